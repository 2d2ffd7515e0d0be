"""Checks for the exercises of chapter 05, PaDiM."""

from typing import Any

import torch
from torch import Tensor

from paperlib.exercises.verdict import (
    like,
    no_function,
    no_number,
    right,
    shape_of,
    wrong,
)


def stored_megabytes(answer: Any) -> bool:
    """Check PaDiM's storage in megabytes: 50 dimensions, 28×28 positions, float32.

    Source: chapter 05, exercise 1; arXiv:2011.08785, Sec. V-D. Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_number(answer):
        return False
    positions, d = 28 * 28, 50
    exact = positions * (d * d + d) * 4 / 1e6
    if abs(answer - exact) < 0.01:
        return right("a covariance and a mean per position, 4 bytes per number")
    if abs(answer - positions * d * d * 4 / 1e6) < 0.01:
        return wrong("that is the covariances alone: each position has a mean as well")
    if abs(answer - 2 * exact) < 0.01:
        return wrong("a float32 number has 4 bytes, not 8")
    if abs(answer - exact / 4) < 0.01:
        return wrong(
            "that is the number of values in millions: how many bytes has each?"
        )
    if abs(answer - exact * 1e6 / 2**20) < 0.01:
        return wrong("that is in MiB (1,048,576 bytes); a megabyte is a million bytes")
    if any(abs(answer / exact / unit - 1) < 1e-3 for unit in (1e3, 1e6)):
        return wrong(
            "the number is right, its unit is not: the answer is in millions of bytes"
        )
    if abs(answer - positions * (d * (d + 1) / 2 + d) * 4 / 1e6) < 0.01:
        return wrong(
            "one triangle of a symmetric matrix would be enough,"
            " but PaDiM stores the whole matrix"
        )
    if abs(answer - exact * 1e6 / positions / 1e6) < 1e-4:
        return wrong("that is one position: there are 28 · 28 of them")
    return wrong(
        "count the numbers of one position (a d × d matrix and a vector),"
        " times the positions, times the bytes"
    )


def distance_by_hand(answer: Any) -> bool:
    """Check a Mahalanobis distance: x - μ = (4, 1), Σ = diag(4, 0.25).

    Source: chapter 05, exercise 2; arXiv:2011.08785, Eq. 2. Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_number(answer):
        return False
    hints = {
        8.0: "that is the square of the distance",
        17**0.5: (
            "either Σ is left out (that is the Euclidean distance),"
            " or x - μ was divided before it was squared"
        ),
        10**0.5: (
            "divide by variances: they are the diagonal of Σ, so do not take its root"
        ),
        64.25**0.5: "multiply by the inverse of Σ, not by Σ",
        4.0: "add the squares of the two parts before you take the root",
    }
    if abs(answer - 8**0.5) < 0.005:
        return right(
            "two standard deviations in each direction,"
            " though one step is four times as long as the other"
        )
    for value, hint in hints.items():
        if abs(answer - value) < 0.005:
            return wrong(hint)
    if abs(answer - 8**0.5) < 0.05:
        return wrong("nearly: three digits are expected, or the root itself")
    return wrong(
        "the inverse of a diagonal matrix is diagonal:"
        " sum (x - μ)² / variance, then take the root"
    )


