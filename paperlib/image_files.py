"""Read image files as 8-bit RGB in their EXIF orientation, and masks as bool."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from paperlib.precision import at_least_float32
from paperlib.validation import UnusableFile, as_path

ENDINGS = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm .ppm".split())
# The formats that are opened, whatever the file's name: others are unsafe, for example
# EPS, which runs a PostScript interpreter.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_LISTED = 10  # problems that one error lists
RESAMPLING = ("bilinear", "bicubic")
DEPTHS = (8, 10, 12, 14)  # bits of cameras that write 16-bit files
MAX_LABEL = 15  # masks with more values, up to this one, hold labels of classes


def read_image(path: str | Path, bits: int | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, rotated as its EXIF data require.

    16-bit values are scaled to 8 bits, grey is repeated three times, palettes and CMYK
    are converted, and transparent parts become white. Of several frames the first is
    read. Colour profiles are not applied: networks are trained on the numbers in the
    file.

    Args:
        path: of the file.
        bits: depth of the data in 16-bit grey files, for example 12 for a camera of 12
            bits: white is 2**bits - 1. None for 16. Files of 8 bits do not depend on
            it, nor files that state their depth.

    Returns:
        a Pillow image of mode RGB.

    Raises:
        UnusableFile: naming the file and the reason, if it is missing, corrupt,
            truncated, contains numbers whose range is not known (floating point, or
            integers above 65,535), values above 2**bits - 1, or 16-bit colours with
            fewer `bits`, because Pillow reads only their upper 8.
    """
    check_bits(bits)
    return _decode(path, partial(_file_to_rgb, bits=bits))


def read_mask(path: str | Path) -> Bool[np.ndarray, "h w"]:
    """Read a mask: True where the largest channel is above half of the image's maximum.

    So JPEG and antialiased masks are read as the shapes that they were drawn as. If
    parts are transparent, they are not marked; of a mask in one colour the
    transparency is the mask.

    Args:
        path: of the file.

    Raises:
        UnusableFile: naming the file and the reason; also for small numbers such as 0,
            1 and 2, which are labels of classes and no soft mask.
    """
    return _decode(path, lambda image, _: _to_mask(image))


def check_bits(bits: int | None) -> None:
    """Raise ValueError unless `bits` is None or a depth that a 16-bit file can hold."""
    is_integer = isinstance(bits, int | np.integer)
    if bits is not None and not (is_integer and 8 <= bits <= 16):
        raise ValueError(f"bits={bits!r:.80}; expected 8 to 16, or None")


def check_depth(
    paths: Sequence[Path], where: str | Path, bits: int | None = None
) -> None:
    """Raise if all 16-bit images of a folder leave the top bits empty.

    They are decoded until one has a value of 2**14 or more: in most folders the first.
    One 16-bit image alone is accepted, because it may be a dark one. Files that can't
    be read are skipped; reading them as items raises.

    Args:
        paths: of the images.
        where: the folder, for the error.
        bits: their depth, as for `read_image`. Unless it is None, no file is read.

    Raises:
        ValueError: that names the likely depth, or for `bits` that can't be a depth.
    """
    check_bits(bits)
    if bits is not None:
        return
    n, highest = 0, 0
    for path in paths:
        try:
            value = _decode(path, _highest_value, if_raw=_is_16_bit)
        except UnusableFile:
            continue
        n, highest = n + (value is not None), max(highest, value or 0)
        if highest >> DEPTHS[-1]:
            return
    if n > 1 and highest:
        likely = next(bits for bits in DEPTHS if highest >> bits == 0)
        raise ValueError(
            f"the {n} images of 16 bits in {where} have no value above {highest}, of"
            f" 65535; expected white at the top. Pass bits={likely} if that is the"
            " camera's depth, or bits=16 if all images are this dark"
        )


def list_image_files(folder: Path, nested: bool = True) -> list[Path]:
    """List the image files in a folder, without hidden ones, in natural order.

    Args:
        folder: to list; it must exist.
        nested: whether to list the folders in it too.
    """
    paths = (
        path.relative_to(folder) for path in folder.glob("**/*" if nested else "*")
    )
    in_order = sorted(paths, key=lambda path: [*map(_natural_sort_key, path.parts)])
    candidates = (
        folder / path
        for path in in_order
        if path.suffix.lower() in ENDINGS
        and not any(part.startswith(".") for part in path.parts)
    )
    return [path for path in candidates if path.is_file()]


def _natural_sort_key(name: str) -> tuple:
    """Return a sort key for natural order: frame2 before frame10."""
    parts = re.split(r"(\d+)", name)
    return [
        int(part) if number % 2 else part for number, part in enumerate(parts)
    ], name


def raise_problems(problems: Sequence[str], where: str | Path) -> None:
    """Raise one error that lists the first ten problems of a data set, if there is any.

    Raises:
        ValueError: if there is a problem.
    """
    if problems:
        n, hidden = len(problems), len(problems) - MAX_LISTED
        lines = [
            f"{n} problem{'s' * (n > 1)} in {where}; fix or remove these files:",
            *problems[:MAX_LISTED],
            *[f"… and {hidden} more"] * (hidden > 0),
        ]
        raise ValueError("\n  ".join(lines))


