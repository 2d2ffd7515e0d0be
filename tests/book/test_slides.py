"""The slides: complete, readable at 1280×720, offline, without solutions."""

import csv
import re

import pytest
import slides
import student
from browser import BROWSER_MARKS, chromium, launched
from built import NOTEBOOKS, ROOT

every_chapter = pytest.mark.parametrize("name", slides.CHAPTERS)
browser_mark, needs_chromium = BROWSER_MARKS

# What is wrong with the slide that is shown. Sub- and superscripts may be smaller.
FAULTS = r"""() => {
  const slide = document.querySelector('.frame.shown .slide');
  const stage = slide.getBoundingClientRect(), faults = [];
  const footer = slide.querySelector('footer').getBoundingClientRect();
  const apart = (a, b) => a.right <= b.left || b.right <= a.left
    || a.bottom <= b.top || b.bottom <= a.top;
  const pictures = [...slide.querySelectorAll('.picture > *')];
  const boxes = pictures.map(picture => picture.getBoundingClientRect());
  const inside = (box, name) => {
    if (box.left < stage.left || box.right > stage.right
        || box.top < stage.top || box.bottom > stage.bottom)
      faults.push('leaves the slide: ' + name);
    if (!apart(box, footer)) faults.push('covers the page number: ' + name);
  };
  const small = (size, name) => {
    if (size < 17.95) faults.push(size.toFixed(1) + ' px: ' + name);
  };
  const walker = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, parent = text.parentElement;
    if (!text.data.trim() || parent.closest('.katex-mathml, footer, svg')) continue;
    const name = text.data.trim().slice(0, 40), range = document.createRange();
    range.selectNodeContents(text);
    for (const box of range.getClientRects()) {
      // Hidden parts of KaTeX have no width.
      if (box.width < 1) continue;
      if (!parent.closest('.katex')) inside(box, name);
      if (boxes.some(other => !apart(box, other)))
        faults.push('over a figure: ' + name);
    }
    const formula = parent.closest('.katex');
    small(parseFloat(getComputedStyle(formula || parent).fontSize), name);
  }
  for (const formula of slide.querySelectorAll('.katex-html'))
    inside(formula.getBoundingClientRect(), 'formula ' + formula.textContent);
  for (const code of slide.querySelectorAll('pre')) {
    inside(code.getBoundingClientRect(), 'listing');
    if (code.scrollWidth > code.clientWidth) faults.push('listing is cut off');
  }
  small(parseFloat(getComputedStyle(slide.querySelector('footer')).fontSize), 'footer');
  pictures.forEach((picture, i) => {
    inside(boxes[i], 'figure');
    if (picture.matches('img'))
      return small(boxes[i].width / picture.naturalWidth * 11 * 110 / 72, 'figure');
    // matplotlib draws text as paths of 100 points and scales them.
    const points = [...picture.querySelectorAll('g[transform]')]
      .map(g => g.getAttribute('transform').match(/scale\((0\.\d+) -/))
      .filter(Boolean).map(scale => 100 * scale[1]);
    const scale = boxes[i].width / picture.viewBox.baseVal.width;
    small(Math.min(...points) * scale, 'figure');
  });
  for (const box of slide.querySelectorAll('.picture'))
    if (!(box.getAttribute('aria-label') || '').trim())
      faults.push('no alternative text');
  for (const image of slide.querySelectorAll('img'))
    if (!image.alt || !image.naturalWidth) faults.push('image without alt or data');
  if (slide.querySelector('.katex-error')) faults.push('a formula is wrong');
  for (const formula of slide.querySelectorAll('.math'))
    if (!formula.querySelector('.katex')) faults.push('a formula is not drawn');
  return faults;
}"""


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides") / "decks"
    slides.write_decks(folder)
    return folder


@pytest.fixture(scope="module")
def browser_on_decks(decks, chromium_type):
    with launched(chromium_type, decks) as started:
        yield started


def test_every_chapter_has_a_deck():
    assert slides.CHAPTERS == [path.stem for path in NOTEBOOKS]


@every_chapter
def test_a_deck_has_its_size_and_fits_into_a_session(name):
    deck = slides.Chapter(name).deck["slides"]
    assert 12 <= len(deck) <= 18
    assert 40 <= sum(spec["minutes"] for spec in deck) <= 60
    assert all(spec["notes"].strip() for spec in deck)
    assert sum("demo" in spec for spec in deck) >= 4
    assert sum("predict" in spec for spec in deck) >= 2


@every_chapter
@browser_mark
@needs_chromium
def test_slides_are_readable_and_complete(name, browser_on_decks):
    """At 1280×720: no text below 18 px, nothing cut off, and no other host is asked."""
    with browser_on_decks.page(f"{name}.html") as page:
        page.set_viewport_size({"width": 1280, "height": 720})
        count = page.locator(".slide").count()
        faults = {}
        for number in range(1, count + 1):
            footer = page.locator(".shown footer").inner_text()
            assert footer.endswith(f"{number} / {count}")
            faults[number] = page.evaluate(FAULTS)
            page.keyboard.press("ArrowRight")
        assert {n: found for n, found in faults.items() if found} == {}
        assert browser_on_decks.complaints == []


@browser_mark
@needs_chromium
def test_the_measurement_finds_faults(browser_on_decks):
    with browser_on_decks.page(f"{slides.CHAPTERS[0]}.html#3") as page:
        page.set_viewport_size({"width": 1280, "height": 720})
        assert page.evaluate(FAULTS) == []
        page.add_style_tag(
            content=".beside h2 { font-size: 17px } .words { margin-top: 600px }"
        )
        page.locator(".shown .picture").evaluate("e => { e.ariaLabel = '' }")
        page.locator(".shown svg").evaluate("e => { e.style.width = '300px' }")
        found = " ".join(page.evaluate(FAULTS))
        faults = ("17.0 px", "px: figure", "leaves the slide", "no alternative text")
        assert [fault for fault in faults if fault not in found] == []


