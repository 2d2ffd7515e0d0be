"""Checks for the exercises of chapter 03, Grad-CAM."""

from typing import Any

import torch
from torch import Tensor, nn

from paperlib.exercises.verdict import (
    like,
    no_function,
    no_number,
    right,
    same_but_scaled,
    shape_of,
    unanswered,
    wrong,
)
from paperlib.gradcam import grad_cam, grad_cam_map

GRADIENT = ((-2.0, 3.0, -1.0), (6.0, -3.0, 1.0), (2.0, -1.0, 3.0))  # of the 3×3 example
# the input of the ReLU there
FORWARD = ((1.0, -1.0, 5.0), (2.0, -5.0, -7.0), (-3.0, 2.0, 4.0))


def channel_weight(answer: Any) -> bool:
    """Check the weight of a channel with the gradient of the 3×3 example.

    Source: chapter 03, exercise 1. Departures: none.
    Test: test_exercises_gradcam.py::test_gradcam_checks
    """
    if no_number(answer):
        return False
    values = [value for row in GRADIENT for value in row]
    exact, positive = sum(values) / 9, sum(max(value, 0) for value in values)
    if abs(answer - exact) < 0.005:
        return right("the average over all nine positions, negative ones included")
    if abs(answer - sum(values)) < 0.005:
        return wrong("that is the sum; Eq. 1 divides it by the number of positions")
    if min(abs(answer - positive), abs(answer - positive / 9)) < 0.005:
        return wrong(
            "no ReLU here: it is applied at the end, to the map,"
            " and negative gradients count"
        )
    if abs(answer - max(values)) < 0.005:
        return wrong("that is the maximum; Grad-CAM pools gradients by their average")
    if abs(answer - exact) < 0.05:
        return wrong("nearly: three digits are expected, or the fraction")
    return wrong(
        "add up the nine gradients, with their signs, and divide by their number"
    )


def largest_value(answer: Any) -> bool:
    """Check Grad-CAM's largest value where CAM's is 24.5, for 7×7 positions.

    Source: chapter 03, exercise 2. Departures: none.
    Test: test_exercises_gradcam.py::test_gradcam_checks
    """
    if no_number(answer):
        return False
    if abs(answer - 0.5) < 1e-6:
        return right(
            "CAM's map over the number of positions;"
            " a positive value passes the ReLU, and the bias is in neither"
        )
    if abs(answer - 24.5) < 1e-6:
        return wrong(
            "the shapes are equal, the units are not:"
            " the average in the network divides every gradient"
        )
    if abs(answer - 3.5) < 1e-6:
        return wrong("the map has two sides: count its positions")
    if abs(answer - 24.5 * 49) < 1e-6:
        return wrong("the other way round: Z times Grad-CAM's map is CAM's")
    return wrong("follow the derivation: which number stands between the two maps?")


def guided_relu6(answer: Any) -> bool:
    """Check guided backpropagation through a ReLU6.

    The inputs are -1, 2, 3, 7, the gradients 4, -5, 6, 8.

    Source: chapter 03, exercise 3. Departures: none.
    Test: test_exercises_gradcam.py::test_gradcam_checks
    """
    if unanswered(answer):
        return False
    try:
        got = tuple(float(value) for value in answer)
    except (TypeError, ValueError):
        return wrong(
            f"received an answer of type {type(answer).__name__};"
            " expected four numbers, for example [1, 2, 3, 4]"
        )
    if len(got) != 4:
        return wrong(f"received {len(got)} numbers; expected four, one per input")
    hints = {
        (0, 0, 6, 8): (
            "that is the rule for a ReLU; a ReLU6 is flat above 6 as well,"
            " so no gradient passes there"
        ),
        (0, -5, 6, 0): (
            "that is the plain gradient; the guided one drops negative gradients, too"
        ),
        (0, -5, 6, 8): (
            "the plain gradient of a ReLU:"
            " look at the 7, and at the sign of the second gradient"
        ),
        (4, 0, 6, 8): "that is the deconvnet's rule, which does not look at the inputs",
    }
    if got == (0, 0, 6, 0):
        return right(
            "only the third has an input between 0 and 6 and a positive gradient"
        )
    return wrong(
        hints.get(
            got,
            "a gradient passes unchanged or becomes 0;"
            " ask two questions of each of the four",
        )
    )


