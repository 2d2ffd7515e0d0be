import threading

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from skimage import data, measure
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchcam.methods import CAM as TorchCAM

from paperlib import backbones
from paperlib.anomaly_map import minmax, upsample
from paperlib.cam import (
    Box,
    bounding_boxes,
    cam,
    class_activation_map,
)
from paperlib.gradcam import grad_cam

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning")


def pictures(n=2, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def build(name):
    torch.manual_seed(0)
    if name.startswith("timm "):
        return timm.create_model(name[5:], pretrained=False).eval()
    options = (
        {"init_weights": False}
        if name in ("googlenet", "inception_v3", "vgg11")
        else {}
    )
    return tv.get_model(name, weights=None, **options).eval()


class Pooled(nn.Module):
    """Features, followed by pooling and classification."""

    def __init__(self, end, channels=8):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3, stride=4), nn.ReLU())
        self.classifier = nn.Linear(channels, 5)
        self.end = end

    def forward(self, x):
        return self.end(self, self.features(x))


def pooled(end, seed=0, **options):
    torch.manual_seed(seed)
    return Pooled(end, **options).eval()


# ---- the map ----


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    t=st.integers(0, 3),
    c=st.integers(1, 4),
    k=st.integers(1, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
)
def test_the_map_is_the_weighted_sum_of_channels(n, t, c, k, h, w):
    features = torch.randn(n, c, h, w, dtype=torch.float64)
    weight = torch.randn(k, c, dtype=torch.float64)
    targets = torch.randint(k, (n, t) if t else (n,))
    maps = class_activation_map(features, weight, targets)
    assert maps.shape == (*targets.shape, h, w)
    for index in np.ndindex(*maps.shape):
        image, row, column = index[0], index[-2], index[-1]
        expected = sum(
            weight[targets[index[:-2]], j] * features[image, j, row, column]
            for j in range(c)
        )
        assert maps[index].item() == pytest.approx(expected.item(), abs=1e-12)


def test_half_precision_adds_up_in_single():
    maps = class_activation_map(
        torch.ones(1, 4, 1, 1).half(), torch.full((1, 4), 5e4).half(), torch.tensor([0])
    )
    assert maps.dtype == torch.float32 and maps.item() == pytest.approx(2e5, rel=1e-3)


