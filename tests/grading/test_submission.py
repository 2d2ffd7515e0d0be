"""Which chapter a notebook answers, which calls are checks, and what has to run for
them.
"""

import importlib
import json
import re
from pathlib import Path

import nbformat
import pytest
import student
from exercise_checks import CHAPTERS, cells
from grading.submission import KINDS, SETUP, exercises, read
from submissions import notebook, solved, stub


def read_cells(*cells):
    return read(notebook(cells).encode()).statements


def read_stub(chapter):
    return read(stub(chapter).encode()).statements


def kept(*cells):
    """What is kept of some cells before an exercise that needs `x`."""
    check = ["from paperlib.exercises import cam as check", "check.side_ratio(x)"]
    statements = read_cells(*cells, *check, "b = 3")[:-1]
    return [s.source for s in statements if not s.source.startswith("from paperlib")]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_checks_have_the_order_and_the_kinds_of_the_exercises(chapter):
    calls = re.findall(r"check\.(\w+)\(\.\.\.\)", "\n".join(cells(chapter, "exercise")))
    module = importlib.import_module(f"paperlib.exercises.{chapter}")
    own = [
        n
        for n, v in vars(module).items()
        if getattr(v, "__module__", "") == module.__name__
    ]
    assert list(exercises()) == list(CHAPTERS)
    checks = [n for n in own if n[0] != "_" and n != "numbers"]
    assert calls == list(exercises()[chapter]) == checks
    kinds = list(exercises()[chapter].values())
    assert set(kinds) == set(KINDS) and kinds == sorted(kinds, key=KINDS.index)


def test_the_seed_is_read_from_the_notebook():
    """The last one counts; without a call, the numbers are those of the book."""
    cell = "from paperlib.exercises import cam as check\ncheck.side_ratio(2)"
    assert read(notebook([cell]).encode()).seed is None
    seeded = cell.replace("\n", "\ncheck.use_seed(1)\ncheck.use_seed( 2027)  # mine\n")
    submission = read(notebook([seeded]).encode())
    assert submission.seed == 2027
    assert not any("use_seed" in s.source for s in submission.statements)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_only_what_the_answers_need_is_kept(chapter):
    """A small part of a chapter is enough for its solutions; dots need only their
    checks.
    """
    solutions = solved(chapter).encode()
    submission, everything = read(solutions), read(solutions, everything=True)
    assert len(submission.statements) < 0.15 * len(everything.statements)
    assert submission.chapter == chapter
    first, *others = read_stub(chapter)
    assert first.source.startswith("from paperlib.exercises import ")
    assert all(s.checks for s in others)


@pytest.mark.parametrize(
    ("cells", "needed"),
    [
        (["x = 1", "y = 2"], ["x = 1"]),
        (["x = 1", "x = 2"], ["x = 2"]),
        (["x = 1", "x += 2"], ["x = 1", "x += 2"]),
        (["x = [1]\nx.append(2)\ny = [1]\ny.append(2)"], ["x = [1]", "x.append(2)"]),
        (
            ["x = {}", "x['a'] = 1", "x.b = 2", "z = x['a']"],
            ["x = {}", "x['a'] = 1", "x.b = 2"],
        ),
        (
            ["a = 1\ndef f(a):\n    return a\nx = f(2)"],
            ["def f(a):\n    return a", "x = f(2)"],
        ),
        (
            ["b = 1\ndef f(a):\n    return a + b\nx = f(2)"],
            ["b = 1", "def f(a):\n    return a + b", "x = f(2)"],
        ),
        (["i = 1\nx = [i for i in range(3)]"], ["x = [i for i in range(3)]"]),
        (["x = 1\ny = [x for x in range(3)]"], ["x = 1"]),
        (["x = 1\ny = {(x, [x for x in (1,)]) for x in range(3)}"], ["x = 1"]),
        (["x = 1\ny = {x: x for x in range(3)}"], ["x = 1"]),
        (
            ["i = 1\nx = {i: [j for j in (i,)] for i in {i}}"],
            ["i = 1", "x = {i: [j for j in (i,)] for i in {i}}"],
        ),
        (
            ["for i in range(3):\n    x = i", "for j in range(3):\n    y = j"],
            ["for i in range(3):\n    x = i"],
        ),
        (["x = 0\nif True:\n    x = 1"], ["x = 0", "if True:\n    x = 1"]),
        (
            ["import time\ntime.sleep(99)\nx = time.time()"],
            ["import time", "x = time.time()"],
        ),
        (["%matplotlib inline\nx = 1\n!rm -rf /"], ["x = 1"]),
        (["x = []\nfill(x)\nprint(x)"], ["x = []", "fill(x)"]),
        (
            ["def f():\n    global x\n    x = 3\nf()"],
            ["def f():\n    global x\n    x = 3"],
        ),
        (
            ["def x(a):\n    return b + a", "b = 1", "c = 2"],
            ["def x(a):\n    return b + a", "b = 1"],
        ),
        (
            ["def x():\n    return f()", "def f():\n    return b", "b = 1\nb = 2"],
            ["def x():\n    return f()", "def f():\n    return b", "b = 1", "b = 2"],
        ),
        (
            [
                "class x:\n    b = 1\n    def f(self):\n        return F.relu(b)",
                "b = 2\nimport torch.nn.functional as F",
            ],
            [
                "class x:\n    b = 1\n\n    def f(self):\n        return F.relu(b)",
                "b = 2",
                "import torch.nn.functional as F",
            ],
        ),
        (
            ["x = lambda: b", "b = []\nb.append(1)\nc = []\nc.append(1)"],
            ["x = lambda: b", "b = []", "b.append(1)"],
        ),
        (["b = 1\nx = b", "b = 2"], ["b = 1", "x = b"]),
        (
            ["b = 1", "b = 2", "def x():\n    return b"],
            ["b = 1", "b = 2", "def x():\n    return b"],
        ),
    ],
)
def test_the_slice_follows_names(cells, needed):
    assert kept(*cells) == needed


