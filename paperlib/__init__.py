"""MobileNetV1, CAM, Grad-CAM, Patch SVDD and PaDiM in PyTorch.

Each folder implements one paper; the files hold what several papers share. The names
below can be imported from here. Each is loaded at its first use.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperlib.complexity import profile
    from paperlib.gradcam import grad_cam, guided_backprop, guided_grad_cam
    from paperlib.mobilenet import MobileNetV1
    from paperlib.padim import PaDiM
    from paperlib.patch_svdd import PatchSVDD
    from paperlib.validation import NotFitted, UnusableFile

__version__ = "0.1.0"
__all__ = [
    "MobileNetV1",
    "NotFitted",
    "PaDiM",
    "PatchSVDD",
    "UnusableFile",
    "grad_cam",
    "guided_backprop",
    "guided_grad_cam",
    "profile",
]

# The function `cam` is not here: it would hide the package of its name.
_PACKAGES = {
    "MobileNetV1": "paperlib.mobilenet",
    "NotFitted": "paperlib.validation",
    "PaDiM": "paperlib.padim",
    "PatchSVDD": "paperlib.patch_svdd",
    "UnusableFile": "paperlib.validation",
    "grad_cam": "paperlib.gradcam",
    "guided_backprop": "paperlib.gradcam",
    "guided_grad_cam": "paperlib.gradcam",
    "profile": "paperlib.complexity",
}


def __getattr__(name: str) -> Any:
    """Load a name of `__all__`, or a module, at its first use."""
    if name in _PACKAGES:
        globals()[name] = getattr(import_module(_PACKAGES[name]), name)
        return globals()[name]
    module = f"{__name__}.{name}"
    if not name.startswith("_") and find_spec(module):
        return import_module(module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
