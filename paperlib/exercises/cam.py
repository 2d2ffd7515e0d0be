"""Checks for the exercises of chapter 02, CAM, in their order."""

from typing import Any

import torch
from torch import nn

from paperlib.cam import cam, class_activation_map
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


@expects(number)
def sum_of_the_map(answer: Any) -> bool:
    """Check the sum of a 7×7 map for a logit of 12.5 and a bias of 0.5."""
    return judge_number(
        answer,
        49 * 12.0,
        "the logit without its bias, times the number of positions,"
        " because the network averages",
        (
            (
                12.0,
                "that holds for the paper's sum;"
                " this network averages over the positions",
            ),
            (49 * 12.5, "the bias belongs to no position: subtract it first"),
            (
                49 * 13.0,
                "the logit already includes the bias: subtract it, do not add it",
            ),
            (7 * 12.0, "the map has two sides: count its positions"),
        ),
        "start from S = (1/Z) ΣM + b and solve it for ΣM",
    )


@expects(number)
def side_ratio(answer: Any) -> bool:
    """Check the ratio of the sides of two concentric squares with an IoU of 0.5."""
    require(answer > 1, "the predicted box is the larger one, so the ratio is above 1")
    iou = 1 / answer**2
    towards = "falls to 0.5 for a larger" if iou > 0.5 else "rises to 0.5 for a smaller"
    areas_hint = "that is the ratio of the areas; the question is about the sides"
    return judge_number(
        iou,
        0.5,
        "the areas may differ by a factor of two, the sides by its square root",
        ((lambda _: abs(answer - 2) < 1e-6, areas_hint),),
        f"with sides {answer:g} times as long the IoU is {iou:.3f}; it {towards} ratio",
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
    """Check `f(map)`: the box around all positions above 20 % of the maximum.

    The paper selects the largest region, the exercise all positions.
    """
    values = torch.full((8, 10), -1.0)
    # 3 is above 20 % of 10, and below the middle of the range from -1 to 10
    values[2:5, 3:9] = 3.0
    values[3, 4:8] = 10.0
    values[0, 2] = 2.5  # above 20 %, and away from the rest
    values[5, 3] = 2.0  # exactly 20 %: not above it
    values[0, 0] = 1.5
    values[7] = -20.0  # larger than the maximum, but for its sign
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
            ((0, 2, 6, 9), "a position at exactly 20 % is not above 20 %"),
            (
                (0, 0, 7, 10),
                "20 % of the way from the minimum to the maximum is another rule;"
                " use 20 % of the maximum",
            ),
            (
                (0, 0, 6, 9),
                "0.2 is not 20 % of the maximum: this map's maximum is 10",
            ),
            (
                (2, 3, 5, 9),
                "all positions above the threshold, not only the largest region",
            ),
            ((3, 4, 4, 8), "your threshold is too high: 3 is more than 20 % of 10"),
        ),
        "find the first and the last row, and column, of map > 0.2 * map.max()",
    )


@expects(number)
def parameters_saved(answer: Any) -> bool:
    """Check the percentage of parameters that GAP saves in VGG-16."""
    from torchvision import models

    with torch.device("meta"):
        vgg = models.vgg16()
        added = nn.ModuleList(
            [nn.Conv2d(512, 1024, 3, padding=1), nn.Linear(1024, 1000)]
        )
    total, features, new = (
        sum(p.numel() for p in part.parameters()) for part in (vgg, vgg.features, added)
    )
    exact = 100 * (1 - (features + new) / total)
    saving_hint = "the answer is the saving, in percent of the parameters of VGG-16"
    return judge_number(
        answer,
        exact,
        "the new convolution and the new linear layer count as well;"
        " the paper's 90 % leaves them out",
        (
            (
                100 * (1 - features / total),
                "that omits the added layers: a 3×3 convolution and a linear one",
            ),
            (100 - exact, saving_hint),
            (lambda share: abs(100 * share - exact) < 0.5, saving_hint),
        ),
        "keep vgg.features,"
        " add a 3×3 convolution to 1,024 channels and a linear layer to 1,000",
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
