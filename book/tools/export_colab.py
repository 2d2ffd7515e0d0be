"""Make self-contained copies of notebooks: for Colab, or for any empty folder.

    python book/tools/export_colab.py FOLDER NOTEBOOK ...

The cell after the title carries paperlib, zipped, and installs only the packages that
are missing. What Jupyter Book understands and a plain notebook does not (directives,
citations, references) is written as plain Markdown. Outputs are kept unless they are
large. What the book's page folds is folded in Colab and JupyterLab, too; VS Code
reads no such metadata (microsoft/vscode, issue 158716).
"""

import argparse
import base64
import hashlib
import io
import json
import re
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import nbformat
import yaml
from addresses import pages_url
from freshness import COMPANION, FOLDERS, LIBRARY, data_files, outside_names
from nbformat import NotebookNode
from plain_markdown import PlainMarkdown
from pybtex.database import parse_file

from paperlib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
SETUP = Path(__file__).with_name("colab_setup.py")
# Tag of a cell that the set-up cell of a copy makes superfluous.
OUR_SETUP = "colab-setup"
HIDDEN = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
HIDDEN_OUTPUTS = {"hide-cell", "hide-output", "remove-cell", "remove-output"}
MOST_OUTPUTS = 1_500_000  # bytes; a copy of a notebook with more of them has none
# Colab folds the source of a cell by the first entry, JupyterLab by the second.
FOLDED_SOURCE = {"cellView": "form", "jupyter": {"source_hidden": True}}
SOLUTION = "solution"  # tag of a cell that Colab folds under this title
HELP = """\
**Run the next cell first.** Its code is folded (VS Code shows it: one very long line).
It contains the library `paperlib`, unpacks it, installs the packages that are missing,
and prints what it did.

**On Colab**: choose *Runtime → Run all*; nothing needs to be edited. On a GPU (*Runtime
→ Change runtime type*) the same cells use larger networks or train longer; the first
text says what changes. For the numbers of the text, run
`%env PAPERLIB_PROFILE=smoke` in a new cell before all others.

- **To keep what is trained** when the session ends, mount your Drive before you run:
  the folder at the left, then the Drive symbol. Trainings are then kept in
  `MyDrive/paperlib`, and a new session resumes them.
- **Your own images**: drop an image, or a zip of a folder of images, onto the same
  panel, or have them on your Drive. *Copy path* in the file's menu shows the path that
  the chapter's cell asks for.
- The main training of a chapter, and one on your own images, stores checkpoints. Stop
  it at any time and run its cell again: it resumes from the last checkpoint. With a
  GPU, it shows its progress, too."""
# For a copy of a book without an address.
WITHOUT_ADDRESS = (
    "\n\nThe pages that this notebook names are in the book that it comes from."
)
PRESENT = {"google", "IPython", "ipywidgets"}  # what the notebook's host brings along

# Import name of a package whose name on the index is another. Every other one swaps
# hyphens for underscores.
IMPORT_NAMES = {
    "opencv-python": "cv2",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}


def pack_library(sources: list[str], root: Path) -> tuple[str, str]:
    """Zip paperlib and what the notebooks share; return it as base64 text and a short
    digest of it.

    The same files give the same text. Results of long runs come along only where
    `sources`, or the modules they import, name them.
    """
    buffer, named = io.BytesIO(), set(data_files(sources, root))
    library = [
        path for path in (root / LIBRARY).rglob("*") if path.suffix in (".py", ".json")
    ]
    companion = root / FOLDERS[COMPANION] / f"{COMPANION}.py"
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted({*library, companion, *named}):
            # A bare ZipInfo has a fixed date.
            entry = zipfile.ZipInfo(path.relative_to(root).as_posix())
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    packed = buffer.getvalue()
    return base64.b64encode(packed).decode(), hashlib.sha256(packed).hexdigest()[:10]


