"""Grad-CAM on the layouts, inputs, precisions and gradient modes that users have."""

import contextlib
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from refusals import refuses
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from paperlib import backbones
from paperlib.gradcam import (
    grad_cam,
    grad_cam_map,
    grad_cam_weights,
    guided_backprop,
    guided_grad_cam,
)


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return float((a.float() - b).norm() / b.norm())


def by_hand(model, images, layer, target, to_maps, call=-1):
    """Compute a signed map and weights with a hook and autograd."""
    outputs = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    score = model(*images if isinstance(images, tuple) else (images,))[:, target].sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(score, outputs[call])
    activations, gradient = to_maps(outputs[call].detach()), to_maps(gradient)
    weights = gradient.flatten(2).mean(2)
    maps = (weights.unsqueeze(2) * activations.flatten(2)).sum(1)
    return weights, maps.view(len(maps), *activations.shape[2:])


def channels_first(maps):
    return maps.movedim(-1, 1)


def tokens_to(height, width, prefix=1):
    def to_maps(tokens):
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, (height, width))

    return to_maps


# ---- layouts ----


def torchvision_vit():
    return tv.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)


class PatchEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 16, 16)
        options = {"dropout": 0.1, "batch_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, **options) for _ in range(2))
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).flatten(2).mT).max(1).values)


LAYOUTS = {
    "torchvision ViT": (
        torchvision_vit,
        64,
        "encoder.layers.encoder_layer_0",
        tokens_to(4, 4),
    ),
    "torchvision ViT, norm": (
        torchvision_vit,
        64,
        "encoder.layers.encoder_layer_1.ln_1",
        tokens_to(4, 4),
    ),
    "nn.TransformerEncoderLayer": (
        PatchEncoder,
        64,
        "blocks.0",
        tokens_to(4, 4, prefix=0),
    ),
    "torchvision Swin": (
        lambda: tv.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=5),
        128,
        "features.1",
        channels_first,
    ),
    "torchvision Swin, long sides": (
        lambda: tv.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=5),
        256,
        "features.1",
        channels_first,
    ),
    "timm Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=96,
            window_size=3,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 2),
            num_classes=5,
        ),
        96,
        "layers.0",
        channels_first,
    ),
    "timm DeiT with two prefix tokens": (
        lambda: timm.create_model(
            "deit_tiny_distilled_patch16_224", img_size=(32, 64), depth=2, num_classes=5
        ),
        (32, 64),
        "blocks.0",
        tokens_to(2, 4, prefix=2),
    ),
    "timm MLP-Mixer": (
        lambda: MlpMixer(
            num_classes=5, img_size=64, patch_size=32, num_blocks=2, embed_dim=32
        ),
        64,
        "blocks.0",
        tokens_to(2, 2, prefix=0),
    ),
}


