"""Patch SVDD's encoders, which embed all patches of an image in one pass.

No layer pads, so a patch's embedding does not depend on its surroundings, and
neighbouring patches share most of the computation: applied to a whole image, the same
layers return the embeddings of all its patches.
"""

import math
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperlib.storage import is_dense, load_state, read_tensors, write_tensors
from paperlib.tables import short_repr
from paperlib.validation import (
    UnusableFile,
    check_images,
    check_integers,
    check_module,
    check_same_kind,
    check_supports_float64,
    check_tensor,
)

SMALL_PATCH, BIG_PATCH = 32, 64  # Patch SVDD, Sec. 4: K in pixels
SMALL_STRIDE, BIG_STRIDE = 4, 16  # Patch SVDD, Sec. 4: S in pixels, for K = 32 and 64
SLOPE = 0.1  # Patch SVDD, Sec. 4: negative slope of the LeakyReLU
PIXELS_PER_PASS = 1024**2  # of the images that a GPU embeds together
ENCODER_FORMAT = "paperlib.patch_encoder.1"


class Embeddings(NamedTuple):
    """Embeddings of all patches; [n, i, j] is the patch at (i, j) times the stride.

    Fields:
        small: (N, h, w, D), patches of 32×32 pixels.
        big: (N, h', w', D), patches of 64×64 pixels.
    """

    small: Tensor
    big: Tensor
    __repr__ = short_repr


class BySize(NamedTuple):
    """One number per patch size: of the 32×32 and of the 64×64 patches."""

    small: float
    big: float


