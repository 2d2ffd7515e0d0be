"""Counts compared with those by hand, of PyTorch, fvcore and eight other tools."""

import contextlib
import copy
import itertools
import logging
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from refusals import refuses
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from paperlib.complexity import (
    Profile,
    conv2d_macs,
    counting,
    depthwise_separable_macs,
    profile,
)
from paperlib.complexity.conventions import COUNTS

# One of each family of torchvision; all are compared in test_complexity_long.py.
TORCHVISION = {
    *"vgg16 squeezenet1_0 googlenet densenet121 resnet50 resnext50_32x4d".split(),
    *"mobilenet_v3_large shufflenet_v2_x1_0 regnet_y_400mf convnext_tiny".split(),
    *"swin_t vit_b_16".split(),
}
TIMM = {
    *"mobilenetv1_100 tf_efficientnet_lite0 vit_tiny_patch16_224".split(),
    *"mixer_s32_224 nf_resnet50 ghostnet_100 mobilevit_xs".split(),
    *"xcit_nano_12_p16_224 levit_128s".split(),
}


def build(name, device="meta", **options):
    # torchvision's RegNet reads its random weights in its constructor, which is not
    # possible on the meta device.
    with torch.device("cpu" if name.startswith("regnet") else device):
        if name in TORCHVISION:
            return torchvision.models.get_model(name, weights=None, **options).eval()
        return timm.create_model(name, **options).eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def mobilenet():
    """Build MobileNetV1 from nn.Conv2d, nn.BatchNorm2d, nn.ReLU and nn.Linear only.

    The other tools counted this network.
    """

    def block(m, n, kernel, stride, groups=1):
        conv = nn.Conv2d(m, n, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(n), nn.ReLU()]

    layers, m = block(3, 32, 3, 2), 32
    widths = (64, 128, 128, 256, 256, 512, *[512] * 5, 1024, 1024)
    for n, stride in zip(widths, (1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1), strict=True):
        layers += block(m, m, 3, stride, groups=m) + block(m, n, 1, 1)
        m = n
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(m, 1000)
    ).eval()


