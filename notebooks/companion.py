"""What the notebooks share beside paperlib: results of long runs, and drawings that
only they need.
"""

import base64
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Ellipse, Polygon, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image
from torch import Tensor

from paperlib import viz
from paperlib.anomaly_map import minmax, upsample

RESULTS = Path(__file__).resolve().parents[1] / "book" / "data" / "results"


def result_file(name: str) -> Path:
    """Return the path of a committed file of a long run; `make results` makes it again.

    Args:
        name: the file's name with its ending, such as "padim_cells.json".

    Raises:
        ValueError: if there is no such file.
    """
    path = RESULTS / name
    if not path.is_file():
        known = (
            ", ".join(sorted(file.name for file in RESULTS.glob("*_cells.*"))) or "none"
        )
        raise ValueError(
            f"no result {name!r}; there are: {known}. Run `make results` in a clone of"
            " the book"
        )
    return path


def read_result(name: str) -> dict:
    """Read the result of a run that is too long for a notebook.

    Args:
        name: of the script in book/tools that made it, without its ending.

    Returns:
        what the file holds: `runs`, and a `stamp` with the code's hash, versions,
        device, date and recipe.

    Raises:
        ValueError: if there is no such result.
    """
    return json.loads(result_file(f"{name}.json").read_text(encoding="utf-8"))


def cuboid(
    ax: Axes,
    corner: tuple[float, float],
    size: tuple[int, int, int],
    color: str,
    cell: float = 1,
) -> tuple[float, float]:
    """Draw a box of cells in oblique view, the way papers draw a stack of channels or a
    filter.

    Args:
        ax: axes with equal aspect; the caller hides its frame.
        corner: lower left corner of the front face.
        size: width, height and depth in cells; every cell of the three visible faces is
            outlined.
        color: of the front; the top and the side are paler.
        cell: side of a cell in the axes' units.

    Returns:
        the upper right corner of the drawing, for placing the next one.
    """
    (x, y), (width, height, depth) = corner, size
    # Where one cell of each direction leads.
    right, up, back = (cell, 0), (0, cell), (0.45 * cell, 0.45 * cell)

    def face(origin, step1, n1, step2, n2, opacity):
        for i, j in itertools.product(range(n1), range(n2)):
            a = (
                origin[0] + i * step1[0] + j * step2[0],
                origin[1] + i * step1[1] + j * step2[1],
            )
            b = (a[0] + step1[0], a[1] + step1[1])
            d = (a[0] + step2[0], a[1] + step2[1])
            c = (b[0] + step2[0], b[1] + step2[1])
            ax.add_patch(
                Polygon(
                    [a, b, c, d],
                    facecolor=color,
                    edgecolor="white",
                    linewidth=0.6,
                    alpha=opacity,
                )
            )

    face((x, y), right, width, up, height, 1.0)
    face((x, y + height * cell), right, width, back, depth, 0.75)
    face((x + width * cell, y), up, height, back, depth, 0.6)
    return x + (width + 0.45 * depth) * cell, y + (height + 0.45 * depth) * cell


