"""The numbers that exercises give: those of the book, or others for each seed.

A teacher who repeats a course gives each year's copies another seed. The first exercise
cell of such a copy calls `check.use_seed(2027)`; without the call, the checks use the
numbers of the book.
"""

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

# A prime that is larger than any number of variants. So two seeds select the same
# variant only if their difference is a multiple of the number of variants, and
# neighbouring seeds select variants that are far apart.
STEP = 7919

_seed: int | None = None


def use_seed(seed: int) -> None:
    """Let all checks use the numbers of a seed, and print which.

    Args:
        seed: an integer, at least 0, such as the year of the course.

    Raises:
        ValueError: if it is anything else.
    """
    global _seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(
            f"received the seed {seed!r}; expected an integer, at least 0, such as the"
            " year of the course"
        )
    _seed = seed
    print(f"The checks use the numbers of seed {seed}.")


def current_seed() -> int | None:
    """Return the seed in use; None stands for the numbers of the book."""
    return _seed


def select(seed: int | None, choices: Mapping[str, Sequence[Any]]) -> SimpleNamespace:
    """Select the numbers of an exercise among all combinations of choices.

    Args:
        seed: None selects the first choices, which are those of the book; any other
            seed selects another combination.
        choices: values for each name. A key may consist of several names; its values
            are then tuples.

    Example:
        >>> select(None, {"kernel": [3, 5], "height width": [(7, 9), (9, 8)]})
        namespace(kernel=3, height=7, width=9)
        >>> select(2027, {"kernel": [3, 5], "height width": [(7, 9), (9, 8)]}).kernel
        5
    """
    book, *others = itertools.product(*choices.values())
    chosen = book if seed is None else others[seed * STEP % len(others)]
    numbers: dict[str, Any] = {}
    for names, value in zip(choices, chosen, strict=True):
        several = names.split()
        values = value if len(several) > 1 else (value,)
        numbers |= dict(zip(several, values, strict=True))
    return SimpleNamespace(**numbers)
