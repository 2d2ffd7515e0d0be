import threading
import time

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from torch.utils.data import ConcatDataset, Dataset

from paperlib.datasets import (
    Batch,
    Item,
    TensorItems,
    batches,
    synthetic_defects,
    textures,
)


class Numbered(Dataset):
    """Items whose pixels are their number; it notes which are read, and by which
    thread.
    """

    def __init__(self, count, masks=False, delay=0.0):
        self.count, self.masks, self.delay, self.read = count, masks, delay, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.delay * (index % 2))  # even ones overtake odd ones
        self.read.append((index, threading.get_ident()))
        mask = torch.full((2, 3), bool(index % 2)) if self.masks else None
        return Item(
            torch.full((3, 2, 3), index / 100), index % 2, mask, f"number {index}"
        )


@pytest.mark.parametrize("masks", [False, True])
def test_batches_keep_order_and_stop_at_the_end(masks):
    found = list(batches(Numbered(7, masks, delay=0.01), size=3, threads=3))
    assert [len(batch.labels) for batch in found] == [3, 3, 1]
    whole = Batch(
        *(
            sum((list(part) for part in parts), []) if parts[0] is not None else None
            for parts in zip(*found, strict=True)
        )
    )
    assert [round(float(image.unique()) * 100) for image in whole.images] == list(
        range(7)
    )
    assert torch.stack(whole.labels).tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert whole.paths == [f"number {n}" for n in range(7)]
    assert found[0].images.shape == (3, 3, 2, 3)
    assert found[-1].images.shape == (1, 3, 2, 3)
    if masks:
        assert [bool(mask.all()) for mask in whole.masks] == [False, True] * 3 + [False]
    else:
        assert whole.masks is None
    assert list(batches(Numbered(0))) == []


def test_batches_read_ahead_by_one_and_no_further():
    class Announced(Numbered):
        ahead = threading.Event()

        def __getitem__(self, index):
            if index == 3:
                self.ahead.set()
            return super().__getitem__(index)

    dataset = Announced(20)
    reading = batches(dataset, size=2, threads=2)
    assert dataset.read == []
    next(reading)
    assert dataset.ahead.wait(timeout=60), "the next batch is read without being asked"
    reading.close()  # waits for the threads
    assert {index for index, _ in dataset.read} == {0, 1, 2, 3}
    assert threading.get_ident() not in {thread for _, thread in dataset.read}


def test_a_reading_that_is_given_up_leaves_no_thread_and_reads_no_more():
    dataset, before = Numbered(20, delay=0.05), threading.active_count()
    reading = batches(dataset, size=4, threads=1)
    next(reading)
    reading.close()
    assert threading.active_count() == before
    assert len(dataset.read) < 8  # the rest of the batch ahead is not read


def test_errors_while_reading_are_propagated():
    class Broken(Numbered):
        def __getitem__(self, index):
            if index == 5:
                raise ValueError("picture 5 is damaged")
            return super().__getitem__(index)

    seen = []
    with refuses("picture 5 is damaged"):
        seen.extend(batches(Broken(8), size=2))
    assert len(seen) <= 2


def test_batches_that_cannot_be_put_together_are_refused():
    with refuses("number 0 has a mask and image 0 has none"):
        unmasked = TensorItems(torch.zeros(1, 2, 3, dtype=torch.uint8))
        list(batches(ConcatDataset([Numbered(1, masks=True), unmasked])))
    sizes = ConcatDataset(
        [
            TensorItems(torch.zeros(1, 2, 3).byte()),
            TensorItems(torch.zeros(1, 4, 3).byte()),
        ]
    )
    with refuses(r"image 0 is \(3, 2, 3\) and image 0 is \(3, 4, 3\)"):
        list(batches(sizes))
    with refuses("an item of type Tensor; expected an Item"):
        list(batches([torch.zeros(3, 2, 3)]))
    for options in ({"size": 0}, {"threads": 0}):
        with refuses("expected at least 1"):
            list(batches(Numbered(2), **options))


def test_pictures_in_memory_become_items():
    grey = torch.arange(2 * 4 * 6, dtype=torch.uint8).view(2, 4, 6) * 5
    items = TensorItems(grey, label=1, name="cell")
    item = items[1]
    assert torch.equal(item.image, (grey[1].float() / 255).expand(3, 4, 6))
    assert item.image.is_contiguous()
    assert item[1:] == (1, None, "cell 1")
    assert len(items) == 2
    assert items[-1].path == "cell 1"
    colour = torch.stack([grey, grey + 1, grey + 2], -1)
    assert torch.equal(
        TensorItems(colour)[0].image, colour[0].movedim(-1, 0).float() / 255
    )
    floats = torch.rand(2, 3, 4, 6)
    assert torch.equal(TensorItems(floats)[0].image, floats[0])
    assert torch.equal(
        TensorItems(floats[:, :1])[0].image, floats[0, :1].expand(3, 4, 6)
    )
    resized = TensorItems(grey, size=8)[0].image
    expected = F.interpolate(
        grey[:1, None].float() / 255, (8, 8), mode="bilinear", antialias=True
    )
    assert resized.shape == (3, 8, 8)
    torch.testing.assert_close(resized[:1], expected[0])


def test_objects_with_images_have_a_short_repr():
    items = TensorItems(torch.zeros(3, 40, 60).byte(), name="cell")
    assert repr(items) == "TensorItems('cell': (3, 40, 60), label 0)"
    item = "Item(image=(3, 40, 60), label=0, mask=None, path='cell 1')"
    assert repr(items[1]) == item
    (batch,) = batches(items)
    assert repr(batch).startswith("Batch(images=(3, 3, 40, 60), labels=(3,), masks=No")
    bricks = textures("brick", count=2)
    assert repr(bricks) == "Textures(brick, train: 2 crops)"
    assert repr(synthetic_defects(bricks)) == (
        f"SyntheticDefects(crack, scratch, stain of contrast 0.5 on {bricks!r})"
    )


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            {},
            r"images of shape \(2, 3, 4\) and dtype float32; expected",
        ),
        (torch.zeros(2, 4, 6, 2).byte(), {}, "with 3 channels or 1"),
        (torch.zeros(2, 3, 4, 6).int(), {}, "dtype int32"),
        (torch.full((2, 3, 4, 6), 2.0), {}, "range from 2 to 2"),
        (torch.full((2, 3, 4, 6), float("nan")), {}, "range from nan to nan"),
        (torch.zeros(2, 4, 6).byte(), {"label": 2}, "label=2"),
        (torch.zeros(2, 4, 6).byte(), {"size": 0}, "size=0"),
    ],
)
def test_tensors_that_are_no_pictures_are_refused(images, options, message):
    with refuses(message):
        TensorItems(images, **options)
