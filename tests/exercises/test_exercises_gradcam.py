import numpy as np
import pytest
import torch
from exercise_checks import (
    assert_check,
    assert_every_check_is_tested,
    assert_random_numbers_stay,
)

from paperlib.anomaly_map import minmax
from paperlib.exercises import gradcam


def maps(
    pool=(2, 3), scale=1.0, relu="last", weigh=True, batch=False, gradient_relu=False
):
    def f(activations, gradients):
        if gradient_relu:
            gradients = gradients.clamp_min(0)
        weights = (
            scale * gradients.mean((0, 2, 3) if batch else pool, keepdim=True)
            if weigh
            else gradients
        )
        products = weights * activations
        if relu == "first":
            return products.clamp_min(0).sum(1)
        return products.sum(1).clamp_min(0) if relu else products.sum(1)

    return f


def rule(backward, forward=torch.relu):
    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(context, gradient):
            return backward(context.saved_tensors[0], gradient)

    return Rule.apply


class Deconvnet(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.relu()

    @staticmethod
    def backward(context, gradient):
        return gradient.relu()


def relu_with_a_hook(x):
    """The identity backward, and a hook on the way."""
    y = x + (x.relu() - x).detach()
    y.register_hook(torch.relu)
    return y


# check → right answers, and wrong ones with a word of the hint they must get
CASES = {
    "channel_weight": (
        [8 / 9, 0.889, 0.89],
        {
            8: "that is the sum",
            15: "no ReLU here",
            15 / 9: "no ReLU here",
            6: "maximum",
            22: "with their sign",
            22 / 9: "with their sign",
            0.9: "three digits",
            0.5: "their number",
        },
    ),
    "largest_value": (
        [0.5],
        {
            24.5: "units",
            3.5: "two sides",
            24.5 * 49: "other way round",
            0.51: "nearly",
            1: "follow the derivation",
        },
    ),
    "guided_relu6": (
        [[0, 0, 6, 0], (0.0, 0.0, 6.0, 0.0)],
        {
            (0, 0, 6, 8): "flat above 6",
            (0, -5, 6, 0): "plain gradient",
            (0, -5, 6, 8): "plain gradient of a ReLU",
            (4, 0, 6, 8): "deconvnet",
            (4, 0, 6, 0): "the first input is negative",
            (0, 5, 6, 0): "does not change its sign",
            (0, 0, 3, 0): "that is the input",
            (0, 0, 1, 0): "the mask",
            (1, 1, 1, 1): "two questions",
            (0, 0, 6): "3 numbers",
            6: "int",
        },
    ),
    "map_function": (
        [
            maps(),
            lambda a, g: torch.einsum("nc,nchw->nhw", g.mean((2, 3)), a).relu(),
            lambda a, g: maps()(a.double(), g),
            lambda a, g: np.maximum(
                (g.numpy().mean((2, 3), keepdims=True) * a.numpy()).sum(1), 0
            ),
        ],
        {
            maps(relu=None): "ReLU of Eq. 2",
            maps(scale=24): "has the average",
            maps(weigh=False): "position by position",
            maps(relu="first"): "after the sum",
            maps(gradient_relu=True): "negative gradients count",
            maps(batch=True): "own weights",
            maps(pool=1): "two spatial axes",
            maps(scale=0.2): "no mean",
            (lambda a, g: minmax(maps()(a, g))): "0…1",
            (lambda a, g: minmax(maps(relu=None)(a, g))): "0…1",
            (lambda a, g: maps(relu=None)(a, g).abs()): "not positive",
            (
                lambda a, g: maps()(a, g.mean((2, 3), keepdim=True).relu())
            ): "negative weight",
            (lambda a, g: maps()(g, a)): "are exchanged",
            (lambda a, g: maps()(a, g.abs())): "no absolute value in Eq. 1",
            (
                lambda a, g: maps()(a, g.mean((2, 3), keepdim=True).abs())
            ): "no absolute value in Eq. 2",
            (lambda a, g: None): "is there a return",
            (lambda a, g: a): "(3, 5, 4, 6)",
            (lambda a, g: 3): "int",
        },
    ),
    "contrast_score": (
        [
            lambda logits: logits[:, 2] - logits[:, 0],
            lambda y: y[:, [0, 2]] @ y.new_tensor([-1.0, 1]),
        ],
        {
            (lambda logits: logits[:, 0] - logits[:, 2]): "the sign is wrong",
            (lambda logits: logits[:, 2]): "class 2 alone",
            (lambda logits: logits.softmax(1)[:, 2]): "a probability",
            (
                lambda logits: logits.softmax(1)[:, 2] - logits.softmax(1)[:, 0]
            ): "depends on the other",
            (
                lambda logits: (logits[:, 2] - logits[:, 0]).abs()
            ): "class 2 has the higher score",
            (
                lambda logits: (logits[:, 2] - logits[:, 0]).relu()
            ): "class 2 has the higher score",
            (lambda logits: logits[:, 1]): "when is class 2 preferred",
            (
                lambda logits: (logits[:, 2] - logits[:, 0]).sum()
            ): "grad_cam raises an error",
            (lambda logits: logits[:, 9]): "grad_cam raises an error",
            2.0: "expected a function",
        },
    ),
    "deconvnet_relu": (
        [rule(lambda x, g: g.clamp_min(0)), relu_with_a_hook],
        {
            torch.relu: "plain gradient",
            rule(lambda x, g: g.clamp_min(0) * (x > 0)): "both conditions",
            rule(lambda x, g: g): "everything passes",
            rule(lambda x, g: g.clamp_min(0), forward=torch.abs): "ordinary ReLU",
            rule(lambda x, g: (g > 0).float()): "unchanged or not at all",
            Deconvnet: "its .apply",
            (lambda x: x.detach().relu()): "forward and backward",
            (lambda x: None): "ordinary ReLU",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcam_checks(name, capsys):
    assert_check("gradcam", name, CASES[name], capsys)


def test_every_check_is_tested():
    assert_every_check_is_tested("gradcam", CASES)


def test_checks_leave_the_random_numbers_as_they_were():
    assert_random_numbers_stay("gradcam", CASES)


def test_the_numbers_by_hand_are_those_of_the_chapter():
    """Three rules on the example's numbers, written out."""
    x, above = torch.tensor(gradcam.FORWARD), torch.tensor(gradcam.GRADIENT)
    assert (above * (x > 0)).tolist() == [[-2, 0, -1], [6, 0, 0], [0, -1, 3]]
    assert above.clamp_min(0).tolist() == [[0, 3, 0], [6, 0, 1], [2, 0, 3]]
    assert (above.clamp_min(0) * (x > 0)).tolist() == [[0, 0, 0], [6, 0, 0], [0, 0, 3]]
