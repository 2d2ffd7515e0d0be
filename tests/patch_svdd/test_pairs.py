import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import peak_memory
from refusals import refuses

from paperlib.patch_svdd import (
    DIRECTIONS,
    mean_image,
    neighbor_pairs,
    perturb,
    position_pairs,
)
from paperlib.patch_svdd.pairs import crop_patches, random_crops


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(
    patch=st.sampled_from([32, 64]),
    extra=st.integers(0, 80),
    wider=st.integers(0, 9),
    step=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_position_pairs_are_where_they_say(patch, extra, wider, step, seed):
    size = (2 * patch - 1 + extra, 2 * patch - 1 + extra + wider)
    first, second, position = position_pairs(
        400, size, patch, generator(seed), step=step
    )
    limit = torch.tensor(size) - patch
    for corner in (first, second):
        assert (corner >= 0).all()
        assert (corner <= limit).all()
        assert (corner % step == 0).all()
    move = second - first
    assert torch.equal(move.sign(), torch.tensor(DIRECTIONS)[position])
    along = move.abs()[move != 0]
    assert along.min() >= 3 * patch // 4 and along.max() <= patch - 1


def test_position_pairs_take_every_class_move_and_place_alike():
    first, second, position = position_pairs(80_000, (256, 256), 64, generator())
    counts = position.bincount(minlength=8)
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(10_000)
    move = (second - first)[position == 7]  # down and right
    down, right = (moves.unique().tolist() for moves in move.T)
    assert down == right == list(range(48, 64))
    assert abs(move.double().mean() - 55.5) < 0.2
    # Straight up the first patch can be in any column, and in the rows that leave room
    # for the move.
    up = position == 1
    assert first[up][:, 1].unique().tolist() == list(range(193))
    room = 192 - (first - second)[up][:, 0]
    share = ((first[up][:, 0] - (first - second)[up][:, 0]).double() / room).mean()
    assert abs(share - 0.5) < 0.02


@pytest.mark.parametrize(("patch", "share"), [(64, 0.34), (32, 0.16)])
def test_clipping_as_released_shortens_moves(patch, share):
    # The shares are counted here from the released rule, written out pair by pair.
    first, second, position = position_pairs(
        40_000, (256, 256), patch, generator(), clip=True
    )
    wanted = torch.tensor(DIRECTIONS)[position] != 0
    short = ((second - first).abs() < 3 * patch // 4) & wanted
    assert short.any(1).double().mean().item() == pytest.approx(share, abs=0.01)
    assert first.min() == second.min() == 0
    assert first.max() == second.max() == 256 - patch
    assert first.float().mean() == pytest.approx((256 - patch) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("patch", "step", "moves"),
    [
        (32, 1, [-1, 0, 1]),
        (64, 1, [-2, -1, 0, 1, 2]),
        (32, 2, [-2, 0, 2]),
        (64, 2, [-2, 0, 2]),
    ],
)
@pytest.mark.parametrize("clip", [False, True])
def test_neighbor_pairs_are_moved_a_little(patch, step, moves, clip):
    first, second, position = neighbor_pairs(
        20_000, (100, 120), patch, generator(), step=step, clip=clip
    )
    assert position is None
    for corner in (first, second):
        assert (corner >= 0).all()
        assert (corner <= torch.tensor([100, 120]) - patch).all()
    move = second - first
    assert move[:, 0].unique().tolist() == move[:, 1].unique().tolist() == moves
    unmoved = (move == 0).all(1)
    assert unmoved.any() == clip  # a patch in a corner is clipped back onto itself
    if not clip:
        kinds, counts = move.unique(dim=0, return_counts=True)
        expected = 20_000 / (len(moves) ** 2 - 1)
        assert len(kinds) == len(moves) ** 2 - 1
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_images_too_small_for_a_pair_are_refused():
    with refuses(
        "126×200 pixels are too small for two .* at least 127×127",
    ):
        position_pairs(1, (126, 200), 64, generator())
    assert position_pairs(9, (127, 127), 64, generator()).first.min() >= 0
    with refuses("64×64 pixels are too small to move a patch .* at least 66×66"):
        neighbor_pairs(1, (64, 64), 64, generator())
    # By default in steps of one pixel.
    just = neighbor_pairs(50, (33, 33), 32, generator())
    moves = set(map(tuple, (just.second - just.first).tolist()))
    assert moves >= {(0, 1), (1, 0), (-1, -1)}
    assert (just.second - just.first).abs().max() == 1


def test_perturbation_is_a_colour_shift_and_noise():
    changed = perturb(torch.zeros(500, 3, 24, 24), generator())
    shift = changed.mean((2, 3))
    assert shift.std().item() == pytest.approx(0.02, rel=0.05)
    assert shift.mean().abs() < 0.002
    noise = changed - shift[:, :, None, None]
    assert noise.std().item() == pytest.approx(0.02, rel=0.02)
    # Each channel by itself.
    assert shift.T.corrcoef().fill_diagonal_(0).abs().max() < 0.2
    assert torch.equal(perturb(changed, generator(1)), perturb(changed, generator(1)))


def test_crops_come_from_everywhere():
    images = torch.rand(3, 3, 9, 7, generator=generator())
    mean = torch.rand(3, 9, 7, generator=generator(1))
    crops = random_crops(images, mean, 600, (4, 5), generator())
    assert crops.shape == (600, 3, 4, 5)
    corners = {
        (n, y, x): images[n, :, y : y + 4, x : x + 5] - mean[:, y : y + 4, x : x + 5]
        for n in range(3)
        for y in range(6)
        for x in range(3)
    }
    for n, (y, x) in ((0, (2, 1)), (2, (5, 2))):
        place = torch.tensor([n]), (4, 5), torch.tensor([[y, x]])
        cut = crop_patches(images, mean, *place)
        assert torch.equal(cut[0], corners[n, y, x])
    seen = [
        next(key for key, wanted in corners.items() if torch.equal(crop, wanted))
        for crop in crops
    ]
    counts = torch.tensor([seen.count(key) for key in corners])
    # 11 of each of the 54 on average.
    assert counts.sum() == 600 and counts.min() > 0 and counts.max() < 30


def test_the_mean_of_many_images_takes_no_copy_of_them():
    # 188 MiB; in double precision twice that, as booleans a quarter.
    images = torch.rand(1000, 3, 128, 128)
    taken = peak_memory(lambda: mean_image(images), torch.device("cpu"))
    if taken is None:
        pytest.skip("the peak of the memory can't be read here")
    assert taken < images.nbytes / 2**20 / 8
    torch.testing.assert_close(
        mean_image(images), images.mean(0, dtype=torch.float64).float(), rtol=0, atol=0
    )


def test_equal_images_are_refused_and_a_few_that_repeat_are_not():
    one, other = torch.rand(2, 1, 3, 64, 64)
    with refuses("the 19 training images are all equal"):
        mean_image(one.expand(19, -1, -1, -1))
    # As many as are compared at once.
    repeated = torch.cat([one.expand(8, -1, -1, -1), other])
    torch.testing.assert_close(mean_image(repeated), (8 * one[0] + other[0]) / 9)


def test_unusable_training_images_are_refused():
    images = torch.rand(4, 3, 64, 70)
    expected = images.double().mean(0).float()
    assert torch.equal(mean_image(images), expected)
    # Two are enough.
    assert torch.equal(mean_image(images[:2]), images[:2].double().mean(0).float())
    mean_image(images * 1.0005 - 1e-4)  # as resizing may round past the ends
    one_colour, nan = images.clone(), images.clone()
    one_colour[2] = torch.tensor([0.1, 0.5, 0.2])[:, None, None]
    nan[1, 0, 0, 0] = math.nan
    for bad, message in (
        (images[:1], "1 training image; expected at least 2"),
        (one_colour, "images number 2 are of one colour"),
        (images[:1].expand(4, -1, -1, -1), "the 4 training images are all equal"),
        (nan, "1 values of images are NaN or infinite, in images number 1"),
        (images[..., :63], r"shape \(4, 3, 64, 63\); expected RGB .* at least 64×64"),
        (images[:, :1], r"shape \(4, 1, 64, 70\); expected RGB"),
        (255 * images, "images range from .* to 25.*; expected 0 to 1"),
        (images - 0.5, "images range from -0.5 to 0.5; expected 0 to 1"),
        ((255 * images).byte(), "dtype uint8; expected floating point"),
    ):
        with refuses(message):
            mean_image(bad)
