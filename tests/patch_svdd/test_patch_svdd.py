import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from safetensors.torch import load_file
from sklearn.neighbors import KDTree
from torch._subclasses.fake_tensor import FakeTensorMode

from paperlib.anomaly_map import Detection
from paperlib.patch_svdd import FlatEncoder, HierarchicalEncoder, PatchSVDD
from paperlib.patch_svdd.detector import SVDD_FORMAT
from paperlib.storage import read_tensors, write_tensors
from paperlib.validation import NotFitted, UnusableFile


def encoder(dimensions=8, seed=0):
    torch.manual_seed(seed)
    return HierarchicalEncoder(dimensions)


def pictures(n=4, height=100, width=90, seed=0):
    """Smooth pictures, RGB in [0, 1]."""
    coarse = torch.rand(n, 3, 9, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def published_maps(model, train, test, patch, stride):
    """The released evaluation, written out: patches one by one, a KD-tree, and a loop
    that adds up over pixels.
    """
    mean = train.mean(0)
    embed = model if patch == 64 else model.small
    rows, columns = ((length - patch) // stride + 1 for length in train.shape[-2:])

    def embeddings(image):
        corners = itertools.product(range(rows), range(columns))
        cut = [
            (image - mean)[None, :, y : y + patch, x : x + patch]
            for y, x in ((i * stride, j * stride) for i, j in corners)
        ]
        with torch.no_grad():
            return torch.cat([embed(one) for one in cut]).double().numpy()

    tree, maps = KDTree([row for image in train for row in embeddings(image)]), []
    for image in test:
        distance, _ = tree.query(embeddings(image), 1)
        total, covering = torch.zeros(2, *train.shape[-2:], dtype=torch.float64)
        for n, score in enumerate(distance[:, 0]):
            i, j = divmod(n, columns)
            window = (
                slice(i * stride, i * stride + patch),
                slice(j * stride, j * stride + patch),
            )
            total[window] += score
            covering[window] += 1
        maps.append(total / covering.clamp_min(1))
    return torch.stack(maps)


@pytest.mark.parametrize("strides", [(4, 16), (7, 9)])
def test_maps_equal_the_published_procedure(strides):
    model, train, test = encoder(), pictures(3), pictures(2, seed=1)
    detector = PatchSVDD(model, stride_small=strides[0], stride_big=strides[1]).fit(
        train
    )
    maps = detector.anomaly_maps(test)
    small = published_maps(model, train, test, 32, strides[0])
    big = published_maps(model, train, test, 64, strides[1])
    for ours, theirs in zip(maps, (small, big, small + big, small * big), strict=True):
        assert ours.shape == (2, 100, 90) and not ours.requires_grad
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        maps.scores.double(), (small * big).amax((1, 2)), rtol=1e-4, atol=1e-6
    )
    # No patch reaches the last row.
    assert (maps.small[:, -1] == 0).all() or (100 - 32) % strides[0] == 0


def test_a_training_image_is_nowhere_anomalous_and_a_scratch_is_where_it_is():
    model, train = encoder(16), pictures(6, 128, 128)
    detector = PatchSVDD(model).fit(train)
    assert all((maps == 0).all() for maps in detector.anomaly_maps(train[2:4]))
    scratched = train[:1].clone()
    scratched[:, :, 70:74, 20:60] = 0
    maps = detector.anomaly_maps(scratched)
    for image in maps:
        y, x = divmod(int(image[0].argmax()), 128)
        assert 30 < y < 110 and 5 < x < 75
    far = maps.small[0, :30].sum() + maps.small[0, :, 100:].sum()
    # Patches that do not touch the scratch are those of the training image.
    assert far == 0


def test_images_are_scored_alike_alone_and_together(monkeypatch):
    detector, test = PatchSVDD(encoder()).fit(pictures()), pictures(5, seed=2)
    together = detector.anomaly_maps(test)
    monkeypatch.setattr("paperlib.patch_svdd.detector.IMAGES_PER_PASS", 2)
    for maps in (
        PatchSVDD(encoder()).fit(pictures()).anomaly_maps(test),
        detector.anomaly_maps(test),
    ):
        for ours, theirs in zip(maps, together, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert detector.anomaly_maps(test[:1]).mult.shape == (1, 100, 90)
    assert torch.equal(together.mult, together.small * together.big)
    assert torch.equal(together.sum, together.small + together.big)


def test_the_memory_of_the_banks_is_reported():
    detector = PatchSVDD(encoder(64))
    assert repr(detector) == "PatchSVDD, not fitted" and detector.bank_bytes == 0
    assert detector.fit(pictures(3, 256, 256)) is detector
    assert detector.small.shape == (3 * 57 * 57, 64)
    assert detector.big.shape == (3 * 13 * 13, 64)
    assert detector.bank_bytes == (3 * 57 * 57 + 3 * 13 * 13) * 64 * 4
    assert (
        repr(detector)
        == "PatchSVDD of 256×256 images: 9,747 small and 507 big patches of"
        " 64 dimensions,"
        " 2.5 MiB, threshold None"
    )
    assert torch.equal(detector.mean, pictures(3, 256, 256).double().mean(0).float())
    assert round(detector.bank_bytes / 3 / 2**20, 2) == 0.83


def test_the_error_of_a_coreset_is_within_its_bound():
    model, train, test = encoder(), pictures(4), pictures(2, seed=1)
    full = PatchSVDD(model).fit(train)
    part = PatchSVDD(model).fit(train, coreset=0.1, seed=3)
    assert full.coreset_radius == (0, 0)
    for name in ("small", "big"):
        whole, kept, radius = (
            getattr(of, name) for of in (full, part, part.coreset_radius)
        )
        assert len(kept) == math.ceil(0.1 * len(whole)) and radius > 0
        assert all((whole == row).all(1).any() for row in kept)
        error = getattr(part.anomaly_maps(test), name) - getattr(
            full.anomaly_maps(test), name
        )
        assert error.min() >= -1e-6 and 0 < error.max() <= radius
    with refuses("coreset=0; expected a share"):
        PatchSVDD(model).fit(train, coreset=0)


def test_a_saved_detector_returns_the_same_maps(tmp_path):
    path, test = tmp_path / "cells.safetensors", pictures(2, seed=1)
    detector = PatchSVDD(encoder(), stride_small=6, stride_big=10).fit(
        pictures(), coreset=0.5
    )
    detector.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["cells.safetensors"]
    names = "encoder.enc.conv8.weight encoder.conv2.bias mean small big"
    assert set(names.split()) <= set(load_file(path))
    found = PatchSVDD.load(path)
    path.write_bytes(b"")  # nothing stays tied to the file
    assert repr(found) == repr(detector)
    assert found.coreset_radius == detector.coreset_radius
    for ours, theirs in zip(
        found.anomaly_maps(test), detector.anomaly_maps(test), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_unusable_files_are_refused_by_name(tmp_path):
    path = tmp_path / "cells.safetensors"
    with refuses("is not fitted; call .fit", NotFitted):
        PatchSVDD(encoder()).save(path)
    PatchSVDD(encoder()).fit(pictures()).save(path)
    whole = path.read_bytes()
    about, tensors = read_tensors(path, SVDD_FORMAT, "saved Patch SVDD", "")
    for damaged in (b"", whole[:500], b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with refuses("cells.safetensors can't be read", UnusableFile):
            PatchSVDD.load(path)
    nan = tensors["mean"].clone()
    nan[0, 0, 0] = math.nan
    for changed, told, message in (
        (
            tensors,
            about | {"format": "paperlib.patch_svdd.0"},
            "is not a saved Patch SVDD of this version",
        ),
        (
            {k: v for k, v in tensors.items() if k != "big"},
            about,
            "is inconsistent",
        ),
        (tensors | {"small": torch.zeros(4, 9)}, about, "is inconsistent"),
        (tensors | {"mean": nan}, about, "is inconsistent"),
        (tensors | {"mean": torch.zeros(3, 20, 20)}, about, "is inconsistent"),
        (tensors | {"big": tensors["big"].double()}, about, "is inconsistent"),
        (tensors, about | {"stride_big": 0}, "is inconsistent"),
        (tensors, about | {"coreset_radius": None}, "is inconsistent"),
        (tensors, about | {"threshold": "0.5"}, "is inconsistent"),
        (
            {k: v for k, v in tensors.items() if k != "encoder.conv1.bias"},
            about,
            'Missing key.*"conv1.bias"',
        ),
    ):
        write_tensors(path, changed, told, told["format"])
        with refuses(message, UnusableFile) as refused:
            PatchSVDD.load(path)
        assert "cells.safetensors" in str(refused.value)


def test_bad_images_are_refused():
    detector = PatchSVDD(encoder())
    with refuses("is not fitted; call .fit", NotFitted):
        detector.anomaly_maps(pictures())
    for bad, message in (
        (pictures(1), "1 training image; expected at least 2"),
        (torch.full((3, 3, 100, 90), 0.5), "of one colour"),
        (pictures(1).expand(3, -1, -1, -1), "3 training images are all equal"),
        (pictures(3, 63, 90), "at least 64×64"),
        (
            pictures().double(),
            "images are torch.float64 on cpu and the encoder is torch.float32",
        ),
    ):
        with refuses(message):
            detector.fit(bad)
        assert detector.mean is None  # a fit that failed leaves nothing behind
    detector.fit(pictures())
    nan = pictures()
    nan[3, 0, 5, 5] = math.nan
    for bad, message in (
        (nan, "NaN or infinite, in images number 3"),
        (
            pictures(2, 100, 91),
            re.escape("images of shape (2, 3, 100, 91); expected (3, 100, 90) each"),
        ),
        (pictures(2, 40, 90), "at least 64×64"),
        (255 * pictures(), "expected 0 to 1"),
        (pictures()[0], "expected a batch"),
        (pictures().double(), "images are torch.float64 on cpu and the mean image"),
    ):
        with refuses(message):
            detector.anomaly_maps(bad)
    # A dead cell is a fair question.
    assert (detector.anomaly_maps(torch.full((1, 3, 100, 90), 0.5)).small > 0).any()
    detector.small = detector.small[:, :5]
    with refuses("with the same D. Compute both with the same encoder"):
        detector.anomaly_maps(pictures())
    with refuses("a FlatEncoder; expected a HierarchicalEncoder"):
        PatchSVDD(FlatEncoder())
    with refuses("stride_small=0"):
        PatchSVDD(encoder(), stride_small=0)


def test_it_stays_on_the_device_of_its_input():
    with FakeTensorMode(), torch.device("cuda"):
        detector = PatchSVDD(HierarchicalEncoder(8)).fit(torch.rand(3, 3, 96, 80))
        maps = detector.anomaly_maps(torch.rand(2, 3, 96, 80))
        assert maps.mult.shape == (2, 96, 80)
        tensors = (detector.small, detector.mean, maps.scores)
        assert all(tensor.is_cuda for tensor in tensors)


def test_every_pixel_may_begin_a_patch(tmp_path):
    """A stride of one pixel is the least: fitted, saved and loaded."""
    normal, path = pictures(2, 64, 66), tmp_path / "dense.safetensors"
    detector = PatchSVDD(encoder(), stride_small=1, stride_big=1).fit(normal)
    assert detector.small.shape == (2 * 33 * 35, 8)
    assert detector.big.shape == (2 * 1 * 3, 8)
    detector.save(path)
    assert torch.equal(
        PatchSVDD.load(path).anomaly_maps(normal).mult,
        detector.anomaly_maps(normal).mult,
    )
    with refuses("stride_small=0"):
        PatchSVDD(encoder(), stride_small=0)


def test_one_forward_pass_returns_scores_and_the_papers_map():
    detector, test = PatchSVDD(encoder()).fit(pictures()), pictures(2, seed=1)
    maps, detection = detector.anomaly_maps(test), detector(test)
    assert isinstance(detection, Detection)
    assert torch.equal(detection.maps, maps.mult)
    assert torch.equal(detection.scores, maps.scores)
    assert torch.equal(detector.anomaly_map(test), maps.mult)
    assert torch.equal(detector.score(test), maps.scores)


def test_a_detector_is_a_module_with_its_fit_in_buffers(tmp_path):
    detector, test = PatchSVDD(encoder()), pictures(2, seed=1)
    assert set(detector.state_dict()) >= {"encoder.conv2.bias", "_extra_state"}
    assert not {"mean", "small", "big"} & set(detector.state_dict())
    detector.fit(pictures(), coreset=0.5)
    detector.normal_threshold(test)
    path = tmp_path / "state.pt"
    torch.save(detector.state_dict(), path)
    # Into a detector that is not fitted, alone and as a part of another module.
    alone, inside = (PatchSVDD(encoder(seed=1)) for _ in range(2))
    alone.load_state_dict(torch.load(path, weights_only=True))
    parent = torch.nn.ModuleDict({"svdd": inside})
    parent.load_state_dict({f"svdd.{k}": v for k, v in detector.state_dict().items()})
    for loaded in (alone, inside):
        assert torch.equal(loaded.anomaly_map(test), detector.anomaly_map(test))
        assert loaded.threshold == detector.threshold
        assert loaded.coreset_radius == detector.coreset_radius
    double = alone.double()
    assert {double.mean.dtype, double.small.dtype} == {torch.float64}
    torch.testing.assert_close(
        double.anomaly_map(test.double()).float(), detector.anomaly_map(test)
    )
    # Its mode changes no result, and is not changed.
    assert detector.training and detector.encoder.training
    assert torch.equal(detector.eval().score(test), alone.float().score(test))
    assert not detector.encoder.training


def test_the_threshold_is_a_quantile_of_held_out_normal_images(tmp_path):
    train, held_out = pictures(4), pictures(9, seed=1)
    detector = PatchSVDD(encoder())
    with refuses("is not fitted", NotFitted):
        detector.normal_threshold(held_out)
    assert detector.fit(train).threshold is None
    scores = detector.score(held_out).double()
    threshold = detector.normal_threshold(held_out, 0.5)
    assert threshold == detector.threshold == scores.median().item()
    assert detector.normal_threshold(held_out.split(4)) == pytest.approx(
        scores.quantile(0.99).item(), rel=1e-6
    )
    stored = detector.threshold
    detector.save(tmp_path / "svdd.safetensors")
    assert PatchSVDD.load(tmp_path / "svdd.safetensors").threshold == stored
    for arguments, message in (
        ((torch.cat([held_out, train[:2]]),), "2 of 11 images have score 0"),
        ((held_out, 1.5), "quantile=1.5; expected a share"),
        ((iter(()),), "no batch received"),
        ((held_out[..., :80],), "expected .* each, as in training"),
    ):
        with refuses(message):
            detector.normal_threshold(*arguments)
    assert detector.threshold == stored  # a failure changes nothing
    assert detector.fit(train).threshold is None  # another fit, another threshold
