"""Collect the ledger: where each numbered item of the five papers is told, computed,
tested, and how it was verified.

The rows are the items of book/data/items.yml. What a row says is collected:

- a docstring whose field `Source:` names an item
  (`arXiv:1704.04861v1, Eq. 2 and 4, Tables 4-9`) gives the function, and its field
  `Test:` the test;
- a test that compares with a library of `PEERS` counts as a peer;
- a tag `ledger:ITEM:KIND` on a code cell of a notebook gives the cell, and says how the
  item is verified there;
- a target `(ledger:ITEM:KIND)=` in a page on a paper does the same for the place that
  it stands before.

ITEM is `mobilenet-eq-2`, `patch-svdd-algorithm-1`, `padim-table-4`; KIND is one of
`KINDS`. The build writes the pages (book/_ext/ledger_pages.py). To see what is wrong:

    python book/tools/ledger.py
"""

import ast
import functools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from api_names import documented_as
from nbformat import NotebookNode

from paperlib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("book/data")
FOLDER = Path("book/ledger")  # written at each build, not committed
QUOTED_SHARE = 0.2  # of equations and algorithms

# From the strongest to the weakest: a row with several counts as the first. Slug → what
# the page calls it, and means.
KINDS = {
    "by-hand": (
        "by hand",
        "a small example computed on paper, or the formula written as loops, has the"
        " same result",
    ),
    "peer": ("a peer", "an independent library returns the same result"),
    "paper-number": (
        "the paper's number",
        "we compute what the paper prints, and the difference is shown",
    ),
    "measured": (
        "measured on other data",
        "the same experiment is run here, with other data or another network; only the"
        " direction can be compared",
    ),
    "redrawn": (
        "redrawn",
        "a diagram without results, drawn again by the book from objects of the"
        " library",
    ),
    "quoted": (
        "quoted only",
        "described or printed as in the paper, and not checked here",
    ),
    "not-here": ("not reproducible here", "the row says why"),
}
# Libraries that a test compares with; others serve as sources of networks and pictures.
PEERS = {
    "captum": "captum",
    "faiss": "faiss",
    "fvcore": "fvcore",
    "pytorch_grad_cam": "pytorch-grad-cam",
    "scipy": "SciPy",
    "sklearn": "scikit-learn",
    "torch.utils.flop_counter": "PyTorch's counter",
    "torchcam": "torchcam",
}
# Kind → the key in items.yml that gives the reason.
UNVERIFIED = {"quoted": "quoted", "not-here": "not_here"}
GROUPS = {"eq": "equation"} | {name: name for name in ("algorithm", "table", "figure")}
WORDS = {"eq": "Eq.", "algorithm": "Algorithm", "table": "Table", "figure": "Figure"}
NUMBERS = {
    "inferred": "number by its order",
    "recalled": "number recalled",
    "unknown": "number not found",
}

NUMERAL = r"(?:[IVX]+|\d+)\b"
NAMED = re.compile(
    rf"arXiv:(?P<arxiv>\d{{4}}\.\d{{5}})|(?P<end>;)"
    rf"|\b(?P<word>Eq|Table|Fig|Figure|Alg|Algorithm)s?\.? (?P<list>{NUMERAL}(?:(?:-|,"
    rf" and |, | and ){NUMERAL})*)"
)
MARK = re.compile(r"ledger:([a-z0-9-]+):([a-z-]+)")
TARGET = re.compile(rf"^\({MARK.pattern}\)=$", re.M)


class Mark(NamedTuple):
    """A place in the book that tells of an item. Its page, without suffix; its anchor;
    whether its code, or that of the hidden cells after it, asserts.
    """

    page: str
    anchor: str
    kind: str
    asserts: bool


class Function(NamedTuple):
    """A function or class whose docstring names an item: dotted name, file, line, tests
    as (file, name).
    """

    name: str
    path: str
    line: int
    tests: tuple[tuple[str, str], ...]

    @property
    def module(self) -> str:
        return ".".join(Path(self.path).with_suffix("").parts)


