"""Images with labels and masks, from installed packages and from folders.

Example:
    >>> from paperlib.datasets import synthetic_defects, textures
    >>> normal = textures("brick", "test", count=3, side=96, size=64)
    >>> defective = synthetic_defects(normal, kinds=["crack"], contrast=0.8)
    >>> item = defective[0]
    >>> item.image.shape, item.label, item.mask.shape
    (torch.Size([3, 64, 64]), 1, torch.Size([64, 64]))
"""

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
from paperlib.datasets.solar_cells import ELPV, CellSplit, elpv, split_cells
from paperlib.datasets.synthetic import DEFECTS, SyntheticDefects, synthetic_defects
from paperlib.datasets.texture_crops import Textures, textures
from paperlib.image_files import read_image, read_mask
from paperlib.items import Batch, Item, TensorItems, batches

# In the order in which the API page shows them.
__all__ = [
    "MVTecAD",
    "folder",
    "elpv",
    "split_cells",
    "textures",
    "synthetic_defects",
    "batches",
    "Item",
    "Batch",
    "ELPV",
    "CellSplit",
    "TensorItems",
    "FolderDataset",
    "Sample",
    "Textures",
    "SyntheticDefects",
    "categories",
    "open_folder",
    "unpack",
    "read_image",
    "read_mask",
    "MVTEC_OBJECTS",
    "MVTEC_TEXTURES",
    "VARIANTS",
    "DEFECTS",
]
