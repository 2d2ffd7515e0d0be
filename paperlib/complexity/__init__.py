"""Multiply-adds (MACs), parameters and latency: the formulas and an exact counter."""

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

__all__ = [
    "Convention",
    "Layer",
    "LayerTime",
    "Machine",
    "Profile",
    "conv2d_macs",
    "depthwise_separable_macs",
    "measure_machine",
    "profile",
    "time_call",
    "time_layers",
    "totals",
]
