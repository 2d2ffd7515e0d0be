import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from captum.attr import GuidedBackprop, GuidedGradCam, LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_grad_cam import GradCAM as PytorchGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from refusals import refuses
from skimage import data
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchcam.methods import GradCAM as TorchCAM

from paperlib import backbones
from paperlib.anomaly_map import upsample
from paperlib.cam import cam
from paperlib.gradcam import (
    grad_cam,
    grad_cam_map,
    grad_cam_weights,
    guided_backprop,
    guided_grad_cam,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU"),
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require grad"),
]


class Small(nn.Module):
    """Two convolutions with batch norm and a ReLU in place, pooling, and a linear layer
    of five classes.
    """

    def __init__(self, relu=nn.ReLU, channels=3):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), relu()
        )
        self.body = nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), relu(inplace=True)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = Small(**options)
    # Statistics as after training, not the initial 0 and 1.
    for norm in (model.stem[1], model.body[1]):
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.1, 0.5)
        nn.init.uniform_(norm.weight, 0.5, 2)
    return model.eval()


def pictures(n=2, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def state(model):
    """Everything about a model that a call might leave changed."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [
        (id(m), type(m), m.training, getattr(m, "inplace", None))
        for m in model.modules()
    ]
    gradients = [
        (p.requires_grad, None if p.grad is None else p.grad.clone())
        for p in model.parameters()
    ]
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    return values, modules, gradients, hooks


def same_state(a, b):
    same_values = all(torch.equal(value, b[0][name]) for name, value in a[0].items())
    same_gradients = all(
        p[0] == q[0] and (p[1] is q[1] or torch.equal(p[1], q[1]))
        for p, q in zip(a[2], b[2], strict=True)
    )
    return same_values and a[1] == b[1] and same_gradients and a[3] == b[3] == 0


# ---- the equations ----


def test_weights_and_map_by_hand():
    a = torch.tensor(
        [[[[1.0, 2.0], [0.0, -1.0]], [[0.5, 0.0], [2.0, 1.0]]]], requires_grad=True
    )
    gradient = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]], [[-1.0, -1.0], [-2.0, 0.0]]]])
    weights = grad_cam_weights((a * gradient).sum((1, 2, 3)), a)
    assert weights.tolist() == [[1.0, -1.0]]
    assert grad_cam_map(weights, a.detach()).tolist() == [[[0.5, 2.0], [0.0, 0.0]]]
    assert grad_cam_map(weights, a.detach(), relu=False).tolist() == [
        [[0.5, 2.0], [-2.0, -2.0]]
    ]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    t=st.integers(0, 3),
    c=st.integers(1, 4),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    relu=st.booleans(),
)
def test_maps_are_the_weighted_sum_of_channels(n, t, c, h, w, relu):
    generator = torch.Generator().manual_seed(n * 1000 + t * 100 + c * 10 + h + w)
    activations = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    weights = torch.randn(
        *((n, t, c) if t else (n, c)), generator=generator, dtype=torch.float64
    )
    expected = (
        weights[..., None, None] * (activations[:, None] if t else activations)
    ).sum(-3)
    maps = grad_cam_map(weights, activations, relu=relu)
    torch.testing.assert_close(maps, expected.clamp_min(0) if relu else expected)


def test_weights_are_finite_differences():
    # Adding ε to one channel of the layer's output moves the score by ε·Z·α.
    model, images, epsilon = small().double(), pictures(3).double(), 1e-6
    found = grad_cam(model, images, "body.0", [0, 3, 4])
    z = found.maps[0].numel()
    with torch.no_grad():
        for channel, unit in enumerate(torch.eye(8).view(8, 8, 1, 1)):
            scores = []
            for sign in (1, -1):
                handle = model.body[0].register_forward_hook(
                    lambda m, i, o, step=sign * epsilon * unit: o + step
                )
                scores.append(model(images)[[0, 1, 2], [0, 3, 4]])
                handle.remove()
            difference = (scores[0] - scores[1]) / (2 * epsilon)
            torch.testing.assert_close(
                found.weights[:, channel] * z, difference, rtol=1e-5, atol=1e-7
            )


def test_equals_cam_on_gap_linear_head():
    model, images = small().double(), pictures(3).double()
    ours = grad_cam(model, images, "body", relu=False)
    exact = cam(model, images)
    z = exact.maps[0].numel()
    torch.testing.assert_close(z * ours.maps, exact.maps, rtol=1e-12, atol=1e-12)
    expected = model.head.weight[ours.targets].detach()
    torch.testing.assert_close(z * ours.weights, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.targets, exact.targets)
    assert torch.equal(ours.logits, exact.logits)

    gap = model.body(model.stem(images)).requires_grad_()
    score = model.head(gap.mean((2, 3)))[:, 2]
    torch.testing.assert_close(
        z * grad_cam_weights(score, gap), model.head.weight[2].expand(3, -1)
    )


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 3),
    height=st.integers(5, 20),
    width=st.integers(5, 20),
    kind=st.sampled_from("none int list rows".split()),
)
def test_shapes_follow_images_and_targets(n, height, width, kind):
    model, images = small(), torch.randn(n, 3, height, width)
    classes = torch.arange(2 * n).view(n, 2) % 5
    kinds = {"none": None, "int": 2, "list": classes[:, 0].tolist(), "rows": classes}
    targets = kinds[kind]
    found = grad_cam(model, images, "body", targets)
    t = (2,) if kind == "rows" else ()
    assert found.maps.shape == (n, *t, (height - 1) // 2, (width - 1) // 2)
    assert found.weights.shape == (n, *t, 8)
    assert found.targets.shape == (n, *t)
    assert found.logits.shape == (n, 5)
    assert guided_backprop(model, images, targets).shape == (n, *t, 3, height, width)
    product = guided_grad_cam(model, images, "body", targets)
    assert product.shape == (n, *t, 3, height, width)


def test_counterfactual_negates_the_weights():
    model, images = small(), pictures()
    plain, counter = (
        grad_cam(model, images, "body", 1, counterfactual=c, relu=False)
        for c in (False, True)
    )
    assert torch.equal(counter.weights, -plain.weights)
    assert torch.equal(counter.maps, -plain.maps)
    kept = grad_cam(model, images, "body", 1, counterfactual=True)
    assert torch.equal(kept.maps, counter.maps.clamp_min(0)) and kept.maps.max() > 0


# ---- other libraries ----

# Architecture: a layer at the end, and one that an in-place operation follows.
NETWORKS = {
    "alexnet": ("features.12", "features.10"),
    "vgg11": ("features.20", "features.18"),
    "resnet18": ("layer4", "layer4.1.bn2"),
    "resnext50_32x4d": ("layer4", "layer3.0.bn1"),
    "densenet121": ("features.denseblock4", "features.norm5"),
    "googlenet": ("inception5b", "inception5b.branch1.bn"),
    "inception_v3": ("Mixed_7c", "Mixed_7c.branch1x1.bn"),
    "mobilenet_v2": ("features.18", "features.18.1"),
    "mobilenet_v3_small": ("features.12", "features.12.1"),
    "efficientnet_b0": ("features.8", "features.8.1"),
    "squeezenet1_1": ("features.12", "classifier.1"),
    "shufflenet_v2_x0_5": ("conv5", "conv5.1"),
    "mnasnet0_5": ("layers.16", "layers.15"),
    "regnet_y_400mf": ("trunk_output", "trunk_output.block4.block4-1.f.c"),
    "convnext_tiny": ("features.7", "features.6"),
    "swin_t": ("permute", "permute"),
    "timm tf_efficientnet_lite0": ("bn2", "conv_head"),
    "timm resnet18d": ("layer4.1.act2", "bn1"),
}


def build(name):
    torch.manual_seed(0)
    if name.startswith("timm "):
        return timm.create_model(name[5:]).eval()
    slow = name in ("googlenet", "inception_v3", "vgg11")  # to initialise
    options = {"init_weights": False} if slow else {}
    return tv.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_captum_on_every_network(name):
    model, targets = build(name), [3, 5]
    images = pictures(2, 96 if name in ("inception_v3", "alexnet") else 64)
    for layer in NETWORKS[name]:
        # Signed: a ReLU may leave nothing to compare.
        ours = grad_cam(model, images, layer, targets, relu=False)
        peer = LayerGradCam(model, model.get_submodule(layer))
        theirs = peer.attribute(images, torch.tensor(targets))[:, 0].detach()
        assert distance(ours.maps, theirs) < 1e-5, layer
        with torch.no_grad():
            torch.testing.assert_close(ours.logits, model(images))


def pytorch_grad_cam(model, layer, images, targets):
    """Its map before it is normalised and resized."""
    peer = PytorchGradCAM(model, [layer])
    peer(images, [ClassifierOutputTarget(t) for t in targets])
    found = peer.activations_and_grads
    maps = peer.get_cam_image(
        images, layer, targets, found.activations[0].numpy(), found.gradients[0].numpy()
    )
    found.release()
    return torch.from_numpy(maps).clamp_min(0)


def torchcam(model, layer, images, targets):
    with TorchCAM(model, layer) as peer:
        scores = model(images)
        return peer(targets, scores, normalized=False)[0]


def test_two_more_libraries_agree_without_in_place_operations():
    model, images, targets = build("resnet18"), pictures(2, 64), [3, 5]
    for name in ("layer4", "layer1.0.conv1", "layer2"):
        ours = grad_cam(model, images, name, targets).maps
        theirs = pytorch_grad_cam(model, model.get_submodule(name), images, targets)
        assert distance(theirs, ours) < 1e-5
        assert distance(torchcam(model, name, images, targets), ours) < 1e-5


def test_an_in_place_operation_after_the_layer_does_not_change_the_map():
    model = build("resnet18")
    images = pictures(2, 64)
    targets = [3, 5]
    layer = "layer4.1.bn2"
    ours = grad_cam(model, images, layer, targets).maps
    outplace = copy.deepcopy(model)
    for module in outplace.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    block = outplace.layer4[1]
    # The residual += of torchvision is in place as well.
    block.forward = lambda x: F.relu(
        block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))) + x
    )
    expected = pytorch_grad_cam(outplace, block.bn2, images, targets)
    assert distance(ours, expected) < 1e-5


# ---- guided backpropagation ----

HAND_INPUT = [[1.0, -1, 5], [2, -5, -7], [-3, 2, 4]]
HAND_GRADIENT = [[-2.0, 3, -1], [6, -3, 1], [2, -1, 3]]


def test_guided_backprop_by_hand():
    class OneReLU(nn.Module):
        def forward(self, x):
            return (F.relu(x) * torch.tensor(HAND_GRADIENT)).sum((1, 2, 3))[:, None]

    images = torch.tensor(HAND_INPUT)[None, None].requires_grad_()
    guided = guided_backprop(OneReLU(), images)[0, 0]
    assert guided.tolist() == [[0, 0, 0], [6, 0, 0], [0, 0, 3]]
    (plain,) = torch.autograd.grad(OneReLU()(images).sum(), images)
    assert plain[0, 0].tolist() == [[-2, 0, -1], [6, 0, 0], [0, -1, 3]]
    # A deconvnet's.
    deconvnet = torch.tensor(HAND_GRADIENT).clamp_min(0)
    assert deconvnet.tolist() == [[0, 3, 0], [6, 0, 1], [2, 0, 3]]


class Rule(torch.autograd.Function):
    """The rule written out: pass where 0 < x < top and the gradient is positive."""

    @staticmethod
    def forward(ctx, x, top):
        ctx.save_for_backward(x)
        ctx.top = top
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0) * (x < ctx.top) * (gradient > 0), None


def written_out(model, images, targets, monkeypatch):
    """Guided backpropagation with every ReLU of torch replaced by `Rule`."""
    with monkeypatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: Rule.apply(x, float("inf")))
        patch.setattr(
            F, "hardtanh", lambda x, low=0, high=6, inplace=False: Rule.apply(x, high)
        )
        images = images.clone().requires_grad_()
        score = model(images)[torch.arange(len(images)), targets].sum()
    return torch.autograd.grad(score, images)[0]


@pytest.mark.parametrize(
    "name",
    [
        *"resnet18 googlenet mobilenet_v2 densenet121".split(),
        "timm tf_efficientnet_lite0",
    ],
)
def test_guided_backprop_follows_the_rule_on_networks(name, monkeypatch):
    model, images, targets = build(name), pictures(2, 64), [3, 5]
    ours = guided_backprop(model, images, targets)
    expected = written_out(model, images, targets, monkeypatch)
    assert distance(ours, expected) < 1e-6
    if name == "resnet18":  # captum guides ReLUs that are modules
        theirs = GuidedBackprop(model).attribute(images, torch.tensor(targets))
        assert distance(theirs.detach(), expected) < 1e-6


def test_a_network_with_shared_and_functional_relus():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.ModuleList(
                [nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)]
            )
            self.shared = nn.ReLU(inplace=True)

        def forward(self, x):
            clamp, in_place = (lambda v: v.clamp(min=0)), torch.relu_
            ways = [self.shared, F.relu, self.shared, clamp, in_place, F.relu6]
            for convolution, relu in zip(self.convolutions, ways, strict=True):
                x = x + relu(convolution(x))
            return x.mean((2, 3))

    torch.manual_seed(0)
    model, images = Mixed(), pictures()

    def reference(x):
        tops = [float("inf")] * 5 + [6]
        for convolution, top in zip(model.convolutions, tops, strict=True):
            x = x + Rule.apply(convolution(x), top)
        return x.mean((2, 3))

    copied = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(copied)[:, 1].sum(), copied)
    torch.testing.assert_close(guided_backprop(model, images, 1), expected)


def test_smooth_networks_need_the_positive_gradient_rule():
    model, images = small(relu=nn.SiLU), pictures()
    for call in (
        lambda **o: guided_backprop(model, images, 1, **o),
        lambda **o: guided_grad_cam(model, images, "body", 1, **o),
    ):
        with refuses("this network uses silu"):
            call()
        assert call(positive_gradients=True).abs().sum() > 0
    assert grad_cam(model, images, "body", 1).maps.sum() > 0


def test_guided_grad_cam_is_the_product_of_its_factors():
    model, images, calls = build("resnet18"), pictures(2, 64), []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for targets in (None, 7, [[3, 5, 3], [1, 2, 3]]):
        for layer in ("layer4", "layer3.0.bn1"):
            calls.clear()
            product = guided_grad_cam(model, images, layer, targets)
            assert len(calls) == 1
            gradient = guided_backprop(model, images, targets)
            maps = grad_cam(model, images, layer, targets).maps
            expected = gradient * upsample(maps, 64).unsqueeze(-3)
            assert distance(product, expected) < 1e-6
    handle.remove()


def test_guided_grad_cam_equals_captums_with_bilinear_maps():
    model, images = build("resnet18"), pictures(2, 64)
    ours = guided_grad_cam(model, images, "layer4", [3, 5])
    peer = GuidedGradCam(model, model.layer4)
    targets = torch.tensor([3, 5])
    bilinear = peer.attribute(images, targets, interpolate_mode="bilinear")
    assert distance(bilinear.detach(), ours) < 1e-5


# ---- targets ----


def test_several_targets_of_one_image_cost_one_forward_pass():
    model, images, calls = small(), pictures(3), []
    rows = torch.tensor([[0, 1], [2, 2], [4, 0]])
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    both = grad_cam(model, images, "stem.1", rows)
    guided = guided_backprop(model, images, rows)
    handle.remove()
    assert len(calls) == 2
    for t in range(2):
        one = grad_cam(model, images, "stem.1", rows[:, t])
        torch.testing.assert_close(both.maps[:, t], one.maps)
        torch.testing.assert_close(both.weights[:, t], one.weights)
        torch.testing.assert_close(
            guided[:, t], guided_backprop(model, images, rows[:, t])
        )


def test_the_ways_to_give_a_class_agree():
    model, images = small(), pictures(2)
    expected = grad_cam(model, images, "body", [3, 1])
    for targets in (
        (3, 1),
        torch.tensor([3, 1]),
        torch.tensor([3, 1], dtype=torch.uint8),
        lambda y: y[[0, 1], [3, 1]],
    ):
        assert torch.equal(grad_cam(model, images, "body", targets).maps, expected.maps)
    predicted = grad_cam(model, images, "body")
    assert torch.equal(predicted.targets, model(images).argmax(1))
    assert torch.equal(grad_cam(model, images, "body", 2).targets, torch.tensor([2, 2]))


def test_each_image_is_explained_independently():
    model, images = small(), pictures(4)
    together = grad_cam(model, images, "stem.0", [0, 1, 2, 3])
    for i in range(4):
        torch.testing.assert_close(
            grad_cam(model, images[i : i + 1], "stem.0", i).maps[0], together.maps[i]
        )


def test_any_score_of_a_segmentation_network():
    torch.manual_seed(0)
    model = tv.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    ).eval()
    images, region = pictures(2, 64), slice(16, 48)

    def score(y):
        return y["out"][:, 2, region, region].mean((1, 2))

    found = grad_cam(model, images, "backbone.16", score)
    assert found.targets is None and found.maps.shape == (2, 4, 4)
    assert found.logits["out"].shape == (2, 4, 64, 64)
    assert not found.logits["out"].requires_grad
    theirs = LayerGradCam(lambda x: score(model(x))[:, None], model.backbone["16"])
    expected = theirs.attribute(images, 0, relu_attributions=True)[:, 0].detach()
    assert distance(found.maps, expected) < 1e-5


def test_the_similarity_of_two_embeddings():
    model, images = build("resnet18"), pictures(2, 64)
    model.fc = nn.Identity()
    with torch.no_grad():
        reference = model(pictures(1, 64, seed=9))

    def similarity(y):
        return F.cosine_similarity(y, reference)

    found = grad_cam(model, images, "layer4", similarity)
    embedding = found.logits.requires_grad_()
    (slope,) = torch.autograd.grad(similarity(embedding).sum(), embedding)
    # Pooling over 2×2 cells.
    torch.testing.assert_close(found.weights, slope / 4, rtol=1e-4, atol=1e-7)


def test_exceptions_of_a_function_are_propagated():
    model = small()
    kept = state(model)

    class Odd(Exception):
        pass

    def fail(logits):
        raise Odd("not ours")

    for call in (grad_cam, guided_grad_cam):
        with pytest.raises(Odd, match="not ours"):
            call(model, pictures(), "body", fail)
    assert same_state(kept, state(model))


def test_the_last_call_of_a_layer_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.again = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.tail(self.conv(F.relu(self.conv(x))))

        def tail(self, x):
            return F.relu(x).mean((2, 3))

    torch.manual_seed(0)
    model, images = Twice(), pictures()
    last = model.conv(F.relu(model.conv(images))).detach().requires_grad_()
    weights = grad_cam_weights(model.tail(last)[:, 1], last)
    found = grad_cam(model, images, "conv", 1)
    torch.testing.assert_close(found.weights, weights)
    torch.testing.assert_close(found.maps, grad_cam_map(weights, last.detach()))
    product = guided_grad_cam(model, images, "conv", 1)
    torch.testing.assert_close(
        product, guided_backprop(model, images, 1) * upsample(found.maps, 16)[:, None]
    )


# ---- the state of model and caller ----

CALLS = {
    "grad_cam": lambda m, images, t=1: grad_cam(m, images, "body", t).maps,
    "guided_backprop": lambda m, images, t=1: guided_backprop(m, images, t),
    "guided_grad_cam": lambda m, images, t=1: guided_grad_cam(m, images, "body", t),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    "prepare",
    ["eval", "train", "half train", "frozen", "half frozen", "with gradients"],
)
def test_the_model_is_restored(call, prepare):
    model, images = small(), pictures()
    expected = call(model, images)
    {
        "eval": lambda: None,
        "train": model.train,
        "half train": model.body.train,
        "frozen": lambda: model.requires_grad_(False),
        "half frozen": lambda: model.stem.requires_grad_(False),
        "with gradients": lambda: model(images).sum().backward(),
    }[prepare]()
    kept = state(model)
    assert torch.equal(call(model, images), expected)
    assert same_state(kept, state(model))
    with refuses():
        call(model, images, lambda y: y)  # not one score per image
    with refuses("the model raises RuntimeError for images of shape"):
        call(model, pictures()[:, :2])
    assert same_state(kept, state(model))
    assert torch.is_grad_enabled() and torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(call, context):
    model, images = small(), pictures()
    expected = call(model, images)
    with context():
        assert torch.equal(call(model, images), expected)
        made_inside = call(model, images * 1)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(made_inside, expected)
    assert not made_inside.is_inference() and not made_inside.requires_grad


def test_a_model_made_in_inference_mode_is_refused_with_the_way_out():
    with torch.inference_mode():
        model = small()
    for call in CALLS.values():
        with refuses(r"inside torch.inference_mode\(\).*copy.deepcopy"):
            call(model, pictures())
    assert CALLS["grad_cam"](copy.deepcopy(model), pictures()).shape == (2, 7, 7)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_callers_images_are_not_changed(call):
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.body = self.net.body

        def forward(self, x):
            return self.net(x.sub_(0.5).div_(2))

    model, images = Greedy(), pictures().requires_grad_()
    with torch.no_grad():
        before = images.clone()
    assert call(model, images).shape[0] == 2
    assert torch.equal(images, before) and images.grad is None and images.requires_grad


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_channels_last_gives_the_same(call):
    model, images = small(), pictures()
    expected = call(model, images)
    layout = {"memory_format": torch.channels_last}
    torch.testing.assert_close(
        call(model.to(**layout), images.to(**layout)), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_single(dtype):
    model, images = small(), pictures()
    expected = grad_cam(model, images, "body", 1)
    found = grad_cam(model.to(dtype), images.to(dtype), "body", 1)
    assert found.maps.dtype == found.weights.dtype == torch.float32
    assert distance(found.maps, expected.maps) < 0.02
    product = guided_grad_cam(model, images.to(dtype), "body", 1)
    # Gradients of float16 images may be too small for float16.
    assert product.dtype == (torch.float32 if dtype == torch.float16 else dtype)

    # 128 × 128 gradients of 1: their sum is beyond what half precision can hold.
    ones = torch.ones(1, 1, 128, 128, dtype=torch.float16, requires_grad=True)
    assert grad_cam_weights((ones.float() * 8).sum((1, 2, 3)), ones).item() == 8
    assert (
        grad_cam_map(torch.full((1, 4), 5e4), torch.ones(1, 4, 1, 1).half()).item()
        == 2e5
    )


def test_under_autocast_only_the_forward_pass_is_cast():
    model, images = small(), pictures()
    expected = grad_cam(model, images, "body", 1)
    casting = []
    with torch.autocast("cpu", torch.bfloat16):
        found = grad_cam(model, images, "body", lambda y: Spy.apply(y, casting)[:, 1])
        assert CALLS["guided_grad_cam"](model, images).shape == (2, 3, 16, 16)
        assert torch.is_autocast_enabled("cpu")
    assert casting == [False] and found.logits.dtype == torch.bfloat16
    assert found.maps.dtype == found.weights.dtype == torch.float32
    assert distance(found.maps, expected.maps) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_last_layer_is_accurate_under_autocast_and_all_layers_without(dtype):
    backbone = backbones.load("efficientnet_lite0")
    cat, model = backbone.transform(data.chelsea()[None]), backbone.model

    def error(layer):
        peer = LayerGradCam(model, model.get_submodule(layer))
        with torch.autocast("cpu", enabled=False):
            expected = peer.attribute(cat, 285)[:, 0].detach()
        return distance(grad_cam(model, cat, layer, 285, relu=False).maps, expected)

    with torch.autocast("cpu", dtype):
        assert 0 < error("conv_head") < (0.04 if dtype == torch.bfloat16 else 0.01)
        with torch.autocast("cpu", enabled=False):
            assert error("conv_head") < 1e-4 and error("blocks.1") < 1e-4


class Spy(torch.autograd.Function):
    """Notes whether autocast is on during the backward pass."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(torch.is_autocast_enabled("cpu"))
        return gradient, None


def test_threads_that_share_a_model_get_their_own_maps():
    model = small()
    jobs = [
        (call, pictures(2, seed=seed), seed % 5)
        for seed in range(6)
        for call in CALLS.values()
    ]
    expected = [call(model, images, target) for call, images, target in jobs]
    found, barrier = [None] * len(jobs), threading.Barrier(6)

    def work(part):
        barrier.wait()
        for _ in range(3):
            for i in range(part, len(jobs), 6):
                call, images, target = jobs[i]
                found[i] = call(model, images, target)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert state(model)[3] == 0


@pytest.mark.filterwarnings("ignore:Using .torch.compile")
def test_compiled_networks_are_explained():
    torch._dynamo.reset()
    model, images = small(), pictures()
    expected = {name: call(model, images) for name, call in CALLS.items()}
    model.body.compile(backend="eager")
    with torch.no_grad():
        model(images)
    for name, call in CALLS.items():
        assert torch.equal(call(model, images), expected[name])
    torch._dynamo.reset()


def test_checkpointed_networks_are_explained():
    class Stored(Small):
        def forward(self, x):
            x = checkpoint(self.stem, x, use_reentrant=False)
            return self.head(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))

    model, images = small(), pictures()
    stored = Stored().eval()
    stored.load_state_dict(model.state_dict())
    for layer in ("stem.0", "body.1"):
        torch.testing.assert_close(
            grad_cam(stored, images, layer, 1).maps,
            grad_cam(model, images, layer, 1).maps,
        )
    for name, call in CALLS.items():
        torch.testing.assert_close(call(stored, images), call(model, images), msg=name)


