"""Where the book documents a name of paperlib: on which page, and under which path.

A paper's package has one page, with what its `__init__.py` exports, under the path from
which users import it. A shared module has a page with all of its public names.
"""

import ast
import functools
from pathlib import Path

LIBRARY = "paperlib"
# Modules inside packages that are used by their own path.
USED_DIRECTLY = {"padim": ["evaluation"]}
# The checks of the exercises: one module per chapter, each used by its own path.
EXERCISES = "exercises"


def pages(root: Path) -> dict[str, str]:
    """Map each page, without `paperlib.`, to the first paragraph of its docstring."""
    summaries = {}
    for path in sorted((root / LIBRARY).iterdir()):
        file = path / "__init__.py" if path.is_dir() else path
        if file.is_file() and file.suffix == ".py" and not path.name.startswith("_"):
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            summaries[path.stem] = " ".join(text.partition("\n\n")[0].split())
    return summaries


def directives(root: Path, page: str) -> list[str]:
    """List the modules that a page documents, as dotted names; the page's own first."""
    own = f"{LIBRARY}.{page}"
    folder = root / LIBRARY / page
    if page == EXERCISES:
        return [
            own,
            *(f"{own}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))),
        ]
    return [own, *(f"{own}.{name}" for name in USED_DIRECTLY.get(page, []))]


def documented_as(root: Path, path: str, name: str) -> tuple[str, str] | None:
    """Return the page of an object and the path under which it is documented there.

    Args:
        root: of the repository.
        path: of the object's file, such as `paperlib/cam/maps.py`.
        name: of the object in it, such as `cam` or `PaDiM.fit`.

    Returns:
        None for an object that no page documents: one that its package does not export.
    """
    parts = Path(path).with_suffix("").parts
    page = parts[1]
    package = root / LIBRARY / page / "__init__.py"
    if not package.is_file() or ".".join(parts) in directives(root, page)[1:]:
        return page, ".".join((*parts, name))
    if name.partition(".")[0] in exported(package):
        return page, f"{LIBRARY}.{page}.{name}"
    return None


@functools.cache
def exported(package: Path) -> frozenset[str]:
    """Read `__all__` of an `__init__.py`."""
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()
