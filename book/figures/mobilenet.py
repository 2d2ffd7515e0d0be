"""Figures of the page on MobileNets."""

from collections.abc import Sequence
from pathlib import Path

import companion
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from drawing import (
    BLUE,
    FILL,
    GREEN,
    GREY,
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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
from matplotlib.path import Path as MplPath
from torch import nn
from torchvision import models

from paperlib.complexity import (
    Profile,
    conv2d_macs,
    depthwise_separable_macs,
    profile,
)
from paperlib.mobilenet import MobileNetV1

FACTS = Path(__file__).resolve().parents[1] / "data" / "mobilenet.yml"
CHANNELS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION)  # of the hand example's input
KINDS = {  # of layer → colour, hatch and name
    "pointwise conv": (ORANGE, "", "pointwise (1×1)"),
    "depthwise conv": (BLUE, "", "depthwise (3×3)"),
    "conv": (GREEN, "///", "first convolution"),
    "linear": (PURPLE, "xxx", "fully connected"),
}


def filters() -> Figure:
    """The paper's Figure 2: the filters of the hand example and their cost."""
    side, kernel, out_side, n_outputs = 6, 3, 4, 7
    n_inputs = len(CHANNELS)
    standard = conv2d_macs(kernel, n_inputs, n_outputs, out_side)
    depthwise = conv2d_macs(kernel, n_inputs, n_inputs, out_side, groups=n_inputs)
    pointwise = conv2d_macs(1, n_inputs, n_outputs, out_side)
    grey = (GREY,) * n_outputs
    spanning = [(kernel, CHANNELS)] * n_outputs
    flat = [(kernel, (colour,)) for colour in CHANNELS]
    mixing = [(1, CHANNELS)] * n_outputs

    figure, ax = plt.subplots(figsize=(5.2, 5.5))
    rows = [
        (
            f"standard: {standard:,} multiply-adds",
            (side, CHANNELS, "input\n6×6×5"),
            (spanning, "7 filters of 3×3×5"),
            (out_side, grey, "output\n4×4×7"),
        ),
        (
            f"depthwise: {depthwise:,} multiply-adds",
            (side, CHANNELS, "input\n6×6×5"),
            (flat, "5 filters of 3×3×1"),
            (out_side, CHANNELS, "filtered\n4×4×5"),
        ),
        (
            f"then pointwise: {pointwise:,} multiply-adds",
            (out_side, CHANNELS, "filtered\n4×4×5"),
            (mixing, "7 filters of 1×1×5"),
            (out_side, grey, "output\n4×4×7"),
        ),
    ]
    for y, (title, before, middle, after) in zip((32, 16, 0), rows, strict=True):
        ax.text(0, y + 9.4, title, weight="bold", va="bottom")
        _labelled_stack(ax, 0, y, *before)
        _filters(ax, 22.4, y + 1.2, *middle)
        _labelled_stack(ax, 37.2, y, *after)
        ax.text(9.7, y + 2, "∗", fontsize=16, ha="center", va="center")
        arrow(ax, (34.0, y + 2.5), (36.9, y + 2.5))
    ax.set(xlim=(-0.3, 45), ylim=(-4.2, 44), aspect="equal")
    blank(ax)
    return figure


def _labelled_stack(
    ax: Axes, x: float, y: float, side: int, colours: Sequence[str], label: str
) -> None:
    """Draw feature maps, the first channel in front, with a label below."""
    _stack(ax, (x, y), side, colours)
    ax.text(x + side / 2, y - 0.5, label, ha="center", va="top", fontsize=10)


def _filters(ax: Axes, centre: float, y: float, copies: list, label: str) -> None:
    """Draw a row of filters, each a side and the colours of its channels."""
    cell = 0.54
    widths = [cell * (side + 0.45 * len(colours)) for side, colours in copies]
    gap = 0.35 if len(copies) * widths[0] > 18 else 0.9
    x = centre - (sum(widths) + gap * (len(widths) - 1)) / 2
    for (side, colours), width in zip(copies, widths, strict=True):
        _stack(ax, (x, y), side, colours, cell)
        x += width + gap
    ax.text(centre, y - 1.7, label, ha="center", va="top", fontsize=10)


