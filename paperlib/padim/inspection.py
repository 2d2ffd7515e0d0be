"""Inspect images with a fitted detector: score, alarm and region of each image.

Regions are in pixels of the original image, whatever the detector's transform resizes
and crops.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from paperlib.anomaly_map import Box
from paperlib.backbones import Images
from paperlib.image_files import list_image_files, read_image
from paperlib.items import Batch, Item, read_ahead
from paperlib.validation import (
    UnusableFile,
    as_tensor,
    channels_first,
    height_and_width,
)

Size = tuple[int, int]  # height and width in pixels


class Inspection(NamedTuple):
    """The result for one image; score, alarm and region are None if it is unreadable.

    Fields:
        path: of the file; that of an item; for images in memory "image 0", "image 1" …
        score: the maximum of the anomaly map.
        alarm: whether the score is above the detector's threshold.
        region: the bounding box of the strongest region, half-open, in pixels of the
            original image as viewers show it, with its EXIF orientation. It is the
            connected region around the maximum of the map: that above the threshold if
            there is an alarm, else that above the middle between the mean of its
            positive values and its maximum. (`PaDiM.region` is another thing: the mask
            of the region of interest.)
        error: why the file can't be read; "" if it can.
    """

    path: str
    score: float | None = None
    alarm: bool | None = None
    region: Box | None = None
    error: str = ""


class Inspected(NamedTuple):
    """An inspection, and the anomaly map (h, w) of a readable image."""

    inspection: Inspection
    map: Float[np.ndarray, "h w"] | None


class Reading(NamedTuple):
    """A prepared image, its original size, and the size to which it was resized.

    Fields:
        name: as `Inspection.path`.
        prepared: (1, 3, H, W); None if the file is unreadable.
        original, resized: heights and widths.
        error: why the file can't be read; "" if it can.
    """

    name: str
    prepared: Tensor | None = None
    original: Size = (0, 0)
    resized: Size = (0, 0)
    error: str = ""


def find_images(
    sources: Iterable[str | Path], without: str | Path | None = None
) -> list[Path]:
    """List image files, each once: of folders all that are in them, in natural order.

    Args:
        sources: files, which are listed whatever their names, and folders.
        without: a folder whose files are not listed.

    Raises:
        ValueError: that names a source that is missing, or a folder without images.
    """
    paths = []
    for source in map(Path, sources):
        if not source.exists():
            raise UnusableFile(f"no file or folder {source}; check the path")
        files = list_image_files(source) if source.is_dir() else [source]
        if not files:
            raise ValueError(
                f"no image in {source}; expected files such as 000.png in it,"
                " or in folders within it"
            )
        if without is not None:
            out = Path(without).resolve()
            files = [path for path in files if out not in path.resolve().parents]
        if not files:
            raise ValueError(
                f"the images of {source} are in the folder of the results, {without},"
                " which is not inspected; write the results to another folder"
            )
        paths += files
    return list(dict.fromkeys(paths))


def check_ready(detector: nn.Module) -> None:
    """Raise ValueError unless a detector has a threshold and a transform."""
    if detector.threshold is None:
        raise ValueError(
            "this detector has no threshold; call normal_threshold with normal images:"
            " the training images with fitted=True, or images that were held back"
        )
    if detector.transform is None:
        raise ValueError("this detector has no transform; pass PaDiM(…, transform=…)")


def inspect_batches(
    detector: nn.Module, images: Images, batch_size: int = 32, threads: int = 2
) -> Iterator[list[Inspected]]:
    """Inspect images batch by batch; the next batch is read in the background.

    Args:
        detector: a fitted PaDiM with a threshold and a transform.
        images: as for `PaDiM.inspect`.
        batch_size: images per batch.
        threads: that read and prepare images.

    Raises:
        ValueError: as `PaDiM.inspect`.
    """
    check_ready(detector)
    for readings in read_images(detector, images, batch_size, threads):
        prepared = [x.prepared for x in readings if x.prepared is not None]
        maps = iter(
            detector(torch.cat(prepared)).maps.cpu().double().numpy()
            if prepared
            else ()
        )
        yield [
            Inspected(Inspection(reading.name, error=reading.error), None)
            if reading.prepared is None
            else _judge(reading, next(maps), detector.threshold)
            for reading in readings
        ]


def read_images(
    detector: nn.Module, images: Images, batch_size: int = 32, threads: int = 2
) -> Iterator[list[Reading]]:
    """Read and prepare images in batches; the next batch is read in the background.

    Args:
        detector: a PaDiM with a transform.
        images: as for `PaDiM.inspect`.
        batch_size: images per batch.
        threads: that read and prepare images.
    """
    images = _as_sequence(images)
    read = partial(_read, detector, images)
    return read_ahead(read, len(images), batch_size, threads)


def resized_size(detector: nn.Module) -> Size:
    """Return the size to which a detector's transform resizes, before it crops."""
    return height_and_width(detector.transform.size)


