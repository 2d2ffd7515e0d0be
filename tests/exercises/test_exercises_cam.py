import numpy as np
import pytest
import torch
from exercise_checks import (
    assert_check,
    assert_every_check_is_tested,
    assert_random_numbers_stay,
)
from scipy import ndimage
from torch import nn

from paperlib.anomaly_map import minmax
from paperlib.cam import bounding_boxes


def loops(features, weight, targets):
    n, c, h, w = features.shape
    out = torch.zeros(n, h, w)
    for i in range(n):
        for k in range(c):
            out[i] += weight[targets[i], k] * features[i, k]
    return out


def box(threshold, end=1, strict=True, scaled=False, turned=False):
    def f(one):
        limit = (
            one.min() + threshold * (one.max() - one.min())
            if scaled
            else threshold * one.max()
        )
        rows, columns = torch.nonzero(
            one > limit if strict else one >= limit, as_tuple=True
        )
        sides = [rows.min(), columns.min(), rows.max() + end, columns.max() + end]
        return [sides[i] for i in (1, 0, 3, 2)] if turned else sides

    return f


def box_by_regions(one):
    above = (one / one.max()).numpy() > 0.2
    (window,) = ndimage.find_objects(above.astype(int))
    return [window[0].start, window[1].start, window[0].stop, window[1].stop]


def box_with(order):
    return lambda one: [box(0.20)(one)[i] for i in order]


def gap(hidden=1024, kernel=3, padding=1, stride=1, extra=(), pool=True):
    def f(features, channels, classes):
        middle = nn.Conv2d(channels, hidden, kernel, stride, padding)
        end = (
            [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *extra]
            if pool
            else [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        )
        return nn.Sequential(features, middle, *end, nn.Linear(hidden, classes))

    return f


def gap_as_a_class(features, channels, classes):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features
            self.added = nn.Conv2d(channels, 1024, 3, padding="same")
            self.scores = nn.Linear(1024, classes, bias=False)

        def forward(self, x):
            return self.scores(self.added(self.features(x)).relu().mean((2, 3)))

    return Network()


def other_features(features, channels, classes):
    return gap()(
        nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.MaxPool2d(2)),
        channels,
        classes,
    )


# check → right answers, and wrong ones with a word of the hint they must get
CASES = {
    "sum_of_the_map": (
        [588, 588.0],
        {
            12: "the paper's sum",
            612.5: "subtract it first",
            637: "do not add it",
            84: "two sides",
            5: "solve it",
        },
    ),
    "side_ratio": (
        [2**0.5, 1.414, 1.41],
        {2: "areas", 0.7: "above 1", 1.2: "larger ratio", 1.8: "smaller ratio"},
    ),
    "map_function": (
        [
            loops,
            lambda f, w, t: torch.einsum("nchw,nc->nhw", f, w[t]),
            lambda f, w, t: loops(f.double(), w.double(), t).double(),
            lambda f, w, t: np.einsum("nchw,nc->nhw", f.numpy(), w.numpy()[t.numpy()]),
        ],
        {
            (lambda f, w, t: loops(f, w, t).clamp_min(0)): "signed",
            (lambda f, w, t: loops(f, w, t) / 24): "1/Z",
            (lambda f, w, t: minmax(loops(f, w, t))): "its scale",
            (lambda f, w, t: loops(f, w, t) / 5): "no mean",
            (lambda f, w, t: loops(f, w, t[:1].expand(3))): "own class",
            (lambda f, w, t: loops(f, w, t * 0 + 1)): "row of weights",
            (lambda f, w, t: f.sum((2, 3)) @ w.T): "(3, 7)",
            (lambda f, w, t: 3): "int",
            (lambda f, w, t: None): "is there a return",
        },
    ),
    "box_function": (
        [box(0.20), box_by_regions],
        {
            box(0.20, end=0): "half-open",
            box(0.20, turned=True): "exchanged",
            box(0.20, strict=False): "not above 20 %",
            box(0.20, scaled=True): "another rule",
            box(0.60): "too high",
            (lambda one: box(0.20)(one.abs())): "first and the last row",
            (lambda one: box(0.20 * one.abs().max() / one.max())(one)): "too high",
            (lambda one: box(0.20 / one.max())(one)): "maximum is 10",
            (lambda one: bounding_boxes(one, 0.20, largest=True)[0]): "largest region",
            (lambda one: [*box(0.20)(one)[:2], 5, 7]): "not height and width",
            box_with((0, 2, 1, 3)): "their order",
            (lambda one: (0, 2, 5, 9)): "upside down",
            (lambda one: (0, 0, 8, 10)): "first and the last row",
            (lambda one: (2, 3)): "2 numbers",
            (lambda one: None): "NoneType",
        },
    ),
    "parameters_saved": (
        [85.2, 85.21],
        {
            89.4: "omits the added layers",
            14.8: "the answer is the saving",
            0.852: "the answer is the saving",
            50: "vgg.features",
        },
    ),
    "gap_network": (
        [gap(), gap_as_a_class],
        {
            gap(pool=False): "cam raises an error",
            gap(
                extra=(nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
            ): "cam raises an error",
            gap(hidden=512): "1,024 channels",
            gap(kernel=1, padding=0): "3×3",
            gap(padding=0): "pad the convolution",
            gap(stride=2): "its stride",
            gap_as_a_class(nn.Identity(), 3, 2): "the function that builds it",
            other_features: "does not contain the given features",
            (lambda f, c, k: gap()(f, c, k + 1)): "each of 5 classes",
            (lambda f, c, k: 3): "int",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cam_checks(name, capsys):
    assert_check("cam", name, CASES[name], capsys)


def test_every_check_is_tested():
    assert_every_check_is_tested("cam", CASES)


def test_checks_leave_the_random_numbers_as_they_were():
    assert_random_numbers_stay("cam", CASES)
