"""The pairs of patches that Patch SVDD learns from: where they lie, what disturbs them, what they are cut from."""

import functools
from typing import NamedTuple

import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from torch import Tensor

from paperlib.distributed import check_same_size, fail_together
from paperlib.patch_encoder import BIG_PATCH
from paperlib.validation import check_images, readable

TOGETHER = 8  # images that are summed at once, so that a file mapped into memory is never copied whole
PERTURBATION = 0.02  # released code: standard deviation of the colour shift and of the pixel noise; white is 1

# Position classes 0 to 7: the 3×3 grid around a patch in reading order, without its centre.
DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


class Pairs(NamedTuple):
    """Pairs of patches by their top left corners (row, column) in pixels, and their position class where they have one.

    Fields:
        first: (n, 2).
        second: (n, 2).
        position: (n,), 0 to 7: the direction from the first patch to the second, see `DIRECTIONS`; or None.
    """

    first: Tensor
    second: Tensor
    position: Tensor | None


def position_pairs(
    count: int, size: tuple[int, int], patch: int, generator: torch.Generator, *, step: int = 1, clip: bool = False
) -> Pairs:
    """Draw pairs of patches, the second in one of eight directions at a distance of 3/4 to 1 patch.

    The direction is uniform; along each axis in which it points the second patch is moved by 3K/4 + U{0, …, K/4 - 1}
    pixels, along the other by 0. The first patch is uniform among the places that keep both inside the image.

    Args:
        count: of pairs.
        size: height and width of the image in pixels.
        patch: side of a patch in pixels, K.
        generator: on the CPU.
        step: corners and moves are multiples of it (it has to divide K/4).
        clip: True draws the first patch anywhere and moves the second back to the border where it would stick out.

    Returns:
        corners in pixels and classes.

    Raises:
        ValueError: if an image can't hold a pair: it must be 2K - 1 pixels high and wide (K with `clip`).

    Source: Patch SVDD, arXiv:2006.16067, Sec. 3.2; the moves are the released code's. Departures: the released code
        clips; on 256×256 images 34.2 % (K = 64) and 15.4 % (K = 32) of its pairs are then closer than the move, some
        equal.
    Test: test_patch_pairs.py::test_position_pairs_are_where_they_say
    """
    needed = patch if clip else 2 * patch - 1
    if min(size) < needed:
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels can't hold two patches of {patch}×{patch} side by side; expected at "
            f"least {needed}×{needed}"
        )
    position = torch.randint(len(DIRECTIONS), (count,), generator=generator)
    move = 3 * patch // 4 + step * torch.randint(patch // 4 // step, (count, 2), generator=generator)
    move = torch.tensor(DIRECTIONS)[position] * move
    limit = torch.tensor(size) - patch
    if clip:
        first = _uniform(torch.zeros_like(move), limit.expand_as(move), step, generator)
        return Pairs(first, torch.minimum((first + move).clamp_min(0), limit), position)
    first = _uniform((-move).clamp_min(0), limit - move.clamp_min(0), step, generator)
    return Pairs(first, first + move, position)


def neighbor_pairs(
    count: int, size: tuple[int, int], patch: int, generator: torch.Generator, *, step: int = 1, clip: bool = False
) -> Pairs:
    """Draw pairs of almost the same patch: the second is moved by up to K/32 pixels in each direction, never by none.

    Args:
        count: of pairs.
        size: height and width of the image in pixels.
        patch: side of a patch in pixels, K.
        generator: on the CPU.
        step: corners and moves are multiples of it; the largest move is at least one step.
        clip: as in `position_pairs`.

    Returns:
        corners in pixels, without classes.

    Raises:
        ValueError: if an image is too small to move a patch in.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 4 and Alg. 1; the range is the released code's.
    Departures: the first patch is uniform among the places that keep both inside; the released code clips.
    Test: test_patch_pairs.py::test_neighbor_pairs_are_moved_a_little
    """
    reach = max(1, patch // 32 // step)
    needed = patch if clip else patch + reach * step
    if min(size) < needed:
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels leave no room to move a patch of {patch}×{patch}; expected at least "
            f"{needed}×{needed}"
        )
    moves = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * 2)
    moves = moves[moves.abs().sum(1) > 0] * step
    move = moves[torch.randint(len(moves), (count,), generator=generator)]
    limit = torch.tensor(size) - patch
    if clip:
        first = _uniform(torch.zeros_like(move), limit.expand_as(move), step, generator)
        return Pairs(first, torch.minimum((first + move).clamp_min(0), limit), None)
    first = _uniform((-move).clamp_min(0), limit - move.clamp_min(0), step, generator)
    return Pairs(first, first + move, None)