@pytest.mark.parametrize(
    ("lines", "called"),
    [
        ("from paperlib.exercises import cam as check\nok = check.side_ratio(2)", 1),
        ("from paperlib.exercises import cam\nassert cam.side_ratio(2)", 1),
        ("import paperlib.exercises.cam as c\nprint(c.side_ratio(2))", 1),
        ("from paperlib.exercises.cam import side_ratio as f\nf(2)", 1),
        ("from paperlib.exercises.cam import *\nside_ratio(2)", 1),
        ("from paperlib.exercises import cam as check\nf = check.side_ratio\nf(2)", 2),
        ("from paperlib.exercises import cam as check\nside_ratio(2)", 0),
        ("check.side_ratio(2)", 1),  # the import is deleted
        ("%%time\nok = check.side_ratio(2)", 1),
        ("ok = %time check.side_ratio(2)", 1),
        ("  check.side_ratio(2)", 1),
    ],
)
def test_calls_are_found_however_imported(lines, called):
    statements = read_cells("from paperlib.exercises import cam", lines)
    assert [s.checks for s in statements if s.checks] == [{"side_ratio"}] * called


@pytest.mark.parametrize(
    "lines",
    [
        "try:\n    import timm\nexcept ImportError:\n    !pip install timm\nx = 1",
        "!pip install \\\n   timm torch\nx = 1",
        "files = !ls\nx = 1",
        "torch.relu?\nx = 1",
        "if False: %matplotlib inline\nx = 1",
        "%%bash\nls\n",
    ],
)
def test_ipython_syntax_costs_no_answer(lines):
    """Also beside the import of the checks; what no answer needs is not run."""
    head = f"{lines}\nfrom paperlib.exercises import cam as check"
    statements = read_cells(head, "check.side_ratio(2)")
    assert {"side_ratio"} in [s.checks for s in statements]
    assert not any("get_ipython" in s.source for s in statements)


def test_a_broken_part_of_a_cell_costs_only_its_own_exercise():
    head = "from paperlib.exercises import cam as check"
    cell = "def f(x)\n    return x\n\ncheck.box_function(f)\ncheck.side_ratio(2)"
    *_, box, side = read_cells(head, cell)
    assert (box.checks, side.checks) == ({"box_function"}, {"side_ratio"})
    (unclosed,) = read_cells(head, "x = 1\ncheck.side_ratio(2\n")
    assert unclosed.checks == {"side_ratio"} and unclosed.cell == 2


def test_every_version_of_the_format_is_read():
    text = nbformat.reads(stub("cam"), as_version=4)
    for version in (3, 4):
        old = nbformat.writes(nbformat.convert(text, version))
        assert json.loads(old)["nbformat"] == version
        assert len(read(old.encode()).statements) == len(read_stub("cam"))
    with_mark = b"\xef\xbb\xbf" + stub("cam").encode()
    assert len(read(with_mark).statements) == len(read_stub("cam"))


def test_the_cell_that_unpacks_the_library_is_not_run():
    text = notebook([f"{SETUP}. It …\nx = 1", "check.side_ratio(x)"])
    assert len(read(text.encode(), everything=True).statements) == 1
    setup = Path(student.__file__).with_name("colab_setup.py")
    assert setup.read_text(encoding="utf-8").startswith(SETUP)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Dear teacher, here is my homework", "not a notebook"),
        ("{" * 100_000, "not a notebook"),
        ("[1, 2]", "not a notebook"),
        ('{"cells": [3]}', "no exercises|not a notebook"),
        ("\xff", "not a notebook"),
        (notebook(["print(1)"]), "no exercises of this book"),
        (
            notebook(
                [
                    "from paperlib.exercises import cam",
                    "from paperlib.exercises import padim",
                ]
            ),
            "cam and padim",
        ),
    ],
)
def test_what_is_no_submission_is_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        read(text.encode("latin-1"))
