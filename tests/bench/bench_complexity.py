"""Time `paperlib.complexity.profile` beside fvcore and PyTorch's own counter, on ResNet-50.

Runs take turns, so that a machine that slows down slows all of them down. Start it with
`python -m tests.bench.bench_complexity`, or directly.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, when started directly

from paperlib.complexity import profile  # noqa: E402

SHAPE = (1, 3, 224, 224)


def contenders(model: torch.nn.Module) -> dict[str, Callable[[], int]]:
    """What is timed, by name; each returns the multiply-adds that it counts."""
    on_meta = torchvision.models.resnet50().to("meta").eval()

    def ours() -> int:
        return profile(model, SHAPE).macs

    def fvcore() -> int:
        with torch.no_grad():
            return FlopCountAnalysis(model, torch.zeros(SHAPE)).unsupported_ops_warnings(False).total()

    def counter(network: torch.nn.Module, device: str) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as mode:
            network(torch.zeros(SHAPE, device=device))
        return mode.get_total_flops() // 2

    return {
        "paperlib": ours,
        "fvcore": fvcore,
        "flop_counter": lambda: counter(model, "cpu"),
        "flop_counter, meta": lambda: counter(on_meta, "meta"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5, help="timed runs of each (default 5)")
    runs = parser.parse_args().n
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    timed = contenders(torchvision.models.resnet50().eval())
    counted = {name: count() for name, count in timed.items()}  # also a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(runs):
        for name, count in timed.items():
            start = time.perf_counter()
            count()
            seconds[name].append(time.perf_counter() - start)

    ours = statistics.median(seconds["paperlib"])
    print(f"ResNet-50, input {SHAPE}, {runs} runs, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':18}  {'median ms':>9}  {'min to max ms':>17}  {'ratio':>6}  {'multiply-adds':>13}  {'difference':>10}")
    for name, times in seconds.items():
        spread = f"{1e3 * min(times):.1f} to {1e3 * max(times):.1f}"
        median = statistics.median(times)
        print(
            f"{name:18}  {1e3 * median:9.1f}  {spread:>17}  {median / ours:6.1f}"
            f"  {counted[name]:13,}  {counted[name] - counted['paperlib']:+10,}"
        )
    print("fvcore counts batch norm and pooling too, which is its difference; see paperlib.conventions.")


if __name__ == "__main__":
    main()
