"""Input validation for numbers, images and class indices."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def has_values(values: Tensor) -> bool:
    """Return whether a tensor's values can be read: not if meta, fake or compiled.

    Source: this book. Departures: none.
    Test: test_validation.py::test_meta_and_fake_tensors_are_not_read
    """
    return (
        values.device.type != "meta"
        and not hasattr(values, "fake_mode")
        and not torch.compiler.is_compiling()
    )


def check_at_least_one(**numbers: int) -> None:
    """Raise ValueError with the names of the numbers that are below 1.

    Source: this book. Departures: none.
    Test: test_validation.py::test_arguments_out_of_range_are_refused_by_name
    """
    low = {name: value for name, value in numbers.items() if value < 1}
    if low:
        received = ", ".join(f"{name}={value}" for name, value in low.items())
        raise ValueError(f"{received}; expected at least 1")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError unless the value of an argument is one of its choices.

    Source: this book. Departures: none.
    Test: test_validation.py::test_arguments_out_of_range_are_refused_by_name
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(choices)}")


def check_same_kind(what: str, values: Tensor, other_what: str, others: Tensor) -> None:
    """Raise ValueError unless two tensors have the same dtype and device.

    Args:
        what: name of `values` in the error, in the plural.
        values: a tensor.
        other_what: name of `others` in the error, in the singular.
        others: a tensor.

    Source: this book. Departures: none.
    Test: test_encoders.py::test_what_cannot_be_embedded_is_refused
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

    Source: this book. Departures: none.
    Test: test_validation.py::test_bad_images_are_refused
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


def check_images(images: Any) -> Tensor:
    """Return a detached batch of images, usable outside inference mode.

    Raises:
        ValueError: unless it is a floating-point batch (N, C, H, W) with at least one
            image and no NaN.

    Source: this book. Departures: none.
    Test: test_validation.py::test_bad_images_are_refused
    """
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images of type {type(images).__name__};"
            " expected a torch.Tensor (N, C, H, W)"
        )
    received = (
        f"images of shape {tuple(images.shape)}"
        f" and dtype {str(images.dtype).removeprefix('torch.')}"
    )
    if images.ndim != 4:
        hint = ". Add a batch axis with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"{received}; expected a batch (N, C, H, W){hint}")
    if not images.is_floating_point():
        raise ValueError(
            f"{received}; expected floating point, scaled as the model was trained"
        )
    if images.numel() == 0:
        raise ValueError(f"{received}; expected at least one image, and no empty axis")
    check_finite(images, "images")
    return images.clone() if images.is_inference() else images.detach()


def target_classes(targets: Any, logits: Any, n: int) -> Tensor:
    """Convert targets to class indices.

    Args:
        targets: None for the class of the largest logit, one class for all images, N
            classes, or N rows of T classes.
        logits: the model's output.
        n: number of images.

    Returns:
        int64 of shape (N,), or (N, T) for T classes per image, on the logits' device.

    Raises:
        ValueError: if the logits are not (N, classes), or the targets are not one class
            (or T classes) per image.

    Source: this book. Departures: none.
    Test: test_validation.py::test_targets_that_fit_no_batch_are_refused
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
    classes = logits.shape[1]
    if targets is None:
        return logits.argmax(1)
    try:
        index = torch.as_tensor(targets, device=logits.device)
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
    if has_values(index):
        outside = index[(index < 0) | (index >= classes)].unique().tolist()
        if outside:
            raise ValueError(
                f"targets {outside[:8]} are outside the model's {classes} classes,"
                f" 0 to {classes - 1}"
            )
    return index.long()