class Row(NamedTuple):
    """One item of a paper, with all that was found about it."""

    paper: str
    item: str
    entry: dict
    marks: list[Mark]
    functions: list[Function]
    peers: list[str]

    @property
    def group(self) -> str:
        return self.item.partition("-")[0]

    @property
    def kinds(self) -> list[str]:
        found = {mark.kind for mark in self.marks} | ({"peer"} if self.peers else set())
        return sorted(found & set(KINDS), key=list(KINDS).index) or [
            kind for kind, reason in UNVERIFIED.items() if reason in self.entry
        ]

    @property
    def kind(self) -> str:
        return self.kinds[0] if self.kinds else ""

    @property
    def tests(self) -> list[tuple[str, str]]:
        tests = (test for function in self.functions for test in function.tests)
        return list(dict.fromkeys(tests))


class Ledger(NamedTuple):
    """All rows in the papers' order, the papers' heads, and everything wrong."""

    papers: dict[str, dict]
    rows: list[Row]
    problems: list[str]

    def quoted_share(self) -> float:
        """Give the share of equations and algorithms that are quoted only."""
        counted = [row for row in self.rows if row.group in ("eq", "algorithm")]
        return sum(row.kind == "quoted" for row in counted) / len(counted)


def collect(root: Path) -> Ledger:
    """Read items, docstrings, notebooks and pages below `root`."""
    papers = _yaml(root / DATA / "items.yml")
    rows = {
        f"{paper.replace('_', '-')}-{item}": Row(paper, item, entry, [], [], [])
        for paper, head in papers.items()
        for item, entry in head["items"].items()
    }
    problems = []

    def row(key: str, where: str) -> Row | None:
        if key not in rows:
            problems.append(
                f"{where} names {key}, which {DATA}/items.yml does not list"
            )
        return rows.get(key)

    for paper in papers:
        for item in known(_yaml(root / DATA / f"{paper}.yml")):
            row(f"{paper.replace('_', '-')}-{item}", f"{DATA}/{paper}.yml")
    for function, keys in functions(
        root, {head["arxiv"]: paper for paper, head in papers.items()}
    ):
        for key in keys:
            if found := row(key, f"the docstring of {function.name}"):
                found.functions.append(function)
    for key, mark in marks(root):
        if mark.kind not in KINDS:
            problems.append(
                f"{mark.page} says {mark.kind!r} of {key}; expected one of"
                f" {', '.join(KINDS)}"
            )
        elif found := row(key, mark.page):
            if any(mark[:2] == other[:2] for other in found.marks):
                problems.append(f"{mark.page} says the same of {key} twice")
            found.marks.append(mark)
    for one in rows.values():
        for file, name in one.tests:
            one.peers.extend(peers(root / "tests" / file, name))
        one.peers[:] = dict.fromkeys(one.peers)
    problems += [
        problem for key, one in rows.items() for problem in _faults(key, one, root)
    ]
    ledger = Ledger(papers, list(rows.values()), problems)
    if (share := ledger.quoted_share()) > QUOTED_SHARE:
        problems.append(
            f"{share:.0%} of equations and algorithms are quoted only; at most"
            f" {QUOTED_SHARE:.0%} may be"
        )
    return ledger


def _faults(key: str, row: Row, root: Path) -> list[str]:
    faults = []
    reasons = [kind for kind, reason in UNVERIFIED.items() if row.entry.get(reason)]
    verified = row.kind and row.kind not in UNVERIFIED
    if not row.kind:
        faults.append(
            f"{key} has no row: no cell, no page and no reason in items.yml"
            " speaks of it"
        )
    if len(reasons) > 1 or (reasons and row.kind not in ("", *reasons)):
        faults.append(
            f"items.yml says why {key} is {KINDS[reasons[0]][0]}, but it counts as"
            f" {KINDS[row.kind][0]}"
        )
    if row.kind in UNVERIFIED and row.kind not in reasons:
        faults.append(f"{key} is {KINDS[row.kind][0]}; items.yml must say why")
    if row.kind == "quoted" and not row.marks:
        faults.append(f"{key} is quoted only, but no page marks where")
    if (
        verified
        and row.group in ("eq", "algorithm")
        and not row.tests
        and not any(mark.asserts for mark in row.marks)
    ):
        faults.append(
            f"{key} is verified {KINDS[row.kind][0]}, but no test and no asserting cell"
            " does it"
        )
    for file, name in row.tests:
        if not _line_of_test(root, file, name):
            faults.append(f"{key}: tests/{file} has no {name}")
    return faults


