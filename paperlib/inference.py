"""Run a model in eval mode, uncompiled, and restore its state."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paperlib.validation import check_module

# PyTorch numbers hooks by a counter that two threads can read at once: the second hook
# of a number replaces the first. Hold this lock while a hook is added or removed.
HOOK_NUMBERS = threading.Lock()


class ModelFailed(ValueError, RuntimeError):
    """The model raises an exception for its inputs."""


_FAILURES = (
    AssertionError,
    AttributeError,
    IndexError,
    RuntimeError,
    TypeError,
    ValueError,
)


def run_model(model: nn.Module, images: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a model; raise ModelFailed, which describes the images, if they do not fit.

    Args:
        model: any network.
        images: described in the error.
        args: positional inputs.
        kwargs: keyword inputs.
    """
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        # Layers of torch raise ValueError for another number of axes only.
        if isinstance(error, ValueError) and "D input" not in str(error):
            raise
        dtype = str(images.dtype).removeprefix("torch.")
        hint = "; add a batch axis with images[None]" if images.ndim == 3 else ""
        raise ModelFailed(
            f"the model raises {type(error).__name__} for images of shape"
            f" {tuple(images.shape)}, dtype {dtype}, on {images.device};"
            f" pass inputs as the model expects them{hint}. Its message: {error}"
        ) from error


def raise_if_hidden(module: nn.Module, what: str) -> None:
    """Raise ValueError for a module whose layers run where hooks cannot act.

    Args:
        module: any module.
        what: its name in the error.

    Raises:
        ValueError: for a ScriptModule, and for an nn.DataParallel over more than one
            device, which runs its module in other threads.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"{what} is a {type(module).__name__}, which hides its layers and ReLUs"
            " from Python; pass the module that it was scripted or traced from"
        )
    if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
        raise ValueError(
            f"{what} is an nn.DataParallel over {len(module.device_ids)} devices,"
            " and runs its module in other threads,"
            " where hooks of the calling thread do not act; pass its .module"
        )


@contextmanager
def hook_in_this_thread(
    register: Callable[[Callable], RemovableHandle], hook: Callable
) -> Iterator[list[int]]:
    """Register a hook that acts in the calling thread only; remove it afterwards.

    Args:
        register: for example `module.register_forward_hook`.
        hook: of the form that `register` expects.

    Yields:
        a list, to which every call in another thread appends that thread's identifier.
    """
    thread, others = threading.get_ident(), []

    def act(*args):
        if threading.get_ident() == thread:
            return hook(*args)
        others.append(threading.get_ident())

    with HOOK_NUMBERS:
        handle = register(act)
    try:
        yield others
    finally:
        with HOOK_NUMBERS:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model as in eval mode, and restore every module's mode.

    Only the `training` flags are set, because a module's `train` method may do more. A
    model in eval mode is not modified.
    """
    check_module(model)
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
        for device, dtype in _autocast().items():
            stack.enter_context(torch.autocast(device, dtype, **change))
        yield


def autocast_dtypes() -> list[torch.dtype]:
    """Return the dtypes to which autocast converts, on the devices where it is on."""
    return list(_autocast().values())


def _autocast() -> dict[str, torch.dtype]:
    return {
        device: torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda", "mps", "xpu")
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    }


class SharedSetting:
    """A setting of the process that overlapping blocks of several threads share.

    The first block changes it, and the last one restores it.

    Args:
        change: returns a context manager that changes the setting.
    """

    def __init__(self, change: Callable[[], AbstractContextManager]):
        self._change, self._changed = change, ExitStack()
        self._blocks, self._lock = 0, threading.Lock()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Change the setting while the block runs."""
        with self._lock:
            if self._blocks == 0:
                self._changed.enter_context(self._change())
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._changed.close()


_EAGER = SharedSetting(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def without_compiler() -> Iterator[None]:
    """Run code compiled by `torch.compile` as plain Python.

    Compiled code ignores hooks that were registered after compilation. The setting
    (`torch.compiler.set_stance`) belongs to the process: while a block runs, compiled
    code of all threads runs uncompiled, and slower. Blocks may overlap.
    """
    with ExitStack() as stack:
        # Otherwise nothing is compiled, and the import would take seconds. The function
        # flex_attention compiles itself at its first call.
        if sys.modules.keys() & {"torch._dynamo", "torch.nn.attention.flex_attention"}:
            stack.enter_context(_EAGER.block())
        yield


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to a tensor, or to those in dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        # Of the same class: its keys may be attributes too.
        result = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key in value:
            result[key] = map_tensors(value[key], function)
        return result
    if isinstance(value, list | tuple):
        parts = [map_tensors(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Run layers that have no gradient in eval mode or at all so that they have one.

    cuDNN computes no gradient of a recurrent layer in eval mode; PyTorch's own code
    does. Reentrant checkpoints, which `torch.autograd.grad` refuses, keep their graph.
    """
    recurrent = [part for part in model.modules() if isinstance(part, nn.RNNBase)]
    with ExitStack() as stack:
        for part in recurrent:
            if any(weight.is_cuda for weight in part.parameters()):
                stack.enter_context(_without_cudnn(part))
        stack.enter_context(_KEPT_GRAPHS.block())
        is_outer = getattr(_KEEPS, "graphs", False)
        _KEEPS.graphs = True
        stack.callback(setattr, _KEEPS, "graphs", is_outer)
        yield


_CUDNN_OFF = SharedSetting(lambda: torch.backends.cudnn.flags(enabled=False))


@contextmanager
def _without_cudnn(module: nn.Module) -> Iterator[None]:
    """Disable cuDNN while a module runs in this thread."""
    with ExitStack() as running, ExitStack() as stack:
        for register, hook in (
            (
                module.register_forward_pre_hook,
                lambda *_: running.enter_context(_CUDNN_OFF.block()),
            ),
            (module.register_forward_hook, lambda *_: running.close()),
        ):
            stack.enter_context(hook_in_this_thread(register, hook))
        yield


@contextmanager
def _kept_graphs() -> Iterator[None]:
    """Run the function of a reentrant checkpoint directly, in the threads of _KEEPS."""
    original = torch.utils.checkpoint.CheckpointFunction

    class Direct(original):
        @staticmethod
        def apply(function, preserve_rng_state, *args):
            if getattr(_KEEPS, "graphs", False):
                return function(*args)
            return original.apply(function, preserve_rng_state, *args)

    torch.utils.checkpoint.CheckpointFunction = Direct
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = original


_KEPT_GRAPHS = SharedSetting(_kept_graphs)
_KEEPS = threading.local()
