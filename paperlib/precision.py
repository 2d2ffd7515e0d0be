"""Matrix products in full precision.

PyTorch may compute float32 products in TF32 or bfloat16, by a setting of the process.
Since version 2.9 each backend also has its own setting, and reading the common one
fails where the backends differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from paperlib.inference import SharedSetting, override_autocast

_BACKENDS = [
    backend
    for backend in (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    if hasattr(backend, "fp32_precision")
]


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products in full precision: without autocast, TF32 and bfloat16.

    Autocast is a setting of the thread, the precision of float32 products one of the
    process. So while a block runs, the products of other threads have full precision
    too, and their compiled code is compiled again. Blocks in several threads may
    overlap: the first sets full precision, and the last restores the previous settings.

    If another thread changes the precision (`torch.set_float32_matmul_precision`) while
    a block runs, that change applies inside the block too, and it remains after the
    block. In code that is compiled or exported, the settings are those of the caller.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with _FULL_FLOAT32.block(), override_autocast(enabled=False):
        yield


@contextmanager
def _full_float32() -> Iterator[None]:
    common, backends = before = _read_settings()
    if common == "highest" and {"ieee", "none"}.issuperset(backends):
        yield
        return
    torch.set_float32_matmul_precision("highest")  # also sets the backends
    inside = _read_settings()
    yield
    # Other settings were made by another thread, and are newer.
    if _read_settings() == inside:
        _restore(*before)


_FULL_FLOAT32 = SharedSetting(_full_float32)


def _restore(common: str | None, backend_settings: list[str]) -> None:
    """Set what `_read_settings` returned."""
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
