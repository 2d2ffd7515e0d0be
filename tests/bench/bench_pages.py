"""Weigh the built book and time it: the largest contentful paint of each page at phone
width, and a warm build.

The pages come from a server on this computer. The paint is the browser's own measure:
the moment at which the largest picture or paragraph of the first screen stood there.
Start it with `python -m tests.bench.bench_pages` on a built book; `--build` times a
build as well, in which one page's source has changed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "book")]

from browser import WIDTHS, driver, launched  # noqa: E402
from built import HTML, documents, why_not_built  # noqa: E402

PAINT = """() => new Promise(resolve => {
  let last = 0;
  new PerformanceObserver(list => {
    for (const entry of list.getEntries()) last = entry.startTime;
  }).observe({type: 'largest-contentful-paint', buffered: true});
  setTimeout(() => resolve(last), 300);
})"""
WEIGHT = """() => ['navigation', 'resource']
  .flatMap(type => performance.getEntriesByType(type))
  .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""


def warm_build() -> float:
    """Build with one page to write anew; return the seconds."""
    os.utime(ROOT / "book" / "02_cam.md")
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        ".",
        "--toc",
        "book/_toc.yml",
        "-W",
        "-n",
    ]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--keep-going"], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "-n", type=int, default=3, help="times that each page is loaded (default 3)"
    )
    parser.add_argument("--build", action="store_true", help="time a warm build, too")
    options = parser.parse_args()
    if problem := why_not_built():
        sys.exit(problem)
    if options.build:
        print(f"a warm build, one page changed: {warm_build():.1f} s")
    files = [path.stat().st_size for path in HTML.rglob("*") if path.is_file()]
    print(f"the book: {sum(files) / 1e6:.1f} MB in {len(files)} files")
    print(
        f"{'page':32} {'MB':>6}  {'paint, s':>8}   (390 px wide, median of {options.n})"
    )
    names = [name for name in documents() if not name.startswith("book/api/")]
    with driver() as chromium, launched(chromium, HTML) as browser:
        # Everything is fetched anew, as on a first visit.
        browser.context.new_cdp_session(browser.context.pages[0]).send(
            "Network.setCacheDisabled", {"cacheDisabled": True}
        )
        for name in names:
            paints, weight = [], 0
            for _ in range(options.n):
                with browser.page(f"{name}.html", WIDTHS["phone"]) as page:
                    paints.append(page.evaluate(PAINT) / 1000)
                    weight = page.evaluate(WEIGHT)
            print(
                f"{name:32} {weight / 1e6:6.2f}  {statistics.median(paints):8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
