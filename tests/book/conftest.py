"""The browser that the tests of the built book share."""

import pytest
from browser import chromium, driver, launched
from built import HTML, why_not_built


@pytest.fixture(scope="session")
def chromium_type():
    assert chromium(), (
        "Chromium was not found; install it (apt-get install chromium) or set"
        " CHROMIUM=<its path>"
    )
    with driver() as playwright_chromium:
        yield playwright_chromium


@pytest.fixture(scope="session")
def browser(chromium_type):
    problem = why_not_built()
    assert not problem, problem
    with launched(chromium_type, HTML) as started:
        yield started
