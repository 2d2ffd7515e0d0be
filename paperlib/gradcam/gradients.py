"""Gradients of class scores with respect to layers and images.

The model is restored: no hook, mode, `.grad` or buffer changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from paperlib.activations import (
    Layer,
    Layout,
    Reshape,
    on_output_with_layout,
    raise_unless_ran,
    spatial_map,
)
from paperlib.gradcam.inputs import Inputs
from paperlib.inference import (
    ModelFailed,
    autocast_dtypes,
    differentiable,
    inference_state,
    map_tensors,
    override_autocast,
)
from paperlib.precision import at_least_float32
from paperlib.validation import ClassTargets, has_values, target_classes

# Classes, or a function of the model's output that returns N scores
Targets = ClassTargets | Callable[[Any], Tensor]
# Factors of scores in float16 networks. Gradients above 65,504 overflow in float16, and
# gradients below 6e-5 lose digits, so the largest factor without overflow is best.
_FLOAT16_SCALES = tuple(2.0**exponent for exponent in range(23, -18, -8))


@contextmanager
def _gradient_state(model: nn.Module) -> Iterator[None]:
    """Prepare model and torch for a gradient."""
    with inference_state(model), differentiable(model), torch.enable_grad():
        if any(
            tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())
        ):
            raise ValueError(
                "the model was created inside torch.inference_mode(),"
                " and torch computes no gradient through its tensors;"
                " create or load it outside, or pass copy.deepcopy(model)"
            )
        yield


# ---- forward pass ----


class _Record(NamedTuple):
    """A layer's output at the call that counts."""

    name: str
    output: Any
    layout: Layout | None
    autocast: list[torch.dtype]

    @property
    def sources(self) -> list[Tensor]:
        """The tensors of the output that have a gradient."""
        tensors: list[Tensor] = []
        map_tensors(self.output, tensors.append)
        return [tensor for tensor in tensors if tensor.requires_grad]

    def activations(self, images: Tensor, reshape: Reshape | None) -> Tensor:
        """Return the feature maps, detached."""
        output = map_tensors(self.output, Tensor.detach)
        return spatial_map(self.name, output, images, reshape, self.layout)

    def gradient(
        self, gradients: Iterator[Tensor | None], reshape: Reshape | None
    ) -> Tensor:
        """Return the gradient of the feature maps, from those of the sources."""
        received = [next(gradients) for _ in self.sources]
        if all(gradient is None for gradient in received):
            _raise_unreached(f"layer {self.name!r}")
        remaining = iter(received)

        def gradient_of(tensor: Tensor) -> Tensor:
            gradient = next(remaining) if tensor.requires_grad else None
            return torch.zeros_like(tensor) if gradient is None else gradient

        output = map_tensors(self.output, gradient_of)
        return reshape(output) if reshape else output


@contextmanager
def _recorded(
    layers: Sequence[Layer], call: int, copy: Callable[[Tensor], Tensor]
) -> Iterator[list[_Record]]:
    """Record a copy of each layer's output; the network continues with another.

    So in-place operations before and after a layer do not change the record. Raises
    ValueError at the end of the block for a layer without such a call in this thread.
    """
    if not isinstance(call, int):
        raise ValueError(f"call={call!r}; expected an integer, -1 for the last call")
    calls: list[list[_Record]] = [[] for _ in layers]
    counts = [0] * len(layers)

    def record(i, output, layout):
        counts[i] += 1
        if call >= 0 and counts[i] != call + 1:
            return None
        autocast = autocast_dtypes()
        copied = map_tensors(output, copy)
        calls[i].append(_Record(layers[i].name, copied, layout, autocast))
        if call < 0:
            del calls[i][:call]
        return map_tensors(copied, Tensor.clone)

    records: list[_Record] = []
    with ExitStack() as stack:
        other_threads = [
            stack.enter_context(on_output_with_layout(module, partial(record, i)))
            for i, (module, _) in enumerate(layers)
        ]
        yield records
    for layer, count, kept, threads in zip(
        layers, counts, calls, other_threads, strict=True
    ):
        raise_unless_ran(layer.name, count > 0, threads)
        if len(kept) < max(1, -call):
            raise ValueError(
                f"layer {layer.name!r} ran {count} time{'s' * (count != 1)}, and"
                f" call={call}; expected {-count} to {count - 1}"
            )
        records.append(kept[0])