def embedding_function(answer: Any) -> bool:
    """Check the reader's `f(maps)`: feature maps concatenated on the grid of the first.

    Source: chapter 05, exercise 3; arXiv:2011.08785, Sec. III-A. Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, c, s, s, generator=generator)
        for c, s in ((3, 8), (4, 4), (5, 2))
    ]

    def stacked(enlarge) -> Tensor:
        return torch.cat(
            [maps[0], *(enlarge(m, 8 // m.shape[-1]) for m in maps[1:])], 1
        )

    def repeated(m: Tensor, times: int) -> Tensor:
        return m.repeat_interleave(times, 2).repeat_interleave(times, 3)

    expected = stacked(repeated)
    got = like(answer([m.clone() for m in maps]), expected)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        received = shape_of(got)
        return wrong(
            "for maps (2, 3, 8, 8), (2, 4, 4, 4) and (2, 5, 2,"
            f" 2) f returned {received}; expected (2, 12, 8, 8)"
        )
    if torch.allclose(got, expected):
        return right(
            "each coarse position is repeated over the fine positions that it covers"
        )
    if torch.allclose(got, stacked(lambda m, times: m.repeat(1, 1, times, times))):
        return wrong(
            "the coarse maps are tiled: each position must be repeated, not the map"
        )
    if torch.allclose(got[:, 3:], expected[:, :-3]) or torch.allclose(
        got.sum(1), expected.sum(1), atol=1e-5
    ):
        return wrong(
            "the values are right, but not the order of the channels:"
            " the first map is first"
        )
    if torch.allclose(got[:, :3], expected[:, :3]):
        return wrong(
            "the coarse maps have new values:"
            " upsample by repeating, without interpolation"
        )
    return wrong(
        "use the first map unchanged, repeat the positions of the others,"
        " and concatenate the channels"
    )


def covariance_function(answer: Any) -> bool:
    """Check the reader's `f(x, epsilon)`, Eq. 1 for all positions at once.

    Source: chapter 05, exercise 4; arXiv:2011.08785, Eq. 1. Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_function(answer):
        return False
    n, positions, d, epsilon = 7, 3, 4, 0.5
    x = torch.randn(n, positions, d, generator=torch.Generator().manual_seed(0)) + 2
    sample = torch.stack([torch.cov(x[:, p].T) for p in range(positions)])
    expected = sample + epsilon * torch.eye(d)
    got = like(answer(x.clone(), epsilon), expected)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        received = shape_of(got)
        return wrong(
            f"for x (7, 3, 4) f returned {received};"
            " expected a 4×4 matrix for each of 3 positions"
        )

    def is_near(other: Tensor) -> bool:
        return torch.allclose(got, other, atol=1e-4)

    if is_near(expected):
        return right("centred, multiplied, divided by N - 1, and ε on the diagonal")
    if is_near(sample):
        return wrong("εI is missing")
    if is_near(sample + epsilon):
        return wrong("ε is added to the diagonal only")
    if is_near(sample * (n - 1) / n + epsilon * torch.eye(d)):
        return wrong("Eq. 1 divides by N - 1, not by N")
    if is_near(expected * (n - 1)) or is_near(
        sample * (n - 1) + epsilon * torch.eye(d)
    ):
        return wrong("the sum must be divided")
    if is_near(sample + epsilon / (n - 1) * torch.eye(d)):
        return wrong("ε is added after the division")
    if is_near(expected * torch.eye(d)):
        return wrong(
            "these are variances alone:"
            " Σ also contains the covariances of pairs of dimensions"
        )
    if is_near(torch.linalg.inv(expected)):
        return wrong("that is the inverse of Σ")
    if is_near(torch.einsum("npi,npj->pij", x, x) / (n - 1) + epsilon * torch.eye(d)):
        return wrong("subtract the mean of each position first")
    pooled = x - x.mean((0, 1))
    if is_near(
        torch.einsum("npi,npj->pij", pooled, pooled) / (n - 1) + epsilon * torch.eye(d)
    ):
        return wrong("each position has its own mean")
    return wrong(
        "c = x - its mean over the images;"
        " then sum c cᵀ over the images, for each position"
    )


