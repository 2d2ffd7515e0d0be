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

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paperlib.guided_relu import GuidedReLU, guided_relu
from paperlib.inference import hook_in_this_thread, raise_if_hidden, without_compiler
from paperlib.validation import check_module

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
        if not isinstance(output, Tensor):
            raise ValueError(_not_a_tensor(name, output))
        # Two copies: nn.Identity returns its input, and the network may change both in
        # place.
        records[layer] = output.clone()
        return records[layer].clone()

    modules = [(layer, *find_layer(model, layer)) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(without_compiler())
        for layer, module, name in modules:
            stack.enter_context(on_output(module, partial(record, layer, name)))
        yield records


# ---- layers and hooks, shared by CAM, Grad-CAM and feature extractors ----

# A function from a layer's output to feature maps (N, C, *spatial)
Reshape = Callable[[Any], Tensor]
_AXES = {3: "l", 4: "h, w", 5: "d, h, w"}  # number of axes: the spatial ones
_RESHAPE_HINT = (
    "reshape=<function from the layer's output to (N, C, *spatial)>, for example"
    " lambda x: x.movedim(-1, 1) for channels last,"
    " or lambda x: x[:, 1:].mT.unflatten(2, (14, 14)) for a class token and 14×14"
    " tokens"
)


class Layer(NamedTuple):
    """A layer of a model: the module and its dotted name."""

    module: nn.Module
    name: str


class Layout(NamedTuple):
    """Where the last function of a layer that fixes a layout put the channels."""

    is_channels_last: bool
    shape: torch.Size


def find_layer(model: nn.Module, layer: nn.Module | str) -> Layer:
    """Find a layer of a model by its dotted name or as a module.

    Raises:
        ValueError: for an unknown name (with the closest names), a module of another
            model, a ScriptModule, or a layer inside an nn.DataParallel over several
            devices.
    """
    check_module(model)
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


def _not_a_tensor(name: str, output: Any) -> str:
    return (
        f"layer {name!r} returns a {type(output).__name__}; expected a tensor."
        " Choose a layer inside it"
    )


def spatial_map(
    name: str,
    output: Any,
    images: Num[Tensor, " n *axes"],
    reshape: Reshape | None = None,
    layout: Layout | None = None,
) -> Float[Tensor, "n channels *spatial"]:
    """Return a layer's output if it is a batch `(N, C, *spatial)`.

    Args:
        name: of the layer.
        output: of the layer.
        images: `(N, C, *spatial)`, the input of the network.
        reshape: applied to the output first.
        layout: of the output, from `on_output_with_layout`; None if unknown.

    Raises:
        ValueError: for anything else, such as token maps and channels-last maps.
    """
    if reshape is not None:
        output = _reshape(name, output, reshape)
    elif isinstance(output, Tensor):
        _check_layout(name, output, images, layout)
    else:
        raise ValueError(f"{_not_a_tensor(name, output)}, or pass {_RESHAPE_HINT}")
    n, received = images.shape[0], "after reshape=" if reshape else "returns"
    description = f"layer {name!r} {received} {tuple(output.shape)}"
    if output.ndim not in _AXES or output.shape[0] != n or 0 in output.shape:
        raise ValueError(
            f"{description} for {n} image{'s' * (n != 1)};"
            f" expected ({n}, C, {_AXES.get(images.ndim, '*spatial')})."
            f" Choose a convolutional layer, or pass {_RESHAPE_HINT}"
        )
    if not output.is_floating_point():
        raise ValueError(
            f"{description} of dtype {output.dtype}; expected floating point"
        )
    return output


def _reshape(name: str, output: Any, reshape: Reshape) -> Tensor:
    """Apply the user's function to a layer's output."""
    received = f"reshape= for the output of layer {name!r}, " + (
        f"a tensor {tuple(output.shape)}"
        if isinstance(output, Tensor)
        else f"a {type(output).__name__}"
    )
    try:
        result = reshape(output)
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{received}, raises {type(error).__name__}: {error}. Pass {_RESHAPE_HINT}"
        ) from error
    if not isinstance(result, Tensor):
        raise ValueError(
            f"{received}, returns a {type(result).__name__}; expected a tensor."
            f" Pass {_RESHAPE_HINT}"
        )
    return result


def _check_layout(
    name: str, output: Tensor, images: Tensor, layout: Layout | None
) -> None:
    """Raise ValueError for channels-last maps and for tokens."""
    shape = tuple(output.shape)
    if (
        layout is not None
        and layout.is_channels_last
        and layout.shape[-1:] == shape[-1:]
        and layout.shape.numel() == output.numel()
        and output.ndim in _AXES
    ):
        raise ValueError(
            f"layer {name!r} returns {shape} as its last linear layer or layer norm"
            " computed it: tokens, or maps with channels last. Expected"
            f" ({len(images)}, C, *spatial): pass {_RESHAPE_HINT},"
            " or choose the layer that permutes the axes before pooling"
        )
    is_conv1d = layout is not None and len(layout.shape) == 3
    if output.ndim == 3 < images.ndim and not is_conv1d:
        raise ValueError(
            f"layer {name!r} returns {shape}, the token map of a transformer, or a map"
            f" with one spatial axis for images with {images.ndim - 2}:"
            f" pass {_RESHAPE_HINT}"
        )


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


@contextmanager
def on_output_with_layout(
    module: nn.Module, act: Callable[[Any, Layout | None], Any]
) -> Iterator[list[int]]:
    """Call `act` on a module's output and its layout, as `on_output` does.

    The layout is that of the last linear layer, layer norm, embedding or convolution
    that ran inside the module; None if there is none, or if its last axis was moved.
    """
    watches: list[_LayoutWatch] = []

    def start(*_):
        watches.append(_LayoutWatch())
        watches[-1].__enter__()

    def finish(output):
        watch = watches.pop() if watches else None
        if watch:
            watch.__exit__(None, None, None)
        return act(output, watch and watch.layout)

    is_watched = any(isinstance(part, _WATCHED) for part in module.modules())
    with ExitStack() as stack:
        if is_watched:
            register = module.register_forward_pre_hook
            stack.enter_context(hook_in_this_thread(register, start))
        try:
            yield stack.enter_context(on_output(module, finish))
        finally:  # of calls that raised an exception
            while watches:
                watches.pop().__exit__(None, None, None)


class _LayoutWatch(TorchFunctionMode):
    """Notes the layout of the last function of this thread that fixes one."""

    layout: Layout | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # An exported network calls linear.default.
        name = getattr(func, "__name__", "").partition(".")[0]
        output = result[0] if isinstance(result, tuple) and result else result
        if name in _FIXED_LAYOUTS:
            self.layout = Layout(_FIXED_LAYOUTS[name], output.shape)
        elif name in _AXES_MOVED and args:
            last_axis = args[0].shape[-1:], args[0].stride()[-1:]
            if last_axis != (output.shape[-1:], output.stride()[-1:]):
                self.layout = None
        return result


# Modules whose functions are watched; other layers cost nothing.
_WATCHED = nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.Conv1d
_FIXED_LAYOUTS = dict.fromkeys(
    "linear layer_norm rms_norm embedding multi_head_attention_forward"
    " lstm gru rnn_tanh rnn_relu".split(),
    True,
) | dict.fromkeys("conv1d conv2d conv3d batch_norm group_norm".split(), False)
_AXES_MOVED = frozenset("permute transpose movedim moveaxis swapaxes swapdims".split())
