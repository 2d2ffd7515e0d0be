"""Draw formulas with the KaTeX that lies in book/_static: from no other host, and only
on pages that have formulas.

KaTeX weighs a third of MathJax, breaks long inline formulas on a phone, and has drawn
them before the page is shown.
"""

from sphinx.application import Sphinx
from sphinx.ext.mathjax import html_visit_displaymath, html_visit_math


def _add_files(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    if app.builder.format == "html" and app.env.get_domain("math").has_equations(page):
        app.add_css_file("katex/katex.min.css")
        app.add_js_file("katex/katex.min.js", loading_method="defer")
        # After KaTeX.
        app.add_js_file("render_math.js", loading_method="defer", priority=600)


def setup(app: Sphinx) -> dict:
    # Sphinx's own writers for MathJax leave the TeX between delimiters, which is all
    # that is needed.
    app.add_html_math_renderer(
        "katex", (html_visit_math, None), (html_visit_displaymath, None)
    )
    app.connect("html-page-context", _add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
