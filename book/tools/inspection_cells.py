"""Measure what an inspection with PaDiM needs, on solar cells (`make results`).

Training images, thresholds, resolution, float16, drift and speed, over several seeds.
Writes book/data/results/inspection_cells.json, which the page book/inspection.md shows.
Each run is saved when it is done, and runs that the file contains are skipped, so an
interrupted command can be resumed; `--force` repeats all of them.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import results
import torch
from torch import Tensor

from paperlib import backbones
from paperlib.anomaly_map import gaussian_blur, upsample
from paperlib.backbones import concatenate_embeddings
from paperlib.datasets import elpv
from paperlib.metrics import auroc
from paperlib.padim import PaDiM, PatchGaussian
from paperlib.padim.detector import SMOOTHING_SIGMA
from paperlib.padim.gaussian import (
    COVARIANCE_EPSILON,
    leave_one_out_distance,
    whiten,
    whitened_norm,
)
from paperlib.padim.inspection import strongest_region

SEEDS, FEW_SEEDS = 3, 2
HELD_OUT, DEFECTIVE = 200, 60  # cells of a seed that no model is fitted to
IMAGES = {100: (24, 40, 100, 150, 300), 20: (24, 100, 300)}  # per dimensions
FALSE_ALARMS = (0.1, 0.05, 0.01)  # that the threshold is chosen for
USUAL = {"images": 150, "dimensions": 100}
MARGIN = 0.06  # width of the frame that the region of interest excludes
# Resolution: training cells, dimensions, cells with a spot, its diameters in pixels of
# the original image (0: no spot) and its contrast.
SMALL, SMALL_DIMENSIONS, SPOTTED = 60, 30, 30
DIAMETERS, CONTRAST = (0, 4, 8, 16), 0.5
INPUTS = {
    "224": {"size": 224},
    "448": {"size": 448},
    "448 in tiles": {"size": 448, "tile": 256, "overlap": 64},
}
DIMMED = (0.0, 0.05, 0.1, 0.2)
# Held-out cells: for float16 per class, for the drift, for the times in turns.
HALF, DRIFTING, TIMED, TURNS = 50, 100, 16, 5
RECIPE = {
    "backbone": "efficientnet_lite0",
    "kind": "mono",
    "held out": HELD_OUT,
    "defective": DEFECTIVE,
    **USUAL,
    "margin of the region": MARGIN,
    "images for resolution": SMALL,
    "dimensions for resolution": SMALL_DIMENSIONS,
    "cells with a spot": SPOTTED,
    "contrast of spots": CONTRAST,
    "turns": TURNS,
}
Runs = Iterator[dict]
Maps = list[Tensor]


class Cells(NamedTuple):
    """Functional cells to fit, functional and defective cells that are held out."""

    train: Tensor
    held_out: Tensor
    defective: Tensor


def split(seed: int) -> Cells:
    """Draw the cells of a seed."""
    cells = elpv("mono")
    generator = torch.Generator().manual_seed(seed)
    good, bad = (
        rows[torch.randperm(len(rows), generator=generator)]
        for rows in (torch.nonzero(cells.probability == p)[:, 0] for p in (0, 1))
    )
    return Cells(
        cells.images[good[:-HELD_OUT]],
        cells.images[good[-HELD_OUT:]],
        cells.images[bad[:DEFECTIVE]],
    )


class Features:
    """Feature maps of a backbone, computed once per image and size of the input."""

    def __init__(self, size: int = 224, tile: int | None = None, overlap: int = 0):
        backbone = backbones.load("efficientnet_lite0")
        self.size = size
        self.transform = replace(backbone.transform, size=size)
        self.extractor = backbone.extractor(tile=tile, overlap=overlap)

    def __call__(self, images: Tensor) -> Maps:
        parts = [self.extractor(self.transform(part)) for part in images.split(4)]
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]


class Model:
    """PaDiM, fitted to feature maps that are there already."""

    def __init__(self, maps: Maps, dimensions: int, seed: int, size: int = 224):
        self.grid, self.size, self.count = maps[0].shape[2:], size, len(maps[0])
        generator = torch.Generator().manual_seed(seed)
        channels = torch.randperm(sum(x.shape[1] for x in maps), generator=generator)
        self.channels = channels[:dimensions].sort().values
        gaussian = PatchGaussian(self.grid.numel(), dimensions, torch.float32)
        for x in self.embed(maps):
            gaussian.update(x)
        self.mean = gaussian.mean()
        self.whitening = whiten(gaussian, COVARIANCE_EPSILON)

    def embed(self, maps: Maps) -> Iterator[Tensor]:
        """Yield the embeddings (n, P, D) of a few images at a time."""
        for part in zip(*(x.split(4) for x in maps), strict=True):
            yield concatenate_embeddings(part, self.channels).flatten(2).mT

    def anomaly_maps(self, maps: Maps, *, fitted: bool = False) -> Iterator[Tensor]:
        """Yield anomaly maps of a few images; `fitted`: each as if left out."""
        for x in self.embed(maps):
            distances = whitened_norm(x, self.mean, self.whitening)
            if fitted:
                distances = leave_one_out_distance(distances, self.count)
            distances = distances.view(-1, *self.grid)
            yield gaussian_blur(upsample(distances, self.size), SMOOTHING_SIGMA)

    def score(
        self, maps: Maps, region: Tensor | None = None, *, fitted: bool = False
    ) -> Tensor:
        """Return the scores in a region of interest."""
        inside = torch.ones(()) if region is None else region
        parts = self.anomaly_maps(maps, fitted=fitted)
        return torch.cat([(part * inside).amax((1, 2)) for part in parts]).double()


def training_images(seed: int) -> Runs:
    """Measure false alarms and detection against the number of training images."""
    train, held_out, defective = map(Features(), split(seed))
    region = torch.zeros(224, 224)
    edge = round(MARGIN * 224)
    region[edge:-edge, edge:-edge] = 1
    for dimensions, counts in IMAGES.items():
        for count in counts:
            part = [layer[:count] for layer in train]
            model = Model(part, dimensions, seed)
            is_usual = {"images": count, "dimensions": dimensions} == USUAL
            for area in (None, region)[: 1 + is_usual]:
                scores = [
                    model.score(part, area, fitted=True),
                    model.score(held_out, area),
                    model.score(defective, area),
                ]
                yield {
                    "images": count,
                    "dimensions": dimensions,
                    "region": area is not None,
                    **measure(*scores),
                }


def measure(train: Tensor, normal: Tensor, defective: Tensor) -> dict:
    """Return shares of alarms per chosen share of false alarms, and the AUROC."""
    labels = torch.arange(len(normal) + len(defective)) >= len(normal)
    thresholds = {share: train.quantile(1 - share) for share in FALSE_ALARMS}
    return {
        "alarms": {
            f"{share:g}": [share_of(x > threshold) for x in (normal, defective)]
            for share, threshold in thresholds.items()
        },
        "contrast": round(float(defective.median() / normal.median()), 4),
        "auroc": round(auroc(labels, torch.cat([normal, defective])), 4),
    }


def share_of(alarms: Tensor) -> float:
    return round(float(alarms.double().mean()), 4)


def add_spots(images: Tensor, diameter: int, seed: int) -> tuple[Tensor, Tensor]:
    """Darken one synthetic round spot per cell; return images and centres (y, x)."""
    n, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    low, high = 0.15, 0.85
    shares = low + (high - low) * torch.rand(n, 2, generator=generator)
    centres = shares * torch.tensor([height, width])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distances = torch.hypot(y - centres[:, :1, None], x - centres[:, 1:, None])
    opacity = CONTRAST * (diameter / 2 + 0.5 - distances).clamp(0, 1) * (diameter > 0)
    return (images * (1 - opacity)).round().to(torch.uint8), centres


def resolution(seed: int) -> Runs:
    """Measure which synthetic spots are found, per size of the network's input."""
    cells = split(seed)
    test = cells.held_out[:SPOTTED]
    for name, arguments in INPUTS.items():
        features = Features(**arguments)
        train = features(cells.train[:SMALL])
        model = Model(train, SMALL_DIMENSIONS, seed, features.size)
        threshold = float(model.score(train, fitted=True).quantile(0.95))
        found, start = {}, time.process_time()
        for diameter in DIAMETERS:
            images, centres = add_spots(test, diameter, seed)
            maps = torch.cat([*model.anomaly_maps(features(images))]).numpy()
            scale = features.size / images.shape[1]
            hits = [
                is_found(anomaly_map, threshold, centre * scale, diameter)
                for anomaly_map, centre in zip(maps, centres.numpy(), strict=True)
            ]
            found[str(diameter)] = round(float(np.mean(hits)), 4)
        seconds = time.process_time() - start
        yield {
            "input": name,
            "found": found,
            "cpu_ms": round(1e3 * seconds / len(DIAMETERS) / SPOTTED, 2),
        }


