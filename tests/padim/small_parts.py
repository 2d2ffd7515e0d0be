"""Images of parts in a path with a space and a non-ASCII letter: 24 good and 8 others.

Real textures in five formats, several sizes and nested folders; four of the eight have
a black rectangle, a synthetic defect.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from paperlib.datasets import textures

FORMATS = ("png", "jpg", "tif", "bmp", "12-bit png")
DEFECTIVE = 4  # of the images to inspect, the last ones


def write(root: Path) -> tuple[Path, Path]:
    """Write both sets; return their folders."""
    good, other = root / "good pärts", root / "to inspect"
    for number, item in enumerate(textures("gravel", count=24, side=128)):
        save(item.image, good / ("line 2" if number % 3 == 0 else ""), number)
    for number, item in enumerate(textures("gravel", "test", count=8)):
        is_defective = number >= 8 - DEFECTIVE
        # The same names in both folders.
        save(item.image, other / "ab"[number % 2], number // 2, number, is_defective)
    return good, other


def defect(height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the synthetic defect."""
    top, left = height // 3, width // 4
    return slice(top, top + height // 5), slice(left, left + width // 3)


def save(image, folder, name, number=None, is_defective=False) -> Path:
    number = name if number is None else number
    height = 120 + 8 * (number % 5)
    grey = Image.fromarray((255 * image[0]).round().byte().numpy())
    pixels = np.array(grey.resize((height + 40, height)))
    if is_defective:
        pixels[defect(*pixels.shape)] = 10
    kind = FORMATS[number % len(FORMATS)]
    if kind == "12-bit png":
        pixels = pixels.astype(np.uint16) * 16
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tüv {name}.{kind.split()[-1]}"
    Image.fromarray(pixels).save(path, **{"quality": 95} if kind == "jpg" else {})
    return path
