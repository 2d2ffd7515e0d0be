"""Train an image classifier: cosine learning rate, one checkpoint per epoch.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from paperlib.training import predict, train_classifier
    >>> _ = torch.manual_seed(0)
    >>> labels = torch.arange(20) % 2
    >>> images = torch.rand(20, 3, 8, 8) - labels.view(-1, 1, 1, 1)  # dark or bright
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> history = train_classifier(model, (images, labels), optimizer, epochs=9)
    >>> predict(model, images).argmax(1).eq(labels).all()
    tensor(True)
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm.auto import tqdm

from paperlib.inference import evaluating, run_model
from paperlib.storage import find_checkpoint, load_checkpoint, save_checkpoint
from paperlib.validation import check_integers, check_module, check_tensor, check_values

Data = tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]] | Dataset


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

    Example:
        >>> import torch
        >>> from paperlib.mobilenet import MobileNetV1
        >>> from paperlib.training import train_classifier
        >>> model = MobileNetV1(0.25, num_classes=2)
        >>> optimizer = torch.optim.RMSprop(model.parameters(), lr=0.001)
        >>> data = torch.rand(8, 3, 32, 32), torch.arange(8) % 2
        >>> history = train_classifier(model, data, optimizer, epochs=2, batch_size=4)
        >>> [epoch.number for epoch in history]
        [1, 2]
    """
    check_module(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer={optimizer!r:.80}; expected a torch.optim one")
    dataset = _as_dataset(data, mirror)
    check_integers(epochs=epochs, batch_size=batch_size)
    check_integers(0, seed=seed, workers=workers)
    device = next((p.device for p in model.parameters() if p.requires_grad), None)
    if device is None or device.type == "meta":
        raise ValueError(
            f"a {type(model).__name__} without parameters to train;"
            " expected some with requires_grad, on a device other than meta"
        )
    rates = [group["lr"] for group in optimizer.param_groups]
    recipe = {"epochs": epochs, "learning_rates": [float(rate) for rate in rates]}
    history = _load_history(checkpoint, model, optimizer, recipe)
    numbers = range(len(history) + 1, epochs + 1)
    bar = tqdm(numbers, "epochs", epochs, initial=len(history), disable=not progress)
    n_batches = math.ceil(len(dataset) / batch_size)
    try:
        for number in bar:
            epoch_seed = derive_seed(seed, number)
            batches = _load_batches(
                dataset, batch_size, mirror, workers, epoch_seed, device
            )
            steps = range((number - 1) * n_batches, number * n_batches)
            schedule = [step / (epochs * n_batches) for step in steps]
            with seeded(epoch_seed, device):
                result = _train_epoch(model, optimizer, batches, rates, schedule)
            history.append(Epoch(number, *result))
            if checkpoint is not None:
                save_checkpoint(
                    checkpoint, model, [optimizer], recipe, {"history": history}
                )
            bar.set_postfix(loss=history[-1].loss)
            if on_epoch is not None:
                on_epoch(history[-1])
    finally:
        _set_cosine_rates(optimizer, rates, 0)
        model.eval()
    return history


def _as_dataset(data: Data, mirror: bool) -> Dataset:
    parts = data if isinstance(data, tuple) and len(data) == 2 else (data, data)
    if isinstance(data, tuple):
        axes = "N, C, H, W" if mirror else ""
        check_tensor(parts[0], "images", axes, is_float=False)
        check_tensor(parts[1], "labels", "N", is_float=False)
        for part, name in zip(parts, ("images", "labels"), strict=True):
            check_values(part, name)
            check_integers(**{f"axes of {name}": part.ndim})
    elif not isinstance(data, Dataset):
        raise ValueError(
            f"data of type {type(data).__name__}; expected (images, labels), two"
            " tensors, or a torch.utils.data.Dataset"
        )
    n_images, n_labels = map(len, parts)
    if n_images != n_labels or n_images < 2:
        raise ValueError(
            f"{n_images} images and {n_labels} labels;"
            " expected the same number, and at least 2 to train on"
        )
    return TensorDataset(*data) if isinstance(data, tuple) else data


def _load_history(
    checkpoint: str | Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
) -> list[Epoch]:
    """Restore the run from its checkpoint if there is one; return its epochs."""
    if not find_checkpoint(checkpoint):
        return []
    stored = load_checkpoint(
        checkpoint,
        model,
        [optimizer],
        recipe,
        len(Epoch._fields),
        optional=["learning_rates"],  # earlier versions did not store them
    )
    return [Epoch(*row) for row in stored["history"]]


def _load_batches(
    dataset: Dataset,
    batch_size: int,
    mirror: bool,
    workers: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an epoch on the device, in random order, randomly flipped.

    A last batch of a single image is dropped, unless all are of this size.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).split(batch_size)
    loader = DataLoader(
        dataset,
        batch_sampler=[x.tolist() for x in order if len(x) > 1 or batch_size == 1],
        num_workers=workers,
        pin_memory=workers > 0 and device.type == "cuda",
        # Without a generator, the loader would draw from the caller's.
        generator=torch.Generator().manual_seed(seed),
    )
    axes = (2, 3) if mirror else ()
    for images, labels in loader:
        flips = [axis for axis in axes if torch.rand((), generator=generator) < 0.5]
        images = images.to(device, non_blocking=True)
        yield images.flip(flips), labels.to(device, non_blocking=True)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    schedule: Sequence[float],
) -> tuple[float, float]:
    """Run one step per batch; return the mean loss and the accuracy.

    Args:
        model, optimizer, batches: as they are.
        rates: the learning rates of the start of the run.
        schedule: the completed share of the run at each batch.
    """
    model.train()
    totals, n_images = 0, 0
    for done, (images, labels) in zip(schedule, batches, strict=False):
        _set_cosine_rates(optimizer, rates, done)
        totals += _step(model, optimizer, images, labels)
        n_images += len(images)
    loss, n_correct = totals.tolist()  # per epoch: reading waits for a GPU
    return loss / n_images, n_correct / n_images


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    """Run one step; return the summed loss and the number correct, on the device."""
    logits = run_model(model, images, images)
    loss = _cross_entropy(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return torch.stack(
        [loss.detach() * len(images), (logits.detach().argmax(1) == labels).sum()]
    )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    try:
        return F.cross_entropy(logits, labels)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model's output does not fit the labels ({error}); expected logits"
            " (N, classes) and integer labels from 0 to classes - 1"
        ) from error


def _set_cosine_rates(
    optimizer: torch.optim.Optimizer, rates: Sequence[float], done: float
) -> None:
    """Set learning rates that fall from `rates` to zero while `done` grows to 1."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2


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

    Example:
        >>> import torch
        >>> from paperlib.mobilenet import MobileNetV1
        >>> from paperlib.training import predict
        >>> predict(MobileNetV1(0.25, num_classes=2), torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 2])
    """
    check_tensor(images, "images", is_float=False)
    check_integers(axes=images.ndim, images=images.numel(), batch_size=batch_size)
    with evaluating(model):
        parts = images.split(batch_size)
        return torch.cat([run_model(model, part, part) for part in parts])
