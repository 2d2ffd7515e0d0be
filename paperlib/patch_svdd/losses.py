"""The losses of Patch SVDD (Eq. 4 and 5) and the classifier of relative positions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperlib.patch_svdd.encoders import SLOPE, initialize
from paperlib.patch_svdd.pairs import DIRECTIONS


class PositionClassifier(nn.Module):
    """Tell from two embeddings in which of eight directions the second patch lies from
    the first.

    The difference of the two goes through D → 128 → 128 → 8 with LeakyReLU 0.1. Before
    use, the last layer's weights are divided by their norm over the classes, so that
    every hidden number has the same influence.

    Args:
        dimensions: of an embedding, D.
        train_last_weight: False keeps the last layer's weights as drawn, as the
            released code does.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 5 and Sec. 4.
    Departures: in the released code the normalisation sits under `no_grad`, so that of
        the last layer only the bias is trained; here the weights are trained too.
    Test: test_patch_training.py::test_the_classifier_looks_at_the_difference
    """

    def __init__(self, dimensions: int = 64, *, train_last_weight: bool = True):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(dimensions, 128),
            nn.Linear(128, 128),
            nn.Linear(128, len(DIRECTIONS)),
        )
        initialize(self)
        self.fc3.weight.requires_grad_(train_last_weight)

    def forward(
        self, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n 8"]:
        """Give the logits of the eight directions."""
        hidden = F.leaky_relu(self.fc1(a - b), SLOPE)
        hidden = F.leaky_relu(self.fc2(hidden), SLOPE)
        return F.linear(hidden, F.normalize(self.fc3.weight, dim=0), self.fc3.bias)


def svdd_loss(a: Float[Tensor, "n d"], b: Float[Tensor, "#n d"]) -> Float[Tensor, ""]:
    r"""Measure how far apart embeddings of neighbouring patches are, or embeddings and
    one centre.

    $$\mathcal L_{\text{SVDD'}} = \frac1n \sum_i \|a_i - b_i\|_2$$

    Args:
        a: embeddings.
        b: those of their neighbours; one row, the centre, gives Deep SVDD's loss
            (Eq. 2).

    Returns:
        the mean distance, not squared.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 2 and 4.
    Departures: the mean, as in the released code, for the sum.
    Test: test_patch_training.py::test_losses_by_hand
    """
    return torch.linalg.vector_norm(a - b, dim=1).mean()


def position_loss(
    classifier: nn.Module,
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    position: Int[Tensor, " n"],
) -> Float[Tensor, ""]:
    r"""Measure how badly the classifier tells the position of the second patch from the
    first.

    $$\mathcal L_{\text{SSL}} = \text{cross-entropy}\big(y, C(f(p_1), f(p_2))\big)$$   with $f(p_1)$ = `a`,
    $f(p_2)$ = `b`, y = `position`, C = `classifier`.

    Args:
        classifier: gives logits for two batches of embeddings.
        a: embeddings of the first patches.
        b: embeddings of the second patches.
        position: 0 to 7.

    Returns:
        the mean over the pairs; ln 8 = 2.08 for a guess.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 5. Departures: none.
    Test: test_patch_training.py::test_losses_by_hand
    """
    return F.cross_entropy(classifier(a, b), position)


def _svdd_part(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    loss = svdd_loss(a, b)
    return loss, loss.detach()
