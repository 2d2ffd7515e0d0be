"""The built book in a real browser: whole offline, readable at two widths, in light and
dark, by everybody.
"""

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
    still,
)
from built import HTML, documents, pages

PAGE_BYTES = 2_500_000
FAULTS = "undrawn wrong raw broken undescribed cut sideways".split()
FORMULAS = 3  # at least, on the pages of a chapter
SEARCH = "search.html"
# Listings of source are all alike: their index and the longest stand for all.
LISTINGS = [page for page in pages() if page.startswith("_modules/")]
LONGEST = max(LISTINGS, key=lambda page: (HTML / page).stat().st_size, default=None)
SHOWN = [
    page
    for page in pages() or [SEARCH]
    if page not in LISTINGS or page in ("_modules/index.html", LONGEST)
]

CHAPTERS = [page for page in SHOWN if re.match(r"(book|notebooks)/\d\d_", page)]
# Listings and tables of a page that are cut on a desktop, and what there is of both.
CUT = """() => {
  const boxes = [...document.querySelectorAll(
    '.bd-article pre, .bd-article .pst-scrollable-table-container')];
  return [[...new Set(boxes.map(box => box.tagName))].sort(),
    boxes.filter(box => box.scrollWidth > box.clientWidth + 1)
      .map(box => box.innerText.slice(0, 60))];
}"""

pytestmark = BROWSER_MARKS


@pytest.mark.parametrize("path", SHOWN)
def test_page_is_whole(browser, path):
    """No request leaves localhost, no error, every formula and picture there and whole,
    no sideways scroll at either width, under 2.5 MB. On a paper's page no listing and
    no table is cut on a desktop.

    On a desktop axe-core finds nothing serious: with all rules in light, in dark with
    the one that depends on colour. `make screenshots` keeps a picture of each page as
    well; otherwise only a page with a fault gets one.
    """
    light, dark = SCHEMES
    with browser.page(path, WIDTHS["phone"], light) as page:
        try:
            check(page)
            resize(page, "desktop")
            facts = check(page)
            if path in CHAPTERS:
                assert facts["formulas"] >= FORMULAS
            if path in CHAPTERS and path.startswith("book/"):
                assert page.evaluate(CUT) == [["DIV", "PRE"], []]
            assert browser.complaints == []
            if os.environ.get("SCREENSHOTS"):
                photograph_all(page, path)
            still(page)
            assert accessibility_faults(page) == []
            switch(page, dark)
            assert contrast_faults(page) == []
        except AssertionError:
            photograph(page, path, "fault")
            raise


def resize(page, width):
    page.set_viewport_size({"width": WIDTHS[width], "height": HEIGHT})


def switch(page, scheme):
    """The page follows the reader's system while it is open."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(
        "scheme => document.documentElement.dataset.theme === scheme", arg=scheme
    )


def check(page):
    """See what is there without interacting."""
    facts = page.evaluate(FACTS)
    for fault in FAULTS:
        assert facts[fault] == [], fault
    heaviest = sorted(facts["weights"].items(), key=lambda item: -item[1])[:5]
    assert sum(facts["weights"].values()) < PAGE_BYTES, (
        f"the heaviest parts: {heaviest}"
    )
    return facts


def photograph_all(page, path):
    """For people to look at; the page is left as it was, on a desktop in light."""
    for scheme in SCHEMES[::-1]:
        switch(page, scheme)
        for width in ("phone", "desktop"):
            resize(page, width)
            photograph(page, path, f"{width}_{scheme}")


def photograph(page, path, what):
    """Keep the whole page as an image."""
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
            still(page)
            assert accessibility_faults(page) == [], path


def test_each_kind_of_token_is_judged_once_in_each_kind_of_box(browser):
    token = '<span style="color: #bbb" class="pale">{}</span>'
    code = " ".join(token.format(text) for text in ("=", "word", "again"))
    code = f"<pre>{code}</pre>"
    with browser.page("book/glossary.html") as page:
        page.locator(".bd-article").evaluate(
            "(article, more) => article.insertAdjacentHTML('beforeend', more)",
            '<button></button><p style="color: #bbb; background: #fff">pale</p>'
            f'<img src="data:,">{code}<div class="note">{code}</div>',
        )
        found = accessibility_faults(page)
        assert page.locator(".pale").count() == 4
    rules = {rule for rule, _, _ in found}
    assert rules >= {"button-name", "color-contrast", "image-alt"}
    pale = [target for rule, target, _ in found if rule == "color-contrast"]
    assert sum(".pale" in str(target) for target in pale) == 2, found


def test_the_front_door_opens_on_the_first_page(browser):
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
        found = page.eval_on_selector_all(
            "#search-results .search li a", "links => links.map(link => link.href)"
        )
    assert any("notebooks/01_mobilenet.html" in link for link in found), found
    assert browser.complaints == []


def test_search_finds_nothing_for_nonsense(browser):
    with browser.page(f"{SEARCH}?q=xylophonic") as page:
        page.wait_for_function(
            "document.querySelector('#search-results')?.textContent.includes('did not"
            " match')"
        )
        assert page.locator("#search-results .search li a").count() == 0


def test_icons_are_drawn_by_the_font(browser):
    """A letter of the icon font stands in the buttons above the page; without the font
    it would be an empty box.
    """
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
        ground = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(ground)
        for _ in range(3):  # the button goes round through auto, light and dark
            page.locator("button.theme-switch-button:visible").first.click()
            if page.evaluate("document.documentElement.dataset.theme") == "dark":
                break
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate(ground) != before
    # The next test is another reader.
    with browser.page(f"{documents()[0]}.html") as page:
        assert page.evaluate(ground) == before
