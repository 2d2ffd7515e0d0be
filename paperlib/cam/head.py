"""Find the global average pooling and the linear layer that end a network.

The torch functions of one forward pass are recorded and followed back from the logits.
"""

import math
import weakref
from collections import deque
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paperlib.inference import override_autocast
from paperlib.validation import has_values


class _Call(NamedTuple):
    """A call of a torch function: name, result, arguments.

    Calls that CAM cannot use hold a weak reference to the result and no arguments.
    """

    name: str
    result: Any
    args: tuple
    kwargs: dict

    def returned(self, tensor: Tensor) -> bool:
        return (
            self.result() if isinstance(self.result, weakref.ref) else self.result
        ) is tensor


# Functions that only rearrange, copy or convert numbers in eval mode.
_PASSING = frozenset(
    "flatten view view_as reshape reshape_as squeeze unsqueeze getitem contiguous clone"
    " detach dropout dropout1d dropout2d feature_dropout alpha_dropout to float double"
    " type type_as permute transpose ravel unflatten identity alias".split()
)
_POOLING = {"adaptive_avg_pool2d", "avg_pool2d", "mean", "sum"}


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
            is_needed = name in _PASSING or name in _POOLING or name == "linear"
            # After the pooling it is a linear layer; before it, its maps would only
            # fill memory.
            if name == "conv2d":
                is_needed = result.shape[-2:] == (1, 1)
            self.last.append(
                _Call(
                    name,
                    result if is_needed else weakref.ref(result),
                    args if is_needed else (),
                    kwargs if is_needed else {},
                )
            )
        return result


class _Head(NamedTuple):
    """The end of a network: the pooled feature map (N, C, h, w) and linear layer."""

    features: Tensor
    divisor: int  # positions that a sum pooling adds up; 1 where it averages
    weight: Tensor | None
    bias: Tensor | None


def _raise_unsupported(reason: str) -> NoReturn:
    raise ValueError(
        "CAM needs a network that ends in global average pooling of a feature map"
        " and one linear layer, with nothing between them that changes numbers; here"
        f" {reason}. Grad-CAM has no such restriction: grad_cam(model, images, layer)"
    )


def _find_head(calls: deque[_Call], logits: Tensor) -> _Head:
    """Follow the logits back to the pooled feature map."""
    calls, weight, bias, what = calls.copy(), None, None, "the logits are"
    call = _source(calls, logits, what)
    if call.name in ("linear", "conv2d"):
        pooled, weight, bias = _linear_arguments(*call.args, **call.kwargs)
        what = "the input of the last linear layer is"
        call = _source(calls, pooled, what)
    if call.name not in _POOLING:
        _raise_unsupported(f"{what} the output of {call.name}")
    head = _Head(*_find_pooled(calls, call), weight, bias)
    channels, classes = head.features.shape[1], logits.shape[1]
    if weight is not None and weight.shape != (classes, channels):
        _raise_unsupported(
            f"{channels} channels are pooled and the last layer's weight"
            f" is {tuple(weight.shape)}"
        )
    return head


def _source(calls: deque[_Call], tensor: Tensor, what: str) -> _Call:
    """Find the call that computed a tensor, and drop it and all later ones."""
    while calls:
        call = calls.pop()
        if call.returned(tensor):
            if call.name not in _PASSING:
                return call
            tensor = call.args[0] if call.args else call.kwargs["input"]
    _raise_unsupported(f"{what} the output of something other than a torch function")


def _linear_arguments(input, weight, bias=None, *_, **__):
    return input, weight.flatten(1), bias


def _find_pooled(calls: deque[_Call], call: _Call) -> tuple[Tensor, int]:
    """Return a pooling's feature map (N, C, h, w), and the divisor if it sums."""
    x, axes, divisor = _axes(call)
    # One spatial axis was reduced before, or both were flattened into one.
    if x.ndim == 3 and axes == {2}:
        while calls:
            earlier = calls.pop()
            if not earlier.returned(x):
                continue
            if earlier.name in ("mean", "sum"):
                features, earlier_axes, earlier_divisor = _axes(earlier)
                if features.ndim == 4 and earlier_axes in ({2}, {3}):
                    return features, divisor * earlier_divisor
            elif (
                earlier.name in _PASSING
                and isinstance(features := earlier.args[0], Tensor)
                and features.ndim == 4
            ):
                if features.flatten(2).shape == x.shape:
                    return features, divisor
            break
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
    """Return a pooling's input, the axes that it reduces, and the divisor of a sum."""

    def reduction_axes(input, dim=None, keepdim=False, *_, **__):
        dims = (
            range(input.ndim)
            if dim is None
            else (dim,)
            if isinstance(dim, int)
            else tuple(dim)
        )
        axes = {axis % input.ndim for axis in dims}
        summed = call.name == "sum"
        return (
            input,
            axes,
            math.prod(input.shape[axis] for axis in axes) if summed else 1,
        )

    def window_axes(input, *_, **__):
        axes = {
            axis
            for axis in (2, 3)
            if call.result.ndim == 4 and call.result.shape[axis] == 1
        }
        return input, axes, 1

    return (reduction_axes if call.name in ("mean", "sum") else window_axes)(
        *call.args, **call.kwargs
    )


def _check_average(head: _Head, logits: Tensor) -> None:
    """Raise unless the maps of this run average to the logits without their bias."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pooled = head.features.mean((2, 3), dtype=dtype) * head.divisor
    expected, size = pooled, pooled.abs()
    if head.weight is not None:
        weight = head.weight.to(dtype)
        with override_autocast(enabled=False):
            expected, size = pooled @ weight.T, pooled.abs() @ weight.abs().T
    if head.bias is not None:
        expected, size = expected + head.bias, size + head.bias.abs()
    if expected.shape != logits.shape:
        _raise_unsupported(
            f"the pooling leads to {tuple(expected.shape)} and the logits"
            f" are {tuple(logits.shape)}"
        )
    # For another structure the difference is as large as the terms themselves; rounding
    # is far smaller.
    rounding = (
        0.05
        if torch.finfo(logits.dtype).bits == 16
        or torch.finfo(head.features.dtype).bits == 16
        else 1e-3
    )
    if has_values(logits) and not bool(
        ((expected - logits).abs() <= rounding * size.amax()).all()
    ):
        _raise_unsupported(
            "the maps do not average to the logits:"
            " another operation changes the numbers"
        )
