"""The state of a training run as one safetensors file, from which the run goes on as if nothing had stopped it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


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
    path = Path(path)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    scalars = {}
    for k, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{k}.{index}.{name}"] = value
                else:
                    scalars[f"optimizer.{k}.{index}.{name}"] = value
    about = json.dumps({"recipe": recipe, "progress": progress, "scalars": scalars})
    # One fixed name: what a killed run leaves there, the next one overwrites.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(copies, temporary, metadata={"checkpoint": about})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: str | Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Put model and optimizers into the state that `save_checkpoint` wrote; nothing changes unless all of it fits.

    Returns:
        the progress that was saved.

    Raises:
        ValueError: naming the file, if it is damaged, no checkpoint, of another recipe, model or optimizer.

    Source: this book. Departures: none. Test: test_checkpoint.py::test_what_is_saved_comes_back
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("checkpoint", "null"))
            # Copied: what stays mapped to a file would crash the process when the file is cut short.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a checkpoint ({error}); delete it to start over") from error
    if not isinstance(about, dict) or {"recipe", "progress", "scalars"} - set(about):
        raise ValueError(f"{path} is no checkpoint of a training run; delete it to start over")
    recipe = json.loads(json.dumps(recipe))
    names = dict.fromkeys([*recipe, *about["recipe"]])
    changed = [name for name in names if recipe.get(name) != about["recipe"].get(name)]
    if changed:
        was = ", ".join(f"{name}={about['recipe'].get(name)!r} (now {recipe.get(name)!r})" for name in changed)
        raise ValueError(f"{path} is of another run: {was}. Run with what it was made with, or delete it to start over")
    own = {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    if {name: t.shape for name, t in tensors.items() if name.startswith("model.")} != own:
        raise ValueError(f"{path} is the checkpoint of another model; give another name or delete it")
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in [*tensors.items(), *about["scalars"].items()]:
        if name.startswith("optimizer."):
            _, k, index, key = name.split(".", 3)
            groups = optimizers[int(k)].param_groups if int(k) < len(optimizers) else []
            parameters = [parameter for group in groups for parameter in group["params"]]
            fits = int(index) < len(parameters) and (
                not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameters[int(index)].shape
            )
            if not fits:
                raise ValueError(f"{path} is the checkpoint of another optimizer; give another name or delete it")
            states[int(k)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    return about["progress"]
