r"""Train Patch SVDD's encoders, without labels.

$$\mathcal L = \lambda\,\mathcal L_{\text{SVDD'}} + \mathcal L_{\text{SSL}}$$
summed over both patch sizes. `train` draws its pairs from the feature map of a large
crop, computed in one pass; `train_on_patches` crops and embeds each patch, as
published.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from paperlib.distributed import fail_together, process_group
from paperlib.patch_svdd.encoders import (
    BIG_PATCH,
    SMALL_PATCH,
    HierarchicalEncoder,
    initialize,
)
from paperlib.patch_svdd.images import check_range, mean_image
from paperlib.patch_svdd.losses import PositionClassifier, _svdd_term
from paperlib.patch_svdd.pairs import (
    crop_patches,
    neighbor_pairs,
    perturb,
    position_pairs,
    random_crops,
)
from paperlib.storage import fingerprint, load_checkpoint, save_checkpoint
from paperlib.training import derive_seed, seeded
from paperlib.validation import check_images

# λ of Eq. 6, in the README of the released code; the code's default is 1
SVDD_WEIGHT = 1e-3
LEARNING_RATE = 1e-4  # released code: of Adam
# released code: pairs per step, pairs per image and epoch, epochs
BATCH, REPEAT, EPOCHS = 64, 100, 300
LEARNING_RATES = {"muon": 0.02, "adam": 0.003}  # of `train`, tuned on solar cells
# L_SVDD' + L_SSL, L_SVDD' alone, L_SVDD alone
OBJECTIVES = ("patch_svdd", "neighbors", "centre")


class Record(NamedTuple):
    """Means over the steps since the previous record: the loss and its parts.

    Fields:
        step: number of steps so far.
        loss: the minimised loss.
        accuracy_big, accuracy_small: accuracy of the positions of the training pairs;
            chance is 1/8.
        svdd_big, svdd_small: mean distance between neighbours (to the centre for the
            objective `centre`).

    Quantities not measured are NaN.
    """

    step: int
    loss: float
    accuracy_big: float
    accuracy_small: float
    svdd_big: float
    svdd_small: float


class Training(NamedTuple):
    """The result of a training run, besides the encoder, which is trained in place.

    Fields:
        history: the training curves.
        big, small: the position classifiers of both patch sizes; None if the encoder
            has no such size.
        mean: (3, H, W), the mean of the training images.
    """

    history: list[Record]
    big: "PositionClassifier | None"
    small: "PositionClassifier | None"
    mean: Tensor


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the processor has instructions for it, else float32.

    Source: this book. Departures: none.
    Test: test_patch_training.py::test_bfloat16_is_chosen_where_it_is_fast
    """
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    has_bf16_instructions = getattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: False
    )
    return (
        torch.bfloat16
        if device.type == "cpu" and has_bf16_instructions()
        else torch.float32
    )


class _Run(nn.Module):
    """The modules of a run: encoder, and per patch size a classifier or a centre."""

    def __init__(
        self,
        encoder: nn.Module,
        seed: int,
        objective: str = "patch_svdd",
        train_last_weight: bool = True,
    ):
        super().__init__()
        self.encoder = encoder
        sizes = {"big": encoder} if encoder.side == BIG_PATCH else {"small": encoder}
        if isinstance(encoder, HierarchicalEncoder):
            sizes["small"] = encoder.small
        self.sizes = {name: part.side for name, part in sizes.items()}
        weight = next(encoder.parameters())
        with seeded(seed):
            if objective == "patch_svdd":
                for name in self.sizes:
                    classifier = PositionClassifier(
                        encoder.dimensions, train_last_weight=train_last_weight
                    )
                    self.add_module(name, classifier.to(weight))
        if objective == "centre":
            for name in self.sizes:
                self.register_buffer(
                    f"centre_{name}", weight.new_zeros(1, encoder.dimensions)
                )

    def classifier(self, name: str) -> PositionClassifier | None:
        return getattr(self, name, None)


