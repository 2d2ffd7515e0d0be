"""PaDiM: a Gaussian of normal embeddings per position, and distances from it."""

from paperlib.padim.detector import PaDiM
from paperlib.padim.gaussian import (
    COVARIANCE_EPSILON,
    PatchGaussian,
    leave_one_out_distance,
    mahalanobis_distance,
)

__all__ = [
    "COVARIANCE_EPSILON",
    "PaDiM",
    "PatchGaussian",
    "leave_one_out_distance",
    "mahalanobis_distance",
]
