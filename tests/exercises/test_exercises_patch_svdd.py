import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exercise_checks import (
    assert_check,
    assert_every_check_is_tested,
    assert_random_numbers_stay,
)


def norms(a, b):
    return torch.linalg.vector_norm(a - b, dim=1)


def spread(
    scores,
    patch,
    stride,
    size,
    *,
    uncovered=0.0,
    divide=True,
    most=False,
    last=False,
    turned=False,
):
    total, count = torch.zeros(size), torch.zeros(size)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            top, left = (j * stride, i * stride) if turned else (i * stride, j * stride)
            window = slice(top, top + patch), slice(left, left + patch)
            total[window] = scores[i, j] if last else total[window] + scores[i, j]
            count[window] = 1 if last else count[window] + 1
    if not divide:
        return total
    return torch.where(count > 0, total / (count.max() if most else count), uncovered)


def spread_by(**change):
    return lambda scores, patch, stride, size: spread(
        scores, patch, stride, size, **change
    )


def folded(scores, patch, stride, size):
    """The same through F.fold, which adds up overlapping blocks."""
    height, width = ((n - 1) * stride + patch for n in scores.shape)
    blocks = scores.flatten().expand(1, patch**2, -1)
    one = dict(output_size=(height, width), kernel_size=patch, stride=stride)
    mean = F.fold(blocks.contiguous(), **one) / F.fold(torch.ones_like(blocks), **one)
    return F.pad(mean[0, 0], (0, size[1] - width, 0, size[0] - height))


def pairs(queries, bank):
    return (queries[:, None] - bank).norm(dim=2)


def raises_error(queries, bank):
    return queries[99]


def in_numpy(queries, bank):
    return np.linalg.norm(queries.numpy()[:, None] - bank.numpy(), axis=2).min(1)


def big_by_sums(encoder, patches):
    """The 2×2 convolution written out as a sum over the quarters."""
    weight, hidden = encoder.conv1.weight, encoder.conv1.bias
    for y in (0, 1):
        for x in (0, 1):
            hidden = (
                hidden
                + encoder.small(patches[..., 32 * y :, 32 * x :][..., :32, :32])
                @ weight[:, :, y, x].T
            )
    return (
        encoder.conv2(torch.where(hidden > 0, hidden, hidden / 10)[..., None, None])
        .tanh()
        .double()
        .flatten(1)
    )


def big_in_stripes(encoder, patches):
    """The four quarters next to each other in memory, taken for a 2×2 grid by a
    reshape.
    """
    corners = [(0, 0), (0, 32), (32, 0), (32, 32)]
    quarters = torch.stack(
        [encoder.small(patches[:, :, y : y + 32, x : x + 32]) for y, x in corners], 1
    )
    return (
        encoder.conv2(F.leaky_relu(encoder.conv1(quarters.reshape(3, 8, 2, 2)), 0.1))
        .tanh()
        .flatten(1)
    )


def big(order=(0, 1, 2, 3), slope=0.1, end=torch.tanh, head=True):
    def f(encoder, patches):
        corners = [(0, 0), (0, 32), (32, 0), (32, 32)]
        quarters = [
            encoder.small(patches[:, :, y : y + 32, x : x + 32]) for y, x in corners
        ]
        grid = torch.stack([quarters[i] for i in order], 2).unflatten(2, (2, 2))
        if not head:
            return grid.mean((2, 3))
        return end(encoder.conv2(F.leaky_relu(encoder.conv1(grid), slope))).flatten(1)

    return f


