"""Time Patch SVDD's parts beside how they are usually done, and the whole detector beside the published procedure.

Embedding: one dense pass beside batches of 64 patches through the same encoder. Spreading: beside the loop over
patches. Neighbours: a bank of 60,000 × 64 beside faiss's flat index and scikit-learn's KD-tree. Whole: 40 training and
20 test images of 256×256, both sizes, nothing thinned; its maps are compared with the slow path.

Runs of a part take turns, so that a machine that slows down slows all of them down; the first turn only warms up. Wall
time says what a reader waits; processor time is what to compare on a machine that does other work. Start it with
`python -m tests.bench.bench_patch_svdd`, or directly; `--parts embedding neighbours` runs some.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F
from sklearn.neighbors import KDTree
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, when started directly

from paperlib.anomaly_map import spread_patch_scores  # noqa: E402
from paperlib.datasets import elpv  # noqa: E402
from paperlib.neighbors import nearest_distance  # noqa: E402
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD  # noqa: E402

Timed = dict[str, Callable[[], Tensor]]


def cells(count: int) -> Tensor:
    """The first solar cells without a defect, RGB (N, 3, 256, 256) in [0, 1]."""
    found = elpv("mono")
    good = found.images[found.probability == 0][:count, None].float() / 255
    return F.interpolate(good, (256, 256), mode="bilinear", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)


@torch.no_grad()
def by_batches(encoder: torch.nn.Module, image: Tensor, patch: int, stride: int) -> Tensor:
    """Embed an image's patches as the released code does: cut out, 64 at a time; (h, w, D)."""
    cut = image.unfold(1, patch, stride).unfold(2, patch, stride)
    rows, columns = cut.shape[1:3]
    patches = cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, patch, patch)
    return torch.cat([encoder(batch) for batch in patches.split(64)]).view(rows, columns, -1)


def by_the_loop(scores: Tensor, patch: int, stride: int, side: int) -> Tensor:
    """Spread scores as the released code does, in numpy: (N, h, w) to (N, side, side)."""
    maps = []
    for grid in scores.numpy():
        total, covering = torch.zeros(2, side, side).numpy()
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                window = (slice(i * stride, i * stride + patch), slice(j * stride, j * stride + patch))
                total[window] += grid[i, j]
                covering[window] += 1
        covering[covering == 0] = 1
        maps.append(torch.from_numpy(total / covering))
    return torch.stack(maps)


def embedding() -> Timed:
    torch.manual_seed(0)
    encoder, images = HierarchicalEncoder(), cells(3)
    images = images - images.mean(0)

    def batches() -> Tensor:
        small, big = by_batches(encoder.small, images[0], 32, 4), by_batches(encoder, images[0], 64, 16)
        return torch.cat([small.flatten(), big.flatten()])

    def dense() -> Tensor:
        found = encoder.embed(images[:1])
        return torch.cat([found.small.flatten(), found.big.flatten()])

    return {"paperlib, one pass": dense, "batches of 64 patches": batches}


def spreading() -> Timed:
    scores = torch.rand(4, 57, 57, generator=torch.Generator().manual_seed(0))
    return {
        "paperlib, 4 images": lambda: spread_patch_scores(scores, 32, 4, 256),
        "the loop, 4 images": lambda: by_the_loop(scores, 32, 4, 256),
    }


def neighbours() -> Timed:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60_000, 64, generator=generator), torch.randn(3249, 64, generator=generator)
    flat = faiss.IndexFlatL2(64)
    flat.add(bank.numpy())
    tree = KDTree(bank.numpy())
    few = queries[:100]  # the tree takes as long for each query; its time is scaled to all
    return {
        "paperlib": lambda: nearest_distance(queries, bank),
        "faiss, flat index": lambda: torch.from_numpy(flat.search(queries.numpy(), 1)[0][:, 0]).sqrt(),
        "scikit-learn, KD-tree": lambda: torch.from_numpy(tree.query(few.numpy(), 1)[0][:, 0]).float(),
    }


