"""From a coarse map to a picture-sized one: resizing and scaling, the same for every method of the book."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from paperlib.inputs import check_finite

MODES = ("bilinear", "bicubic", "nearest")


def upsample(
    maps: Float[Tensor, "*batch_h_w"], size: int | tuple[int, int], mode: str = "bilinear"
) -> Float[Tensor, "*batch_H_W"]:
    """Resize maps to the size of the picture they belong to.

    A map's cell covers the patch of pixels that it stands for: corners are not aligned (`align_corners=False`).

    Args:
        maps: one map, or any number of leading axes.
        size: height and width in pixels; one number for a square.
        mode: `bilinear`, `bicubic` (which may leave the range of the map) or `nearest`.

    Returns:
        maps with the same leading axes, dtype and device.

    Raises:
        ValueError: for an unknown mode, a size below 1, or maps without an (h, w) to resize.

    Source: Grad-CAM, arXiv:1610.02391v4, Sec. 3.2 (bilinear); PaDiM, arXiv:2011.08785, Sec. V-A (bicubic).
    Departures: none; neither paper says how corners are treated.
    Test: test_anomaly_map.py::test_bilinear_is_a_weighted_mean_of_the_nearest_cells
    """
    height, width = (size, size) if isinstance(size, int) else size
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    if height < 1 or width < 1:
        raise ValueError(f"size={size}; expected a height and a width of at least 1 pixel")
    flat = _one_axis(maps).unsqueeze(1)
    corners = None if mode == "nearest" else False
    return F.interpolate(flat, (height, width), mode=mode, align_corners=corners).view(*maps.shape[:-2], height, width)


def minmax(maps: Float[Tensor, "*batch_h_w"]) -> Float[Tensor, "*batch_h_w"]:
    r"""Scale each map to [0, 1] by its own extremes; a constant map becomes 0.

    $$m' = \frac{m - \min m}{\max m - \min m}$$

    For a picture, never for a score: the extremes differ from image to image.

    Args:
        maps: one map, or any number of leading axes; each (h, w) is scaled on its own.

    Raises:
        ValueError: if a map holds NaN or infinite values, or has no cell.

    Source: the released code of CAM, arXiv:1512.04150. Departures: 0 instead of 0/0 for a constant map.
    Test: test_anomaly_map.py::test_minmax_spans_zero_to_one_and_a_constant_map_is_zero
    """
    check_finite(_one_axis(maps), "maps")
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, 1)


def _one_axis(maps: Tensor) -> Tensor:
    """Join all leading axes into one: (n, h, w)."""
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"maps of shape {tuple(maps.shape)}; expected (…, h, w) with at least one cell")
    return maps.reshape(math.prod(maps.shape[:-2]), *maps.shape[-2:])
