"""Train an image classifier: cosine learning rate, one checkpoint per epoch."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm.auto import tqdm

from paperlib.inference import evaluating
from paperlib.storage import load_checkpoint, save_checkpoint

Data = tuple[Float[Tensor, "n c h w"], Int[Tensor, " m"]] | Dataset


class Epoch(NamedTuple):
    """The result of an epoch: its number from 1, mean loss, and training accuracy."""

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
    progress: bool = False,
) -> list[Epoch]:
    """Train in place with cross-entropy and a cosine learning rate down to zero.

    All randomness of an epoch (order, flips, dropout) depends only on `seed` and the
    epoch's number, so equal seeds result in equal runs, and a run resumed from its
    checkpoint ends like one that was never interrupted. The optimizer's learning rates
    are restored at the end, also after an exception.

    Args:
        model: maps a batch of images to logits (N, classes); afterwards in eval mode.
        data: (images, labels) as the model expects them, or a map-style dataset of such
            pairs, such as torchvision's `ImageFolder`. Batches are moved to the model's
            device.
        optimizer: built over the model's parameters, `parameter_groups` included.
        epochs: passes over the images; a last batch of a single image is dropped
            because of batch norm.
        batch_size: images per step.
        mirror: flip each batch's images left-right and up-down, each with probability
            one half.
        seed: of the order, the flips and the model's own randomness.
        workers: processes that read a dataset; tensors need none.
        checkpoint: a file that is written after each epoch, and from which the run
            resumes if it exists.
        on_epoch: called with the record of each epoch.
        progress: whether to show a progress bar.

    Returns:
        one record per epoch, including those before a resumption; the accuracy is
        measured during training.

    Raises:
        ValueError: if there are fewer than two images, images and labels disagree in
            number, `epochs` or `batch_size` is below 1, or the checkpoint is corrupt or
            of another model, optimizer, learning rate or number of epochs.
    """
    count = _count(data)
    if epochs < 1 or batch_size < 1:
        raise ValueError(
            f"epochs={epochs}, batch_size={batch_size}; expected at least 1 of each"
        )
    device = next(model.parameters()).device
    rates = [group["lr"] for group in optimizer.param_groups]
    recipe = {"epochs": epochs, "learning_rates": [float(rate) for rate in rates]}
    history: list[Epoch] = []
    if checkpoint and Path(checkpoint).exists():
        stored = load_checkpoint(
            checkpoint,
            model,
            [optimizer],
            recipe,
            len(Epoch._fields),
            optional=("learning_rates",),  # earlier versions did not store them
        )
        history = [Epoch(*row) for row in stored["history"]]
    batches, axes = math.ceil(count / batch_size), (2, 3) if mirror else ()
    first = len(history) + 1
    bar = tqdm(
        range(first, epochs + 1),
        "epochs",
        epochs,
        initial=first - 1,
        disable=not progress,
    )
    try:
        for number in bar:
            epoch_seed = derive_seed(seed, number)
            generator = torch.Generator().manual_seed(epoch_seed)
            order = torch.randperm(count, generator=generator)
            draw = functools.partial(torch.rand, (), generator=generator)
            loader = _batches(data, order, batch_size, workers, epoch_seed)
            model.train()
            totals, n_images = torch.zeros(2, device=device), 0
            with seeded(epoch_seed, device):
                for step, (images, labels) in enumerate(loader):
                    if len(images) == 1 < batch_size:
                        continue
                    flips = [axis for axis in axes if draw() < 0.5]
                    images = images.to(device, non_blocking=True).flip(flips)
                    labels = labels.to(device, non_blocking=True)
                    done = ((number - 1) * batches + step) / (epochs * batches)
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
                    totals += _step(model, optimizer, images, labels)
                    n_images += len(images)
            loss, n_correct = totals.tolist()  # per epoch: reading waits for a GPU
            history.append(Epoch(number, loss / n_images, n_correct / n_images))
            if checkpoint:
                state = {"history": history}
                save_checkpoint(checkpoint, model, [optimizer], recipe, state)
            bar.set_postfix(loss=history[-1].loss)
            if on_epoch is not None:
                on_epoch(history[-1])
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        model.eval()
    return history


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    """Run one step; return the summed loss and the number correct, on the device."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return torch.stack(
        [loss.detach() * len(images), (logits.detach().argmax(1) == labels).sum()]
    )


def _count(data: Data) -> int:
    lengths = [len(part) for part in data] if isinstance(data, tuple) else [len(data)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{lengths[0]} images and {lengths[1]} labels; expected the same number"
        )
    if lengths[0] < 2:
        raise ValueError(f"{lengths[0]} images; expected at least 2 to train on")
    return lengths[0]


def _batches(
    data: Data, order: Tensor, batch_size: int, workers: int, seed: int
) -> DataLoader:
    parts = order.split(batch_size)
    # Without a generator, the loader would draw from the caller's.
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, tuple):
        # The images of a batch are selected by one indexing operation.
        dataset = TensorDataset(*data)
        return DataLoader(dataset, None, sampler=parts, generator=generator)
    return DataLoader(
        data,
        batch_sampler=[part.tolist() for part in parts],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )


def derive_seed(seed: int, number: int) -> int:
    """Return the seed of one step or epoch: a run can be resumed at any of them."""
    return (seed * 1_000_003 + number) % 2**63


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed the default generators of the CPU and of `device`; restore both afterwards.

    `torch.manual_seed` is no substitute: it also seeds all other devices.
    """
    device = torch.device(device)
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.default_generator.manual_seed(seed)
        for accelerator in devices:
            state = torch.Generator(accelerator).manual_seed(seed).get_state()
            torch.get_device_module(accelerator).set_rng_state(state, accelerator)
        yield


@torch.no_grad()
def predict(
    model: nn.Module, images: Float[Tensor, "n c h w"], batch_size: int = 64
) -> Float[Tensor, "n classes"]:
    """Return the logits of many images, in batches, with the model in eval mode.

    Args:
        model: maps a batch of images to logits; its mode is restored.
        images: on the model's device.
        batch_size: images per step; it bounds the memory and does not change the result
            beyond rounding.

    Raises:
        ValueError: if there is no image or `batch_size` is below 1.
    """
    if len(images) == 0 or batch_size < 1:
        raise ValueError(
            f"{len(images)} images in batches of {batch_size};"
            " expected at least 1 of each"
        )
    with evaluating(model):
        return torch.cat([model(batch) for batch in images.split(batch_size)])