def build(make):
    """Build a network whose scores depend on the image: some heads start as zeros."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_and_channels_last_need_reshape_and_equal_autograd(name):
    make, size, layer, to_maps = LAYOUTS[name]
    model = build(make)
    height, width = size if isinstance(size, tuple) else (size, size)
    images = random(2, 3, height, width)
    with refuses(rf"layer '{layer}' returns .*pass reshape="):
        grad_cam(model, images, layer, 3)
    with refuses("pass reshape="):
        guided_grad_cam(model, images, layer, 3, positive_gradients=True)
    ours = grad_cam(model, images, layer, 3, relu=False, reshape=to_maps)
    weights, maps = by_hand(model, images, layer, 3, to_maps)
    assert distance(ours.weights, weights) < 1e-4
    assert distance(ours.maps, maps) < 1e-4
    product = guided_grad_cam(
        model, images, layer, 3, positive_gradients=True, reshape=to_maps
    )
    guided = guided_backprop(model, images, 3, positive_gradients=True)
    factor = F.interpolate(maps.clamp_min(0)[:, None], (height, width), mode="bilinear")
    torch.testing.assert_close(product, guided * factor, rtol=1e-3, atol=1e-9)
    with refuses("pass reshape="):
        backbones.FeatureExtractor(model, [layer])(images)
    extractor = backbones.FeatureExtractor(model, [layer], reshape=to_maps)
    assert extractor(images)[0].shape[2:] == maps.shape[1:]


class Block(nn.Module):
    """A layer that computes its output with channels last or first."""

    def __init__(self, run, *parts):
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(parts)

    def forward(self, x):
        return self.run(x, *self.parts)


def classifier(layer, channels=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        layer,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(layer_features(layer, channels), 5),
    ).eval()


def layer_features(layer, channels):
    return layer(torch.zeros(1, channels, 6, 6)).shape[1]


def last(x):
    return x.permute(0, 2, 3, 1)


def first(x):
    return x.permute(0, 3, 1, 2)


# All maps are 6 × 6 × 6, so no shape tells the axes apart.
REFUSED = {
    "linear": Block(lambda x, part: part(last(x)), nn.Linear(6, 6)),
    "layer norm and dropout": Block(
        lambda x, norm, drop: drop(norm(last(x))), nn.LayerNorm(6), nn.Dropout()
    ),
    "residual of flattened tokens": Block(
        lambda x, part: last(x) + part(last(x).flatten(1, 2)).unflatten(1, (6, 6)),
        nn.Linear(6, 6),
    ),
    "tokens": Block(lambda x, part: part(x.flatten(2).mT), nn.Linear(6, 6)),
    "attention": Block(
        lambda x, part: part(*[x.flatten(2).mT] * 3)[0],
        nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "recurrent": Block(
        lambda x, part: part(x.flatten(2).mT)[0], nn.GRU(6, 6, batch_first=True)
    ),
}
ACCEPTED = {
    "ConvNeXt's order of axes": Block(
        lambda x, norm, part: x + first(part(norm(last(x)))),
        nn.LayerNorm(6),
        nn.Linear(6, 6),
    ),
    "a convolution after linear layers": Block(
        lambda x, part, conv: conv(first(part(last(x)))),
        nn.Linear(6, 6),
        nn.Conv2d(6, 6, 1),
    ),
    "squeeze and excitation": Block(
        lambda x, part: x * part(x.mean((2, 3)))[..., None, None], nn.Linear(6, 6)
    ),
    "torchvision's LayerNorm2d": tv.convnext.LayerNorm2d(6),
    "timm's LayerNorm2d": timm.layers.LayerNorm2d(6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_of_linear_layers_and_norms_are_refused(name):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, 6, 3, padding=1), REFUSED[name]

        def forward(self, x):
            return self.layer(self.stem(x)).flatten(1, -2).mean(1)

    torch.manual_seed(0)
    with refuses("layer 'layer' returns .*pass reshape="):
        grad_cam(Pooled().eval(), random(2, 3, 6, 6), "layer", 1)


@pytest.mark.parametrize("name", ACCEPTED)
def test_channels_first_is_accepted_where_all_axes_are_equal(name):
    model, images = classifier(ACCEPTED[name]), random(2, 3, 6, 6)
    ours = grad_cam(model, images, "1", 2, relu=False)
    weights, maps = by_hand(model, images, "1", 2, lambda x: x)
    torch.testing.assert_close(ours.weights, weights)
    torch.testing.assert_close(ours.maps, maps, rtol=1e-4, atol=1e-6)


def test_tokens_without_a_linear_layer_are_refused():
    vit = build(lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1))
    for layer in ("patch_embed", "pos_drop"):
        with refuses("token map of a transformer, or a map with one spatial axis"):
            grad_cam(vit, random(1, 3, 64, 64), layer, 1)
    ours = grad_cam(
        vit, random(1, 3, 64, 64), "patch_embed", 1, reshape=tokens_to(4, 4, 0)
    )
    assert ours.maps.shape == (1, 4, 4)


def test_no_layout_is_guessed_from_proportions():
    model = classifier(nn.Conv2d(6, 64, 1))
    wide = random(2, 3, 64, 2)  # (N, 64, 64, 2) could be (N, h, w, C)
    assert grad_cam(model, wide, "1", 2).maps.shape == (2, 64, 2)


def test_a_layer_that_returns_several_tensors_is_reshaped():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.rnn = nn.Conv1d(2, 6, 3), nn.LSTM(6, 4, batch_first=True)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            sequence, (hidden, _) = self.rnn(self.stem(x).mT)
            return self.head(sequence.mean(1) + hidden[-1])

    torch.manual_seed(0)
    model, signals = Recurrent().eval(), random(3, 2, 12)
    with refuses("layer 'rnn' returns a tuple; expected a tensor.*reshape="):
        grad_cam(model, signals, "rnn", 1)
    ours = grad_cam(model, signals, "rnn", 1, reshape=lambda output: output[0].mT)
    sequence, (hidden, _) = model.rnn(model.stem(signals).mT)
    (gradient,) = torch.autograd.grad(
        model.head(sequence.mean(1) + hidden[-1])[:, 1].sum(), sequence
    )
    torch.testing.assert_close(ours.weights, gradient.mean(1))
    expected = (gradient.mean(1, keepdim=True) * sequence).sum(2).clamp_min(0)
    torch.testing.assert_close(ours.maps, expected)


@pytest.mark.parametrize(
    ("reshape", "message"),
    [
        (lambda x: x.view(7, -1), "raises RuntimeError: .*Pass reshape=<function"),
        (lambda x: x[..., 99], "raises IndexError"),
        (lambda x: x.tokens, "raises AttributeError"),
        (lambda x: None, "returns a NoneType; expected a tensor"),
        (lambda x: x.flatten(1), r"after reshape= \(2, 216\) for 2 images; expected"),
        (lambda x: x.flatten(0, 1)[:, None], r"after reshape= \(12, 1, 6, 6\)"),
        ("channels_last", "raises TypeError: 'str' object is not callable"),
    ],
)
def test_a_wrong_reshape_is_refused(reshape, message):
    model, images = classifier(nn.ReLU()), random(2, 3, 6, 6)
    for call in (grad_cam, guided_grad_cam):
        with refuses(message):
            call(model, images, "1", 1, reshape=reshape)
    with refuses(message):
        backbones.FeatureExtractor(model, ["1"], reshape=reshape)(images)


# ---- one, two and three spatial axes ----


def convolutional(axes):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    return nn.Sequential(
        conv(2, 4, 3), nn.ReLU(), conv(4, 6, 2), nn.Flatten(2), Mean(), nn.Linear(6, 5)
    ).eval()


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(-1)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_signals_images_and_volumes(axes):
    model, images = convolutional(axes), random(3, 2, *(9, 7, 8)[:axes])
    for layer in ("1", "2"):
        ours = grad_cam(model, images, layer, [[1, 4]] * 3, relu=False)
        for t, target in enumerate((1, 4)):
            weights, maps = by_hand(model, images, layer, target, lambda x: x)
            torch.testing.assert_close(ours.weights[:, t], weights)
            torch.testing.assert_close(ours.maps[:, t], maps)
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]
    factor = F.interpolate(maps.clamp_min(0)[:, None], images.shape[2:], mode=mode)
    product = guided_grad_cam(model, images, "2", [[1, 4]] * 3)
    assert product.shape == (3, 2, *images.shape[1:])
    expected = guided_backprop(model, images, 4) * factor
    torch.testing.assert_close(product[:, 1], expected)


def test_a_layer_may_have_fewer_or_more_spatial_axes_than_the_input():
    class Strokes(nn.Module):  # images → a sequence of columns
        def __init__(self):
            super().__init__()
            self.stem, self.columns = nn.Conv2d(1, 4, 3), nn.Conv1d(4, 6, 2)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.columns(self.stem(x).mean(2)).mean(2))

    class Spectrum(nn.Module):  # waveforms (N, L) → images
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.conv(x.unflatten(1, (1, 8, -1))).mean((2, 3)))

    torch.manual_seed(0)
    strokes, spectrum = Strokes().eval(), Spectrum().eval()
    for model, images, layer in (
        (strokes, random(2, 1, 8, 12), "columns"),
        (spectrum, random(2, 80), "conv"),
    ):
        ours = grad_cam(model, images, layer, 1, relu=False)
        weights, maps = by_hand(model, images, layer, 1, lambda x: x)
        torch.testing.assert_close(ours.maps, maps)
        torch.testing.assert_close(ours.weights, weights)
        with refuses("spatial axes .* expected as many. Pass reshape="):
            guided_grad_cam(model, images, layer, 1)


# ---- several inputs, layers and calls ----


class Pair(nn.Module):
    """Scores of an image, a second image, and a dictionary with a mask."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, image, depth, extra=None):
        features = self.conv(image).relu().mean((2, 3))
        depth.mul_(2)  # in place: the caller's tensor does not change
        if extra is not None:
            features = features * extra["mask"].float()
        return self.head(features + self.other(depth).relu().mean((2, 3)))


