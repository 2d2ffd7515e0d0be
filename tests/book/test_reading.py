"""The actions of a reader: open the first page, search, open solutions, tab, print."""

import pytest
from browser import BROWSER_MARKS, HEIGHT, WIDTHS, stop_transitions
from built import HTML, NOTEBOOKS, documents

pytestmark = BROWSER_MARKS

OPENING = f"{documents()[0]}.html"
NOTEBOOK_PAGES = [
    f"{name}.html" for name in documents() if name.startswith("notebooks/")
]
SLIDER_PAGES = [
    f"notebooks/{path.stem}.html"
    for path in NOTEBOOKS
    if "companion.Slider(" in path.read_text(encoding="utf-8")
]
SCREEN = {"width": 1280, "height": 800}
PRINTED_HEIGHT = 1000  # px of an A4 page between its margins

# Does the element with the focus look different from the same element without it?
FOCUS_IS_SEEN = """() => {
  const element = document.activeElement;
  const keys = ['outlineStyle', 'outlineWidth', 'outlineColor', 'boxShadow',
    'backgroundColor', 'borderColor', 'textDecoration', 'color'];
  const style = box => JSON.stringify(keys.map(key => getComputedStyle(box)[key]));
  // A theme may mark the box around a field, or a symbol in a button.
  const boxes = [element, element.parentElement, element.closest('form'),
    element.firstElementChild].filter(Boolean);
  const focused = boxes.map(style);
  element.blur();
  const differs = boxes.some((box, i) => style(box) !== focused[i]);
  element.focus();
  return differs;
}"""

SHOWN_BY_SLIDER = """figure => [figure.querySelector('img').src,
  figure.querySelector('img').alt, figure.innerText]"""

# ---- print ----

NOT_PRINTED = (
    ".bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-footer"
)
# Images beyond the margins, or that a page break may split. Collapsed parts are not
# printed.
CUT_IMAGES = """height => [...document.querySelectorAll('.bd-article img')]
  .filter(image => image.getClientRects().length)
  .filter(image => {
    const box = image.getBoundingClientRect();
    let part = image;
    while (part !== document.body && getComputedStyle(part).breakInside !== 'avoid')
      part = part.parentElement;
    return box.left < 0 || box.right > 721 || box.height >= height
      || part === document.body;
  })
  .map(image => image.alt)"""
BREAKS_AFTER = "headings => headings.map(h => getComputedStyle(h).breakAfter)"
WIDE_CODE = """listings => listings
  .filter(pre => pre.scrollWidth > pre.clientWidth + 1
    && getComputedStyle(pre).whiteSpace !== 'pre-wrap')
  .map(pre => pre.innerText.slice(0, 60))"""


# ---- the opening page ----


def test_the_first_screen_contains_heading_figure_and_start(browser):
    with browser.page(OPENING) as page:
        page.set_viewport_size(SCREEN)
        heading = page.locator(".bd-article h1").inner_text()
        assert heading.startswith("Five vision papers")
        for place in ("#front-hero", ".start"):
            box = page.locator(place).bounding_box()
            assert box["y"] > 0 and box["y"] + box["height"] <= SCREEN["height"], place
        assert page.locator(".chapters .drawing").count() == len(NOTEBOOK_PAGES)
    assert browser.complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_cards_figures_are_large_enough_to_read(browser, width):
    with browser.page(OPENING, WIDTHS[width]) as page:
        drawings = page.locator(".chapters .drawing svg").all()
        assert min(drawing.bounding_box()["width"] for drawing in drawings) >= 130


def test_the_links_of_the_opening_page_lead_to_pages_with_a_heading(browser):
    with browser.page(OPENING) as page:
        links = page.eval_on_selector_all(
            ".chapters a, .start a", "links => links.map(a => a.getAttribute('href'))"
        )
    assert len(links) > 2 * len(NOTEBOOK_PAGES)
    for link in links:
        name = link.partition("#")[0]
        assert not name or "<h1>" in ((HTML / OPENING).parent / name).read_text(
            encoding="utf-8"
        ), link


@pytest.mark.parametrize("width", WIDTHS)
def test_a_heading_is_larger_than_those_below_it(browser, width):
    with browser.page("book/api/complexity.html", WIDTHS[width]) as page:
        page.evaluate(
            "document.querySelector('.bd-article h1').insertAdjacentHTML('afterend',"
            " '<h2>b</h2><h3>c</h3>')"
        )
        size = (
            "name => parseFloat(getComputedStyle(document.querySelector(`.bd-article"
            " ${name}`)).fontSize)"
        )
        h1, h2, h3 = (page.evaluate(size, name) for name in ("h1", "h2", "h3"))
        assert h1 > h2 > h3 > 16


# ---- search, solutions, sliders ----


@pytest.mark.parametrize("width", WIDTHS)
def test_searching_for_mahalanobis_leads_to_padim(browser, width):
    """From the opening page by the search button, without any other host."""
    with browser.page(OPENING, WIDTHS[width]) as page:
        page.locator(
            "button.search-button__button:visible, button.search-button-field:visible"
        ).first.click()
        page.keyboard.type("Mahalanobis")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=Mahalanobis*")
        page.wait_for_selector("#search-results .search li a")
        page.wait_for_function(
            "document.querySelector('#search-results').textContent.includes('found')"
        )
        results = page.locator("#search-results li > a", has_text="PaDiM: the paper")
        results.first.click()
        page.wait_for_url("**/book/05_padim.html*")
        assert (
            page.locator(".bd-article h1").inner_text().startswith("PaDiM: the paper")
        )
    assert browser.complaints == []


