import pytest
import torch
from refusals import refuses
from safetensors.torch import save_file
from torch import nn

from paperlib.storage import load_checkpoint, save_checkpoint

RECIPE = {"steps": 5, "size": (3, 4), "rate": 0.1}


def model_and_optimizers(hidden=3, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, hidden), nn.Linear(hidden, 1))
    return model, [
        torch.optim.Adam(model[0].parameters()),
        torch.optim.SGD(model[1].parameters(), 0.1, momentum=0.9),
    ]


def advance(model, optimizers, steps):
    for step in range(steps):
        model(torch.full((4, 2), step + 1.0)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_saved_values_are_restored(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizers = model_and_optimizers()
    advance(model, optimizers, 3)
    save_checkpoint(path, model, optimizers, RECIPE, {"done": 3, "loss": [1.5, None]})
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    advance(model, optimizers, 2)

    again, others = model_and_optimizers(seed=1)
    assert load_checkpoint(path, again, others, RECIPE) == {
        "done": 3,
        "loss": [1.5, None],
    }
    advance(again, others, 2)
    # Equal after two more steps: the moments came back too.
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_mismatched_checkpoints_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizers = model_and_optimizers()
    advance(model, optimizers, 2)
    save_checkpoint(path, model, optimizers, RECIPE, {})

    other, others = model_and_optimizers(seed=1)
    state = {name: value.clone() for name, value in other.state_dict().items()}

    def refused(message, model=other, optimizers=others, recipe=RECIPE):
        with refuses(f"run.safetensors {message}"):
            load_checkpoint(path, model, optimizers, recipe)

    refused(
        r"is of another run: rate=0.1 \(now 0.2\), seed=None \(now 7\)",
        recipe=RECIPE | {"rate": 0.2, "seed": 7},
    )
    refused("is the checkpoint of another model", *model_and_optimizers(hidden=4))
    refused("is the checkpoint of another optimizer", optimizers=others[:1])
    refused("is the checkpoint of another optimizer", optimizers=others[::-1])
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"\x80\x04pickle",
        whole[:8] + b"\xff" + whole[9:],
    ):
        path.write_bytes(damaged)
        refused("can't be read")
        assert path.read_bytes() == damaged
    save_file({"a": torch.zeros(1)}, path)
    refused("is not a checkpoint")
    assert all(
        torch.equal(value, state[name]) for name, value in other.state_dict().items()
    )


@pytest.mark.parametrize("missing", ["of one parameter", "of all"])
def test_an_incomplete_second_optimizer_leaves_the_first_unchanged(tmp_path, missing):
    path = tmp_path / "run.safetensors"
    model, (first, _) = model_and_optimizers()
    second = torch.optim.Adam(model[1].parameters())
    advance(model, [first, second], 1)
    if missing == "of all":  # found by the optimizer itself
        for state in second.state.values():
            del state["step"]
    else:
        del second.state[model[1].weight]["exp_avg"]
    save_checkpoint(path, model, [first, second], RECIPE, {})
    other, (other_first, _) = model_and_optimizers(seed=1)
    optimizers = [other_first, torch.optim.Adam(other[1].parameters())]
    with refuses("checkpoint of another optimizer(, or a part of|: it has no 'step')"):
        load_checkpoint(path, other, optimizers, RECIPE)
    assert other_first.state_dict()["state"] == {}


def test_an_optional_name_is_compared_only_where_both_have_it(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizers = model_and_optimizers()
    save_checkpoint(path, model, optimizers, RECIPE, {"done": 1})
    arguments, recipe = (path, model, optimizers), RECIPE | {"seed": 7}
    assert load_checkpoint(*arguments, recipe, optional=["seed"]) == {"done": 1}
    save_checkpoint(*arguments, recipe, {"done": 2})
    recipe["seed"] = 8
    with refuses(r"is of another run: seed=7 \(now 8\)"):
        load_checkpoint(*arguments, recipe, optional=["seed"])
    assert load_checkpoint(*arguments, RECIPE, optional=["seed"]) == {"done": 2}


def test_a_state_of_more_parameters_or_with_a_part_missing_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizers = model_and_optimizers()
    advance(model, optimizers, 1)
    save_checkpoint(path, model, optimizers, RECIPE, {})
    # The bias would be its second.
    fewer = [torch.optim.Adam([model[0].weight]), optimizers[1]]
    with refuses("run.safetensors is the checkpoint of another optimizer"):
        load_checkpoint(path, model, fewer, RECIPE)
    other_order = torch.optim.Adam([model[0].bias, model[0].weight])
    with refuses("run.safetensors is the checkpoint of another optimizer"):
        load_checkpoint(path, model, [other_order, optimizers[1]], RECIPE)
    del optimizers[0].state[model[0].bias]["exp_avg"]
    save_checkpoint(path, model, optimizers, RECIPE, {})
    with refuses("run.safetensors is .* or a part of its state is missing"):
        load_checkpoint(path, *model_and_optimizers(), RECIPE)
