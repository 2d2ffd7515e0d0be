import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from paperlib.anomaly_map import minmax, upsample


def test_bilinear_is_a_weighted_mean_of_the_nearest_cells():
    # Four pixels a cell: their centres lie 3/8 and 1/8 of a cell from the cell's centre; beyond the first and the last
    # centre there is nothing to mix with.
    row = torch.tensor([[0.0, 8.0]])
    assert upsample(row, (1, 8)).tolist() == [[0, 0, 1, 3, 5, 7, 8, 8]]
    assert upsample(row.T, (8, 1)).tolist() == [[0], [0], [1], [3], [5], [7], [8], [8]]
    assert upsample(row, (2, 4), mode="nearest").tolist() == [[0, 0, 8, 8]] * 2


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), height=st.integers(1, 20), width=st.integers(1, 20))
def test_bilinear_equals_opencvs_enlargement(h, w, height, width):
    if height < h or width < w:
        return
    grid = torch.randn(h, w, generator=torch.Generator().manual_seed(h * 7 + w))
    theirs = cv2.resize(grid.numpy(), (width, height), interpolation=cv2.INTER_LINEAR)  # OpenCV gives the width first
    np.testing.assert_allclose(upsample(grid, (height, width)), theirs.reshape(height, width), atol=1e-5)


def test_leading_axes_dtype_and_a_square():
    maps = torch.randn(2, 3, 5, 4)
    assert upsample(maps, 9).shape == (2, 3, 9, 9)
    torch.testing.assert_close(upsample(maps, (7, 9))[1, 2], upsample(maps[1, 2], (7, 9)))
    assert upsample(maps.double(), 6).dtype == torch.float64 and upsample(maps.bfloat16(), 6).dtype == torch.bfloat16
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
        ((2, 2), 4, "cubic", "mode='cubic'; expected one of bilinear, bicubic, nearest"),
        ((2, 0), 4, "bilinear", r"shape \(2, 0\); expected .* at least one cell"),
        ((2,), 4, "bilinear", r"shape \(2,\)"),
    ],
)
def test_what_cannot_be_resized_is_refused(shape, size, mode, message):
    with pytest.raises(ValueError, match=message):
        upsample(torch.zeros(shape), size, mode)


def test_minmax_spans_zero_to_one_and_a_constant_map_is_zero():
    maps = torch.stack([torch.tensor([[-2.0, 0], [6, 2]]), torch.full((2, 2), 5.0), torch.zeros(2, 2)])
    assert minmax(maps).tolist() == [[[0, 0.25], [1, 0.5]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert torch.equal(minmax(maps[0]), minmax(maps)[0])
    assert torch.equal(minmax(1e-30 * maps)[0], minmax(maps)[0])  # a weak map is still a map


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 5), scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10)
)
def test_minmax_forgets_scale_and_shift(n, h, w, scale, shift):
    maps = torch.randn(n, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(n * 100 + h * 10 + w))
    scaled = minmax(maps)
    assert scaled.min() == 0 and scaled.max() == (1 if h * w > 1 else 0)
    torch.testing.assert_close(minmax(scale * maps + shift), scaled, rtol=1e-8, atol=1e-8)


def test_minmax_refuses_what_has_no_extremes():
    maps = torch.zeros(3, 2, 2)
    maps[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 values of maps are NaN or infinite, in maps number 1"):
        minmax(maps)
    with pytest.raises(ValueError, match=r"shape \(2, 0, 3\)"):
        minmax(torch.zeros(2, 0, 3))
