"""Does a notebook's output still belong to the code it was made by?

The answer is a hash of the notebook's code cells, of the library modules that they
import, directly or through one another, and of the library's data files that any of
these names in a string. Code is hashed as a syntax tree without docstrings: a comment,
a line break or a reworded docstring changes no output and makes nothing stale. All of
it is found by reading, not by running, so a name that is put together at run time is
not seen. The module that the notebooks share, notebooks/companion.py, and its results
count as part of the library.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

LIBRARY = "paperlib"
COMPANION = "companion"
# Of the top-level names that are hashed.
FOLDERS = {
    LIBRARY: Path(),
    COMPANION: Path("notebooks"),
    "drawing": Path("book/figures"),
}
RESULTS = Path("book/data/results")


class Names(NamedTuple):
    """What a source imports, as dotted names, and the strings in it."""

    imports: tuple[str, ...]
    strings: frozenset[str]


def code_hash(notebook: NotebookNode, root: Path, written: str = "") -> str:
    """Hash what `notebook` runs: its code cells, and the modules below `root` that they
    import.

    Data files with the stem `written` are left out: they are results of this code, not
    what it runs on.
    """
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    parts = [_canonical_source(source) for source in cells]
    for name, path in sorted(imported_modules(cells, root).items()):
        parts.append(f"{name} {_canonical_module(path.read_text(encoding='utf-8'))}")
    for path in (path for path in data_files(cells, root) if path.stem != written):
        parts.append(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def script_hash(script: Path, root: Path) -> str:
    """Hash a script as a notebook of one cell; the results of its own name are what it
    writes.
    """
    return code_hash(
        new_notebook(cells=[new_code_cell(script.read_text(encoding="utf-8"))]),
        root,
        script.stem,
    )


def imported_modules(sources: list[str], root: Path) -> dict[str, Path]:
    """Find the library modules that `sources` import, and those that these import, by
    name.
    """
    found: dict[str, Path] = {}
    seen = set()
    waiting = [name for source in sources for name in _library_names(source)]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _module_file(name, root)
        if path is None:
            if package := _lazy_names(root).get(name):
                waiting.append(package)
            continue
        found[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting.extend(_library_names(path.read_text(encoding="utf-8"), package))
    return found


def _lazy_names(root: Path) -> dict[str, str]:
    """Map the names that the library loads at first use to their packages."""
    path = root / LIBRARY / "__init__.py"
    return _names_for_type_checkers(path.read_text(encoding="utf-8"))


@cache
def _names_for_type_checkers(source: str) -> dict[str, str]:
    """Read the imports under `if TYPE_CHECKING`, where lazily loaded names stand."""
    blocks = (node for node in ast.parse(source).body if _is_for_type_checkers(node))
    imports = (
        node
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    )
    return {
        f"{LIBRARY}.{alias.name}": node.module
        for node in imports
        for alias in node.names
    }


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def data_files(sources: list[str], root: Path) -> list[Path]:
    """Find the library's data files that `sources` or their library modules name, with
    or without ending.
    """
    _, strings = outside_names(sources, root)
    folders = (root / LIBRARY, root / RESULTS)
    files = (
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    )
    return sorted(path for path in files if {path.name, path.stem} & strings)


def outside_names(sources: list[str], root: Path) -> tuple[set[str], set[str]]:
    """Name the packages other than the library that `sources` or their library modules
    import, and list all strings.
    """
    modules = imported_modules(sources, root).values()
    texts = [*sources, *(path.read_text(encoding="utf-8") for path in modules)]
    found = [_names(text, package="") for text in texts]
    imports = {name.partition(".")[0] for names in found for name in names.imports}
    strings = {string for names in found for string in names.strings}
    return imports - {*FOLDERS, ""}, strings


@cache
def _names(source: str, package: str) -> Names:
    """Read the names in a source once, however many notebooks lead to it."""
    tree = _parse_cell(source)
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    strings = (node.value for node in constants if isinstance(node.value, str))
    return Names(tuple(_imported(tree, package)), frozenset(strings))


def _parse_cell(source: str) -> ast.Module:
    """Parse a cell; IPython's magics and shell lines are taken out, they import
    nothing.
    """
    try:
        return ast.parse(source)
    except SyntaxError:
        lines = [
            line
            for line in source.splitlines()
            if not line.lstrip().startswith(("%", "!", "?"))
        ]
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            raise ValueError(
                f"a code cell is not Python ({error}); expected Python, or lines of %"
                f" or ! magic:\n{source}"
            ) from error


def _library_names(source: str, package: str = "") -> Iterator[str]:
    for name in _names(source, package).imports:
        parts = name.split(".")
        if parts[0] in FOLDERS:
            # Importing a.b.c runs a and a.b first.
            yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Give the dotted name of everything that a syntax tree imports; `package` resolves
    relative imports.
    """
    for node in _walk_what_runs(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and not package:
                continue
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1]
                if node.level
                else []
            )
            base = ".".join([*above, *filter(None, [node.module])])
            # `from package import x` imports a module where x is one; where it is not,
            # no file will be found.
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == LIBRARY
        ):
            yield f"{LIBRARY}.{node.attr}"


def _walk_what_runs(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a syntax tree as `ast.walk` does, without `if TYPE_CHECKING:` blocks."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [
            child
            for child in ast.iter_child_nodes(node)
            if not _is_for_type_checkers(child)
        ]


def _module_file(name: str, root: Path) -> Path | None:
    base = root.joinpath(FOLDERS[name.partition(".")[0]], *name.split("."))
    return next(
        (
            path
            for path in (base.with_suffix(".py"), base / "__init__.py")
            if path.is_file()
        ),
        None,
    )


@cache
def _canonical_module(source: str) -> str:
    return _canonical(_without_docstrings(ast.parse(source)))


@cache
def _canonical_source(source: str) -> str:
    try:
        return _canonical(ast.parse(source))
    except SyntaxError:
        return source.strip()


def _canonical(node: object) -> str:
    """Write a syntax tree so that every Python version writes it alike: `ast.dump` and
    `ast.unparse` do not.
    """
    if isinstance(node, ast.JoinedStr):
        # Python 3.12 ends some f-strings with an empty constant that other versions
        # leave out.
        parts = [part for part in node.values if getattr(part, "value", None) != ""]
        return f"JoinedStr({','.join(map(_canonical, parts))})"
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_canonical(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree
