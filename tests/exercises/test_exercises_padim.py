import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exercise_checks import (
    assert_check,
    assert_every_check_is_tested,
    assert_random_numbers_stay,
)


def enlarged(maps, mode="nearest"):
    size = maps[0].shape[-2:]
    corners = None if mode == "nearest" else False
    return torch.cat(
        [F.interpolate(m, size, mode=mode, align_corners=corners) for m in maps], 1
    )


def by_index(maps):
    side = maps[0].shape[-1]
    rows = [torch.arange(side) * m.shape[-1] // side for m in maps]
    return torch.cat(
        [m[:, :, i][:, :, :, i] for m, i in zip(maps, rows, strict=True)], 1
    )


def tiled(maps):
    side = maps[0].shape[-1]
    return torch.cat(
        [m.repeat(1, 1, side // m.shape[2], side // m.shape[3]) for m in maps], 1
    )


def covariance(x, epsilon, over=1, centre=True, diagonal=True):
    n, positions, d = x.shape
    out = torch.empty(positions, d, d)
    for p in range(positions):
        c = x[:, p] - x[:, p].mean(0) if centre else x[:, p]
        out[p] = c.T @ c / (n - over) + (
            epsilon * torch.eye(d) if diagonal else epsilon
        )
    return out


def by_matmul(x, epsilon):
    c = (x - x.mean(0)).movedim(0, 1)
    return c.mT @ c / (len(x) - 1) + epsilon * torch.eye(x.shape[2])


def one_mean(x, epsilon):
    c = x - x.mean((0, 1))
    return torch.einsum("npi,npj->pij", c, c) / (len(x) - 1) + epsilon * torch.eye(
        x.shape[2]
    )


def merge(weighed=True, factor=None, over=1):
    def f(n1, mean1, scatter1, n2, mean2, scatter2):
        n = n1 + n2
        mean = (n1 * mean1 + n2 * mean2) / n if weighed else (mean1 + mean2) / 2
        between = torch.outer(mean2 - mean1, mean2 - mean1)
        by = n1 * n2 / n if factor is None else factor
        return n, mean, (scatter1 + scatter2 + by * between) / over

    return f


def merge_around_the_new_mean(n1, mean1, scatter1, n2, mean2, scatter2):
    n = n1 + n2
    mean = mean1 + (mean2 - mean1) * n2 / n
    moved = [
        s + k * torch.outer(m - mean, m - mean)
        for k, m, s in ((n1, mean1, scatter1), (n2, mean2, scatter2))
    ]
    return [n, mean, sum(moved)]


# check → right answers, and wrong ones with a word of the hint they must get
CASES = {
    "stored_megabytes": (
        [7.9968, 7.997],
        {
            7.84: "mean as well",
            15.99: "not 8",
            2.0: "how many bytes",
            7.626: "MiB",
            0.0102: "one position",
            5: "count",
            7_996_800: "its unit",
            7997: "its unit",
            4.1552: "the whole matrix",
        },
    ),
    "distance_by_hand": (
        [8**0.5, 2.83, 2.828],
        {
            8: "square",
            4.123: "Euclidean",
            3.162: "variances",
            8.0156: "inverse",
            4: "before you take",
            1: "diagonal",
            17**0.5: "before it was squared",
            2.8: "three digits",
        },
    ),
    "embedding_function": (
        [
            enlarged,
            by_index,
            lambda m: enlarged(m).double(),
            lambda m: enlarged(m).numpy(),
        ],
        {
            tiled: "are tiled",
            (lambda m: enlarged(m, "bilinear")): "without interpolation",
            (lambda m: enlarged(m).flip(1)): "order",
            (lambda m: enlarged(m).roll(3, 1)): "order",
            (lambda m: enlarged(m[::-1])): "(2, 12, 2, 2)",
            (lambda m: enlarged(m) * 2): "use the first map",
            (lambda m: 3): "int",
        },
    ),
    "covariance_function": (
        [
            covariance,
            by_matmul,
            lambda x, e: by_matmul(x.double(), e),
            lambda x, e: covariance(x, e).numpy(),
        ],
        {
            (lambda x, e: covariance(x, e, over=0)): "N - 1, not by N",
            (lambda x, e: covariance(x, 0)): "εI is missing",
            (lambda x, e: covariance(x, e, diagonal=False)): "diagonal only",
            (lambda x, e: covariance(x, e, centre=False)): "subtract the mean",
            (lambda x, e: covariance(x, 0) * 6 + e * torch.eye(4)): "divided",
            one_mean: "its own mean",
            (lambda x, e: covariance(x.movedim(0, 1), e)): "(7, 4, 4)",
            (lambda x, e: torch.linalg.inv(covariance(x, e))): "inverse of Σ",
            (lambda x, e: covariance(x, e / 6)): "after the division",
            (lambda x, e: covariance(x, e) * torch.eye(4)): "variances alone",
            (lambda x, e: covariance(x - x.mean(1, keepdim=True), e)): "sum c cᵀ",
            (lambda x, e: None): "is there a return",
        },
    ),
    "threshold_function": (
        [
            (lambda s, r: torch.quantile(s, 1 - r)),
            (lambda s, r: np.quantile(s.numpy(), 1 - r)),
            (lambda s, r: s.sort().values[len(s) - 1 - round(r * len(s))]),
        ],
        {
            (lambda s, r: torch.quantile(s, r)): "other end",
            (lambda s, r: s.max()): "depends on one image",
            (lambda s, r: s.mean() + 2 * s.std()): "are above your threshold",
            (lambda s, r: s.median()): "are above your threshold",
            (lambda s, r: s): "one number",
        },
    ),
    "crossover": (
        [91, 91.0],
        {
            90: "also has a mean",
            90.18: "first integer",
            22.5: "own grid",
            1.8: "d · d",
            400: "over",
        },
    ),
    "merge_function": (
        [
            merge(),
            merge_around_the_new_mean,
            lambda *s: [s[0] + s[3], *(v.numpy() for v in merge()(*s)[1:])],
            lambda *s: merge()(*(v if isinstance(v, int) else v.float() for v in s)),
        ],
        {
            merge(weighed=False): "weight the means",
            merge(factor=0): "own mean",
            merge(factor=1): "factor is not 1",
            merge(over=10): "do not divide",
            merge(over=9): "do not divide",
            merge(factor=21): "factor is not 21",
            (lambda *s: merge(factor=torch.eye(3) * 2.1)(*s)): "grows with",
            (lambda *s: (s[0] + s[3], s[1], s[2])): "all ten",
            (lambda *s: (3, s[1], s[2])): "n = 3",
            (lambda *s: (10, s[2], s[1])): "expected (3,)",
            (lambda *s: s[1]): "three values",
            (lambda *s: s[1:3]): "2 values",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_padim_checks(name, capsys):
    assert_check("padim", name, CASES[name], capsys)


def test_every_check_is_tested():
    assert_every_check_is_tested("padim", CASES)


def test_checks_leave_the_random_numbers_as_they_were():
    assert_random_numbers_stay("padim", CASES)
