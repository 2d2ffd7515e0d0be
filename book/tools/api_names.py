"""Where the book documents a name of paperlib: on which page, and under which path.

Each paper and each shared module that users import has a page, with what its `__all__`
exports, or all of its public names, under the path from which users import them. The
other modules are internal and have no page.
"""

import ast
import functools
from pathlib import Path

LIBRARY = "paperlib"
# The pages of the API, in the order in which they are listed.
GROUPS = {
    "Papers": ("complexity", "mobilenet", "cam", "gradcam", "patch_svdd", "padim"),
    "Shared by several papers": (
        "backbones",
        "activations",
        "anomaly_map",
        "neighbors",
        "metrics",
        "training",
    ),
    "Data and figures": ("datasets", "viz"),
    "Notebooks": ("runtime", "exercises"),
}
# Modules inside packages that are used by their own path.
USED_DIRECTLY = {"padim": ["evaluation"]}
# The checks of the exercises: one module per chapter, each used by its own path.
EXERCISES = "exercises"


def module_file(root: Path, page: str) -> Path:
    """Return the file of a module, or the `__init__.py` of a package."""
    package = root / LIBRARY / page / "__init__.py"
    return package if package.is_file() else root / LIBRARY / f"{page}.py"


def summary(root: Path, page: str) -> str:
    """Return the first paragraph of a module's docstring, on one line."""
    text = module_file(root, page).read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


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
        None for an object that no page documents: one of an internal module, or one
        that its package does not export.
    """
    parts = Path(path).with_suffix("").parts
    page, first = parts[1], name.partition(".")[0]
    if page not in sum(GROUPS.values(), ()):
        return None
    if ".".join(parts) in directives(root, page)[1:]:
        return page, ".".join((*parts, name))
    names = exported(module_file(root, page))
    if names is None or first in names:
        return page, f"{LIBRARY}.{page}.{name}"
    return None


@functools.cache
def exported(module: Path) -> frozenset[str] | None:
    """Read `__all__` of a module; None if it has none."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return None
