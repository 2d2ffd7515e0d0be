import math

import pytest
import torch
from refusals import refuses
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from paperlib.mobilenet import MobileNetV1
from paperlib.storage import CHECKPOINT_FORMAT as FORMAT
from paperlib.storage import read_tensors, write_tensors
from paperlib.training import predict, train_classifier


def left_or_right(n=96, seed=0):
    """Draw noise images with a brighter half: left for class 0, right for class 1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 16, 16, generator=generator)
    labels = torch.arange(n) % 2
    images[labels == 0, :, :, :8] += 1
    images[labels == 1, :, :, 8:] += 1
    return images, labels


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


def trained(seed=0, **options):
    model, (images, labels) = network(), left_or_right()
    model(images)  # gives the lazy layer its size
    torch.manual_seed(1)
    nn.init.normal_(model[-1].weight, std=0.01)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.005)
    return model, train_classifier(
        model, (images, labels), optimizer, **{"epochs": 6, "seed": seed} | options
    )


def test_learns_which_half_is_bright():
    model, history = trained(mirror=False)
    images, labels = left_or_right(seed=1)
    assert (predict(model, images).argmax(1) == labels).float().mean() > 0.9
    assert [epoch.number for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < 0.5 * history[0].loss
    assert history[-1].accuracy > 0.9
    assert not model.training


def test_mirroring_flips_batches_both_ways_and_can_be_turned_off():
    """Each image has a bright corner, whose position shows how it was flipped."""
    seen = []

    class Spy(nn.Linear):
        def forward(self, images):
            corners = images[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
            seen.append(corners.argmax(1).unique().tolist())
            return super().forward(images.flatten(1))

    images, labels = torch.zeros(64, 3, 4, 4), torch.arange(64) % 2
    images[:, :, 0, 0] = 1
    for mirror, expected in ((True, {(0,), (1,), (2,), (3,)}), (False, {(0,)})):
        seen.clear()
        model = Spy(48, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        train_classifier(
            model, (images, labels), optimizer, epochs=8, batch_size=8, mirror=mirror
        )
        # One corner per batch: a batch is flipped as a whole.
        assert {tuple(corners) for corners in seen} == expected


def test_equal_seeds_result_in_equal_runs():
    _, first = trained(seed=3)
    torch.rand(17)
    _, again = trained(seed=3)
    _, other = trained(seed=4)
    assert first == again
    assert first != other


def test_epochs_are_reported_and_the_rate_is_restored():
    model, (images, labels) = MobileNetV1(0.25, 2), left_or_right(9)
    optimizer, seen = torch.optim.RMSprop(model.parameters(), lr=0.01), []
    history = train_classifier(
        model, (images, labels), optimizer, epochs=2, batch_size=5, on_epoch=seen.append
    )
    assert seen == history
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_the_progress_bar_shows_epochs_and_loss(capsys):
    model, data = MobileNetV1(0.25, 2), left_or_right(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train_classifier(model, data, optimizer, epochs=2)
    assert capsys.readouterr().err == ""
    train_classifier(model, data, optimizer, epochs=2, progress=True)
    shown = capsys.readouterr().err
    assert "epochs: 100%" in shown and "2/2" in shown and "loss=" in shown


def test_the_learning_rate_follows_a_cosine_to_zero():
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model, data = MobileNetV1(0.25, 2), left_or_right(10)
    train_classifier(
        model, data, Recorder(model.parameters(), lr=0.2), epochs=3, batch_size=5
    )
    assert rates == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    )


def test_a_last_batch_of_one_is_dropped():
    model, (images, labels) = MobileNetV1(0.25, 2), left_or_right(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, inputs: lengths.append(len(inputs[0]))
    )
    train_classifier(model, (images, labels), optimizer, epochs=1, batch_size=8)
    assert lengths == [8]  # batch norm can't take a batch of one


def test_predict_equals_one_batch_and_keeps_the_mode():
    model, (images, _) = MobileNetV1(0.25, 2), left_or_right(10)
    model.train()
    model.features.block3.eval()
    modes = [module.training for module in model.modules()]
    parts = predict(model, images, batch_size=3)
    assert [module.training for module in model.modules()] == modes
    assert not parts.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(parts, model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (5, {}, "9 images and 5 labels"),
        (9, {"epochs": 0}, "epochs=0"),
        (9, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_refused(labels, options, message):
    model, (images, targets) = MobileNetV1(0.25, 2), left_or_right(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with refuses(message):
        train_classifier(
            model, (images, targets[:labels]), optimizer, **{"epochs": 1} | options
        )
    with refuses("images=0; expected at least 1"):
        predict(model, images[:0])


class Interrupted(Exception):
    pass


def dropout_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(72, 2),
    )


def run(path=None, stop_after=None, epochs=4, make=torch.optim.RMSprop, lr=0.003):
    """Train from the start, or from the checkpoint at `path`; `stop_after` an epoch, as
    a lost connection would.
    """
    model, data = dropout_network(), left_or_right(40)
    optimizer = make(model.parameters(), lr=lr)

    def stop(epoch):
        if epoch.number == stop_after:
            raise Interrupted

    history = train_classifier(
        model, data, optimizer, epochs=epochs, checkpoint=path, on_epoch=stop
    )
    return model.state_dict(), history


@pytest.mark.parametrize(
    "make", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.SGD]
)
def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path, make):
    path = tmp_path / "run.safetensors"
    expected, history = run(make=make)
    for stop_after in (1, 3):
        with pytest.raises(Interrupted):
            run(path, stop_after, make=make)
        torch.rand(5)  # whatever else draws random numbers meanwhile
    state, resumed = run(path, make=make)
    assert resumed == history
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    # No temporary file stays.
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


@pytest.mark.parametrize("where", ["between epochs", "within an epoch"])
def test_the_optimizer_of_an_interrupted_run_can_resume_it(tmp_path, where):
    """The lowered rate must not be taken for the base rate by the second call."""
    path = tmp_path / "run.safetensors"
    expected, history = run(make=torch.optim.Adam)
    model, data = dropout_network(), left_or_right(40)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    options = {"epochs": 4, "checkpoint": path}
    steps = []

    def stop(*_):
        steps.append(None)
        if where == "between epochs" or len(steps) == 6:  # an epoch has 2 steps
            raise Interrupted

    hook = model.register_forward_hook(stop) if where == "within an epoch" else None
    on_epoch = None if hook else stop
    with pytest.raises(Interrupted):
        train_classifier(model, data, optimizer, on_epoch=on_epoch, **options)
    assert optimizer.param_groups[0]["lr"] == 0.003
    if hook:
        hook.remove()
    resumed = train_classifier(model, data, optimizer, **options)
    assert resumed == history
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_changed_learning_rate_is_another_run(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Interrupted):
        run(path, stop_after=1)
    before = path.read_bytes()
    message = r"safetensors is of another run: learning_rates=\[0.003\] \(now \[0.01"
    with refuses(message):
        run(path, lr=0.01)
    assert path.read_bytes() == before
    run(path)


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """Earlier versions did not store the learning rates."""
    path = tmp_path / "run.safetensors"
    expected, history = run()
    with pytest.raises(Interrupted):
        run(path, stop_after=2)
    about, tensors = read_tensors(path, FORMAT, "checkpoint", "")
    assert about["recipe"].pop("learning_rates") == [0.003]
    write_tensors(path, tensors, about, FORMAT)
    state, resumed = run(path)
    assert resumed == history
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_finished_checkpoint_is_not_trained_again(tmp_path):
    path = tmp_path / "run.safetensors"
    state, history = run(path)
    before = path.read_bytes()
    again, repeated = run(path)
    assert repeated == history and path.read_bytes() == before
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_unusable_checkpoints_are_refused_by_name_and_change_nothing(tmp_path):
    path = tmp_path / "run.safetensors"
    run(path, epochs=2)
    with refuses(r"run.safetensors is of another run: epochs=2 \(now 3\)"):
        run(path, epochs=3)

    model, data = MobileNetV1(0.25, 2), left_or_right(8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    with refuses("checkpoint of another model"):
        train_classifier(model, data, optimizer, epochs=2, checkpoint=path)
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )

    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"\x80\x04pickle",
        whole[:8] + b"\xff" + whole[9:],
    ):
        path.write_bytes(damaged)
        with refuses("run.safetensors can't be read"):
            run(path, epochs=2)
        assert path.read_bytes() == damaged  # nothing is overwritten
    save_file({"a": torch.zeros(1)}, path)
    with refuses("not a checkpoint of this version"):
        run(path, epochs=2)


def test_a_dataset_trains_like_the_tensors_it_holds():
    images, labels = left_or_right(24)
    states = []
    for data in ((images, labels), TensorDataset(images, labels)):
        torch.manual_seed(0)
        model = MobileNetV1(0.25, 2)
        train_classifier(
            model,
            data,
            torch.optim.SGD(model.parameters(), lr=0.01),
            epochs=2,
            batch_size=8,
        )
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_callers_random_state_is_not_changed():
    torch.manual_seed(5)
    expected = torch.rand(1)
    model, data = dropout_network(), left_or_right(8)
    torch.manual_seed(5)
    train_classifier(
        model, data, torch.optim.SGD(model.parameters(), lr=0.01), epochs=1
    )
    assert torch.equal(torch.rand(1), expected)


def test_the_generators_of_other_devices_are_not_seeded(monkeypatch):
    model, seeded = dropout_network(), []  # this seeds all devices
    for name in ("cuda.manual_seed_all", "mps.manual_seed", "xpu.manual_seed_all"):
        monkeypatch.setattr(f"torch.{name}", lambda seed: seeded.append(seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
    train_classifier(model, left_or_right(8), optimizer, epochs=1)
    assert seeded == []


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_callers_cuda_generator_is_restored(device):
    """The dropout on the GPU follows from the seed all the same."""
    data, losses = left_or_right(40), []
    for _ in range(2):
        before = torch.cuda.get_rng_state()
        model = dropout_network().to(device)
        torch.cuda.set_rng_state(before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
        (epoch,) = train_classifier(model, data, optimizer, epochs=1)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        losses.append(epoch.loss)
        torch.rand(1, device="cuda")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
