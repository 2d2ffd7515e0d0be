"""Find the global average pooling and the linear layer that end a network.

The calls of one forward pass are recorded, and followed back from the logits.
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
    """One torch function: its name, what it gave (weakly unless CAM may need it), and
    its arguments in that case.
    """

    name: str
    result: Any
    args: tuple
    kwargs: dict

    def gave(self, tensor: Tensor) -> bool:
        return (
            self.result() if isinstance(self.result, weakref.ref) else self.result
        ) is tensor


# What only rearranges, copies or converts numbers in eval mode.
_PASSING = {
    "flatten",
    "view",
    "view_as",
    "reshape",
    "reshape_as",
    "squeeze",
    "unsqueeze",
    "getitem",
    "contiguous",
    "clone",
    "detach",
    "dropout",
    "dropout1d",
    "dropout2d",
    "feature_dropout",
    "alpha_dropout",
    "to",
    "float",
    "double",
    "type",
    "type_as",
    "permute",
    "transpose",
    "ravel",
    "unflatten",
    "identity",
    "alias",
}
_POOLING = {"adaptive_avg_pool2d", "avg_pool2d", "mean", "sum"}


class _Calls(TorchFunctionMode):
    """Remembers the last torch functions of this thread, enough of them to lead from
    the logits to the pooling.
    """

    def __init__(self):
        super().__init__()
        self.last: deque[_Call] = deque(maxlen=24)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            name = getattr(func, "__name__", "").partition(".")[0].strip("_")
            kept = name in _PASSING or name in _POOLING or name == "linear"
            # after pooling it is a linear layer; before, its maps would only fill
            # memory
            if name == "conv2d":
                kept = result.shape[-2:] == (1, 1)
            self.last.append(
                _Call(
                    name,
                    result if kept else weakref.ref(result),
                    args if kept else (),
                    kwargs if kept else {},
                )
            )
        return result


class _Head(NamedTuple):
    """The end of a network: what is pooled, (N, C, h, w), how many cells it sums, and
    the layer after it.
    """

    features: Tensor
    cells: int  # 1 where the pooling averages
    weight: Tensor | None
    bias: Tensor | None


def _refuse(found: str) -> NoReturn:
    raise ValueError(
        "CAM needs a network that ends in global average pooling of a feature map"
        " and one linear layer, with nothing between them that changes numbers;"
        f" here {found}. Grad-CAM needs none of this: grad_cam(model, images, layer)"
    )


def _find_head(calls: deque[_Call], logits: Tensor) -> _Head:
    """Follow the logits back to what was pooled."""
    calls, weight, bias, what = calls.copy(), None, None, "the logits come"
    call = _source(calls, logits, what)
    if call.name in ("linear", "conv2d"):
        pooled, weight, bias = _linear(*call.args, **call.kwargs)
        what = "what goes into the last linear layer comes"
        call = _source(calls, pooled, what)
    if call.name not in _POOLING:
        _refuse(f"{what} from {call.name}")
    head = _Head(*_pooled(calls, call), weight, bias)
    channels, classes = head.features.shape[1], logits.shape[1]
    if weight is not None and weight.shape != (classes, channels):
        _refuse(
            f"{channels} channels are pooled and the last layer's weight"
            f" is {tuple(weight.shape)}"
        )
    return head


def _source(calls: deque[_Call], tensor: Tensor, what: str) -> _Call:
    """Find the call that made a tensor's numbers, and drop it and all later ones."""
    while calls:
        call = calls.pop()
        if call.gave(tensor):
            if call.name not in _PASSING:
                return call
            tensor = call.args[0] if call.args else call.kwargs["input"]
    _refuse(f"{what} from something other than a torch function")


def _linear(input, weight, bias=None, *_, **__):
    return input, weight.flatten(1), bias


def _pooled(calls: deque[_Call], call: _Call) -> tuple[Tensor, int]:
    """Say what a pooling pools, as (N, C, h, w), and over how many cells it sums (1: it
    averages).
    """
    x, axes, cells = _axes(call)
    # one axis of space went before, or both were flattened into one
    if x.ndim == 3 and axes == {2}:
        while calls:
            earlier = calls.pop()
            if not earlier.gave(x):
                continue
            if earlier.name in ("mean", "sum"):
                before, earlier_axes, earlier_cells = _axes(earlier)
                if before.ndim == 4 and earlier_axes in ({2}, {3}):
                    return before, cells * earlier_cells
            elif (
                earlier.name in _PASSING
                and isinstance(before := earlier.args[0], Tensor)
                and before.ndim == 4
            ):
                if before.flatten(2).shape == x.shape:
                    return before, cells
            break
    if x.ndim == 4 and axes == {2, 3}:
        return x, cells
    if x.ndim == 4 and axes == {1, 2}:  # (N, h, w, C)
        return x.permute(0, 3, 1, 2), cells
    if x.ndim == 3 and axes == {1}:
        _refuse("tokens are pooled, which have no (h, w)")
    _refuse(f"{call.name} turns {tuple(x.shape)} into {tuple(call.result.shape)}")


def _axes(call: _Call) -> tuple[Tensor, set[int], int]:
    """Say what a pooling takes, the axes that it reduces to one number, and over how
    many cells it sums.
    """

    def reduced(input, dim=None, keepdim=False, *_, **__):
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

    def windowed(input, *_, **__):
        axes = {
            axis
            for axis in (2, 3)
            if call.result.ndim == 4 and call.result.shape[axis] == 1
        }
        return input, axes, 1

    return (reduced if call.name in ("mean", "sum") else windowed)(
        *call.args, **call.kwargs
    )


def _check_average(head: _Head, logits: Tensor) -> None:
    """Refuse unless the maps' mean over space is the logits without their bias, in this
    very run.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pooled = head.features.mean((2, 3), dtype=dtype) * head.cells
    expected, size = pooled, pooled.abs()
    if head.weight is not None:
        weight = head.weight.to(dtype)
        with override_autocast(enabled=False):
            expected, size = pooled @ weight.T, pooled.abs() @ weight.abs().T
    if head.bias is not None:
        expected, size = expected + head.bias, size + head.bias.abs()
    if expected.shape != logits.shape:
        _refuse(
            f"the pooling leads to {tuple(expected.shape)} and the logits"
            f" are {tuple(logits.shape)}"
        )
    # Another structure is off by as much as the terms themselves; rounding is far below
    # that.
    rounding = (
        0.05
        if torch.finfo(logits.dtype).bits == 16
        or torch.finfo(head.features.dtype).bits == 16
        else 1e-3
    )
    if has_values(logits) and not bool(
        ((expected - logits).abs() <= rounding * size.amax()).all()
    ):
        _refuse(
            "the maps do not average to the logits:"
            " something else changes the numbers on the way"
        )
