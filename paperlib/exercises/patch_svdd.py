"""Checks for the exercises of chapter 04, Patch SVDD."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paperlib.anomaly_map import spread_patch_scores
from paperlib.exercises.verdict import (
    like,
    no_function,
    no_number,
    right,
    shape_of,
    wrong,
)
from paperlib.patch_svdd import HierarchicalEncoder


def patches_of_a_picture(answer: Any) -> bool:
    """Check the number of 64×64 patches at stride 16 in an image of 400×300 pixels.

    Source: chapter 04, exercise 1; arXiv:2006.16067, Alg. 2. Departures: none.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_number(answer):
        return False
    rows, columns = (400 - 64) // 16 + 1, (300 - 64) // 16 + 1
    without_first = (rows - 1) * (columns - 1)
    without_overlap = (400 // 64) * (300 // 64)
    small_patches = ((400 - 32) // 4 + 1) * ((300 - 32) // 4 + 1)
    hints = {
        without_first: "a patch starts at pixel 0, too: count the steps, plus one",
        (400 // 16) * (300 // 16): (
            "the last patch must fit:"
            " its corner lies at most 64 pixels before the border"
        ),
        rows * (columns + 1): (
            "the steps along the short side leave a remainder:"
            " a patch must be inside the image"
        ),
        without_overlap: "that is without overlap: a patch starts every 16 pixels",
        small_patches: "that is for patches of 32 pixels at stride 4",
    }
    if answer == rows * columns:
        return right(
            "22 along the long side times 15 along the short one,"
            " whose last 12 pixels belong to no patch"
        )
    general_hint = (
        "along a side: the steps of 16 that fit into the length minus 64, plus 1"
    )
    return wrong(hints.get(float(answer), general_hint))


def class_of_a_pair(answer: Any) -> bool:
    """Check the class of a pair: the second patch is 27 pixels lower, 30 further left.

    Source: chapter 04, exercise 2; the released code of Patch SVDD. Departures: none.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_number(answer):
        return False
    hints = {
        2: "that is where the first patch lies, seen from the second",
        3: "the second patch is lower as well as further left",
        6: "the centre of the 3×3 grid is not a class, so it has no number",
        7: "that is lower and further right",
        0: "that is higher and further left: rows count downwards",
    }
    if answer == 5:
        return right("row below, column to the left: the first of the last three")
    return wrong(
        hints.get(
            float(answer), "number the 3×3 grid row by row, from 0, without its centre"
        )
    )


def loss_function(answer: Any) -> bool:
    """Check the reader's `f(a, b)`, the loss of Eq. 4 for a batch of pairs.

    Source: chapter 04, exercise 3; arXiv:2006.16067, Eq. 4.
    Departures: the mean over the pairs, as in the released code.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 5, generator=generator) for _ in range(2))
    norms = (a - b).square().sum(1).sqrt()
    got = answer(a, b)
    if not isinstance(got, Tensor) or got.numel() != 1:
        received = shape_of(got)
        return wrong(
            f"for six pairs f returned {received};"
            " expected one number, a tensor that can be differentiated"
        )
    got = like(got, norms)
    hints = (
        (
            norms.square().mean(),
            "the norm is not squared: take the root of each pair's sum of squares",
        ),
        (
            (a - b).square().mean(),
            (
                "sum the squares over the dimensions, take the root,"
                " then average over the pairs"
            ),
        ),
        (
            norms.sum(),
            "average over the pairs, so that the loss does not grow with the batch",
        ),
        ((a - b).norm(), "a norm per pair, not one for the whole batch"),
        (
            (a - b).abs().sum(1).mean(),
            "that is the sum of absolute differences: Eq. 4 has the Euclidean norm",
        ),
        (
            (a - b).mean(0).norm(),
            (
                "the norm of the mean lets differences cancel:"
                " first the norm, then the mean"
            ),
        ),
    )
    if torch.allclose(got, norms.mean()):
        return right("a Euclidean norm for each pair, averaged over the pairs")
    for value, hint in hints:
        if torch.allclose(got, value):
            return wrong(hint)
    return wrong(
        "first the length of each pair's difference, then the mean of the lengths"
    )


