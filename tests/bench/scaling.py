"""Measure how time and memory grow with the size of the task.

The sizes are images, positions and dimensions (PaDiM), the bank (Patch SVDD), the batch
(Grad-CAM), and the depth of the network (counting). Each curve is
{name, x, y, points: {contender: [[x, y], …]}}. Times are processor seconds on one
thread of a CPU, wall seconds otherwise; the minimum of a few calls, which other
processes affect least.
"""

from collections.abc import Callable, Iterator
from functools import partial

import bench_gradcam
import bench_padim
import torch
import torchvision
from bench_patch_svdd import as_cells
from measure import COMMON, OURS, Contender, clock, peak_apart, peer, seconds

from paperlib.complexity import profile
from paperlib.datasets import elpv
from paperlib.gradcam import grad_cam
from paperlib.metrics import auroc
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD

Curve = dict[str, object]


def best(run: Callable[[], object], device: torch.device, calls: int = 3) -> float:
    """Return the seconds of the fastest call."""
    return min(seconds(run, device)[clock(device)] for _ in range(calls))


def padim(device: torch.device) -> Iterator[Curve]:
    """Measure PaDiM's fit against images, positions and dimensions.

    One size grows; the others remain at 50 images, 28² positions and d = 100.
    """

    def measure(
        images: int, side: int, dimensions: int
    ) -> dict[str, tuple[float, float | None]]:
        shapes = ((64, side), (128, side // 2), (256, side // 4))
        task = bench_padim.Task(images, 1, device, shapes, dimensions)
        runs = {OURS: task.our_fit}
        if device.type == "cpu":
            runs[COMMON] = task.common_fit
        peaks = {
            name: peak_apart(Contender(name, run), device) for name, run in runs.items()
        }
        return {name: (best(run, device), peaks[name]) for name, run in runs.items()}

    axes = {
        "images": [(n, (n, 28, 100)) for n in (25, 50, 100, 200)],
        "positions": [(side**2, (50, side, 100)) for side in (16, 28, 40, 56)],
        "dimensions": [(d, (50, 28, d)) for d in (25, 50, 100, 200)],
    }
    for axis, sizes in axes.items():
        results = [(x, measure(*size)) for x, size in sizes]
        for index, (quantity, y) in enumerate(
            (("seconds", "seconds to fit"), ("memory", "peak MiB of the fit"))
        ):
            points = {
                name: [
                    [x, values[name][index]]
                    for x, values in results
                    if values[name][index] is not None
                ]
                for name in results[0][1]
            }
            yield {
                "name": f"padim_{axis}_{quantity}",
                "x": axis,
                "y": y,
                "points": points,
            }


def patch_svdd(device: torch.device) -> Iterator[Curve]:
    """Measure Patch SVDD on solar cells against the number of images in the bank.

    The bank contains all of their patches, or a tenth of them (a coreset). The encoder
    is untrained: a strong baseline, for which no file is needed.
    """
    cells = elpv("mono")
    # Drawn at random: in the package's order, neighbouring cells belong to the same
    # module, and its brightness would separate them from the others.
    generator, drawn = torch.Generator().manual_seed(0), []
    for probability, count in ((0, 56), (1, 40)):
        rows = torch.nonzero(cells.probability == probability).flatten()
        order = torch.randperm(len(rows), generator=generator)[:count]
        drawn.append(as_cells(cells.images[rows[order]]))
    good, bad = drawn
    test = torch.cat([good[16:], bad]).to(device)
    labels = torch.tensor([0] * 40 + [1] * 40)
    torch.manual_seed(0)
    encoder = HierarchicalEncoder().to(device)
    times: dict[str, list] = {"all patches": [], "a tenth of the patches": []}
    areas: dict[str, list] = {"all patches": [], "a tenth of the patches": []}
    for count in (2, 4, 8, 16):
        for name, share in zip(times, (1, 0.1), strict=True):
            detector = PatchSVDD(encoder).fit(good[:count].to(device), coreset=share)
            times[name].append(
                [count, best(lambda d=detector: d.anomaly_maps(test[:4]), device) / 4]
            )
            areas[name].append(
                [count, auroc(labels, detector.anomaly_maps(test).scores.cpu())]
            )
    yield {
        "name": "patch_svdd_seconds",
        "x": "images in the bank",
        "y": "seconds per image",
        "points": times,
    }
    yield {
        "name": "patch_svdd_auroc",
        "x": "images in the bank",
        "y": "AUROC on 80 solar cells",
        "points": areas,
    }


def gradcam(device: torch.device) -> Iterator[Curve]:
    """Measure Grad-CAM on ResNet-50 against the batch size."""
    points: dict[str, list] = {OURS: []}
    for batch in (1, 2, 4, 8):
        model, images, classes, *_ = bench_gradcam.make_task(batch, device)
        runs = {
            OURS: partial(grad_cam, model, images, bench_gradcam.LAYER, classes),
            COMMON: partial(bench_gradcam.common_grad_cam, model, images, classes),
        }
        with peer({}, "pytorch-grad-cam"):
            runs["pytorch-grad-cam"] = bench_gradcam.pytorch_grad_cam_maps(
                model, images, classes
            )
        for name, run in runs.items():
            points.setdefault(name, []).append([batch, best(run, device) / batch])
    yield {
        "name": "gradcam_batch",
        "x": "images per batch",
        "y": "seconds per image",
        "points": points,
    }


def counting(device: torch.device) -> Iterator[Curve]:
    """Measure the time to count a ResNet against its number of layers."""
    points: dict[str, list] = {OURS: []}
    for depth in (18, 34, 50, 101, 152):
        model = getattr(torchvision.models, f"resnet{depth}")().eval()
        points[OURS].append([depth, best(lambda m=model: profile(m), device)])
        with peer({}, "fvcore"):
            from fvcore.nn import FlopCountAnalysis

            def fvcore(m: torch.nn.Module = model) -> int:
                with torch.no_grad():
                    counts = FlopCountAnalysis(m, torch.zeros(1, 3, 224, 224))
                    return counts.unsupported_ops_warnings(False).total()

            points.setdefault("fvcore", []).append([depth, best(fvcore, device)])
    yield {
        "name": "counting_depth",
        "x": "layers of the ResNet",
        "y": "seconds to count",
        "points": points,
    }


CURVES = {
    "padim": padim,
    "patch_svdd": patch_svdd,
    "gradcam": gradcam,
    "counting": counting,
}