class Calls(nn.Module):
    """A module around a function of its parameters and inputs."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, *inputs):
        return self.function(self, *inputs)


# By hand


def test_by_hand():
    # 6×6×5 in, 3×3 kernel, no padding, 4×4×7 out: 16 positions × 7 filters × 45 weights
    # each.
    assert conv2d_macs(3, 5, 7, 4) == 5040
    assert conv2d_macs(3, 5, 5, 4, groups=5) == 720  # depthwise: 16 × 5 × 9
    assert conv2d_macs(1, 5, 7, 4) == 560  # pointwise: 16 × 7 × 5
    assert depthwise_separable_macs(3, 5, 7, 4) == 1280
    assert conv2d_macs((3, 5), 4, 6, (7, 2), groups=2) == 3 * 5 * 2 * 6 * 7 * 2
    # Table 3 of the paper: 462 M and 52.3 M; the width multiplier 0.75; the resolution
    # 10 for 14.
    assert conv2d_macs(3, 512, 512, 14) == 462_422_016
    assert depthwise_separable_macs(3, 512, 512, 14) == 52_283_392
    assert depthwise_separable_macs(3, 384, 384, 14) == 29_578_752
    assert depthwise_separable_macs(3, 384, 384, 10) == 15_091_200
    ratio = depthwise_separable_macs(3, 512, 512, 14) / conv2d_macs(3, 512, 512, 14)
    assert math.isclose(ratio, 1 / 512 + 1 / 9)


def test_profile_of_the_hand_example():
    counted = profile(
        nn.Sequential(nn.Conv2d(5, 5, 3, groups=5, bias=False), nn.Conv2d(5, 7, 1)),
        (1, 5, 6, 6),
    )
    assert counted.layers == [
        ("0", "depthwise conv", (1, 5, 4, 4), 720, 45),
        ("1", "pointwise conv", (1, 7, 4, 4), 560, 42),
    ]
    assert [counted.macs, counted.flops, counted.params] == [1280, 2560, 87]
    assert counted.layers[1].name == "1" and counted.layers[1].macs == 560


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1, 1, 1), "kernel=0; expected at least 1"),
        ((3, -4, 1, 1), "in_channels=-4; expected at least 1"),
        ((3, 4, 8, 7.0), "out_size=7.0; expected .* an integer"),
        ((3, 4, True, 7), "out_channels=True; expected .* an integer"),
        (((3, 3, 3), 4, 8, 7), "expected one number for a square"),
        ((3, 6, 9, 7, 2), "the largest that does here is 3"),
        ((3, 5, 10, 7, 2), "groups = 2 with in_channels = 5"),
    ],
)
def test_formulas_explain_invalid_arguments(arguments, said):
    with refuses(said):
        conv2d_macs(*arguments)
    if len(arguments) == 4:  # without groups
        with refuses(said):
            depthwise_separable_macs(*arguments)


# One multiplication at a time


def positions(shape):
    return itertools.product(*map(range, shape))


def convolve(x, weight, stride, padding, dilation, groups):
    """Convolve with Python loops, in any number of dimensions; return the result and
    how often it multiplied.
    """
    x = F.pad(x, (padding, padding) * (x.ndim - 2))
    kernel = weight.shape[2:]
    size = [
        (side - dilation * (k - 1) - 1) // stride + 1
        for side, k in zip(x.shape[2:], kernel, strict=True)
    ]
    out, multiplied = torch.zeros(x.shape[0], weight.shape[0], *size), 0
    for image, n, *at in positions(out.shape):
        first = n // (weight.shape[0] // groups) * weight.shape[1]
        for m, *k in positions(weight.shape[1:]):
            where = tuple(stride * a + dilation * b for a, b in zip(at, k, strict=True))
            out[(image, n, *at)] += weight[(n, m, *k)] * x[(image, first + m, *where)]
            multiplied += 1
    return out, multiplied


def convolve_transposed(x, weight, stride, padding, dilation, groups):
    """Scatter with Python loops, crop at the end; return the result and how often it
    multiplied.
    """
    kernel = weight.shape[2:]
    size = [
        (side - 1) * stride + dilation * (k - 1) + 1
        for side, k in zip(x.shape[2:], kernel, strict=True)
    ]
    out, multiplied = torch.zeros(x.shape[0], weight.shape[1] * groups, *size), 0
    for image, m, *at in positions(x.shape):
        first = m // (weight.shape[0] // groups) * weight.shape[1]
        for n, *k in positions(weight.shape[1:]):
            where = tuple(stride * a + dilation * b for a, b in zip(at, k, strict=True))
            out[(image, first + n, *where)] += weight[(m, n, *k)] * x[(image, m, *at)]
            multiplied += 1
    crop = [slice(padding, side - padding) for side in size]
    return out[(slice(None), slice(None), *crop)], multiplied


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize(
    ("dimensions", "m", "n", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (2, 3, 4, 3, 1, 1, 1, 1),
        (2, 3, 4, 1, 2, 0, 1, 1),
        (2, 4, 6, 3, 2, 1, 1, 2),
        (2, 4, 4, 3, 1, 1, 1, 4),
        (2, 4, 8, 3, 1, 2, 2, 4),
        (2, 2, 3, 2, 3, 1, 2, 1),
        (1, 4, 6, 5, 2, 2, 1, 2),
        (1, 2, 2, 3, 1, 2, 3, 1),
        (3, 2, 4, 2, 1, 1, 1, 2),
        (3, 2, 2, 3, 2, 1, 1, 1),
    ],
)
def test_counts_each_multiplication(
    transposed, dimensions, m, n, kernel, stride, padding, dilation, groups
):
    module = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    layer = module(
        m, n, kernel, stride, padding, dilation=dilation, groups=groups, bias=False
    )
    x = torch.randn(2, m, *(5, 6, 4)[:dimensions])
    with torch.no_grad():
        loops = convolve_transposed if transposed else convolve
        out, multiplied = loops(x, layer.weight, stride, padding, dilation, groups)
        # The loops are the very same convolution.
        torch.testing.assert_close(out, layer(x))
    counted = profile(layer, tuple(x.shape))
    assert counted.macs == multiplied
    assert counted.layers[0].output_shape == out.shape


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.Conv2d(4, 8, 3), (1, 4, 5, 5), "conv"),
        (nn.Conv2d(4, 8, 1), (1, 4, 5, 5), "pointwise conv"),
        (nn.Conv2d(4, 8, 1, stride=2), (1, 4, 5, 5), "pointwise conv"),
        # A single image without a batch dimension.
        (nn.Conv2d(4, 8, 1), (4, 5, 5), "pointwise conv"),
        (nn.Conv2d(4, 8, (1, 3)), (1, 4, 5, 5), "conv"),
        (nn.Conv2d(4, 8, (3, 1)), (1, 4, 5, 5), "conv"),
        (nn.Conv2d(4, 8, 3, padding="same"), (1, 4, 5, 5), "conv"),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), "depthwise conv"),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 5, 5), "depthwise conv"),
        (nn.Conv2d(4, 4, 1, groups=4), (1, 4, 5, 5), "depthwise conv"),
        (nn.Conv2d(4, 8, 1, groups=2), (1, 4, 5, 5), "grouped conv"),
        (nn.Conv2d(4, 8, 3, groups=2), (1, 4, 5, 5), "grouped conv"),
        (nn.Conv2d(1, 8, 3), (1, 1, 5, 5), "conv"),
        (nn.Conv1d(4, 8, 1), (1, 4, 5), "pointwise conv"),
        (nn.Conv3d(4, 4, 3, groups=4), (1, 4, 5, 5, 5), "depthwise conv"),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), (1, 4, 5, 5), "transposed conv"),
        (nn.Linear(4, 8), (3, 5, 4), "linear"),
        (nn.Bilinear(4, 5, 6), [(2, 4), (2, 5)], "bilinear"),
        (nn.LSTM(4, 8), (3, 5, 4), "recurrent"),
        (nn.BatchNorm2d(4), (2, 4, 5, 5), "norm"),
        (nn.GroupNorm(2, 4), (2, 4, 5, 5), "norm"),
        (nn.LayerNorm([5, 5]), (2, 4, 5, 5), "norm"),
        (nn.LayerNorm(5, bias=False), (2, 4, 5, 5), "norm"),
        (nn.InstanceNorm2d(4), (2, 4, 5, 5), "norm"),
        (nn.RMSNorm(5, eps=1e-6), (2, 4, 5, 5), "norm"),
    ],
)
def test_kinds(layer, shape, kind):
    counted = profile(layer, shape)
    assert [row.kind for row in counted.layers] == [kind]
    assert counted.params == parameters(layer)
    assert (counted.macs == 0) == (kind == "norm")


# Whole networks against torch.utils.flop_counter and fvcore


def test_mobilenet_of_timm():
    counted = profile(build("mobilenetv1_100"))
    assert counted.macs == 568_740_352 == profile(mobilenet()).macs
    assert counted.flops == 1_137_480_704
    assert counted.params == 4_231_976
    # Table 2 of the paper: 94.86, 3.06, 1.19 (its misprint of 1.91) and 0.18 per cent
    # of the multiply-adds.
    expected = {
        "pointwise conv": 94.857,
        "depthwise conv": 3.057,
        "conv": 1.906,
        "linear": 0.18,
    }
    shares = dict.fromkeys(expected, 0.0)
    for layer in counted.layers:
        if layer.macs:
            shares[layer.kind] += 100 * layer.macs / counted.macs
    assert {kind: round(share, 3) for kind, share in shares.items()} == expected


@pytest.mark.parametrize("name", sorted(TORCHVISION | TIMM))
def test_agrees_with_flop_counter(name):
    model = build(name)
    counted = profile(model)
    assert counted.params == parameters(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(1, 3, 224, 224, device="meta"))
    assert counted.flops == counter.get_total_flops()


# fvcore counts this on top; it does not know scaled_dot_product_attention, which we
# leave out of the comparison.
FVCORE_ADDS = {
    # The standardising of the convolutions' weights, taken for norms of activations.
    "nf_resnet50": 5 * 23_454_912
}
# One network of each kind; PyTorch's counter is compared on all.
FVCORE = """googlenet mobilenet_v3_large swin_t vit_b_16 tf_efficientnet_lite0
    mixer_s32_224 nf_resnet50""".split()
SMALL = {
    "vit_b_16": {"image_size": 64},
    "mixer_s32_224": {"img_size": 64},
}


@pytest.mark.parametrize("name", FVCORE)
def test_agrees_with_fvcore(name, monkeypatch):
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    # fvcore needs real tensors. Uninitialised weights will do, but Swin's index of
    # positions must be a true one.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    if name == "swin_t":
        model = build(name, "cpu")
    else:
        model = build(name, **SMALL.get(name, {})).to_empty(device="cpu")
    shape = (1, 3, 64, 64)
    # Under no_grad nn.MultiheadAttention would take a way on which fvcore sees none of
    # it, its linear layers neither.
    analysis = FlopCountAnalysis(model, torch.zeros(shape))
    analysis.uncalled_modules_warnings(False).tracer_warnings("none")
    counted = profile(model, shape)
    attention = sum(layer.macs for layer in counted.layers if layer.kind == "attention")
    assert (attention > 0) == (name == "vit_b_16")
    products = ("conv", "linear", "matmul", "bmm", "addmm", "mm", "einsum")
    theirs = sum(analysis.by_operator()[what] for what in products)
    assert theirs == counted.macs - attention
    total = {row.used_by: row.total for row in counted.conventions()}["fvcore 0.1.5"]
    assert analysis.total() == total - attention + FVCORE_ADDS.get(name, 0)


def test_attention_of_a_transformer_by_hand():
    counted = profile(build("vit_tiny_patch16_224"))
    attention = sum(layer.macs for layer in counted.layers if layer.kind == "attention")
    # Layers × heads × queries × keys × (a score and a sum).
    assert attention == 12 * 3 * 197 * 197 * (64 + 64)


# Totals that other tools gave, each in the version that
# `paperlib.complexity.conventions` names, for MobileNetV1 as above and for
# torchvision's ResNet-50 and VGG-16, all at 1×3×224×224; for ViT-B/16 deepspeed's, the
# only one that sees all of it.
OBSERVED = {
    "deepspeed 0.19.8, calflops 0.3.2 (MACs)": (
        568_740_352,
        4_089_184_256,
        15_470_264_320,
        17_563_828_224,
    ),
    "ptflops 0.7.5 (aten)": (568_741_352, 4_089_185_256, 15_483_821_032, None),
    "torchinfo 1.8.0": (568_763_240, 4_089_238_376, 15_483_821_032, None),
    "torchprofile 0.1.0": (573_784_064, 4_100_300_288, 15_470_289_408, None),
    "fvcore 0.1.5": (578_875_904, 4_111_512_576, 15_470_289_408, None),
    "flopth 0.1.6": (583_918_592, None, 15_503_514_112, None),
    "thop 0.1.1, ultralytics-thop 2.2.3": (
        588_962_304,
        4_133_742_592,
        15_470_314_496,
        None,
    ),
    "ptflops 0.7.5 (pytorch)": (589_012_456, 4_132_436_968, 15_523_225_576, None),
    "torch.utils.flop_counter": (1_137_480_704, 8_178_368_512, 30_940_528_640, None),
    "deepspeed 0.19.8, calflops 0.3.2 (FLOPs)": (
        1_152_658_944,
        8_211_108_352,
        30_973_778_432,
        35_153_981_184,
    ),
}


@pytest.mark.parametrize(
    "column", range(4), ids=["mobilenet", "resnet50", "vgg16", "vit_b_16"]
)
def test_conventions_reproduce_the_peers(column):
    name = (None, "resnet50", "vgg16", "vit_b_16")[column]
    rows = profile(build(name) if name else mobilenet()).conventions()
    for peer, observed in OBSERVED.items():
        if observed[column] is not None:
            (row,) = [row for row in rows if peer in row.used_by]
            assert row.total == observed[column], peer
    # And the step "MACs + norm", which no tool stops at.
    assert len(rows) == len(OBSERVED) + 1


def test_conventions_of_mobilenet():
    rows = profile(mobilenet()).conventions()
    millions = " ".join(f"{row.total / 1e6:.1f}" for row in rows)
    assert millions == (
        "568.7 568.7 568.8 573.8 578.8 578.9 583.9 589.0 589.0 1137.5 1152.7"
    )
    widths = (32, 64, 128, 128, 256, 256, 512, *[512] * 5, 1024, 1024)
    sides = (112, 56, 56, 28, 28, 14, *[14] * 5, 7, 7)
    blocks = zip(itertools.pairwise(widths), sides, strict=True)
    separable = sum(depthwise_separable_macs(3, m, n, side) for (m, n), side in blocks)
    assert rows[0].total == conv2d_macs(3, 3, 32, 112) + 1024 * 1000 + separable
    # timm's version has modules that tools which count by module type do not know; here
    # its totals are the same.
    assert profile(build("mobilenetv1_100")).conventions() == rows


def test_counts_by_hand():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(4, affine=False),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.GroupNorm(2, 4),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.Softmax(-1),
        nn.PReLU(),
    )
    counted = profile(model, (1, 2, 10, 10))
    assert counted.counts == {
        "macs": 64 * 4 * 2 * 9 + 12,
        "conv_bias": 256,
        "linear_bias": 3,
        "batch_norm": 256 + 64,
        "batch_norm_affine": 256,
        "other_norm": 16 + 3,
        "other_norm_affine": 16,
        "norm_params": 16,
        "activation": 256 + 64 + 16 + 3 + 3,
        "max_pool_in": 256,
        "avg_pool_in": 64,
        "avg_pool_out": 16,
        "adaptive_avg_pool_in": 16,
        "adaptive_avg_pool_out": 4,
    }
    assert set(counted.counts) == set(COUNTS)


# Every way to multiply


def way(function, shapes, macs, **weights):
    return Calls(function, **weights), shapes, macs


def attend(macs, *shapes, **options):
    return way(
        lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        list(shapes),
        macs,
    )


X, BATCH = [(3, 5)], [(2, 3, 5)]
Q, K, V = (2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 4)
WAYS = {
    "linear": way(
        lambda m, x: F.linear(x, m.w, m.b), BATCH, 2 * 3 * 5 * 7, w=(7, 5), b=(7,)
    ),
    "keywords": way(
        lambda m, x: F.linear(weight=m.w, input=x, bias=m.b), X, 105, w=(7, 5), b=(7,)
    ),
    "attention by keywords": way(
        lambda m, q, k: F.scaled_dot_product_attention(
            value=k, key=k, query=q, scale=1.0
        ),
        [(2, 7, 8), (2, 9, 8)],
        2 * 7 * 9 * 16,
    ),
    "linear to one": way(lambda m, x: F.linear(x, m.w), BATCH, 2 * 3 * 5, w=(5,)),
    "matmul": way(lambda m, x: torch.matmul(x, m.w), BATCH, 2 * 3 * 5 * 7, w=(5, 7)),
    "@": way(lambda m, x: x @ m.w, BATCH, 2 * 3 * 5 * 7, w=(5, 7)),
    "@ vector": way(lambda m, x: x @ m.w, BATCH, 2 * 3 * 5, w=(5,)),
    "vector @": way(lambda m, x: m.w @ x, BATCH, 2 * 3 * 5, w=(3,)),
    "vector @ vector": way(lambda m, x: x @ m.w, [(5,)], 5, w=(5,)),
    "broadcast": way(
        lambda m, x, y: x @ y, [(4, 1, 3, 5), (2, 5, 7)], 4 * 2 * 3 * 5 * 7
    ),
    "mm": way(lambda m, x: torch.mm(x, m.w), X, 3 * 5 * 7, w=(5, 7)),
    "mm into": way(
        lambda m, x: torch.mm(x, m.w.detach(), out=x.new_empty(3, 7)),
        X,
        3 * 5 * 7,
        w=(5, 7),
    ),
    "bmm": way(lambda m, x: torch.bmm(x, x.mT), BATCH, 2 * 3 * 3 * 5),
    "addmm": way(lambda m, x: torch.addmm(m.b, x, m.w), X, 3 * 5 * 7, w=(5, 7), b=(7,)),
    "addmm_": way(
        lambda m, x: torch.zeros(3, 7).addmm_(x, m.w), X, 3 * 5 * 7, w=(5, 7)
    ),
    "baddbmm": way(
        lambda m, x: torch.baddbmm(m.b, x, x.mT), BATCH, 2 * 3 * 3 * 5, b=(3,)
    ),
    "addbmm": way(
        lambda m, x: torch.addbmm(m.b, x, x.mT), BATCH, 2 * 3 * 3 * 5, b=(3,)
    ),
    "mv": way(lambda m, x: torch.mv(x, m.w), X, 15, w=(5,)),
    "addmv": way(lambda m, x: torch.addmv(m.b, x, m.w), X, 15, w=(5,), b=(3,)),
    "dot": way(lambda m, x: torch.dot(x, m.w), [(5,)], 5, w=(5,)),
    "inner": way(lambda m, x: torch.inner(x, m.w), X, 3 * 5 * 7, w=(7, 5)),
    "einsum": way(
        lambda m, x: torch.einsum("bij,jk->bik", x, m.w), BATCH, 2 * 3 * 5 * 7, w=(5, 7)
    ),
    "tensordot": way(
        lambda m, x: torch.tensordot(x, m.w, 2), BATCH, 2 * 3 * 5 * 7, w=(3, 5, 7)
    ),
    "multi_dot": way(
        lambda m, x: torch.linalg.multi_dot([x, m.w, m.b]),
        X,
        5 * 7 + 15,
        w=(5, 7),
        b=(7, 1),
    ),
    "bilinear": way(
        lambda m, x, y: F.bilinear(x, y, m.w),
        [(2, 4), (2, 5)],
        2 * 6 * (4 + 1) * 5,
        w=(6, 4, 5),
    ),
    "conv2d": way(
        lambda m, x: F.conv2d(x, m.w, padding=1),
        [(2, 3, 6, 6)],
        2 * 36 * 4 * 27,
        w=(4, 3, 3, 3),
    ),
    "attention": attend(2 * 3 * 7 * 9 * (8 + 4), Q, K, V),
    "masked": attend(2 * 3 * 7 * 9 * (8 + 4), Q, K, V, attn_mask=torch.ones(7, 9)),
    "causal": attend(2 * 3 * 7 * 7 * (8 + 8), Q, Q, Q, is_causal=True),
    "grouped queries": attend(
        2 * 6 * 7 * 9 * (8 + 8), (2, 6, 7, 8), K, K, enable_gqa=True
    ),
    "checkpoint": way(
        lambda m, x: checkpoint(F.linear, x, m.w, use_reentrant=False),
        X,
        105,
        w=(7, 5),
    ),
    "nothing": way(
        lambda m, x: torch.cdist(x, x) * F.relu(x).sum() + x.softmax(-1).cumsum(0),
        [(5, 5)],
        0,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_multiply(way):
    model, shapes, macs = WAYS[way]
    counted = profile(model, shapes)
    assert counted.macs == macs
    assert counted.params == parameters(model)
    # einsum and tensordot are products of reshaped operands.
    if way not in ("nothing", "einsum", "tensordot"):
        assert counted.layers[-1].output_shape == model(*map(torch.zeros, shapes)).shape


def linear_relu():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


class OwnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("nothing differentiates here")


@pytest.mark.parametrize(
    ("wrap", "macs"),
    [
        (lambda: torch.fx.symbolic_trace(linear_relu()), 16),
        (lambda: torch.compile(linear_relu()), 16),
        (lambda: nn.DataParallel(nn.Linear(4, 4)), 16),
        (lambda: Calls(lambda m, x: OwnProduct.apply(x, m.w), w=(4, 4)), 16),
        (lambda: torchvision.ops.MLP(4, [4, 4]), 32),
    ],
    ids=["fx", "compile", "DataParallel", "autograd.Function", "MLP"],
)
def test_wrappers(wrap, macs):
    model = wrap()
    assert profile(model, (1, 4)).macs == macs
    assert profile(model, (1, 4)).params == parameters(model)


def test_deformable_convolution():
    layer = torchvision.ops.DeformConv2d(3, 8, 3, padding=1)
    counted = profile(layer, [(2, 3, 6, 6), (2, 18, 6, 6)])
    assert counted.layers == [
        ("", "deformable conv", (2, 8, 6, 6), 2 * 36 * 8 * 27, 8 * 27 + 8)
    ]


def test_an_operation_with_a_registered_formula(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(flop_registry, torch.ops.aten.cumsum, lambda x, *_, **__: 2 * 7)
        model = Calls(lambda m, x: x.cumsum(0))
        assert profile(model, (3, 4)).layers == [("", "matmul", (3, 4), 7, 0)]
    assert profile(model, (3, 4)).macs == 0


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(need_weights, batch_first):
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    model = Calls(lambda m, x: m.attention(x, x, x, need_weights=need_weights)[0])
    model.attention = attention
    counted = profile(model, (2, 5, 16))
    images, tokens = (2, 5) if batch_first else (5, 2)
    macs = {"linear": 0, "attention": 0}
    for layer in counted.layers:
        assert layer.name == "attention"
        macs[layer.kind] += layer.macs
    assert macs == {
        "linear": 10 * 16 * 64,
        "attention": images * tokens * tokens * 2 * 16,
    }
    assert counted.params == parameters(model)


def test_fast_path_of_transformers():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad(), torch.profiler.profile() as profiler:
        model(torch.zeros(2, 5, 16))
    operators = [event.key for event in profiler.key_averages()]
    assert any("_transformer_encoder_layer_fwd" in name for name in operators)
    macs = 10 * 16 * (64 + 2 * 32) + 2 * 5 * 5 * 32  # of one of the two layers
    with torch.no_grad():
        assert profile(model, (2, 5, 16)).macs == 2 * macs


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent(cell, gates):
    counted = profile(
        cell(6, 8, num_layers=2, bidirectional=True, batch_first=True), (3, 5, 6)
    )
    (layer,) = counted.layers
    assert layer.kind == "recurrent" and layer.output_shape == (3, 5, 16)
    assert layer.macs == 2 * 3 * 5 * gates * 8 * ((6 + 8) + (16 + 8))


# Modules, parameters, inputs


def test_functional_calls_belong_to_the_module_whose_forward_runs():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return helper(x, self.weight)

    def helper(x, weight):
        return F.linear(x, weight)

    inner = Inner()
    model = Calls(lambda m, x: F.linear(m.inner(m.inner.forward(x)), m.w), w=(2, 4))
    model.inner = inner
    assert profile(model, (3, 4)).layers == [
        ("inner", "linear", (3, 4), 48, 16),
        ("inner", "linear", (3, 4), 48, 0),
        ("", "linear", (3, 2), 24, 8),
    ]


def test_a_module_used_twice_counts_twice_with_its_parameters_once():
    layer = nn.Linear(4, 4)
    counted = profile(nn.Sequential(layer, nn.ReLU(), layer), (3, 4))
    assert counted.layers == [
        ("0", "linear", (3, 4), 48, 20),
        ("0", "linear", (3, 4), 48, 0),
    ]
    assert counted.params == 20


def test_tied_weights_count_once():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    counted = profile(nn.Sequential(embedding, head), (2, 5), torch.long)
    assert counted.layers == [("1", "linear", (2, 5, 10), 400, 40)]
    assert counted.params == 40


def test_several_inputs_and_dtypes():
    def forward(m, image, tokens, step):
        words = F.embedding(tokens, m.table).mean(1)
        return words + F.linear(image.flatten(1), m.w) * step

    model = Calls(forward, table=(10, 4), w=(4, 12))
    counted = profile(
        model, [(2, 3, 2, 2), (2, 7), ()], [torch.float32, torch.long, torch.float32]
    )
    assert counted.input_shapes == [(2, 3, 2, 2), (2, 7), ()]
    assert [layer.name for layer in counted.layers] == ["table", ""]
    assert counted.macs == 2 * 4 * 12


def test_the_input_has_the_precision_of_the_model():
    def forward(m, x):
        return torch.linalg.vecdot(x, m.layer(x)) if x.dtype == torch.half else None

    half = Calls(forward)
    half.layer = nn.Linear(4, 4).half()
    assert profile(half, (1, 4)).macs == 16


@pytest.mark.parametrize("shape", [torch.Size([2, 4]), [2, 4], (2, 4)], ids=repr)
def test_a_shape_is_any_sequence(shape):
    assert profile(nn.Linear(4, 4), shape).macs == 32


def test_counts_are_of_the_whole_batch():
    model = build("mobilenetv1_100")
    one, four = profile(model), profile(model, (4, 3, 224, 224))
    assert four.macs == 4 * one.macs and four.params == one.params
    assert four.counts["activation"] == 4 * one.counts["activation"]


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True
        )
        return self._conv_forward(x, weight.reshape_as(self.weight) * 0.5, self.bias)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.places = nn.Parameter(torch.zeros(1, 5, 4))
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 9)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.mlp(self.norm(x))


@pytest.mark.parametrize(
    ("model", "shape", "rows"),
    [
        (
            Tokens(),
            (2, 4, 4),
            [
                ("token", "parameter", 4),
                ("places", "parameter", 20),
                ("norm", "norm", 8),
                ("mlp", "linear", 20),
                ("spare", "unused", 45),
            ],
        ),
        (
            nn.Sequential(Standardised(3, 4, 1)),
            (1, 3, 5, 5),
            [("0", "pointwise conv", 16)],
        ),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
            (1, 3),
            [("0", "linear", 20)],
        ),
        (
            Calls(lambda m, x: F.linear(x, m.w.data, m.b), w=(4, 3), b=(4,)),
            (1, 3),
            [("", "linear", 16)],
        ),
        (
            Calls(lambda m, x: F.conv1d(x, m.w * m.g), w=(4, 3, 1), g=(4, 1, 1)),
            (1, 3, 5),
            [("", "pointwise conv", 16)],
        ),
        (
            Calls(lambda m, x: F.linear(x, m.a @ m.b), a=(4, 2), b=(2, 3)),
            (1, 3),
            [("", "matmul", 14), ("", "linear", 0)],
        ),
        # Learned queries, as in DETR: an input, not a weight of the next layer.
        (
            Calls(
                lambda m, x: F.linear(m.queries, m.w) @ x.mT, queries=(5, 4), w=(3, 4)
            ),
            (1, 6, 3),
            [("queries", "parameter", 20), ("", "linear", 12), ("", "matmul", 0)],
        ),
        (nn.Sequential(nn.PReLU(3), nn.Embedding(3, 2)), (1, 3), None),
    ],
    ids="tokens standardised weight_norm data gain product queries error".split(),
)
def test_parameters_belong_to_the_layer_that_uses_them(model, shape, rows):
    if rows is None:
        with refuses("in layer '1', Embedding"):
            profile(model, shape)
        return
    counted = profile(model, shape)
    assert [(layer.name, layer.kind, layer.params) for layer in counted.layers] == rows
    assert counted.params == parameters(model)


def test_auxiliary_heads_are_unused_in_eval_mode():
    rows = profile(build("googlenet")).layers
    unused = [layer for layer in rows if layer.kind == "unused"]
    assert {layer.name.split(".")[0] for layer in unused} == {"aux1", "aux2"}
    assert sum(layer.params for layer in unused) == 6_379_984
    assert rows[-len(unused) :] == unused


# Tables


def test_table():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    counted = profile(model, (1, 3, 8, 8))
    assert counted.table() == (
        "Sequential, input 1×3×8×8\n"
        "layer  kind    output     MACs  parameters\n"
        "0      conv    1×8×6×6   7,776         224\n"
        "1      norm    1×8×6×6       0          16\n"
        "3      linear  1×10      2,880       2,890\n"
        "total                   10,656       3,130"
    )
    costly = counted.table(costly_only=True)
    assert "norm" not in costly and costly.endswith("10,656       3,130")
    # The model itself is listed by its class.
    assert "Linear  linear  1×2" in profile(nn.Linear(3, 2), (1, 3)).table()


# The model is restored


def state(model):
    """Return all state that a count could change: modes, hooks, attributes, tensors."""
    found = []
    for name, module in model.named_modules():
        values = vars(module)
        inside = {k: list(v) for k, v in values.items() if isinstance(v, (dict, list))}
        found.append((name, module.training, list(map(id, values.values())), inside))
    tensors = itertools.chain(model.parameters(), model.buffers())
    return found, [(t, t.clone(), t.device, t._version) for t in tensors]


def assert_unchanged(model, before):
    found, tensors = state(model)
    assert found == before[0]
    pairs = zip(tensors, before[1], strict=True)
    for (now, *_), (tensor, value, device, version) in pairs:
        assert now is tensor
        assert now.device == device
        assert torch.equal(now, value)
        assert now._version == version


class Careless(nn.Module):
    """Does to itself in forward whatever code found in the wild does."""

    def __init__(self, fails=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.seen, self.cache, self.fails = [], {}, fails
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.steps += 1
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 1.0)
        self.conv.bias.data.clamp_(-1, 1)
        x = self.drop(self.norm(self.conv(x)))
        self.last = x
        self.seen.append(x)
        self.cache["x"] = x
        self.register_buffer("late", x)
        self.steps = self.steps + 1
        self.conv.register_forward_hook(lambda *_: None)
        if self.fails:
            raise KeyError("lost")
        return x


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_is_left_behind(training, fails):
    model = Careless(fails).train(training)
    model.norm.eval()  # a mixture of modes comes back as a mixture
    weight = model.conv.weight
    before = state(model)
    lost = refuses("KeyError: 'lost'")
    with lost if fails else contextlib.nullcontext():
        assert profile(model, (1, 3, 5, 5)).macs == 25 * 12
    before = before[0], [(t, v, d, t._version) for t, v, d, _ in before[1]]
    assert_unchanged(model, before)
    assert model.conv.weight is weight and weight.requires_grad and weight.grad is None
    # Still a leaf that can be trained.
    F.conv2d(torch.ones(1, 3, 2, 2), weight).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_train_mode_counts_as_eval():
    model = build("googlenet").train()
    before = [module.training for module in model.modules()]
    evaluated = profile(build("googlenet"), (1, 3, 96, 96))
    assert profile(model, (1, 3, 96, 96)).layers == evaluated.layers
    assert [module.training for module in model.modules()] == before


def test_random_numbers_go_on_as_before():
    model = nn.Sequential(
        nn.Linear(4, 4), Calls(lambda m, x: F.dropout(x, training=True) + torch.rand(4))
    )
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    profile(model, (2, 4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, torch.enable_grad],
    ids=lambda c: c.__name__,
)
def test_under_any_gradient_mode(context):
    seen = []

    def build():
        gradients = Calls(lambda m, x: seen.append(torch.is_grad_enabled()) or x)
        return nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), Tokens(), gradients)

    model = build()
    with context():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert profile(model, (1, 3, 4)).macs == 4 * 12 + 5 * 16
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        made_here = build()
        assert profile(made_here, (1, 3, 4)).macs == 4 * 12 + 5 * 16
    assert profile(made_here, (1, 3, 4)).macs == 4 * 12 + 5 * 16
    assert seen == [False] * 3


def test_autocast():
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            attended = F.scaled_dot_product_attention(x, m.w, m.w)
            return attended + m.layer(m.conv(x)) @ m.w.mT

    model = Calls(forward, w=(1, 4, 4))
    model.conv, model.layer = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
    macs = 4 * 16 * (2 + 1 + 1 + 1)
    assert profile(model, (1, 4, 4)).macs == macs
    with torch.autocast("cpu", torch.bfloat16):
        assert profile(model, (1, 4, 4)).macs == macs
        # The cache of autocast holds no tensor of ours.
        out = model.layer(torch.zeros(5, 4))
        assert out.device.type == "cpu"
        assert out.dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")


def test_other_modes_do_not_mix():
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        assert profile(nn.Conv1d(4, 3, 1), (1, 4, 5)).macs == 60
    assert counter.get_total_flops() == 0


def test_threads_that_share_a_model_are_independent():
    ready, counted = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x):
            if x.is_meta:
                ready.set()
                assert counted.wait(20)
            return x

    model = nn.Sequential(nn.Linear(4, 4), Waits(), nn.Linear(4, 4)).eval()
    x = torch.ones(2, 4)
    with torch.no_grad():
        expected = model[2](model[0](x))
    results = []
    other = threading.Thread(target=lambda: results.append(profile(model, (2, 4)).macs))
    other.start()
    assert ready.wait(20)
    with torch.no_grad():
        for _ in range(10):  # while the other thread stands in the middle of its run
            assert torch.equal(model(x), expected)
    counted.set()
    other.join()
    assert results == [2 * 32]


def test_hooks_of_others_survive():
    calls = []

    def change_hooks(*_):
        old.remove()
        model[0].register_forward_hook(lambda *_: calls.append("new"))

    def forward(m, x):
        # Another library, in another thread, uses the model that is being profiled.
        with ThreadPoolExecutor(1) as worker:
            worker.submit(change_hooks).result()
        return x

    model = nn.Sequential(nn.Linear(4, 4), Calls(forward)).eval()
    old = model[0].register_forward_hook(lambda *_: calls.append("old"))
    assert profile(model, (2, 4)).macs == 2 * 16
    assert calls == ["old"]  # hooks that were there before act on the copy
    model[0](torch.ones(2, 4))
    assert calls == ["old", "new"]


def test_threads_that_profile_one_model_agree():
    model = mobilenet()
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(profile, model) for _ in range(8)]
    expected = profile(model)
    assert all(result.result() == expected for result in results)


# Devices and memory


class SameThread(ThreadPoolExecutor):
    """Runs what is submitted at once, in the calling thread."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def test_no_memory_is_allocated(monkeypatch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2048, 2048)
            self.plain = torch.zeros(2048, 2048)

        def forward(self, x):
            ones = torch.ones(4096, 4096, device=self.layer.weight.device)
            mask = ones.tril() + torch.eye(4096)
            weight = self.layer.weight * 2 + self.plain.half().float()
            return self.layer(x) @ weight + mask.sum()

    def allocated(profiler):
        usages = [event.self_cpu_memory_usage for event in profiler.key_averages()]
        return sum(max(usage, 0) for usage in usages)

    model = Masked()
    # The profiler does not see the thread that `profile` starts.
    monkeypatch.setattr(counting, "ThreadPoolExecutor", SameThread)
    with torch.profiler.profile(profile_memory=True) as profiler:
        counted = profile(model, (8, 2048))
    assert counted.macs == 2 * 8 * 2048 * 2048
    assert allocated(profiler) < 1000


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_a_model_on_a_gpu(inside):
    """Like real ones, fake CUDA tensors can't be mixed with other tensors."""
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        resnet = torchvision.models.resnet18()
        encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        lstm = nn.LSTM(4, 8)
    assert resnet.fc.weight.device.type == "cuda"
    made = Calls(lambda m, x: x @ m.w.to(x.device) + m.w.new_ones(4))
    with mode, torch.device("cuda"):
        made.w = nn.Parameter(torch.empty(4, 4))
    with mode if inside else contextlib.nullcontext():
        counted = profile(resnet)
        assert counted.macs == 1_814_073_344 and counted.params == parameters(resnet)
        macs = 10 * 16 * (64 + 2 * 32) + 2 * 5 * 5 * 32
        assert profile(encoder, (2, 5, 16)).macs == macs
        assert profile(lstm, (5, 3, 4)).macs == 15 * 32 * 12
        assert profile(made, (2, 4)).macs == 32
    assert resnet.fc.weight.device.type == "cuda" and resnet.training