def needed_packages(sources: list[str], root: Path) -> dict[str, str]:
    """Map the import name of every package that `sources` need to its requirement in
    pyproject.toml.
    """
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extra = project["optional-dependencies"]["notebooks"]
    requirements = project["dependencies"] + extra
    by_module = {}
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)[0]
        by_module[IMPORT_NAMES.get(name, name.replace("-", "_"))] = requirement
    imports, strings = outside_names(sources, root)
    # A package that is only asked for its files is not imported: its name stands in a
    # string.
    named = {
        module
        for module, requirement in by_module.items()
        if re.match(r"[\w.-]+", requirement)[0] in strings
    }
    unknown = imports - by_module.keys() - sys.stdlib_module_names - PRESENT
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))} is imported but is no requirement in"
            " pyproject.toml; add it to the dependencies or the extra `notebooks` (and"
            " its import name to export_colab.py if it differs)"
        )
    return {
        module: by_module[module]
        for module in sorted((imports | named) & by_module.keys())
    }


def repository_url(root: Path) -> str:
    """Read the public repository's address from _config.yml, or return ""."""
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    return (config.get("repository") or {}).get("url") or ""


def convert(
    path: Path, root: Path, edit: Callable[[NotebookNode], NotebookNode] | None = None
) -> NotebookNode:
    """Make the self-contained copy of one notebook, which `edit` may change first."""
    notebook = nbformat.read(path, as_version=4)
    if edit is not None:
        notebook = edit(notebook)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if OUR_SETUP not in cell.metadata.get("tags", ())
    ]
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    references = parse_file(root / "book" / "references.bib")
    pages = pages_url(repository_url(root))
    plain = PlainMarkdown(
        [cell.source for cell in texts], path.parent, root, references, pages
    ).convert()
    for cell, source in zip(texts, plain, strict=True):
        cell.source = source
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    has_outputs = len(json.dumps(outputs)) <= MOST_OUTPUTS
    for cell in code:
        cell.execution_count = None
        if not has_outputs:
            cell.outputs = []
        tags = set(cell.metadata.get("tags", ()))
        cell.metadata = nbformat.from_dict(FOLDED_SOURCE if HIDDEN & tags else {})
        if HIDDEN_OUTPUTS & tags:
            cell.metadata.collapsed = True
            cell.metadata.setdefault("jupyter", NotebookNode()).outputs_hidden = True
        if SOLUTION in tags:
            cell.source = f"# @title Solution\n{cell.source}"
    first = next(
        (i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"),
        len(notebook.cells),
    )
    help_text = HELP if pages else HELP + WITHOUT_ADDRESS
    help_cell = nbformat.v4.new_markdown_cell(help_text, id="on-colab")
    notebook.cells[first:first] = [
        help_cell,
        _setup_cell([cell.source for cell in code], root),
    ]
    notebook.metadata.pop("executed", None)
    notebook.metadata["colab"] = {"provenance": [], "toc_visible": True}
    return notebook


def _setup_cell(sources: list[str], root: Path) -> NotebookNode:
    library, digest = pack_library(sources, root)
    source = (root / LIBRARY / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', source, re.M)[1]
    filled = SETUP.read_text(encoding="utf-8")
    filled = filled.replace("DIGEST", digest).replace("VERSION", version)
    for name, value in (
        ("packages", needed_packages(sources, root)),
        ("library", library),
    ):
        filled, count = re.subn(
            rf"^{name} = (?:{{}}|\"\")", f"{name} = {value!r}", filled, flags=re.M
        )
        assert count == 1, f"{SETUP.name} has no empty `{name}` to fill"
    return nbformat.v4.new_code_cell(
        filled.strip(), id="setup", metadata=nbformat.from_dict(FOLDED_SOURCE)
    )


def export(
    path: Path,
    folder: Path,
    root: Path = ROOT,
    edit: Callable[[NotebookNode], NotebookNode] | None = None,
) -> Path:
    """Write the self-contained copy of a notebook, changed by `edit` first, into
    `folder`.
    """
    try:
        copy = convert(path, root, edit)
    except ValueError as error:
        raise ValueError(
            f"{path.name} can't be made self-contained: {error}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    write_text(target, nbformat.writes(copy, version=4) + "\n")
    return target


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the copies")
    parser.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    options = parser.parse_args(arguments)
    try:
        for path in options.notebooks:
            print(export(path, options.folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
