"""Write what book/speed.md includes, its tables and curves, from the files that
`make bench` and `make test-gpu` leave.

book/data/speed.json holds the CPU's figures, speed_gpu.json a GPU's. What is written,
into book/speed_parts, is made anew when they change and is not committed.
"""

import inspect
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "book" / "tools")]
from paperlib.storage import write_text  # noqa: E402
from paperlib.viz import use_style  # noqa: E402

FOLDER = Path("book/speed_parts")
OURS, USUAL = "paperlib", "the review's way"
TITLES = {
    "complexity": "Counting",
    "gradcam": "CAM and Grad-CAM",
    "metrics": "Metrics",
    "padim": "PaDiM",
    "pipeline": "From pictures on",
    "patch_svdd": "Patch SVDD",
}
COLUMNS = (
    "Way",
    "processor ms",
    "wall ms",
    "time over paperlib's",
    "peak MiB",
    "differs by",
)
TO_FILL = (  # heads the last column until `make test-gpu` has filled it
    "GPU ms: none yet"
)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number as a reader wants it: three digits, no exponent."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:g}"


def is_peer(row: dict) -> bool:
    """Whether a row is of another way to do the same, and no floor or what comes
    before.
    """
    return row["contender"] != OURS and "no peer" not in row["note"]


def parts(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Sort rows by their part, in the order in which they came."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["bench"], row["part"]), []).append(row)
    return found


def summary(rows: list[dict]) -> str:
    """Say for each part how much longer the review's way and the fastest peer take."""
    lines = [
        "| Work | the review's way takes | the fastest peer takes |",
        "|---|---|---|",
    ]
    for part in parts(rows).values():
        times = {row["contender"]: row for row in part if is_peer(row)}
        usual = times.pop(USUAL, None)
        best = min(times.values(), key=lambda row: row["ratio"], default=None)
        if usual is None and best is None:
            continue
        told = [_ratio(row) if row else "–" for row in (usual, best)]
        told[1] += f", {best['contender']}" if best else ""
        lines.append(f"| {part[0]['what']} | {told[0]} | {told[1]} |")
    return "\n".join(lines) + "\n"


def _ratio(row: dict) -> str:
    low, high = number(row["ratio_low"]), number(row["ratio_high"])
    return f"{number(row['ratio'])}× ({low} to {high})"


def tables(rows: list[dict], machine: dict, gpu: dict | None) -> str:
    """Write a table for each bench, its parts one below the other."""
    there = (
        {(row["bench"], row["part"], row["contender"]): row for row in gpu["rows"]}
        if gpu
        else {}
    )
    columns, text = (*COLUMNS, "GPU ms" if gpu else TO_FILL), []
    for bench, title in TITLES.items():
        own = {key: part for key, part in parts(rows).items() if key[0] == bench}
        if not own:
            continue
        text += [f"## {title}\n"]
        for key, part in own.items():
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
                on_gpu = there.get((*key, row["contender"]))
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
                    number(1e3 * on_gpu["wall"]) if on_gpu else "–",
                ]
                text.append(f"| {' | '.join(cells)} |")
            notes = [
                f"{row['contender']}: {row['note']}" for row in part if row["note"]
            ]
            text += ["", "; ".join(notes) + ".\n" if notes else ""]
    return "\n".join(text)


def seconds_an_image(rows: list[dict], part: str, contender: str = OURS) -> float:
    """The processor's time for one image of a part's work."""
    row = next(
        row for row in rows if row["part"] == part and row["contender"] == contender
    )
    return row["cpu"] / row["images"]


def hours(seconds: float) -> str:
    return f"{number(seconds / 3600, 2)} h"