MAPS = {  # network: the last module with weights, whose bias the maps leave out
    "resnet18": "fc",
    "resnext50_32x4d": "fc",
    "densenet121": "classifier",
    "googlenet": "fc",
    "inception_v3": "fc",
    "efficientnet_b0": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "regnet_y_400mf": "fc",
    "mnasnet0_5": "classifier.1",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": None,
    "swin_t": "head",
    "timm resnet18d": "fc",
    "timm tf_efficientnet_lite0": "classifier",
    "timm mobilenetv1_100": "classifier",
    "timm dpn48b": "classifier",
    "timm resnetv2_50": "head.fc",
    "timm dla34": "fc",
    "timm rexnet_100": "head.fc",
    "timm hrnet_w18_small": "classifier",
    "timm legacy_seresnet18": "last_linear",
    "timm mixnet_s": "classifier",
    "timm swin_tiny_patch4_window7_224": "head.fc",
    "timm repvgg_a0": "head.fc",
    "timm cspresnet50": "head.fc",
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_average_to_the_logits_of_many_networks(name):
    model = build(name).double()
    size = {"inception_v3": 128, "timm swin_tiny_patch4_window7_224": 224}.get(name, 64)
    images, targets = pictures(2, size).double(), torch.tensor([[3, 5, 7], [1, 0, 2]])
    if name.startswith("timm"):
        # Some are zero to begin with.
        nn.init.normal_(model.get_submodule(MAPS[name]).weight, std=0.1)
    found = cam(model, images, targets)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(found.logits, logits)
    assert found.maps.shape[:2] == (2, 3)
    assert found.maps.shape[-1] > 1
    assert found.maps.std() > 0
    bias = (
        getattr(model.get_submodule(MAPS[name]), "bias", None) if MAPS[name] else None
    )
    expected = (logits - (0 if bias is None else bias)).gather(1, targets)
    torch.testing.assert_close(found.maps.mean((2, 3)), expected, rtol=1e-9, atol=1e-10)


def test_every_position_of_the_map_is_correct():
    # Each position equals the layer applied to that position, not only the mean.
    for name, features in (
        ("resnet18", "layer4"),
        ("densenet121", "features"),
        ("swin_t", "permute"),
    ):
        model, kept = build(name), {}
        handle = model.get_submodule(features).register_forward_hook(
            lambda m, i, o, kept=kept: kept.update(x=o.clone())
        )
        found = cam(model, pictures(1, 96), 3)
        handle.remove()
        cells = kept["x"].relu() if name == "densenet121" else kept["x"]
        head = model.get_submodule(MAPS[name])
        scores = nn.functional.linear(cells.movedim(1, -1), head.weight)
        expected = scores[..., 3].detach()
        assert expected.shape[-1] == 3
        torch.testing.assert_close(found.maps, expected, rtol=1e-4, atol=1e-5)


def test_torchcam_agrees():
    model, images = build("resnet18"), pictures()
    for network, layer, head in (
        (model, "layer4", "fc"),
        (build("shufflenet_v2_x0_5"), "conv5", "fc"),
    ):
        with TorchCAM(network, layer, head) as peer, torch.no_grad():
            network(images)
            theirs = peer([3, 5], normalized=False)[0]
        torch.testing.assert_close(
            cam(network, images, [3, 5]).maps, theirs, rtol=1e-4, atol=1e-5
        )


ENDS = {
    "mean": lambda m, f: m.classifier(f.mean((2, 3))),
    "mean, axes from the end": lambda m, f: m.classifier(f.mean([-1, -2])),
    "mean kept, flattened": lambda m, f: m.classifier(
        torch.flatten(f.mean((2, 3), keepdim=True), 1)
    ),
    "two means": lambda m, f: m.classifier(f.mean(3).mean(2)),
    "two means, height first": lambda m, f: m.classifier(f.mean(2).mean(-1)),
    "flattened and averaged": lambda m, f: m.classifier(f.flatten(2).mean(2)),
    "viewed and averaged": lambda m, f: m.classifier(
        f.view(*f.shape[:2], -1).mean(dim=-1)
    ),
    "channels last": lambda m, f: m.classifier(f.permute(0, 2, 3, 1).mean((1, 2))),
    "adaptive pooling": lambda m, f: m.classifier(
        nn.functional.adaptive_avg_pool2d(f, 1)[:, :, 0, 0]
    ),
    "adaptive, squeezed": lambda m, f: m.classifier(
        nn.AdaptiveAvgPool2d((1, 1))(f).squeeze(-1).squeeze(-1)
    ),
    "average pooling": lambda m, f: m.classifier(
        nn.functional.avg_pool2d(f, f.shape[-2:]).view(len(f), -1)
    ),
    "dropout": lambda m, f: m.classifier(
        nn.Dropout(0.5).eval()(f.mean((2, 3)).contiguous().clone())
    ),
    "dropout in place": lambda m, f: m.classifier(
        nn.Dropout(0.5, True).eval()(f.mean((2, 3)))
    ),
    "a 1×1 convolution after": (
        lambda m, f: nn.functional.conv2d(
            f.mean((2, 3), True),
            m.classifier.weight[:, :, None, None],
            m.classifier.bias,
        ).flatten(1)
    ),
    "a 1×1 convolution before": (
        lambda m, f: nn.functional.conv2d(
            f, m.classifier.weight[:, :, None, None]
        ).mean((2, 3))
    ),
    "a sum": lambda m, f: m.classifier(f.sum((2, 3))),
    "converted logits": lambda m, f: m.classifier(f.mean((2, 3))).double(),
    "features changed in place first": lambda m, f: m.classifier(
        f.mul_(2).sub_(0.1).mean((2, 3))
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_ways_to_pool_and_classify(name):
    model, images = pooled(ENDS[name]), torch.randn(3, 3, 22, 30)
    found = cam(model, images, [[0, 1], [2, 3], [4, 0]])
    features = model.features(images).detach()
    features = features * 2 - 0.1 if "in place first" in name else features
    expected = class_activation_map(
        features, model.classifier.weight, torch.tensor([[0, 1], [2, 3], [4, 0]])
    ).detach()
    assert found.maps.shape == (3, 2, 5, 7)
    torch.testing.assert_close(found.maps, expected.to(found.maps.dtype))


REFUSED_ENDS = {
    "is the output of layer_norm": lambda m, f: m.classifier(
        nn.functional.layer_norm(f.mean((2, 3)), (8,))
    ),
    "is the output of relu": lambda m, f: m.classifier(f.mean((2, 3)).sub(0.1).relu()),
    "is the output of sub": lambda m, f: m.classifier(f.mean((2, 3)).sub_(0.1)),
    "is the output of cat": lambda m, f: m.classifier(
        torch.cat([f.mean((2, 3))[:, :4], f.amax((2, 3))[:, 4:]], 1)
    ),
    "is the output of adaptive_max_pool2d": lambda m, f: m.classifier(
        nn.functional.adaptive_max_pool2d(f, 1).flatten(1)
    ),
    "logits are the output of softmax": lambda m, f: m.classifier(
        f.mean((2, 3))
    ).softmax(1),
    "logits are the output of add": lambda m, f: m.classifier(f.mean((2, 3))) + 1,
    "logits are the output of relu": lambda m, f: m.classifier(f.mean((2, 3))).relu_(),
    "tokens are pooled": lambda m, f: m.classifier(
        f.flatten(2).transpose(1, 2).mean(1)
    ),
    r"adaptive_avg_pool2d turns \(2, 8, 4, 4\) into \(2, 8, 2, 2\)": lambda m, f: (
        nn.functional.linear(
            nn.functional.adaptive_avg_pool2d(f, 2).flatten(1), torch.ones(5, 32)
        )
    ),
    "the maps do not average to the logits": lambda m, f: m.classifier(
        f.mean((2, 3))[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    ),
    "something other than a torch function": lambda m, f: torch.from_numpy(
        m.classifier(f.mean((2, 3))).numpy()
    ),
    "8 channels are pooled": lambda m, f: nn.functional.linear(
        f.mean((2, 3))[:, :4], torch.ones(5, 4)
    ),
}


@pytest.mark.parametrize("message", REFUSED_ENDS)
def test_other_ends_are_refused_with_what_was_found(message):
    model = pooled(REFUSED_ENDS[message])
    with refuses(
        (
            f"(?s)CAM needs a network that ends in global average.*{message}.*Grad-CAM"
            " has no such"
        ),
    ):
        cam(model, pictures(2, 16))
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vgg11", "is the output of relu"),
        ("alexnet", "is the output of relu"),
        ("vit_b_32", "is the output of layer_norm"),
        ("convnext_tiny", "is the output of layer_norm"),
        ("mobilenet_v3_small", "is the output of hardswish"),
        ("timm vit_tiny_patch16_224", "is the output of layer_norm"),
        ("timm mixer_s32_224", "tokens are pooled"),
    ],
)
def test_networks_without_such_an_end_are_refused(name, found):
    model = build(name)
    with refuses(f"CAM needs .*{found}.*Grad-CAM has no such restriction"):
        cam(model, pictures(1, 224 if "vit" in name or "mixer" in name else 64))


def test_classes_and_images_are_checked():
    model, images = pooled(ENDS["mean"]), pictures(2, 16)
    predicted = cam(model, images)
    assert torch.equal(predicted.targets, model(images).argmax(1))
    assert predicted.maps.shape == (2, 4, 4)
    for targets in ([3, 1], (3, 1), torch.tensor([3, 1]), torch.tensor([[3], [1]])):
        assert torch.equal(
            cam(model, images, targets).maps.reshape(2, 4, 4),
            cam(model, images, [3, 1]).maps,
        )
    with refuses(r"\[7\] are outside the model's 5 classes"):
        cam(model, images, [1, 7])
    with refuses(r"images\[None\]"):
        cam(model, images[0])
    with refuses("expected logits"):
        cam(nn.Conv2d(3, 4, 1), images)
    with refuses("the model is a TopLevelTracedModule, which hides its layers"):
        cam(torch.jit.trace(model, images), images)


# ---- the state of model and caller ----


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_restored(training):
    model = build("resnet18").train(training)
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    images = pictures().requires_grad_()
    found = cam(model, images)
    with pytest.raises(RuntimeError):
        cam(model, pictures()[:, :2])
    assert [module.training for module in model.modules()] == modes
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    assert images.grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not found.maps.requires_grad and not found.logits.requires_grad
    assert torch.equal(cam(model.eval(), images).maps, found.maps)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context):
    model, images = pooled(ENDS["mean"]), pictures(2, 16)
    expected = cam(model, images)
    with context():
        found = cam(model, images * 1)
    assert torch.equal(found.maps, expected.maps) and not found.maps.is_inference()


def test_a_network_that_changes_its_input_in_place_leaves_the_images_as_they_are():
    model, images = pooled(lambda m, f: m.classifier(f.mean((2, 3)))), pictures()
    expected = cam(model, images.relu()).maps
    model.features.insert(0, nn.ReLU(inplace=True))
    assert torch.equal(cam(model, images).maps, expected)
    assert torch.equal(images, pictures())


def test_threads_that_share_a_model_get_their_own_maps():
    model, found = pooled(ENDS["mean"]), {}
    expected = {
        seed: cam(model, pictures(2, 16, seed), seed % 5).maps for seed in range(8)
    }
    barrier = threading.Barrier(8)

    def work(seed):
        barrier.wait()
        for _ in range(5):
            found[seed] = cam(model, pictures(2, 16, seed), seed % 5).maps

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(8))