def _stack(
    ax: Axes,
    corner: tuple[float, float],
    side: int,
    colours: Sequence[str],
    cell: float = 1,
    lines: bool = True,
) -> None:
    """Draw square channels behind one another, each as a slice one cell thick."""
    back = 0.45 * cell
    n, step = (side, cell) if lines else (1, side * cell)
    edges = [(step * a, step * (a + 1)) for a in range(n)]
    whole = n * step
    top = [
        [(a, whole), (b, whole), (b + back, whole + back), (a + back, whole + back)]
        for a, b in edges
    ]
    right = [
        [(whole, a), (whole, b), (whole + back, b + back), (whole + back, a + back)]
        for a, b in edges
    ]
    front = [[(a, c), (b, c), (b, d), (a, d)] for a, b in edges for c, d in edges]
    for k in reversed(range(len(colours))):
        at = np.array(corner) + k * back
        _face(ax, top, at, colours[k], 0.8)
        _face(ax, right, at, colours[k], 0.62)
    _face(ax, front, np.array(corner), colours[0], 1)  # it hides those behind it


def _face(ax: Axes, cells: list, at: np.ndarray, colour: str, shade: float) -> None:
    """Draw the cells of one face as a single path; a long list of paths is heavy."""
    points = (np.array([*cell, cell[0]]) + at for cell in cells)
    path = MplPath.make_compound_path(*(MplPath(p, closed=True) for p in points))
    face = [shade * value for value in to_rgb(colour)]
    ax.add_patch(PathPatch(path, facecolor=face, edgecolor=PAPER, lw=0.5))


def saving() -> Figure:
    """How many times fewer multiply-adds a separable layer needs, against N."""
    figure, ax = plt.subplots(figsize=(5.2, 2.7))
    counts = np.unique(np.logspace(0, 11, 60, base=2).astype(int)).tolist()
    ax.axhline(3**2, color=MUTED, lw=1, ls="--")
    ax.text(1, 9.15, "the limit, $D_K^2$ = 9", va="bottom", color=INK, fontsize=10)
    ax.plot(counts, [_times_saved(n) for n in counts], color=BLUE)
    ax.plot(7, _times_saved(7), "s", color=VERMILION, ms=7)
    ax.text(
        8.5, _times_saved(7) - 1.1, f"example by hand, N = 7: {_times_saved(7):.1f}"
    )
    blocks = _separable_layers(_profile(separable=True))
    widths = sorted({output_shape[1] for _, output_shape in blocks})
    ax.plot(widths, [_times_saved(n) for n in widths], "o", color=INK, ms=5)
    low, high = widths[0], widths[-1]
    ax.annotate(
        f"MobileNet's layers,\nN = {low} to {high}:"
        f" {_times_saved(low):.1f} to {_times_saved(high):.1f}",
        (2 * low, _times_saved(2 * low) - 0.3),
        (30, 4.9),
        arrowprops={"arrowstyle": "-", "color": MUTED},
    )
    ax.set_xscale("log")
    companion.log_ticks(ax.xaxis, (1, 4, 16, 64, 256, 1024))
    ax.set(xlabel="output channels N", ylabel="times fewer\nmultiply-adds")
    ax.set(ylim=(0, 10.6), yticks=(0, 3, 6, 9))
    return figure


def _times_saved(n_outputs: int) -> float:
    sizes = 3, 64, n_outputs, 14  # neither 64 nor 14 changes the quotient
    return conv2d_macs(*sizes) / depthwise_separable_macs(*sizes)


def _profile(side: int = 224, **variant) -> Profile:
    with torch.device("meta"):  # shapes only
        return profile(MobileNetV1(**variant), (1, 3, side, side))


