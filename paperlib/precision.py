"""Matrix products in full precision.

PyTorch may compute float32 products in TF32 or bfloat16, by a setting of the process.
Since version 2.9 each backend also has its own setting, and reading the common one
fails where the backends differ.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from paperlib.inference import override_autocast

_BACKENDS = [
    backend
    for backend in (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    if hasattr(backend, "fp32_precision")
]
_LOCK = threading.Lock()
_FULL: dict[str, Any] = {"blocks": 0, "before": None, "inside": None}


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products in full precision: without autocast, TF32 and bfloat16.

    Autocast is a setting of the thread, the precision of float32 products one of the
    process. So while a block runs, the products of other threads have full precision
    too, and their compiled code is compiled again. Blocks in several threads may
    overlap: the first sets full precision, and the last restores the previous settings.

    If another thread changes the precision (`torch.set_float32_matmul_precision`) while
    a block runs, that change applies inside the block too, and it remains after the
    block.
    """
    with _LOCK:
        if _FULL["blocks"] == 0:
            common, backend_settings = _read_settings()
            lowered = common != "highest" or not {"ieee", "none"}.issuperset(
                backend_settings
            )
            _FULL["before"] = (common, backend_settings) if lowered else None
            if lowered:
                torch.set_float32_matmul_precision("highest")  # also sets the backends
                _FULL["inside"] = _read_settings()
        _FULL["blocks"] += 1
    try:
        with override_autocast(enabled=False):
            yield
    finally:
        with _LOCK:
            _FULL["blocks"] -= 1
            if _FULL["blocks"] == 0 and _FULL["before"]:
                # Other settings were made by another thread, and are newer.
                if _read_settings() == _FULL["inside"]:
                    _restore(*_FULL["before"])
                _FULL["before"] = None


def _restore(common: str | None, backend_settings: list[str]) -> None:
    """Set what `_settings` returned."""
    if common:
        torch.set_float32_matmul_precision(common)
    for backend, precision in zip(_BACKENDS, backend_settings, strict=True):
        if backend.fp32_precision != precision:
            backend.fp32_precision = precision


def _read_settings() -> tuple[str | None, list[str]]:
    """Return the common setting (None where it cannot be read) and the backends'."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, [backend.fp32_precision for backend in _BACKENDS]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 for half precision, which is too coarse for sums."""
    return torch.promote_types(dtype, torch.float32)
