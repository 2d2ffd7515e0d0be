"""Run a model in eval mode, uncompiled, and restore its state."""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# PyTorch numbers hooks by a counter that two threads can read at once: the second hook
# of a number replaces the first. Hold this lock while a hook is added or removed.
HOOK_NUMBERS = threading.Lock()


def raise_if_threaded(module: nn.Module, what: str) -> None:
    """Raise ValueError for an nn.DataParallel that runs its module in other threads.

    Args:
        module: any module.
        what: its name in the error.

    Raises:
        ValueError: for an nn.DataParallel over more than one device.
    """
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise ValueError(
            f"{what} is an nn.DataParallel over {len(module.device_ids)} devices,"
            " and runs its module in other threads,"
            " where hooks of the calling thread do not act; pass its .module"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model as in eval mode, and restore every module's mode.

    Only the `training` flags are set, because a module's `train` method may do more. A
    model in eval mode is not modified.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def inference_state(model: nn.Module) -> Iterator[None]:
    """Run a model as in eval mode, uncompiled, and outside inference mode."""
    with ExitStack() as stack:
        stack.enter_context(without_compiler())
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        # Autocast caches the weights that it casts. Cast without a graph, they would
        # have no gradients in the caller's next step.
        stack.enter_context(override_autocast(cache_enabled=False))
        yield


@contextmanager
def override_autocast(**change: bool) -> Iterator[None]:
    """Change autocast on the devices where it is enabled."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
                device
            ):
                stack.enter_context(
                    torch.autocast(device, torch.get_autocast_dtype(device), **change)
                )
        yield


_COMPILER = threading.Lock()
_EAGER: dict[str, Any] = {"blocks": 0, "stance": None}


@contextmanager
def without_compiler() -> Iterator[None]:
    """Run code compiled by `torch.compile` as plain Python.

    Compiled code ignores hooks that were registered after compilation. The setting
    (`torch.compiler.set_stance`) belongs to the process: while a block runs, compiled
    code of all threads runs uncompiled, and slower. Blocks may overlap: the first sets
    it, and the last restores the previous one.
    """
    # Then nothing is compiled, and the import would take seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _COMPILER:
        if _EAGER["blocks"] == 0:
            _EAGER["stance"] = torch.compiler.set_stance("force_eager")
        _EAGER["blocks"] += 1
    try:
        yield
    finally:
        with _COMPILER:
            _EAGER["blocks"] -= 1
            if _EAGER["blocks"] == 0:
                _EAGER.pop("stance").__exit__(None, None, None)