def test_a_search_by_keyboard_alone(browser):
    with browser.page(OPENING) as page:
        page.keyboard.press("Control+k")
        page.keyboard.type("Cholesky")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results .search li a")
        assert page.locator(
            "#search-results li > a", has_text="PaDiM: the paper"
        ).count()


@pytest.mark.parametrize(
    ("path", "width"),
    [*((path, "desktop") for path in NOTEBOOK_PAGES), (NOTEBOOK_PAGES[0], "phone")],
)
def test_a_solution_opens_by_click_and_by_keyboard(browser, path, width):
    with browser.page(path, WIDTHS[width]) as page:
        solutions = page.locator("section[id^='exercises'] details")
        assert solutions.count() >= 3, "a chapter has exercises with solutions"
        names = {
            text.strip() for text in solutions.locator("summary").all_inner_texts()
        }
        assert names == {"Solution"}
        first, second = solutions.nth(0), solutions.nth(1)
        # Set-up cells and answers of the quiz also open.
        others = page.locator(
            ".bd-article details:not([open]):not(section[id^='exercises'] details)"
        )
        for part in others.element_handles()[:: others.count() - 1]:
            part.query_selector("summary").click()
            assert part.evaluate("details => details.open")
        for solution in (first, second):
            assert not solution.evaluate("details => details.open")
        first.locator("summary").click()
        second.locator("summary").focus()
        page.keyboard.press("Enter")
        for solution in (first, second):
            assert solution.evaluate("details => details.open")
            assert (
                solution.locator("> :not(summary)").first.bounding_box()["height"] > 15
            )
        page.keyboard.press("Space")
        assert not second.evaluate("details => details.open")


@pytest.mark.parametrize("path", SLIDER_PAGES)
def test_a_slider_changes_image_and_text(browser, path):
    """With the arrow keys and with a click on its track, at both widths."""
    n_sliders = 0
    with browser.page(path) as page:
        page.evaluate(
            "document.querySelectorAll('details').forEach(d => d.open = true)"
        )
        for width in WIDTHS.values():
            page.set_viewport_size({"width": width, "height": HEIGHT})
            for figure in page.locator(".paperlib-slider").all():
                for slider in figure.locator("input[type=range]").all():
                    before = figure.evaluate(SHOWN_BY_SLIDER)
                    slider.focus()
                    page.keyboard.press("ArrowRight")
                    after = figure.evaluate(SHOWN_BY_SLIDER)
                    assert all(
                        new != old for new, old in zip(after, before, strict=True)
                    )
                    slider.click(
                        position={"x": 2, "y": slider.bounding_box()["height"] / 2}
                    )
                    assert slider.input_value() == "0"
                    assert figure.evaluate(SHOWN_BY_SLIDER) == before
                    n_sliders += 1
    assert n_sliders >= 2
    assert browser.complaints == []


# ---- keyboard only, print ----


def test_the_keyboard_alone_reaches_the_text(browser):
    with browser.page("book/02_cam.html") as page:
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.textContent.trim()")
        assert focused == "Skip to main content"
        # The link slides in when it has the focus.
        page.wait_for_function(
            "document.querySelector('#pst-skip-link a').getBoundingClientRect().y >= 0"
        )
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate(
            "document.querySelector('#main-content').contains(document.activeElement)"
        )


@pytest.mark.parametrize(
    ("path", "scheme"),
    [
        (OPENING, "light"),
        (OPENING, "dark"),
        ("book/02_cam.html", "dark"),
        ("notebooks/01_mobilenet.html", "light"),
    ],
)
def test_the_focus_is_visible_on_every_element(browser, path, scheme):
    with browser.page(path, scheme=scheme) as page:
        stop_transitions(page)
        without_focus_style = []
        for _ in range(45):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement === document.body"):
                break
            if not page.evaluate(FOCUS_IS_SEEN):
                without_focus_style.append(
                    page.evaluate("document.activeElement.outerHTML.slice(0, 120)")
                )
        assert without_focus_style == []


@pytest.mark.parametrize("path", [OPENING, "book/03_gradcam.html", *NOTEBOOK_PAGES])
def test_print_contains_the_text_and_complete_figures(browser, path):
    with browser.page(path, width=720) as page:  # the width of an A4 page
        page.emulate_media(media="print")
        assert page.locator(NOT_PRINTED).count() >= 3
        assert page.locator(NOT_PRINTED).filter(visible=True).count() == 0
        article = page.locator(".bd-article").bounding_box()
        assert article["x"] < 40 and article["width"] > 600
        assert page.evaluate(CUT_IMAGES, PRINTED_HEIGHT) == []
        headings = page.locator(".bd-article h2")
        assert set(headings.evaluate_all(BREAKS_AFTER)) == {"avoid"}
        assert page.locator(".bd-article pre").evaluate_all(WIDE_CODE) == []