def test_shapes_on_the_meta_device():
    model = small().to("meta")
    found = grad_cam(model, torch.empty(2, 3, 16, 16, device="meta"), "body")
    assert found.maps.shape == (2, 7, 7) and found.maps.device.type == "meta"
    assert guided_grad_cam(
        model, torch.empty(2, 3, 16, 16, device="meta"), "body", [1, 2]
    ).shape == (2, 3, 16, 16)


# ---- refusals ----


class Branches(nn.Module):
    """Layers that can't be explained, for different reasons."""

    def __init__(self):
        super().__init__()
        self.used = nn.Conv2d(3, 4, 3)
        self.aside = nn.Conv2d(3, 4, 3)
        self.skipped = nn.Conv2d(3, 4, 3)
        self.tokens = nn.Flatten(2)
        self.lists = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 5)
        self.folded = nn.Identity()
        self.integers = nn.Identity()

    def forward(self, x):
        self.aside(x)
        y = self.used(x)
        self.folded(y.reshape(-1, 4, 2, 7))
        self.integers((y > 0).int())
        tokens = self.tokens(y).transpose(1, 2)
        return self.head(self.lists(tokens)[0].mean(1) + tokens.mean(1))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("aside", "the score does not depend on layer 'aside'"),
        ("skipped", "layer 'skipped' did not run"),
        (
            "tokens",
            r"layer 'tokens' returns \(2, 4, 196\), the token map of a transformer",
        ),
        ("lists", "layer 'lists' returns a tuple"),
        (
            "head",
            r"layer 'head' returns \(2, 5\) for 2 images; expected \(2, C, h, w\)",
        ),
        ("folded", r"returns \(28, 4, 2, 7\) for 2 images"),
        ("integers", "of dtype torch.int32; expected floating point"),
        ("usd", "no layer 'usd' in this Branches; did you mean one of: used"),
        (nn.Conv2d(3, 4, 3), "a Conv2d, is not part of this model"),
    ],
)
def test_a_layer_that_cannot_be_explained_is_refused_with_its_reason(layer, message):
    torch.manual_seed(0)
    model = Branches()
    assert grad_cam(model, pictures(), "used", 1).maps.shape == (2, 14, 14)
    for call in (grad_cam, guided_grad_cam):
        with refuses(message):
            call(
                model,
                pictures(),
                layer,
                1,
                **({"positive_gradients": True} if call is guided_grad_cam else {}),
            )
    assert state(model)[3] == 0


