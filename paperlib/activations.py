"""Record the outputs of layers while a network runs, and leave no hook behind.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from paperlib.activations import record_activations
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> with record_activations(model, "0", "2") as outputs:
    ...     _ = model(torch.rand(1, 3, 16, 16))
    >>> {name: tuple(output.shape) for name, output in outputs.items()}
    {'0': (1, 8, 14, 14), '2': (1, 4, 12, 12)}
"""

import difflib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from paperlib.guided_relu import GuidedReLU, guided_relu
from paperlib.inference import hook_in_this_thread, raise_if_hidden, without_compiler

__all__ = ["record_activations", "guided_relu", "find_layer", "Layer", "GuidedReLU"]


@contextmanager
def record_activations(
    model: nn.Module, *layers: nn.Module | str
) -> Iterator[dict[nn.Module | str, Tensor]]:
    """Record the outputs of layers while the model runs inside the `with` block.

    The model continues with a copy, so that an in-place operation after a layer (for
    example a ReLU after batch norm) does not overwrite the record. Records stay in the
    autograd graph: `torch.autograd.grad` reaches them. Only calls of the thread that
    entered the block are recorded. The hooks are removed when the block ends, also
    after an exception.

    Args:
        model: any network that is neither a ScriptModule nor an nn.DataParallel over
            several devices.
        layers: modules of the model, or their dotted names.

    Yields:
        a dictionary that maps each entry of `layers` to its output. A layer that runs
        several times is recorded at its last call; a layer that did not run in this
        thread is missing.

    Raises:
        ValueError: for an unknown name (with the closest names), a module of another
            model, a ScriptModule, a layer inside an nn.DataParallel over several
            devices, or a layer that returns something other than a tensor.

    Example:
        >>> import torch
        >>> from paperlib import backbones
        >>> from paperlib.activations import record_activations
        >>> model = backbones.load("efficientnet_lite0").model
        >>> with torch.no_grad(), record_activations(model, "conv_head") as records:
        ...     logits = model(torch.zeros(1, 3, 64, 64))
        >>> records["conv_head"].shape
        torch.Size([1, 1280, 2, 2])
    """
    records: dict[nn.Module | str, Tensor] = {}

    def record(layer, name, output):
        # Two copies: nn.Identity returns its input, and the network may change both in
        # place.
        records[layer] = feature_map(name, output).clone()
        return records[layer].clone()

    modules = [(layer, *find_layer(model, layer)) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(without_compiler())
        for layer, module, name in modules:
            stack.enter_context(on_output(module, partial(record, layer, name)))
        yield records


# ---- layers and hooks, shared by CAM, Grad-CAM and feature extractors ----


class Layer(NamedTuple):
    """A layer of a model: the module and its dotted name."""

    module: nn.Module
    name: str


def find_layer(model: nn.Module, layer: nn.Module | str) -> Layer:
    """Find a layer of a model by its dotted name or as a module.

    Raises:
        ValueError: for an unknown name (with the closest names), a module of another
            model, a ScriptModule, or a layer inside an nn.DataParallel over several
            devices.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, str):
        # torch.compile and DataParallel wrap the network in a module; the names of its
        # layers remain valid.
        names = [
            name
            for name in (layer, f"_orig_mod.{layer}", f"module.{layer}")
            if name and name in modules
        ]
    else:
        names = [name for name, module in modules.items() if module is layer]
    if not names:
        raise ValueError(_unknown_layer(model, layer, list(modules)[1:]))
    name = names[0]
    for prefix, module in modules.items():
        if not prefix or f"{name}.".startswith(f"{prefix}."):
            raise_if_hidden(module, f"layer {prefix!r}" if prefix else "the model")
    return Layer(modules[name], name)


def _unknown_layer(model: nn.Module, layer: nn.Module | str, names: list[str]) -> str:
    """Describe the error, with the closest of the model's names."""
    if not isinstance(layer, str):
        return (
            f"the layer, a {type(layer).__name__}, is not part of this model;"
            " pass one of its modules, or a dotted name"
        )
    top_level = [name for name in names if "." not in name][:8]
    close = difflib.get_close_matches(layer, names, n=3, cutoff=0.5) or top_level
    return (
        f"no layer {layer!r} in this {type(model).__name__};"
        f" did you mean one of: {', '.join(close)}?"
    )


def feature_map(name: str, output: Any) -> Tensor:
    """Return a layer's output if it is a tensor.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"layer {name!r} returns a {type(output).__name__}; expected a tensor."
            " Choose a layer inside it"
        )
    return output


def spatial_map(
    name: str, output: Any, images: Float[Tensor, "n c height width"]
) -> Float[Tensor, "n channels h w"]:
    """Return a layer's output if it is a batch of feature maps (N, C, h, w).

    Args:
        name: of the layer.
        output: of the layer.
        images: (N, C, H, W), the input of the network.

    Raises:
        ValueError: for anything else, such as token maps and channels-last maps.
    """
    output, (n, _, height, width) = feature_map(name, output), images.shape
    description = f"layer {name!r} returns {tuple(output.shape)}"
    if output.ndim == 3:
        raise ValueError(
            f"{description}, the token map of a transformer:"
            " it has no spatial axes (h, w). Choose a layer that returns (N, C, h, w)"
        )
    if output.ndim != 4 or len(output) != n or output.numel() == 0:
        raise ValueError(
            f"{description} for {n} image{'s' * (n != 1)}; expected ({n}, C, h, w)."
            " Choose a convolutional layer"
        )
    if not output.is_floating_point():
        raise ValueError(
            f"{description} of dtype {output.dtype}; expected floating point"
        )
    # Channels-last outputs would return a wrong map without an error. They are
    # recognised by the shape: the first two axes have the image's proportions, the last
    # two do not, and the last is the longest.
    a, b, c = output.shape[1:]
    first_error, last_error = abs(a * width - b * height), abs(b * width - c * height)
    if first_error <= max(height, width) < last_error and c > max(a, b):
        raise ValueError(
            f"{description}, which for images of {height}×{width} is (N, h, w, C):"
            " channels last. Choose a layer that returns (N, C, h, w),"
            " for example the one that permutes the axes before pooling"
        )
    return output


def raise_unless_ran(name: str, ran: bool, other_threads: list[int]) -> None:
    """Raise ValueError for a layer that did not run in the calling thread.

    Args:
        name: of the layer.
        ran: whether it did.
        other_threads: in which it ran, from `on_output`.
    """
    if not ran and other_threads:
        raise ValueError(
            f"layer {name!r} ran only in other threads, where hooks of the calling"
            " thread do not act: the model starts threads of its own. Use a model that"
            " runs in the calling thread"
        )
    if not ran:
        raise ValueError(
            f"layer {name!r} did not run: the model does not use it in eval mode,"
            " or calls its parts but not it. Choose a layer inside or after it"
        )


def on_output(
    module: nn.Module, act: Callable[[Any], Any]
) -> AbstractContextManager[list[int]]:
    """Call `act` on a module's output in a `with` block, in this thread only.

    What `act` returns replaces the output, unless it is None.

    Returns:
        a context manager that yields a list, to which every call of the module in
        another thread appends that thread's identifier.
    """
    return hook_in_this_thread(
        module.register_forward_hook, lambda module, inputs, output: act(output)
    )
