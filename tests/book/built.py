"""Paths of the book and its sources, and whether the built book is up to date."""

import os
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
# Written by book/_ext/built_mark.py; its time is the start of the last build.
MARK = HTML / ".built"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Written by the build.
GENERATED = tuple(
    Path("book", name) for name in ("api", "inspection_parts", "ledger", "speed_parts")
)
SOURCES = (
    "_config.yml",
    "book/**/*",
    "notebooks/*.ipynb",
    "paperlib/**/*.py",
    "tests/**/*.py",
)
BUILD_IT = "run `make html` (`make test` does it first)"


def documents() -> list[str]:
    """List the documents in the table of contents, without suffix, in its order."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))

    def walk(node: object) -> list[str]:
        if isinstance(node, list):
            return [name for item in node for name in walk(item)]
        if isinstance(node, dict):
            listed = [node[key] for key in ("root", "file") if key in node]
            if "glob" in node:
                listed += sorted(
                    path.relative_to(ROOT).with_suffix("").as_posix()
                    for path in ROOT.glob(f"{node['glob']}.md")
                )
            return listed + [
                name
                for key in ("parts", "chapters", "sections")
                for name in walk(node.get(key, []))
            ]
        return []

    return walk(toc)


def pages() -> list[str]:
    """List all built pages, relative to the built book, except index.html."""
    paths = sorted(path.relative_to(HTML) for path in HTML.rglob("*.html"))
    return [
        path.as_posix()
        for path in paths
        if path.parts[0] not in ("_static", "_sources", "index.html")
    ]


def why_not_built() -> str:
    """Return why the built book can't be tested; empty if it is up to date."""
    if not MARK.is_file():
        return f"the book is not built; {BUILD_IT}"
    built = MARK.stat().st_mtime
    files = [
        path.relative_to(ROOT)
        for pattern in SOURCES
        for path in ROOT.glob(pattern)
        if path.is_file()
    ]
    sources = [
        path
        for path in files
        if "__pycache__" not in path.parts and path.parent not in GENERATED
    ]
    newer = sorted(
        str(path) for path in sources if (ROOT / path).stat().st_mtime > built
    )
    return (
        f"the built book is older than {', '.join(newer[:3])}; {BUILD_IT}"
        if newer
        else ""
    )


def in_ci() -> bool:
    """Return whether this is continuous integration, where no test may be skipped."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
