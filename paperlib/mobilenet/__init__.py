"""MobileNetV1 and the parameter groups with which it is trained."""

from paperlib.mobilenet.network import (
    BLOCKS,
    SHALLOW_BLOCKS,
    STEM_CHANNELS,
    Block,
    MobileNetV1,
)
from paperlib.mobilenet.optimizer import parameter_groups

__all__ = [
    "BLOCKS",
    "SHALLOW_BLOCKS",
    "STEM_CHANNELS",
    "Block",
    "MobileNetV1",
    "parameter_groups",
]
