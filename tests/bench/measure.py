"""Shared code of the benchmarks: timing in turns, peak memory, floors, and table rows.

A part is one task that several libraries can do. Its contenders run in turns, so that
other load on the machine affects all of them alike, and a ratio is the median over the
turns. On one thread of a CPU, processor times are compared, because other processes
affect them least; otherwise wall times are.
"""

import contextlib
import ctypes
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from paperlib.complexity import Machine, measure_machine

OURS, COMMON = "paperlib", "the common implementation"
WALL, CPU = 0, 1  # indices of the pair that `seconds` returns
MIN_SECONDS = 0.05  # of a turn; shorter calls are repeated


class Contender(NamedTuple):
    """One implementation of a part's task.

    Fields:
        name: of the library or the implementation.
        run: does the task once; the results of the other contenders are compared with
            that of the first.
        prepare: runs before peak memory is measured: for example, fits the model that
            `run` scores with.
        share: of the task that `run` does; its time is divided by it.
        compared: False where the result is another quantity.
        note: for the table.
    """

    name: str
    run: Callable[[], Tensor | float | int]
    prepare: Callable[[], object] | None = None
    share: float = 1.0
    compared: bool = True
    note: str = ""


class Part(NamedTuple):
    """A task, its contenders, and its minimum of operations and memory traffic.

    Fields:
        what: the task in words, with sizes.
        contenders: in the order of the table, paperlib first.
        macs: multiply-adds that any exact implementation computes.
        bytes: read or written at least once by any implementation.
        missing: peers that can't be imported or can't run on this device, with the
            reasons.
        images: that the task processes, for times per image.
        wall: whether to compare wall times, for contenders with several threads or
            processes.
    """

    what: str
    contenders: list[Contender]
    macs: int
    bytes: int
    missing: dict[str, str]
    images: int = 1
    wall: bool = False


@contextlib.contextmanager
def peer(missing: dict[str, str], name: str) -> Iterator[None]:
    """Record a peer as missing, and continue, if its import fails inside the block."""
    try:
        yield
    except ImportError as error:
        missing[name] = f"not installed ({error})"


def mebibytes(field: str) -> float:
    """Read resident memory (VmRSS) or its peak (VmHWM) from /proc/self/status."""
    return (
        int(
            re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        )
        / 1024
    )


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Run once; return the peak memory in MiB above that before the call.

    None on systems where the peak can't be read.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Freed memory that the allocator has not returned would hide new allocations.
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = mebibytes("VmRSS")
    except OSError:
        return None
    result = run()
    peak = mebibytes("VmHWM") - before
    del result  # it counts towards the peak
    return peak


def peak_apart(contender: Contender, device: torch.device) -> float | None:
    """Return the peak memory of a contender's first call, in a forked process.

    In the fork, no memory that earlier calls have freed is reused.
    """
    # CUDA and thread pools do not survive a fork.
    if device.type == "cuda" or torch.get_num_threads() > 1:
        if contender.prepare is not None:
            contender.prepare()
        return peak_memory(contender.run, device)
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(ours)
            if contender.prepare is not None:
                contender.prepare()
            os.write(theirs, json.dumps(peak_memory(contender.run, device)).encode())
        finally:
            os._exit(0)  # also after an exception: the fork must not return
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        message = pipe.read()
    os.waitpid(process, 0)
    return json.loads(message) if message else None


def clock(device: torch.device) -> int:
    """Select the time to compare: CPU time on one thread of a CPU, else wall time."""
    return CPU if device.type == "cpu" and torch.get_num_threads() == 1 else WALL


def seconds(
    run: Callable[[], object], device: torch.device, repeats: int = 1
) -> tuple[float, float]:
    """Measure the wall and processor seconds of a call, the mean of `repeats` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def difference(result: Tensor | float | int, ours: Tensor | float | int) -> float:
    """Compute the relative difference: the norm of the difference over that of ours.

    A contender that does a share of the task is compared on the first values.
    """
    a, b = (
        torch.as_tensor(x).detach().cpu().double().flatten() for x in (result, ours)
    )
    b = b[: len(a)]
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def floor(row: dict, machine: dict) -> float | None:
    """Compute the seconds of a row's operations or bytes at the machine's peak rates.

    The longer of the two counts; None for a row without either.
    """
    return (
        max(
            row["macs"] / machine["macs_per_second"],
            row["bytes"] / machine["bytes_per_second"],
        )
        or None
    )


def peak_of_machine(device: torch.device) -> Machine:
    """Measure the peak rates of float32 products and copies, by the compared clock."""
    if clock(device) == WALL:
        return measure_machine(device)
    a, source = torch.ones(768, 768), torch.ones(2**25)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(a, a), device)[CPU] for _ in range(50))
    copy = min(seconds(lambda: target.copy_(source), device)[CPU] for _ in range(20))
    return Machine(len(a) ** 3 / product, 2 * source.nbytes / copy)


def rows(part: Part, turns: int, budget: float, device: torch.device) -> list[dict]:
    """Run the contenders in turns and return one row per contender.

    Args:
        part: with paperlib as its first contender.
        turns: per contender, after a warm-up call whose results are compared.
        budget: in seconds; once it is spent, no turn after the third begins.
        device: on which the contenders compute.
    """
    compared_clock = WALL if part.wall else clock(device)
    peaks = {
        contender.name: peak_apart(contender, device) for contender in part.contenders
    }
    results, repeats = {}, {}
    for contender in part.contenders:
        # The first call also loads and allocates, which matters only if it is short.
        duration = max(
            seconds(lambda c=contender: results.update({c.name: c.run()}), device)
        )
        if duration < 1:
            duration = max(seconds(contender.run, device))
        repeats[contender.name] = max(1, round(MIN_SECONDS / max(duration, 1e-6)))
    times: dict[str, list[tuple[float, float]]] = {
        contender.name: [] for contender in part.contenders
    }
    spent = 0.0
    for turn in range(turns):
        if turn >= 3 and spent > budget:
            break
        for contender in part.contenders:
            pair = seconds(contender.run, device, repeats[contender.name])
            spent += pair[compared_clock] * repeats[contender.name]
            times[contender.name].append(
                tuple(value / contender.share for value in pair)
            )
    ours = part.contenders[0].name
    table = []
    for contender in part.contenders:
        wall, cpu = zip(*times[contender.name], strict=True)
        pairs = zip(times[contender.name], times[ours], strict=True)
        ratios = [
            pair[compared_clock] / max(our_pair[compared_clock], 1e-9)
            for pair, our_pair in pairs
        ]
        table.append(
            {
                "what": part.what,
                "images": part.images,
                "contender": contender.name,
                "turns": len(wall),
                "wall": statistics.median(wall),
                "wall_low": min(wall),
                "wall_high": max(wall),
                "cpu": statistics.median(cpu),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "difference": (
                    difference(results[contender.name], results[ours])
                    if contender.compared
                    else None
                ),
                "peak": peaks[contender.name],
                "macs": part.macs,
                "bytes": part.bytes,
                "note": contender.note,
            }
        )
    return table
