"""Read a submitted notebook without running it: the chapter, and the statements that
the answers need.

A chapter takes minutes to run and its answers need a few of its lines. These are found
by walking back from the calls of checks through the names that they read (a program
slice).
"""

import ast
import builtins
import dis
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks" / "py"
PACKAGE = "paperlib.exercises"
KINDS = ("warm-up", "core", "stretch")
# First line of the cell that unpacks paperlib; the grader uses its own copy.
SETUP = "# @title Set-up: run this cell first"
SEED = re.compile(r"\buse_seed\(\s*(\d+)")  # names the numbers of a copy's exercises
# Magics whose argument is Python: they are removed, so that its checks are found.
CELL_MAGIC = re.compile(r"\A\s*%%(?:time|timeit|capture|prun)\b.*\n?")
LINE_MAGIC = re.compile(r"^([ \t]*(?:\w+ *= *)?)%(?:time|timeit)[ \t]+(?!-)", re.M)
# Code of Python that Jupyter accepts at the top level, but `compile` does not.
AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
ASSERTION = "expect"  # the method by which chapters assert their results
UNCHANGING = {*dir(builtins), "display"}  # functions that change no argument
BINDINGS = (
    *(ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
)


class Statement(NamedTuple):
    """A top-level statement of a notebook, with the names that it uses."""

    source: str
    cell: int  # number of its notebook cell, from 1
    checks: set[str] = set()  # checks that it calls
    reads: set[str] = set()
    reads_later: set[str] = set()  # of these, names read when a function is called
    binds: set[str] = set()
    changes: set[str] = set()  # names of objects that it may change
    replaces: bool = False  # whether an earlier value of `binds` is lost
    is_broken: bool = False  # not Python; run all the same, for its error


class Submission(NamedTuple):
    """What there is to run in a notebook."""

    chapter: str
    statements: list[Statement]
    seed: int | None = None  # as the notebook states it; None: the book's numbers


def exercises() -> dict[str, dict[str, str]]:
    """Return check → kind for each chapter, in the order of the book's notebooks."""
    found = {}
    for path in sorted(NOTEBOOKS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        chapter = re.search(rf"^from {PACKAGE} import (\w+) as check", text, re.M)
        kind, kinds = "", {}
        for heading, check in re.findall(
            r"^# \*\*(Warm-up|Core|Stretch)\b|\bcheck\.(\w+)\(\.\.\.\)", text, re.M
        ):
            kind = heading.lower() or kind
            if check:
                kinds[check] = kind
        if chapter:
            found[chapter[1]] = kinds
    return found


def read(data: bytes, everything: bool = False) -> Submission:
    """Read a notebook of any version of the format.

    Args:
        data: the content of the file.
        everything: whether to return all statements, not only those that the answers
            need.

    Raises:
        ValueError: if it is not a notebook with the exercises of one chapter.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            notebook = nbformat.reads(data.decode("utf-8-sig"), as_version=4)
        cells = [
            (number, _to_python(cell.source))
            for number, cell in enumerate(notebook.cells, 1)
            if cell.cell_type == "code" and not cell.source.lstrip().startswith(SETUP)
        ]
    except Exception as error:  # nbformat raises whatever a malformed file leads to
        raise ValueError(
            f"not a notebook, or a damaged one ({type(error).__name__}): hand in the"
            " .ipynb file that Jupyter or Colab saves"
        ) from error
    code = "\n".join(source for _, source in cells)
    chapter, checks = _chapter(code)
    statements = list(_statements(cells, chapter, checks))
    seeds = SEED.findall(code)
    return Submission(
        chapter,
        statements if everything else _needed(statements),
        int(seeds[-1]) if seeds else None,
    )


def _to_python(source: str) -> str:
    """Replace IPython syntax (magics, shell commands, help) by calls."""
    source = LINE_MAGIC.sub(r"\1", CELL_MAGIC.sub("", source))
    return TransformerManager().transform_cell(source)


def _chapter(code: str) -> tuple[str, set[str]]:
    """Return the chapter and its checks: by the import, or by the checks' names."""
    known = exercises()
    imported = re.findall(rf"\b{PACKAGE}(?:\.|\s+import\s+\(?\s*)(\w+)", code)
    found = set(imported) & set(known)
    if not found:
        called = set(re.findall(r"\bcheck\s*\.\s*(\w+)", code))
        shared = {name: len(called & set(checks)) for name, checks in known.items()}
        found = {name for name, n in shared.items() if 0 < n == max(shared.values())}
    if len(found) != 1:
        names = " and ".join(sorted(found))
        raise ValueError(
            f"exercises of {names}; expected those of one chapter"
            if found
            else "no exercises of this book; expected the notebook of a chapter"
        )
    (chapter,) = found
    return chapter, set(known[chapter])


def _statements(
    cells: list[tuple[int, str]], chapter: str, checks: set[str]
) -> Iterator[Statement]:
    """Split notebook cells into statements."""
    aliases: dict[str, str] = {}  # the notebook's own name for a check → the check
    for number, cell in cells:
        for source in _parsable_parts(cell):
            try:
                for node in ast.parse(source).body:
                    yield _statement(node, number, checks, aliases)
                    _follow_aliases(node, chapter, checks, aliases)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                called = set(re.findall(r"\w+", source)) & checks
                yield Statement(source, number, called, is_broken=True)


def _parsable_parts(cell: str) -> list[str]:
    """Return the cell; if it is not Python, its parts from one unindented line to the
    next, so that an error costs no other part.
    """
    try:
        ast.parse(cell)
        return [cell]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.split(r"\n(?=[^\s)\]}])", cell)


def _statement(
    node: ast.stmt, cell: int, checks: set[str], aliases: dict[str, str]
) -> Statement:
    code = compile(ast.Module([node], []), "<cell>", "exec", AWAIT, dont_inherit=True)
    reads, later, binds = _names(code)
    called = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)} & checks
    called |= {aliases[name] for name in reads if name in aliases}
    replaces = isinstance(node, BINDINGS)
    changes = set(_changed(node, replaces))
    source = ast.unparse(node)
    return Statement(source, cell, called, reads, later, binds, changes, replaces)


