"""Checks for the exercises of chapter 01, MobileNet."""

from typing import Any

import torch
import torch.nn.functional as F

from paperlib.complexity import (
    Profile,
    conv2d_macs,
    depthwise_separable_macs,
    profile,
)
from paperlib.exercises.verdict import (
    expects_function,
    expects_number,
    judge_number,
    judge_tensor,
    right,
    wrong,
)
from paperlib.mobilenet import MobileNetV1


@expects_number
def standard_cost(answer: Any) -> bool:
    """Check the MACs of a 5×5 convolution, 16 to 32 channels, 28×28 output.

    Source: chapter 01, exercise 1. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    exact = conv2d_macs(5, 16, 32, 28)
    one_channel_number = (
        "every output channel sums over every input channel:"
        " both numbers of channels count"
    )
    return judge_number(
        answer,
        exact,
        "kernel area × channels in × channels out × output area",
        (
            (
                2 * exact,
                "you counted the multiplication and the addition separately;"
                " the paper counts the pair once",
            ),
            (exact / 5, "the kernel is a square: both of its sides count"),
            (exact / 28, "the output is a square: both of its sides count"),
            (exact / 32, one_channel_number),
            (exact / 16, one_channel_number),
        ),
        "write the four factors of Eq. 2 down one by one:"
        " kernel area, channels in, channels out, output area",
    )


@expects_number
def break_even(answer: Any) -> bool:
    """Check the output channels for which a 3×3 separable layer costs six times less.

    Source: chapter 01, exercise 2. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if answer <= 0:
        return wrong("a layer has at least one output channel")
    saving = 1 / (1 / answer + 1 / 9)
    if abs(saving - 6) < 1e-9:
        return right("1/N + 1/9 = 1/6")
    change, direction = ("falls", "smaller") if saving > 6 else ("rises", "larger")
    return wrong(
        f"with N = {answer} the saving is {saving:.3f};"
        f" it {change} towards 6 for {direction} N"
    )


@expects_function
def separable_function(answer: Any) -> bool:
    """Check the reader's `f(kernel, in_channels, out_channels, out_size)`.

    Source: chapter 01, exercise 3. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    for case in ((3, 5, 7, 4), (3, 512, 512, 14), (5, 8, 24, 10), (1, 4, 4, 1)):
        got = answer(*case)
        if got != depthwise_separable_macs(*case):
            kernel, m, n, side = case
            if got in (kernel**2 * m * side**2, m * n * side**2):
                hint = "that is one of the two steps; add the other"
            else:
                hint = "compare with Eq. 5, depthwise plus pointwise"
            return wrong(f"f{case} returned {got}: {hint}")
    return right("depthwise plus pointwise, on four layers")


@expects_number
def largest_width(answer: Any) -> bool:
    """Check the largest width (in steps of 0.05) with at most 200 million MACs.

    The input has 192×192 pixels.

    Source: chapter 01, exercise 4. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if answer > 10:  # a network of any width, 1e30 for example, could not be built
        return wrong("even a network of width 10 costs more than 200 million")
    steps = round(float(answer) / 0.05)
    if steps < 1 or abs(steps * 0.05 - answer) > 1e-9:
        return wrong("the answer is a positive multiple of 0.05")
    here, above = (_profile(s * 0.05, 192).macs / 1e6 for s in (steps, steps + 1))
    if here > 200:
        return wrong(f"that network costs {here:.1f} million, more than 200")
    if above <= 200:
        return wrong(f"that network costs {here:.1f} million; a wider one still fits")
    return right(f"{here:.1f} million fit, and the next width needs {above:.1f}")


@expects_number
def spared_weights(answer: Any) -> bool:
    """Check the number of weights without decay in the full MobileNet.

    Source: chapter 01, exercise 5. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    layers = _profile(1.0, 224).layers
    return judge_number(
        answer,
        sum(layer.params for layer in layers if layer.kind == "depthwise conv"),
        "about 1 % of the network:"
        " nine weights for each channel of the 13 depthwise layers",
        ((13, "that is the number of weight tensors; count the weights in them"),),
        "look at the two groups it returns:"
        " which one has no decay, and how many numbers are in its tensors?",
    )


@expects_function
def depthwise_function(answer: Any) -> bool:
    """Check the reader's depthwise convolution `f(images, filters)`.

    Source: chapter 01, exercise 6. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    generator = torch.Generator().manual_seed(0)
    images, filters = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 7, 6), (3, 3, 3))
    )
    expected, flipped = (
        F.conv2d(images, kernels[:, None], padding=1, groups=3)
        for kernels in (filters, filters.flip(1, 2))
    )
    return judge_tensor(
        answer(images, filters),
        expected,
        "for images (2, 3, 7, 6); expected a tensor of that shape:"
        " pad by one, keep the channels",
        "equal to F.conv2d with groups = channels",
        (
            (flipped, "your kernel is flipped: networks compute a cross-correlation"),
            (
                lambda got: torch.allclose(got.sum(1), expected.sum(1), atol=1e-5),
                "the sum over channels is right, but channels are mixed up",
            ),
        ),
        "channel m of the output must depend on channel m of the input and on filter"
        " m alone",
    )


def _profile(width: float, side: int) -> Profile:
    with torch.device("meta"):
        return profile(MobileNetV1(width), (1, 3, side, side))
