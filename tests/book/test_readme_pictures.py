"""README's pictures: present, light, described; and the parts of the tool that makes
them. `make readme-pictures` itself is run by the long test of all make targets.
"""

import re

import numpy as np
import pytest
import readme_pictures
from browser import BROWSER_MARKS, launched
from built import ROOT
from PIL import Image
from readme_pictures import COLUMN, FOLDER, Picture

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^!\[(.+)\]\((\S+)\)$", README, re.M)
MADE = {**readme_pictures.OF_BOOK, **readme_pictures.OF_REPORT}


# ---- the committed pictures ----


def test_readme_shows_what_the_tool_makes():
    paths = [ROOT / path for _, path in SHOWN]
    assert paths == [FOLDER / f"{name}.webp" for name in MADE]
    assert sorted(paths) == sorted(FOLDER.iterdir())
    before_the_commands = README[: README.index("make book")]
    assert all(path in before_the_commands for _, path in SHOWN)


def test_the_pictures_are_light_and_sharp():
    assert readme_pictures.check_weight(FOLDER) < 300_000
    for _, path in SHOWN:
        picture = Image.open(ROOT / path)
        # Opaque, so that text is readable on a dark page, too; about two pixels per
        # pixel of GitHub's column.
        assert picture.mode == "RGB", path
        assert 1.8 * COLUMN < picture.width < 2.2 * COLUMN, path


def test_each_picture_has_an_alternative_text_of_its_own():
    texts = [text for text, _ in SHOWN]
    assert len(set(texts)) == 3
    assert all(len(text.split()) > 25 for text in texts)


# ---- the tool ----


def test_the_report_is_that_of_the_page_on_inspection():
    code, (fit, inspect) = readme_pictures.example()
    assert 'elpv("mono")' in code
    assert fit[:3] == ["-m", "paperlib", "fit"]
    assert inspect[:3] == ["-m", "paperlib", "inspect"]
    assert inspect[-1] == "report"


def test_a_picture_that_looks_the_same_is_not_written_again(tmp_path):
    path = tmp_path / "new" / "picture.webp"
    y, x = np.mgrid[0:90, 0:120]
    pixels = np.stack([x, y, x + y], axis=2).astype(np.uint8)
    assert readme_pictures.write(path, Image.fromarray(pixels))
    before = path.stat().st_mtime_ns
    assert not readme_pictures.write(path, Image.fromarray(pixels + 1))
    assert path.stat().st_mtime_ns == before
    pixels[20:30, 20:30] = 255
    assert readme_pictures.write(path, Image.fromarray(pixels))
    assert readme_pictures.write(path, Image.fromarray(pixels[:80]))
    assert [file.name for file in path.parent.iterdir()] == ["picture.webp"]


def test_pictures_that_are_too_heavy_are_an_error(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.webp").write_bytes(bytes(readme_pictures.MOST_BYTES // 2))
    assert readme_pictures.check_weight(tmp_path) == 300_000
    (tmp_path / "c.webp").write_bytes(b"1")
    with pytest.raises(ValueError, match="weigh 300,001 bytes; expected at most"):
        readme_pictures.check_weight(tmp_path)


@pytest.fixture(scope="module")
def pages(tmp_path_factory, chromium_type):
    folder = tmp_path_factory.mktemp("pages")
    colours = ("#f00", "#0f0", "#00f")
    blocks = "".join(
        f"<div id=d{k} style='height: 900px; background: {colour}'></div>"
        for k, colour in enumerate(colours)
    )
    page = "<!DOCTYPE html><title>t</title><link rel=icon href=data:,>"
    page += f"<style>body {{ margin: 0 }}</style>{blocks}"
    (folder / "good.html").write_text(page)
    (folder / "bad.html").write_text(f"{page}<img src=missing.png alt=''>")
    with launched(chromium_type, folder, readme_pictures.SCALE) as started:
        yield started


class TestInABrowser:
    pytestmark = BROWSER_MARKS

    def test_a_picture_contains_its_parts_and_a_margin(self, pages):
        """Below the window, too; at two pixels per CSS pixel, in a line."""
        picture = Picture("good.html", 400, ("#d1",))
        pixels = np.asarray(readme_pictures.photograph(pages, picture))
        margin, line = 2 * readme_pictures.MARGIN, readme_pictures.SCALE
        assert pixels.shape[0] == 2 * 900 + 2 * margin + 2 * line
        middle = pixels[:, pixels.shape[1] // 2]
        assert (middle[[0, -1]] == 0xB8).all()
        inner = middle[line:-line]
        assert (inner[:margin] == (255, 0, 0)).all()
        assert (inner[margin:-margin] == (0, 255, 0)).all()
        assert (inner[-margin:] == (0, 0, 255)).all()

    def test_a_part_that_is_missing_is_an_error(self, pages):
        with pytest.raises(ValueError, match="good.html has no element '#d9'"):
            readme_pictures.photograph(pages, Picture("good.html", 400, ("#d0", "#d9")))

    def test_a_page_with_an_error_is_refused(self, pages):
        with pytest.raises(ValueError, match="404: .*missing.png"):
            readme_pictures.photograph(pages, Picture("bad.html", 400, ("#d0",)))

    @pytest.mark.parametrize("name", readme_pictures.OF_BOOK)
    def test_the_parts_are_on_the_pages_of_the_book(self, browser, name):
        picture = readme_pictures.OF_BOOK[name]
        with browser.page(picture.page, picture.width) as page:
            for part in picture.parts:
                assert page.locator(part).count() in (1, 2)