def is_found(
    anomaly_map: np.ndarray, threshold: float, centre: np.ndarray, diameter: float
) -> bool:
    """Return whether there is an alarm whose strongest region contains the centre.

    Without a spot, any alarm counts.
    """
    if anomaly_map.max() <= threshold:
        return False
    if not diameter:
        return True
    box = strongest_region(anomaly_map, threshold)
    y, x = centre
    return box.top <= y < box.bottom and box.left <= x < box.right


def half(seed: int) -> Runs:
    """Compare a model that is stored in float16 with the same in float32."""
    detector, cells = fit(seed)
    images = torch.cat([cells.held_out[:HALF], cells.defective[:HALF]]).split(4)
    batches = [detector.prepare(part) for part in images]
    expected = torch.cat([detector.score(batch) for batch in batches])
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for name, dtype in (("float32", None), ("float16", torch.float16)):
            path = Path(folder, f"{name}.safetensors")
            detector.save(path, dtype)
            sizes[name] = round(path.stat().st_size / 1e6, 1)
        smaller = PaDiM.load(path)
    stored = torch.cat([smaller.score(batch) for batch in batches])
    alarms = [scores > detector.threshold for scores in (expected, stored)]
    yield {
        "megabytes": sizes,
        "largest_change": float(f"{(stored / expected - 1).abs().max():.2g}"),
        "decisions_changed": int((alarms[0] != alarms[1]).sum()),
        "images_scored": len(expected),
    }


