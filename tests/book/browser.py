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

# No background traffic of the browser's own, and no name or number but localhost's is
# found; the sandbox needs rights that containers do not give.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
CANDIDATES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHT = 844
SCHEMES = ("light", "dark")
CONTRAST = "color-contrast"  # the one rule of axe-core that depends on the scheme

# Resolves when every picture and font is there; gives the reason where that does not
# happen.
SETTLED = """async () => {
  for (const image of document.querySelectorAll('img[loading=lazy]'))
    image.loading = 'eager';
  const decoded = [...document.images].map(image => image.decode().catch(() => {}));
  const parts = {pictures: Promise.all(decoded), fonts: document.fonts.ready};
  const late = name => new Promise(resolve =>
    setTimeout(() => resolve(name + ' did not arrive in 15 s'), 15000));
  const results = Object.entries(parts).map(([name, part]) =>
    Promise.race([part.then(() => ''), late(name)]));
  return (await Promise.all(results)).filter(Boolean).join('; ');
}"""

# What can be seen without interacting; each list holds what is wrong.
FACTS = r"""() => {
  const article = document.querySelector('.bd-article') || document.body;
  const shown = element => element.tagName.toLowerCase() + '.'
    + (element.className.baseVal ?? element.className);
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
  for (const type of ['navigation', 'resource'])
    for (const entry of performance.getEntriesByType(type)) {
      const name = entry.name.split('?')[0];
      weights[name] = Math.max(weights[name] || 0, entry.decodedBodySize || 0);
    }
  // What lies in a box that scrolls or hides makes no page wider.
  const shows = box => !box || getComputedStyle(box).overflowX === 'visible'
    && shows(box.parentElement);
  const reaches = e => e.getBoundingClientRect().right > width + 1
    && shows(e.parentElement);
  return {
    formulas: document.querySelectorAll('.math').length,
    undrawn: [...document.querySelectorAll('.math')]
      .filter(e => !e.querySelector('.katex')).map(e => e.textContent.slice(0, 80)),
    wrong: [...document.querySelectorAll('.katex-error')]
      .map(e => e.title || e.textContent),
    raw: raw,
    broken: [...document.images]
      .filter(image => !image.naturalWidth).map(image => image.src.slice(0, 120)),
    undescribed: [...document.images]
      .filter(image => !image.alt.trim()).map(image => image.src.slice(0, 120)),
    // A formula whose end is out of sight may look complete and be another formula.
    cut: [...document.querySelectorAll('div.math > span:not(.eqno)')]
      .filter(box => box.scrollWidth - box.clientWidth > 10)
      .map(box => box.parentElement.id || box.textContent.slice(0, 80)),
    sideways: !sideways ? [] : [...document.body.querySelectorAll('*')]
      .filter(reaches).slice(0, 5).map(shown)
      .concat([`page is ${document.documentElement.scrollWidth} px wide in ${width}`]),
    weights: weights,
  };
}"""

# Three quarters of a notebook's page are coloured tokens of code, and half of a paper's
# page are parts of formulas. Where another one with the same classes has been seen
# inside the same kinds of boxes, a token or a formula becomes plain text: it would be
# judged the same, for as much time again.
EACH_TOKEN_ONCE = """() => {
  const seen = new Set();
  for (const token of document.querySelectorAll('pre span, .katex')) {
    if (token.childElementCount && !token.matches('.katex')) continue;
    // axe-core judges no single letter.
    let kind = token.textContent.trim().length > 1 ? 'word ' : '';
    for (let box = token; box !== document.body; box = box.parentElement)
      kind += box.tagName + '.' + box.className + ' ';
    const drawn = token.querySelector('.katex-html') || token;
    if (seen.has(kind)) token.replaceWith(drawn.textContent);
    seen.add(kind);
  }
}"""

# The same for contrast, which axe-core computes for one text after the other: of the
# texts inside the same kinds of boxes one is left, and what is empty then goes. Rows of
# a table are striped; of a formula the part for screen readers has no colour.
EACH_TEXT_ONCE = """() => {
  const kinds = new Map(), seen = new Set(), texts = [];
  const kind = box => {
    if (box === document.documentElement) return '';
    if (!kinds.has(box)) {
      const style = box.getAttribute('style') || '';
      kinds.set(box, [kind(box.parentElement), box.tagName,
        box.className.baseVal ?? box.className, /color|background/.test(style) && style,
        box.tagName === 'TR' && [...box.parentElement.children].indexOf(box) % 2,
      ].join(' '));
    }
    return kinds.get(box);
  };
  for (const unseen of document.querySelectorAll('.katex-mathml')) unseen.remove();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts) {
    const length = text.data.trim().length;
    if (!length) continue;
    const box = text.parentElement.closest('.katex-html') || text.parentElement;
    const found = (length > 1 ? 'word' : 'letter') + kind(box);
    if (seen.has(found)) text.data = '';
    seen.add(found);
  }
  for (const element of [...document.body.querySelectorAll('*')].reverse())
    if (!element.textContent.trim() && !element.matches('input, textarea, select'))
      element.remove();
}"""


