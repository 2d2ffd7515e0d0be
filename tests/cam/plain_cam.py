"""CAM as its paper writes it: the listings of the page, short and unoptimised."""

import numpy as np
import torch
from scipy import ndimage


def last_feature_map(model, layer, images):
    outputs = []
    hook = layer.register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    with torch.no_grad():
        scores = model(images)
    hook.remove()
    return outputs[0], scores


def class_activation_map(f, w, c):
    weights = w[c]
    return torch.einsum("nk,nkyx->nyx", weights, f)


def score_from_map(M, b, c):
    return M.mean(dim=(1, 2)) + b[c]


def bounding_box(M, threshold=0.20):
    above = M > threshold * M.max()
    structure = np.ones((3, 3))
    regions, _ = ndimage.label(above, structure)
    sizes = np.bincount(regions.flatten())[1:]
    boxes = ndimage.find_objects(regions)
    rows, columns = boxes[sizes.argmax()]
    return rows.start, columns.start, rows.stop, columns.stop


def intersection_over_union(a, b):
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(height, 0) * max(width, 0)
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return shared / (area_a + area_b - shared)


def localization_error(boxes, true_boxes, is_correct):
    overlaps = map(intersection_over_union, boxes, true_boxes)
    localized = [
        correct and overlap >= 0.5
        for correct, overlap in zip(is_correct, overlaps, strict=True)
    ]
    return 1 - sum(localized) / len(localized)
