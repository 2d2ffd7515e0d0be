"""Checks for the exercises of chapter 02, CAM, in their order."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from paperlib.cam import cam, class_activation_map
from paperlib.exercises.given import current_seed, select
from paperlib.exercises.given import use_seed as use_seed  # check.use_seed(2027)
from paperlib.exercises.verdict import (
    errors_rejected,
    expects,
    four_numbers,
    function,
    judge,
    judge_number,
    judge_tensor,
    number,
    random_tensors,
    require,
    right,
    same_but_scaled,
)


def numbers(seed: int | None = None) -> dict[str, SimpleNamespace]:
    """Return what the exercises give: the book's numbers, or those of a seed."""
    return {
        "sum_of_the_map": select(
            seed,
            {"side": (7, 6, 8, 14), "score": (12.5, 9.5, 18.5), "bias": (0.5, 1.5)},
        ),
        "side_ratio": select(
            seed,
            {
                "iou": (
                    *(0.5, 0.25, 0.3, 0.36, 0.4, 0.45, 0.55, 0.6, 0.64, 0.7, 0.75),
                    *(0.8, 0.85),
                )
            },
        ),
        "box_function": select(
            seed,
            # A share of 100 that is an integer in float32 and in float64.
            {"percent": (20, 10, 12, 15, 17, 22, 25, 27, 30, 35, 37, 40, 45)},
        ),
        "parameters_saved": select(
            seed,
            {
                # Savings that differ by more than their tolerance.
                "depth channels": (
                    *((16, 1024), (11, 256), (11, 512), (13, 768), (16, 256)),
                    *((16, 512), (13, 1536), (19, 512), (16, 1536), (19, 1024)),
                    *((16, 2048), (13, 3072), (19, 2048), (16, 3072)),
                )
            },
        ),
    }


@expects(number)
def sum_of_the_map(answer: Any) -> bool:
    """Check the sum of a map, from a logit and its bias (in the book: 12.5 and 0.5)."""
    given = numbers(current_seed())["sum_of_the_map"]
    positions = given.side**2
    mean = given.score - given.bias
    return judge_number(
        answer,
        positions * mean,
        "the logit without its bias, times the number of positions,"
        " because the network averages",
        (
            (
                mean,
                "that holds for the paper's sum;"
                " this network averages over the positions",
            ),
            (
                positions * given.score,
                "the bias belongs to no position: subtract it first",
            ),
            (
                positions * (given.score + given.bias),
                "the logit already includes the bias: subtract it, do not add it",
            ),
            (
                given.side * mean,
                "the map has two sides: count its positions",
            ),
        ),
        "start from S = (1/Z) ΣM + b and solve it for ΣM",
    )


@expects(number)
def side_ratio(answer: Any) -> bool:
    """Check the ratio of the sides of two concentric squares with a given IoU.

    In the book: 0.5.
    """
    given = numbers(current_seed())["side_ratio"]
    require(answer > 1, "the predicted box is the larger one, so the ratio is above 1")
    iou = (1 / answer) ** 2
    direction = "falls" if iou > given.iou else "rises"
    size = "larger" if iou > given.iou else "smaller"
    return judge_number(
        iou,
        given.iou,
        f"the areas may differ by a factor of {1 / given.iou:.3g}, the sides by its"
        " square root",
        (
            (
                given.iou**2,
                "that is the ratio of the areas; the question is about the sides",
            ),
        ),
        f"with sides {answer:g} times as long the IoU is {iou:.3f}; it {direction} to"
        f" {given.iou:g} for a {size} ratio",
        tolerance=0.005,
    )


@expects(function)
def map_function(answer: Any) -> bool:
    """Check the reader's `f(features, weight, targets)`, Eq. 2 for a batch."""
    features, weight = random_tensors((3, 5, 4, 6), (7, 5))
    targets = torch.tensor([6, 0, 2])
    expected = class_activation_map(features, weight, targets)
    return judge_tensor(
        answer(features.clone(), weight.clone(), targets),
        expected,
        "for features (3, 5, 4, 6) and 7 classes; expected one map (4, 6) per image",
        "the row of the class, times the channels, summed over channels",
        (
            (
                expected.clamp_min(0),
                "a CAM is signed: keep the positions that decrease the class score",
            ),
            (expected / 24, "Eq. 2 has no 1/Z; it belongs to the pooling"),
            (
                lambda got: torch.allclose(got[:1], expected[:1], atol=1e-5),
                "the first image is right: every image needs the row of its own class",
            ),
            (
                same_but_scaled(expected),
                "right but for its scale: a sum over the channels, no mean,"
                " and not scaled to 0…1",
            ),
        ),
        "each image has a class: pick that class's row of weights,"
        " and sum over the channels only",
    )


