"""Read a submitted notebook: which chapter it answers, and which of its statements the
answers depend on.

Nothing is run here. A chapter takes a minute or two to run, its answers need a few of
its lines: those are found by going back from the statements that call a check, through
the names that they use (a program slice).
"""

import ast
import importlib
import json
import symtable
from collections.abc import Iterator
from typing import NamedTuple

# Modules of paperlib.exercises that hold checks.
CHAPTERS = ("mobilenet", "cam", "gradcam", "patch_svdd", "padim")
PACKAGE = "paperlib.exercises"
# first line of the cell that unpacks paperlib; the grader has its own
SETUP = "# @title Set-up: run this cell first"


class Statement(NamedTuple):
    """One top-level statement of a notebook."""

    source: str
    checks: list[str]  # names of the checks that it calls
    error: str = ""  # why it can't be run: the cell is not Python


class Submission(NamedTuple):
    """What there is to run in a notebook."""

    chapter: str
    statements: list[Statement]


class _Scope(NamedTuple):
    loads: set[str]
    # Of these, what functions read when they are called, and not where they stand.
    loads_later: set[str]
    binds: set[str]
    # Names whose methods or items are touched: `x.append(1)`, `x[0] = 1`, `x += 1`.
    calls_on: set[str]
    binds_for_sure: bool


def exercises(chapter: str) -> list[str]:
    """Name the checks of a chapter, in the order of its exercises.

    Source: none, the book's own. Departures: none. Test:
    test_submission.py::test_checks_have_the_order_of_the_exercises
    """
    module = importlib.import_module(f"{PACKAGE}.{chapter}")
    own = (
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__
    )
    return [name for name in own if not name.startswith("_")]


def read(text: str, everything: bool = False) -> Submission:
    """Take a notebook's text apart.

    Args:
        text: the content of an .ipynb file.
        everything: keep all statements, not only those that the answers depend on.

    Raises:
        ValueError: if it is no notebook, or one without a chapter's exercises.

    Source: none, the book's own. Departures: none. Test:
    test_submission.py::test_only_what_the_answers_need_is_kept
    """
    cells = [source for source in _code_cells(text) if not source.startswith(SETUP)]
    chapter, aliases, imported = _chapter(cells)
    statements = list(_statements(cells, set(exercises(chapter)), aliases, imported))
    return Submission(chapter, statements if everything else _needed(statements))


def _code_cells(text: str) -> list[str]:
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"damaged: a notebook is JSON, and this is not ({error})"
        ) from error
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError(
            "not a notebook: no list of cells; hand in the .ipynb file that Jupyter or"
            " Colab saves"
        )
    sources = []
    for cell in cells:
        if not isinstance(cell, dict):
            raise ValueError(
                "damaged: a cell is no object; save the notebook again and hand that in"
            )
        source = cell.get("source", "")
        if cell.get("cell_type") == "code":
            lines = source if isinstance(source, list) else [source]
            if not all(isinstance(line, str) for line in lines):
                raise ValueError(
                    "damaged: a cell's source is no text; save the notebook again and"
                    " hand that in"
                )
            sources.append("".join(lines))
    return sources


def _parse(source: str) -> ast.Module:
    """Parse a cell; lines for IPython (%magic, !shell) are taken out, they belong to no
    answer.
    """
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(
            "\n".join(
                line
                for line in source.splitlines()
                if not line.lstrip().startswith(("%", "!", "?"))
            )
        )


