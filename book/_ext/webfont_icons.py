"""Keep the theme's icon script out of the built book.

The theme ships Font Awesome twice: as a web font with its style sheet (0.16 MB) and as a script of 1.5 MB that replaces
each icon by an SVG. The font alone draws the same icons, and a page without the script stays under 2 MB.
"""

from pathlib import Path

from sphinx.application import Sphinx

SCRIPT = "_static/scripts/fontawesome.js"


def _empty_the_script(app: Sphinx, exception: Exception | None) -> None:
    script = Path(app.outdir, SCRIPT)
    if exception is None and script.exists():
        script.write_text("/* left empty: the web font draws the icons */\n")


def setup(app: Sphinx) -> dict:
    app.connect("build-finished", _empty_the_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
