"""Checks for the exercises of chapter 04, Patch SVDD, in their order."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paperlib.anomaly_map import spread_patch_scores
from paperlib.exercises.given import current_seed, select
from paperlib.exercises.given import use_seed as use_seed  # check.use_seed(2027)
from paperlib.exercises.verdict import (
    errors_rejected,
    expects,
    function,
    judge_number,
    judge_tensor,
    number,
    random_tensors,
    require,
    shape_of,
)
from paperlib.patch_svdd import DIRECTIONS, HierarchicalEncoder


def numbers(seed: int | None = None) -> dict[str, SimpleNamespace]:
    """Return what the exercises give: the book's numbers, or those of a seed."""
    shift = select(
        seed,
        {
            "down right": (
                *((27, -30), (-26, 29), (0, 31), (-28, -25), (30, 0), (0, -27)),
                *((29, 26), (-31, 0)),
            )
        },
    )
    vertical = f"{abs(shift.down)} pixels {'lower' if shift.down > 0 else 'higher'}"
    side = "right" if shift.right > 0 else "left"
    horizontal = f"{abs(shift.right)} pixels further {side}"
    position = f"{vertical} and {horizontal} than the first"
    if not shift.right:
        position = f"{vertical} than the first, in the same columns"
    elif not shift.down:
        position = f"{horizontal} than the first, in the same rows"
    direction = tuple((n > 0) - (n < 0) for n in (shift.down, shift.right))
    return {
        "patches_of_an_image": select(
            seed,
            {
                # Only along the height, pixels are left over.
                "width height": (
                    *((400, 300), (480, 270), (640, 360), (720, 450), (512, 350)),
                    *((320, 200), (800, 250), (560, 220), (448, 360), (640, 270)),
                    *((480, 450), (400, 220), (720, 300), (560, 300)),
                )
            },
        ),
        "class_of_a_pair": SimpleNamespace(position=position, direction=direction),
        "distances_of_an_evaluation": select(
            seed,
            {
                "n_train": (3000, 2000, 4000),
                "n_test": (1000, 700),
                "side": (1024, 512, 768, 1280),
            },
        ),
    }


