"""Draw the figures of the paper pages whose code has changed.

    python book/figures/draw.py [--force] [PAPER ...]

Each public function of book/figures/PAPER.py draws the figure of its name. It returns a
matplotlib figure, or a list of them: parts that stand side by side on a wide page and
below each other on a phone. The SVG files are committed under book/figures/PAPER/, with
a hash of the code that drew them; a test compares the hash.
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / path) for path in (".", "book/tools", "notebooks")]
from freshness import script_hash  # noqa: E402

from paperlib.storage import write_text  # noqa: E402

HERE = Path(__file__).parent
SHARED = {"draw", "drawing"}


def papers() -> list[str]:
    """List the modules that draw figures."""
    return sorted({path.stem for path in HERE.glob("*.py")} - SHARED)


def names(paper: str) -> list[str]:
    """List the figures of a paper, in the order of their code."""
    tree = ast.parse((HERE / f"{paper}.py").read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    return [node.name for node in functions if not node.name.startswith("_")]


def files(paper: str, name: str) -> list[Path]:
    """List the parts of a drawn figure, in their order."""
    found = (HERE / paper).glob(f"{name}-*.svg")
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def code_hash(paper: str) -> str:
    """Hash the code that draws a paper's figures, the library's part included."""
    return script_hash(HERE / f"{paper}.py", ROOT)


def is_stale(paper: str) -> bool:
    """Say whether the figures of a paper were drawn by other code, or are missing."""
    stamp = HERE / paper / "stamp.txt"
    if not stamp.is_file() or stamp.read_text() != code_hash(paper):
        return True
    return not all(files(paper, name) for name in names(paper))


def draw(paper: str) -> None:
    """Draw all figures of a paper, remove those that have no function, and stamp."""
    import drawing
    import matplotlib.pyplot as plt
    import torch

    torch.set_num_threads(1)  # the same sums on every machine
    drawing.use_style()
    folder = HERE / paper
    folder.mkdir(exist_ok=True)
    module = importlib.import_module(paper)
    kept = {"stamp.txt"}
    for name in names(paper):
        print(f"{paper}: {name}", flush=True)
        figures = getattr(module, name)()
        parts = figures if isinstance(figures, list) else [figures]
        drawing.save(parts, folder, name)
        plt.close("all")
        kept |= {path.name for path in files(paper, name)}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    write_text(folder / "stamp.txt", code_hash(paper))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("papers", nargs="*", help="all, where none is named")
    parser.add_argument("--force", action="store_true", help="draw fresh ones, too")
    arguments = parser.parse_args()
    if unknown := set(arguments.papers) - set(papers()):
        parser.error(f"no figures of {', '.join(unknown)}; there are {papers()}")
    for paper in arguments.papers or papers():
        if arguments.force or is_stale(paper):
            draw(paper)
