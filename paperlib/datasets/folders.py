"""Data sets that lie in folders: MVTec AD as it is published, and anyone's pictures."""

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
MVTEC_OBJECTS = (
    "bottle",
    "cable",
    "capsule",
    "hazelnut",
    "metal_nut",
    "pill",
    "screw",
    "toothbrush",
    "transistor",
    "zipper",
)
RESIZE, CROP = 256, 224  # PaDiM, Sec. IV-B: pixels
MAX_TURN = 10  # PaDiM, Sec. IV-A: degrees to either side, of Rd-MVTec AD
VARIANTS = ("centered", "random")
# 01_001: anything else might hold defects, and is never taken for normal
_FRAMES_FOLDER = re.compile(r"[\d_-]+")
_NORMAL_MASK = Path()  # stands for a mask without a file: nothing is marked
# picture, its number, filter → what is shown
View = Callable[[Image.Image, int, Image.Resampling], Image.Image]


class Sample(NamedTuple):
    """A picture's file, its label, and its mask: a file, a frame of a file of masks,
    nothing marked, or not known.
    """

    path: Path
    label: int
    mask: Path | tuple[Path, int] | None

    def read_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Read the mask, bool of shape (height, width); `size` is (width, height) of
        the picture.
        """
        if self.mask == _NORMAL_MASK:
            return np.zeros(size[::-1], dtype=bool)
        if isinstance(self.mask, tuple):
            file, frame = self.mask
            mask = _array(file)[frame] != 0
        else:
            file = self.mask
            mask = read_mask(file)
        if mask.shape != size[::-1]:
            raise ValueError(
                f"{self.path}: the picture has {size[0]}×{size[1]} pixels and its mask"
                f" {mask.shape[1]}×{mask.shape[0]}, in {file.name}"
            )
        if not mask.any() and not isinstance(self.mask, tuple):
            raise ValueError(f"{self.path}: its mask {self.mask.name} marks no pixel")
        return mask


class FolderDataset(Dataset):
    """Items read from files as they are asked for. `MVTecAD` and `folder` make it.

    Args:
        samples: what there is.
        view: resizes, turns and crops a picture and, in the same way, its mask.
        where: the folder, for messages.
        check: read every picture and mask once, so that all damaged ones are named
            together and at once.

    Raises:
        ValueError: naming up to ten pictures or masks that can't be read or do not fit
            each other.

    Source: this book. Departures: none.
    Test: test_folders.py::test_damaged_files_are_named_together
    """

    def __init__(
        self, samples: Sequence[Sample], view: View, where: Path, check: bool = True
    ):
        self.samples, self._view = list(samples), view
        if check:
            # Pillow frees Python's lock while it decodes
            with ThreadPoolExecutor(2) as pool:
                raise_problems(
                    [
                        problem
                        for problem in pool.map(_problem, self.samples)
                        if problem
                    ],
                    where,
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        number = index % len(self.samples)
        picture = read_image(sample.path)
        mask = None
        if sample.mask is not None:
            full = Image.fromarray(sample.read_mask(picture.size).astype(np.uint8))
            mask = torch.from_numpy(
                np.array(self._view(full, number, Image.Resampling.NEAREST))
            ).bool()
        shown = torch.from_numpy(
            np.array(self._view(picture, number, Image.Resampling.BICUBIC))
        )
        return Item(
            shown.movedim(-1, 0).contiguous().float() / 255,
            sample.label,
            mask,
            str(sample.path),
        )


def _problem(sample: Sample) -> str | None:
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
    fifteen categories are `MVTEC_TEXTURES` and `MVTEC_OBJECTS`. Pictures are resized
    (bicubic; masks nearest) and then cropped in the middle; greyscale ones get three
    equal channels. The variant "random" makes Rd-MVTec AD: each picture, of training
    and test alike, is turned by up to 10° to either side and cropped anywhere, and its
    mask with it, as `seed` and its number say.

    Args:
        root: the folder of the categories; `archive.unpack` makes it from the published
            archive.
        category: its name.
        split: "train" (normal pictures only) or "test".
        variant: "centered" or "random".
        resize: side in pixels of the square that the picture is resized to first.
        crop: side in pixels of the square cut out of that.
        seed: of the turns and crops of the variant "random".
        check: read every file once now, so that all damaged ones are named together.

    Raises:
        ValueError: if a folder is missing, a mask has no picture or a defective picture
            no mask, or files can't be read or do not fit each other: one error that
            names up to ten.

    Source: PaDiM, arXiv:2011.08785, Sec. IV-A and IV-B; Bergmann et al., CVPR 2019.
        Licence of the data: CC BY-NC-SA 4.0.
    Departures: the paper does not say what fills the corners of a turned picture; here
        black, and not a defect. It does not say how masks are resized; here each pixel
        takes the nearest one.
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
        self.root, self.category, self.split, self.variant = (
            Path(root),
            category,
            split,
            variant,
        )
        known = categories(root)
        if category not in known:
            raise ValueError(
                f"no category {category!r} in {root}; there are {', '.join(known)}"
            )
        self._resize, self._crop, self._seed = resize, crop, seed
        samples = (
            _train_samples(self._folder)
            if split == "train"
            else _test_samples(self._folder)
        )
        super().__init__(samples, self._shown, self._folder, check)

    @property
    def _folder(self) -> Path:
        return self.root / self.category

    def _shown(
        self, picture: Image.Image, number: int, resampling: Image.Resampling
    ) -> Image.Image:
        picture = picture.resize((self._resize, self._resize), resampling)
        margin = self._resize - self._crop
        left = top = round(margin / 2)
        if self.variant == "random":
            random = np.random.default_rng(
                (self._seed, ("train", "test").index(self.split), number)
            )
            picture = picture.rotate(random.uniform(-MAX_TURN, MAX_TURN), resampling)
            left, top = random.integers(0, margin, size=2, endpoint=True).tolist()
        return picture.crop((left, top, left + self._crop, top + self._crop))


def categories(root: str | Path) -> list[str]:
    """Name the categories in a folder of MVTec AD's layout: those of its folders that
    have a folder `train`.

    Args:
        root: the folder.

    Returns:
        their names in alphabetical order, at least one.

    Raises:
        ValueError: if there is no such folder, or no category in it.

    Source: Bergmann et al., CVPR 2019. Departures: none.
    Test: test_folders.py::test_missing_folders_are_named
    """
    root = _existing(root)
    found = sorted(path.name for path in root.iterdir() if (path / "train").is_dir())
    if not found:
        inside = (
            ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        )
        raise ValueError(
            f"no category in {root}: expected folders such as bottle/train/good;"
            f" there is {inside}"
        )
    return found


def _train_samples(folder: Path) -> list[Sample]:
    others = [
        path.name
        for path in sorted((folder / "train").iterdir())
        if path.is_dir() and path.name != "good"
    ]
    raise_problems(
        [f"{name}: only 'good' belongs here" for name in others], folder / "train"
    )
    return [
        Sample(path, 0, _NORMAL_MASK)
        for path in _pictures_in(folder / "train" / "good")
    ]


def _test_samples(folder: Path) -> list[Sample]:
    samples = [
        Sample(path, 0, _NORMAL_MASK) for path in _pictures_in(folder / "test" / "good")
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
        pictures = (
            list_image_files(folder / "test" / defect) if defect in defects else []
        )
        masks = (
            {path.stem: path for path in list_image_files(truth / defect)}
            if defect in masked
            else {}
        )
        for path in pictures:
            mask = masks.pop(f"{path.stem}_mask", None)
            if mask is None:
                problems.append(
                    f"test/{defect}/{path.name} has no"
                    f" mask ground_truth/{defect}/{path.stem}_mask.png"
                )
            samples.append(Sample(path, 1, mask))
        problems += [
            f"ground_truth/{defect}/{path.name} has no picture in test/{defect}"
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
    Departures: PaDiM takes ShanghaiTech Campus at 256×256.
    Test: test_folders.py::test_folders_of_normal_and_abnormal_pictures
    """
    root = _existing(root)
    if size < 1:
        raise ValueError(
            f"size={size}; expected the side of a square in pixels, at least 1"
        )
    labels = {normal: 0, abnormal: 1}
    inside = {name for name in labels if (root / name).is_dir()}
    if inside:
        samples = [
            Sample(path, labels[name], None)
            for name in (normal, abnormal)
            if name in inside
            for path in _pictures_in(root / name)
        ]
    elif (root / "frames").is_dir():
        samples = _video_samples(root, videos)
    else:
        samples = _normal_samples(root, videos)
    if not samples:
        raise ValueError(
            f"no picture in {root};"
            f" expected pictures, or folders {normal} and {abnormal} with pictures"
        )
    return FolderDataset(
        samples,
        lambda picture, _, filter: picture.resize((size, size), filter),
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
            f"{root} holds the folders {', '.join(other[:10])},"
            " and what they hold is not clear; expected normal and abnormal,"
            " or pictures alone. Pass normal='good', say, to give the names"
        )
    if any(
        (root.parent / name).is_dir() for name in ("test_frame_mask", "test_pixel_mask")
    ):
        raise ValueError(
            f"{root} has labels beside it in {root.parent}; pass {root.parent} instead"
        )
    frames = sorted(
        (path for path in folders if path.match(videos)), key=natural_sort_key
    )
    paths = list_image_files(root) + [
        path for video in frames for path in list_image_files(video)
    ]
    return [Sample(path, 0, None) for path in paths]