def test_several_inputs_by_position_and_by_keyword():
    torch.manual_seed(0)
    model = Pair().eval()
    image, depth = random(2, 3, 8, 8), random(2, 1, 16, 12, seed=1)
    extra = {"mask": torch.tensor([1, 0, 1, 1]), "ids": torch.tensor([3])}
    before = depth.clone()
    expected = by_hand(model, (image, depth.clone(), extra), "conv", 1, lambda x: x)[1]
    keywords = {"image": image, "depth": depth, "extra": extra}
    for images in ((image, depth, extra), keywords):
        ours = grad_cam(model, images, "conv", 1, relu=False)
        torch.testing.assert_close(ours.maps, expected)
        for explain in (1, "depth"):
            if explain in keywords if isinstance(images, dict) else explain == 1:
                guided = guided_backprop(model, images, 1, explain=explain)
                product = guided_grad_cam(model, images, "other", 1, explain=explain)
                assert guided.shape == product.shape == depth.shape
    assert torch.equal(depth, before)
    first = image.clone().requires_grad_()
    score = model(first, depth.clone(), extra)[:, 1].sum()
    assert guided_backprop(model, keywords, 1).shape == image.shape
    assert torch.autograd.grad(score, first)[0].shape == image.shape


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ((), {}, r"explain=None for the inputs \[\]"),
        ({}, {}, r"explain=None for the inputs \[\]"),
        ((1, random(2, 1, 8, 8)), {}, "images of type int"),
        ((random(2, 3, 8, 8),), {"explain": 1}, r"explain=1 for the inputs \[0\]"),
        ({"x": random(2, 3, 8, 8)}, {"explain": "y"}, r"explain='y' .* \['x'\]"),
        (random(2, 3, 8, 8), {"explain": []}, r"explain=\[\] for the inputs"),
        ((random(2, 3, 8, 8),), {}, "the model raises TypeError.*'depth'"),
        ({"picture": random(2, 3, 8, 8)}, {}, "the model raises TypeError.*'picture'"),
        ((random(2, 1, 8, 8), random(2, 1, 8, 8)), {}, "raises RuntimeError"),
        ((random(3, 8, 8), random(1, 8, 8)), {}, r"batch axis with images\[None\]"),
        ([random(2, 3, 8, 8)], {}, "images of type list"),
    ],
)
def test_inputs_that_the_model_does_not_accept_are_refused(images, options, message):
    torch.manual_seed(0)
    model = Pair().eval()
    for call in (
        lambda: grad_cam(model, images, "conv", 1, **options),
        lambda: guided_backprop(model, images, 1, **options),
        lambda: guided_grad_cam(model, images, "conv", 1, **options),
    ):
        with refuses(message):
            call()


