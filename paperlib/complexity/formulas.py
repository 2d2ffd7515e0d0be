"""The cost formulas of the MobileNet paper: multiply-adds of one layer (Eq. 2 to 5).

| paper | here |
|---|---|
| $D_K$, side of the kernel | `kernel` |
| $M$, input channels | `in_channels` |
| $N$, output channels | `out_channels` |
| $D_F$, side of the feature map | `out_size` |
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

# Floats are let in to be refused in words: 224 / 32 is a float, and a likely slip.
Size = int | float | Sequence[int | float]


def conv2d_macs(
    kernel: Size,
    in_channels: int | float,
    out_channels: int | float,
    out_size: Size,
    groups: int | float = 1,
) -> int:
    r"""Multiply-adds of a 2-d convolution on one image.

    $$D_K \cdot D_K \cdot \frac{M}{g} \cdot N \cdot D_F \cdot D_F$$   with $g$ = `groups`; $g = M = N$: depthwise.

    Args:
        kernel: side of the kernel, or (height, width).
        in_channels: channels that enter.
        out_channels: channels that leave.
        out_size: side of the output feature map, or (height, width).
        groups: groups of channels that do not see each other.

    Raises:
        ValueError: a number that is no whole number above 0, or channels that `groups`
            does not divide.

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3.1, Eq. 2 (groups=1) and Eq. 4
        (groups=in_channels=out_channels).
    Departures: $D_F$ is the side of the output, so that strides are right; the paper
        writes input and output the same.
    Test: test_complexity.py::test_by_hand
    """
    kernel_height, kernel_width = _pair(kernel, "kernel")
    height, width = _pair(out_size, "out_size")
    m, n, g = (
        _whole(in_channels, "in_channels"),
        _whole(out_channels, "out_channels"),
        _whole(groups, "groups"),
    )
    if m % g or n % g:
        raise ValueError(
            f"groups = {g} with in_channels = {m} and out_channels = {n}; expected"
            f" groups that divide both; the largest that does here is {math.gcd(m, n)}"
        )
    return kernel_height * kernel_width * (m // g) * n * height * width


def depthwise_separable_macs(
    kernel: Size, in_channels: int | float, out_channels: int | float, out_size: Size
) -> int:
    r"""Multiply-adds of a depthwise convolution and the 1×1 convolution after it, on
    one image.

    $$D_K \cdot D_K \cdot M \cdot D_F \cdot D_F + M \cdot N \cdot D_F \cdot D_F$$

    Args:
        kernel: side of the depthwise kernel, or (height, width).
        in_channels: channels that enter, and pass through the depthwise part.
        out_channels: channels that leave.
        out_size: side of the output feature map, or (height, width).

    Raises:
        ValueError: a number that is no whole number above 0.

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3.1, Eq. 5; with channels and side
        multiplied, arXiv:1704.04861v1, Eq. 6 and 7 and Table 3.
    Departures: as `conv2d_macs`.
    Test: test_complexity.py::test_by_hand
    """
    depthwise = conv2d_macs(
        kernel, in_channels, in_channels, out_size, groups=in_channels
    )
    return depthwise + conv2d_macs(1, in_channels, out_channels, out_size)


def _whole(value: Any, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(
            f"{what} = {value!r}; expected a whole number,"
            " as 224 // 32 gives and 224 / 32 does not"
        )
    if number < 1:
        raise ValueError(
            f"{what} = {number}; expected 1 or more; give a size or count above 0"
        )
    return number


def _pair(value: Any, what: str) -> tuple[int, int]:
    if not isinstance(value, Sequence):
        return (_whole(value, what),) * 2
    if len(value) != 2:
        raise ValueError(
            f"{what} = {value!r}; expected one number for a square, or (height, width);"
            " give one or two numbers"
        )
    return _whole(value[0], what), _whole(value[1], what)
