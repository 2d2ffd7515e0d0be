"""Write the tables and curves that book/speed.md includes, into book/speed_parts.

The measurements are in book/data/speed.json (CPU, written by `make bench`) and
speed_gpu.json (GPU, written by `make test-gpu`). The folder is not committed; its files
are rewritten when the measurements change.
"""

import inspect
import json
import statistics
import sys
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "tools")]
from paperlib.storage import write_text  # noqa: E402
from paperlib.viz import BLUE, VERMILION, use_style  # noqa: E402

FOLDER = Path("book/speed_parts")
OURS, COMMON = "paperlib", "the common implementation"
TITLES = {
    "complexity": "Counting",
    "gradcam": "CAM and Grad-CAM",
    "metrics": "Metrics",
    "padim": "PaDiM",
    "pipeline": "Backbones and image reading",
    "patch_svdd": "Patch SVDD",
}
COLUMNS = (
    "Implementation",
    "CPU ms",
    "wall ms",
    "relative time",
    "peak MiB",
    "relative difference",
)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with three significant digits and without an exponent."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:g}"


def is_peer(row: dict) -> bool:
    """Return whether a row is another implementation of the part's task."""
    return row["contender"] != OURS and "no peer" not in row["note"]


def parts(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Group rows by benchmark and part, in their order."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["bench"], row["part"]), []).append(row)
    return groups


def comparisons(rows: list[dict]) -> list[tuple[str, dict | None, dict | None]]:
    """List the tasks that have peers: the common implementation, the fastest peer."""
    found = []
    for part in parts(rows).values():
        peers = [row for row in part if is_peer(row) and row["contender"] != COMMON]
        common = next((row for row in part if row["contender"] == COMMON), None)
        fastest = min(peers, key=lambda row: row["ratio"], default=None)
        if common or fastest:
            found.append((part[0]["what"], common, fastest))
    return found


def lead(rows: list[dict]) -> str:
    """Write three sentences that the ratios support."""
    tasks = comparisons(rows)
    commons = [common["ratio"] for _, common, _ in tasks if common]
    peers = [peer for _, _, peer in tasks if peer]
    slower = [row for row in peers if row["ratio_high"] < 1]
    level = [row for row in peers if row["ratio_low"] <= 1.1 and row not in slower]
    faster = len(peers) - len(slower) - len(level)
    beaten = (
        f" and slower in {len(slower)}"
        f" ({', '.join(row['contender'] for row in slower)})"
        if slower
        else " and slower in none"
    )
    n_faster = sum(ratio > 1 for ratio in commons)
    common, peer = (
        statistics.median(commons),
        statistics.median(row["ratio"] for row in peers),
    )
    return (
        "`paperlib` takes less time than the common implementation in"
        f" {n_faster} of {len(commons)} tasks; at the median the common implementation"
        f" takes {number(common)} times as long. Against the fastest other library it"
        f" is faster in {faster} of {len(peers)} tasks, about equal in"
        f" {len(level)}{beaten}. At the median that library takes {number(peer)} times"
        " as long.\n"
    )


def summary(rows: list[dict]) -> str:
    """Write the table of relative times: one row per part."""
    lines = [
        "| Task | common implementation | fastest peer |",
        "|---|---|---|",
    ]
    for what, common, fastest in comparisons(rows):
        cells = [_ratio(row) if row else "–" for row in (common, fastest)]
        cells[1] += f", {fastest['contender']}" if fastest else ""
        lines.append(f"| {what} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _ratio(row: dict) -> str:
    low, high = number(row["ratio_low"]), number(row["ratio_high"])
    return f"{number(row['ratio'])}× ({low} to {high})"


def tables(rows: list[dict], machine: dict, gpu: dict | None) -> str:
    """Write a section per benchmark with a table per part."""
    gpu_rows = (
        {(row["bench"], row["part"], row["contender"]): row for row in gpu["rows"]}
        if gpu
        else {}
    )
    columns, text = (*COLUMNS, *["GPU ms"] * bool(gpu)), []
    for bench, title in TITLES.items():
        section = {key: part for key, part in parts(rows).items() if key[0] == bench}
        if not section:
            continue
        text += [f":::{{dropdown}} {title}\n"]
        for key, part in section.items():
            row = part[0]
            floor = max(
                row["macs"] / machine["macs_per_second"],
                row["bytes"] / machine["bytes_per_second"],
            )
            bound = f" Floor: {number(1e3 * floor)} ms." if floor else ""
            text += [
                f"**{part[0]['what']}.**{bound}\n",
                f"| {' | '.join(columns)} |",
                "|---" * len(columns) + "|",
            ]
            for row in part:
                gpu_row = gpu_rows.get((*key, row["contender"]))
                cells = [
                    row["contender"],
                    number(1e3 * row["cpu"]),
                    (
                        f"{number(1e3 * row['wall_low'])} to"
                        f" {number(1e3 * row['wall_high'])}"
                    ),
                    (
                        f"{number(row['ratio'])} ({number(row['ratio_low'])} to"
                        f" {number(row['ratio_high'])})"
                    ),
                    number(row["peak"]),
                    (
                        "–"
                        if row["difference"] is None
                        else f"{row['difference']:.0e}"
                        if row["difference"]
                        else "0"
                    ),
                ]
                if gpu:
                    cells.append(number(1e3 * gpu_row["wall"]) if gpu_row else "–")
                text.append(f"| {' | '.join(cells)} |")
            notes = [
                f"{row['contender']}: {row['note']}" for row in part if row["note"]
            ]
            text += ["", "; ".join(notes) + ".\n" if notes else ""]
        text += [":::\n"]
    return "\n".join(text)


def seconds_per_image(rows: list[dict], part: str, contender: str = OURS) -> float:
    """Return the processor time per image of a part."""
    row = next(
        row for row in rows if row["part"] == part and row["contender"] == contender
    )
    return row["cpu"] / row["images"]


def hours(seconds: float) -> str:
    return f"{number(seconds / 3600, 2)} h"


def million(rows: list[dict]) -> str:
    """Write the table of memory and time for a million images.

    The memory is computed; the times are extrapolated from the measured rates.
    """
    images = 10**6
    positions, patches, queries = 56**2, 57**2 + 13**2, 57**2
    gaussians = positions * 100**2 * 4 + positions * 100 * 8
    wide = positions * 550**2 * 4 + positions * 550 * 8
    bank = patches * 64 * 4
    fit = seconds_per_image(rows, "fit")
    backbone = seconds_per_image(rows, "fit", "the backbone alone")
    embed = seconds_per_image(rows, "embedding")
    step = seconds_per_image(rows, "training")
    search = next(
        row for row in rows if row["part"] == "neighbours" and row["contender"] == OURS
    )
    pairs = int(search["what"].split()[2].replace(",", "")) * queries
    searching = search["cpu"] / pairs * images * queries**2
    lines = [
        (
            "| A million images, one thread of this machine | constant memory |"
            " memory that grows with the images | time |"
        ),
        "|---|---|---|---|",
        (
            "| PaDiM, ResNet-18, d = 100: the backbone | – | – |"
            f" {hours(images * backbone)} |"
        ),
        (
            f"| its Gaussians | {number(gaussians / 2**20)} MiB | – |"
            f" {hours(images * fit)} |"
        ),
        (
            "| the same for Wide ResNet-50-2, d = 550 |"
            f" {number(wide / 2**30)} GiB | – | not measured |"
        ),
        (
            "| Patch SVDD, 256×256 pixels: embedding | – |"
            f" {number(images * bank / 2**30)} GiB | {hours(images * embed)} |"
        ),
        f"| searching that bank for one image | – | – | {hours(searching)} |",
        f"| training on one crop per image | – | – | {hours(images * step)} |",
    ]
    return "\n".join(lines) + "\n"


def where(stamp: dict) -> str:
    """Describe a measurement: machine, date, versions, and missing peers."""
    versions = ", ".join(
        f"{name} {version}"
        for name, version in {**stamp["versions"], **stamp["peers"]}.items()
        if version
    )
    missing = "".join(
        f" Missing: {name}, {reason}." for name, reason in stamp["missing"].items()
    )
    machine = stamp["machine"]
    return (
        f"**{stamp['device']}**, {stamp['date']}, {stamp['mode']} run of"
        f" {stamp['seconds'] / 60:.0f} minutes; measured peak"
        f" {machine['macs_per_second'] / 1e9:,.0f} billion multiply-adds and"
        f" {machine['bytes_per_second'] / 1e9:,.1f} GB per second."
        f" {versions}.{missing}\n"
    )


def draw(curve: dict, path: Path) -> None:
    """Draw a curve on logarithmic axes as an SVG file with reproducible content."""
    use_style()
    with plt.rc_context({"svg.hashsalt": curve["name"], "figure.figsize": (5.6, 3.4)}):
        figure, ax = plt.subplots()
        for (name, points), mark in zip(curve["points"].items(), "osD^v", strict=False):
            ax.plot(*zip(*points, strict=True), marker=mark, label=name)
        ax.set_xlabel(curve["x"])
        ax.set_ylabel(curve["y"])
        ax.set_xscale("log")
        xs = sorted({x for points in curve["points"].values() for x, _ in points})
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        if "AUROC" not in curve["y"]:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.legend()
        _save(figure, path)


def draw_ratios(rows: list[dict], path: Path) -> None:
    """Draw how many times as long other implementations take, one line per task."""
    use_style()
    tasks = comparisons(rows)[::-1]
    with plt.rc_context({"svg.hashsalt": "ratios", "figure.figsize": (4.8, 8)}):
        figure, ax = plt.subplots()
        ax.axvline(1, color="black", lw=1)
        for index, colour, mark, label in (
            (1, VERMILION, "o", "the common implementation"),
            (2, BLUE, "s", "the fastest other library"),
        ):
            points = [(y, task[index]) for y, task in enumerate(tasks) if task[index]]
            ratios = [row["ratio"] for _, row in points]
            spread = [
                [row["ratio"] - row["ratio_low"] for _, row in points],
                [row["ratio_high"] - row["ratio"] for _, row in points],
            ]
            ax.errorbar(
                ratios,
                [y for y, _ in points],
                xerr=spread,
                fmt=mark,
                color=colour,
                label=label,
            )
        labels = [fill(what, 30) for what, *_ in tasks]
        ax.set_yticks(range(len(tasks)), labels, fontsize=8, linespacing=1)
        ax.set(xscale="log", xlabel="time divided by paperlib's")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="x", alpha=0.4)
        figure.legend(loc="outside upper center")
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write an SVG file with reproducible content."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)
    temporary.replace(path)


def describe_ratios(rows: list[dict]) -> str:
    """Describe the chart in words, for its alt text."""
    tasks = (
        f"{what}: "
        + ", ".join(
            f"{row['contender']} {number(row['ratio'])}" for row in peers if row
        )
        for what, *peers in comparisons(rows)
    )
    return "Time divided by that of paperlib. " + "; ".join(tasks)


def describe(curve: dict) -> str:
    """Describe the ends of a curve in words, for its alt text."""
    ends = [
        f"{name} from "
        + " to ".join(f"{number(y)} at {number(x)}" for x, y in (points[0], points[-1]))
        for name, points in curve["points"].items()
    ]
    return f"{curve['y']} against {curve['x']}: {'; '.join(ends)}"


def write_parts(root: Path) -> None:
    """Write tables and curves; unchanged files keep their modification time."""
    data, folder = root / "book" / "data", root / FOLDER
    folder.mkdir(exist_ok=True)
    if not (data / "speed.json").is_file():
        raise ValueError(
            "book/data/speed.json is missing; run `make bench`, which writes it"
        )
    speed = json.loads((data / "speed.json").read_text(encoding="utf-8"))
    path = data / "speed_gpu.json"
    gpu = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    texts = {
        "where.txt": where(speed["stamp"]),
        "lead.txt": lead(speed["rows"]),
        "ratios.txt": (
            "```{figure} speed_parts/ratios.svg\n:alt: "
            f"{describe_ratios(speed['rows'])}\n:width: 520px\n\nTime of other"
            " implementations divided by that of `paperlib` in the same run: the median"
            " of the turns and its range. Right of the line they are slower.\n```\n"
        ),
        "summary.txt": summary(speed["rows"]),
        "tables.txt": tables(speed["rows"], speed["stamp"]["machine"], gpu),
        "million.txt": million(speed["rows"]),
        "gpu.txt": (
            where(gpu["stamp"])
            if gpu
            else "Not measured yet: no machine with a CUDA device was available.\n"
        ),
    }
    curves, titles = [], {**TITLES, "gradcam": "Grad-CAM", "counting": "Counting"}
    for subject, measured in speed.get("curves", {}).items():
        curves += [{"title": titles[subject], **c} for c in measured["curves"]]
    figures = [
        f"```{{figure}} speed_parts/{curve['name']}.svg\n:alt:"
        f" {describe(curve)}\n:width: 100%\n\n{curve['title']}: {curve['y']} against"
        f" {curve['x']}.\n```\n"
        for curve in curves
    ]
    texts["curves.txt"] = (
        "\n".join(figures) or "No curves yet: `make bench CURVES=1` measures them.\n"
    )
    for name, text in texts.items():
        target = folder / name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)
    # A change to the style also redraws the figures.
    style = inspect.getsource(use_style)
    drawn = {"ratios": (draw_ratios, speed["rows"])}
    drawn |= {curve["name"]: (draw, curve) for curve in curves}
    for name, (function, values) in drawn.items():
        target, mark = folder / f"{name}.svg", folder / f"{name}.json"
        text = json.dumps([values, inspect.getsource(function), style])
        if (
            not target.exists()
            or not mark.exists()
            or mark.read_text(encoding="utf-8") != text
        ):
            function(values, target)
            write_text(mark, text)
    current = {
        *texts,
        *(f"{name}.{kind}" for name in drawn for kind in ("svg", "json")),
    }
    for path in folder.iterdir():
        if path.name not in current:
            path.unlink()


def setup(app: Sphinx) -> dict:
    write_parts(ROOT)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