@expects(function)
def box_function(answer: Any) -> bool:
    """Check `f(map)`: the box around all positions above a share of the maximum.

    In the book: 20 %. The paper selects the largest region, the exercise all positions.
    """
    percent = numbers(current_seed())["box_function"].percent
    values = torch.full((8, 10), -1.0)
    # Above the threshold.
    values[2:5, 3:9] = percent + 10
    values[3, 4:8] = 100.0
    values[0, 2] = percent + 1  # away from the rest
    values[5, 3] = percent  # not above the threshold
    values[0, 0] = percent - 1
    values[7] = -200.0  # larger than the maximum, but for its sign
    box, flipped_box = (
        four_numbers(answer(values), "f returned a", "top, left, bottom, right")
        for values in (values.clone(), values.flip(0))
    )
    require(
        box != (0, 2, 5, 9) or flipped_box == (3, 2, 8, 9),
        "right on one map, but not on the same map upside down:"
        " compute the box from the map",
    )
    return judge(
        box,
        box.__eq__,
        (0, 2, 5, 9),
        "rows 0 to 4 and columns 2 to 8, half-open",
        (
            (
                (0, 2, 4, 8),
                "right and bottom are one past the last position (half-open),"
                " so that bottom - top is the height",
            ),
            (
                (2, 0, 9, 5),
                "rows and columns are exchanged:"
                " a map is indexed [row, column], and the top is first",
            ),
            (
                (0, 5, 2, 9),
                "the four numbers are right, but not their order:"
                " top, left, bottom, right",
            ),
            ((0, 2, 5, 7), "bottom and right are asked for, not height and width"),
            (
                (0, 2, 6, 9),
                f"a position at exactly {percent} % is not above {percent} %",
            ),
            (
                (0, 0, 7, 10),
                f"{percent} % of the way from the minimum to the maximum is another"
                f" rule; use {percent} % of the maximum",
            ),
            (
                (0, 0, 6, 9),
                f"your threshold is too low: it is {percent} % of this map's maximum,"
                " and this map's maximum is 100",
            ),
            (
                (2, 3, 5, 9),
                f"all positions above {percent} % count, not only the largest region",
            ),
            (
                (3, 4, 4, 8),
                f"your threshold is too high: {percent + 10} is more than {percent} %"
                " of 100",
            ),
        ),
        f"find the first and the last row, and column, of the positions above"
        f" {percent} % of map.max()",
    )


@expects(number)
def parameters_saved(answer: Any) -> bool:
    """Check the percentage of parameters that GAP saves in a VGG (in the book: 16)."""
    from torchvision import models

    given = numbers(current_seed())["parameters_saved"]
    with torch.device("meta"):
        vgg = models.get_model(f"vgg{given.depth}")
        added = nn.ModuleList(
            [
                nn.Conv2d(512, given.channels, 3, padding=1),
                nn.Linear(given.channels, 1000),
            ]
        )
    total, features, new = (
        sum(p.numel() for p in part.parameters()) for part in (vgg, vgg.features, added)
    )
    exact = 100 * (1 - (features + new) / total)
    saving_hint = (
        f"the answer is the saving, in percent of the parameters of VGG-{given.depth}"
    )
    return judge_number(
        answer,
        exact,
        "the new convolution and the new linear layer count as well;"
        " the paper's 90 % (for VGG-16) leaves them out",
        (
            (
                100 * (1 - features / total),
                "that omits the added layers: a 3×3 convolution and a linear one",
            ),
            (100 - exact, saving_hint),
            (lambda share: abs(100 * share - exact) < 0.5, saving_hint),
        ),
        "keep vgg.features, add a 3×3 convolution to"
        f" {given.channels:,} channels and a linear layer to 1,000",
        tolerance=0.5,
    )


@expects(function)
def gap_network(answer: Any) -> bool:
    """Check `f(features, channels, classes)`, which builds a network for CAM."""
    require(
        not isinstance(answer, nn.Module),
        "received a network; expected the function that builds it:"
        " pass its name, without calling it",
    )
    # The state of the reader's generator does not change.
    with (
        torch.random.fork_rng(devices=[]),
        errors_rejected("cam raises an error for it"),
    ):
        torch.manual_seed(0)
        features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        network = answer(features, 12, 5)
        require(
            isinstance(network, nn.Module),
            f"f returned a {type(network).__name__};"
            " expected a network, for example an nn.Sequential",
        )
        result = cam(network, torch.randn(2, 3, 16, 12))
    require(
        result.logits.shape == (2, 5),
        f"the network returns {tuple(result.logits.shape)};"
        " expected a score for each of 5 classes",
    )
    require(
        features[0] in set(network.modules()),
        "the network does not contain the given features",
    )
    require(
        any(
            isinstance(module, nn.Conv2d)
            and (module.in_channels, module.out_channels) == (12, 1024)
            and module.kernel_size == (3, 3)
            for module in set(network.modules()) - set(features.modules())
        ),
        "the paper adds a 3×3 convolution with 1,024 channels before the pooling",
    )
    require(
        result.maps.shape == (2, 8, 6),
        f"the map is {tuple(result.maps.shape[1:])} for features of (8, 6):"
        " pad the convolution by one, and keep its stride at 1",
    )
    return right("cam finds the pooled features and the linear layer by itself")