def test_half_precision_and_autocast():
    model, images = build("resnet18"), pictures()
    expected = cam(model, images, 3).maps
    with torch.autocast("cpu", torch.bfloat16):
        cast = cam(model, images, 3)
    assert cast.maps.dtype == torch.float32 and cast.logits.dtype == torch.bfloat16
    assert ((cast.maps - expected).norm() / expected.norm()) < 0.1
    halved = cam(model.bfloat16(), images.bfloat16(), 3).maps
    assert ((halved - expected).norm() / expected.norm()) < 0.1


def test_on_a_gpu_that_is_not_there():
    with FakeTensorMode(), torch.device("cuda"):
        model = tv.resnet18().eval()
        found = cam(model, torch.randn(2, 3, 64, 64), [3, 5])
        assert found.maps.shape == (2, 2, 2) and found.maps.device.type == "cuda"
        assert upsample(minmax(found.maps), 64).device.type == "cuda"
    meta = cam(
        pooled(ENDS["mean"]).to("meta"), torch.empty(2, 3, 16, 16, device="meta")
    )
    assert meta.maps.shape == (2, 4, 4)


# ---- boxes ----


def test_boxes_by_hand():
    grid = torch.tensor([[0.0, 0, 5, 5], [0, 0, 5, 0], [9, 9, 0, 0], [10, 0, 0, -4]])
    assert bounding_boxes(grid) == [Box(top=0, left=0, bottom=4, right=4)]
    assert bounding_boxes(grid, connectivity=4) == [Box(0, 2, 2, 4), Box(2, 0, 4, 2)]
    # Strictly above half of 10.
    assert bounding_boxes(grid, threshold=0.5) == [Box(2, 0, 4, 2)]
    # The first of equals.
    assert bounding_boxes(grid, threshold=0.49, connectivity=4, largest=True) == [
        Box(0, 2, 2, 4)
    ]
    assert bounding_boxes(-grid - 5) == bounding_boxes(grid * 0) == []
    assert bounding_boxes(grid, threshold=1) == []


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    threshold=st.sampled_from([0, 0.15, 0.2, 0.6, 0.9]),
    connectivity=st.sampled_from([4, 8]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_boxes_equal_skimage_regions(
    rows, columns, seed, threshold, connectivity, dtype
):
    # Many on the threshold.
    values = (
        np.random.default_rng(seed).normal(size=(rows, columns)).round(1).astype(dtype)
    )
    labels = measure.label(
        values > values.dtype.type(threshold) * values.max(),
        connectivity=connectivity // 4,
    )
    regions = measure.regionprops(labels) if values.max() > 0 else []
    expected = [Box(*region.bbox) for region in regions]
    assert bounding_boxes(values, threshold, connectivity) == expected
    assert bounding_boxes(torch.from_numpy(values), threshold, connectivity) == expected
    largest = bounding_boxes(values, threshold, connectivity, largest=True)
    assert len(largest) == min(1, len(expected))
    if expected:
        areas = [region.area for region in regions]
        assert largest == [expected[int(np.argmax(areas))]]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(1, 2, 2), {}, r"shape \(1, 2, 2\); expected one map \(h, w\)"),
        (
            torch.tensor([[float("nan"), 1.0]]),
            {},
            "1 values of rows of the map",
        ),
        (torch.tensor([[float("inf"), 1.0]]), {}, "NaN or infinite"),
        (torch.ones(2, 2), {"threshold": 20}, "threshold=20; expected a share"),
        (torch.ones(2, 2), {"threshold": 1.01}, "threshold=1.01; expected a share"),
        (torch.ones(2, 2), {"threshold": -0.01}, "threshold=-0.01; expected a share"),
        (torch.ones(2, 2), {"threshold": float("nan")}, "threshold=nan"),
        (torch.ones(2, 2), {"connectivity": 6}, "connectivity=6; expected one of 4, 8"),
    ],
)
def test_boxes_refuse_invalid_arguments(values, options, message):
    with refuses(message):
        bounding_boxes(values, **options)


# ---- a real network on a real picture ----


def test_the_cats_box_is_on_the_cat():
    backbone = backbones.load("efficientnet_lite0")
    images = backbone.transform(data.chelsea()[None])
    found = cam(backbone.model, images)
    assert found.targets.tolist() == [285]  # Egyptian cat
    similar = grad_cam(backbone.model, images, "bn2")
    torch.testing.assert_close(
        49 * similar.maps, found.maps.clamp_min(0), rtol=1e-3, atol=1e-3
    )
    (box,) = bounding_boxes(
        upsample(found.maps, (300, 451))[0], threshold=0.5, largest=True
    )
    assert box.top < 110 < box.bottom and box.left < 220 < box.right  # between the eyes
    assert (box.bottom - box.top) * (box.right - box.left) < 0.7 * 300 * 451
