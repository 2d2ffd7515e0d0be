"""Time PaDiM's fit and scoring from raw feature maps, each contender with its own joining, on a CPU.

ResNet-18's shapes (64, 128 and 256 channels at 56², 28², 14²), d = 100, random features. The contenders:

- paperlib: `PaDiM` with an extractor that hands out the maps, in batches of 32.
- the usual way: maps joined by unfold and fold, all channels before 100 are selected; `np.cov` in a loop over
  positions; to score, every covariance inverted again, SciPy's distance one image and position after the other.
- anomalib: its own joining, Gaussian and anomaly map (left out where it is not installed).
- the backbone: ResNet-18 with random weights as far as layer3, the floor that the rest of PaDiM should stay below.

Runs take turns, so that a machine that slows down slows all of them down. Peak memory is that of a process of its own
for each, above what the maps take; for scoring, above the fitted model as well. `--wide` runs Wide ResNet-50-2's
shapes at d = 550 instead, paperlib alone, once. Start it with `python -m tests.bench.bench_padim`, or directly; on a
machine that does other work, `OMP_WAIT_POLICY=passive` keeps threads that wait from taking its time.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, when started directly

from paperlib.backbones import FeatureExtractor  # noqa: E402
from paperlib.padim import PaDiM  # noqa: E402

try:
    from anomalib.models.components.stats import MultiVariateGaussian
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
    from anomalib.models.image.padim.torch_model import PadimModel
except ImportError as missing:
    PadimModel, MISSING = None, str(missing)

RESNET18 = ((64, 56), (128, 28), (256, 14))
WIDE_RESNET50 = ((256, 56), (512, 28), (1024, 14))
SIDE, BATCH = 224, 32
OURS, USUAL, ANOMALIB, BACKBONE = "paperlib", "the usual way", "anomalib", "the backbone"


class HandedOut(FeatureExtractor):
    """Gives maps that are already there; the first pixel of a batch says from which on."""

    def __init__(self, maps: list[Tensor]):
        super().__init__(nn.Sequential(*(nn.Identity() for _ in maps)), [str(i) for i in range(len(maps))])
        self.maps = maps

    def __call__(self, images: Tensor) -> list[Tensor]:
        start = int(images[0, 0, 0, 0])
        return [part[start : start + len(images)] for part in self.maps]


def images(start: int, stop: int) -> Tensor:
    return torch.tensor(float(start)).expand(stop - start, 3, SIDE, SIDE)


def batches(n: int) -> list[Tensor]:
    return [images(start, min(start + BATCH, n)) for start in range(0, n, BATCH)]


def features(n: int, shapes: tuple, seed: int) -> list[Tensor]:
    """Feature maps of n images; channels are mixed, so that covariances are no diagonal."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, c, side, side, generator=generator) for c, side in shapes]
    return [part.add_(0.5 * part.roll(1, 1)) for part in made]


# ---- the usual way, written from its description ---------------------------------------------------------------------


def unfold_and_fold(large: Tensor, small: Tensor) -> Tensor:
    """Join two maps: each cell of the small one beside the cells of the large one that it covers."""
    n, c, h, w = large.shape
    s = h // small.shape[2]
    patches = F.unfold(large, s, stride=s).view(n, c, s * s, *small.shape[2:])
    beside = small[:, :, None].expand(-1, -1, s * s, -1, -1)
    both = torch.cat([patches, beside], 1)
    return F.fold(both.reshape(n, -1, small.shape[2] * small.shape[3]), (h, w), s, stride=s)


def usual_embedding(maps: list[Tensor], channels: Tensor) -> np.ndarray:
    joined = maps[0]
    for part in maps[1:]:
        joined = unfold_and_fold(joined, part)
    return joined[:, channels].flatten(2).numpy()