def log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers at the given places, and nowhere
    else.

    Args:
        axis: `ax.xaxis` or `ax.yaxis`, already logarithmic.
        ticks: where to put a label.
    """
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


class Slider:
    """A figure with sliders that needs no kernel and no network: every frame is drawn
    beforehand.

    Args:
        draw: called as `draw(ax, value, …)` with one value of each slider.
        axes: slider label → the values it takes, in order.
        describe: called with the same values; its text is the picture's alt text and
            stands under it.
        figsize: of a frame, in inches.
        dpi: dots an inch; the frames are inside the page, so it grows with them.

    Raises:
        ValueError: if a slider has no value, or there are more than 60 frames.
    """

    def __init__(
        self,
        draw: Callable[..., None],
        axes: dict[str, Sequence],
        describe: Callable[..., str],
        figsize: tuple[float, float] = (6.0, 3.2),
        dpi: int = 80,
    ):
        self.axes = {label: list(values) for label, values in axes.items()}
        combinations = list(itertools.product(*self.axes.values()))
        if not axes or not 1 <= len(combinations) <= 60:
            raise ValueError(
                f"{len(combinations)} frames; expected 1 to 60. Give fewer values"
            )
        self.texts = [describe(*values) for values in combinations]
        self.frames = [_frame(draw, values, figsize, dpi) for values in combinations]

    def _repr_html_(self) -> str:
        # The id comes from the content, so that running twice gives the same output.
        uid = f"slider{zlib.crc32(''.join(self.frames).encode()):08x}"
        controls = "".join(
            f"<label>{escape(label)}: <output>{escape(str(values[0]))}</output>"
            f'<input type="range" min="0" max="{len(values) - 1}" value="0" step="1" '
            f'aria-label="{escape(label)}"></label>'
            for label, values in self.axes.items()
        )
        data = json.dumps(
            {
                "frames": self.frames,
                "texts": self.texts,
                "values": [[str(v) for v in vs] for vs in self.axes.values()],
            }
        ).replace("</", "<\\/")
        return (
            f'<figure class="paperlib-slider" id="{uid}">{controls}'
            f'<img src="{self.frames[0]}" alt="{escape(self.texts[0])}"'
            ' style="max-width:100%;background:white">'
            f'<figcaption aria-live="polite">{escape(self.texts[0])}</figcaption>'
            "</figure>"
            f'<script>(()=>{{const figure=document.getElementById("{uid}"),data={data};'
            'const inputs=[...figure.querySelectorAll("input")],'
            'outputs=figure.querySelectorAll("output");'
            "const show=()=>{let frame=0;"
            "inputs.forEach((input,i)=>{"
            "frame=frame*data.values[i].length+Number(input.value);"
            "outputs[i].textContent=data.values[i][input.value]});"
            'const picture=figure.querySelector("img");'
            "picture.src=data.frames[frame];picture.alt=data.texts[frame];"
            'figure.querySelector("figcaption").textContent=data.texts[frame]};'
            'inputs.forEach(input=>input.addEventListener("input",show))})()</script>'
        )


def _frame(
    draw: Callable[..., None], values: tuple, figsize: tuple[float, float], dpi: int
) -> str:
    """Draw one frame as a data URL: a palette PNG where its colours are few, a JPEG
    where it holds a photograph.
    """
    fig, ax = plt.subplots(figsize=figsize)
    try:
        draw(ax, *values)
        drawn, small = io.BytesIO(), io.BytesIO()
        fig.savefig(drawn, format="png", dpi=dpi)
    finally:
        plt.close(fig)
    picture = Image.open(drawn).convert("RGB")
    kind = "png" if picture.getcolors(4096) else "jpeg"
    if kind == "png":
        picture = picture.quantize(128, dither=Image.Dither.NONE)
    picture.save(small, kind, optimize=True, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(small.getvalue()).decode()


# Chapter 02


def draw_signed_map(
    ax: Axes, activation_map: Tensor, image: np.ndarray | Tensor, title: str = ""
) -> AxesImage:
    """Lay a signed map over the brightness of its image: red above zero, blue below.

    Args:
        ax: where to draw.
        activation_map: (h, w), in any unit; resized to the image, white at zero.
        image: grey (H, W) or RGB (H, W, 3), 8 bits or floats in [0, 1].
        title: above the image.

    Returns:
        the drawn map, for a colour bar.
    """
    image = np.asarray(image)
    brightness = image
    if image.ndim == 3:
        brightness = image.mean(2) / (255 if image.dtype == np.uint8 else 1)
    viz.panel(ax, brightness, title)
    limit = float(activation_map.abs().max())
    large = upsample(activation_map.cpu(), image.shape[:2])
    return ax.imshow(large, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.6)


def draw_grid(ax: Axes, values: Tensor, title: str, limit: float) -> None:
    """Draw a small matrix as coloured squares with the numbers in them.

    Args:
        ax: where to draw.
        values: (h, w), shown without decimals.
        title: above the grid.
        limit: the value of the darkest red; its negative has the darkest blue.
    """
    ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for (y, x), value in np.ndenumerate(values.numpy()):
        ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=13)
    ax.set_title(title)
    ax.set_axis_off()


def draw_box(ax: Axes, box: tuple[int, int, int, int]) -> None:
    """Outline a half-open box (top, left, bottom, right) in black on a grid."""
    top, left, bottom, right = box
    # The centre of a square has whole coordinates, so its edge lies half a unit off.
    corner = (left - 0.5, top - 0.5)
    style = {"fill": False, "edgecolor": "black", "linewidth": 3}
    ax.add_patch(Rectangle(corner, right - left, bottom - top, **style))


def draw_error_curves(
    ax: Axes,
    thresholds: np.ndarray,
    curves: dict[str, Sequence[float]],
    marked: Sequence[int] = (),
) -> None:
    """Plot localisation errors against the threshold of the box rule.

    Args:
        ax: where to draw.
        thresholds: shares of the map's maximum, between 0 and 1.
        curves: label → errors in %, one per threshold.
        marked: thresholds in % that get a vertical line.
    """
    for (label, errors), marker in zip(curves.items(), "os^D", strict=False):
        ax.plot(100 * thresholds, errors, marker=marker, ms=4, label=label)
    for percent in marked:
        ax.axvline(percent, color="black", lw=1, ls=":")
        style = {"textcoords": "offset points", "ha": "center", "fontsize": 11}
        ax.annotate(str(percent), (percent, 100), (0, 4), **style)
    ax.set_xlabel("threshold, % of the map's maximum")
    ax.set(ylabel="localisation error, %", ylim=(0, 100))
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.06), columnspacing=1)


# Chapter 03


def explanation_figure(
    image: np.ndarray,
    maps: Tensor,
    guided: Tensor,
    guided_cams: Tensor,
    labels: Sequence[str],
) -> Figure:
    """Draw Grad-CAM's Figure 1 for two classes, each method's two panels side by side.

    Args:
        image: (H, W, 3), RGB, uint8 or float in [0, 1].
        maps: (2, h, w), raw: each is scaled to [0, 1] by its minimum and maximum and
            resized to the image.
        guided: (2, 3, H, W), from `guided_backprop`.
        guided_cams: (2, 3, H, W), from `guided_grad_cam`.
        labels: of the two classes.

    Returns:
        the figure; its axes are in reading order.
    """
    heats = viz.heatmap(minmax(upsample(maps.detach().cpu(), image.shape[:2])))
    methods = {
        "heat map": heats,
        "Guided Backpropagation": viz.gradient_image(guided),
        "overlay": [viz.overlay(heat, image) for heat in heats],
        "Guided Grad-CAM": viz.gradient_image(guided_cams),
    }
    fig = plt.figure(figsize=(6.4, 4.5), layout="constrained")
    parts = fig.subfigures(2, 2, hspace=0.04, wspace=0.04).flat
    for part, (method, panels) in zip(parts, methods.items(), strict=True):
        part.suptitle(method, fontsize=12, fontweight="bold")
        for ax, label, shown in zip(part.subplots(1, 2), labels, panels, strict=True):
            viz.panel(ax, shown, label)
    return fig


def draw_number_grids(grids: dict[str, Tensor], figsize: tuple[float, float]) -> None:
    """Draw small grids of whole numbers in a row, red above zero and blue below.

    Args:
        grids: title → (h, w); the colours are darkest at -9 and 9.
        figsize: of the figure, in inches.
    """
    axes = plt.subplots(1, len(grids), figsize=figsize, squeeze=False)[1][0]
    for ax, (title, grid) in zip(axes, grids.items(), strict=True):
        values = np.asarray(grid) + 0.0  # + 0.0 turns -0 into 0
        ax.imshow(values, cmap="RdBu_r", vmin=-9, vmax=9)
        for (i, j), value in np.ndenumerate(values):
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=12)
        ax.set_title(title)
        ax.set_axis_off()


# Chapter 04


def draw_scores(
    ax: Axes,
    scores: Tensor,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> AxesImage:
    """Draw a map of anomaly scores without its image, and return it for a colour bar.

    Args:
        ax: where to draw.
        scores: (h, w), on any device.
        title: text above the map.
        limits: the values at the two ends of the colour scale; None for the map's own.
    """
    low, high = limits or (None, None)
    mappable = ax.imshow(scores.cpu(), vmin=low, vmax=high)
    ax.set(xticks=[], yticks=[], title=title)
    return mappable


def draw_square(
    ax: Axes,
    corner: Sequence[int],
    side: int,
    color: str,
    linewidth: float = 1,
) -> None:
    """Outline a patch of an image, given its top left corner (row, column)."""
    top, left = corner
    style = {"fill": False, "edgecolor": color, "linewidth": linewidth}
    ax.add_patch(Rectangle((left, top), side, side, **style))


def draw_hierarchy(
    patch: Tensor,
    quarter_embeddings: Sequence[Tensor],
    embedding: Tensor,
) -> None:
    """Draw how Patch SVDD's large encoder embeds a patch through its quarters.

    Args:
        patch: (3, 64, 64), RGB in [0, 1].
        quarter_embeddings: of the four quarters in reading order, 64 numbers each.
        embedding: of the whole patch, 64 numbers.
    """
    columns = {"figsize": (6.4, 2.9), "width_ratios": (1, 1, 0.9, 1, 1, 0.9, 2)}
    fig, axes = plt.subplot_mosaic("pp.ab.w;pp.cd.w", **columns)
    viz.panel(axes["p"], patch, "64×64 pixels")
    axes["p"].axhline(31.5, color=viz.ORANGE)
    axes["p"].axvline(31.5, color=viz.ORANGE)
    for name, values in zip("abcdw", (*quarter_embeddings, embedding), strict=True):
        grid = values.view(8, 8)
        mappable = axes[name].imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1)
        axes[name].set_axis_off()
    axes["a"].set_title("4 × 64 numbers", loc="left")
    axes["w"].set_title("64 numbers")
    style = {"ha": "center", "va": "center", "fontsize": 15}
    fig.text(0.313, 0.5, "$f_{\\mathrm{small}}$\n→", **style)
    fig.text(0.687, 0.5, "$g_{\\mathrm{big}}$\n→", **style)
    scale = {"location": "bottom", "ticks": (-1, 0, 1), "shrink": 0.5}
    fig.colorbar(mappable, ax=list(axes.values()), label="value", **scale)


# Chapter 05


def call_and_time(function: Callable, *arguments) -> tuple:
    """Call a function, and return its result and how many seconds it took.

    Args:
        function: called once; work that it leaves to a GPU counts.
        arguments: passed to the function.
    """
    start = _read_clock()
    result = function(*arguments)
    return result, _read_clock() - start


def _read_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_map(
    ax: Axes,
    image: Tensor,
    anomaly_map: Tensor,
    limits: tuple[float, float],
    title: str = "",
) -> AxesImage:
    """Draw an anomaly map over its grey image, and return the map for a colour bar.

    Args:
        ax: where to draw.
        image: (H, W), uint8 or float in [0, 1].
        anomaly_map: (h, w), on any device; it is enlarged to the image's size.
        limits: the values at the two ends of the colour scale.
        title: text above the image.
    """
    viz.panel(ax, image, title)
    enlarged = upsample(anomaly_map.cpu(), image.shape[-2:])
    low, high = limits
    return ax.imshow(enlarged, cmap="inferno", vmin=low, vmax=high, alpha=0.6)


def draw_padim_overview(image: Tensor, layers: Sequence[Tensor]) -> None:
    """Draw PaDiM's Figure 2: an image, three layers, their embedding, a Gaussian.

    Args:
        image: (H, W), grey.
        layers: feature maps (N, C, h, w) of three layers, the largest first.
    """
    _, ax = plt.subplots(figsize=(6.4, 5.6))
    ax.imshow(image, cmap="gray", extent=(0, 8, 0, 8))
    caption = {"ha": "center", "va": "top", "fontsize": 11}
    blocks = zip((10, 20.5, 31), (8, 4, 2), (2, 1, 1), layers, strict=True)
    colors = (viz.SKY, viz.GREEN, viz.ORANGE)
    for (left, side, depth, layer), color in zip(blocks, colors, strict=True):
        cuboid(ax, (left, 0), (side, side, depth), color, 8 // side)
        channels, height, width = layer.shape[1:]
        text = f"{channels} channels of\n{height}×{width} positions"
        ax.text(left + 4, -0.6, text, **caption)
    arrow = {"arrowstyle": "->"}
    ax.annotate("", (16.5, -7.6), (20, -4), arrowprops=arrow)
    # The channels of all layers in one block, drawn from the back to the front.
    stack = zip((13.2, 11.4, 10), (4, 4, 3), reversed(colors), strict=True)
    for left, depth, color in stack:
        cuboid(ax, (left, left - 31), (8, 8, depth), color)
    ax.add_patch(Rectangle((13, -17), 1, 1, color=viz.VERMILION))
    total = sum(layer.shape[1] for layer in layers)
    ax.text(14, -21.6, f"{total} channels, of\nwhich 100 are kept", **caption)
    arrow["color"] = viz.VERMILION
    ax.annotate("", (29.5, -16.5), (14.2, -16.5), arrowprops=arrow)
    center, covariance = (33.5, -16.5), [[2.0, 1.2], [1.2, 1.4]]
    cloud = np.random.default_rng(0).multivariate_normal(center, covariance, 40)
    ax.plot(*cloud.T, ".", color=viz.BLUE, ms=4)
    for distance in (1, 2):
        size = (2 * distance * 1.74, 2 * distance * 0.69)
        ax.add_patch(Ellipse(center, *size, angle=38, fill=False, color=viz.GREY))
    ax.text(33.5, -21.6, "one Gaussian\nper position", **caption)
    ax.set(xlim=(-0.5, 43), ylim=(-25.5, 12), aspect="equal")
    ax.axis("off")


def draw_reduction_curves(tables) -> None:
    """Draw three measures against the number of dimensions kept, a column per kind.

    Args:
        tables: a data frame with a row per run and the columns `kind`, `method`,
            `dimensions`, `image`, `pixel` and `pro`.
    """
    measures = {
        "image": "image AUROC, %\nreal defects",
        "pixel": "pixel AUROC, %\nsynthetic defects",
        "pro": "PRO-score, %\nsynthetic defects",
    }
    methods = {  # marker, label, and a factor that moves the error bars apart
        "random": ("o", "random channels", 0.96),
        "PCA": ("s", "PCA, largest variance", 1),
        "least variance": ("^", "PCA, smallest variance", 1.04),
    }
    fig, panels = plt.subplots(3, 2, figsize=(6.4, 7.4), sharex=True)
    for column, kind in zip(panels.T, ("mono", "poly"), strict=True):
        runs = tables[tables.kind == kind]
        for ax, (measure, label) in zip(column, measures.items(), strict=True):
            _draw_measure(ax, runs, measure, methods)
            ax.set_ylabel(label if kind == "mono" else "")
        column[0].set_title(kind)
        column[2].set_xlabel("dimensions kept")
    # Of all panels, now that none is empty.
    panels[0, 0].set_xscale("log")
    log_ticks(panels[0, 0].xaxis, (10, 25, 50, 100))
    handles = panels[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=2)


def _draw_measure(ax: Axes, runs, measure: str, methods: dict[str, tuple]) -> None:
    bars = {"ms": 5, "capsize": 3, "lw": 1.5}
    for method, (marker, label, factor) in methods.items():
        groups = runs[runs.method == method].groupby("dimensions")[measure]
        mean, deviation = 100 * groups.mean(), 100 * groups.std()
        dimensions = factor * mean.index
        ax.errorbar(dimensions, mean, deviation, marker=marker, label=label, **bars)
    every_channel = 100 * runs[runs.method == "all"][measure].mean()
    ax.axhline(every_channel, ls="--", color="black", lw=1, label="all 176")


def draw_costs(costs, gaussian_bytes: int, bytes_per_image: int) -> None:
    """Draw time and memory of PaDiM and of nearest neighbours against the images.

    Args:
        costs: a data frame with the columns `images`, `fit, s`, `factors, s`,
            `score, s`, `search, s`, `PaDiM, MB` and `k-NN, MB`.
        gaussian_bytes: of PaDiM's means and factors.
        bytes_per_image: that nearest neighbours store.
    """
    figure = plt.figure(figsize=(6.4, 6))
    fit, score, memory = figure.subplot_mosaic("ab;cc").values()
    n_images = costs["images"]
    neighbours = {"color": viz.VERMILION, "label": "nearest neighbours"}
    fit.plot(n_images, costs["fit, s"], "o-", label="means, covariances")
    label = "Cholesky factors"
    fit.plot(n_images, costs["factors, s"], "D-", color=viz.GREEN, label=label)
    score.plot(n_images, costs["score, s"], "o-", label="PaDiM")
    score.plot(n_images, costs["search, s"], "s--", **neighbours)
    ends = np.array([20, 400])  # of the lines, beyond the crossing
    constant = np.full(2, gaussian_bytes / 1e6)
    memory.plot(ends, constant, color=viz.BLUE, label="PaDiM")
    memory.plot(n_images, costs["PaDiM, MB"], "o", color=viz.BLUE)
    memory.plot(ends, ends * bytes_per_image / 1e6, "--", **neighbours)
    memory.plot(n_images, costs["k-NN, MB"], "s", color=viz.VERMILION)
    crossing = gaussian_bytes / bytes_per_image
    memory.axvline(crossing, color="black", lw=1, ls=":")
    fit.set(title="PaDiM's fit", ylabel="seconds")
    score.set(title="score one image", ylabel="seconds")
    memory.set(title="memory", ylabel="megabytes")
    for ax in (fit, score, memory):
        ax.set_xlabel("normal images")
        ax.margins(y=0.8)  # room for the legend
        if ax is score:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0)
        ax.legend(loc="upper left")
