"""Write one page for each module of paperlib, into book/api, before Sphinx reads the
table of contents.

The pages hold nothing but autodoc's directive, so they are made anew at each build and
not committed.
"""

import ast
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))
sys.path.insert(0, str(ROOT / "book"))
import atomic  # noqa: E402
from grading.submission import CHAPTERS  # noqa: E402

FOLDER = Path("book/api")
PAGE = """\
# paperlib.{name}

```{{eval-rst}}
.. automodule:: paperlib.{name}
   :members:
   :ignore-module-all:
```
"""


def modules(root: Path) -> dict[str, str]:
    """Map the name of each public module, without `paperlib.`, to the first line of its
    docstring.
    """
    found = {}
    for path in sorted((root / "paperlib").rglob("*.py")):
        name = ".".join(
            path.relative_to(root / "paperlib").with_suffix("").parts
        ).removesuffix(".__init__")
        if not any(part.startswith("_") for part in name.split(".")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def write_pages(root: Path) -> None:
    """Write the pages and, for book/api.md to include, the list of them; remove pages
    of modules that are gone.
    """
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    public = modules(root)
    texts = {f"{name}.md": PAGE.format(name=name) for name in public}
    rows = [
        f"| [`{name}`](api/{name}.md) | {summary} |" for name, summary in public.items()
    ]
    texts["modules.txt"] = (
        "\n".join(["| Module | What it holds |", "|---|---|", *rows]) + "\n"
    )
    for path in folder.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        # An unchanged file keeps its time, so that its page is not built again.
        if (
            not (folder / name).exists()
            or (folder / name).read_text(encoding="utf-8") != text
        ):
            atomic.write_text(folder / name, text)


def hide_checks(app: Sphinx, module: str) -> tuple[str, dict] | None:
    """Keep viewcode from publishing the source of the exercises' checks: it holds what
    is right.
    """
    package, _, name = module.rpartition(".")
    if package != "paperlib.exercises" or name not in CHAPTERS:
        return None  # viewcode reads the source itself
    return (
        "# The checks know the answers, so their source is in the repository only.\n",
        {},
    )


def setup(app: Sphinx) -> dict:
    write_pages(ROOT)
    app.connect("viewcode-find-source", hide_checks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
