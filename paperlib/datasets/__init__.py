"""Images with labels and masks, from installed packages and from folders."""

from paperlib.datasets.archive import open_folder, unpack
from paperlib.datasets.folders import (
    MVTEC_OBJECTS,
    MVTEC_TEXTURES,
    VARIANTS,
    FolderDataset,
    MVTecAD,
    Sample,
    categories,
    folder,
)
from paperlib.datasets.image_files import read_image, read_mask
from paperlib.datasets.items import Batch, Item, TensorItems, batches
from paperlib.datasets.solar_cells import ELPV, CellSplit, elpv, split_cells
from paperlib.datasets.synthetic import DEFECTS, SyntheticDefects, synthetic_defects
from paperlib.datasets.texture_crops import Textures, textures

__all__ = [
    "DEFECTS",
    "ELPV",
    "MVTEC_OBJECTS",
    "MVTEC_TEXTURES",
    "VARIANTS",
    "Batch",
    "CellSplit",
    "Item",
    "MVTecAD",
    "FolderDataset",
    "Sample",
    "SyntheticDefects",
    "TensorItems",
    "Textures",
    "batches",
    "categories",
    "elpv",
    "folder",
    "open_folder",
    "read_mask",
    "read_image",
    "split_cells",
    "synthetic_defects",
    "textures",
    "unpack",
]
