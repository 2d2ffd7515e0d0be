"""Draw, perturb and crop the pairs of patches that Patch SVDD learns from."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlib.validation import (
    check_generator,
    check_integers,
    check_tensor,
    height_and_width,
)

# released code: standard deviation of the colour shift and of the pixel noise (white is
# 1)
PERTURBATION = 0.02
# Position classes 0 to 7: the 3×3 grid around a patch in reading order, without its
# centre.
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


class Pairs(NamedTuple):
    """Pairs of patches: their top left corners (row, column) in pixels, and classes.

    Fields:
        first: (n, 2).
        second: (n, 2).
        position: (n,), 0 to 7: the direction from the first patch to the second, see
            `DIRECTIONS`; or None.
    """

    first: Tensor
    second: Tensor
    position: Tensor | None


def _check_arguments(
    count: int,
    size: tuple[int, int],
    patch: int,
    generator: torch.Generator,
    step: int,
) -> tuple[int, int]:
    """Return the size; raise ValueError for arguments of a wrong type or range."""
    check_integers(count=count, patch=patch, step=step)
    check_generator(generator)
    return height_and_width(size)


def position_pairs(
    count: int,
    size: tuple[int, int],
    patch: int,
    generator: torch.Generator,
    *,
    step: int = 1,
    clip: bool = False,
) -> Pairs:
    """Draw pairs of patches, the second in one of eight directions from the first.

    The direction is uniform; along each of its axes the second patch is moved by 3K/4 +
    U{0, …, K/4 - 1} pixels. The first patch is uniform among the positions with both
    patches inside the image.

    Args:
        count: of pairs.
        size: height and width of the image in pixels.
        patch: side of a patch in pixels, K.
        generator: on the CPU.
        step: corners and moves are multiples of it (it has to divide K/4).
        clip: True draws the first patch anywhere and clips the second to the image.

    Returns:
        corners in pixels and classes.

    Raises:
        ValueError: if an image is too small for a pair: below 2K - 1 pixels high or
            wide (K with `clip`).

    Source: Patch SVDD, arXiv:2006.16067, Sec. 3.2; the moves are the released code's.
    Departures: the released code clips; on 256×256 images 34.2 % (K = 64) and 15.4 % (K
        = 32) of its pairs are then closer than the move, some identical.
    Test: test_pairs.py::test_position_pairs_are_where_they_say
    """
    size = _check_arguments(count, size, patch, generator, step)
    check_integers(**{"patch // 4 // step": patch // 4 // step})
    needed = patch if clip else 2 * patch - 1
    if min(size) < needed:
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels are too small for two patches"
            f" of {patch}×{patch} side by side; expected at least {needed}×{needed}"
        )
    position = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    move = 3 * patch // 4 + step * torch.randint(
        patch // 4 // step, (count, 2), generator=generator
    )
    move = torch.tensor(DIRECTIONS)[position] * move
    return Pairs(*_place(move, size, patch, generator, step, clip), position)


def neighbor_pairs(
    count: int,
    size: tuple[int, int],
    patch: int,
    generator: torch.Generator,
    *,
    step: int = 1,
    clip: bool = False,
) -> Pairs:
    """Draw pairs of neighbouring patches, up to K/32 pixels apart per axis, not equal.

    Args:
        count: of pairs.
        size: height and width of the image in pixels.
        patch: side of a patch in pixels, K.
        generator: on the CPU.
        step: corners and moves are multiples of it; the largest move is at least one
            step.
        clip: as in `position_pairs`.

    Returns:
        corners in pixels, without classes.

    Raises:
        ValueError: if an image is too small to move a patch.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 4 and Alg. 1; the range is the released
        code's.
    Departures: the first patch is uniform among the positions with both patches inside;
        the released code clips.
    Test: test_pairs.py::test_neighbor_pairs_are_moved_a_little
    """
    size = _check_arguments(count, size, patch, generator, step)
    reach = max(1, patch // 32 // step)
    needed = patch if clip else patch + reach * step
    if min(size) < needed:
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels are too small to move a patch"
            f" of {patch}×{patch}; expected at least {needed}×{needed}"
        )
    moves = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * 2)
    moves = moves[moves.abs().sum(1) > 0] * step
    move = moves[torch.randint(len(moves), (count,), generator=generator)]
    return Pairs(*_place(move, size, patch, generator, step, clip), None)


def _place(
    move: Tensor,
    size: tuple[int, int],
    patch: int,
    generator: torch.Generator,
    step: int,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    """Draw the corners of first patches, and move them; see `position_pairs`."""
    limit = torch.tensor(size) - patch
    if clip:
        first = _uniform(torch.zeros_like(move), limit.expand_as(move), step, generator)
        return first, torch.minimum((first + move).clamp_min(0), limit)
    first = _uniform((-move).clamp_min(0), limit - move.clamp_min(0), step, generator)
    return first, first + move


def _uniform(
    low: Tensor, high: Tensor, step: int, generator: torch.Generator
) -> Tensor:
    """Draw uniformly from low, low + step, … up to high."""
    choices = (high - low) // step + 1
    share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
    return low + step * torch.minimum((share * choices).long(), choices - 1)


def perturb(
    images: Float[Tensor, "n 3 h w"], generator: torch.Generator
) -> Float[Tensor, "n 3 h w"]:
    """Add a random colour shift per image and noise per pixel, both normal (0.02).

    Without it a network can infer where a patch is from traces that the lens leaves in
    its colours.

    Args:
        images: in units where white is 1.
        generator: on the images' device.

    Source: Patch SVDD, arXiv:2006.16067, Sec. 3.2 and the released code.
    Departures: none.
    Test: test_pairs.py::test_perturbation_is_a_colour_shift_and_noise
    """
    check_tensor(images, "images", "N, 3, H, W")
    check_generator(generator)
    if images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images {tuple(images.shape)}; expected (N, 3, H, W)")
    draw = functools.partial(
        torch.randn, generator=generator, device=images.device, dtype=images.dtype
    )
    return images + PERTURBATION * (draw(len(images), 3, 1, 1) + draw(images.shape))


def random_crops(
    images: Float[Tensor, "n 3 h w"],
    mean: Float[Tensor, "3 h w"],
    count: int,
    size: tuple[int, int],
    generator: torch.Generator,
) -> Float[Tensor, "count 3 height width"]:
    """Crop random rectangles of random images, and subtract the mean image.

    Args:
        images: RGB in [0, 1].
        mean: from `mean_image`.
        count: of crops.
        size: of a crop, height and width in pixels, at most the images'.
        generator: on the CPU.
    """
    rows = torch.randint(len(images), (count,), generator=generator)
    room = torch.tensor(images.shape[-2:]) - torch.tensor(size)
    corners = _uniform(
        torch.zeros(count, 2, dtype=torch.long), room.expand(count, 2), 1, generator
    )
    return crop_patches(images, mean, rows, size, corners)


def crop_patches(
    images: Float[Tensor, "n 3 h w"],
    mean: Float[Tensor, "3 h w"],
    rows: Int[Tensor, " m"],
    size: int | tuple[int, int],
    corners: Int[Tensor, "m 2"],
) -> Float[Tensor, "m 3 height width"]:
    """Crop a rectangle from each selected image, and subtract the mean image.

    Args:
        images: RGB in [0, 1].
        mean: from `mean_image`.
        rows: index of the image per crop.
        size: height and width in pixels; one number for a square.
        corners: top left, row and column, in pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return torch.stack(
        [
            images[row, :, y : y + height, x : x + width]
            - mean[:, y : y + height, x : x + width]
            for row, (y, x) in zip(rows.tolist(), corners.tolist(), strict=True)
        ]
    )
