import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from torch._subclasses.fake_tensor import FakeTensorMode

from paperlib.anomaly_map import gaussian_blur, minmax, spread_patch_scores, upsample


def test_bilinear_is_a_weighted_mean_of_the_nearest_positions():
    # Four pixels per position: their centres lie 3/8 and 1/8 of a position from its
    # centre. Beyond the first and the last centre the values are constant.
    row = torch.tensor([[0.0, 8.0]])
    assert upsample(row, (1, 8)).tolist() == [[0, 0, 1, 3, 5, 7, 8, 8]]
    assert upsample(row.T, (8, 1)).tolist() == [[0], [0], [1], [3], [5], [7], [8], [8]]
    assert upsample(row, (2, 4), mode="nearest").tolist() == [[0, 0, 8, 8]] * 2


@settings(max_examples=30, deadline=None)
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
)
def test_bilinear_equals_opencvs_enlargement(h, w, height, width):
    if height < h or width < w:
        return
    grid = torch.randn(h, w, generator=torch.Generator().manual_seed(h * 7 + w))
    # OpenCV gives the width first.
    theirs = cv2.resize(grid.numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(
        upsample(grid, (height, width)), theirs.reshape(height, width), atol=1e-5
    )


def test_leading_axes_dtype_and_a_square():
    maps = torch.randn(2, 3, 5, 4)
    assert upsample(maps, 9).shape == (2, 3, 9, 9)
    torch.testing.assert_close(
        upsample(maps, (7, 9))[1, 2], upsample(maps[1, 2], (7, 9))
    )
    assert upsample(maps.double(), 6).dtype == torch.float64
    assert upsample(maps.bfloat16(), 6).dtype == torch.bfloat16
    assert upsample(maps[:0], 6).shape == (0, 3, 6, 6)
    assert upsample(maps, (2, 2), mode="bicubic").shape == (2, 3, 2, 2)
    with FakeTensorMode(), torch.device("cuda"):
        fake = minmax(upsample(torch.rand(2, 3, 3), 6))
        assert fake.shape == (2, 6, 6) and fake.device.type == "cuda"


@pytest.mark.parametrize(
    ("shape", "size", "mode", "message"),
    [
        ((2, 2), 0, "bilinear", "size=0; expected a height and a width of at least 1"),
        ((2, 2), (4, -1), "bilinear", r"size=\(4, -1\)"),
        (
            (2, 2),
            4,
            "cubic",
            "mode='cubic'; expected one of bilinear, bicubic, nearest",
        ),
        ((2, 0), 4, "bilinear", r"shape \(2, 0\); expected .* not empty"),
        ((2,), 4, "bilinear", r"shape \(2,\)"),
    ],
)
def test_invalid_sizes_are_refused(shape, size, mode, message):
    with refuses(message):
        upsample(torch.zeros(shape), size, mode)


def test_minmax_spans_zero_to_one_and_a_constant_map_is_zero():
    maps = torch.stack(
        [torch.tensor([[-2.0, 0], [6, 2]]), torch.full((2, 2), 5.0), torch.zeros(2, 2)]
    )
    assert minmax(maps).tolist() == [
        [[0, 0.25], [1, 0.5]],
        [[0, 0], [0, 0]],
        [[0, 0], [0, 0]],
    ]
    assert torch.equal(minmax(maps[0]), minmax(maps)[0])
    # A weak map is still a map.
    assert torch.equal(minmax(1e-30 * maps)[0], minmax(maps)[0])


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
)
def test_minmax_forgets_scale_and_shift(n, h, w, scale, shift):
    generator = torch.Generator().manual_seed(n * 100 + h * 10 + w)
    maps = torch.randn(n, h, w, dtype=torch.float64, generator=generator)
    scaled = minmax(maps)
    assert scaled.min() == 0 and scaled.max() == (1 if h * w > 1 else 0)
    torch.testing.assert_close(
        minmax(scale * maps + shift), scaled, rtol=1e-8, atol=1e-8
    )


def test_minmax_refuses_maps_without_extremes():
    maps = torch.zeros(3, 2, 2)
    maps[1, 0, 0] = float("nan")
    with refuses("1 values of maps are NaN or infinite, in maps number 1"):
        minmax(maps)
    with refuses(r"shape \(2, 0, 3\)"):
        minmax(torch.zeros(2, 0, 3))


@pytest.mark.parametrize(
    "shape", [(40, 64), (224, 224), (5, 7), (1, 30), (3, 1)]
)  # also smaller than the kernel
@pytest.mark.parametrize("sigma", [4, 1.3, 0.1, 0])
def test_blur_equals_scipy_at_the_border_too(shape, sigma):
    maps = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(shape[0]))
    theirs = scipy.ndimage.gaussian_filter(maps.double().numpy(), (0, 0, sigma, sigma))
    np.testing.assert_allclose(gaussian_blur(maps, sigma), theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        gaussian_blur(maps.double(), sigma), theirs, rtol=0, atol=1e-13
    )
    assert torch.equal(
        gaussian_blur(maps, sigma)[1, 2], gaussian_blur(maps[1, 2], sigma)
    )
    assert torch.equal(gaussian_blur(maps), gaussian_blur(maps, 4))  # PaDiM says 4


