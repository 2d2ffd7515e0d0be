"""Figures of the page on CAM."""

import functools
import itertools
from pathlib import Path

import companion
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
import yaml
from drawing import BLUE, FILL, GREY, INK, MUTED, ORANGE, PAPER, arrow, blank
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage
from skimage import data
from skimage.draw import polygon2mask
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from paperlib import backbones
from paperlib.activations import record_activations
from paperlib.anomaly_map import minmax, upsample
from paperlib.cam import (
    LOCALIZATION_THRESHOLD,
    Box,
    bounding_boxes,
    cam,
    class_activation_map,
)
from paperlib.metrics import intersection_over_union

LAYER, HEAD = "bn2", "classifier"  # of EfficientNet-Lite0
TRIPOD, BINOCULARS, BELL_COTE, LAKESIDE = 872, 447, 442, 975
EGYPTIAN_CAT, ESPRESSO = 285, 967
# The two channels and two classes of the notebook's example by hand.
F1 = torch.tensor([[0.0, 0, 0], [0, 2, 1], [0, 1, 0]])
F2 = torch.tensor([[3.0, 2, 0], [0, 0, 0], [0, 0, 1]])
WEIGHT = torch.tensor([[2.0, -1], [-1, 1]])
# A polygon around the head of the cat: x, y, x, y, …
CAT = (
    "20 300 45 255 32 190 45 115 60 45 95 0 290 0 345 30 398 0 350 85 362 125 322 225 "
    "285 290 255 300"
)
REDS, BLUES = (to_hex(colormaps["RdBu_r"](level)) for level in (0.75, 0.25))
CENTRED = {"ha": "center", "va": "center"}


def two_orders() -> list[Figure]:
    """The same score by pooling first and by adding the channels up first."""
    features, weight = torch.stack([F1, F2]), WEIGHT[0]
    (activation_map,) = class_activation_map(
        features[None], weight[None], torch.tensor([0])
    )
    pooled = features.sum((1, 2))

    pool_first, ax = _canvas(2.45, 3.5)
    ax.text(1.22, 3.35, "pool, then weigh", **CENTRED, fontweight="bold")
    for left, grid, name, total in zip(
        (0.1, 1.35), features, "12", pooled, strict=True
    ):
        _number_grid(ax, grid, (left, 2.0), f"channel $f_{name}$")
        arrow(ax, (left + 0.5, 1.98), (left + 0.5, 1.5))
        ax.text(left + 0.56, 1.76, "add up", va="center", fontsize=10)
        ax.text(left + 0.5, 1.36, f"$F_{name}={total:.0f}$", **CENTRED)
        arrow(ax, (left + 0.5, 1.24), (1.22 + 0.3 * (left - 0.72), 0.55))
    ax.text(0.42, 0.88, f"× {weight[0]:.0f}", **CENTRED)
    ax.text(1.95, 0.88, f"× ({_signed(weight[1], 0)})", **CENTRED)
    score = weight @ pooled
    ax.text(1.22, 0.36, f"score {score:.0f}", **CENTRED, fontsize=13)

    weigh_first, ax = _canvas(2.45, 3.5)
    ax.text(1.22, 3.35, "weigh, then pool", **CENTRED, fontweight="bold")
    for left, grid, name in zip((0.1, 1.35), features, "12", strict=True):
        _number_grid(ax, grid, (left, 2.0), f"channel $f_{name}$")
        arrow(ax, (left + 0.5, 1.98), (1.22 + 0.3 * (left - 0.72), 1.72))
    ax.text(0.28, 1.78, f"× {weight[0]:.0f}", **CENTRED)
    ax.text(2.12, 1.78, f"× ({_signed(weight[1], 0)})", **CENTRED)
    _number_grid(ax, activation_map, (0.72, 0.7), "", signed=True)
    ax.text(1.8, 1.2, "map $M_c$", va="center")
    arrow(ax, (1.22, 0.68), (1.22, 0.48))
    ax.text(1.3, 0.58, "add up", va="center", fontsize=10)
    ax.text(1.22, 0.36, f"score {activation_map.sum():.0f}", **CENTRED, fontsize=13)
    return [pool_first, weigh_first]


