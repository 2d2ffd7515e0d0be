"""What every check prints, in one place."""

from numbers import Real

from torch import Tensor


def unanswered(answer) -> bool:
    """Tell whether there is no answer yet, and say so."""
    if answer is None or answer is ...:
        print("no answer yet: put yours in place of the dots and run the cell again")
        return True
    return False


def no_number(answer) -> bool:
    """Tell whether there is no answer yet, or one that is no number, and say so."""
    if unanswered(answer):
        return True
    if isinstance(answer, Real) or (isinstance(answer, Tensor) and answer.numel() == 1):
        return False
    if callable(answer):
        wrong("a function came; expected a number: call the function and give what it returns")
    else:
        wrong(f"a {type(answer).__name__} came; expected a number")
    return True


def no_function(answer) -> bool:
    """Tell whether there is no answer yet, or one that can't be called, and say so."""
    if unanswered(answer):
        return True
    if callable(answer):
        return False
    wrong(f"a {type(answer).__name__} came; expected a function: give its name, without calling it")
    return True


def right(explanation: str) -> bool:
    """Accept an answer and say why it is right."""
    print(f"right: {explanation}")
    return True


def wrong(hint: str) -> bool:
    """Turn an answer down with a hint."""
    print(f"not yet: {hint}")
    return False
