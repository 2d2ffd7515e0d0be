"""What the figures of the paper pages share: colours that follow the page, and saving.

A figure is saved as SVG and set into the page itself, not as an image file, so that its
lines and letters take the page's colours, in light and in dark.
"""

import base64
import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from pictures import lighten

from paperlib import viz
from paperlib.storage import write_text

# Stand-ins for colours of the page, replaced when a figure is saved.
INK, MUTED, FILL, PAPER = "#010101", "#020202", "#030303", "#040404"
PAGE_COLOURS = {
    INK: "currentColor",
    MUTED: "var(--pst-color-text-muted)",
    FILL: "var(--pst-color-surface)",
    PAPER: "var(--pst-color-background)",
}
# Readable with colour blindness and visible on white and on black; for text, use INK.
BLUE, ORANGE, GREEN, PURPLE = "#3A8FD0", "#E69F00", "#009E73", "#CC79A7"
VERMILION, GREY = "#D9652A", "#8A8A8A"

WIDEST = 5.2  # inches: a phone shows them at 350 px
SMALLEST = 10  # points: 9.4 px on that phone
DOTS = 150  # per inch, of images inside a figure
PIXELS_PER_INCH = 105  # on a wide screen

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": DOTS,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "axes.grid": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "path",
}


def use_style() -> None:
    """Set matplotlib's defaults for the figures of the pages."""
    viz.use_style()
    plt.rcParams.update(STYLE)


def blank(ax: Axes) -> Axes:
    """Remove the frame and ticks of axes, as for a diagram or an image."""
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def arrow(ax: Axes, start: tuple, end: tuple, colour: str = INK, **style) -> None:
    """Draw an arrow from `start` to `end`, both in data coordinates."""
    line = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkA": 2, "shrinkB": 2}
    ax.annotate("", end, start, arrowprops=line | style)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG that takes the page's colours.

    Args:
        figure: at most `WIDEST` inches wide, no text below `SMALLEST` points.
        name: a word that is unique on the page; identifiers in the SVG begin with it.

    Raises:
        ValueError: if the figure would not be readable on a phone.
    """
    width, height = figure.get_size_inches()
    if width > WIDEST:
        raise ValueError(f"{name}: {width} inches wide; expected at most {WIDEST}")
    for text in figure.findobj(Text):
        size = text.get_fontsize()
        if text.get_text().strip() and text.get_visible() and size < SMALLEST:
            raise ValueError(
                f"{name}: {text.get_text()!r} has {size} points; expected {SMALLEST}"
                " or more"
            )
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style sheet inside the SVG would hold for the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r' d="[^"]*"', lambda path: _rounded(path[0]), text)
    text = re.sub(r"data:image/png;base64,([^\"]+)", _lighter, text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    # The size is the page's business; the viewBox keeps the proportions.
    head = (
        f'<svg viewBox="0 0 {72 * width:g} {72 * height:g}" aria-hidden="true"'
        f' style="width: {PIXELS_PER_INCH * width:.0f}px; stroke-linejoin: round"'
        ' xmlns="http://www.w3.org/2000/svg"'
        ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return re.sub(r"[ \t]*\n\s*", "\n", head + text[text.index(">") + 1 :])


def _rounded(path: str) -> str:
    """Cut coordinates after a hundredth of a point."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path)


def _lighter(match: re.Match) -> str:
    kind, data = lighten(base64.b64decode(match[1]))
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def save(figures: list[Figure], folder: Path, name: str) -> None:
    """Save the parts of one figure as NAME-1.svg, NAME-2.svg, …; remove others of it.

    Args:
        figures: stand side by side on a wide page and below each other on a phone.
        folder: exists.
        name: letters, digits and underscores.
    """
    texts = [svg(figure, f"{name}-{i}") for i, figure in enumerate(figures, 1)]
    for old in folder.glob(f"{name}-*.svg"):
        old.unlink()
    for i, text in enumerate(texts, 1):
        write_text(folder / f"{name}-{i}.svg", text)
