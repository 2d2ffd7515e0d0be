"""Open the built book in a real browser without access to any other host."""

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

# No background traffic, and no host except localhost resolves. The sandbox needs rights
# that containers do not have.
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

# Resolves when all images and fonts are loaded, or to the reason why they are not.
SETTLED = """async () => {
  for (const image of document.querySelectorAll('img[loading=lazy]'))
    image.loading = 'eager';
  const decoded = [...document.images].map(image => image.decode().catch(() => {}));
  const parts = {images: Promise.all(decoded), fonts: document.fonts.ready};
  const late = name => new Promise(resolve =>
    setTimeout(() => resolve(name + ' not loaded after 15 s'), 15000));
  const results = Object.entries(parts).map(([name, part]) =>
    Promise.race([part.then(() => ''), late(name)]));
  return (await Promise.all(results)).filter(Boolean).join('; ');
}"""

# Facts about a page without interaction. The lists contain its errors.
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
  // Content of a box that scrolls or hides does not make the page wider.
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
    // A formula that is cut off may look like another complete formula.
    cut: [...document.querySelectorAll('div.math > span:not(.eqno)')]
      .filter(box => box.scrollWidth - box.clientWidth > 10)
      .map(box => box.parentElement.id || box.textContent.slice(0, 80)),
    sideways: !sideways ? [] : [...document.body.querySelectorAll('*')]
      .filter(reaches).slice(0, 5).map(shown)
      .concat([`page is ${document.documentElement.scrollWidth} px wide in ${width}`]),
    weights: weights,
  };
}"""

# Most elements of a page are tokens of code and parts of formulas. axe-core's results
# depend only on the classes of an element and of its ancestors, so to save time all
# elements but the first with the same classes are replaced by plain text.
EACH_TOKEN_ONCE = """() => {
  const seen = new Set();
  for (const token of document.querySelectorAll('pre span, .katex')) {
    if (token.childElementCount && !token.matches('.katex')) continue;
    // axe-core skips single letters.
    let kind = token.textContent.trim().length > 1 ? 'word ' : '';
    for (let box = token; box !== document.body; box = box.parentElement)
      kind += box.tagName + '.' + box.className + ' ';
    const drawn = token.querySelector('.katex-html') || token;
    if (seen.has(kind)) token.replaceWith(drawn.textContent);
    seen.add(kind);
  }
}"""

# The same for contrast, which axe-core computes per text node: one text per kind of
# ancestors remains, and empty elements are removed. The rows of tables alternate in
# colour, so their parity counts; a formula's part for screen readers has no colour.
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
    """Find the browser: $CHROMIUM, or a common name on the path; None without one."""
    return os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, CANDIDATES)), None
    )


# The pytestmark of modules with browser tests.
BROWSER_MARKS = [
    pytest.mark.browser,
    # In continuous integration a missing browser is an error, reported by the fixture.
    pytest.mark.skipif(
        chromium() is None and not in_ci(),
        reason="no chromium; install it or set CHROMIUM=<its path>",
    ),
]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Log nothing; the tests report the errors."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on localhost; yield its address, which ends in a slash."""
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
    """Open pages of a served folder, and record the errors while they load."""

    def __init__(self, context, base: str):
        self.context, self.base = context, base
        self.complaints: list[str] = []
        # Recorded, not intercepted, which would be slow and disable the cache.
        local = (base, "data:", "blob:", "about:")
        context.on(
            "request",
            lambda sent: (
                sent.url.startswith(local)
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
        """Open a page in the browser's only tab, and wait until it is loaded."""
        page = self.context.pages[0]
        if page.url.startswith(self.base):
            # The theme stores its colour scheme there; a new reader has none.
            page.evaluate("localStorage.clear()")
        # Errors of the previous page, which may still be loading, are discarded.
        page.goto("about:blank")
        self.complaints.clear()
        page.set_viewport_size({"width": width, "height": HEIGHT})
        page.emulate_media(color_scheme=scheme, media="screen")
        page.goto(self.base + path, wait_until="load")
        if problem := page.evaluate(SETTLED):
            self.complaints.append(problem)
        yield page


def stop_transitions(page) -> None:
    """Stop transitions, so that no colour is measured during a change."""
    page.add_style_tag(
        content=(
            "*, *::before, *::after { transition: none !important; animation: none"
            " !important; }"
        )
    )


@functools.cache
def axe() -> str:
    """Read the accessibility checker from its package."""
    import axe_playwright_python

    return (
        Path(axe_playwright_python.__file__)
        .with_name("axe.min.js")
        .read_text(encoding="utf-8")
    )


def accessibility_faults(page) -> list[tuple]:
    """Return axe-core's serious and critical findings: rule, element, reason.

    Contrast is checked for the current colour scheme. The page loses repeated code and
    formulas.
    """
    page.evaluate(EACH_TOKEN_ONCE)
    return _faults(page, {"rules": {CONTRAST: {"enabled": False}}}) + contrast_faults(
        page
    )


def contrast_faults(page) -> list[tuple]:
    """Return axe-core's findings on contrast. The page loses repeated texts."""
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
    """Start playwright, of which only one instance can run."""
    # Imported here, so that the other tests of this folder run without playwright.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium


@contextmanager
def launched(
    chromium_type, folder: Path, scale: float = 1, more: tuple[str, ...] = ()
) -> Iterator[Browser]:
    """Serve a folder and start a browser with a fresh profile on it; `scale` is the
    number of pixels per CSS pixel, `more` are further arguments of the browser.
    """
    with served(folder) as base, tempfile.TemporaryDirectory() as profile:
        context = chromium_type.launch_persistent_context(
            profile,
            executable_path=chromium(),
            headless=True,
            args=[*ARGUMENTS, *more],
            device_scale_factor=scale,
        )
        # Long enough for a busy machine.
        context.set_default_timeout(120_000)
        try:
            yield Browser(context, base)
        finally:
            context.close()
