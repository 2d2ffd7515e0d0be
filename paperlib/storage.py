"""Write files atomically: tensors, training states, texts; load only intact files."""

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paperlib.validation import UnusableFile

SAMPLED = 4096  # elements of a tensor that identify it


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary path, which replaces `path` if no error occurs.

    A reader sees the previous file or the complete new one, never a part of it.

    Args:
        path: of the file; its folder must exist.
    """
    path = Path(path)
    # A folder, because safetensors writes to a temporary name of its own choice. Its
    # name is fixed, so that the next run removes what a killed run left.
    folder = path.with_name(f".{path.name}.tmp")
    folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    temporary = folder / path.name
    try:
        yield temporary
        # The permissions of the user's umask; safetensors sets them to the owner only.
        temporary.chmod(folder.stat().st_mode & 0o666)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    format: str,
) -> None:
    """Write tensors with a checksum as a safetensors file, atomically.

    Args:
        path: of the file.
        tensors: by name; on any device; they may share memory.
        about: metadata that can be written as JSON.
        format: kind and version of the file: "paperlib.padim.1".
    """
    prepared, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors rejects shared memory.
        prepared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    text = json.dumps({**about, "format": format})
    metadata = {"paperlib": text, "sha256": checksum(text, prepared)}
    with atomic_path(path) as temporary:
        save_file(prepared, temporary, metadata=metadata)


def read_tensors(
    path: str | Path, format: str, what: str, instead: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors` wrote; no pickle is ever loaded.

    Args:
        path: of the file.
        format: the expected format.
        what: kind of file, for errors: "saved PaDiM".
        instead: advice for errors: "fit and save again".

    Returns:
        the metadata, and the tensors, on the CPU and in their own memory.

    Raises:
        UnusableFile: naming the file, if it is missing, another kind of file, corrupt,
            or of a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("paperlib", "null")
            about = json.loads(text)
            file_format = about.get("format") if isinstance(about, dict) else None
            mapped = {
                name: file.get_tensor(name)
                for name in (file.keys() if file_format == format else ())
            }
            is_intact = metadata.get("sha256") == checksum(text, mapped)
            # Copy, because reading memory mapped to a truncated file would crash the
            # process. Copy only intact files, because a small sparse file may claim any
            # size.
            tensors = {name: mapped[name].clone() for name in mapped if is_intact}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UnusableFile(
            f"{path} can't be read as a {what} ({error}); {instead}"
        ) from error
    if file_format != format:
        if _version(file_format, format) > _version(format, format):
            raise UnusableFile(
                f"{path} has the format {file_format!r}, newer than {format!r};"
                f" update paperlib, or {instead}"
            )
        raise UnusableFile(
            f"{path} is not a {what} of this version ({format}); {instead}"
        )
    if not is_intact:
        raise UnusableFile(
            f"{path} is corrupt: its contents do not match their checksum;"
            f" copy it again, or {instead}"
        )
    return about, tensors


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a text and of tensors, sorted by name."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def fingerprint(*parts: Tensor | str | float | bool) -> str:
    """Return 8 hexadecimal digits that identify data and settings.

    Args:
        parts: of a tensor, the shape, the dtype and 4,096 elements count.
    """
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().tolist()
            part = f"{tuple(part.shape)} {part.dtype} {sample}"
        sha.update(f"{part}\0".encode())
    return sha.hexdigest()[:8]


def load_state(path: str | Path) -> Any:
    """Read tensors written by `torch.save`, without executing or decompressing.

    Raises:
        Exception: of many kinds, for any other file.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > Path(path).stat().st_size:  # torch.save does not compress
            raise ValueError(f"it is compressed, and decompresses to {size:,} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the storage holds all elements of a tensor (no expanded view)."""
    is_strided_cpu = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return (
        is_strided_cpu
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _version(file_format: Any, format: str) -> int:
    """Return the version number of a format of the same kind, else 0."""
    kind = format.rpartition(".")[0]
    number = (
        file_format.removeprefix(f"{kind}.")
        if isinstance(file_format, str) and file_format.startswith(f"{kind}.")
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
    """Write the state of a training as a file, atomically.

    Args:
        path: of the file.
        model: whose state dict is stored.
        optimizers: whose moments are stored; their learning rates depend on the step.
        recipe: settings that must be equal to resume the run; can be written as JSON.
        progress: state of the run; can be written as JSON.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    scalars = {}
    for k, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                target = tensors if isinstance(value, Tensor) else scalars
                target[f"optimizer.{k}.{index}.{name}"] = value
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

    Model and optimizers change only if everything fits.

    Args:
        path, model, optimizers, recipe: as for `save_checkpoint`.
        columns: of the progress's `history`, a list of rows: a step or epoch, then
            numbers or None. If `columns` is None, the history is not checked.
        optional: names of `recipe` that are compared only if both the file and `recipe`
            have them, for what one version stores and another does not.

    Returns:
        the progress that was saved.

    Raises:
        UnusableFile: naming the file, if it is corrupt, not a checkpoint, or of another
            recipe, model or optimizer.
    """
    about, tensors = read_tensors(
        path, CHECKPOINT_FORMAT, "checkpoint", "delete it to start over"
    )
    parts = [about.get(name) for name in ("recipe", "progress", "scalars")]
    if not (
        all(isinstance(part, dict) for part in parts)
        and (columns is None or _is_history(about["progress"].get("history"), columns))
    ):
        history = "" if columns is None else f" (a history of {columns} columns)"
        raise UnusableFile(
            f"{path} is inconsistent: recipe, progress{history} or scalars"
            " are missing; delete it"
        )
    stored, recipe = about["recipe"], json.loads(json.dumps(recipe))
    differences = ", ".join(
        f"{name}={stored.get(name)!r} (now {recipe.get(name)!r})"
        for name in {**recipe, **stored}
        if recipe.get(name) != stored.get(name)
        and (name not in optional or (name in stored and name in recipe))
    )
    if differences:
        raise UnusableFile(
            f"{path} is of another run: {differences}."
            " Use the settings it was created with, or delete it to start over"
        )
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    if _signature(weights) != _signature(model.state_dict()):
        raise UnusableFile(
            f"{path} is the checkpoint of another model; pass another name or delete it"
        )
    states = _optimizer_states(path, {**tensors, **about["scalars"]}, optimizers)
    previous = [optimizer.state_dict() for optimizer in optimizers]
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except KeyError as error:
        for optimizer, state in zip(optimizers, previous, strict=True):
            optimizer.load_state_dict(state)
        raise UnusableFile(
            f"{path} is inconsistent: no {error} of an optimizer; delete it"
        ) from error
    model.load_state_dict(weights)
    return about["progress"]


def _signature(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _optimizer_states(
    path: str | Path,
    values: Mapping[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
) -> list[dict[int, dict[str, Any]]]:
    """Sort `optimizer.<k>.<index>.<name>` by optimizer and parameter.

    Raises:
        UnusableFile: if a value belongs to no parameter, or has another shape, or if
            not all parameters of an optimizer have the same values.
    """
    shapes = {
        f"optimizer.{k}.{index}": parameter.shape
        for k, optimizer in enumerate(optimizers)
        for index, parameter in enumerate(
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
        )
    }
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, value in values.items():
        if not name.startswith("optimizer."):
            continue
        owner, _, key = name.rpartition(".")
        is_moment = isinstance(value, Tensor) and value.ndim > 0
        if owner not in shapes or (is_moment and value.shape != shapes[owner]):
            raise UnusableFile(
                f"{path} is the checkpoint of another optimizer;"
                " pass another name or delete it"
            )
        _, k, index = owner.split(".")
        states[int(k)].setdefault(int(index), {})[key] = value
    if any(len(set(map(frozenset, state.values()))) > 1 for state in states):
        raise UnusableFile(
            f"{path} is inconsistent: a part of an optimizer's state is missing;"
            " delete it"
        )
    return states


def _is_history(rows: Any, columns: int) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == columns
        and type(row[0]) is int
        and all(value is None or type(value) in (int, float) for value in row)
        for row in rows
    )
