"""Checks of annotations at run time, under the tests only (see pyproject.toml)."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# An int passes as a float (PEP 484).
CONFIGURATION = BeartypeConf(is_pep484_tower=True)


def check(function: Callable) -> Callable:
    """Check arguments and result at each call.

    Not of a function inside another one: each call of the outer one would prepare the
    checks of the inner one again, which takes far longer than most calls.
    """
    if "<locals>" in function.__qualname__:
        return function
    return beartype(function, conf=CONFIGURATION)
