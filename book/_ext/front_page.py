"""Write index.html: a small page that forwards to the book's first page, and says so to
readers who are not forwarded.

Without one, sphinx-external-toc writes a bare `<meta refresh>`: no title, no language,
and no icon, so that a browser asks for /favicon.ico, which is not there.
"""

import html
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from paperlib.storage import write_text  # noqa: E402

PAGE = """<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="canonical" href="{target}">
<link rel="icon" href="_static/{icon}">
<meta http-equiv="refresh" content="0; url={target}">
</head>
<body>
<main>
<h1>{title}</h1>
<p><a href="{target}">Open the first page of the book</a></p>
</main>
</body>
</html>
"""


def front_page(title: str, language: str, icon: str, target: str) -> str:
    """Return the HTML of the page that forwards to `target`; all arguments are plain
    text.
    """
    values = {"title": title, "language": language, "icon": icon, "target": target}
    return PAGE.format_map({name: html.escape(text) for name, text in values.items()})


def _write(app: Sphinx, exception: Exception | None) -> None:
    if (
        exception is None
        and app.builder.name == "html"
        and app.config.root_doc != "index"
    ):
        config = app.config
        page = front_page(
            config.html_title,
            config.language,
            Path(config.html_favicon).name,
            app.builder.get_target_uri(config.root_doc),
        )
        write_text(Path(app.outdir, "index.html"), page)


def setup(app: Sphinx) -> dict:
    app.connect("build-finished", _write, priority=900)  # after sphinx-external-toc
    return {"parallel_read_safe": True, "parallel_write_safe": True}