Step = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class _Step(nn.Module):
    """A step's loss as a module, for DistributedDataParallel."""

    def __init__(self, run: _Run, step_loss: Step):
        super().__init__()
        self.run, self.step_loss = run, step_loss

    def forward(
        self, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step_loss(step, generator)


def _optimise(
    run: _Run,
    optimizers: list[torch.optim.Optimizer],
    rate: Callable[[float], float],
    step_loss: Step,
    steps: int,
    seed: int,
    every: int,
    checkpoint: str | Path | None,
    recipe: dict,
    on_record: Callable[[Record], None] | None,
    progress: bool,
    world: int = 1,
) -> list[Record]:
    """Run the remaining steps.

    Each step seeds its generator from (seed, step), so a run can be stopped and resumed
    at any step.
    """
    history: list[Record] = []
    device = next(run.parameters()).device
    with fail_together(device if world > 1 else None):
        if checkpoint is not None and Path(checkpoint).exists():
            columns = len(Record._fields)
            # Earlier versions identified the images in another way.
            optional = ("images", "fingerprint")
            stored = load_checkpoint(
                checkpoint, run, optimizers, recipe, columns, optional=optional
            )
            for row in stored["history"]:
                values = (math.nan if value is None else value for value in row)
                history.append(Record(*values))
    rates = [
        [group["lr"] for group in optimizer.param_groups] for optimizer in optimizers
    ]
    parameters = [
        parameter for parameter in run.parameters() if parameter.requires_grad
    ]
    first_step = history[-1].step if history else 0
    if world > 1:
        extremes = torch.tensor([first_step, -first_step], device=parameters[0].device)
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
        most, least = extremes.tolist()
        if most != -least:
            raise ValueError(
                f"the processes would resume from step {-least} to {most},"
                f" this one from {first_step}; the checkpoint {checkpoint} must be the"
                " same file for all: use a folder shared by all machines, or delete it"
            )
    call = (
        step_loss
        if world == 1
        else DistributedDataParallel(_Step(run, step_loss), broadcast_buffers=False)
    )
    rows: list[Tensor] = []
    is_first = world == 1 or distributed.get_rank() == 0
    bar = tqdm(
        range(first_step, steps),
        "steps",
        steps,
        initial=first_step,
        disable=not (progress and is_first),
    )
    for step in bar:
        loss, measured = call(
            step, torch.Generator().manual_seed(derive_seed(seed, step))
        )
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        for optimizer, base_rates in zip(optimizers, rates, strict=True):
            for group, value in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = value * rate(step / steps)
            optimizer.step()
        not_measured = loss.new_tensor(math.nan)
        rows.append(
            torch.stack(
                [
                    loss.detach(),
                    *(measured.get(name, not_measured) for name in Record._fields[2:]),
                ]
            )
        )
        # Read once per record, because reading waits for the GPU.
        if (step + 1) % every == 0 or step + 1 == steps:
            means = torch.stack(rows).mean(0)
            if world > 1:
                distributed.all_reduce(means.div_(world))
            history.append(Record(step + 1, *means.tolist()))
            rows = []
            if not math.isfinite(history[-1].loss):
                raise ValueError(
                    f"the loss is {history[-1].loss} at step {step + 1};"
                    " expected a finite number. Lower the learning rate"
                )
            bar.set_postfix(loss=history[-1].loss)
            if checkpoint is not None and is_first:
                history_rows = [
                    [None if value != value else value for value in row]
                    for row in history
                ]
                save_checkpoint(
                    checkpoint, run, optimizers, recipe, {"history": history_rows}
                )
            if on_record is not None:
                on_record(history[-1])
    for parameter in parameters:
        parameter.grad = None
    return history


# PyTorch has Muon since 2.9.
class _MatrixMuon(getattr(torch.optim, "Muon", torch.optim.Optimizer)):
    """Muon for convolutions: weights (out, in, k, k) as matrices (out, in·k·k).

    The matrices share the memory of the weights.
    """

    def __init__(self, weights: list[Tensor], lr: float):
        self.weights = weights
        super().__init__(
            [weight.detach().view(len(weight), -1) for weight in weights],
            lr=lr,
            weight_decay=0.0,
        )

    def step(self) -> None:
        for matrix, weight in zip(
            self.param_groups[0]["params"], self.weights, strict=True
        ):
            matrix.grad = weight.grad.view_as(matrix)
        super().step()


def _one_cycle(done: float) -> float:
    """Return the learning rate factor: up to 1 in the first 30 %, then down to 0."""
    if done < 0.3:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / 0.3)) / 2
    return (1 + math.cos(math.pi * (done - 0.3) / 0.7)) / 2


