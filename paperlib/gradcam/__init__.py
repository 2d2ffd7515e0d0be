"""Grad-CAM, guided backpropagation and their product, for any network.

Example:
    >>> from paperlib.backbones import load
    >>> from paperlib.gradcam import grad_cam, guided_grad_cam
    >>> from skimage.data import chelsea  # a cat
    >>> backbone = load("efficientnet_lite0")
    >>> images = backbone.transform(chelsea()[None])
    >>> grad_cam(backbone.model, images, "conv_head").maps.shape
    torch.Size([1, 7, 7])
    >>> guided_grad_cam(backbone.model, images, "conv_head").shape
    torch.Size([1, 3, 224, 224])
"""

from paperlib.gradcam.guided import guided_backprop, guided_grad_cam
from paperlib.gradcam.maps import (
    LOCALIZATION_THRESHOLD,
    GradCAM,
    grad_cam,
    grad_cam_map,
    grad_cam_weights,
)

# In the order in which the API page shows them.
__all__ = [
    "grad_cam",
    "GradCAM",
    "guided_backprop",
    "guided_grad_cam",
    "grad_cam_weights",
    "grad_cam_map",
    "LOCALIZATION_THRESHOLD",
]