def _run_from_layers(
    model: nn.Module, inputs: Inputs, layers: Sequence[Layer], call: int
) -> tuple[Any, list[_Record]]:
    """Run the network; the graph starts at the layers."""

    def start_graph(tensor: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        # Another layer or call before this one needs the graph between them.
        is_needed = tensor.requires_grad and (len(layers) > 1 or call < -1)
        if is_needed or not tensor.is_floating_point():
            return tensor.clone()
        return tensor.detach().clone().requires_grad_()

    for grad_mode in (torch.no_grad, torch.enable_grad):
        with grad_mode(), _recorded(layers, call, start_graph) as records:
            output = inputs.run(model, inputs.explained)
            is_graph_whole = torch.is_grad_enabled()
        # A part of the network around the layer set the gradient mode and restored
        # no_grad, which ended the graph. The second run has nothing to restore.
        if is_graph_whole:
            break
    return output, records


def _scores(output: Any, targets: Targets, n: int) -> tuple[Tensor, Tensor | None]:
    """Select the scores to explain, (N,) or (N, T), and their classes."""
    if not callable(targets):
        classes = target_classes(targets, output, n)
        return output.gather(1, classes.view(n, -1)).view(classes.shape), classes
    scores = targets(output)
    if (
        not isinstance(scores, Tensor)
        or scores.shape != (n,)
        or not scores.is_floating_point()
    ):
        received = (
            f"{tuple(scores.shape)} of {scores.dtype}"
            if isinstance(scores, Tensor)
            else f"a {type(scores).__name__}"
        )
        raise ValueError(
            f"the function given as targets returned {received};"
            f" expected a floating-point tensor ({n},)"
        )
    return scores, None


# ---- backward pass ----


def _uses_float16(
    model: nn.Module, tensors: Sequence[Tensor], records: Sequence[_Record] = ()
) -> bool:
    """Return whether gradients may pass through float16."""
    autocast = autocast_dtypes() + sum((record.autocast for record in records), [])
    sources = sum((record.sources for record in records), [])
    all_tensors = (*model.parameters(), *model.buffers(), *tensors, *sources)
    return torch.float16 in {*autocast, *(tensor.dtype for tensor in all_tensors)}


def _gradients(
    scores: Tensor,
    sources: Sequence[Tensor],
    pool: Callable[[Sequence[Tensor | None]], list[Tensor]],
    *,
    uses_float16: bool,
    retain_graph: bool = False,
) -> list[Tensor]:
    """Differentiate the scores by `sources`; rows of T scores add an axis T after N.

    Args:
        scores: (N,) or (N, T).
        sources: in the graph of the scores.
        pool: applied to the gradients of each target; None marks a source that the
            scores do not depend on.
        uses_float16: scale the scores.
        retain_graph: do not free the graph.
    """
    columns = scores.unbind(1) if scores.ndim == 2 else (scores,)
    differentiate = _differentiate_float16 if uses_float16 else _differentiate
    pooled = []
    for i, column in enumerate(columns):
        gradients: Sequence[Tensor | None] = [None] * len(sources)
        if scores.requires_grad and sources:
            retain = retain_graph or i + 1 < len(columns)
            with override_autocast(enabled=False):
                gradients = differentiate(column, sources, retain)
        pooled.append(pool(gradients))
    if scores.ndim == 1:
        return pooled[0]
    return [torch.stack(parts, 1) for parts in zip(*pooled, strict=True)]


def _differentiate(
    scores: Tensor, sources: Sequence[Tensor], retain_graph: bool, scale: float = 1.0
) -> Sequence[Tensor | None]:
    """Compute the gradients of scale·scores; None where they do not depend on it."""
    try:
        return torch.autograd.grad(
            scores,
            sources,
            torch.full_like(scores, scale),
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelFailed(
            "torch can't compute a gradient through this model; explain a layer after"
            f" the part that it names: {error}"
        ) from error


def _differentiate_float16(
    scores: Tensor, sources: Sequence[Tensor], retain_graph: bool
) -> Sequence[Tensor | None]:
    """Compute the gradients in float32, scaled in the network by a power of two."""
    for scale in _FLOAT16_SCALES:
        if scale > torch.finfo(scores.dtype).max:
            continue
        gradients = _differentiate(scores, sources, True, scale)
        known = [gradient for gradient in gradients if gradient is not None]
        if all(not has_values(x) or bool(x.isfinite().all()) for x in known):
            break
    return [
        None if x is None else x.to(at_least_float32(x.dtype)) / scale
        for x in gradients
    ]


def _mean_over_space(gradient: Tensor) -> Tensor:
    """Average over the spatial axes."""
    # Half precision is too coarse for a mean over thousands of positions.
    dtype = at_least_float32(gradient.dtype)
    return gradient.mean(tuple(range(2, gradient.ndim)), dtype=dtype)


def _raise_unreached(what: str) -> NoReturn:
    raise ValueError(
        f"the score does not depend on {what}, or the model has no gradient there"
        " (no_grad, inference_mode, detach, argmax, rounding);"
        " explain another score or another layer"
    )