# ---- where things are said ----
def known(facts: dict) -> list[str]:
    """List the items that a file of facts knows of."""
    found = []
    for key, value in facts.items():
        if numbered := re.match(rf"table_({NUMERAL[:-2]}|per_class)(?:_|$)", key):
            found.append(f"table-{_number(numbered[1]).replace('_', '-')}")
        elif key in ("equations", "equations_arxiv_v4"):
            found += [f"eq-{one['number']}" for one in value["items"] if one["number"]]
        elif key == "algorithms":
            found += [
                f"algorithm-{number}"
                for name in value
                for number in re.findall(r"^(\d+)_", name)
            ]
        elif key.startswith("figures") and isinstance(value, dict):
            found += [
                f"figure-{number}"
                for name in value
                for number in re.findall(r"^figure_(\d+)$", name)
            ]
            found += [f"figure-{name}" for name in value.get("without_number", ())]
    return found


def named(source: str, papers: dict[str, str]) -> list[str]:
    """List the items that a `Source:` names: `arXiv:2006.16067, Eq. 4-6 and Alg. 1` →
    patch-svdd-eq-4, …

    Args:
        source: the text of the field.
        papers: arXiv number → paper; items of other papers are left out.
    """
    found, paper = [], None
    for part in NAMED.finditer(source):
        if part["arxiv"]:
            paper = papers.get(part["arxiv"])
        elif part["end"]:
            paper = None
        elif paper:
            groups = {"E": "eq", "T": "table", "F": "figure", "A": "algorithm"}
            stem = f"{paper.replace('_', '-')}-{groups[part['word'][0]]}"
            ranges = re.findall(rf"({NUMERAL})(?:-({NUMERAL}))?", part["list"])
            for first, last in ranges:
                numbers = range(int(_number(first)), int(_number(last or first)) + 1)
                found += [f"{stem}-{number}" for number in numbers]
    return found


def _number(numeral: str) -> str:
    if not set(numeral) <= set("IVX"):
        return numeral
    values = [{"I": 1, "V": 5, "X": 10}[letter] for letter in numeral]
    pairs = zip(values, [*values[1:], 0], strict=True)
    return str(sum(-value if value < after else value for value, after in pairs))