def million(rows: list[dict]) -> str:
    """What a million images take, from this machine's measured rates: memory by
    arithmetic, hours by measurement.
    """
    images = 10**6
    positions, kept, queries = 56**2, 57**2 + 13**2, 57**2
    gaussians = positions * 100**2 * 4 + positions * 100 * 8
    wide = positions * 550**2 * 4 + positions * 550 * 8
    bank = kept * 64 * 4
    fit = seconds_an_image(rows, "fit")
    backbone = seconds_an_image(rows, "fit", "the backbone alone")
    embed = seconds_an_image(rows, "embedding")
    step = seconds_an_image(rows, "training")
    search = next(
        row for row in rows if row["part"] == "neighbours" and row["contender"] == OURS
    )
    pairs = int(search["what"].split()[2].replace(",", "")) * queries
    searching = search["cpu"] / pairs * images * queries**2
    lines = [
        (
            "| A million images, one thread of this machine | memory that stays |"
            " memory that grows | time |"
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
            f"| the same, Wide ResNet-50-2, d = 550 | {number(wide / 2**30)} GiB | – |"
            " not measured |"
        ),
        (
            f"| Patch SVDD, 256×256: embedding | – | {number(images * bank / 2**30)}"
            f" GiB | {hours(images * embed)} |"
        ),
        f"| searching that bank, for one image | – | – | {hours(searching)} |",
        f"| training, each image in one crop | – | – | {hours(images * step)} |",
    ]
    return "\n".join(lines) + "\n"


def where(stamp: dict) -> str:
    """Say where and with what a file of figures was made, and which peers it lacks."""
    versions = ", ".join(
        f"{name} {version}"
        for name, version in {**stamp["versions"], **stamp["peers"]}.items()
        if version
    )
    lacks = "".join(
        f" Missing: {name}, {why}." for name, why in stamp["missing"].items()
    )
    peak = (
        f"{stamp['machine']['macs_per_second'] / 1e9:,.0f} billion multiply-adds and "
    )
    peak += f"{stamp['machine']['bytes_per_second'] / 1e9:,.1f} GB a second"
    return (
        f"**{stamp['device']}**, {stamp['date']}, {stamp['mode']} run of"
        f" {stamp['seconds'] / 60:.0f} minutes; measured peak {peak}."
        f" {versions}.{lacks}\n"
    )


def draw(curve: dict, path: Path) -> None:
    """Draw one curve on logarithmic axes, as text that is the same each time."""
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
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(
            temporary, format="svg", facecolor="white", metadata={"Date": None}
        )
        plt.close(figure)
        temporary.replace(path)


def describe(curve: dict) -> str:
    """Tell a curve's ends in words."""
    ends = [
        f"{name} from "
        + " to ".join(f"{number(y)} at {number(x)}" for x, y in (points[0], points[-1]))
        for name, points in curve["points"].items()
    ]
    return f"{curve['y']} against {curve['x']}: {'; '.join(ends)}"


def write_parts(root: Path) -> None:
    """Write tables and curves; a file whose text is the same keeps its time."""
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
        "summary.txt": summary(speed["rows"]),
        "tables.txt": tables(speed["rows"], speed["stamp"]["machine"], gpu),
        "million.txt": million(speed["rows"]),
        "gpu.txt": (
            where(gpu["stamp"])
            if gpu
            else "No GPU was at hand: the last column is empty.\n"
        ),
    }
    curves = [
        curve
        for subject in speed.get("curves", {}).values()
        for curve in subject["curves"]
    ]
    figures = [
        f"```{{figure}} speed_parts/{curve['name']}.svg\n:alt:"
        f" {describe(curve)}\n:width: 100%\n\n{curve['y'][0].upper()}{curve['y'][1:]}"
        f" against {curve['x']}.\n```\n"
        for curve in curves
    ]
    texts["curves.txt"] = (
        "\n".join(figures) or "No curves yet: `make bench CURVES=1` measures them.\n"
    )
    for name, text in texts.items():
        target = folder / name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)
    # A new style draws the same points anew.
    how = inspect.getsource(draw) + inspect.getsource(use_style)
    for curve in curves:
        target, mark = folder / f"{curve['name']}.svg", folder / f"{curve['name']}.json"
        text = json.dumps([curve, how])
        if (
            not target.exists()
            or not mark.exists()
            or mark.read_text(encoding="utf-8") != text
        ):
            draw(curve, target)
            write_text(mark, text)
    kept = {
        *texts,
        *(f"{curve['name']}.{kind}" for curve in curves for kind in ("svg", "json")),
    }
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def setup(app: Sphinx) -> dict:
    write_parts(ROOT)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
