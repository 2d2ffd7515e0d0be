import collections
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from paperlib.patch_svdd import (
    FlatEncoder,
    HierarchicalEncoder,
    PatchEncoder,
    initialize,
    load_released_weights,
)
from paperlib.validation import UnusableFile

# Two orders of the same float32 sums of values below one: over 660 images each differs
# by at most 0.9e-6 from the sums in float64, so they differ by up to twice that from
# each other. Results in float64 are compared at 1e-14.
ROUNDING = 2e-6


def encoder(kind=HierarchicalEncoder, dimensions=8, seed=0):
    torch.manual_seed(seed)
    made = kind(dimensions).eval()
    for parameter in made.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)  # biases as after training
    return made


def pictures(n=1, height=70, width=78, seed=0):
    return 0.2 * torch.randn(
        n, 3, height, width, generator=torch.Generator().manual_seed(seed)
    )


def small_by_the_table(weights, x):
    """Patches through the layers as the released code lists them: (n, 3, 32, 32) to (n,
    D).
    """
    for i, stride in enumerate((2, 1, 1, 1, 1, 1, 1, 1), 1):
        x = F.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], stride)
        x = torch.where(x > 0, x, 0.1 * x) if i < 8 else torch.tanh(x)
    return x[:, :, 0, 0]


def flat_by_the_table(weights, x):
    for i, stride in enumerate((2, 2, 2, 1), 1):
        x = F.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], stride)
        x = torch.where(x > 0, x, 0.1 * x) if i < 4 else torch.tanh(x)
    return x[:, :, 0, 0]


def big_by_the_table(weights, x):
    """The quarters' embeddings, then two convolutions written as sums over what they
    see.
    """
    enc = {
        name.removeprefix("enc."): value
        for name, value in weights.items()
        if name.startswith("enc.")
    }
    hidden = weights["conv1.bias"]
    for k in (0, 1):
        for m in (0, 1):
            quarter = x[:, :, 32 * k : 32 * k + 32, 32 * m : 32 * m + 32]
            hidden = (
                hidden
                + small_by_the_table(enc, quarter)
                @ weights["conv1.weight"][:, :, k, m].T
            )
    hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
    return torch.tanh(
        hidden @ weights["conv2.weight"].flatten(1).T + weights["conv2.bias"]
    )