def map_function(answer: Any) -> bool:
    """Check the reader's `f(activations, gradients)`, Eq. 1 and 2 for a batch.

    Source: chapter 03, exercise 4. Departures: none.
    Test: test_exercises_gradcam.py::test_gradcam_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    activations, gradients = (
        torch.randn(3, 5, 4, 6, generator=generator) for _ in range(2)
    )
    weights = gradients.mean((2, 3))
    expected = grad_cam_map(weights, activations)
    got = like(answer(activations.clone(), gradients.clone()), expected)
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        received = shape_of(got)
        return wrong(
            f"for activations (3, 5, 4, 6) f returned {received};"
            " expected one map (4, 6) per image"
        )

    def equals(other):
        return torch.allclose(got, other, atol=1e-5)

    if equals(expected):
        return right(
            "one weight per channel, the weighted sum of the channels,"
            " and the ReLU last"
        )
    signed = grad_cam_map(weights, activations, relu=False)
    if equals(signed):
        return wrong("the ReLU of Eq. 2 is missing")
    if equals(signed.abs()):
        return wrong("what is negative before the ReLU is 0 after it, not positive")
    if equals(24 * expected):
        return wrong("the weights are sums; Eq. 1 has the average")
    if equals((gradients * activations).sum(1).clamp_min(0)):
        return wrong(
            "you multiplied position by position;"
            " Grad-CAM first averages each channel's gradient over its positions"
        )
    if equals((weights[:, :, None, None] * activations).clamp_min(0).sum(1)):
        return wrong(
            "the ReLU is applied after the sum over the channels, not before it"
        )
    if equals(grad_cam_map(gradients.clamp_min(0).mean((2, 3)), activations)):
        return wrong("negative gradients count: no ReLU in Eq. 1")
    if equals(grad_cam_map(gradients.mean((0, 2, 3)).expand(3, -1), activations)):
        return wrong("every image has its own weights: do not average over the batch")
    if equals(grad_cam_map(weights.clamp_min(0), activations)):
        return wrong(
            "a channel may have a negative weight: the only ReLU is at the end"
        )
    if equals(grad_cam_map(activations.mean((2, 3)), gradients)):
        return wrong(
            "the two are exchanged: the gradients become weights of the activations"
        )
    if same_but_scaled(got, expected) or same_but_scaled(got, signed):
        return wrong(
            "right but for its scale: a sum over the channels, no mean,"
            " and not scaled to 0…1"
        )
    return wrong(
        "weights (3, 5): the gradients' average over the two spatial axes;"
        " then sum weights × channels"
    )


def contrast_score(answer: Any) -> bool:
    """Check the reader's `score(logits)`: why class 2 rather than class 0.

    Source: chapter 03, exercise 5. Departures: none.
    Test: test_exercises_gradcam.py::test_gradcam_checks
    """
    if no_function(answer):
        return False
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )
        images = torch.randn(3, 3, 8, 8, generator=generator)
        # Class 2 has the higher score in some images, but not in all.
        with torch.no_grad():
            logits = network(images)
            network[-1].bias[2] -= (logits[:, 2] - logits[:, 0]).mean()
            logits = network(images)
        is_preferred = logits[:, 2] > logits[:, 0]

        def compute_maps(score):
            return grad_cam(network, images, "0", score, relu=False).maps

        expected = compute_maps(lambda logits: logits[:, 2] - logits[:, 0])
        got = compute_maps(answer)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return wrong(f"grad_cam raises an error for it: {error}")
    finally:
        torch.set_rng_state(state)
    if torch.allclose(got, expected, atol=1e-6):
        return right(
            "the difference of two scores is a score;"
            " its map is the difference of the two maps"
        )
    if torch.allclose(got, -expected, atol=1e-6):
        return wrong("that explains class 0 rather than class 2: the sign is wrong")
    if torch.allclose(got, compute_maps(2), atol=1e-6):
        return wrong(
            "that is class 2 alone;"
            " what class 0 has as well is no reason to prefer class 2"
        )
    if torch.allclose(
        got, compute_maps(lambda logits: logits.softmax(1)[:, 2]), atol=1e-6
    ):
        return wrong(
            "a probability compares class 2 with all classes; the question names one"
        )
    if torch.allclose(
        got,
        compute_maps(lambda logits: logits.softmax(1)[:, 2] - logits.softmax(1)[:, 0]),
        atol=1e-6,
    ):
        return wrong(
            "use the scores themselves:"
            " the softmax depends on the other classes as well"
        )
    if torch.allclose(got[is_preferred], expected[is_preferred], atol=1e-6):
        return wrong(
            "right where class 2 has the higher score;"
            " otherwise the number should be negative and count as well"
        )
    return wrong(
        "when is class 2 preferred to class 0? When this number is positive: which?"
    )


def deconvnet_relu(answer: Any) -> bool:
    """Check the reader's `f(x)`: forward a ReLU, backward the deconvnet's rule.

    Source: chapter 03, exercise 6; Zeiler and Fergus, arXiv:1311.2901.
    Departures: none.
    Test: test_exercises_gradcam.py::test_gradcam_checks
    """
    if no_function(answer):
        return False
    if isinstance(answer, type):
        return wrong(
            "received a class; expected a function:"
            " a torch.autograd.Function is called through its .apply"
        )
    x, above = torch.tensor(FORWARD, requires_grad=True), torch.tensor(GRADIENT)
    try:
        output = answer(x)
        if not isinstance(output, Tensor) or not torch.equal(output, x.relu()):
            return wrong("forward it is an ordinary ReLU: max(x, 0)")
        (got,) = torch.autograd.grad(output, x, above)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return wrong(f"it does not run forward and backward: {error}")
    if torch.equal(got, above.clamp_min(0)):
        return right(
            "the backward pass applies a ReLU to the gradient and ignores the input"
        )
    if torch.equal(got, above * (x > 0)):
        return wrong(
            "that is the plain gradient, which depends on the input;"
            " the deconvnet's rule depends on the gradient's sign"
        )
    if torch.equal(got, above.clamp_min(0) * (x > 0)):
        return wrong(
            "that is guided backpropagation, which has both conditions;"
            " the deconvnet has one"
        )
    if torch.equal(got, above):
        return wrong("everything passes: the deconvnet drops negative gradients")
    return wrong(
        "backward, each gradient passes unchanged or not at all,"
        " and only its own sign decides"
    )
