"""Data sets in folders: MVTec AD as published, and the user's own images."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from paperlib.datasets.image_files import (
    list_image_files,
    natural_sort_key,
    raise_problems,
    read_image,
    read_mask,
)
from paperlib.datasets.items import Item

MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
MVTEC_OBJECTS = tuple(
    "bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor"
    " zipper".split()
)
RESIZE, CROP = 256, 224  # PaDiM, Sec. IV-B: pixels
MAX_TURN = 10  # PaDiM, Sec. IV-A: degrees in either direction, of Rd-MVTec AD
VARIANTS = ("centered", "random")
# For example 01_001. Any other folder may contain defects, and is never assumed normal.
_FRAMES_FOLDER = re.compile(r"[\d_-]+")
_NORMAL_MASK = Path()  # stands for a mask without a file: no defect
# Image, its index, filter → the transformed image.
View = Callable[[Image.Image, int, Image.Resampling], Image.Image]


class Sample(NamedTuple):
    """An image file, its label, and its mask: a file, a frame of a file, or None."""

    path: Path
    label: int
    mask: Path | tuple[Path, int] | None

    def read_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Read the mask, bool (h, w), of an image of `size` (width, height)."""
        if self.mask == _NORMAL_MASK:
            return np.zeros(size[::-1], dtype=bool)
        if isinstance(self.mask, tuple):
            file, frame = self.mask
            mask = _map_array(file)[frame] != 0
        else:
            file = self.mask
            mask = read_mask(file)
        if mask.shape != size[::-1]:
            raise ValueError(
                f"{self.path}: the image has {size[0]}×{size[1]} pixels and its mask"
                f" {mask.shape[1]}×{mask.shape[0]}, in {file.name}"
            )
        if not mask.any() and not isinstance(self.mask, tuple):
            raise ValueError(f"{self.path}: its mask {self.mask.name} marks no pixel")
        return mask


class FolderDataset(Dataset):
    """Items read from files on access. `MVTecAD` and `folder` create it.

    Args:
        samples: files, labels and masks.
        view: resizes, rotates and crops an image and, in the same way, its mask.
        where: the folder, for messages.
        check: read every image and mask once, so that one error names all corrupt ones.

    Raises:
        ValueError: naming up to ten images or masks that can't be read or do not match.

    Source: this book. Departures: none.
    Test: test_folders.py::test_damaged_files_are_named_together
    """

    def __init__(
        self, samples: Sequence[Sample], view: View, where: Path, check: bool = True
    ):
        self.samples, self._view = list(samples), view
        if check:
            # Pillow releases the GIL while it decodes.
            with ThreadPoolExecutor(2) as pool:
                problems = pool.map(_find_problem, self.samples)
                raise_problems([text for text in problems if text], where)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        number = index % len(self.samples)
        original = read_image(sample.path)
        mask = None
        if sample.mask is not None:
            mask_image = Image.fromarray(
                sample.read_mask(original.size).astype(np.uint8)
            )
            mask = torch.from_numpy(
                np.array(self._view(mask_image, number, Image.Resampling.NEAREST))
            ).bool()
        image = torch.from_numpy(
            np.array(self._view(original, number, Image.Resampling.BICUBIC))
        )
        return Item(
            image.movedim(-1, 0).contiguous().float() / 255,
            sample.label,
            mask,
            str(sample.path),
        )


def _find_problem(sample: Sample) -> str | None:
    try:
        size = read_image(sample.path).size
        if sample.mask is not None:
            sample.read_mask(size)
    except ValueError as error:
        return str(error)