def _names(code: types.CodeType) -> tuple[set[str], set[str], set[str]]:
    """Return the global names that code reads, those that its functions read, and
    those that it binds.
    """
    reads, later, binds = set(), set(), set()
    for step in dis.get_instructions(code):
        operation, _, scope = step.opname.partition("_")
        if scope in ("NAME", "GLOBAL", "FROM_DICT_OR_GLOBALS"):
            if operation == "LOAD":
                reads.add(step.argval)
            elif operation == "STORE":
                binds.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            inner_reads, _, _ = _names(inner)
            reads |= inner_reads
            later |= inner_reads
            binds |= {
                step.argval
                for step in dis.get_instructions(inner)
                if step.opname == "STORE_GLOBAL"
            }
    return reads, later, binds


def _changed(node: ast.stmt, replaces: bool) -> Iterator[str]:
    """Yield names of objects that a statement may change: `x[0] = 1`, `x.y = 1`; and,
    unless it binds a name, `x.append(1)` and `fill(x)`.
    """
    touched = [
        n
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute | ast.Subscript)
        and not isinstance(n.ctx, ast.Load)
    ]
    if not replaces:
        calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
        for n in calls:
            if isinstance(n.func, ast.Attribute) and n.func.attr != ASSERTION:
                touched.append(n.func)
            elif isinstance(n.func, ast.Name) and n.func.id not in UNCHANGING:
                touched += n.args
    for expression in touched:
        while isinstance(expression, ast.Attribute | ast.Subscript):
            expression = expression.value
        if isinstance(expression, ast.Name):
            yield expression.id


def _follow_aliases(
    node: ast.stmt, chapter: str, checks: set[str], aliases: dict[str, str]
) -> None:
    """Record other names of checks: `from … import *`, `f = check.x`."""
    if isinstance(node, ast.ImportFrom) and node.module == f"{PACKAGE}.{chapter}":
        for imported in node.names:
            names = checks if imported.name == "*" else {imported.name}
            aliases.update({imported.asname or name: name for name in names & checks})
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
        if node.value.attr in checks:
            named = (n.id for n in node.targets if isinstance(n, ast.Name))
            aliases.update(dict.fromkeys(named, node.value.attr))
    elif isinstance(node, ast.FunctionDef):
        aliases.pop(node.name, None)


def _needed(statements: list[Statement]) -> list[Statement]:
    """Return the statements that call a check, and those that these depend on.

    A function may read a name that is bound after it. So the walk from the last
    statement to the first is repeated until no kept function reads another name.
    """
    imports = ("import ", "from ")
    modules = {n for s in statements if s.source.startswith(imports) for n in s.binds}
    last = max((at for at, s in enumerate(statements) if s.checks), default=-1)
    late: set[str] = set()
    while True:
        kept, wanted = [], set(late)
        for statement in reversed(statements[: last + 1]):
            changes = statement.changes & wanted - modules
            is_kept = statement.is_broken or statement.source.endswith("import *")
            if statement.checks or statement.binds & wanted or changes or is_kept:
                kept.append(statement)
                if statement.replaces:
                    wanted -= statement.binds - late
                wanted |= statement.reads | changes
        read_later = {name for statement in kept for name in statement.reads_later}
        if read_later <= late:
            return kept[::-1]
        late |= read_later