def threshold_function(answer: Any) -> bool:
    """Check `f(scores, rate)`: a threshold that a share `rate` of scores exceeds.

    Source: chapter 05, exercise 5. Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    for rate in (0.05, 0.2):
        # Skewed, so that a mean and a standard deviation do not describe it.
        scores = torch.rand(200, generator=generator) ** 3 * 9 + 10
        try:
            threshold = float(answer(scores, rate))
        except (TypeError, ValueError, RuntimeError) as error:
            return wrong(f"f did not return one number for 200 scores ({error})")
        above = (scores > threshold).float().mean().item()
        if abs(above - rate) <= 1 / len(scores) + 1e-6:
            continue
        if abs(above - (1 - rate)) <= 2 / len(scores):
            return wrong(
                f"{above:.0%} of the normal scores are above it:"
                " you computed the quantile from the other end"
            )
        if above == 0:
            return wrong(
                "no normal score is above it:"
                " a maximum depends on one image, and allows no false alarm"
            )
        return wrong(
            f"at a rate of {rate:.0%},"
            f" {above:.1%} of 200 normal scores are above your threshold"
        )
    return right("the quantile 1 - rate of normal scores, whatever their distribution")


def crossover(answer: Any) -> bool:
    """Check the number of images from which k-NN stores more than PaDiM.

    k-NN uses ResNet-18's three layers, PaDiM d = 100.

    Source: chapter 05, exercise 6; arXiv:2011.08785, Table VIII. Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_number(answer):
        return False
    gaussians = 56 * 56 * (100 * 100 + 100)
    an_image = 64 * 56 * 56 + 128 * 28 * 28 + 256 * 14 * 14
    exact = gaussians / an_image
    if answer == int(exact) + 1:
        return right("each further image adds to the storage of k-NN, but not of PaDiM")
    if abs(answer - exact) < 1:
        return wrong(
            "nearly: a Gaussian also has a mean,"
            " and the answer is the first integer for which k-NN stores more"
        )
    if abs(answer - gaussians / (448 * 56 * 56)) < 1:
        return wrong(
            "k-NN can store each layer on its own grid:"
            " 28×28 and 14×14 for the later two"
        )
    if abs(answer - 56 * 56 * 200 / an_image) < 1:
        return wrong("a covariance has d · d numbers, not d")
    return wrong(
        "numbers of the Gaussians, 56 · 56 · (d² + d),"
        " over the numbers of three layers of one image"
    )


def merge_function(answer: Any) -> bool:
    """Check the reader's `f(n1, mean1, scatter1, n2, mean2, scatter2)`.

    It merges the statistics of two sets; a scatter is the sum of (x - mean)(x - mean)ᵀ.

    Source: chapter 05, exercise 7; Chan, Golub & LeVeque, The American Statistician 37
        (1983).
    Departures: none.
    Test: test_exercises_padim.py::test_padim_checks
    """
    if no_function(answer):
        return False

    def statistics(x: Tensor) -> tuple[int, Tensor, Tensor]:
        return len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0))

    x = torch.randn(
        10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x[7:] += 4  # another mean, another size
    (n1, mean1, scatter1), (n2, mean2, scatter2), (n, mean, scatter) = map(
        statistics, (x[:7], x[7:], x)
    )
    got = answer(n1, mean1, scatter1, n2, mean2, scatter2)
    if not isinstance(got, tuple | list) or len(got) != 3:
        received = (
            f"{len(got)} values"
            if isinstance(got, tuple | list)
            else f"a {type(got).__name__}"
        )
        return wrong(
            f"f returned {received}; expected three values: n, mean and scatter"
        )
    if got[0] != n:
        return wrong(f"7 images and 3 images gave n = {got[0]}")
    got = [like(value, mean) for value in got]
    shapes = [
        tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for value in got[1:]
    ]
    if shapes != [(3,), (3, 3)]:
        return wrong(
            f"mean and scatter have shapes {shapes[0]} and {shapes[1]};"
            " expected (3,) and (3, 3)"
        )
    if torch.allclose(got[1], (mean1 + mean2) / 2):
        return wrong("seven images have more weight than three: weight the means")
    if not torch.allclose(got[1], mean):
        return wrong("the mean is not that of all ten images")
    if torch.allclose(got[2], scatter):
        return right(
            "the two scatters, plus a term for the distance between the two means"
        )
    if torch.allclose(got[2], scatter1 + scatter2):
        return wrong(
            "each scatter is around its own mean:"
            " a term for the distance between the means is missing"
        )
    between = torch.outer(mean2 - mean1, mean2 - mean1)
    rest = got[2] - scatter1 - scatter2
    factor = (rest[0, 0] / between[0, 0]).item()
    if torch.allclose(rest, factor * between):
        return wrong(
            "the outer product of the difference of the means is right,"
            f" but its factor is not {factor:.3g}"
        )
    if torch.allclose(got[2], scatter / n) or torch.allclose(got[2], scatter / (n - 1)):
        return wrong("a scatter is a sum: do not divide it")
    return wrong(
        "the mean is right;"
        " add to the two scatters a term that grows with the distance between the means"
    )
