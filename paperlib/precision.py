"""How exact float32 matrix products are: in full where a sum needs it, and how coarse they may be elsewhere.

PyTorch may take them in TF32 or bfloat16, by a setting of the whole process. Since version 2.9 each backend has a
setting of its own beside the common one, and reading or using the common one fails where they disagree.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from paperlib.activations import autocast

_BACKENDS = [
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")
]
_ROUNDING = {
    None: 0.0, "highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8,
    "none": 2.0**-24, "ieee": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8,
}  # fmt: skip
_LOCK = threading.Lock()
_FULL: dict[str, Any] = {"blocks": 0, "before": None}


@contextmanager
def full_precision() -> Iterator[None]:
    """Take matrix products in their own precision: no autocast, no TF32, no bfloat16 inside float32 products.

    The caller's settings are put back at the end.

    Source: this book. Departures: none. Test: test_patch_gaussian.py::test_no_bfloat16_or_tf32_leaks_in
    """
    # The setting belongs to the process, not to a thread: the first block in sets it, the last one out puts it back.
    with _LOCK:
        if _FULL["blocks"] == 0:
            common, own = _settings()
            lowered = common != "highest" or not {"ieee", "none"}.issuperset(own)
            _FULL["before"] = (common, own) if lowered else None
            if lowered:
                torch.set_float32_matmul_precision("highest")  # of the backends, too
        _FULL["blocks"] += 1
    try:
        with autocast(enabled=False):
            yield
    finally:
        with _LOCK:
            _FULL["blocks"] -= 1
            if _FULL["blocks"] == 0 and _FULL["before"]:
                common, own = _FULL["before"]
                if common:
                    torch.set_float32_matmul_precision(common)
                for backend, precision in zip(_BACKENDS, own, strict=True):
                    if backend.fp32_precision != precision:
                        backend.fp32_precision = precision
                _FULL["before"] = None


def product_rounding(dtype: torch.dtype) -> float:
    """Give the relative rounding of a number in a matrix product, as the process is set now.

    Args:
        dtype: of the matrices. In float32 the coarsest setting of any backend counts, and inside `full_precision` what
            the caller had set: another thread may be about to put it back.

    Source: this book. Departures: none. Test: test_neighbors.py::test_lower_matmul_precision_costs_no_digit
    """
    if dtype != torch.float32:
        return torch.finfo(dtype).eps / 2
    with _LOCK:
        common, own = _FULL["before"] or _settings()
    return max(_ROUNDING[setting] for setting in (common, *own))


def _settings() -> tuple[str | None, list[str]]:
    """Return the common setting, None where it can't be read, and each backend's."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, [backend.fp32_precision for backend in _BACKENDS]
