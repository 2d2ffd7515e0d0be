"""The benchmarks' measurements: ratios, differences, peaks, floors, missing peers."""

import importlib
import json

import measure
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


class Clocks:
    """Clocks that only the measured work advances, so that tests are reproducible."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.cpu

    def work(self, wall, cpu, result=1.0):
        """Return a function that advances the clocks by these seconds."""

        def run():
            self.wall += wall
            self.cpu += cpu
            return result

        return run


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr(measure, "time", clocks)
    return clocks


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ratios_are_times_over_the_first_contenders(clocks):
    contenders = [
        Contender("paperlib", clocks.work(0.04, 0.01)),
        Contender("slow", clocks.work(0.03, 0.03, 1.5), note="slower"),
        Contender("a fifth", clocks.work(0.01, 0.01), share=0.2, compared=False),
    ]
    ours, slow, part = rows(Part("work", contenders, 5_000_000, 0, {}, 4), 3, 9, CPU)
    assert ours["ratio"] == 1 and ours["difference"] == 0 and ours["images"] == 4
    assert slow["ratio"] == pytest.approx(3)
    assert slow["difference"] == 0.5
    assert slow["note"] == "slower"
    assert part["ratio"] == pytest.approx(5) and part["difference"] is None
    assert ours["macs"] == 5_000_000 and ours["cpu"] == pytest.approx(0.01)
    assert ours["turns"] == 3 and ours["wall"] == pytest.approx(0.04)
    # Three turns are run without any budget.
    assert len(rows(Part("work", contenders, 0, 0, {}), 9, 0, CPU)) == 3


def test_contenders_with_threads_are_compared_by_wall_time(clocks):
    calls, wait = [], clocks.work(0.2, 0.0)
    contenders = [
        Contender("paperlib", clocks.work(0.01, 0.01)),
        Contender("waits", lambda: calls.append(1) or wait()),
    ]
    by_wall = rows(Part("work", contenders, 0, 0, {}, wall=True), 3, 9, CPU)
    assert by_wall[1]["ratio"] == pytest.approx(20)
    assert rows(Part("work", contenders, 0, 0, {}), 3, 9, CPU)[1]["ratio"] == 0
    # The repeats follow from the longer of both times, because a contender may wait.
    assert len(calls) < 60


def test_the_committed_measurements_cover_all_parts():
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
    """The full run takes half an hour; errors should be found before it."""
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
    # The first operation of a process also maps pages of PyTorch's libraries.
    load_libraries = lambda: torch.ones(2).sum()  # noqa: E731
    peak = peak_apart(Contender("fifty MiB", allocate, load_libraries), CPU)
    if peak is None:
        pytest.skip("this system has no /proc to read the peak from")
    assert 45 < peak < 60
    tensors: list[torch.Tensor] = []
    prepare = lambda: tensors.append(torch.ones(50 * 2**18))  # noqa: E731
    score = lambda: tensors[0].sum()  # noqa: E731
    assert peak_apart(Contender("prepared", score, prepare), CPU) < 20
    assert tensors == []  # the fork appended to its own copy


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
