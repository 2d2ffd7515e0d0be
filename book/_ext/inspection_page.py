"""Write the tables that book/inspection.md includes, into book/inspection_parts.

The measurements are in book/data/results/inspection_cells.json (`make results`). The
folder is not committed; its files are rewritten when the measurements change.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from paperlib.storage import write_text  # noqa: E402

FOLDER = Path("book/inspection_parts")
RESULT = Path("book/data/results/inspection_cells.json")
Runs = list[dict]


def select(runs: Runs, experiment: str, **values: object) -> Runs:
    """Return the runs of an experiment that have the given values, one per seed."""
    return [
        run
        for run in runs
        if run["experiment"] == experiment
        and all(run[name] == value for name, value in values.items())
    ]


def percent(shares: Sequence[float], digits: int = 0) -> str:
    """Format the mean of shares, and their range if they differ."""
    return with_range([100 * share for share in shares], digits, " %")


def with_range(values: Sequence[float], digits: int, unit: str = "") -> str:
    """Format the mean of values, and their range if they differ."""
    in_brackets = _in_brackets(min(values), max(values), digits)
    return f"{mean(values):.{digits}f}{unit}{in_brackets}"


def _in_brackets(low: float, high: float, digits: int = 2) -> str:
    return f" ({span(low, high, digits)})" if low < high else ""


def span(low: float, high: float, digits: int = 2) -> str:
    """Write a range that no line break divides."""
    return f"{low:.{digits}f}\u2060–\u2060{high:.{digits}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def false_alarms(runs: Runs) -> str:
    """Measured shares of false alarms per number of training images."""
    rows = []
    for count in _values(select(runs, "training_images", dimensions=100), "images"):
        of_count = select(
            runs, "training_images", images=count, dimensions=100, region=False
        )
        shares = (
            percent([run["alarms"][share][0] for run in of_count], digits=1)
            for share in ("0.1", "0.05", "0.01")
        )
        rows.append([str(count), *shares])
    return _table(["images", "10 % chosen", "5 % chosen", "1 % chosen"], rows)


def training_images(runs: Runs) -> str:
    """Detection per number of training images and of dimensions."""
    rows = []
    for dimensions in (100, 20):
        of_dimensions = select(runs, "training_images", dimensions=dimensions)
        for count in _values(of_dimensions, "images"):
            group = [
                run
                for run in of_dimensions
                if run["images"] == count and not run["region"]
            ]
            rows.append(
                [
                    str(dimensions),
                    str(count),
                    f"{mean(run['auroc'] for run in group):.3f}",
                    f"{mean(run['contrast'] for run in group):.2f}",
                    *(
                        percent([run["alarms"]["0.05"][kind] for run in group], digits)
                        for kind, digits in ((1, 0), (0, 1))
                    ),
                ]
            )
    columns = ["dimensions", "images", "AUROC", "contrast", "found", "false alarms"]
    return _table(columns, rows)


def resolution(runs: Runs) -> str:
    """Share of the synthetic spots that are found, and cost, per size of the input."""
    rows = []
    for name in _values(select(runs, "resolution"), "input"):
        group = select(runs, "resolution", input=name)
        rows.append(
            [
                name,
                *(
                    percent([run["found"][diameter] for run in group])
                    for diameter in group[0]["found"]
                ),
                f"{mean(run['cpu_ms'] for run in group):.0f}",
            ]
        )
    diameters = [
        "no spot" if diameter == "0" else f"{diameter} px"
        for diameter in select(runs, "resolution")[0]["found"]
    ]
    return _table(["input", *diameters, "ms"], rows)


def drift(runs: Runs) -> str:
    """Scores and false alarms per change of the brightness."""
    rows = []
    for dimmed in _values(select(runs, "drift"), "dimmed"):
        group = select(runs, "drift", dimmed=dimmed)
        rows.append(
            [
                f"{100 * dimmed:.0f} %",
                with_range([run["median"] for run in group], digits=2),
                percent([run["alarms"] for run in group], digits=1),
            ]
        )
    return _table(["darker by", "median score / threshold", "false alarms"], rows)


def serving(runs: Runs) -> str:
    """Processor time of the ways to call a detector."""
    rows = [
        [
            run["way"],
            f"{run['cpu_ms']:.0f}",
            f"{run['speed']:.2f}" + _in_brackets(run["lowest"], run["highest"]),
        ]
        for run in select(runs, "serving")
    ]
    return _table(["one thread", "processor ms per image", "relative speed"], rows)


def _values(runs: Runs, name: str) -> list:
    """Return the different values of a column, in their order."""
    return list(dict.fromkeys(run[name] for run in runs))


TABLES: tuple[Callable[[Runs], str], ...] = (
    false_alarms,
    training_images,
    resolution,
    drift,
    serving,
)


def write_parts(root: Path) -> None:
    """Write the tables; unchanged files keep their modification time."""
    runs = json.loads((root / RESULT).read_text(encoding="utf-8"))["runs"]
    (root / FOLDER).mkdir(exist_ok=True)
    for table in TABLES:
        target, text = root / FOLDER / f"{table.__name__}.txt", table(runs)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            write_text(target, text)


def setup(app: Sphinx) -> dict:
    write_parts(ROOT)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
