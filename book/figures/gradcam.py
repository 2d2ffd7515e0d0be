"""Figures of the page on Grad-CAM."""

import copy
import itertools
from functools import lru_cache
from types import SimpleNamespace

import companion
import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from drawing import BLUE, FILL, INK, MUTED, ORANGE, PURPLE, arrow, blank
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from scipy.stats import spearmanr
from skimage import data
from torch import Tensor

from paperlib import backbones, viz
from paperlib.activations import guided_relu, record_activations
from paperlib.anomaly_map import minmax, upsample
from paperlib.gradcam import grad_cam, guided_backprop, guided_grad_cam

LAYER, HEAD = "bn2", "classifier"  # the last with spatial positions; the linear layer
CLASSES = {"Egyptian cat": 285, "espresso": 967}  # of ImageNet's 1,000
COVERED, STEP = 96, 32  # pixels: side of the grey square, and how far it moves
# The nine numbers of the notebook: a ReLU's input and the gradient at its output.
RELU_INPUT = torch.tensor([[1.0, -1, 5], [2, -5, -7], [-3, 2, 4]])
GRADIENT = torch.tensor([[-2.0, 3, -1], [6, -3, 1], [2, -1, 3]])


# ---- what the figures share: one network, one image, two classes ----


@lru_cache
def _pair() -> SimpleNamespace:
    """Explain the image of cat and cup, as the notebook does."""
    backbone = backbones.load("efficientnet_lite0")
    coffee = cv2.resize(data.coffee()[60:360], (451, 225), interpolation=cv2.INTER_AREA)
    image = np.vstack([data.chelsea()[30:255], coffee])
    batch = backbone.transform(torch.tensor(image)[None])
    targets = [list(CLASSES.values())]
    with torch.no_grad(), record_activations(backbone.model, LAYER) as recorded:
        backbone.model(batch)
    return SimpleNamespace(
        model=backbone.model,
        batch=batch,
        image=backbone.transform.resize(torch.tensor(image)[None])[0]
        .clamp(0, 1)
        .movedim(0, -1)
        .numpy(),
        targets=targets,
        channels=recorded[LAYER][0],
        cam=grad_cam(backbone.model, batch, LAYER, targets, relu=False),
        guided=guided_backprop(backbone.model, batch, targets)[0],
        guided_cam=guided_grad_cam(backbone.model, batch, LAYER, targets)[0],
    )


def _over_image(activation_map: Tensor) -> np.ndarray:
    """Lay the positive part of a map, scaled to its maximum, over the image."""
    pair = _pair()
    large = upsample(activation_map.relu(), pair.image.shape[:2])
    return viz.overlay(viz.heatmap(minmax(large)), pair.image)


def _plain_gradient(target: int) -> Tensor:
    pixels = _pair().batch.clone().requires_grad_()
    score = _pair().model(pixels)[0, target]
    return torch.autograd.grad(score, pixels)[0][0]


@lru_cache
def _occlusion() -> Tensor:
    """Cover the image square by square: how far the two scores fall, (2, h, w)."""
    pair = _pair()
    side = pair.batch.shape[-1]
    starts = range(0, side - COVERED + 1, STEP)
    covered = pair.batch.repeat(len(starts) ** 2, 1, 1, 1)
    for k, (i, j) in enumerate(itertools.product(starts, starts)):
        covered[k, :, i : i + COVERED, j : j + COVERED] = 0  # the average colour
    with torch.no_grad():
        scores = torch.cat([pair.model(part) for part in covered.split(4)])
        fall = (pair.model(pair.batch) - scores)[:, pair.targets[0]]
    # A pixel has the mean fall of the squares that cover it.
    falls, times = torch.zeros(2, side, side), torch.zeros(side, side)
    for k, (i, j) in enumerate(itertools.product(starts, starts)):
        falls[:, i : i + COVERED, j : j + COVERED] += fall[k, :, None, None]
        times[i : i + COVERED, j : j + COVERED] += 1
    return falls / times


# ---- the figures ----


