"""Counting conventions: one run, totalled as different FLOP counters do.

A counter of "the FLOPs of a network" chooses whether a multiplication with its addition
is one operation or two, and whether (and how much) biases, normalisation, activations
and pooling cost. For one MobileNet-224 the totals range from 569 M to 1,153 M. A
convention is a set of weights on what `paperlib.complexity.counting.profile` counted.
The tools named with it were run on MobileNetV1, ResNet-50 and VGG-16, in the version
named, and returned exactly its total.
"""

from collections.abc import Mapping
from typing import NamedTuple

# The counts of a run, by name. An element is one number of a tensor.
COUNTS = {
    "macs": (
        "multiply-adds of convolutions, linear layers, matrix products and attention"
    ),
    "conv_bias": "outputs of convolutions with a bias",
    "linear_bias": "outputs of linear layers with a bias",
    "batch_norm": "input elements of batch norms",
    "batch_norm_affine": "those of them that are scaled and shifted too",
    "other_norm": "input elements of layer, group, instance and RMS norms",
    "other_norm_affine": "those of them that are scaled and shifted too",
    "norm_params": "learned scales and shifts of all norms",
    "activation": "input elements of activation functions",
    "max_pool_in": "input elements of max pooling",
    "avg_pool_in": "input elements of average pooling with a kernel",
    "avg_pool_out": "its output elements",
    "adaptive_avg_pool_in": "input elements of average pooling to a given size",
    "adaptive_avg_pool_out": "its output elements",
}
_BIAS = {"conv_bias": 1, "linear_bias": 1}
_NORM = {
    "batch_norm": 1,
    "batch_norm_affine": 1,
    "other_norm": 4,
    "other_norm_affine": 1,
}
_SCALING = {"batch_norm_affine": 1, "other_norm_affine": 1}
_NORM_ONCE_AND_AGAIN = {"batch_norm": 1, "other_norm": 1, **_SCALING}
_NORM_TWICE = {name: 2 * weight for name, weight in _NORM_ONCE_AND_AGAIN.items()}
_POOLS_IN = {"max_pool_in": 1, "avg_pool_in": 1, "adaptive_avg_pool_in": 1}
_AVG_POOLS_OUT = {"avg_pool_out": 1, "adaptive_avg_pool_out": 1}


class Convention(NamedTuple):
    """One way to total a run: its name, what it counts, the total, and who uses it."""

    name: str
    counts: str
    total: int
    used_by: str


# Name, what it counts, who uses it, weights; in ascending order for MobileNetV1.
_CONVENTIONS: tuple[tuple[str, str, str, dict[str, int]], ...] = (
    (
        "MACs",
        "1 per multiply-add of a convolution, linear layer, matrix product, attention",
        "the MobileNet paper; deepspeed 0.19.8, calflops 0.3.2 (MACs)",
        {"macs": 1},
    ),
    (
        "MACs + bias",
        "1 per output that gets a bias",
        "ptflops 0.7.5 (aten)",
        {"macs": 1, **_BIAS},
    ),
    (
        "MACs + bias + norm parameters",
        "1 per scale and shift of a norm, for the whole feature map",
        "torchinfo 1.8.0",
        {"macs": 1, **_BIAS, "norm_params": 1},
    ),
    (
        "MACs + scaling + average",
        "1 per element that a norm scales, 1 per output of average pooling",
        "torchprofile 0.1.0",
        {"macs": 1, **_SCALING, **_AVG_POOLS_OUT},
    ),
    (
        "MACs + norm",
        "2 per element of a batch norm, 5 of another norm (1 less without a scale)",
        "no tool: the step to the next row",
        {"macs": 1, **_NORM},
    ),
    (
        "MACs + norm + adaptive pooling",
        "1 per input of adaptive average pooling",
        "fvcore 0.1.5",
        {"macs": 1, **_NORM, "adaptive_avg_pool_in": 1},
    ),
    (
        "MACs + norm + activation + pooling",
        "1 per activation, per input of any pooling, per bias of a convolution",
        "flopth 0.1.6 (loses the second call of a module)",
        {"macs": 1, **_NORM, "conv_bias": 1, "activation": 1, **_POOLS_IN},
    ),
    (
        "MACs + twice the norm + average",
        "4 per element of a norm, 1 per input and output of average pooling",
        "thop 0.1.1, ultralytics-thop 2.2.3",
        {"macs": 1, **_NORM_TWICE, "adaptive_avg_pool_in": 1, **_AVG_POOLS_OUT},
    ),
    (
        "MACs + every operation, some twice",
        "2 per element of a norm, per activation, per input of pooling; 1 per bias",
        "ptflops 0.7.5 (pytorch)",
        {
            "macs": 1,
            **_BIAS,
            **_NORM_ONCE_AND_AGAIN,
            "activation": 2,
            **{name: 2 for name in _POOLS_IN},
        },
    ),
    (
        "FLOPs",
        "2 per multiply-add",
        "torch.utils.flop_counter (PyTorch 2.14)",
        {"macs": 2},
    ),
    (
        "FLOPs + norm + activation + pooling",
        "2 per multiply-add; the rest as in the line of flopth",
        "deepspeed 0.19.8, calflops 0.3.2 (FLOPs)",
        {"macs": 2, **_NORM, "conv_bias": 1, "activation": 1, **_POOLS_IN},
    ),
)


def totals(counts: Mapping[str, int]) -> list[Convention]:
    """Total one run by every convention.

    Args:
        counts: the counts named in `COUNTS`, as in
            `paperlib.complexity.counting.Profile.counts`; 0 if missing.

    Returns:
        one row per convention, in ascending order for MobileNetV1.

    Source: counting conventions of the tools named in each row, each observed in the
        version named.
    Departures: sums of residuals, products of gates, the softmax inside fused attention
        and upsampling cost nothing here, and some of the tools count some of these;
        tools that know modules only miss calls of functions.
    Test: test_complexity.py::test_conventions_reproduce_the_peers
    """
    return [
        Convention(
            name,
            words,
            sum(weight * counts.get(what, 0) for what, weight in weights.items()),
            used_by,
        )
        for name, words, used_by, weights in _CONVENTIONS
    ]