def functions(root: Path, papers: dict[str, str]) -> list[tuple[Function, list[str]]]:
    """List the documented functions and classes whose docstring names items, and those
    items. Exercises are left out.
    """
    found = []
    for path in sorted((root / "paperlib").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "exercises" not in parts and not any(part.startswith("_") for part in parts):
            text = path.read_text(encoding="utf-8")
            if any(f"arXiv:{number}" in text for number in papers):
                tree, file = ast.parse(text), path.relative_to(root)
                found += _walk(tree, parts, file, papers, root)
    # Docstrings name a test's file alone; its folder mirrors that of the library.
    tests = root / "tests"
    files = {
        path.name: path.relative_to(tests).as_posix()
        for path in tests.rglob("test_*.py")
    }
    return [
        (
            function._replace(
                tests=tuple(
                    (files.get(file, file), name) for file, name in function.tests
                )
            ),
            items,
        )
        for function, items in found
    ]


def _walk(
    tree: ast.AST, parts: tuple, path: Path, papers: dict[str, str], root: Path
) -> list[tuple[Function, list[str]]]:
    found = []
    for node in tree.body:
        is_named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if is_named and not node.name.startswith("_"):
            name = (*parts, node.name)
            text = ast.get_docstring(node) or ""
            fields = re.split(r"\b(Source|Departures|Test):\s", text)
            fields = dict(zip(fields[1::2], fields[2::2], strict=True))
            inner = ".".join(name[len(path.with_suffix("").parts) :])
            keys = named(" ".join(fields.get("Source", "").split()), papers)
            if keys and documented_as(root, path.as_posix(), inner):
                tests = tuple(re.findall(r"(\w+\.py)::(\w+)", fields.get("Test", "")))
                place = path.as_posix(), node.lineno
                found.append((Function(".".join(name), *place, tests), keys))
            if isinstance(node, ast.ClassDef):
                found += _walk(node, name, path, papers, root)
    return found


def marks(root: Path) -> list[tuple[str, Mark]]:
    """List what tags of notebook cells and targets of pages say, page by page,
    in their order.
    """
    found = []
    for path in sorted((root / "book").glob("*.md")):
        page = f"book/{path.stem}"
        for match in TARGET.finditer(path.read_text(encoding="utf-8")):
            mark = Mark(page, anchor(match[0][1:-2]), match[2], False)
            found.append((match[1], mark))
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for i, cell in enumerate(cells):
            for tag in cell.metadata.get("tags", ()):
                if match := MARK.fullmatch(tag):
                    page = f"notebooks/{path.stem}"
                    asserts = any(map(_asserts, _with_checks(cells[i:])))
                    found.append((match[1], Mark(page, anchor(tag), match[2], asserts)))
    return found


def _with_checks(cells: Sequence[NotebookNode]) -> Iterator[str]:
    """Yield the code of the first cell and of the hidden cells right after it, which
    check its results out of the reader's sight.
    """
    yield cells[0].source
    for cell in cells[1:]:
        if "remove-cell" not in cell.metadata.get("tags", ()):
            return
        yield cell.source


def anchor(mark: str) -> str:
    """Name the place of a mark in its page, as docutils does for targets."""
    return mark.replace(":", "-")


def _asserts(source: str) -> bool:
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr.startswith("assert_"))
        for node in ast.walk(ast.parse(source))
    )


def peers(path: Path, test: str) -> list[str]:
    """Name the libraries that a test compares with: what it uses, or a function of the
    same file that it calls.
    """
    imported, functions = _imports_and_functions(path)
    names = _names(functions.get(test))
    inner = [name for called in names for name in _names(functions.get(called))]
    found = []
    for name in [*names, *inner]:
        whole = f"{imported.get(name, '')}."
        found += [
            label for library, label in PEERS.items() if whole.startswith(f"{library}.")
        ]
    return list(dict.fromkeys(found))


@functools.cache
def _imports_and_functions(
    path: Path,
) -> tuple[dict[str, str], dict[str, ast.FunctionDef]]:
    """Map the names that a file imports to what they stand for, and the names of its
    functions to their code.
    """
    imported, functions = {}, {}
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for alias in node.names
            }
        elif isinstance(node, ast.FunctionDef):
            functions[node.name] = node
    return imported, functions


def _names(function: ast.FunctionDef | None) -> list[str]:
    nodes = ast.walk(function) if function else ()
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def _line_of_test(root: Path, file: str, name: str) -> int:
    path = root / "tests" / file
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next(
        (i for i, line in enumerate(lines, start=1) if line.startswith(f"def {name}(")),
        0,
    )


def _yaml(path: Path) -> dict:
    # In C ten times as fast, where it is there.
    safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=safe)


