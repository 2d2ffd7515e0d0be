"""Resize, scale and smooth anomaly maps, the same way for every method of the book.

Example:
    >>> import torch
    >>> from paperlib.anomaly_map import gaussian_blur, minmax, upsample
    >>> distances = torch.rand(2, 56, 56)
    >>> maps = gaussian_blur(upsample(distances, (224, 224)), sigma=4.0)
    >>> maps.shape
    torch.Size([2, 224, 224])
    >>> scaled = minmax(maps)
    >>> float(scaled.min()), float(scaled.max())
    (0.0, 1.0)
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from paperlib.precision import at_least_float32, full_precision
from paperlib.tables import short_repr
from paperlib.validation import (
    check_choice,
    check_finite,
    check_integers,
    check_iterable,
    check_number,
    check_tensor,
    height_and_width,
)

MAX_SIGMA = 1000  # pixels; a larger one only costs time
MODES = ("bilinear", "bicubic", "nearest")
NO_BATCH = "no batch received; a generator yields its batches only once"


class Detection(NamedTuple):
    """Scores (N,) and anomaly maps (N, H, W) of a batch of images."""

    scores: Tensor
    maps: Tensor
    __repr__ = short_repr


class Box(NamedTuple):
    """A half-open rectangle: rows top to bottom - 1, columns left to right - 1."""

    top: int
    left: int
    bottom: int
    right: int


def score_quantile(
    images: Tensor | Iterable[Tensor],
    score: Callable[[Tensor], Tensor],
    quantile: float,
) -> float:
    """Return a quantile of the scores of images, which detectors use as a threshold.

    Args:
        images: one batch, or an iterable of batches.
        score: returns one score per image of a batch.
        quantile: share of the scores below the result.

    Raises:
        ValueError: for no batch, or a quantile outside [0, 1].
    """
    what = "a share of the normal images"
    check_number("quantile", quantile, what, least=0, most=1)
    batches = [images] if isinstance(images, Tensor) else images
    check_iterable(batches)
    scores = [score(batch) for batch in batches]
    if not scores:
        raise ValueError(NO_BATCH)
    return float(torch.cat(scores).double().quantile(quantile))


def upsample(
    maps: Float[Tensor, "*batch h w"],
    size: int | tuple[int, int],
    mode: str = "bilinear",
) -> Float[Tensor, "*batch height width"]:
    """Resize maps to the size of their image.

    A position of the map stands for a patch of pixels, so corners are not aligned
    (`align_corners=False`).

    Args:
        maps: one map, or any number of leading axes.
        size: height and width in pixels; one number for a square.
        mode: `bilinear`, `bicubic` (which may leave the range of the map) or `nearest`.

    Returns:
        maps with the same leading axes, dtype and device.

    Raises:
        ValueError: for an unknown mode, a size below 1, or maps without an (h, w) to
            resize.

    Example:
        >>> import torch
        >>> from paperlib.anomaly_map import upsample
        >>> upsample(torch.tensor([[0.0, 8.0]]), (1, 8))
        tensor([[0., 0., 1., 3., 5., 7., 8., 8.]])

    Source: Grad-CAM, arXiv:1610.02391v4, Sec. 3.2 (bilinear); PaDiM, arXiv:2011.08785,
        Sec. V-A (bicubic).
    Departures: none; neither paper says how corners are treated.
    Test: test_anomaly_map.py::test_bilinear_is_a_weighted_mean_of_the_nearest_positions
    """
    height, width = height_and_width(size)
    check_choice("mode", mode, MODES)
    corners = None if mode == "nearest" else False
    return F.interpolate(
        _flatten_leading_axes(maps).unsqueeze(1),
        (height, width),
        mode=mode,
        align_corners=corners,
    ).view(*maps.shape[:-2], height, width)


def minmax(maps: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch h w"]:
    r"""Scale each map to [0, 1] by its minimum and maximum; a constant map becomes 0.

    $$m' = \frac{m - \min m}{\max m - \min m}$$

    Use it for display, not for scores: the extremes differ between images.

    Args:
        maps: one map, or any number of leading axes; each (h, w) is scaled separately.

    Raises:
        ValueError: if a map contains NaN or infinite values, or is empty.

    Example:
        >>> import torch
        >>> from paperlib.anomaly_map import minmax
        >>> minmax(torch.tensor([[2.0, 3.0], [4.0, 6.0]]))
        tensor([[0.0000, 0.2500],
                [0.5000, 1.0000]])

    Source: the released code of CAM, arXiv:1512.04150.
    Departures: 0 instead of 0/0 for a constant map.
    Test: test_anomaly_map.py::test_minmax_spans_zero_to_one_and_a_constant_map_is_zero
    """
    check_finite(_flatten_leading_axes(maps), "maps")
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, 1)


def gaussian_blur(
    maps: Float[Tensor, "*batch h w"], sigma: float = 4.0
) -> Float[Tensor, "*batch h w"]:
    r"""Smooth maps with a Gaussian filter, as SciPy does.

    $$m'_i = \sum_{t=-r}^{r} g_t\, m_{i+t}$$
    along each axis, with $g_t \propto e^{-t^2/2\sigma^2}$ of sum 1 and r = 4σ rounded.
    The map is reflected at the border, the border value repeated (d c b a | a b c d).

    Args:
        maps: one map, or any number of leading axes.
        sigma: standard deviation in pixels; 0 leaves the maps as they are.

    Returns:
        maps of the same shape, dtype and device; half precision is summed in float32.

    Raises:
        ValueError: if sigma is negative or not finite, or maps are without an (h, w).

    Example:
        >>> import torch
        >>> from paperlib.anomaly_map import gaussian_blur
        >>> maps = torch.zeros(2, 32, 32)
        >>> maps[:, 16, 16] = 100
        >>> gaussian_blur(maps).amax((1, 2))  # about 100 / (2π · 4²)
        tensor([0.9948, 0.9948])

    Source: PaDiM, arXiv:2011.08785, Sec. IV-B (σ = 4).
    Departures: the paper states neither the border nor the truncation; both are those
        of `scipy.ndimage.gaussian_filter`.
    Test: test_anomaly_map.py::test_blur_equals_scipy_at_the_border_too
    """
    check_sigma(sigma)
    blurred = _flatten_leading_axes(maps).to(at_least_float32(maps.dtype))
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return maps
    taps = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-radius, radius + 1)]
    for axis in (1, 2):
        blurred = _weighted_sum(blurred, axis, [tap / sum(taps) for tap in taps])
    return blurred.view(maps.shape).to(maps.dtype)


def _weighted_sum(maps: Tensor, axis: int, taps: list[float]) -> Tensor:
    """Convolve maps with an odd number of taps along an axis, reflected at the border.

    Every way is exact in any matmul precision. On a CPU a sum of shifted maps is the
    fastest; on a GPU, and in compiled code, one product with a banded matrix is.
    """
    radius, length = len(taps) // 2, maps.shape[axis]
    # The reflected map repeats every 2 · length positions.
    index = torch.arange(-radius, length + radius, device=maps.device) % (2 * length)
    index = torch.minimum(index, 2 * length - 1 - index)
    if maps.device.type == "cpu" and not torch.compiler.is_compiling():
        padded = maps.index_select(axis, index)
        total = torch.zeros_like(maps)
        for t, tap in enumerate(taps):
            total.add_(padded.narrow(axis, t, length), alpha=tap)
        return total
    windows = index.unfold(0, len(taps), 1)  # (length, taps), the sources per position
    values = torch.tensor(taps, dtype=maps.dtype, device=maps.device)
    weights = maps.new_zeros(length, length)
    weights.scatter_add_(1, windows, values.expand_as(windows))
    with full_precision():
        return weights @ maps if axis == 1 else maps @ weights.T


def spread_patch_scores(
    scores: Float[Tensor, "*batch h w"],
    patch: int,
    stride: int,
    size: int | tuple[int, int],
) -> Float[Tensor, "*batch height width"]:
    r"""Average, per pixel, the scores of the patches that cover it; 0 if there are
    none.

    Patch (i, j) covers rows i·stride to i·stride + patch - 1 and the same columns for
    j. The patches over a pixel form a rectangle of the grid, and the mean over a
    rectangle is the mean over its rows, then over its columns:

    $$M = A\,S\,B^\top$$
    with $S$ = `scores`, $A_{yi}$ = 1 / (number of grid rows over pixel row y) if grid
    row i is one of them, else 0; $B$ the same for columns. Pixels covered by the same
    patches are computed once.

    Args:
        scores: one grid, or any number of leading axes.
        patch: side of a patch in pixels.
        stride: pixels from one patch to the next.
        size: height and width of the image in pixels; one number for a square.

    Returns:
        maps with the same leading axes, dtype and device. The sums are computed in
        double precision.

    Raises:
        ValueError: for a patch or stride below 1, scores without an (h, w), or patches
            that extend beyond the image.

    Example:
        >>> import torch
        >>> from paperlib.anomaly_map import spread_patch_scores
        >>> scores = torch.tensor([[2.0, 4.0]])  # two patches of 2×2 pixels
        >>> spread_patch_scores(scores, patch=2, stride=1, size=(2, 3))
        tensor([[2., 3., 4.],
                [2., 3., 4.]])

    Source: Patch SVDD, arXiv:2006.16067, Alg. 2; the mean and the 0 are the released
        code's.
    Departures: none.
    Test: test_anomaly_map.py::test_spreading_equals_the_loop_over_patches
    """
    height, width = height_and_width(size)
    check_integers(patch=patch, stride=stride)
    flat = _flatten_leading_axes(scores)
    extent = [(positions - 1) * stride + patch for positions in flat.shape[1:]]
    if extent[0] > height or extent[1] > width:
        raise ValueError(
            f"{flat.shape[1]}×{flat.shape[2]} patches of {patch} pixels at stride"
            f" {stride} cover {extent[0]}×{extent[1]} pixels; expected at most"
            f" the image's {height}×{width}. Pass the stride of the scores"
        )
    rows, columns = (
        _average_weights(positions, length, patch, stride, scores.device)
        for positions, length in zip(flat.shape[1:], (height, width), strict=True)
    )
    blocks = (rows @ flat.double() @ columns.T).to(scores.dtype)
    block = math.gcd(patch, stride)
    maps = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)
    maps = maps[:, :height, :width].contiguous()
    return maps.view(*scores.shape[:-2], height, width)


def _average_weights(
    positions: int, length: int, patch: int, stride: int, device: torch.device
) -> Float[Tensor, "blocks positions"]:
    """Return the matrix A of `spread_patch_scores`, one row per block of pixels.

    A block has gcd(patch, stride) pixels: the set of patches that cover a pixel changes
    only at its multiples.
    """
    block = math.gcd(patch, stride)
    block_start = torch.arange(0, length, block, device=device)[:, None]
    patch_start = stride * torch.arange(positions, device=device)
    covers = (patch_start <= block_start) & (block_start < patch_start + patch)
    return covers / covers.double().sum(1, keepdim=True).clamp_min(1)


def check_sigma(sigma: float) -> None:
    """Raise ValueError unless sigma is a standard deviation that a map can have."""
    what = "a standard deviation in pixels"
    check_number("sigma", sigma, what, least=0, most=MAX_SIGMA)


def _flatten_leading_axes(maps: Tensor) -> Tensor:
    """Join all leading axes into one: (n, h, w)."""
    check_tensor(maps, "maps")
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(
            f"maps of shape {tuple(maps.shape)}; expected (…, h, w), not empty"
        )
    return maps.reshape(math.prod(maps.shape[:-2]), *maps.shape[-2:])
