"""How good scores, maps and boxes are, given the truth."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from torch import Tensor


def auroc(
    labels: Bool[Tensor, "*n"] | Int[Tensor, "*n"], scores: Float[Tensor, "*m"]
) -> float:
    r"""Measure how well scores rank positives above negatives: the area under the ROC
    curve.

    $$\mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)$$   with $s^+$ the score of a random positive and $s^-$
    that of a random negative.

    Args:
        labels: truth of shape (n,), 1 or True for a positive.
        scores: of shape (n,); higher means more positive.

    Returns:
        the area, between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: if the lengths differ, a label is neither 0 nor 1, only one class is
            present, or a score is NaN.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 1; ties count one half, as in the
        Mann-Whitney statistic.
    Departures: none.
    Test: test_metrics.py::test_auroc_equals_scikit_learn
    """
    positive = _positive(labels, scores)
    positives = int(positive.sum())
    negatives = len(labels) - positives
    scores = _plain(scores)
    # Only negatives are sorted as a whole; twice the number of pairs in order is an
    # integer, so ties stay exact.
    better, atleast = _outranked(scores[positive], _sorted(scores[~positive]))
    return int((better + atleast).sum()) / (2 * positives * negatives)


def pixel_auroc(masks: Bool[Tensor, "n h w"], maps: Float[Tensor, "m H W"]) -> float:
    """Measure how well maps rank defective pixels above all others: the AUROC over all
    pixels of all images together.

    Large defects count for more than small ones, by their area; `aupro` counts every
    defect alike.

    Args:
        masks: True where the defect is; normal images are included, all False.
        maps: anomaly maps; higher means more anomalous.

    Returns:
        the area, between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: if the shapes differ, no pixel or every pixel is defective, or a map
            holds NaN.

    Source: PaDiM, arXiv:2011.08785, Sec. IV-A. Departures: none.
    Test: test_metrics.py::test_pixel_auroc_equals_scikit_learn
    """
    _check_maps(masks, maps)
    return auroc(masks.flatten(), maps.flatten())


def aupro(
    masks: Bool[Tensor, "n h w"],
    maps: Float[Tensor, "m H W"],
    fpr_limit: float | int = 0.3,
) -> float:
    r"""Measure how much of each defect maps find, large or small: the area under the
    per-region overlap curve.

    $$\mathrm{PRO}(t) = \frac1R\sum_{r=1}^{R} \frac{|\{p \in r : m_p \ge t\}|}{|r|}$$
    $$\mathrm{AUPRO} = \frac{1}{L}\int_0^{L} \mathrm{PRO}\; d\,\mathrm{FPR}$$
    with $R$ regions $r$ of defective pixels that touch at a side or corner, $m$ =
    `maps`, $L$ = `fpr_limit`, and FPR the share of all pixels outside the masks with
    $m_p \ge t$.

    No curve is drawn. Between neighbouring thresholds the curve is a straight line, so
    a pixel of a region raises it over a known stretch of FPR, which gives each pixel's
    own part of the area: that takes one sort of the highest `fpr_limit` of the normal
    pixels, and is exact.

    Args:
        masks: True where the defect is; normal images are included, all False.
        maps: anomaly maps; higher means more anomalous.
        fpr_limit: the false positive rate up to which is integrated, in (0, 1].

    Returns:
        the area divided by the limit, between 0 and 1; chance is half the limit.

    Raises:
        ValueError: if the shapes differ, no pixel or every pixel is defective, a map
            holds NaN, or the limit is not in (0, 1].

    Source: PaDiM, arXiv:2011.08785, Sec. IV-A; Bergmann et al., CVPR 2020 (Uninformed
        Students), Sec. 4.1.
    Departures: none; computed on the CPU, where the regions are found.
    Test: test_metrics.py::test_aupro_equals_the_definition
    """
    _check_maps(masks, maps)
    if not 0 < fpr_limit <= 1:
        raise ValueError(
            f"fpr_limit={fpr_limit}; expected a share above 0 and at most 1"
        )
    masks, maps = masks.cpu(), _plain(maps).cpu()
    if torch.isnan(maps).any():
        raise ValueError(
            f"{int(torch.isnan(maps).sum())} of {maps.numel()} values of maps are NaN;"
            " mend them first"
        )
    regions, count = _regions(masks)
    inside = masks.flatten()
    normal = maps.flatten()[~inside]
    if not count or not len(normal):
        raise ValueError(
            f"{int(inside.sum())} defective and {len(normal)} other pixels;"
            " expected some of each"
        )
    limit = fpr_limit * len(normal)  # in pixels
    highest = _highest(normal, math.ceil(limit))
    # A pixel of a region is found when the FPR passes from `first` to `last` pixels out
    # of all normal ones: more than one apart where normal pixels have the same score.
    # What it adds is the area right of that slope, up to the limit.
    first, last = (
        len(highest) - rank.double()
        for rank in reversed(_outranked(maps.flatten()[inside], highest))
    )
    whole = limit - (first + last) / 2
    cut = (limit - first).clamp_min(0).square() / (2 * (last - first)).clamp_min(1)
    area = torch.where(last <= limit, whole, cut)
    found = torch.zeros(count, dtype=torch.float64).index_add_(0, regions, area)
    return float((found / torch.bincount(regions, minlength=count)).mean() / limit)


def best_threshold(
    labels: Bool[Tensor, " n"] | Int[Tensor, " n"], scores: Float[Tensor, " m"]
) -> tuple[float, float]:
    r"""Find the threshold that tells positives from negatives best, by the F1 score of
    "score ≥ threshold".

    $$F_1 = \frac{2\,\mathrm{TP}}{2\,\mathrm{TP} + \mathrm{FP} + \mathrm{FN}}$$

    It takes labels to choose it, so the F1 that it reaches on the same labels is a best
    case.

    Args:
        labels: truth, 1 or True for a positive.
        scores: higher means more positive.

    Returns:
        the threshold, which is one of the scores (the highest of equally good ones),
        and its F1.

    Raises:
        ValueError: as `auroc`.

    Source: this book; F1 is van Rijsbergen's. Departures: none.
    Test: test_metrics.py::test_best_threshold_equals_scikit_learns_curve
    """
    positive = _positive(labels, scores)
    ordered, order = scores.sort(descending=True)
    hits = positive[order].cumsum(0)
    f1 = (
        2
        * hits.double()
        / (torch.arange(1, len(scores) + 1, device=scores.device) + hits[-1])
    )
    # equal scores go together
    last = torch.cat([ordered[:-1] != ordered[1:], hits.new_ones(1, dtype=torch.bool)])
    best = int(f1.where(last, -1).argmax())
    return float(ordered[best]), float(f1[best])


def intersection_over_union(
    a: Sequence[float | int], b: Sequence[float | int]
) -> float:
    r"""Measure how well two boxes agree: the area they share over the area they cover
    together.

    $$\mathrm{IoU}(a, b) = |a \cap b| \,/\, |a \cup b|$$

    Args:
        a, b: (top, left, bottom, right), half-open, in pixels.

    Returns:
        between 0 (apart) and 1 (equal).

    Raises:
        ValueError: if a box is not four numbers with bottom > top and right > left.

    Source: ILSVRC, arXiv:1409.0575, Sec. 4.2.
    Departures: boxes are half-open, so no +1 in their sides.
    Test: test_metrics.py::test_iou_counts_cells
    """
    for box in (a, b):
        if len(box) != 4 or not (box[2] > box[0] and box[3] > box[1]):
            raise ValueError(
                f"box {tuple(box)}; expected (top, left, bottom,"
                " right) with bottom > top and right > left"
            )
    height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = height * width
    together = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / together


def localization_error(
    boxes: Sequence, true_boxes: Sequence[Sequence[float | int]], iou: float | int = 0.5
) -> float:
    """Measure the share of images in which no predicted box fits the true one.

    Top-1 localisation error as the papers define it asks for the right class too: give
    None (or an empty list) for an image whose class was predicted wrongly. For top-5,
    give the box of the right class if it is among the five answers, and None if it is
    not.

    Args:
        boxes: for each image a box (top, left, bottom, right), or a list of boxes of
            which any may fit, or None.
        true_boxes: the one true box of each image.
        iou: a box fits if its intersection over union with the true box is at least
            this.

    Returns:
        the share of images without a fitting box, between 0 and 1.

    Raises:
        ValueError: if the numbers differ, there is no image, `iou` is not in (0, 1], or
            a box is malformed.

    Source: Zhou et al., arXiv:1512.04150, Sec. 3.2 (the ILSVRC rule, which Tables 2 and
        3 use).
    Departures: one true box an image.
    Test: test_metrics.py::test_localization_error_by_hand
    """
    if len(boxes) != len(true_boxes) or not len(boxes):
        raise ValueError(
            f"{len(boxes)} predictions and {len(true_boxes)} true boxes;"
            " expected the same number, at least 1"
        )
    if not 0 < iou <= 1:
        raise ValueError(f"iou={iou}; expected a share above 0 and at most 1")
    missed = 0
    for predicted, true in zip(boxes, true_boxes, strict=True):
        candidates = [] if predicted is None else list(predicted)
        if candidates and not isinstance(candidates[0], Sequence):
            candidates = [candidates]
        missed += not any(
            intersection_over_union(box, true) >= iou for box in candidates
        )
    return missed / len(boxes)


def _positive(labels: Tensor, scores: Tensor) -> Tensor:
    """Which of the labels are positive, once labels and scores are known to fit."""
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and scores {tuple(scores.shape)};"
            " expected two vectors of one length"
        )
    if torch.isnan(scores).any():
        raise ValueError(
            f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are NaN;"
            " remove or mend them first"
        )
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise ValueError(
            "labels other than 0 and 1; expected 1 for a positive and 0 for a negative"
        )
    positives = int(positive.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise ValueError(
            f"{positives} positives and {negatives} negatives;"
            " expected at least one of each"
        )
    return positive


def _check_maps(masks: Tensor, maps: Tensor) -> None:
    if masks.shape != maps.shape:
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} and maps of shape"
            f" {tuple(maps.shape)}; expected one shape (N, H, W)."
            " Resize the maps to the masks with anomaly_map.upsample"
        )


def _plain(scores: Tensor) -> Tensor:
    """Cut off from any graph, and of a type that can be searched: half precision as
    float32, with the same order.
    """
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32))


def _sorted(values: Tensor) -> Tensor:
    """Sort ascending; on the CPU NumPy is three times as fast as torch, which sorts
    indices too.
    """
    return (
        torch.from_numpy(np.sort(values.numpy()))
        if values.device.type == "cpu"
        else values.sort().values
    )


def _highest(values: Tensor, count: int) -> Tensor:
    """The `count` highest values, and all that equal the lowest of them, ascending."""
    lowest = values.kthvalue(len(values) - count + 1).values
    return _sorted(values[values >= lowest])


def _outranked(scores: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Count for each score the ordered values that are below it, and those that are
    below it or equal.
    """
    return torch.searchsorted(ordered, scores), torch.searchsorted(
        ordered, scores, right=True
    )


def _regions(masks: Tensor) -> tuple[Tensor, int]:
    """Number the 8-connected regions of all masks: for each True pixel, in order, its
    region; and their count.
    """
    numbers, count = [], 0
    for mask in masks.numpy():
        if mask.any():
            labelled, found = ndimage.label(mask, structure=np.ones((3, 3)))
            numbers.append(
                torch.from_numpy(labelled[mask].astype(np.int64) - 1 + count)
            )
            count += found
    return (torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64)), count
