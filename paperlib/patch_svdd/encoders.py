"""Patch SVDD's encoders, which embed all patches of an image in one pass.

No layer pads, so a patch's embedding does not depend on its surroundings, and
neighbouring patches share most of the computation: applied to a whole image, the same
layers return the embeddings of all its patches.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperlib.storage import is_dense, load_state, read_tensors, write_tensors
from paperlib.validation import check_images

SMALL_PATCH, BIG_PATCH = 32, 64  # Patch SVDD, Sec. 4: K in pixels
SMALL_STRIDE, BIG_STRIDE = 4, 16  # Patch SVDD, Sec. 4: S in pixels, for K = 32 and 64
SLOPE = 0.1  # Patch SVDD, Sec. 4: negative slope of the LeakyReLU
TILE = 1024  # side in pixels of the tiles in which large images are embedded
ENCODER_FORMAT = "paperlib.patch_encoder.1"


class Embeddings(NamedTuple):
    """Embeddings of all patches; [n, i, j] is the patch at (i, j) times the stride.

    Fields:
        small: (N, h, w, D), patches of 32×32 pixels.
        big: (N, h', w', D), patches of 64×64 pixels.
    """

    small: Tensor
    big: Tensor


class _DenseEncoder(nn.Module):
    """Convolutions without padding, from a patch of `side` pixels to D numbers.

    A subclass sets `side`, the `step` in pixels between neighbouring positions of its
    last feature map, and its layers, the last of which returns the embedding.
    """

    side: int
    step: int

    def __init__(
        self, channels: tuple[int, ...], kernel: int, strides: tuple[int, ...]
    ):
        super().__init__()
        self.dimensions, self.strides = channels[-1], strides
        for i, ((before, after), stride) in enumerate(
            zip(pairwise(channels), strides, strict=True), 1
        ):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, stride))
        initialize(self)

    def forward(self, patches: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embed patches of `side` × `side` pixels."""
        if patches.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"patches of shape {tuple(patches.shape)}; expected (N, 3, {self.side},"
                f" {self.side}). For whole images call .embed(images)"
            )
        return self.dense(patches).flatten(1)

    def dense(
        self, images: Float[Tensor, "n 3 h w"], stride: int | None = None
    ) -> Float[Tensor, "n d i j"]:
        """Embed patches with gradients, at a stride that is a multiple of `step`."""
        layers = list(self.children())
        for layer, layer_stride in zip(layers[:-1], self.strides, strict=False):
            images = F.leaky_relu(
                F.conv2d(images, layer.weight, layer.bias, layer_stride),
                SLOPE,
                inplace=True,
            )
        last_stride = (
            stride or self.step
        ) // self.step  # Only the requested positions are computed.
        return torch.tanh(
            F.conv2d(images, layers[-1].weight, layers[-1].bias, last_stride)
        )

    @torch.no_grad()
    def embed(
        self, images: Tensor, stride: int, *, tile: int = TILE
    ) -> Float[Tensor, "n i j d"]:
        """Embed patches of images at any stride; see `HierarchicalEncoder.embed`."""
        return _embed_grid(
            self, _check_input(images, self, self.side, (stride,), tile), stride, tile
        )


class PatchEncoder(_DenseEncoder):
    """The small encoder, f_small: eight 3×3 convolutions, for 32×32 patches.

    Channels 3 → 32 → 64 → 128 → 128 → 64 → 32 → 32 → D, the first at stride 2,
    LeakyReLU 0.1 between them, tanh at the end. `forward(patches)` maps (N, 3, 32, 32)
    to (N, D); `embed(images, stride)` returns (N, h, w, D); `dense`, for training,
    returns (N, D, h, w) at stride 2.

    Args:
        dimensions: of an embedding, D.

    Source: Patch SVDD, arXiv:2006.16067, Sec. 4 and its released code.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_one_pass_equals_patch_by_patch
    """

    side, step = SMALL_PATCH, 2

    def __init__(self, dimensions: int = 64):
        super().__init__(
            (3, 32, 64, 128, 128, 64, 32, 32, _check_dimensions(dimensions)),
            3,
            (2, 1, 1, 1, 1, 1, 1, 1),
        )


