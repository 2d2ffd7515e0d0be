"""Checks for the exercises of chapter 02, CAM."""

from typing import Any

import torch
from torch import Tensor, nn

from paperlib.cam import cam, class_activation_map
from paperlib.exercises.verdict import (
    like,
    no_function,
    no_number,
    right,
    same_but_scaled,
    shape_of,
    wrong,
)


def sum_of_the_map(answer: Any) -> bool:
    """Check the sum of a 7×7 map for a logit of 12.5 and a bias of 0.5.

    Source: chapter 02, exercise 1. Departures: none.
    Test: test_exercises_cam.py::test_cam_checks
    """
    if no_number(answer):
        return False
    exact = 7 * 7 * (12.5 - 0.5)
    if abs(answer - exact) < 1e-6:
        return right(
            "the logit without its bias, times the number of positions,"
            " because the network averages"
        )
    if abs(answer - exact / 49) < 1e-6:
        return wrong(
            "that holds for the paper's sum; this network averages over the positions"
        )
    if abs(answer - 49 * 12.5) < 1e-6:
        return wrong("the bias belongs to no position: subtract it first")
    if abs(answer - 49 * 13) < 1e-6:
        return wrong("the logit already includes the bias: subtract it, do not add it")
    if abs(answer - exact / 7) < 1e-6:
        return wrong("the map has two sides: count its positions")
    return wrong("start from S = (1/Z) ΣM + b and solve it for ΣM")


def side_ratio(answer: Any) -> bool:
    """Check the ratio of the sides of two concentric squares with an IoU of 0.5.

    Source: chapter 02, exercise 2. Departures: none.
    Test: test_exercises_cam.py::test_cam_checks
    """
    if no_number(answer):
        return False
    if answer <= 1:
        return wrong("the predicted box is the larger one, so the ratio is above 1")
    iou = 1 / answer**2
    if abs(iou - 0.5) < 0.005:
        return right(
            "the areas may differ by a factor of two, the sides by its square root"
        )
    if abs(answer - 2) < 1e-6:
        return wrong("that is the ratio of the areas; the question is about the sides")
    towards = "falls to 0.5 for a larger" if iou > 0.5 else "rises to 0.5 for a smaller"
    return wrong(
        f"with sides {answer:g} times as long the IoU is {iou:.3f}; it {towards} ratio"
    )


