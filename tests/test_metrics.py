import itertools

import numpy as np
import pytest
import torch
from refusals import refuses
from scipy import ndimage
from skimage.measure import label as label_regions
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torchvision.ops import box_iou

from paperlib.metrics import (
    aupro,
    auroc,
    best_threshold,
    intersection_over_union,
    localization_error,
    pixel_auroc,
)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 6])  # one decimal: nearly every score is tied
def test_auroc_equals_scikit_learn(seed, decimals):
    torch.manual_seed(seed)
    labels = torch.rand(500) < 0.3
    scores = (torch.randn(500) + labels).round(decimals=decimals)
    assert auroc(labels, scores) == pytest.approx(
        roc_auc_score(labels, scores), abs=1e-12
    )
    assert auroc(labels.long(), scores) == auroc(labels, scores)


def test_auroc_is_the_share_of_pairs_in_order():
    labels = torch.tensor([1, 0, 1, 0, 0])
    scores = torch.tensor([0.9, 0.4, 0.4, 0.1, 0.9])
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    assert auroc(labels, scores) == sum(
        float(a > b) + 0.5 * float(a == b) for a, b in pairs
    ) / len(pairs)


def test_auroc_of_perfect_reversed_and_constant_scores():
    labels, scores = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert auroc(labels, scores) == 1.0
    assert auroc(labels, -scores) == 0.0
    assert auroc(labels, scores * 0) == 0.5


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1, 0.2, 0.3], "two vectors of the same length"),
        ([0, 2], [0.1, 0.2], "other than 0 and 1"),
        ([1, 1], [0.1, 0.2], "2 positives and 0 negatives"),
        ([0, 1], [0.1, float("nan")], "1 of 2 scores are NaN"),
    ],
)
def test_auroc_refuses_invalid_arguments(labels, scores, message):
    with refuses(message):
        auroc(torch.tensor(labels), torch.tensor(scores))