def usual_fit(maps: list[Tensor], channels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x = usual_embedding(maps, channels)
    _, d, positions = x.shape
    covariances = np.zeros((d, d, positions), np.float32)
    for i in range(positions):
        covariances[:, :, i] = np.cov(x[:, :, i], rowvar=False) + 0.01 * np.eye(d)
    return x.mean(0), covariances


def usual_maps(maps: list[Tensor], channels: Tensor, fitted: tuple[np.ndarray, np.ndarray]) -> Tensor:
    x, (mean, covariances) = usual_embedding(maps, channels), fitted
    distances = []
    for i in range(x.shape[2]):
        inverse = np.linalg.inv(covariances[:, :, i])
        distances.append([mahalanobis(one[:, i], mean[:, i], inverse) for one in x])
    side = maps[0].shape[2]
    grid = torch.tensor(np.array(distances)).T.reshape(len(x), 1, side, side)
    large = F.interpolate(grid, size=SIDE, mode="bilinear", align_corners=False)[:, 0].numpy()
    return torch.from_numpy(np.stack([gaussian_filter(one, 4) for one in large])).float()


# ---- contenders ------------------------------------------------------------------------------------------------------


def contenders(train: int, test: int) -> dict[tuple[str, str], Callable]:
    """What is timed, by task and contender. Fits return (mean, sample of covariances), scoring returns maps."""
    maps, seen = features(train, RESNET18, 0), features(test, RESNET18, 1)
    model = PaDiM(HandedOut(maps), 100)
    channels = torch.randperm(448, generator=torch.Generator().manual_seed(0))[:100].sort().values
    one, kept = [part[:1] for part in seen], {}
    resnet = FeatureExtractor(torchvision.models.resnet18(), ["layer1", "layer2", "layer3"])
    pictures = torch.randn(test, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))

    def our_maps(parts: list[Tensor]) -> Tensor:
        if OURS not in kept:
            kept[OURS] = model.fit(batches(train))
        model.extractor = HandedOut(parts)
        try:
            return torch.cat([model.anomaly_map(batch) for batch in batches(len(parts[0]))])
        finally:
            model.extractor = HandedOut(maps)

    def our_fit() -> Tensor:
        kept[OURS] = model.fit(batches(train))
        return model.mean

    def usual_fitted() -> Tensor:
        kept[USUAL] = usual_fit(maps, channels)
        return torch.from_numpy(kept[USUAL][0].T.copy())

    def usual_scored(parts: list[Tensor]) -> Tensor:
        if USUAL not in kept:
            usual_fitted()
        return usual_maps(parts, channels, kept[USUAL])

    found = {
        ("fit", OURS): our_fit,
        ("fit", USUAL): usual_fitted,
        ("fit", BACKBONE): lambda: [resnet(pictures[:BATCH]) for _ in range(-(-train // BATCH))],
        ("score", OURS): lambda: our_maps(seen),
        ("score", USUAL): lambda: usual_scored(seen),
        ("score", BACKBONE): lambda: [resnet(batch) for batch in pictures.split(BATCH)],
        ("score one", OURS): lambda: our_maps(one),
        ("score one", USUAL): lambda: usual_scored(one),
        ("score one", BACKBONE): lambda: resnet(pictures[:1]),
    }
    if PadimModel is None:
        return found

    names = [f"layer{i + 1}" for i in range(len(RESNET18))]
    holder = SimpleNamespace(layers=names, idx=channels)
    gaussian, generator = MultiVariateGaussian(), AnomalyMapGenerator()

    def anomalib_embedding(parts: list[Tensor]) -> Tensor:
        return PadimModel.generate_embedding(holder, dict(zip(names, parts, strict=True)))

    def anomalib_fit() -> Tensor:
        bank = [anomalib_embedding(list(parts)) for parts in zip(*(m.split(BATCH) for m in maps), strict=True)]
        kept[ANOMALIB] = gaussian.fit(torch.vstack(bank))
        return kept[ANOMALIB][0].T

    def anomalib_maps(parts: list[Tensor]) -> Tensor:
        if ANOMALIB not in kept:
            anomalib_fit()
        mean, inverse = kept[ANOMALIB]
        split = zip(*(part.split(BATCH) for part in parts), strict=True)
        made = [
            generator(
                embedding=anomalib_embedding(list(batch)), mean=mean, inv_covariance=inverse, image_size=(SIDE, SIDE)
            )
            for batch in split
        ]
        return torch.cat(made)[:, 0]

    found[("fit", ANOMALIB)] = anomalib_fit
    found[("score", ANOMALIB)] = lambda: anomalib_maps(seen)
    found[("score one", ANOMALIB)] = lambda: anomalib_maps(one)
    return found


def high_water() -> int:
    """The most memory that this process has had resident, in MiB; Linux only."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024


def forget_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_mebibytes(task: str, name: str, arguments: list[str]) -> int:
    """Run one contender once in a process of its own and read what it took above what was there."""
    found = subprocess.run(
        [sys.executable, __file__, *arguments, "--peak", f"{task}/{name}"], capture_output=True, text=True, check=True
    )
    return int(found.stdout.split()[-1])


def wide(train: int) -> None:
    """Fit and score Wide ResNet-50-2's shapes at d = 550, batches made as they are needed, and say what it took."""

    class Fresh(HandedOut):
        def __call__(self, images: Tensor) -> list[Tensor]:
            return features(len(images), WIDE_RESNET50, int(images[0, 0, 0, 0]))

    before = high_water()
    model = PaDiM(Fresh([None] * 3), 550)
    start = time.perf_counter()
    for batch in batches(train):
        model.extractor(batch)
    made = time.perf_counter() - start
    start = time.perf_counter()
    model.fit(batches(train))
    fitted = time.perf_counter() - start - made
    print(f"Wide ResNet-50-2's shapes, d = 550, {train} images: fit {fitted:.1f} s, ", end="")
    print(f"peak {(high_water() - before) / 1024:.2f} GiB above torch itself (Gaussians: 3.53 GiB)")
    for n in (1, 8, 32):
        parts = features(n, WIDE_RESNET50, 1000)
        model.extractor.__class__, model.extractor.maps = HandedOut, parts
        model.anomaly_map(images(0, n))
        start = time.perf_counter()
        maps = model.anomaly_map(images(0, n))
        seconds = time.perf_counter() - start
        resnet = FeatureExtractor(torchvision.models.wide_resnet50_2(), ["layer1", "layer2", "layer3"])
        start = time.perf_counter()
        resnet(torch.randn(n, 3, SIDE, SIDE))
        print(f"score {n}: {seconds:.2f} s, the backbone {time.perf_counter() - start:.2f} s; ", end="")
        print(f"median distance {maps.median():.1f} (√550 = {550**0.5:.1f})")
    print(f"peak with scoring {(high_water() - before) / 1024:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=3, help="timed runs of each (default 3)")
    parser.add_argument("--train", type=int, default=209, help="images to fit (default 209)")
    parser.add_argument("--test", type=int, default=83, help="images to score (default 83)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--cpu", action="store_true", help="processor time, for a machine busy with other work")
    parser.add_argument("--no-peak", action="store_true", help="leave out peak memory")
    parser.add_argument("--wide", action="store_true", help="Wide ResNet-50-2's shapes, d = 550")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.wide:
        wide(options.train)
        return
    timed = contenders(options.train, options.test)
    if options.peak:
        task, name = options.peak.split("/")
        if task != "fit" and name != BACKBONE:
            timed["fit", name]()
        forget_high_water()
        before = high_water()
        timed[task, name]()
        print(high_water() - before)
        return

    clock = time.process_time if options.cpu else time.perf_counter
    results = {key: run() for key, run in timed.items()}  # also a warm-up
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for _ in range(options.n):
        for key, run in timed.items():
            start = clock()
            run()
            seconds[key].append(clock() - start)

    print(
        f"ResNet-18's shapes, d = 100, {options.train} images to fit, {options.test} to score, {options.n} runs, ",
        end="",
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ", end="")
    print("processor time" if options.cpu else "wall clock")
    print(f"{'':25} {'median ms':>9}  {'min to max ms':>16}  {'ratio':>6}  {'peak MiB':>8}  {'difference':>10}")
    passed = [f"--train={options.train}", f"--test={options.test}", f"--threads={options.threads}"]
    for task in ("fit", "score", "score one"):
        for name in (OURS, USUAL, ANOMALIB, BACKBONE):
            if (task, name) not in timed:
                continue
            times, ours = seconds[task, name], results[task, OURS]
            median = statistics.median(times)
            # Paired: each run over paperlib's of the same turn, which meets the same load.
            ratio = statistics.median(a / b for a, b in zip(times, seconds[task, OURS], strict=True))
            spread = f"{1e3 * min(times):.0f} to {1e3 * max(times):.0f}"
            peak = "" if options.no_peak else f"{peak_mebibytes(task, name, passed):,}"
            apart = "" if name == BACKBONE else f"{((results[task, name] - ours).norm() / ours.norm()).item():10.1e}"
            print(
                f"{task + ', ' + name:25} {1e3 * median:9.0f}  {spread:>16}  {ratio:6.2f}  {peak:>8}  {apart:>10}",
                flush=True,
            )
    print("ratio: median over turns of time over paperlib's for the same task; difference: of means or maps, by norms.")
    if PadimModel is None:
        print(f"anomalib is not installed ({MISSING}): its rows are missing")


if __name__ == "__main__":
    main()
