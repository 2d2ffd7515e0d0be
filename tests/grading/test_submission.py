"""Which chapter a notebook answers, which calls are checks, and what has to run for
them.
"""

import ast
import re

import pytest
from exercise_checks import CHAPTERS, cells
from grading import submission
from grading.submission import called_checks, exercises, read
from submissions import notebook, solved, stub


def sources(text, **options):
    return [statement.source for statement in read(text, **options).statements]


def kept(*cells):
    """What is kept of some cells before an exercise that needs `x`."""
    check = ["from paperlib.exercises import cam as check", "check.side_ratio(x)"]
    made = read(notebook([*cells, *check, "b = 3"]))
    return [statement.source for statement in made.statements[:-1]]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_checks_have_the_order_of_the_exercises(chapter):
    calls = re.findall(r"check\.(\w+)\(\.\.\.\)", "\n".join(cells(chapter, "exercise")))
    assert calls == exercises(chapter)
    assert tuple(CHAPTERS) == submission.CHAPTERS


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_only_what_the_answers_need_is_kept(chapter):
    """A tenth of a chapter's statements is enough for its solutions; a stub needs
    nothing but its checks.
    """
    assert len(sources(solved(chapter))) < 0.15 * len(
        sources(solved(chapter), everything=True)
    )
    assert all(statement.checks for statement in read(stub(chapter)).statements)
    assert read(stub(chapter)).chapter == chapter


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
            ["b = 2", "def x():\n    return b"],
        ),
    ],
)
def test_the_slice_follows_names(cells, needed):
    assert kept(*cells) == needed


def test_calls_are_found_however_imported():
    def found(line, text):
        made = read(notebook([f"{line}\n{text}"])).statements
        return [name for statement in made for name in statement.checks]

    assert found(
        "from paperlib.exercises import cam as check", "done = check.side_ratio(2)"
    ) == ["side_ratio"]
    assert found("from paperlib.exercises import cam", "assert cam.side_ratio(2)") == [
        "side_ratio"
    ]
    assert found(
        "import paperlib.exercises.cam as c", "c.side_ratio(2), c.box_function(f)"
    ) == ["side_ratio", "box_function"]
    assert found("from paperlib.exercises.cam import side_ratio", "side_ratio(2)") == [
        "side_ratio"
    ]
    uses = "side_ratio(2); other.side_ratio(2)"
    assert found("from paperlib.exercises import cam as check", uses) == []
    tree = ast.parse("check.side_ratio(1)")
    assert len(list(called_checks(tree, {"side_ratio"}, {"check"}, set()))) == 1


def test_a_check_that_is_overwritten_is_the_graders_all_the_same():
    text = notebook(
        [
            "from paperlib.exercises import cam as check",
            "check = None\nok = check.side_ratio(3)",
        ]
    )
    assert sources(text)[-1] == "ok = __paperlib_check__('side_ratio', 3)"


def test_a_cell_that_is_not_python_keeps_its_exercises():
    unclosed = "done = check.side_ratio(1.4\n"
    cells = ["from paperlib.exercises import cam as check", unclosed]
    made = read(notebook(cells)).statements
    assert [statement.checks for statement in made] == [["side_ratio"]]
    assert made[0].error.startswith("SyntaxError")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Dear teacher, here is my homework", "damaged: a notebook is JSON"),
        ("{" * 100_000, "damaged"),
        ("[1, 2]", "not a notebook"),
        ('{"cells": [3]}', "damaged: a cell"),
        (
            '{"cells": [{"cell_type": "code", "source": [3]}]}',
            "damaged: a cell's source",
        ),
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
def test_what_is_no_submission_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        read(text)
