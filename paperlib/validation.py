"""Input validation for numbers, images and class indices."""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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
    check_tensor(array, name, is_float=False)
    check_values(array, name)
    is_wide = array.dtype in (torch.uint16, torch.uint32, torch.uint64)
    return array.long() if is_wide else array


def check_integers(least: int = 1, /, **numbers: int) -> None:
    """Raise ValueError with the names of those that are not integers ≥ `least`."""
    wrong = [
        f"{name}={value!r}"
        for name, value in numbers.items()
        if not isinstance(value, int | np.integer)
        or isinstance(value, bool)
        or not least <= value < 2**63
    ]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}; expected at least {least}, an integer")


def check_number(
    name: str,
    value: Any,
    what: str,
    *,
    least: float | None = None,
    above: float = -math.inf,
    most: float = math.inf,
) -> None:
    """Raise ValueError unless a finite number lies between limits.

    Args:
        name: of the argument.
        value: of it.
        what: is expected, for the error: "a share of the bank".
        least: lower limit, included.
        above: lower limit, excluded.
        most: upper limit, included.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating)
    largest = torch.finfo(torch.float32).max
    if not (
        is_number
        and not isinstance(value, bool)
        and abs(value) <= largest
        and (above < value if least is None else least <= value)
        and value <= most
    ):
        low = f" above {above:g}" if least is None else f", at least {least:g}"
        limits = f"{low} and at most {min(most, largest):.3g}"
        raise ValueError(f"{name}={value!r}; expected {what}{limits}")


def check_tensor(
    values: Any, name: str, axes: str = "", *, is_float: bool = True
) -> None:
    """Raise ValueError unless values are a dense tensor of real numbers.

    Args:
        values: to check.
        name: of them in the error, in the plural.
        axes: names of the axes, separated by commas: "N, C, H, W"; any if empty.
        is_float: whether floating point is required.
    """
    expected = f"a torch.Tensor ({axes})" if axes else "a torch.Tensor"
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} of type {type(values).__name__}; expected {expected}")
    if values.layout != torch.strided or values.is_quantized or values.is_complex():
        raise ValueError(
            f"{name} of {values.dtype} and {values.layout};"
            " expected dense real numbers."
            " Convert them with .to_dense(), .dequantize() or .abs()"
        )
    if is_float and not values.is_floating_point():
        raise ValueError(
            f"{_describe(values, name)}; expected floating point."
            " Convert them with .float()"
        )
    if axes and values.ndim != axes.count(",") + 1:
        raise ValueError(f"{_describe(values, name)}; expected ({axes})")


def check_iterable(batches: Any, what: str = "an iterable of batches") -> None:
    """Raise ValueError unless a loop can run over the batches."""
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes | Mapping):
        raise ValueError(f"{batches!r:.80}; expected {what}")


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return two sides in pixels; one number is that of a square.

    Raises:
        ValueError: for anything else, and sides below 1.
    """
    sides = size if isinstance(size, Sequence) else (size, size)
    try:
        height, width = sides
        check_integers(height=height, width=width)
    except ValueError:
        raise ValueError(
            f"size={size!r:.80}; expected a height and a width of at least 1 pixel,"
            " or one integer for both"
        ) from None
    return height, width


def check_module(model: Any, name: str = "the model") -> None:
    """Raise ValueError unless a model is a module that has been built."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{name} is {model!r:.80}; expected an nn.Module that has been built,"
            " such as MobileNetV1()"
        )


def as_path(path: str | Path) -> Path:
    """Return a path; raise UnusableFile for anything that can't be one."""
    is_path = isinstance(path, str | os.PathLike) and str(path)
    if not is_path or "\0" in str(path) or len(Path(path).name) > 255:
        raise UnusableFile(f"{path!r:.80} is no path; expected a str or a pathlib.Path")
    return Path(path)


def check_choice(name: str, value: Any, choices: Collection) -> None:
    """Raise ValueError unless the value of an argument is one of its choices."""
    if isinstance(value, Tensor | np.ndarray | list | dict) or value not in choices:
        shown = ", ".join(map(str, choices))
        raise ValueError(f"{name}={value!r:.80}; expected one of {shown}")


