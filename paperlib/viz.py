"""Figures of images and maps, in one style, readable with colour blindness."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from paperlib.anomaly_map import upsample
from paperlib.validation import channels_first, check_finite, rgb_batch

Array = Tensor | np.ndarray
Number = float  # the type checks in the tests reject int for float

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
            "jet" is the papers'; it shows edges where the map has none.
        size: height and width to resize to first, bilinearly; one number for a square.

    Returns:
        float32 (…, H, W, 3), RGB in [0, 1].

    Raises:
        ValueError: for values outside [0, 1] or an unknown colormap.
    """
    values = torch.as_tensor(map).detach().float().cpu()
    if values.ndim < 2:
        raise ValueError(f"map of shape {tuple(values.shape)}; expected (h, w)")
    low, high = (float(value) for value in torch.aminmax(values))
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # resizing rounds
        raise ValueError(
            f"map with values from {low:g} to {high:g}; expected [0, 1]:"
            " scale it with anomaly_map.minmax(map)"
        )
    if size is not None:
        values = upsample(values, size)
    colours = plt.get_cmap(colormap)(values.clamp(0, 1).numpy())
    return np.float32(colours[..., :3])


def overlay(
    heat: Array, image: Array, weights: tuple[Number, Number] = (0.5, 0.5)
) -> np.ndarray:
    """Blend a heat map with its image.

    Args:
        heat: from `heatmap`, at the image's size.
        image: RGB or grey, uint8 or float in [0, 1], (H, W, 3) or (3, H, W), also in
            batches.
        weights: of heat map and image. A sum above 1 is clipped; common scripts use
            (0.7, 0.5).

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
    return np.float32(np.clip(weights[0] * heat + weights[1] * image, 0, 1))


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
    values = _batch(torch.as_tensor(gradient).detach().double().cpu())
    values = channels_first(values, "gradient").expand(-1, 3, -1, -1)
    check_finite(values, "gradients")
    deviation, mean = torch.std_mean(values, (1, 2, 3), correction=0, keepdim=True)
    # A constant gradient is 0 after its mean is subtracted.
    scaled = 0.1 * (values - mean) / torch.where(deviation > 0, deviation, 1)
    return _channels_last((scaled + 0.5).clamp(0, 1), gradient)


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
    fig.colorbar(
        ScalarMappable(Normalize(low, high), colormap),
        ax=axes,
        label=scale,
        fraction=0.05,
    )
    return fig


def _to_rgb(image: Array, name: str) -> np.ndarray:
    """Convert an image or a batch to float32 (…, H, W, 3) in [0, 1]."""
    rgb = rgb_batch(_batch(torch.as_tensor(image).detach().cpu()), name)
    return _channels_last(rgb.clamp(0, 1), image)


def _batch(image: Tensor) -> Tensor:
    """Add a batch axis to a single image."""
    return image if image.ndim == 4 else image[None]


def _channels_last(batch: Tensor, image: Array) -> np.ndarray:
    """Return a batch as float32 arrays, without the axis that `_batch` added."""
    values = np.float32(batch.movedim(1, -1).numpy())
    return values if image.ndim == 4 else values[0]