class FlatEncoder(_DenseEncoder):
    """The encoder without hierarchy: four 5×5 convolutions, from 64×64 patches.

    Channels 3 → 64 → 64 → 128 → D, all but the last at stride 2; methods as in
    `PatchEncoder`.

    Args:
        dimensions: of an embedding, D.

    Source: Patch SVDD, arXiv:2006.16067, Sec. 3.3 (the ablation) and its released code.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_one_pass_equals_patch_by_patch
    """

    side, step = BIG_PATCH, 8

    def __init__(self, dimensions: int = 64):
        super().__init__(
            (3, 64, 64, 128, _check_dimensions(dimensions)), 5, (2, 2, 2, 1)
        )


class HierarchicalEncoder(nn.Module):
    r"""Both encoders of Patch SVDD: the big one aggregates outputs of the small one.

    $$f_{\text{big}}(p) = g_{\text{big}}(f_{\text{small}}(p_1), \dots,
      f_{\text{small}}(p_4))$$
    with $p_1 \dots p_4$ the quarters of a 64×64 patch, and $g_{\text{big}}$ a 2×2
    convolution D → 128, LeakyReLU 0.1, a 1×1 convolution 128 → D and tanh.

    `forward(patches)` maps (N, 3, 64, 64) to the big embeddings (N, D).
    Parameters are named as in the released code: `enc.conv1` to `enc.conv8`, `conv1`,
    `conv2`.

    Args:
        dimensions: of an embedding, D.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 7 and Sec. 4.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_the_big_encoder_sees_a_patch_through_its_quarters
    """

    side, step = BIG_PATCH, PatchEncoder.step

    def __init__(self, dimensions: int = 64):
        super().__init__()
        self.enc = PatchEncoder(dimensions)
        self.conv1 = nn.Conv2d(dimensions, 128, 2)
        self.conv2 = nn.Conv2d(128, dimensions, 1)
        initialize(self.conv1)
        initialize(self.conv2)

    @property
    def small(self) -> PatchEncoder:
        """The encoder of 32×32 patches."""
        return self.enc

    @property
    def dimensions(self) -> int:
        """D, the length of an embedding."""
        return self.enc.dimensions

    def forward(self, patches: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embed patches of 64×64 pixels."""
        if patches.shape[-2:] != (BIG_PATCH, BIG_PATCH):
            raise ValueError(
                f"patches of shape {tuple(patches.shape)}; expected (N, 3, 64, 64)."
                " For 32×32 patches call .small, for whole images .embed(images)"
            )
        n, half = len(patches), SMALL_PATCH
        quarters = (
            patches.reshape(n, 3, 2, half, 2, half)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, 3, half, half)
        )
        small = self.enc(quarters).view(n, 2, 2, -1).permute(0, 3, 1, 2)
        return self.aggregate(small, SMALL_PATCH).flatten(1)

    def aggregate(
        self,
        small: Float[Tensor, "n d h w"],
        stride: int,
        skip: int = 1,
        *,
        exact: bool = True,
    ) -> Float[Tensor, "n d i j"]:
        """Compute big embeddings, at every `skip`-th position, from small ones.

        The map's stride divides 32. The quarters of a big patch lie 32 pixels apart, so
        the 2×2 convolution has a dilation of 32 / stride. `exact` sums in double
        precision, so that an embedding does not depend on the order of summation in a
        kernel; compared with the small encoder it costs little.
        """
        weights = [*self.conv1.parameters(), *self.conv2.parameters()]
        x = small
        if exact:
            x, weights = small.double(), [weight.double() for weight in weights]
        hidden = F.conv2d(x, *weights[:2], skip, dilation=SMALL_PATCH // stride)
        hidden = F.leaky_relu(hidden, SLOPE, inplace=True)
        return torch.tanh(F.conv2d(hidden, *weights[2:])).to(small.dtype)

    def dense(
        self, images: Float[Tensor, "n 3 h w"]
    ) -> tuple[Float[Tensor, "n d h1 w1"], Float[Tensor, "n d h2 w2"]]:
        """Embed all small and big patches at stride 2, with gradients, for training."""
        small = self.enc.dense(images)
        return small, self.aggregate(small, self.enc.step, exact=False)

    @torch.no_grad()
    def embed(
        self,
        images: Tensor,
        stride_small: int = SMALL_STRIDE,
        stride_big: int = BIG_STRIDE,
        *,
        tile: int = TILE,
    ) -> Embeddings:
        """Embed all patches of images at both scales.

        At even strides the small encoder runs once over the image for both scales; an
        embedding equals that of the patch alone up to rounding (2e-6). At an odd stride
        patches are cropped and run one by one.

        Args:
            images: after subtracting the mean image (without other scaling), at least
                64 × 64 pixels, of the encoder's dtype and on its device.
            stride_small: pixels from one 32×32 patch to the next.
            stride_big: pixels from one 64×64 patch to the next.
            tile: larger images are split into tiles of this side in pixels; it bounds
                the memory and does not change the result.

        Returns:
            for 256×256 images at the default strides (N, 57, 57, D) and (N, 13, 13, D),
            without gradients.

        Raises:
            ValueError: for images smaller than 64 pixels, not a finite floating-point
                batch (N, 3, H, W), of another dtype or device; a stride below 1, or a
                tile smaller than a patch.

        Source: Patch SVDD, arXiv:2006.16067, Alg. 2.
        Departures: the released code crops each patch, 3,249 + 169 per image, and runs
            it separately.
        Test: test_encoders.py::test_both_scales_of_an_image_equal_patch_by_patch
        """
        images = _check_input(images, self, BIG_PATCH, (stride_small, stride_big), tile)
        even = [
            stride
            for stride in (stride_small, stride_big)
            if stride % self.enc.step == 0
        ]
        shared = math.gcd(SMALL_PATCH, *even)
        grid = _embed_grid(self.enc, images, shared, tile) if even else None
        if stride_small in even:
            skip = stride_small // shared
            small = grid[:, ::skip, ::skip].contiguous()
        else:
            small = _embed_grid(self.enc, images, stride_small, tile)
        if stride_big in even:
            big = self.aggregate(
                grid.permute(0, 3, 1, 2), shared, stride_big // shared
            ).permute(0, 2, 3, 1)
        else:
            big = _embed_separately(self, images, stride_big)
        return Embeddings(small, big.contiguous())

    def save(self, path: str | Path) -> None:
        """Write the weights as a safetensors file, atomically."""
        write_tensors(path, self.state_dict(), {}, ENCODER_FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "HierarchicalEncoder":
        """Read what `save` wrote, on the CPU.

        Raises:
            ValueError: naming the file, if it is another kind of file or corrupt.
        """
        _, tensors = read_tensors(
            path, ENCODER_FORMAT, "saved encoder", "save it again"
        )
        return encoder_from_weights(tensors, path)


def initialize(encoder: nn.Module, *, as_released: bool = False) -> None:
    r"""Initialise every layer so that the signal's variance is preserved (Kaiming).

    $$w \sim \mathcal N\big(0, 2 / ((1 + 0.1^2)\,n)\big)$$
    with n the layer's inputs per output; biases are 0.

    Args:
        encoder: a module of convolutions and linear layers, changed in place, with
            torch's global generator.
        as_released: True uses PyTorch's default instead, as the released code does:
            uniform weights with a sixth of that variance. After eight layers the signal
            is then about a thousandth, and training starts slowly.

    Source: He et al., arXiv:1502.01852, Eq. 15, for a LeakyReLU of slope 0.1.
    Departures: see `as_released`.
    Test: test_encoders.py::test_the_signal_keeps_its_size_through_the_layers
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if as_released:
                module.reset_parameters()
            else:
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)