def figure_1() -> list[Figure]:
    """The paper's Figure 1, with a cat and a cup."""
    pair, figures = _pair(), []
    for k, (name, target) in enumerate(CLASSES.items()):
        panels = {
            "image": pair.image,
            "guided\nbackpropagation": viz.gradient_image(pair.guided[k]),
            "Grad-CAM": _over_image(pair.cam.maps[0, k]),
            "Guided\nGrad-CAM": viz.gradient_image(pair.guided_cam[k]),
            "occlusion": _over_image(_occlusion()[k]),
            "gradient": viz.gradient_image(_plain_gradient(target)),
        }
        letters = "abcdef" if k == 0 else "ghijkl"
        figure, axes = plt.subplots(3, 2, figsize=(2.5, 4.9))
        figure.suptitle(name, fontsize=12, color=INK)
        for ax, letter, (title, panel) in zip(
            axes.flat, letters, panels.items(), strict=True
        ):
            viz.panel(ax, panel)
            ax.set_title(f"({letter}) {title}", fontsize=10)
        figures.append(figure)
    return figures


def data_flow() -> Figure:
    """The paper's Figure 2: what is computed from what."""
    pair = _pair()
    figure, ax = plt.subplots(figsize=(5.2, 5.75))
    blank(ax).set(aspect="equal")

    def picture(x, y, side, content):
        ax.imshow(content, extent=(x, x + side, y, y + side), zorder=3)
        edge = {"fill": False, "edgecolor": INK, "lw": 0.8, "zorder": 4}
        ax.add_patch(Rectangle((x, y), side, side, **edge))

    def note(x, y, text, **style):
        ax.text(x, y, text, **({"ha": "center", "va": "center", "color": INK} | style))

    # Forward: image, convolutions, channels, further layers, scores.
    names = list(_chosen_channels())
    picture(0, 7.9, 2, pair.image)
    corners = [(2.6, 7.9), (2.6, 9.9), (4, 9.4), (4, 8.4)]
    box = {"facecolor": FILL, "edgecolor": INK, "lw": 0.8}
    ax.add_patch(Polygon(corners, **box))
    for k, name in enumerate(reversed(names)):
        picture(5.05 - 0.2 * k, 8.45 - 0.2 * k, 1.3, pair.channels[name])
    ax.add_patch(Rectangle((6.9, 8.2), 1.3, 1.4, **box))
    note(3.3, 8.9, "convo-\nlutions")
    note(7.55, 8.9, "further\nlayers")
    scores = pair.cam.logits[0, pair.targets[0]].tolist()
    for y, name, score in zip((9.27, 8.37), CLASSES, scores, strict=True):
        label = f"{name} {score:.1f}".replace(" ", "\n", 1)
        note(8.8, y, label, ha="left", fontsize=10)
    note(9.5, 7.8, "…")
    ax.add_patch(Rectangle((8.7, 8.85), 1.6, 0.85, fill=False, ec=ORANGE, lw=1.8))
    for x, text in ((1, "image"), (5.4, "channels $A^k$"), (9.5, "scores $y^c$")):
        note(x, 10.2, text)
    for start, end in ((2, 2.6), (4, 4.6), (6.4, 6.9), (8.2, 8.7)):
        arrow(ax, (start, 8.9), (end, 8.9))

    # Backward to the layer: one number per channel.
    path = [10.3, 10.5, 10.5, 5.4], [9.25, 9.25, 7.4, 7.4]
    ax.plot(*path, color=ORANGE, lw=1.8, ls="--")
    arrow(ax, (5.4, 7.4), (5.4, 8.05), ORANGE, lw=1.8)
    arrow(ax, (5.4, 7.4), (5.4, 6.25), ORANGE, lw=1.8)
    note(7.1, 7.75, r"gradient  $\partial y^c / \partial A^k$")
    note(
        5.7, 6.85, r"average over the positions:  $\alpha_k^c$", ha="left", fontsize=10
    )

    # Weighted sum and its positive part.
    for x, name in zip((2.9, 5.3, 7.7), names, strict=True):
        picture(x, 4.5, 1.3, pair.channels[name])
        weight = f"{pair.cam.weights[0, 0, name]:+.4f}".replace("-", "−")
        note(x + 0.65, 6.05, f"{weight} ×")
        note(x + 1.85, 5.15, "+")
    note(9.95, 5.15, "…")
    arrow(ax, (5.4, 4.4), (5.4, 3.15))
    note(5.7, 3.8, "sum, ReLU", ha="left")

    # Backward to the pixels, and the product.
    ax.plot([9.5, 9.5, 1, 1], [10.5, 10.8, 10.8, 10.5], color=PURPLE, lw=1.8, ls=":")
    arrow(ax, (1, 7.8), (1, 3.15), PURPLE, lw=1.8, ls=":")
    note(5.4, 11.1, "guided backpropagation, through every layer to the pixels")
    panels = {
        0: ("guided\nbackpropagation", viz.gradient_image(pair.guided[0])),
        4.4: ("Grad-CAM,\nresized", _over_image(pair.cam.maps[0, 0])),
        8.3: ("Guided\nGrad-CAM", viz.gradient_image(pair.guided_cam[0])),
    }
    for x, (title, panel) in panels.items():
        picture(x, 1.1, 2, panel)
        note(x + 1, 0.5, title)
    note(3.2, 2.1, "×", fontsize=16)
    note(7.35, 2.1, "=", fontsize=16)
    ax.set(xlim=(-0.1, 10.6), ylim=(0, 11.4))
    return figure


