"""Write the ledger's pages before Sphinx reads the table of contents, and give tagged
notebook cells their anchors.

What is wrong with the ledger is a warning, which fails the build.
"""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))
import ledger  # noqa: E402


def _anchor_cells(app: Sphinx, doctree: nodes.document) -> None:
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code":
            tags = cell.get("cell_metadata", {}).get("tags", ())
            cell["ids"] += [
                ledger.anchor(tag) for tag in tags if ledger.MARK.fullmatch(tag)
            ]


def setup(app: Sphinx) -> dict:
    found = ledger.collect(ROOT)
    for problem in found.problems:
        logging.getLogger(__name__).warning("ledger: %s", problem)
    ledger.write(ROOT, found)
    app.connect("doctree-read", _anchor_cells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