def score_to_map() -> Figure:
    """Three real channels, their weights, the sum of all, and the map on the image."""
    photo = data.camera()
    features, logits = _last_features(photo)
    head = _backbone().model.get_submodule(HEAD)
    weight, bias = head.weight[TRIPOD].detach(), head.bias[TRIPOD].item()
    products = weight[:, None, None] * features[0]
    means = products.mean((1, 2))
    order = means.argsort(descending=True)
    shown = [int(order[0]), int(order[1]), int(order[-1])]
    (activation_map,) = cam(_backbone().model, _prepare(photo), TRIPOD).maps

    figure, page = _canvas(5.2, 5.75)
    size, lefts = 1.05, (1.62, 2.82, 4.02)
    image = _inset(figure, (0.05, 4.1), size)
    image.imshow(photo, cmap="gray")
    page.text(0.57, 5.28, "image", **CENTRED)
    arrow(page, (1.12, 4.62), (1.6, 4.62))
    page.text(1.36, 4.77, "net", **CENTRED, fontsize=10)
    title = f"last feature map: 3 of {len(weight):,} channels"
    page.text(3.35, 5.62, title, **CENTRED, fontweight="bold")
    limit = products[shown].abs().max()
    for left, k in zip(lefts, shown, strict=True):
        middle = left + size / 2
        page.text(middle, 5.28, f"$k={k}$", **CENTRED)
        _inset(figure, (left, 4.1), size).imshow(features[0, k], cmap="viridis", vmin=0)
        page.text(middle, 3.95, f"mean {features[0, k].mean():.2f}", **CENTRED)
        arrow(page, (middle - 0.3, 3.82), (middle - 0.3, 3.24))
        page.text(middle - 0.22, 3.53, f"× {_signed(weight[k], 3)}", va="center")
        signed = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        _inset(figure, (left, 2.16), size).imshow(products[k], **signed)
        page.text(middle, 2.01, f"mean {_signed(means[k])}", **CENTRED)
    page.text(0.72, 3.53, "weight of class\n“tripod”", **CENTRED)
    page.text(0.72, 2.68, "weighted\nchannels", **CENTRED)

    page.plot((1.62, 1.62, 5.07, 5.07), (1.85, 1.8, 1.8, 1.85), color=INK, lw=1)
    arrow(page, (3.35, 1.8), (3.35, 1.36))
    page.text(3.42, 1.58, f"sum of all {len(weight):,}", va="center")
    limit = activation_map.abs().max()
    signed = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    _inset(figure, (lefts[1], 0.28), size).imshow(activation_map, **signed)
    page.text(2.72, 0.8, "map of\n“tripod”", ha="right", va="center")
    companion.draw_signed_map(
        _inset(figure, (lefts[2], 0.28), size), activation_map, photo
    )
    mean, score = activation_map.mean(), logits[0, TRIPOD]
    text = f"mean {mean:.3f} + bias {_signed(bias, 3)} = score {score:.3f}"
    page.text(3.2, 0.12, text, **CENTRED)
    return figure


def two_classes() -> Figure:
    """Two photographs, each with the maps of two classes."""
    photos = {
        "camera": (data.camera(), (TRIPOD, BINOCULARS)),
        "china": (load_sample_image("china.jpg").copy(), (BELL_COTE, LAKESIDE)),
    }
    figure, axes = plt.subplots(2, 3, figsize=(5.2, 3.5), height_ratios=(1, 0.68))
    for row, (photo, classes) in zip(axes, photos.values(), strict=True):
        blank(row[0]).imshow(photo, cmap="gray")
        row[0].set_title("image")
        maps = cam(_backbone().model, _prepare(photo), [classes]).maps[0]
        for ax, index, activation_map in zip(row[1:], classes, maps, strict=True):
            title = f"“{_class_name(index)}”"
            companion.draw_signed_map(ax, activation_map, photo, title)
    return figure


