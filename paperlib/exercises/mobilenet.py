"""Checks for the exercises of chapter 01, MobileNet."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paperlib.complexity import conv2d_macs, depthwise_separable_macs, profile
from paperlib.exercises.verdict import no_function, no_number, right, wrong
from paperlib.mobilenet import MobileNetV1


def standard_cost(answer: Any) -> bool:
    """Check the MACs of a 5×5 convolution, 16 to 32 channels, 28×28 output.

    Source: chapter 01, exercise 1. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if no_number(answer):
        return False
    exact = conv2d_macs(5, 16, 32, 28)
    if answer == exact:
        return right("kernel area × channels in × channels out × output area")
    if answer == 2 * exact:
        return wrong(
            "you counted the multiplication and the addition separately;"
            " the paper counts the pair once"
        )
    for factor, name in ((5, "kernel"), (28, "output")):
        if answer * factor == exact:
            return wrong(f"the {name} is a square: both of its sides count")
    if answer == exact // 32 or answer == exact // 16:
        return wrong(
            "every output channel sums over every input channel:"
            " both numbers of channels count"
        )
    return wrong(
        "write the four factors of Eq. 2 down one by one:"
        " kernel area, channels in, channels out, output area"
    )


def break_even(answer: Any) -> bool:
    """Check the output channels for which a 3×3 separable layer costs six times less.

    Source: chapter 01, exercise 2. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if no_number(answer):
        return False
    if answer <= 0:
        return wrong("a layer has at least one output channel")
    saving = 1 / (1 / answer + 1 / 9)
    if abs(saving - 6) < 1e-9:
        return right("1/N + 1/9 = 1/6")
    return wrong(
        f"with N = {answer} the saving is {saving:.3f};"
        f" it {'falls' if saving > 6 else 'rises'} towards 6"
        f" for {'smaller' if saving > 6 else 'larger'} N"
    )


def separable_function(answer: Any) -> bool:
    """Check the reader's `f(kernel, in_channels, out_channels, out_size)`.

    Source: chapter 01, exercise 3. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if no_function(answer):
        return False
    for case in ((3, 5, 7, 4), (3, 512, 512, 14), (5, 8, 24, 10), (1, 4, 4, 1)):
        got, expected = answer(*case), depthwise_separable_macs(*case)
        if got != expected:
            kernel, m, n, side = case
            where = f"f{case} returned {got}"
            if got == kernel**2 * m * side**2 or got == m * n * side**2:
                return wrong(f"{where}: that is one of the two steps; add the other")
            return wrong(f"{where}: compare with Eq. 5, depthwise plus pointwise")
    return right("depthwise plus pointwise, on four layers")


def largest_width(answer: Any) -> bool:
    """Check the largest width (in steps of 0.05) with at most 200 million MACs.

    The input has 192×192 pixels.

    Source: chapter 01, exercise 4. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if no_number(answer):
        return False
    if answer > 10:  # a network of any width, 1e30 for example, could not be built
        return wrong("even a network of width 10 costs more than 200 million")
    steps = round(float(answer) / 0.05)
    if steps < 1 or abs(steps * 0.05 - answer) > 1e-9:
        return wrong("the answer is a positive multiple of 0.05")
    here, above = (_macs(s * 0.05, 192) for s in (steps, steps + 1))
    if here > 200e6:
        return wrong(f"that network costs {here / 1e6:.1f} million, more than 200")
    if above <= 200e6:
        return wrong(
            f"that network costs {here / 1e6:.1f} million; a wider one still fits"
        )
    return right(
        f"{here / 1e6:.1f} million fit, and the next width needs {above / 1e6:.1f}"
    )


def spared_weights(answer: Any) -> bool:
    """Check the number of weights without decay in the full MobileNet.

    Source: chapter 01, exercise 5. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if no_number(answer):
        return False
    with torch.device("meta"):
        model = MobileNetV1()
    exact = sum(
        layer.params
        for layer in profile(model).layers
        if layer.kind == "depthwise conv"
    )
    if answer == exact:
        return right(
            "about 1 % of the network:"
            " nine weights for each channel of the 13 depthwise layers"
        )
    if answer == 13:
        return wrong("that is the number of weight tensors; count the weights in them")
    return wrong(
        "look at the two groups it returns:"
        " which one has no decay, and how many numbers are in its tensors?"
    )


def depthwise_function(answer: Any) -> bool:
    """Check the reader's depthwise convolution `f(images, filters)`.

    Source: chapter 01, exercise 6. Departures: none.
    Test: test_exercises_mobilenet.py::test_mobilenet_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    images, filters = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 7, 6), (3, 3, 3))
    )
    expected = F.conv2d(images, filters[:, None], padding=1, groups=3)
    got = answer(images, filters)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        return wrong(
            f"f returned {shape}; expected a tensor of shape {tuple(expected.shape)}:"
            " pad by one, keep the channels"
        )
    if torch.allclose(got, expected, atol=1e-5):
        return right("equal to F.conv2d with groups = channels")
    if torch.allclose(
        got,
        F.conv2d(images, filters.flip(1, 2)[:, None], padding=1, groups=3),
        atol=1e-5,
    ):
        return wrong("your kernel is flipped: networks compute a cross-correlation")
    if torch.allclose(got.sum(1), expected.sum(1), atol=1e-5):
        return wrong("the sum over channels is right, but channels are mixed up")
    return wrong(
        "channel m of the output must depend on channel m of the input and on filter"
        " m alone"
    )


def _macs(width: float, side: int) -> int:
    with torch.device("meta"):
        return profile(MobileNetV1(width), (1, 3, side, side)).macs
