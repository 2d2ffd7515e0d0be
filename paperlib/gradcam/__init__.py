"""Grad-CAM, guided backpropagation and their product, for any network."""

from paperlib.gradcam.guided import guided_backprop, guided_grad_cam
from paperlib.gradcam.maps import (
    LOCALIZATION_THRESHOLD,
    GradCAM,
    grad_cam,
    grad_cam_map,
    grad_cam_weights,
)

__all__ = [
    "LOCALIZATION_THRESHOLD",
    "GradCAM",
    "grad_cam",
    "grad_cam_map",
    "grad_cam_weights",
    "guided_backprop",
    "guided_grad_cam",
]
