"""Checks for the exercises of chapter 03, Grad-CAM, in their order."""

from typing import Any

import torch
from torch import Tensor, nn

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
    same_but_scaled,
)
from paperlib.gradcam import grad_cam, grad_cam_map

GRADIENT = ((-2.0, 3.0, -1.0), (6.0, -3.0, 1.0), (2.0, -1.0, 3.0))  # of the 3×3 example
# the input of the ReLU there
FORWARD = ((1.0, -1.0, 5.0), (2.0, -5.0, -7.0), (-3.0, 2.0, 4.0))


@expects(number)
def channel_weight(answer: Any) -> bool:
    """Check the weight of a channel with the gradient of the 3×3 example."""
    gradient = torch.tensor(GRADIENT)
    total, exact = gradient.sum().item(), gradient.sum().item() / 9
    positive = gradient.clamp_min(0).sum().item()
    relu_hint = (
        "no ReLU here: it is applied at the end, to the map,"
        " and negative gradients count"
    )
    return judge_number(
        answer,
        exact,
        "the average over all nine positions, negative ones included",
        (
            (total, "that is the sum; Eq. 1 divides it by the number of positions"),
            (positive, relu_hint),
            (positive / 9, relu_hint),
            (
                gradient.max().item(),
                "that is the maximum; Grad-CAM pools gradients by their average",
            ),
            (
                lambda weight: abs(weight - exact) < 0.05,
                "nearly: three digits are expected, or the fraction",
            ),
        ),
        "add up the nine gradients, with their signs, and divide by their number",
        tolerance=0.005,
    )


@expects(number)
def largest_value(answer: Any) -> bool:
    """Check Grad-CAM's largest value where CAM's is 24.5, for 7×7 positions."""
    return judge_number(
        answer,
        24.5 / 49,
        "CAM's map over the number of positions;"
        " a positive value passes the ReLU, and the bias is in neither",
        (
            (
                24.5,
                "the shapes are equal, the units are not:"
                " the average in the network divides every gradient",
            ),
            (24.5 / 7, "the map has two sides: count its positions"),
            (24.5 * 49, "the other way round: Z times Grad-CAM's map is CAM's"),
        ),
        "follow the derivation: which number stands between the two maps?",
    )


@expects(four_numbers)
def guided_relu6(answer: Any) -> bool:
    """Check guided backpropagation through a ReLU6.

    The inputs are -1, 2, 3, 7, the gradients 4, -5, 6, 8.
    """
    return judge(
        answer,
        answer.__eq__,
        (0, 0, 6, 0),
        "only the third has an input between 0 and 6 and a positive gradient",
        (
            (
                (0, 0, 6, 8),
                "that is the rule for a ReLU; a ReLU6 is flat above 6 as well,"
                " so no gradient passes there",
            ),
            (
                (0, -5, 6, 0),
                "that is the plain gradient;"
                " the guided one drops negative gradients, too",
            ),
            (
                (0, -5, 6, 8),
                "the plain gradient of a ReLU:"
                " look at the 7, and at the sign of the second gradient",
            ),
            (
                (4, 0, 6, 8),
                "that is the deconvnet's rule, which does not look at the inputs",
            ),
        ),
        "a gradient passes unchanged or becomes 0;"
        " ask two questions of each of the four",
    )


@expects(function)
def map_function(answer: Any) -> bool:
    """Check the reader's `f(activations, gradients)`, Eq. 1 and 2 for a batch."""
    activations, gradients = random_tensors((3, 5, 4, 6), (3, 5, 4, 6))
    weights = gradients.mean((2, 3))
    expected, signed = (
        grad_cam_map(weights, activations, relu=relu) for relu in (True, False)
    )
    scale_hint = (
        "right but for its scale: a sum over the channels, no mean,"
        " and not scaled to 0…1"
    )
    return judge_tensor(
        answer(activations.clone(), gradients.clone()),
        expected,
        "for activations (3, 5, 4, 6); expected one map (4, 6) per image",
        "one weight per channel, the weighted sum of the channels, and the ReLU last",
        (
            (signed, "the ReLU of Eq. 2 is missing"),
            (
                signed.abs(),
                "what is negative before the ReLU is 0 after it, not positive",
            ),
            (24 * expected, "the weights are sums; Eq. 1 has the average"),
            (
                (gradients * activations).sum(1).clamp_min(0),
                "you multiplied position by position; Grad-CAM first averages"
                " each channel's gradient over its positions",
            ),
            (
                (weights[:, :, None, None] * activations).clamp_min(0).sum(1),
                "the ReLU is applied after the sum over the channels, not before it",
            ),
            (
                grad_cam_map(gradients.clamp_min(0).mean((2, 3)), activations),
                "negative gradients count: no ReLU in Eq. 1",
            ),
            (
                grad_cam_map(gradients.mean((0, 2, 3)).expand(3, -1), activations),
                "every image has its own weights: do not average over the batch",
            ),
            (
                grad_cam_map(weights.clamp_min(0), activations),
                "a channel may have a negative weight: the only ReLU is at the end",
            ),
            (
                grad_cam_map(activations.mean((2, 3)), gradients),
                "the two are exchanged:"
                " the gradients become weights of the activations",
            ),
            (same_but_scaled(expected), scale_hint),
            (same_but_scaled(signed), scale_hint),
        ),
        "weights (3, 5): the gradients' average over the two spatial axes;"
        " then sum weights × channels",
    )


