"""What the tests of every chapter's checks share.

A chapter's test lists, for each check, right answers (written otherwise than the
notebook's solution) and wrong ones, each with a word of the hint that it must get.
"""

import ast
import importlib
import re
from pathlib import Path

import jupytext
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {
    "mobilenet": "01_mobilenet",
    "cam": "02_cam",
    "gradcam": "03_gradcam",
    "patch_svdd": "04_patch_svdd",
    "padim": "05_padim",
}
FEWEST_WRONG = 3


def cells(chapter: str, tag: str | None = None) -> list[str]:
    """The code cells of a chapter's text twin, or those with a tag."""
    notebook = jupytext.read(ROOT / "notebooks" / "py" / f"{CHAPTERS[chapter]}.py")
    code = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [
        cell.source
        for cell in code
        if tag is None or tag in cell.metadata.get("tags", ())
    ]


def spellings(value: float) -> set[str]:
    """How a hint could write a number."""
    ways = {str(value), f"{value:,}", f"{value:g}", f"{value:.2f}", f"{value:.3f}"}
    if float(value).is_integer():
        ways |= {str(int(value)), f"{int(value):,}"}
    return ways


def leaked_answers(message: str, right: list, solutions: list[str]) -> list[str]:
    """List the right answers, and parts of the solutions' code, in a message."""
    numbers = [
        item for answer in right if not callable(answer) for item in (answer, [answer])
    ]
    ways = {
        way
        for answer in numbers
        if isinstance(answer, int | float)
        for way in spellings(answer)
    }
    ways |= {str(answer) for answer in numbers if isinstance(answer, list | tuple)}
    leaks = [
        way
        for way in ways
        if re.search(rf"(?<![\w.,]){re.escape(way)}(?![\w]|[.,]\d)", message)
    ]
    for source in solutions:
        parts = (
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call | ast.Subscript | ast.BinOp)
        )
        code = {ast.unparse(node) for node in parts}
        leaks += [part for part in code if len(part) > 9 and part in message]
    return leaks


def assert_check(chapter: str, name: str, case: tuple[list, dict], capsys) -> None:
    """Assert that a check accepts right answers and rejects wrong ones and stubs.

    Its hints may not contain the answer.
    """
    check = getattr(importlib.import_module(f"paperlib.exercises.{chapter}"), name)
    right, wrong = case
    solutions = cells(chapter, "solution")
    assert right and len(wrong) >= FEWEST_WRONG
    for answer in right:
        assert check(answer) is True
        assert capsys.readouterr().out.startswith("right: ")
        if not callable(answer) and not isinstance(answer, list | tuple):
            # A tensor is a number, too.
            assert check(torch.tensor(answer, dtype=torch.float64)) is True
    for answer, hint in [*wrong.items(), *_of_another_kind(right[0])]:
        capsys.readouterr()
        assert check(answer) is False
        said = capsys.readouterr().out
        assert said.startswith("not yet: ") and hint in said
        assert leaked_answers(said, right, solutions) == []
        if isinstance(answer, int | float) and isinstance(right[0], int | float):
            assert check(torch.tensor(answer, dtype=torch.float64)) is False
            assert hint in capsys.readouterr().out  # the same for a tensor
    for empty in (None, ...):
        assert check(empty) is False
        assert "no answer yet" in capsys.readouterr().out


def _of_another_kind(right) -> list[tuple]:
    """Answers of a wrong type, which a check should name instead of failing."""
    if callable(right):
        return [(3, "expected a function"), ("f", "expected a function")]
    if isinstance(right, list | tuple):
        return [("six", "str")]
    return [
        ("5", "expected a number"),
        ((lambda: 5), "call the function"),
        (torch.zeros(3), "expected a number"),
    ]


def assert_every_check_is_tested(chapter: str, written: dict) -> None:
    module = importlib.import_module(f"paperlib.exercises.{chapter}")
    public = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
    }
    checks = {name for name in public if not name.startswith("_")} - {"numbers"}
    assert checks == set(written)


def assert_random_numbers_stay(chapter: str, written: dict) -> None:
    torch.manual_seed(0)
    expected: Tensor = torch.rand(3)
    torch.manual_seed(0)
    for name, (right, _) in written.items():
        getattr(importlib.import_module(f"paperlib.exercises.{chapter}"), name)(
            right[0]
        )
    assert torch.equal(torch.rand(3), expected)
