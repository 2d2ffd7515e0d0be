"""MobileNetV1: depthwise separable convolutions, with a width multiplier."""

from collections import OrderedDict
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from paperlib.inference import run_model
from paperlib.validation import check_choice, check_integers, check_number, check_tensor


class Block(NamedTuple):
    """A pair of rows of Table 1: input channels, output channels, spatial stride."""

    in_channels: int
    out_channels: int
    stride: int


STEM_CHANNELS = 32  # MobileNet, Table 1, first row
BLOCKS = (  # MobileNet, Table 1, the 13 pairs of depthwise and pointwise rows
    Block(32, 64, 1),
    Block(64, 128, 2),
    Block(128, 128, 1),
    Block(128, 256, 2),
    Block(256, 256, 1),
    Block(256, 512, 2),
    *[Block(512, 512, 1)] * 5,
    Block(512, 1024, 2),
    # Table 1 prints "s2", but input and output are both 7×7: see `last_stride`.
    Block(1024, 1024, 1),
)
# MobileNet, Table 5: without the five 14×14×512 blocks
SHALLOW_BLOCKS = BLOCKS[:6] + BLOCKS[11:]


class MobileNetV1(nn.Module):
    r"""MobileNetV1, and the variants that the paper compares it with.

    A 3×3 convolution with stride 2 is followed by 13 blocks. In a separable block each
    input channel is filtered by its own 3×3 kernel (depthwise), and a 1×1 convolution
    (pointwise) mixes the channels; batch norm and an activation follow each of the two.
    Global average pooling and one linear layer return the logits.

    Args:
        width: $\alpha$, the width multiplier; every layer's channels are multiplied by
            it and truncated to an integer.
        num_classes: number of logits.
        separable: False replaces each depthwise and pointwise pair by a standard 3×3
            convolution (Table 4).
        shallow: True omits the five 14×14×512 blocks (Table 5).
        last_stride: stride of the last depthwise layer. Table 1 prints 2; the 7×7 maps
            around it and the paper's total of 569 million multiply-adds need 1.
        activation: the module class used after each batch norm; it is called with
            `inplace=True`.

    Raises:
        ValueError: if `width` leaves a layer without channels, `num_classes` is below
            1, or `last_stride` is neither 1 nor 2.

    Example:
        >>> import torch
        >>> from paperlib.mobilenet import MobileNetV1
        >>> model = MobileNetV1(width=0.25, num_classes=10).eval()
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> model.features(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 256, 2, 2])

    Source: Howard et al., arXiv:1704.04861v1, Table 1 and Sec. 3.2-3.3 (variants:
        Tables 4-10).
    Departures: padding is symmetric, as in timm; TensorFlow's original pads more at the
        bottom and the right.
    Test: test_mobilenet.py::test_macs_and_parameters_are_the_papers
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        *,
        separable: bool = True,
        shallow: bool = False,
        last_stride: int = 1,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        check_number(
            "width",
            width,
            "a width that leaves the first layer a channel (the paper: 1 to 0.25)",
            least=1 / STEM_CHANNELS,
            most=100,
        )
        check_integers(num_classes=num_classes)
        # What the paper counts, and what Table 1 prints.
        check_choice("last_stride", last_stride, (1, 2))

        blocks = SHALLOW_BLOCKS if shallow else BLOCKS
        blocks = (*blocks[:-1], blocks[-1]._replace(stride=last_stride))
        make_block = _separable_block if separable else _full_block
        channels = int(STEM_CHANNELS * width)
        layers = OrderedDict(stem=_full_block(3, channels, 2, activation))
        for number, block in enumerate(blocks, start=1):
            out_channels = int(block.out_channels * width)
            layers[f"block{number}"] = make_block(
                channels, out_channels, block.stride, activation
            )
            channels = out_channels
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Return the logits of images of shape (N, 3, H, W), of any H and W."""
        check_tensor(images, "images")
        if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
            raise ValueError(
                f"images of shape {tuple(images.shape)};"
                " expected (N, 3, H, W). Add a batch axis with images[None],"
                " or repeat a grey image's single channel three times"
            )
        features = run_model(self.features, images, images)
        return self.classifier(self.pool(features).flatten(1))


def _separable_block(
    in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]
) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            depthwise=nn.Conv2d(
                in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False
            ),
            norm1=nn.BatchNorm2d(in_channels),
            act1=activation(inplace=True),
            pointwise=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            norm2=nn.BatchNorm2d(out_channels),
            act2=activation(inplace=True),
        )
    )


def _full_block(
    in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]
) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False),
            norm=nn.BatchNorm2d(out_channels),
            act=activation(inplace=True),
        )
    )