class MVTecAD(FolderDataset):
    """One category of MVTec AD, or of any set in the same layout, prepared as in PaDiM.

    The layout is the published one: category/train/good, category/test/good,
    category/test/(defect) and category/ground_truth/(defect)/(name)_mask.png. The
    fifteen categories are `MVTEC_TEXTURES` and `MVTEC_OBJECTS`. Images are resized
    (bicubic; masks nearest) and then cropped at the centre; greyscale ones get three
    equal channels. The variant "random" creates Rd-MVTec AD: each training and test
    image is rotated by up to 10° in either direction and cropped at random, and its
    mask with it; the draw depends on `seed` and the image's index.

    Args:
        root: the folder of the categories; `archive.unpack` creates it from the
            published archive.
        category: its name.
        split: "train" (normal images only) or "test".
        variant: "centered" or "random".
        resize: side in pixels of the square that the image is resized to first.
        crop: side in pixels of the square cut out of that.
        seed: of the rotations and crops of the variant "random".
        check: read every file once now, so that one error names all corrupt ones.

    Raises:
        ValueError: if a folder is missing, a mask has no image or a defective image no
            mask, or files can't be read or do not match: one error that names up to
            ten.

    Source: PaDiM, arXiv:2011.08785, Sec. IV-A and IV-B; Bergmann et al., CVPR 2019.
        Licence of the data: CC BY-NC-SA 4.0.
    Departures: the paper does not say what fills the corners of a rotated image (here
        black, and not a defect), nor how masks are resized (here nearest neighbour).
    Test: test_folders.py::test_the_official_layout_is_read
    """

    def __init__(
        self,
        root: str | Path,
        category: str,
        split: str,
        variant: str = "centered",
        *,
        resize: int = RESIZE,
        crop: int = CROP,
        seed: int = 0,
        check: bool = True,
    ):
        if split not in ("train", "test") or variant not in VARIANTS:
            raise ValueError(
                f"split={split!r}, variant={variant!r}; expected split 'train'"
                f" or 'test', variant one of {', '.join(VARIANTS)}"
            )
        if not 1 <= crop <= resize:
            raise ValueError(
                f"resize={resize}, crop={crop}; expected 1 ≤ crop ≤ resize, in pixels"
            )
        self.root, self.category, self.split = Path(root), category, split
        self.variant = variant
        known = categories(root)
        if category not in known:
            raise ValueError(
                f"no category {category!r} in {root};"
                f" expected one of {', '.join(known)}"
            )
        self._resize, self._crop, self._seed = resize, crop, seed
        samples = (
            _train_samples(self._folder)
            if split == "train"
            else _test_samples(self._folder)
        )
        super().__init__(samples, self._transform, self._folder, check)

    @property
    def _folder(self) -> Path:
        return self.root / self.category

    def _transform(
        self, image: Image.Image, number: int, resampling: Image.Resampling
    ) -> Image.Image:
        image = image.resize((self._resize, self._resize), resampling)
        margin = self._resize - self._crop
        left = top = round(margin / 2)
        if self.variant == "random":
            random = np.random.default_rng(
                (self._seed, ("train", "test").index(self.split), number)
            )
            image = image.rotate(random.uniform(-MAX_TURN, MAX_TURN), resampling)
            left, top = random.integers(0, margin, size=2, endpoint=True).tolist()
        return image.crop((left, top, left + self._crop, top + self._crop))


def categories(root: str | Path) -> list[str]:
    """List the categories in MVTec AD's layout: the folders that contain `train`.

    Args:
        root: the folder.

    Returns:
        their names in alphabetical order, at least one.

    Raises:
        ValueError: if there is no such folder, or no category in it.

    Source: Bergmann et al., CVPR 2019. Departures: none.
    Test: test_folders.py::test_missing_folders_are_named
    """
    root = _check_folder(root)
    names = sorted(path.name for path in root.iterdir() if (path / "train").is_dir())
    if not names:
        entries = (
            ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        )
        raise ValueError(
            f"no category in {root}: expected folders such as bottle/train/good,"
            f" found {entries}"
        )
    return names


def _train_samples(folder: Path) -> list[Sample]:
    unexpected = [
        path.name
        for path in sorted((folder / "train").iterdir())
        if path.is_dir() and path.name != "good"
    ]
    raise_problems(
        [f"{name}: expected only the folder 'good'" for name in unexpected],
        folder / "train",
    )
    return [
        Sample(path, 0, _NORMAL_MASK)
        for path in _list_images(folder / "train" / "good")
    ]


def _test_samples(folder: Path) -> list[Sample]:
    samples = [
        Sample(path, 0, _NORMAL_MASK) for path in _list_images(folder / "test" / "good")
    ]
    truth, problems = folder / "ground_truth", []
    defects = {path.name for path in (folder / "test").iterdir() if path.is_dir()} - {
        "good"
    }
    masked = (
        {path.name for path in truth.iterdir() if path.is_dir()} - {"good"}
        if truth.is_dir()
        else set()
    )
    for defect in sorted(defects | masked):
        images = list_image_files(folder / "test" / defect) if defect in defects else []
        masks = (
            {path.stem: path for path in list_image_files(truth / defect)}
            if defect in masked
            else {}
        )
        for path in images:
            mask = masks.pop(f"{path.stem}_mask", None)
            if mask is None:
                problems.append(
                    f"test/{defect}/{path.name} has no"
                    f" mask ground_truth/{defect}/{path.stem}_mask.png"
                )
            samples.append(Sample(path, 1, mask))
        problems += [
            f"ground_truth/{defect}/{path.name} has no image in test/{defect}"
            for path in masks.values()
        ]
    raise_problems(problems, folder)
    return samples