def spread_function(answer: Any) -> bool:
    """Check `f(scores, patch, stride, size)`: the mean score of the patches per pixel.

    Source: chapter 04, exercise 4; arXiv:2006.16067, Alg. 2. Departures: none.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_function(answer):
        return False
    scores, patch, stride, size = torch.arange(1.0, 13.0).view(3, 4), 4, 2, (8, 11)
    expected = spread_patch_scores(scores, patch, stride, size)
    got = like(answer(scores.clone(), patch, stride, size), expected)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        received = shape_of(got)
        return wrong(
            f"for 3×4 scores and an image of 8×11 pixels f returned {received};"
            " expected a map (8, 11)"
        )
    if torch.allclose(got, expected):
        return right(
            "every pixel has the mean over its patches, and 0 where there are none"
        )
    if not torch.isfinite(got).all():
        return wrong("a pixel that no patch covers divides 0 by 0: it should score 0")
    covers = F.conv_transpose2d(
        torch.ones(1, 1, 3, 4), torch.ones(1, 1, patch, patch), stride=stride
    )[0, 0]
    sums = F.pad(covers, (0, 1)) * expected
    if torch.allclose(got, sums):
        return wrong(
            "you add the scores: divide by the number of patches that cover the pixel"
        )
    if got[0, 0] > 0 and torch.allclose(got / got[0, 0], sums / sums[0, 0]):
        return wrong(
            "a corner is covered once: divide by the pixel's own count,"
            " not all pixels by the same number"
        )
    for wrong_scores, wrong_stride, hint in (
        (scores.mT, stride, "rows and columns of the scores are exchanged"),
        (scores, patch, "a new patch starts every `stride` pixels: they overlap"),
    ):
        wrong_map = spread_patch_scores(wrong_scores, patch, wrong_stride, (16, 16))
        if torch.allclose(got, wrong_map[: size[0], : size[1]]):
            return wrong(hint)
    if torch.allclose(got[:2, :2], expected[:2, :2]):
        return wrong(
            "the first corner is right;"
            " a pixel that several patches cover has their mean, not one of them"
        )
    return wrong(
        "patch (i, j) covers rows i·stride to i·stride + patch - 1,"
        " and columns the same way with j"
    )


def nearest_function(answer: Any) -> bool:
    """Check the reader's `f(queries, bank)`, the distances of Eq. 8.

    Source: chapter 04, exercise 5; arXiv:2006.16067, Eq. 8. Departures: none.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(40, 5, generator=generator)
    queries = torch.cat([torch.randn(8, 5, generator=generator), bank[7:8]])
    every = (queries[:, None] - bank).square().sum(2).sqrt()
    expected = every.min(1).values
    got = like(answer(queries.clone(), bank.clone()), expected)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        received = shape_of(got)
        return wrong(
            f"for 9 queries and a bank of 40 f returned {received};"
            " expected one distance per query, (9,)"
        )
    if got.isnan().any():
        return wrong(
            "nan: rounding makes a squared distance of 0 negative;"
            " clamp it at 0 before the root"
        )
    if torch.equal(got, every.argmin(1).to(got)):
        return wrong("these are rows of the bank: return the distance to that row")
    if torch.allclose(got, expected, atol=2e-3):
        return right(
            "the smallest of the distances to all vectors of the bank;"
            " 0 for a query that is in it"
        )
    hints = (
        (expected.square(), "the distance, not its square"),
        (
            every.mean(1),
            (
                "the nearest one, not the mean over the bank:"
                " a patch needs only one that is similar"
            ),
        ),
        (every.max(1).values, "that is the farthest vector"),
        (
            (queries - bank.mean(0)).norm(dim=1),
            "that is the distance to one centre: Deep SVDD's score, not Eq. 8",
        ),
        (
            (queries[:, None] - bank).abs().sum(2).min(1).values,
            "that adds absolute differences: Eq. 8 has the norm",
        ),
        (
            every.min(0).values[:9],
            "the minimum runs over the bank, not over the queries",
        ),
    )
    for value, hint in hints:
        if torch.allclose(got, value, atol=2e-3):
            return wrong(hint)
    return wrong(
        "for each query: its distance to every vector of the bank,"
        " and of these the smallest"
    )


