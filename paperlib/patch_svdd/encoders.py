"""Patch SVDD's encoders: from a patch of pixels to D numbers, for all patches of an
image in one pass.

No layer pads, so a patch's embedding does not depend on what surrounds it, and
neighbouring patches share most of their arithmetic: run on a whole image, the same
layers give the embeddings of all its patches.
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
# Patch SVDD, Sec. 4: S in pixels, for K = 32 and K = 64
SMALL_STRIDE, BIG_STRIDE = (4, 16)
SLOPE = 0.1  # Patch SVDD, Sec. 4: of the LeakyReLU below zero
TILE = 1024  # side in pixels of the piece of an image that is run at once
ENCODER_FORMAT = "paperlib.patch_encoder.1"


class Embeddings(NamedTuple):
    """Embeddings of all patches of N images: [n, i, j] is of the patch whose corner is
    pixel (i, j) times the stride.

    Fields:
        small: (N, h, w, D), patches of 32×32 pixels.
        big: (N, h', w', D), patches of 64×64 pixels.
    """

    small: Tensor
    big: Tensor


class _DenseEncoder(nn.Module):
    """Convolutions without padding that turn one patch of `side` pixels into one
    position of D numbers in (-1, 1).

    A subclass names the side, the `step` in pixels between neighbouring positions of
    its last feature map, and its layers, the last of which gives the embedding.
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
                f" {self.side}). For whole images there is .embed(images)"
            )
        return self.dense(patches).flatten(1)

    def dense(
        self, images: Float[Tensor, "n 3 h w"], stride: int | None = None
    ) -> Float[Tensor, "n d i j"]:
        """Embed the patches of images at a multiple of `step` pixels (by default
        `step`), with gradients.
        """
        layers = list(self.children())
        for layer, own in zip(layers[:-1], self.strides, strict=False):
            images = F.leaky_relu(
                F.conv2d(images, layer.weight, layer.bias, own), SLOPE, inplace=True
            )
        skip = (
            stride or self.step
        ) // self.step  # positions that nobody asks for are not computed
        return torch.tanh(F.conv2d(images, layers[-1].weight, layers[-1].bias, skip))

    @torch.no_grad()
    def embed(
        self, images: Tensor, stride: int, *, tile: int = TILE
    ) -> Float[Tensor, "n i j d"]:
        """Embed the patches of images, at any stride; see `HierarchicalEncoder.embed`."""
        return _grid(
            self, _checked(images, self, self.side, (stride,), tile), stride, tile
        )


class PatchEncoder(_DenseEncoder):
    """The small encoder, f_small: eight 3×3 convolutions from a 32×32 patch to D
    numbers.

    Channels 3 → 32 → 64 → 128 → 128 → 64 → 32 → 32 → D, the first at stride 2,
    LeakyReLU 0.1 between, tanh at the end. `forward(patches)` takes (N, 3, 32, 32) and
    gives (N, D); `embed(images, stride)` gives (N, h, w, D); `dense`, for training,
    gives (N, D, h, w) at stride 2.

    Args:
        dimensions: of an embedding, D.

    Source: Patch SVDD, arXiv:2006.16067, Sec. 4 and its released code.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_one_pass_equals_patch_by_patch
    """

    side, step = SMALL_PATCH, 2

    def __init__(self, dimensions: int = 64):
        super().__init__(
            (3, 32, 64, 128, 128, 64, 32, 32, _positive(dimensions)),
            3,
            (2, 1, 1, 1, 1, 1, 1, 1),
        )