# ---- the pages ----
def write(root: Path, ledger: Ledger) -> None:
    """Write what book/ledger.md includes, and the page of the tests; an unchanged file
    keeps its time.
    """
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    for name, text in {
        "rows.txt": rows_page(root, ledger),
        "tests.md": tests_page(ledger),
    }.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def rows_page(root: Path, ledger: Ledger) -> str:
    """Compose summary, the meaning of each kind, and one table a paper."""
    parts = [_summary(ledger)]
    for paper, head in ledger.papers.items():
        own = [row for row in ledger.rows if row.paper == paper]
        about = [head["about"].strip()] if "about" in head else []
        chapter = (
            f"[page](../book/{head['review']}.md) ·"
            f" [notebook](../notebooks/{head['review']}.ipynb)"
        )
        parts.append(f"## {head['name']}\n\n{{cite:t}}`{head['cite']}` · {chapter}\n")
        parts += [f"{text}\n" for text in about]
        lines = [
            "| item | in the book | code and test | verified |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {' | '.join(_cells(root, row, head.get('roman', False)))} |"
            for row in own
        ]
        parts.append(":::{table}\n:class: ledger\n\n" + "\n".join(lines) + "\n:::\n")
    return "\n".join(parts)


def _summary(ledger: Ledger) -> str:
    tables = [row for row in ledger.rows if row.group == "table"]
    kinds = {
        "equations, algorithms": [
            row.kind for row in ledger.rows if row.group in ("eq", "algorithm")
        ],
        "figures": [row.kind for row in ledger.rows if row.group == "figure"],
        "tables": [row.kind for row in tables if "needs" not in row.entry],
        "tables, data not here": [row.kind for row in tables if "needs" in row.entry],
    }
    counts = {name: Counter(column) for name, column in kinds.items()}
    lines = [
        "| verified | " + " | ".join(counts) + " |",
        "|---|" + "---:|" * len(counts),
    ]
    for kind, (label, _) in KINDS.items():
        if any(count[kind] for count in counts.values()):
            cells = [str(count[kind] or "") for count in counts.values()]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    totals = [f"**{count.total()}**" for count in counts.values()]
    lines.append(f"| **all** | {' | '.join(totals)} |")
    summary = "\n".join(lines)
    needs = Counter(row.entry["needs"] for row in tables if "needs" in row.entry)
    largest = " and ".join(
        f"{name} ({count} tables)" for name, count in needs.most_common(2)
    )
    meanings = "\n".join(
        f"- **{label}**: {sentence}." for label, sentence in KINDS.values()
    )
    confirmed = sum(row.kind == "by-hand" and bool(row.peers) for row in ledger.rows)
    equations = counts["equations, algorithms"]
    quoted = equations["quoted"]
    return (
        f"## {len(ledger.rows)} items\n\n"
        f":::{{table}}\n:class: ledger-summary\n\n{summary}\n:::\n\n"
        "An item that was verified in several ways is counted once, in the first row"
        f" that applies. For {confirmed} of the items verified by hand, an independent"
        f" library confirms the result. {quoted} of the {equations.total()} equations"
        f" and algorithms {'is' if quoted == 1 else 'are'} quoted only"
        f" ({ledger.quoted_share():.0%}; limit: {QUOTED_SHARE:.0%}). The tables in"
        " the last column can only be repeated in full with data that this book does"
        f" not include, mostly {largest}. Their accuracies are not measured here, but"
        " costs are counted, and some experiments are run on other data.\n\n"
        f"The kinds of verification:\n\n{meanings}\n"
    )


def label(row: Row, roman: bool) -> str:
    """Call an item as its paper does: Eq. 2, Table IV; where the number was not found,
    by its kind alone.
    """
    number = row.item.partition("-")[2]
    if not number.isdigit():
        return f"a {row.group}"
    if roman and row.group == "table":
        number = "I II III IV V VI VII VIII IX X".split()[int(number) - 1]
    return f"{WORDS[row.group]} {number}"


