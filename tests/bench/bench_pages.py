"""Measure the size and the largest contentful paint of each page of the built book.

The pages are served locally and loaded at phone width. The largest contentful paint is
the time at which the largest image or paragraph of the first screen is painted. Run
`python -m tests.bench.bench_pages` on a built book; `--build` also times an incremental
build after a change to one page.
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


def incremental_build() -> float:
    """Rebuild after a change to one page; return the seconds."""
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
    parser.add_argument("-n", type=int, default=3, help="loads per page (default 3)")
    parser.add_argument("--build", action="store_true", help="also time a build")
    options = parser.parse_args()
    if problem := why_not_built():
        sys.exit(problem)
    if options.build:
        print(f"build after a change to one page: {incremental_build():.1f} s")
    files = [path.stat().st_size for path in HTML.rglob("*") if path.is_file()]
    print(f"the book: {sum(files) / 1e6:.1f} MB in {len(files)} files")
    print(
        f"{'page':32} {'MB':>6}  {'paint, s':>8}   (390 px wide, median of {options.n})"
    )
    names = [name for name in documents() if not name.startswith("book/api/")]
    with driver() as chromium, launched(chromium, HTML) as browser:
        # Without the cache, every load is like a first visit.
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
