"""Checks for the exercises of chapter 01, MobileNet, in their order."""

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
    expects,
    function,
    judge_number,
    judge_tensor,
    number,
    random_tensors,
    require,
    right,
)
from paperlib.mobilenet import MobileNetV1


@expects(number)
def standard_cost(answer: Any) -> bool:
    """Check the MACs of a 5×5 convolution, 16 to 32 channels, 28×28 output."""
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


@expects(number)
def break_even(answer: Any) -> bool:
    """Check the output channels where a 3×3 separable layer costs six times less."""
    require(answer > 0, "a layer has at least one output channel")
    saving = 1 / (1 / answer + 1 / 9)
    change, direction = ("falls", "smaller") if saving > 6 else ("rises", "larger")
    require(
        abs(saving - 6) < 1e-9,
        f"with N = {answer} the saving is {saving:.3f};"
        f" it {change} towards 6 for {direction} N",
    )
    return right("1/N + 1/9 = 1/6")


@expects(function)
def separable_function(answer: Any) -> bool:
    """Check the reader's `f(kernel, in_channels, out_channels, out_size)`."""
    for layer in ((3, 5, 7, 4), (3, 512, 512, 14), (5, 8, 24, 10), (1, 4, 4, 1)):
        macs = answer(*layer)
        kernel, m, n, side = layer
        received = f"f{layer} returned {macs}"
        require(
            macs not in (kernel**2 * m * side**2, m * n * side**2),
            f"{received}: that is one of the two steps; add the other",
        )
        require(
            macs == depthwise_separable_macs(*layer),
            f"{received}: compare with Eq. 5, depthwise plus pointwise",
        )
    return right("depthwise plus pointwise, on four layers")


@expects(number)
def largest_width(answer: Any) -> bool:
    """Check the largest width (in steps of 0.05) with at most 200 million MACs.

    The input has 192×192 pixels.
    """
    # A network of any width, 1e30 for example, could not be built.
    require(answer <= 10, "even a network of width 10 costs more than 200 million")
    steps = round(float(answer) / 0.05)
    require(
        steps >= 1 and abs(steps * 0.05 - answer) <= 1e-9,
        "the answer is a positive multiple of 0.05",
    )
    here, above = (_profile(s * 0.05, 192).macs / 1e6 for s in (steps, steps + 1))
    require(here <= 200, f"that network costs {here:.1f} million, more than 200")
    require(
        above > 200, f"that network costs {here:.1f} million; a wider one still fits"
    )
    return right(f"{here:.1f} million fit, and the next width needs {above:.1f}")


@expects(number)
def spared_weights(answer: Any) -> bool:
    """Check the number of weights without decay in the full MobileNet."""
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


@expects(function)
def depthwise_function(answer: Any) -> bool:
    """Check the reader's depthwise convolution `f(images, filters)`."""
    images, filters = random_tensors((2, 3, 7, 6), (3, 3, 3))
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
