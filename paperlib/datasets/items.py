"""The items of a data set (an image with its label and mask), and batches of them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset


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


class Batch(NamedTuple):
    """N items: images (N, 3, H, W), labels (N,), masks (N, H, W) or None, and paths."""

    images: Float[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]
    masks: Bool[Tensor, "n h w"] | None
    paths: list[str]


class TensorItems(Dataset):
    """Images in memory, as items without masks.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3), or float (N, 1 or 3, H, W) in [0, 1].
        label: of all of them, 0 normal or 1 defective.
        size: side in pixels of the square that they are resized to (bilinear with
            antialiasing); None for no resizing.
        name: prefix of the paths.

    Raises:
        ValueError: for another shape or dtype, or values outside [0, 1].

    Source: this book. Departures: none.
    Test: test_items.py::test_pictures_in_memory_become_items
    """

    def __init__(
        self,
        images: Tensor,
        label: int = 0,
        size: int | None = None,
        name: str = "image",
    ):
        received = (
            f"images of shape {tuple(images.shape)}"
            f" and dtype {str(images.dtype).removeprefix('torch.')}"
        )
        expected = (
            "expected uint8 (N, H, W) or (N, H, W, 3), or float (N, 1 or 3, H,"
            " W) in [0, 1]"
        )
        channels = -1 if images.dtype == torch.uint8 else 1
        if images.dtype == torch.uint8 and images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[channels] not in (1, 3):
            raise ValueError(f"{received}; {expected}")
        if images.dtype != torch.uint8:
            if not images.is_floating_point():
                raise ValueError(f"{received}; {expected}")
            if images.numel() and not (0 <= images.min() and images.max() <= 1):
                raise ValueError(
                    f"{received} range from {images.min():g}"
                    f" to {images.max():g}; {expected}"
                )
        if label not in (0, 1) or (size is not None and size < 1):
            raise ValueError(
                f"label={label}, size={size};"
                " expected label 0 or 1, and a size of at least 1 pixel"
            )
        self.images, self.label, self.size, self.name = images, label, size, name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        image = self.images[index]
        if image.dtype == torch.uint8:
            image = image.movedim(-1, 0).float() / 255
        if self.size is not None:
            size = (self.size, self.size)
            batch = F.interpolate(image[None], size, mode="bilinear", antialias=True)
            image = batch[0].clamp(0, 1)
        number = index % len(self.images)
        return Item(
            image.expand(3, -1, -1).contiguous(),
            self.label,
            None,
            f"{self.name} {number}",
        )


def batches(dataset: Dataset, size: int = 32, threads: int = 2) -> Iterator[Batch]:
    """Read a data set in batches, in order; the next batch is read in the background.

    Args:
        dataset: of `Item` tuples.
        size: items per batch; the last may be smaller.
        threads: that read images; Pillow releases the GIL while it decodes.

    Raises:
        ValueError: if `size` or `threads` is below 1, the images of a batch differ in
            size, or only some have masks.

    Source: this book. Departures: none.
    Test: test_items.py::test_batches_keep_order_and_stop_at_the_end
    """
    if size < 1 or threads < 1:
        raise ValueError(f"size={size}, threads={threads}; expected at least 1 of each")
    ahead: deque[list] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(dataset), size):
            numbers = range(start, min(start + size, len(dataset)))
            ahead.append(
                [pool.submit(dataset.__getitem__, number) for number in numbers]
            )
            if len(ahead) == 2:
                yield _collate([reading.result() for reading in ahead.popleft()])
        if ahead:
            yield _collate([reading.result() for reading in ahead.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def _collate(items: list[Item]) -> Batch:
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