def train(
    encoder: nn.Module,
    images: Tensor,
    *,
    steps: int = 400,
    crops: int = 8,
    side: int = 160,
    pairs: int = 1024,
    svdd_weight: float | int = SVDD_WEIGHT,
    objective: str = "patch_svdd",
    optimizer: str = "muon",
    learning_rate: float | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 25,
    on_record: Callable[[Record], None] | None = None,
    progress: bool = False,
    distribute: bool = False,
) -> Training:
    r"""Train encoders in place on dense embeddings of large crops: minutes on a CPU.

    A step perturbs a few crops, embeds all of their patches at stride 2 in one pass
    (the flat encoder's at stride 8), and draws thousands of pairs from the maps.
    Weights are optimised with Muon, biases and the classifiers' last layers with Adam,
    both with a one-cycle learning rate. Equal arguments result in equal weights on a
    CPU (with equal numbers of threads), also if the run was killed and resumed; on a
    GPU they agree up to rounding.

    Args:
        encoder: hierarchical (both sizes), small or flat; new or already trained.
        images: normal ones only, (N, 3, H, W), RGB in [0, 1]; their mean image is
            subtracted.
        steps: of the optimizer.
        crops: random crops per step, each of a random image.
        side: of a crop in pixels, at least 127; smaller images are not cropped.
        pairs: per crop, patch size and loss.
        svdd_weight: λ. A larger value pulls neighbours closer; with a far too large one
            all embeddings collapse.
        objective: "patch_svdd" (λ L_SVDD' + L_SSL); for comparison "neighbors" (L_SVDD'
            alone) and "centre" (L_SVDD alone, with one centre per patch size, the mean
            embedding before training).
        optimizer: "muon", or "adam" for all weights, which learns more slowly here.
        learning_rate: maximum of the cycle; None for 0.02 with Muon (0.15 of that for
            Adam's parameters), 0.003 with Adam.
        dtype: of the convolutions; None for `fast_dtype`. Weights and losses are
            float32.
        seed: of the classifiers' initial weights and of all draws.
        checkpoint: a file that is written at each record, and from which the run
            resumes if it exists.
        every: steps between records.
        on_record: called with each record.
        progress: whether to show a progress bar.
        distribute: True splits the crops of each step among the processes of
            `torch.distributed`, which all call this with the same arguments, and
            averages their gradients (DistributedDataParallel): the result equals that
            of one process, up to rounding. The first process writes the checkpoint, and
            all resume from it: on several machines it must be in a shared folder.

    Returns:
        the training curves, the classifiers and the mean image.

    Raises:
        ValueError: for images that `mean_image` rejects or that are too small for a
            pair (127 pixels), an unknown objective, numbers below 1, a checkpoint of
            another run, or a loss that is not finite; with `distribute`, if no process
            group is initialised, the crops can't be split evenly, or only some
            processes find the checkpoint.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 3-6 and Alg. 1.
    Departures: pairs are drawn from the map of one pass, so that corners and moves are
        even (neighbours of small patches move by 2 pixels, not 1; for the flat encoder
        all are multiples of 8); the patches of a crop share its perturbation, noise
        included, in both losses; pairs stay inside; Kaiming weights, Muon (Jordan et
        al., 2024) and a learning-rate cycle where the released code has PyTorch's
        default, Adam and 1e-4; Deep SVDD's centres are the means over the first 32
        images.
    Test: test_patch_training.py::test_training_learns_positions_that_it_has_not_seen,
        test_patch_training.py::test_the_centre_is_the_mean_embedding_before_training
    """
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("optimizer", optimizer, LEARNING_RATES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(known)}")
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(
            "optimizer='muon' requires PyTorch 2.9 or newer,"
            f" this is {torch.__version__}; pass 'adam'"
        )
    learning_rate = (
        LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
    )
    _check_numbers(steps=steps, crops=crops, pairs=pairs, every=every)
    rank, world = process_group() if distribute else (0, 1)
    with fail_together(next(encoder.parameters()).device if distribute else None):
        if crops % world:
            expected = f"expected a multiple of {world}"
            raise ValueError(f"crops={crops} for {world} processes; {expected}")
        mean = mean_image(images)
        images = _check_dtype_and_device(images, encoder)
    crops_per_process = crops // world
    own_crops, own_pairs = (
        slice(rank * crops_per_process * each, (rank + 1) * crops_per_process * each)
        for each in (1, pairs)
    )
    size = tuple(min(side, length) for length in images.shape[-2:])
    # Muon's matrices share the memory of the weights.
    encoder.to(memory_format=torch.contiguous_format)
    run = _Run(encoder, seed, objective)
    if objective == "centre":
        with torch.no_grad():
            maps = encoder.dense(images[:32] - mean)
            for name, embeddings in _by_size(encoder, maps).items():
                getattr(run, f"centre_{name}").copy_(embeddings.mean((0, 2, 3)))
    dtype = fast_dtype(images.device) if dtype is None else dtype

    def step_loss(
        step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Every process draws the whole step and uses its own part of it, so that the
        # step equals that of a single process.
        crop = perturb(
            random_crops(images, mean, crops, size, generator),
            _on_device(generator, images.device),
        )[own_crops]
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            maps = encoder.dense(crop.contiguous(memory_format=torch.channels_last))
        loss, measured = images.new_zeros(()), {}
        for name, embeddings in _by_size(encoder, maps).items():
            rows, patch = embeddings.permute(0, 2, 3, 1).flatten(0, 2), run.sizes[name]

            def pick(corners: Tensor, rows=rows, shape=embeddings.shape) -> Tensor:
                positions = corners[own_pairs] // encoder.step
                first = (
                    torch.arange(crops_per_process).repeat_interleave(pairs)
                    * shape[2]
                    * shape[3]
                )
                index = first + positions[:, 0] * shape[3] + positions[:, 1]
                return rows.index_select(0, index.to(rows.device)).to(images.dtype)

            neighbors = neighbor_pairs(
                crops * pairs, size, patch, generator, step=encoder.step
            )
            a = pick(neighbors.first)
            b = (
                getattr(run, f"centre_{name}")
                if objective == "centre"
                else pick(neighbors.second)
            )
            svdd_term, measured[f"svdd_{name}"] = _svdd_term(a, b)
            loss = loss + (svdd_weight if objective == "patch_svdd" else 1) * svdd_term
            if objective == "patch_svdd":
                located = position_pairs(
                    crops * pairs, size, patch, generator, step=encoder.step
                )
                position = located.position[own_pairs].to(rows.device)
                logits = run.classifier(name)(pick(located.first), pick(located.second))
                loss = loss + F.cross_entropy(logits, position)
                measured[f"accuracy_{name}"] = _accuracy(logits, position)
        return loss, measured

    # Muon orthogonalises the update of a matrix. That has no meaning for a vector, nor
    # for weights that are normalised in the forward pass.
    last_layers = {
        id(run.classifier(name).fc3.weight)
        for name in run.sizes
        if run.classifier(name)
    }
    matrices = [p for p in run.parameters() if p.ndim > 1 and id(p) not in last_layers]
    vectors = [p for p in run.parameters() if p.ndim == 1 or id(p) in last_layers]
    if optimizer == "muon":
        optimizers = [
            _MatrixMuon(matrices, lr=learning_rate),
            torch.optim.Adam(vectors, lr=0.15 * learning_rate),
        ]
    else:
        optimizers = [torch.optim.Adam(run.parameters(), lr=learning_rate)]
    recipe = {
        "recipe": "dense",
        "steps": steps,
        "crops": crops,
        "size": size,
        "pairs": pairs,
        "svdd_weight": svdd_weight,
        "objective": objective,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "dtype": str(dtype),
        "seed": seed,
        "every": every,
        "fingerprint": fingerprint(images),
    }
    history = _optimise(
        run,
        optimizers,
        _one_cycle,
        step_loss,
        steps,
        seed,
        every,
        checkpoint,
        recipe,
        on_record,
        progress,
        world,
    )
    return Training(history, run.classifier("big"), run.classifier("small"), mean)


def train_on_patches(
    encoder: nn.Module,
    images: Tensor,
    *,
    epochs: int = EPOCHS,
    repeat: int = REPEAT,
    batch_size: int = BATCH,
    svdd_weight: float | int = SVDD_WEIGHT,
    learning_rate: float = LEARNING_RATE,
    as_released: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 25,
    on_record: Callable[[Record], None] | None = None,
    progress: bool = False,
) -> Training:
    """Train encoders in place as published, on separately cropped patches.

    A step uses a batch of each of four sets: perturbed position pairs of both sizes,
    and unperturbed neighbours of both sizes. An encoder of one size is trained on the
    two sets of its size. Resumption and seeds are as in `train`.

    Args:
        encoder: hierarchical, small or flat.
        images: as in `train`.
        epochs: passes in which each image is drawn `repeat` times, in random order.
        repeat: pairs per image, set and epoch.
        batch_size: pairs per set and step.
        svdd_weight: λ.
        learning_rate: Adam's, constant.
        as_released: True clips pairs at the border and uses PyTorch's default weights
            for the classifiers, whose last layers are then not trained.
        seed: of the classifiers' initial weights and of all draws.
        checkpoint: as in `train`.
        every: steps between records.
        on_record: called with each record.
        progress: whether to show a progress bar.

    Returns:
        the training curves, the classifiers and the mean image.

    Raises:
        ValueError: as `train`.

    Source: Patch SVDD, arXiv:2006.16067, Alg. 1, and the released code.
    Departures: without `as_released` pairs stay inside the image, the classifiers' last
        layers are trained from Kaiming weights; the default λ is that of the released
        README (1e-3), not that of its code (1).
    Test: test_patch_training.py::test_published_training_takes_the_released_steps
    """
    _check_numbers(epochs=epochs, repeat=repeat, batch_size=batch_size, every=every)
    mean = mean_image(images)
    images = _check_dtype_and_device(images, encoder)
    run = _Run(encoder, seed, train_last_weight=not as_released)
    size = tuple(images.shape[-2:])
    if as_released:
        with seeded(seed):
            for name in run.sizes:
                initialize(run.classifier(name), as_released=True)
    image_order = functools.lru_cache(1)(
        lambda epoch: _order(len(images) * repeat, seed, epoch) % len(images)
    )
    per_epoch = math.ceil(len(images) * repeat / batch_size)

    def step_loss(
        step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, batch = divmod(step, per_epoch)
        rows = image_order(epoch)[batch * batch_size : (batch + 1) * batch_size]
        loss, measured = images.new_zeros(()), {}
        for name, patch in run.sizes.items():
            embed = encoder if patch == encoder.side else encoder.small
            patches = functools.partial(crop_patches, images, mean, rows, patch)
            located = position_pairs(
                len(rows), size, patch, generator, clip=as_released
            )
            device_generator = _on_device(generator, images.device)
            first, second = (
                perturb(patches(corners), device_generator)
                for corners in (located.first, located.second)
            )
            position = located.position.to(images.device)
            logits = run.classifier(name)(embed(first), embed(second))
            neighbors = neighbor_pairs(
                len(rows), size, patch, generator, clip=as_released
            )
            svdd_term, measured[f"svdd_{name}"] = _svdd_term(
                embed(patches(neighbors.first)), embed(patches(neighbors.second))
            )
            loss = loss + F.cross_entropy(logits, position) + svdd_weight * svdd_term
            measured[f"accuracy_{name}"] = _accuracy(logits, position)
        return loss, measured

    trainable = [parameter for parameter in run.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.Adam(trainable, lr=learning_rate)]
    recipe = {
        "recipe": "patches",
        "epochs": epochs,
        "repeat": repeat,
        "batch_size": batch_size,
        "svdd_weight": svdd_weight,
        "learning_rate": learning_rate,
        "as_released": as_released,
        "seed": seed,
        "every": every,
        "fingerprint": fingerprint(images),
    }
    history = _optimise(
        run,
        optimizers,
        lambda done: 1.0,
        step_loss,
        epochs * per_epoch,
        seed,
        every,
        checkpoint,
        recipe,
        on_record,
        progress,
    )
    return Training(history, run.classifier("big"), run.classifier("small"), mean)


@torch.no_grad()
def position_accuracy(
    encoder: nn.Module,
    training: Training,
    images: Tensor,
    *,
    pairs: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Measure the classifiers' accuracy on images that were not used in training.

    Args:
        encoder: trained.
        training: the result of `train` or `train_on_patches` with it.
        images: test images, of the size of the training images, RGB in [0, 1]; they are
            not perturbed.
        pairs: per image, with corners and moves that are multiples of the encoder's
            step.
        seed: of the draw.

    Returns:
        accuracy for 64×64 and for 32×32 patches, NaN for a size that the encoder does
        not have; chance is 1/8.

    Raises:
        ValueError: for images of another size or range.

    Source: this book. Departures: none.
    Test: test_patch_training.py::test_training_learns_positions_that_it_has_not_seen
    """
    images = check_images(images)
    check_range(images)
    if images.shape[1:] != training.mean.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)};"
            f" expected {tuple(training.mean.shape)} each, as in training"
        )
    generator, size = torch.Generator().manual_seed(seed), tuple(images.shape[-2:])
    accuracies = {"big": [], "small": []}
    for image in images:
        for name, embeddings in _by_size(
            encoder, encoder.dense(image[None] - training.mean)
        ).items():
            patch = BIG_PATCH if name == "big" else SMALL_PATCH
            located = position_pairs(pairs, size, patch, generator, step=encoder.step)
            first, second = (
                embeddings[0][:, *(corners // encoder.step).T].T
                for corners in located[:2]
            )
            accuracies[name].append(
                _accuracy(
                    getattr(training, name)(first, second),
                    located.position.to(embeddings.device),
                )
            )
    return tuple(
        float(torch.stack(values).mean()) if values else math.nan
        for values in accuracies.values()
    )


def _by_size(
    encoder: nn.Module, maps: Tensor | tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return the output of an encoder's `dense` by patch size."""
    if isinstance(encoder, HierarchicalEncoder):
        small, big = maps
        return {"big": big, "small": small}
    return {"big" if encoder.side == BIG_PATCH else "small": maps}


def _accuracy(logits: Tensor, position: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == position).float().mean()


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on the images' device, seeded from this one."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(
        int(torch.randint(2**62, (), generator=generator))
    )


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(
        count,
        generator=torch.Generator().manual_seed(derive_seed(seed, epoch)),
    )


def _check_dtype_and_device(images: Tensor, encoder: nn.Module) -> Tensor:
    weight = next(encoder.parameters())
    if images.dtype != weight.dtype or images.device != weight.device:
        raise ValueError(
            f"images are {images.dtype} on {images.device} and the encoder"
            f" is {weight.dtype} on {weight.device}; expected the same."
            " Convert one with .to(…)"
        )
    return check_images(images)


def _check_numbers(**numbers: int) -> None:
    low = {name: value for name, value in numbers.items() if value < 1}
    if low:
        raise ValueError(
            f"{', '.join(f'{name}={value}' for name, value in low.items())}; expected"
            " at least 1"
        )
