"""The bench measures what it says: ratios, differences, peaks, floors, and which peers
are missing.
"""

import importlib
import json
import time

import pytest
import torch
from built import ROOT
from measure import (
    Contender,
    Part,
    difference,
    floor,
    peak_apart,
    peak_of_machine,
    peer,
    rows,
)

CPU = torch.device("cpu")


def busy(seconds: float, result: float = 1.0):
    """Work that takes this much of the processor's time."""

    def run() -> float:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return result

    return run


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ratios_are_times_over_the_first_contenders():
    contenders = [
        Contender("paperlib", busy(0.01)),
        Contender("slow", busy(0.03, 1.5), note="slower"),
        Contender("a fifth of the work", busy(0.01), share=0.2, compared=False),
    ]
    ours, slow, part = rows(Part("work", contenders, 5_000_000, 0, {}, 4), 3, 9, CPU)
    assert ours["ratio"] == 1 and ours["difference"] == 0 and ours["images"] == 4
    assert 2.5 < slow["ratio"] < 3.5
    assert slow["difference"] == 0.5
    assert slow["note"] == "slower"
    assert 4 < part["ratio"] < 6 and part["difference"] is None
    assert ours["macs"] == 5_000_000 and ours["cpu"] == pytest.approx(0.01, rel=0.2)
    assert ours["turns"] == 3 and ours["wall_low"] <= ours["wall"] <= ours["wall_high"]
    # No budget: three turns at least.
    assert len(rows(Part("work", contenders, 0, 0, {}), 9, 0, CPU)) == 3


def test_ways_with_threads_are_compared_by_the_clock_on_the_wall():
    calls = []

    def waiting() -> float:
        calls.append(1)
        # Twenty times the other's work: where much else runs, the clock on the wall
        # counts that, too.
        time.sleep(0.2)
        return 1.0

    contenders = [Contender("paperlib", busy(0.01)), Contender("waits", waiting)]
    assert (
        rows(Part("work", contenders, 0, 0, {}, wall=True), 3, 9, CPU)[1]["ratio"] > 2
    )
    assert rows(Part("work", contenders, 0, 0, {}), 3, 9, CPU)[1]["ratio"] < 0.5
    # What waits is not repeated until it has used the processor for as long as others.
    assert len(calls) < 60


def test_the_figures_of_the_page_are_of_the_parts_that_the_bench_has():
    committed = json.loads(
        (ROOT / "book" / "data" / "speed.json").read_text(encoding="utf-8")
    )["rows"]
    names = {path.stem for path in (ROOT / "tests" / "bench").glob("bench_*.py")} - {
        "bench_pages"
    }
    parts = {
        (name.removeprefix("bench_"), part)
        for name in names
        for part in importlib.import_module(name).PARTS
    }
    assert {(row["bench"], row["part"]) for row in committed} == parts


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["complexity", "gradcam", "metrics", "padim", "pipeline", "patch_svdd"]
)
def test_every_part_can_be_set_up_at_its_full_size(name):
    """The full bench takes half an hour: what fails in it is to be known before."""
    for build in importlib.import_module(f"bench_{name}").PARTS.values():
        names = [contender.name for contender in build(True, CPU).contenders]
        assert names[0] == "paperlib" and len(names) == len(set(names))


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    machine = {"macs_per_second": 1e9, "bytes_per_second": 1e10}
    assert floor({"macs": 10**9, "bytes": 10**9}, machine) == 1
    assert floor({"macs": 10**8, "bytes": 10**10}, machine) == 1
    assert floor({"macs": 0, "bytes": 0}, machine) is None
    assert all(1e7 < value < 1e13 for value in peak_of_machine(CPU))


def test_peak_memory_is_that_of_a_first_call():
    allocate = lambda: torch.ones(50 * 2**18).sum()  # noqa: E731
    found = peak_apart(Contender("fifty MiB", allocate), CPU)
    if found is None:
        pytest.skip("no /proc here to read it from")
    assert 45 < found < 60
    kept: list[torch.Tensor] = []
    prepare = lambda: kept.append(torch.ones(50 * 2**18))  # noqa: E731
    assert peak_apart(Contender("prepared", lambda: kept[0].sum(), prepare), CPU) < 20
    assert kept == []  # it happened in a copy of this process


def test_a_missing_peer_is_named():
    missing: dict[str, str] = {}
    with peer(missing, "there"):
        import torch  # noqa: F401
    with peer(missing, "not there"):
        import a_library_that_nobody_wrote  # noqa: F401
    assert list(missing) == ["not there"] and "not installed" in missing["not there"]


def test_differences_are_relative():
    assert difference(
        torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])
    ) == pytest.approx(0.08)
    assert difference(torch.tensor([3.0]), torch.tensor([3.0, 4.0])) == 0
    assert difference(101, 100) == pytest.approx(0.01)