def test_inputs_of_another_dtype_are_refused_with_both():
    model = classifier(nn.ReLU())
    for images in (random(2, 3, 6, 6).double(), random(2, 3, 6, 6).bfloat16()):
        with refuses("raises RuntimeError for images .* dtype (float64|bfloat16)"):
            grad_cam(model, images, "1", 1)


def test_several_layers_cost_one_pass_and_equal_single_calls():
    model, images, calls = convolutional(2), random(2, 2, 9, 9), []
    model.register_forward_hook(lambda *_: calls.append(1))
    layers = ["2", "0", model[1], "2"]
    several = grad_cam(model, images, layers, [[1, 2]] * 2, counterfactual=True)
    assert len(calls) == 1 and isinstance(several, list)
    for layer, ours in zip(layers, several, strict=True):
        single = grad_cam(model, images, layer, [[1, 2]] * 2, counterfactual=True)
        torch.testing.assert_close(ours.maps, single.maps)
        torch.testing.assert_close(ours.weights, single.weights)
        assert torch.equal(ours.targets, single.targets)
    (only,) = grad_cam(model, images, ("2",), 1)
    assert torch.equal(only.maps, grad_cam(model, images, "2", 1).maps)
    with refuses("empty sequence"):
        grad_cam(model, images, [], 1)
    with refuses("no layer 'absent'"):
        grad_cam(model, images, ["0", "absent"], 1)