class FlatEncoder(_DenseEncoder):
    """The encoder without hierarchy, for comparison: four 5×5 convolutions from a 64×64
    patch to D numbers.

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
        super().__init__((3, 64, 64, 128, _positive(dimensions)), 5, (2, 2, 2, 1))


class HierarchicalEncoder(nn.Module):
    r"""Both encoders of Patch SVDD: the small one, and the big one that looks through
    it.

    $$f_{\text{big}}(p) = g_{\text{big}}(f_{\text{small}}(p_1), \dots, f_{\text{small}}(p_4))$$   with $p_1 \dots p_4$
    the quarters of a 64×64 patch, and $g_{\text{big}}$ a 2×2 convolution D → 128,
    LeakyReLU 0.1, a 1×1 convolution 128 → D and tanh.

    `forward(patches)` takes (N, 3, 64, 64) and gives the big embeddings (N, D).
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
                " For 32×32 patches there is .small, for whole images .embed(images)"
            )
        n, half = len(patches), SMALL_PATCH
        quarters = (
            patches.reshape(n, 3, 2, half, 2, half)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, 3, half, half)
        )
        return self.aggregate(
            self.enc(quarters).view(n, 2, 2, -1).permute(0, 3, 1, 2), SMALL_PATCH
        ).flatten(1)

    def aggregate(
        self,
        small: Float[Tensor, "n d h w"],
        stride: int,
        skip: int = 1,
        *,
        exact: bool = True,
    ) -> Float[Tensor, "n d i j"]:
        """Turn the small encoder's map at a stride that divides 32 into the big one's,
        of which `skip` takes a part.

        The quarters of a big patch lie 32 pixels apart, so the 2×2 convolution reaches
        over 32 / stride positions. `exact` sums in double precision, so that an
        embedding does not depend on the order in which a kernel sums; it costs little
        beside the small encoder.
        """
        weights = [*self.conv1.parameters(), *self.conv2.parameters()]
        x = small
        if exact:
            x, weights = small.double(), [weight.double() for weight in weights]
        hidden = F.conv2d(x, *weights[:2], skip, dilation=SMALL_PATCH // stride)
        return torch.tanh(
            F.conv2d(F.leaky_relu(hidden, SLOPE, inplace=True), *weights[2:])
        ).to(small.dtype)

    def dense(
        self, images: Float[Tensor, "n 3 h w"]
    ) -> tuple[Float[Tensor, "n d h1 w1"], Float[Tensor, "n d h2 w2"]]:
        """Embed all small and big patches of images at stride 2, with gradients: what
        training uses.
        """
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

        At even strides the small encoder runs once over the image and serves both
        scales; an embedding equals that of the patch alone to 2e-6, the rounding of two
        orders of summing. At an odd stride patches are cut out and run one by one.

        Args:
            images: less their mean image and nothing else (no scaling is done here), at
                least 64 × 64 pixels, of the encoder's dtype and on its device.
            stride_small: pixels from one 32×32 patch to the next.
            stride_big: pixels from one 64×64 patch to the next.
            tile: larger images are run in pieces of this side in pixels; it bounds the
                memory and changes nothing.

        Returns:
            for 256×256 images at the default strides (N, 57, 57, D) and (N, 13, 13, D),
            without gradients.

        Raises:
            ValueError: for images smaller than 64 pixels, not a finite floating-point
                batch (N, 3, H, W), of another dtype or device; a stride below 1, or a
                tile smaller than a patch.

        Source: Patch SVDD, arXiv:2006.16067, Alg. 2.
        Departures: the released code cuts out each patch, 3,249 + 169 for an image, and
            runs it by itself.
        Test: test_encoders.py::test_both_scales_of_an_image_equal_patch_by_patch
        """
        images = _checked(images, self, BIG_PATCH, (stride_small, stride_big), tile)
        even = [
            stride
            for stride in (stride_small, stride_big)
            if stride % self.enc.step == 0
        ]
        shared = math.gcd(SMALL_PATCH, *even)
        grid = _grid(self.enc, images, shared, tile) if even else None
        if stride_small in even:
            skip = stride_small // shared
            small = grid[:, ::skip, ::skip].contiguous()
        else:
            small = _grid(self.enc, images, stride_small, tile)
        if stride_big in even:
            big = self.aggregate(
                grid.permute(0, 3, 1, 2), shared, stride_big // shared
            ).permute(0, 2, 3, 1)
        else:
            big = _one_by_one(self, images, stride_big)
        return Embeddings(small, big.contiguous())

    def save(self, path: str | Path) -> None:
        """Write the weights as one safetensors file under the released code's names,
        whole or not at all.
        """
        write_tensors(path, self.state_dict(), {}, ENCODER_FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "HierarchicalEncoder":
        """Read what `save` wrote, on the CPU.

        Raises:
            ValueError: naming the file, if it is anything else or damaged.
        """
        _, tensors = read_tensors(
            path, ENCODER_FORMAT, "saved encoder", "save it again"
        )
        return encoder_from_weights(tensors, path)


def initialize(encoder: nn.Module, *, as_released: bool = False) -> None:
    r"""Give every layer fresh random weights that keep the signal's size from layer to
    layer, and no bias.

    $$w \sim \mathcal N\big(0, 2 / ((1 + 0.1^2)\,n)\big)$$   with n the layer's inputs per output (Kaiming).

    Args:
        encoder: a module of convolutions and linear layers, changed in place; torch's
            global generator draws.
        as_released: True draws PyTorch's default instead, as the released code does:
            uniform weights of a sixth of that variance. Through the eight layers the
            signal then fades to a thousandth, and training starts slowly.

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
    """Read an encoder that the authors' released code has saved (`enchier.pkl`).

    Only tensors are read: no code that a pickle may carry is run.

    Args:
        path: a file that `torch.save` wrote from the encoder's state dict; the authors'
            use the format of before PyTorch 1.6.

    Returns:
        the encoder on the CPU; its dimension D is the file's.

    Raises:
        ValueError: naming the file, if it is anything but float32 weights of this
            encoder, all there and finite.

    Source: the released code of Patch SVDD. Departures: none.
    Test: test_encoders.py::test_released_weights_are_read
    """
    try:
        found = load_state(path)
    except Exception as error:  # torch raises a dozen kinds for what is no such file
        raise ValueError(
            f"{path} can't be read as weights saved by torch.save ({error})"
        ) from error
    return encoder_from_weights(found, path)


def encoder_from_weights(tensors: object, path: str | Path) -> HierarchicalEncoder:
    """Build the encoder that the tensors belong to, if they are exactly its weights.

    Args:
        tensors: name → float32 weight.
        path: of the file that they were read from, for messages.

    Raises:
        ValueError: naming the file and what does not fit.

    Source: this book. Departures: none.
    Test: test_encoders.py::test_any_other_file_is_refused_by_name
    """
    expected = f"expected the float32 weights of a Patch SVDD encoder in {path}"
    if not isinstance(tensors, dict) or not all(
        isinstance(value, Tensor) for value in tensors.values()
    ):
        raise ValueError(
            f"{expected}, a dictionary of tensors; came a {type(tensors).__name__}"
        )
    with torch.device("meta"):
        names = set(HierarchicalEncoder(1).state_dict())
    if set(tensors) != names:
        odd = ", ".join(sorted(map(str, set(tensors) ^ names))[:4])
        raise ValueError(
            f"{expected}, named enc.conv1.weight to conv2.bias;"
            f" missing or unknown: {odd}"
        )
    if not all(is_dense(tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{expected}; its tensors are of other sizes than what is stored of them"
        )
    dimensions = tensors["conv2.bias"].numel()
    if dimensions == 0:
        raise ValueError(f"{expected}; its embeddings have no dimension")
    with torch.device("meta"):
        encoder = HierarchicalEncoder(dimensions)
    for name, own in encoder.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != own.shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{expected}; {name} is {tuple(tensor.shape)} of {tensor.dtype},"
                f" not {tuple(own.shape)} of float32"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{expected}; {name} holds NaN or infinite values")
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _positive(dimensions: int) -> int:
    if dimensions < 1:
        raise ValueError(
            f"dimensions={dimensions}; expected at least 1 number for each patch"
        )
    return dimensions


def _checked(
    images: Tensor, encoder: nn.Module, side: int, strides: tuple[int, ...], tile: int
) -> Tensor:
    images = check_images(images)
    if images.shape[1] != 3:
        raise ValueError(
            f"images of shape {tuple(images.shape)}; expected 3 channels. Repeat grey:"
            " .expand(-1, 3, …)"
        )
    if min(images.shape[-2:]) < side:
        raise ValueError(
            f"images of {images.shape[-2]}×{images.shape[-1]} pixels are smaller than a"
            f" patch of {side}×{side}; resize them, to 256×256 as in the paper say"
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


def _grid(encoder: _DenseEncoder, images: Tensor, stride: int, tile: int) -> Tensor:
    """Embed patches at a stride: (N, h, w, D), in one pass where the stride allows,
    piece by piece.
    """
    if stride % encoder.step:
        return _one_by_one(encoder, images, stride)
    n, _, height, width = images.shape
    rows, columns = (
        (length - encoder.side) // stride + 1 for length in (height, width)
    )
    out = images.new_empty(n, rows, columns, encoder.dimensions)
    held = (tile - encoder.side) // stride + 1  # positions along a side of a piece
    # One image at a time keeps a CPU's cache; a GPU wants more to do.
    together = 1 if images.device.type == "cpu" else max(1, tile**2 // (height * width))
    for first in range(0, n, together):
        for top in range(0, rows, held):
            for left in range(0, columns, held):
                bottom, right = min(rows, top + held), min(columns, left + held)
                piece = images[
                    first : first + together,
                    :,
                    top * stride : (bottom - 1) * stride + encoder.side,
                    left * stride : (right - 1) * stride + encoder.side,
                ]
                embedded = encoder.dense(piece, stride)
                out[first : first + together, top:bottom, left:right] = (
                    embedded.permute(0, 2, 3, 1)
                )
    return out


def _one_by_one(encoder: nn.Module, images: Tensor, stride: int) -> Tensor:
    """Embed patches at a stride, each by itself: (N, h, w, D); a row of the grid at
    once.
    """
    patches = images.unfold(2, encoder.side, stride).unfold(3, encoder.side, stride)
    rows = [
        [encoder(row.transpose(0, 1)) for row in image.unbind(1)] for image in patches
    ]
    return torch.stack([torch.stack(image) for image in rows])
