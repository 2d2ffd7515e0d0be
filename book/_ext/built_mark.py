"""Know how old the built book is, and build it anew when the code that builds it has changed.

Sphinx rebuilds a page when its source changes. It does not notice an edit in these extensions or in book/tools; their
hash, as a configuration value, makes it do so.
"""

import hashlib
import os
import time
from pathlib import Path

from sphinx.application import Sphinx

BOOK = Path(__file__).resolve().parents[1]
MARK = ".built"


def _mark(app: Sphinx, exception: Exception | None) -> None:
    if exception is None:
        mark = Path(app.outdir, MARK)
        mark.touch()
        # A source edited while the book was building is newer than the book.
        os.utime(mark, (app.build_began, app.build_began))


def setup(app: Sphinx) -> dict:
    app.build_began = time.time()
    code = b"".join(path.read_bytes() for folder in ("_ext", "tools") for path in sorted(BOOK.glob(f"{folder}/*.py")))
    app.add_config_value("book_code", hashlib.sha256(code).hexdigest(), "env")
    app.connect("build-finished", _mark, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
