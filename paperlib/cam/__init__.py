"""CAM: class activation maps, for networks that end in GAP and a linear layer."""

from paperlib.cam.boxes import (
    CODE_REVIEW_THRESHOLD,
    LOCALIZATION_THRESHOLD,
    Box,
    bounding_boxes,
)
from paperlib.cam.maps import CAM, cam, class_activation_map

__all__ = [
    "CAM",
    "CODE_REVIEW_THRESHOLD",
    "LOCALIZATION_THRESHOLD",
    "Box",
    "bounding_boxes",
    "cam",
    "class_activation_map",
]
