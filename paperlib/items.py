"""The items of a data set (an image with its label and mask), and batches of them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from paperlib.image_files import resize_images
from paperlib.tables import short_repr
from paperlib.validation import (
    check_choice,
    check_integers,
    check_tensor,
    check_values,
    rgb_batch,
)


class Item(NamedTuple):
    """An image with its label and its mask.

    Fields:
        image: (3, H, W), RGB in [0, 1].
        label: 0 normal, 1 defective.
        mask: True where the defect is; all False for a normal image; None if the data
            set has no masks.
        path: of its file, or a description of the image's origin.
    """

    image: Float[Tensor, "3 h w"]
    label: int
    mask: Bool[Tensor, "h w"] | None
    path: str
    __repr__ = short_repr


class Batch(NamedTuple):
    """N items: images (N, 3, H, W), labels (N,), masks (N, H, W) or None, and paths."""

    images: Float[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]
    masks: Bool[Tensor, "n h w"] | None
    paths: list[str]
    __repr__ = short_repr


def check_dataset(dataset: Any) -> None:
    """Raise ValueError unless a data set has a length and items."""
    if not isinstance(dataset, Dataset | Sequence) or isinstance(dataset, str | bytes):
        raise ValueError(
            f"a data set of type {type(dataset).__name__};"
            " expected a torch.utils.data.Dataset of Item tuples"
        )


def check_item(item: Any) -> Item:
    """Return an item of a data set; raise ValueError for anything else."""
    if not isinstance(item, Item):
        raise ValueError(f"an item of type {type(item).__name__}; expected an Item")
    return item


class TensorItems(Dataset):
    """Images in memory, as items without masks.

    Args:
        images: uint8, or floating point in [0, 1]; (N, H, W, C) or (N, C, H, W) with 3
            channels or 1, or uint8 (N, H, W).
        label: of all of them, 0 normal or 1 defective.
        size: side in pixels of the square that they are resized to (bilinear with
            antialiasing); None for no resizing.
        name: prefix of the paths.

    Raises:
        ValueError: for another shape or dtype, or values outside [0, 1].
    """

    def __init__(
        self,
        images: Tensor,
        label: int = 0,
        size: int | None = None,
        name: str = "image",
    ):
        # The numbers of 8-bit images need no check: the first image shows the layout.
        check_tensor(images, "images", is_float=False)
        rgb_batch(images[:1] if images.dtype == torch.uint8 else images)
        check_values(images, "images")
        check_choice("label", label, (0, 1))
        if size is not None:
            check_integers(size=size)
        self.images, self.label, self.size, self.name = images, label, size, name

    def __repr__(self) -> str:
        """Name the images and their shape."""
        shape = tuple(self.images.shape)
        return f"TensorItems({self.name!r}: {shape}, label {self.label})"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        image = rgb_batch(self.images[index][None])
        if self.size is not None:
            image = resize_images(image, (self.size, self.size))
        name = f"{self.name} {index % len(self.images)}"
        return Item(image[0].contiguous(), self.label, None, name)


def batches(dataset: Dataset, size: int = 32, threads: int = 2) -> Iterator[Batch]:
    """Read a data set in batches, in order; the next batch is read in the background.

    Args:
        dataset: of `Item` tuples.
        size: items per batch; the last may be smaller.
        threads: that read images; Pillow releases the GIL while it decodes.

    Raises:
        ValueError: if `size` or `threads` is below 1, the images of a batch differ in
            size, or only some have masks.
    """
    check_dataset(dataset)
    for items in read_ahead(dataset.__getitem__, len(dataset), size, threads):
        yield _collate(items)


def read_ahead(
    read: Callable[[int], Any], count: int, size: int = 32, threads: int = 2
) -> Iterator[list[Any]]:
    """Yield `read(0)`, …, `read(count - 1)` in lists; the next is read meanwhile.

    Args:
        read: a function of a number, called in the background.
        count: of the numbers.
        size: results per list; the last may be shorter.
        threads: that call `read`.

    Raises:
        ValueError: if `size` or `threads` is below 1.
    """
    check_integers(size=size, threads=threads)
    pool = ThreadPoolExecutor(threads)

    def start_reading(first: int) -> list[Future]:
        numbers = range(first, min(first + size, count))
        return [pool.submit(read, number) for number in numbers]

    try:
        ahead = start_reading(0)
        for first in range(size, count + size, size):
            current, ahead = ahead, start_reading(first)
            yield [reading.result() for reading in current]
    finally:
        pool.shutdown(cancel_futures=True)


def _collate(items: list[Item]) -> Batch:
    for item in items:
        check_item(item)
    shapes = {tuple(item.image.shape): item.path for item in items}
    if len(shapes) > 1:
        (first_shape, first_path), (second_shape, second_path), *_ = shapes.items()
        raise ValueError(
            f"{first_path} is {first_shape} and {second_path} is {second_shape};"
            " expected one size per batch. Resize them"
        )
    with_mask = [item for item in items if item.mask is not None]
    if with_mask and len(with_mask) < len(items):
        without = next(item.path for item in items if item.mask is None)
        raise ValueError(
            f"{with_mask[0].path} has a mask and {without} has none; expected masks for"
            " all items of a batch or for none. The mask of a normal image is all False"
        )
    return Batch(
        torch.stack([item.image for item in items]),
        torch.tensor([item.label for item in items]),
        torch.stack([item.mask for item in items]) if with_mask else None,
        [item.path for item in items],
    )