def patch_by_patch(embed, images, side, stride):
    """Cut out every patch and embed it: (n, h, w, D)."""
    rows, columns = ((length - side) // stride + 1 for length in images.shape[-2:])
    cut = [
        image[:, i * stride : i * stride + side, j * stride : j * stride + side]
        for image in images
        for i in range(rows)
        for j in range(columns)
    ]
    return embed(torch.stack(cut)).view(len(images), rows, columns, -1)


def expected(model, images, stride):
    """Embed by the table, in double precision; the arguments are not changed."""
    table = {
        PatchEncoder: small_by_the_table,
        FlatEncoder: flat_by_the_table,
        HierarchicalEncoder: big_by_the_table,
    }
    weights = {name: value.double() for name, value in model.state_dict().items()}
    return patch_by_patch(
        lambda x: table[type(model)](weights, x), images.double(), model.side, stride
    )


@pytest.mark.parametrize("dimensions", [64, 5])
def test_layers_and_names_are_the_released_ones(dimensions):
    shapes = {
        name: tuple(value.shape)
        for name, value in HierarchicalEncoder(dimensions).state_dict().items()
    }
    channels = (3, 32, 64, 128, 128, 64, 32, 32, dimensions)
    expected = {}
    for i in range(8):
        expected[f"enc.conv{i + 1}.weight"] = (channels[i + 1], channels[i], 3, 3)
        expected[f"enc.conv{i + 1}.bias"] = (channels[i + 1],)
    expected |= {"conv1.weight": (128, dimensions, 2, 2), "conv1.bias": (128,)}
    expected |= {"conv2.weight": (dimensions, 128, 1, 1), "conv2.bias": (dimensions,)}
    assert shapes == expected
    flat = {
        name: tuple(value.shape)
        for name, value in FlatEncoder(dimensions).named_parameters()
        if "weight" in name
    }
    assert flat == {
        "conv1.weight": (64, 3, 5, 5),
        "conv2.weight": (64, 64, 5, 5),
        "conv3.weight": (128, 64, 5, 5),
        "conv4.weight": (dimensions, 128, 5, 5),
    }


def test_the_big_encoder_sees_a_patch_through_its_quarters():
    model, patches = encoder(), pictures(3, 64, 64)
    torch.testing.assert_close(
        model.double()(patches.double()),
        expected(model, patches, 1)[:, 0, 0],
        rtol=0,
        atol=1e-14,
    )
    assert model.small is model.enc and model.dimensions == 8
    quarter = patches[:, :, :32, 32:]
    torch.testing.assert_close(
        model.small(quarter.double()), expected(model.small, quarter, 1)[:, 0, 0]
    )


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 2),
    height=st.integers(64, 75),
    width=st.integers(64, 85),
    stride=st.integers(4, 40),
    flat=st.booleans(),
)
def test_one_pass_equals_patch_by_patch(n, height, width, stride, flat):
    images = pictures(n, height, width, seed=height * width)
    model = encoder(FlatEncoder if flat else PatchEncoder)
    found = model.embed(images, stride)
    with torch.no_grad():
        torch.testing.assert_close(
            found,
            patch_by_patch(model, images, model.side, stride),
            rtol=0,
            atol=ROUNDING,
        )
    double = model.double().embed(images.double(), stride)
    torch.testing.assert_close(
        double, expected(model, images, stride), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_one_pass_at_small_strides(stride):
    images, model = pictures(1, 37, 34), encoder(PatchEncoder).double()
    found = model.embed(images.double(), stride)
    torch.testing.assert_close(
        found, expected(model, images, stride), rtol=0, atol=1e-14
    )


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(64, 140),
    width=st.integers(64, 120),
    small=st.integers(6, 40),
    big=st.integers(6, 40),
)
def test_both_scales_of_an_image_equal_patch_by_patch(height, width, small, big):
    model = encoder(dimensions=64)
    images = pictures(1, height, width, seed=height + width)
    found = model.embed(images, small, big)
    with torch.no_grad():
        torch.testing.assert_close(
            found.small,
            patch_by_patch(model.small, images, 32, small),
            rtol=0,
            atol=ROUNDING,
        )
        torch.testing.assert_close(
            found.big, patch_by_patch(model, images, 64, big), rtol=0, atol=ROUNDING
        )
    double = model.double().embed(images.double(), small, big)
    torch.testing.assert_close(
        double.small, expected(model.small, images, small), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(
        double.big, expected(model, images, big), rtol=0, atol=1e-14
    )


def test_published_grids_and_training_maps():
    model, images = encoder(dimensions=64), pictures(2, 256, 256)
    found = model.embed(images)
    assert found.small.shape == (2, 57, 57, 64) and found.big.shape == (2, 13, 13, 64)
    assert not found.small.requires_grad
    assert found.small.is_contiguous()
    assert found.big.is_contiguous()
    assert found.small.abs().max() < 1
    for row, column in ((0, 0), (12, 7)):
        corner = images[1:, :, 16 * row : 16 * row + 64, 16 * column : 16 * column + 64]
        torch.testing.assert_close(
            found.big[1, row, column], model(corner)[0], rtol=0, atol=ROUNDING
        )
        torch.testing.assert_close(
            found.small[1, 4 * row, 4 * column],
            model.small(corner[..., :32, :32])[0],
            rtol=0,
            atol=ROUNDING,
        )
    small, big = model.dense(images)
    assert small.shape == (2, 64, 113, 113)
    assert big.shape == (2, 64, 97, 97)
    assert big.requires_grad
    torch.testing.assert_close(
        small[:, :, ::2, ::2].permute(0, 2, 3, 1), found.small, rtol=0, atol=ROUNDING
    )
    torch.testing.assert_close(
        big[:, :, ::8, ::8].permute(0, 2, 3, 1), found.big, rtol=0, atol=ROUNDING
    )


def test_dtypes_layouts_and_devices():
    model, images = encoder(), pictures(2)
    found = model.embed(images)
    double = encoder().double().embed(images.double())
    assert double.small.dtype == torch.float64
    torch.testing.assert_close(found.big, double.big.float(), rtol=0, atol=3e-6)
    last = (
        encoder()
        .to(memory_format=torch.channels_last)
        .embed(images.contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(last.small, found.small, rtol=0, atol=3e-6)
    with FakeTensorMode(), torch.device("cuda"):
        fake = HierarchicalEncoder(8).embed(torch.rand(2, 3, 96, 80), 4, 7)
        assert fake.small.shape == (2, 17, 13, 8) and fake.big.shape == (2, 5, 3, 8)
        assert fake.small.device.type == fake.big.device.type == "cuda"


def test_the_signal_keeps_its_size_through_the_layers():
    torch.manual_seed(0)
    images, sizes = torch.randn(4, 3, 96, 96), {}
    for name in ("kaiming", "default"):
        model = HierarchicalEncoder()
        if name == "default":
            initialize(model, as_released=True)
        x = images
        for layer in list(model.enc.children())[:-1]:
            x = F.leaky_relu(layer(x), 0.1)
        sizes[name] = x.square().mean().item()
    assert 0.5 < sizes["kaiming"] < 2
    assert sizes["default"] < 0.02
    before = model.enc.conv3.weight.clone()
    initialize(model)
    assert not torch.equal(before, model.enc.conv3.weight)
    assert model.enc.conv3.weight.std().item() == pytest.approx(
        math.sqrt(2 / 1.01 / (64 * 9)), rel=0.02
    )
    assert all(
        (module.bias == 0).all()
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    )


def test_images_that_cannot_be_embedded_are_refused():
    model = encoder()
    for images, message in (
        (torch.zeros(1, 3, 63, 80), "at least 64×64 pixels"),
        (torch.zeros(1, 1, 80, 80), "expected RGB"),
        (torch.zeros(3, 80, 80), "expected a batch"),
        (torch.zeros(0, 3, 80, 80), "at least one image"),
        (torch.zeros(1, 3, 80, 80, dtype=torch.uint8), "expected floating point"),
        (torch.full((1, 3, 80, 80), math.nan), "NaN or infinite, in images number 0"),
        (
            torch.zeros(1, 3, 80, 80, dtype=torch.float64),
            "images are torch.float64 on cpu and the encoder is torch.f",
        ),
    ):
        with refuses(message):
            model.embed(images)
    for options, message in (
        ({"stride_small": 0}, "stride_small=0; expected at least 1"),
        ({"stride_big": -2}, "stride_big=-2"),
    ):
        with refuses(message):
            model.embed(torch.zeros(1, 3, 80, 80), **options)
    with refuses(
        r"patches of shape \(1, 3, 65, 64\); expected \(N, 3, 64, 64\)",
    ):
        model(torch.zeros(1, 3, 65, 64))
    with refuses(r"expected \(N, 3, 32, 32\)"):
        model.small(torch.zeros(1, 3, 64, 64))
    with refuses("at least 32×32 pixels"):
        model.small.embed(torch.zeros(1, 3, 31, 40), 4)
    with refuses("dimensions=0"):
        HierarchicalEncoder(0)


# ---- files ----


def released_file(path, weights):
    """Write what the authors' code writes: `torch.save` of a state dict in the format
    of before PyTorch 1.6.
    """
    torch.save(
        collections.OrderedDict(weights), path, _use_new_zipfile_serialization=False
    )
    assert path.read_bytes()[:2] == b"\x80\x02"  # a pickle stream, not a zip archive
    return path


@pytest.mark.parametrize("dimensions", [64, 7])
def test_released_weights_are_read(tmp_path, dimensions):
    model = encoder(dimensions=dimensions)
    found = load_released_weights(
        released_file(tmp_path / "enchier.pkl", model.state_dict())
    )
    assert isinstance(found, HierarchicalEncoder) and found.dimensions == dimensions
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in found.state_dict().items()
    )
    patches = pictures(2, 64, 64)
    assert torch.equal(found(patches), model(patches))
    assert all(
        parameter.requires_grad and parameter.is_leaf
        for parameter in found.parameters()
    )


def test_any_other_file_is_refused_by_name(tmp_path):
    path, weights = tmp_path / "enchier.pkl", encoder().state_dict()
    with refuses("enchier.pkl can't be read"):
        load_released_weights(path)
    nan = weights["conv1.bias"].clone()
    nan[0] = math.nan
    for change, message in (
        (
            {"conv3.weight": torch.zeros(1)},
            'Unexpected key.*"conv3.weight"',
        ),
        ({"enc.conv4.bias": None}, '"enc.conv4.bias", expected torch.Tensor'),
        (
            {"enc.conv4.weight": torch.zeros(128, 128, 5, 5)},
            "size mismatch for enc.conv4.weight.*128, 128, 5, 5",
        ),
        (
            {"conv2.bias": torch.zeros(9)},
            "size mismatch for conv1.weight.*128, 8, 2, 2.*128, 9, 2, 2",
        ),
        ({"conv2.bias": torch.zeros(0)}, "dimensions=0"),
        (
            {"conv1.bias": weights["conv1.bias"].double()},
            r"conv1.bias \(torch.float64\); expected finite float32",
        ),
        (
            {"conv1.bias": nan},
            r"NaN or infinite values.*: conv1.bias \(torch.float32\)",
        ),
    ):
        with refuses(message, UnusableFile) as refused:
            load_released_weights(released_file(path, weights | change))
        assert "enchier.pkl" in str(refused.value)
    del weights["conv2.bias"]
    with refuses("KeyError: 'conv2.bias'", UnusableFile):
        load_released_weights(released_file(path, weights))
    for odd in ([1, 2], {"a": 1}):
        torch.save(odd, path, _use_new_zipfile_serialization=False)
        with refuses("enchier.pkl", UnusableFile):
            load_released_weights(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    path = tmp_path / "enchier.pkl"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Bomb())),
        lambda: torch.save(
            {"conv2.bias": Bomb()}, path, _use_new_zipfile_serialization=False
        ),
        # A whole module.
        lambda: torch.save(encoder(), path, _use_new_zipfile_serialization=False),
    ):
        write()
        with refuses("enchier.pkl can't be read"):
            load_released_weights(path)
    assert not (tmp_path / "ran").exists()


def test_our_file_is_safetensors_under_the_released_names(tmp_path):
    model, path = encoder(dimensions=64), tmp_path / "encoder.safetensors"
    model.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert path.stat().st_size < 2e6
    assert set(load_file(path)) == set(model.state_dict())
    found, whole = HierarchicalEncoder.load(path), path.read_bytes()
    path.write_bytes(b"")  # nothing stays tied to the file
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in found.state_dict().items()
    )

    for damaged in (b"", whole[:1000], b"\x80\x04pickle"):
        path.write_bytes(damaged)
        with refuses("encoder.safetensors can't be read"):
            HierarchicalEncoder.load(path)
    save_file(model.state_dict(), path)
    with refuses("encoder.safetensors is not a saved encoder of this version"):
        HierarchicalEncoder.load(path)
