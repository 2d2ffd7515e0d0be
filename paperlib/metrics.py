"""How good a score is, from labels and scores alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def auroc(labels: Bool[Tensor, "*n"] | Int[Tensor, "*n"], scores: Float[Tensor, "*m"]) -> float:
    r"""Measure how well scores rank positives above negatives: the area under the ROC curve.

    $$\mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)$$   with $s^+$ the score of a random positive and $s^-$
    that of a random negative.

    Args:
        labels: truth of shape (n,), 1 or True for a positive.
        scores: of shape (n,); higher means more positive.

    Returns:
        the area, between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: if the lengths differ, a label is neither 0 nor 1, only one class is present, or a score is NaN.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 1; ties count one half, as in the Mann-Whitney statistic.
    Departures: none. Test: test_metrics.py::test_auroc_equals_scikit_learn
    """
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and scores {tuple(scores.shape)}; expected two vectors of one length"
        )
    if torch.isnan(scores).any():
        raise ValueError(f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are NaN; remove or mend them first")
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise ValueError("labels other than 0 and 1; expected 1 for a positive and 0 for a negative")
    positives = int(positive.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise ValueError(f"{positives} positives and {negatives} negatives; expected at least one of each")
    # The rank of a tied score is the mean of the ranks it spans; ranks are half integers, exact in float64.
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    rank = (last - (counts - 1) / 2)[group]
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def intersection_over_union(a: Sequence[float | int], b: Sequence[float | int]) -> float:
    r"""Measure how well two boxes agree: the area they share over the area they cover together.

    $$\mathrm{IoU}(a, b) = |a \cap b| \,/\, |a \cup b|$$

    Args:
        a, b: (top, left, bottom, right), half-open, in pixels.

    Returns:
        between 0 (apart) and 1 (equal).

    Raises:
        ValueError: if a box is not four numbers with bottom > top and right > left.

    Source: ILSVRC, arXiv:1409.0575, Sec. 4.2. Departures: boxes are half-open, so no +1 in their sides.
    Test: test_metrics.py::test_iou_counts_cells
    """
    for box in (a, b):
        if len(box) != 4 or not (box[2] > box[0] and box[3] > box[1]):
            raise ValueError(
                f"box {tuple(box)}; expected (top, left, bottom, right) with bottom > top and right > left"
            )
    height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = height * width
    together = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / together


def localization_error(boxes: Sequence, true_boxes: Sequence[Sequence[float | int]], iou: float | int = 0.5) -> float:
    """Measure the share of images in which no predicted box fits the true one.

    Top-1 localisation error as the papers define it asks for the right class too: give None (or an empty list) for an
    image whose class was predicted wrongly. For top-5, give the boxes of the five classes if the right one is among
    them.

    Args:
        boxes: for each image a box (top, left, bottom, right), or a list of boxes of which any may fit, or None.
        true_boxes: the one true box of each image.
        iou: a box fits if its intersection over union with the true box is at least this.

    Returns:
        the share of images without a fitting box, between 0 and 1.

    Raises:
        ValueError: if the numbers differ, there is no image, `iou` is not in (0, 1], or a box is malformed.

    Source: Zhou et al., arXiv:1512.04150, Sec. 3.2 (the ILSVRC rule). Departures: one true box an image.
    Test: test_metrics.py::test_localization_error_by_hand
    """
    if len(boxes) != len(true_boxes) or not len(boxes):
        raise ValueError(
            f"{len(boxes)} predictions and {len(true_boxes)} true boxes; expected the same number, at least 1"
        )
    if not 0 < iou <= 1:
        raise ValueError(f"iou={iou}; expected a share above 0 and at most 1")
    missed = 0
    for predicted, true in zip(boxes, true_boxes, strict=True):
        candidates = [] if predicted is None else list(predicted)
        if candidates and not isinstance(candidates[0], Sequence):
            candidates = [candidates]
        missed += not any(intersection_over_union(box, true) >= iou for box in candidates)
    return missed / len(boxes)
