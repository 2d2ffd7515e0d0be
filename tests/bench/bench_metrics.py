"""Time AUPRO beside anomalib's and pixel AUROC beside scikit-learn's, on maps and masks shaped as MVTec AD's bottles.

83 maps of 224×224, 63 of them with one or two defects. Runs take turns, so that a machine that slows down slows all of
them down. anomalib is no dependency of the book: where it is not installed, its row is left out. Start it with
`python -m tests.bench.bench_metrics`, or directly.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, when started directly

from paperlib.metrics import aupro, pixel_auroc  # noqa: E402


def bottles(seed: int, decimals: int | None) -> tuple[Tensor, Tensor]:
    """Masks of discs, and smooth noise that is higher where they are; rounded, many scores are tied."""
    random = np.random.default_rng(seed)
    masks = np.zeros((83, 224, 224), dtype=bool)
    rows, columns = np.mgrid[:224, :224]
    for mask in masks[20:]:
        for _ in range(random.integers(1, 3)):
            (y, x), radius = random.uniform(40, 184, 2), random.uniform(6, 30)
            mask |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    noise = ndimage.gaussian_filter(random.normal(size=masks.shape), (0, 4, 4))
    maps = noise / noise.std() + 2 * ndimage.gaussian_filter(masks.astype(float), (0, 4, 4))
    maps = torch.from_numpy(maps.astype(np.float32))
    return torch.from_numpy(masks), maps if decimals is None else maps.round(decimals=decimals)


def contenders(masks: Tensor, maps: Tensor) -> dict[str, Callable[[], float]]:
    """What is timed, by metric and library."""
    timed: dict[str, Callable[[], float]] = {"AUPRO, paperlib": lambda: aupro(masks, maps)}
    try:
        from anomalib.metrics.aupro import _AUPRO
    except ImportError:
        print("anomalib is not installed; `pip install anomalib` in an environment of its own to time it too")
    else:

        def peer() -> float:
            metric = _AUPRO(fpr_limit=0.3)
            metric.update(maps, masks)
            return float(metric.compute())

        timed["AUPRO, anomalib"] = peer
    timed["pixel AUROC, paperlib"] = lambda: pixel_auroc(masks, maps)
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        print("scikit-learn is not installed; `pip install scikit-learn` to time it too")
    else:
        labels, scores = masks.flatten().numpy(), maps.flatten().numpy()
        timed["pixel AUROC, scikit-learn"] = lambda: float(roc_auc_score(labels, scores))
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--decimals", type=int, help="round the maps, so that scores are tied (default: not)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = contenders(*bottles(0, options.decimals))
    results = {name: run() for name, run in timed.items()}  # also a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.n):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    print(f"83 maps of 224×224, {options.n} runs, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':25} {'median ms':>9}  {'min to max ms':>15}  {'ratio':>5}  {'result':>12}")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = median / statistics.median(seconds[f"{name.split(',')[0]}, paperlib"])
        spread = f"{1e3 * min(times):.0f} to {1e3 * max(times):.0f}"
        print(f"{name:25} {1e3 * median:9.0f}  {spread:>15}  {ratio:5.2f}  {results[name]:12.9f}")
    print("ratio: time over paperlib's for the same metric.")


if __name__ == "__main__":
    main()
