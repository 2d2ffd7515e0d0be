"""Mend what Sphinx and the theme write and a screen reader can't use: buttons without a
name, lists that are none.

tests/book/test_reading.py looks for such faults with axe-core; what it found in pages
that we do not write is here.
"""

import re
from functools import cache

from bs4 import BeautifulSoup
from sphinx.application import Sphinx

SIGNATURE = re.compile(r'<dt class="sig[^>]*>.*?</dt>', re.S)
# docutils marks a bibliography as a list whose children are no list items; without
# roles it is plain text.
NO_LIST = re.compile(
    r' role="(?:list|doc-biblioentry)"(?= class="citation)|(?<=")'
    r' role="doc-biblioentry"'
)


def mend_body(html: str) -> str:
    """Return a page's body with a long signature's parameters as spans, and a
    bibliography without list roles.
    """

    def spans(match: re.Match) -> str:
        # Sphinx writes one parameter a line as a <dl> without a single <dt>; course.css
        # sets the lines.
        return re.sub(
            r"</d[ld]>",
            "</span>",
            re.sub(r"<d[ld]>", '<span class="sig-lines">', match[0]),
        )

    return NO_LIST.sub("", SIGNATURE.sub(spans, html))


@cache
def name_toggles(html: str) -> str:
    """Return the table of contents with a name for every button that unfolds a part of
    it.
    """
    tree = BeautifulSoup(html, "html.parser")
    for summary in tree.select("li > details > summary"):
        link = summary.find_parent("li").find("a")
        summary["aria-label"] = f"Pages below “{link.get_text(strip=True)}”"
    return str(tree)


def _mend(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    if "body" in context:
        context["body"] = mend_body(context["body"])
    if make := context.get("generate_toctree_html"):
        context["generate_toctree_html"] = lambda *given, **named: name_toggles(
            str(make(*given, **named))
        )


def setup(app: Sphinx) -> dict:
    # After the theme has put its functions there.
    app.connect("html-page-context", _mend, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