def test_iou_counts_cells():
    a, b = (0, 0, 4, 3), (2, 1, 6, 5)
    grid = torch.zeros(2, 8, 8, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(grid, (a, b), strict=True):
        mask[top:bottom, left:right] = True
    assert intersection_over_union(a, b) == int((grid[0] & grid[1]).sum()) / int(
        (grid[0] | grid[1]).sum()
    )
    assert intersection_over_union(a, a) == 1
    assert intersection_over_union((0, 0, 1, 1), (1, 1, 2, 2)) == 0


def test_iou_equals_torchvisions():
    corners = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    # (top, left, bottom, right)
    boxes = torch.cat([corners.min(1).values, corners.max(1).values + 0.01], 1)
    peer = box_iou(boxes[:, [1, 0, 3, 2]], boxes[:, [1, 0, 3, 2]])
    ours = torch.tensor(
        [
            [intersection_over_union(a, b) for b in boxes.tolist()]
            for a in boxes.tolist()
        ]
    )
    torch.testing.assert_close(ours.double(), peer, rtol=1e-6, atol=1e-6)


def test_localization_error_by_hand():
    true = [(0, 0, 10, 10)] * 6
    predicted = [
        (0, 0, 10, 10),  # fits
        (0, 0, 5, 10),  # IoU exactly one half: fits
        (0, 0, 4, 10),  # 0.4
        [(50, 50, 60, 60), (1, 1, 10, 10)],  # the second of two fits
        None,  # wrong class
        [],  # no box
    ]
    assert localization_error(predicted, true) == 3 / 6
    assert localization_error([[(0, 0, 10, 10)]], true[:1]) == 0  # a list of one
    assert localization_error(predicted, true, iou=0.4) == 2 / 6
    assert localization_error(predicted, true, iou=1) == 5 / 6


@pytest.mark.parametrize(
    "form", [torch.tensor, np.array, lambda box: torch.tensor(box).float(), tuple]
)
def test_boxes_of_every_form_have_the_same_error(form):
    true = form([(0, 0, 10, 10), (5, 5, 9, 9), (2, 2, 4, 4)])
    assert localization_error(form([(0, 0, 10, 10)] * 3), true) == 2 / 3
    several = form([[(0, 0, 10, 10), (2, 2, 4, 4)]] * 3)  # (N, K, 4)
    assert localization_error(several, true) == 1 / 3
    mixed = [None, form([(1, 1, 2, 2), (5, 5, 9, 9)]), form((2, 2, 4, 4))]
    assert localization_error(mixed, true) == 1 / 3
    assert localization_error([form([])] * 3, true) == 1
    assert intersection_over_union(true[0], form((0, 0, 5, 10))) == 0.5
    for wrong in ([form((1, 2, 3))] * 3, [["box"]] * 3, 3, torch.tensor(3)):
        with refuses("box"):
            localization_error(wrong, true)


@pytest.mark.parametrize(
    ("boxes", "true", "iou", "message"),
    [
        ([(0, 0, 1, 1)], [], 0.5, "1 predictions and 0 true boxes"),
        ([], [], 0.5, "at least 1"),
        ([(0, 0, 1, 1)], [(0, 0, 1, 1)], 0, "iou=0"),
        (
            [(0, 0, 1, 1)],
            [(0, 0, 1, 1)],
            1.01,
            "iou=1.01; expected a share above 0 and at most 1",
        ),
        ([(2, 0, 1, 1)], [(0, 0, 1, 1)], 0.5, r"box \(2, 0, 1, 1\); expected"),
        ([(0, 0, 1)], [(0, 0, 1, 1)], 0.5, r"box \(0, 0, 1\)"),
    ],
)
def test_localization_error_refuses_nonsense(boxes, true, iou, message):
    with refuses(message):
        localization_error(boxes, true, iou)


def defects(seed=0, n=4, side=24, decimals=None):
    """Masks with regions of many sizes, some touching at a corner only, one image
    normal; maps that half see them.
    """
    random = np.random.default_rng(seed)
    masks = torch.from_numpy(
        ndimage.gaussian_filter(random.normal(size=(n, side, side)), (0, 1, 1)) > 0.25
    )
    masks[0] = False
    maps = torch.from_numpy(random.normal(size=(n, side, side))) + 1.5 * masks
    return masks, (maps if decimals is None else maps.round(decimals=decimals))


def aupro_by_definition(masks, maps, limit):
    """PRO and FPR at every threshold, one by one; the trapezoids under the curve up to
    the limit.
    """
    masks, maps = np.asarray(masks), np.asarray(maps)
    regions = [
        labelled == number
        for labelled in (label_regions(mask, connectivity=2) for mask in masks)
        for number in range(1, labelled.max() + 1)
    ]
    where = [
        index
        for index, mask in enumerate(masks)
        for _ in range(label_regions(mask, connectivity=2).max())
    ]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        fpr.append(above[~masks].mean())
        places = zip(where, regions, strict=True)
        pro.append(np.mean([above[index][region].mean() for index, region in places]))
    kept = [(f, p) for f, p in zip(fpr, pro, strict=True) if f <= limit]
    # The straight line between the last point before the limit and the first after it.
    if kept[-1][0] < limit:
        f0, p0 = kept[-1]
        f1, p1 = next((f, p) for f, p in zip(fpr, pro, strict=True) if f > limit)
        kept.append((limit, p0 + (p1 - p0) * (limit - f0) / (f1 - f0)))
    return np.trapezoid([p for _, p in kept], [f for f, _ in kept]) / limit


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "decimals", [None, 1, 0]
)  # without decimals six values share all pixels
@pytest.mark.parametrize("limit", [0.3, 0.05, 1])
def test_aupro_equals_the_definition(seed, decimals, limit):
    masks, maps = defects(seed, decimals=decimals)
    found = aupro(masks, maps, limit)
    assert found == pytest.approx(aupro_by_definition(masks, maps, limit), abs=1e-12)
    assert 0 < found < 1
    # Only the order matters.
    assert aupro(masks, maps.exp() - 7, limit) == pytest.approx(found, abs=1e-12)