def _uniform(low: Tensor, high: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Draw low, low + step, … up to high, each as often."""
    choices = (high - low) // step + 1
    share = torch.rand(low.shape, generator=generator, dtype=torch.float64)
    return low + step * torch.minimum((share * choices).long(), choices - 1)


def perturb(images: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Shift each image's colours by one random amount and add noise to each pixel, both normal with deviation 0.02.

    Without it a network can tell where two patches lie from each other by how a lens parts the colours.

    Args:
        images: in units where white is 1.
        generator: on the images' device.

    Source: Patch SVDD, arXiv:2006.16067, Sec. 3.2 and the released code. Departures: none.
    Test: test_patch_pairs.py::test_perturbation_is_a_colour_shift_and_noise
    """
    draw = functools.partial(torch.randn, generator=generator, device=images.device, dtype=images.dtype)
    return images + PERTURBATION * (draw(len(images), 3, 1, 1) + draw(images.shape))


def mean_image(
    images: Tensor,
    *,
    group_device: torch.device | None = None,
) -> Float[Tensor, "3 h w"]:
    """Average the training images, pixel by pixel, after checking that there is something to learn from them.

    Args:
        images: (N, 3, H, W), RGB in [0, 1].
        group_device: None for the mean of `images`. A device for the mean over all
            processes of `torch.distributed`, which communicate there: all of them call
            this, each with its part of the images, and one image is enough for a part.

    Raises:
        ValueError: for images that are not a finite floating-point batch (N, 3, H, W) in [0, 1] of at least 64×64
            pixels; for a single image, images that are all equal (nothing is left after subtraction), or an image of
            one colour. With `group_device`, every process raises if one of them does.

    Source: the released code of Patch SVDD. Departures: none.
    Test: test_patch_pairs.py::test_images_that_teach_nothing_are_refused
    """
    with fail_together(group_device):
        images = check_images(images)
        check_range(images)
        _check_colours(images)
    total = images.new_zeros(images.shape[1:], dtype=torch.float64)
    for part in images.split(TOGETHER):
        total += part.sum(0, dtype=torch.float64)
    if group_device is None:
        count, differ = len(images), _any_differs(images, images[0])
    else:
        total, count, differ = _combine(images, total.to(group_device))
    if count < 2:
        raise ValueError(
            "1 training image; expected at least 2, since their mean is subtracted and "
            "nothing would be left of a single one"
        )
    if not differ:
        raise ValueError(
            f"the {count} training images are all equal, and nothing is left of them "
            "without their mean; expected different ones"
        )
    return (total / count).to(images)


def _combine(images: Tensor, total: Tensor) -> tuple[Tensor, int, bool]:
    """Return sum and number of the images of all processes, and whether any differ.

    `total` is the sum of this process's images, on the device of the group.
    """
    check_same_size(tuple(images.shape[2:]), total.device)
    first = images[0].to(total.device, torch.float64, copy=True)
    distributed.broadcast(first, 0)
    differ = _any_differs(images, first.to(images.device))
    counts = torch.tensor([len(images), differ], dtype=torch.int64, device=total.device)
    for statistic in (total, counts):
        distributed.all_reduce(statistic)
    count, n_differing = counts.tolist()
    return total, count, n_differing > 0


def _any_differs(images: Tensor, reference: Tensor) -> bool:
    if not readable(images):
        return True
    return any(bool((part != reference).any()) for part in images.split(TOGETHER))


def _check_colours(images: Tensor) -> None:
    if not readable(images):
        return
    spread = (images.amax((2, 3)) - images.amin((2, 3))).amax(1)
    if (spread == 0).any():
        rows = (spread == 0).nonzero().flatten().tolist()
        which = f"training images number {', '.join(map(str, rows[:8]))}"
        raise ValueError(f"{which} are of one colour; remove them")


def check_range(images: Tensor) -> None:
    """Refuse images that are no RGB in [0, 1] or smaller than a patch.

    Raises:
        ValueError: saying what came and what to do.

    Source: this book. Departures: none. Test: test_patch_pairs.py::test_images_that_teach_nothing_are_refused
    """
    if images.shape[1] != 3 or min(images.shape[-2:]) < BIG_PATCH:
        raise ValueError(
            f"images of shape {tuple(images.shape)}; expected RGB (N, 3, H, W) of at least {BIG_PATCH}×{BIG_PATCH} "
            "pixels. Resize them, to 256×256 as in the paper say, and repeat grey with .expand(-1, 3, -1, -1)"
        )
    if readable(images):
        low, high = float(images.amin()), float(images.amax())
        if low < -1e-3 or high > 1 + 1e-3:  # resizing may round past the ends
            raise ValueError(f"images go from {low:.3g} to {high:.3g}; expected 0 to 1. Bytes are divided by 255")


def random_crops(
    images: Float[Tensor, "n 3 h w"],
    mean: Float[Tensor, "3 h w"],
    count: int,
    size: tuple[int, int],
    generator: torch.Generator,
) -> Float[Tensor, "count 3 height width"]:
    """Cut rectangles out of random images at random places, less the mean image.

    Args:
        images: RGB in [0, 1].
        mean: what `mean_image` gave.
        count: of crops.
        size: of a crop, height and width in pixels, at most the images'.
        generator: on the CPU.

    Source: this book. Departures: none. Test: test_patch_pairs.py::test_crops_come_from_everywhere
    """
    rows = torch.randint(len(images), (count,), generator=generator)
    room = torch.tensor(images.shape[-2:]) - torch.tensor(size)
    corners = _uniform(torch.zeros(count, 2, dtype=torch.long), room.expand(count, 2), 1, generator)
    return cut(images, mean, rows, size, corners)


def cut(
    images: Float[Tensor, "n 3 h w"],
    mean: Float[Tensor, "3 h w"],
    rows: Int[Tensor, " m"],
    size: int | tuple[int, int],
    corners: Int[Tensor, "m 2"],
) -> Float[Tensor, "m 3 height width"]:
    """Cut a rectangle out of each chosen image, less the mean image.

    Args:
        images: RGB in [0, 1].
        mean: what `mean_image` gave.
        rows: which image each is cut from.
        size: height and width in pixels; one number for a square.
        corners: top left, row and column, in pixels.

    Source: this book. Departures: none. Test: test_patch_pairs.py::test_crops_come_from_everywhere
    """
    height, width = (size, size) if isinstance(size, int) else size
    return torch.stack([
        images[row, :, y : y + height, x : x + width] - mean[:, y : y + height, x : x + width]
        for row, (y, x) in zip(rows.tolist(), corners.tolist(), strict=True)
    ])  # fmt: skip
