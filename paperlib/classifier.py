"""Train an image classifier, from tensors or a folder: cross-entropy, a cosine learning rate, a checkpoint an epoch."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CHECKPOINT_FORMAT = "paperlib.classifier.1"
Data = tuple[Float[Tensor, "n c h w"], Int[Tensor, " m"]] | Dataset


class Epoch(NamedTuple):
    """What one pass over the training images gave: its number from 1, mean loss, and share of right answers."""

    number: int
    loss: float
    accuracy: float


def train_classifier(
    model: nn.Module,
    data: Data,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int = 32,
    mirror: bool = True,
    seed: int = 0,
    workers: int = 0,
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train in place with cross-entropy; the learning rate falls from the optimizer's to zero along a cosine.

    All randomness of an epoch (order, flips, dropout) follows from `seed` and the epoch's number, so equal seeds give
    equal runs whatever ran before, and a run resumed from its checkpoint ends like one that was never interrupted.

    Args:
        model: maps a batch of images to logits (N, classes); left in eval mode.
        data: (images, labels) as the model takes them, or a map-style dataset of such pairs, such as torchvision's
            `ImageFolder`. Batches are moved to the model's device.
        optimizer: built over the model's parameters, `parameter_groups` included.
        epochs: passes over the images; a last batch of a single image is dropped, batch norm can't use it.
        batch_size: images a step.
        mirror: flip each batch's images left-right and up-down, each with probability one half.
        seed: of the order, the flips and the model's own randomness.
        workers: processes that read a dataset; tensors need none.
        checkpoint: a file that is written after each epoch, and continued from where it exists.
        on_epoch: called after each epoch, to show progress.

    Returns:
        one record an epoch, those before a resumption included; the accuracy is measured while training.

    Raises:
        ValueError: if images and labels disagree in number, `epochs` or `batch_size` is below 1, or the checkpoint is
            damaged or of another model, optimizer or number of epochs.

    Source: this book; the optimizer and decay of MobileNet, arXiv:1704.04861v1, Sec. 3.2, are the caller's choice.
    Departures: none. Test: test_classifier.py::test_learns_which_half_is_bright
    """
    count = _count(data)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs={epochs}, batch_size={batch_size}; expected at least 1 of each")
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    history = _resume(Path(checkpoint), model, optimizer, epochs) if checkpoint and Path(checkpoint).exists() else []
    batches = math.ceil(count / batch_size)
    for number in range(len(history) + 1, epochs + 1):
        generator = torch.Generator().manual_seed(_epoch_seed(seed, number))
        order = torch.randperm(count, generator=generator)
        model.train()
        totals, seen = torch.zeros(2, device=device), 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_epoch_seed(seed, number))
            for step, (images, labels) in enumerate(_batches(data, order, batch_size, workers)):
                if len(images) == 1 < batch_size:
                    continue
                flips = [axis for axis in (2, 3) if mirror and torch.rand((), generator=generator) < 0.5]
                images, labels = images.to(device, non_blocking=True).flip(flips), labels.to(device, non_blocking=True)
                done = ((number - 1) * batches + step) / (epochs * batches)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
                totals += _step(model, optimizer, images, labels)
                seen += len(images)
        loss, right = totals.tolist()  # read once an epoch: reading waits for a GPU
        history.append(Epoch(number, loss / seen, right / seen))
        if checkpoint:
            _save(Path(checkpoint), model, optimizer, history, epochs)
        if on_epoch is not None:
            on_epoch(history[-1])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    model.eval()
    return history


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """Take one step; return the summed loss and the number of right answers, on the device."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return torch.stack([loss.detach() * len(images), (logits.detach().argmax(1) == labels).sum()])


def _count(data: Data) -> int:
    if isinstance(data, tuple):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels; expected the same number")
        data = images
    if len(data) < 2:
        raise ValueError(f"{len(data)} images; expected at least 2 to train on")
    return len(data)


def _batches(data: Data, order: Tensor, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    parts = order.split(batch_size)
    if isinstance(data, tuple):
        images, labels = data
        return ((images[i], labels[i]) for i in (part.to(images.device) for part in parts))
    pinned = torch.cuda.is_available()
    return iter(DataLoader(data, batch_sampler=[p.tolist() for p in parts], num_workers=workers, pin_memory=pinned))


def _epoch_seed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Epoch], epochs: int) -> None:
    """Write model, optimizer and history as one safetensors file, whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    scalars = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif value is not None:
                scalars[f"{index}.{name}"] = value
    about = {"format": CHECKPOINT_FORMAT, "epochs": epochs, "history": history, "scalars": scalars}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, temporary,
                  metadata={"paperlib": json.dumps(about)})  # fmt: skip
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> list[Epoch]:
    """Load what `_save` wrote; nothing is changed unless all of it fits."""
    about, tensors = _read(path)
    if about["epochs"] != epochs:
        raise ValueError(f"{path} is of a run of {about['epochs']} epochs; expected {epochs}. Delete it to start over")
    own = model.state_dict()
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in own.items()}:
        raise ValueError(f"{path} is the checkpoint of another model; give it another name or delete it")
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    for name, value in about["scalars"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes_fit = all(
        not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameters[index].shape
        for index, values in state.items() if index < len(parameters) for value in values.values()
    )  # fmt: skip
    if not shapes_fit or any(index >= len(parameters) for index in state):
        raise ValueError(f"{path} is the checkpoint of another optimizer; give it another name or delete it")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    model.load_state_dict(saved)
    return [Epoch(*row) for row in about["history"]]


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("paperlib", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a checkpoint ({error}); delete it to start over") from error
    if not isinstance(about, dict) or about.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version ({CHECKPOINT_FORMAT}); delete it to start over")
    return about, tensors


@torch.no_grad()
def predict(model: nn.Module, images: Float[Tensor, "n c h w"], batch_size: int = 64) -> Float[Tensor, "n classes"]:
    """Return the logits of many images, batch by batch, with the model in eval mode; its mode is put back.

    Args:
        model: maps a batch of images to logits.
        images: on the model's device.
        batch_size: images a step; it bounds the memory and does not change the result beyond rounding.

    Raises:
        ValueError: if there is no image or `batch_size` is below 1.

    Source: this book. Departures: none. Test: test_classifier.py::test_predict_equals_one_batch_and_keeps_the_mode
    """
    if len(images) == 0 or batch_size < 1:
        raise ValueError(f"{len(images)} images in batches of {batch_size}; expected at least 1 of each")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return torch.cat([model(batch) for batch in images.split(batch_size)])
    finally:
        for module, mode in modes:
            module.training = mode