def average_and_maximum() -> Figure:
    """Which positions of a channel get gradient from either pooling."""
    features, _ = _last_features(data.camera())
    weight = _backbone().model.get_submodule(HEAD).weight[TRIPOD]
    below_six = features[0].amax((1, 2)) < 6  # ReLU6 cuts larger values off
    best = int((weight * features[0].mean((1, 2)) * below_six).argmax())
    channel = features[:, best : best + 1].detach().requires_grad_()
    figure, axes = plt.subplots(1, 3, figsize=(5.2, 2.75))
    blank(axes[0]).imshow(channel[0, 0].detach(), cmap="viridis", vmin=0)
    axes[0].set(title="one channel")
    axes[0].set_xlabel(f"7×7 positions,\nlargest value {channel.max():.1f}")
    poolings = {"average": F.adaptive_avg_pool2d, "maximum": F.adaptive_max_pool2d}
    for ax, (name, pool) in zip(axes[1:], poolings.items(), strict=True):
        (gradient,) = torch.autograd.grad(pool(channel, 1).sum(), channel)
        reached = gradient[0, 0] != 0
        for row, column in np.ndindex(*reached.shape):
            colour = BLUE if reached[row, column] else FILL
            square = {"facecolor": colour, "edgecolor": INK, "lw": 0.6}
            ax.add_patch(Rectangle((column, row), 1, 1, **square))
        blank(ax).set(xlim=(-0.05, 7.05), ylim=(7.05, -0.05), aspect="equal")
        ax.set_title(f"gradient of\nthe {name}")
        n_reached, n_rest = int(reached.sum()), int((~reached).sum())
        value = f"1/{1 / gradient.max().item():.0f}".removesuffix("/1")
        rest = f"0 at the other {n_rest}" if n_rest else ""
        ax.set_xlabel(f"{value} at {n_reached} of {reached.numel()}\n{rest}")
    return figure


def box() -> Figure:
    """From a map to a box: threshold, largest region, box, and its overlap."""
    image, true_box, _ = _two_cats()
    side = image.shape[-1]
    (activation_map,) = cam(_backbone().model, _prepare(image), EGYPTIAN_CAT).maps
    large = upsample(activation_map, side)
    (predicted,) = bounding_boxes(large, largest=True)
    above = (large > LOCALIZATION_THRESHOLD * large.max()).numpy()
    regions, count = ndimage.label(above, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel())[1:]
    largest = 1 + int(sizes.argmax())
    photo = image.movedim(0, -1).numpy()

    figure, axes = plt.subplots(2, 2, figsize=(5.2, 5.5))
    companion.draw_signed_map(axes[0, 0], activation_map, photo)
    axes[0, 0].set_title("map of “Egyptian cat”,\nresized to the image")
    grey = photo.mean(-1, keepdims=True).repeat(3, -1)
    kept = regions == largest
    for ax, shown in ((axes[0, 1], above), (axes[1, 0], kept)):
        blended = 0.25 + 0.5 * grey
        blended[above & ~shown] = 0.55
        blended[shown] = 0.35 * grey[shown] + 0.65 * np.array(to_rgb(ORANGE))
        blank(ax).imshow(blended)
    percent = f"{LOCALIZATION_THRESHOLD:.0%}".replace("%", " %")
    axes[0, 1].set_title(f"step 1: above {percent}\nof the maximum")
    axes[1, 0].set_title(f"step 2: the larger of the\n{count} connected regions")
    for label, (row, column) in enumerate(
        ndimage.center_of_mass(above, regions, range(1, count + 1)), 1
    ):
        name = "kept" if label == largest else "dropped"
        axes[1, 0].text(column, row, name, **CENTRED, color="black", fontweight="bold")
    overlap = intersection_over_union(predicted, true_box)
    blank(axes[1, 1]).imshow(photo)
    axes[1, 1].set_title(f"step 3: its box (IoU {overlap:.2f}\nwith the true box)")
    _outline(axes[1, 1], true_box, "white", "--")
    _outline(axes[1, 1], predicted, ORANGE, "-")
    return figure


