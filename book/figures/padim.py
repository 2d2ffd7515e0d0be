"""Figures of the page on PaDiM."""

from functools import cache
from itertools import combinations
from typing import NamedTuple

import companion
import matplotlib.pyplot as plt
import numpy as np
import torch
from drawing import (
    BLUE,
    FILL,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    VERMILION,
    arrow,
    blank,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision import models

from paperlib import backbones
from paperlib.backbones import FeatureExtractor, concatenate_embeddings
from paperlib.datasets import elpv
from paperlib.metrics import aupro, pixel_auroc
from paperlib.padim import PaDiM, PatchGaussian, mahalanobis_distance
from paperlib.padim.gaussian import whitened_norm

N_TRAIN = 150
OFFSET = "offset points"
POSITION = (20, 36)  # row and column of the position that is followed
# The five vectors of the notebook, and the two that are compared.
VECTORS = torch.tensor([[5.0, 4], [1, 0], [4, 1], [2, 3], [3, 2]])
POINTS = {"a": (5.0, 4.0), "b": (5.0, 0.0)}


class Example(NamedTuple):
    """PaDiM, fitted to functional solar cells, and what it was fitted to."""

    detector: PaDiM
    extractor: FeatureExtractor
    resize: object  # images as the network sees them, in [0, 1]
    prepare: object  # the same, normalised
    train: Tensor  # images
    embeddings: Tensor  # (N, P, D) of the training images
    functional: Tensor  # images that were not used to fit
    defective: Tensor


@cache
def _example() -> Example:
    """Fit PaDiM to the notebook's 150 functional mono cells."""
    backbone = backbones.load("efficientnet_lite0")
    extractor = FeatureExtractor(*backbone[:2])
    cells = elpv("mono")
    generator = torch.Generator().manual_seed(0)
    functional, defective = (
        indices[torch.randperm(len(indices), generator=generator)]
        for indices in (torch.nonzero(cells.probability == p)[:, 0] for p in (0, 1))
    )
    train = cells.images[functional[:N_TRAIN]]
    batches = [backbone.transform(batch) for batch in train.split(4)]
    detector = PaDiM(extractor, 100, seed=0).fit(batches)
    embeddings = torch.cat(
        [_embed(extractor(batch), detector.channels) for batch in batches]
    )
    return Example(
        detector,
        extractor,
        backbone.transform.resize,
        backbone.transform,
        train,
        embeddings,
        cells.images[functional[200:202]],
        cells.images[defective[:4]],
    )


def _embed(maps: list[Tensor], channels: Tensor) -> Tensor:
    return concatenate_embeddings(maps, channels).flatten(2).transpose(1, 2)


def embedding() -> Figure:
    """Three layers' maps of real sizes, enlarged, and stacked to one embedding."""
    example = _example()
    image = example.train[:1]
    maps = example.extractor(example.prepare(image))
    side = maps[0].shape[2]
    row, column = POSITION
    vector = concatenate_embeddings(maps)[0, :, row, column]
    figure, ax = plt.subplots(figsize=(5.2, 4.75))
    blank(ax)
    middle = step = side + 20.0
    picture = example.resize(image)[0, 0]
    _place(ax, picture, (0, middle), side, "gray")
    ax.text(side / 2, middle - 4, _size(picture), ha="center", va="bottom")
    left, enlarged_left, vector_left = side + 22, 2 * side + 44, 3 * side + 80
    height, total = 2 * step + side, len(vector)
    start = 0
    for k, part in enumerate(maps):
        channels, size = part.shape[1:3]
        channel = part[0, part[0].flatten(1).var(1).argmax()]
        top, gap = k * step, (side - size) / 2
        corner = (left + gap, top + gap)
        _layers(ax, corner, size)
        _place(ax, channel, corner, size, "viridis")
        _layers(ax, (enlarged_left, top), side)
        _place(ax, channel, (enlarged_left, top), side, "viridis")
        is_last = k == len(maps) - 1  # where an arrow comes from above
        ax.text(
            left + side / 2,
            top + gap + (size + 3 if is_last else -9),
            f"{channels} channels\n{_size(channel)}",
            ha="center",
            va="top" if is_last else "bottom",
        )
        arrow(ax, (side + 2, middle + side / 2), (corner[0] - 2, top + side / 2), MUTED)
        arrow(
            ax,
            (corner[0] + size + 6, top + side / 2),
            (enlarged_left - 2, top + side / 2),
        )
        # The position, and its part of the embedding.
        outline = {"fill": False, "edgecolor": VERMILION, "lw": 2, "zorder": 3}
        cell = (enlarged_left + column - 1.5, top + row - 1.5)
        ax.add_patch(Rectangle(cell, 4, 4, **outline))
        low, high = (height * at / total for at in (start, start + channels))
        values = vector[start : start + channels, None]
        values = (values - values.min()) / (values.max() - values.min())
        ax.imshow(
            values,
            cmap="viridis",
            extent=(vector_left, vector_left + 12, high, low),
            interpolation="nearest",
            zorder=2,
        )
        ax.add_patch(
            Rectangle(
                (vector_left, low), 12, high - low, **(outline | {"edgecolor": INK})
            )
        )
        target = (vector_left - 1, (low + high) / 2)
        arrow(ax, (cell[0] + 4, cell[1] + 2), target, VERMILION, lw=1.5)
        ax.text(vector_left + 15, (low + high) / 2, channels, va="center", color=INK)
        start += channels
    ax.text(enlarged_left + side / 2, -9, f"enlarged to\n{side}×{side}", ha="center")
    ax.text(vector_left + 6, height + 4, f"{total}\nnumbers", ha="center", va="top")
    ax.set(xlim=(-2, vector_left + 34), ylim=(height + 24, -28), aspect="equal")
    return figure


def _size(image: Tensor) -> str:
    return f"{image.shape[0]}×{image.shape[1]}"


def _place(ax: Axes, image: Tensor, corner: tuple, side: float, cmap: str) -> None:
    """Draw an image as a square with the given upper left corner."""
    left, top = corner
    extent = (left, left + side, top + side, top)
    ax.imshow(image, cmap=cmap, extent=extent, interpolation="nearest", zorder=2)


def _layers(ax: Axes, corner: tuple, side: float) -> None:
    """Draw the edges of two more channels behind the one that is shown."""
    left, top = corner
    for shift in (5, 2.5):
        back = (left + shift, top - shift)
        style = {"facecolor": FILL, "edgecolor": MUTED, "lw": 0.8, "zorder": 1.5}
        ax.add_patch(Rectangle(back, side, side, **style))


def gaussian() -> list[Figure]:
    """The Gaussian of one position in two channels, and a defect outside of it."""
    example = _example()
    defect = example.defective[:1]
    prepared = example.prepare(defect)
    new = _embed(example.extractor(prepared), example.detector.channels)
    distances = whitened_norm(new, example.detector.mean, example.detector.whitening)
    side = example.detector.grid[1]
    column = side // 2  # there, the position with the largest distance
    row = int(distances.view(example.detector.grid)[:, column].argmax())
    position = row * side + column
    normal, vector = example.embeddings[:, position], new[0, position]
    first, second = _channels(normal, vector)
    points, point = normal[:, [first, second]], vector[[first, second]]
    mean, covariance = _fit(points)

    photo, ax = plt.subplots(figsize=(2.2, 2.5))
    picture = example.resize(defect)[0, 0]
    blank(ax).imshow(picture, cmap="gray")
    step = picture.shape[0] / side
    corner = (step * column - 6.5, step * row - 6.5)
    ax.add_patch(
        Rectangle(corner, step + 12, step + 12, fill=False, edgecolor=ORANGE, lw=2)
    )
    ax.set_title(f"position ({row}, {column})")

    scatter, ax = plt.subplots(figsize=(2.9, 2.9))
    ax.plot(*points.T, "o", color=BLUE, ms=3, label="150 normal cells")
    label = f"defective cell, M = {_distance(point, mean, covariance):.1f}"
    ax.plot(*point, "^", color=ORANGE, ms=9, label=label)
    ax.plot(*mean, "+", color=INK, ms=10, mew=1.5)
    _ellipses(ax, mean, covariance, (1, 2, 3))
    names = example.detector.channels[[first, second]].tolist()
    ax.set(xlabel=f"channel {names[0]}", ylabel=f"channel {names[1]}")
    ax.spines[["top", "right"]].set_visible(False)
    scatter.legend(loc="outside upper center", handletextpad=0.3)
    return [photo, scatter]


def _fit(points: Tensor, epsilon: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of points (N, 2), as PaDiM fits them."""
    fitted = PatchGaussian(1, 2).update(points[:, None])
    return fitted.mean()[0], fitted.covariance(epsilon)[0]


def _distance(point: Tensor, mean: Tensor, covariance: Tensor) -> float:
    cholesky = torch.linalg.cholesky(covariance)
    return mahalanobis_distance(point[None, None], mean[None], cholesky[None]).item()


def _channels(normal: Tensor, vector: Tensor) -> tuple[int, int]:
    """Find two channels that show a defect together, but not one at a time.

    In each of the two the defect deviates by less than three standard deviations, and
    together they put it farther from the mean than every normal vector. Of such pairs,
    this is the one with the largest Mahalanobis distance.
    """
    deviation = ((vector - normal.mean(0)) / normal.std(0)).abs()
    usual = torch.nonzero(deviation < 3)[:, 0].tolist()
    distances = {}
    for pair in combinations(usual, 2):
        points = torch.cat([normal, vector[None]])[:, None, list(pair)]
        mean, covariance = _fit(points[:-1, 0])
        cholesky = torch.linalg.cholesky(covariance)
        *others, defect = mahalanobis_distance(points, mean[None], cholesky[None])
        if defect > max(others):
            distances[pair] = defect.item()
    return max(distances, key=distances.get)


def _ellipses(
    ax: Axes, mean: Tensor, covariance: Tensor, distances: tuple[float, ...]
) -> None:
    """Draw the ellipses on which the Mahalanobis distance has the given values."""
    angles = torch.linspace(0, 2 * torch.pi, 200)
    circle = torch.stack([angles.cos(), angles.sin()])
    factor = torch.linalg.cholesky(covariance)
    for distance in distances:
        x, y = mean[:, None] + distance * factor @ circle
        ax.plot(x, y, color=MUTED, lw=1)
        label = y.argmin()
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
        style = {"ha": "center", "va": "center", "fontsize": 10, "bbox": box}
        ax.text(x[label], y[label], f"{distance:g}", color=INK, **style)


def covariance() -> list[Figure]:
    """Two points, with the variances only and with the whole covariance."""
    mean, whole = _fit(VECTORS, epsilon=0)
    kinds = {
        "variances only": torch.diag(torch.diag(whole)),
        "whole covariance": whole,
    }
    figures = []
    for title, matrix in kinds.items():
        figure, ax = plt.subplots(figsize=(2.5, 2.7))
        ax.plot(*VECTORS.T, "o", color=BLUE, ms=5)
        ax.plot(*mean, "+", color=INK, ms=10, mew=1.5)
        _ellipses(ax, mean, matrix, (1, 2))
        for name, point in POINTS.items():
            distance = _distance(torch.tensor(point), mean, matrix)
            style = {"color": ORANGE, "ms": 10, "mfc": "none", "mew": 2}
            ax.plot(*point, "^" if name == "a" else "s", **style)
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
            style = {"textcoords": OFFSET, "va": "center", "bbox": box}
            ax.annotate(f"{name}: {distance:.2f}", point, (9, 0), **style)
        ax.set(xlim=(-0.8, 8.2), ylim=(-2, 6), aspect="equal", title=title)
        ax.set(xlabel="channel 1", ylabel="channel 2")
        ax.spines[["top", "right"]].set_visible(False)
        figures.append(figure)
    return figures


def map_and_score() -> Figure:
    """Image, distances, map and score of a defective and of a functional cell."""
    example = _example()
    cells = {"defective": example.defective[:1], "functional": example.functional[:1]}
    detector = example.detector
    figure, axes = plt.subplots(2, 3, figsize=(5.2, 4.4))
    rows = []
    for kind, image in cells.items():
        prepared = example.prepare(image)
        x = _embed(example.extractor(prepared), detector.channels)
        distances = whitened_norm(x, detector.mean, detector.whitening)
        anomaly_map = detector.anomaly_map(prepared)[0]
        rows.append((kind, image, distances.view(detector.grid), anomaly_map))
    limits = {"vmin": 0, "vmax": float(max(row[2].max() for row in rows))}
    for panels, (kind, image, distances, anomaly_map) in zip(axes, rows, strict=True):
        for ax in panels:
            blank(ax)
        panels[0].imshow(example.resize(image)[0, 0], cmap="gray")
        panels[0].set_ylabel(kind)
        panels[1].imshow(distances, cmap="inferno", **limits)
        scale = panels[2].imshow(anomaly_map, cmap="inferno", **limits)
        row, column = np.unravel_index(int(anomaly_map.argmax()), anomaly_map.shape)
        ring = {"mfc": "none", "mec": "white", "mew": 1.5, "ms": 12}
        panels[2].plot(column, row, "o", **ring)
        panels[2].set_xlabel(f"score {anomaly_map.max():.0f}")
        panels[1].set_xlabel(f"largest {distances.max():.0f}")
    sizes = [_size(distances), _size(anomaly_map)]
    axes[0, 0].set_title(f"image\n{sizes[1]}")
    axes[0, 1].set_title(f"distances\n{sizes[0]}")
    axes[0, 2].set_title(f"map\n{sizes[1]}")
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.6, aspect=30)
    bar.set_label("distance")
    return figure


def _two_defects() -> tuple[Tensor, dict[str, Tensor]]:
    """Make a synthetic mask of a stain and a crack, and two maps that find one each."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    stain = (rows - 22) ** 2 + (columns - 20) ** 2 < 14**2
    crack = ((rows - columns - 4).abs() < 2) & (columns > 38) & (columns < 58)
    noise = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    maps = {
        "finds the stain": noise + 1.0 * stain,
        "finds the crack": noise + 1.0 * crack,
    }
    return torch.stack([stain, crack]), maps


def pro_score() -> list[Figure]:
    """Two detectors that find one defect each: the curves behind two measures."""
    regions, maps = _two_defects()
    mask = regions.any(0)
    figures = []
    for title, values in maps.items():
        figure, (image, ax) = plt.subplots(
            2, 1, figsize=(2.5, 5.2), height_ratios=(1, 1.05)
        )
        blank(image).imshow(values, cmap="inferno")
        for region in regions:
            image.contour(region, levels=[0.5], colors="white", linewidths=1.2)
        image.set_title(title)
        fpr, found, pro = _curves(regions, values)
        pixel = pixel_auroc(mask[None], values[None])
        score = aupro(mask[None], values[None])
        ax.fill_between(fpr, pro, where=fpr <= 0.3, color=PURPLE, alpha=0.35, lw=0)
        ax.plot(
            fpr, pro, color=PURPLE, lw=2, label=f"per region: PRO-score {score:.2f}"
        )
        label = f"per pixel: AUROC {pixel:.2f}"
        ax.plot(fpr, found, "--", color=BLUE, lw=2, label=label)
        figure.legend(loc="outside lower center")
        ax.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.3, 1), yticks=(0, 0.5, 1))
        ax.set(xlabel="false positive rate", ylabel="share found")
        ax.spines[["top", "right"]].set_visible(False)
        figures.append(figure)
    return figures


