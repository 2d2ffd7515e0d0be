"""The built pages as files: complete, with valid links, and without other hosts."""

import ast
import json
import os
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import api_names
import built as built_book
import pytest
from api_names import exported
from bs4 import BeautifulSoup
from built import HTML, ROOT, documents, pages, why_not_built
from test_package import NAMES

sys.path.insert(0, str(ROOT / "book" / "_ext"))
from front_page import front_page  # noqa: E402

BOOK_BYTES = 60_000_000
LOADED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
}


class Page(HTMLParser):
    """The resources, links, ids and images of a page."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.undescribed = [], [], set(), []
        self.feed((HTML / path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if identifier := values.get("id") or values.get("name"):
            self.ids.add(identifier)
        if tag in LOADED and values.get(LOADED[tag]):
            self.loads.append(values[LOADED[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img" and not (values.get("alt") or "").strip():
            self.undescribed.append(values.get("src", "")[:80])


@pytest.fixture(scope="module")
def built():
    problem = why_not_built()
    assert not problem, problem
    return {path: Page(path) for path in [*pages(), "index.html"]}


def test_every_page_of_the_contents_is_built_and_no_other(built):
    expected = {f"{name}.html" for name in documents()}
    made_by_sphinx = {"genindex.html", "index.html", "py-modindex.html", "search.html"}
    assert {
        path for path in built if not path.startswith("_modules/")
    } - made_by_sphinx == expected


@pytest.mark.parametrize("page", ["inspection", "01_mobilenet", "02_cam", "status"])
def test_a_number_and_its_unit_stay_in_one_line(built, page):
    text = (HTML / "book" / f"{page}.html").read_text(encoding="utf-8")
    article = BeautifulSoup(text, "html.parser").find("article")
    for code in article.select("code, pre, script, style, svg, .math"):
        code.replace_with("1" if "math" in code.get("class", ()) else "")
    words = article.get_text()
    assert re.search(r"\d\u00a0(%|MB)", words)
    assert re.findall(r"\d (?:%|px|MB|ms)(?!\w)", words) == []


def test_every_source_page_is_in_the_contents():
    sources = [
        path
        for folder in ("book", "notebooks")
        for kind in ("md", "ipynb")
        for path in (ROOT / folder).rglob(f"*.{kind}")
    ]
    names = {path.relative_to(ROOT).with_suffix("").as_posix() for path in sources}
    assert names - set(documents()) == set()


def test_the_api_pages_document_the_contract_under_its_import_paths(built):
    pages = sum(api_names.GROUPS.values(), ())
    assert list(NAMES) == [page for page in NAMES if page in pages]
    for module, names in NAMES.items():
        ids = built[f"book/api/{module}.html"].ids
        for name in names.split():
            assert f"paperlib.{module}.{name}" in ids or (
                f"module-paperlib.{module}.{name}" in ids  # a module of the exercises
            ), f"{module}.{name}"


def test_each_api_page_begins_with_an_example_and_is_listed(built):
    toc = (ROOT / "book" / "_toc.yml").read_text(encoding="utf-8")
    pages = sum(api_names.GROUPS.values(), ())
    assert re.findall(r"book/api/(\w+)", toc) == list(pages)
    assert {path.stem for path in (ROOT / "book" / "api").glob("*.md")} == set(pages)
    for page in pages:
        assert f"api/{page}.html" in built["book/api.html"].links, page
        module = api_names.module_file(ROOT, page).read_text(encoding="utf-8")
        assert ">>> " in ast.get_docstring(ast.parse(module)), page


def test_exported_names_are_documented_under_their_import_path(built):
    for package in ("cam", "complexity", "datasets", "gradcam", "padim", "patch_svdd"):
        ids = built[f"book/api/{package}.html"].ids
        names = exported(ROOT / "paperlib" / package / "__init__.py")
        documented = {name for name in names if not name.isupper()}  # no constants
        assert documented
        assert {f"paperlib.{package}.{name}" for name in documented} <= ids


def test_links_within_the_book_are_valid(built):
    dead = []
    for path, page in built.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                (HTML / path).parent / unquote(parts.path)
                if parts.path
                else HTML / path
            )
            name = (
                target.resolve().relative_to(HTML).as_posix()
                if target.resolve().is_relative_to(HTML)
                else ""
            )
            if not name or not target.is_file():
                dead.append((path, link))
            elif (
                parts.fragment
                and name in built
                and unquote(parts.fragment)
                not in built[name].ids | {"search-documentation"}
            ):
                dead.append((path, link))
    assert dead == []


def test_nothing_is_loaded_from_another_host(built):
    loads = [(path, address) for path, page in built.items() for address in page.loads]
    assert loads
    assert [
        (path, address) for path, address in loads if urlsplit(address).netloc
    ] == []


def test_no_style_or_script_of_a_page_names_another_host():
    """Style sheets and scripts may load addresses after the page."""
    pattern = re.compile(
        r"""(?:url\(\s*["']?|@import\s+["']|import\(["']|from\s*["'])(?:https?:)?//[^"')\s]+"""
    )
    matches = [
        (path.relative_to(HTML).as_posix(), match[0])
        for kind in ("css", "js")
        for path in (HTML / "_static").rglob(f"*.{kind}")
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert matches == []


def test_the_book_is_small():
    """The browser test measures each page with its resources."""
    files = [path for path in HTML.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < BOOK_BYTES


def test_every_image_has_a_description(built):
    assert {
        path: page.undescribed for path, page in built.items() if page.undescribed
    } == {}


def test_every_notebook_page_offers_its_self_contained_copy(built):
    notebooks = [name for name in documents() if name.startswith("notebooks/")]
    assert notebooks
    for name in notebooks:
        copy = f"colab/{name.rpartition('/')[2]}.ipynb"
        assert any(link.endswith(copy) for link in built[f"{name}.html"].links), name


def test_without_a_repository_no_page_links_to_one(built):
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    if 'url: ""' not in config:
        pytest.skip("this copy of the book names its repository")
    links = {link for page in built.values() for link in page.links}
    assert [
        link
        for link in links
        if "colab.research.google.com/github" in link or "executablebooks" in link
    ] == []


def test_the_docstrings_are_rendered(built):
    """Formulas, code and the three fields become HTML, without markup characters."""
    html = (HTML / "book" / "api" / "complexity.html").read_text(encoding="utf-8")
    article = html[html.index("<article") : html.index("</article>")]
    assert len(re.findall(r'class="math notranslate', article)) >= 3
    for field in ("Source", "Departures", "Test"):
        assert re.search(rf"<dt[^>]*>{field}<", article), field
    # docutils reads "D." at the start of a paragraph as a list item, and napoleon reads
    # the text before the first colon of a result as its type.
    for path in (HTML / "book" / "api").glob("*.html"):
        page = path.read_text(encoding="utf-8")
        assert "upperalpha" not in page, path.name
        assert not re.search(
            r"<dt[^>]*>(Returns|Yields)<.{0,40}</dt>\s*<dd[^>]*><p><em>", page
        ), path.name
        assert ">Fields:" not in page, path.name  # it becomes a list of parameters
    text = re.sub(r"<(pre|code|script|style).*?</\1>|<[^>]+>", "", article, flags=re.S)
    assert re.findall(r".{0,30}(?:\$|`).{0,30}", text) == []


def test_keys_of_the_bibliography_are_initials(built):
    """An accent in TeX notation would add a whole name to the key."""
    page = (HTML / "book" / "bibliography.html").read_text(encoding="utf-8")
    keys = re.findall(
        r'<span class="label"><span class="fn-bracket">\[</span>(.*?)<span', page
    )
    assert len(keys) > 40
    # Its author has a single name.
    assert [key for key in keys if re.search("[a-z]{3}", key)] == ["Google26"]


def test_the_search_index_contains_the_words_of_the_notebooks():
    index = (HTML / "searchindex.js").read_text(encoding="utf-8")
    data = json.loads(index[index.index("{") : index.rindex("}") + 1])
    assert set(documents()) <= set(data["docnames"])
    assert "depthwis" in data["terms"]


def test_a_book_older_than_a_source_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(built_book, "ROOT", tmp_path)
    monkeypatch.setattr(built_book, "MARK", tmp_path / ".built")
    source, page = tmp_path / "paperlib" / "a.py", tmp_path / "book" / "api" / "a.md"
    for path in (source, page):
        path.parent.mkdir(parents=True)
        path.touch()
    assert "not built" in why_not_built()
    (tmp_path / ".built").touch()
    os.utime(source, (1, 1))
    assert why_not_built() == ""
    os.utime(page, (2**31, 2**31))  # the build writes it
    assert why_not_built() == ""
    os.utime(source, (2**31, 2**31))
    assert "older than paperlib/a.py" in why_not_built()


def test_index_html_is_a_complete_page(built):
    """It has a link for readers who are not forwarded, a title and an icon."""
    soup = BeautifulSoup(
        (HTML / "index.html").read_text(encoding="utf-8"), "html.parser"
    )
    target = f"{documents()[0]}.html"
    assert soup.html["lang"] == "en"
    assert soup.title.text == "Five vision papers, by running them"
    assert (HTML / soup.find("link", rel="icon")["href"]).is_file()
    assert soup.find("link", rel="canonical")["href"] == target
    assert (HTML / target).is_file()
    assert soup.find("meta", {"http-equiv": "refresh"})["content"] == f"0; url={target}"
    assert soup.body.find("a", href=target).text == "Open the first page of the book"


def test_titles_are_escaped_in_index_html():
    page = front_page('A <b> & "c"', "en", "icon.svg", "first.html")
    assert BeautifulSoup(page, "html.parser").title.text == 'A <b> & "c"'
