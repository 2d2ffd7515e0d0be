"""Checks for the exercises of chapter 05, PaDiM, in their order."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paperlib.exercises.given import current_seed, select
from paperlib.exercises.given import use_seed as use_seed  # check.use_seed(2027)
from paperlib.exercises.verdict import (
    errors_rejected,
    expects,
    function,
    judge_number,
    judge_tensor,
    like,
    number,
    random_tensors,
    require,
    right,
    shape_of,
)


def numbers(seed: int | None = None) -> dict[str, SimpleNamespace]:
    """Return what the exercises give: the book's numbers, or those of a seed."""
    return {
        "stored_megabytes": select(
            seed, {"dimensions": (50, 30, 40, 60, 70, 80, 120), "side": (28, 14, 32)}
        ),
        "distance_by_hand": select(
            seed,
            {
                # Both differences are integer numbers of standard deviations.
                "variances differences": (
                    *(((4, 0.25), (4, 1)), ((9, 0.25), (3, 1)), ((4, 1), (6, 2))),
                    *(((0.25, 4), (1.5, 2)), ((1, 0.25), (4, 0.5)), ((16, 1), (12, 4))),
                    *(((4, 9), (8, 6)), ((0.25, 1), (2.5, 2)), ((9, 4), (9, 10))),
                    *(((25, 4), (5, 12)), ((1, 9), (6, 9)), ((4, 0.25), (10, 2))),
                    *(((4, 0.25), (2, 3.5)), ((0.25, 16), (3.5, 8))),
                )
            },
        ),
        "crossover": select(
            seed,
            {
                "dimensions": (
                    *(100, 40, 50, 60, 70, 80, 90, 120, 130, 140, 150, 180),
                    *(200, 250),
                )
            },
        ),
    }


@expects(number)
def stored_megabytes(answer: Any) -> bool:
    """Check PaDiM's storage in megabytes, float32 (in the book: d = 50, 28×28)."""
    given = numbers(current_seed())["stored_megabytes"]
    d, side = given.dimensions, given.side
    positions = side**2
    exact = positions * (d * d + d) * 4 / 1e6
    unit_hint = (
        "the number is right, its unit is not: the answer is in millions of bytes"
    )
    return judge_number(
        answer,
        exact,
        "a covariance and a mean per position, 4 bytes per number",
        (
            (
                positions * d * d * 4 / 1e6,
                "that is the covariances alone: each position has a mean as well",
            ),
            (2 * exact, "a float32 number has 4 bytes, not 8"),
            (
                exact / 4,
                "that is the number of values in millions: how many bytes has each?",
            ),
            (
                exact * 1e6 / 2**20,
                "that is in MiB (1,048,576 bytes); a megabyte is a million bytes",
            ),
            (lambda size: abs(size / exact / 1e3 - 1) < 1e-3, unit_hint),
            (lambda size: abs(size / exact / 1e6 - 1) < 1e-3, unit_hint),
            (
                positions * (d * (d + 1) / 2 + d) * 4 / 1e6,
                "one triangle of a symmetric matrix would be enough,"
                " but PaDiM stores the whole matrix",
            ),
            (
                lambda size: abs(size / exact * positions - 1) < 0.01,
                f"that is one position: there are {side} · {side} of them",
            ),
        ),
        "count the numbers of one position (a d × d matrix and a vector),"
        " times the positions, times the bytes",
        tolerance=0.01,
        relative=1e-3,
    )


@expects(number)
def distance_by_hand(answer: Any) -> bool:
    """Check a Mahalanobis distance with a diagonal Σ.

    In the book: x - μ = (4, 1), Σ = diag(4, 0.25).
    """
    given = numbers(current_seed())["distance_by_hand"]
    variances = torch.tensor(given.variances, dtype=torch.float64)
    differences = torch.tensor(given.differences, dtype=torch.float64)
    deviations = differences / variances.sqrt()
    exact = deviations.norm().item()
    # With the book's numbers, these two mistakes have the same result.
    inverse_hint = (
        "either Σ is left out (that is the Euclidean distance),"
        " or x - μ was divided before it was squared"
    )
    return judge_number(
        answer,
        exact,
        f"{deviations[0]:g} and {deviations[1]:g} standard deviations in the two"
        " directions, whatever the length of a step",
        (
            (exact**2, "that is the square of the distance"),
            (differences.norm().item(), inverse_hint),
            ((differences / variances).norm().item(), inverse_hint),
            (
                (differences.square() / variances.sqrt()).sum().sqrt().item(),
                "divide by variances:"
                " they are the diagonal of Σ, so do not take its root",
            ),
            (
                (differences.square() * variances).sum().sqrt().item(),
                "multiply by the inverse of Σ, not by Σ",
            ),
            (
                deviations.sum().item(),
                "add the squares of the two parts before you take the root",
            ),
            (
                lambda distance: abs(distance - exact) < 0.05,
                "nearly: three digits are expected, or the root itself",
            ),
        ),
        "the inverse of a diagonal matrix is diagonal:"
        " sum (x - μ)² / variance, then take the root",
        tolerance=0.005,
    )


