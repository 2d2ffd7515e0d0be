"""Verdicts that the checks print, and tests of the kind of an answer."""

import functools
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A wrong value, or a function that recognises wrong answers, and the hint for it.
Mistakes = Sequence[tuple[Any, str]]


def right(explanation: str) -> bool:
    """Accept an answer and say why it is right."""
    print(f"right: {explanation}")
    return True


def wrong(hint: str) -> bool:
    """Reject an answer with a hint."""
    print(f"not yet: {hint}")
    return False


def unanswered(answer: Any) -> bool:
    """Return whether there is no answer yet, and print so."""
    if answer is None or answer is ...:
        print("no answer yet: replace the dots by your answer and run the cell again")
        return True
    return False


def expects_number(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Decorate a check so that it receives finite numbers only, as int or float."""

    @functools.wraps(check)
    def checked(answer: Any) -> bool:
        if unanswered(answer):
            return False
        if isinstance(answer, Tensor) and answer.numel() == 1:
            answer = answer.item()
        if callable(answer):
            return wrong(
                "received a function; expected a number:"
                " call the function and pass its result"
            )
        if not isinstance(answer, Real):
            kind = type(answer).__name__
            return wrong(f"received an answer of type {kind}; expected a number")
        if not -math.inf < answer < math.inf:
            return wrong(f"the answer is {float(answer)}; expected a finite number")
        return check(answer)

    return checked


def expects_function(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Decorate a check so that it receives functions only."""

    @functools.wraps(check)
    def checked(answer: Any) -> bool:
        if unanswered(answer):
            return False
        if callable(answer):
            return check(answer)
        return wrong(
            f"received an answer of type {type(answer).__name__}; expected a function:"
            " pass its name, without calling it"
        )

    return checked


def judge(
    answer: Any,
    equals: Callable[[Any], bool],
    expected: Any,
    explanation: str,
    mistakes: Mistakes,
    otherwise: str,
) -> bool:
    """Compare an answer with the right value, then with known mistakes in their order.

    Args:
        answer: passed to those mistakes that are functions.
        equals: returns whether the answer equals a value.
        expected: the right value.
        explanation: printed for a right answer.
        mistakes: pairs of a wrong value, or a function that recognises wrong answers,
            and the hint for it.
        otherwise: the hint for all other answers.
    """
    if equals(expected):
        return right(explanation)
    for mistake, hint in mistakes:
        if mistake(answer) if callable(mistake) else equals(mistake):
            return wrong(hint)
    return wrong(otherwise)


def judge_number(
    answer: Real, *verdicts: Any, tolerance: float = 1e-6, relative: float = 0.0
) -> bool:
    """Judge a number by `judge`; close values are equal.

    Args:
        answer: finite.
        verdicts: expected, explanation, mistakes and otherwise of `judge`.
        tolerance: largest absolute difference of equal values.
        relative: largest difference of equal values, as a share of them.
    """

    def equals(value: Real) -> bool:
        return math.isclose(answer, value, rel_tol=relative, abs_tol=tolerance)

    return judge(answer, equals, *verdicts)


def judge_tensor(
    answer: Any, expected: Tensor, wanted: str, *verdicts: Any, tolerance: float = 1e-5
) -> bool:
    """Judge what the reader's function returned by `judge`, its shape first.

    Args:
        answer: a tensor, or an array, of any dtype.
        expected: the right tensor.
        wanted: the input of the function, and the output expected for it.
        verdicts: explanation, mistakes and otherwise of `judge`.
        tolerance: largest absolute difference of equal values.
    """
    answer = like(answer, expected)
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        return wrong(f"f returned {shape_of(answer)} {wanted}")

    def equals(value: Tensor) -> bool:
        return torch.allclose(answer, value, atol=tolerance)

    return judge(answer, equals, expected, *verdicts)


def like(answer: Any, expected: Tensor) -> Any:
    """Convert an array or tensor to the dtype and device of the expected one."""
    if isinstance(answer, np.ndarray) and answer.dtype.kind in "fiu":
        answer = torch.tensor(answer)
    return answer.to(expected) if isinstance(answer, Tensor) else answer


def shape_of(answer: Any) -> str:
    """Describe an answer that was expected to be a tensor of another shape."""
    if answer is None:
        return "nothing (is there a return?)"
    return (
        str(tuple(answer.shape))
        if isinstance(answer, Tensor)
        else f"{type(answer).__name__}, not a tensor"
    )


def same_but_scaled(expected: Tensor) -> Callable[[Tensor], bool]:
    """Return a function that recognises maps of another scale and offset."""

    def standardise(maps: Tensor) -> Tensor:
        centred = maps - maps.mean((-2, -1), keepdim=True)
        return centred / maps.std((-2, -1), keepdim=True)

    return lambda maps: torch.allclose(
        standardise(maps), standardise(expected), atol=1e-4
    )