def _curves(regions: Tensor, values: Tensor) -> tuple[np.ndarray, ...]:
    """Return false positive rate, share of the pixels, and mean share per region."""
    mask = regions.any(0)
    thresholds = values.unique().flip(0)[:, None]
    fpr, found = (
        (values[part] >= thresholds).float().mean(1) for part in (~mask, mask)
    )
    shares = [(values[region] >= thresholds).float().mean(1) for region in regions]
    return fpr.numpy(), found.numpy(), torch.stack(shares).mean(0).numpy()


def memory() -> Figure:
    """Memory against the number of normal images, at the sizes of the paper."""
    images = np.geomspace(10, 2e4, 50)
    per_image = sum(map_.numel() for map_ in _shapes("wide_resnet50_2"))
    side = _shapes("resnet18")[0].shape[2]
    lines = {
        "nearest neighbours, WR50": (images * per_image, "--", VERMILION),
        "PaDiM-WR50-Rd550": (_numbers(side, 550), "-", BLUE),
        "PaDiM-R18-Rd100": (_numbers(side, 100), "-", GREEN),
    }
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    search = None
    for label, (numbers, style, colour) in lines.items():
        gigabytes = 4 * np.broadcast_to(numbers, images.shape) / 1e9
        ax.plot(images, gigabytes, style, color=colour, lw=2)
        if search is None:
            search = gigabytes
            ax.text(1700, 11, label, ha="right", va="bottom")
            continue
        crossing = float(np.interp(gigabytes[0], search, images))
        ax.plot(crossing, gigabytes[0], "o", color=INK, ms=6)
        text = f"{np.ceil(crossing):.0f} images"
        ax.annotate(text, (crossing, gigabytes[0]), (6, -14), textcoords=OFFSET)
        ax.annotate(label, (2e4, gigabytes[0]), (0, 5), textcoords=OFFSET, ha="right")
    ax.set(xscale="log", yscale="log", xlabel="normal images", ylabel="GB")
    companion.log_ticks(ax.xaxis, (10, 100, 1000, 10_000))
    companion.log_ticks(ax.yaxis, (0.1, 1, 10, 100))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _numbers(side: int, dimensions: int) -> int:
    """Count the numbers of the means and covariances of a grid."""
    return side**2 * (dimensions**2 + dimensions)


