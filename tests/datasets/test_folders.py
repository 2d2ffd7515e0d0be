import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refuses
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from paperlib.backbones import Transform
from paperlib.datasets import (
    MVTEC_OBJECTS,
    MVTEC_TEXTURES,
    MVTecAD,
    Sample,
    categories,
    folder,
)
from paperlib.validation import UnusableFile

SIDE = 300


def picture(seed, grey=False, side=SIDE):
    values = np.random.default_rng(seed).integers(
        0, 256, (side // 10, side // 10, 1 if grey else 3), np.uint8
    )
    return Image.fromarray(values.repeat(10, 0).repeat(10, 1).squeeze())


def square(top, left, side=60):
    """Create an image of a white square, which is also its mask."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[top : top + side, left : left + side] = 255
    return Image.fromarray(mask)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def mvtec(tmp_path):
    """Two small categories in the official layout, one of them greyscale, with what a
    download leaves lying about.
    """
    root = tmp_path / "mvtec"
    for category, grey in (("bottle", False), ("grid", True)):
        for n in range(3):
            save(picture(n, grey), root / category / f"train/good/{n:03}.png")
        for n in range(2):
            save(picture(10 + n, grey), root / category / f"test/good/{n:03}.png")
        for defect, count in (("crack", 2), ("hole", 1)):
            for n in range(count):
                mask = square(80 + 20 * n, 100)
                save(
                    picture(20 + n, grey) if grey else mask.convert("RGB"),
                    root / category / f"test/{defect}/{n:03}.png",
                )
                save(mask, root / category / f"ground_truth/{defect}/{n:03}_mask.png")
    (root / "bottle/test/crack/.DS_Store").write_bytes(b"junk")
    (root / "bottle/ground_truth/crack/._000_mask.png").write_bytes(b"junk")
    (root / "license.txt").write_text("CC BY-NC-SA 4.0")
    return root


def test_the_official_layout_is_read(mvtec):
    train, test = (MVTecAD(mvtec, "bottle", split) for split in ("train", "test"))
    assert [len(train), len(test)] == [3, 5]
    names = [item.path.split("bottle/")[1] for item in test]
    assert names == [
        "test/good/000.png",
        "test/good/001.png",
        "test/crack/000.png",
        "test/crack/001.png",
        "test/hole/000.png",
    ]
    assert [item.label for item in test] == [0, 0, 1, 1, 1]
    assert {item.label for item in train} == {0}
    for item in [*train, *test]:
        assert item.image.shape == (3, 224, 224)
        assert item.image.dtype == torch.float32
        assert item.image.is_contiguous()
        assert 0 <= item.image.min() < item.image.max() <= 1
        assert item.mask.shape == (224, 224) and item.mask.dtype == torch.bool
        assert bool(item.mask.any()) == bool(item.label)
    assert categories(mvtec) == ["bottle", "grid"]
    assert torch.equal(test[-1].image, test[4].image)
    with pytest.raises(IndexError):
        test[5]


def test_there_are_fifteen_categories():
    assert len(MVTEC_TEXTURES) == 5
    assert len(MVTEC_OBJECTS) == 10
    assert len({*MVTEC_TEXTURES, *MVTEC_OBJECTS}) == 15


def test_pictures_are_resized_and_cropped_in_the_middle_as_torchvision_does(mvtec):
    for split in ("train", "test"):
        for item in MVTecAD(mvtec, "bottle", split):
            original = Image.open(item.path)
            expected = TF.center_crop(
                TF.resize(original, [256, 256], InterpolationMode.BICUBIC), [224, 224]
            )
            assert torch.equal(item.image, TF.to_tensor(expected))
    path = mvtec / "bottle/ground_truth/crack/001_mask.png"
    # All edges.
    save(
        Image.fromarray(
            np.random.default_rng(0).integers(0, 2, (SIDE, SIDE), np.uint8) * 255
        ),
        path,
    )
    item = MVTecAD(mvtec, "bottle", "test", resize=60, crop=41)[3]
    mask = Image.open(path)
    expected = TF.center_crop(
        TF.resize(mask, [60, 60], InterpolationMode.NEAREST), [41, 41]
    )
    assert torch.equal(item.mask, TF.to_tensor(expected)[0] > 0)
    middles = np.asarray(mask)[2::5, 2::5] > 0  # of each 5×5 block
    assert np.array_equal(item.mask, middles[10:51, 10:51])  # 9.5 rounds to even


def test_greyscale_categories_get_three_equal_channels(mvtec):
    for item in MVTecAD(mvtec, "grid", "train"):
        assert Image.open(item.path).mode == "L"
        assert torch.equal(item.image[0], item.image[1])
        assert torch.equal(item.image[0], item.image[2])
        assert item.image.std() > 0.1


def test_the_random_variant_turns_and_crops_picture_and_mask_alike(mvtec):
    places = set()
    for seed in range(6):
        for index in (2, 3):  # image and mask are equal
            item = MVTecAD(mvtec, "bottle", "test", "random", seed=seed)[index]
            assert item.image.shape == (3, 224, 224) and item.mask.shape == (224, 224)
            apart = (item.image[0] > 0.5) != item.mask
            assert apart.float().mean() < 0.004  # an edge pixel here and there
            rows, columns = (item.mask.any(axis).nonzero().flatten() for axis in (1, 0))
            places.add((int(rows[0]), int(columns[0]), len(rows)))
    assert len(places) == 12


def test_random_turns_stay_within_ten_degrees_and_random_crops_within_the_picture(
    mvtec,
):
    """Angle and offset are measured from the centre and corners of a square."""
    angles, offsets = [], []
    for seed in range(40):
        options = {"seed": seed, "resize": 256, "crop": 224}
        dataset = MVTecAD(mvtec, "bottle", "test", "random", **options)
        rows, columns = (dataset[2].mask.nonzero()[:, axis].double() for axis in (0, 1))
        # The angle follows from the top and the left corner of the square.
        top, left = rows.argmin(), columns.argmin()
        turned = torch.atan2(
            rows[left] - rows[top], columns[top] - columns[left]
        ).rad2deg()
        angles.append(float(min(turned, 90 - turned)))
        offsets.append((float(rows.mean()), float(columns.mean())))
    assert max(angles) < 12 and max(angles) > 4
    # The square's centre lies 15 px above and 17 px beside that of the image, so a
    # rotation by 10° moves it by up to 4 px.
    rows, columns = np.array(offsets).T
    middle = (110 * 256 / 300, 130 * 256 / 300)
    for found, centre in ((rows, middle[0]), (columns, middle[1])):
        assert centre - 32 - 6 < found.min() and found.max() < centre + 6
        assert np.ptp(found) > 20


def test_the_random_variant_depends_only_on_seed_and_index(mvtec):
    first, again = (
        MVTecAD(mvtec, "bottle", "train", "random", seed=4) for _ in range(2)
    )
    for index in (2, 0, 1):
        assert torch.equal(first[index].image, again[index].image)
        assert torch.equal(first[index].image, again[index - 3].image)
    assert not torch.equal(
        first[0].image, MVTecAD(mvtec, "bottle", "train", "random", seed=5)[0].image
    )
    assert torch.equal(
        MVTecAD(mvtec, "bottle", "train", "random")[0].image,
        MVTecAD(mvtec, "bottle", "train", "random", seed=0)[0].image,
    )
    centered = MVTecAD(mvtec, "bottle", "train", seed=1)
    assert torch.equal(
        centered[0].image, MVTecAD(mvtec, "bottle", "train", seed=2)[0].image
    )


def test_missing_folders_are_named(mvtec, tmp_path):
    with refuses("no folder .*absent", UnusableFile):
        MVTecAD(tmp_path / "absent", "bottle", "train")
    with refuses("category='cable'; expected one of bottle, grid"):
        MVTecAD(mvtec, "cable", "train")
    with refuses(
        (
            "no category in .*: expected folders such as bottle/train/good,"
            " found bottle, grid, l"
        ),
    ):
        (mvtec / "bottle/train").rename(mvtec / "bottle/old")
        (mvtec / "grid/train").rename(mvtec / "grid/old")
        categories(mvtec)
    (mvtec / "bottle/old").rename(mvtec / "bottle/train")
    (mvtec / "bottle/train/good").rename(mvtec / "bottle/train/fine")
    with refuses("fine: expected only the folder 'good'"):
        MVTecAD(mvtec, "bottle", "train")
    (mvtec / "bottle/train/fine").rename(mvtec / "bottle/fine")
    with refuses("no folder .*train.good"):
        MVTecAD(mvtec, "bottle", "train")
    (mvtec / "bottle/train/good").mkdir()
    with refuses("no image in .*train.good"):
        MVTecAD(mvtec, "bottle", "train")
    with refuses("unpack the archive"):
        folder(mvtec / "license.txt")


def test_masks_and_pictures_that_lack_each_other_are_named_together(mvtec):
    truth = mvtec / "bottle/ground_truth"
    (truth / "crack/001_mask.png").unlink()
    save(square(9, 9), truth / "hole/007_mask.png")
    save(square(9, 9), truth / "bent/000_mask.png")
    save(picture(3), mvtec / "bottle/test/dirt/000.png")
    with refuses("4 problems") as error:
        MVTecAD(mvtec, "bottle", "test")
    for part in (
        "test/crack/001.png has no mask ground_truth/crack/001_mask.png",
        "ground_truth/hole/007_mask.png has no image in test/hole",
        "ground_truth/bent/000_mask.png has no image in test/bent",
        "test/dirt/000.png has no mask",
    ):
        assert part in str(error.value)
    # Training pictures need no masks.
    assert len(MVTecAD(mvtec, "bottle", "train")) == 3


def test_without_any_mask_defective_images_have_labels_only(mvtec):
    (mvtec / "bottle/ground_truth").rename(mvtec / "bottle/elsewhere")
    test = MVTecAD(mvtec, "bottle", "test")
    assert [item.label for item in test] == [0, 0, 1, 1, 1]
    assert {item.mask for item in test} == {None} and not test.has_masks
    (mvtec / "bottle/ground_truth/crack").mkdir(parents=True)
    assert not MVTecAD(mvtec, "bottle", "test").has_masks
    save(square(9, 9), mvtec / "bottle/ground_truth/crack/000.png")
    with refuses("2 problems"):  # a mask is missing only where others are
        MVTecAD(mvtec, "bottle", "test")


@pytest.mark.parametrize("normal", ["good", "normal"])
@pytest.mark.parametrize("ending", ["", "_mask"])
def test_nested_folders_and_both_names_of_masks_are_read(tmp_path, normal, ending):
    root = tmp_path / "part"
    for name in ("train/{}/monday/2", "train/{}/1", "test/{}/night/a/7"):
        save(picture(1), root / f"{name.format(normal)}.png")
    for n, name in enumerate(("dent/left/0", "dent/left/10", "dent/5", "a/b/c/1")):
        mask = square(60 + 20 * n, 100)
        save(mask.convert("RGB"), root / f"test/{name}.png")
        save(mask, root / f"ground_truth/{name}{ending}.bmp")
    save(picture(2), root / "test/dent/.hidden/9.png")
    assert len(MVTecAD(tmp_path, "part", "train")) == 2
    test = MVTecAD(tmp_path, "part", "test")
    assert [item.label for item in test] == [0, 1, 1, 1, 1]
    names = [item.path.split("test/")[1] for item in test]
    assert names[1:] == [
        *("a/b/c/1.png", "dent/5.png", "dent/left/0.png", "dent/left/10.png")
    ]
    for item in list(test)[1:]:
        assert ((item.image[0] > 0.5) != item.mask).float().mean() < 0.01
    save(picture(2), root / f"ground_truth/dent/5{'' if ending else '_mask'}.bmp")
    with refuses("ground_truth/dent/5.*bmp has no image in test/dent"):
        MVTecAD(tmp_path, "part", "test")


def test_good_and_normal_together_are_refused(mvtec):
    save(picture(1), mvtec / "bottle/test/normal/0.png")
    with refuses("normal: expected only the folder 'good'"):
        MVTecAD(mvtec, "bottle", "test")


def test_folders_within_normal_and_abnormal_are_read(tmp_path):
    for name in ("normal/day/1", "normal/2", "abnormal/dent/deep/3", "abnormal/4"):
        save(picture(1), tmp_path / f"{name}.png")
    assert [item.label for item in folder(tmp_path, size=8)] == [0, 0, 1, 1]


def test_damaged_files_are_named_when_they_are_read(mvtec):
    good = mvtec / "bottle/test/good"
    whole = (good / "000.png").read_bytes()
    (good / "000.png").write_bytes(whole[: len(whole) // 2])
    (good / "001.png").write_text("no picture")
    save(
        square(10, 10).resize((100, 200)),
        mvtec / "bottle/ground_truth/crack/000_mask.png",
    )
    save(Image.new("L", (SIDE, SIDE)), mvtec / "bottle/ground_truth/crack/001_mask.png")
    dataset = MVTecAD(mvtec, "bottle", "test")
    for index, message in enumerate(
        [
            "good/000.png: ",
            "good/001.png: cannot identify image file",
            "crack/000.png: the image has 300×300 pixels and its mask 100×200",
            "crack/001.png: its mask 001_mask.png marks no pixel",
        ]
    ):
        with refuses(message, UnusableFile):
            dataset[index]
    assert dataset[4].label == 1  # the rest can be read
    for full in (Image.new("L", (SIDE, SIDE), 255), Image.new("1", (SIDE, SIDE), 1)):
        save(full, mvtec / "bottle/ground_truth/crack/001_mask.png")
        with refuses("its mask 001_mask.png marks every pixel", UnusableFile):
            dataset[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split='val'"),
        ({"variant": "rotated"}, "variant='rotated'; expected .* centered, random"),
        ({"crop": 300}, "resize=256, crop=300"),
        ({"crop": 0}, "crop=0"),
    ],
)
def test_wrong_arguments_are_refused(mvtec, options, message):
    with refuses(message):
        MVTecAD(**({"root": mvtec, "category": "bottle", "split": "test"} | options))


def test_the_smallest_crop_and_the_whole_picture_can_be_had(mvtec, tmp_path):
    for variant in ("centered", "random"):
        for resize, crop in ((1, 1), (24, 24), (256, 1)):
            item, *_ = MVTecAD(
                mvtec, "bottle", "test", variant, resize=resize, crop=crop
            )
            assert item.image.shape == (3, crop, crop)
    save(picture(1), tmp_path / "flat/a.png")
    assert folder(tmp_path / "flat", size=1)[0].image.shape == (3, 1, 1)


def test_folders_of_normal_and_abnormal_pictures(tmp_path):
    for n in (1, 2, 10):
        save(picture(n), tmp_path / f"normal/{n}.png")
    save(picture(5).resize((400, 200)), tmp_path / "abnormal/5.jpg")
    items = list(folder(tmp_path, size=64))
    assert [item.path.rsplit("/", 1)[1] for item in items] == [
        "1.png",
        "2.png",
        "10.png",
        "5.jpg",
    ]
    assert [item.label for item in items] == [0, 0, 0, 1]
    assert all(item.mask is None for item in items)
    for item in items:
        original = Image.open(item.path)
        expected = TF.to_tensor(TF.resize(original, [64, 64]))  # bilinear
        # Pillow rounds to 8 bits after each axis.
        assert (item.image - expected).abs().max() < 1.5 / 255
        transform = Transform(64, (0.4,) * 3, (0.2,) * 3)
        assert torch.equal(item.image, transform.resize(original)[0])
    assert folder(tmp_path)[0].image.shape == (3, 224, 224)
    (tmp_path / "normal").rename(tmp_path / "good")
    assert [item.label for item in folder(tmp_path, normal="good")] == [0, 0, 0, 1]
    assert [item.label for item in folder(tmp_path)] == [1]  # abnormal alone


def test_a_flat_folder_is_normal_and_unclear_ones_are_refused(tmp_path):
    save(picture(1), tmp_path / "flat/a.png")
    assert [item.label for item in folder(tmp_path / "flat")] == [0]
    save(picture(1), tmp_path / "flat/broken/a.png")
    with refuses("contains the folders broken, .* example normal='good'"):
        folder(tmp_path / "flat")
    (tmp_path / "empty").mkdir()
    with refuses(
        "no image in .*empty; expected files .* or folders normal and abnormal",
    ):
        folder(tmp_path / "empty")
    with refuses("size=0"):
        folder(tmp_path / "flat", size=0)


def test_a_sample_reads_a_mask_of_the_pictures_size(tmp_path):
    save(square(10, 20), tmp_path / "mask.png")
    mask = Sample(tmp_path / "a.png", 1, tmp_path / "mask.png").read_mask((SIDE, SIDE))
    assert mask[10:70, 20:80].all()


@pytest.mark.parametrize("bits", [10, 14])
def test_depths_of_cameras_reach_every_data_set(tmp_path, bits):
    values = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    for split in ("train", "test"):
        for n in range(2):
            save(Image.fromarray(values), tmp_path / f"part/{split}/good/{n}.png")
    good = tmp_path / "part/train/good"
    for load in (
        lambda **options: folder(good, **options),
        lambda **options: MVTecAD(tmp_path, "part", "train", **options),
    ):
        with refuses(f"2 images of 16 bits in .*part.train.* Pass bits={bits} "):
            load()
        image = load(bits=bits)[0].image
        assert image.min() < 0.1 and image.max() > 0.9
        assert load(bits=16)[0].image.max() < 1.1 * 2 ** (bits - 16)
        assert f"bits={bits}" in repr(load(bits=bits))
        with refuses("bits=4"):
            load(bits=4)
