"""The book's Sphinx extensions: docstrings, buttons, and small pages."""

import sys

import pytest
from addresses import BRANCH, FOLDER, colab_url
from built import HTML, ROOT, pages, why_not_built
from docutils import nodes
from docutils.utils import new_document

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from accessible import fix_body, name_toggles  # noqa: E402
from docstrings import to_rst  # noqa: E402
from no_break import KeepUnits  # noqa: E402


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Take $x$ and `y`.", "Take :math:`x` and ``y``."),
        ("the $M$s, 2$x$", "the :math:`M`\\ s, 2\\ :math:`x`"),
        ("over $a +\n    b$ lines", "over :math:`a + b` lines"),
        ("costs `5$` or ``$6``", "costs ``5$`` or ``$6``"),
        ("already :math:`x` and :class:`C`", "already :math:`x` and :class:`C`"),
        ("an escaped \\$ sign", "an escaped \\$ sign"),
        ("$$a = b$$", ".. math::\n\n   a = b"),
        (
            "$$a$$   with $b$ = `c`\nand more.",
            ".. math::\n\n   a\n\nwith :math:`b` = ``c``\nand more.",
        ),
        ("  $$\n  a \\\\\n  b\n  $$", "  .. math::\n\n     a \\\\\n     b"),
    ],
)
def test_docstring_markup(docstring, expected):
    assert to_rst(docstring).strip("\n").rstrip() == expected


@pytest.mark.parametrize(
    "docstring",
    [
        (
            "Do it.\n\nSource: A, Eq. 1,\n    and $B$. Departures: none. Test:"
            " test_a.py::test_b\n"
        ),
        (
            "Do it.\n\nSource: A, Eq. 1, and $B$.  Departures: none.  Test:"
            " test_a.py::test_b\n"
        ),
        (
            "Do it.\n\nSource: A, Eq. 1, and $B$.\nDepartures: none.\nTest:"
            " test_a.py::test_b\n"
        ),
    ],
)
def test_the_three_fields_in_each_layout(docstring):
    assert to_rst(docstring) == (
        "Do it.\n\n:Source: A, Eq. 1, and :math:`B`.\n:Departures: none.\n"
        ":Test: ``test_a.py::test_b``\n"
    )


def test_tables_of_docstrings():
    table = to_rst("Symbols.\n\n| paper | here |\n|---|---|\n| $M$ | `m` |\n\nAfter.\n")
    cells = ["   * - paper", "     - here", "   * - :math:`M`", "     - ``m``"]
    assert "\n".join([".. list-table::", "   :header-rows: 1", "", *cells]) in table
    assert table.rstrip().endswith("\n\nAfter.")


def test_fields_of_a_tuple_become_a_list():
    fields = "name: of a row,\n    in full.\nsize: in px."
    rst = to_rst(f"Row.\n\n{fields}\n\nNot: a field.\n")
    expected = ":ivar name: of a row,\n    in full.\n:ivar size: in px."
    assert rst.startswith(f"Row.\n\n{expected}\n\nNot: a field.")


def test_the_colab_address_follows_the_repository():
    assert colab_url("https://github.com/a-fork/papers", "01_x") == (
        "https://colab.research.google.com/github/a-fork/papers"
        f"/blob/{BRANCH}/{FOLDER}/01_x.ipynb"
    )
    for address in ("", "https://gitlab.com/a/b", "https://github.com/only-owner"):
        assert colab_url(address, "01_x") == ""


def test_the_workflow_publishes_where_the_buttons_point():
    workflow = (ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8")
    assert f"--initial-branch={BRANCH}" in workflow
    assert f"{FOLDER}/01_mobilenet.ipynb" in workflow


def test_pages_load_neither_the_icon_script_nor_the_search_index():
    problem = why_not_built()
    assert not problem, problem
    for page in pages():
        html = (HTML / page).read_text(encoding="utf-8")
        assert "fontawesome.js" not in html, page
        assert ("searchindex.js" in html) == (page == "search.html"), page
    assert list((HTML / "_static").rglob("fa-solid-900.woff2"))


def test_units_stay_beside_their_numbers_except_in_code():
    paragraph = nodes.paragraph("", "", nodes.Text("4 px, 65 MB, 5 msgs, then "))
    paragraph += nodes.literal("", "5 %")
    paragraph += nodes.math("", "x = 6")
    paragraph += nodes.Text(" % or 7 %")
    document = new_document("page")
    document += paragraph
    KeepUnits(document).run()
    assert paragraph.astext() == (
        "4\u00a0px, 65\u00a0MB, 5 msgs, then 5 %x = 6\u00a0% or 7\u00a0%"
    )


# ---- screen readers ----


def test_the_parameters_of_a_signature_become_spans_and_other_lists_remain():
    html = (
        '<dt class="sig sig-object" id="f">f(<dl>\n<dd><em>x</em>,</dd>\n</dl>\n)</dt>'
        "<dl><dt>a</dt><dd>b</dd></dl>"
    )
    fixed = fix_body(html)
    assert "<dl><dt>a</dt><dd>b</dd></dl>" in fixed
    assert (
        '<span class="sig-lines">\n<span class="sig-lines"><em>x</em>,</span>\n</span>'
        in fixed
    )


def test_a_bibliography_has_no_list_roles():
    html = (
        '<div role="list" class="citation-list">\n<div class="citation" id="a"'
        ' role="doc-biblioentry">'
    )
    assert (
        fix_body(html) == '<div class="citation-list">\n<div class="citation" id="a">'
    )


def test_a_button_that_expands_has_a_name():
    html = (
        '<ul><li class="has-children"><a'
        ' href="a.html">CAM</a><details><summary><i></i></summary></details></li></ul>'
    )
    assert '<summary aria-label="Pages below “CAM”">' in name_toggles(html)