@cache
def _shapes(name: str) -> list[Tensor]:
    """Return the layers' maps of an image of 224×224 pixels, without their values."""
    with torch.device("meta"):
        network = models.get_model(name).eval()
        image = torch.empty(1, 3, 224, 224)
    return FeatureExtractor(network, backbones.TORCHVISION_LAYERS[name])(image)


def reduction() -> list[Figure]:
    """PRO-score against the channels kept: random channels and principal components."""
    runs = companion.read_result("padim_cells")["runs"]
    styles = {
        "random": ("o-", BLUE, "random channels"),
        "PCA": ("s--", ORANGE, "largest variance (PCA)"),
        "least variance": ("^:", GREEN, "smallest variance"),
    }
    figures = []
    for kind in ("mono", "poly"):
        figure, ax = plt.subplots(figsize=(2.5, 3.6))
        for method, (style, colour, label) in styles.items():
            scores = {}
            for run in runs:
                group = (run["experiment"], run["kind"], run["method"])
                if group == ("tables", kind, method):
                    scores.setdefault(run["dimensions"], []).append(100 * run["pro"])
            kept = sorted(scores)
            means = [np.mean(scores[d]) for d in kept]
            ax.plot(kept, means, style, color=colour, ms=5, label=label)
        ax.set(title=kind, xlabel="dimensions kept, of 176", xscale="log")
        ax.set_ylabel("PRO-score, %")
        companion.log_ticks(ax.xaxis, kept)
        ax.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center")
        figures.append(figure)
    return figures
