"""Write a page of the API for each paper and shared module, into book/api.

It happens before Sphinx reads the table of contents. The pages hold nothing but
autodoc's directives, so they are made anew at each build and not committed.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))
sys.path.insert(0, str(ROOT / "book"))
import api_names  # noqa: E402
from grading.submission import CHAPTERS  # noqa: E402

from paperlib.storage import write_text  # noqa: E402

FOLDER = Path("book/api")
PAPERS = ("complexity", "mobilenet", "cam", "gradcam", "patch_svdd", "padim")
# What a package exports is documented under the package's path.
MODULE = """\
.. automodule:: {name}
   :members:
   :{which}:
"""


def page_text(root: Path, page: str) -> str:
    """Compose a page of the API: a directive of autodoc per module."""
    is_package = (root / "paperlib" / page).is_dir() and page != api_names.EXERCISES
    texts = [
        MODULE.format(
            name=name,
            which="imported-members"
            if is_package and name == f"paperlib.{page}"
            else "ignore-module-all",
        )
        for name in api_names.directives(root, page)
    ]
    directives = "\n".join(texts)
    return f"# paperlib.{page}\n\n```{{eval-rst}}\n{directives}```\n"


def list_of_pages(summaries: dict[str, str]) -> str:
    """Compose what book/api.md includes: a table of the papers, and one of the rest."""
    shared = [page for page in summaries if page not in PAPERS]
    parts = []
    for title, names in (("Papers", PAPERS), ("Shared", shared)):
        rows = [f"| [`{name}`](api/{name}.md) | {summaries[name]} |" for name in names]
        parts.append(
            "\n".join([f"## {title}\n", "| Module | Content |", "|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def write_pages(root: Path) -> None:
    """Write the pages and the list of them; remove pages of modules that are gone."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    summaries = api_names.pages(root)
    texts = {f"{page}.md": page_text(root, page) for page in summaries}
    texts["modules.txt"] = list_of_pages(summaries)
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
