"""CAM: class activation maps, for networks that end in GAP and a linear layer.

Example:
    >>> from paperlib.anomaly_map import minmax, upsample
    >>> from paperlib.backbones import load
    >>> from paperlib.cam import bounding_boxes, cam
    >>> from skimage.data import chelsea  # a cat
    >>> backbone = load("efficientnet_lite0")
    >>> result = cam(backbone.model, backbone.transform(chelsea()[None]))
    >>> result.maps.shape, result.targets  # class 285 of ImageNet is the Egyptian cat
    (torch.Size([1, 7, 7]), tensor([285]))
    >>> scaled = minmax(upsample(result.maps, (224, 224)))
    >>> bounding_boxes(scaled[0], threshold=0.6, largest=True)  # in pixels
    [Box(top=24, left=36, bottom=190, right=173)]
"""

from paperlib.cam.boxes import (
    CODE_REVIEW_THRESHOLD,
    LOCALIZATION_THRESHOLD,
    Box,
    bounding_boxes,
)
from paperlib.cam.maps import CAM, cam, class_activation_map

# In the order in which the API page shows them.
__all__ = [
    "cam",
    "CAM",
    "class_activation_map",
    "bounding_boxes",
    "Box",
    "LOCALIZATION_THRESHOLD",
    "CODE_REVIEW_THRESHOLD",
]
