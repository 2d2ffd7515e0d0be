"""Checks for the exercises of chapter 01, MobileNet, in their order."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from paperlib.complexity import (
    Profile,
    conv2d_macs,
    depthwise_separable_macs,
    profile,
)
from paperlib.exercises.given import current_seed, select
from paperlib.exercises.given import use_seed as use_seed  # check.use_seed(2027)
from paperlib.exercises.verdict import (
    WrongAnswer,
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


def numbers(seed: int | None = None) -> dict[str, SimpleNamespace]:
    """Return what the exercises give: the book's numbers, or those of a seed."""
    return {
        "standard_cost": select(
            seed,
            {
                "kernel": (5, 3, 7),
                "in_channels": (16, 24, 40),
                "out_channels": (32, 40, 56),
                "out_size": (28, 14, 56),
            },
        ),
        "break_even": select(
            seed,
            {
                # The saving is exact for an integer number of channels.
                "kernel saving": (
                    *((3, 6), (3, 8), (3, 4.5), (3, 7.2), (3, 3.6), (3, 7.5)),
                    *((3, 6.75), (3, 6.3), (3, 7.875), (5, 20), (5, 12.5), (5, 22.5)),
                    *((5, 18.75), (5, 9.375)),
                )
            },
        ),
        "largest_width": select(
            seed,
            {
                "side budget": (
                    *((192, 200), (224, 60), (160, 45), (128, 35), (192, 100)),
                    *((160, 80), (224, 200), (128, 75), (160, 150), (192, 250)),
                    *((224, 400), (128, 140), (160, 250), (192, 400), (128, 200)),
                )
            },
        ),
        "spared_weights": select(
            seed,
            {
                "width": (
                    *(1.0, 0.25, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75),
                    *(0.8, 0.85, 0.9, 0.95),
                )
            },
        ),
    }


@expects(number)
def standard_cost(answer: Any) -> bool:
    """Check the MACs of a standard convolution.

    In the book: 5×5, 16 to 32 channels, 28×28 output.
    """
    given = numbers(current_seed())["standard_cost"]
    exact = conv2d_macs(
        given.kernel, given.in_channels, given.out_channels, given.out_size
    )
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
            (
                exact / given.kernel,
                "the kernel is a square: both of its sides count",
            ),
            (
                exact / given.out_size,
                "the output is a square: both of its sides count",
            ),
            (exact / given.out_channels, one_channel_number),
            (exact / given.in_channels, one_channel_number),
        ),
        "write the four factors of Eq. 2 down one by one:"
        " kernel area, channels in, channels out, output area",
    )


@expects(number)
def break_even(answer: Any) -> bool:
    """Check the output channels where a separable layer costs so many times less.

    In the book: 3×3, six times.
    """
    given = numbers(current_seed())["break_even"]
    require(answer > 0, "a layer has at least one output channel")
    area = given.kernel**2
    saving = 1 / (1 / answer + 1 / area)
    change, direction = (
        ("falls", "smaller") if saving > given.saving else ("rises", "larger")
    )
    require(
        abs(saving - given.saving) < 1e-9,
        f"with N = {answer:g} the saving is {saving:.3f};"
        f" it {change} towards {given.saving} for {direction} N",
    )
    return right(f"1/N + 1/{area} = 1/{given.saving}")


@expects(function)
def separable_function(answer: Any) -> bool:
    """Check the reader's `f(kernel, in_channels, out_channels, out_size)`."""
    for layer in ((3, 5, 7, 4), (3, 512, 512, 14), (5, 8, 24, 10), (1, 4, 4, 1)):
        try:
            macs = number(answer(*layer))
        except WrongAnswer as hint:
            raise WrongAnswer(f"of what f{layer} returned: {hint}") from None
        kernel, m, n, side = layer
        received = f"f{layer} returned {macs:.10g}"
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
    """Check the largest width (in steps of 0.05) within a budget of MACs.

    In the book: inputs of 192×192 pixels, 200 million.
    """
    given = numbers(current_seed())["largest_width"]
    budget = given.budget
    # A network of any width, 1e30 for example, could not be built.
    require(
        answer <= 10, f"even a network of width 10 costs more than {budget} million"
    )
    steps = round(max(answer, 0) / 0.05)
    require(
        steps >= 1 and abs(steps * 0.05 - answer) <= 1e-9,
        "the answer is a positive multiple of 0.05",
    )
    here, above = (
        _profile(s * 0.05, given.side).macs / 1e6 for s in (steps, steps + 1)
    )
    require(
        here <= budget, f"that network costs {here:.1f} million, more than {budget}"
    )
    require(
        above > budget,
        f"that network costs {here:.1f} million; a wider one still fits",
    )
    return right(f"{here:.1f} million fit, and the next width needs {above:.1f}")


@expects(number)
def spared_weights(answer: Any) -> bool:
    """Check the number of weights without decay in a MobileNet (in the book: α = 1)."""
    given = numbers(current_seed())["spared_weights"]
    counted = _profile(given.width, 224)
    exact = sum(x.params for x in counted.layers if x.kind == "depthwise conv")
    return judge_number(
        answer,
        exact,
        f"about {exact / counted.params:.0%} of the network:"
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