@browser_mark
@needs_chromium
def test_keys_notes_and_print(browser_on_decks):
    with browser_on_decks.page(f"{slides.CHAPTERS[0]}.html") as page:
        page.set_viewport_size({"width": 1280, "height": 720})
        count = page.locator(".slide").count()
        notes = page.locator(".shown .notes")
        assert not notes.is_visible()
        page.keyboard.press("n")
        assert notes.is_visible() and "min;" in notes.inner_text()
        slide = page.locator(".shown .slide").bounding_box()
        assert slide["y"] + slide["height"] <= notes.bounding_box()["y"] + 1
        page.keyboard.press("n")
        for key, number in (("End", count), ("ArrowLeft", count - 1), ("Home", 1)):
            page.keyboard.press(key)
            assert page.url.endswith(f"#{number}")
        page.emulate_media(media="print")
        pdf = page.pdf(prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == count
        assert all(
            page.locator(".slide").nth(number).is_visible() for number in range(count)
        )


@browser_mark
@needs_chromium
def test_a_deck_opens_as_a_file(decks, chromium_type):
    """Without a server, as from a USB stick."""
    with chromium_type.launch(executable_path=chromium(), args=["--no-sandbox"]) as app:
        page = app.new_page()
        page.goto((decks / f"{slides.CHAPTERS[0]}.html").as_uri() + "#4")
        assert page.locator(".shown .katex").count() >= 2


def test_decks_contain_no_solution_and_no_model_answer(decks):
    assert student.check_built(decks) == []
    guide = (ROOT / "book" / "instructor.md").read_text(encoding="utf-8")
    answers = re.findall(r"\{dropdown\} Model answer\n(.*?)\n:::", guide, re.S)
    assert len(answers) >= 10
    for deck in decks.glob("*.html"):
        text = " ".join(deck.read_text(encoding="utf-8").split())
        for answer in answers:
            assert " ".join(answer.split())[:60] not in text, deck.name


def test_a_prediction_sheet_has_every_box_of_the_notebook(decks):
    for name in slides.CHAPTERS:
        sheet = (decks / f"{name}_predictions.html").read_text(encoding="utf-8")
        boxes = slides.Chapter(name).markdown.count("Predict first\n")
        assert boxes >= 4
        assert sheet.count('<div class="answer">') == boxes


@every_chapter
def test_the_given_numbers_of_a_sheet_are_those_of_the_notebook(name):
    """Fields belong to a box, and given grids stand in the notebook."""
    chapter = slides.Chapter(name)

    def digits(text):
        return re.sub(r"\.0?(?=[,\s])|[\[\]\s]", "", f"{text} ")

    code = digits("".join(c.source for c in chapter.cells if c.cell_type == "code"))
    for fields in chapter.deck["sheet"].values():
        for spec in fields:
            if "values" in spec:
                assert digits(spec["values"]) in code, spec
    chapter.deck["sheet"] = {"No such section": [{"blank": "x"}]}
    with pytest.raises(ValueError, match="no box for No such section"):
        chapter.write_predictions(None)


@every_chapter
@browser_mark
@needs_chromium
def test_a_prediction_sheet_fits_on_two_pages(name, browser_on_decks):
    """On A4, with every field inside the page."""
    with browser_on_decks.page(f"{name}_predictions.html") as page:
        page.set_viewport_size({"width": 672, "height": 1000})  # A4 without margins
        page.emulate_media(media="print")
        pdf = page.pdf(prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 2
        width, height = re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)", pdf).groups()
        assert (round(float(width)), round(float(height))) == (595, 842)
        assert page.locator(".katex-error").count() == 0
        ends = "es => es.map(e => e.getBoundingClientRect().right)"
        for part in ("table", ".blank", ".option"):
            assert max(page.locator(part).evaluate_all(ends), default=0) <= 672


def test_a_figure_that_would_be_too_small_is_refused():
    chapter = slides.Chapter("03_gradcam")
    with pytest.raises(ValueError, match="px high; expected 18"):
        chapter.slide({"figure": "gradcam/data_flow"})
    with pytest.raises(ValueError, match="expected one match, found 0"):
        chapter.slide({"listing": "no_such_function"})


def test_images_of_solar_cells_keep_their_licence():
    figures = [
        figure
        for name in slides.CHAPTERS
        for figure in slides.Chapter(name).figures.values()
    ]
    licences = {figure.name: figure.licence for figure in figures}
    assert "ELPV" in licences["padim/map_and_score"]
    assert "scikit-image" in licences["gradcam/figure_1"]
    assert licences["mobilenet/saving"] == "CC BY 4.0"
    # Captions name the source of every image.
    assert [
        figure.name
        for figure in figures
        if "<image" in "".join(figure.parts)
        and "ELPV" in figure.caption
        and "ELPV" not in figure.licence
    ] == []


@browser_mark
@needs_chromium
def test_figures_are_written_as_png(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "CHAPTERS", ["01_mobilenet"])
    slides.write_pngs(tmp_path, chromium())
    with (tmp_path / "index.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {p.name for p in tmp_path.glob("*.png")}
    assert all(row["caption"] and row["alt text"] and row["licence"] for row in rows)
    width, height = slides.Image.open(tmp_path / "mobilenet-saving-1.png").size
    assert width == round(4 * 72 * 5.2) and height > 500
