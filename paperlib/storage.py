"""Write files atomically: tensors, training states, texts; load only intact files."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paperlib.validation import UnusableFile, as_path

SAMPLED = 4096  # elements of a tensor that identify it


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary path, which replaces `path` if no error occurs.

    A reader sees the previous file or the complete new one, never a part of it.

    Args:
        path: of the file; its folder must exist.
    """
    path = as_path(path)
    # A folder, because safetensors writes to a temporary name of its own choice. Its
    # name is fixed, so that the next run removes what a killed run left.
    folder = path.with_name(f".{path.name}.tmp")
    temporary = folder / path.name
    try:
        folder.unlink() if folder.is_file() else shutil.rmtree(folder, True)
        folder.mkdir()
        yield temporary
        # The permissions of the user's umask; safetensors sets them to the owner only.
        temporary.chmod(folder.stat().st_mode & 0o666)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UnusableFile(
            f"{path} can't be written ({error}); check its folder and permissions"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_checkpoint(path: str | Path | None) -> bool:
    """Return whether a checkpoint exists; raise if none can be written there."""
    if path is None:
        return False
    path = as_path(path)
    if not os.path.isdir(path.parent) or len(path.name) > 200 or os.path.isdir(path):
        raise UnusableFile(f"{path} can't be written; expected a file in a folder")
    return os.path.exists(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def open_csv(path: Path, mode: str = "r") -> TextIO:
    """Open a CSV file. A file name in it that is no valid text is kept, as bytes."""
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


def csv_writer(file: TextIO, columns: Iterable[str]) -> csv.DictWriter:
    """Return a writer of the columns of rows; None is an empty cell."""
    return csv.DictWriter(file, [*columns], extrasaction="ignore", lineterminator="\n")


def write_csv(
    path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Write the columns of rows as a CSV file, atomically."""
    with atomic_path(path) as temporary, open_csv(temporary, "w") as file:
        writer = csv_writer(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_csv(
    path: Path,
    columns: Collection[str],
    parse: Callable[[dict[str, str]], Any],
    what: str,
    optional: Mapping[str, str] = {},
    *,
    strict: bool = True,
) -> list[Any]:
    """Read the rows of a CSV file; return [] if there is no file.

    Args:
        path: of the file.
        columns: that the file has.
        parse: converts a row, a dictionary of texts by column.
        what: the rows are, for errors: "results".
        optional: columns that the file may lack, and their texts in every row.
        strict: False accepts a last row that a killed run cut off within quotes.

    Raises:
        UnusableFile: naming the file, if it is another kind of file.
    """
    if not path.exists():
        return []
    try:
        with open_csv(path) as file:
            table = csv.DictReader(file, strict=strict)
            names = table.fieldnames or ()
            is_complete = {*columns} - {*optional} <= {*names} <= {*columns}
            if not is_complete or len({*names}) < len(names):
                raise ValueError(f"its columns are {table.fieldnames}")
            rows = [*table]
            if any(None in row for row in rows):
                raise ValueError("a row has more values than the table has columns")
            return [parse({**optional, **row}) for row in rows]
    except (ValueError, TypeError, KeyError, OSError, csv.Error) as error:
        raise UnusableFile(
            f"{path} is not a table of {what} ({error});"
            " move it away, or pass another folder"
        ) from error


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
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # safetensors rejects shared memory: one tensor per storage is written as it is.
    owners = {t.untyped_storage().data_ptr(): name for name, t in on_cpu.items()}
    prepared = {
        name: t if owners[t.untyped_storage().data_ptr()] == name else t.clone()
        for name, t in on_cpu.items()
    }
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
            or of another format.
    """
    path = as_path(path)
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
        if not os.path.isfile(path):
            raise UnusableFile(
                f"{path} is no file (looked for it from {Path.cwd()});"
                f" expected a {what}; check the path"
            ) from error
        raise UnusableFile(
            f"{path} can't be read as a {what} ({error}); {instead}"
        ) from error
    if file_format != format:
        raise UnusableFile(
            f"{path} is not a {what} of this version: its format is {file_format!r},"
            f" not {format!r}; {instead}, or update paperlib if the file is newer"
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


def file_version(path: Path) -> tuple[str | int, ...]:
    """Return what identifies the content of a file: its path, size and time."""
    try:
        stat = path.stat()
    except OSError:
        return (ascii(path),)
    return ascii(path.resolve()), stat.st_size, stat.st_mtime_ns


def load_state(path: str | Path) -> Any:
    """Read tensors written by `torch.save`, without executing or decompressing.

    Raises:
        Exception: of many kinds, for any other file.
    """
    path = as_path(path)  # `open` would take an integer for a file descriptor
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > path.stat().st_size:  # torch.save does not compress
            raise ValueError(f"it is compressed, and decompresses to {size:,} bytes")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_dense(tensor: Tensor) -> bool:
    """Return whether the storage holds all elements of a tensor (no expanded view)."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


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
    values = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    values |= {
        f"optimizer.{k}.{index}.{name}": value
        for k, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    tensors = {
        name: value for name, value in values.items() if isinstance(value, Tensor)
    }
    scalars = {name: value for name, value in values.items() if name not in tensors}
    about = {"recipe": recipe, "progress": progress, "scalars": scalars}
    write_tensors(path, tensors, about, CHECKPOINT_FORMAT)


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
    _check_contents(path, about, columns)
    _check_recipe(path, about["recipe"], recipe, optional)
    weights = _select(tensors, "model.")
    if _signature(weights) != _signature(model.state_dict()):
        raise UnusableFile(
            f"{path} is the checkpoint of another model; pass another name or delete it"
        )
    values = _select({**tensors, **about["scalars"]}, "optimizer.")
    _load_optimizers(path, optimizers, values)
    model.load_state_dict(weights)
    return about["progress"]


def _check_contents(
    path: str | Path, about: Mapping[str, Any], columns: int | None
) -> None:
    parts = [about.get(name) for name in ("recipe", "progress", "scalars")]
    if not (
        all(isinstance(part, dict) for part in parts)
        and (columns is None or _is_history(about["progress"].get("history"), columns))
    ):
        raise UnusableFile(
            f"{path} is inconsistent: expected a recipe, scalars and a progress"
            f" (a history of {columns or 'any'} columns); delete it"
        )


def _check_recipe(
    path: str | Path,
    stored: Mapping[str, Any],
    recipe: Mapping[str, Any],
    optional: Collection[str],
) -> None:
    recipe = json.loads(json.dumps(recipe))
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


def _select(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values whose names have a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def _signature(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _load_optimizers(
    path: str | Path,
    optimizers: Sequence[torch.optim.Optimizer],
    values: Mapping[str, Any],
) -> None:
    """Load the states of all optimizers, or change none of them.

    Args:
        path: of the file, for errors.
        optimizers: of the run.
        values: by `<number of the optimizer>.<number of the parameter>.<name>`.
    """
    states = [
        _fitting_state(optimizer, _select(values, f"{k}."))
        for k, optimizer in enumerate(optimizers)
    ]
    n_fitting = sum(len(part) for state in states for part in state.values())
    # In an optimizer, all parameters with a state have the same values.
    are_complete = all(len(set(map(frozenset, x.values()))) <= 1 for x in states)
    if n_fitting < len(values) or not are_complete:
        raise UnusableFile(
            f"{path} is the checkpoint of another optimizer, or a part of its state is"
            " missing; pass another name or delete it"
        )
    previous = [optimizer.state_dict() for optimizer in optimizers]
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except KeyError as error:
        for optimizer, state in zip(optimizers, previous, strict=True):
            optimizer.load_state_dict(state)
        raise UnusableFile(
            f"{path} is the checkpoint of another optimizer: it has no {error};"
            " pass another name or delete it"
        ) from error


def _fitting_state(
    optimizer: torch.optim.Optimizer, values: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """Return the values of each parameter: numbers, and tensors of its shape."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: value
            for name, value in _select(values, f"{index}.").items()
            if not isinstance(value, Tensor) or value.shape in ((), parameter.shape)
        }
        for index, parameter in enumerate(parameters)
    }
    return {index: part for index, part in state.items() if part}


def _is_history(rows: Any, columns: int) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == columns
        and type(row[0]) is int
        and all(value is None or type(value) in (int, float) for value in row)
        for row in rows
    )
