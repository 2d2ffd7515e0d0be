"""Verdicts that the checks print, and tests of the kind of an answer."""

import functools
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Check = Callable[[Any], bool]
# A wrong value, or a function that recognises wrong answers, and the hint for it.
Mistakes = Sequence[tuple[Any, str]]


class WrongAnswer(Exception):
    """Raised by a check: the hint for an answer that is wrong."""


def right(explanation: str) -> bool:
    """Accept an answer and say why it is right."""
    print(f"right: {explanation}")
    return True


def require(condition: bool, hint: str) -> None:
    """Reject the answer with a hint unless a condition holds."""
    if not condition:
        raise WrongAnswer(hint)


@contextmanager
def errors_rejected(hint: str) -> Iterator[None]:
    """Reject an answer whose code raises an error; the hint ends with the error."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise WrongAnswer(f"{hint}: {error}") from None


def expects(read: Callable[[Any], Any]) -> Callable[[Check], Check]:
    """Decorate a check: it receives what `read` returns for the reader's answer.

    The decorated check prints the verdict. `None` and `...` are no answer yet. A hint
    is the `WrongAnswer` that `read` or the check raises. An error of the reader's
    function is a hint, too, with the line that raised it.
    """

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def checked(answer: Any) -> bool:
            if answer is None or answer is ...:
                print(
                    "no answer yet: replace the dots with your answer"
                    " and run the cell again"
                )
                return False
            try:
                return check(read(answer))
            except WrongAnswer as hint:
                print(f"not yet: {hint}")
            except Exception as error:
                if read is not function:
                    raise
                print(f"not yet: your function raised {describe_error(error)}")
            return False

        return checked

    return decorate


def describe_error(error: Exception) -> str:
    """Return an error as one line, with the last line of the reader's own code."""
    libraries = (str(Path(__file__).parents[1]), "site-packages", "dist-packages")
    lines = [
        f" in line {frame.lineno}" + (f" ({frame.line})" if frame.line else "")
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(library in frame.filename for library in libraries)
    ]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}{''.join(lines[-1:])}: {message[:300]}"


def number(answer: Any) -> float:
    """Return an answer that is one finite number, also of a tensor or an array."""
    if isinstance(answer, Tensor) and answer.numel() == 1 and not answer.is_meta:
        answer = answer.item()
    if isinstance(answer, np.ndarray) and answer.size == 1:
        answer = answer.item()
    require(
        not callable(answer),
        "received a function; expected a number: call the function and pass its result",
    )
    kind = type(answer).__name__
    require(
        isinstance(answer, Real),
        f"received an answer of type {kind}; expected a number",
    )
    try:
        value = float(answer)
    except OverflowError:  # an integer or a fraction
        value = math.inf
    require(
        math.isfinite(value),
        f"the answer is {value}; expected a finite number",
    )
    return value


def function(answer: Any) -> Callable[..., Any]:
    """Return an answer that is a function."""
    require(
        callable(answer),
        f"received an answer of type {type(answer).__name__}; expected a function:"
        " pass its name, without calling it",
    )
    return answer


def four_numbers(
    answer: Any,
    received: str = "received an answer of type",
    meaning: str = "one per input, for example [1, 2, 3, 4]",
) -> tuple[float, ...]:
    """Return an answer that consists of four numbers, as floats.

    Args:
        answer: anything.
        received: start of the hint, before the type of the answer.
        meaning: of the four numbers, for the hint.
    """
    try:
        numbers = tuple(float(value) for value in answer)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        raise WrongAnswer(
            f"{received} {type(answer).__name__}; expected four numbers: {meaning}"
        ) from None
    require(
        len(numbers) == 4,
        f"received {len(numbers)} numbers; expected four: {meaning}",
    )
    return numbers


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Draw normal numbers, the same in every call, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def judge(
    answer: Any,
    equals: Callable[[Any], bool],
    expected: Any,
    explanation: str,
    mistakes: Mistakes,
    otherwise: str,
) -> bool:
    """Accept the right value; reject others with the hint for the first known mistake.

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
        is_made = mistake(answer) if callable(mistake) else equals(mistake)
        require(not is_made, hint)
    raise WrongAnswer(otherwise)


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
    require(
        isinstance(answer, Tensor) and answer.shape == expected.shape,
        f"f returned {shape_of(answer)} {wanted}",
    )

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
    if isinstance(answer, tuple) and hasattr(answer, "values"):
        return "a pair (values, indices) instead of its .values"
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