def test_swins_blocks_are_channels_last_and_its_permute_is_not():
    model, images = build("swin_t"), pictures(1, 64)
    with refuses("channels last.*permutes the axes"):
        grad_cam(model, images, "features.7", 1)
    assert grad_cam(model, images, "permute", 1).maps.shape == (1, 2, 2)


def test_scripts_are_refused():
    scripted = torch.jit.trace(small(), pictures())
    with refuses("the model is a TopLevelTracedModule, which hides its layers"):
        grad_cam(scripted, pictures(), "body")
    part = nn.Sequential(
        torch.jit.trace(small().stem, pictures()),
        nn.Conv2d(6, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with refuses("layer '0' is a TopLevelTracedModule"):
        grad_cam(part, pictures(), "0")
    # A scripted part elsewhere does no harm.
    assert grad_cam(part, pictures(), "1").maps.shape == (2, 16, 16)
    with refuses("hides its layers and ReLUs"):
        guided_backprop(part, pictures())


class Threaded(Small):
    """Runs its parts in other threads, as nn.DataParallel does on several GPUs."""

    def forward(self, x):
        with ThreadPoolExecutor(1) as worker:
            x = worker.submit(self.body, worker.submit(self.stem, x).result()).result()
        return self.head(x.mean((2, 3)))


def test_a_model_that_runs_in_other_threads_is_refused_with_the_cause():
    model, threaded = small(), Threaded().eval()
    threaded.load_state_dict(model.state_dict())
    assert torch.equal(threaded(pictures()), model(pictures()))
    for call in (guided_backprop, lambda m, x, t: guided_grad_cam(m, x, "body", t)):
        with refuses("did not see .* ran in another thread"):
            call(threaded, pictures(), 1)
    with refuses("layer 'body' ran only in other threads"):
        grad_cam(threaded, pictures(), "body", 1)
    with refuses("layer 'body' ran only in other"):
        backbones.FeatureExtractor(threaded, ["body"])(pictures())
    assert state(threaded)[3] == 0


def test_a_score_cut_off_from_the_graph_is_refused():
    model = small()
    with refuses(
        "does not depend on layer 'body', or the model has no gradient there",
    ):
        grad_cam(model, pictures(), "body", lambda y: y.detach().sum(1))
    with refuses("does not depend on the images"):
        guided_backprop(model, pictures(), lambda y: y.detach().sum(1))
    with refuses("does not depend on the activations"):
        grad_cam_weights(
            torch.zeros(1, requires_grad=True) * 2,
            torch.zeros(1, 1, 1, 1, requires_grad=True),
        )


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda y: y,
            (
                r"returned \(2, 5\) of torch.float32; expected a floating-point tensor"
                r" \(2,\)"
            ),
        ),
        (lambda y: y.sum(), r"returned \(\) of"),
        (lambda y: y.argmax(1), r"returned \(2,\) of torch.int64"),
        (lambda y: 3.0, "returned a float"),
    ],
)
def test_a_function_must_give_one_score_an_image(score, message):
    with refuses(message):
        grad_cam(small(), pictures(), "body", score)