def load_released_weights(path: str | Path) -> HierarchicalEncoder:
    """Read an encoder saved by the authors' released code (`enchier.pkl`).

    Only tensors are read: no code in a pickle is executed.

    Args:
        path: a file that `torch.save` wrote from the encoder's state dict; the authors'
            files have the format before PyTorch 1.6.

    Returns:
        the encoder on the CPU; its dimension D is the file's.

    Raises:
        ValueError: naming the file, unless it contains complete and finite float32
            weights of this encoder.

    Source: the released code of Patch SVDD. Departures: none.
    Test: test_encoders.py::test_released_weights_are_read
    """
    try:
        tensors = load_state(path)
    except Exception as error:  # torch raises many kinds of errors for other files
        raise ValueError(
            f"{path} can't be read as weights saved by torch.save ({error})"
        ) from error
    return encoder_from_weights(tensors, path)


def encoder_from_weights(tensors: object, path: str | Path) -> HierarchicalEncoder:
    """Create the encoder with these weights; raise if they are not exactly its weights.

    Args:
        tensors: name → float32 weight.
        path: of the file that they were read from, for errors.

    Raises:
        ValueError: naming the file and the mismatch.

    Source: this book. Departures: none.
    Test: test_encoders.py::test_any_other_file_is_refused_by_name
    """
    expected = f"expected the float32 weights of a Patch SVDD encoder in {path}"
    if not isinstance(tensors, dict) or not all(
        isinstance(value, Tensor) for value in tensors.values()
    ):
        raise ValueError(
            f"{expected}, a dictionary of tensors; received a {type(tensors).__name__}"
        )
    with torch.device("meta"):
        names = set(HierarchicalEncoder(1).state_dict())
    if set(tensors) != names:
        unmatched = ", ".join(sorted(map(str, set(tensors) ^ names))[:4])
        raise ValueError(
            f"{expected}, named enc.conv1.weight to conv2.bias;"
            f" missing or unknown: {unmatched}"
        )
    if not all(is_dense(tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{expected}; the shapes of its tensors do not match the stored data"
        )
    dimensions = tensors["conv2.bias"].numel()
    if dimensions == 0:
        raise ValueError(f"{expected}; its embeddings have 0 dimensions")
    with torch.device("meta"):
        encoder = HierarchicalEncoder(dimensions)
    for name, reference in encoder.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != reference.shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{expected}; {name} is {tuple(tensor.shape)} of {tensor.dtype},"
                f" not {tuple(reference.shape)} of float32"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{expected}; {name} contains NaN or infinite values")
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _check_dimensions(dimensions: int) -> int:
    if dimensions < 1:
        raise ValueError(
            f"dimensions={dimensions}; expected at least 1 number per patch"
        )
    return dimensions


def _check_input(
    images: Tensor, encoder: nn.Module, side: int, strides: tuple[int, ...], tile: int
) -> Tensor:
    images = check_images(images)
    if images.shape[1] != 3:
        raise ValueError(
            f"images of shape {tuple(images.shape)}; expected 3 channels."
            " Repeat a grey channel: .expand(-1, 3, …)"
        )
    if min(images.shape[-2:]) < side:
        raise ValueError(
            f"images of {images.shape[-2]}×{images.shape[-1]}"
            f" pixels are smaller than a patch of {side}×{side};"
            " resize them, for example to 256×256 as in the paper"
        )
    if min(strides) < 1 or tile < side:
        raise ValueError(
            f"strides {strides} and tile={tile};"
            f" expected strides of at least 1, a tile of at least {side}"
        )
    weight = next(encoder.parameters())
    if images.dtype != weight.dtype or images.device != weight.device:
        raise ValueError(
            f"images are {images.dtype} on {images.device} and the encoder"
            f" is {weight.dtype} on {weight.device}; expected the same."
            " Convert one with .to(…)"
        )
    return images


def _embed_grid(
    encoder: _DenseEncoder, images: Tensor, stride: int, tile: int
) -> Tensor:
    """Embed patches at a stride, (N, h, w, D): one pass per tile, if possible."""
    if stride % encoder.step:
        return _embed_separately(encoder, images, stride)
    n, _, height, width = images.shape
    rows, columns = (
        (length - encoder.side) // stride + 1 for length in (height, width)
    )
    out = images.new_empty(n, rows, columns, encoder.dimensions)
    tile_positions = (tile - encoder.side) // stride + 1  # along a side of a tile
    # One image at a time fits a CPU's cache; a GPU needs larger batches.
    n_images = 1 if images.device.type == "cpu" else max(1, tile**2 // (height * width))
    for first in range(0, n, n_images):
        for top in range(0, rows, tile_positions):
            for left in range(0, columns, tile_positions):
                bottom = min(rows, top + tile_positions)
                right = min(columns, left + tile_positions)
                image_tile = images[
                    first : first + n_images,
                    :,
                    top * stride : (bottom - 1) * stride + encoder.side,
                    left * stride : (right - 1) * stride + encoder.side,
                ]
                embeddings = encoder.dense(image_tile, stride)
                out[first : first + n_images, top:bottom, left:right] = (
                    embeddings.permute(0, 2, 3, 1)
                )
    return out


def _embed_separately(encoder: nn.Module, images: Tensor, stride: int) -> Tensor:
    """Embed patches at a stride, (N, h, w, D), each separately."""
    patches = images.unfold(2, encoder.side, stride).unfold(3, encoder.side, stride)
    rows = [
        [encoder(row.transpose(0, 1)) for row in image.unbind(1)] for image in patches
    ]
    return torch.stack([torch.stack(image) for image in rows])
