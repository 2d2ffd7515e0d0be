import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from sklearn.metrics import log_loss
from torch import nn

from paperlib.datasets import elpv
from paperlib.patch_svdd import (
    FlatEncoder,
    HierarchicalEncoder,
    PatchEncoder,
    PositionClassifier,
    initialize,
    position_accuracy,
    position_loss,
    svdd_loss,
    train,
    train_on_patches,
)
from paperlib.patch_svdd import training as training_module
from paperlib.patch_svdd.training import fast_dtype
from paperlib.storage import CHECKPOINT_FORMAT, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parents[2]


def encoder(kind=HierarchicalEncoder, dimensions=4, seed=0):
    torch.manual_seed(seed)
    return kind(dimensions)


def pictures(n=3, side=127, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- losses ----


def test_losses_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert svdd_loss(a, b).item() == 3.5  # (5 + 2) / 2: distances, not squares
    # Deep SVDD's centre.
    assert svdd_loss(a, torch.tensor([[1.0, 1.0]])).item() == pytest.approx(
        math.sqrt(13) / 2
    )
    equal = torch.ones(2, 2, requires_grad=True)
    svdd_loss(equal, equal.detach()).backward()
    # Not NaN, where the root has no slope.
    assert torch.equal(equal.grad, torch.zeros(2, 2))

    classifier = PositionClassifier(5)
    a, b = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    position = torch.arange(30) % 8
    shares = classifier(a, b).softmax(1).detach().double()
    theirs = log_loss(position, shares / shares.sum(1, keepdim=True), labels=range(8))
    assert position_loss(classifier, a, b, position).item() == pytest.approx(
        theirs, rel=1e-5
    )


def test_the_classifier_looks_at_the_difference():
    torch.manual_seed(0)
    classifier, a, b = PositionClassifier(6), torch.randn(9, 6), torch.randn(9, 6)
    w = {
        name: value.detach().double() for name, value in classifier.state_dict().items()
    }
    assert {name: tuple(value.shape) for name, value in w.items()} == {
        "fc1.weight": (128, 6),
        "fc1.bias": (128,),
        "fc2.weight": (128, 128),
        "fc2.bias": (128,),
        "fc3.weight": (8, 128),
        "fc3.bias": (8,),
    }
    x = a.double() - b.double()
    for name in ("fc1", "fc2"):
        x = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        x = torch.maximum(x, 0.1 * x)
    columns = [
        w["fc3.weight"][:, j] / w["fc3.weight"][:, j].square().sum().sqrt()
        for j in range(128)
    ]
    expected = x @ torch.stack(columns, 1).T + w["fc3.bias"]
    torch.testing.assert_close(
        classifier.double()(a.double(), b.double()), expected, rtol=1e-9, atol=1e-12
    )
    a, b = a.double(), b.double()
    torch.testing.assert_close(
        classifier(a + 1, b + 1), classifier(a, b), rtol=1e-9, atol=1e-12
    )

    for trains in (True, False):
        classifier = PositionClassifier(6, train_last_weight=trains).double()
        position_loss(classifier, a, b, torch.arange(9) % 8).backward()
        assert (classifier.fc3.weight.grad is not None) == trains
        assert classifier.fc3.bias.grad.abs().max() > 0


# ---- dense training ----


def cells(count):
    """Real solar cells without a defect: 128×128 pixels from the middle of each."""
    found = elpv("mono")
    good = found.images[found.probability == 0][:count, None, 86:214, 86:214]
    return (good.float() / 255).expand(-1, 3, -1, -1)


def test_training_learns_positions_that_it_has_not_seen():
    images = cells(110)
    learned, start = encoder(dimensions=16), encoder(dimensions=16)
    options = {"steps": 30, "crops": 2, "side": 127, "pairs": 256, "every": 10}
    training = train(learned, images[:100], **options)
    small, big = position_accuracy(learned, training, images[100:])
    # Of 20,000 pairs; a guess gets 0.125, give or take 0.0025.
    assert big > 0.16 and small > 0.14
    assert [record.step for record in training.history] == [10, 20, 30]
    assert training.history[-1].loss < training.history[0].loss - 0.05
    assert training.history[-1].accuracy_big > 0.16
    assert not same(state(learned), state(start))
    small, big = position_accuracy(start, training, images[100:])
    # With another encoder, the classifiers are at chance level.
    assert abs(big - 0.125) < 0.02 and abs(small - 0.125) < 0.02


def spied(name, seen, monkeypatch):
    """Keep what a function of the module returns, call by call."""
    original = getattr(training_module, name)

    def call(*args, **options):
        seen.setdefault(name, []).append(original(*args, **options))
        return seen[name][-1]

    monkeypatch.setattr(training_module, name, call)


@pytest.mark.parametrize("shared_shift", [False, True])
def test_a_dense_step_is_the_loss_over_its_patches(monkeypatch, shared_shift):
    images, crops, pairs, seen = pictures(4, 140), 2, 5, {}
    model = encoder().double()
    images = images.double()

    for name in ("perturb", "position_pairs", "neighbor_pairs"):
        spied(name, seen, monkeypatch)
    weight = 0.3
    training = train(
        model,
        images,
        steps=1,
        crops=crops,
        side=133,
        pairs=pairs,
        svdd_weight=weight,
        every=1,
        shared_shift=shared_shift,
        dtype=torch.float32,
        learning_rate=0.0,
    )

    # The crops under the shift of the first patches, and under that of the second.
    assert len(seen["perturb"]) == (1 if shared_shift else 2)
    first_crops, second_crops = seen["perturb"][0], seen["perturb"][-1]
    assert first_crops.shape == (crops, 3, 133, 133)
    shifts = (second_crops - first_crops).mean((2, 3))
    assert (shifts == 0).all() if shared_shift else (shifts.abs() > 1e-4).all()
    expected = 0
    with torch.no_grad():
        for k, (name, patch) in enumerate((("big", 64), ("small", 32))):

            def embed(corners, perturbed=first_crops, patch=patch):
                which = torch.arange(crops).repeat_interleave(pairs)
                cut = [
                    perturbed[n, :, y : y + patch, x : x + patch]
                    for n, (y, x) in zip(which, corners, strict=True)
                ]
                return (model if patch == 64 else model.small)(torch.stack(cut))

            first, second, position = seen["position_pairs"][k]
            classifier = getattr(training, name)
            expected += F.cross_entropy(
                classifier(embed(first), embed(second, second_crops)), position
            )
            first, second, _ = seen["neighbor_pairs"][k]
            distance = (embed(first) - embed(second)).norm(dim=1).mean()
            assert getattr(training.history[0], f"svdd_{name}") == pytest.approx(
                distance.item(), rel=1e-5
            )
            expected += weight * distance
    assert training.history[0].loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shared_shift", [False, True])
def test_a_tint_reveals_the_direction_only_under_a_shared_shift(shared_shift):
    """The images differ only in brightness, and have a tint that grows to the right and
    downwards, like that of a lens: nothing else shows where a patch lies.
    """
    ramp, grey = torch.linspace(-0.1, 0.1, 80), torch.linspace(0.2, 0.8, 12)
    tint = torch.stack(
        [ramp.expand(80, 80), torch.zeros(80, 80), ramp[:, None].expand(80, 80)]
    )
    images = grey[:, None, None, None] * (1 + tint)
    training = train(
        encoder(PatchEncoder, 16),
        images,
        steps=40,
        crops=1,
        pairs=256,
        every=10,
        shared_shift=shared_shift,
    )
    accuracy = training.history[-1].accuracy_small
    assert accuracy > 0.3 if shared_shift else accuracy < 0.2  # a guess gets 0.125


def test_equal_arguments_result_in_equal_weights():
    results = []
    for seed in (0, 0, 1):
        torch.rand(7)
        before = torch.get_rng_state()
        model = encoder()
        torch.set_rng_state(before)
        training = train(
            model, pictures(), steps=3, crops=1, pairs=16, every=2, seed=seed
        )
        # The caller's random numbers are left alone.
        assert torch.equal(torch.get_rng_state(), before)
        results.append((state(model), training))
        assert all(parameter.grad is None for parameter in model.parameters())
    assert same(results[0][0], results[1][0])
    assert results[0][1].history == results[1][1].history
    assert same(state(results[0][1].big), state(results[1][1].big))
    assert not same(results[0][0], results[2][0])


def train_both_ways(model):
    train(model, pictures(), steps=1, crops=1, pairs=4)
    options = {"epochs": 1, "repeat": 1, "batch_size": 3, "as_released": True}
    train_on_patches(model, pictures(), **options)


def test_the_generators_of_other_devices_are_not_seeded(monkeypatch):
    seeded = []
    model = encoder()  # this seeds all devices
    for name in ("cuda.manual_seed_all", "mps.manual_seed", "xpu.manual_seed_all"):
        monkeypatch.setattr(f"torch.{name}", lambda seed: seeded.append(seed))
    train_both_ways(model)
    assert seeded == []


@pytest.mark.gpu
def test_the_callers_cuda_generator_is_not_changed():
    model = encoder()  # this seeds all devices
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    train_both_ways(model)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_objectives_for_comparison(monkeypatch):
    images, distances = pictures(6), {}
    for objective in ("patch_svdd", "neighbors", "centre"):
        model = encoder(dimensions=8)
        training = train(
            model, images, steps=20, crops=1, pairs=64, every=5, objective=objective
        )
        assert (
            (training.big is None)
            == (training.small is None)
            == (objective != "patch_svdd")
        )
        assert math.isnan(training.history[0].accuracy_big) == (
            objective != "patch_svdd"
        )
        distances[objective] = [record.svdd_small for record in training.history]
        spread = (
            model.embed(images - training.mean).small.flatten(0, 2).std(0).norm().item()
        )
        distances[objective].append(spread)
    # Without the loss of positions, embeddings converge, to a centre or pair by pair.
    for objective in ("neighbors", "centre"):
        assert distances[objective][-2] < 0.5 * distances[objective][0]
        assert distances[objective][-1] < 0.5 * distances["patch_svdd"][-1]


def test_the_centre_is_the_mean_embedding_before_training():
    images, model = pictures(5), encoder(dimensions=8)
    mean = images.mean(0)
    start = model.embed(images - mean)
    training = train(
        model,
        images,
        steps=1,
        crops=4,
        pairs=4000,
        objective="centre",
        every=1,
        dtype=torch.float32,
    )
    for name in ("small", "big"):
        rows = getattr(start, name).flatten(0, 2)
        expected = (rows - rows.mean(0)).norm(dim=1).mean().item()
        assert getattr(training.history[0], f"svdd_{name}") == pytest.approx(
            expected, rel=0.1
        )


def test_muon_takes_filter_banks_as_matrices():
    torch.manual_seed(0)
    weight, gradient = nn.Parameter(torch.randn(6, 4, 3, 3)), torch.randn(6, 4, 3, 3)
    flat = nn.Parameter(weight.detach().flatten(1).clone())
    ours = training_module._muon([weight], 0.1)
    theirs = torch.optim.Muon([flat], 0.1, weight_decay=0)
    for scale in (1, -3):
        weight.grad, flat.grad = scale * gradient, scale * gradient.flatten(1)
        ours.step()
        theirs.step()
    assert torch.equal(weight.flatten(1), flat) and weight.shape == (6, 4, 3, 3)


def test_the_learning_rate_follows_torchs_cycle():
    """At the same share of the way up, and of the way down."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=1,
        total_steps=100,
        pct_start=0.3,
        div_factor=25,
        final_div_factor=1e12,
        cycle_momentum=False,
    )
    for step in range(100):
        done = 0.3 * step / 29 if step <= 29 else 0.3 + 0.7 * (step - 29) / 70
        assert training_module._one_cycle(done) == pytest.approx(
            cycle.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        if step < 99:
            cycle.step()


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 - 1])
def test_the_order_is_one_of_its_own_for_each_seed_and_epoch(seed):
    orders = [
        tuple(training_module._order(50, s, epoch).tolist())
        for s in (seed, seed - 1)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == tuple(training_module._order(50, seed, 0).tolist())


def test_without_muon_the_error_suggests_adam(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with refuses("optimizer='muon' requires PyTorch 2.9 or newer.*pass 'adam'"):
        train(HierarchicalEncoder(), torch.rand(2, 3, 96, 96), steps=1)


def test_bfloat16_is_chosen_where_it_is_fast(monkeypatch):
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cpu,
            "get_capabilities",
            lambda native=native: {"avx512_bf16": native},
            raising=False,
        )
        assert fast_dtype(torch.device("cpu")) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_dtype(torch.device("cpu")) == torch.float32
    assert fast_dtype(torch.device("mps")) == torch.float32


# ---- stop and go on ----


def test_curves_and_classifiers_come_back_and_a_finished_run_is_not_repeated(tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"steps": 4, "crops": 1, "pairs": 16, "every": 2}
    whole = train(encoder(), pictures(), **options)

    class Interrupted(Exception):
        pass

    def stop(record):
        raise Interrupted

    with pytest.raises(Interrupted):
        train(encoder(), pictures(), checkpoint=path, on_record=stop, **options)
    model, seen = encoder(), []
    resumed = train(
        model, pictures(), checkpoint=path, on_record=seen.append, **options
    )
    assert resumed.history == whole.history and seen == whole.history[1:]
    assert same(state(resumed.small), state(whole.small))
    before = path.read_bytes()
    again = train(
        encoder(seed=3), pictures(), checkpoint=path, on_record=stop, **options
    )
    assert again.history == whole.history and path.read_bytes() == before
    for change in (
        {"steps": 5},
        {"svdd_weight": 0.1},
        {"seed": 2},
        {"objective": "neighbors"},
        {"shared_shift": True},
    ):
        with refuses(f"is of another run: {next(iter(change))}="):
            train(encoder(), pictures(), checkpoint=path, **options | change)
    with refuses("is of another run: fingerprint="):
        train(encoder(), pictures(seed=1), checkpoint=path, **options)
    # Earlier versions stored the shape and the checksum of the images.
    about, tensors = read_tensors(path, CHECKPOINT_FORMAT, "checkpoint", "")
    del about["recipe"]["fingerprint"]
    about["recipe"]["images"] = [3, 3, 130, 130, 7]
    write_tensors(path, tensors, about, CHECKPOINT_FORMAT)
    earlier = train(encoder(), pictures(), checkpoint=path, **options)
    assert earlier.history == whole.history


def test_a_checkpoint_keeps_the_order_of_its_columns(tmp_path):
    """Earlier versions stored the large patches first."""
    path = tmp_path / "run.safetensors"
    options = {"steps": 2, "crops": 1, "pairs": 8, "every": 1}
    history = train(encoder(), pictures(), checkpoint=path, **options).history
    about, _ = read_tensors(path, CHECKPOINT_FORMAT, "checkpoint", "")
    names = "step loss accuracy_big accuracy_small svdd_big svdd_small".split()
    for row, record in zip(about["progress"]["history"], history, strict=True):
        assert dict(zip(names, row, strict=True)) == record._asdict()
    assert train(encoder(), pictures(), checkpoint=path, **options).history == history
    assert history[0]._fields[2:] == (
        *("accuracy_small", "accuracy_big", "svdd_small", "svdd_big"),
    )


def test_the_progress_bar_shows_steps_and_loss(capsys):
    train(encoder(), pictures(), steps=2, crops=1, pairs=4, every=1, progress=True)
    shown = capsys.readouterr().err
    assert "steps: 100%" in shown and "2/2" in shown and "loss=" in shown


# ---- as published ----


def published_step(model, classifiers, images, seen, rows, weight):
    """The loss of a step as in the released code, over the pairs that were drawn."""
    mean, loss = images.mean(0), 0.0
    for k, (patch, embed) in enumerate(((64, model), (32, model.small))):

        def crop_patches(corners, patch=patch):
            return torch.stack(
                [
                    (images[n] - mean)[:, y : y + patch, x : x + patch]
                    for n, (y, x) in zip(rows, corners.tolist(), strict=True)
                ]
            )

        first, second, position = seen["position_pairs"][k]
        a, b = seen["perturb"][2 * k : 2 * k + 2]
        for corners, perturbed in ((first, a), (second, b)):
            assert (perturbed - crop_patches(corners)).std() == pytest.approx(
                0.02 * math.sqrt(2), rel=0.35
            )
        loss = loss + F.cross_entropy(classifiers[k](embed(a), embed(b)), position)
        first, second, _ = seen["neighbor_pairs"][k]
        # Not perturbed.
        loss = (
            loss
            + weight
            * (embed(crop_patches(first)) - embed(crop_patches(second)))
            .norm(dim=1)
            .mean()
        )
    return loss


@pytest.mark.parametrize("as_released", [False, True])
def test_published_training_takes_the_released_steps(monkeypatch, as_released):
    images, seen, rows = pictures(3), {}, []
    for name in ("perturb", "position_pairs", "neighbor_pairs", "_order"):
        spied(name, seen, monkeypatch)
    model, copy = encoder(), encoder()
    training = train_on_patches(
        model,
        images,
        epochs=1,
        repeat=2,
        batch_size=3,
        svdd_weight=0.5,
        every=1,
        seed=5,
        as_released=as_released,
    )
    assert len(training.history) == 2
    assert sorted((seen["_order"][0] % 3).tolist()) == [0, 0, 1, 1, 2, 2]
    rows = (seen["_order"][0] % 3)[:3].tolist()

    # Adam's first step moves each weight by the learning rate against its gradient's
    # sign.
    torch.manual_seed(5)
    classifiers = [
        PositionClassifier(4, train_last_weight=not as_released) for _ in range(2)
    ]
    if as_released:
        torch.manual_seed(5)
        for classifier in classifiers:
            initialize(classifier, as_released=True)
    loss = published_step(
        copy, classifiers, images, {k: v for k, v in seen.items()}, rows, 0.5
    )
    assert training.history[0].loss == pytest.approx(loss.item(), rel=1e-5)
    frozen = training.big.fc3.weight.detach()
    assert torch.equal(frozen, classifiers[0].fc3.weight) == as_released
    loss.backward()
    modules = [copy, *classifiers]
    optimizer = torch.optim.Adam(
        [p for module in modules for p in module.parameters() if p.requires_grad],
        lr=1e-4,
    )
    optimizer.step()
    second = {
        k: v[4:] if k == "perturb" else v[2:] for k, v in seen.items() if k != "_order"
    }
    loss = published_step(
        copy, classifiers, images, second, (seen["_order"][0] % 3)[3:].tolist(), 0.5
    )
    assert training.history[1].loss == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "has", "lacks"),
    [(FlatEncoder, "big", "small"), (PatchEncoder, "small", "big")],
)
def test_encoders_of_one_size_are_trained_too(kind, has, lacks):
    for train_it, options in (
        (train_on_patches, {"epochs": 1, "repeat": 2, "batch_size": 3}),
        (train, {"steps": 2, "crops": 2, "pairs": 50}),
        (train, {"steps": 2, "crops": 2, "pairs": 50, "optimizer": "adam"}),
        (train, {"steps": 2, "crops": 2, "pairs": 50, "objective": "centre"}),
    ):
        model = encoder(kind)
        before = state(model)
        training = train_it(model, pictures(), every=1, **options)
        assert not same(state(model), before)
        assert math.isnan(getattr(training.history[0], f"svdd_{lacks}"))
        assert getattr(training.history[0], f"svdd_{has}") > 0
        assert getattr(training, lacks) is None
        if "objective" not in options:
            accuracy = position_accuracy(model, training, pictures())._asdict()
            assert 0 < accuracy[has] < 0.4 and math.isnan(accuracy[lacks])


# ---- at the door ----


def test_bad_arguments_are_refused():
    for options, message in (
        (
            {"objective": "svdd"},
            "objective='svdd'; expected one of patch_svdd, neighbors, centre",
        ),
        ({"optimizer": "sgd"}, "optimizer='sgd'; expected one of muon, adam"),
        ({"steps": 0}, "steps=0; expected at least 1"),
        ({"crops": 0, "pairs": -1}, "crops=0, pairs=-1"),
        (
            {"learning_rate": 1e30, "steps": 3, "crops": 1, "pairs": 8, "every": 1},
            "the loss is nan",
        ),
    ):
        with refuses(message):
            train(encoder(), pictures(), **options)
    with refuses("an encoder of type Linear; expected a HierarchicalEncoder"):
        train(nn.Linear(3, 2), pictures(), steps=1)
    for bad, message in (
        (pictures(1), "1 training image"),
        (pictures(3, 63), "at least 64×64"),
        (pictures(3, 126), "126×126 pixels are too small for two patches of 64×64"),
        (torch.full((3, 3, 127, 127), math.nan), "NaN"),
        (torch.full((3, 3, 127, 127), 0.5), "of one colour"),
    ):
        with refuses(message):
            train(encoder(), bad, steps=1)
        with refuses(message):
            train_on_patches(encoder(), bad, epochs=1, repeat=1)
    with refuses("epochs=0"):
        train_on_patches(encoder(), pictures(), epochs=0)
    with refuses(
        "images are torch.float64 on cpu and the encoder is torch.float32",
    ):
        train(encoder(), pictures().double(), steps=1)
    training = train(encoder(), pictures(), steps=1, crops=1, pairs=4)
    with refuses(r"shape \(3, 3, 130, 130\); expected .* as in training"):
        position_accuracy(encoder(), training, pictures(3, 130))