def _separable_layers(network: Profile) -> list[tuple[str, tuple[int, ...]]]:
    layers = network.layers
    pointwise = (layer for layer in layers if layer.kind == "pointwise conv")
    return [(layer.name, layer.output_shape) for layer in pointwise]


def blocks() -> Figure:
    """The paper's Figure 3: the standard and the separable block, with their cost."""
    figure, ax = plt.subplots(figsize=(5.2, 5.0))
    columns = {"standard block": False, "separable block": True}
    for column, (title, separable) in enumerate(columns.items()):
        with torch.device("meta"):
            network = MobileNetV1(separable=separable)
        costs = {layer.name: layer for layer in profile(network).layers}
        x = 1.12 * column
        ax.text(x, 0.55, title, ha="center", weight="bold")
        y = 0.0
        for name, module in network.features.block7.named_children():
            is_conv = isinstance(module, nn.Conv2d)
            height = 1.15 if is_conv else 0.62
            text = _name(module)
            if is_conv:
                macs = costs[f"features.block7.{name}"].macs
                text += f"\n{macs / 1e6:.1f} million"
            corner = (x - 0.49, y - height)
            colour = ORANGE if is_conv else FILL
            style = dict(boxstyle="round,pad=0,rounding_size=0.08", mutation_aspect=2)
            box = FancyBboxPatch(
                corner, 0.98, height, fc=colour, ec=INK, lw=0.8, **style
            )
            ax.add_patch(box)
            ink = "black" if is_conv else INK
            ax.text(x, y - height / 2, text, ha="center", va="center", color=ink)
            y -= height
            arrow(ax, (x, y), (x, y - 0.45), shrinkA=0, shrinkB=0)
            y -= 0.45
    ax.set(xlim=(-0.53, 1.65), ylim=(-7.65, 1.0))
    blank(ax)
    return figure


def _name(module: nn.Module) -> str:
    if isinstance(module, nn.BatchNorm2d):
        return "batch norm"
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    kind = "depthwise convolution" if module.groups > 1 else "convolution"
    return f"{module.kernel_size[0]}×{module.kernel_size[1]} {kind}"


def network() -> Figure:
    """Sides of the feature maps and multiply-adds of MobileNet's 28 layers."""
    with torch.device("meta"):
        model = MobileNetV1()
    modules = dict(model.named_modules())
    counted = profile(model)
    layers = [layer for layer in counted.layers if layer.macs]
    figure, (side_ax, macs_ax) = plt.subplots(
        2, 1, figsize=(5.2, 4.8), sharex=True, height_ratios=[1, 1.25]
    )

    convolutions = layers[:-1]
    sides = [224, *(layer.output_shape[-1] for layer in convolutions)]
    numbers = range(len(sides))
    side_ax.step(numbers, sides, where="mid", color=INK, lw=1.5)
    halved = [i for i in numbers[1:] if modules[layers[i - 1].name].stride == (2, 2)]
    side_ax.plot(halved, [sides[i] for i in halved], "v", color=VERMILION, ms=8)
    for i in halved:
        # The last ones lie low: their numbers stand above.
        side_ax.annotate(
            f"layer {i}: {sides[i]}",
            (i, sides[i]),
            (5, 7),
            textcoords="offset points",
            fontsize=10,
        )
    side_ax.set(yscale="log", ylim=(5, 330), ylabel="side of the output")
    companion.log_ticks(side_ax.yaxis, (7, 14, 28, 56, 112, 224))
    side_ax.plot([], [], "v", color=VERMILION, ms=8, label="stride 2")
    side_ax.legend(loc="upper right")

    for kind, (colour, hatch, name) in KINDS.items():
        chosen = [i for i, layer in enumerate(layers, 1) if layer.kind == kind]
        millions = [layers[i - 1].macs / 1e6 for i in chosen]
        share = sum(millions) * 1e6 / counted.macs
        label = f"{name}: {share:.1%}".replace("%", " %")
        style = dict(color=colour, hatch=hatch, edgecolor=PAPER, lw=0)
        macs_ax.bar(chosen, millions, width=0.86, label=label, **style)
    macs_ax.set(xlabel="layer", ylabel="million multiply-adds", ylim=(0, 84))
    macs_ax.set(xticks=(1, 5, 10, 15, 20, 25, 28), yticks=(0, 20, 40))
    macs_ax.legend(ncols=2, loc="upper center", columnspacing=1, handlelength=1.2)
    return figure


