"""Figures of images and maps, in one style, readable with colour blindness.

Example:
    >>> import torch
    >>> from paperlib import viz
    >>> from skimage.data import brick  # a photograph, 512×512, grey
    >>> viz.use_style()  # matplotlib's defaults of the book
    >>> image = torch.from_numpy(brick())[:, :, None]
    >>> scores = torch.rand(56, 56)  # an anomaly map in [0, 1]
    >>> viz.overlay(viz.heatmap(scores, size=512), image).shape
    (512, 512, 3)
    >>> figure = viz.anomaly_figure(image[None], scores[None], labels=["brick"])
    >>> figure.savefig("brick.png")
"""

from collections.abc import Mapping, Sequence

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
from paperlib.validation import (
    as_tensor,
    channels_first,
    check_choice,
    check_finite,
    check_iterable,
    check_number,
    rgb_batch,
)

Array = Tensor | np.ndarray

# Okabe and Ito's colours: distinguishable with all common forms of colour blindness,
# and different greys in print.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GREY = "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F"


def use_style() -> None:
    """Set matplotlib's defaults for the book, readable at the width of a phone.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> from paperlib.viz import use_style
        >>> with plt.rc_context():  # restores the previous defaults
        ...     use_style()
        ...     plt.rcParams["font.size"], plt.rcParams["lines.linewidth"]
        (12.0, 2.0)
    """
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
    values = as_tensor(map, "map").detach().float().cpu()
    if values.ndim < 2 or not values.numel():
        raise ValueError(f"map of shape {tuple(values.shape)}; expected (h, w)")
    if colormap not in plt.colormaps():
        raise ValueError(f"colormap={colormap!r:.80}; expected one of plt.colormaps()")
    low, high = (float(value) for value in torch.aminmax(values))
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # resizing rounds
        raise ValueError(
            f"map with values from {low:g} to {high:g}; expected [0, 1]:"
            " scale it with anomaly_map.minmax(map)"
        )
    if size is not None:
        values = upsample(values, size)
    rgba = plt.get_cmap(colormap)(values.clamp(0, 1).numpy())
    return np.float32(rgba[..., :3])


def overlay(
    heat: Array, image: Array, weights: tuple[float, float] = (0.5, 0.5)
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
    check_iterable(weights, "two weights")
    weights = tuple(weights)
    check_choice("number of weights", len(weights), (2,))
    for weight in weights:
        check_number(f"weights={weights!r:.80}, weight", weight, "a share", least=0)
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
    gradient = as_tensor(gradient, "gradient").detach().double().cpu()
    values = _batch(gradient)
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
        ax.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=color,
                linewidth=2,
            )
        )


def anomaly_figure(
    images: Array,
    maps: Array,
    masks: Array | None = None,
    *,
    labels: Sequence[str] = (),
    scale: str = "anomaly score",
) -> Figure:
    """Draw one row per image, with image, mask (if passed), anomaly map and overlay.

    All maps share one colour scale, from their minimum to their maximum, so that the
    colours of normal and defective images are comparable.

    Args:
        images: (rows, 3, H, W) or (rows, H, W, 3), RGB or grey, uint8 or float in [0,
            1].
        maps: (rows, h, w), raw; resized to the images.
        masks: (rows, H, W), True where the defect is.
        labels: one per row.
        scale: label of the colour scale, with its unit.

    Returns:
        the figure; its axes are in reading order, the colour scale's last.

    Raises:
        ValueError: if the numbers of rows differ, sizes of masks and images differ, or
            maps are not finite.
    """
    rgb = _to_rgb(images, "images")
    maps = as_tensor(maps, "maps").detach().float().cpu()
    check_iterable(labels, "one label per row")
    labels = [*labels]
    columns = {"image": rgb}
    if masks is not None:
        columns["mask"] = np.float32(as_tensor(masks, "masks").detach().cpu() != 0)
    shapes = {name: batch.shape for name, batch in columns.items()}
    if not (
        rgb.ndim == 4
        and all(shape[:3] == rgb.shape[:3] for shape in shapes.values())
        and maps.ndim == 3
        and maps.numel()
        and len(maps) == len(rgb)
        and len(labels) in (0, len(rgb))
    ):
        raise ValueError(
            f"shapes {shapes}, maps {tuple(maps.shape)} and {len(labels)} labels;"
            " expected images (rows, H, W, 3), masks (rows, H, W), maps (rows, h, w),"
            " and one label per row or none"
        )
    check_finite(maps, "maps")
    low, high = (value.item() for value in torch.aminmax(maps))
    high = high if high > low else low + 1  # constant maps
    scaled = (upsample(maps, rgb.shape[1:3]) - low) / (high - low)
    heats = heatmap(scaled.clamp(0, 1))
    columns |= {"anomaly map": heats, "overlay": overlay(heats, rgb)}
    fig, axes = _panel_grid(columns)
    for ax, label in zip(axes[:, 0], labels, strict=False):
        ax.set_ylabel(label)
    colours = ScalarMappable(Normalize(low, high), "viridis")
    fig.colorbar(colours, ax=axes, label=scale, fraction=0.05)
    return fig


def _panel_grid(columns: Mapping[str, np.ndarray]) -> tuple[Figure, np.ndarray]:
    """Draw one column of panels per batch of images, with its title above the first."""
    n_rows, height, width = columns["image"].shape[:3]
    # Inches per panel; 0.9 are for labels and colour scale, and 6.4 is readable on a
    # phone.
    side = min(2.1, (6.4 - 0.9) / len(columns))
    inches = (side * len(columns) + 0.9, side * n_rows * height / width + 0.4)
    fig, axes = plt.subplots(
        n_rows, len(columns), figsize=inches, squeeze=False, layout="constrained"
    )
    for column, (title, images) in zip(axes.T, columns.items(), strict=True):
        for ax, image in zip(column, images, strict=True):
            panel(ax, image, "" if ax is not column[0] else title)
    return fig, axes


def _to_rgb(image: Array, name: str) -> np.ndarray:
    """Convert an image or a batch to float32 (…, H, W, 3) in [0, 1]."""
    image = as_tensor(image, name).detach().cpu()
    rgb = rgb_batch(_batch(image), name)
    return _channels_last(rgb.clamp(0, 1), image)


def _batch(image: Tensor) -> Tensor:
    """Add a batch axis to a single image."""
    return image if image.ndim == 4 else image[None]


def _channels_last(batch: Tensor, image: Tensor) -> np.ndarray:
    """Return a batch as float32 arrays, without the axis that `_batch` added."""
    values = batch.movedim(1, -1).float().numpy()
    return values if image.ndim == 4 else values[0]