def check_same_kind(
    what: str, values: Tensor, other_what: str, others: Tensor, *, dtype: bool = True
) -> None:
    """Raise ValueError unless two tensors have the same dtype and device.

    Args:
        what: name of `values` in the error, in the plural.
        values: a tensor.
        other_what: name of `others` in the error, in the singular.
        others: a tensor.
        dtype: False compares the devices only.
    """
    if values.device != others.device or (dtype and values.dtype != others.dtype):
        raise ValueError(
            f"{what} are {values.dtype} on {values.device} and {other_what}"
            f" is {others.dtype} on {others.device}; expected the same."
            " Convert one with .to(…)"
        )


def check_indices(name: str, indices: Any, length: int, what: str) -> Tensor:
    """Return int64 indices; raise ValueError unless they are at least one and in range.

    Args:
        name: of the indices.
        indices: of an integer dtype and any shape; values are read on the CPU only.
        length: of what is indexed.
        what: is indexed, for the error.
    """
    check_tensor(indices, name, is_float=False)
    is_integer = not indices.is_floating_point() and indices.dtype != torch.bool
    if not is_integer or not indices.numel():
        raise ValueError(f"{_describe(indices, name)}; expected integers, {what}")
    indices = indices.long()
    # On a GPU reading would wait for it.
    if has_values(indices) and indices.device.type == "cpu":
        low, high = (value.item() for value in torch.aminmax(indices))
        if low < 0 or high >= length:
            raise ValueError(
                f"{name} from {low} to {high}; expected {what}, 0 to {length - 1}"
            )
    return indices


def check_values(values: Tensor, name: str) -> None:
    """Raise ValueError for a tensor on the meta device."""
    if values.is_meta:
        raise ValueError(
            f"{name} are on the meta device, without values; expected another device"
        )


def check_supports_float64(device: torch.device | str) -> None:
    """Raise ValueError for a device that has no double precision."""
    if torch.device(device).type == "mps":
        raise ValueError(
            "device='mps' has no float64, in which sums are computed here;"
            " expected 'cpu' or 'cuda'. Move the network and the images with .to('cpu')"
        )


def check_generator(generator: Any) -> None:
    """Raise ValueError unless random numbers can be drawn from a generator."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator={generator!r:.80}; expected torch.Generator().manual_seed(0)"
        )


def as_device(device: torch.device | str) -> torch.device:
    """Return a device; raise ValueError for an unknown one."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={str(device)!r:.80} ({str(error).partition(chr(10))[0]});"
            " expected a device of this machine, such as 'cpu'"
        ) from error
    return device


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
    images: Float[Tensor, " n *axes"], *, any_axes: bool = False, values: bool = True
) -> Float[Tensor, " n *axes"]:
    """Return a detached batch of images, usable outside inference mode.

    Args:
        images: (N, C, H, W).
        any_axes: True accepts signals, volumes and other batches (N, …) as well.
        values: False does not look for NaN, because a later step does.

    Raises:
        ValueError: unless it is a floating-point batch (N, C, H, W) with at least one
            image and no NaN.
    """
    check_tensor(images, "images", is_float=False)
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
    if values:
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
    check_tensor(images, name, is_float=False)
    received = _describe(images, name)
    if images.numel() == 0:
        raise ValueError(f"{received} are empty; expected at least one pixel")
    is_grey_batch = images.dtype == torch.uint8 and images.shape[-1:] not in (
        (3,),
        (4,),
    )
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
        # Later steps are 1.6 times as fast on contiguous channels as on (N, H, W, C).
        batch = batch.contiguous().to(torch.get_default_dtype()).div_(255)
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
    return index


def _class_indices(targets: ClassTargets, n: int, device: torch.device) -> Tensor:
    """Return integers of shape (N,) or (N, T); raise ValueError for anything else."""
    if isinstance(targets, Tensor):
        check_tensor(targets, "targets", is_float=False)
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
    return index.long()