@pytest.mark.gpu
def test_a_model_on_a_real_gpu():
    model = torchvision.models.resnet50().cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert profile(model).macs == 4_089_184_256
    assert torch.cuda.max_memory_allocated() == before
    assert next(model.parameters()).is_cuda


def test_plain_tensors_and_values_of_buffers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.ones(4, 4)
            self.more = [torch.ones(4, 4), torch.ones(4)]
            self.register_buffer("times", torch.tensor(3))

        def forward(self, x):
            assert self.times
            assert torch.equal(self.more[1], torch.tensor([1.0] * 4))
            assert self.more[1].tolist() == [1] * 4
            for _ in range(int(self.times)):
                x = F.linear(x, self.weight, self.more[1]) @ self.more[0]
            x[:, 0] = torch.tensor(2.0).item()
            canvas = torch.zeros(2, 4)
            canvas[:, :] = x
            return F.batch_norm(canvas, None, None, training=True)

    model = Plain()
    counted = profile(model, (2, 4))
    assert counted.macs == 3 * 2 * 32 and counted.params == 0
    # What was zeros is an activation once one is written into it.
    assert counted.layers[-1].kind == "norm"
    assert not model.weight.is_meta and not model.more[0].is_meta


def test_views_of_buffers():
    model = Calls(lambda m, x: x @ torch.stack(m.table.chunk(2, -1)).view(4, 4))
    model.register_buffer("table", torch.ones(2, 8))
    assert profile(model, (3, 4)).layers == [("", "matmul", (3, 4), 48, 0)]