def hierarchy_function(answer: Any) -> bool:
    """Check the reader's `f(encoder, patches)`: big embeddings from small ones, Eq. 7.

    Source: chapter 04, exercise 6; arXiv:2006.16067, Eq. 7. Departures: none.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_function(answer):
        return False
    # The state of the reader's generator does not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, patches = HierarchicalEncoder(8), torch.rand(3, 3, 64, 64) - 0.5

    def raise_forward_used(*_: Any) -> None:
        raise ValueError(
            "the exercise replaces the encoder's forward: use its three parts"
        )

    encoder.forward = raise_forward_used
    with torch.no_grad():
        try:
            got = like(answer(encoder, patches.clone()), patches)
        except (RuntimeError, ValueError) as error:
            return wrong(f"it raises an error: {error}")
        if not isinstance(got, Tensor) or got.shape != (3, 8):
            received = shape_of(got)
            return wrong(
                f"for 3 patches and D = 8 f returned {received}; expected (3, 8)"
            )
        halves = (slice(None, 32), slice(32, None))
        quarters = [
            [encoder.small(patches[..., rows, columns]) for columns in halves]
            for rows in halves
        ]
        # (N, D, 2, 2), rows before columns.
        grid = torch.stack([torch.stack(row, -1) for row in quarters], -2)
        hidden = encoder.conv1(grid)
        activated = F.leaky_relu(hidden, 0.1)

        def head(grid: Tensor) -> Tensor:
            return torch.tanh(encoder.conv2(F.leaky_relu(encoder.conv1(grid), 0.1)))

        # The memory of (N, 4, D), reshaped without a transpose.
        reshaped = grid.flatten(2).mT.reshape(3, 8, 2, 2)
        hints = (
            (head(grid.mT), "rows and columns of the 2×2 grid are exchanged"),
            (
                head(reshaped),
                "a reshape does not transpose:"
                " exchange the axes of quarters and of D first",
            ),
            (
                torch.tanh(encoder.conv2(hidden)),
                "a LeakyReLU of slope 0.1 stands between the two convolutions",
            ),
            (
                torch.tanh(encoder.conv2(F.leaky_relu(hidden, 0.01))),
                "the slope is 0.1, not PyTorch's 0.01",
            ),
            (
                torch.tanh(encoder.conv2(F.relu(hidden))),
                "a LeakyReLU of slope 0.1, not a ReLU",
            ),
            (encoder.conv2(activated).flatten(1), "the embedding ends in a tanh"),
            (
                grid.mean((2, 3)),
                (
                    "the four are not averaged:"
                    " g_big (conv1, LeakyReLU, conv2, tanh) combines them"
                ),
            ),
        )
        if torch.allclose(
            got, torch.tanh(encoder.conv2(activated)).flatten(1), atol=1e-5
        ):
            return right(
                "four quarters through one small encoder,"
                " then the head over their 2×2 grid"
            )
        for value, hint in hints:
            if torch.allclose(got, value.flatten(1), atol=1e-5):
                return wrong(hint)
    return wrong(
        "embed the four quarters with encoder.small, arrange them as (N, D, 2, 2),"
        " then conv1 and conv2"
    )


def distances_of_an_evaluation(answer: Any) -> bool:
    """Check the number of distances of one evaluation.

    3,000 and 1,000 images of 1024×1024 pixels, K = 32, stride 4.

    Source: chapter 04, exercise 7; arXiv:2006.16067, Eq. 8. Departures: none.
    Test: test_exercises_patch_svdd.py::test_patch_svdd_checks
    """
    if no_number(answer):
        return False
    patches = ((1024 - 32) // 4 + 1) ** 2
    exact = 3000 * 1000 * patches**2

    def near(value: float | int) -> bool:
        return bool(abs(answer - value) < 0.005 * value)

    if near(exact):
        return right(
            "it grows with the product of both sets,"
            " and with the fourth power of the image's side"
        )
    if near(3000 * 1000 * patches):
        return wrong(
            "each test patch is compared with the patches of the training images,"
            " not with the images"
        )
    if near(4000 * patches):
        return wrong(
            "that is the number of patches;"
            " each test patch is compared with each training patch"
        )
    if near(3000 * 1000 * 3249**2):
        return wrong(
            "an image of 256×256 has 3,249 patches; these have 1024×1024 pixels"
        )
    if near(exact * 64):
        return wrong("a distance counts once, for any number of dimensions")
    if near(3000 * 1000 * 256**4):
        return wrong(
            "close: the last patch must fit, so there are not 1024 / 4 along a side"
        )
    if near(3000 * 1000 * 248**4):
        return wrong(
            "close: a patch starts at pixel 0, too:"
            " count the steps along a side, plus one"
        )
    if near(exact * (4 * 57 / 249) ** 4):
        return wrong(
            "close: four times the side has room for more than four times the 57"
            " patches of 256 pixels"
        )
    if abs(answer - exact) < 0.05 * exact:
        return wrong("close: three digits are expected, or the product itself")
    return wrong(
        "patches per image times images: once for the test set, once for the bank;"
        " then the product"
    )
