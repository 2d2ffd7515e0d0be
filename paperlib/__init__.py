"""MobileNetV1, CAM, Grad-CAM, Patch SVDD and PaDiM in PyTorch: one small module an idea, each pinned by a test."""

__version__ = "0.1.0"