def overlap() -> Figure:
    """Pairs of boxes whose intersection over union is below, at and above 0.5."""
    true = Box(4, 4, 16, 16)
    predictions = (Box(10, 10, 22, 22), Box(8, 4, 20, 16), Box(3, 3, 16, 17))
    figure, axes = plt.subplots(1, 3, figsize=(5.2, 2.5))
    for ax, predicted in zip(axes, predictions, strict=True):
        value = intersection_over_union(true, predicted)
        shared = Box(
            *map(max, true[:2], predicted[:2]), *map(min, true[2:], predicted[2:])
        )
        blank(ax).set(xlim=(2, 23), ylim=(23, 2), aspect="equal")
        for corner in (true, predicted):
            size = (corner.right - corner.left, corner.bottom - corner.top)
            patch = Rectangle((corner.left, corner.top), *size, facecolor=FILL)
            ax.add_patch(patch)
        size = (shared.right - shared.left, shared.bottom - shared.top)
        style = {"facecolor": BLUE, "hatch": "///", "edgecolor": PAPER, "lw": 0}
        ax.add_patch(Rectangle((shared.left, shared.top), *size, **style))
        _outline(ax, true, INK, "--", shift=0)
        _outline(ax, predicted, ORANGE, "-", shift=0)
        both = size[0] * size[1]
        union = round(both / value)
        verdict = "correct" if value >= 0.5 else "not correct"
        ax.set_title(f"IoU {value:.2f}")
        ax.set_xlabel(f"{both} / {union}\n{verdict}")
    return figure


def surgery() -> list[Figure]:
    """VGG-16 before and after the paper's change, with the parameters of each part."""
    with torch.device("meta"):
        vgg = torchvision.models.vgg16()
        added = (nn.Conv2d(512, 1024, 3, padding=1), nn.Linear(1024, 1000))
    shared = vgg.features[:-1]
    linear = [layer for layer in vgg.classifier if isinstance(layer, nn.Linear)]
    sides = [_side(shared), _side(vgg.features)]
    trunk = ("13 convolutions", f"{sides[0]}×{sides[0]}×512", shared, "same")
    before = [
        trunk,
        ("max pooling", f"{sides[1]}×{sides[1]}×512", None, "cut"),
        *(
            (f"fully connected {i}", f"{layer.out_features:,}", layer, "cut")
            for i, layer in enumerate(linear, 1)
        ),
    ]
    after = [
        trunk,
        ("3×3 convolution", f"{sides[0]}×{sides[0]}×1,024", added[0], "new"),
        ("average pooling", "1,024", None, "new"),
        ("one linear layer", "1,000", added[1], "new"),
    ]
    return [_stack("VGG-16", before), _stack("VGG-16 with GAP", after)]