def fit(seed: int) -> tuple[PaDiM, Cells]:
    """Fit as the command `fit` does, and choose the threshold for 5 % false alarms."""
    cells = split(seed)
    detector = PaDiM(
        backbones.load("efficientnet_lite0").extractor(), USUAL["dimensions"], seed
    )
    train = cells.train[: USUAL["images"]].split(4)
    batches = [detector.prepare(part) for part in train]
    detector.fit(batches).normal_threshold(batches, 0.95, fitted=True)
    return detector, cells


def drift(seed: int) -> Runs:
    """Dim normal cells, which simulates a slow change of the lighting."""
    cells, features = split(seed), Features()
    train = features(cells.train[: USUAL["images"]])
    model = Model(train, USUAL["dimensions"], seed)
    threshold = float(model.score(train, fitted=True).quantile(0.95))
    for dimmed in DIMMED:
        images = (cells.held_out[:DRIFTING] * (1 - dimmed)).round().to(torch.uint8)
        scores = model.score(features(images))
        yield {
            "dimmed": dimmed,
            "median": round(float(scores.median()) / threshold, 4),
            "alarms": share_of(scores > threshold),
        }


def serving(seed: int) -> Runs:
    """Compare ways to score prepared images, in turns, on one thread."""
    detector, cells = fit(seed)
    images = detector.prepare(cells.held_out[:TIMED])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "detector.onnx")
        export_onnx(detector, images[:2], path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options)
    (received,) = session.get_inputs()

    def with_onnx(part: Tensor) -> None:
        session.run(None, {received.name: part.numpy()})

    ways = {
        f"{name}, {label}": (call, images.split(length))
        for name, call in (("PyTorch", detector), ("onnxruntime", with_onnx))
        for label, length in (("one by one", 1), ("batches of 8", 8))
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, (call, parts) in ways.items():
            # Processor time, because other processes hardly affect it.
            start = time.process_time()
            for part in parts:
                call(part)
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - start)
    first, *_ = seconds.values()
    for name, taken in seconds.items():
        speeds = [a / b for a, b in zip(first, taken, strict=True)]
        yield {
            "way": name,
            "speed": round(statistics.median(speeds), 3),
            "lowest": round(min(speeds), 3),
            "highest": round(max(speeds), 3),
            "cpu_ms": round(1e3 * statistics.median(taken) / len(images), 2),
        }


def export_onnx(detector: PaDiM, images: Tensor, path: Path) -> None:
    """Export a detector for batches of any length."""
    shapes = ({0: torch.export.Dim("n")},)
    program = torch.export.export(detector, (images,), dynamic_shapes=shapes)
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)


EXPERIMENTS = {
    training_images: SEEDS,
    resolution: FEW_SEEDS,
    drift: FEW_SEEDS,
    half: 1,
    serving: 1,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the missing experiments."""
    stored = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["experiment"], row["seed"]) for row in stored.runs}
    for run, seeds in EXPERIMENTS.items():
        for seed in range(seeds):
            if (run.__name__, seed) in done:
                continue
            rows = list(run(seed))
            stored.runs += [
                {"experiment": run.__name__, "seed": seed, **row} for row in rows
            ]
            stored.save()
            print(run.__name__, seed, *rows, sep="\n ", flush=True)


if __name__ == "__main__":
    main()
