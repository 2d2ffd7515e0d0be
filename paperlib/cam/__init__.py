"""CAM: class activation maps, for networks that end in GAP and a linear layer.

Example:
    >>> from paperlib.backbones import load
    >>> from paperlib.cam import bounding_boxes, cam
    >>> from skimage.data import chelsea  # a cat
    >>> backbone = load("efficientnet_lite0")
    >>> result = cam(backbone.model, backbone.transform(chelsea()[None]))
    >>> result.maps.shape, result.targets  # class 285 of ImageNet is the Egyptian cat
    (torch.Size([1, 7, 7]), tensor([285]))
    >>> bounding_boxes(result.maps[0], largest=True)  # in positions of the map
    [Box(top=0, left=0, bottom=7, right=6)]
"""

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
