"""Latency of a forward pass per layer, and the roofline of the machine."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paperlib.complexity.counting import profile
from paperlib.complexity.values import list_tensors
from paperlib.inference import evaluating, run_model
from paperlib.validation import (
    as_device,
    check_integers,
    check_number,
    check_tensor,
    check_values,
)


class LayerTime(NamedTuple):
    """One layer's median seconds, multiply-adds, and bytes read and written."""

    name: str
    kind: str
    seconds: float
    macs: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: multiply-adds per byte; 0 for a layer without bytes."""
        return self.macs / max(self.bytes, 1)


class Machine(NamedTuple):
    """A device's peak rates per second: multiply-adds, and bytes moved in memory."""

    macs_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """Intensity in MACs per byte above which arithmetic is the limit."""
        return self.macs_per_second / self.bytes_per_second

    def attainable(self, intensity: float) -> float:
        r"""Bound a layer's speed in MACs per second.

        $$\min(\text{peak}, \text{intensity} \times \text{bandwidth})$$
        """
        return min(self.macs_per_second, intensity * self.bytes_per_second)


def time_layers(model: nn.Module, images: Tensor, repeats: int = 10) -> list[LayerTime]:
    """Time every layer of a network inside its forward pass, in eval mode.

    A layer is a module without children. Its bytes are those of its inputs, outputs and
    parameters, each counted once: the memory traffic of a cold, unlimited cache.
    Tensors in tuples, lists, dictionaries and keyword arguments are included. The time
    includes Python's overhead, some microseconds per layer, and on accelerators other
    than CUDA a synchronisation of the device before and after each layer.

    Args:
        model: any network; its mode is restored and no hook remains.
        images: the first input, on the model's device.
        repeats: timed passes after one warm-up pass; the median is reported.

    Returns:
        one row per layer that ran, in the order of the first calls; several calls of
        one layer are summed.

    Raises:
        ValueError: if `repeats` is below 1.

    Example:
        >>> import torch
        >>> from paperlib.complexity import time_layers
        >>> from paperlib.mobilenet import MobileNetV1
        >>> rows = time_layers(MobileNetV1(0.25), torch.zeros(1, 3, 32, 32), repeats=3)
        >>> len(rows), rows[0].name, rows[0].macs
        (83, 'features.stem.conv', 55296)
        >>> rows[0].seconds > 0
        True
    """
    check_integers(repeats=repeats)
    check_tensor(images, "images", is_float=False)
    check_values(images, "images")
    # The first pass allocates memory and chooses algorithms: it does not count.
    first, *passes = _record_passes(model, images, repeats + 1)
    macs, kinds = defaultdict(int), {}
    for layer in profile(model, inputs=images).layers:
        macs[layer.name] += layer.macs
        kinds.setdefault(layer.name, layer.kind)
    return [
        LayerTime(
            name,
            kinds.get(name, type(model.get_submodule(name)).__name__),
            statistics.median(
                sum(_elapsed_seconds(start, end) for start, end, _ in calls[name])
                for calls in passes
            ),
            macs[name],
            sum(moved for _, _, moved in first_calls),
        )
        for name, first_calls in first.items()
    ]


def _record_passes(
    model: nn.Module, images: Tensor, n_passes: int
) -> list[dict[str, list[tuple[Any, Any, int]]]]:
    """Record the calls of each layer, by name, in each of several forward passes.

    A call is a mark of its start, a mark of its end, and the bytes that it moves.
    """
    starts, passes = {}, []

    def before(name, module, inputs):
        starts[name] = _mark_time(images.device)

    def after(name, module, args, kwargs, output):
        end = _mark_time(images.device)
        parameters = list(module.parameters(recurse=False))
        moved = sum(_bytes(part) for part in ((args, kwargs), output, parameters))
        passes[-1][name].append((starts[name], end, moved))

    with ExitStack() as hooks, evaluating(model), torch.inference_mode():
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                start, stop = partial(before, name), partial(after, name)
                hooks.enter_context(module.register_forward_pre_hook(start))
                hooks.enter_context(
                    module.register_forward_hook(stop, with_kwargs=True)
                )
        for _ in range(n_passes):
            passes.append(defaultdict(list))
            run_model(model, images, images)
    return passes


def measure_machine(
    device: torch.device | str = "cpu", side: int = 1024, seconds: float = 0.5
) -> Machine:
    """Measure a device's roofline: peak rates of float32 products and of memory copies.

    Args:
        device: the CPU or an accelerator.
        side: of the square matrices; the copied buffer has 64 times as many elements,
            so that it exceeds every cache.
        seconds: duration of each of the two measurements; the fastest run counts,
            because a roofline is an upper bound.

    Returns:
        multiply-adds per second and bytes per second (read plus written).

    Raises:
        ValueError: if `side` is below 1 or `seconds` is not above 0.

    Example:
        >>> from paperlib.complexity import measure_machine
        >>> machine = measure_machine("cpu", side=64, seconds=0.01)
        >>> machine.attainable(intensity=1e9) == machine.macs_per_second
        True

    Source: Williams, Waterman & Patterson, CACM 52(4), 2009.
    Departures: counts a multiply-add as one operation.
    Test: test_latency.py::test_roofline_is_a_minimum
    """
    check_integers(side=side)
    device = as_device(device)
    a, b = torch.ones(side, side, device=device), torch.ones(side, side, device=device)
    source = torch.ones(64 * side * side, device=device)
    target = torch.empty_like(source)
    product = min(_measure_calls(lambda: torch.mm(a, b), device, seconds))
    copy = min(_measure_calls(lambda: target.copy_(source), device, seconds))
    return Machine(side**3 / product, 2 * source.numel() * source.element_size() / copy)


def time_call(
    run: Callable[[], object],
    device: torch.device | str = "cpu",
    seconds: float = 0.2,
) -> float:
    """Time a function: the median over the calls that fit into `seconds`, at least 3.

    Args:
        run: called without arguments; one warm-up call precedes the timed calls.
        device: where the work runs; on CUDA the time between two events of the device's
            current stream is measured.
        seconds: duration of the measurement in seconds.

    Returns:
        seconds per call.

    Raises:
        ValueError: if `seconds` is not above 0.

    Example:
        >>> import torch
        >>> from paperlib.complexity import time_call
        >>> a = torch.ones(64, 64)
        >>> time_call(lambda: a @ a, seconds=0.01) < 1
        True
    """
    return statistics.median(_measure_calls(run, device, seconds))


def _measure_calls(
    run: Callable[[], object], device: torch.device | str, seconds: float
) -> list[float]:
    check_number("seconds", seconds, "a duration such as 0.2", above=0)
    device = as_device(device)
    run()  # the first call allocates memory and chooses algorithms
    readings, end = [], time.perf_counter() + seconds
    while len(readings) < 3 or time.perf_counter() < end:
        start = _mark_time(device)
        run()
        readings.append(_elapsed_seconds(start, _mark_time(device)))
    return readings


def _mark_time(device: torch.device) -> Any:
    """Return a mark of the time at which the device has finished its previous work.

    Kernels run asynchronously on accelerators. On CUDA an event is recorded in the
    device's current stream; on other accelerators (MPS, XPU) the device is awaited.
    """
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _elapsed_seconds(start: Any, end: Any) -> float:
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _bytes(values: Any) -> int:
    """Sum the sizes of all tensors in nested containers, each tensor once."""
    tensors = {id(tensor): tensor for tensor in list_tensors(values)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
