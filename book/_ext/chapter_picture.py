"""`{chapter-picture}`: a light picture for the opening page, cut from a figure that a
notebook's last run drew.

    ```{chapter-picture} ../notebooks/02_cam.ipynb
    :below: The result first
    :columns: 0 66
    ```

It shows the first picture below the heading that begins so, described by that cell's
alt text, and leads to it. It is made anew when the notebook changes, so it can't show
what the notebook does not.
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
import numpy as np
from docutils import nodes
from docutils.parsers.rst import directives
from PIL import Image
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import atomic  # noqa: E402
from pictures import lighten  # noqa: E402

# Twice what a card has room for, so that it is sharp on a fine screen.
WIDTH, HEIGHT = 400, 320
WHITE = 240  # JPEG makes white a little grey between two photographs
REACH = 0.08  # how far from the given share a gap between panels may lie


def find(notebook: nbformat.NotebookNode, below: str) -> tuple[str, Image.Image, str]:
    """Find the first picture below a heading.

    Args:
        notebook: with outputs.
        below: how the heading begins.

    Returns:
        the heading in full, the picture, and its alt text.

    Raises:
        ValueError: if there is no such heading, or no picture with alt text before the
            next heading.
    """
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = [
                line.lstrip("# ")
                for line in cell.source.splitlines()
                if line.startswith("## ")
            ]
            if heading and found:
                break
            heading = next((line for line in found if line.startswith(below)), heading)
        elif heading:
            for output in cell.get("outputs", []):
                for kind, data in output.get("data", {}).items():
                    if kind in ("image/png", "image/jpeg"):
                        alt = (
                            cell.metadata.get("mystnb", {})
                            .get("image", {})
                            .get("alt", "")
                        )
                        if not alt:
                            raise ValueError(
                                f"the picture below {heading!r} has no alt text; give"
                                " its cell one"
                            )
                        return (
                            heading,
                            Image.open(io.BytesIO(base64.b64decode(data))).convert(
                                "RGB"
                            ),
                            alt,
                        )
    raise ValueError(
        f"no picture below a heading {below!r}…; name a heading `## …` with a figure of"
        " its own"
    )


def cut(
    picture: Image.Image, columns: tuple[float, float], rows: tuple[float, float]
) -> Image.Image:
    """Cut whole panels out of a figure and make them small.

    Args:
        picture: the figure, on white.
        columns: from and to, in per cent of the width; moved to the middle of the
            nearest white gap.
        rows: the same of the height.

    Raises:
        ValueError: if there is no gap near a place to cut at, as when the figure has
            another layout now.
    """
    white = np.asarray(picture).min(2) >= WHITE
    left, right = (_gap(white.all(0), share, "column") for share in columns)
    top, bottom = (_gap(white.all(1), share, "row") for share in rows)
    inside = ~white[top:bottom, left:right]
    (y0, y1), (x0, x1) = (np.flatnonzero(inside.any(axis))[[0, -1]] for axis in (1, 0))
    part = picture.crop((left + x0, top + y0, left + x1 + 1, top + y1 + 1))
    part.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return part


def _gap(white: np.ndarray, share: float, what: str) -> int:
    if share in (0, 100):
        return round(share / 100 * len(white))
    near = np.flatnonzero(white)
    near = near[np.abs(near / len(white) - share / 100) <= REACH]
    if not len(near):
        raise ValueError(
            f"no white {what} near {share:g} % of the figure; give the share at which"
            " panels part now"
        )
    # The middle of the run of white that lies nearest.
    runs = np.split(near, np.flatnonzero(np.diff(near) > 1) + 1)
    return int(
        np.mean(min(runs, key=lambda run: np.abs(run / len(white) - share / 100).min()))
    )


def _shares(text: str) -> tuple[float, float]:
    shares = tuple(float(part) for part in text.split())
    if len(shares) != 2 or not 0 <= shares[0] < shares[1] <= 100:
        raise ValueError(f"{text!r}; expected two per cents, like `0 66`")
    return shares


class ChapterPicture(SphinxDirective):
    """See above."""

    required_arguments = 1
    option_spec = {
        "below": directives.unchanged_required,
        "columns": _shares,
        "rows": _shares,
    }

    def run(self) -> list[nodes.Node]:
        relative, source = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(relative)
        whole = (0, 100)
        try:
            heading, picture, alt = find(
                nbformat.read(source, as_version=4), self.options["below"]
            )
            part = cut(
                picture,
                self.options.get("columns", whole),
                self.options.get("rows", whole),
            )
        except (OSError, ValueError) as error:
            raise self.error(f"chapter-picture {self.arguments[0]}: {error}") from error
        drawn = io.BytesIO()
        part.save(drawn, "PNG")
        kind, light = lighten(drawn.getvalue())
        # Inside the build's folder, beside the pictures that myst-nb takes out of
        # notebooks.
        folder = Path(self.env.app.outdir).parent / "chapter_pictures"
        folder.mkdir(exist_ok=True)
        target = folder / f"{Path(source).stem}.{kind.partition('/')[2]}"
        if not target.exists() or target.read_bytes() != light:
            atomic.write_bytes(target, light)
        # The build's folder may lie outside the sources, as that of `make student-book`
        # does.
        below_sources = Path(os.path.relpath(target, self.env.srcdir)).as_posix()
        image = nodes.image(uri=f"/{below_sources}", alt=f"From a figure: {alt}")
        image["width"], image["height"] = (f"{side}px" for side in part.size)
        page = Path(relative).with_suffix(".html")
        link = nodes.reference(
            "",
            "",
            image,
            refuri=f"../{page.as_posix()}#{nodes.make_id(heading)}",
            internal=True,
        )
        return [
            nodes.container(
                "", nodes.paragraph("", "", link), classes=["chapter-picture"]
            )
        ]


def setup(app: Sphinx) -> dict:
    app.add_directive("chapter-picture", ChapterPicture)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
