"""CAM: put the weights of the last linear layer back on the feature map that was pooled, and draw boxes around it."""

import math
import weakref
from collections import deque
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paperlib.inference import autocast, raise_if_threaded, undisturbed
from paperlib.validation import check_images, readable, target_classes

LOCALIZATION_THRESHOLD = 0.20  # CAM, Sec. 3.1: share of the map's maximum; the box of the largest region is kept
CODE_REVIEW_THRESHOLD = 0.60  # a common script: share of the maximum after min-max scaling; every 4-connected region


class CAM(NamedTuple):
    """What `cam` found. With T targets an image, maps and targets have an axis T after N.

    Fields:
        maps: (N, h, w), signed, in units of the logit: their mean over space (their sum, where the network
            pools by a sum) is the logit without its bias.
        logits: (N, classes).
        targets: (N,) class indices.
    """

    maps: Tensor
    logits: Tensor
    targets: Tensor


class Box(NamedTuple):
    """A half-open rectangle of cells: rows top to bottom - 1, columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int


def class_activation_map(
    features: Float[Tensor, "n c h w"], weight: Float[Tensor, "classes c"], targets: Int[Tensor, "*n_t"]
) -> Float[Tensor, "*n_t h w"]:
    r"""Weigh the channels of the last feature map by one class's row of the linear layer.

    $$M_c(x, y) = \sum_k w_k^c f_k(x, y)$$   with $f_k$ = `features[:, k]`, $w_k^c$ = `weight[c, k]`.

    Args:
        features: what global average pooling pools.
        weight: of the linear layer that follows the pooling.
        targets: one class an image, or T classes an image for T maps.

    Returns:
        signed maps: no ReLU, no scaling, no bias; float32 where the features are half precision.

    Source: Zhou et al., arXiv:1512.04150, Eq. 2. Departures: none.
    Test: test_cam.py::test_the_map_is_the_weighted_sum_of_channels
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    n, c, h, w = features.shape
    rows = weight[targets].to(dtype).view(n, -1, c)
    with autocast(enabled=False):  # it would take the sum in half precision again
        return (rows @ features.flatten(2).to(dtype)).view(*targets.shape, h, w)


