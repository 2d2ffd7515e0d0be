"""Tensors and what is known about them in one safetensors file: written whole or not at all, read only if intact."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], format: str) -> None:
    """Write tensors with a checksum: killed at any moment, the old file or the new one is there, whole.

    Args:
        path: of the file.
        tensors: by name; of any device, and they may share memory.
        about: what else to keep, as JSON holds it.
        format: what the file is, and its version: "paperlib.padim.1".

    Source: this book. Departures: none. Test: test_tensor_file.py::test_what_is_written_comes_back
    """
    path, plain, storages = Path(path), {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)
    text = json.dumps({**about, "format": format})
    # One fixed name: what a killed run leaves there, the next one overwrites.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(plain, temporary, metadata={"paperlib": text, "sha256": digest(text, plain)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path, format: str, what: str, instead: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors` wrote; no pickle is ever loaded.

    Args:
        path: of the file.
        format: that it must have.
        what: it is to be, in words for messages: "saved PaDiM".
        instead: what to do if it can't be used: "fit and save again".

    Returns:
        what was said about the tensors, and the tensors, on the CPU and in memory of their own.

    Raises:
        ValueError: naming the file, if it is missing, anything else, damaged, or of a newer format.

    Source: this book. Departures: none. Test: test_tensor_file.py::test_every_damage_is_noticed
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("paperlib", "null")
            about = json.loads(text)
            found = about.get("format") if isinstance(about, dict) else None
            # Copied: what stays mapped to a file would crash the process when the file is cut short.
            names = file.keys() if found == format else ()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as a {what} ({error}); {instead}") from error
    if found != format:
        if _version(found, format) > _version(format, format):
            raise ValueError(f"{path} has the format {found!r}, newer than {format!r}; update paperlib, or {instead}")
        raise ValueError(f"{path} is no {what} of this version ({format}); {instead}")
    if metadata.get("sha256") != digest(text, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match their checksum; copy it again, or {instead}")
    return about, tensors


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Give the SHA-256 of a text and of tensors on the CPU with their names, dtypes and shapes, in the names' order.

    Source: this book. Departures: none. Test: test_tensor_file.py::test_every_damage_is_noticed
    """
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(uint8).numpy())
    return found.hexdigest()


def _version(found: Any, format: str) -> int:
    """The number at the end of a format of the same kind; 0 for anything else."""
    kind = format.rpartition(".")[0]
    number = found.removeprefix(f"{kind}.") if isinstance(found, str) and found.startswith(f"{kind}.") else ""
    return int(number) if number.isdecimal() and len(number) < 10 else 0