@expects(function)
def embedding_function(answer: Any) -> bool:
    """Check `f(maps)`: feature maps concatenated on the grid of the first."""
    maps = random_tensors((2, 3, 8, 8), (2, 4, 4, 4), (2, 5, 2, 2))
    expected = torch.cat([F.interpolate(m, 8, mode="nearest") for m in maps], 1)
    tiled = torch.cat(
        [m.repeat(1, 1, 8 // m.shape[2], 8 // m.shape[3]) for m in maps], 1
    )
    order_hint = (
        "the values are right, but not the order of the channels:"
        " the first map is first"
    )
    return judge_tensor(
        answer([m.clone() for m in maps]),
        expected,
        "for maps (2, 3, 8, 8), (2, 4, 4, 4) and (2, 5, 2, 2); expected (2, 12, 8, 8)",
        "each coarse position is repeated over the fine positions that it covers",
        (
            (
                tiled,
                "the coarse maps are tiled:"
                " each position must be repeated, not the map",
            ),
            (lambda got: torch.allclose(got[:, 3:], expected[:, :-3]), order_hint),
            (
                lambda got: torch.allclose(got.sum(1), expected.sum(1), atol=1e-5),
                order_hint,
            ),
            (
                lambda got: torch.allclose(got[:, :3], expected[:, :3]),
                "the coarse maps have new values:"
                " upsample by repeating, without interpolation",
            ),
        ),
        "use the first map unchanged, repeat the positions of the others,"
        " and concatenate the channels",
    )


@expects(function)
def covariance_function(answer: Any) -> bool:
    """Check the reader's `f(x, epsilon)`, Eq. 1 for all positions at once."""
    n, d, epsilon = 7, 4, 0.5
    x = random_tensors((n, 3, d))[0] + 2

    def scatter(x: Tensor) -> Tensor:
        return torch.einsum("npi,npj->pij", x, x)

    sums, ridge = scatter(x - x.mean(0)), epsilon * torch.eye(d)
    sample = sums / (n - 1)
    expected = sample + ridge
    sum_hint = "the sum must be divided"
    return judge_tensor(
        answer(x.clone(), epsilon),
        expected,
        "for x (7, 3, 4); expected a 4×4 matrix for each of 3 positions",
        "centred, multiplied, divided by N - 1, and ε on the diagonal",
        (
            (sample, "εI is missing"),
            (sample + epsilon, "ε is added to the diagonal only"),
            (sums / n + ridge, "Eq. 1 divides by N - 1, not by N"),
            (expected * (n - 1), sum_hint),
            (sums + ridge, sum_hint),
            (sample + ridge / (n - 1), "ε is added after the division"),
            (
                expected * torch.eye(d),
                "these are variances alone:"
                " Σ also contains the covariances of pairs of dimensions",
            ),
            (torch.linalg.inv(expected), "that is the inverse of Σ"),
            (
                scatter(x) / (n - 1) + ridge,
                "subtract the mean of each position first",
            ),
            (
                scatter(x - x.mean((0, 1))) / (n - 1) + ridge,
                "each position has its own mean",
            ),
        ),
        "c = x - its mean over the images;"
        " then sum c cᵀ over the images, for each position",
        tolerance=1e-4,
    )


@expects(function)
def threshold_function(answer: Any) -> bool:
    """Check `f(scores, rate)`: a threshold that a share `rate` of scores exceeds."""
    generator = torch.Generator().manual_seed(0)
    for rate in (0.05, 0.2):
        # Skewed, so that a mean and a standard deviation do not describe it.
        scores = torch.rand(200, generator=generator) ** 3 * 9 + 10
        with errors_rejected("f did not return one number for 200 scores"):
            threshold = float(answer(scores, rate))
        above = (scores > threshold).float().mean().item()
        require(
            abs(above - (1 - rate)) > 2 / len(scores),
            f"{above:.0%} of the normal scores are above it:"
            " you computed the quantile from the other end",
        )
        require(
            above > 0,
            "no normal score is above it:"
            " a maximum depends on one image, and allows no false alarm",
        )
        require(
            abs(above - rate) <= 1 / len(scores) + 1e-6,
            f"at a rate of {rate:.0%},"
            f" {above:.1%} of 200 normal scores are above your threshold",
        )
    return right("the quantile 1 - rate of normal scores, whatever their distribution")


@expects(number)
def crossover(answer: Any) -> bool:
    """Check the number of images from which k-NN stores more than PaDiM.

    k-NN uses ResNet-18's three layers, PaDiM `d` channels (in the book: 100).
    """
    d = numbers(current_seed())["crossover"].dimensions
    gaussians = 56 * 56 * (d * d + d)
    image_size = 64 * 56 * 56 + 128 * 28 * 28 + 256 * 14 * 14
    exact = gaussians / image_size

    def is_near(value: float) -> Any:
        return lambda count: abs(count - value) < 1

    return judge_number(
        answer,
        int(exact) + 1,
        "each further image adds to the storage of k-NN, but not of PaDiM",
        (
            (
                is_near(exact),
                "nearly: a Gaussian also has a mean,"
                " and the answer is the first integer for which k-NN stores more",
            ),
            (
                is_near(gaussians / (448 * 56 * 56)),
                "k-NN can store each layer on its own grid:"
                " 28×28 and 14×14 for the later two",
            ),
            (
                is_near(56 * 56 * 2 * d / image_size),
                "a covariance has d · d numbers, not d",
            ),
        ),
        "numbers of the Gaussians, 56 · 56 · (d² + d),"
        " over the numbers of three layers of one image",
    )


@expects(function)
def merge_function(answer: Any) -> bool:
    """Check the reader's `f(n1, mean1, scatter1, n2, mean2, scatter2)`.

    It merges the statistics of two sets; a scatter is the sum of (x - mean)(x - mean)ᵀ.
    """

    def statistics(x: Tensor) -> tuple[int, Tensor, Tensor]:
        return len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0))

    x = torch.randn(
        10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x[7:] += 4  # another mean, another size
    (n1, mean1, scatter1), (n2, mean2, scatter2), (n, mean, scatter) = map(
        statistics, (x[:7], x[7:], x)
    )
    got_n, got_mean, got_scatter = _read_statistics(
        answer(n1, mean1, scatter1, n2, mean2, scatter2), like_tensor=mean
    )
    require(got_n == n, f"7 images and 3 images gave n = {got_n}")
    require(
        not torch.allclose(got_mean, (mean1 + mean2) / 2),
        "seven images have more weight than three: weight the means",
    )
    require(torch.allclose(got_mean, mean), "the mean is not that of all ten images")
    within = scatter1 + scatter2
    between = torch.outer(mean2 - mean1, mean2 - mean1)
    factor = ((got_scatter - within)[0, 0] / between[0, 0]).item()
    divided_hint = "a scatter is a sum: do not divide it"
    return judge_tensor(
        got_scatter,
        scatter,
        "",
        "the two scatters, plus a term for the distance between the two means",
        (
            (
                within,
                "each scatter is around its own mean:"
                " a term for the distance between the means is missing",
            ),
            (
                within + factor * between,
                "the outer product of the difference of the means is right,"
                f" but its factor is not {factor:.3g}",
            ),
            (scatter / n, divided_hint),
            (scatter / (n - 1), divided_hint),
        ),
        "the mean is right; add to the two scatters"
        " a term that grows with the distance between the means",
        tolerance=1e-8,
    )


def _read_statistics(merged: Any, like_tensor: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Return n, mean and scatter of an answer, if it has the right form."""
    is_sequence = isinstance(merged, tuple | list)
    received = f"{len(merged)} values" if is_sequence else f"a {type(merged).__name__}"
    require(
        is_sequence and len(merged) == 3,
        f"f returned {received}; expected three values: n, mean and scatter",
    )
    n, mean, scatter = merged
    mean, scatter = like(mean, like_tensor), like(scatter, like_tensor)
    require(
        (shape_of(mean), shape_of(scatter)) == ("(3,)", "(3, 3)"),
        f"mean and scatter have shapes {shape_of(mean)} and {shape_of(scatter)};"
        " expected (3,) and (3, 3)",
    )
    return n, mean, scatter
