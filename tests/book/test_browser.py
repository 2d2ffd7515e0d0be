"""The built book in a real browser: offline, at two widths, in light and dark mode."""

import os
import re

import pytest
from browser import (
    BROWSER_MARKS,
    FACTS,
    HEIGHT,
    SCHEMES,
    SCREENSHOTS,
    WIDTHS,
    accessibility_faults,
    contrast_faults,
    stop_transitions,
)
from built import HTML, documents, pages

PAGE_BYTES = 2_500_000
FAULTS = "undrawn wrong raw broken undescribed cut sideways".split()
FORMULAS = 3  # at least, on the pages of a chapter
SEARCH = "search.html"
# Source listings are alike, so only their index and the longest are tested.
LISTINGS = [page for page in pages() if page.startswith("_modules/")]
LONGEST = max(LISTINGS, key=lambda page: (HTML / page).stat().st_size, default=None)
SHOWN = [
    page
    for page in pages() or [SEARCH]
    if page not in LISTINGS or page in ("_modules/index.html", LONGEST)
]

# A share of the code and output boxes of a notebook's page may be cut off.
CUT_SHARE = 0.03
CHAPTERS = [page for page in SHOWN if re.match(r"(book|notebooks)/\d\d_", page)]
# The kinds of code, output and table boxes of a page, also of those in a closed fold;
# their number, and those that are cut off on a desktop.
CUT = """() => {
  const boxes = [...document.querySelectorAll(
    '.bd-article pre, .bd-article .pst-scrollable-table-container')];
  const folds = [...document.querySelectorAll('.bd-article details:not([open])')];
  for (const fold of folds) fold.open = true;
  const cut = boxes.filter(box => box.scrollWidth > box.clientWidth + 1)
    .map(box => box.innerText.slice(0, 60));
  for (const fold of folds) fold.open = false;
  return [[...new Set(boxes.map(box => box.tagName))].sort(), boxes.length, cut];
}"""

pytestmark = BROWSER_MARKS


@pytest.mark.parametrize("path", SHOWN)
def test_page_is_complete_and_accessible(browser, path):
    """A page loads without errors and without other hosts, and is below 2.5 MB.

    All formulas and images are complete, and no page scrolls sideways at either width;
    on the page of a paper no listing and no table is cut off on a desktop, on that of a
    notebook at most 3 % of the blocks of code and output. axe-core has
    no serious findings on a desktop: with all rules in light mode, for contrast also in
    dark mode. `make screenshots` stores a screenshot of each page; otherwise only pages
    with an error have one.
    """
    light, dark = SCHEMES
    with browser.page(path, WIDTHS["phone"], light) as page:
        try:
            check(page)
            resize(page, "desktop")
            facts = check(page)
            if path in CHAPTERS:
                assert facts["formulas"] >= FORMULAS
            if path in CHAPTERS:
                kinds, count, cut = page.evaluate(CUT)
                is_notebook = path.startswith("notebooks/")
                assert is_notebook or kinds == ["DIV", "PRE"]
                assert len(cut) <= count * CUT_SHARE * is_notebook, (count, cut)
            assert browser.complaints == []
            if os.environ.get("SCREENSHOTS"):
                photograph_all(page, path)
            stop_transitions(page)
            assert accessibility_faults(page) == []
            set_scheme(page, dark)
            assert contrast_faults(page) == []
        except AssertionError:
            photograph(page, path, "fault")
            raise


def resize(page, width):
    page.set_viewport_size({"width": WIDTHS[width], "height": HEIGHT})


def set_scheme(page, scheme):
    """Change the colour scheme of the system, which an open page follows."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(
        "scheme => document.documentElement.dataset.theme === scheme", arg=scheme
    )


def check(page):
    """Check a page without interaction; return its facts."""
    facts = page.evaluate(FACTS)
    for fault in FAULTS:
        assert facts[fault] == [], fault
    heaviest = sorted(facts["weights"].items(), key=lambda item: -item[1])[:5]
    assert sum(facts["weights"].values()) < PAGE_BYTES, (
        f"the heaviest parts: {heaviest}"
    )
    return facts


def photograph_all(page, path):
    """Take screenshots at all widths and schemes, ending on a desktop in light mode."""
    for scheme in SCHEMES[::-1]:
        set_scheme(page, scheme)
        for width in ("phone", "desktop"):
            resize(page, width)
            photograph(page, path, f"{width}_{scheme}")


def photograph(page, path, what):
    """Store a screenshot of the full page."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", path.removesuffix(".html"))
    page.screenshot(path=SCREENSHOTS / f"{name}_{what}.png", full_page=True)


