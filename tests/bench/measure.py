"""What every bench shares: contenders that take turns, peak memory in a process of its
own, the floor, and the rows.

A part is one piece of work that several libraries can do. Its contenders take turns, so
that a machine that slows down slows all of them down, and a ratio is the median over
turns: each turn meets the same load. On one thread of a CPU what is compared is
processor time, which other work on the machine disturbs least; elsewhere it is the wall
clock.
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

OURS, USUAL = "paperlib", "the review's way"
WALL, CPU = 0, 1  # of what `seconds` gives
AT_LEAST = 0.05  # seconds: shorter calls are repeated within a turn


class Contender(NamedTuple):
    """One way to do a part's work.

    Fields:
        name: of the library, or of the way.
        run: does the work once; the first contender's result is what the others' are
            compared with.
        prepare: what peak memory leaves out: a model fitted before it scores, say.
        share: of the work that it is given; its time is divided by it.
        compared: False where the result is something else, as of a floor.
        note: what a reader should know beside its numbers.
    """

    name: str
    run: Callable[[], Tensor | float | int]
    prepare: Callable[[], object] | None = None
    share: float = 1.0
    compared: bool = True
    note: str = ""


class Part(NamedTuple):
    """A piece of work, its contenders (paperlib first), and what no exact way can do
    without.

    Fields:
        what: in words, with sizes.
        contenders: in the order of the table.
        macs: multiply-adds that have to be carried out.
        bytes: that have to be read or written at least once.
        missing: peers that can't be imported here, or can't run on this device, and
            why.
        images: that the work takes, for times an image.
        wall: compare what the clock on the wall says: for ways that use several threads
            or processes.
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
    """Import a peer and add its contenders inside; where it can't be imported, note
    that and go on.
    """
    try:
        yield
    except ImportError as error:
        missing[name] = f"not installed ({error})"


def mebibytes(field: str) -> float:
    """A line of /proc/self/status: VmRSS, what is resident now, or VmHWM, the most that
    was.
    """
    return (
        int(
            re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        )
        / 1024
    )


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """Run once and give the MiB taken at the highest, above what was there; None where
    that can't be read.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What was freed but kept would hide what is taken.
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = mebibytes("VmRSS")
    except OSError:
        return None
    kept = run()
    taken = mebibytes("VmHWM") - before
    del kept
    return taken


def peak_apart(contender: Contender, device: torch.device) -> float | None:
    """Peak memory of a contender's first call, in a copy of this process: nothing freed
    earlier hides what it takes.
    """
    # Neither survives being copied.
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
            os._exit(0)  # whatever happened: this copy has nothing else to do
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        told = pipe.read()
    os.waitpid(process, 0)
    return json.loads(told) if told else None


def clock(device: torch.device) -> int:
    """Which time to compare: CPU time on one thread of a CPU, else wall time."""
    return CPU if device.type == "cpu" and torch.get_num_threads() == 1 else WALL


def seconds(
    run: Callable[[], object], device: torch.device, repeats: int = 1
) -> tuple[float, float]:
    """Wall and processor seconds of one call, the mean of `repeats`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def difference(found: Tensor | float | int, ours: Tensor | float | int) -> float:
    """Norm of the difference over the norm of ours, on what both results have."""
    a, b = (torch.as_tensor(x).detach().cpu().double().flatten() for x in (found, ours))
    b = b[: len(a)]
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def floor(row: dict, machine: dict) -> float | None:
    """The time that a row's operations and bytes take at a machine's measured peak,
    whichever is longer.
    """
    return (
        max(
            row["macs"] / machine["macs_per_second"],
            row["bytes"] / machine["bytes_per_second"],
        )
        or None
    )


def peak_of_machine(device: torch.device) -> Machine:
    """This machine's fastest float32 product and copy, on the clock that ratios are
    taken from.
    """
    if clock(device) == WALL:
        return measure_machine(device)
    a, source = torch.ones(768, 768), torch.ones(2**25)
    target = torch.empty_like(source)
    product = min(seconds(lambda: torch.mm(a, a), device)[CPU] for _ in range(50))
    copy = min(seconds(lambda: target.copy_(source), device)[CPU] for _ in range(20))
    return Machine(len(a) ** 3 / product, 2 * source.nbytes / copy)


def rows(part: Part, turns: int, budget: float, device: torch.device) -> list[dict]:
    """Let the contenders take turns and give a row for each.

    Args:
        part: with paperlib first.
        turns: of each contender, after one that warms up and whose results are
            compared.
        budget: seconds after which no new turn begins, once there are three.
        device: where the work is done.
    """
    at = WALL if part.wall else clock(device)
    peaks = {
        contender.name: peak_apart(contender, device) for contender in part.contenders
    }
    results, repeats = {}, {}
    for contender in part.contenders:
        # The first call also loads and allocates; where it took long, a second would
        # say no more.
        took = max(
            seconds(lambda c=contender: results.update({c.name: c.run()}), device)
        )
        took = max(seconds(contender.run, device)) if took < 1 else took
        repeats[contender.name] = max(1, round(AT_LEAST / max(took, 1e-6)))
    taken: dict[str, list[tuple[float, float]]] = {
        contender.name: [] for contender in part.contenders
    }
    spent = 0.0
    for turn in range(turns):
        if turn >= 3 and spent > budget:
            break
        for contender in part.contenders:
            pair = seconds(contender.run, device, repeats[contender.name])
            spent += pair[at] * repeats[contender.name]
            taken[contender.name].append(
                tuple(value / contender.share for value in pair)
            )
    ours = part.contenders[0].name
    found = []
    for contender in part.contenders:
        wall, cpu = zip(*taken[contender.name], strict=True)
        pairs = zip(taken[contender.name], taken[ours], strict=True)
        ratios = [theirs[at] / max(mine[at], 1e-9) for theirs, mine in pairs]
        found.append(
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
    return found
