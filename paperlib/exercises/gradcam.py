"""Checks for the exercises of chapter 03, Grad-CAM, in their order."""

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

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
    same_but_scaled,
)
from paperlib.gradcam import grad_cam, grad_cam_map

GRADIENT = ((-2.0, 3.0, -1.0), (6.0, -3.0, 1.0), (2.0, -1.0, 3.0))  # of the 3×3 example
# the input of the ReLU there
FORWARD = ((1.0, -1.0, 5.0), (2.0, -5.0, -7.0), (-3.0, 2.0, 4.0))


def numbers(seed: int | None = None) -> dict[str, SimpleNamespace]:
    """Return what the exercises give: the book's numbers, or those of a seed."""
    guided = select(
        seed,
        {
            # Of a negative input, a negative gradient, one that passes, and an input
            # above 6. The one that passes is at each of the four places.
            "order": ((0, 1, 2, 3), (2, 3, 1, 0), (1, 2, 0, 3), (3, 0, 1, 2)),
            "passing": (6, 3, 5, 7, 9),
        },
    )
    pairs = ((-1, 4), (2, -5), (3, guided.passing), (7, 8))
    inputs, gradients = zip(*(pairs[k] for k in guided.order), strict=True)
    return {
        "channel_weight": select(
            seed,
            {
                # Two values of the grid, each time with another sum.
                "centre last": (
                    *((-3, 3), (-9, 3), (-7, 2), (-8, 4), (-5, 2), (-6, 4), (-5, 4)),
                    *((-4, 5), (4, -2), (-2, 5), (5, -1), (3, 2), (4, 2), (2, 5)),
                )
            },
        ),
        "largest_value": select(
            seed,
            {
                "side maximum": (
                    *((7, 24.5), (6, 9), (8, 48), (10, 30), (5, 15), (14, 29.4)),
                    *((7, 73.5), (5, 30), (10, 45), (8, 8), (14, 19.6), (6, 14.4)),
                    *((5, 20), (10, 35)),
                )
            },
        ),
        "guided_relu6": SimpleNamespace(inputs=inputs, gradients=gradients),
        "contrast_score": select(
            seed,
            {
                "preferred other": (
                    (2, 0),
                    *(
                        pair
                        for pair in itertools.permutations(range(4), 2)
                        if pair != (2, 0)
                    ),
                )
            },
        ),
    }


