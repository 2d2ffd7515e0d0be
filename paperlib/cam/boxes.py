"""Bounding boxes around the high regions of a map (CAM, Sec. 3.1)."""

import numpy as np
from jaxtyping import Num
from torch import Tensor

from paperlib.anomaly_map import Box
from paperlib.precision import at_least_float32
from paperlib.validation import as_tensor, check_choice, check_finite, check_number

# CAM, Sec. 3.1: share of the map's maximum; the box of the largest region is returned
LOCALIZATION_THRESHOLD = 0.20
# a common script: share of the maximum after min-max scaling; every 4-connected region
CODE_REVIEW_THRESHOLD = 0.60


def bounding_boxes(
    map: Num[Tensor, "h w"] | Num[np.ndarray, "h w"],
    threshold: float = LOCALIZATION_THRESHOLD,
    connectivity: int = 8,
    largest: bool = False,
) -> list[Box]:
    """Find the bounding box of each connected region above a share of the maximum.

    The papers resize the map to the image first (`anomaly_map.upsample`), so that boxes
    are in pixels, and use the largest region.

    Args:
        map: (h, w), of any scale. Scripts that threshold at 60 %
            (`CODE_REVIEW_THRESHOLD`) scale it with `anomaly_map.minmax` first.
        threshold: share of the maximum; positions strictly above it count.
        connectivity: 8 joins positions that touch at a corner, 4 does not.
        largest: True returns only the box of the largest region (the first of equals).

    Returns:
        half-open boxes in reading order of their regions; none for a map without a
        positive value.

    Raises:
        ValueError: for a map that is not (h, w) or contains NaN or infinite values, a
            threshold outside [0, 1], or a connectivity other than 4 and 8.

    Example:
        >>> import torch
        >>> from paperlib.cam import bounding_boxes
        >>> cam_map = torch.zeros(5, 8)
        >>> cam_map[1:3, 2:6] = 1.0
        >>> cam_map[4, 7] = 0.5
        >>> bounding_boxes(cam_map, threshold=0.2)[0]
        Box(top=1, left=2, bottom=3, right=6)
        >>> len(bounding_boxes(cam_map)), len(bounding_boxes(cam_map, largest=True))
        (2, 1)

    Source: Zhou et al., arXiv:1512.04150, Sec. 3.1; Selvaraju et al.,
        arXiv:1610.02391v4, Sec. 4.1.
    Departures: neither paper states the connectivity.
    Test: test_cam.py::test_boxes_equal_skimage_regions
    """
    from scipy import ndimage

    tensor = as_tensor(map, "values of the map").detach().cpu()
    if tensor.ndim != 2:
        raise ValueError(
            f"map of shape {tuple(tensor.shape)}; expected one map (h, w)."
            " Select one of a batch, for example maps[0]"
        )
    check_finite(tensor, "rows of the map")
    values = tensor.to(at_least_float32(tensor.dtype)).numpy()
    check_number("threshold", threshold, "a share of the maximum", least=0, most=1)
    check_choice("connectivity", connectivity, (4, 8))
    if values.size == 0 or values.max() <= 0:
        return []
    labels, count = ndimage.label(
        values > threshold * values.max(),
        ndimage.generate_binary_structure(2, connectivity // 4),
    )
    boxes = [
        Box(rows.start, columns.start, rows.stop, columns.stop)
        for rows, columns in ndimage.find_objects(labels)
    ]
    return (
        [boxes[np.bincount(labels.ravel(), minlength=count + 1)[1:].argmax()]]
        if largest and boxes
        else boxes
    )