def errors() -> Figure:
    """How the paper's localisation errors split into wrong classes and wrong boxes."""
    path = Path(__file__).resolve().parents[1] / "data" / "cam.yml"
    facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    table_1 = facts["table_1_classification_error_ilsvrc_val"]["rows"]
    table_2 = facts["table_2_localization_error_ilsvrc_val"]["rows"]
    wrong_class = {name: top1 for name, top1, _ in table_1}
    wrong = {name: top1 for name, top1, _ in table_2 if name in wrong_class}
    names = sorted(wrong, key=wrong.get, reverse=True)
    figure, ax = plt.subplots(figsize=(5.2, 3.4))
    classes = [wrong_class[name] for name in names]
    boxes = [wrong[name] - wrong_class[name] for name in names]
    ax.barh(names, classes, 0.7, color=GREY, label="wrong class")
    style = {"color": ORANGE, "hatch": "//", "edgecolor": PAPER, "lw": 0}
    ax.barh(names, boxes, 0.7, classes, label="correct class, wrong box", **style)
    for row, (a, b) in enumerate(zip(classes, boxes, strict=True)):
        ax.text(a / 2, row, f"{a:.1f}", **CENTRED, color="black")
        pad = {"facecolor": ORANGE, "edgecolor": "none", "pad": 1.5}
        ax.text(a + b / 2, row, f"{b:.1f}", **CENTRED, color="black", bbox=pad)
        ax.text(a + b + 1, row, f"{a + b:.4g}", va="center")
    ax.set(xlabel="top-1 localisation error, %", xlim=(0, 80))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def absent_class() -> Figure:
    """Maps of a present and an absent class, each on its own scale and on one scale."""
    photo = data.chelsea()
    classes = (EGYPTIAN_CAT, ESPRESSO)
    found = cam(_backbone().model, _prepare(photo), [classes])
    maps, scores = found.maps[0], found.logits[0, list(classes)]
    figure, axes = plt.subplots(2, 2, figsize=(5.2, 3.9))
    limit = float(maps.max())
    scales = (
        {"cmap": "inferno", "vmin": 0, "vmax": 1},
        {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit},
    )
    drawn = {}
    for column, (index, activation_map) in enumerate(zip(classes, maps, strict=True)):
        large = upsample(activation_map, photo.shape[:2])
        values = (minmax(large[None])[0], large)
        for row, (shown, scale) in enumerate(zip(values, scales, strict=True)):
            ax = blank(axes[row, column])
            ax.imshow(photo.mean(-1), cmap="gray", vmin=0, vmax=255)
            drawn[row] = ax.imshow(shown, alpha=0.7, **scale)
        title = f"“{_class_name(index)}”\nscore {_signed(scores[column], 1)}"
        axes[0, column].set_title(title)
    axes[0, 0].set_ylabel("its own scale")
    axes[1, 0].set_ylabel("one scale")
    figure.colorbar(drawn[0], ax=axes[0], label="min-max", ticks=(0, 1), shrink=0.9)
    figure.colorbar(drawn[1], ax=axes[1], label="logits", shrink=0.9)
    return figure


@functools.cache
def _backbone() -> backbones.Backbone:
    return backbones.load("efficientnet_lite0")


@functools.cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def _class_name(index: int) -> str:
    return _imagenet().index_to_description(index).split(",")[0]


def _prepare(photo: np.ndarray | Tensor) -> Tensor:
    return _backbone().transform(torch.as_tensor(photo)[None])


