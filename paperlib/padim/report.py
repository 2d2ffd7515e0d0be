"""Inspect files into a folder: tables, overlays at original size, and a gallery.

The gallery, index.html, is one file that works offline. Its texts are in report.html.
"""

import base64
import html
import json
import math
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import nn
from tqdm.auto import tqdm

from paperlib.anomaly_map import Box
from paperlib.image_files import read_image
from paperlib.padim.inspection import (
    Inspected,
    Inspection,
    Size,
    check_ready,
    inspect_batches,
    margins,
    resized_size,
)
from paperlib.storage import (
    atomic_path,
    csv_writer,
    file_version,
    fingerprint,
    open_csv,
    read_csv,
    write_csv,
    write_text,
)

# The fingerprint comes last, so that a row that a killed run cut off has none.
COLUMNS = "path score alarm top left height width error fingerprint".split()
THUMBNAIL = 180  # pixels of the longer side
# Viridis, as a path of colours with increasing lightness: readable in grey, and with
# colour blindness.
COLOURS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
OPACITY = 0.7  # of the heat map where it is most opaque
# Grey levels of a heat map: the first above the threshold, and the last.
ABOVE, TOP = 128, 255


def inspect_files(
    detector: nn.Module,
    paths: Sequence[Path],
    out: Path,
    *,
    model: str = "",
    pictures: bool = True,
    batch_size: int = 32,
    threads: int = 2,
    progress: bool = False,
    fresh: bool = False,
) -> list[Inspection]:
    """Inspect files, and write results.csv, results.json, overlays and index.html.

    Each batch's rows are appended to results.csv when its pictures are written. A row
    that is stored is reused, and that is said on standard error, if the model is the
    same and the file's size and time have not changed. At the end results.csv holds one
    row per path, in the order of `paths`; rows of other files are removed.

    Args:
        detector: a fitted PaDiM with a threshold.
        paths: of the image files.
        out: folder to write into. Simultaneous runs need different folders.
        model: identifies the detector, for example by a digest of its file.
        pictures: whether to write overlays and the gallery.
        batch_size: images per batch.
        threads: that read images and draw.
        progress: whether to show a progress bar.
        fresh: whether to inspect again what is stored.

    Raises:
        ValueError: as `PaDiM.inspect`, and for a results.csv of another kind.
        FileExistsError: if `out` is a file.
    """
    check_ready(detector)
    for folder in (out, *([out / "overlays", out / "thumbnails"] if pictures else [])):
        folder.mkdir(parents=True, exist_ok=True)
    table = out / "results.csv"
    keys = {str(path): fingerprint(model, *file_version(path)) for path in paths}
    done = {
        result.path: result
        for result, key in read_rows(table)
        if key == keys.get(result.path)
        and not (fresh or result.error)
        and (not pictures or all(x.is_file() for x in _picture_files(out, result.path)))
    }
    if done:
        print(
            f"{len(done)} of {len(paths)} rows reused from {table}, their files are"
            " unchanged; --fresh (fresh=True) inspects them again",
            file=sys.stderr,
        )

    def to_rows(results: Iterable[Inspection]) -> list[dict[str, Any]]:
        return [
            _to_row(result)
            | {"alarm": _BOOLEANS[result.alarm], "fingerprint": keys[result.path]}
            for result in results
        ]

    write_csv(table, COLUMNS, to_rows(done.values()))
    remaining = [path for path in paths if str(path) not in done]
    draw = partial(_write_pictures, detector, out)
    with (
        open_csv(table, "a") as file,
        ThreadPoolExecutor(threads) as pool,
        tqdm(
            None, "inspect", len(remaining), unit="image", disable=not progress
        ) as bar,
    ):
        for part in inspect_batches(detector, remaining, batch_size, threads):
            if pictures:
                list(pool.map(draw, part))
            results = [inspected.inspection for inspected in part]
            csv_writer(file, COLUMNS).writerows(to_rows(results))
            file.flush()
            done |= {result.path: result for result in results}
            bar.update(len(part))
    results = [done[path] for path in keys]
    write_csv(table, COLUMNS, to_rows(results))
    write_text(out / "results.json", to_json(results, detector.threshold))
    if pictures:
        write_gallery(out, results, detector)
    return results


def read_rows(path: Path) -> list[tuple[Inspection, str]]:
    """Read inspections and their fingerprints from results.csv; [] without a file.

    Raises:
        UnusableFile: naming the file, if it is another kind of file.
    """
    rows = read_csv(path, COLUMNS, _from_row, "inspections", strict=False)
    return [row for row in rows if row is not None]


def to_json(results: Sequence[Inspection], threshold: float) -> str:
    """Write results as JSON: the threshold, and one object per image."""
    images = [_to_row(result) for result in results]
    return json.dumps({"threshold": threshold, "images": images}, indent=1) + "\n"


def summary(results: Sequence[Inspection]) -> str:
    """Count the images, the alarms and the unreadable files in one sentence."""
    n, alarms = len(results), sum(bool(result.alarm) for result in results)
    unreadable = sum(bool(result.error) for result in results)
    return (
        f"{n} image{'s' * (n != 1)}: {alarms} alarm{'s' * (alarms != 1)}"
        + f", {unreadable} can't be read" * (unreadable > 0)
    )