def _chapter(cells: list[str]) -> tuple[str, set[str], set[str]]:
    """Find the chapter, the names under which its checks are imported as a module, and
    those imported one by one.
    """
    chapters, aliases, imported = [], {"check"}, set()
    for source in cells:
        try:
            nodes = list(ast.walk(_parse(source)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # told where the statements are made
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                for alias in node.names:
                    chapters.append(alias.name)
                    aliases.add(alias.asname or alias.name)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                f"{PACKAGE}."
            ):
                chapters.append(node.module.removeprefix(f"{PACKAGE}."))
                imported.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith(f"{PACKAGE}."):
                        chapters.append(alias.name.removeprefix(f"{PACKAGE}."))
                        aliases.add(alias.asname or alias.name)
    known = list(dict.fromkeys(name for name in chapters if name in CHAPTERS))
    if len(known) != 1:
        found = (
            f"exercises of {' and '.join(known)}"
            if known
            else "no exercises of this book"
        )
        raise ValueError(
            f"{found}; expected a chapter's notebook, with its line `from {PACKAGE}"
            " import … as check`"
        )
    return known[0], aliases, imported


def called_checks(
    node: ast.AST, names: set[str], aliases: set[str], imported: set[str]
) -> Iterator[ast.Call]:
    """Give every call of a check below `node`.

    Source: none, the book's own. Departures: none. Test:
    test_submission.py::test_calls_are_found_however_imported
    """
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            of_module = (
                isinstance(call.func, ast.Attribute)
                and ast.unparse(call.func.value) in aliases
            )
            name = (
                call.func.attr
                if of_module
                else call.func.id
                if isinstance(call.func, ast.Name)
                else None
            )
            if name in names and (of_module or name in imported):
                yield call


class _ToGrader(ast.NodeTransformer):
    """Puts the grader's function in place of a check, whatever the notebook made of the
    name `check`.
    """

    def __init__(self, calls: list[ast.Call]):
        self.calls = calls

    def visit_Call(self, node: ast.Call) -> ast.Call:
        mine = any(node is call for call in self.calls)
        self.generic_visit(node)
        if mine:
            name = (
                node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            )
            node.args.insert(0, ast.Constant(name))
            node.func = ast.Name(GRADER, ast.Load())
        return node


GRADER = "__paperlib_check__"


def _statements(
    cells: list[str], names: set[str], aliases: set[str], imported: set[str]
) -> Iterator[Statement]:
    for source in cells:
        try:
            body = _parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield Statement(
                "",
                sorted(name for name in names if f"{name}(" in source),
                f"{type(error).__name__}: {error}",
            )
            continue
        for node in body:
            calls = list(called_checks(node, names, aliases, imported))
            called = [
                call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
                for call in calls
            ]
            yield Statement(
                ast.unparse(ast.fix_missing_locations(_ToGrader(calls).visit(node))),
                called,
            )


def _needed(statements: list[Statement]) -> list[Statement]:
    """Go back from the last statement to the first and keep what binds or changes a
    name that is still wanted.

    A function may read a name that is bound only after it, before it is called: so the
    walk is repeated until no function that is kept adds such a name.
    """
    scopes = [_scope(statement.source) for statement in statements]
    modules = set()
    for statement, scope in zip(statements, scopes, strict=True):
        if statement.source.startswith(("import ", "from ")):
            modules |= scope.binds
    last = max(
        (at for at, statement in enumerate(statements) if statement.checks), default=-1
    )
    # Name → the first kept statement with a function that reads it.
    read_from: dict[str, int] = {}
    while True:
        kept, wanted = [], set()
        for at in range(last, -1, -1):
            statement, scope = statements[at], scopes[at]
            late = {name for name, first in read_from.items() if first < at}
            changes = (scope.calls_on - modules) & (wanted | late)
            binds = scope.binds & (wanted | late)
            if not (
                statement.checks
                or changes
                or binds
                or statement.source.endswith("import *")
            ):
                continue
            kept.append(at)
            if scope.binds_for_sure:
                # An earlier value under this name reaches nothing.
                wanted -= scope.binds
            wanted |= scope.loads | changes
        # From last to first: the first stays.
        found = {name: at for at in kept for name in scopes[at].loads_later}
        if found == read_from:
            return [statements[at] for at in reversed(kept)]
        read_from = found


def _scope(source: str) -> _Scope:
    """Say which global names a statement reads, which it binds, and which it may change
    without binding them.
    """
    loads, later, binds, calls_on = set(), set(), set(), set()

    def walk(table: symtable.SymbolTable, top: bool, inside: bool = False) -> None:
        inside = inside or table.get_type() == "function"
        for symbol in table.get_symbols():
            is_global = top or symbol.is_global()
            if is_global and symbol.is_referenced():
                loads.add(symbol.get_name())
                if inside:
                    later.add(symbol.get_name())
            if is_global and (symbol.is_assigned() or symbol.is_imported()):
                binds.add(symbol.get_name())
        for child in table.get_children():
            walk(child, False, inside)

    body = ast.parse(source).body
    walk(
        symtable.symtable(
            ast.unparse(_Generators().visit(ast.parse(source))), "<cell>", "exec"
        ),
        True,
    )
    node = body[0] if body else ast.Pass()
    for inner in ast.walk(node):
        changed = (
            inner.func.value
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)
            else None
        )
        if isinstance(inner, ast.Attribute | ast.Subscript) and isinstance(
            inner.ctx, ast.Store | ast.Del
        ):
            changed = inner
        while isinstance(changed, ast.Attribute | ast.Subscript):
            changed = changed.value
        if isinstance(changed, ast.Name):
            calls_on.add(changed.id)
    simple = (
        ast.Assign,
        ast.AnnAssign,
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
    )
    # `x = x.view(2)` reads its x through a method and changes nothing: only a bare
    # statement is run for its effect.
    effects = (
        calls_on
        if not isinstance(node, (*simple, ast.AsyncFunctionDef))
        else calls_on & _stored_into(node)
    )
    return _Scope(loads, later, binds, effects, isinstance(node, simple))


class _Generators(ast.NodeTransformer):
    """Makes every comprehension a generator: since Python 3.12 the others' variables
    pass for the module's own.
    """

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(node.elt, node.generators)

    visit_SetComp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.GeneratorExp:
        self.generic_visit(node)
        return ast.GeneratorExp(
            ast.Tuple([node.key, node.value], ast.Load()), node.generators
        )


def _stored_into(node: ast.stmt) -> set[str]:
    """Name what an assignment stores into, as `x` in `x[0] = 1` or `x.y = 1`."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {
        name.id
        for target in targets
        if isinstance(target, ast.Attribute | ast.Subscript)
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
