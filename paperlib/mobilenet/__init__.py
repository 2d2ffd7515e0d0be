"""MobileNetV1 and the parameter groups with which it is trained."""

from paperlib.mobilenet.network import (
    BLOCKS,
    SHALLOW_BLOCKS,
    STEM_CHANNELS,
    Block,
    MobileNetV1,
    load_timm_state,
    timm_names,
)
from paperlib.mobilenet.optimizer import parameter_groups

__all__ = [
    "BLOCKS",
    "SHALLOW_BLOCKS",
    "STEM_CHANNELS",
    "Block",
    "MobileNetV1",
    "load_timm_state",
    "parameter_groups",
    "timm_names",
]