def cam(model: nn.Module, images: Tensor, targets: Any = None) -> CAM:
    """Compute the class activation maps of a network.

    The network must end in global average pooling and one linear layer. It runs once,
    without gradients. Starting from the logits, the operations are followed backwards
    by the identity of tensors: through flattening and dropout to a linear layer or 1×1
    convolution, and to a global pooling; the input of the pooling is the feature map.
    If the logits are the output of the pooling (SqueezeNet), its channels are the maps.
    The function checks on this run that the maps average (or sum) to the logits.

    The model's state, mode and buffers are restored as by `grad_cam`.

    Args:
        model: for example torchvision's ResNet, DenseNet, EfficientNet or Swin, and
            most of timm's convolutional networks.
        images: (N, C, H, W), prepared as the model expects.
        targets: None for the predicted class; one class for all images; N classes; or N
            rows of T classes.

    Returns:
        maps at the resolution of the feature map, logits and targets.

    Raises:
        ValueError: for a network with another head (the message says which operation
            was found), images that are not a finite batch, targets that do not match
            the batch or the classes, and an nn.DataParallel over several devices.

    Source: Zhou et al., arXiv:1512.04150, Eq. 1. Departures: none in the map. Networks average over space, so its mean
        and not its sum is the logit; the bias is left out, as in the paper.
    Test: test_cam.py::test_maps_average_to_the_logits_of_many_networks
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"a {type(model).__name__} hides the end of its network; pass the module it was made from")
    raise_if_threaded(model, "the model")
    with undisturbed(model), torch.no_grad():
        images = check_images(images)
        with _Calls() as calls:
            logits = model(images.clone())  # a network may change its input in place
        classes = target_classes(targets, logits, len(images))
        head = _find_head(calls.last, logits)
        _check_average(head, logits)
        if head.weight is None:
            picked = head.features.take_along_dim(classes.view(len(images), -1, 1, 1), 1)
            maps = picked.view(*classes.shape, *picked.shape[-2:])
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        else:
            maps = class_activation_map(head.features, head.weight, classes)
    return CAM(maps, logits.detach(), classes)


def bounding_boxes(
    map: Tensor | np.ndarray,
    threshold: float | int = LOCALIZATION_THRESHOLD,
    connectivity: int = 8,
    largest: bool = False,
) -> list[Box]:
    """Draw a box around each connected region of a map that lies above a share of its maximum.

    The papers resize the map to the image first (`anomaly_map.upsample`), so that boxes are in pixels, and keep the
    largest region.

    Args:
        map: (h, w), of any scale; min-max scale it first for the 60 % rule (`CODE_REVIEW_THRESHOLD`).
        threshold: share of the maximum; cells strictly above it count.
        connectivity: 8 joins cells that touch at a corner, 4 does not.
        largest: True keeps only the region with the most cells (the first of equals).

    Returns:
        half-open boxes in reading order of their regions; none for a map without a positive value.

    Raises:
        ValueError: for a map that is not (h, w) or holds NaN or infinite values, a threshold outside [0, 1], or a
            connectivity other than 4 and 8.

    Source: Zhou et al., arXiv:1512.04150, Sec. 3.1; Selvaraju et al., arXiv:1610.02391v4, Sec. 4.1.
    Departures: neither paper states the connectivity. Test: test_cam.py::test_boxes_equal_skimage_regions
    """
    from scipy import ndimage

    values = torch.as_tensor(map).detach().cpu()
    values = values.to(torch.promote_types(values.dtype, torch.float32)).numpy()
    if values.ndim != 2:
        raise ValueError(f"map of shape {values.shape}; expected one map (h, w). Take one of a batch, maps[0] say")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} values of the map are NaN or infinite; expected finite ones"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}; expected a share of the maximum, 0 to 1 (0.2 for 20 %)")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity={connectivity}; expected 4 or 8")
    if values.size == 0 or values.max() <= 0:
        return []
    labels, count = ndimage.label(
        values > threshold * values.max(), ndimage.generate_binary_structure(2, connectivity // 4)
    )
    boxes = [Box(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in ndimage.find_objects(labels)]
    return [boxes[np.bincount(labels.ravel(), minlength=count + 1)[1:].argmax()]] if largest and boxes else boxes


class _Call(NamedTuple):
    """One torch function: its name, what it gave (weakly unless CAM may need it), and its arguments in that case."""

    name: str
    result: Any
    args: tuple
    kwargs: dict

    def gave(self, tensor: Tensor) -> bool:
        return (self.result() if isinstance(self.result, weakref.ref) else self.result) is tensor


# What only rearranges, copies or converts numbers in eval mode.
_PASSING = {
    "flatten", "view", "view_as", "reshape", "reshape_as", "squeeze", "unsqueeze", "getitem", "contiguous", "clone",
    "detach", "dropout", "dropout1d", "dropout2d", "feature_dropout", "alpha_dropout", "to", "float", "double", "type",
    "type_as", "permute", "transpose", "ravel", "unflatten", "identity", "alias",
}  # fmt: skip
_POOLING = {"adaptive_avg_pool2d", "avg_pool2d", "mean", "sum"}


class _Calls(TorchFunctionMode):
    """Remembers the last torch functions of this thread, enough of them to lead from the logits to the pooling."""

    def __init__(self):
        super().__init__()
        self.last: deque[_Call] = deque(maxlen=24)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            name = getattr(func, "__name__", "").partition(".")[0].strip("_")
            kept = name in _PASSING or name in _POOLING or name == "linear"
            if name == "conv2d":  # after pooling it is a linear layer; before, its maps would only fill memory
                kept = result.shape[-2:] == (1, 1)
            self.last.append(
                _Call(name, result if kept else weakref.ref(result), args if kept else (), kwargs if kept else {})
            )
        return result


class _Head(NamedTuple):
    """The end of a network: what is pooled, (N, C, h, w), how many cells it sums, and the layer after it."""

    features: Tensor
    cells: int  # 1 where the pooling averages
    weight: Tensor | None
    bias: Tensor | None


def _refuse(found: str) -> NoReturn:
    raise ValueError(
        "CAM needs a network that ends in global average pooling of a feature map and one linear layer, with nothing "
        f"between them that changes numbers; here {found}. Grad-CAM needs none of this: grad_cam(model, images, layer)"
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
        _refuse(f"{channels} channels are pooled and the last layer's weight is {tuple(weight.shape)}")
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
    """Say what a pooling pools, as (N, C, h, w), and over how many cells it sums (1: it averages)."""
    x, axes, cells = _axes(call)
    if x.ndim == 3 and axes == {2}:  # one axis of space went before, or both were flattened into one
        while calls:
            earlier = calls.pop()
            if not earlier.gave(x):
                continue
            if earlier.name in ("mean", "sum"):
                before, earlier_axes, earlier_cells = _axes(earlier)
                if before.ndim == 4 and earlier_axes in ({2}, {3}):
                    return before, cells * earlier_cells
            elif earlier.name in _PASSING and isinstance(before := earlier.args[0], Tensor) and before.ndim == 4:
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
    """Say what a pooling takes, the axes that it reduces to one number, and over how many cells it sums."""

    def reduced(input, dim=None, keepdim=False, *_, **__):
        dims = range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        axes = {axis % input.ndim for axis in dims}
        summed = call.name == "sum"
        return input, axes, math.prod(input.shape[axis] for axis in axes) if summed else 1

    def windowed(input, *_, **__):
        axes = {axis for axis in (2, 3) if call.result.ndim == 4 and call.result.shape[axis] == 1}
        return input, axes, 1

    return (reduced if call.name in ("mean", "sum") else windowed)(*call.args, **call.kwargs)


def _check_average(head: _Head, logits: Tensor) -> None:
    """Refuse unless the maps' mean over space is the logits without their bias, in this very run."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pooled = head.features.mean((2, 3), dtype=dtype) * head.cells
    expected, size = pooled, pooled.abs()
    if head.weight is not None:
        weight = head.weight.to(dtype)
        with autocast(enabled=False):
            expected, size = pooled @ weight.T, pooled.abs() @ weight.abs().T
    if head.bias is not None:
        expected, size = expected + head.bias, size + head.bias.abs()
    if expected.shape != logits.shape:
        _refuse(f"the pooling leads to {tuple(expected.shape)} and the logits are {tuple(logits.shape)}")
    # Another structure is off by as much as the terms themselves; rounding is far below that.
    rounding = 0.05 if torch.finfo(logits.dtype).bits == 16 or torch.finfo(head.features.dtype).bits == 16 else 1e-3
    if readable(logits) and not bool(((expected - logits).abs() <= rounding * size.amax()).all()):
        _refuse("the maps do not average to the logits: something else changes the numbers on the way")
