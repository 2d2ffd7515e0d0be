"""Figures of the page on Patch SVDD."""

import functools
import itertools
from typing import NamedTuple

import companion
import matplotlib.pyplot as plt
import torch
from drawing import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILION,
    arrow,
    blank,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from paperlib.anomaly_map import spread_patch_scores
from paperlib.datasets import TensorItems, elpv
from paperlib.neighbors import nearest_distance
from paperlib.patch_svdd import (
    BIG_PATCH,
    BIG_STRIDE,
    DIRECTIONS,
    SMALL_PATCH,
    SMALL_STRIDE,
    HierarchicalEncoder,
    PatchSVDD,
    neighbor_pairs,
    position_pairs,
    svdd_loss,
    train,
)

SIDE = 256  # pixels
GRID = (SIDE - BIG_PATCH) // BIG_STRIDE + 1  # big patches per row
FINE_GRID = (SIDE - SMALL_PATCH) // SMALL_STRIDE + 1
# Same scale in all panels with one embedding.
EMBEDDING = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}


class _Cells(NamedTuple):
    """The solar cells of the notebook's first figure, (n, 3, 256, 256)."""

    normal: Tensor  # in the bank
    functional: Tensor  # held out
    defective: Tensor


@functools.cache
def _cells() -> _Cells:
    cells, generator = elpv("mono"), torch.Generator().manual_seed(0)

    def shuffled(probability: float) -> Tensor:
        indices = torch.nonzero(cells.probability == probability).flatten()
        return indices[torch.randperm(len(indices), generator=generator)]

    def load(indices: Tensor) -> Tensor:
        items = TensorItems(cells.images[indices], size=SIDE)
        return torch.stack([item.image for item in items])

    functional, defective = shuffled(0), shuffled(1)
    return _Cells(load(functional[40:72]), load(functional[:2]), load(defective[:2]))


@functools.cache
def _detector() -> PatchSVDD:
    """The trained encoder with the bank of the notebook."""
    file = companion.result_file("patch_svdd_cells.safetensors")
    return PatchSVDD(HierarchicalEncoder.load(file)).fit(_cells().normal)