def test_aupro_by_hand():
    # Two regions, of one and of two pixels; six normal pixels, of which 0.3 · 6 = 1.8
    # may be flagged.
    mask = torch.tensor([[[1, 0, 0], [0, 0, 1], [0, 0, 1]]], dtype=torch.bool)
    scores = torch.tensor([[[9.0, 8.0, 1.0], [1.0, 1.0, 7.0], [1.0, 1.0, 0.0]]])
    # The large region is half found after one false pixel (0.8 of the 1.8 remain), the
    # small one from the start.
    assert aupro(mask, scores) == pytest.approx((1 + 0.5 * 0.8 / 1.8) / 2, abs=1e-12)
    assert auroc(mask.flatten(), scores.flatten()) == (6 + 5 + 0) / 18


def test_aupro_of_perfect_reversed_and_constant_maps():
    masks, _ = defects()
    assert aupro(masks, masks.float()) == 1
    assert aupro(masks, -masks.float()) == 0
    # A straight line to (1, 1): half the limit.
    assert aupro(masks, masks * 0.0) == pytest.approx(0.15, abs=1e-12)
    assert aupro(masks, masks * 0.0, 1) == 0.5


def test_regions_touch_at_corners_and_never_across_images():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 1, 1] = True  # one region by its corner
    masks[1, 1, 1] = True  # in the same place of the next image: another region
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = (
        # half of the first region, none of the second: a quarter, before any false
        # alarm
        1.0
    )
    assert aupro(masks, maps, 0.3) == pytest.approx(0.25 + 0.75 * 0.15, abs=1e-12)


def test_large_and_small_defects_count_alike_in_aupro_and_by_area_in_pixel_auroc():
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, :20, :20], masks[0, 30, 30] = True, True
    only_large = masks.float() * 1.0
    only_large[0, 30, 30] = 0
    assert aupro(masks, only_large) == pytest.approx(0.5 + 0.5 * 0.15, abs=1e-12)
    assert pixel_auroc(masks, only_large) > 0.998


@pytest.mark.parametrize("decimals", [None, 1])
def test_pixel_auroc_equals_scikit_learn(decimals):
    masks, maps = defects(decimals=decimals)
    assert pixel_auroc(masks, maps) == pytest.approx(
        roc_auc_score(masks.flatten(), maps.flatten()), abs=1e-12
    )


def test_half_precision_and_graphs_are_scored():
    masks, maps = defects()
    for dtype in (torch.float16, torch.bfloat16):
        halves = maps.to(dtype)
        assert aupro(masks, halves) == aupro(masks, halves.double())
        assert pixel_auroc(masks, halves) == pixel_auroc(masks, halves.double())
    assert aupro(masks, maps.clone().requires_grad_()) == aupro(masks, maps)
    assert pixel_auroc(masks, maps.clone().requires_grad_()) == pixel_auroc(masks, maps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda masks, maps: (masks, maps[:, :-1]),
            r"masks of shape \(4, 24, 24\) and maps of shape \(4, 23, 24\)",
        ),
        (
            lambda masks, maps: (masks & False, maps),
            "0 defective and 2304 other pixels",
        ),
        (lambda masks, maps: (masks | True, maps), "2304 defective and 0 other pixels"),
        (
            lambda masks, maps: (masks, maps.where(masks, float("nan"))),
            "values of maps are NaN",
        ),
    ],
)
def test_aupro_refuses_invalid_arguments(change, message):
    masks, maps = defects()
    with refuses(message):
        aupro(*change(masks, maps))


