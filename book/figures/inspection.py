"""Figures of the page that leads from a folder to an inspection."""

from functools import cache

import companion
import matplotlib.pyplot as plt
import numpy as np
import torch
from drawing import BLUE, GREEN, MUTED, ORANGE, blank
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from paperlib import backbones
from paperlib.datasets import elpv
from paperlib.padim import PaDiM
from paperlib.padim.inspection import inspect_batches, resized_size
from paperlib.padim.report import overlay

N_TRAIN, QUANTILE = 150, 0.95
OFFSET = "offset points"


@cache
def _runs(experiment: str) -> list[dict]:
    runs = companion.read_result("inspection_cells")["runs"]
    return [run for run in runs if run["experiment"] == experiment]


def _cells(probability: int) -> Tensor:
    """Return the cells of a defect probability in the random order of the page."""
    cells = elpv("mono")
    rows = torch.nonzero(cells.probability == probability)[:, 0]
    generator = torch.Generator().manual_seed(0)
    return cells.images[rows[torch.randperm(len(rows), generator=generator)]]


def report() -> Figure:
    """Three cells and their overlays: an alarm, a missed defect, a functional cell."""
    backbone = backbones.load("efficientnet_lite0")
    detector = PaDiM(backbone.extractor())
    good, bad = _cells(0), _cells(1)
    batches = [detector.prepare(part) for part in good[:N_TRAIN].split(8)]
    detector.fit(batches).normal_threshold(batches, QUANTILE, fitted=True)
    groups = {"functional": good[-20:], "defective": bad[:40]}
    results = {
        name: [
            inspected
            for part in inspect_batches(detector, images[..., None].numpy(), 8)
            for inspected in part
        ]
        for name, images in groups.items()
    }
    # In the order of the scores: the middle one of those with and without an alarm.
    shown = [
        (name, has_alarm, _middle(results[name], has_alarm))
        for name, has_alarm in (
            ("defective", True),
            ("defective", False),
            ("functional", False),
        )
    ]
    figure, axes = plt.subplots(2, len(shown), figsize=(5.2, 3.9))
    for (above, below), (name, has_alarm, index) in zip(axes.T, shown, strict=True):
        inspection, anomaly_map = results[name][index]
        image = Image.fromarray(groups[name][index].numpy()).convert("RGB")
        drawn = overlay(
            image,
            anomaly_map,
            detector.threshold,
            resized_size(detector),
            inspection.region if has_alarm else None,
        )
        blank(above).imshow(image)
        blank(below).imshow(drawn)
        above.set_title(f"{name} cell")
        sign, verdict = (">", "alarm") if has_alarm else ("≤", "no alarm")
        comparison = f"score {inspection.score:.1f} {sign} {detector.threshold:.1f}"
        below.set_xlabel(f"{comparison}:\n{verdict}")
    for row, name in zip(axes, ("image", "overlay"), strict=True):
        row[0].set_ylabel(name)
    return figure


def _middle(results: list, has_alarm: bool) -> int:
    matching = [k for k, (x, _) in enumerate(results) if x.alarm == has_alarm]
    in_order = sorted(matching, key=lambda k: results[k][0].score)
    return in_order[len(in_order) // 2]


def false_alarms() -> Figure:
    """Measured against chosen shares of false alarms, per number of images."""
    figure, ax = plt.subplots(figsize=(5.2, 3.5))
    styles = {"0.1": ("o", BLUE), "0.05": ("s", ORANGE), "0.01": ("^", GREEN)}
    runs = [
        run
        for run in _runs("training_images")
        if run["dimensions"] == 100 and not run["region"]
    ]
    counts = sorted({run["images"] for run in runs})
    # Points of one number of images stand side by side, so that none hides another.
    aside = np.array([1 + 0.012 * (run["seed"] - 1) for run in runs])
    for shift, (share, (marker, colour)) in zip(
        (0.96, 1, 1.04), styles.items(), strict=True
    ):
        x = shift * aside * np.array([run["images"] for run in runs])
        y = np.array([100 * run["alarms"][share][0] for run in runs])
        chosen = 100 * float(share)
        ax.axhline(chosen, color=colour, lw=1, ls="--")
        label = f"{chosen:g} % chosen"
        ax.plot(x, y, marker, color=colour, ms=5, label=label, clip_on=False)
    ax.set(xscale="log", xlabel="training images", ylabel="false alarms, %")
    companion.log_ticks(ax.xaxis, counts)
    ax.set_ylim(0)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def small_defects() -> list[Figure]:
    """Cells with a synthetic spot of each size, and how many are found."""
    runs = _runs("resolution")
    diameters = [int(d) for d in runs[0]["found"] if d != "0"]
    cell = _cells(0)[-1].float()
    height, width = cell.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    contrast = companion.read_result("inspection_cells")["stamp"]["recipe"][
        "contrast of spots"
    ]
    examples, axes = plt.subplots(2, 2, figsize=(2.5, 3.0))
    for ax, diameter in zip(axes.flat, (0, *diameters), strict=True):
        distance = torch.hypot(y - height * 0.4, x - width * 0.3)
        opacity = contrast * (diameter / 2 + 0.5 - distance).clamp(0, 1)
        opacity = opacity * (diameter > 0)
        blank(ax).imshow(cell * (1 - opacity), cmap="gray", vmin=0, vmax=255)
        ax.set_xlabel(f"{diameter} px" if diameter else "no spot")
    curves, ax = plt.subplots(figsize=(2.6, 3.6))
    styles = {
        "224": ("o", "-", BLUE, 0.96, "224 px"),
        "448": ("s", "-", ORANGE, 1, "448 px"),
        "448 in tiles": ("^", "--", GREEN, 1.04, "448 px, tiles"),
    }
    for name, (marker, line, color, shift, label) in styles.items():
        shares = np.array(
            [
                [100 * run["found"][str(diameter)] for diameter in diameters]
                for run in runs
                if run["input"] == name
            ]
        )
        style = {"color": color, "clip_on": False}
        ax.plot(diameters, shares.mean(0), line, label=label, **style)
        x = shift * np.array(diameters)
        for of_seed in shares:
            ax.plot(x, of_seed, marker, ms=5, **style)
    ax.set(xscale="log", xlabel="spot diameter, px", ylabel="spots found, %")
    companion.log_ticks(ax.xaxis, diameters)
    ax.set_ylim(0, 103)
    ax.grid(axis="y", color=MUTED, alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    curves.legend(loc="outside lower center", title="input")
    return [examples, curves]
