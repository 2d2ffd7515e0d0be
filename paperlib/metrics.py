"""Metrics of anomaly scores, anomaly maps and boxes against the ground truth.

Example:
    >>> import torch
    >>> from paperlib.metrics import aupro, auroc, best_threshold
    >>> auroc(torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.4, 0.35, 0.8]))
    0.75
    >>> masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    >>> masks[0, 2:4, 2:4] = True
    >>> aupro(masks, masks.float())
    1.0
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

from paperlib.precision import at_least_float32
from paperlib.validation import Numbers, as_tensor, check_number


def auroc(labels: Numbers, scores: Numbers) -> float:
    r"""Measure how well scores rank positives above negatives: the area under the ROC.

    $$\mathrm{AUROC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)$$
    with $s^+$ the score of a random positive and $s^-$ that of a random negative.

    Args:
        labels: truth (N,), 1 or True for a positive, as tensor, array or list.
        scores: (N,); higher means more positive.

    Returns:
        the area, between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: if the lengths differ, a label is neither 0 nor 1, only one class is
            present, or a score is NaN.

    Example:
        >>> import torch
        >>> from paperlib.metrics import auroc
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> auroc(labels, torch.tensor([0.1, 0.4, 0.35, 0.8]))
        0.75

    Source: Patch SVDD, arXiv:2006.16067, Eq. 1; ties count one half, as in the
        Mann-Whitney statistic.
    Departures: none.
    Test: test_metrics.py::test_auroc_equals_scikit_learn
    """
    is_positive, scores = _check_labels(labels, scores)
    scores = scores.to(at_least_float32(scores.dtype))
    positives, negatives = scores[is_positive], scores[~is_positive]
    # Only negatives are sorted; twice the number of ordered pairs is an integer, so
    # ties are exact.
    below, below_or_equal = _count_below(positives, _sorted(negatives))
    pairs = int((below + below_or_equal).sum())
    return pairs / (2 * len(positives) * len(negatives))


def pixel_auroc(masks: Numbers, maps: Numbers) -> float:
    """Measure how well maps rank defective pixels above all others: the pixel AUROC.

    The AUROC is computed over all pixels of all images together, so a defect counts in
    proportion to its area; `aupro` weights all defects equally.

    Args:
        masks: (N, H, W) or (N, 1, H, W), tensor or array: True, 1 or 255 where the
            defect is, 0 elsewhere; normal images are included, all 0.
        maps: anomaly maps of the same shape; higher means more anomalous.

    Returns:
        the area, between 0 and 1; 0.5 is chance.

    Raises:
        ValueError: if the shapes differ, a mask has other values, no pixel or every
            pixel is defective, or a map contains NaN.

    Example:
        >>> import torch
        >>> from paperlib.metrics import pixel_auroc
        >>> masks = torch.zeros(2, 4, 4, dtype=torch.bool)
        >>> masks[1, :2] = True  # the second image has a defect
        >>> maps = torch.arange(16.0).flip(0).view(1, 4, 4).repeat(2, 1, 1)
        >>> round(pixel_auroc(masks, maps), 3)
        0.833

    Source: PaDiM, arXiv:2011.08785, Sec. IV-A. Departures: none.
    Test: test_metrics.py::test_pixel_auroc_equals_scikit_learn
    """
    masks, maps = _check_maps(masks, maps)
    return auroc(masks.flatten(), maps.flatten())


def aupro(
    masks: Numbers,
    maps: Numbers,
    fpr_limit: float = 0.3,
) -> float:
    r"""Measure how much of each defect maps find: the area under the PRO curve.

    $$\mathrm{PRO}(t) = \frac1R\sum_{r=1}^{R} \frac{|\{p \in r : m_p \ge t\}|}{|r|}$$
    $$\mathrm{AUPRO} = \frac{1}{L}\int_0^{L} \mathrm{PRO}\; d\,\mathrm{FPR}$$
    with $R$ regions $r$ of defective pixels that touch at a side or corner, $m$ =
    `maps`, $L$ = `fpr_limit`, and FPR the share of all pixels outside the masks with
    $m_p \ge t$.

    The area is computed exactly and without the curve: between thresholds the curve is
    linear, so each pixel of a region contributes a known area. Only the highest
    `fpr_limit` of the normal pixels are sorted.

    Args:
        masks: (N, H, W) or (N, 1, H, W), tensor or array: True, 1 or 255 where the
            defect is, 0 elsewhere; normal images are included, all 0.
        maps: anomaly maps of the same shape; higher means more anomalous.
        fpr_limit: upper limit of the integral over the false positive rate, in (0, 1].

    Returns:
        the area divided by the limit, between 0 and 1; chance is half the limit.

    Raises:
        ValueError: if the shapes differ, a mask has other values, no pixel or every
            pixel is defective, a map contains NaN, or the limit is not in (0, 1].

    Example:
        >>> import torch
        >>> from paperlib.metrics import aupro
        >>> masks = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> masks[0, 0, 0] = masks[0, 3, 1:] = True  # a small and a large defect
        >>> maps = torch.zeros(1, 4, 4)
        >>> maps[0, 3, 1:] = 1.0  # only the large one is found
        >>> round(aupro(masks, maps), 3)
        0.575

    Source: PaDiM, arXiv:2011.08785, Sec. IV-A; Bergmann et al., CVPR 2020 (Uninformed
        Students), Sec. 4.1.
    Departures: none; computed on the CPU, where regions are labelled.
    Test: test_metrics.py::test_aupro_equals_the_definition
    """
    masks, maps = _check_maps(masks, maps)
    check_number("fpr_limit", fpr_limit, "a share", above=0, most=1)
    masks = masks.cpu()
    maps = maps.to("cpu", at_least_float32(maps.dtype))
    _check_not_nan("values of maps", maps)
    regions, count = _regions(masks)
    defective, normal = maps[masks], maps[~masks]
    if not count or not len(normal):
        raise ValueError(
            f"{len(defective)} defective and {len(normal)} other pixels;"
            " expected some of each"
        )
    limit = fpr_limit * len(normal)  # in pixels
    areas = _areas_under_steps(defective, normal, limit)
    region_areas = torch.zeros(count, dtype=torch.float64).index_add_(0, regions, areas)
    return float(
        (region_areas / torch.bincount(regions, minlength=count)).mean() / limit
    )


def _areas_under_steps(
    defective: Float[Tensor, " d"], normal: Float[Tensor, " n"], limit: float
) -> Float[Tensor, " d"]:
    """Return what each defective pixel contributes to the area under the PRO curve.

    Args:
        defective: scores of the defective pixels.
        normal: scores of all other pixels.
        limit: number of false positives up to which the area is measured.
    """
    top_normal = _top_values(normal, math.ceil(limit))
    # A defective pixel is detected between `first` and `last` false positives (more
    # than one apart where normal pixels have equal scores). It contributes the area
    # right of that slope, up to the limit.
    below, below_or_equal = _count_below(defective, top_normal)
    first = len(top_normal) - below_or_equal.double()
    last = len(top_normal) - below.double()
    full_area = limit - (first + last) / 2
    double_width = (2 * (last - first)).clamp_min(1)
    partial_area = (limit - first).clamp_min(0).square() / double_width
    return torch.where(last <= limit, full_area, partial_area)


class BestThreshold(NamedTuple):
    """The result of `best_threshold`.

    Fields:
        threshold: one of the scores; scores at or above it count as positive.
        f1: the F1 score at this threshold, between 0 and 1.
    """

    threshold: float
    f1: float


def best_threshold(labels: Numbers, scores: Numbers) -> BestThreshold:
    r"""Find the threshold with the highest F1 score of "score ≥ threshold".

    $$F_1 = \frac{2\,\mathrm{TP}}{2\,\mathrm{TP} + \mathrm{FP} + \mathrm{FN}}$$

    The choice uses the labels, so its F1 on the same labels is optimistic.

    Args:
        labels: truth (N,), 1 or True for a positive, as tensor, array or list.
        scores: (N,); higher means more positive.

    Returns:
        the threshold, which is one of the scores (the highest of equally good ones),
        and its F1.

    Raises:
        ValueError: as `auroc`.

    Example:
        >>> import torch
        >>> from paperlib.metrics import best_threshold
        >>> labels, scores = torch.tensor([0, 1, 0, 1]), torch.tensor([0.0, 0.5, 1, 2])
        >>> best_threshold(labels, scores)
        BestThreshold(threshold=0.5, f1=0.8)
    """
    is_positive, scores = _check_labels(labels, scores)
    ordered, order = scores.sort(descending=True)
    true_positives = is_positive[order].cumsum(0)
    f1 = (
        2
        * true_positives.double()
        / (torch.arange(1, len(scores) + 1, device=scores.device) + true_positives[-1])
    )
    # Equal scores are separated by no threshold.
    is_last = torch.cat(
        [ordered[:-1] != ordered[1:], true_positives.new_ones(1, dtype=torch.bool)]
    )
    best = int(f1.where(is_last, -1).argmax())
    return BestThreshold(float(ordered[best]), float(f1[best]))


def intersection_over_union(a: Numbers, b: Numbers) -> float:
    r"""Measure how well two boxes agree: the area of intersection over that of union.

    $$\mathrm{IoU}(a, b) = |a \cap b| \,/\, |a \cup b|$$

    Args:
        a, b: (top, left, bottom, right), half-open, in pixels, as tensor, array or
            sequence.

    Returns:
        between 0 (disjoint) and 1 (equal).

    Raises:
        ValueError: if a box is not four numbers with bottom > top and right > left.

    Source: ILSVRC, arXiv:1409.0575, Sec. 4.2.
    Departures: boxes are half-open, so there is no +1 in their sides.
    Test: test_metrics.py::test_iou_counts_cells
    """
    a, b = (as_tensor(box, "box").flatten().tolist() for box in (a, b))
    for box in (a, b):
        if len(box) != 4 or not (box[2] > box[0] and box[3] > box[1]):
            raise ValueError(
                f"box {tuple(box)}; expected (top, left, bottom,"
                " right) with bottom > top and right > left"
            )
    height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = height * width
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - intersection
    return intersection / union


def localization_error(
    boxes: Numbers | Sequence[Numbers | None],
    true_boxes: Numbers | Sequence[Numbers],
    iou: float = 0.5,
) -> float:
    """Measure the share of images in which no predicted box matches the true one.

    The papers' top-1 localisation error also requires the correct class: pass None (or
    an empty list) for a misclassified image. For top-5, pass the box of the correct
    class if it is among the five predictions, and None otherwise.

    Args:
        boxes: per image a box (top, left, bottom, right), any number of boxes (K, 4) of
            which one may match, or None. Tensors and arrays are accepted, also of all
            images: (N, 4) or (N, K, 4).
        true_boxes: the one true box of each image.
        iou: a box matches if its intersection over union with the true box is at least
            this.

    Returns:
        the share of images without a matching box, between 0 and 1.

    Raises:
        ValueError: if the numbers differ, there is no image, `iou` is not in (0, 1], or
            a box is malformed.

    Example:
        >>> from paperlib.metrics import localization_error
        >>> boxes = [(0, 0, 10, 10), (0, 0, 4, 10), None]  # IoU 1, IoU 0.4, wrong class
        >>> round(localization_error(boxes, [(0, 0, 10, 10)] * 3), 3)
        0.667

    Source: Zhou et al., arXiv:1512.04150, Sec. 3.2 (the ILSVRC rule, which Tables 2 and
        3 use).
    Departures: one true box per image.
    Test: test_metrics.py::test_localization_error_by_hand
    """
    for values in (boxes, true_boxes):
        if not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
            raise ValueError(f"boxes {values!r}; expected one entry per image")
    if len(boxes) != len(true_boxes) or not len(boxes):
        raise ValueError(
            f"{len(boxes)} predictions and {len(true_boxes)} true boxes;"
            " expected the same number, at least 1"
        )
    check_number("iou", iou, "a share", above=0, most=1)
    missed = 0
    for predicted, true in zip(boxes, true_boxes, strict=True):
        candidates = as_tensor([] if predicted is None else predicted, "boxes")
        candidates = candidates if candidates.ndim > 1 else candidates.reshape(1, -1)
        missed += not any(
            intersection_over_union(box, true) >= iou
            for box in candidates
            if box.numel()
        )
    return missed / len(boxes)


def _check_labels(labels: Numbers, scores: Numbers) -> tuple[Tensor, Tensor]:
    """Return which labels are positive, and the scores; raise unless they match."""
    labels, scores = as_tensor(labels, "labels"), as_tensor(scores, "scores").detach()
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(
            f"labels {tuple(labels.shape)} and scores {tuple(scores.shape)};"
            " expected two vectors of the same length"
        )
    _check_not_nan("scores", scores)
    is_positive = labels == 1
    if not (is_positive | (labels == 0)).all():
        raise ValueError(
            "labels other than 0 and 1; expected 1 for a positive and 0 for a negative"
        )
    positives = int(is_positive.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        raise ValueError(
            f"{positives} positives and {negatives} negatives;"
            " expected at least one of each"
        )
    return is_positive.to(scores.device), scores


def _check_not_nan(what: str, values: Tensor) -> None:
    if count := int(torch.isnan(values).sum()):
        raise ValueError(
            f"{count} of {values.numel()} {what} are NaN; remove or fix them first"
        )


def _check_maps(masks: Numbers, maps: Numbers) -> tuple[Tensor, Tensor]:
    """Return masks, bool, and maps, both (N, H, W); raise unless they match."""
    masks, maps = as_tensor(masks, "masks"), as_tensor(maps, "maps").detach()
    shapes = (
        f"masks of shape {tuple(masks.shape)} and maps of shape {tuple(maps.shape)}"
    )
    masks, maps = (
        values[:, 0] if values.ndim == 4 and values.shape[1] == 1 else values
        for values in (masks, maps)
    )
    if masks.ndim != 3 or masks.shape != maps.shape:
        hint = (
            "Add the axis of the images: masks[None], maps[None]"
            if masks.ndim == 2
            else "Resize the maps to the masks with anomaly_map.upsample"
        )
        raise ValueError(
            f"{shapes}; expected one shape, (N, H, W) or (N, 1, H, W). {hint}"
        )
    is_defective = masks == (255 if (masks == 255).any() else 1)
    if not (is_defective | (masks == 0)).all():
        raise ValueError(
            f"masks with values from {masks.min().item():g} to {masks.max().item():g};"
            " expected only 0 and 1, or 0 and 255. Pass masks > threshold"
        )
    return is_defective.to(maps.device), maps


def _sorted(values: Tensor) -> Tensor:
    """Sort ascending; on a CPU NumPy is three times as fast as torch."""
    return (
        torch.from_numpy(np.sort(values.numpy()))
        if values.device.type == "cpu"
        else values.sort().values
    )


def _top_values(values: Tensor, count: int) -> Tensor:
    """Return the `count` highest values, and those equal to their lowest, ascending."""
    lowest = values.kthvalue(len(values) - count + 1).values
    return _sorted(values[values >= lowest])


def _count_below(scores: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Count, per score, the ordered values below it, and those below or equal."""
    return torch.searchsorted(ordered, scores), torch.searchsorted(
        ordered, scores, right=True
    )


def _regions(masks: Tensor) -> tuple[Tensor, int]:
    """Label 8-connected regions: return each True pixel's region, and their number."""
    numbers, count = [], 0
    for mask in masks.numpy():
        if mask.any():
            labelled, n_regions = ndimage.label(mask, structure=np.ones((3, 3)))
            numbers.append(
                torch.from_numpy(labelled[mask].astype(np.int64) - 1 + count)
            )
            count += n_regions
    return (torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64)), count