@expects(number)
def patches_of_an_image(answer: Any) -> bool:
    """Check the number of 64×64 patches at stride 16 in an image.

    In the book, the image has 400×300 pixels.
    """
    given = numbers(current_seed())["patches_of_an_image"]
    width, height = given.width, given.height
    columns, rows = (width - 64) // 16 + 1, (height - 64) // 16 + 1
    return judge_number(
        answer,
        rows * columns,
        f"{columns} along the long side times {rows} along the short one,"
        f" whose last {(height - 64) % 16} pixels belong to no patch",
        (
            (
                (rows - 1) * (columns - 1),
                "a patch starts at pixel 0, too: count the steps, plus one",
            ),
            (
                (width // 16) * (height // 16),
                "the last patch must fit:"
                " its corner lies at most 64 pixels before the border",
            ),
            (
                (rows + 1) * columns,
                "the steps along the short side leave a remainder:"
                " a patch must be inside the image",
            ),
            (
                (width // 64) * (height // 64),
                "that is without overlap: a patch starts every 16 pixels",
            ),
            (
                ((width - 32) // 4 + 1) * ((height - 32) // 4 + 1),
                "that is for patches of 32 pixels at stride 4",
            ),
        ),
        "along a side: the steps of 16 that fit into the length minus 64, plus 1",
    )


@expects(number)
def class_of_a_pair(answer: Any) -> bool:
    """Check the class of a pair of patches.

    In the book, the second patch is 27 pixels lower and 30 further left.
    """
    down, right_ = numbers(current_seed())["class_of_a_pair"].direction
    exact = DIRECTIONS.index((down, right_))
    mistakes = [
        (
            DIRECTIONS.index((-down, -right_)),
            "that is where the first patch lies, seen from the second",
        )
    ]
    if down and right_:
        vertical = ("higher", "lower")[down > 0]
        horizontal = f"further {('left', 'right')[right_ > 0]}"
        mirrored = f"further {('left', 'right')[right_ < 0]}"
        both = f"the second patch is {vertical} as well as {horizontal}"
        mistakes += [
            (
                DIRECTIONS.index((down, -right_)),
                f"that is {vertical}, but {mirrored}",
            ),
            (
                DIRECTIONS.index((-down, right_)),
                "higher and lower are exchanged: rows count downwards",
            ),
            (DIRECTIONS.index((0, right_)), both),
        ]
    if exact >= 4:
        mistakes.append(
            (
                exact + 1,
                "the centre of the 3×3 grid is not a class, so it has no number",
            )
        )
    return judge_number(
        answer,
        exact,
        "the 3×3 grid is numbered row by row, without its centre",
        mistakes,
        "number the 3×3 grid row by row, from 0, without its centre",
    )


@expects(function)
def loss_function(answer: Any) -> bool:
    """Check the reader's `f(a, b)`, the loss of Eq. 4, averaged over pairs."""
    a, b = random_tensors((6, 5), (6, 5))
    norms = (a - b).square().sum(1).sqrt()
    got = answer(a, b)
    require(
        isinstance(got, Tensor) and got.numel() == 1,
        f"for six pairs f returned {shape_of(got)};"
        " expected one number, a tensor that can be differentiated",
    )
    return judge_tensor(
        got.reshape(()),
        norms.mean(),
        "",
        "a Euclidean norm for each pair, averaged over the pairs",
        (
            (
                norms.square().mean(),
                "the norm is not squared: take the root of each pair's sum of squares",
            ),
            (
                (a - b).square().mean(),
                "sum the squares over the dimensions, take the root,"
                " then average over the pairs",
            ),
            (
                norms.sum(),
                "average over the pairs, so that the loss does not grow with the batch",
            ),
            ((a - b).norm(), "a norm per pair, not one for the whole batch"),
            (
                (a - b).norm(dim=0).mean(),
                "the norm runs over the dimensions of a pair, not over the pairs:"
                " it is the other axis",
            ),
            (
                (a - b).abs().sum(1).mean(),
                "that is the sum of absolute differences: Eq. 4 has the Euclidean norm",
            ),
            (
                (a - b).mean(0).norm(),
                "the norm of the mean lets differences cancel:"
                " first the norm, then the mean",
            ),
        ),
        "first the length of each pair's difference, then the mean of the lengths",
        tolerance=1e-8,
    )


@expects(function)
def spread_function(answer: Any) -> bool:
    """Check `f(scores, patch, stride, size)`: the mean score of a pixel's patches."""
    scores, patch, stride, size = torch.arange(1.0, 13.0).view(3, 4), 4, 2, (8, 11)
    expected = spread_patch_scores(scores, patch, stride, size)
    covers = F.conv_transpose2d(
        torch.ones(1, 1, 3, 4), torch.ones(1, 1, patch, patch), stride=stride
    )[0, 0]
    sums = F.pad(covers, (0, 1)) * expected
    transposed, without_overlap = (
        spread_patch_scores(wrong_scores, patch, wrong_stride, (16, 16))[:8, :11]
        for wrong_scores, wrong_stride in ((scores.mT, stride), (scores, patch))
    )
    return judge_tensor(
        answer(scores.clone(), patch, stride, size),
        expected,
        "for 3×4 scores and an image of 8×11 pixels; expected a map (8, 11)",
        "every pixel has the mean over its patches, and 0 where there are none",
        (
            (
                lambda got: not torch.isfinite(got).all(),
                "a pixel that no patch covers divides 0 by 0: it should score 0",
            ),
            (
                sums,
                "you add the scores:"
                " divide by the number of patches that cover the pixel",
            ),
            (
                lambda got: (
                    torch.allclose(got * sums[0, 0], sums * got[0, 0]) and got[0, 0] > 0
                ),
                "a corner is covered once: divide by the pixel's own count,"
                " not all pixels by the same number",
            ),
            (transposed, "rows and columns of the scores are exchanged"),
            (
                without_overlap,
                "a new patch starts every `stride` pixels: they overlap",
            ),
            (
                lambda got: torch.allclose(got[:2, :2], expected[:2, :2]),
                "the first corner is right;"
                " a pixel that several patches cover has their mean, not one of them",
            ),
        ),
        "patch (i, j) covers rows i·stride to i·stride + patch - 1,"
        " and columns the same way with j",
        tolerance=1e-8,
    )


@expects(function)
def nearest_function(answer: Any) -> bool:
    """Check the reader's `f(queries, bank)`, the distances of Eq. 8."""
    bank, queries = random_tensors((40, 5), (8, 5))
    queries = torch.cat([queries, bank[7:8]])
    differences = queries[:, None] - bank
    distances = differences.square().sum(2).sqrt()
    expected, rows = distances.min(1)
    return judge_tensor(
        answer(queries.clone(), bank.clone()),
        expected,
        "for 9 queries and a bank of 40; expected one distance per query, (9,)",
        "the smallest of the distances to all vectors of the bank;"
        " 0 for a query that is in it",
        (
            (
                lambda got: bool(got.isnan().any()),
                "nan: rounding makes a squared distance of 0 negative;"
                " clamp it at 0 before the root",
            ),
            (
                rows.to(expected),
                "these are rows of the bank: return the distance to that row",
            ),
            (expected.square(), "the distance, not its square"),
            (
                distances.mean(1),
                "the nearest one, not the mean over the bank:"
                " a patch needs only one that is similar",
            ),
            (distances.max(1).values, "that is the farthest vector"),
            (
                (queries - bank.mean(0)).norm(dim=1),
                "that is the distance to one centre: Deep SVDD's score, not Eq. 8",
            ),
            (
                differences.abs().sum(2).min(1).values,
                "that adds absolute differences: Eq. 8 has the norm",
            ),
            (
                distances.min(0).values[:9],
                "the minimum runs over the bank, not over the queries",
            ),
        ),
        "for each query: its distance to every vector of the bank,"
        " and of these the smallest",
        tolerance=2e-3,
    )


@expects(function)
def hierarchy_function(answer: Any) -> bool:
    """Check `f(encoder, patches)`: big embeddings from small ones, Eq. 7."""
    # The state of the reader's generator does not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, patches = HierarchicalEncoder(8), torch.rand(3, 3, 64, 64) - 0.5

    def raise_forward_used(*_: Any) -> None:
        raise ValueError(
            "the exercise replaces the encoder's forward: use its three parts"
        )

    def combine(grid: Tensor, slope: float = 0.1) -> Tensor:
        hidden = F.leaky_relu(encoder.conv1(grid), slope)
        return encoder.conv2(hidden).flatten(1)

    encoder.forward = raise_forward_used
    with torch.no_grad():
        with errors_rejected("it raises an error"):
            got = answer(encoder, patches.clone())
        embedded = _embed_quarters(encoder, patches)
        grid = embedded.mT.unflatten(2, (2, 2))  # (N, D, 2, 2)
        return judge_tensor(
            got,
            combine(grid).tanh(),
            "for 3 patches and D = 8; expected (3, 8)",
            "four quarters through one small encoder, then the head over their"
            " 2×2 grid",
            (
                (
                    combine(grid.mT).tanh(),
                    "rows and columns of the 2×2 grid are exchanged",
                ),
                (
                    combine(embedded.reshape(3, 8, 2, 2)).tanh(),
                    "a reshape does not transpose:"
                    " exchange the axes of quarters and of D first",
                ),
                (
                    combine(grid, slope=1.0).tanh(),
                    "a LeakyReLU of slope 0.1 stands between the two convolutions",
                ),
                (
                    combine(grid, slope=0.01).tanh(),
                    "the slope is 0.1, not PyTorch's 0.01",
                ),
                (
                    combine(grid, slope=0.0).tanh(),
                    "a LeakyReLU of slope 0.1, not a ReLU",
                ),
                (combine(grid), "the embedding ends in a tanh"),
                (
                    grid.mean((2, 3)),
                    "the four are not averaged:"
                    " g_big (conv1, LeakyReLU, conv2, tanh) combines them",
                ),
            ),
            "embed the four quarters with encoder.small, arrange them as (N, D, 2, 2),"
            " then conv1 and conv2",
        )


def _embed_quarters(encoder: HierarchicalEncoder, patches: Tensor) -> Tensor:
    """Return the embeddings of the quarters of 64×64 patches, (N, 4, D)."""
    # (N, 3, 2, 2, 32, 32), rows before columns
    quarters = patches.unfold(2, 32, 32).unfold(3, 32, 32)
    embedded = encoder.small(quarters.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))
    return embedded.unflatten(0, (len(patches), 4))


@expects(number)
def distances_of_an_evaluation(answer: Any) -> bool:
    """Check the number of distances of one evaluation, with K = 32 and stride 4.

    In the book: 3,000 and 1,000 images of 1024×1024 pixels.
    """
    given = numbers(current_seed())["distances_of_an_evaluation"]
    side, pairs = given.side, given.n_train * given.n_test
    per_side = (side - 32) // 4 + 1
    patches = per_side**2
    exact = pairs * patches**2
    return judge_number(
        answer,
        exact,
        "it grows with the product of both sets,"
        " and with the fourth power of the image's side",
        (
            (
                pairs * patches,
                "each test patch is compared with the patches of the training images,"
                " not with the images",
            ),
            (
                (given.n_train + given.n_test) * patches,
                "that is the number of patches;"
                " each test patch is compared with each training patch",
            ),
            (
                pairs * 3249**2,
                f"an image of 256×256 has 3,249 patches; these have {side}×{side}"
                " pixels",
            ),
            (
                exact * 64,
                "a distance counts once, for any number of dimensions",
            ),
            (
                pairs * (side // 4) ** 4,
                "close: the last patch must fit,"
                f" so there are not {side} / 4 along a side",
            ),
            (
                pairs * (per_side - 1) ** 4,
                "close: a patch starts at pixel 0, too:"
                " count the steps along a side, plus one",
            ),
            (
                pairs * (side / 256 * 57) ** 4,
                f"close: {side / 256:g} times the side has room for more than"
                f" {side / 256:g} times the 57 patches of 256 pixels",
            ),
            (
                lambda count: abs(count - exact) < 0.05 * exact,
                "close: three digits are expected, or the product itself",
            ),
        ),
        "patches per image times images: once for the test set, once for the bank;"
        " then the product",
        relative=0.005,
    )
