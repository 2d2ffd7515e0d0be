"""The figures of the paper pages: up to date with their code, readable, numbered."""

import io
import re
import sys
from xml.etree import ElementTree

import draw
import drawing
import matplotlib.pyplot as plt
import pytest
from bs4 import BeautifulSoup
from built import HTML, ROOT
from sphinx.application import Sphinx

sys.path.insert(0, str(ROOT / "book" / "_ext"))


@pytest.mark.parametrize("paper", draw.papers())
def test_the_figures_are_up_to_date(paper):
    assert not draw.is_stale(paper), "run `make figures`"


@pytest.mark.parametrize("paper", draw.papers())
def test_every_figure_is_on_a_page(paper):
    pages = [path.read_text(encoding="utf-8") for path in ROOT.glob("book/*.md")]
    on_pages = set(re.findall(r"\{drawn\} (\S+)", "\n".join(pages)))
    assert {f"{paper}/{name}" for name in draw.names(paper)} <= on_pages


def test_changed_code_makes_figures_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "HERE", tmp_path)
    code = "def dot():\n    return 1\n"
    (tmp_path / "paper.py").write_text(code)
    assert draw.papers() == ["paper"] and draw.is_stale("paper")
    folder = tmp_path / "paper"
    folder.mkdir()
    (folder / "stamp.txt").write_text(draw.code_hash("paper"))
    assert draw.is_stale("paper"), "the figure's file is missing"
    (folder / "dot-1.svg").write_text("<svg/>")
    assert not draw.is_stale("paper")
    (tmp_path / "paper.py").write_text(code.replace("1", "2"))
    assert draw.is_stale("paper")


def test_drawing_a_paper_writes_a_stamp_and_removes_old_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "HERE", tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_paper.py").write_text(
        "import matplotlib.pyplot as plt\n\n\ndef dot():\n"
        "    return plt.figure(figsize=(1, 1))\n"
    )
    (tmp_path / "tiny_paper").mkdir()
    (tmp_path / "tiny_paper" / "gone-1.svg").write_text("<svg/>")
    with plt.rc_context():
        draw.draw("tiny_paper")
    names = {path.name for path in (tmp_path / "tiny_paper").iterdir()}
    assert names == {"dot-1.svg", "stamp.txt"}
    assert not draw.is_stale("tiny_paper")


@pytest.fixture
def figure():
    with plt.rc_context():
        drawing.use_style()
        figure, ax = plt.subplots(figsize=(3, 2))
        ax.plot([0, 1], [0, 1], color=drawing.INK)
        ax.imshow([[0, 1]])
        ax.set_title("title")
        yield figure
    plt.close(figure)


def test_a_figure_uses_the_colours_of_the_page(figure):
    text = drawing.svg(figure, "line")
    assert "currentColor" in text
    assert not any(placeholder in text for placeholder in drawing.PAGE_COLOURS)
    assert "<style" not in text
    tree = ElementTree.fromstring(text)
    identifiers = [node.get("id") for node in tree.iter() if node.get("id")]
    assert identifiers and all(name.startswith("line-") for name in identifiers)
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert {a or b for a, b in targets} <= set(identifiers)


def test_figures_are_reproducible(figure):
    assert drawing.svg(figure, "line") == drawing.svg(figure, "line")


def test_parts_are_numbered_and_old_ones_are_removed(figure, tmp_path):
    drawing.save([figure, figure], tmp_path, "line")
    assert draw.files(tmp_path, "line") == [
        tmp_path / "line-1.svg",
        tmp_path / "line-2.svg",
    ]
    assert 'id="line-2-' in (tmp_path / "line-2.svg").read_text()
    drawing.save([figure], tmp_path, "line")
    assert [path.name for path in tmp_path.iterdir()] == ["line-1.svg"]


def test_coordinates_have_two_decimals(figure):
    paths = re.findall(r' d="([^"]*)"', drawing.svg(figure, "line"))
    assert paths and not any(re.search(r"\.\d{3}", path) for path in paths)


def test_small_text_and_wide_figures_are_refused(figure):
    figure.axes[0].set_title("title", fontsize=7)
    with pytest.raises(ValueError, match="'title' has 7"):
        drawing.svg(figure, "line")
    figure.set_size_inches(9, 2)
    with pytest.raises(ValueError, match="expected at most"):
        drawing.svg(figure, "line")


def test_figures_are_numbered_within_their_chapter():
    for path in sorted((HTML / "book").glob("0*.html")):
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        figures = soup.select("figure.drawn")
        numbers = [figure.figcaption.strong.get_text() for figure in figures]
        chapter = int(path.name[:2])
        expected = [f"Figure {chapter}.{i}." for i in range(1, len(figures) + 1)]
        assert numbers == expected
        for figure in figures:
            assert figure.get("id") and figure.select_one("[role=img][aria-label]")
            for link in soup.select(f'a[href="#{figure["id"]}"]'):
                number = figure.figcaption.strong.get_text()
                assert f"{link.get_text()}." == number


@pytest.mark.parametrize(
    ("directive", "expected"),
    [
        ("```{drawn} gradcam/absent\n:alt: x\n```", "no figure 'gradcam/absent'"),
        ("```{drawn} gradcam/relu_rules\n```", "expected an :alt:"),
        (
            "```{drawn} gradcam/relu_rules\n:alt: x\n\nOne.\n\nTwo.\n```",
            "expected a caption of one paragraph",
        ),
    ],
)
def test_an_invalid_figure_directive_fails_the_build(tmp_path, directive, expected):
    (tmp_path / "index.md").write_text(f"# Title\n\n{directive}\n")
    warnings = io.StringIO()
    app = Sphinx(
        srcdir=tmp_path,
        confdir=None,
        outdir=tmp_path / "html",
        doctreedir=tmp_path / "doctrees",
        buildername="html",
        confoverrides={"extensions": ["myst_parser", "drawn_figure"]},
        status=None,
        warning=warnings,
    )
    app.build()
    assert expected in warnings.getvalue()