# What is refused


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((), None, r"input_shape = \(\); expected a shape such as"),
        ((0, 4), None, "a size in input_shape=0; expected at least 1"),
        ((7.0, 4), None, "a size in input_shape=7.0; expected .* an integer"),
        ([(1, 4), 4], None, "expected a shape such as .* or a list of shapes"),
        ((1, 4), [torch.float32] * 2, r"for 1 input\(s\); expected a torch.dtype for"),
        ([(1, 4)] * 2, None, r"shape \(1, 4\), \(1, 4\).*TypeError.*positional arg"),
    ],
)
def test_refused_inputs(shape, dtype, said):
    with refuses(f"(?s){said}"):
        profile(nn.Linear(4, 4), shape, dtype)


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (nn.LazyLinear(4), (1, 4), "cannot be copied .*[Cc]all `forward`"),
        (
            torch.jit.script(nn.ReLU()),
            (1, 4),
            "the model is a .*ScriptModule, .*pass the module that it was",
        ),
        (
            nn.Sequential(torch.jit.script(nn.ReLU())),
            (1, 4),
            "layer '0' is a .*ScriptModule",
        ),
        (
            nn.Sequential(nn.ReLU(), nn.Linear(5, 3)),
            (2, 4),
            r"shape \(2, 4\) in layer '1', Linear\(in_fea.*reduction",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            (1, 5, 9, 9),
            r"shape \(1, 5, 9, 9\) in layer '0', Conv2d\(3, 4.*The error was",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(9)),
            (1, 5, 9, 9),
            "should contain 5 elements not 9",
        ),
        (nn.GroupNorm(2, 4), (1, 5, 9, 9), "num_channels|divisible"),
        (nn.LayerNorm(4), (1, 5), "Given normalized_shape"),
        (nn.Embedding(4, 4), (1, 5), "dtype=torch.long for token ids"),
        (
            Calls(lambda m, x: x if x.sum() > 0 else -x),
            (1, 4),
            "reads the values of its activations",
        ),
        (
            Calls(lambda m, q, k: F.scaled_dot_product_attention(q, k, k)),
            [(1, 2, 4), (1, 2, 5)],
            "RuntimeError",
        ),
    ],
)
def test_refused_models(model, shape, said):
    with refuses(f"(?s){said}"):
        profile(model, shape)


