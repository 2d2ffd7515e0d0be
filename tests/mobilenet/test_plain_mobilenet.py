"""The plain code on the page computes what the library computes."""

import itertools

import plain_mobilenet as plain
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paperlib.complexity import conv2d_macs, depthwise_separable_macs, profile
from paperlib.mobilenet import MobileNetV1, parameter_groups

SIZES = list(itertools.product((1, 3, 5), (4, 6), (1, 7), (1, 4, 14)))
# The paper's Table 3: α, ρ, and the millions of multiply-adds that it prints.
TABLE_3 = [(1, 1, 52.3), (0.75, 1, 29.6), (0.75, 0.714, 15.1)]


def test_convolution_and_its_count_equal_pytorch_and_the_library():
    torch.manual_seed(0)
    image, kernels = torch.randn(5, 6, 6), torch.randn(7, 5, 3, 3)
    output, multiply_adds = plain.standard_convolution(image, kernels)
    torch.testing.assert_close(output, F.conv2d(image[None], kernels)[0])
    assert multiply_adds == conv2d_macs(3, 5, 7, out_size=4) == 5040

    one_channel = image[:1], kernels[:1, :1]
    output, multiply_adds = plain.standard_convolution(*one_channel)
    expected = F.conv2d(image[None], kernels[:1, :1].expand(5, 1, 3, 3), groups=5)
    torch.testing.assert_close(output[0], expected[0, 0])
    assert 5 * multiply_adds == conv2d_macs(3, 5, 5, out_size=4, groups=5) == 720


@pytest.mark.parametrize("sizes", SIZES)
def test_costs_equal_the_librarys(sizes):
    assert plain.standard_macs(*sizes) == conv2d_macs(*sizes)
    assert plain.separable_macs(*sizes) == depthwise_separable_macs(*sizes)


@pytest.mark.parametrize(("alpha", "rho", "printed"), TABLE_3)
def test_shrunk_costs_equal_the_librarys_and_table_3(alpha, rho, printed):
    channels, side = int(512 * alpha), {1: 14, 0.714: 10}[rho]
    expected = depthwise_separable_macs(3, channels, channels, side)
    assert plain.shrunk_macs(3, 512, 512, 14, alpha, rho) == expected
    assert round(expected / 1e6, 1) == printed


def test_a_pointwise_convolution_is_a_matrix_product():
    torch.manual_seed(0)
    layer = MobileNetV1(width=0.25).features.block2.pointwise
    features = torch.randn(1, layer.in_channels, 5, 4)
    output = plain.pointwise_convolution(features[0], layer.weight[:, :, 0, 0])
    torch.testing.assert_close(output, layer(features)[0])


@pytest.mark.parametrize("number", [2, 3])  # stride 2 and 1
def test_block_equals_the_librarys(number):
    torch.manual_seed(0)
    ours = MobileNetV1(width=0.25).features[number]
    stride = ours.depthwise.stride[0]
    assert stride == (2 if number == 2 else 1)
    sizes = ours.pointwise.in_channels, ours.pointwise.out_channels
    block = plain.separable_block(*sizes, stride)
    values = ours.state_dict().values()
    block.load_state_dict(dict(zip(block.state_dict(), values, strict=True)))
    features = torch.randn(2, sizes[0], 9, 9)
    torch.testing.assert_close(block(features), ours(features))
    # Eq. 5, counted by the profile of the block.
    counted = profile(plain.separable_block(*sizes, 1), (1, sizes[0], 9, 9))
    assert counted.macs == plain.separable_macs(3, *sizes, 9)


def test_parameter_groups_equal_the_librarys():
    model = MobileNetV1(width=0.25, num_classes=2)
    pairs = zip(
        plain.parameter_groups(model, 4e-5), parameter_groups(model, 4e-5), strict=True
    )
    for group, expected in pairs:
        assert group["weight_decay"] == expected["weight_decay"]
        assert list(map(id, group["params"])) == list(map(id, expected["params"]))
    assert len(group["params"]) == 13
    not_depthwise = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    assert plain.parameter_groups(not_depthwise, 0.1)[1]["params"] == []
