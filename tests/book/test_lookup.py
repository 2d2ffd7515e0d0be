"""The glossary and its links in both directions, and the table of symbols."""

import re
from functools import cache

import pytest
from bs4 import BeautifulSoup
from built import HTML, ROOT, documents, why_not_built

REVIEWS = [name for name in documents() if re.fullmatch(r"book/\d\d_\w+", name)]
LIBRARY = "\n".join(
    path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "paperlib").rglob("*.py"))
)

# TeX that is not a symbol of a paper: layout, operators, and words.
WORDS = re.compile(
    r"\\(?:text|mathrm|mathsf|operatorname)\s*\{[^{}]*\}|\\mathsf\s+T|\\(?:begin|end)\{\w+\}"
)
GREEK = "alpha|rho|theta|phi|lambda|mu|Sigma|sigma|epsilon|odot"
SYMBOL = re.compile(
    rf"\\math(?:cal|bf)\s*\{{?[A-Za-z]\}}?|\\(?:{GREEK})(?![a-z])|[A-Za-z]"
)
OTHER = re.compile(rf"\\(?!math|(?:{GREEK})(?![a-z]))[a-zA-Z]+")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)\$", re.S)


def source(name):
    return (ROOT / f"{name}.md").read_text(encoding="utf-8")


def symbols(text):
    """List the symbols in a text's formulas, without words in their indices."""
    prose = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.S | re.M)
    formulas = WORDS.sub(
        " ", " ".join(display or inline for display, inline in FORMULA.findall(prose))
    )
    return {
        re.sub(r"[\s{}]", "", symbol)
        for symbol in SYMBOL.findall(OTHER.sub(" ", formulas))
    }


def chapters_of_the_table():
    """Split the page of symbols by chapter."""
    parts = re.split(r"^## Chapter (\d): .*$", source("book/notation"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@cache
def page(name):
    return BeautifulSoup((HTML / name).read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def entries():
    problem = why_not_built()
    assert not problem, problem
    return page("book/glossary.html").select("dl.glossary > dt")


# ---- glossary ----


def test_every_term_leads_to_a_chapter_and_back(entries):
    """Each link of an entry leads to a section whose text links to that entry."""
    assert len(entries) > 40
    for term in entries:
        links = term.find_next_sibling("dd").select(".glossary-uses a")
        assert links, f"no page names {term.get_text()!r} with {{term}}`…`"
        for link in links:
            path, _, anchor = link["href"].partition("#")
            section = page(f"book/{path}").find(id=anchor)
            assert section, link["href"]
            back = [a["href"] for a in section.select("a[href*='glossary.html#']")]
            assert f"glossary.html#{term['id']}" in back, (
                term.get_text(),
                link["href"],
            )


def test_every_page_on_a_paper_uses_the_glossary():
    for name in REVIEWS:
        assert source(name).count("{term}`") >= 8, name


def test_a_term_is_linked_once_per_page():
    """A page with many links to the glossary is hard to read."""
    for name in REVIEWS:
        targets = [
            target or text
            for text, target in re.findall(
                r"\{term\}`([^`<]+?)(?:\s*<([^>]+)>)?`", source(name)
            )
        ]
        lower = [" ".join(target.lower().split()) for target in targets]
        assert len(lower) == len(set(lower)), name


def test_the_glossary_is_sorted(entries):
    names = [term.find(string=True).strip() for term in entries]
    assert names == sorted(names, key=str.lower)


# ---- symbols ----


@pytest.mark.parametrize("name", REVIEWS)
def test_every_symbol_of_a_page_is_in_the_table(name):
    table = chapters_of_the_table()[str(int(name[5:7]))]
    assert symbols(source(name)) - symbols(table) == set()


def test_the_names_in_the_table_exist_in_the_library():
    named = set(re.findall(r"`([A-Za-z_]{3,})`", source("book/notation"))) - {
        "paperlib"
    }
    assert len(named) > 20
    assert {name for name in named if not re.search(rf"\b{name}\b", LIBRARY)} == set()