def _chosen_channels() -> dict[int, str]:
    """Choose three channels by their part in the cat's score, and say why."""
    pair = _pair()
    parts = pair.cam.weights[0, 0] * pair.channels.sum((1, 2))
    active = pair.channels.sum((1, 2)).argsort(descending=True)[:100]
    ignored = active[pair.cam.weights[0, 0, active].abs().argmin()]
    return {
        int(parts.argmax()): "increases the score",
        int(ignored): "hardly matters",
        int(parts.argmin()): "decreases the score",
    }


def one_map() -> Figure:
    """One map, step by step: channels, their weights, their sum, its positive part."""
    pair = _pair()
    figure, axes = plt.subplots(2, 3, figsize=(5.2, 4.3))
    viz.panel(axes[0, 0], pair.image, "image")
    places = (axes[0, 1], axes[0, 2], axes[1, 0])
    for ax, channel in zip(places, _chosen_channels(), strict=True):
        weight = f"{pair.cam.weights[0, 0, channel]:+.4f}".replace("-", "−")
        blank(ax).set_title(f"channel {channel}\nweight {weight}")
        shown = ax.imshow(pair.channels[channel], vmin=0, vmax=6)
    figure.colorbar(shown, ax=axes[1, 0], location="bottom", label="activation")
    signed = pair.cam.maps[0, 0]
    limit = float(signed.abs().max())
    n = len(pair.channels)
    blank(axes[1, 1]).set_title(f"weighted sum of\nall {n:,} channels")
    shown = axes[1, 1].imshow(signed, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(shown, ax=axes[1, 1], location="bottom", label="logits")
    viz.panel(axes[1, 2], _over_image(signed), "its positive part\nover the image")
    positive = plt.cm.ScalarMappable(plt.Normalize(0, limit), "viridis")
    figure.colorbar(positive, ax=axes[1, 2], location="bottom", label="logits")
    return figure


def relu_rules() -> Figure:
    """What the gradient, the deconvnet and guided backpropagation pass on at a ReLU."""
    rules = {
        "gradient": GRADIENT * (RELU_INPUT > 0),
        "deconvnet": GRADIENT.relu(),
        "guided backpropagation": _guided(),
    }
    figure, axes = plt.subplots(2, 3, figsize=(5.2, 4.0))
    _grid(axes[0, 0], RELU_INPUT, "input of the ReLU", kept=RELU_INPUT > 0)
    _grid(axes[0, 1], GRADIENT, "arriving gradient", kept=GRADIENT > 0)
    key = "upper row:\nfilled where\npositive\n\nlower row:\nfilled where\npassed on"
    blank(axes[0, 2]).text(
        0.5, 0.5, key, ha="center", va="center", transform=axes[0, 2].transAxes
    )
    for ax, (name, values) in zip(axes[1], rules.items(), strict=True):
        _grid(ax, values, name.replace(" ", "\n"), kept=values != 0)
    return figure


def _guided() -> Tensor:
    """Run guided backpropagation of the library through one ReLU."""
    x = RELU_INPUT.clone().requires_grad_()
    with guided_relu():
        (gradient,) = torch.autograd.grad(torch.relu(x), x, GRADIENT)
    return gradient


def _grid(ax: Axes, values: Tensor, title: str, kept: Tensor) -> None:
    """Print a matrix as a grid whose kept numbers are filled."""
    blank(ax).set_title(title)
    ax.set(xlim=(-0.05, 3.05), ylim=(3.05, -0.05), aspect="equal")
    for i, j in itertools.product(range(3), range(3)):
        colour = BLUE if kept[i, j] else FILL
        ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor=INK, lw=0.8))
        ax.text(
            j + 0.5,
            i + 0.5,
            f"{values[i, j] + 0:g}".replace("-", "−"),
            ha="center",
            va="center",
            color="white" if kept[i, j] else MUTED,
        )


