"""Write a page of the API for each module that users import, into book/api.

It happens before Sphinx reads the table of contents. The pages hold nothing but
autodoc's directives, so they are made anew at each build and not committed.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))
import api_names  # noqa: E402

from paperlib.storage import write_text  # noqa: E402

FOLDER = Path("book/api")
# What a module exports is documented under its own path.
MODULE = """\
```{{eval-rst}}
.. automodule:: {name}
   :members:
   :special-members: __call__
   :exclude-members: get_extra_state, set_extra_state, extra_repr
   :{which}:
```
"""


def page_text(root: Path, page: str) -> str:
    """Compose a page of the API: a directive of autodoc per module."""
    own, *others = api_names.directives(root, page)
    exports = api_names.exported(api_names.module_file(root, page)) is not None
    which = {own: "imported-members" if exports else "ignore-module-all"}
    which |= dict.fromkeys(others, "ignore-module-all")
    return "\n".join(
        f"{'#' if name == own else '##'} {name}\n\n{MODULE.format(name=name, which=w)}"
        for name, w in which.items()
    )


def list_of_pages(root: Path) -> str:
    """Compose what book/api.md includes: a table of pages per group."""
    parts = []
    for title, pages in api_names.GROUPS.items():
        rows = [
            f"| [`{page}`](api/{page}.md) | {api_names.summary(root, page)} |"
            for page in pages
        ]
        parts.append(
            "\n".join([f"## {title}\n", "| Module | Content |", "|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def write_pages(root: Path) -> None:
    """Write the pages and the list of them; remove pages of modules that are gone."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    texts = {
        f"{page}.md": page_text(root, page)
        for pages in api_names.GROUPS.values()
        for page in pages
    }
    texts["modules.txt"] = list_of_pages(root)
    for path in folder.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        # An unchanged file keeps its time, so that its page is not built again.
        old = folder / name
        if not old.exists() or old.read_text(encoding="utf-8") != text:
            write_text(old, text)


def hide_checks(app: Sphinx, module: str) -> tuple[str, dict] | None:
    """Keep viewcode from publishing the source of the exercises' checks: it holds what
    is right.
    """
    package, _, name = module.rpartition(".")
    if package != "paperlib.exercises" or name in ("given", "verdict"):
        return None  # viewcode reads the source itself
    return (
        "# The checks know the answers, so their source is in the repository only.\n",
        {},
    )


def repair_backlinks(
    app: Sphinx, pagename: str, template: str, context: dict, _
) -> None:
    """Let the page of a source file link objects under the path that users import.

    viewcode assumes that all objects of a file are on the page of the first one.
    """
    if pagename.startswith("_modules/"):
        context["body"] = re.sub(
            r"(api/(\w+)\.html#paperlib\.)(?!\2\.)\w+\.", r"\1\2.", context["body"]
        )


def setup(app: Sphinx) -> dict:
    write_pages(ROOT)
    app.connect("html-page-context", repair_backlinks)
    app.connect("viewcode-find-source", hide_checks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