def _decode(
    path: str | Path,
    convert: Callable[[Image.Image, str], Any],
    if_raw: Callable[[str], bool] = lambda raw: True,
) -> Any:
    """Decode and convert an image, or return None.

    Args:
        path: of the file.
        convert: of the decoded image and Pillow's raw mode, such as "RGB;16B".
        if_raw: whether a file of a raw mode is decoded at all.
    """
    path = as_path(path)  # Pillow takes what it does not know for an open file
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            raw = str(image.tile[0][3]) if image.tile else ""
            if not if_raw(raw):
                return None
            _check_complete(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return convert(image, raw)
    except MemoryError:
        raise
    # Pillow's decoders raise many kinds of errors for corrupt files.
    except Exception as error:
        raise UnusableFile(f"{path}: {error or type(error).__name__}") from error


def _is_16_bit(raw: str) -> bool:
    """Return whether a file has 16 or 32 bits per channel and does not state fewer."""
    return ";16" in raw or "I;32" in raw


def _highest_value(image: Image.Image, raw: str) -> int:
    """Return the highest value of a 16-bit image, without its transparency."""
    values = np.asarray(image)
    if image.mode.startswith("I"):
        return int(values.max())
    # Of 16-bit colours Pillow keeps the upper 8 bits.
    return int(values[..., : 1 if image.mode == "LA" else 3].max()) << 8 | 255


def _file_to_rgb(image: Image.Image, raw: str, bits: int | None) -> Image.Image:
    is_grey = image.mode.startswith("I")
    if is_grey and not _is_16_bit(raw):
        bits = 12 if "I;12" in raw else None  # the file states its depth
    elif ";16" in raw and not is_grey and (bits or 16) < 16:
        raise ValueError(
            f"bits={bits} of 16-bit colours, of which Pillow reads the upper 8 bits"
            f" only; multiply the values by {2 ** (16 - bits)} and save them again"
        )
    return to_rgb(image, bits)


def _check_complete(image: Image.Image) -> None:
    """Raise for a TIFF with missing strips, which Pillow would fill with black."""
    if image.format == "TIFF":
        right, bottom = (max(tile[1][i] for tile in image.tile) for i in (2, 3))
        if right < image.width or bottom < image.height:
            raise ValueError(
                f"its header states {image.width}×{image.height} pixels,"
                f" its data hold {right}×{bottom}"
            )


def to_rgb(image: Image.Image, bits: int | None = None) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, as `read_image` does.

    Raises:
        ValueError: for numbers whose range is not known, or above 2**bits - 1.
    """
    mode = image.mode
    if mode == "F":
        raise ValueError(
            "it contains floating-point numbers; expected 8 or 16 bits per channel."
            " Save it as 8-bit PNG"
        )
    if mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return Image.fromarray(to_8_bits(np.asarray(image), bits)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", image.size, "white"), image
        ).convert("RGB")
    return image.convert("RGB")


def to_8_bits(values: np.ndarray, bits: int | None) -> UInt8[np.ndarray, "..."]:
    """Scale integers so that 2**bits - 1 becomes 255; None for 16 bits.

    Raises:
        ValueError: for values outside 0 to 2**bits - 1.
    """
    white, values = 2 ** (bits or 16) - 1, values.astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > white:
        depth = f"bits={bits}" if bits else "8 or 16 bits per channel"
        raise ValueError(
            f"its values range from {low} to {high}; expected {depth}, 0 to {white}"
        )
    return ((values * 255 + white // 2) // white).astype(np.uint8)


def resize_images(
    images: Float[Tensor, "n 3 h w"],
    size: tuple[int, int],
    resampling: str = "bilinear",
) -> Float[Tensor, "n 3 height width"]:
    """Resize RGB in [0, 1] to (height, width), with antialiasing.

    Bicubic on the CPU is Pillow's, on 8 bits, as for MVTec AD; all else computes in at
    least float32.
    """
    x = images.to(at_least_float32(images.dtype))
    if resampling == "bicubic" and x.device.type == "cpu":
        pixels = (x * 255).round().byte().movedim(1, -1).numpy()
        resized = [
            Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
            for image in pixels
        ]
        return torch.from_numpy(np.stack(resized)).movedim(-1, 1).to(x.dtype) / 255
    x = F.interpolate(x, size, mode=resampling, antialias=True, align_corners=False)
    return x.clamp_(0, 1)


def _to_mask(image: Image.Image) -> np.ndarray:
    alpha = None
    if image.has_transparency_data and not image.mode.startswith("I"):
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
    if image.mode in ("P", "RGBA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values.max(-1) if values.ndim == 3 else values
    if alpha is not None and np.ptp(alpha):
        is_plain = np.ptp(np.asarray(image), axis=(0, 1)).max() == 0
        values = alpha if is_plain else values * (alpha / 255)
        if not values.any():
            raise ValueError(
                "its colours and its transparency mark different pixels;"
                " save it without transparency, defects white on black"
            )
    highest = values.max()
    labels = np.unique(values) if highest <= MAX_LABEL else ()
    if values.dtype.kind in "iu" and len(labels) > 2:
        raise ValueError(
            f"its values are {', '.join(map(str, labels))}, labels of classes;"
            " expected a mask, 0 and 255. Save every defect as 255"
        )
    return values > max(highest / 2, 0)
