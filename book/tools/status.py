"""Write book/status.md: what was run, where, when and with which versions, from the notebooks' stamps.

python book/tools/status.py
"""

import sys
from pathlib import Path

import atomic
import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path("book/status.md")
COMPARED = "nbval-check-output"  # nbval, in its lax mode, compares the cells that carry this tag

HEAD = """\
# What was run, and where

Every output in this book was written by running the notebook from the first cell to the last, in a fresh kernel, and
is committed with a stamp: a hash of the notebook's code and of every `paperlib` module it uses. A test fails when the
stamp no longer fits the code. `make test` runs every cell again and none may fail; a cell counts as *compared* when
its printed result must also come out the same, which pictures and timings never do.

<!-- Written by book/tools/status.py from the notebooks' stamps; edits here are lost. -->
"""
COLUMNS = ("Notebook", "Seconds", "Cells compared", "Date", "Size")


def compared(notebook: NotebookNode) -> tuple[int, int]:
    """Count the code cells whose output `make test` compares, and all code cells."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return sum(COMPARED in cell.metadata.get("tags", ()) for cell in code), len(code)


def page(root: Path) -> str:
    """Compose the page from the notebooks below `root`: a table for each machine, profile and set of versions."""
    tables: dict[str, list[list[str]]] = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        where, row = _row(path)
        tables.setdefault(where, []).append(row)
    parts = [HEAD]
    for where, rows in tables.items():
        lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
        parts.append(f"{where}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _row(path: Path) -> tuple[str, list[str]]:
    """Say where a notebook was run, and list what stands in its row."""
    notebook = nbformat.read(path, as_version=4)
    stamp = notebook.metadata.get("executed")
    if stamp is None:
        raise ValueError(f"{path.name} has no stamp; run `make execute`, which runs and stamps it")
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    some, every = compared(notebook)
    row = [
        f"[{path.stem}](../notebooks/{path.name})",
        f"{stamp['seconds']:.0f}",
        f"{some} of {every}",
        stamp["date"],
        f"{path.stat().st_size / 1e6:.2f} MB",
    ]
    return f"**{stamp['device']}**, profile {stamp['profile']}, {versions}:", row


def write(root: Path) -> None:
    """Write the status page."""
    atomic.write_text(root / PAGE, page(root))


if __name__ == "__main__":
    try:
        write(ROOT)
    except ValueError as error:
        sys.exit(f"error: {error}")
