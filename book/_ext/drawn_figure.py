"""`{drawn}`: a figure of a paper page, drawn by book/figures and set into the page.

    ```{drawn} gradcam/data_flow
    :alt: what a reader who cannot see it needs to know

    The caption.
    ```

In a chapter it is numbered (Figure 3.1) and can be referred to by its name:
`[](#gradcam-data-flow)` becomes "Figure 3.1". Elsewhere it has no number and may have
no caption.
"""

import re
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
import draw  # noqa: E402


class Figure(nodes.General, nodes.Element):
    """Not docutils' own figure, which Sphinx would number through the whole book."""


class Caption(nodes.Part, nodes.TextElement):
    """Below the figure."""


class Drawn(SphinxDirective):
    """See above."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        paper, _, name = self.arguments[0].partition("/")
        files = draw.files(paper, name)
        if not files:
            raise self.error(
                f"no figure {self.arguments[0]!r}; draw it with `make figures`"
            )
        if not self.options.get("alt"):
            raise self.error(f"{self.arguments[0]}: expected an :alt:")
        for path in files:
            self.env.note_dependency(str(path))
        parts = "\n".join(path.read_text(encoding="utf-8") for path in files)
        label = escape(" ".join(self.options["alt"].split()), quote=True)
        image = nodes.raw(
            "",
            f'<div class="drawing" role="img" aria-label="{label}">{parts}</div>',
            format="html",
        )
        target = f"{paper}-{name}".replace("_", "-")
        figure = Figure("", image, classes=["drawn"], ids=[target])
        self.set_source_info(figure)
        if not self.content:
            return [figure]

        caption = Caption()
        if chapter := re.match(r"\d+(?=_)", Path(self.env.docname).name):
            n = self.env.new_serialno("drawn") + 1
            number = f"Figure {int(chapter[0])}.{n}"
            caption += [nodes.strong("", f"{number}."), nodes.Text(" ")]
            standard = self.env.get_domain("std")
            standard.note_hyperlink_target(target, self.env.docname, target, number)
        parsed = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, parsed)
        if len(parsed) != 1 or not isinstance(parsed[0], nodes.paragraph):
            raise self.error(
                f"{self.arguments[0]}: expected a caption of one paragraph"
            )
        caption += parsed[0].children
        figure += caption
        return [figure]


def _element(tag: str) -> tuple[Callable, Callable]:
    """Return a node's visitors for HTML: they write its children inside `tag`."""

    def visit(writer: HTML5Translator, node: nodes.Element) -> None:
        writer.body.append(writer.starttag(node, tag))

    def depart(writer: HTML5Translator, node: nodes.Element) -> None:
        writer.body.append(f"</{tag}>\n")

    return visit, depart


def setup(app: Sphinx) -> dict:
    app.add_node(Figure, html=_element("figure"))
    app.add_node(Caption, html=_element("figcaption"))
    app.add_directive("drawn", Drawn)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
