"""The gallery that `inspect` writes, in a real browser."""

import pytest
import small_parts
from browser import (
    BROWSER_MARKS,
    FACTS,
    SCHEMES,
    WIDTHS,
    accessibility_faults,
    contrast_faults,
    launched,
)
from test_inspection import Brightness

from paperlib.padim import report
from paperlib.padim.inspection import find_images

pytestmark = BROWSER_MARKS


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, chromium_type):
    folder = tmp_path_factory.mktemp("report")
    _, other = small_parts.write(folder)
    (other / "broken.png").touch()
    report.inspect_files(Brightness(), find_images([other]), folder / "out")
    with launched(chromium_type, folder / "out") as started:
        yield started


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS.values())
def test_the_gallery_is_readable(gallery, width, scheme):
    with gallery.page("index.html", width, scheme) as page:
        facts = page.evaluate(FACTS)
        assert facts["broken"] == facts["undescribed"] == facts["sideways"] == []
        check = accessibility_faults if scheme == SCHEMES[0] else contrast_faults
        assert check(page) == []
        assert gallery.complaints == []


def test_the_gallery_is_filtered_and_sorted(gallery):
    with gallery.page("index.html") as page:
        shown = page.locator("li:visible h2")
        assert shown.count() == 9
        page.get_by_label("Sort by").select_option("number")
        assert shown.all_inner_texts()[-1].endswith("broken.png")
        page.get_by_label("Show").select_option("unreadable")
        assert shown.count() == 1
        assert page.locator("output").inner_text() == "1 of 9 shown"
        page.get_by_label("Show").select_option("alarm")
        assert shown.count() == page.locator("li.alarm").count() > 0
