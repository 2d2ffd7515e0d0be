"""Picture files, whatever they hold, as 8-bit RGB the right way up; masks as True and
False.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps, UnidentifiedImageError

ENDINGS = frozenset(".png .jpg .jpeg .bmp .gif .tif .tiff .webp .pgm .ppm".split())
# What a file may hold, whatever its name: of the other kinds that Pillow opens, EPS
# runs a PostScript interpreter.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
LISTED = 10  # problems that one error names


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB, turned as its EXIF data say.

    16-bit values are scaled to 8 bits, grey is repeated three times, palettes and CMYK
    are converted, and transparent parts are laid on white. Of several frames the first
    is taken. Colour profiles are not applied: networks are trained on the file's own
    numbers.

    Args:
        path: of the file.

    Returns:
        a Pillow image of mode RGB.

    Raises:
        ValueError: naming the file and what is wrong, if it is missing, damaged, cut
            short, or holds numbers whose range is not known (floating point, or
            integers above 65,535).

    Source: this book; Pillow decodes. Departures: none.
    Test: test_image_files.py::test_every_kind_of_file_reads_as_independent_readers_do
    """
    return _read(path, _rgb)


def read_mask(path: str | Path) -> Bool[np.ndarray, "h w"]:
    """Read a mask: True where any colour is not zero, so that marks of 1 and of 255
    both count.

    Args:
        path: of the file.

    Raises:
        ValueError: naming the file and what is wrong.

    Source: this book; Pillow decodes. Departures: none.
    Test: test_image_files.py::test_masks_of_any_kind_are_boolean
    """
    return _read(path, _nonzero)


def list_image_files(folder: Path) -> list[Path]:
    """List the pictures in a folder by the ending of their names, hidden files left
    out, 2 before 10.

    Source: this book. Departures: none.
    Test: test_image_files.py::test_files_are_in_natural_order
    """
    found = (
        path
        for path in folder.iterdir()
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".")
    )
    return sorted((path for path in found if path.is_file()), key=natural_sort_key)


def natural_sort_key(path: Path) -> tuple:
    """Give the key that sorts names with numbers as people do: frame2 before frame10.

    Source: this book. Departures: none.
    Test: test_image_files.py::test_files_are_in_natural_order
    """
    parts = re.split(r"(\d+)", path.name)
    return [
        int(part) if number % 2 else part for number, part in enumerate(parts)
    ], path.name


def raise_problems(problems: Sequence[str], where: str | Path) -> None:
    """Raise one error for all problems of a data set, naming the first ten; do nothing
    where there is none.

    Raises:
        ValueError: if there is a problem.

    Source: this book. Departures: none.
    Test: test_image_files.py::test_one_error_names_ten_problems
    """
    if problems:
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)} in {where}"
        more = (
            [f"… and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        )
        raise ValueError(
            "\n  ".join(
                [f"{count}; mend or remove these files:", *problems[:LISTED], *more]
            )
        )


def _read(path: str | Path, convert):
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_whole(picture)
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return convert(picture)
    except FileNotFoundError:
        reason = "there is no such file"
    except UnidentifiedImageError:
        reason = (
            f"it is no picture that can be read; expected one of {', '.join(FORMATS)}"
        )
    except MemoryError:
        raise
    # Pillow's decoders raise many kinds of errors on damaged files
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise ValueError(f"{path}: {reason}")


def _check_whole(picture: Image.Image) -> None:
    """Refuse a TIFF whose strips end before its height does: Pillow would take any
    memory, and leave the rest black.
    """
    if picture.format == "TIFF":
        width, height = (
            max((tile[1][side] for tile in picture.tile), default=0) for side in (2, 3)
        )
        if width < picture.width or height < picture.height:
            raise ValueError(
                f"it announces {picture.width}×{picture.height} pixels"
                f" and holds {width}×{height}"
            )


def _rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "F":
        raise ValueError(
            "it holds floating-point numbers; expected 8 or 16 bits a channel."
            " Save it as 8-bit PNG"
        )
    if mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its values range from {values.min()} to {values.max()};"
                " expected 8 or 16 bits a channel"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", picture.size, "white"), picture
        ).convert("RGB")
    return picture.convert("RGB")


def _nonzero(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("P", "PA", "CMYK", "YCbCr"):
        picture = picture.convert("RGB")
    values = np.asarray(picture)
    if values.ndim == 3:
        return (values[..., : 1 if picture.mode == "LA" else 3] != 0).any(-1)
    return values != 0
