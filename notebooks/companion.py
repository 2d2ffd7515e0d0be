"""What the notebooks share beside paperlib: results of long runs, and drawings that only they need."""

import base64
import io
import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import Polygon
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

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
        known = ", ".join(sorted(file.name for file in RESULTS.glob("*_cells.*"))) or "none"
        raise ValueError(f"no result {name!r}; there are: {known}. Run `make results` in a clone of the book")
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
    ax: Axes, corner: tuple[float, float], size: tuple[int, int, int], color: str, cell: float = 1
) -> tuple[float, float]:
    """Draw a box of cells in oblique view, the way papers draw a stack of channels or a filter.

    Args:
        ax: axes with equal aspect; the caller hides its frame.
        corner: lower left corner of the front face.
        size: width, height and depth in cells; every cell of the three visible faces is outlined.
        color: of the front; the top and the side are paler.
        cell: side of a cell in the axes' units.

    Returns:
        the upper right corner of the drawing, for placing the next one.
    """
    (x, y), (width, height, depth) = corner, size
    right, up, back = (cell, 0), (0, cell), (0.45 * cell, 0.45 * cell)  # where one cell of each direction leads

    def face(origin, step1, n1, step2, n2, opacity):
        for i, j in itertools.product(range(n1), range(n2)):
            a = (origin[0] + i * step1[0] + j * step2[0], origin[1] + i * step1[1] + j * step2[1])
            b = (a[0] + step1[0], a[1] + step1[1])
            d = (a[0] + step2[0], a[1] + step2[1])
            c = (b[0] + step2[0], b[1] + step2[1])
            ax.add_patch(Polygon([a, b, c, d], facecolor=color, edgecolor="white", linewidth=0.6, alpha=opacity))

    face((x, y), right, width, up, height, 1.0)
    face((x, y + height * cell), right, width, back, depth, 0.75)
    face((x + width * cell, y), up, height, back, depth, 0.6)
    return x + (width + 0.45 * depth) * cell, y + (height + 0.45 * depth) * cell


def log_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers at the given places, and nowhere else.

    Args:
        axis: `ax.xaxis` or `ax.yaxis`, already logarithmic.
        ticks: where to put a label.
    """
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


class Slider:
    """A figure with sliders that needs no kernel and no network: every frame is drawn beforehand.

    Args:
        draw: called as `draw(ax, value, …)` with one value of each slider.
        axes: slider label → the values it takes, in order.
        describe: called with the same values; its text is the picture's alt text and stands under it.
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
            raise ValueError(f"{len(combinations)} frames; expected 1 to 60. Give fewer values")
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
            {"frames": self.frames, "texts": self.texts, "values": [[str(v) for v in vs] for vs in self.axes.values()]}
        ).replace("</", "<\\/")
        return (
            f'<figure class="paperlib-slider" id="{uid}">{controls}'
            f'<img src="{self.frames[0]}" alt="{escape(self.texts[0])}" style="max-width:100%;background:white">'
            f'<figcaption aria-live="polite">{escape(self.texts[0])}</figcaption></figure>'
            f'<script>(()=>{{const figure=document.getElementById("{uid}"),data={data};'
            'const inputs=[...figure.querySelectorAll("input")],outputs=figure.querySelectorAll("output");'
            "const show=()=>{let frame=0;"
            "inputs.forEach((input,i)=>{frame=frame*data.values[i].length+Number(input.value);"
            "outputs[i].textContent=data.values[i][input.value]});"
            'const picture=figure.querySelector("img");picture.src=data.frames[frame];picture.alt=data.texts[frame];'
            'figure.querySelector("figcaption").textContent=data.texts[frame]};'
            'inputs.forEach(input=>input.addEventListener("input",show))})()</script>'
        )


def _frame(draw: Callable[..., None], values: tuple, figsize: tuple[float, float], dpi: int) -> str:
    """Draw one frame as a data URL: a palette PNG where its colours are few, a JPEG where it holds a photograph."""
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
