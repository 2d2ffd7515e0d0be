"""Input validation for numbers, images and class indices."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

# The predicted classes, one class for all images, N classes, or N rows of T classes.
ClassTargets = (
    int | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray | None
)

# What `as_tensor` converts.
Numbers = Tensor | np.ndarray | Sequence


class NotFitted(ValueError):
    """A detector is used before `fit` or `load`."""


class UnusableFile(ValueError, OSError):
    """A file is missing, corrupt, or of another kind than expected."""


def has_values(values: Tensor) -> bool:
    """Return whether a tensor's values can be read: not if meta, fake or compiled."""
    return (
        values.device.type != "meta"
        and not hasattr(values, "fake_mode")
        and not torch.compiler.is_compiling()
    )


def as_tensor(values: Numbers, name: str) -> Tensor:
    """Convert an array or nested sequences of numbers to a tensor; tensors are kept.

    Args:
        values: real numbers. Unsigned integers of 16 bits or more become int64, for
            which PyTorch has all operations.
        name: of the values, for the error.

    Raises:
        ValueError: for anything else, such as complex numbers or rows of several
            lengths.
    """
    try:
        array = (
            values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} of type {type(values).__name__} can't be read as numbers"
            f" ({error}); expected a tensor or an array"
        ) from error
    if array.is_complex():
        raise ValueError(f"{name} are complex; expected real numbers")
    is_wide = array.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return array.long() if is_wide else array


def check_at_least_one(**numbers: int) -> None:
    """Raise ValueError with the names of the numbers that are below 1."""
    low = {name: value for name, value in numbers.items() if value < 1}
    if low:
        received = ", ".join(f"{name}={value}" for name, value in low.items())
        raise ValueError(f"{received}; expected at least 1")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless the value of an argument is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(choices)}")


def check_same_kind(what: str, values: Tensor, other_what: str, others: Tensor) -> None:
    """Raise ValueError unless two tensors have the same dtype and device.

    Args:
        what: name of `values` in the error, in the plural.
        values: a tensor.
        other_what: name of `others` in the error, in the singular.
        others: a tensor.
    """
    if (values.dtype, values.device) != (others.dtype, others.device):
        raise ValueError(
            f"{what} are {values.dtype} on {values.device} and {other_what}"
            f" is {others.dtype} on {others.device}; expected the same."
            " Convert one with .to(…)"
        )


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError if any value is NaN or infinite.

    Meta and fake tensors are skipped.

    Args:
        values: of any shape with at least one axis; the error counts along the first.
        what: what the entries of the first axis are, for example "images".

    Raises:
        ValueError: with the number of such values and the first entries that contain
            one.
    """
    # A finite sum has finite terms. The converse can fail.
    if not has_values(values) or torch.isfinite(values.sum()):
        return
    bad = (~torch.isfinite(values)).reshape(len(values), -1).sum(1)
    rows = bad.nonzero().flatten().tolist()
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        raise ValueError(
            f"{int(bad.sum())} values of {what} are NaN or infinite,"
            f" in {what} number {shown}; remove or fix them"
        )


def check_images(
    images: Float[Tensor, " n *axes"], *, any_axes: bool = False
) -> Float[Tensor, " n *axes"]:
    """Return a detached batch of images, usable outside inference mode.

    Args:
        images: (N, C, H, W).
        any_axes: True accepts signals, volumes and other batches (N, …) as well.

    Raises:
        ValueError: unless it is a floating-point batch (N, C, H, W) with at least one
            image and no NaN.
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images of type {type(images).__name__};"
            " expected a torch.Tensor (N, C, H, W)"
        )
    received = _describe(images, "images")
    if images.ndim != 4 and not (any_axes and images.ndim > 1):
        hint = ". Add a batch axis with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{received}; expected a batch (N, C, H, W){hint}")
    if not images.is_floating_point():
        raise ValueError(
            f"{received}; expected floating point, scaled as the model was trained"
        )
    if images.numel() == 0:
        raise ValueError(f"{received}; expected at least one image, and no empty axis")
    check_finite(images, "images")
    is_inference = not torch.compiler.is_compiling() and images.is_inference()
    return images.clone() if is_inference else images.detach()


