"""Multiply-adds (MACs), parameters and latency: the formulas and an exact counter.

Example:
    >>> from paperlib.complexity import conv2d_macs, depthwise_separable_macs, profile
    >>> from paperlib.mobilenet import MobileNetV1
    >>> counted = profile(MobileNetV1(), (1, 3, 224, 224))
    >>> print(f"{counted.macs / 1e6:.0f} million MACs")
    569 million MACs
    >>> standard = conv2d_macs(3, 512, 512, 14)
    >>> round(standard / depthwise_separable_macs(3, 512, 512, 14), 2)
    8.84
"""

from paperlib.complexity.conventions import Convention, totals
from paperlib.complexity.counting import Profile, profile
from paperlib.complexity.formulas import conv2d_macs, depthwise_separable_macs
from paperlib.complexity.latency import (
    LayerTime,
    Machine,
    measure_machine,
    time_call,
    time_layers,
)
from paperlib.complexity.recorder import Layer

# In the order in which the API page shows them.
__all__ = [
    "profile",
    "Profile",
    "Layer",
    "conv2d_macs",
    "depthwise_separable_macs",
    "totals",
    "Convention",
    "time_layers",
    "LayerTime",
    "time_call",
    "measure_machine",
    "Machine",
]
