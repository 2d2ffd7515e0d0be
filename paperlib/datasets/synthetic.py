"""Synthetic defects: cracks, scratches and stains painted on real images, with masks.

They show only how a method behaves as the contrast of a defect decreases. Every
docstring, path and caption calls them synthetic.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from paperlib.items import Item, TensorItems, check_dataset, check_item
from paperlib.validation import (
    check_integers,
    check_number,
)

DEFECTS = ("crack", "scratch", "stain")
_SUPERSAMPLING = 4  # lines are drawn this much larger and averaged


def synthetic_defects(
    normal: Tensor | Dataset,
    *,
    kinds: Sequence[str] = DEFECTS,
    contrast: float = 0.5,
    seed: int = 0,
    size: int | None = None,
) -> "SyntheticDefects":
    """Paint one synthetic defect on each real image.

    A crack is a jagged dark line that may branch, a scratch a straight or slightly bent
    bright line, a stain a soft blot, dark on a bright background and bright on a dark
    one. Kind, position and shape depend only on the seed and the image's index, so the
    masks are the same at every contrast.

    Args:
        normal: images without defects: a data set of items, for example
            `textures("brick", "test")`, or a tensor as for `TensorItems`, for example
            `elpv("mono").images[:50]`.
        kinds: those to choose from, of "crack", "scratch" and "stain".
        contrast: 0 is invisible, 1 is opaque.
        seed: of kinds, positions and shapes.
        size: side in pixels to which a tensor's images are resized before painting;
            None for no resizing.

    Returns:
        a data set of items with label 1, a mask, and a path that begins with
        "synthetic".

    Raises:
        ValueError: for an unknown kind, a contrast outside [0, 1], or `size` with a
            data set.

    Example:
        >>> from paperlib.datasets import synthetic_defects, textures
        >>> normal = textures("brick", "test", count=4)
        >>> defective = synthetic_defects(normal, kinds=["crack"], contrast=0.8)
        >>> item = defective[0]
        >>> item.label, bool(item.mask.any()), item.path[:15]
        (1, True, 'synthetic crack')
    """
    if isinstance(normal, Tensor):
        normal = TensorItems(normal, size=size)
    elif size is not None:
        raise ValueError(
            f"size={size} with a data set, whose items have a size;"
            " pass it to the data set instead"
        )
    return SyntheticDefects(normal, kinds, contrast, seed)


class SyntheticDefects(Dataset):
    """Real images, each with one synthetic defect that is painted on access.

    Args:
        normal, kinds, contrast, seed: as for `synthetic_defects`.

    Raises:
        ValueError: for an unknown kind, or a contrast outside [0, 1].
    """

    def __init__(
        self, normal: Dataset, kinds: Sequence[str], contrast: float, seed: int
    ):
        check_dataset(normal)
        is_sequence = isinstance(kinds, Sequence) and not isinstance(kinds, str)
        if not is_sequence or not kinds or any(kind not in DEFECTS for kind in kinds):
            raise ValueError(
                f"kinds={kinds!r:.80}; expected a sequence of some of"
                f" {', '.join(DEFECTS)}"
            )
        what = "a number from 0 (invisible) to 1 (strong)"
        check_number("contrast", contrast, what, least=0, most=1)
        check_integers(0, seed=seed)
        self.normal, self.kinds, self.contrast = normal, tuple(kinds), contrast
        self.seed = seed

    def __repr__(self) -> str:
        """Name the kinds, their contrast and the images that they are painted on."""
        kinds = ", ".join(self.kinds)
        return f"SyntheticDefects({kinds} of contrast {self.contrast} on {self.normal})"

    def __len__(self) -> int:
        return len(self.normal)

    def __getitem__(self, index: int) -> Item:
        item = check_item(self.normal[index])
        height, width = item.image.shape[1:]
        random = np.random.default_rng((self.seed, index % len(self)))
        kind = self.kinds[random.integers(len(self.kinds))]
        opacity = torch.from_numpy(
            _SHAPES[kind](random, height, width).astype(np.float32) / 255
        ).to(item.image)
        mask = opacity >= 0.5
        colour = {
            "crack": 0.0,
            "scratch": 1.0,
            "stain": float(item.image[:, mask].mean() < 0.5),
        }[kind]
        image = item.image.lerp(opacity.new_tensor(colour), self.contrast * opacity)
        if item.mask is not None:
            mask = mask | item.mask
        return Item(
            image,
            1,
            mask,
            f"synthetic {kind} of contrast {self.contrast:g} on {item.path}",
        )


def _crack(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a random walk with small turns, sometimes with a branch."""
    side = min(height, width)
    start = random.uniform(0.25, 0.75, 2) * (height, width)
    direction = random.uniform(0, 2 * np.pi)
    main = _walk(random, start, direction, side * random.uniform(0.3, 0.6), bend=0.5)
    lines = [main]
    if random.random() < 0.5:
        turn = random.choice([-1, 1]) * random.uniform(0.4, 1.0)
        lines.append(
            _walk(
                random,
                main[len(main) // 2],
                direction + turn,
                side * random.uniform(0.1, 0.25),
                bend=0.5,
            )
        )
    return _draw(
        height, width, lines, thickness=max(1.5, side * random.uniform(0.008, 0.015))
    )


def _scratch(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a nearly straight line."""
    side = min(height, width)
    start = random.uniform(0.25, 0.75, 2) * (height, width)
    line = _walk(
        random,
        start,
        random.uniform(0, 2 * np.pi),
        side * random.uniform(0.2, 0.5),
        bend=0.1,
    )
    return _draw(
        height, width, [line], thickness=max(1.5, side * random.uniform(0.006, 0.012))
    )


def _stain(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a cluster of blurred discs."""
    side = min(height, width)
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    middle = random.uniform(0.25, 0.75, 2) * (height, width)
    for _ in range(random.integers(3, 7)):
        y, x = middle + random.normal(0, 0.03 * side, 2)
        ry, rx = random.uniform(0.03, 0.07, 2) * side + 1
        draw.ellipse([x - rx, y - ry, x + rx, y + ry], fill=255)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.008 * side)))


_SHAPES = {"crack": _crack, "scratch": _scratch, "stain": _stain}


def _walk(
    random: np.random.Generator,
    start: np.ndarray,
    direction: float,
    length: float,
    bend: float,
) -> np.ndarray:
    """Return points (y, x) of 16 steps, whose turns have deviation `bend` (radians)."""
    angles = direction + random.normal(0, bend, 16)
    steps = np.stack([np.sin(angles), np.cos(angles)], 1) * (length / 16)
    return np.concatenate([start[None], start + steps.cumsum(0)])


def _draw(
    height: int, width: int, lines: Sequence[np.ndarray], thickness: float
) -> np.ndarray:
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        points = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for y, x in line]
        draw.line(
            points, fill=255, width=round(thickness * _SUPERSAMPLING), joint="curve"
        )
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX))
