"""Crops of scikit-image's brick, grass and gravel."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from paperlib.items import Item
from paperlib.validation import check_choice, check_integers, rgb_batch

TEXTURES = ("brick", "grass", "gravel")
SPLITS = ("train", "test")
TRAIN_ROWS = 320  # of 512: training crops lie above, test crops below


def textures(
    kind: str = "all",
    split: str = "train",
    *,
    count: int = 100,
    side: int = 128,
    size: int = 224,
    seed: int = 0,
) -> "Textures":
    """Cut crops from scikit-image's photographs of brick, grass and gravel.

    Training crops are cut from the upper 320 rows of each 512×512 photograph and test
    crops from the lower 192, so no pixel is in both. Crops of one split may overlap.

    Args:
        kind: "brick", "grass", "gravel", or "all" for the three in turn.
        split: "train" or "test".
        count: number of crops.
        side: of a crop in pixels of the photograph, at most 192.
        size: side in pixels that a crop is resized to (bicubic).
        seed: of the positions.

    Returns:
        a data set of normal items, grey like the photographs, with masks that are all
        False.

    Raises:
        ValueError: for an unknown kind or split, a number below 1, a side above 192, or
            if scikit-image is missing.

    Example:
        >>> from paperlib.datasets import textures
        >>> bricks = textures("brick", count=10)
        >>> len(bricks), bricks[0].image.shape, bricks[0].path
        (10, torch.Size([3, 224, 224]), 'brick, row 164, column 245')

    Source: scikit-image's `data.brick`, `data.grass` (both CC0) and `data.gravel`
        (CC0).
    Departures: none.
    Test: test_datasets.py::test_texture_crops_of_training_and_test_share_no_pixel
    """
    check_choice("kind", kind, ("all", *TEXTURES))
    check_choice("split", split, SPLITS)
    return Textures(
        TEXTURES if kind == "all" else (kind,), split, count, side, size, seed
    )


class Textures(Dataset):
    """Crops of textures, cut on access.

    Args:
        kinds, split, count, side, size, seed: as for `textures`.

    Raises:
        ValueError: for a number below 1, a side above 192, or if scikit-image is
            missing.
    """

    def __init__(
        self,
        kinds: tuple[str, ...],
        split: str,
        count: int,
        side: int,
        size: int,
        seed: int,
    ):
        try:
            from skimage import data
        except ImportError as error:
            raise ValueError(
                "the textures are part of scikit-image; run `pip install scikit-image`"
            ) from error
        rows = slice(0, TRAIN_ROWS) if split == "train" else slice(TRAIN_ROWS, None)
        self.photographs = {kind: getattr(data, kind)()[rows] for kind in kinds}
        most = 512 - TRAIN_ROWS
        check_integers(count=count, side=side, size=size)
        check_integers(0, seed=seed)
        if side > most:
            raise ValueError(f"side={side}; expected a side up to {most}")
        self.kinds, self.split, self.count, self.side = kinds, split, count, side
        self.size, self.seed = size, seed

    def __repr__(self) -> str:
        """Name the textures and count the crops."""
        return f"Textures({', '.join(self.kinds)}, {self.split}: {self.count} crops)"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not -self.count <= index < self.count:
            raise IndexError(f"crop {index} of {self.count}")
        number = index % self.count
        kind = self.kinds[number % len(self.kinds)]
        photograph = self.photographs[kind]
        random = np.random.default_rng(
            (
                self.seed,
                SPLITS.index(self.split),
                TEXTURES.index(kind),
                number,
            )
        )
        top, left = (
            int(random.integers(length - self.side + 1)) for length in photograph.shape
        )
        crop = Image.fromarray(
            photograph[top : top + self.side, left : left + self.side]
        )
        crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        image = rgb_batch(torch.from_numpy(np.array(crop))[None])[0].contiguous()
        row = top + (TRAIN_ROWS if self.split == "test" else 0)
        return Item(
            image,
            0,
            torch.zeros(self.size, self.size, dtype=torch.bool),
            f"{kind}, row {row}, column {left}",
        )