def test_images_and_targets_are_checked():
    model = small()
    for call in CALLS.values():
        with refuses(r"shape \(3, 16, 16\).*images\[None\]"):
            call(model, pictures()[0])
        with refuses(r"\[5\] are outside the model's 5 classes"):
            call(model, pictures(), [0, 5])
    wrapped = nn.ModuleDict({"net": model})
    wrapped.forward = lambda x: {"logits": model(x)}
    with refuses("an output of type dict; expected logits.*targets=<function"):
        grad_cam(wrapped, pictures(), "net.body")


def test_any_output_is_explained_by_a_function_and_returned_detached():
    class Best(NamedTuple):
        scores: torch.Tensor
        classes: torch.Tensor

    class Several(Small):
        def forward(self, x):
            logits = super().forward(x)
            best = Best(*logits.max(1))
            return {"logits": logits, "best": best, "list": [logits, "text"]}

    model, images = Several().eval(), pictures()
    found = grad_cam(model, images, "body", lambda output: output["logits"][:, 1])
    classifier = Small().eval()
    classifier.load_state_dict(model.state_dict())
    expected = grad_cam(classifier, images, "body", 1)
    assert torch.equal(found.maps, expected.maps) and found.targets is None
    assert torch.equal(found.logits["logits"], expected.logits)
    logits, best, (listed, text) = found.logits.values()
    assert isinstance(best, Best) and text == "text"
    assert not any(part.requires_grad for part in (logits, best.scores, listed))


# ---- a real network on a real picture ----


def test_two_classes_in_an_image_have_different_maps():
    backbone = backbones.load("efficientnet_lite0")
    cat, cup = (
        backbone.transform(picture[None]) for picture in (data.chelsea(), data.coffee())
    )
    scene = torch.cat([cat, cup], 3)  # the cat on the left, the cup on the right
    # Egyptian cat, espresso.
    found = grad_cam(backbone.model, scene, "conv_head", [[285, 967]])
    left = found.maps[..., :7].sum((2, 3)) / found.maps.sum((2, 3))
    assert left[0, 0] > 0.8 and left[0, 1] < 0.2
    sharp = guided_grad_cam(backbone.model, scene, "conv_head", [[285, 967]]).abs()
    left = sharp[..., :224].sum((2, 3, 4)) / sharp.sum((2, 3, 4))
    assert left[0, 0] > 0.9 and left[0, 1] < 0.1
