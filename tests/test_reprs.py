"""The repr of results and detectors: a few lines that show sizes and state."""

import pytest
import test_wrong_inputs as right
import torch

from paperlib import PaDiM, cam, gradcam, padim, patch_svdd

IMAGES = right.rand(2, 3, 16, 16)
TALL = right.rand(2, 3, 72, 64)
REPRS = {
    "PatchGaussian(positions=2, dimensions=3: 8 images)": right.gaussian,
    "PatchGaussian(positions=2, dimensions=3: 0 images)": lambda: padim.PatchGaussian(
        2, 3
    ),
    "CAM(maps=(2, 8, 8), logits=(2, 5), targets=(2,))": lambda: cam.cam(
        right.small(), IMAGES
    ),
    "GradCAM(maps=(2, 8, 8), weights=(2, 6), logits=(2, 5), targets=(2,))": lambda: (
        gradcam.grad_cam(right.small(), IMAGES, "0")
    ),
    "Detection(scores=(2,), maps=(2, 16, 16))": lambda: right.fitted_padim()(IMAGES),
    "fitted on 4 images of 16×16 pixels, threshold None": right.fitted_padim,
    "not fitted": lambda: PaDiM(right.extractor(), 4),
    "PatchSVDD, not fitted": lambda: patch_svdd.PatchSVDD(right.encoder()),
    "0.0 MiB, threshold None": right.fitted_svdd,
    "PatchMaps(small=(2, 72, 64), big=(2, 72, 64)": lambda: (
        right.fitted_svdd().anomaly_maps(TALL)
    ),
    "Embeddings(small=(2, 11, 9, 4), big=(2, 1, 1, 4))": lambda: right.encoder().embed(
        TALL
    ),
    "Training(0 records, the last: no step)": lambda: patch_svdd.Training(
        [], None, None, torch.zeros(3, 4, 4)
    ),
}


@pytest.mark.parametrize("expected", REPRS)
def test_a_repr_is_short_and_shows_the_state(expected):
    shown = repr(REPRS[expected]())
    assert expected in shown
    assert len(shown.splitlines()) <= 6
