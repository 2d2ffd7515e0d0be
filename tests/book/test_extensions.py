"""The book's Sphinx extensions: docstrings, buttons, and what keeps a page light."""

import sys

import pytest
from built import HTML, ROOT, pages, why_not_built

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from accessible import mend_body, name_toggles  # noqa: E402
from docstrings import to_rst  # noqa: E402
from selfcontained import BRANCH, FOLDER, colab_url  # noqa: E402


@pytest.mark.parametrize(
    ("written", "expected"),
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
def test_docstring_markup(written, expected):
    assert to_rst(written).strip("\n").rstrip() == expected


@pytest.mark.parametrize(
    "written",
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
def test_the_three_fields_in_each_layout(written):
    assert to_rst(written) == (
        "Do it.\n\n:Source: A, Eq. 1, and :math:`B`.\n:Departures: none.\n"
        ":Test: ``test_a.py::test_b``\n"
    )


def test_tables_of_docstrings():
    table = to_rst("Symbols.\n\n| paper | here |\n|---|---|\n| $M$ | `m` |\n\nAfter.\n")
    cells = ["   * - paper", "     - here", "   * - :math:`M`", "     - ``m``"]
    assert "\n".join([".. list-table::", "   :header-rows: 1", "", *cells]) in table
    assert table.rstrip().endswith("\n\nAfter.")


def test_fields_of_a_tuple_become_a_list():
    row = "Row.\n\nname: of it,\n    in full.\nsize: in px.\n\nNot: this one.\n"
    fields = "Row.\n\n:ivar name: of it,\n    in full.\n:ivar size: in px.\n\nNot: this"
    assert to_rst(row).startswith(fields)


def test_the_colab_address_follows_the_repository():
    assert colab_url("https://github.com/a-fork/papers", "01_x") == (
        "https://colab.research.google.com/github/a-fork/papers"
        f"/blob/{BRANCH}/{FOLDER}/01_x.ipynb"
    )
    for elsewhere in ("", "https://gitlab.com/a/b", "https://github.com/only-owner"):
        assert colab_url(elsewhere, "01_x") == ""


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


# ---- what a screen reader gets ----


def test_a_signatures_list_becomes_lines_and_other_lists_stay():
    html = (
        '<dt class="sig sig-object" id="f">f(<dl>\n<dd><em>x</em>,</dd>\n</dl>\n)</dt>'
        "<dl><dt>a</dt><dd>b</dd></dl>"
    )
    mended = mend_body(html)
    assert "<dl><dt>a</dt><dd>b</dd></dl>" in mended
    assert (
        '<span class="sig-lines">\n<span class="sig-lines"><em>x</em>,</span>\n</span>'
        in mended
    )


def test_a_bibliography_is_no_list_without_items():
    html = (
        '<div role="list" class="citation-list">\n<div class="citation" id="a"'
        ' role="doc-biblioentry">'
    )
    assert (
        mend_body(html) == '<div class="citation-list">\n<div class="citation" id="a">'
    )


def test_a_button_that_unfolds_says_what():
    html = (
        '<ul><li class="has-children"><a'
        ' href="a.html">CAM</a><details><summary><i></i></summary></details></li></ul>'
    )
    assert '<summary aria-label="Pages below “CAM”">' in name_toggles(html)