def from_images_to_patches() -> list[Figure]:
    """One centre for whole images; pairs of neighbouring patches instead."""
    normal = _cells().normal
    left, ax = plt.subplots(figsize=(2.5, 2.7))
    blank(ax).set(xlim=(0, 10), ylim=(0, 10), aspect="equal")
    ax.set_title("Deep SVDD:\nwhole images, one centre")
    places = ((1.7, 8.2), (8.3, 8.2), (1.7, 1.8), (8.3, 1.8))
    for place, image in zip(places, normal, strict=False):
        _thumbnail(ax, image, place, 2.9)
        step = torch.tensor([5.0, 5.0]) - torch.tensor(place)
        start = torch.tensor(place) + 0.52 * step
        arrow(ax, tuple(start.tolist()), tuple((start + 0.36 * step).tolist()), BLUE)
    ax.plot(5, 5, "*", ms=13, color=VERMILION)
    ax.text(5, 3.4, "$c$", ha="center", va="center", fontsize=13)

    right, ax = plt.subplots(figsize=(2.5, 2.7))
    blank(ax).set(xlim=(0, 10), ylim=(0, 10), aspect="equal")
    ax.set_title("Patch SVDD:\npairs of patches, no centre")
    # Corners of the first patch: on a bar, at the border, in a dark corner.
    spots = {(92, 60): (2.7, 7.7), (0, 96): (7.2, 5.0), (192, 192): (2.7, 2.3)}
    generator = torch.Generator().manual_seed(1)
    pairs = neighbor_pairs(3, (SIDE, SIDE), BIG_PATCH, generator)
    moves = (pairs.second - pairs.first).tolist()
    for (corner, (x, y)), (down, along) in zip(spots.items(), moves, strict=True):
        second = corner[0] + max(0, down), corner[1] + along
        ax.add_patch(
            FancyBboxPatch(
                (x - 2.05, y - 0.75),
                4.1,
                1.5,
                boxstyle="round,pad=0.45",
                facecolor="none",
                edgecolor=MUTED,
                linestyle="--",
            )
        )
        _thumbnail(ax, _cut(normal[0], corner), (x - 1.3, y), 1.5)
        _thumbnail(ax, _cut(normal[0], second), (x + 1.3, y), 1.5)
        style = {"colour": BLUE, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
        arrow(ax, (x - 0.5, y), (x, y), **style)
        arrow(ax, (x + 0.5, y), (x, y), **style)
    return [left, right]


def collapse() -> Figure:
    """How far the embeddings of patches lie apart while three losses are minimised."""
    cells = _cells()
    probe = cells.functional[:1] - cells.normal[:8].mean(0)
    budget = {"steps": 16, "crops": 4, "side": 128, "pairs": 256, "every": 2}
    losses = {
        "centre": ("one centre (Eq. 2)", ORANGE, "o"),
        "neighbors": ("neighbours alone (Eq. 4)", PURPLE, "s"),
        "patch_svdd": ("neighbours and task (Eq. 6)", BLUE, "^"),
    }

    def spread(encoder: HierarchicalEncoder) -> float:
        small = encoder.embed(probe, 16, 16).small.flatten(0, 2)
        return svdd_loss(small, small.mean(0, keepdim=True)).item()

    figure, ax = plt.subplots(figsize=(4.6, 2.9))
    for objective, (label, colour, marker) in losses.items():
        torch.manual_seed(0)
        encoder = HierarchicalEncoder()
        curve = [spread(encoder)]
        train(
            encoder,
            cells.normal[:8],
            objective=objective,
            shared_shift=True,
            on_record=lambda _, encoder=encoder, curve=curve: curve.append(
                spread(encoder)
            ),
            **budget,
        )
        relative = [value / curve[0] for value in curve]
        steps = range(0, 17, 2)
        ax.semilogy(steps, relative, marker=marker, ms=5, color=colour, label=label)
    ax.set(xlabel="training step", ylabel="spread, relative\nto before training")
    ax.set(ylim=(0.012, 14), xticks=range(0, 17, 4))
    companion.log_ticks(ax.yaxis, (0.03, 0.1, 0.3, 1))
    ax.legend(loc="upper left", frameon=False)
    return figure


def relative_position() -> list[Figure]:
    """The eight classes, with patches of a real cell, and how far the second lies."""
    image, K = _cells().normal[0], BIG_PATCH
    top = left = (SIDE - K) // 2
    pairs = position_pairs(400, (SIDE, SIDE), K, torch.Generator().manual_seed(0))
    moves = pairs.second - pairs.first
    drawn = {n: moves[pairs.position == n][0].tolist() for n in range(len(DIRECTIONS))}

    where, ax = plt.subplots(figsize=(2.1, 2.3))
    _show(ax, image).set_title("where they are cut out")
    for number, (down, right) in drawn.items():
        _outline(ax, (top + down, left + right), K, ORANGE, 1.3)
        x, y = left + right + K / 2, top + down + K / 2
        _number(ax, x, y, str(number))
    _outline(ax, (top, left), K, BLUE, 2.4)
    _number(ax, left + K / 2, top + K / 2, "$p_1$")

    cut, axes = plt.subplots(3, 3, figsize=(2.1, 2.3))
    cut.suptitle("the patches", fontsize=11)
    for ax in axes.flat:
        blank(ax)
    _show(axes[1, 1], _cut(image, (top, left)))
    _number(axes[1, 1], K / 2, K / 2, "$p_1$")
    _outline(axes[1, 1], (0, 0), K - 1, BLUE, 2.4)
    for number, ((down, right), (y, x)) in enumerate(
        zip(DIRECTIONS, drawn.values(), strict=True)
    ):
        ax = axes[1 + down, 1 + right]
        _show(ax, _cut(image, (top + y, left + x)))
        _number(ax, K / 2, K / 2, str(number))

    sizes = moves[moves != 0].abs()
    nearest, farthest = int(sizes.min()), int(sizes.max())
    ruler, ax = plt.subplots(figsize=(2.1, 2.3))
    blank(ax).set_title(f"how far apart, $K={K}$")
    ax.set(xlim=(-6, farthest + K + 4), ylim=(0, 10))
    bars = (
        (8.0, 0, BLUE, "$p_1$"),
        (5.6, nearest, ORANGE, "nearest"),
        (3.2, farthest, ORANGE, "farthest"),
    )
    for y, start, colour, name in bars:
        ax.add_patch(Rectangle((start, y), K, 1.3, facecolor=colour, edgecolor=INK))
        ax.text(start + K / 2, y + 0.62, name, ha="center", va="center", color="black")
    for x, y in ((0, 8.0), (nearest, 5.6), (farthest, 3.2)):
        ax.plot([x, x], [1.7, y], ":", color=MUTED, lw=1)
    for x in (0, nearest, farthest):
        ax.text(x, 0.9, str(x), ha="center", va="center", fontsize=10)
    ax.text(0, -0.3, "first pixel", fontsize=10)
    return [where, cut, ruler]


def hierarchy() -> list[Figure]:
    """A big patch, its quarters, and their embeddings, with shapes."""
    detector, image = _detector(), _cells().defective[1]
    corner, half = (96, 32), SMALL_PATCH
    patch = _cut(image - detector.mean, corner)[None]
    quarters = (
        patch.unfold(2, half, half).unfold(3, half, half)[0].permute(1, 2, 0, 3, 4)
    )
    with torch.no_grad():
        small = detector.encoder.small(quarters.flatten(0, 1))
        big = detector.encoder(patch)[0]

    y, n, d = 5.4, *small.shape
    labels = {
        2.2: (r"patch $p$", tuple(patch.shape[1:])),
        7.1: ("quarters", (n, *quarters.shape[2:])),
        13.6: ("embeddings", (n, d)),
        19.1: (r"$f_{\mathrm{big}}(p)$", tuple(big.shape)),
    }
    parts = []
    for low, high in ((0, 9.3), (9.3, 20.8)):
        figure, ax = plt.subplots(figsize=((high - low) / 4, 2.0))
        blank(ax).set(xlim=(low, high), ylim=(0.3, 8), aspect="equal")
        for x, (name, shape) in labels.items():
            if low < x < high:
                ax.text(x, 2.2, name, ha="center", va="center")
                ax.text(x, 1.0, str(shape), ha="center", va="center", fontsize=10)
        parts.append((figure, ax))
    (left, cut), (right, embedded) = parts
    pixels = _cut(image, corner)
    _thumbnail(cut, pixels, (2.2, y), 4.0)
    for row, column in itertools.product(range(2), range(2)):
        quarter = pixels[:, half * row : half * (row + 1)]
        quarter = quarter[..., half * column : half * (column + 1)]
        right_of_middle, above_middle = 2.3 * (column - 0.5), -2.3 * (row - 0.5)
        _thumbnail(cut, quarter, (7.1 + right_of_middle, y + above_middle), 2.0)
        values = small[2 * row + column].view(8, 8)
        place = 13.6 + right_of_middle, y + above_middle
        _thumbnail(embedded, values, place, 2.0, **EMBEDDING)
    _thumbnail(embedded, big.view(8, 8), (19.1, y), 3.2, **EMBEDDING)
    arrow(cut, (4.2, y), (5.0, y))
    arrow(embedded, (9.3, y), (11.5, y))
    arrow(embedded, (15.8, y), (17.4, y))
    embedded.text(10.35, y + 0.7, r"$f_{\mathrm{small}}$", ha="center")
    embedded.text(16.6, y + 0.7, r"$g_{\mathrm{big}}$", ha="center")
    return [left, right]


def sides() -> Figure:
    """The side of the map after each layer of the small encoder."""
    chain = _chain()
    figure, ax = plt.subplots(figsize=(5.2, 1.5))
    blank(ax).set(aspect="equal")
    x, gap, middle = 0.0, 7.5, 0.0
    for i, (channels, side) in enumerate(chain):
        ax.add_patch(
            Rectangle((x, middle - side / 2), side, side, facecolor=BLUE, edgecolor=INK)
        )
        centre = x + side / 2
        ax.text(centre, middle + side / 2 + 3.5, str(side), ha="center", va="center")
        ax.text(centre, -20, str(channels), ha="center", va="center", fontsize=10)
        x += side
        if i < len(chain) - 1:
            style = {"shrinkA": 1, "shrinkB": 1, "mutation_scale": 8}
            arrow(ax, (x, middle), (x + gap, middle), **style)
        x += gap
    ax.text(-3, -20, "channels", ha="right", va="center", fontsize=10)
    ax.text(-3, middle + chain[0][1] / 2 + 3.5, "side", ha="right", va="center")
    ax.set(xlim=(-24, x - gap + 2), ylim=(-24, 23))
    return figure


def _chain() -> list[tuple[int, int]]:
    """Channels and side of the small encoder's input and of each layer's output."""
    small = HierarchicalEncoder().small
    maps = torch.zeros(1, 3, SMALL_PATCH, SMALL_PATCH)
    chain = [(maps.shape[1], maps.shape[2])]
    with torch.no_grad():
        for layer in small.children():
            maps = layer(maps)
            chain.append((maps.shape[1], maps.shape[2]))
    return chain


def nearest_patches() -> list[Figure]:
    """Test patches, and the patch of the bank that is nearest to each."""
    detector, cells = _detector(), _cells()
    parts = []
    for kind, images in (
        ("functional", cells.functional),
        ("defective", cells.defective),
    ):
        figure, axes = plt.subplots(2, 2, figsize=(2.4, 2.75))
        figure.suptitle(f"two {kind} cells", fontsize=11)
        for column, image in enumerate(images):
            big = detector.encoder.embed(image[None] - detector.mean).big.flatten(0, 2)
            distances, rows = nearest_distance(big, detector.big, return_index=True)
            order = distances.argsort()
            # The median patch of a functional cell, the farthest of a defective one.
            middle = order[len(order) // 2]
            number = int(middle if kind == "functional" else order[-1])
            source, place = divmod(int(rows[number]), GRID**2)
            patches = (image, number), (cells.normal[source], place)
            for ax, (shown, position) in zip(axes[:, column], patches, strict=True):
                row, along = divmod(position, GRID)
                _show(ax, _cut(shown, (BIG_STRIDE * row, BIG_STRIDE * along)))
            axes[1, column].set_xlabel(f"distance {distances[number]:.2f}")
        axes[0, 0].set_ylabel("patch")
        axes[1, 0].set_ylabel("nearest")
        parts.append(figure)
    return parts


def coverage() -> list[Figure]:
    """Where the patches of one row lie, and how many patches cover a pixel."""
    counts = _cover_counts(GRID, BIG_PATCH, BIG_STRIDE, SIDE)
    row, (upper, lower) = plt.subplots(
        2, 1, figsize=(3.2, 3.3), sharex=True, height_ratios=(2.3, 1)
    )
    starts = [BIG_STRIDE * i for i in range(GRID)]
    for i, start in enumerate(starts):
        upper.barh(i + 1, BIG_PATCH, left=start, height=0.7, color=BLUE)
    upper.set(ylabel="patch", yticks=(1, 5, 9, GRID), ylim=(GRID + 0.8, 0.2))
    upper.set_title(f"{GRID} patches of $K={BIG_PATCH}$, $S={BIG_STRIDE}$")
    lower.stairs(counts, range(SIDE + 1), color=INK, lw=1.4)
    lower.set(ylabel="covered\nby", ylim=(0, 5), yticks=(0, 2, 4))
    lower.set(xlabel="column of the pixel", xlim=(0, SIDE))
    lower.set_xticks(range(0, SIDE + 1, 64))

    corner, ax = plt.subplots(figsize=(3.0, 3.3))
    blocks = counts[::BIG_STRIDE][:6]
    table = torch.outer(blocks, blocks)
    extent = (0, 6 * BIG_STRIDE, 6 * BIG_STRIDE, 0)
    ax.imshow(table, cmap="viridis", extent=extent, vmin=0)
    for (i, j), value in _entries(table):
        colour = "white" if value < 0.6 * table.max() else "black"
        x, y = BIG_STRIDE * (j + 0.5), BIG_STRIDE * (i + 0.5)
        ax.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour)
    ax.set_title("patches over a pixel,\nupper left corner")
    ax.set(xlabel="column of the pixel", ylabel="row of the pixel")
    ax.set(xticks=range(0, 97, 32), yticks=range(0, 97, 32))
    return [row, corner]


def _cover_counts(n: int, patch: int, stride: int, size: int) -> Tensor:
    """Count, for the pixels of one row, the patches over each: from the library's map.

    A score of 1 for one patch and 0 for the others is spread over the pixels of that
    patch only.
    """
    one_patch = torch.eye(n).view(n, 1, n)
    maps = spread_patch_scores(one_patch, patch, stride, (patch, size))
    return (maps[:, 0] > 0).sum(0).double()


def from_distances_to_maps() -> list[Figure]:
    """All steps from an image to its score, on a defective cell."""
    detector, image = _detector(), _cells().defective[:1]
    embeddings = detector.encoder.embed(image - detector.mean)
    fine, coarse = (
        nearest_distance(queries.flatten(0, 2), bank).view(queries.shape[1:3])
        for queries, bank in zip(
            embeddings, (detector.small, detector.big), strict=True
        )
    )
    maps = detector.anomaly_maps(image)
    assert fine.shape == (FINE_GRID, FINE_GRID) and coarse.shape == (GRID, GRID)
    before, axes = plt.subplots(2, 2, figsize=(2.6, 3.0))
    _show(axes[0, 0], image[0]).set_title("image")
    axes[0, 1].remove()
    _map(axes[1, 0], fine, f"$K=32$: {FINE_GRID}×{FINE_GRID}")
    _map(axes[1, 1], coarse, f"$K=64$: {GRID}×{GRID}")
    note = before.add_subplot(axes[0, 1].get_subplotspec())
    blank(note).text(
        0.5,
        0.5,
        "distance of\neach patch to\nthe nearest\nnormal patch\n↓",
        ha="center",
        va="center",
    )

    after, axes = plt.subplots(2, 2, figsize=(2.6, 3.0))
    titles = ("small", "big", "sum", "product")
    for ax, title, values in zip(axes.flat, titles, maps, strict=True):
        _map(ax, values[0], title)
        row, column = divmod(int(values[0].argmax()), SIDE)
        ax.plot(column, row, "o", mfc="none", mec=VERMILION, ms=9, mew=1.8)
        ax.set_xlabel(f"max {values.max():.2f}", fontsize=10)
    return [before, after]


def weight() -> list[Figure]:
    """Task and detection of training runs that differ in λ, from stored results."""
    runs = companion.read_result("patch_svdd_cells")["runs"]
    prefix = "λ = "
    runs = {
        run["name"].removeprefix(prefix): run
        for run in runs
        if run["name"].startswith(prefix) and run["seed"] == 0
    }
    names = list(runs)
    panels = {
        "correct directions, %": lambda run, kind: 100 * run["positions"][kind][0],
        "pixel AUROC": lambda run, kind: run["auroc"][f"{kind} pixel mult"],
        "image AUROC": lambda run, kind: run["auroc"][f"{kind} image mult"],
    }
    styles = {"mono": ("o", BLUE, "-"), "poly": ("s", ORANGE, "--")}
    parts = []
    for title, measure in panels.items():
        figure, ax = plt.subplots(figsize=(2.1, 2.4))
        for kind, (marker, colour, line) in styles.items():
            values = [measure(run, kind) for run in runs.values()]
            style = {"marker": marker, "color": colour, "ls": line, "ms": 6}
            ax.plot(range(len(names)), values, label=kind, **style)
        if "AUROC" in title:
            ax.set(ylim=(0.5, 1), yticks=(0.5, 0.6, 0.7, 0.8, 0.9, 1))
        else:
            ax.axhline(100 / len(DIRECTIONS), color=MUTED, ls=":")
            ax.text(
                0, 100 / len(DIRECTIONS) + 2.5, "guessing", color=MUTED, fontsize=10
            )
            ax.set(ylim=(0, 65), yticks=(0, 20, 40, 60))
            ax.legend(loc="upper right", frameon=False)
        ax.set_title(title)
        ax.set_xticks(range(len(names)), names, rotation=45)
        ax.set(xlabel="$\\lambda$", xmargin=0.1)
        parts.append(figure)
    return parts


def _cut(image: Tensor, corner: tuple[int, int]) -> Tensor:
    """Cut a big patch out of an image (3, H, W), given its top left corner."""
    top, left = corner
    return image[:, top : top + BIG_PATCH, left : left + BIG_PATCH]


def _show(ax: Axes, image: Tensor) -> Axes:
    """Draw an image (3, H, W) of a cell, which is grey."""
    blank(ax).imshow(image[0], cmap="gray", vmin=0, vmax=1)
    return ax


def _map(ax: Axes, values: Tensor, title: str) -> None:
    """Draw a map of distances, bright where they are large."""
    blank(ax).imshow(values, cmap="viridis", vmin=0)
    ax.set_title(title)


def _thumbnail(
    ax: Axes, values: Tensor, centre: tuple[float, float], side: float, **colours
) -> None:
    """Draw an image or a matrix as a square inside a diagram."""
    (x, y), half = centre, side / 2
    extent = (x - half, x + half, y - half, y + half)
    image = values[0] if values.ndim == 3 else values
    colours = colours or {"cmap": "gray", "vmin": 0, "vmax": 1}
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(image, extent=extent, zorder=2, **colours)
    ax.set(xlim=limits[0], ylim=limits[1])
    ax.add_patch(
        Rectangle((x - half, y - half), side, side, fill=False, edgecolor=INK, zorder=3)
    )


def _outline(
    ax: Axes, corner: tuple[int, int], side: int, colour: str, width: float
) -> None:
    """Outline a patch, given its top left corner (row, column)."""
    top, left = corner
    ax.add_patch(
        Rectangle((left, top), side, side, fill=False, edgecolor=colour, lw=width)
    )


def _number(ax: Axes, x: float, y: float, text: str) -> None:
    """Print a label on an image: white on a dark disc."""
    box = {"boxstyle": "circle,pad=0.15", "facecolor": "black", "edgecolor": "none"}
    style = {"ha": "center", "va": "center", "color": "white", "fontsize": 10}
    ax.text(x, y, text, bbox=box, **style)


def _entries(table: Tensor):
    """Yield the indices and the value of each entry of a matrix."""
    for i, j in itertools.product(range(table.shape[0]), range(table.shape[1])):
        yield (i, j), float(table[i, j])