def test_layers_inside_and_beside_each_other():
    torch.manual_seed(0)
    model = Pair().eval()
    model.all = nn.Sequential(model.conv, nn.ReLU())
    image, depth = random(2, 3, 8, 8), random(2, 1, 8, 8, seed=1)
    model.forward = lambda a, b: model.head(
        model.all(a).mean((2, 3)) + model.other(b).relu().mean((2, 3))
    )
    layers = ["all", "other", "all.0"]
    for layer, ours in zip(
        layers, grad_cam(model, (image, depth), layers, 1, relu=False), strict=True
    ):
        weights, maps = by_hand(model, (image, depth), layer, 1, lambda x: x)
        torch.testing.assert_close(ours.weights, weights)
        torch.testing.assert_close(ours.maps, maps)


class Repeated(nn.Module):
    """One convolution that runs three times, at the last one on a vector's shape."""

    def __init__(self):
        super().__init__()
        self.conv, self.shared = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        for _ in range(3):
            x = self.shared(self.conv(x)) + 0.1 * x
        return self.shared(self.head(x.mean((2, 3)))) + 1


@pytest.mark.parametrize("call", [0, 1, 2, -1, -2, -3])
def test_any_call_of_a_shared_layer(call):
    torch.manual_seed(0)
    model, images = Repeated().eval(), random(2, 3, 6, 6)
    ours = grad_cam(model, images, "conv", 1, relu=False, call=call)
    weights, maps = by_hand(model, images, "conv", 1, lambda x: x, call)
    torch.testing.assert_close(ours.weights, weights)
    torch.testing.assert_close(ours.maps, maps)
    (again, shared) = grad_cam(
        model, images, ["conv", "shared"], 1, relu=False, call=call if call >= 0 else -2
    )
    call_of_both = call if call >= 0 else -2
    for layer, found in (("conv", again), ("shared", shared)):
        _, expected = by_hand(model, images, layer, 1, lambda x: x, call_of_both)
        torch.testing.assert_close(found.maps, expected)
    product = guided_grad_cam(model, images, "conv", 1, call=call)
    factor = F.interpolate(maps.clamp_min(0)[:, None], (6, 6), mode="bilinear")
    torch.testing.assert_close(product, guided_backprop(model, images, 1) * factor)


def test_a_call_that_did_not_happen_is_refused():
    torch.manual_seed(0)
    model, images = Repeated().eval(), random(2, 3, 6, 6)
    for call in (3, -4, 99):
        with refuses(rf"'conv' ran 3 times, and call={call}; expected -3 to 2"):
            grad_cam(model, images, "conv", 1, call=call)
    for call in (0.5, "last", None):
        with refuses("expected an integer"):
            grad_cam(model, images, "conv", 1, call=call)
    # The last call of the shared ReLU has no spatial axes, the third has.
    with refuses(r"layer 'shared' returns \(2, 5\)"):
        grad_cam(model, images, "shared", 1)
    assert grad_cam(model, images, "shared", 1, call=2).maps.shape == (2, 6, 6)


# ---- float16 ----


def segmentation(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, padding=1),
    ).eval()


def rounded(model):
    """Round the weights to float16, so that only the arithmetic differs."""
    return model.half().float()


