"""How time and memory grow: with images, positions and dimensions, with the bank, with
the batch, with depth.

Each curve is {name, x, y, points: {contender: [[x, y], …]}}; times are processor
seconds on one thread of a CPU, wall seconds elsewhere, the smallest of a few calls:
what other work on the machine disturbs least.
"""

from collections.abc import Callable, Iterator

import bench_gradcam
import bench_padim
import torch
import torchvision
from bench_patch_svdd import as_cells
from measure import OURS, USUAL, Contender, clock, peak_apart, peer, seconds

from paperlib.complexity import profile
from paperlib.datasets import elpv
from paperlib.gradcam import grad_cam
from paperlib.metrics import auroc
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD

Curve = dict[str, object]


def best(run: Callable[[], object], device: torch.device, calls: int = 3) -> float:
    """Seconds of the fastest call."""
    return min(seconds(run, device)[clock(device)] for _ in range(calls))


def padim(device: torch.device) -> Iterator[Curve]:
    """Fit PaDiM beside the review's way, one size growing, the others at 50 images, 28²
    positions and d = 100.
    """

    def measured(
        images: int, side: int, dimensions: int
    ) -> dict[str, tuple[float, float | None]]:
        shapes = ((64, side), (128, side // 2), (256, side // 4))
        work = bench_padim.Work(images, 1, device, shapes, dimensions)
        ways = (
            {OURS: work.our_fit, USUAL: work.usual_fit}
            if device.type == "cpu"
            else {OURS: work.our_fit}
        )
        peaks = {
            name: peak_apart(Contender(name, run), device) for name, run in ways.items()
        }
        return {name: (best(run, device), peaks[name]) for name, run in ways.items()}

    axes = {
        "images": [(n, (n, 28, 100)) for n in (25, 50, 100, 200)],
        "positions": [(side**2, (50, side, 100)) for side in (16, 28, 40, 56)],
        "dimensions": [(d, (50, 28, d)) for d in (25, 50, 100, 200)],
    }
    for axis, sizes in axes.items():
        found = [(x, measured(*size)) for x, size in sizes]
        for row, (what, y) in enumerate(
            (("seconds", "seconds to fit"), ("memory", "MiB at the peak of the fit"))
        ):
            points = {
                name: [
                    [x, values[name][row]]
                    for x, values in found
                    if values[name][row] is not None
                ]
                for name in found[0][1]
            }
            yield {"name": f"padim_{axis}_{what}", "x": axis, "y": y, "points": points}


def patch_svdd(device: torch.device) -> Iterator[Curve]:
    """Evaluate Patch SVDD on solar cells against the images kept, all of their patches
    and a tenth (a coreset).

    The encoder is untrained: a strong baseline, and there is no file to need.
    """
    cells = elpv("mono")
    # Drawn at random: in the package's order neighbours come from one module, and its
    # brightness tells them apart.
    generator, drawn = torch.Generator().manual_seed(0), []
    for probability, count in ((0, 56), (1, 40)):
        kind = torch.nonzero(cells.probability == probability).flatten()
        chosen = torch.randperm(len(kind), generator=generator)[:count]
        drawn.append(as_cells(cells.images[kind[chosen]]))
    good, bad = drawn
    test = torch.cat([good[16:], bad]).to(device)
    labels = torch.tensor([0] * 40 + [1] * 40)
    torch.manual_seed(0)
    encoder = HierarchicalEncoder().to(device)
    times: dict[str, list] = {"every patch kept": [], "a tenth kept": []}
    areas: dict[str, list] = {"every patch kept": [], "a tenth kept": []}
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
        "x": "images kept",
        "y": "seconds an image",
        "points": times,
    }
    yield {
        "name": "patch_svdd_auroc",
        "x": "images kept",
        "y": "AUROC on 80 solar cells",
        "points": areas,
    }


def gradcam(device: torch.device) -> Iterator[Curve]:
    """Grad-CAM on ResNet-50 against the batch."""
    points: dict[str, list] = {OURS: []}
    for batch in (1, 2, 4, 8):
        at = bench_gradcam.given(batch, device)
        ways = {
            OURS: lambda at=at: grad_cam(
                at.model, at.images, bench_gradcam.LAYER, at.classes
            )
        }
        ways[USUAL] = lambda at=at: bench_gradcam.usual_grad_cam(
            at.model, at.images, at.classes
        )
        with peer({}, "pytorch-grad-cam"):
            ways["pytorch-grad-cam"] = bench_gradcam.pytorch_grad_cam_maps(
                at.model, at.images, at.classes
            )
        for name, run in ways.items():
            points.setdefault(name, []).append([batch, best(run, device) / batch])
    yield {
        "name": "gradcam_batch",
        "x": "images in a batch",
        "y": "seconds an image",
        "points": points,
    }


def counting(device: torch.device) -> Iterator[Curve]:
    """Count ResNets against their convolutions."""
    points: dict[str, list] = {OURS: []}
    for depth in (18, 34, 50, 101, 152):
        model = getattr(torchvision.models, f"resnet{depth}")().eval()
        points[OURS].append([depth, best(lambda m=model: profile(m), device)])
        with peer({}, "fvcore"):
            from fvcore.nn import FlopCountAnalysis

            def fvcore(m: torch.nn.Module = model) -> int:
                with torch.no_grad():
                    found = FlopCountAnalysis(
                        m, torch.zeros(1, 3, 224, 224)
                    ).unsupported_ops_warnings(False)
                    return found.total()

            points.setdefault("fvcore", []).append([depth, best(fvcore, device)])
    yield {
        "name": "counting_depth",
        "x": "layers of a ResNet",
        "y": "seconds to count",
        "points": points,
    }


CURVES = {
    "padim": padim,
    "patch_svdd": patch_svdd,
    "gradcam": gradcam,
    "counting": counting,
}