def _cells(root: Path, row: Row, roman: bool) -> list[str]:
    aside = [f"Sec. {row.entry['where']}"] if "where" in row.entry else []
    aside += [NUMBERS[row.entry["number"]]] if "number" in row.entry else []
    says = f"**{label(row, roman)}** {row.entry['says']}"
    says += f" ({', '.join(aside)})" if aside else ""
    why = [row.entry[key] for key in ("quoted", "not_here", "note") if key in row.entry]
    words = [
        "quoted" if kind == "quoted" != row.kind else KINDS[kind][0]
        for kind in row.kinds
    ]
    if row.peers:
        peer = KINDS["peer"][0]
        by_name = f"{peer} ({', '.join(row.peers)})"
        words = [by_name if word == peer else word for word in words]
    verified = f"**{', '.join(words)}**" + (f": {why[0]}" if why else "")
    return [says, _places(row), _code(root, row), verified]


def _places(row: Row) -> str:
    links = {}
    for mark in row.marks:
        name = "notebook" if mark.page.startswith("notebooks/") else "page"
        links.setdefault(name, []).append(f"../{mark.page}.html#{mark.anchor}")
    shown = [
        _link(name if i == 0 else str(i + 1), address)
        for name, addresses in links.items()
        for i, address in enumerate(dict.fromkeys(addresses))
    ]
    return " · ".join(shown) or "not in the book"


def _code(root: Path, row: Row) -> str:
    lines = []
    for function in row.functions:
        inner = function.name.removeprefix(f"{function.module}.")
        page, documented = documented_as(root, function.path, inner)
        source = f"../_modules/{function.module.replace('.', '/')}.html#{inner}"
        name = _link(_as_code(inner), f"api/{page}.html#{documented}")
        lines.append(
            f"{name} ({_link(f'{Path(function.path).name}:{function.line}', source)})"
        )
    for file, name in row.tests:
        line = _line_of_test(root, file, name)
        place = f"ledger/tests.html#{_test_anchor(file, name)}"
        lines.append(f"test {_link(_as_code(name), place)} ({file}:{line})")
    cells = [mark for mark in row.marks if mark.asserts and mark.kind not in UNVERIFIED]
    if cells:
        links = ", ".join(
            _link(f"cell {i}", f"../{m.page}.html#{m.anchor}")
            for i, m in enumerate(cells, start=1)
        )
        links = links if len(cells) > 1 else links.replace("cell 1", "a cell")
        lines.append(f"asserted in {links} of the notebook")
    return "<br>".join(lines)


def _link(text: str, address: str) -> str:
    # Written as HTML: Sphinx knows neither the pages of source nor the anchors of
    # cells. tests/book follow every link.
    return f'<a href="{address}">{text}</a>'


def _as_code(name: str) -> str:
    # a long name breaks between its words
    return f"<code>{name.replace('_', '_<wbr>')}</code>"


def _test_anchor(file: str, name: str) -> str:
    return f"{Path(file).stem}-{name}".replace("_", "-")


def tests_page(ledger: Ledger) -> str:
    """Compose the page that shows the code of every test in the ledger."""
    items: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in ledger.rows:
        head = ledger.papers[row.paper]
        for test in row.tests:
            own = items.setdefault(test, {}).setdefault(head["name"], [])
            own.append(label(row, head.get("roman", False)))
    parts = [
        "# The tests behind the ledger\n\nEach test that pins an item of the"
        " [ledger](../ledger.md), as it stands in the repository. `make test` runs all"
        " of them, and several hundred more.\n"
    ]
    for file in sorted({file for file, _ in items}):
        parts.append(f"## {file}\n")
        for test, papers in items.items():
            if test[0] == file:
                pinned = "; ".join(
                    f"{paper}: {', '.join(names)}" for paper, names in papers.items()
                )
                parts.append(
                    f"({_test_anchor(*test)})=\n**{pinned}**\n\n```{{literalinclude}}"
                    f" ../../tests/{file}\n:pyobject: {test[1]}\n:lineno-match:\n```\n"
                )
    return "\n".join(parts)


if __name__ == "__main__":
    found = collect(ROOT)
    print(*found.problems, sep="\n")
    print(f"{len(found.rows)} items, {len(found.problems)} problems")
    sys.exit(bool(found.problems))