def test_axe_finds_nothing_serious_on_a_phone(browser):
    for path in (
        f"{documents()[0]}.html",
        "book/glossary.html",
        "notebooks/02_cam.html",
    ):
        with browser.page(path, WIDTHS["phone"]) as page:
            stop_transitions(page)
            assert accessibility_faults(page) == [], path


def test_each_kind_of_token_is_checked_once_per_kind_of_box(browser):
    token = '<span style="color: #bbb" class="pale">{}</span>'
    code = " ".join(token.format(text) for text in ("=", "word", "again"))
    code = f"<pre>{code}</pre>"
    with browser.page("book/glossary.html") as page:
        page.locator(".bd-article").evaluate(
            "(article, more) => article.insertAdjacentHTML('beforeend', more)",
            '<button></button><p style="color: #bbb; background: #fff">pale</p>'
            f'<img src="data:,">{code}<div class="note">{code}</div>',
        )
        findings = accessibility_faults(page)
        assert page.locator(".pale").count() == 4
    rules = {rule for rule, _, _ in findings}
    assert rules >= {"button-name", "color-contrast", "image-alt"}
    pale = [target for rule, target, _ in findings if rule == "color-contrast"]
    assert sum(".pale" in str(target) for target in pale) == 2, findings


def test_index_html_forwards_to_the_first_page(browser):
    browser.complaints.clear()
    page = browser.context.new_page()
    try:
        page.goto(browser.base, wait_until="commit")
        page.wait_for_url(f"**/{documents()[0]}.html")
        assert page.url == f"{browser.base}{documents()[0]}.html"
        assert (
            page.locator(".bd-article h1").inner_text().startswith("Five vision papers")
        )
    finally:
        page.close()
    assert browser.complaints == []


def test_search_finds_the_chapter(browser):
    with browser.page(f"{SEARCH}?q=depthwise") as page:
        page.wait_for_selector("#search-results .search li a")
        links = page.eval_on_selector_all(
            "#search-results .search li a", "links => links.map(link => link.href)"
        )
    assert any("notebooks/01_mobilenet.html" in link for link in links), links
    assert browser.complaints == []


def test_search_has_no_results_for_an_unknown_word(browser):
    with browser.page(f"{SEARCH}?q=xylophonic") as page:
        page.wait_for_function(
            "document.querySelector('#search-results')?.textContent.includes('did not"
            " match')"
        )
        assert page.locator("#search-results .search li a").count() == 0


def test_icons_are_drawn_by_the_font(browser):
    """The buttons contain characters of the icon font, empty boxes without the font."""
    with browser.page(f"{documents()[0]}.html") as page:
        icon = page.locator(
            "button.theme-switch-button:visible i, .dropdown-download-buttons"
            " button:visible i"
        ).first
        family = icon.evaluate("icon => getComputedStyle(icon, '::before').fontFamily")
        assert "Font Awesome" in family
        assert page.evaluate(
            "[...document.fonts].some("
            "f => f.family.includes('Awesome') && f.status === 'loaded')"
        )


def test_dark_mode_can_be_switched_on(browser):
    with browser.page(f"{documents()[0]}.html") as page:
        background = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(background)
        for _ in range(3):  # the button cycles through auto, light and dark
            page.locator("button.theme-switch-button:visible").first.click()
            if page.evaluate("document.documentElement.dataset.theme") == "dark":
                break
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate(background) != before
    # The scheme is not stored for the next test.
    with browser.page(f"{documents()[0]}.html") as page:
        assert page.evaluate(background) == before
