"""Numbers from a seed: each seed has other answers, and the solutions fit them."""

import functools
import importlib
import itertools

import nbformat
import pytest
import student
import torch
import torch.nn.functional as F
import yaml
from exercise_checks import CHAPTERS, ROOT, leaked_answers
from torch import nn

from paperlib.complexity import profile
from paperlib.exercises import given
from paperlib.mobilenet import MobileNetV1, parameter_groups

QUESTIONS = yaml.safe_load(student.QUESTIONS.read_text(encoding="utf-8"))
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


@pytest.fixture(autouse=True)
def book_numbers_again(monkeypatch):
    monkeypatch.setattr(given, "_seed", None)


def module_of(chapter):
    return importlib.import_module(f"paperlib.exercises.{chapter}")


class Recorder:
    """Stands for the checks in a solution: calls them, and keeps the answers."""

    def __init__(self, chapter):
        self.module, self.answers = module_of(chapter), {}

    def __getattr__(self, name):
        def check(answer):
            self.answers[name] = answer
            return getattr(self.module, name)(answer)

        return check


@functools.cache
def cost(width, side):
    with torch.device("meta"):
        return profile(MobileNetV1(width), (1, 3, side, side))


def small_vgg(chapter):
    """VGG-16 without memory for its weights, as the notebook's earlier cells load."""
    from torchvision import models

    with torch.device("meta"):
        return models.vgg16() if chapter == "cam" else None


def solve(chapter, seed):
    """Run the solutions of a copy with the seed; return the answers by check."""
    path = ROOT / "notebooks" / f"{CHAPTERS[chapter]}.ipynb"
    notebook = student.with_numbers(nbformat.read(path, as_version=4), seed)
    recorder = Recorder(chapter)
    if seed is not None:
        given.use_seed(seed)
    names = {
        "check": recorder,
        "torch": torch,
        "F": F,
        "nn": nn,
        "itertools": itertools,
        "cost": cost,
        "parameter_groups": parameter_groups,
        "MobileNetV1": MobileNetV1,
        "vgg": small_vgg(chapter),
        "DIRECTIONS": module_of("patch_svdd").DIRECTIONS,
    }
    for source in student.solution_cells(notebook):
        exec(source, names)  # asserts that each check accepts its answer
    return recorder.answers


def test_select_counts_through_the_combinations():
    choices = {"a": (1, 2), "b c": ((3, 4), (5, 6), (7, 8))}
    book = given.select(None, choices)
    assert vars(book) == {"a": 1, "b": 3, "c": 4}
    others = [given.select(seed, choices) for seed in range(5)]
    assert book not in others
    assert len({str(other) for other in others}) == 5  # all, before one comes again
    assert given.select(5, choices) == others[0]


@pytest.mark.parametrize("seed", [-1, True])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match="expected an integer, at least 0"):
        given.use_seed(seed)
    assert given.current_seed() is None


@every_chapter
def test_the_answers_of_one_seed_fail_the_checks_of_another(chapter, capsys):
    """In the book and in two years; what has no given number stays the same."""
    module, seeds = module_of(chapter), (None, 2027, 2028)
    answers = {seed: solve(chapter, seed) for seed in seeds}
    assert set(QUESTIONS[chapter]) == set(module.numbers())
    for seed, others in itertools.permutations(seeds, 2):
        given._seed = seed
        for name in QUESTIONS[chapter]:
            said = name, seed, others
            assert getattr(module, name)(answers[others][name]) is False, said
            assert "not yet: " in capsys.readouterr().out, said
    given._seed = 2027
    for name in set(answers[None]) - set(QUESTIONS[chapter]):
        assert getattr(module, name)(answers[None][name]) is True


@every_chapter
def test_numbers_come_again_after_many_years(chapter):
    fewest = {"class_of_a_pair": 7, "contrast_score": 11}  # all that there are
    numbers = module_of(chapter).numbers
    for name, first in numbers(0).items():
        seeds = range(1, fewest.get(name, 12))
        assert first not in [numbers(seed)[name] for seed in seeds], name
        assert numbers()[name] not in [numbers(seed)[name] for seed in (0, *seeds)]


# Relative differences that a check accepts, where they are not tiny.
ACCEPTED = {
    "side_ratio": 0.01,
    "channel_weight": 0.005,
    "stored_megabytes": 0.0015,
    "distances_of_an_evaluation": 0.006,
    "distance_by_hand": 0.003,
}


class Keeper:
    """Stands for the checks: keeps the answer, and judges nothing."""

    def __getattr__(self, name):
        return lambda answer: setattr(self, "kept", answer)


@every_chapter
def test_no_two_variants_have_the_same_answer(chapter):
    """Where the solution is an expression of the given numbers."""
    numbers = module_of(chapter).numbers
    for name, (_, *code) in QUESTIONS[chapter].items():
        templates = [text if isinstance(text, str) else text[1] for text in code]
        if name == "contrast_score" or "check." not in templates[-1]:
            continue  # a function, or it needs more of the notebook
        count = next(
            s for s in itertools.count(1) if numbers(s)[name] == numbers(0)[name]
        )
        answers = []
        for seed in (None, *range(count)):
            given_numbers, keeper = vars(numbers(seed)[name]), Keeper()
            names = {"check": keeper, "DIRECTIONS": module_of("patch_svdd").DIRECTIONS}
            for template in templates:
                exec(template.format(**given_numbers), names)
            answers.append(keeper.kept)
        tolerance = ACCEPTED.get(name, 1e-6)
        for one, other in itertools.combinations(answers, 2):
            assert one != pytest.approx(other, rel=tolerance), (name, one)


@every_chapter
def test_hints_fit_the_numbers_of_a_seed(chapter, capsys):
    """Hints name the numbers of the seed, and never the right answer."""
    wrong = importlib.import_module(f"test_exercises_{chapter}").CASES
    right = solve(chapter, 2027)
    for name in QUESTIONS[chapter]:
        for answer in wrong[name][1]:
            capsys.readouterr()
            passed = getattr(module_of(chapter), name)(answer)
            said = capsys.readouterr().out
            assert said.startswith("right: " if passed else "not yet: ")
            if not passed:
                assert leaked_answers(said, [right[name]], []) == [], said
