"""The book's Sphinx extensions: docstrings, buttons, and what keeps a page light."""

import base64
import io
import re
import sys

import nbformat
import numpy as np
import pytest
from built import HTML, ROOT, pages, why_not_built
from PIL import Image

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from accessible import mend_body, name_toggles  # noqa: E402
from chapter_picture import cut, find  # noqa: E402
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


# ---- pictures of the opening page ----


def figure():
    """A figure of three coloured panels in a row, a thin white gap between any two."""
    drawn = np.full((60, 320, 3), 255, np.uint8)
    for place, colour in zip(
        (10, 112, 214), ((200, 0, 0), (0, 200, 0), (0, 0, 200)), strict=True
    ):
        drawn[5:55, place : place + 96] = colour
    return Image.fromarray(drawn)


def notebook(alt="three squares"):
    buffer = io.BytesIO()
    figure().save(buffer, "PNG")
    shown = nbformat.v4.new_output(
        "display_data", data={"image/png": base64.b64encode(buffer.getvalue()).decode()}
    )
    described = {"mystnb": {"image": {"alt": alt}}} if alt else {}
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Title\n\n## The result first: squares"),
            nbformat.v4.new_code_cell("compute()"),
            nbformat.v4.new_code_cell("draw()", outputs=[shown], metadata=described),
            nbformat.v4.new_markdown_cell(
                "## What you will be able to do\n\n## By hand"
            ),
        ]
    )


def test_the_picture_below_a_heading_is_found_with_its_text():
    heading, picture, alt = find(notebook(), "The result first")
    assert (heading, alt) == ("The result first: squares", "three squares")
    assert np.array_equal(np.asarray(picture), np.asarray(figure()))


def test_a_heading_without_picture_or_a_picture_without_text_is_refused():
    with pytest.raises(ValueError, match="no picture below a heading 'By hand'"):
        find(notebook(), "By hand")
    with pytest.raises(ValueError, match="no alt text"):
        find(notebook(alt=""), "The result first")


def test_whole_panels_are_cut_and_trimmed():
    # 64 % is inside the second gap's reach, not on it.
    part = np.asarray(cut(figure(), (0, 64), (0, 100)))
    assert part.shape == (50, 198, 3)
    assert part[25, 0].tolist() == [200, 0, 0] and part[25, -1].tolist() == [0, 200, 0]


def test_a_cut_through_a_panel_is_refused():
    with pytest.raises(ValueError, match="no white column near 50 % of the figure"):
        cut(figure(), (0, 50), (0, 100))


def test_the_opening_page_shows_what_the_notebooks_hold():
    """Cut anew, each picture is the one that was built."""
    text = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\{chapter-picture\} \.\./(\S+)\n(.*?)```", text, re.S)
    assert [name for name, _ in blocks] == [
        f"notebooks/{path.name}" for path in sorted(ROOT.glob("notebooks/*.ipynb"))
    ]
    for name, block in blocks:
        options = dict(re.findall(r":(\w+): (.+)", block))
        shares = {
            key: tuple(map(float, options.get(key, "0 100").split()))
            for key in ("columns", "rows")
        }
        expected = cut(
            find(nbformat.read(ROOT / name, as_version=4), options["below"])[1],
            **shares,
        )
        (built,) = (HTML / "_images").glob(f"{name[10:-6]}.*")
        shown = np.asarray(Image.open(built).convert("RGB"), dtype=int)
        assert np.abs(shown - np.asarray(expected, dtype=int)).mean() < 3, name


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