def test_other_types_are_refused():
    with refuses("expected an nn.Module that has been built"):
        profile(nn.Linear, (1, 4))
    with refuses("dtype = 'long' .* expected a torch.dtype"):
        profile(nn.Linear(4, 4), (1, 4), "long")


def test_a_model_on_several_gpus_is_refused():
    model = nn.DataParallel(nn.Linear(4, 4))
    model.device_ids = [0, 1]  # as on a computer with two GPUs
    with refuses("nn.DataParallel over 2 devices.* pass its .module"):
        profile(model, (1, 4))


def test_the_cause_of_an_error_is_chained():
    with refuses() as caught:
        profile(Careless(fails=True), (1, 3, 5, 5))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_model_that_cannot_be_copied():
    model = nn.Linear(4, 4)
    model.lock = threading.Lock()
    with refuses(r"Linear cannot be copied \(TypeError.*lock"):
        profile(model, (1, 4))


def test_a_hook_that_fails():
    model = nn.Linear(4, 4)
    model.register_forward_pre_hook(lambda *_: {}["lost"])
    with refuses("Linear.* failed on .*KeyError: 'lost'"):
        profile(model, (1, 4))


def test_an_interrupted_profile_restores_the_model():
    def interrupted(m, x):
        raise KeyboardInterrupt

    model = Calls(interrupted).train()
    with pytest.raises(KeyboardInterrupt):
        profile(model, (1, 4))
    assert model.training
    assert torch.zeros(1).device.type == "cpu"
    assert torch.zeros(2)[0].item() == 0


def test_profile_is_a_plain_value():
    counted = profile(nn.Linear(3, 2), (1, 3))
    assert counted == profile(nn.Linear(3, 2), (1, 3)) == copy.deepcopy(counted)
    assert isinstance(counted, Profile) and counted.model == "Linear"
