"""The built book in a real browser: whole offline, readable at two widths, in light and
dark, by everybody.
"""

import os
import re

import pytest
from browser import (
    BROWSER_MARKS,
    FACTS,
    SCHEMES,
    SCREENSHOTS,
    WIDTHS,
    accessibility_faults,
    launched,
    still,
)
from built import documents, pages

PAGE_BYTES = 2_500_000
SEARCH = "search.html"
# Listings of source are all alike, so one of them stands for all.
LISTINGS = [page for page in pages() if page.startswith("_modules/")]
CHECKED_BY_AXE = {page for page in pages() if page not in LISTINGS} | set(LISTINGS[-1:])

pytestmark = BROWSER_MARKS


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", pages() or [SEARCH])
def test_page_is_whole(browser, path, width):
    """No request leaves localhost, no error, every formula and picture there, no
    sideways scroll, under 2.5 MB.

    On a desktop axe-core finds nothing serious: with all rules in light, in dark with
    the one that depends on colour. `make screenshots` keeps a picture of each page as
    well; otherwise only a page with a fault gets one.
    """
    first, second = SCHEMES if width == "desktop" else SCHEMES[::-1]
    with browser.page(path, WIDTHS[width], first) as page:
        try:
            check(page, path, width, first)
            switch(page, second)
            check(page, path, width, second)
            assert browser.complaints == []
            if width == "desktop" and path in CHECKED_BY_AXE:
                still(page)
                assert accessibility_faults(page, ["color-contrast"]) == []
                switch(page, first)
                assert accessibility_faults(page) == []
        except AssertionError:
            photograph(page, path, width, "fault")
            raise


def switch(page, scheme):
    """The page follows the reader's system while it is open."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function(
        "scheme => document.documentElement.dataset.theme === scheme", arg=scheme
    )


def check(page, path, width, scheme):
    """See what is there without interacting."""
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    if os.environ.get("SCREENSHOTS") and path not in LISTINGS:
        photograph(page, path, width, scheme)
    facts = page.evaluate(FACTS)
    for fault in ("undrawn", "wrong", "raw", "broken", "undescribed", "sideways"):
        assert facts[fault] == [], fault
    heaviest = sorted(facts["weights"].items(), key=lambda item: -item[1])[:5]
    assert sum(facts["weights"].values()) < PAGE_BYTES, (
        f"the heaviest parts: {heaviest}"
    )


def photograph(page, path, width, what):
    """Keep the whole page as a picture, for people to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", path.removesuffix(".html"))
    page.screenshot(path=SCREENSHOTS / f"{name}_{width}_{what}.png", full_page=True)


def test_axe_finds_nothing_serious_on_a_phone(browser):
    for path in (
        f"{documents()[0]}.html",
        "book/glossary.html",
        "notebooks/02_cam.html",
    ):
        with browser.page(path, WIDTHS["phone"]) as page:
            still(page)
            assert accessibility_faults(page) == [], path


def test_the_accessibility_check_can_fail(browser):
    """Also for code, of which each kind of token is judged once in each kind of box."""
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


BROKEN = """<!doctype html><meta name="viewport" content="width=device-width"><body>
<article class="bd-article">
<div class="math">\\(a\\)</div><span class="katex-error" title="no such macro">x</span>
<p>see {eq}`eq-x`</p><img src="missing.png" alt="gone">
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" alt="">
<div style="width:600px">wide</div>
<script>console.error("oops"); undefined_name()</script>
<script src="http://192.0.2.1/elsewhere.js"></script></article>"""


def test_the_page_check_can_fail(chromium_type, tmp_path):
    """Each fault that the page test looks for is seen on a page that has them all."""
    (tmp_path / "broken.html").write_text(BROKEN, encoding="utf-8")
    with (
        launched(chromium_type, tmp_path) as started,
        started.page("broken.html", WIDTHS["phone"]) as page,
    ):
        facts = page.evaluate(FACTS)
        complaints = " ".join(started.complaints)
    for fault in ("undrawn", "wrong", "raw", "broken", "undescribed", "sideways"):
        assert facts[fault], fault
    assert sum(facts["weights"].values()) >= len(BROKEN)
    left = "left localhost: http://192.0.2.1/elsewhere.js"
    for complaint in (
        "console: oops",
        "undefined_name",
        "404: ",
        left,
        "ERR_NAME_NOT_RESOLVED",
    ):
        assert complaint in complaints, complaints


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


def test_formulas_are_drawn(browser):
    """The page test passes where there is no formula at all; a chapter's two pages have
    some.
    """
    for name in ("book/01_mobilenet", "notebooks/01_mobilenet", "book/api/complexity"):
        with browser.page(f"{name}.html") as page:
            assert page.evaluate(FACTS)["formulas"] >= 3, name


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
