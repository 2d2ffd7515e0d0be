"""Offer every notebook as a self-contained copy: in its page's download menu, and on
Colab where it is published.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from addresses import FOLDER, colab_url  # noqa: E402
from export_colab import export  # noqa: E402


def _is_notebook(app: Sphinx, page: str) -> bool:
    return page in app.env.found_docs and str(app.env.doc2path(page)).endswith(".ipynb")


def _add_buttons(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    if not _is_notebook(app, page):
        return
    name = Path(page).name
    groups = context.get("header_buttons", [])
    for group in groups:
        if group.get("label") == "download-buttons":
            copy = {
                "type": "link",
                "url": context["pathto"](f"{FOLDER}/{name}.ipynb", 1),
                "text": "for Colab (self-contained)",
                "tooltip": (
                    "Download a copy that carries the library, for Colab or an empty"
                    " folder"
                ),
                "icon": "fas fa-box-open",
                "label": "download-colab-button",
            }
            group["buttons"].insert(0, copy)
    repository = app.config.html_theme_options.get("repository_url") or ""
    address = colab_url(repository, name)
    if address:
        button = {
            "type": "link",
            "url": address,
            "tooltip": "Open in Colab",
            "icon": "fas fa-rocket",
            "label": "launch-colab-button",
        }
        groups.insert(0, button)


def _write_copies(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        for page in sorted(app.env.found_docs):
            if _is_notebook(app, page):
                export(Path(app.env.doc2path(page)), Path(app.outdir, FOLDER))


def setup(app: Sphinx) -> dict:
    # After the theme has made its buttons.
    app.connect("html-page-context", _add_buttons, priority=900)
    app.connect("build-finished", _write_copies)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
