"""Look at the built book with a real browser that can reach nothing but the book."""

import functools
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from built import ROOT, in_ci

SCREENSHOTS = ROOT / "_build" / "screenshots"

# No background traffic of the browser's own; the sandbox needs rights that containers do not give.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars"]  # fmt: skip
CANDIDATES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHT = 844
SCHEMES = ("light", "dark")

# Resolves when every picture and font is there; gives the reason where that does not happen.
SETTLED = """async () => {
  document.querySelectorAll('img[loading=lazy]').forEach(image => image.loading = 'eager');
  const parts = {
    pictures: Promise.all([...document.images].map(image => image.decode().catch(() => {}))),
    fonts: document.fonts.ready,
  };
  const late = name => new Promise(resolve => setTimeout(resolve, 15000)).then(() => name + ' did not arrive in 15 s');
  const results = Object.entries(parts).map(([name, part]) => Promise.race([part.then(() => ''), late(name)]));
  return (await Promise.all(results)).filter(Boolean).join('; ');
}"""

# What can be seen without interacting; each list holds what is wrong.
FACTS = r"""() => {
  const article = document.querySelector('.bd-article') || document.body;
  const shown = element => element.tagName.toLowerCase() + '.' + (element.className.baseVal ?? element.className);
  const raw = [];
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode;
    const code = text.parentElement.closest('pre,code,script,style,.katex');
    if (!code && /\\\(|\\\[|\$\$|\{(eq|ref|cite|doc|numref)(:\w+)?\}/.test(text.data))
      raw.push(text.data.trim().slice(0, 80));
  }
  const width = document.documentElement.clientWidth;
  const sideways = document.documentElement.scrollWidth > width;
  const weights = {};
  for (const entry of [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')])
    weights[entry.name.split('?')[0]] = Math.max(weights[entry.name.split('?')[0]] || 0, entry.decodedBodySize || 0);
  return {
    formulas: document.querySelectorAll('.math').length,
    undrawn: [...document.querySelectorAll('.math')].filter(e => !e.querySelector('.katex'))
      .map(e => e.textContent.slice(0, 80)),
    wrong: [...document.querySelectorAll('.katex-error')].map(e => e.title || e.textContent),
    raw: raw,
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src.slice(0, 120)),
    undescribed: [...document.images].filter(image => !image.alt.trim()).map(image => image.src.slice(0, 120)),
    sideways: !sideways ? [] : [...document.body.querySelectorAll('*')]
      .filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest('.katex-mathml')).slice(0, 5).map(shown)
      .concat(['page is ' + document.documentElement.scrollWidth + ' px wide in ' + width]),
    weights: weights,
  };
}"""


def chromium() -> str | None:
    """Find the browser: `CHROMIUM` from the environment, or one of the usual names; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CANDIDATES)), None)


# What a module of browser tests sets as its pytestmark.
BROWSER_MARKS = [
    pytest.mark.browser,
    # In continuous integration a missing browser is an error that the fixture reports, not a reason to skip.
    pytest.mark.skipif(chromium() is None and not in_ci(), reason="no chromium; install it or set CHROMIUM=<its path>"),
]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing: the tests report what matters."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on localhost; give its address, ending in a slash."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Browser:
    """Opens pages of one served folder, and remembers everything that went wrong while they loaded."""

    def __init__(self, context, base: str):
        self.context, self.base = context, base
        self.complaints: list[str] = []
        outside = re.compile(rf"^(?!{re.escape(base)}|data:|blob:)")
        context.route(outside, self._refuse)
        context.on(
            "console", lambda message: message.type == "error" and self.complaints.append(f"console: {message.text}")
        )
        context.on("weberror", lambda error: self.complaints.append(f"script: {error.error}"))
        context.on(
            "response", lambda answer: answer.status >= 400 and self.complaints.append(f"{answer.status}: {answer.url}")
        )

    def _refuse(self, route) -> None:
        self.complaints.append(f"left localhost: {route.request.url}")
        route.abort()

    @contextmanager
    def page(self, path: str, width: int = WIDTHS["desktop"], scheme: str = "light") -> Iterator:
        """Open a page, wait until nothing in it is missing any more, and close it afterwards."""
        self.complaints.clear()
        page = self.context.new_page()
        try:
            page.set_viewport_size({"width": width, "height": HEIGHT})
            page.emulate_media(color_scheme=scheme)
            page.goto(self.base + path, wait_until="load")
            problem = page.evaluate(SETTLED)
            if problem:
                self.complaints.append(problem)
            yield page
        finally:
            page.close()


@contextmanager
def driver() -> Iterator:
    """Start playwright; it can be started once at a time."""
    # Imported here, so that the other tests of this folder run where playwright is missing.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium


@contextmanager
def launched(chromium_type, folder: Path) -> Iterator[Browser]:
    """Serve a folder and start a browser with a fresh profile on it."""
    with served(folder) as base, tempfile.TemporaryDirectory() as profile:
        context = chromium_type.launch_persistent_context(
            profile, executable_path=chromium(), headless=True, args=ARGUMENTS
        )
        context.set_default_timeout(120_000)  # a machine that does other work is slow, not wrong
        try:
            yield Browser(context, base)
        finally:
            context.close()
