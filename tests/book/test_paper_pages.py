"""The five pages on the papers: short headings and listings, figures, equations."""

import ast
import re

import ledger
import pytest
from built import ROOT

CHAPTERS = [path.stem for path in sorted((ROOT / "book").glob("0*.md"))]
LISTING = re.compile(r"^```\{literalinclude\} \.\./(\S+)\n:pyobject: (\S+)$", re.M)
LINES, FIGURES, HEADING = 15, 4, 8  # per listing; per page; words


def text(chapter):
    return (ROOT / "book" / f"{chapter}.md").read_text(encoding="utf-8")


def listings(chapter):
    """List the functions that a page prints, as (file, name)."""
    return [(ROOT / path, name) for path, name in LISTING.findall(text(chapter))]


def definition(path, name):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (node,) = (
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    )
    return node


def names_used(path):
    """Return all names that the test functions of a file use."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return {
        node.id if isinstance(node, ast.Name) else node.attr
        for test in tests
        for node in ast.walk(test)
        if isinstance(node, (ast.Name, ast.Attribute))
    }


def documented_name(function):
    """Return the path under which a function of the ledger is documented."""
    inner = function.name.removeprefix(f"{function.module}.")
    return ledger.documented_as(ROOT, function.path, inner)[1]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_headings_are_short(chapter):
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text(chapter), flags=re.M | re.S), re.M
    )
    assert [line for line in headings if len(line.split()) > HEADING] == []


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_listings_are_short_and_their_code_is_tested(chapter):
    functions = listings(chapter)
    assert functions
    assert "{literalinclude}" not in LISTING.sub("", text(chapter))
    for path, name in functions:
        assert path.name.startswith("plain_"), f"{path.name} is not a plain module"
        node = definition(path, name)
        assert ast.get_docstring(node) is None, name
        assert node.end_lineno - node.lineno < LINES, name
        tests = path.parent.glob("test_*.py")
        assert any(name in names_used(test) for test in tests), f"{name}: no test"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_equations_link_to_the_functions_that_implement_them(chapter):
    collected = ledger.collect(ROOT)
    paper = next(p for p, head in collected.papers.items() if head["review"] == chapter)
    links = set(re.findall(r"\{py:\w+\}`(?:[^`<]*<)?~?([\w.]+)>?`", text(chapter)))
    for row in collected.rows:
        if row.paper == paper and row.group == "eq" and row.functions:
            names = {documented_name(function) for function in row.functions}
            assert names & links, f"{row.item}: the page links to none of {names}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_page_has_figures(chapter):
    drawn = re.findall(r"^```\{drawn\} (\S+)$", text(chapter), re.M)
    assert len(set(drawn)) == len(drawn) >= FIGURES


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_equations_have_the_papers_numbers(chapter):
    notebook = ROOT / "notebooks" / "py" / f"{chapter}.py"
    assert not re.search(r"^#? ?\$\$ *\(", text(chapter), re.M), "a label of our own"
    tags = re.findall(r"\\tag\{([^}]*)\}", text(chapter))
    assert len(set(tags)) == len(tags) > 0
    assert "{eq}`" not in text(chapter) + notebook.read_text(encoding="utf-8")
