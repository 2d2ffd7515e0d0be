r"""Train Patch SVDD's encoders, without labels.

$$\mathcal L = \lambda\,\mathcal L_{\text{SVDD'}} + \mathcal L_{\text{SSL}}$$
summed over both patch sizes. `train` draws its pairs from the feature map of a large
crop, computed in one pass; `train_on_patches` crops and embeds each patch, as
published.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from paperlib.distributed import check_same, fail_together, process_group
from paperlib.patch_svdd.encoders import BIG_PATCH, HierarchicalEncoder, initialize
from paperlib.patch_svdd.images import check_range, mean_image
from paperlib.patch_svdd.losses import PositionClassifier, svdd_loss
from paperlib.patch_svdd.pairs import (
    crop_patches,
    neighbor_pairs,
    perturb,
    position_pairs,
    random_crops,
)
from paperlib.storage import fingerprint, load_checkpoint, save_checkpoint
from paperlib.training import derive_seed, seeded
from paperlib.validation import (
    check_at_least_one,
    check_choice,
    check_images,
    check_same_kind,
)

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

    For a CPU this is known from PyTorch's release with `torch.cpu.get_capabilities`.
    """
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        is_fast = device.type == "cpu" and capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if is_fast else torch.float32


class _EmbeddedPairs(NamedTuple):
    """Embeddings (n, D) of the pairs of one patch size, for both losses.

    Fields:
        a, b: neighbours, for the SVDD loss.
        first, second: pairs of a known position, for the SSL loss; None without it.
        position: (n,), their position classes.
    """

    a: Tensor
    b: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    position: Tensor | None = None


# Draws and embeds the pairs of a step, by patch size.
DrawPairs = Callable[[int, torch.Generator], Iterator[tuple[str, _EmbeddedPairs]]]


class _Run(nn.Module):
    """The modules of a run: encoder, and per patch size a classifier or a centre.

    `forward` computes the loss of a step, so that DistributedDataParallel can wrap it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        seed: int,
        svdd_weight: float,
        objective: str = "patch_svdd",
        *,
        as_released: bool = False,
    ):
        super().__init__()
        self.encoder, self.seed = encoder, seed
        self.svdd_weight = svdd_weight if objective == "patch_svdd" else 1
        self.big = self.small = None
        if objective == "patch_svdd":
            with seeded(seed):
                for name in _encoders(encoder):
                    classifier = PositionClassifier(
                        encoder.dimensions, train_last_weight=not as_released
                    )
                    setattr(self, name, classifier.to(next(encoder.parameters())))
        self.draw_pairs: DrawPairs | None = None  # set before the first step

    def forward(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the loss, and it and its parts in the order of `Record`."""
        generator = _generator(self.seed, step)
        loss, measured = 0, {}
        for name, pairs in self.draw_pairs(step, generator):
            b = getattr(self, f"centre_{name}", pairs.b)  # a buffer, if there is one
            distance = svdd_loss(pairs.a, b)
            loss = loss + self.svdd_weight * distance
            measured[f"svdd_{name}"] = distance.detach()
            if pairs.position is not None:
                logits = getattr(self, name)(pairs.first, pairs.second)
                loss = loss + F.cross_entropy(logits, pairs.position)
                measured[f"accuracy_{name}"] = _accuracy(logits, pairs.position)
        measured["loss"], not_measured = loss.detach(), loss.new_tensor(math.nan)
        columns = [measured.get(name, not_measured) for name in Record._fields[1:]]
        return loss, torch.stack(columns)


def _optimise(
    run: _Run,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    recipe: dict,
    checkpoint: str | Path | None,
    on_record: Callable[[Record], None] | None,
    progress: bool,
    rate: Callable[[float], float] = lambda done: 1.0,
    world: int = 1,
) -> list[Record]:
    """Run the remaining steps.

    Each step seeds its generator from (seed, step), so a run can be stopped and resumed
    at any step. `rate` maps the share of the run that is done to a factor of the
    learning rates, and `recipe` holds the settings of the run.
    """
    history: list[Record] = []
    device = next(run.parameters()).device if world > 1 else None
    with fail_together(device):
        if checkpoint is not None and Path(checkpoint).exists():
            columns = len(Record._fields)
            # Earlier versions identified the images in another way.
            stored = load_checkpoint(
                checkpoint,
                run,
                optimizers,
                recipe,
                columns,
                optional=("images", "fingerprint"),
            )
            for row in stored["history"]:
                values = (math.nan if value is None else value for value in row)
                history.append(Record(*values))
    first_step = history[-1].step if history else 0
    step_loss = run
    if world > 1:
        check_same(
            [first_step],
            device,
            f"this process would resume from step {first_step}, another one from a"
            f" different step; the checkpoint {checkpoint} must be the same file for"
            " all: use a folder shared by all machines, or delete it",
        )
        step_loss = DistributedDataParallel(run, broadcast_buffers=False)
    schedules = [
        LambdaLR(optimizer, lambda step: rate((first_step + step) / steps))
        for optimizer in optimizers
    ]
    rows: list[Tensor] = []
    is_first = world == 1 or distributed.get_rank() == 0
    bar = tqdm(
        range(first_step + 1, steps + 1),
        "steps",
        steps,
        initial=first_step,
        disable=not (progress and is_first),
    )
    for done in bar:
        loss, row = step_loss(done - 1)
        run.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        rows.append(row)
        # Read once per record, because reading waits for the GPU.
        if done % recipe["every"] == 0 or done == steps:
            means = torch.stack(rows).mean(0)
            rows = []
            if world > 1:
                distributed.all_reduce(means.div_(world))
            history.append(Record(done, *means.tolist()))
            if not math.isfinite(history[-1].loss):
                raise ValueError(
                    f"the loss is {history[-1].loss} at step {done};"
                    " expected a finite number. Lower the learning rate"
                )
            bar.set_postfix(loss=history[-1].loss)
            if checkpoint is not None and is_first:
                # JSON has no NaN.
                table = [[None if v != v else v for v in row] for row in history]
                save_checkpoint(checkpoint, run, optimizers, recipe, {"history": table})
            if on_record is not None:
                on_record(history[-1])
    run.zero_grad()
    return history


