"""Data sets in folders: MVTec AD as published, and the user's own images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from paperlib.image_files import (
    check_depth,
    list_image_files,
    raise_problems,
    read_image,
    read_mask,
    resize_images,
)
from paperlib.items import Item
from paperlib.validation import UnusableFile, as_path, check_choice, check_integers

MVTEC_TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
MVTEC_OBJECTS = tuple(
    "bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor"
    " zipper".split()
)
RESIZE, CROP = 256, 224  # PaDiM, Sec. IV-B: pixels
MAX_TURN = 10  # PaDiM, Sec. IV-A: degrees in either direction, of Rd-MVTec AD
NORMAL = ("good", "normal")  # names of folders of normal images
SPLITS, VARIANTS = ("train", "test"), ("centered", "random")
# Image or mask, its index, whether it is a mask → (3, h, w) in [0, 1], or (h, w).
View = Callable[[Image.Image, int, bool], Tensor]


class Sample(NamedTuple):
    """An image file, its label, and the file of its mask, None without a defect."""

    path: Path
    label: int
    mask: Path | None

    def read_mask(self, size: tuple[int, int]) -> np.ndarray:
        """Read the mask, bool (h, w), of an image of `size` (width, height)."""
        if self.mask is None:
            return np.zeros(size[::-1], dtype=bool)
        mask = read_mask(self.mask)
        if mask.shape != size[::-1]:
            raise UnusableFile(
                f"{self.path}: the image has {size[0]}×{size[1]} pixels and its mask"
                f" {mask.shape[1]}×{mask.shape[0]}, in {self.mask.name}"
            )
        if mask.all() or not mask.any():
            marked = "every pixel" if mask.any() else "no pixel"
            raise UnusableFile(f"{self.path}: its mask {self.mask.name} marks {marked}")
        return mask


class FolderDataset(Dataset):
    """Items read from files on access. `MVTecAD` and `folder` create it.

    Reading an item raises UnusableFile, with the file's name, if the image or its mask
    can't be read or do not match.

    Args:
        samples: files, labels and masks.
        view: resizes, rotates and crops an image and, in the same way, its mask.
        has_masks: False if the items have no masks.
        where: the folder, for errors and the repr.
        bits: depth of the data in 16-bit files, as for `read_image`.

    Raises:
        ValueError: if `bits` is None and all 16-bit images leave the top bits empty.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        view: View,
        has_masks: bool,
        where: str | Path,
        bits: int | None = None,
    ):
        self.samples, self._view, self.has_masks = list(samples), view, has_masks
        self.where, self.bits = where, bits
        check_depth([sample.path for sample in self.samples], where, bits)

    def __repr__(self) -> str:
        """Name the folder and count the items."""
        n, bits = len(self), f", bits={self.bits}" * (self.bits is not None)
        return f"{type(self).__name__}({str(self.where)!r}: {n} items{bits})"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample, number = self.samples[index], index % len(self.samples)
        original = read_image(sample.path, self.bits)
        image, mask = self._view(original, number, False), None
        if self.has_masks:
            mask = Image.fromarray(sample.read_mask(original.size).astype(np.uint8))
            mask = self._view(mask, number, True).bool()
        return Item(image, sample.label, mask, str(sample.path))