class Inside(nn.Module):
    """Casts inside its forward pass and returns float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            return self.model(x).float()


def mean_score(output):
    return output[:, 1].float().mean((1, 2))


def half_mean(output):
    return output[:, 1].mean((1, 2))


@pytest.mark.parametrize("score", [mean_score, half_mean])
@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("way", ["model", "autocast", "autocast inside"])
def test_float16_gradients_survive_an_average_over_many_pixels(way, side, score):
    model, images = rounded(segmentation()), random(1, 3, side, side).half().float()
    expected = grad_cam(model, images, "1", score)
    guided = guided_backprop(model, images, score)
    layer = "1"
    if way == "model":
        model, images = model.half(), images.half()
    elif way == "autocast inside":
        model, layer = Inside(model), "model.1"
    with torch.autocast("cpu", torch.float16, enabled=way == "autocast"):
        ours = grad_cam(model, images, layer, score)
        ours_guided = guided_backprop(model, images, score)
    assert distance(ours.weights, expected.weights) < 0.02
    assert distance(ours.maps, expected.maps) < 0.02
    assert distance(ours_guided, guided) < 0.02
    assert ours_guided.dtype == torch.float32


@pytest.mark.parametrize("factor", [1e-6, 1.0, 3e4])
def test_float16_gradients_neither_vanish_nor_overflow(factor):
    # A sum over all pixels, of a small or large multiple of the score.
    def score(output):
        return output[:, 1].float().sum((1, 2)) * factor

    model, images = rounded(segmentation(1)), random(2, 3, 64, 64).half().float()
    expected = grad_cam(model, images, "1", score).weights
    guided = guided_backprop(model, images, score)
    model, images = model.half(), images.half()
    assert distance(grad_cam(model, images, "1", score).weights, expected) < 0.02
    assert distance(guided_backprop(model, images, score), guided) < 0.02
    features = model[:2](images).detach().requires_grad_()
    weights = grad_cam_weights(score(model[2:](features)), features)
    assert distance(weights, expected) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_not_scaled(dtype, monkeypatch):
    model, images = segmentation().to(dtype), random(1, 3, 32, 32).to(dtype)
    features = model[:2](images).detach().requires_grad_()
    score = mean_score(model[2:](features))
    (gradient,) = torch.autograd.grad(score, features, torch.ones_like(score))
    weights = gradient.mean((2, 3), dtype=torch.float32)
    ours = grad_cam(model, images, "1", mean_score)
    assert torch.equal(ours.weights, weights)
    assert torch.equal(ours.maps, grad_cam_map(weights, features.detach()))
    monkeypatch.setattr("paperlib.gradcam.gradients._FLOAT16_SCALES", ())
    assert torch.equal(grad_cam(model, images, "1", mean_score).maps, ours.maps)
    assert guided_backprop(model, images, mean_score).dtype == dtype


# ---- gradient modes and recurrent layers ----


class Modes(nn.Module):
    """Two stages with batch norm, which `run` may execute in different modes."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.run(self.one, x)
        return self.head((x[..., 1:-1, 1:-1] + self.run(self.two, x)).mean((2, 3)))


def plain(stage, x):
    return stage(x)


def enabled(stage, x):
    with torch.enable_grad():
        return stage(x)


@torch.enable_grad()
def decorated(stage, x):
    return stage(x)


