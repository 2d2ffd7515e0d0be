"""Know how old the built book is, build it anew when the code that builds it has
changed, and drop what is left over.

Sphinx rebuilds a page when its source changes. It does not notice an edit in these
extensions, in book/tools or in the templates; their hash, as a configuration value,
makes it do so. It leaves the page of a source that is gone, and it leaves the listing
of a module alone while the module is the same, whatever became of the page around it.
"""

import hashlib
import os
import time
from pathlib import Path

from sphinx.application import Sphinx

BOOK = Path(__file__).resolve().parents[1]
MARK = ".built"
KINDS = ("_ext/*.py", "tools/*.py", "_templates/*.html")
AROUND = (*KINDS, "_toc.yml", "../_config.yml")


def _remove_old_listings(app: Sphinx) -> None:
    changed = max(path.stat().st_mtime for kind in AROUND for path in BOOK.glob(kind))
    for page in Path(app.outdir, "_modules").rglob("*.html"):
        if page.stat().st_mtime < changed:
            page.unlink()


def _remove_leftovers(app: Sphinx, exception: Exception | None) -> None:
    for folder in ("book", "notebooks"):
        for page in Path(app.outdir, folder).rglob("*.html"):
            if (
                page.relative_to(app.outdir).with_suffix("").as_posix()
                not in app.env.found_docs
            ):
                page.unlink()


def _mark(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        mark = Path(app.outdir, MARK)
        mark.touch()
        # A source edited while the book was building is newer than the book.
        os.utime(mark, (app.build_began, app.build_began))


def setup(app: Sphinx) -> dict:
    app.build_began = time.time()
    code = b"".join(
        path.read_bytes() for kind in KINDS for path in sorted(BOOK.glob(kind))
    )
    app.add_config_value("book_code", hashlib.sha256(code).hexdigest(), "env")
    app.connect("builder-inited", _remove_old_listings)
    app.connect("build-finished", _remove_leftovers)
    app.connect("build-finished", _mark, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
