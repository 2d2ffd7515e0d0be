"""Patch SVDD: encoders, their training, and a detector by nearest normal patches.

Example:
    >>> import torch
    >>> from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD
    >>> _ = torch.manual_seed(0)
    >>> normal = torch.rand(4, 3, 96, 96)  # RGB in [0, 1]
    >>> detector = PatchSVDD(HierarchicalEncoder(), stride_small=8).fit(normal)
    >>> defective = normal[:1].clone()
    >>> defective[:, :, 40:60, 40:60] = 1
    >>> scores = detector.score(torch.cat([normal[:1], defective]))
    >>> bool(scores[1] > scores[0])
    True
"""

from paperlib.patch_svdd.detector import PatchMaps, PatchSVDD
from paperlib.patch_svdd.encoders import (
    BIG_PATCH,
    BIG_STRIDE,
    SMALL_PATCH,
    SMALL_STRIDE,
    BySize,
    Embeddings,
    FlatEncoder,
    HierarchicalEncoder,
    PatchEncoder,
    initialize,
    load_released_weights,
)
from paperlib.patch_svdd.images import mean_image
from paperlib.patch_svdd.losses import PositionClassifier, position_loss, svdd_loss
from paperlib.patch_svdd.pairs import (
    DIRECTIONS,
    Pairs,
    neighbor_pairs,
    perturb,
    position_pairs,
)
from paperlib.patch_svdd.training import (
    Record,
    Training,
    position_accuracy,
    train,
    train_on_patches,
)

# In the order in which the API page shows them.
__all__ = [
    "PatchSVDD",
    "PatchMaps",
    "HierarchicalEncoder",
    "PatchEncoder",
    "FlatEncoder",
    "Embeddings",
    "initialize",
    "load_released_weights",
    "train",
    "Training",
    "Record",
    "train_on_patches",
    "PositionClassifier",
    "svdd_loss",
    "position_loss",
    "position_accuracy",
    "BySize",
    "neighbor_pairs",
    "position_pairs",
    "Pairs",
    "perturb",
    "mean_image",
    "SMALL_PATCH",
    "BIG_PATCH",
    "SMALL_STRIDE",
    "BIG_STRIDE",
    "DIRECTIONS",
]
