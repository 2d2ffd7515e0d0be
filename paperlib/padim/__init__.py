"""PaDiM: a Gaussian of normal embeddings per position, and distances from it.

Example:
    >>> import torch
    >>> from paperlib.backbones import load
    >>> from paperlib.padim import PaDiM
    >>> backbone = load("efficientnet_lite0")
    >>> images = backbone.transform(torch.rand(8, 64, 64, 3))
    >>> detector = PaDiM(backbone.extractor(), dimensions=50).fit(images.split(4))
    >>> detector.anomaly_map(images).shape
    torch.Size([8, 224, 224])
    >>> threshold = detector.normal_threshold(images.split(4), fitted=True)
    >>> (detector.score(images) > threshold).tolist()
    [False, False, False, False, False, False, False, False]
"""

from paperlib.padim.detector import PaDiM
from paperlib.padim.gaussian import (
    COVARIANCE_EPSILON,
    PatchGaussian,
    leave_one_out_distance,
    mahalanobis_distance,
)
from paperlib.padim.inspection import Inspection

# In the order in which the API page shows them.
__all__ = [
    "PaDiM",
    "Inspection",
    "PatchGaussian",
    "mahalanobis_distance",
    "leave_one_out_distance",
    "COVARIANCE_EPSILON",
]