@expects(function)
def contrast_score(answer: Any) -> bool:
    """Check the reader's `score(logits)`: why class 2 rather than class 0."""
    network, images, is_preferred = _network_and_images()

    def compute_maps(score: Any) -> Tensor:
        return grad_cam(network, images, "0", score, relu=False).maps

    with errors_rejected("grad_cam raises an error for it"):
        got = compute_maps(answer)
    expected = compute_maps(lambda logits: logits[:, 2] - logits[:, 0])
    return judge_tensor(
        got,
        expected,
        "",
        "the difference of two scores is a score;"
        " its map is the difference of the two maps",
        (
            (
                -expected,
                "that explains class 0 rather than class 2: the sign is wrong",
            ),
            (
                compute_maps(2),
                "that is class 2 alone;"
                " what class 0 has as well is no reason to prefer class 2",
            ),
            (
                compute_maps(lambda logits: logits.softmax(1)[:, 2]),
                "a probability compares class 2 with all classes;"
                " the question names one",
            ),
            (
                compute_maps(
                    lambda logits: logits.softmax(1)[:, 2] - logits.softmax(1)[:, 0]
                ),
                "use the scores themselves:"
                " the softmax depends on the other classes as well",
            ),
            (
                lambda maps: torch.allclose(
                    maps[is_preferred], expected[is_preferred], atol=1e-6
                ),
                "right where class 2 has the higher score;"
                " otherwise the number should be negative and count as well",
            ),
        ),
        "when is class 2 preferred to class 0? When this number is positive: which?",
        tolerance=1e-6,
    )


def _network_and_images() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network, images, and for which of them it prefers class 2 to class 0."""
    # The state of the reader's generator does not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )
    (images,) = random_tensors((3, 3, 8, 8))
    # Class 2 has the higher score in some images, but not in all.
    with torch.no_grad():
        logits = network(images)
        difference = logits[:, 2] - logits[:, 0]
        network[-1].bias[2] -= difference.mean()
    return network, images, difference > difference.mean()


@expects(function)
def deconvnet_relu(answer: Any) -> bool:
    """Check the reader's `f(x)`: forward a ReLU, backward the deconvnet's rule."""
    require(
        not isinstance(answer, type),
        "received a class; expected a function:"
        " a torch.autograd.Function is called through its .apply",
    )
    x, above = torch.tensor(FORWARD, requires_grad=True), torch.tensor(GRADIENT)
    with errors_rejected("it does not run forward and backward"):
        output = answer(x)
        require(
            isinstance(output, Tensor) and torch.equal(output, x.relu()),
            "forward it is an ordinary ReLU: max(x, 0)",
        )
        (got,) = torch.autograd.grad(output, x, above)
    return judge(
        got,
        got.equal,
        above.clamp_min(0),
        "the backward pass applies a ReLU to the gradient and ignores the input",
        (
            (
                above * (x > 0),
                "that is the plain gradient, which depends on the input;"
                " the deconvnet's rule depends on the gradient's sign",
            ),
            (
                above.clamp_min(0) * (x > 0),
                "that is guided backpropagation, which has both conditions;"
                " the deconvnet has one",
            ),
            (above, "everything passes: the deconvnet drops negative gradients"),
        ),
        "backward, each gradient passes unchanged or not at all,"
        " and only its own sign decides",
    )
