"""Images with labels and masks, read from packages and folders, never from the network."""

from paperlib.datasets.archive import unpack
from paperlib.datasets.folders import (
    MVTEC_OBJECTS,
    MVTEC_TEXTURES,
    VARIANTS,
    MVTecAD,
    PictureFolder,
    Sample,
    categories,
    folder,
)
from paperlib.datasets.image_files import read_mask, read_picture
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
    "PictureFolder",
    "Sample",
    "SyntheticDefects",
    "TensorItems",
    "Textures",
    "batches",
    "categories",
    "elpv",
    "folder",
    "read_mask",
    "read_picture",
    "split_cells",
    "synthetic_defects",
    "textures",
    "unpack",
]
