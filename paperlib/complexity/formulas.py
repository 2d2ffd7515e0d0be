"""The cost formulas of the MobileNet paper: multiply-adds of one layer (Eq. 2 to 5).

| paper | here |
|---|---|
| $D_K$, side of the kernel | `kernel` |
| $M$, input channels | `in_channels` |
| $N$, output channels | `out_channels` |
| $D_F$, side of the feature map | `out_size` |
"""

import math
from collections.abc import Sequence
from typing import Any

from paperlib.validation import check_integers

Size = int | Sequence[int]  # of a square, or (height, width)


def conv2d_macs(
    kernel: Size,
    in_channels: int,
    out_channels: int,
    out_size: Size,
    groups: int = 1,
) -> int:
    r"""Count the multiply-adds of a 2-d convolution on one image.

    $$D_K \cdot D_K \cdot \frac{M}{g} \cdot N \cdot D_F \cdot D_F$$
    with $g$ = `groups`; $g = M = N$ is depthwise.

    Args:
        kernel: side of the kernel, or (height, width).
        in_channels: number of input channels.
        out_channels: number of output channels.
        out_size: side of the output feature map, or (height, width).
        groups: number of groups of channels, each with its own filters.

    Raises:
        ValueError: if a number is not a positive integer, or `groups` does not divide
            the channels.

    Example:
        >>> from paperlib.complexity import conv2d_macs
        >>> conv2d_macs(kernel=3, in_channels=512, out_channels=512, out_size=14)
        462422016
        >>> conv2d_macs((1, 7), 64, 64, out_size=(12, 20), groups=64)  # depthwise
        107520

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3.1, Eq. 2 (groups=1) and Eq. 4
        (groups=in_channels=out_channels).
    Departures: $D_F$ is the side of the output, so that strides are counted correctly;
        the paper assumes equal input and output.
    Test: test_complexity.py::test_by_hand
    """
    kernel_height, kernel_width = _pair(kernel, "kernel")
    height, width = _pair(out_size, "out_size")
    m = check_size(in_channels, "in_channels")
    n, g = check_size(out_channels, "out_channels"), check_size(groups, "groups")
    if m % g or n % g:
        raise ValueError(
            f"groups = {g} with in_channels = {m} and out_channels = {n}; expected"
            f" groups that divide both; the largest that does here is {math.gcd(m, n)}"
        )
    return kernel_height * kernel_width * (m // g) * n * height * width


def depthwise_separable_macs(
    kernel: Size, in_channels: int, out_channels: int, out_size: Size
) -> int:
    r"""Count the multiply-adds of a depthwise separable convolution on one image.

    $$D_K \cdot D_K \cdot M \cdot D_F \cdot D_F + M \cdot N \cdot D_F \cdot D_F$$

    Args:
        kernel: side of the depthwise kernel, or (height, width).
        in_channels: number of input channels, and of the depthwise filters.
        out_channels: number of output channels.
        out_size: side of the output feature map, or (height, width).

    Raises:
        ValueError: if a number is not a positive integer.

    Example:
        The saving compared with a standard convolution, in the largest layers:

        >>> from paperlib.complexity import conv2d_macs, depthwise_separable_macs
        >>> depthwise_separable_macs(3, in_channels=512, out_channels=512, out_size=14)
        52283392
        >>> conv2d_macs(3, 512, 512, 14) / depthwise_separable_macs(3, 512, 512, 14)
        8.84...

    Source: Howard et al., arXiv:1704.04861v1, Sec. 3.1, Eq. 5; with multipliers for
        channels and side, arXiv:1704.04861v1, Eq. 6 and 7 and Table 3.
    Departures: as `conv2d_macs`.
    Test: test_complexity.py::test_by_hand
    """
    depthwise = conv2d_macs(
        kernel, in_channels, in_channels, out_size, groups=in_channels
    )
    return depthwise + conv2d_macs(1, in_channels, out_channels, out_size)


def check_size(value: Any, what: str, least: int = 1) -> int:
    """Return an integer; raise ValueError unless it is one, and large enough."""
    check_integers(least, **{what: value})
    return int(value)


def _pair(value: Any, what: str) -> tuple[int, int]:
    sides = value if isinstance(value, Sequence) else (value, value)
    if len(sides) != 2:
        raise ValueError(
            f"{what} = {value!r}; expected one number for a square, or (height, width)"
        )
    return check_size(sides[0], what), check_size(sides[1], what)
