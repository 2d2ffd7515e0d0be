import numpy as np
import pytest
import torch
from refusals import refuses
from scipy import ndimage

from paperlib.datasets import DEFECTS, TensorItems, elpv, synthetic_defects, textures
from paperlib.metrics import pixel_auroc


@pytest.fixture(scope="module")
def bricks():
    return textures("brick", "test", count=12, size=96)


def stacked(items):
    return torch.stack([item.image for item in items]), torch.stack(
        [item.mask for item in items]
    )


def items(dataset):
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("kind", DEFECTS)
def test_contrast_ranges_from_invisible_to_strong(bricks, kind):
    clean, none = stacked(items(bricks))
    assert not none.any()
    changes, masks = [], []
    for contrast in (0, 0.1, 0.3, 1.0):
        painted, mask = stacked(
            items(synthetic_defects(bricks, kinds=[kind], contrast=contrast, seed=3))
        )
        masks.append(mask)
        changes.append((painted - clean).abs().mean(1)[mask].mean().item())
    assert changes[0] == 0 and changes[1] < 0.06 and changes[3] > 0.25
    assert changes == sorted(changes)
    assert changes[2] == pytest.approx(0.3 * changes[3], rel=1e-3)
    # The same places at every contrast.
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0.0005 < masks[0].float().mean() < 0.1 and masks[0].flatten(1).any(1).all()


@pytest.mark.parametrize("kind", DEFECTS)
def test_only_the_mask_and_its_soft_edge_are_painted(bricks, kind):
    clean, _ = stacked(items(bricks))
    painted, mask = stacked(
        items(synthetic_defects(bricks, kinds=[kind], contrast=1, seed=1))
    )
    change = (painted - clean).abs().amax(1)
    near = torch.from_numpy(
        ndimage.binary_dilation(mask.numpy(), np.ones((1, 3, 3)), iterations=4)
    )
    assert change[~near].max() == 0
    assert pixel_auroc(mask, change) > 0.99
    assert painted.min() >= 0 and painted.max() <= 1


def test_a_crack_is_dark_a_scratch_bright_and_a_stain_stands_out():
    flat = TensorItems(torch.full((8, 64, 64), 100, dtype=torch.uint8))
    bright = TensorItems(torch.full((8, 64, 64), 200, dtype=torch.uint8))
    for ground, kind, value in (
        (flat, "crack", 0),
        (flat, "scratch", 1),
        (flat, "stain", 1),
        (bright, "stain", 0),
    ):
        image, mask = stacked(
            items(synthetic_defects(ground, kinds=[kind], contrast=1))
        )
        middle = torch.from_numpy(
            ndimage.binary_erosion(
                mask.numpy(), structure=[[[0, 1, 0], [1, 1, 1], [0, 1, 0]]]
            )
        )
        inside = image.mean(1)[middle if kind == "stain" else mask]
        assert (inside - value).abs().median() < 0.25, kind


def test_a_defect_depends_only_on_seed_and_index(bricks):
    first, again = (synthetic_defects(bricks, seed=5) for _ in range(2))
    order = [7, 0, 3]
    for index in order:  # in any order, and by negative numbers
        a, b, c = first[index], again[index], again[index - len(again)]
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.mask, c.mask)
        assert a.path == b.path == c.path
    masks = stacked(items(first))[1]
    assert not torch.equal(masks, stacked(items(synthetic_defects(bricks, seed=6)))[1])
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
    assert {item.path.split()[1] for item in items(first)} == set(DEFECTS)


def test_they_are_called_synthetic_wherever_they_appear(bricks):
    item = synthetic_defects(bricks, kinds=["crack"], contrast=0.25)[2]
    assert item.path == f"synthetic crack of contrast 0.25 on {bricks[2].path}"
    assert item.label == 1
    assert "synthetic" in synthetic_defects.__doc__
    assert "Synthetic" in type(synthetic_defects(bricks)).__name__


def test_real_cells_are_painted_on_at_a_size():
    cells = elpv("mono")
    painted = synthetic_defects(
        cells.images[cells.probability == 0][:3], size=128, contrast=0.5
    )
    assert len(painted) == 3
    for index, item in enumerate(items(painted)):
        assert item.image.shape == (3, 128, 128)
        assert item.mask.shape == (128, 128)
        assert item.mask.any()
        assert item.path.endswith(f"on image {index}")


def test_an_existing_mask_is_not_changed(bricks):
    twice = synthetic_defects(synthetic_defects(bricks, seed=1), seed=2)
    for index in range(3):
        once = synthetic_defects(bricks, seed=1)[index].mask
        other = synthetic_defects(bricks, seed=2)[index].mask
        assert torch.equal(twice[index].mask, once | other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kinds": ["dent"]},
            r"kinds=\['dent'\]; expected a sequence of some of crack, scratch, stain",
        ),
        ({"kinds": []}, r"kinds=\[\]"),
        ({"kinds": "crack"}, "kinds='crack'"),
        ({"contrast": 1.2}, "contrast=1.2; expected a number from 0"),
        ({"contrast": float("nan")}, "contrast=nan"),
        ({"size": 64}, "size=64 with a data set"),
    ],
)
def test_defects_that_cannot_be_painted_are_refused(bricks, options, message):
    with refuses(message):
        synthetic_defects(bricks, **options)
