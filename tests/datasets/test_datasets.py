import sys

import numpy as np
import pytest
import skimage
import torch
from elpv_dataset.utils import load_dataset
from refusals import refuses

from paperlib import datasets
from paperlib.datasets.texture_crops import TEXTURES


@pytest.fixture(scope="module")
def cells():
    return datasets.elpv()


def test_elpv_counts_are_the_published_ones(cells):
    assert cells.images.shape == (2624, 300, 300)
    kinds, counts = np.unique(cells.kind, return_counts=True)
    assert dict(zip(kinds, counts, strict=True)) == {"mono": 1074, "poly": 1550}
    values, counts = cells.probability.unique(return_counts=True)
    torch.testing.assert_close(
        values, torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64)
    )
    assert counts.tolist() == [1508, 295, 106, 715]


def test_elpv_equals_the_packages_own_reader(cells):
    images, probability, kind = load_dataset()
    assert np.array_equal(cells.images.numpy(), images)
    assert np.array_equal(cells.probability.numpy(), probability)
    assert np.array_equal(cells.kind, kind)


def test_one_kind_is_the_subset_in_order(cells):
    part = datasets.elpv("mono")
    assert (part.kind == "mono").all()
    is_mono = torch.from_numpy(cells.kind == "mono")
    assert torch.equal(part.images, cells.images[is_mono])
    assert torch.equal(part.probability, cells.probability[is_mono])


def test_unknown_kind_and_missing_package_are_refused(monkeypatch):
    with refuses("kind='thin'; expected one of all, mono, poly"):
        datasets.elpv("thin")
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with refuses("pip install elpv-dataset"):
        datasets.elpv()


def small_cells(seed=0):
    """Create forty cells of different brightness, which identifies resized images."""
    brightness = torch.randperm(40, generator=torch.Generator().manual_seed(seed)) * 6
    images = brightness.to(torch.uint8)[:, None, None].expand(40, 300, 300).contiguous()
    probability = torch.tensor([0.0, 1.0, 1 / 3, 0.0], dtype=torch.float64).repeat(10)
    return datasets.ELPV(images, probability, np.array(["mono"] * 40))


def test_split_is_stratified_disjoint_and_repeatable():
    cells = small_cells()
    split = datasets.split_cells(cells, side=8, test_share=0.3, seed=1)
    assert split.train.shape == (21, 3, 8, 8) and split.test.shape == (9, 3, 8, 8)
    assert split.train_labels.sum() == 7 and split.test_labels.sum() == 3

    # Undo the standardisation with two known cells, and identify every image by its
    # brightness.
    values = torch.cat([split.train, split.test])[:, 0, 0, 0].double()
    labels = torch.cat([split.train_labels, split.test_labels])
    sure = cells.probability != 1 / 3
    known, order = cells.images[sure, 0, 0].double().sort()
    torch.testing.assert_close(
        (values.sort().values - values.min()) / (values.max() - values.min()),
        (known - known.min()) / (known.max() - known.min()),
        rtol=0,
        atol=1e-5,
    )
    assert torch.equal(labels[values.argsort()], cells.probability[sure][order].long())

    again = datasets.split_cells(cells, side=8, test_share=0.3, seed=1)
    other = datasets.split_cells(cells, side=8, test_share=0.3, seed=2)
    assert torch.equal(split.train, again.train)
    assert not torch.equal(split.train_labels, other.train_labels) or not torch.equal(
        split.train, other.train
    )


def test_split_is_standardised_by_the_training_cells():
    split = datasets.split_cells(small_cells(), side=8, test_share=0.3)
    assert abs(split.train.mean()) < 1e-5
    assert split.train[:, 0].std() == pytest.approx(1, abs=1e-3)
    assert abs(split.test.mean()) > 1e-3  # the test cells' own mean was not taken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"side": 0}, "side=0"),
        ({"test_share": 0}, "0 of 20 cells"),
        ({"test_share": 1}, "20 of 20"),
    ],
)
def test_impossible_splits_are_refused(arguments, message):
    with refuses(message):
        datasets.split_cells(small_cells(), **arguments)


def test_every_data_set_of_the_book_is_found_here():
    for name in (
        *"elpv textures synthetic_defects MVTecAD folder Item batches".split(),
    ):
        assert callable(getattr(datasets, name)) and name in datasets.__all__


def test_texture_crops_of_training_and_test_share_no_pixel(monkeypatch):
    halves = np.zeros((512, 512), np.uint8)
    halves[320:] = 255  # below the line only test crops may look
    for kind in TEXTURES:
        monkeypatch.setattr(skimage.data, kind, lambda: halves)
    train, test = (
        datasets.textures("all", split, count=60, size=32)
        for split in ("train", "test")
    )
    assert max(float(item.image.max()) for item in (train[i] for i in range(60))) == 0
    assert min(float(item.image.min()) for item in (test[i] for i in range(60))) == 1
    tall = datasets.textures("brick", "test", side=192, size=192, count=5)
    assert min(float(tall[i].image.min()) for i in range(5)) == 1


def test_texture_crops_are_real_and_repeatable():
    crops = datasets.textures("gravel", "test", count=8, side=64, size=64, seed=3)
    photograph = skimage.data.gravel()
    places = set()
    for index in range(8):
        item = crops[index]
        row, column = (int(word.strip(",")) for word in item.path.split()[2::2])
        expected = (
            torch.from_numpy(photograph[row : row + 64, column : column + 64]).float()
            / 255
        )
        assert torch.equal(item.image, expected.expand(3, 64, 64))
        assert item.label == 0 and item.mask.shape == (64, 64) and not item.mask.any()
        places.add((row, column))
    assert len(places) == 8 and len(list(crops)) == len(crops) == 8
    again, other = (
        datasets.textures("gravel", "test", count=9, side=64, size=64, seed=seed)
        for seed in (3, 4)
    )
    assert torch.equal(again[5].image, crops[5].image)
    assert torch.equal(crops[-1].image, crops[7].image)
    assert not torch.equal(other[5].image, crops[5].image)


def test_all_textures_come_by_turns_at_the_size_asked_for():
    crops = datasets.textures(count=6, side=96, size=48)
    assert [crops[i].path.split(",")[0] for i in range(6)] == [*TEXTURES] * 2
    assert all(
        item.image.shape == (3, 48, 48)
        and 0 <= item.image.min() < item.image.max() <= 1
        for item in crops
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sand"}, "kind='sand'.* one of all, brick, grass, gravel"),
        ({"split": "val"}, "split='val'"),
        ({"side": 193}, "side=193.* up to 192"),
        ({"count": 0}, "count=0"),
        ({"size": 0}, "size=0"),
    ],
)
def test_impossible_textures_are_refused(arguments, message):
    with refuses(message):
        datasets.textures(**arguments)


def test_textures_without_scikit_image_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with refuses("pip install scikit-image"):
        datasets.textures()