def switched(stage, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    try:
        return stage(x)
    finally:
        torch.set_grad_enabled(before)


def reentrant(stage, x):
    return checkpoint(stage, x, use_reentrant=True)


def reentrant_lambda(stage, x):
    return checkpoint(lambda y: stage(y) * 1, x, use_reentrant=True)


def not_reentrant(stage, x):
    return checkpoint(stage, x, use_reentrant=False)


def nested(stage, x):
    return enabled(lambda y: reentrant(stage, y), x)


MODES = [
    enabled,
    decorated,
    switched,
    reentrant,
    reentrant_lambda,
    not_reentrant,
    nested,
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("run", MODES)
def test_a_layer_inside_code_that_sets_the_gradient_mode(run, frozen):
    torch.manual_seed(4)
    model, images = Modes(plain).eval(), random(2, 3, 12, 12)
    other = Modes(run).eval()
    other.load_state_dict(model.state_dict())
    other.requires_grad_(not frozen)
    for layer in ("one.0", "one.1", "two.0", "two"):
        expected = grad_cam(model, images, layer, 1, relu=False)
        ours = grad_cam(other, images, layer, 1, relu=False)
        torch.testing.assert_close(ours.maps, expected.maps)
        product = guided_grad_cam(other, images, layer, 1)
        expected = guided_grad_cam(model, images, layer, 1)
        torch.testing.assert_close(product, expected)
    layers = ["one.2", "two"]
    for ours, expected in zip(
        grad_cam(other, images, layers, 1),
        grad_cam(model, images, layers, 1),
        strict=True,
    ):
        torch.testing.assert_close(ours.maps, expected.maps)
    guided = guided_backprop(other, images, 1)
    torch.testing.assert_close(guided, guided_backprop(model, images, 1))
    assert all(p.grad is None for p in other.parameters()) and torch.is_grad_enabled()


def test_a_frozen_part_under_no_grad_is_explained():
    def frozen(stage, x):
        with torch.no_grad():
            return stage(x)

    torch.manual_seed(4)
    model, images = Modes(plain).eval(), random(2, 3, 12, 12)
    other = Modes(frozen).eval()
    other.load_state_dict(model.state_dict())
    ours = grad_cam(other, images, "two", 1)
    assert torch.equal(ours.maps, grad_cam(model, images, "two", 1).maps)
    with refuses("does not depend on the images.*no_grad"):
        guided_backprop(other, images, 1)


def test_reentrant_checkpoints_of_other_threads_remain_checkpoints():
    from torch.utils import checkpoint as module

    original, runs = module.CheckpointFunction, []

    def counted(y):
        runs.append(1)
        return y * 2

    def train():
        x = torch.ones(2, requires_grad=True)
        checkpoint(counted, x, use_reentrant=True).sum().backward()

    class Starts(Modes):
        def forward(self, x):
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
            return super().forward(x)

    torch.manual_seed(4)
    grad_cam(Starts(reentrant).eval(), random(2, 3, 12, 12), "two", 1)
    assert len(runs) == 2  # forward, and again in the backward pass
    assert module.CheckpointFunction is original


def test_a_gradient_that_torch_refuses_is_a_value_error_with_its_reason():
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("this operator has no backward pass in eval mode")

    model = classifier(Block(lambda x: Refusing.apply(x)))
    for call in (
        lambda: grad_cam(model, random(2, 3, 6, 6), "0", 1),
        lambda: guided_backprop(model, random(2, 3, 6, 6), 1),
    ):
        with refuses("can't compute a gradient.*no backward pass in eval mode"):
            call()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_lack_of_memory_is_no_mistake_in_the_arguments(in_backward):
    def run_out(*_):
        raise torch.OutOfMemoryError

    def run(x):
        if not in_backward:
            run_out()
        y = x * 2
        y.register_hook(run_out)
        return y

    model = nn.Sequential(nn.Conv2d(3, 4, 6), Block(run), nn.Flatten()).eval()
    with pytest.raises(torch.OutOfMemoryError):
        grad_cam(model, random(2, 3, 6, 6), "0", 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_without_cudnn_on_a_gpu(kind):
    class Watched(kind):
        def forward(self, x):
            seen.append(torch.backends.cudnn.enabled)
            return super().forward(x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rnn = nn.Conv2d(3, 4, 3), Watched(4, 4, batch_first=True)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x)
            seen.append(torch.backends.cudnn.enabled)
            x = self.rnn(x.mean(2).mT)[0].mean(1)
            seen.append(torch.backends.cudnn.enabled)
            return self.head(x)

    seen = []
    with FakeTensorMode(), torch.device("cuda"):
        model = Network().eval()
        # A fake GPU runs the forward pass only.
        with contextlib.suppress(ValueError):
            grad_cam(model, torch.zeros(2, 3, 8, 8), "conv", 1)
    assert seen[:2] == [True, False] and torch.backends.cudnn.enabled
    seen.clear()
    model, images = Network().eval(), random(2, 3, 8, 8)
    ours = grad_cam(model, images, "conv", 1, relu=False)
    assert seen == [True] * 3
    weights, maps = by_hand(model, images, "conv", 1, lambda x: x)
    torch.testing.assert_close(ours.weights, weights)
    torch.testing.assert_close(ours.maps, maps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_eval_mode_equal_the_cpu_on_a_gpu(kind):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.rnn = nn.Conv2d(3, 4, 3), kind(4, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(self.conv(x).relu().mean(2).mT)[0].mean(1)

    torch.manual_seed(0)
    model, images = Network().eval(), random(2, 3, 8, 8)
    on_cpu = grad_cam(model, images, "conv", 1), guided_backprop(model, images, 1)
    model, images = model.cuda(), images.cuda()
    on_gpu = grad_cam(model, images, "conv", 1), guided_backprop(model, images, 1)
    torch.testing.assert_close(on_gpu[0].weights.cpu(), on_cpu[0].weights)
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], rtol=1e-3, atol=1e-5)