def map_function(answer: Any) -> bool:
    """Check the reader's `f(features, weight, targets)`, Eq. 2 for a batch.

    Source: chapter 02, exercise 3. Departures: none.
    Test: test_exercises_cam.py::test_cam_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    features, weight = (
        torch.randn(shape, generator=generator) for shape in ((3, 5, 4, 6), (7, 5))
    )
    targets = torch.tensor([6, 0, 2])
    expected = class_activation_map(features, weight, targets)
    got = like(answer(features.clone(), weight.clone(), targets), expected)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        received = shape_of(got)
        return wrong(
            f"for features (3, 5, 4, 6) and 7 classes f returned {received};"
            " expected one map (4, 6) per image"
        )
    if torch.allclose(got, expected, atol=1e-5):
        return right("the row of the class, times the channels, summed over channels")
    if torch.allclose(got, expected.clamp_min(0), atol=1e-5):
        return wrong(
            "a CAM is signed: keep the positions that decrease the class score"
        )
    if torch.allclose(got, expected / 24, atol=1e-5):
        return wrong("Eq. 2 has no 1/Z; it belongs to the pooling")
    if torch.allclose(got[:1], expected[:1], atol=1e-5):
        return wrong(
            "the first image is right: every image needs the row of its own class"
        )
    if same_but_scaled(got, expected):
        return wrong(
            "right but for its scale: a sum over the channels, no mean,"
            " and not scaled to 0…1"
        )
    return wrong(
        "each image has a class: pick that class's row of weights,"
        " and sum over the channels only"
    )


def box_function(answer: Any) -> bool:
    """Check `f(map)`: the smallest box around all positions above 20 % of the maximum.

    Source: chapter 02, exercise 4.
    Departures: the paper selects the largest region, the exercise all positions.
    Test: test_exercises_cam.py::test_cam_checks
    """
    if no_function(answer):
        return False
    values = torch.full((8, 10), -1.0)
    values[2:5, 3:9] = (
        3.0  # 3 is above 20 % of 10, and below the middle of the range from -1 to 10
    )
    values[3, 4:8] = 10.0
    values[0, 2] = 2.5  # above 20 %, and away from the rest
    values[5, 3] = 2.0  # exactly 20 %: not above it
    values[0, 0] = 1.5
    values[7] = -20.0  # larger than the maximum, but for its sign
    got = answer(values.clone())
    try:
        got = tuple(int(side) for side in got)
    except (TypeError, ValueError):
        return wrong(
            f"f returned a {type(got).__name__}; expected four numbers:"
            " top, left, bottom, right"
        )
    hints = {
        (0, 2, 4, 8): (
            "right and bottom are one past the last position (half-open),"
            " so that bottom - top is the height"
        ),
        (2, 0, 9, 5): (
            "rows and columns are exchanged:"
            " a map is indexed [row, column], and the top is first"
        ),
        (0, 5, 2, 9): (
            "the four numbers are right, but not their order: top, left, bottom, right"
        ),
        (0, 2, 5, 7): "bottom and right are asked for, not height and width",
        (0, 2, 6, 9): "a position at exactly 20 % is not above 20 %",
        (0, 0, 7, 10): (
            "20 % of the way from the minimum to the maximum is another rule;"
            " use 20 % of the maximum"
        ),
        (0, 0, 6, 9): "0.2 is not 20 % of the maximum: this map's maximum is 10",
        (2, 3, 5, 9): (
            "all positions above the threshold, not only the largest region"
        ),
        (3, 4, 4, 8): "your threshold is too high: 3 is more than 20 % of 10",
    }
    if got == (0, 2, 5, 9):
        if tuple(int(side) for side in answer(values.flip(0))) != (3, 2, 8, 9):
            return wrong(
                "right on one map, but not on the same map upside down:"
                " compute the box from the map"
            )
        return right("rows 0 to 4 and columns 2 to 8, half-open")
    if len(got) != 4:
        return wrong(
            f"f returned {len(got)} numbers; expected four: top, left, bottom, right"
        )
    return wrong(
        hints.get(
            got, "find the first and the last row, and column, of map > 0.2 * map.max()"
        )
    )


def parameters_saved(answer: Any) -> bool:
    """Check the percentage of parameters that GAP saves in VGG-16.

    Source: chapter 02, exercise 5; arXiv:1512.04150, Sec. 3.1. Departures: none.
    Test: test_exercises_cam.py::test_cam_checks
    """
    if no_number(answer):
        return False
    from torchvision import models

    with torch.device("meta"):
        vgg = models.vgg16()
        added = nn.ModuleList(
            [nn.Conv2d(512, 1024, 3, padding=1), nn.Linear(1024, 1000)]
        )
    total, features, new = (
        sum(p.numel() for p in part.parameters()) for part in (vgg, vgg.features, added)
    )
    exact, without = 100 * (1 - (features + new) / total), 100 * (1 - features / total)
    if abs(answer - exact) < 0.5:
        return right(
            "the new convolution and the new linear layer count as well;"
            " the paper's 90 % leaves them out"
        )
    if abs(answer - without) < 0.5:
        return wrong("that omits the added layers: a 3×3 convolution and a linear one")
    if abs(answer - (100 - exact)) < 0.5 or abs(answer * 100 - exact) < 0.5:
        return wrong("the answer is the saving, in percent of the parameters of VGG-16")
    return wrong(
        "keep vgg.features,"
        " add a 3×3 convolution to 1,024 channels and a linear layer to 1,000"
    )


def gap_network(answer: Any) -> bool:
    """Check the reader's `f(features, channels, classes)`: a network that CAM accepts.

    Source: chapter 02, exercise 6; arXiv:1512.04150, Sec. 3.1. Departures: none.
    Test: test_exercises_cam.py::test_cam_checks
    """
    if no_function(answer):
        return False
    if isinstance(answer, nn.Module):
        return wrong(
            "received a network; expected the function that builds it:"
            " pass its name, without calling it"
        )
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        network, images = answer(features, 12, 5), torch.randn(2, 3, 16, 12)
        if not isinstance(network, nn.Module):
            return wrong(
                f"f returned a {type(network).__name__};"
                " expected a network, for example an nn.Sequential"
            )
        result = cam(network, images)
    except (ValueError, RuntimeError) as error:
        return wrong(f"cam raises an error for it: {error}")
    finally:
        torch.set_rng_state(torch_state)
    if result.logits.shape != (2, 5):
        return wrong(
            f"the network returns {tuple(result.logits.shape)};"
            " expected a score for each of 5 classes"
        )
    if not any(
        parameter is parameter_of_features
        for parameter in network.parameters()
        for parameter_of_features in features.parameters()
    ):
        return wrong("the network does not contain the given features")
    convolutions = [
        m
        for m in network.modules()
        if isinstance(m, nn.Conv2d) and m not in list(features.modules())
    ]
    if not any(
        m.in_channels == 12 and m.out_channels == 1024 and m.kernel_size == (3, 3)
        for m in convolutions
    ):
        return wrong(
            "the paper adds a 3×3 convolution with 1,024 channels before the pooling"
        )
    if result.maps.shape != (2, 8, 6):
        received = tuple(result.maps.shape[1:])
        return wrong(
            f"the map is {received} for features of (8, 6):"
            " pad the convolution by one, and keep its stride at 1"
        )
    return right("cam finds the pooled features and the linear layer by itself")