def _video_samples(root: Path, videos: str) -> list[Sample]:
    """Frames with ShanghaiTech Campus's labels and masks; without either, all normal
    (its training part).
    """
    label_folder, mask_folder = root / "test_frame_mask", root / "test_pixel_mask"
    if (
        root.name.startswith("test")
        and not label_folder.is_dir()
        and not mask_folder.is_dir()
    ):
        raise ValueError(
            f"{root} has no test_frame_mask and no test_pixel_mask beside frames;"
            " expected one or both"
        )
    samples, problems = [], []
    found = (
        path
        for path in (root / "frames").iterdir()
        if path.is_dir() and path.match(videos)
    )
    for video in sorted(found, key=natural_sort_key):
        paths = list_image_files(video)
        labels, masks = [0] * len(paths), [None] * len(paths)
        try:
            if mask_folder.is_dir():
                file = mask_folder / f"{video.name}.npy"
                marked = _array(file, (len(paths), None, None))
                masks = [(file, number) for number in range(len(paths))]
                if not label_folder.is_dir():
                    labels = [int(frame.any()) for frame in marked]
            if label_folder.is_dir():
                values = _array(label_folder / f"{video.name}.npy", (len(paths),))
                labels = [int(value) for value in values != 0]
        except ValueError as error:
            problems.append(str(error))
        samples += [Sample(*one) for one in zip(paths, labels, masks, strict=True)]
    raise_problems(problems, root)
    return samples


def _array(path: Path, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """Map an array file into memory; a length of None in `shape` is not checked."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # NumPy reads the header with Python's parser, whose errors come through
    except Exception as error:
        raise ValueError(f"{path} can't be read as an array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"{path} holds several arrays; expected one, as numpy.save writes it"
        )
    if shape and (
        array.ndim != len(shape)
        or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True))
    ):
        expected = " × ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{path} is of shape {array.shape}; expected {expected}, one for each frame"
        )
    return array


def _existing(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"no folder {root}; check the path"
            + (", or unpack the archive" if root.is_file() else "")
        )
    return root


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder that must have some."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected one with pictures")
    found = list_image_files(folder)
    if not found:
        raise ValueError(f"no picture in {folder}; expected files such as 000.png")
    return found