class MVTecAD(FolderDataset):
    """One category of MVTec AD, or of any set in the same layout, prepared as in PaDiM.

    The layout is the published one: category/train/good, category/test/good,
    category/test/(defect) and category/ground_truth/(defect)/(name)_mask.png. Normal
    images may be in folders "normal" instead of "good", all of these may contain
    folders, and a mask may have the name of its image. Without any mask the defective
    images have labels only. The fifteen published categories are `MVTEC_TEXTURES` and
    `MVTEC_OBJECTS`. Images are resized
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
        bits: depth of the data in 16-bit files, as for `read_image`.

    Raises:
        ValueError: if a folder is missing, or a mask has no image or a defective image
            no mask: one error that names up to ten; or if all 16-bit images leave the
            top bits empty and `bits` is None. Files are read, and corrupt ones found,
            when an item is used.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from paperlib.datasets import MVTecAD
        >>> for name in ("train/good/0", "test/good/0", "test/dirt/0"):
        ...     path = Path("data/tile", f"{name}.png")
        ...     path.parent.mkdir(parents=True)
        ...     Image.new("RGB", (300, 300), "grey").save(path)
        >>> truth = Path("data/tile/ground_truth/dirt")
        >>> truth.mkdir(parents=True)
        >>> mask = Image.new("L", (300, 300))
        >>> mask.paste(255, (100, 100, 200, 200))
        >>> mask.save(truth / "0_mask.png")
        >>> test = MVTecAD("data", "tile", "test")
        >>> [item.label for item in test], test[1].image.shape, test[1].mask.shape
        ([0, 1], torch.Size([3, 224, 224]), torch.Size([224, 224]))

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
        bits: int | None = None,
    ):
        check_choice("split", split, SPLITS)
        check_choice("variant", variant, VARIANTS)
        check_choice("category", category, categories(root))
        check_integers(resize=resize, crop=crop)
        check_integers(0, seed=seed)
        if crop > resize:
            raise ValueError(f"resize={resize}, crop={crop}; expected crop ≤ resize")
        self.root, self.category, self.split = Path(root), category, split
        self.variant = variant
        self._resize, self._crop, self._seed = resize, crop, seed
        where = self.root / category
        samples = _mvtec_samples(where, split)
        has_masks = all(bool(sample.label) == bool(sample.mask) for sample in samples)
        super().__init__(samples, self._transform, has_masks, where / split, bits)

    def _transform(self, image: Image.Image, number: int, is_mask: bool) -> Tensor:
        resampling = Image.Resampling.NEAREST if is_mask else Image.Resampling.BICUBIC
        image = image.resize((self._resize, self._resize), resampling)
        margin = self._resize - self._crop
        left = top = round(margin / 2)
        if self.variant == "random":
            random = np.random.default_rng(
                (self._seed, SPLITS.index(self.split), number)
            )
            image = image.rotate(random.uniform(-MAX_TURN, MAX_TURN), resampling)
            left, top = random.integers(0, margin, size=2, endpoint=True).tolist()
        image = image.crop((left, top, left + self._crop, top + self._crop))
        return torch.from_numpy(np.array(image)) if is_mask else _to_tensor(image)


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
    entries = sorted(path.name for path in root.iterdir())
    names = [name for name in entries if (root / name / "train").is_dir()]
    if not names:
        raise ValueError(
            f"no category in {root}: expected folders such as bottle/train/good,"
            f" found {', '.join(entries[:10]) or 'nothing'}"
        )
    return names


def _mvtec_samples(folder: Path, split: str) -> list[Sample]:
    """List the normal images of a split, and then the defective ones."""
    names = _subfolders(folder / split)
    good = next((name for name in NORMAL if name in names), NORMAL[0])
    others = names - {good}
    unexpected = others if split == "train" else others & {*NORMAL}
    raise_problems(
        [f"{name}: expected only the folder '{good}'" for name in sorted(unexpected)],
        folder / split,
    )
    normal = [Sample(path, 0, None) for path in _list_images(folder / split / good)]
    return normal if split == "train" else normal + _defective_samples(folder, others)


def _defective_samples(folder: Path, defects: set[str]) -> list[Sample]:
    """Pair the defective images with their masks; raise if any has no partner.

    Without a single mask all of them have none.
    """
    masks = {
        path.relative_to(folder / "ground_truth").with_suffix(""): path
        for defect in sorted(_subfolders(folder / "ground_truth") - {*NORMAL})
        for path in list_image_files(folder / "ground_truth" / defect)
    }
    paths = [
        path
        for defect in sorted(defects)
        for path in list_image_files(folder / "test" / defect)
    ]
    if not masks:
        return [Sample(path, 1, None) for path in paths]
    samples, problems = [], []
    for path in paths:
        name = path.relative_to(folder / "test").with_suffix("")
        masked = name.with_name(f"{name.name}_mask")
        mask = masks.pop(masked, None) or masks.pop(name, None)
        samples.append(Sample(path, 1, mask))
        if mask is None:
            problems.append(
                f"{path.relative_to(folder).as_posix()} has no mask"
                f" ground_truth/{masked.as_posix()}.png"
            )
    problems += [
        f"{path.relative_to(folder).as_posix()} has no image in test/{name.parent}"
        for name, path in masks.items()
    ]
    raise_problems(problems, folder)
    return samples


def folder(
    root: str | Path,
    *,
    size: int = 224,
    normal: str = "normal",
    abnormal: str = "abnormal",
    bits: int | None = None,
) -> FolderDataset:
    """Load a folder of images as a data set, each image resized to a square.

    Images in the folders `normal` and `abnormal`, and in folders within these, get the
    labels 0 and 1; either folder may be missing. Without both, images in `root` itself
    are all normal.

    Args:
        root: the folder.
        size: side of the square in pixels; resized as a backbone's `transform` does
            (bilinear with antialiasing). Nothing is cropped.
        normal: name of the folder of normal images.
        abnormal: name of the folder of defective images.
        bits: depth of the data in 16-bit files, as for `read_image`: 12 for a camera of
            12 bits.

    Returns:
        items without masks, the normal ones first. Files are read, and corrupt ones
        found, when an item is used.

    Raises:
        ValueError: if there is no image, the layout is ambiguous (for example a folder
            "good" and none called `normal`), or all 16-bit images leave the top bits
            empty and `bits` is None.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from paperlib.datasets import folder
        >>> for name in ("normal", "abnormal"):
        ...     Path("parts", name).mkdir(parents=True)
        ...     Image.new("RGB", (400, 300), "grey").save(f"parts/{name}/1.png")
        >>> parts = folder("parts", size=128)
        >>> [(item.label, item.image.shape) for item in parts]
        [(0, torch.Size([3, 128, 128])), (1, torch.Size([3, 128, 128]))]
    """
    root = _check_folder(root)
    check_integers(size=size)
    names = sorted(name for name in _subfolders(root) if not name.startswith("."))
    labels = {
        name: label for name, label in ((normal, 0), (abnormal, 1)) if name in names
    }
    if names and not labels:
        raise ValueError(
            f"{root} contains the folders {', '.join(names[:10])}, whose labels are"
            " not known; expected normal and abnormal, or only images."
            " Pass the names, for example normal='good'"
        )
    samples = [
        Sample(path, label, None)
        for name, label in (labels or {".": 0}).items()
        for path in _list_images(root / name, nested=bool(labels))
    ]
    return FolderDataset(
        samples,
        lambda image, *_: resize_images(_to_tensor(image)[None], (size, size))[0],
        has_masks=False,
        where=root,
        bits=bits,
    )


def _to_tensor(image: Image.Image) -> Tensor:
    """Convert 8-bit RGB to (3, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous().float() / 255


def _check_folder(root: str | Path) -> Path:
    root = as_path(root)
    if not root.is_dir():
        raise UnusableFile(f"no folder {root}; check the path, or unpack the archive")
    return root


def _subfolders(folder: Path) -> set[str]:
    """Return the names of the folders in a folder, which may be missing."""
    return {path.name for path in folder.glob("*/")}


def _list_images(folder: Path, nested: bool = True) -> list[Path]:
    """List the images of a folder; raise if there is none."""
    paths = list_image_files(_check_folder(folder), nested)
    if not paths:
        raise ValueError(
            f"no image in {folder}; expected files such as 000.png,"
            " or folders normal and abnormal in a folder of your own"
        )
    return paths
