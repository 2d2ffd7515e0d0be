"""MobileNetV1 and the parameter groups with which it is trained.

Example:
    >>> import torch
    >>> from paperlib.mobilenet import MobileNetV1, parameter_groups
    >>> model = MobileNetV1(width=0.5, num_classes=10)
    >>> model(torch.rand(2, 3, 128, 128)).shape
    torch.Size([2, 10])
    >>> optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=4e-5), lr=0.1)
"""

from paperlib.mobilenet.network import (
    BLOCKS,
    SHALLOW_BLOCKS,
    STEM_CHANNELS,
    Block,
    MobileNetV1,
)
from paperlib.mobilenet.optimizer import parameter_groups

# In the order in which the API page shows them.
__all__ = [
    "MobileNetV1",
    "parameter_groups",
    "Block",
    "BLOCKS",
    "SHALLOW_BLOCKS",
    "STEM_CHANNELS",
]