def overlay(
    image: Image.Image,
    map: Float[np.ndarray, "h w"],
    threshold: float,
    resized: Size,
    region: Box | None = None,
) -> Image.Image:
    """Draw an anomaly map over its image, with the outline of what exceeds a threshold.

    Colours are comparable between images: the scale extends from half of the threshold
    to one and a half times the threshold. The higher the map, the more opaque it is.

    Args:
        image: RGB, of any size.
        map: (h, w), not negative.
        threshold: of the outline.
        resized: height and width to which the image was resized for the map; a crop of
            these at the centre has the size of the map.
        region: outlined if the map's region is too small to be seen in the image.
    """
    share = map / max(threshold, 1e-12) - 0.5  # 0.5 at the threshold
    levels = np.clip(np.ceil(TOP * share - 0.5), 0, TOP)
    canvas = Image.new("L", resized[::-1])
    canvas.paste(
        Image.fromarray(levels.astype(np.uint8)), margins(resized, map.shape)[::-1]
    )
    heat = canvas.resize(image.size, Image.Resampling.BILINEAR)
    alpha = heat.point([round(OPACITY * v * v / TOP) for v in range(256)])
    drawn = Image.composite(_colour(heat), image, alpha)
    is_above = heat.point([TOP * (v >= ABOVE) for v in range(256)])
    if region is not None and is_above.getbbox() is None:
        box = (region.left, region.top, region.right - 1, region.bottom - 1)
        ImageDraw.Draw(is_above).rectangle(box, fill=TOP)
    # Two lines, so that one of them is visible on any ground.
    width = max(1, round(max(image.size) / 200))
    for colour, radius in (("black", 2 * width), ("white", width)):
        inner = is_above.filter(ImageFilter.BoxBlur(radius))
        inner = inner.point([TOP * (v == TOP) for v in range(256)])
        drawn.paste(colour, mask=ImageChops.subtract(is_above, inner))
    return drawn


def write_gallery(
    out: Path, results: Sequence[Inspection], detector: nn.Module
) -> None:
    """Write index.html with all thumbnails: unreadable files first, then by score."""
    text = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    head, image, error, foot = map(Template, text.split("<!-- part -->\n"))
    scores = [math.inf if x.score is None else x.score for x in results]
    in_order = sorted(range(len(results)), key=lambda number: -scores[number])
    with (
        atomic_path(out / "index.html") as temporary,
        temporary.open("w", encoding="utf-8", errors="replace") as file,
    ):
        facts = {
            "summary": summary(results),
            "threshold": f"{detector.threshold:.4g}",
            "count": detector.count,
        }
        file.write(head.substitute(facts))
        for number in in_order:
            result = results[number]
            values = {
                "number": number,
                "score": result.score,
                "path": html.escape(result.path),
                "error": html.escape(result.error),
            }
            if not result.error:
                original, drawn, full = _picture_files(out, result.path)
                box = result.region
                values |= {
                    "kind": "alarm" if result.alarm else "normal",
                    "verdict": "Alarm" if result.alarm else "No alarm",
                    "shown": f"{result.score:.4g}",
                    "region": f"{box.bottom - box.top} pixels high and"
                    f" {box.right - box.left} wide, at row {box.top},"
                    f" column {box.left}",
                    "original": _to_base64(original),
                    "overlay": _to_base64(drawn),
                    "link": quote(f"overlays/{full.name}"),
                }
            file.write((error if result.error else image).substitute(values))
        file.write(foot.substitute())


# ---- rows ----


def _to_row(result: Inspection) -> dict[str, Any]:
    box = result.region
    sides = (
        (box.top, box.left, box.bottom - box.top, box.right - box.left)
        if box
        else (None,) * 4
    )
    values = (result.path, result.score, result.alarm, *sides, result.error)
    return dict(zip(COLUMNS, values, strict=False))


_BOOLEANS = {True: "true", False: "false", None: ""}


def _from_row(row: dict[str, str]) -> tuple[Inspection, str] | None:
    """Return a row's inspection and fingerprint; None for one that was cut off."""
    path, key = row["path"], row["fingerprint"]
    if not key:  # the last row of a killed run
        return None
    if row["error"]:
        return Inspection(path, error=row["error"]), key
    top, left, height, width = (int(row[name]) for name in COLUMNS[3:7])
    region = Box(top, left, top + height, left + width)
    return Inspection(path, float(row["score"]), row["alarm"] == "true", region), key


# ---- pictures ----


def _picture_files(out: Path, path: str) -> tuple[Path, Path, Path]:
    """Return the files of both thumbnails and of the overlay.

    A digest of the path keeps the names of nested folders apart.
    """
    name = f"{Path(path).stem[:60]}-{fingerprint(ascii(path))}"
    name = name.encode(errors="replace").decode()
    folder = out / "thumbnails"
    return (
        folder / f"{name}.jpg",
        folder / f"{name}-overlay.jpg",
        out / "overlays" / f"{name}.jpg",
    )


def _write_pictures(detector: nn.Module, out: Path, inspected: Inspected) -> None:
    inspection, map = inspected
    if map is None:
        return
    # Read again: to keep the originals of a batch would take gigabytes.
    image = read_image(inspection.path, detector.transform.bits)
    drawn = overlay(
        image,
        map,
        detector.threshold,
        resized_size(detector),
        inspection.region if inspection.alarm else None,
    )
    original, small, full = _picture_files(out, inspection.path)
    drawn.save(full, quality=90)
    for picture, path in ((image, original), (drawn, small)):
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(path, quality=70)


def _colour(levels: Image.Image) -> Image.Image:
    """Colour grey levels: RGB."""
    stops = np.array([[*bytes.fromhex(colour)] for colour in COLOURS.split()])
    where = np.linspace(0, 255, len(stops))
    channels = (
        np.interp(np.arange(256), where, channel).round().astype(int).tolist()
        for channel in stops.T
    )
    return Image.merge("RGB", [levels.point(channel) for channel in channels])


def _to_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
