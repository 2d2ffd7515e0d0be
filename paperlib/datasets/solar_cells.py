"""Electroluminescence images of solar cells (ELPV), from the package elpv-dataset."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor

from paperlib.tables import short_repr
from paperlib.validation import check_choice, check_integers, check_number

ELPV_PACKAGE = "elpv-dataset"
ELPV_KINDS = ("all", "mono", "poly")


class ELPV(NamedTuple):
    """Images of solar cells, their probability of a defect, and their kind."""

    images: UInt8[Tensor, "n 300 300"]
    probability: Float[Tensor, " n"]
    kind: Shaped[np.ndarray, " n"]
    __repr__ = short_repr


def elpv(kind: str = "all") -> ELPV:
    """Read the ELPV data set: 2,624 images of solar cells, 300×300 pixels each.

    With a current applied, a functional cell glows; cracks and inactive parts stay
    dark. Experts assigned each cell a probability of a defect: 0, 1/3, 2/3 or 1.

    Args:
        kind: "mono" (1,074 monocrystalline cells), "poly" (1,550 polycrystalline
            cells), or "all".

    Returns:
        images (grey, 0 to 255), probability (float64), and kind ("mono" or "poly" per
        cell), in the order of the package.

    Raises:
        ValueError: if `kind` is unknown or the package elpv-dataset is not installed.

    Example:
        >>> from paperlib.datasets import elpv
        >>> cells = elpv("mono")
        >>> cells.images.shape, int((cells.probability == 1).sum())
        (torch.Size([1074, 300, 300]), 313)

    Source: Deitsch et al., arXiv:1807.02894; Buerhop-Lutz et al., EU PVSEC 2018.
        Licence: CC BY-NC-SA 4.0.
    Departures: none.
    Test: test_datasets.py::test_elpv_counts_are_the_published_ones
    """
    check_choice("kind", kind, ELPV_KINDS)
    try:
        import elpv_dataset
    except ImportError as error:
        raise ValueError(
            f"the solar cells are in the package {ELPV_PACKAGE},"
            f" which is not installed; run `pip install {ELPV_PACKAGE}`"
        ) from error
    root = Path(elpv_dataset.__path__[0], "data")
    table = np.loadtxt(root / "labels.csv", dtype=str)
    paths, probability, kinds = table[(table[:, 2] == kind) | (kind == "all")].T
    images = np.stack([np.asarray(Image.open(root / path)) for path in paths])
    return ELPV(
        torch.from_numpy(images),
        torch.from_numpy(probability.astype(np.float64)),
        kinds.astype("<U4"),
    )


class CellSplit(NamedTuple):
    """Functional (0) and defective (1) cells, split into training and test."""

    train: Float[Tensor, "n_train 3 side side"]
    train_labels: Int[Tensor, " n_train"]
    test: Float[Tensor, "n_test 3 side side"]
    test_labels: Int[Tensor, " n_test"]
    __repr__ = short_repr


def split_cells(
    cells: ELPV, side: int = 128, test_share: float = 0.25, seed: int = 0
) -> CellSplit:
    """Split the cells on which the experts agree into training and test sets.

    Cells with a defect probability of 1/3 or 2/3 are left out. The images are resized
    to side × side, standardised by the mean and standard deviation of the training
    pixels, and the grey channel is repeated three times.

    Args:
        cells: from `elpv`.
        side: of the resized images, in pixels.
        test_share: share of each class that is held out, rounded down.
        seed: of the split.

    Returns:
        training and test images and labels, each in random order.

    Raises:
        ValueError: if `side` is below 1, or the split would leave a class without
            training or test cells.
    """
    if not isinstance(cells, ELPV):
        raise ValueError(f"cells of type {type(cells).__name__}; expected elpv(…)")
    check_integers(side=side)
    check_integers(0, seed=seed)
    check_number("test_share", test_share, "a share of each class", least=0, most=1)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for probability in (0, 1):
        of_class = torch.nonzero(cells.probability == probability).flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        held_out = int(len(of_class) * test_share)
        if not 0 < held_out < len(of_class):
            raise ValueError(
                f"{held_out} of {len(of_class)} cells with defect probability"
                f" {probability} would be held out (test_share={test_share});"
                " expected at least one on each side"
            )
        test.append(of_class[:held_out])
        train.append(of_class[held_out:])
    train, test = (
        indices[torch.randperm(len(indices), generator=generator)]
        for indices in (torch.cat(train), torch.cat(test))
    )

    def resized(indices: Tensor) -> Tensor:
        images = cells.images[indices, None].float() / 255
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)

    train_images, test_images = resized(train), resized(test)
    mean, std = train_images.mean(), train_images.std()
    labels = (cells.probability == 1).long()
    return CellSplit(
        ((train_images - mean) / std).expand(-1, 3, -1, -1),
        labels[train],
        ((test_images - mean) / std).expand(-1, 3, -1, -1),
        labels[test],
    )
