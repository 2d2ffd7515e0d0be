"""Answers that nobody expects: each gets a line, and none a traceback."""

import importlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from exercise_checks import CHAPTERS
from grading.submission import exercises

ODD = (
    *(1e308, -1e308, 1e-320, 10**400, Fraction(1, 3), True, 1j, float("nan")),
    *("x", [], {1: 2}, object(), int, [1, 2, 3, 10**400], [torch.zeros(2)] * 4),
    *(np.float32(3), np.array(3.0), np.array([1, 2]), torch.zeros(2, 2)),
    *(torch.tensor(3.0, requires_grad=True), torch.tensor(3, device="meta")),
)
RETURNED = (
    *(None, 1, 10**400, "x", (1, 2, 3), [torch.zeros(2)] * 4, object()),
    *(torch.zeros(3, 4, 6), torch.full((3, 4, 6), float("nan"))),
    *(torch.zeros(3, 4, 6, device="meta"), np.array("x"), np.zeros((3, 4, 6))),
    *((10, torch.zeros(3), torch.zeros(3, 3)), (10, None, "x")),
)


def returning(value):
    return lambda *_: value


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_answer_leads_to_a_traceback(chapter, capsys):
    module = importlib.import_module(f"paperlib.exercises.{chapter}")
    for name in exercises()[chapter]:
        check = getattr(module, name)
        for answer in (*ODD, *map(returning, RETURNED), lambda: 1):
            capsys.readouterr()
            assert check(answer) is False, (name, answer)
            said = capsys.readouterr().out
            assert said.startswith("not yet: ") and said.count("\n") == 1, (name, said)


def test_numbers_in_any_form_are_accepted():
    from paperlib.exercises import cam

    for total in (588, 588.0, Fraction(588), np.int64(588), np.array([588.0])):
        assert cam.sum_of_the_map(total) is True
        assert cam.sum_of_the_map(torch.tensor(total, dtype=torch.float64)) is True
