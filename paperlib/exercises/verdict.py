"""Verdicts that the checks print, and tests of the kind of an answer."""

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def unanswered(answer) -> bool:
    """Return whether there is no answer yet, and print so."""
    if answer is None or answer is ...:
        print("no answer yet: replace the dots by your answer and run the cell again")
        return True
    return False


def no_number(answer) -> bool:
    """Return whether the answer is missing or not a finite number, and print which."""
    if unanswered(answer):
        return True
    if isinstance(answer, Real) or (isinstance(answer, Tensor) and answer.numel() == 1):
        if -math.inf < answer < math.inf:
            return False
        wrong(f"the answer is {float(answer)}; expected a finite number")
        return True
    if callable(answer):
        wrong(
            "received a function; expected a number:"
            " call the function and pass its result"
        )
    else:
        wrong(f"received an answer of type {type(answer).__name__}; expected a number")
    return True


def no_function(answer) -> bool:
    """Return whether the answer is missing or not callable, and print which."""
    if unanswered(answer):
        return True
    if callable(answer):
        return False
    wrong(
        f"received an answer of type {type(answer).__name__}; expected a function:"
        " pass its name, without calling it"
    )
    return True


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


def same_but_scaled(maps: Tensor, expected: Tensor) -> bool:
    """Return whether maps equal the expected ones up to a scale and an offset."""
    standardised, standardised_expected = (
        (m - m.mean((-2, -1), keepdim=True)) / m.std((-2, -1), keepdim=True)
        for m in (maps, expected)
    )
    return torch.allclose(standardised, standardised_expected, atol=1e-4)


def right(explanation: str) -> bool:
    """Accept an answer and say why it is right."""
    print(f"right: {explanation}")
    return True


def wrong(hint: str) -> bool:
    """Reject an answer with a hint."""
    print(f"not yet: {hint}")
    return False
