"""Read image files as 8-bit RGB in their EXIF orientation, and masks as bool."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps

from paperlib.validation import UnusableFile

ENDINGS = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm .ppm".split())
# The formats that are opened, whatever the file's name: others are unsafe, for example
# EPS, which runs a PostScript interpreter.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
MAX_LISTED = 10  # problems that one error lists


def read_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, rotated as its EXIF data require.

    16-bit values are scaled to 8 bits, grey is repeated three times, palettes and CMYK
    are converted, and transparent parts become white. Of several frames the first is
    read. Colour profiles are not applied: networks are trained on the numbers in the
    file.

    Args:
        path: of the file.

    Returns:
        a Pillow image of mode RGB.

    Raises:
        UnusableFile: naming the file and the reason, if it is missing, corrupt,
            truncated, or contains numbers whose range is not known (floating point, or
            integers above 65,535).
    """
    return _decode(path, _to_rgb)


def read_mask(path: str | Path) -> Bool[np.ndarray, "h w"]:
    """Read a mask: True where any channel is not zero.

    Args:
        path: of the file.

    Raises:
        UnusableFile: naming the file and the reason.
    """
    return _decode(path, _to_mask)


def list_image_files(folder: Path) -> list[Path]:
    """List the image files in a folder, without hidden ones, in natural order."""
    candidates = (
        path
        for path in folder.iterdir()
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".")
    )
    return sorted((path for path in candidates if path.is_file()), key=natural_sort_key)


def natural_sort_key(path: Path) -> tuple:
    """Return a sort key for natural order: frame2 before frame10."""
    parts = re.split(r"(\d+)", path.name)
    return [
        int(part) if number % 2 else part for number, part in enumerate(parts)
    ], path.name


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


def _decode(path: str | Path, convert):
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            _check_complete(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return convert(image)
    except MemoryError:
        raise
    # Pillow's decoders raise many kinds of errors for corrupt files.
    except Exception as error:
        raise UnusableFile(f"{path}: {error or type(error).__name__}") from error


def _check_complete(image: Image.Image) -> None:
    """Raise for a TIFF with missing strips, which Pillow would fill with black."""
    if image.format == "TIFF":
        right, bottom = (max(tile[1][i] for tile in image.tile) for i in (2, 3))
        if right < image.width or bottom < image.height:
            raise ValueError(
                f"its header states {image.width}×{image.height} pixels,"
                f" its data hold {right}×{bottom}"
            )


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "F":
        raise ValueError(
            "it contains floating-point numbers; expected 8 or 16 bits per channel."
            " Save it as 8-bit PNG"
        )
    if mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its values range from {values.min()} to {values.max()};"
                " expected 8 or 16 bits per channel"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", image.size, "white"), image
        ).convert("RGB")
    return image.convert("RGB")


def _to_mask(image: Image.Image) -> np.ndarray:
    if image.mode in ("P", "PA", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.ndim == 3:
        return (values[..., : 1 if image.mode == "LA" else 3] != 0).any(-1)
    return values != 0
