"""Where the time of a forward pass goes: seconds a layer beside its MACs and bytes, and this machine's roofline."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paperlib.complexity import profile


class LayerTime(NamedTuple):
    """One layer's share of a forward pass: median seconds, multiply-adds, and bytes that must move at least once."""

    name: str
    kind: str
    seconds: float
    macs: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: multiply-adds per byte."""
        return self.macs / self.bytes


class Machine(NamedTuple):
    """What a device reaches at best: multiply-adds a second, and bytes a second to and from memory."""

    macs_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """The intensity, in MACs per byte, above which arithmetic and not memory is the limit."""
        return self.macs_per_second / self.bytes_per_second

    def attainable(self, intensity: float | int) -> float:
        r"""Bound a layer's speed: $\min(\text{peak}, \text{intensity} \times \text{bandwidth})$, in MACs a second."""
        return min(self.macs_per_second, intensity * self.bytes_per_second)


class _Clock:
    """Readings around layers: CUDA events where kernels run behind Python's back, the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def read(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end) -> float:
        return start.elapsed_time(end) / 1000 if self.cuda else end - start

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def time_layers(model: nn.Module, images: Tensor, repeats: int = 10) -> list[LayerTime]:
    """Time every layer of a network inside its forward pass, in eval mode.

    A layer is a module without children. Its bytes are those of its inputs, outputs and parameters, each counted
    once: what has to move if the caches held nothing before and everything after. Python's own overhead (some
    microseconds a layer) is part of the time.

    Args:
        model: any network; its mode is put back and no hook remains.
        images: the first input, on the model's device.
        repeats: timed passes after one that warms up; the median is kept.

    Returns:
        one row for each layer that ran, in order of its first call; several calls of one layer are added up.

    Raises:
        ValueError: if `repeats` is below 1.

    Source: this book; arithmetic intensity after Williams et al., CACM 2009. Departures: none.
    Test: test_latency.py::test_rows_carry_the_profiles_macs_and_their_own_bytes
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected at least 1")
    clock, readings, moved = _Clock(images.device), defaultdict(list), {}
    starts, modes = {}, [(module, module.training) for module in model.modules()]

    def before(name, module, inputs):
        starts[name] = clock.read()

    def after(name, module, inputs, output):
        readings[name].append((starts[name], clock.read()))
        tensors = [t for t in (*inputs, output, *module.parameters(recurse=False)) if isinstance(t, Tensor)]
        moved[name] = sum(t.numel() * t.element_size() for t in tensors)

    handles = []
    try:
        model.eval()
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                handles.append(module.register_forward_pre_hook(lambda m, i, name=name: before(name, m, i)))
                handles.append(module.register_forward_hook(lambda m, i, o, name=name: after(name, m, i, o)))
        with torch.inference_mode():
            model(images)  # the first pass allocates memory and chooses algorithms
            calls = {name: len(pairs) for name, pairs in readings.items()}
            readings.clear()
            for _ in range(repeats):
                model(images)
        clock.finish()
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode

    macs, kinds = defaultdict(int), {}
    for layer in profile(model, tuple(images.shape)).layers:
        macs[layer.name] += layer.macs
        kinds.setdefault(layer.name, layer.kind)
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    rows = []
    for name, pairs in readings.items():
        seconds = [clock.seconds(*pair) for pair in pairs]
        each = [sum(seconds[i : i + calls[name]]) for i in range(0, len(seconds), calls[name])]
        kind = kinds.get(name, types[name])
        rows.append(LayerTime(name, kind, statistics.median(each), macs[name], moved[name] * calls[name]))
    return rows


def measure_machine(device: torch.device | str = "cpu", side: int = 1024, seconds: float | int = 0.5) -> Machine:
    """Measure a device's roofline: its fastest float32 matrix product and its fastest copy in memory.

    Args:
        device: the CPU or a CUDA device.
        side: of the square matrices; the copied buffer has 64 times as many numbers, so that no cache holds it.
        seconds: given to each of the two; the best run is kept, since a roofline is what can be reached.

    Returns:
        multiply-adds a second and bytes a second (read plus written).

    Raises:
        ValueError: if `side` is below 1 or `seconds` is not above 0.

    Source: Williams, Waterman & Patterson, CACM 52(4), 2009. Departures: counts a multiply-add as one operation.
    Test: test_latency.py::test_roofline_is_a_minimum
    """
    if side < 1 or not seconds > 0:
        raise ValueError(f"side={side}, seconds={seconds}; expected at least 1 and more than 0")
    device = torch.device(device)
    a, b = torch.ones(side, side, device=device), torch.ones(side, side, device=device)
    source = torch.ones(64 * side * side, device=device)
    target = torch.empty_like(source)
    product = min(_readings(lambda: torch.mm(a, b), device, seconds))
    copy = min(_readings(lambda: target.copy_(source), device, seconds))
    return Machine(side**3 / product, 2 * source.numel() * source.element_size() / copy)


def time_call(run: Callable[[], object], device: torch.device | str = "cpu", seconds: float | int = 0.2) -> float:
    """Time one call of a function: the median over as many calls as fit into `seconds`, at least three.

    Args:
        run: called without arguments; one call before the timed ones warms up.
        device: where its work happens; on a CUDA device the kernels' own time is taken.
        seconds: how long to go on, in seconds.

    Returns:
        seconds a call.

    Raises:
        ValueError: if `seconds` is not above 0.

    Source: this book. Departures: none. Test: test_latency.py::test_a_call_is_timed_by_its_median
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}; expected a number above 0, 0.2 say")
    return statistics.median(_readings(run, torch.device(device), seconds))


def _readings(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    clock, pairs = _Clock(device), []
    run()
    clock.finish()
    end = time.perf_counter() + seconds
    while len(pairs) < 3 or time.perf_counter() < end:
        start = clock.read()
        run()
        pairs.append((start, clock.read()))
        clock.finish()
    return [clock.seconds(*pair) for pair in pairs]