def channels_first(images: Tensor, name: str = "images") -> Tensor:
    """Return a batch of images of any layout as a view (N, C, H, W).

    Args:
        images: (N, C, H, W) or (N, H, W, C) with C = 3, or 1 for grey; or grey
            (N, H, W). Of floating-point numbers (N, H, W) is accepted for N = 1 only,
            because (3, H, W) is rather one colour image without a batch axis; so is
            uint8 (H, W, 3), and (H, W, 4).
        name: of the images, for messages.

    Raises:
        ValueError: for another shape, an empty batch, or a shape in which either axis
            could be that of the channels.
    """
    received = _describe(images, name)
    if images.numel() == 0:
        raise ValueError(f"{received} are empty; expected at least one pixel")
    is_grey_batch = images.dtype == torch.uint8 and images.shape[-1] not in (3, 4)
    if images.ndim == 3 and (is_grey_batch or len(images) == 1):
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, 3))
    if first and last:
        raise ValueError(f"{received}; the axis of the colours is ambiguous")
    if not first and not last:
        hint = ". Add a batch axis with images[None]" if images.ndim < 4 else ""
        raise ValueError(
            f"{received}; expected (N, C, H, W) or (N, H, W, C) with 3 channels"
            f" or 1{hint}"
        )
    return images if first else images.movedim(-1, 1)


def rgb_batch(images: Tensor, name: str = "images") -> Tensor:
    """Convert a batch of images to floating-point RGB (N, 3, H, W) in [0, 1].

    Args:
        images: of a layout that `channels_first` accepts; uint8, or floating point in
            [0, 1]. Grey images get three equal channels.
        name: of the images, for messages.

    Returns:
        uint8 divided by 255, in PyTorch's default dtype; floating point as it is.

    Raises:
        ValueError: for another shape or dtype, or values outside [0, 1].
    """
    batch = channels_first(images, name)
    received = _describe(images, name)
    if images.dtype == torch.uint8:
        batch = batch.to(torch.get_default_dtype()) / 255
    elif not images.is_floating_point():
        raise ValueError(f"{received}; expected uint8, or floating point in [0, 1]")
    elif has_values(images):
        low, high = (value.item() for value in torch.aminmax(images))
        if not (low >= -1e-6 and high <= 1 + 1e-6):  # resizing rounds
            raise ValueError(
                f"{received} range from {low:g} to {high:g}; expected [0, 1]."
                " Divide 8-bit values by 255, and undo a network's normalisation"
            )
    return batch.expand(-1, 3, -1, -1)


def _describe(images: Tensor, name: str) -> str:
    dtype = str(images.dtype).removeprefix("torch.")
    return f"{name} of shape {tuple(images.shape)} and dtype {dtype}"


def target_classes(targets: ClassTargets, logits: Any, n: int) -> Int[Tensor, " n *t"]:
    """Convert targets to class indices.

    Args:
        targets: None for the class of the largest logit, one class for all images, N
            classes, or N rows of T classes.
        logits: the model's output, which may be of any type.
        n: number of images.

    Returns:
        int64 of shape (N,), or (N, T) for T classes per image, on the logits' device.

    Raises:
        ValueError: if the logits are not (N, classes), or the targets are not one class
            (or T classes) per image.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n:
        what = (
            f"shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else f"type {type(logits).__name__}"
        )
        raise ValueError(
            f"the model returns an output of {what}; expected logits ({n}, classes)."
            " For any other output pass grad_cam targets=<function of the output that"
            " returns one score per image>"
        )
    if targets is None:
        return logits.argmax(1)
    classes, index = logits.shape[1], _class_indices(targets, n, logits.device)
    if has_values(index):
        outside = index[(index < 0) | (index >= classes)].unique().tolist()
        if outside:
            raise ValueError(
                f"targets {outside[:8]} are outside the model's {classes} classes,"
                f" 0 to {classes - 1}"
            )
    return index.long()


def _class_indices(targets: ClassTargets, n: int, device: torch.device) -> Tensor:
    """Return integers of shape (N,) or (N, T); raise ValueError for anything else."""
    try:
        index = torch.as_tensor(targets, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"targets {targets!r} can't be read as class indices ({error});"
            " expected integers"
        ) from None
    if index.ndim == 0:
        index = index.expand(n)
    if index.ndim > 2 or len(index) != n or index.shape[-1] == 0:
        raise ValueError(
            f"targets of shape {tuple(index.shape)} for {n} image{'s' * (n != 1)};"
            f" expected one class, {n} classes, or ({n}, T) for T classes per image,"
            " for example [[254, 281]]"
        )
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"targets of dtype {str(index.dtype).removeprefix('torch.')};"
            " expected integer class indices"
        )
    return index