def chromium() -> str | None:
    """Find the browser: `CHROMIUM` from the environment, or one of the usual names;
    None where there is none.
    """
    return os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, CANDIDATES)), None
    )


# What a module of browser tests sets as its pytestmark.
BROWSER_MARKS = [
    pytest.mark.browser,
    # In continuous integration a missing browser is an error that the fixture reports,
    # not a reason to skip.
    pytest.mark.skipif(
        chromium() is None and not in_ci(),
        reason="no chromium; install it or set CHROMIUM=<its path>",
    ),
]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing: the tests report what matters."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on localhost; give its address, ending in a slash."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Browser:
    """Opens pages of one served folder, and remembers everything that went wrong while
    they loaded.
    """

    def __init__(self, context, base: str):
        self.context, self.base = context, base
        self.complaints: list[str] = []
        # Noted, not intercepted: that would take every request through this process,
        # and the browser's cache away.
        at_home = (base, "data:", "blob:", "about:")
        context.on(
            "request",
            lambda sent: (
                sent.url.startswith(at_home)
                or self.complaints.append(f"left localhost: {sent.url}")
            ),
        )
        context.on(
            "console",
            lambda message: (
                message.type == "error"
                and self.complaints.append(f"console: {message.text}")
            ),
        )
        context.on(
            "weberror", lambda error: self.complaints.append(f"script: {error.error}")
        )
        context.on(
            "response",
            lambda answer: (
                answer.status >= 400
                and self.complaints.append(f"{answer.status}: {answer.url}")
            ),
        )

    @contextmanager
    def page(
        self, path: str, width: int = WIDTHS["desktop"], scheme: str = "light"
    ) -> Iterator:
        """Open a page in the browser's one tab, and wait until nothing in it is missing
        any more.
        """
        page = self.context.pages[0]
        if page.url.startswith(self.base):
            # As for a new reader: the theme keeps its colours there.
            page.evaluate("localStorage.clear()")
        # What still loads of the page before is no complaint about this one.
        page.goto("about:blank")
        self.complaints.clear()
        page.set_viewport_size({"width": width, "height": HEIGHT})
        page.emulate_media(color_scheme=scheme, media="screen")
        page.goto(self.base + path, wait_until="load")
        if problem := page.evaluate(SETTLED):
            self.complaints.append(problem)
        yield page


def still(page) -> None:
    """Stop transitions, so that nothing is judged half-way between two colours."""
    page.add_style_tag(
        content=(
            "*, *::before, *::after { transition: none !important; animation: none"
            " !important; }"
        )
    )


@functools.cache
def axe() -> str:
    """Read the accessibility checker as its package carries it: nothing is fetched."""
    import axe_playwright_python

    return (
        Path(axe_playwright_python.__file__)
        .with_name("axe.min.js")
        .read_text(encoding="utf-8")
    )


def accessibility_faults(page) -> list[tuple]:
    """Ask axe-core for what is serious or critical, in the colours in which the page is
    shown: rule, place, reason. The page's code and formulas become fewer.
    """
    page.evaluate(EACH_TOKEN_ONCE)
    return _faults(page, {"rules": {CONTRAST: {"enabled": False}}}) + contrast_faults(
        page
    )


def contrast_faults(page) -> list[tuple]:
    """Ask axe-core for text without enough contrast. The page's text becomes less."""
    page.evaluate(EACH_TEXT_ONCE)
    return _faults(page, {"runOnly": [CONTRAST]})


def _faults(page, options: dict) -> list[tuple]:
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe())
    report = page.evaluate(
        "options => axe.run(document, options)",
        {"resultTypes": ["violations"]} | options,
    )
    return [
        (fault["id"], node["target"], re.sub(r"\s+", " ", node["failureSummary"])[:200])
        for fault in report["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"][:5]
    ]


@contextmanager
def driver() -> Iterator:
    """Start playwright; it can be started once at a time."""
    # Imported here, so that the other tests of this folder run where playwright is
    # missing.
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
        # A machine that does other work is slow, not wrong.
        context.set_default_timeout(120_000)
        try:
            yield Browser(context, base)
        finally:
            context.close()
