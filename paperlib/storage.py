"""Save tensors and training states atomically in safetensors files, and load only
intact ones.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    format: str,
) -> None:
    """Write tensors with a checksum: killed at any moment, the old file or the new one
    is there, whole.

    Args:
        path: of the file.
        tensors: by name; of any device, and they may share memory.
        about: what else to keep, as JSON holds it.
        format: what the file is, and its version: "paperlib.padim.1".

    Source: this book. Departures: none.
    Test: test_storage.py::test_what_is_written_comes_back
    """
    path, plain, storages = Path(path), {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses shared memory
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    text = json.dumps({**about, "format": format})
    # safetensors writes under a name of its own choice and renames: in a folder of one
    # fixed name, so that what a killed run leaves there, the next one removes.
    folder = path.with_name(f".{path.name}.tmp")
    folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    temporary = folder / path.name
    try:
        save_file(
            plain, temporary, metadata={"paperlib": text, "sha256": digest(text, plain)}
        )
        # what the user's mask allows; safetensors lets only them read
        temporary.chmod(folder.stat().st_mode & 0o666)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_tensors(
    path: str | Path, format: str, what: str, instead: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors` wrote; no pickle is ever loaded.

    Args:
        path: of the file.
        format: that it must have.
        what: it is to be, in words for messages: "saved PaDiM".
        instead: what to do if it can't be used: "fit and save again".

    Returns:
        what was said about the tensors, and the tensors, on the CPU and in memory of
        their own.

    Raises:
        ValueError: naming the file, if it is missing, anything else, damaged, or of a
            newer format.

    Source: this book. Departures: none.
    Test: test_storage.py::test_every_damage_is_noticed
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("paperlib", "null")
            about = json.loads(text)
            found = about.get("format") if isinstance(about, dict) else None
            mapped = {
                name: file.get_tensor(name)
                for name in (file.keys() if found == format else ())
            }
            whole = metadata.get("sha256") == digest(text, mapped)
            # Copied: what stays mapped to a file would crash the process when the file
            # is cut short. Only once it is known to be whole: a file of a few blocks
            # may say that it has any size.
            tensors = (
                {name: tensor.clone() for name, tensor in mapped.items()}
                if whole
                else {}
            )
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} can't be read as a {what} ({error}); {instead}"
        ) from error
    if found != format:
        if _version(found, format) > _version(format, format):
            raise ValueError(
                f"{path} has the format {found!r}, newer than {format!r};"
                f" update paperlib, or {instead}"
            )
        raise ValueError(f"{path} is no {what} of this version ({format}); {instead}")
    if not whole:
        raise ValueError(
            f"{path} is damaged: its contents do not match their checksum;"
            f" copy it again, or {instead}"
        )
    return about, tensors


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Give the SHA-256 of a text and of tensors on the CPU with their names, dtypes and
    shapes, in the names' order.

    Source: this book. Departures: none.
    Test: test_storage.py::test_every_damage_is_noticed
    """
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def load_state(path: str | Path) -> Any:
    """Read tensors that `torch.save` wrote; no code that a pickle may carry is run, and
    nothing packed is unpacked.

    Raises:
        Exception: of a dozen kinds, if it is no such file.

    Source: this book. Departures: none.
    Test: test_storage.py::test_what_is_packed_or_only_looks_large_is_told
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > Path(path).stat().st_size:  # torch.save packs nothing
            raise ValueError(f"it is packed, and unpacks to {size:,} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor that was read is as large as it looks: a view of one number may
    be of any shape.

    Source: this book. Departures: none.
    Test: test_storage.py::test_what_is_packed_or_only_looks_large_is_told
    """
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return (
        plain
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _version(found: Any, format: str) -> int:
    """The number at the end of a format of the same kind; 0 for anything else."""
    kind = format.rpartition(".")[0]
    number = (
        found.removeprefix(f"{kind}.")
        if isinstance(found, str) and found.startswith(f"{kind}.")
        else ""
    )
    return int(number) if number.isdecimal() and len(number) < 10 else 0


CHECKPOINT_FORMAT = "paperlib.checkpoint.1"


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Write model, optimizers, recipe and progress: killed at any moment, the old file
    or the new one is there, whole.

    Args:
        path: of the file.
        model: whose state dict is kept.
        optimizers: whose moments are kept; their learning rates follow from the step.
        recipe: what must be equal for a run to be the same run, as JSON holds it.
        progress: how far it has come, as JSON holds it.

    Source: this book. Departures: none.
    Test: test_checkpoint.py::test_what_is_saved_comes_back
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    scalars = {}
    for k, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                kept = tensors if isinstance(value, Tensor) else scalars
                kept[f"optimizer.{k}.{index}.{name}"] = value
    write_tensors(
        path,
        tensors,
        {"recipe": recipe, "progress": progress, "scalars": scalars},
        CHECKPOINT_FORMAT,
    )


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
        columns: of the progress's `history`, a list of rows: a step or epoch, then
            numbers or None. None here: not looked at.
        optional: names of `recipe` that are not compared if the file lacks them, for
            what earlier versions did not store.

    Returns:
        the progress that was saved.

    Raises:
        ValueError: naming the file, if it is damaged, no checkpoint, of another recipe,
            model or optimizer.

    Source: this book. Departures: none.
    Test: test_checkpoint.py::test_what_is_saved_comes_back
    """
    about, tensors = read_tensors(
        path, CHECKPOINT_FORMAT, "checkpoint", "delete it to start over"
    )
    if not all(
        isinstance(about.get(name), dict) for name in ("recipe", "progress", "scalars")
    ):
        raise ValueError(
            f"{path} does not fit together: recipe, progress or scalars are missing;"
            " delete it"
        )
    if columns is not None and not _is_history(
        about["progress"].get("history"), columns
    ):
        raise ValueError(
            f"{path} does not fit together:"
            f" its history is missing or no table of {columns} columns; delete it"
        )
    recipe = json.loads(json.dumps(recipe))
    for name in optional:
        if name not in about["recipe"]:
            recipe.pop(name, None)
    names = dict.fromkeys([*recipe, *about["recipe"]])
    changed = [name for name in names if recipe.get(name) != about["recipe"].get(name)]
    if changed:
        was = ", ".join(
            f"{name}={about['recipe'].get(name)!r} (now {recipe.get(name)!r})"
            for name in changed
        )
        raise ValueError(
            f"{path} is of another run: {was}."
            " Run with what it was made with, or delete it to start over"
        )
    own = {
        f"model.{name}": (tensor.shape, tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    if {
        name: (t.shape, t.dtype)
        for name, t in tensors.items()
        if name.startswith("model.")
    } != own:
        raise ValueError(
            f"{path} is the checkpoint of another model; give another name or delete it"
        )
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in [*tensors.items(), *about["scalars"].items()]:
        if name.startswith("optimizer."):
            _, k, index, key = (*name.split(".", 3), "", "", "")[:4]
            known = k.isdecimal() and index.isdecimal() and int(k) < len(optimizers)
            groups = optimizers[int(k)].param_groups if known else []
            parameters = [
                parameter for group in groups for parameter in group["params"]
            ]
            fits = (
                known
                and int(index) < len(parameters)
                and (
                    not isinstance(value, Tensor)
                    or value.ndim == 0
                    or value.shape == parameters[int(index)].shape
                )
            )
            if not fits:
                raise ValueError(
                    f"{path} is the checkpoint of another optimizer;"
                    " give another name or delete it"
                )
            states[int(k)].setdefault(int(index), {})[key] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        if len({frozenset(own) for own in state.values()}) > 1:
            raise ValueError(
                f"{path} does not fit together:"
                " a part of an optimizer's state is missing; delete it"
            )
        try:
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        except KeyError as error:
            raise ValueError(
                f"{path} does not fit together: no {error} of an optimizer; delete it"
            ) from error
    model.load_state_dict(
        {
            name.removeprefix("model."): t
            for name, t in tensors.items()
            if name.startswith("model.")
        }
    )
    return about["progress"]


def _is_history(rows: Any, columns: int) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == columns
        and type(row[0]) is int
        and all(value is None or type(value) in (int, float) for value in row)
        for row in rows
    )