def folder(
    root: str | Path,
    *,
    size: int = 224,
    normal: str = "normal",
    abnormal: str = "abnormal",
    videos: str = "*",
    check: bool = True,
) -> FolderDataset:
    """Load a folder of images as a data set, each image resized to a square.

    One of three layouts is recognised by the folders in `root`:

    - the folders `normal` and `abnormal`: labels 0 and 1; either may be missing;
    - images in `root` itself, or video frames in folders with numeric names
      (01_001/000.jpg): all normal;
    - ShanghaiTech Campus, which no chapter uses: `root`/frames/(video)/000.jpg, and for
      its test part test_frame_mask/(video).npy with the labels and
      test_pixel_mask/(video).npy, (frames, height, width), with the masks.

    Args:
        root: the folder; for ShanghaiTech Campus its `training` (after frames were
            extracted from its videos) or `testing`.
        size: side of the square in pixels (bicubic; masks nearest). Nothing is cropped.
        normal: name of the folder of normal images.
        abnormal: name of the folder of defective images.
        videos: pattern of the folders of frames to load: "01_*" is scene 1 of
            ShanghaiTech Campus.
        check: read every file once now, so that one error names all corrupt files;
            False saves the time for large data sets.

    Raises:
        ValueError: if there is no image, if the layout is ambiguous (for example a
            folder "good" and none called `normal`), if labels, masks and frames differ
            in number, or if files cannot be read (the error names up to ten).

    Source: this book; Liu et al., arXiv:1712.09867 (ShanghaiTech Campus); PaDiM,
        arXiv:2011.08785, Sec. IV-B.
    Departures: PaDiM resizes ShanghaiTech Campus to 256×256.
    Test: test_folders.py::test_folders_of_normal_and_abnormal_pictures
    """
    root = _check_folder(root)
    if size < 1:
        raise ValueError(
            f"size={size}; expected the side of a square in pixels, at least 1"
        )
    labels = {normal: 0, abnormal: 1}
    present = {name for name in labels if (root / name).is_dir()}
    if present:
        samples = [
            Sample(path, labels[name], None)
            for name in (normal, abnormal)
            if name in present
            for path in _list_images(root / name)
        ]
    elif (root / "frames").is_dir():
        samples = _video_samples(root, videos)
    else:
        samples = _normal_samples(root, videos)
    if not samples:
        raise ValueError(
            f"no image in {root};"
            f" expected images, or folders {normal} and {abnormal} with images"
        )
    return FolderDataset(
        samples,
        lambda image, _, filter: image.resize((size, size), filter),
        root,
        check,
    )


def _normal_samples(root: Path, videos: str) -> list[Sample]:
    folders = [
        path
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    ]
    other = sorted(
        path.name for path in folders if not _FRAMES_FOLDER.fullmatch(path.name)
    )
    if other:
        raise ValueError(
            f"{root} contains the folders {', '.join(other[:10])},"
            " whose labels are not known; expected normal and abnormal, or only images."
            " Pass the names, for example normal='good'"
        )
    if any(
        (root.parent / name).is_dir() for name in ("test_frame_mask", "test_pixel_mask")
    ):
        raise ValueError(
            f"{root} has its labels in {root.parent}; pass {root.parent} instead"
        )
    frames = sorted(
        (path for path in folders if path.match(videos)), key=natural_sort_key
    )
    paths = list_image_files(root) + [
        path for video in frames for path in list_image_files(video)
    ]
    return [Sample(path, 0, None) for path in paths]


def _video_samples(root: Path, videos: str) -> list[Sample]:
    """List ShanghaiTech Campus's frames with labels and masks (0 without files)."""
    label_folder, mask_folder = root / "test_frame_mask", root / "test_pixel_mask"
    if (
        root.name.startswith("test")
        and not label_folder.is_dir()
        and not mask_folder.is_dir()
    ):
        raise ValueError(
            f"{root} has frames but neither test_frame_mask nor test_pixel_mask;"
            " expected one or both"
        )
    samples, problems = [], []
    videos_found = (
        path
        for path in (root / "frames").iterdir()
        if path.is_dir() and path.match(videos)
    )
    for video in sorted(videos_found, key=natural_sort_key):
        paths = list_image_files(video)
        labels, masks = [0] * len(paths), [None] * len(paths)
        try:
            if mask_folder.is_dir():
                file = mask_folder / f"{video.name}.npy"
                frame_masks = _map_array(file, (len(paths), None, None))
                masks = [(file, number) for number in range(len(paths))]
                if not label_folder.is_dir():
                    labels = [int(frame.any()) for frame in frame_masks]
            if label_folder.is_dir():
                values = _map_array(label_folder / f"{video.name}.npy", (len(paths),))
                labels = [int(value) for value in values != 0]
        except ValueError as error:
            problems.append(str(error))
        samples += [Sample(*row) for row in zip(paths, labels, masks, strict=True)]
    raise_problems(problems, root)
    return samples


def _map_array(path: Path, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """Map an array file into memory; a length of None in `shape` is not checked."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # NumPy reads the header with Python's parser and passes on its errors.
    except Exception as error:
        raise ValueError(f"{path} can't be read as an array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{path} contains several arrays; expected one, as numpy.save writes it"
        )
    if shape and (
        array.ndim != len(shape)
        or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True))
    ):
        expected = " × ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{path} is of shape {array.shape}; expected {expected}, one per frame"
        )
    return array


def _check_folder(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"no folder {root}; check the path"
            + (", or unpack the archive" if root.is_file() else "")
        )
    return root


def _list_images(folder: Path) -> list[Path]:
    """List the images of a folder; raise if there is none."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected one with images")
    paths = list_image_files(folder)
    if not paths:
        raise ValueError(f"no image in {folder}; expected files such as 000.png")
    return paths