PARTS = {"embedding": embedding, "spreading": spreading, "neighbours": neighbours}


def compare(part: str, turns: int) -> None:
    """Let the contenders of a part take turns, and print their times and how far their results are apart."""
    timed = PARTS[part]()
    results = {name: run() for name, run in timed.items()}  # also a warm-up
    wall: dict[str, list[float]] = {name: [] for name in timed}
    cpu: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(turns):
        for name, run in timed.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            scale = len(next(iter(results.values()))) / len(results[name])
            wall[name].append(scale * (time.perf_counter() - start))
            cpu[name].append(scale * (time.process_time() - start_cpu))
    ours = next(iter(timed))
    print(
        f"{part:24} {'wall ms':>9}  {'min to max':>17}  {'ratio':>6}  {'CPU ms':>9}  {'ratio':>6}  {'difference':>10}"
    )
    for name in timed:
        median, median_cpu = statistics.median(wall[name]), statistics.median(cpu[name])
        spread = f"{1e3 * min(wall[name]):.1f} to {1e3 * max(wall[name]):.1f}"
        found, same = results[name], results[ours][: len(results[name])]
        print(
            f"  {name:22} {1e3 * median:9.1f}  {spread:>17}  {median / statistics.median(wall[ours]):6.1f}  "
            f"{1e3 * median_cpu:9.1f}  {median_cpu / statistics.median(cpu[ours]):6.1f}  "
            f"{(found - same).abs().max():10.1e}"
        )


def whole() -> None:
    """Fit on 40 images and map 20, both sizes, nothing thinned; then the slow path on two of the test images."""
    torch.manual_seed(0)
    encoder, images = HierarchicalEncoder(), cells(60)
    start, start_cpu = time.perf_counter(), time.process_time()
    detector = PatchSVDD(encoder).fit(images[:40])
    fitted = time.perf_counter() - start
    maps = detector.anomaly_maps(images[40:])
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(f"whole: {detector}")
    print(f"  40 training images in {fitted:.1f} s, with 20 test images {wall:.1f} s (processor {cpu:.1f} s)")
    mean, worst = images[:40].mean(0), 0.0
    for part, patch, stride, bank in (("small", 32, 4, detector.small), ("big", 64, 16, detector.big)):
        network = encoder.small if part == "small" else encoder
        kept = torch.cat([by_batches(network, image - mean, patch, stride).flatten(0, 1) for image in images[:2]])
        print(f"  bank, {part}: difference {(kept - bank[: len(kept)]).abs().max():.1e} to batches of patches")
        flat = faiss.IndexFlatL2(64)
        flat.add(bank.double().sub(bank.double().mean(0)).float().numpy())
        for row in (40, 59):
            embedded = by_batches(network, images[row] - mean, patch, stride)
            _, nearest = flat.search((embedded.flatten(0, 1) - bank.mean(0)).numpy(), 8)
            candidates = bank[torch.from_numpy(nearest)].double()
            scores = (candidates - embedded.flatten(0, 1)[:, None].double()).norm(dim=2).amin(1).float()
            slow = by_the_loop(scores.view(1, *embedded.shape[:2]), patch, stride, 256)
            worst = max(worst, float((slow - getattr(maps, part)[row - 40]).abs().max()))
    print(f"  maps of 2 test images: difference {worst:.1e} to batches, faiss and the loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=7, help="timed turns of each part (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and faiss (default 2)")
    parser.add_argument("--parts", nargs="*", default=[*PARTS, "whole"], choices=[*PARTS, "whole"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    print(
        f"median of {options.n} turns, torch {torch.__version__}, faiss {faiss.__version__}, {options.threads} threads"
    )
    for part in options.parts:
        whole() if part == "whole" else compare(part, options.n)


if __name__ == "__main__":
    main()
