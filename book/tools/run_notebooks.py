"""Bring the notebooks up to date with their text twins: run the stale ones, and stamp
what was run.

    python book/tools/run_notebooks.py [NAME ...] [--force] [--check]

`notebooks/py/NAME.py` is the source; `notebooks/NAME.ipynb` holds the same cells with
outputs and the stamp. A notebook whose text changed but whose code did not gets the new
text and keeps its outputs.
"""

import argparse
import datetime
import hashlib
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import status
from freshness import code_hash
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from pictures import lighten_outputs

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
CELL_SECONDS = 1800
SHARED_METADATA = ("tags", "mystnb")  # what the text twin holds of a cell's metadata


def text_path(notebook: Path) -> Path:
    """Name the text twin of a notebook."""
    return notebook.parent / "py" / f"{notebook.stem}.py"


def names(root: Path) -> list[str]:
    """Name every notebook that has a text."""
    return sorted(path.stem for path in (root / "notebooks" / "py").glob("*.py"))


def read_text(notebook: Path) -> NotebookNode:
    """Read the text twin as a notebook without outputs, its cell ids derived from its
    cells.
    """
    read = jupytext.read(text_path(notebook))
    read.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL))
    seen: dict[str, int] = {}
    for cell in read.cells:
        cell.metadata = NotebookNode(
            {key: cell.metadata[key] for key in SHARED_METADATA if key in cell.metadata}
        )
        content = f"{cell.cell_type}\0{cell.source}".encode()
        key = hashlib.sha256(content).hexdigest()[:8]
        seen[key] = seen.get(key, 0) + 1
        cell["id"] = key if seen[key] == 1 else f"{key}-{seen[key]}"
    read.nbformat, read.nbformat_minor = 4, 5
    return read


def shared_part(notebook: NotebookNode) -> list[tuple]:
    """List what a notebook and its text twin must have in common, cell by cell."""

    def shared(metadata: dict) -> dict:
        return {key: metadata[key] for key in SHARED_METADATA if key in metadata}

    cells = notebook.cells
    return [(cell.cell_type, cell.source, shared(cell.metadata)) for cell in cells]


def state(notebook: Path, root: Path) -> str:
    """Say whether a notebook is "missing", "stale" (its code changed), "unpaired" (its
    text changed) or "fresh".
    """
    if not notebook.exists():
        return "missing"
    text, committed = read_text(notebook), nbformat.read(notebook, as_version=4)
    if committed.metadata.get("executed", {}).get("code") != code_hash(text, root):
        return "stale"
    # An output may have been cleared, or a cell edited and reverted, since the stamp
    # was made.
    if len(_code(text)) != len(_code(committed)) or not all(
        c.execution_count for c in _code(committed) if c.source.strip()
    ):
        return "stale"
    return "fresh" if shared_part(text) == shared_part(committed) else "unpaired"


def execute(notebook: Path, root: Path) -> float:
    """Run a notebook's text in a fresh kernel and write the notebook; on a failure the
    old file stays as it was.

    Returns:
        the seconds it took.

    Raises:
        ValueError: if a cell fails, takes too long, or writes a warning.
    """
    run = read_text(notebook)
    # Before running: an edit made meanwhile must show as stale.
    code = code_hash(run, root)
    client = NotebookClient(
        run,
        timeout=CELL_SECONDS,
        kernel_name=KERNEL["name"],
        record_timing=False,
        coalesce_streams=True,  # however slowly a cell prints, its text is one output
        resources={"metadata": {"path": notebook.parent}},
    )
    started = time.monotonic()
    try:
        # The library that is hashed is the one that runs, whatever copy is installed.
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        client.execute(env={**os.environ, "PYTHONPATH": path})
    except (CellExecutionError, CellTimeoutError, RuntimeError) as error:
        raise ValueError(
            f"{notebook.name} did not run through; the old file is kept.\n{error}"
        ) from error
    seconds = time.monotonic() - started
    _refuse_stderr(notebook, run)
    lighten_outputs(run)
    run.metadata.get("language_info", {}).pop("version", None)
    run.metadata["executed"] = {
        "code": code,
        **_surroundings(),
        "seconds": round(seconds, 1),
    }
    _write(notebook, run)
    return seconds


def take_text(notebook: Path) -> None:
    """Give a notebook the cells of its text twin, whose code is the same, and keep
    outputs and stamp.
    """
    new, old = read_text(notebook), nbformat.read(notebook, as_version=4)
    for cell, before in zip(_code(new), _code(old), strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    new.metadata = old.metadata
    _write(notebook, new)


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _refuse_stderr(notebook: Path, run: NotebookNode) -> None:
    for cell in _code(run):
        for output in cell.outputs:
            if output.get("name") == "stderr":
                raise ValueError(
                    f"{notebook.name} wrote to stderr, which a page may not show; the"
                    " old file is kept. Remove the cause of the warning in the"
                    f" cell\n{cell.source}\n{output.text}"
                )


def _surroundings() -> dict:
    # Imported here: torch takes seconds, and asking what is stale needs none of it.
    import torch

    from paperlib import runtime

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "profile": runtime.default_profile(),
        "device": runtime.device_name(device),
        "versions": runtime.versions(),
        "date": datetime.date.today().isoformat(),
    }


def _write(path: Path, notebook: NotebookNode) -> None:
    from paperlib.storage import write_text  # imports torch, see `_surroundings`

    nbformat.validate(notebook)
    write_text(path, nbformat.writes(notebook, version=4) + "\n")


def select(given: list[str], root: Path) -> list[Path]:
    """Turn names or paths into notebook paths; without any, all of them."""
    known = names(root)
    wanted = [Path(name).stem for name in given] or known
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"no text notebooks/py/{unknown[0]}.py; expected one of"
            f" {', '.join(known) or '(none there)'}"
        )
    return [root / "notebooks" / f"{name}.ipynb" for name in wanted]


def update(notebooks: list[Path], root: Path, force: bool = False) -> list[str]:
    """Bring each notebook up to date, print what was done, and return the messages of
    those that failed.
    """
    failures = []
    for notebook in notebooks:
        now = state(notebook, root)
        if force or now in ("missing", "stale"):
            print(f"{notebook.stem}: {now}, running …", flush=True)
            try:
                print(
                    f"{notebook.stem}: ran in {execute(notebook, root):.1f} s",
                    flush=True,
                )
            except ValueError as error:
                failures.append(str(error))
        elif now == "unpaired":
            take_text(notebook)
            print(f"{notebook.stem}: took the new text, outputs kept")
        else:
            print(f"{notebook.stem}: fresh")
    return failures


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="notebooks to look at, e.g. 01_mobilenet; default: all",
    )
    parser.add_argument("--force", action="store_true", help="run fresh ones too")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run nothing; list what is not fresh and exit with 1",
    )
    options = parser.parse_args(arguments)
    try:
        notebooks = select(options.names, root)
        if options.check:
            behind = [(path.stem, state(path, root)) for path in notebooks]
            behind = [f"{name}: {now}" for name, now in behind if now != "fresh"]
            print("\n".join(behind) or "every notebook is fresh")
            return 1 if behind else 0
        failures = update(notebooks, root, options.force)
        status.write(root)
    except ValueError as error:
        failures = [str(error)]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
