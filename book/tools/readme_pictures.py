"""Make the pictures of README: a result, a part of a page, and a part of a report.

    python book/tools/readme_pictures.py FOLDER

The result and the page are cut out of the built book; the report is that of the two
commands on the page "From a folder to an inspection", run on its solar cells. Needs
Chromium. A picture that still looks the same is not written again.
"""

import argparse
import io
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from paperlib.storage import atomic_path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "book"))
from browser import Browser, chromium, driver, launched, stop_transitions  # noqa: E402
from built import HTML, why_not_built  # noqa: E402

FOLDER = ROOT / ".github" / "pictures"
MOST_BYTES = 300_000  # all pictures together
COLUMN = 830  # CSS pixels of README's column on GitHub
SCALE = 2  # pixels per CSS pixel, so that text is sharp on dense screens
MARGIN, LINE = 12, "#b8b8b8"  # a line separates white pictures from a white page
BAR = 100  # CSS pixels, more than the bar at the top of a page
QUALITY = 80  # of WebP
# Levels of 256 by which a pixel may differ, for example after another rounding.
INVISIBLE = 32
BLOCK = re.compile(r"^```(?:python|sh)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Picture:
    """A rectangle of a page.

    Fields:
        page: path of the page in its folder.
        width: of the window, in CSS pixels.
        parts: CSS selectors; the rectangle contains all elements that they match.
    """

    page: str
    width: int
    parts: tuple[str, ...]


# At 1,280 pixels, the five images of the figure stand in one row of 825.
_SECTION = "#learning-mean-and-covariance-per-position"
OF_BOOK = {
    "result": Picture("book/index.html", 1280, ("#front-hero svg",)),
    "page": Picture(
        "book/05_padim.html",
        COLUMN,
        (f"{_SECTION} > p:has(+ .math)", f"{_SECTION} > ul"),
    ),
}
OF_REPORT = {"report": Picture("index.html", COLUMN, ("h1", "li:nth-child(-n+2)"))}


def example() -> tuple[str, list[list[str]]]:
    """Read the example of the page on inspection: the code that writes the folders of
    images, and the arguments of its commands after `python`.
    """
    text = (ROOT / "book" / "inspection.md").read_text(encoding="utf-8")
    code, commands = BLOCK.findall(text)[:2]
    return code, [shlex.split(line)[1:] for line in commands.splitlines()]


def write_report(folder: Path) -> Path:
    """Run the example in `folder`; return the folder of its report."""
    code, commands = example()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in (["-c", code], *commands):
        subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, check=True
        )
    return folder / "report"


def _rectangle(page, picture: Picture) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the picture in the window."""
    boxes = []
    for part in picture.parts:
        matched = [element.bounding_box() for element in page.locator(part).all()]
        if not matched:
            raise ValueError(
                f"{picture.page} has no element {part!r}; correct the selector"
            )
        boxes += matched
    left, top = (min(box[side] for box in boxes) - MARGIN for side in "xy")
    right = max(box["x"] + box["width"] for box in boxes) + MARGIN
    bottom = max(box["y"] + box["height"] for box in boxes) + MARGIN
    return left, top, right - left, bottom - top


def photograph(browser: Browser, picture: Picture) -> Image.Image:
    """Cut the picture out of its page.

    Raises:
        ValueError: if a selector matches nothing, or the page has errors.
    """
    with browser.page(picture.page, picture.width) as page:
        stop_transitions(page)
        # In view, and below the bar at the top of the book's pages: a screenshot of
        # what is out of view changes the layout.
        _, top, _, height = _rectangle(page, picture)
        space = {"width": picture.width, "height": math.ceil(height) + 2 * BAR}
        page.set_viewport_size(space)
        page.evaluate("y => window.scrollTo(0, y)", top - BAR)
        values = _rectangle(page, picture)
        clip = dict(zip(("x", "y", "width", "height"), values, strict=True))
        png = page.screenshot(clip=clip)
        if browser.complaints:
            raise ValueError(f"{picture.page}: {'; '.join(browser.complaints)}")
    return ImageOps.expand(Image.open(io.BytesIO(png)).convert("RGB"), SCALE, LINE)


def write(path: Path, picture: Image.Image) -> bool:
    """Write the picture as WebP, unless the file looks like it already; return whether
    it was written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=6)
    if path.exists() and looks_the_same(path, buffer):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return True


def looks_the_same(first: Path | io.BytesIO, second: Path | io.BytesIO) -> bool:
    """Return whether no pixel of two pictures differs visibly."""
    a, b = (np.asarray(Image.open(x).convert("RGB"), int) for x in (first, second))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= INVISIBLE)


def check_weight(folder: Path) -> int:
    """Return the bytes of all pictures.

    Raises:
        ValueError: if they weigh too much.
    """
    weight = sum(path.stat().st_size for path in folder.glob("*.webp"))
    if weight > MOST_BYTES:
        raise ValueError(
            f"the pictures in {folder} weigh {weight:,} bytes; expected at most"
            f" {MOST_BYTES:,}. Lower QUALITY, or choose smaller parts"
        )
    return weight


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args(arguments).folder
    try:
        if problem := why_not_built():
            raise ValueError(problem)
        if not chromium():
            raise ValueError("no chromium was found; install it, or set CHROMIUM=PATH")
        with tempfile.TemporaryDirectory() as temporary, driver() as started:
            report = write_report(Path(temporary))
            for pages, pictures in ((HTML, OF_BOOK), (report, OF_REPORT)):
                with launched(started, pages, SCALE) as browser:
                    for name, picture in pictures.items():
                        path = folder / f"{name}.webp"
                        written = write(path, photograph(browser, picture))
                        print(path, "written" if written else "looks the same")
        print(f"{check_weight(folder):,} bytes together")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
