"""The state of a training run as one safetensors file, from which the run goes on as if nothing had stopped it."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperlib.storage import read_tensors, write_tensors

FORMAT = "paperlib.checkpoint.1"


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Write model, optimizers, recipe and progress: killed at any moment, the old file or the new one is there, whole.

    Args:
        path: of the file.
        model: whose state dict is kept.
        optimizers: whose moments are kept; their learning rates follow from the step.
        recipe: what must be equal for a run to be the same run, as JSON holds it.
        progress: how far it has come, as JSON holds it.

    Source: this book. Departures: none. Test: test_checkpoint.py::test_what_is_saved_comes_back
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    scalars = {}
    for k, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                kept = tensors if isinstance(value, Tensor) else scalars
                kept[f"optimizer.{k}.{index}.{name}"] = value
    write_tensors(path, tensors, {"recipe": recipe, "progress": progress, "scalars": scalars}, FORMAT)


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Mapping[str, Any],
    columns: int | None = None,
    *,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Restore the state of model and optimizers that `save_checkpoint` stored.

    The model changes only if everything fits. The optimizers are restored one by one:
    if one is found incomplete, those before it have already changed.

    Args:
        path, model, optimizers, recipe: as `save_checkpoint` had them.
        columns: of the progress's `history`, a list of rows: a step or epoch, then numbers or None. None here:
            not looked at.
        optional: names of `recipe` that are not compared if the file lacks them, for
            what earlier versions did not store.

    Returns:
        the progress that was saved.

    Raises:
        ValueError: naming the file, if it is damaged, no checkpoint, of another recipe, model or optimizer.

    Source: this book. Departures: none. Test: test_checkpoint.py::test_what_is_saved_comes_back
    """
    about, tensors = read_tensors(path, FORMAT, "checkpoint", "delete it to start over")
    if not all(isinstance(about.get(name), dict) for name in ("recipe", "progress", "scalars")):
        raise ValueError(f"{path} does not fit together: recipe, progress or scalars are missing; delete it")
    if columns is not None and not _is_history(about["progress"].get("history"), columns):
        raise ValueError(f"{path} does not fit together: its history is missing or no table of {columns} columns; "
                         "delete it")  # fmt: skip
    recipe = json.loads(json.dumps(recipe))
    for name in optional:
        if name not in about["recipe"]:
            recipe.pop(name, None)
    names = dict.fromkeys([*recipe, *about["recipe"]])
    changed = [name for name in names if recipe.get(name) != about["recipe"].get(name)]
    if changed:
        was = ", ".join(f"{name}={about['recipe'].get(name)!r} (now {recipe.get(name)!r})" for name in changed)
        raise ValueError(f"{path} is of another run: {was}. Run with what it was made with, or delete it to start over")
    own = {f"model.{name}": (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    if {name: (t.shape, t.dtype) for name, t in tensors.items() if name.startswith("model.")} != own:
        raise ValueError(f"{path} is the checkpoint of another model; give another name or delete it")
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in [*tensors.items(), *about["scalars"].items()]:
        if name.startswith("optimizer."):
            _, k, index, key = (*name.split(".", 3), "", "", "")[:4]
            known = k.isdecimal() and index.isdecimal() and int(k) < len(optimizers)
            groups = optimizers[int(k)].param_groups if known else []
            parameters = [parameter for group in groups for parameter in group["params"]]
            fits = (
                known
                and int(index) < len(parameters)
                and (not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameters[int(index)].shape)
            )
            if not fits:
                raise ValueError(f"{path} is the checkpoint of another optimizer; give another name or delete it")
            states[int(k)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        if len({frozenset(own) for own in state.values()}) > 1:
            raise ValueError(f"{path} does not fit together: a part of an optimizer's state is missing; delete it")
        try:
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        except KeyError as error:
            raise ValueError(f"{path} does not fit together: no {error} of an optimizer; delete it") from error
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    return about["progress"]


def _is_history(rows: Any, columns: int) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == columns
        and type(row[0]) is int
        and all(value is None or type(value) in (int, float) for value in row)
        for row in rows
    )
