"""Figures of images and maps, in one style, readable with colour blindness."""

import difflib
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from paperlib.anomaly_map import minmax, upsample

Array = Tensor | np.ndarray
Number = float | int  # the type checks in the tests reject int for float

# Okabe and Ito's colours: distinguishable with all common forms of colour blindness,
# and different greys in print.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F"


def use_style() -> None:
    """Set matplotlib's defaults for the book, readable at the width of a phone."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 12,  # 9 px where a phone shows the 6.4 inches at 350 px
            "axes.titlesize": 12,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "legend.fontsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
            "lines.linewidth": 2,
            "legend.frameon": False,
            "axes.prop_cycle": plt.cycler(
                color=[BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY]
            ),
        }
    )


# ---- images are RGB floats in [0, 1], (H, W, 3) ----


def heatmap(
    map: Array, colormap: str = "viridis", size: int | tuple[int, int] | None = None
) -> np.ndarray:
    """Colour a map whose values lie in [0, 1].

    Args:
        map: (h, w), or any number of leading axes; `anomaly_map.minmax` scales a raw
            one.
        colormap: a name that matplotlib knows; the default is perceptually uniform.
            "jet" is the papers' (OpenCV's, in RGB); it shows edges where the map has
            none.
        size: height and width to resize to first, bilinearly; one number for a square.

    Returns:
        float32 (…, H, W, 3), RGB in [0, 1].

    Raises:
        ValueError: for values outside [0, 1] or an unknown colormap.
    """
    values = torch.as_tensor(map).detach().float().cpu()
    if values.ndim < 2:
        raise ValueError(f"map of shape {tuple(values.shape)}; expected (h, w)")
    values = _in_range(values, "map", "scale it with anomaly_map.minmax(map)")
    values = (values if size is None else upsample(values, size).clamp(0, 1)).numpy()
    if colormap.lower() == "jet":
        import cv2

        levels = (255 * values).round().astype(np.uint8)
        blue_green_red = cv2.applyColorMap(levels.reshape(-1, 1), cv2.COLORMAP_JET)
        return np.float32(blue_green_red[:, 0, ::-1].reshape(*values.shape, 3) / 255)
    if colormap not in matplotlib.colormaps:
        close = difflib.get_close_matches(colormap, matplotlib.colormaps, n=3) or [
            "viridis",
            "magma",
            "jet",
        ]
        raise ValueError(
            f"unknown colormap {colormap!r}; did you mean one of: {', '.join(close)}?"
        )
    return np.float32(matplotlib.colormaps[colormap](values)[..., :3])


def overlay(
    heat: Array,
    image: Array,
    weights: tuple[Number, Number] = (0.5, 0.5),
    divide_by_maximum: bool = False,
) -> np.ndarray:
    """Blend a heat map with its image.

    Args:
        heat: from `heatmap`, at the image's size.
        image: RGB or grey, uint8 or float in [0, 1], (H, W, 3) or (3, H, W), also in
            batches.
        weights: of heat map and image. A sum above 1 is clipped; common scripts use
            (0.7, 0.5).
        divide_by_maximum: divide by the brightest value instead of clipping, as
            Grad-CAM scripts do.

    Returns:
        float32 (…, H, W, 3), RGB in [0, 1].

    Raises:
        ValueError: for images of different sizes, values outside [0, 1], or a negative
            weight.
    """
    heat, image = _to_rgb(heat, "heat"), _to_rgb(image, "image")
    if heat.shape[-3:] != image.shape[-3:]:
        raise ValueError(
            f"a heat map of {heat.shape[-3]}×{heat.shape[-2]} over"
            f" an image of {image.shape[-3]}×{image.shape[-2]};"
            " create it with heatmap(map, size=(height, width))"
        )
    if min(weights) < 0:
        raise ValueError(f"weights={weights}; expected two numbers of at least 0")
    mixed = weights[0] * heat + weights[1] * image
    mixed = (
        mixed / max(float(mixed.max()), 1e-12)
        if divide_by_maximum
        else np.clip(mixed, 0, 1)
    )
    return np.float32(mixed)


def gradient_image(gradient: Array) -> np.ndarray:
    """Convert an input gradient to an image of mean 0.5 and standard deviation 0.1.

    Args:
        gradient: (3, H, W) or (H, W, 3), of any scale, also in batches; each image is
            scaled separately.

    Returns:
        float32 (…, H, W, 3); a constant gradient is grey, 0.5. Values are clipped to
        [0, 1].

    Raises:
        ValueError: if it is not an RGB image, or contains NaN or infinite values.
    """
    values = _channels_last(
        torch.as_tensor(gradient).detach().double().cpu(), "gradient"
    ).numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} values of the gradient are NaN"
            " or infinite"
        )
    axes = (-3, -2, -1)
    centred = values - values.mean(axes, keepdims=True)
    deviation = centred.std(axes, keepdims=True)
    scaled = np.divide(
        0.1 * centred, deviation, out=np.zeros_like(centred), where=deviation > 0
    )
    return np.float32(np.clip(scaled + 0.5, 0, 1))


def panel(
    ax: Axes,
    image: Array,
    title: str = "",
    boxes: Sequence[tuple[int, int, int, int]] = (),
    color: str = VERMILION,
) -> None:
    """Show one image on axes without ticks, with optional boxes.

    Args:
        ax: where to draw.
        image: RGB or grey, uint8 or float in [0, 1], (H, W, 3) or (3, H, W).
        title: above the image.
        boxes: (top, left, bottom, right), half-open, in the image's pixels, as from
            `cam.bounding_boxes`.
        color: of the boxes.

    Raises:
        ValueError: for a batch of images, or values outside [0, 1].
    """
    rgb = _to_rgb(image, "image")
    if rgb.ndim != 3:
        raise ValueError(
            f"images of shape {rgb.shape}; expected one."
            " Select one of a batch, for example images[0]"
        )
    ax.imshow(rgb)
    ax.set(xticks=[], yticks=[], title=title)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    # Pixel centres have integer coordinates, so edges are offset by half a pixel.
    for top, left, bottom, right in boxes:
        edge = Rectangle(
            (left - 0.5, top - 0.5),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=color,
            linewidth=2,
        )
        ax.add_patch(edge)


def explanation_figure(
    image: Array,
    maps: Array,
    guided: Array | None = None,
    guided_cams: Array | None = None,
    *,
    labels: Sequence[str] = (),
    boxes: Sequence[Sequence[tuple[int, int, int, int]]] = (),
    colormap: str = "viridis",
) -> Figure:
    """Draw Grad-CAM's Figure 1: one row per class with image, heat map and overlay.

    Guided images, if passed, are drawn in a second line per class, so that no panel is
    too small on a phone.

    Args:
        image: one image, RGB or grey, uint8 or float in [0, 1], (H, W, 3) or (3, H, W).
        maps: (rows, h, w), raw: each is scaled to [0, 1] by its minimum and maximum and
            resized to the image.
        guided: (rows, 3, H, W), from `guided_backprop`.
        guided_cams: (rows, 3, H, W), from `guided_grad_cam`.
        labels: one per row.
        boxes: one list of boxes per row, in the image's pixels, drawn on the overlay.
        colormap: as in `heatmap`.

    Returns:
        the figure; its axes are in reading order.

    Raises:
        ValueError: if the numbers of rows differ, or `image` is not one image.
    """
    rgb, maps = _to_rgb(image, "image"), torch.as_tensor(maps).detach().float().cpu()
    if maps.ndim != 3 or rgb.ndim != 3:
        raise ValueError(
            f"image {rgb.shape} and maps {tuple(maps.shape)};"
            " expected one image and (rows, h, w)"
        )
    inputs = {
        "guided": guided,
        "guided_cams": guided_cams,
        "labels": labels,
        "boxes": boxes,
    }
    mismatches = [
        f"{name} {len(value)}"
        for name, value in inputs.items()
        if value is not None and len(value) not in (0, len(maps))
    ]
    if mismatches:
        raise ValueError(
            f"{len(maps)} maps, but {', '.join(mismatches)}; expected one per row"
        )
    heats = heatmap(minmax(upsample(maps, rgb.shape[:2])), colormap)
    columns = {
        "original": [rgb] * len(maps),
        "heat map": heats,
        "overlay": [overlay(heat, rgb) for heat in heats],
    }
    columns |= (
        {"Guided\nBackpropagation": gradient_image(guided)}
        if guided is not None
        else {}
    )
    columns |= (
        {"Guided\nGrad-CAM": gradient_image(guided_cams)}
        if guided_cams is not None
        else {}
    )
    lines = -(-len(columns) // 3)  # per class, of at most three panels
    across = -(-len(columns) // lines)
    size = (
        1.6 * across,
        lines * len(maps) * (1.5 * rgb.shape[0] / rgb.shape[1] + 0.4),
    )
    fig, axes = plt.subplots(
        lines * len(maps), across, figsize=size, squeeze=False, layout="constrained"
    )
    axes = axes.reshape(len(maps), lines * across)
    for spare in axes[:, len(columns) :].flat:
        spare.remove()
    for row in range(len(maps)):
        for ax, (title, panels) in zip(axes[row], columns.items(), strict=False):
            named = row == 0 or lines > 1
            panel(
                ax,
                panels[row],
                title if named else "",
                boxes[row] if boxes and title == "overlay" else (),
            )
        for first in axes[row, ::across] if labels else ():
            first.set_ylabel(labels[row])
    return fig


def anomaly_figure(
    images: Array,
    maps: Array,
    masks: Array | None = None,
    *,
    labels: Sequence[str] = (),
    boxes: Sequence[Sequence[tuple[int, int, int, int]]] = (),
    limits: tuple[Number, Number] | None = None,
    scale: str = "anomaly score",
    colormap: str = "viridis",
) -> Figure:
    """Draw one row per image, with image, mask (if passed), anomaly map and overlay.

    All maps share one colour scale, so that the colours of normal and defective images
    are comparable.

    Args:
        images: (rows, 3, H, W) or (rows, H, W, 3), RGB or grey, uint8 or float in [0,
            1].
        maps: (rows, h, w), raw; resized to the images.
        masks: (rows, H, W), True where the defect is.
        labels: one per row.
        boxes: one list of boxes (top, left, bottom, right) per row, half-open, in the
            image's pixels, drawn on image and overlay.
        limits: scores at the two ends of the colour scale; None for the minimum and
            maximum of maps.
        scale: label of the colour scale, with its unit.
        colormap: as in `heatmap`.

    Returns:
        the figure; its axes are in reading order, the colour scale's last.

    Raises:
        ValueError: if the numbers of rows differ, sizes of masks and images differ, or
            maps or limits are not finite.
    """
    rgb, maps = (
        _to_rgb(images, "images"),
        torch.as_tensor(maps).detach().float().cpu(),
    )
    if maps.ndim != 3 or rgb.ndim != 4 or len(maps) != len(rgb) or not len(maps):
        raise ValueError(
            f"images {rgb.shape} and maps {tuple(maps.shape)};"
            " expected (rows, 3, H, W) and (rows, h, w)"
        )
    size = rgb.shape[1:3]
    if masks is not None:
        masks = torch.as_tensor(masks).detach().cpu()
        if masks.shape != (len(maps), *size):
            raise ValueError(
                f"masks {tuple(masks.shape)};"
                f" expected {(len(maps), *size)}, one per image, of its size"
            )
    for name, values in (("labels", labels), ("boxes", boxes)):
        if len(values) not in (0, len(maps)):
            raise ValueError(
                f"{len(maps)} maps, but {name} {len(values)}; expected one per row"
            )
    low, high = (float(v) for v in (torch.aminmax(maps) if limits is None else limits))
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ValueError(
            f"colours from {low:g} to {high:g}; expected finite scores, the lower first"
        )
    high = high if high > low else low + 1  # constant maps
    heats = heatmap(((upsample(maps, size) - low) / (high - low)).clamp(0, 1), colormap)
    columns = {"image": rgb}
    columns |= {} if masks is None else {"mask": (masks != 0).float().numpy()}
    columns |= {"anomaly map": heats, "overlay": overlay(heats, rgb)}
    # Inches per panel; 0.9 are for labels and colour scale, and 6.4 is readable on a
    # phone.
    width = min(2.1, (6.4 - 0.9) / len(columns))
    inches = (width * len(columns) + 0.9, width * len(maps) * size[0] / size[1] + 0.4)
    fig, axes = plt.subplots(
        len(maps), len(columns), figsize=inches, squeeze=False, layout="constrained"
    )
    for row in range(len(maps)):
        for ax, (title, shown) in zip(axes[row], columns.items(), strict=True):
            drawn = boxes[row] if boxes and title in ("image", "overlay") else ()
            panel(ax, shown[row], title if row == 0 else "", drawn)
        if labels:
            axes[row, 0].set_ylabel(labels[row])
    colours = ListedColormap(heatmap(torch.linspace(0, 1, 256)[None], colormap)[0])
    fig.colorbar(
        ScalarMappable(Normalize(low, high), colours),
        ax=axes,
        label=scale,
        fraction=0.05,
    )
    return fig


def _to_rgb(image: Array, name: str) -> np.ndarray:
    """Convert an image or a batch to float32 (…, H, W, 3) in [0, 1]."""
    values = torch.as_tensor(image).detach().cpu()
    if values.dtype == torch.uint8:
        values = values.float() / 255
    elif not values.is_floating_point():
        raise ValueError(
            f"{name} of dtype {str(values.dtype).removeprefix('torch.')};"
            " expected uint8, or float in [0, 1]"
        )
    values = _in_range(
        values.float(),
        name,
        "divide 8-bit values by 255, and undo a network's normalisation",
    )
    return _channels_last(values, name).numpy()


def _channels_last(values: Tensor, name: str) -> Tensor:
    if values.ndim == 2:
        return values[..., None].expand(-1, -1, 3)
    last, first = (
        values.ndim in (3, 4) and values.shape[axis] in (1, 3) for axis in (-1, -3)
    )
    if last == first:
        what = (
            "the axis of the colours is ambiguous"
            if last
            else "expected (H, W, 3) or (3, H, W), alone or in batches"
        )
        raise ValueError(f"{name} of shape {tuple(values.shape)}; {what}")
    values = values if last else values.movedim(-3, -1)
    return values.expand(*values.shape[:-1], 3)


def _in_range(values: Tensor, name: str, advice: str) -> Tensor:
    low, high = (
        (float(v) for v in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    )
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # resizing rounds
        raise ValueError(
            f"{name} with values from {low:g} to {high:g}; expected [0, 1]: {advice}"
        )
    return values.clamp(0, 1)