def _last_features(photo: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the last feature map (1, C, h, w) and the scores of a photograph."""
    model = _backbone().model
    with torch.no_grad(), record_activations(model, LAYER) as recorded:
        logits = model(_prepare(photo))
    return recorded[LAYER], logits


def _two_cats() -> tuple[Tensor, Box, Box]:
    """Paste a large and a small head of a cat on bricks; return their true boxes."""
    cat = data.chelsea()
    corners = np.array(CAT.split(), int).reshape(-1, 2)
    mask = polygon2mask(cat.shape[:2], corners[:, ::-1])
    (window,) = ndimage.find_objects(mask.astype(int))
    layers = np.dstack([cat / 255, mask])[window]
    cutout = torch.tensor(layers, dtype=torch.float32).movedim(-1, 0)[None]
    image = _backbone().transform.resize(torch.tensor(data.brick())[None])[0]
    image, side = image.clamp(0, 1), _backbone().transform.size
    boxes = []
    for longest, at_end in ((140, False), (60, True)):
        size = [round(n * longest / max(cutout.shape[2:])) for n in cutout.shape[2:]]
        small = F.interpolate(cutout, size, mode="bilinear", antialias=True)[0]
        top, left = (side - size[0], side - size[1]) if at_end else (0, 0)
        inside = image[:, top : top + size[0], left : left + size[1]]
        is_cat = small[3] > 0.5
        inside[:, is_cat] = small[:3, is_cat].clamp(0, 1)
        boxes.append(Box(top, left, top + size[0], left + size[1]))
    return image, *boxes


def _side(layers: nn.Module) -> int:
    """Return the side of the map that layers compute from 224×224 pixels."""
    return layers(torch.empty(1, 3, 224, 224, device="meta")).shape[-1]


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Make a figure with axes over all of it, in inches."""
    figure = plt.figure(figsize=(width, height), layout="none")
    ax = blank(figure.add_axes((0, 0, 1, 1)))
    ax.set(xlim=(0, width), ylim=(0, height))
    return figure, ax


def _inset(figure: Figure, corner: tuple[float, float], size: float) -> Axes:
    """Add square axes to a canvas: lower left corner and side in inches."""
    width, height = figure.get_size_inches()
    x, y = corner
    return blank(figure.add_axes((x / width, y / height, size / width, size / height)))


def _signed(value: float | Tensor, decimals: int = 2) -> str:
    return f"{float(value):.{decimals}f}".replace("-", "−")


def _number_grid(
    ax: Axes,
    grid: Tensor,
    corner: tuple[float, float],
    title: str,
    signed: bool = False,
) -> None:
    """Draw 3×3 numbers on a canvas, 1 inch wide; not 0 is filled."""
    x, y = corner
    for row, column in itertools.product(range(3), range(3)):
        value = float(grid[row, column])
        colour = FILL if value == 0 else BLUES if value < 0 else REDS
        left, bottom = x + column / 3, y + (2 - row) / 3
        square = {"facecolor": colour, "edgecolor": INK, "lw": 0.8}
        ax.add_patch(Rectangle((left, bottom), 1 / 3, 1 / 3, **square))
        text = {"color": MUTED if value == 0 else "black"}
        ax.text(left + 1 / 6, bottom + 1 / 6, _signed(value + 0, 0), **CENTRED, **text)
    ax.text(x + 0.5, y + 1.12, title, **CENTRED)


def _outline(ax: Axes, corner: Box, colour: str, line: str, shift: float = 0.5) -> None:
    """Outline a half-open box; pixel centres lie half a unit inside its edges."""
    ax.add_patch(
        Rectangle(
            (corner.left - shift, corner.top - shift),
            corner.right - corner.left,
            corner.bottom - corner.top,
            fill=False,
            edgecolor=colour,
            linestyle=line,
            lw=2.2,
        )
    )


def _stack(title: str, layers: list[tuple]) -> Figure:
    """Draw layers below each other: name, size of the output, parameters."""
    height, step = 4.3, 2.88 / (len(layers) - 1)
    figure, ax = _canvas(2.45, height)
    ax.text(1.22, height - 0.12, title, **CENTRED, fontweight="bold")
    verbs = {"same": "", "cut": "removed: ", "new": "added: "}
    styles = {
        "same": {"facecolor": FILL, "edgecolor": INK},
        "cut": {"facecolor": "none", "edgecolor": ORANGE, "linestyle": "--"},
        "new": {"facecolor": "none", "edgecolor": BLUE, "lw": 2.5},
    }
    total = 0
    for row, (name, output, layer, kind) in enumerate(layers):
        n_parameters = sum(p.numel() for p in layer.parameters()) if layer else 0
        total += n_parameters
        bottom = height - 0.86 - step * row
        style = {"lw": 1.5} | styles[kind]
        ax.add_patch(Rectangle((0.1, bottom), 2.25, 0.56, **style))
        ax.text(1.22, bottom + 0.4, verbs[kind] + name, **CENTRED)
        amount = f"{n_parameters / 1e6:.1f} M" if n_parameters else "0"
        ax.text(1.22, bottom + 0.16, f"{output}  |  {amount}", **CENTRED, fontsize=10)
        if row:
            arrow(ax, (1.22, bottom + step + 0.02), (1.22, bottom + 0.54), lw=1)
    ax.text(1.22, bottom - 0.2, f"{total / 1e6:.1f} M parameters", **CENTRED)
    return figure
