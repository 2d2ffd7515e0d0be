import itertools

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchvision.ops import box_iou

from paperlib.metrics import auroc, intersection_over_union, localization_error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 6])  # one decimal: nearly every score is tied
def test_auroc_equals_scikit_learn(seed, decimals):
    torch.manual_seed(seed)
    labels = torch.rand(500) < 0.3
    scores = (torch.randn(500) + labels).round(decimals=decimals)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc(labels.long(), scores) == auroc(labels, scores)


def test_auroc_is_the_share_of_pairs_in_order():
    labels = torch.tensor([1, 0, 1, 0, 0])
    scores = torch.tensor([0.9, 0.4, 0.4, 0.1, 0.9])
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    assert auroc(labels, scores) == sum(float(a > b) + 0.5 * float(a == b) for a, b in pairs) / len(pairs)


def test_auroc_of_perfect_reversed_and_constant_scores():
    labels, scores = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert [auroc(labels, scores), auroc(labels, -scores), auroc(labels, scores * 0)] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.1, 0.2, 0.3], "two vectors of one length"),
        ([0, 2], [0.1, 0.2], "other than 0 and 1"),
        ([1, 1], [0.1, 0.2], "2 positives and 0 negatives"),
        ([0, 1], [0.1, float("nan")], "1 of 2 scores are NaN"),
    ],
)
def test_auroc_refuses_what_has_no_answer(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        auroc(torch.tensor(labels), torch.tensor(scores))


def test_iou_counts_cells():
    a, b = (0, 0, 4, 3), (2, 1, 6, 5)
    grid = torch.zeros(2, 8, 8, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(grid, (a, b), strict=True):
        mask[top:bottom, left:right] = True
    assert intersection_over_union(a, b) == int((grid[0] & grid[1]).sum()) / int((grid[0] | grid[1]).sum())
    assert intersection_over_union(a, a) == 1 and intersection_over_union((0, 0, 1, 1), (1, 1, 2, 2)) == 0


def test_iou_equals_torchvisions():
    corners = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    boxes = torch.cat([corners.min(1).values, corners.max(1).values + 0.01], 1)  # (top, left, bottom, right)
    peer = box_iou(boxes[:, [1, 0, 3, 2]], boxes[:, [1, 0, 3, 2]])
    ours = torch.tensor([[intersection_over_union(a, b) for b in boxes.tolist()] for a in boxes.tolist()])
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
    assert localization_error(predicted, true, iou=0.4) == 2 / 6
    assert localization_error(predicted, true, iou=1) == 5 / 6


@pytest.mark.parametrize(
    ("boxes", "true", "iou", "message"),
    [
        ([(0, 0, 1, 1)], [], 0.5, "1 predictions and 0 true boxes"),
        ([], [], 0.5, "at least 1"),
        ([(0, 0, 1, 1)], [(0, 0, 1, 1)], 0, "iou=0"),
        ([(2, 0, 1, 1)], [(0, 0, 1, 1)], 0.5, r"box \(2, 0, 1, 1\); expected"),
        ([(0, 0, 1)], [(0, 0, 1, 1)], 0.5, r"box \(0, 0, 1\)"),
    ],
)
def test_localization_error_refuses_nonsense(boxes, true, iou, message):
    with pytest.raises(ValueError, match=message):
        localization_error(boxes, true, iou)