def counterfactual() -> Figure:
    """Grad-CAM beside the counterfactual map, and both as one signed map."""
    pair = _pair()
    figure, axes = plt.subplots(2, 3, figsize=(5.2, 4.9))
    limit = float(pair.cam.maps.abs().max())
    for row, signed, name in zip(axes, pair.cam.maps[0], CLASSES, strict=True):
        parts = {"Grad-CAM": signed.relu(), "counterfactual": (-signed).relu()}
        for ax, (title, part) in zip(row, parts.items(), strict=False):
            viz.panel(ax, _over_image(part), f"{title}\nup to {part.max():.2f}")
        shown = companion.draw_signed_map(row[2], signed, pair.image, "both,\nsigned")
        shown.set_clim(-limit, limit)
        row[0].set_ylabel(name)
    colours = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), "RdBu_r")
    style = {"location": "bottom", "aspect": 30, "label": "signed map, logits"}
    figure.colorbar(colours, ax=axes, **style)
    return figure


def layers() -> Figure:
    """Both classes' maps at an early, two later and the last layer."""
    pair = _pair()
    names = ("blocks.0", "blocks.3", "blocks.5", LAYER)
    figure, axes = plt.subplots(2, 4, figsize=(5.2, 3.3))
    for column, name in zip(axes.T, names, strict=True):
        maps = grad_cam(pair.model, pair.batch, name, pair.targets).maps[0]
        height, width = maps.shape[-2:]
        large = upsample(maps, pair.image.shape[:2])
        halves = large[0].chunk(2)[0], large[1].chunk(2)[1]
        for ax, activation_map, whole, half in zip(
            column, maps, large, halves, strict=True
        ):
            viz.panel(ax, _over_image(activation_map))
            ax.set_xlabel(f"{half.sum() / whole.sum():.0%}")
        column[0].set_title(f"{name}\n{height}×{width}")
    for ax, name in zip(axes[:, 0], CLASSES, strict=True):
        ax.set_ylabel(name)
    return figure


def random_head() -> list[Figure]:
    """Both methods on the trained network, and after its linear layer is random."""
    pair = _pair()
    randomised = copy.deepcopy(pair.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in randomised.get_submodule(HEAD).parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.mean() + weight.std() * noise)
    target = next(iter(CLASSES.values()))
    maps = {
        "trained": pair.cam.maps[0, 0],
        "random": grad_cam(randomised, pair.batch, LAYER, target, relu=False).maps[0],
    }
    gradients = {
        "trained": pair.guided[0],
        "random": guided_backprop(randomised, pair.batch, target)[0],
    }
    figures = []
    for method, explanations in {
        "Grad-CAM": maps,
        "guided backpropagation": gradients,
    }.items():
        figure, axes = plt.subplots(1, 2, figsize=(2.5, 1.95))
        for ax, (state, values) in zip(axes, explanations.items(), strict=True):
            if values.ndim == 2:
                companion.draw_signed_map(ax, values, pair.image, state)
            else:
                viz.panel(ax, viz.gradient_image(values), state)
        a, b = (values.flatten() for values in explanations.values())
        correlation = f"{spearmanr(a, b).statistic:.2f}".replace("-", "−")
        figure.suptitle(method, fontsize=12, color=INK)
        figure.supxlabel(f"rank correlation {correlation}", fontsize=11, color=INK)
        figures.append(figure)
    return figures
