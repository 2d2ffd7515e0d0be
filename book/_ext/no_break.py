"""Keep a number and its unit in one line: 5 % and 65 MB are never divided."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

# A text that begins with a unit follows a formula: $\alpha^2 = 6$ %.
UNIT = re.compile(r"(?:(?<=\d)|^) (?=(?:%|px|kB|MB|GB|ms)(?!\w))")
NO_BREAK = "\u00a0"


class KeepUnits(SphinxPostTransform):
    """Replace the space before a unit in the text of a page, but not in its code."""

    default_priority = 900

    def run(self, **options: object) -> None:
        for text in list(self.document.findall(nodes.Text)):
            kept = UNIT.sub(NO_BREAK, text)
            if kept != text and not _in_code(text):
                text.parent.replace(text, nodes.Text(kept))


def _in_code(text: nodes.Text) -> bool:
    parent = text.parent
    while parent is not None:
        if isinstance(
            parent, (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block)
        ):
            return True
        parent = parent.parent
    return False


def setup(app: Sphinx) -> dict:
    app.add_post_transform(KeepUnits)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
