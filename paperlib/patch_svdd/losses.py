"""The losses of Patch SVDD (Eq. 4 and 5) and the classifier of relative positions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperlib.inference import run_model
from paperlib.patch_svdd.encoders import SLOPE, initialize
from paperlib.patch_svdd.pairs import DIRECTIONS
from paperlib.validation import (
    check_indices,
    check_integers,
    check_module,
    check_same_kind,
    check_tensor,
)


class PositionClassifier(nn.Module):
    """Classify the direction from the first patch to the second, by their embeddings.

    The input is the difference of the two; the layers are D → 128 → 128 → 8 with
    LeakyReLU 0.1. The last layer's weights are divided by their norm over the classes
    in the forward pass, so that every hidden unit has the same influence.

    Args:
        dimensions: of an embedding, D.
        train_last_weight: False does not train the last layer's weights, as the
            released code.

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import PositionClassifier
        >>> classifier = PositionClassifier(dimensions=16)
        >>> classifier(torch.rand(5, 16), torch.rand(5, 16)).shape
        torch.Size([5, 8])

    Source: Patch SVDD, arXiv:2006.16067, Eq. 5 and Sec. 4.
    Departures: in the released code the normalisation is under `no_grad`, so that only
        the bias of the last layer is trained; here the weights are trained too.
    Test: test_patch_training.py::test_the_classifier_looks_at_the_difference
    """

    def __init__(self, dimensions: int = 64, *, train_last_weight: bool = True):
        check_integers(dimensions=dimensions)
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dimensions, 128), nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, len(DIRECTIONS))
        initialize(self)
        self.fc3.weight.requires_grad_(train_last_weight)

    def forward(
        self, a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]
    ) -> Float[Tensor, "n 8"]:
        """Return the logits of the eight directions."""
        _check_pairs(a, b)
        hidden = F.leaky_relu(self.fc1(a - b), SLOPE)
        hidden = F.leaky_relu(self.fc2(hidden), SLOPE)
        return F.linear(hidden, F.normalize(self.fc3.weight, dim=0), self.fc3.bias)


def svdd_loss(a: Float[Tensor, "n d"], b: Float[Tensor, "#n d"]) -> Float[Tensor, ""]:
    r"""Compute the mean distance between embeddings of neighbouring patches.

    $$\mathcal L_{\text{SVDD'}} = \frac1n \sum_i \|a_i - b_i\|_2$$

    Args:
        a: embeddings.
        b: those of their neighbours, or one row, the centre, for Deep SVDD's loss (Eq.
            2).

    Returns:
        the mean distance, not squared.

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import svdd_loss
        >>> svdd_loss(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.zeros(2, 2))
        tensor(3.2071)

    Source: Patch SVDD, arXiv:2006.16067, Eq. 2 and 4.
    Departures: the mean, as in the released code, instead of the sum.
    Test: test_patch_training.py::test_losses_by_hand
    """
    is_centre = isinstance(b, Tensor) and b.ndim == 2 and len(b) == 1
    _check_pairs(a[:1] if is_centre else a, b)
    return torch.linalg.vector_norm(a - b, dim=1).mean()


def _check_pairs(a: Tensor, b: Tensor) -> None:
    check_tensor(a, "embeddings", "n, d")
    check_tensor(b, "embeddings", "n, d")
    check_same_kind("embeddings", b, "their partners", a)
    if a.shape != b.shape or not a.numel():
        raise ValueError(
            f"embeddings {tuple(a.shape)} and {tuple(b.shape)};"
            " expected two times (n, d), n ≥ 1"
        )


def position_loss(
    classifier: nn.Module,
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    position: Int[Tensor, " n"],
) -> Float[Tensor, ""]:
    r"""Compute the cross-entropy of the classified relative positions.

    $$\mathcal L_{\text{SSL}} = \text{cross-entropy}\big(y, C(f(p_1), f(p_2))\big)$$
    with $f(p_1)$ = `a`, $f(p_2)$ = `b`, y = `position`, C = `classifier`.

    Args:
        classifier: maps two batches of embeddings to logits.
        a: embeddings of the first patches.
        b: embeddings of the second patches.
        position: 0 to 7.

    Returns:
        the mean over the pairs; ln 8 = 2.08 for guessing.

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import PositionClassifier, position_loss
        >>> classifier, embeddings = PositionClassifier(16), torch.rand(2, 5, 16)
        >>> position = torch.tensor([0, 3, 7, 1, 4])
        >>> loss = position_loss(classifier, *embeddings, position)
        >>> loss.shape, bool(loss > 0)
        (torch.Size([]), True)

    Source: Patch SVDD, arXiv:2006.16067, Eq. 5. Departures: none.
    Test: test_patch_training.py::test_losses_by_hand
    """
    check_module(classifier, "the classifier")
    _check_pairs(a, b)
    position = check_indices("position", position, len(DIRECTIONS), "directions")
    check_same_kind("embeddings", a, "position", position, dtype=False)
    if position.shape != a.shape[:1]:
        raise ValueError(
            f"position {tuple(position.shape)} for {len(a)} pairs; expected one each"
        )
    return F.cross_entropy(run_model(classifier, a, a, b), position)
