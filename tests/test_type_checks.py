"""The checks of annotations are on under the tests."""

import jaxtyping
import pytest
import torch
from type_checks import check

from paperlib.anomaly_map import gaussian_blur


@pytest.mark.parametrize("maps", ["text", torch.zeros(3), torch.zeros(8, 8).int()])
def test_a_wrong_argument_is_found(maps):
    with pytest.raises(jaxtyping.TypeCheckError, match="gaussian_blur"):
        gaussian_blur(maps)


def test_inner_functions_are_left_alone():
    def inner(number: int): ...

    assert check(inner) is inner
    assert check(gaussian_blur.__wrapped__) is not gaussian_blur.__wrapped__
