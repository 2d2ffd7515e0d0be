import pytest
import torch
import torch.nn.functional as F
from exercise_checks import (
    assert_check,
    assert_every_check_is_tested,
    assert_random_numbers_stay,
)


def wrong_side(images, filters):
    return F.conv2d(images, filters[:, None], groups=3)


def flipped(images, filters):
    return F.conv2d(images, filters.flip(1, 2)[:, None], padding=1, groups=3)


def summed(images, filters):
    return F.conv2d(images, filters[None], padding=1).expand(-1, 3, -1, -1)


def by_hand(images, filters):
    n, c, h, w = images.shape
    padded, out = F.pad(images, (1, 1, 1, 1)), torch.zeros_like(images)
    for i in range(3):
        for j in range(3):
            out += (
                padded[:, :, i : i + h, j : j + w] * filters[None, :, i, j, None, None]
            )
    return out


def separable(kernel, m, n, side):
    return kernel**2 * m * side**2 + m * n * side**2


# check → right answers, and wrong ones with a word of the hint they must get
CASES = {
    "standard_cost": (
        [10_035_200],
        {
            20_070_400: "counts the pair once",
            2_007_040: "kernel is a square",
            358_400: "output is a square",
            627_200: "input channel",
            5: "Eq. 2",
        },
    ),
    "break_even": ([18, 18.0], {17: "larger", 19: "smaller", -1: "at least one"}),
    "separable_function": (
        [separable],
        {
            (lambda k, m, n, s: k * k * m * s * s): "one of the two steps",
            (lambda k, m, n, s: m * n * s * s): "other",
            (lambda k, m, n, s: k * k * m * n * s * s): "Eq. 5",
            (lambda k, m, n, s: separable(k, m, n, 7)): "Eq. 5",
        },
    ),
    "largest_width": (
        [0.65],
        {
            0.7: "more than 200",
            0.6: "wider one still fits",
            0.66: "multiple of 0.05",
            -1: "positive",
            1e30: "width 10 costs more",
            float("inf"): "expected a finite",
            float("nan"): "expected a finite",
        },
    ),
    "spared_weights": (
        [44_640],
        {13: "weights in them", 4_231_976: "no decay", 4_960: "no decay"},
    ),
    "depthwise_function": (
        [by_hand],
        {
            wrong_side: "pad by one",
            flipped: "is flipped",
            summed: "filter m alone",
            (lambda x, f: 3): "int",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mobilenet_checks(name, capsys):
    assert_check("mobilenet", name, CASES[name], capsys)


def test_every_check_is_tested():
    assert_every_check_is_tested("mobilenet", CASES)


def test_checks_leave_the_random_numbers_as_they_were():
    assert_random_numbers_stay("mobilenet", CASES)