def margins(resized: Size, size: Size) -> Size:
    """Return the numbers of rows and columns that a crop removes at top and left."""
    top, left = (
        round((large - small) / 2) for large, small in zip(resized, size, strict=True)
    )
    return top, left


def strongest_region(map: Float[np.ndarray, "h w"], threshold: float) -> Box:
    """Return the box of the connected region around the maximum of an anomaly map.

    Args:
        map: (h, w), finite and not negative.
        threshold: of the region's pixels; if no pixel is above it, the middle between
            the mean of the positive values and the maximum.

    Example:
        >>> import numpy as np
        >>> from paperlib.padim.inspection import strongest_region
        >>> anomaly_map = np.zeros((6, 8))
        >>> anomaly_map[1:3, 2:5] = 9.0
        >>> anomaly_map[5, 0] = 8.0
        >>> strongest_region(anomaly_map, threshold=7.0)
        Box(top=1, left=2, bottom=3, right=5)
    """
    from scipy import ndimage

    peak = np.unravel_index(map.argmax(), map.shape)
    # What is excluded from the search has the value 0.
    mean = map[map > 0].mean() if map[peak] > 0 else 0.0
    level = threshold if map[peak] > threshold else (mean + map[peak]) / 2
    is_above = map > level
    is_above[peak] = True  # of a constant map nothing is above its mean
    labels, _ = ndimage.label(is_above, np.ones((3, 3)))
    rows, columns = ndimage.find_objects(labels)[labels[peak] - 1]
    return Box(rows.start, columns.start, rows.stop, columns.stop)


def _as_sequence(images: Images) -> Any:
    """Return images one by one: a batch as items, a folder as its files."""
    if isinstance(images, (str, Path)):
        return find_images([images]) if Path(images).is_dir() else [images]
    if isinstance(images, Batch):
        pairs = zip(images.images, images.paths, strict=True)
        return [Item(image, 0, None, path) for image, path in pairs]
    if isinstance(images, (Image.Image, Item)):
        return [images]
    if isinstance(images, (Tensor, np.ndarray)):
        channels_first(as_tensor(images, "images"))  # raises for a single image
    return images


def _read(detector: nn.Module, images: Any, number: int) -> Reading:
    image = images[number]
    name = f"image {number}"
    resized = resized_size(detector)
    if isinstance(image, (str, Path)):
        name = str(image)
        try:
            image = read_image(image, detector.transform.bits)
        except UnusableFile as error:
            return Reading(name, error=str(error).removeprefix(f"{name}: "))
    if isinstance(image, Image.Image):
        original = image.size[::-1]
    elif isinstance(image, Item):
        name, original = image.path, tuple(image.image.shape[1:])
        if original == detector.size:  # it is resized and cropped already
            resized = original
    else:
        original = tuple(channels_first(as_tensor(image, "image")[None]).shape[2:])
    return Reading(name, detector.prepare([image]), original, resized)


def _judge(reading: Reading, map: np.ndarray, threshold: float) -> Inspected:
    score = float(map.max())
    box = strongest_region(map, threshold)
    top, left = margins(reading.resized, map.shape)
    # Row r of the resized image covers the original rows from r · scale on.
    (y0, y1), (x0, x1) = (
        (start * original // resized, -(-stop * original // resized))
        for start, stop, original, resized in zip(
            (box.top + top, box.left + left),
            (box.bottom + top, box.right + left),
            reading.original,
            reading.resized,
            strict=True,
        )
    )
    region = Box(y0, x0, y1, x1)
    return Inspected(Inspection(reading.name, score, score > threshold, region), map)
