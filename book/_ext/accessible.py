"""Fix HTML of Sphinx and the theme for screen readers: unnamed buttons, wrong roles.

tests/book/test_reading.py finds such errors with axe-core. This extension fixes those
in HTML that Sphinx or the theme generates. It also names the folds of solutions.
"""

import re
from functools import cache

from bs4 import BeautifulSoup
from docutils import nodes
from sphinx.application import Sphinx

SIGNATURE = re.compile(r'<dt class="sig[^>]*>.*?</dt>', re.S)
# docutils gives a bibliography the role of a list, but its children are not list items.
# Without roles it is read as plain text.
BIBLIOGRAPHY_ROLE = re.compile(
    r' role="(?:list|doc-biblioentry)"(?= class="citation)|(?<=")'
    r' role="doc-biblioentry"'
)


def fix_body(html: str) -> str:
    """Fix a page's body: parameters of long signatures, roles of the bibliography."""

    def use_spans(match: re.Match) -> str:
        # Sphinx writes the parameters of a long signature as <dl> without any <dt>;
        # course.css displays the spans as lines.
        return re.sub(
            r"</d[ld]>",
            "</span>",
            re.sub(r"<d[ld]>", '<span class="sig-lines">', match[0]),
        )

    return BIBLIOGRAPHY_ROLE.sub("", SIGNATURE.sub(use_spans, html))


@cache
def name_toggles(html: str) -> str:
    """Add a name to each button that expands a part of the table of contents."""
    tree = BeautifulSoup(html, "html.parser")
    for summary in tree.select("li > details > summary"):
        link = summary.find_parent("li").find("a")
        summary["aria-label"] = f"Pages below “{link.get_text(strip=True)}”"
    return str(tree)


def _name_solutions(app: Sphinx, document: nodes.document) -> None:
    for cell in document.findall(nodes.container):
        if "tag_solution" in cell["classes"]:
            cell["prompt_show"] = cell["prompt_hide"] = "Solution"


def _fix_page(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    if "body" in context:
        context["body"] = fix_body(context["body"])
    if make := context.get("generate_toctree_html"):
        context["generate_toctree_html"] = lambda *args, **kwargs: name_toggles(
            str(make(*args, **kwargs))
        )


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", _name_solutions)
    # With a late priority, after the theme has added its functions to the context.
    app.connect("html-page-context", _fix_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