def _muon_and_adam(run: _Run, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the weight matrices and Adam for all other parameters.

    Muon orthogonalises the update of a matrix. That has no meaning for a vector, nor
    for weights that are normalised in the forward pass.
    """
    last_layers = {
        id(module.fc3.weight)
        for module in run.modules()
        if isinstance(module, PositionClassifier)
    }
    matrices = [p for p in run.parameters() if p.ndim > 1 and id(p) not in last_layers]
    vectors = [p for p in run.parameters() if p.ndim == 1 or id(p) in last_layers]
    adam = torch.optim.Adam(vectors, lr=0.15 * learning_rate)
    return [_muon(matrices, learning_rate), adam]


def _muon(weights: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """Return Muon for convolutions: weights (out, in, k, k) as matrices (out, in·k·k).

    The matrices share the memory of the weights.
    """
    matrices = [weight.detach().view(len(weight), -1) for weight in weights]

    def flatten_gradients(*_) -> None:
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.grad = weight.grad.view_as(matrix)

    optimizer = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0)
    optimizer.register_step_pre_hook(flatten_gradients)
    return optimizer


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
    svdd_weight: float = SVDD_WEIGHT,
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
    check_choice("objective", objective, OBJECTIVES)
    check_choice("optimizer", optimizer, LEARNING_RATES)
    check_at_least_one(steps=steps, crops=crops, pairs=pairs, every=every)
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(
            "optimizer='muon' requires PyTorch 2.9 or newer,"
            f" this is {torch.__version__}; pass 'adam'"
        )
    if learning_rate is None:
        learning_rate = LEARNING_RATES[optimizer]
    rank, world = process_group() if distribute else (0, 1)
    with fail_together(next(encoder.parameters()).device if distribute else None):
        if crops % world:
            expected = f"expected a multiple of {world}"
            raise ValueError(f"crops={crops} for {world} processes; {expected}")
        mean, images = _check_input(encoder, images)
    own_crops, own_pairs = (
        slice(rank * count // world, (rank + 1) * count // world)
        for count in (crops, crops * pairs)
    )
    size = tuple(min(side, length) for length in images.shape[-2:])
    # Muon's matrices share the memory of the weights.
    encoder.to(memory_format=torch.contiguous_format)
    run = _Run(encoder, seed, svdd_weight, objective)
    if objective == "centre":
        with torch.no_grad():
            for name, maps in _dense(encoder, images[:32] - mean).items():
                run.register_buffer(f"centre_{name}", maps.mean((0, 2, 3))[None])
    dtype = fast_dtype(images.device) if dtype is None else dtype

    def draw_pairs(
        step: int, generator: torch.Generator
    ) -> Iterator[tuple[str, _EmbeddedPairs]]:
        # Every process draws the whole step and uses its own part of it, so that the
        # step equals that of a single process.
        crop = perturb(
            random_crops(images, mean, crops, size, generator),
            _on_device(generator, images.device),
        )[own_crops]
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            maps = _dense(encoder, crop.contiguous(memory_format=torch.channels_last))
        for name, part in _encoders(encoder).items():
            embed = functools.partial(_embeddings_at, maps[name], dtype=images.dtype)
            arguments = (crops * pairs, size, part.side, generator)
            neighbors = neighbor_pairs(*arguments, step=encoder.step)
            a, b = (
                embed(corners[own_pairs] // encoder.step) for corners in neighbors[:2]
            )
            if objective != "patch_svdd":
                yield name, _EmbeddedPairs(a, b)
                continue
            located = position_pairs(*arguments, step=encoder.step)
            first, second = (
                embed(corners[own_pairs] // encoder.step) for corners in located[:2]
            )
            position = located.position[own_pairs].to(images.device)
            yield name, _EmbeddedPairs(a, b, first, second, position)

    run.draw_pairs = draw_pairs
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
    optimizers = (
        _muon_and_adam(run, learning_rate)
        if optimizer == "muon"
        else [torch.optim.Adam(run.parameters(), lr=learning_rate)]
    )
    history = _optimise(
        run,
        optimizers,
        steps,
        recipe,
        checkpoint,
        on_record,
        progress,
        _one_cycle,
        world,
    )
    return Training(history, run.big, run.small, mean)


def train_on_patches(
    encoder: nn.Module,
    images: Tensor,
    *,
    epochs: int = EPOCHS,
    repeat: int = REPEAT,
    batch_size: int = BATCH,
    svdd_weight: float = SVDD_WEIGHT,
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
    check_at_least_one(epochs=epochs, repeat=repeat, batch_size=batch_size, every=every)
    mean, images = _check_input(encoder, images)
    run = _Run(encoder, seed, svdd_weight, as_released=as_released)
    if as_released:
        with seeded(seed):
            for name in _encoders(encoder):
                initialize(getattr(run, name), as_released=True)
    image_order = functools.lru_cache(1)(
        lambda epoch: _order(len(images) * repeat, seed, epoch) % len(images)
    )
    per_epoch = math.ceil(len(images) * repeat / batch_size)

    def draw_pairs(
        step: int, generator: torch.Generator
    ) -> Iterator[tuple[str, _EmbeddedPairs]]:
        epoch, batch = divmod(step, per_epoch)
        rows = image_order(epoch)[batch * batch_size : (batch + 1) * batch_size]
        for name, embed in _encoders(encoder).items():
            crop = functools.partial(crop_patches, images, mean, rows, embed.side)
            arguments = (len(rows), tuple(images.shape[-2:]), embed.side, generator)
            located = position_pairs(*arguments, clip=as_released)
            device_generator = _on_device(generator, images.device)
            first, second = (
                embed(perturb(crop(corners), device_generator))
                for corners in located[:2]
            )
            neighbors = neighbor_pairs(*arguments, clip=as_released)
            a, b = (embed(crop(corners)) for corners in neighbors[:2])
            position = located.position.to(images.device)
            yield name, _EmbeddedPairs(a, b, first, second, position)

    run.draw_pairs = draw_pairs
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
    trainable = [parameter for parameter in run.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.Adam(trainable, lr=learning_rate)]
    steps = epochs * per_epoch
    history = _optimise(run, optimizers, steps, recipe, checkpoint, on_record, progress)
    return Training(history, run.big, run.small, mean)


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
    """
    images = check_range(images, training.mean)
    generator, size = torch.Generator().manual_seed(seed), tuple(images.shape[-2:])
    accuracies = {"big": [], "small": []}
    for image in images:
        maps = _dense(encoder, image[None] - training.mean)
        for name, part in _encoders(encoder).items():
            located = position_pairs(
                pairs, size, part.side, generator, step=encoder.step
            )
            first, second = (
                _embeddings_at(maps[name], corners // encoder.step)
                for corners in located[:2]
            )
            logits = getattr(training, name)(first, second)
            position = located.position.to(images.device)
            accuracies[name].append(_accuracy(logits, position))
    return tuple(
        float(torch.stack(values).mean()) if values else math.nan
        for values in accuracies.values()
    )


def _encoders(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the encoders of the patch sizes that an encoder embeds."""
    if isinstance(encoder, HierarchicalEncoder):
        return {"big": encoder, "small": encoder.small}
    return {"big" if encoder.side == BIG_PATCH else "small": encoder}


def _dense(encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the feature maps (N, D, h, w) of an encoder by patch size."""
    maps = encoder.dense(images)
    if isinstance(maps, Tensor):
        return dict.fromkeys(_encoders(encoder), maps)
    small, big = maps
    return {"big": big, "small": small}


def _embeddings_at(
    maps: Tensor, positions: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the embeddings (m, D) at m positions, equally many of each map in turn."""
    n, _, height, width = maps.shape
    first = torch.arange(n).repeat_interleave(len(positions) // n) * height * width
    index = first + positions[:, 0] * width + positions[:, 1]
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    return rows.index_select(0, index.to(maps.device)).to(dtype or maps.dtype)


def _accuracy(logits: Tensor, position: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == position).float().mean()


def _generator(seed: int, number: int) -> torch.Generator:
    """Return a generator for a step or an epoch of the run with this seed."""
    return torch.Generator().manual_seed(derive_seed(seed, number))


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on the images' device, seeded from this one."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(
        int(torch.randint(2**62, (), generator=generator))
    )


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, epoch))


def _check_input(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean image and the detached images, after checking them."""
    mean = mean_image(images)
    check_same_kind("images", images, "the encoder", next(encoder.parameters()))
    return mean, check_images(images)
