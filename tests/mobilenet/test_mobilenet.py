import pytest
import timm
import torch
from refusals import refuses
from torch import nn

from paperlib.complexity import profile
from paperlib.mobilenet import (
    BLOCKS,
    STEM_CHANNELS,
    MobileNetV1,
    parameter_groups,
)

# The paper's rows (Tables 4 to 10) and the exact totals that follow from its Table 1:
# multiply-adds, and parameters without batch norm. A comment says where the paper
# prints something else.
DOGS = dict(width=0.75, num_classes=120)
PAPER = {
    "1.0-224": (dict(), 224, 568_740_352, 4_210_088),
    # Printed: 4866.
    "full convolutions": (dict(separable=False), 224, 4_867_293_184, 29_282_120),
    "shallow": (dict(shallow=True), 224, 307_323_392, 2_876_328),
    "0.75-224": (dict(width=0.75), 224, 325_400_448, 2_569_144),
    "0.5-224": (dict(width=0.5), 224, 149_497_088, 1_320_648),
    "0.25-224": (dict(width=0.25), 224, 41_030_272, 464_600),
    "1.0-192": (dict(), 192, 418_121_728, 4_210_088),
    "1.0-160": (dict(), 160, 290_675_200, 4_210_088),  # printed: 290
    "1.0-128": (dict(), 128, 186_400_768, 4_210_088),
    "0.5-160": (dict(width=0.5), 160, 76_524_800, 1_320_648),  # printed: 76
    "0.75-192, 120 dogs": (DOGS, 192, 238_597_632, 1_892_424),  # printed: 239
}


def norm_parameters(model):
    return sum(
        p.numel()
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d)
        for p in m.parameters()
    )


@pytest.mark.parametrize("case", PAPER)
def test_macs_and_parameters_are_the_papers(case):
    arguments, side, macs, parameters = PAPER[case]
    with torch.device("meta"):
        model = MobileNetV1(**arguments)
    counted = profile(model, (1, 3, side, side))
    assert counted.macs == macs
    assert counted.params - norm_parameters(model) == parameters


def test_the_shapes_of_consecutive_blocks_of_table_1_match():
    given = [STEM_CHANNELS, *(block.out_channels for block in BLOCKS)]
    assert [block.in_channels for block in BLOCKS] == given[:-1]


def test_last_stride_two_misses_the_papers_total():
    with torch.device("meta"):
        printed, meant = MobileNetV1(last_stride=2), MobileNetV1()
    assert round(profile(meant).macs / 1e6) == 569  # Table 4
    assert profile(printed).macs == 533_833_216  # what Table 1's "s2" would cost


def test_logits_equal_timms():
    torch.manual_seed(0)
    theirs = timm.create_model("mobilenetv1_100")
    # Running statistics that differ from their initial values.
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    # Both list their tensors in the same order, under different names.
    ours = MobileNetV1(activation=nn.ReLU6).eval()
    values = theirs.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected = theirs.eval()(images)
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-6)
        assert expected.std() > 0.01  # the logits carry something to compare


@pytest.mark.parametrize(
    "arguments",
    [{}, {"separable": False}, {"shallow": True}, {"last_stride": 2}, {"width": 0.1}],
)
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (1, 1)])
def test_any_resolution_and_a_gradient_everywhere(arguments, size):
    arguments = {"width": 0.25} | arguments
    model = MobileNetV1(num_classes=5, **arguments)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_depthwise_filters_are_not_decayed():
    model = MobileNetV1(width=0.25, num_classes=2)
    decayed, spared = parameter_groups(model, 4e-5)
    depthwise = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Conv2d) and m.weight.shape[1] == 1
    }
    assert len(depthwise) == 13
    assert {id(p) for p in spared["params"]} == depthwise
    assert (decayed["weight_decay"], spared["weight_decay"]) == (4e-5, 0.0)
    assert sorted(map(id, decayed["params"] + spared["params"])) == sorted(
        map(id, model.parameters())
    )

    # What it is for: with a zero gradient RMSprop moves the decayed weights and leaves
    # the depthwise ones alone.
    optimizer = torch.optim.RMSprop([decayed, spared], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {
        name for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    assert not any("depthwise" in name for name in moved)
    assert {name for name in before if "pointwise" in name} <= moved


def test_frozen_parameters_are_in_no_group():
    model = MobileNetV1(width=0.25, num_classes=2)
    model.features.requires_grad_(False)
    decayed, spared = parameter_groups(model, 1e-4)
    assert [len(decayed["params"]), len(spared["params"])] == [2, 0]


def test_only_one_group_per_channel_is_depthwise():
    layers = [nn.Conv2d(4, 8, 3, groups=groups, bias=False) for groups in (1, 2, 4)]
    one_channel = nn.Conv2d(1, 8, 3, bias=False)
    decayed, spared = parameter_groups(nn.Sequential(*layers, one_channel), 1e-4)
    assert spared["params"] == [layers[2].weight]
    assert len(decayed["params"]) == 3


def test_the_least_that_is_accepted():
    model = MobileNetV1(width=1 / 32, num_classes=1)
    assert model.classifier.out_features == model.features.stem.conv.out_channels == 1
    assert [group["weight_decay"] for group in parameter_groups(model, 0)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, r"width=0; .* at least 0.03"),
        ({"width": -1.0}, r"width=-1.0"),
        ({"width": float("nan")}, r"width=nan"),
        ({"num_classes": 0}, r"num_classes=0; expected at least 1"),
        ({"last_stride": 3}, r"last_stride=3; expected one of 1, 2"),
    ],
)
def test_errors_explain_invalid_arguments(arguments, message):
    with refuses(message):
        MobileNetV1(**arguments)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_errors_explain_invalid_images(shape):
    with refuses(r"expected \(N, 3, H, W\)"):
        MobileNetV1(width=0.25)(torch.zeros(shape))


def test_negative_weight_decay_is_refused():
    with refuses("weight_decay=-0.1; expected .* at least 0"):
        parameter_groups(MobileNetV1(width=0.25), -0.1)