FORMS = {
    "float32": lambda masks: masks.float(),
    "float16": lambda masks: masks.half(),
    "int32": lambda masks: masks.int(),
    "uint8": lambda masks: masks.byte(),
    "uint8 0/255": lambda masks: masks.byte() * 255,
    "int64 0/255": lambda masks: masks.long() * 255,
    "uint16": lambda masks: masks.numpy().astype(np.uint16),
    "array": lambda masks: masks.numpy(),
    "array, not contiguous": lambda masks: masks.numpy()[:, ::-1][:, ::-1],
    "array (N, 1, H, W)": lambda masks: masks[:, None].numpy().astype(np.float64),
    "(N, 1, H, W)": lambda masks: masks[:, None],
    "list of tensors": list,
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_every_form_have_the_same_metrics(form):
    masks, maps = defects()
    other = FORMS[form](masks)
    for metric in (aupro, pixel_auroc):
        expected = metric(masks, maps)
        assert metric(other, maps) == expected
        assert metric(masks, maps.numpy()) == metric(masks, maps[:, None]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m[0],
            r"expected one shape, \(N, H, W\).*masks\[None\], maps\[None\]",
        ),
        (lambda m: m[..., None], "expected one shape"),
        (lambda m: m.flatten(), "expected one shape"),
        (lambda m: m.long() * 3, "values from 0 to 3; expected only 0 and 1, or 0 and"),
        (lambda m: m * 0.5, "values from 0 to 0.5; .* Pass masks > threshold"),
        (lambda m: m.long() + 254 * m[:1], "values from 0 to 255"),
        (lambda m: -m.long(), "values from -1 to 0"),
        (lambda m: m * float("nan"), "values from nan to nan"),
        (lambda m: m * 1j, "masks of torch.complex64"),
        (lambda m: "masks", "masks of type str can't be read as numbers"),
        (lambda m: [m[0], m[1, 1:]], "masks of type list can't be read as numbers"),
    ],
)
def test_masks_without_one_meaning_are_refused(change, message):
    masks, maps = defects()
    masks[0, 0, 0] = True
    for metric in (aupro, pixel_auroc):
        with refuses(message):
            metric(change(masks), change(maps) if "shape" in message else maps)


def test_labels_and_scores_of_every_form_have_the_same_metrics():
    labels, scores = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([1, 3, 2, 2, 5])
    expected = auroc(labels, scores.double()), best_threshold(labels, scores.double())
    for form in (torch.Tensor.numpy, list, torch.Tensor.tolist, torch.Tensor.half):
        found = auroc(form(labels), form(scores)), best_threshold(labels, form(scores))
        assert found == expected
    assert auroc(labels.bool().numpy(), scores.numpy().astype(np.uint16)) == expected[0]


def test_pixel_auroc_refuses_invalid_arguments():
    masks, maps = defects()
    with refuses("one shape"):
        pixel_auroc(masks, maps[:1])
    with refuses("0 positives"):
        pixel_auroc(masks & False, maps)


@pytest.mark.parametrize("limit", [0, -0.1, 1.1, float("nan")])
def test_an_impossible_limit_is_refused(limit):
    with refuses("fpr_limit="):
        aupro(*defects(), limit)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decimals", [1, 6])
def test_best_threshold_equals_scikit_learns_curve(seed, decimals):
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(random.random(200) < 0.3)
    scores = (
        (torch.from_numpy(random.normal(size=200)) + labels)
        .round(decimals=decimals)
        .float()
    )
    threshold, f1 = best_threshold(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    curve = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert f1 == pytest.approx(curve.max(), abs=1e-12)
    predicted = scores >= threshold
    hits = int((predicted & labels).sum())
    assert f1 == pytest.approx(
        2 * hits / int(predicted.sum() + labels.sum()), abs=1e-12
    )


def test_best_threshold_by_hand():
    best = best_threshold(
        torch.tensor([0, 1, 1, 0]), torch.tensor([0.1, 0.6, 0.8, 0.2])
    )
    assert (best.threshold, best.f1) == best == (pytest.approx(0.6), 1)
    # Two positives and one negative share a score: all or none of them are flagged.
    assert best_threshold(
        torch.tensor([1, 1, 0, 0]), torch.tensor([2.0, 2.0, 2.0, 1.0])
    ) == (2.0, 0.8)
    with refuses("1 of 2 scores are NaN"):
        best_threshold(torch.tensor([0, 1]), torch.tensor([0.1, float("nan")]))