class _DenseEncoder(nn.Module):
    """Convolutions without padding, from a patch of `side` pixels to D numbers.

    A subclass sets `side`, the `step` in pixels between neighbouring positions of its
    last feature map, and its layers: their input `channels`, `kernel` and `strides`.
    The last layer returns the embedding.
    """

    def __init__(self, dimensions: int = 64):
        check_integers(dimensions=dimensions)
        super().__init__()
        self.dimensions = dimensions
        sizes = pairwise((*self.channels, dimensions))
        for i, (size, stride) in enumerate(zip(sizes, self.strides, strict=True), 1):
            self.add_module(f"conv{i}", nn.Conv2d(*size, self.kernel, stride))
        initialize(self)

    def forward(self, patches: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embed patches of `side` × `side` pixels."""
        _check_patches(patches, self)
        return self.dense(patches).flatten(1)

    def dense(
        self, images: Float[Tensor, "n 3 h w"], stride: int | None = None
    ) -> Float[Tensor, "n d i j"]:
        """Embed patches with gradients, at a stride that is a multiple of `step`."""
        *layers, last = self.children()
        for layer in layers:
            images = F.leaky_relu(layer(images), SLOPE, inplace=True)
        # Only the requested positions are computed.
        skip = (stride or self.step) // self.step
        return torch.tanh(F.conv2d(images, last.weight, last.bias, skip))

    @torch.no_grad()
    def embed(
        self, images: Float[Tensor, "n 3 h w"], stride: int
    ) -> Float[Tensor, "n i j d"]:
        """Embed patches of images at any stride; see `HierarchicalEncoder.embed`."""
        check_integers(stride=stride)
        images = _check_input(images, self)
        return _embed_grid(self, self.dense, images, stride)


class PatchEncoder(_DenseEncoder):
    """The small encoder, f_small: eight 3×3 convolutions, for 32×32 patches.

    Channels 3 → 32 → 64 → 128 → 128 → 64 → 32 → 32 → D, the first at stride 2,
    LeakyReLU 0.1 between them, tanh at the end. `forward(patches)` maps (N, 3, 32, 32)
    to (N, D); `embed(images, stride)` returns (N, h, w, D); `dense`, for training,
    returns (N, D, h, w) at stride 2.

    Args:
        dimensions: of an embedding, D.

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import PatchEncoder
        >>> encoder = PatchEncoder(dimensions=16)
        >>> encoder(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 16])
        >>> encoder.embed(torch.rand(1, 3, 64, 64), stride=8).shape
        torch.Size([1, 5, 5, 16])

    Source: Patch SVDD, arXiv:2006.16067, Sec. 4 and its released code.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_one_pass_equals_patch_by_patch
    """

    side, step, kernel = SMALL_PATCH, 2, 3
    channels, strides = (3, 32, 64, 128, 128, 64, 32, 32), (2, 1, 1, 1, 1, 1, 1, 1)


class FlatEncoder(_DenseEncoder):
    """The encoder without hierarchy: four 5×5 convolutions, from 64×64 patches.

    Channels 3 → 64 → 64 → 128 → D, all but the last at stride 2; methods as in
    `PatchEncoder`.

    Args:
        dimensions: of an embedding, D.

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import FlatEncoder
        >>> FlatEncoder(dimensions=16).embed(torch.rand(1, 3, 96, 96), stride=16).shape
        torch.Size([1, 3, 3, 16])

    Source: Patch SVDD, arXiv:2006.16067, Sec. 3.3 (the ablation) and its released code.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_one_pass_equals_patch_by_patch
    """

    side, step, kernel = BIG_PATCH, 8, 5
    channels, strides = (3, 64, 64, 128), (2, 2, 2, 1)


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

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import HierarchicalEncoder
        >>> encoder = HierarchicalEncoder(dimensions=16)
        >>> small, big = encoder.embed(torch.rand(1, 3, 96, 96))
        >>> small.shape, big.shape
        (torch.Size([1, 17, 17, 16]), torch.Size([1, 3, 3, 16]))

    Source: Patch SVDD, arXiv:2006.16067, Eq. 7 and Sec. 4.
    Departures: initial weights, see `initialize`.
    Test: test_encoders.py::test_the_big_encoder_sees_a_patch_through_its_quarters
    """

    side, step = BIG_PATCH, PatchEncoder.step

    def __init__(self, dimensions: int = 64):
        super().__init__()
        self.dimensions, self.enc = dimensions, PatchEncoder(dimensions)
        self.conv1 = nn.Conv2d(dimensions, 128, 2)
        self.conv2 = nn.Conv2d(128, dimensions, 1)
        initialize(self.conv1)
        initialize(self.conv2)

    @property
    def small(self) -> PatchEncoder:
        """The encoder of 32×32 patches."""
        return self.enc

    def forward(self, patches: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Embed patches of 64×64 pixels."""
        _check_patches(patches, self)
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

    def _dense_big(self, images: Tensor, stride: int) -> Tensor:
        """Embed big patches at an even stride."""
        shared = math.gcd(SMALL_PATCH, stride)
        return self.aggregate(self.enc.dense(images, shared), shared, stride // shared)

    @torch.no_grad()
    def embed(
        self,
        images: Tensor,
        stride_small: int = SMALL_STRIDE,
        stride_big: int = BIG_STRIDE,
        *,
        values: bool = True,
    ) -> Embeddings:
        """Embed all patches of images at both scales.

        At even strides the small encoder runs once over the image for both scales. If a
        stride is odd, each scale takes passes of its own, over shifted images. An
        embedding equals that of the patch alone up to rounding (2e-6).

        Args:
            images: after subtracting the mean image (without other scaling), at least
                64 × 64 pixels, of the encoder's dtype and on its device.
            stride_small: pixels from one 32×32 patch to the next.
            stride_big: pixels from one 64×64 patch to the next.
            values: False does not look for NaN, because the caller has.

        Returns:
            for 256×256 images at the default strides (N, 57, 57, D) and (N, 13, 13, D),
            without gradients.

        Raises:
            ValueError: for images smaller than 64 pixels, not a finite floating-point
                batch (N, 3, H, W), of another dtype or device, and a stride below 1.

        Source: Patch SVDD, arXiv:2006.16067, Alg. 2.
        Departures: the released code crops each patch, 3,249 + 169 per image, and runs
            it separately.
        Test: test_encoders.py::test_both_scales_of_an_image_equal_patch_by_patch
        """
        check_integers(stride_small=stride_small, stride_big=stride_big)
        images = _check_input(images, self, values)
        if stride_small % self.step or stride_big % self.step:
            return Embeddings(
                _embed_grid(self.enc, self.enc.dense, images, stride_small),
                _embed_grid(self, self._dense_big, images, stride_big),
            )
        shared = math.gcd(SMALL_PATCH, stride_small, stride_big)
        grid = _embed_grid(self.enc, self.enc.dense, images, shared)
        skip = stride_small // shared
        big = self.aggregate(grid.permute(0, 3, 1, 2), shared, stride_big // shared)
        return Embeddings(
            grid[:, ::skip, ::skip].contiguous(), big.permute(0, 2, 3, 1).contiguous()
        )

    def save(self, path: str | Path) -> None:
        """Write the weights as a safetensors file, atomically."""
        write_tensors(path, self.state_dict(), {}, ENCODER_FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "HierarchicalEncoder":
        """Read what `save` wrote, on the CPU.

        Raises:
            UnusableFile: naming the file, if it is missing, corrupt or another kind of
                file.
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
    check_module(encoder)
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
        UnusableFile: naming the file, unless it contains complete and finite float32
            weights of this encoder.

    Example:
        >>> import torch
        >>> from paperlib.patch_svdd import HierarchicalEncoder, load_released_weights
        >>> torch.save(HierarchicalEncoder(dimensions=16).state_dict(), "enchier.pkl")
        >>> load_released_weights("enchier.pkl").dimensions
        16

    Source: the released code of Patch SVDD. Departures: none.
    Test: test_encoders.py::test_released_weights_are_read
    """
    try:
        tensors = load_state(path)
    except Exception as error:  # torch raises many kinds of errors for other files
        raise UnusableFile(
            f"{path} can't be read as weights saved by torch.save ({error});"
            " download or copy it again"
        ) from error
    return encoder_from_weights(tensors, path)


def encoder_from_weights(tensors: object, path: str | Path) -> HierarchicalEncoder:
    """Create the encoder with these weights; raise if they are not exactly its weights.

    Args:
        tensors: name → float32 weight, as read; not checked before.
        path: of the file that they were read from, for errors.

    Raises:
        UnusableFile: naming the file and the mismatch.
    """
    try:
        with torch.device("meta"):
            encoder = HierarchicalEncoder(len(tensors["conv2.bias"]))
        encoder.load_state_dict(tensors, assign=True)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UnusableFile(
            f"{path} does not contain the weights of a Patch SVDD encoder"
            f" ({type(error).__name__}: {error}). Save its state dict again"
        ) from error
    unusable = [
        f"{name} ({tensor.dtype})"
        for name, tensor in tensors.items()
        if not (is_dense(tensor) and tensor.dtype == torch.float32)
        or not tensor.isfinite().all()
    ]
    if unusable:
        raise UnusableFile(
            f"{path} contains weights with NaN or infinite values, of another dtype, or"
            f" smaller than their shape: {', '.join(unusable[:4])}; expected finite"
            " float32. Save the state dict again"
        )
    return encoder


def check_rgb(images: Tensor, side: int = BIG_PATCH, *, values: bool = True) -> Tensor:
    """Return detached images if they are RGB and not smaller than a patch.

    Args:
        images: (N, 3, H, W).
        side: of a patch in pixels.
        values: False does not look for NaN, because the caller does.

    Raises:
        ValueError: for other shapes, and as `check_images`.
    """
    images = check_images(images, values=values)
    check_supports_float64(images.device)
    if images.shape[1] != 3 or min(images.shape[-2:]) < side:
        raise ValueError(
            f"images of shape {tuple(images.shape)};"
            f" expected RGB (N, 3, H, W) of at least {side}×{side} pixels."
            " Resize them, for example to 256×256 as in the paper,"
            " and repeat a grey channel with .expand(-1, 3, -1, -1)"
        )
    return images


def _check_input(images: Tensor, encoder: nn.Module, values: bool = True) -> Tensor:
    images = check_rgb(images, encoder.side, values=values)
    check_same_kind("images", images, "the encoder", next(encoder.parameters()))
    return images


def _check_patches(patches: Tensor, encoder: nn.Module) -> None:
    check_tensor(patches, "patches", "N, 3, H, W")
    side = encoder.side
    if patches.shape[1:] != (3, side, side) or not len(patches):
        raise ValueError(
            f"patches of shape {tuple(patches.shape)}; expected (N, 3, {side}, {side})."
            " For whole images call .embed(images)"
        )
    check_same_kind("patches", patches, "the encoder", next(encoder.parameters()))


def _embed_grid(
    encoder: nn.Module,
    dense: Callable[[Tensor, int], Tensor],
    images: Tensor,
    stride: int,
) -> Tensor:
    """Embed patches at a stride, (N, h, w, D).

    `dense` embeds patches at a stride that is a multiple of the encoder's step. For
    other strides it embeds every n-th patch, in passes over shifted images.
    """
    n, _, *size = images.shape
    rows, columns = ((length - encoder.side) // stride + 1 for length in size)
    out = images.new_empty(n, rows, columns, encoder.dimensions)
    passes = encoder.step // math.gcd(encoder.step, stride)  # per axis
    # One image at a time fits a CPU's cache; a GPU needs larger batches.
    is_cpu = images.device.type == "cpu"
    n_images = 1 if is_cpu else max(1, PIXELS_PER_PASS // math.prod(size))
    for y, x in product(range(min(passes, rows)), range(min(passes, columns))):
        grid = out[:, y::passes, x::passes]
        height, width = (
            (length - 1) * passes * stride + encoder.side for length in grid.shape[1:3]
        )
        shifted = images[..., y * stride :, x * stride :][..., :height, :width]
        parts = zip(shifted.split(n_images), grid.split(n_images), strict=True)
        for image_part, grid_part in parts:
            embeddings = dense(image_part, passes * stride)
            grid_part.copy_(embeddings.permute(0, 2, 3, 1))
    return out