def test_blur_keeps_sums_dtype_and_device():
    maps = torch.rand(2, 20, 30, dtype=torch.float64)
    # A mirror loses nothing.
    torch.testing.assert_close(gaussian_blur(maps).sum((1, 2)), maps.sum((1, 2)))
    half = gaussian_blur(maps.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - gaussian_blur(maps)).abs().max() < 0.01
    assert gaussian_blur(maps[:0]).shape == (0, 20, 30)
    strided = torch.rand(2, 30, 20).mT
    torch.testing.assert_close(
        gaussian_blur(strided), gaussian_blur(strided.contiguous())
    )
    with FakeTensorMode(), torch.device("cuda"):
        assert gaussian_blur(torch.rand(2, 9, 9)).device.type == "cuda"
    for sigma in (-1, float("nan"), float("inf")):
        with refuses(f"sigma={sigma}"):
            gaussian_blur(maps, sigma)
    with refuses(r"shape \(4,\)"):
        gaussian_blur(torch.zeros(4), 0)


def spread_by_the_loop(scores, patch, stride, height, width):
    """The mean over covering patches as the released code writes it out."""
    total = torch.zeros(height, width, dtype=torch.float64)
    covering = torch.zeros(height, width, dtype=torch.float64)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            y, x = i * stride, j * stride
            total[y : y + patch, x : x + patch] += scores[i, j]
            covering[y : y + patch, x : x + patch] += 1
    return total / covering.clamp_min(1)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    patch=st.integers(1, 9),
    stride=st.integers(1, 12),
    below=st.integers(0, 5),
    right=st.integers(0, 5),
)
def test_spreading_equals_the_loop_over_patches(n, h, w, patch, stride, below, right):
    generator = torch.Generator().manual_seed(n * 100 + h * 10 + w)
    scores = torch.rand(n, h, w, generator=generator, dtype=torch.float64)
    height, width = (h - 1) * stride + patch + below, (w - 1) * stride + patch + right
    maps = spread_patch_scores(scores, patch, stride, (height, width))
    expected = torch.stack(
        [spread_by_the_loop(grid, patch, stride, height, width) for grid in scores]
    )
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=0)
    # Nothing but uncovered pixels is exactly 0.
    assert torch.equal(maps == 0, expected == 0)
    torch.testing.assert_close(
        spread_patch_scores(scores.float(), patch, stride, (height, width)),
        expected.float(),
    )


def test_spreading_the_published_grids():
    for patch, stride, side in ((32, 4, 57), (64, 16, 13)):
        scores = torch.rand(side, side, generator=torch.Generator().manual_seed(side))
        maps = spread_patch_scores(scores, patch, stride, 256)
        torch.testing.assert_close(
            maps.double(),
            spread_by_the_loop(scores, patch, stride, 256, 256),
            rtol=1e-6,
            atol=0,
        )
        # One patch covers a corner.
        assert maps[0, 0] == scores[0, 0] and maps[-1, -1] == scores[-1, -1]
        assert torch.equal(
            spread_patch_scores(torch.ones(side, side), patch, stride, 256),
            torch.ones(256, 256),
        )


def test_spreading_keeps_axes_and_dtype_and_devices():
    scores = torch.rand(2, 3, 5, 4)
    maps = spread_patch_scores(scores, 4, 2, (13, 10))
    assert maps.shape == (2, 3, 13, 10) and (maps[..., 12, :] == 0).all()
    assert torch.equal(maps[1, 2], spread_patch_scores(scores[1, 2], 4, 2, (13, 10)))
    assert (
        spread_patch_scores(scores.bfloat16(), 4, 2, (13, 10)).dtype == torch.bfloat16
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(spread_patch_scores(scores, 4, 2, (13, 10)), maps)
    with FakeTensorMode(), torch.device("cuda"):
        assert spread_patch_scores(torch.rand(2, 5, 5), 4, 2, 12).device.type == "cuda"


@pytest.mark.parametrize(
    ("shape", "patch", "stride", "size", "message"),
    [
        ((2, 3, 3), 0, 1, 9, "patch=0; expected at least 1"),
        ((2, 3, 3), 4, 0, 9, "stride=0"),
        (
            (2, 3, 4),
            4,
            2,
            9,
            (
                "3×4 patches of 4 pixels at stride 2 cover 8×10 pixels; expected at"
                " most .* 9×9"
            ),
        ),
        ((3,), 4, 2, 9, r"shape \(3,\)"),
    ],
)
def test_scores_that_do_not_fit_the_picture_are_refused(
    shape, patch, stride, size, message
):
    with refuses(message):
        spread_patch_scores(torch.zeros(shape), patch, stride, size)