N = ((1024 - 32) // 4 + 1) ** 2
# check → right answers, and wrong ones with a word of the hint they must get
CASES = {
    "patches_of_an_image": (
        [330, 330.0],
        {
            294: "plus one",
            450: "must fit",
            352: "must be inside the image",
            24: "overlap",
            6324: "stride 4",
            10: "steps of 16",
        },
    ),
    "class_of_a_pair": (
        [5, 5.0],
        {
            2: "seen from the second",
            3: "lower as well",
            6: "centre",
            7: "further right",
            0: "downwards",
            4: "row by",
        },
    ),
    "loss_function": (
        [
            lambda a, b: norms(a, b).mean(),
            lambda a, b: norms(a.double(), b).mean(),
            lambda a, b: F.pairwise_distance(a, b, eps=0).mean(),
        ],
        {
            (lambda a, b: norms(a, b).square().mean()): "not squared",
            F.mse_loss: "sum the squares",
            (lambda a, b: norms(a, b).sum()): "average over the pairs",
            (lambda a, b: (a - b).norm()): "whole batch",
            (lambda a, b: (a - b).norm(dim=0).mean()): "the other axis",
            (lambda a, b: (a - b).abs().sum(1).mean()): "absolute",
            (lambda a, b: (a - b).mean(0).norm()): "cancel",
            norms: "(6,)",
            (lambda a, b: norms(a, b).mean().item()): "float",
            (lambda a, b: (a * b).mean()): "length of each",
        },
    ),
    "spread_function": (
        [
            spread,
            folded,
            lambda *given: spread(*given).double(),
            lambda *given: spread(*given).numpy(),
        ],
        {
            spread_by(divide=False): "add the scores",
            spread_by(most=True): "own count",
            spread_by(uncovered=float("nan")): "0 by 0",
            spread_by(last=True): "not one of them",
            spread_by(uncovered=1.0): "has their mean",
            (lambda *given: spread(*given, divide=False) / 16): "own count",
            (lambda s, *given: spread(s.T, *given)): "are exchanged",
            (lambda s, p, t, size: spread(s, p, p, size)): "overlap",
            (lambda s, p, t, size: spread(s.T, p, t, size[::-1])): "(11, 8)",
            (lambda s, p, t, size: torch.ones(size) * 7): "i·stride",
            (lambda *_: 3): "int",
        },
    ),
    "nearest_function": (
        [
            lambda q, b: pairs(q, b).min(1).values,
            lambda q, b: torch.cdist(q.double(), b.double()).amin(1),
            in_numpy,
        ],
        {
            (lambda q, b: pairs(q, b).square().min(1).values): "not its square",
            (lambda q, b: pairs(q, b).mean(1)): "only one that is similar",
            (lambda q, b: pairs(q, b).max(1).values): "farthest",
            (lambda q, b: (q - b.mean(0)).norm(dim=1)): "one centre",
            (lambda q, b: pairs(q, b).min(0).values[:9]): "not over the queries",
            (lambda q, b: pairs(q, b).argmin(1)): "rows of the bank",
            (
                lambda q, b: (pairs(q, b).square().min(1).values - 1e-9).sqrt()
            ): "clamp it at 0",
            (lambda q, b: torch.cdist(q, b, p=1).amin(1)): "absolute",
            (lambda q, b: None): "is there a return",
            (lambda q, b: pairs(q, b).min(1)): "instead of its .values",
            raises_error: "(return queries[99]): index 99 is out of bounds",
            pairs: "(9, 40)",
            (lambda q, b: q[:, 0]): "every vector",
        },
    ),
    "hierarchy_function": (
        [big(), big_by_sums],
        {
            big(order=(0, 2, 1, 3)): "are exchanged",
            big(slope=1.0): "between the two",
            big(slope=0.01): "not PyTorch's",
            big(slope=0.0): "not a ReLU",
            big(end=lambda x: x): "ends in a tanh",
            big(head=False): "not averaged",
            big_in_stripes: "does not transpose",
            (lambda encoder, patches: encoder(patches)): "three parts",
            big(order=(3, 2, 1, 0)): "four quarters",
            (lambda encoder, patches: encoder.small(patches)): "raises an error",
            (lambda encoder, patches: patches): "(3, 3, 64, 64)",
        },
    ),
    "distances_of_an_evaluation": (
        [3000 * 1000 * N**2, 1.153e16],
        {
            3000 * 1000 * N: "not with the images",
            4000 * N: "number of patches",
            3000 * 1000 * 3249**2: "256×256",
            64 * 3000 * 1000 * N**2: "counts once",
            3000 * 1000 * 256**4: "must fit",
            3000 * 1000 * 248**4: "plus one",
            3000 * 1000 * (4 * 57) ** 4: "4 times the side",
            1.2e16: "three digits",
            5: "then the product",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_patch_svdd_checks(name, capsys):
    assert_check("patch_svdd", name, CASES[name], capsys)


def test_every_check_is_tested():
    assert_every_check_is_tested("patch_svdd", CASES)


def test_checks_leave_the_random_numbers_as_they_were():
    assert_random_numbers_stay("patch_svdd", CASES)