def shrinking() -> Figure:
    """The paper's Table 3: one layer, made cheaper three times in a row."""
    rows = [
        ("standard", conv2d_macs, 512, 14),
        ("separable", depthwise_separable_macs, 512, 14),
        ("α = 0.75", depthwise_separable_macs, int(0.75 * 512), 14),
        ("ρ = 0.714", depthwise_separable_macs, int(0.75 * 512), round(0.714 * 14)),
    ]
    figure, ax = plt.subplots(figsize=(5.2, 4.3))
    costs = [count(3, n, n, side) / 1e6 for _, count, n, side in rows]
    for row, ((name, _, channels, side), cost) in enumerate(
        zip(rows, costs, strict=True)
    ):
        y = -2.2 * row
        ax.text(0, y + 0.8, name if row < 2 else f"and {name}", va="center")
        slices = (BLUE,) * (channels // 128)
        _stack(ax, (2.55, y), side, slices, cell=0.1, lines=False)
        ax.text(2.55, y - 0.08, f"{side}×{side}×{channels}", va="top", fontsize=10)
        width = 3.3 * cost / costs[0]
        ax.add_patch(
            Polygon(
                [(4.9, y + 0.35), (4.9 + width, y + 0.35)]
                + [(4.9 + width, y + 1.15), (4.9, y + 1.15)],
                facecolor=ORANGE,
            )
        )
        share = cost / costs[0]
        label = f"{cost:.1f}" + (f"  ({share:.1%})".replace("%", " %") if row else "")
        x, ink, side_ = (
            (8.1, "black", "right") if row == 0 else (5.0 + width, INK, "left")
        )
        ax.text(x, y + 0.75, label, va="center", ha=side_, color=ink)
    ax.text(2.55, 2.35, "output", weight="bold")
    ax.text(4.9, 2.35, "million multiply-adds", weight="bold")
    ax.set(xlim=(-0.05, 8.25), ylim=(-7.2, 2.8))
    blank(ax)
    return figure


def accuracy() -> Figure:
    """Accuracies that the papers print against multiply-adds that we count."""
    facts = yaml.safe_load(FACTS.read_text(encoding="utf-8"))
    markers = {
        1: (BLUE, "o"),
        0.75: (ORANGE, "s"),
        0.5: (GREEN, "D"),
        0.25: (PURPLE, "^"),
    }
    figure, ax = plt.subplots(figsize=(5.2, 4.2))
    printed = _printed_accuracies(facts)
    for width, (colour, marker) in markers.items():
        sides = [side for w, side in printed if w == width]
        costs = [_profile(side, width=width).macs / 1e6 for side in sides]
        values = [printed[width, side] for side in sides]
        ax.plot(costs, values, marker, color=colour, ms=8, label=f"α = {width:g}")
        for side, x, y in zip(sides, costs, values, strict=True):
            ax.annotate(
                side,
                (x, y),
                (7 if width == 1 else -7, 0),
                textcoords="offset points",
                ha="left" if width == 1 else "right",
                va="center",
                fontsize=10,
            )
    table = {
        row["model"]: row["accuracy_pct"]
        for key in (
            "table_4_depthwise_vs_full",
            "table_8_popular_models",
            "table_9_smaller_popular_models",
        )
        for row in facts[key]["rows"]
    }
    with torch.device("meta"):
        others = {
            "full convolutions": ("Conv MobileNet", MobileNetV1(separable=False)),
            "GoogLeNet": (
                "GoogleNet",
                models.googlenet(aux_logits=False, init_weights=False),
            ),
            "VGG-16": ("VGG 16", models.vgg16()),
            "SqueezeNet": ("Squeezenet", models.squeezenet1_0()),
            "AlexNet": ("AlexNet", models.alexnet()),
        }
        costs = {name: profile(model).macs / 1e6 for name, (_, model) in others.items()}
    values = {name: table[key] for name, (key, _) in others.items()}
    ax.plot(
        costs.values(), values.values(), "X", color=GREY, ms=8, label="other network"
    )
    offsets = {"full convolutions": (0, 8), "VGG-16": (0, -8), "AlexNet": (0, 8)}
    for name, x in costs.items():
        right, up = offsets.get(name, (8, -1))
        ax.annotate(
            name,
            (x, values[name]),
            (right, up),
            textcoords="offset points",
            ha="left" if right else "right" if name == "AlexNet" else "center",
            va={8: "bottom", -8: "top"}.get(up, "center"),
            fontsize=10,
        )
    ax.set(xscale="log", xlim=(18, 42000), ylim=(48, 75))
    companion.log_ticks(ax.xaxis, (50, 150, 500, 1500, 5000, 15000))
    ax.set(xlabel="million multiply-adds", ylabel="ImageNet top-1 accuracy, %")
    ax.legend(loc="lower right")
    return figure


def _printed_accuracies(facts: dict) -> dict[tuple[float, int], float]:
    """Collect the accuracies of Tables 6, 7 and 9: (α, input side) → percent."""
    found = {}
    for key in (
        "table_6_width_multiplier",
        "table_7_resolution",
        "table_9_smaller_popular_models",
    ):
        for row in facts[key]["rows"]:
            name, _, side = row["model"].partition(" MobileNet-")
            if side:
                found[float(name), int(side)] = row["accuracy_pct"]
    return found


def time() -> Figure:
    """Multiply-adds and measured time of three networks trained on solar cells."""
    measured = companion.read_result("mobilenet_cells")
    side = measured["stamp"]["recipe"]["side"]
    runs: dict[str, list[dict]] = {}
    for run in measured["runs"]:
        runs.setdefault(run["model"], []).append(run)
    order = sorted(runs, key=lambda name: "full" not in name)
    macs, seconds, labels = [], [], []
    for name in order:
        arguments = runs[name][0]["arguments"]
        macs.append(_profile(side, num_classes=2, **arguments).macs)
        seconds.append([run["cpu_seconds_per_epoch"] for run in runs[name]])
        auroc = np.mean([run["auroc"] for run in runs[name]])
        width, _, kind = name.partition(" ")
        labels.append(f"{kind},\nα = {width}\nAUROC {auroc:.3f}")
    means = np.mean(seconds, axis=1)
    spread = 100 * np.std(seconds, axis=1, ddof=1) / means[0]

    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    y = np.arange(len(order))
    for offset, values, error, colour, hatch, label in (
        (-0.2, 100 * np.array(macs) / macs[0], None, ORANGE, "", "multiply-adds"),
        (0.2, 100 * means / means[0], spread, BLUE, "///", "processor time"),
    ):
        ax.barh(
            y + offset,
            values,
            0.38,
            xerr=error,
            color=colour,
            hatch=hatch,
            edgecolor=PAPER,
            lw=0,
            ecolor=INK,
            label=label,
        )
        for i, value in enumerate(values):
            shift = 2 if error is None else 2 + error[i]
            digits = 1 if error is None and value < 100 else 0  # counts are exact
            text = f"{value:.{digits}f}"
            ax.text(value + shift, i + offset, text, va="center")
    ax.set_yticks(y, labels)
    ax.set(xlabel="percent of the network with full convolutions")
    ax.set(ylim=(2.5, -0.5), xlim=(0, 139))
    figure.legend(loc="outside upper center", ncols=2)
    return figure
