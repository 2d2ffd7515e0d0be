"""Find the global average pooling and the linear layer that end a network.

The torch functions of one forward pass are recorded and followed back from the logits.
"""

import math
import weakref
from collections import deque
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paperlib.inference import override_autocast
from paperlib.precision import at_least_float32
from paperlib.validation import has_values


class _Call(NamedTuple):
    """A call of a torch function: name, result, arguments.

    Calls that CAM cannot use hold a weak reference to the result, and nothing else.
    """

    name: str
    reference: weakref.ref
    result: Tensor | None
    args: tuple
    kwargs: dict

    @property
    def input(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["input"]


# Functions that only rearrange, copy or convert numbers in eval mode.
_PASSING = frozenset(
    "flatten view view_as reshape reshape_as squeeze unsqueeze getitem contiguous clone"
    " detach dropout dropout1d dropout2d feature_dropout alpha_dropout to float double"
    " type type_as permute transpose ravel unflatten identity alias".split()
)
_POOLING = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "mean", "sum"})


class _CallRecorder(TorchFunctionMode):
    """Records the last torch functions of this thread: enough to reach the pooling."""

    def __init__(self):
        super().__init__()
        self.last: deque[_Call] = deque(maxlen=24)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            name = getattr(func, "__name__", "").partition(".")[0].strip("_")
            # A 1×1 convolution is a linear layer after the pooling; before it, its maps
            # would only fill memory.
            is_needed = (
                name in _PASSING
                or name in _POOLING
                or name == "linear"
                or (name == "conv2d" and result.shape[-2:] == (1, 1))
            )
            contents = (result, args, kwargs) if is_needed else (None, (), {})
            self.last.append(_Call(name, weakref.ref(result), *contents))
        return result


class _Head(NamedTuple):
    """The end of a network: the pooled feature map (N, C, h, w) and linear layer."""

    features: Tensor
    divisor: int  # positions that a sum pooling adds up; 1 where it averages
    weight: Tensor  # (classes, C); the identity where no linear layer follows
    bias: Tensor  # (classes,); zeros where the linear layer has none


def _raise_unsupported(reason: str) -> NoReturn:
    raise ValueError(
        "CAM needs a network that ends in global average pooling of a feature map"
        " and one linear layer, with nothing between them that changes numbers; here"
        f" {reason}. Grad-CAM has no such restriction: grad_cam(model, images, layer)"
    )


def _find_head(calls: deque[_Call], logits: Tensor) -> _Head:
    """Follow the logits back to the pooled feature map."""
    calls, linear, what = calls.copy(), None, "the logits are"
    call = _source(calls, logits, what)
    if call.name in ("linear", "conv2d"):
        linear, what = call, "the input of the last linear layer is"
        call = _source(calls, linear.input, what)
    if call.name not in _POOLING:
        _raise_unsupported(f"{what} the output of {call.name}")
    features, divisor = _find_pooled(calls, call)
    channels, classes = features.shape[1], logits.shape[1]
    if linear is None:
        weight, bias = torch.eye(classes, channels).to(features), None
    else:
        weight, bias = _parameters(*linear.args, **linear.kwargs)
    if weight.shape != (classes, channels):
        _raise_unsupported(
            f"{channels} channels are pooled and the last layer's weight"
            f" is {tuple(weight.shape)}"
        )
    bias = weight.new_zeros(classes) if bias is None else bias
    return _Head(features, divisor, weight, bias)


def _parameters(input, weight, bias=None, *_, **__):
    return weight.flatten(1), bias


def _source(calls: deque[_Call], tensor: Tensor, what: str) -> _Call:
    """Find the call that computed a tensor, and drop it and all later ones."""
    while call := _returning(calls, tensor):
        if call.name not in _PASSING:
            return call
        tensor = call.input
    _raise_unsupported(f"{what} the output of something other than a torch function")


def _returning(calls: deque[_Call], tensor: Tensor) -> _Call | None:
    """Find the call that returned a tensor, and drop it and all later ones."""
    while calls:
        call = calls.pop()
        if call.reference() is tensor:
            return call
    return None


def _find_pooled(calls: deque[_Call], call: _Call) -> tuple[Tensor, int]:
    """Return a pooling's feature map (N, C, h, w), and the divisor if it sums."""
    x, axes, divisor = _axes(call)
    if x.ndim == 3 and axes == {2}:
        # Before that, one spatial axis was reduced, or both were flattened into one.
        earlier = _returning(calls, x)
        if earlier is not None and earlier.name in _PASSING | _POOLING:
            features, other_axes, other_divisor = _axes(earlier)
            is_flattened = not other_axes and features.flatten(2).shape == x.shape
            if features.ndim == 4 and (is_flattened or other_axes in ({2}, {3})):
                return features, divisor * other_divisor
    if x.ndim == 4 and axes == {2, 3}:
        return x, divisor
    if x.ndim == 4 and axes == {1, 2}:  # (N, h, w, C)
        return x.permute(0, 3, 1, 2), divisor
    if x.ndim == 3 and axes == {1}:
        _raise_unsupported("tokens are pooled, which have no spatial positions")
    _raise_unsupported(
        f"{call.name} turns {tuple(x.shape)} into {tuple(call.result.shape)}"
    )


def _axes(call: _Call) -> tuple[Tensor, set[int], int]:
    """Return a call's input, the axes that it reduces, and the divisor of a sum."""
    x, shape = call.input, call.result.shape
    if call.name in ("mean", "sum"):
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
        dim = range(x.ndim) if dim is None else dim
        axes = {axis % x.ndim for axis in np.atleast_1d(dim).tolist()}
    else:
        axes = {axis for axis in (2, 3) if len(shape) == 4 and shape[axis] == 1}
    divisor = math.prod(x.shape[axis] for axis in axes) if call.name == "sum" else 1
    return x, axes, divisor


def _check_average(head: _Head, logits: Tensor) -> None:
    """Raise unless the maps of this run average to the logits without their bias."""
    dtype = at_least_float32(logits.dtype)
    pooled = head.features.mean((2, 3), dtype=dtype) * head.divisor
    weight = head.weight.to(dtype)
    with override_autocast(enabled=False):
        expected = pooled @ weight.T + head.bias
        size = pooled.abs() @ weight.T.abs() + head.bias.abs()
    # For another structure the difference is as large as the terms themselves; rounding
    # is far smaller.
    is_half = any(x.dtype.itemsize == 2 for x in (logits, head.features))
    rounding = (0.05 if is_half else 1e-3) * size.amax()
    if expected.shape != logits.shape or (
        has_values(logits) and not ((expected - logits).abs() <= rounding).all()
    ):
        _raise_unsupported(
            "the maps do not average to the logits:"
            " another operation changes the numbers"
        )
