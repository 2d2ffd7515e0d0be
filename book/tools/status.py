"""Write book/status.md: what was run, where, when and with which versions, from the
notebooks' stamps.

python book/tools/status.py
"""

import argparse
import json
import sys
from pathlib import Path

import nbformat
from freshness import script_hash
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("book/status.md")
# nbval, in its lax mode, compares the cells that carry this tag
COMPARED = "nbval-check-output"

HEAD = """\
# What was run, and where

Every output in this book was written by running the notebook from the first cell to
the last, in a fresh kernel, and is committed with a stamp: a hash of the notebook's
code and of every `paperlib` module it uses. A test fails when the stamp no longer fits
the code. `make test` runs every cell again and fails if any cell fails; a cell
counts as *compared* if its printed output must also be the same. Images and times are
never compared.

<!-- Written by book/tools/status.py from the notebooks' stamps; edits are lost. -->
"""
RESULTS = """\
## Runs too long for a notebook

`make results` trains and measures for an hour or more, and writes stamped files, which
the notebooks and pages draw. The second column says *changed* if the code of the
script, or of a `paperlib` module that it uses, has changed since the run (comments and
docstrings do not count). Such results are not computed again automatically: they are
those of the code of that date.
"""
RESULT_COLUMNS = ("Result", "Code since", "Runs", "Date")
COLUMNS = ("Notebook", "Seconds", "Cells compared", "Date", "Size")


def compared(notebook: NotebookNode) -> tuple[int, int]:
    """Count the code cells whose output `make test` compares, and all code cells."""
    code = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.strip()
    ]
    return sum(COMPARED in cell.metadata.get("tags", ()) for cell in code), len(code)


def page(root: Path) -> str:
    """Compose the page from the notebooks below `root`: a table for each machine,
    profile and set of versions.
    """
    tables: dict[str, list[list[str]]] = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        where, row = _row(path)
        tables.setdefault(where, []).append(row)
    long_runs: dict[str, list[list[str]]] = {}
    encoders = []
    for script in sorted((root / "book" / "tools").glob("*_cells.py")):
        path = root / "book" / "data" / "results" / f"{script.stem}.json"
        if path.is_file():
            where, row = _result_row(path, script, root)
            long_runs.setdefault(where, []).append(row)
            encoders += _encoder(path)
    parts = [HEAD, *_tables(COLUMNS, tables)]
    if long_runs:
        parts += [RESULTS, *_tables(RESULT_COLUMNS, long_runs), *encoders]
    return "\n".join(parts)


def _tables(columns: tuple[str, ...], tables: dict[str, list[list[str]]]) -> list[str]:
    """Write a table under each heading."""
    written = []
    for where, rows in tables.items():
        lines = [
            f"| {' | '.join(cells)} |"
            for cells in (columns, ["---"] * len(columns), *rows)
        ]
        written.append(f"{where}\n\n" + "\n".join(lines) + "\n")
    return written


def _undivided(date: str) -> str:
    """Keep a date in one line of a narrow table."""
    return date.replace("-", "\u2011")


def _where(stamp: dict) -> str:
    return f"**{stamp['device']}**, " + ", ".join(
        f"{name} {version}" for name, version in stamp["versions"].items()
    )


def _row(path: Path) -> tuple[str, list[str]]:
    """Say where a notebook was run, and list what stands in its row."""
    notebook = nbformat.read(path, as_version=4)
    stamp = notebook.metadata.get("executed")
    if stamp is None:
        raise ValueError(
            f"{path.name} has no stamp; run `make execute`, which runs and stamps it"
        )
    some, every = compared(notebook)
    row = [
        f"[`{path.stem}`](../notebooks/{path.name})",
        f"{stamp['seconds']:.0f}",
        f"{some} of {every}",
        _undivided(stamp["date"]),
        f"{path.stat().st_size / 1e6:.2f} MB",
    ]
    return f"{_where(stamp)}, profile {stamp['profile']}:", row


def _result_row(path: Path, script: Path, root: Path) -> tuple[str, list[str]]:
    """Say where a long run was made, and list what stands in its row."""
    result = json.loads(path.read_text(encoding="utf-8"))
    stamp = result["stamp"]
    row = [
        f"`{path.name}`",
        "unchanged" if script_hash(script, root) == stamp["code"] else "changed",
        str(len(result["runs"])),
        _undivided(stamp["date"]),
    ]
    return f"{_where(stamp)}:", row


def _encoder(path: Path) -> list[str]:
    """Tell how the encoder beside a result was trained, if there is one."""
    weights = path.with_suffix(".safetensors")
    if not weights.is_file():
        return []
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    run = next(run for run in runs if run["name"] == "committed")
    minutes = (
        f" in {run['cpu_seconds'] / 60:.0f} processor minutes"
        if run["cpu_seconds"]
        else ""
    )
    shares = [
        f"{100 * large:.0f} and {100 * small:.0f} % ({kind} cells)"
        for kind, (large, small) in run["positions"].items()
    ]
    return [
        f"`{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB, is the encoder of"
        f" the run named *committed*: {run['steps']} steps{minutes}, loss"
        f" {run['curves'][0][1]:.2f} at first and {run['curves'][-1][1]:.2f} at the"
        " end. For pairs of large patches, then of small ones, from cells that it was"
        " not trained on, it names the correct one of eight directions for"
        f" {', '.join(shares)}; chance is 12.5 %. Both patches of a pair shared a"
        " colour shift (`shared_shift=True`), as these cells are grey.\n"
    ]


def write(root: Path) -> None:
    """Write the status page."""
    # Imported here: torch takes seconds, and `page` needs none of it.
    from paperlib.storage import write_text

    write_text(root / PAGE, page(root))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        write(ROOT)
    except ValueError as error:
        sys.exit(f"error: {error}")