@expects(number)
def channel_weight(answer: Any) -> bool:
    """Check the weight of a channel with a 3×3 gradient (in the book: `GRADIENT`)."""
    given = numbers(current_seed())["channel_weight"]
    gradient = torch.tensor(GRADIENT)
    gradient[1, 1], gradient[2, 2] = given.centre, given.last
    total, exact = gradient.sum().item(), gradient.sum().item() / 9
    positive = gradient.clamp_min(0).sum().item()
    relu_hint = (
        "no ReLU here: it is applied at the end, to the map,"
        " and negative gradients count"
    )
    sign_hint = "negative gradients count with their sign"
    return judge_number(
        answer,
        exact,
        "the average over all nine positions, negative ones included",
        (
            (total, "that is the sum; Eq. 1 divides it by the number of positions"),
            (positive, relu_hint),
            (positive / 9, relu_hint),
            (gradient.abs().sum().item(), sign_hint),
            (gradient.abs().mean().item(), sign_hint),
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
    """Check Grad-CAM's largest value, from CAM's and the number of positions.

    In the book: 24.5 and 7×7.
    """
    given = numbers(current_seed())["largest_value"]
    exact = given.maximum / given.side**2
    return judge_number(
        answer,
        exact,
        "CAM's map over the number of positions;"
        " a positive value passes the ReLU, and the bias is in neither",
        (
            (
                given.maximum,
                "the shapes are equal, the units are not:"
                " the average in the network divides every gradient",
            ),
            (
                given.maximum / given.side,
                "the map has two sides: count its positions",
            ),
            (
                given.maximum * given.side**2,
                "the other way round: Z times Grad-CAM's map is CAM's",
            ),
            (
                lambda value: abs(value - exact) < 0.05 * exact,
                "nearly: the idea is right, so check the division",
            ),
        ),
        "follow the derivation: which number stands between the two maps?",
    )


@expects(four_numbers)
def guided_relu6(answer: Any) -> bool:
    """Check guided backpropagation through a ReLU6.

    In the book, the inputs are -1, 2, 3, 7, the gradients 4, -5, 6, 8.
    """
    given = numbers(current_seed())["guided_relu6"]
    pairs = list(zip(given.inputs, given.gradients, strict=True))
    ordinals = ("first", "second", "third", "fourth")
    passing, negative_gradient, negative_input = (
        ordinals[[*map(is_it, pairs)].index(True)]
        for is_it in (
            lambda pair: 0 < pair[0] < 6 and pair[1] > 0,
            lambda pair: pair[1] < 0,
            lambda pair: pair[0] < 0,
        )
    )

    def keep(is_kept: Any, value: Any = lambda x, g: g) -> tuple[float, ...]:
        return tuple(value(x, g) if is_kept(x, g) else 0 for x, g in pairs)

    def is_passed(x: float, g: float) -> bool:
        return 0 < x < 6 and g > 0

    return judge(
        answer,
        answer.__eq__,
        keep(is_passed),
        f"only the {passing} has an input between 0 and 6 and a positive gradient",
        (
            (
                keep(lambda x, g: x > 0 and g > 0),
                "that is the rule for a ReLU; a ReLU6 is flat above 6 as well,"
                " so no gradient passes there",
            ),
            (
                keep(lambda x, g: 0 < x < 6),
                "that is the plain gradient;"
                " the guided one drops negative gradients, too",
            ),
            (
                keep(lambda x, g: x > 0),
                "the plain gradient of a ReLU: look at the 7, and at the sign of the"
                f" {negative_gradient} gradient",
            ),
            (
                keep(lambda x, g: g > 0),
                "that is the deconvnet's rule, which does not look at the inputs",
            ),
            (
                keep(lambda x, g: x < 6 and g > 0),
                f"the {negative_input} input is negative: a ReLU6 is flat below 0, too",
            ),
            (
                keep(lambda x, g: 0 < x < 6, lambda x, g: abs(g)),
                "a negative gradient becomes 0; it does not change its sign",
            ),
            (
                keep(is_passed, lambda x, g: x),
                "that is the input; the gradient that arrives is passed on",
            ),
            (
                keep(is_passed, lambda x, g: 1),
                "that is the mask: multiply it by the gradients that arrive",
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
                grad_cam_map(gradients.abs().mean((2, 3)), activations),
                "gradients count with their signs: no absolute value in Eq. 1",
            ),
            (
                grad_cam_map(weights.abs(), activations),
                "a weight keeps its sign: no absolute value in Eq. 2",
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
    """Check the reader's `score(logits)`: why one class rather than another.

    In the book: class 2 rather than class 0.
    """
    given = numbers(current_seed())["contrast_score"]
    preferred, other = given.preferred, given.other
    network, images, is_preferred = _network_and_images(preferred, other)

    def compute_maps(score: Any) -> Tensor:
        return grad_cam(network, images, "0", score, relu=False).maps

    with errors_rejected("grad_cam raises an error for it"):
        got = compute_maps(answer)
    expected = compute_maps(lambda logits: logits[:, preferred] - logits[:, other])
    return judge_tensor(
        got,
        expected,
        "",
        "the difference of two scores is a score;"
        " its map is the difference of the two maps",
        (
            (
                -expected,
                f"that explains class {other} rather than class {preferred}:"
                " the sign is wrong",
            ),
            (
                compute_maps(preferred),
                f"that is class {preferred} alone; what class {other} has as well is no"
                f" reason to prefer class {preferred}",
            ),
            (
                compute_maps(lambda logits: logits.softmax(1)[:, preferred]),
                f"a probability compares class {preferred} with all classes;"
                " the question names one",
            ),
            (
                compute_maps(
                    lambda logits: (
                        logits.softmax(1)[:, preferred] - logits.softmax(1)[:, other]
                    )
                ),
                "use the scores themselves:"
                " the softmax depends on the other classes as well",
            ),
            (
                lambda maps: torch.allclose(
                    maps[is_preferred], expected[is_preferred], atol=1e-6
                ),
                f"right where class {preferred} has the higher score;"
                " otherwise the number should be negative and count as well",
            ),
        ),
        f"when is class {preferred} preferred to class {other}? When this number is"
        " positive: which?",
        tolerance=1e-6,
    )


def _network_and_images(
    preferred: int, other: int
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network, images, and for which of these it prefers the first class."""
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
    # The class has the higher score in some images, but not in all.
    with torch.no_grad():
        logits = network(images)
        difference = logits[:, preferred] - logits[:, other]
        network[-1].bias[preferred] -= difference.mean()
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
