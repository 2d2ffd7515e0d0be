"""Expect a ValueError of the library itself, not of the type checks of the tests."""

import contextlib
from collections.abc import Iterator

import jaxtyping
import pytest


@contextlib.contextmanager
def without_type_checks() -> Iterator[None]:
    """Run the library as its users do: annotations are not checked at run time."""
    disabled = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", disabled)


@contextlib.contextmanager
def refuses(
    match: str | None = None, error: type[ValueError] = ValueError
) -> Iterator[pytest.ExceptionInfo]:
    """Expect a ValueError with a message that matches; wrong types reach the code."""
    with without_type_checks(), pytest.raises(error, match=match) as caught:
        yield caught
