"""Check the range of images and compute the mean image that is subtracted."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from paperlib.distributed import check_same_size, fail_together
from paperlib.patch_svdd.encoders import check_rgb
from paperlib.validation import check_finite, has_values

# Images are summed in batches, so that a memory-mapped file is never copied as a whole.
IMAGES_PER_SUM = 8


def mean_image(
    images: Tensor, *, group_device: torch.device | None = None
) -> Float[Tensor, "3 h w"]:
    """Average the training images, pixel by pixel, after checking them.

    Args:
        images: (N, 3, H, W), RGB in [0, 1].
        group_device: None for the mean of `images`. A device for the mean over all
            processes of `torch.distributed`, which communicate there: all of them call
            this, each with at least one image.

    Raises:
        ValueError: for images that are not a finite floating-point batch (N, 3, H, W)
            in [0, 1] of at least 64×64 pixels; for a single image, images that are all
            equal (their difference from the mean is 0), or an image of one colour. With
            `group_device`, every process raises if one of them does.

    Source: the released code of Patch SVDD. Departures: none.
    Test: test_pairs.py::test_unusable_training_images_are_refused
    """
    with fail_together(group_device):
        images = check_range(images)
        _check_colours(images)
    total = images.new_zeros(images.shape[1:], dtype=torch.float64)
    for part in images.split(IMAGES_PER_SUM):
        total += part.sum(0, dtype=torch.float64)
    if group_device is None:
        count, differ = len(images), _any_differs(images, images[0])
    else:
        total, count, differ = _combine(images, total.to(group_device))
    if count < 2:
        raise ValueError(
            "1 training image; expected at least 2,"
            " because the mean is subtracted and a single image minus itself is 0"
        )
    if not differ:
        raise ValueError(
            f"the {count} training images are all equal,"
            " and 0 after subtracting the mean; expected different images"
        )
    return (total / count).to(images)


def check_range(images: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return detached images if they are RGB in [0, 1] and not smaller than a patch.

    Args:
        images: (N, 3, H, W).
        mean: the mean training image (3, H, W), which the images must fit; or None.

    Raises:
        ValueError: with the received shape or range.
    """
    images = check_rgb(images, values=False)
    if has_values(images):
        low, high = torch.stack(torch.aminmax(images)).tolist()
        if math.isnan(low):
            check_finite(images, "images")
        if low < -1e-3 or high > 1 + 1e-3:  # resizing may round beyond the limits
            raise ValueError(
                f"images range from {low:.3g} to {high:.3g}; expected 0 to 1."
                " Divide 8-bit values by 255"
            )
    if mean is not None and images.shape[1:] != mean.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)};"
            f" expected {tuple(mean.shape)} each, as in training,"
            " since the mean of those images is subtracted. Resize them"
        )
    return images


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
    return not has_values(images) or any(
        bool((part != reference).any()) for part in images.split(IMAGES_PER_SUM)
    )


def _check_colours(images: Tensor) -> None:
    spread = (images.amax((2, 3)) - images.amin((2, 3))).amax(1)
    if has_values(images) and (spread == 0).any():
        rows = (spread == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"training images number {', '.join(map(str, rows[:8]))}"
            " are of one colour; remove them"
        )
