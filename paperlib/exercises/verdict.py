"""What every check prints, in one place."""

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def unanswered(answer) -> bool:
    """Tell whether there is no answer yet, and say so."""
    if answer is None or answer is ...:
        print("no answer yet: put yours in place of the dots and run the cell again")
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
            "a function came; expected a number:"
            " call the function and give what it returns"
        )
    else:
        wrong(f"an answer of type {type(answer).__name__} came; expected a number")
    return True


def no_function(answer) -> bool:
    """Tell whether there is no answer yet, or one that can't be called, and say so."""
    if unanswered(answer):
        return True
    if callable(answer):
        return False
    wrong(
        f"an answer of type {type(answer).__name__} came; expected a function:"
        " give its name, without calling it"
    )
    return True


def like(answer: Any, expected: Tensor) -> Any:
    """Give an array or a tensor in the kind of the expected one: NumPy is as right as
    PyTorch, 64 bits as 32.
    """
    if isinstance(answer, np.ndarray) and answer.dtype.kind in "fiu":
        answer = torch.tensor(answer)
    return answer.to(expected) if isinstance(answer, Tensor) else answer


def shape_of(answer: Any) -> str:
    """Say what came where a tensor of another shape was expected."""
    if answer is None:
        return "nothing (is there a return?)"
    return (
        str(tuple(answer.shape))
        if isinstance(answer, Tensor)
        else f"{type(answer).__name__}, no tensor"
    )


def same_but_scaled(maps: Tensor, expected: Tensor) -> bool:
    """Tell whether each map is the expected one, but for a positive factor and a number
    added.
    """
    ones, others = (
        (m - m.mean((-2, -1), keepdim=True)) / m.std((-2, -1), keepdim=True)
        for m in (maps, expected)
    )
    return torch.allclose(ones, others, atol=1e-4)


def right(explanation: str) -> bool:
    """Accept an answer and say why it is right."""
    print(f"right: {explanation}")
    return True


def wrong(hint: str) -> bool:
    """Turn an answer down with a hint."""
    print(f"not yet: {hint}")
    return False
