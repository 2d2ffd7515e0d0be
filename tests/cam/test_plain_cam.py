"""The listings of the page on CAM equal the library."""

import numpy as np
import plain_cam
import pytest
import torch
import torchvision

from paperlib import backbones, cam, metrics
from paperlib.anomaly_map import upsample


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    return model.eval().requires_grad_(False)


def random_images(n=2, size=96):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_plain_map_equals_the_library():
    f, w = torch.randn(3, 6, 4, 5), torch.randn(7, 6)
    c = torch.tensor([6, 0, 3])
    torch.testing.assert_close(
        plain_cam.class_activation_map(f, w, c), cam.class_activation_map(f, w, c)
    )


def test_the_plain_map_equals_the_library_on_a_network(resnet):
    images, c = random_images(), torch.tensor([4, 1])
    f, scores = plain_cam.last_feature_map(resnet, resnet.layer4, images)
    found = cam.cam(resnet, images, c)
    torch.testing.assert_close(scores, found.logits)
    torch.testing.assert_close(
        plain_cam.class_activation_map(f, resnet.fc.weight, c), found.maps
    )
    assert not resnet.layer4._forward_hooks


def test_the_plain_score_equals_the_library(resnet):
    images, c = random_images(), torch.tensor([2, 0])
    found = cam.cam(resnet, images, c)
    torch.testing.assert_close(
        plain_cam.score_from_map(found.maps, resnet.fc.bias, c),
        found.logits[torch.arange(2), c],
    )


@pytest.mark.parametrize(
    ("name", "layer", "classes", "channels"),
    [("resnet18", "layer4", 2, 512), ("efficientnet_lite0", "bn2", 1000, 1280)],
)
def test_the_shapes_on_the_page(name, layer, classes, channels):
    if name == "resnet18":
        model = torchvision.models.resnet18(num_classes=classes).eval()
        w = model.fc.weight
    else:
        model = backbones.load(name, weights=None).model
        w = model.classifier.weight
    images, c = random_images(1, 224), torch.tensor([1])
    f, scores = plain_cam.last_feature_map(model, model.get_submodule(layer), images)
    maps = plain_cam.class_activation_map(f, w, c)
    assert f.shape == (1, channels, 7, 7) and scores.shape == (1, classes)
    assert w.shape == (classes, channels) and w[c].shape == (1, channels)
    assert maps.shape == (1, 7, 7) and upsample(maps, 224).shape == (1, 224, 224)


@pytest.mark.parametrize("seed", range(20))
def test_the_plain_box_equals_the_library(seed):
    random = torch.Generator().manual_seed(seed)
    activation_map = upsample(torch.randn(1, 6, 7, generator=random), (30, 40))[0]
    expected = cam.bounding_boxes(activation_map, largest=True)
    assert [plain_cam.bounding_box(activation_map.numpy())] == expected


def test_only_the_largest_of_several_regions_gets_a_box():
    activation_map = np.zeros((6, 6))
    activation_map[0, 0], activation_map[3:6, 2:4], activation_map[2, 4] = 9, 5, 2
    assert plain_cam.bounding_box(activation_map) == (2, 2, 6, 5)
    assert cam.bounding_boxes(activation_map, largest=True) == [(2, 2, 6, 5)]


def random_boxes(n, seed):
    corners = np.random.default_rng(seed).integers(0, 20, (n, 2, 2))
    low, high = corners.min(1), corners.max(1) + 1
    return [(*map(int, a), *map(int, b)) for a, b in zip(low, high, strict=True)]


def test_the_plain_error_equals_the_library():
    boxes, true_boxes = random_boxes(200, 0), random_boxes(200, 1)
    for box, true_box in zip(boxes, true_boxes, strict=True):
        plain = plain_cam.intersection_over_union(box, true_box)
        assert plain == pytest.approx(metrics.intersection_over_union(box, true_box))
    boxes = boxes[:40] + true_boxes[40:]
    is_correct = [i % 3 > 0 for i in range(200)]
    counted = [
        box if correct else None for box, correct in zip(boxes, is_correct, strict=True)
    ]
    error = plain_cam.localization_error(boxes, true_boxes, is_correct)
    assert error == pytest.approx(metrics.localization_error(counted, true_boxes))
    assert 0.3 < error < 0.6


def test_a_box_with_an_iou_of_exactly_one_half_counts():
    box, true_box = (8, 4, 20, 16), (4, 4, 16, 16)
    assert plain_cam.intersection_over_union(box, true_box) == 0.5
    assert plain_cam.localization_error([box], [true_box], [True]) == 0
    assert metrics.localization_error([box], [true_box]) == 0
