"""Train Patch SVDD's encoders, without labels.

`train` draws its pairs from the feature map of a large crop, computed in one pass;
`train_on_patches` crops and embeds each patch, as published.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from paperlib.distributed import check_same, fail_together, process_group
from paperlib.patch_svdd.encoders import (
    BIG_PATCH,
    BySize,
    FlatEncoder,
    HierarchicalEncoder,
    PatchEncoder,
    initialize,
)
from paperlib.patch_svdd.images import check_range, mean_image
from paperlib.patch_svdd.losses import PositionClassifier, svdd_loss
from paperlib.patch_svdd.pairs import (
    Pairs,
    crop_patches,
    neighbor_pairs,
    perturb,
    position_pairs,
    random_crops,
)
from paperlib.storage import (
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from paperlib.training import derive_seed, seeded
from paperlib.validation import (
    check_choice,
    check_images,
    check_integers,
    check_number,
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
# The columns of the history in a checkpoint.
HISTORY_COLUMNS = (
    "step",
    "loss",
    "accuracy_big",
    "accuracy_small",
    "svdd_big",
    "svdd_small",
)


class Record(NamedTuple):
    """Means over the steps since the previous record: the loss and its parts.

    Fields:
        step: number of steps so far.
        loss: the minimised loss.
        accuracy_small, accuracy_big: accuracy of the positions of the training pairs;
            chance is 1/8.
        svdd_small, svdd_big: mean distance between neighbours (to the centre for the
            objective `centre`).

    Quantities not measured are NaN.
    """

    step: int
    loss: float
    accuracy_small: float
    accuracy_big: float
    svdd_small: float
    svdd_big: float


class Training(NamedTuple):
    """The result of a training run, besides the encoder, which is trained in place.

    Fields:
        history: the training curves.
        small, big: the position classifiers of both patch sizes; None if the encoder
            has no such size.
        mean: (3, H, W), the mean of the training images.
    """

    history: list[Record]
    small: PositionClassifier | None
    big: PositionClassifier | None
    mean: Tensor

    def __repr__(self) -> str:
        """Count the records, and show the last one."""
        last = self.history[-1] if self.history else "no step"
        return f"Training({len(self.history)} records, the last: {last})"


def _check_settings(
    encoder: nn.Module, svdd_weight: float, learning_rate: float, seed: int
) -> None:
    """Raise ValueError for settings that no training can have."""
    if not isinstance(encoder, HierarchicalEncoder | PatchEncoder | FlatEncoder):
        raise ValueError(
            f"an encoder of type {type(encoder).__name__};"
            " expected a HierarchicalEncoder, PatchEncoder or FlatEncoder"
        )
    check_number("svdd_weight", svdd_weight, "a weight of the loss", least=0)
    check_number("learning_rate", learning_rate, "a step size", least=0)
    check_integers(0, seed=seed)


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


class _Run(nn.Module):
    """The modules of a run: encoder, and per patch size a classifier or a centre.

    A subclass defines `draw_pairs(step, generator)`, which yields each patch size with
    the embeddings of its neighbours and of its position pairs (or None). `forward`
    computes the loss of a step, so that DistributedDataParallel can wrap it.

    Args:
        encoder: is trained in place.
        images: of the training, (N, 3, H, W).
        mean: their mean image.
        recipe: settings of the run, which a checkpoint stores.
        rank, world: this process and the number of processes that share the run.
    """

    def __init__(
        self,
        encoder: nn.Module,
        images: Tensor,
        mean: Tensor,
        recipe: dict[str, Any],
        rank: int = 0,
        world: int = 1,
    ):
        super().__init__()
        self.mean, self.images = mean, check_images(images)
        check_same_kind("images", images, "the encoder", next(encoder.parameters()))
        self.encoder, self.rank, self.world = encoder, rank, world
        self.recipe = recipe | {"fingerprint": fingerprint(images)}
        self.objective = recipe.get("objective", "patch_svdd")
        self.big = self.small = None
        if self.objective == "patch_svdd":
            is_trained = not recipe.get("as_released", False)
            with seeded(recipe["seed"]):
                for name in _encoders(encoder):
                    classifier = PositionClassifier(
                        encoder.dimensions, train_last_weight=is_trained
                    )
                    setattr(self, name, classifier.to(next(encoder.parameters())))

    def forward(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the loss, and it and its parts in the order of `Record`."""
        weight = self.recipe["svdd_weight"] if self.objective == "patch_svdd" else 1
        seed = derive_seed(self.recipe["seed"], step)
        generator = torch.Generator().manual_seed(seed)
        loss, measured = 0, {}
        for name, neighbors, located in self.draw_pairs(step, generator):
            # The centre is a buffer, if there is one.
            centre = getattr(self, f"centre_{name}", neighbors.second)
            distance = svdd_loss(neighbors.first, centre)
            loss = loss + weight * distance
            measured[f"svdd_{name}"] = distance.detach()
            if located is not None:
                logits = getattr(self, name)(located.first, located.second)
                loss = loss + F.cross_entropy(logits, located.position)
                is_correct = logits.argmax(1) == located.position
                measured[f"accuracy_{name}"] = is_correct.float().mean()
        measured["loss"], not_measured = loss.detach(), loss.new_tensor(math.nan)
        columns = [measured.get(name, not_measured) for name in Record._fields[1:]]
        return loss, torch.stack(columns)


class _DenseRun(_Run):
    """Draws pairs from the feature maps of a few crops, each computed in one pass.

    Every process draws the whole step and uses its own part of it, so that the step
    equals that of a single process.
    """

    def draw_pairs(
        self, step: int, generator: torch.Generator
    ) -> Iterator[tuple[str, Pairs, Pairs | None]]:
        """Draw pairs whose corners and moves are multiples of the encoder's step."""
        count = self.recipe["crops"] * self.recipe["pairs"]
        maps, second_maps = self.embed_crops(generator)
        for name, part in _encoders(self.encoder).items():
            size, step_in_pixels = self.recipe["size"], self.encoder.step
            arguments = (count, size, part.side, generator)
            first, second, _ = neighbor_pairs(*arguments, step=step_in_pixels)
            embeddings = (self.embed_patches(maps[name], p) for p in (first, second))
            neighbors, located = Pairs(*embeddings, None), None
            if self.objective == "patch_svdd":
                first, second, position = position_pairs(
                    *arguments, step=step_in_pixels
                )
                located = Pairs(
                    self.embed_patches(maps[name], first),
                    self.embed_patches(second_maps[name], second),
                    self.own(position).to(self.images.device),
                )
            yield name, neighbors, located

    def embed_crops(
        self, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return two feature maps per crop and patch size, of this process's crops.

        The first patches of position pairs are read from the first maps, the second
        ones from the second maps. A colour shift is the same at all positions of a map,
        so a crop is perturbed and embedded twice, unless both patches may share a
        shift.
        """
        count, size = self.recipe["crops"], self.recipe["size"]
        crops = random_crops(self.images, self.mean, count, size, generator)
        noise = _on_device(generator, crops.device)
        maps = self.embed_views(perturb(crops, noise))
        if self.recipe.get("shared_shift", True):
            return maps, maps
        return maps, self.embed_views(perturb(crops, noise))

    def embed_views(self, crops: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of this process's perturbed crops, by patch size."""
        crops = self.own(crops).contiguous(memory_format=torch.channels_last)
        dtype = getattr(torch, self.recipe["dtype"].removeprefix("torch."))
        is_lower = dtype != torch.float32
        with torch.autocast(crops.device.type, dtype, enabled=is_lower):
            return _dense(self.encoder, crops)

    def embed_patches(self, maps: Tensor, corners: Tensor) -> Tensor:
        """Return the embeddings of this process's patches, in the images' dtype."""
        positions = self.own(corners) // self.encoder.step
        return _embeddings_at(maps, positions).to(self.images.dtype)

    def own(self, drawn: Tensor) -> Tensor:
        """Return the part of the drawn crops or pairs that this process uses."""
        return drawn.chunk(self.world)[self.rank]


class _PatchRun(_Run):
    """Crops and embeds each patch, as published."""

    def draw_pairs(
        self, step: int, generator: torch.Generator
    ) -> Iterator[tuple[str, Pairs, Pairs | None]]:
        """Draw a batch of perturbed position pairs and one of neighbours."""
        rows, device = self.rows_of(step), self.images.device
        clip, size = self.recipe["as_released"], tuple(self.images.shape[-2:])
        for name, embed in _encoders(self.encoder).items():
            crop = functools.partial(
                crop_patches, self.images, self.mean, rows, embed.side
            )
            arguments = (len(rows), size, embed.side, generator)
            located = position_pairs(*arguments, clip=clip)
            noise = _on_device(generator, device)
            first, second = (embed(perturb(crop(part), noise)) for part in located[:2])
            neighbors = neighbor_pairs(*arguments, clip=clip)
            a, b = (embed(crop(part)) for part in neighbors[:2])
            located = Pairs(first, second, located.position.to(device))
            yield name, Pairs(a, b, None), located

    def rows_of(self, step: int) -> Tensor:
        """Return the indices of the images of a step's batch."""
        total = len(self.images) * self.recipe["repeat"]
        size = self.recipe["batch_size"]
        epoch, batch = divmod(step, math.ceil(total / size))
        order = _order(total, self.recipe["seed"], epoch)
        return order[batch * size : (batch + 1) * size] % len(self.images)


def _optimise(
    run: _Run,
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    rate: Callable[[float], float],
    checkpoint: str | Path | None,
    on_record: Callable[[Record], None] | None,
    progress: bool,
) -> list[Record]:
    """Run the remaining steps, and return the records of all.

    Each step seeds its generator from (seed, step), so a run can be stopped and resumed
    at any step. `rate` maps the share of the run that is done to a factor of the
    learning rates.
    """
    history = _resume(run, optimizers, checkpoint)
    first_step = history[-1].step if history else 0
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate((first_step + step) / steps)
        )
        for optimizer in optimizers
    ]
    step_loss, rows = run, []
    if run.world > 1:
        parallel = nn.parallel.DistributedDataParallel
        # PyTorch 2.14 has renamed the argument.
        new_name, old_name = "forward_sync_buffers", "broadcast_buffers"
        is_new = new_name in inspect.signature(parallel).parameters
        step_loss = parallel(run, **{new_name if is_new else old_name: False})
    bar = tqdm(
        range(first_step + 1, steps + 1),
        "steps",
        steps,
        initial=first_step,
        disable=not progress or run.rank > 0,
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
        if done % run.recipe["every"] == 0 or done == steps:
            history.append(_mean_record(done, rows, run.world))
            rows = []
            bar.set_postfix(loss=history[-1].loss)
            if checkpoint is not None and run.rank == 0:
                _save(run, optimizers, checkpoint, history)
            if on_record is not None:
                on_record(history[-1])
    run.zero_grad()
    return history


def _resume(
    run: _Run, optimizers: list[torch.optim.Optimizer], checkpoint: str | Path | None
) -> list[Record]:
    """Restore the state of a checkpoint, if it exists, and return its records."""
    device = next(run.parameters()).device if run.world > 1 else None
    rows: list[list[float | None]] = []
    with fail_together(device):
        if find_checkpoint(checkpoint):
            # Earlier versions identified the images in another way.
            identity = ("images", "fingerprint")
            rows = load_checkpoint(
                checkpoint,
                run,
                optimizers,
                run.recipe,
                len(HISTORY_COLUMNS),
                optional=identity,
            )["history"]
    if device is not None:
        step = rows[-1][0] if rows else 0
        check_same(
            [step],
            device,
            f"this process would resume from step {step}, another one from a different"
            f" step; the checkpoint {checkpoint} must be the same file for all: use a"
            " folder shared by all machines, or delete it",
        )
    table = ([math.nan if value is None else value for value in row] for row in rows)
    return [Record(**dict(zip(HISTORY_COLUMNS, row, strict=True))) for row in table]


def _save(
    run: _Run,
    optimizers: list[torch.optim.Optimizer],
    checkpoint: str | Path,
    history: list[Record],
) -> None:
    """Write a checkpoint. JSON has no NaN, so null stands for it."""
    table = [[getattr(record, name) for name in HISTORY_COLUMNS] for record in history]
    rows = [[None if math.isnan(value) else value for value in row] for row in table]
    save_checkpoint(checkpoint, run, optimizers, run.recipe, {"history": rows})


def _mean_record(step: int, rows: list[Tensor], world: int) -> Record:
    """Average measurements over the steps and the processes."""
    means = torch.stack(rows).mean(0)
    if world > 1:
        distributed.all_reduce(means.div_(world))
    record = Record(step, *means.tolist())
    if not math.isfinite(record.loss):
        raise ValueError(
            f"the loss is {record.loss} at step {step}; expected a finite number."
            " Lower the learning rate"
        )
    return record


def _dense_optimizers(
    run: _Run, kind: str, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Return Adam for all parameters, or Muon for the matrices and Adam for the others.

    Muon orthogonalises the update of a matrix. That has no meaning for a vector, nor
    for weights that are normalised in the forward pass.
    """
    if kind == "adam":
        return [torch.optim.Adam(run.parameters(), lr=learning_rate)]
    is_vector = {
        name: parameter.ndim == 1 or name.endswith("fc3.weight")
        for name, parameter in run.named_parameters()
    }
    matrices = [p for name, p in run.named_parameters() if not is_vector[name]]
    vectors = [p for name, p in run.named_parameters() if is_vector[name]]
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
    shared_shift: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 25,
    on_record: Callable[[Record], None] | None = None,
    progress: bool = False,
    distribute: bool = False,
) -> Training:
    r"""Train encoders in place on dense embeddings of large crops: minutes on a CPU.

    $$\mathcal L = \lambda\,\mathcal L_{\text{SVDD'}} + \mathcal L_{\text{SSL}}$$
    summed over both patch sizes, with $\lambda$ = `svdd_weight`.

    A step perturbs a few crops, embeds all of their patches at stride 2 in one pass
    (the flat encoder's at stride 8), and draws thousands of pairs from the maps. It
    does so twice per crop, with two colour shifts: the first patch of a position pair
    is read from one map, the second patch from the other.
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
        svdd_weight: a larger value pulls neighbours closer; with a far too large one
            all embeddings collapse.
        objective: "patch_svdd" for both losses; for comparison "neighbors" (L_SVDD'
            alone) and "centre" (L_SVDD alone, with one centre per patch size, the mean
            embedding before training).
        optimizer: "muon", or "adam" for all weights, which learns more slowly here.
        learning_rate: maximum of the cycle; None for 0.02 with Muon (0.15 of that for
            Adam's parameters), 0.003 with Adam.
        shared_shift: True embeds each crop once, so that both patches of a pair share
            a colour shift. A step then takes half the time, but colours
            remain a shortcut: suitable for grey images only.
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

    Example:
        >>> import torch
        >>> from paperlib import datasets
        >>> from paperlib.patch_svdd import HierarchicalEncoder, train
        >>> bricks = datasets.textures("brick", count=4)
        >>> images = torch.stack([item.image for item in bricks])
        >>> encoder = HierarchicalEncoder(dimensions=16)
        >>> training = train(encoder, images, steps=2, crops=1, pairs=16, every=1)
        >>> [record.step for record in training.history], training.mean.shape
        ([1, 2], torch.Size([3, 224, 224]))

    Source: Patch SVDD, arXiv:2006.16067, Eq. 3-6 and Alg. 1.
    Departures: pairs are drawn from the map of one pass, so that corners and moves are
        even (neighbours of small patches move by 2 pixels, not 1; for the flat encoder
        all are multiples of 8); all first patches of a crop share one perturbation,
        noise included, all second patches another one, and neighbours the first; pairs
        stay inside; Kaiming weights, Muon (Jordan et al., 2024) and a learning-rate
        cycle where the released code has PyTorch's default, Adam and 1e-4; Deep SVDD's
        centres are the means over the first 32 images.
    Test: test_patch_training.py::test_training_learns_positions_that_it_has_not_seen,
        test_patch_training.py::test_a_dense_step_is_the_loss_over_its_patches,
        test_patch_training.py::test_the_centre_is_the_mean_embedding_before_training
    """
    check_choice("objective", objective, OBJECTIVES)
    check_choice("optimizer", optimizer, LEARNING_RATES)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    check_choice("dtype", dtype, (None, *dtypes))
    check_integers(steps=steps, crops=crops, pairs=pairs, every=every, side=side)
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(
            "optimizer='muon' requires PyTorch 2.9 or newer,"
            f" this is {torch.__version__}; pass 'adam'"
        )
    if learning_rate is None:
        learning_rate = LEARNING_RATES[optimizer]
    _check_settings(encoder, svdd_weight, learning_rate, seed)
    device = next(encoder.parameters()).device
    rank, world = process_group() if distribute else (0, 1)
    with fail_together(device if distribute else None):
        if crops % world:
            raise ValueError(
                f"crops={crops} for {world} processes; expected a multiple of {world}"
            )
        mean = mean_image(images)
        recipe = {
            "recipe": "dense",
            "steps": steps,
            "crops": crops,
            "size": tuple(min(side, length) for length in mean.shape[1:]),
            "pairs": pairs,
            "svdd_weight": float(svdd_weight),
            "objective": objective,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "dtype": str(fast_dtype(device) if dtype is None else dtype),
            "seed": seed,
            "every": every,
        }
        # Only position pairs need a second shift. A recipe without the entry is that of
        # earlier versions, whose checkpoints are resumed with shared_shift=True.
        if objective == "patch_svdd" and not shared_shift:
            recipe["shared_shift"] = False
        run = _DenseRun(encoder, images, mean, recipe, rank, world)
    # Muon's matrices share the memory of the weights.
    encoder.to(memory_format=torch.contiguous_format)
    if objective == "centre":
        with torch.no_grad():
            for name, maps in _dense(encoder, run.images[:32] - run.mean).items():
                run.register_buffer(f"centre_{name}", maps.mean((0, 2, 3))[None])
    optimizers = _dense_optimizers(run, optimizer, learning_rate)
    history = _optimise(
        run, optimizers, steps, _one_cycle, checkpoint, on_record, progress
    )
    return Training(history, run.small, run.big, run.mean)


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
        svdd_weight: as in `train`.
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
    check_integers(epochs=epochs, repeat=repeat, batch_size=batch_size, every=every)
    _check_settings(encoder, svdd_weight, learning_rate, seed)
    recipe = {
        "recipe": "patches",
        "epochs": epochs,
        "repeat": repeat,
        "batch_size": batch_size,
        "svdd_weight": float(svdd_weight),
        "learning_rate": learning_rate,
        "as_released": as_released,
        "seed": seed,
        "every": every,
    }
    run = _PatchRun(encoder, images, mean_image(images), recipe)
    if as_released:
        with seeded(seed):
            for name in _encoders(encoder):
                initialize(getattr(run, name), as_released=True)
    trainable = [parameter for parameter in run.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.Adam(trainable, lr=learning_rate)]
    steps = epochs * math.ceil(len(images) * repeat / batch_size)
    history = _optimise(
        run, optimizers, steps, lambda done: 1.0, checkpoint, on_record, progress
    )
    return Training(history, run.small, run.big, run.mean)


@torch.no_grad()
def position_accuracy(
    encoder: nn.Module,
    training: Training,
    images: Tensor,
    *,
    pairs: int = 2000,
    seed: int = 0,
) -> BySize:
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
        accuracy for 32×32 and for 64×64 patches, NaN for a size that the encoder does
        not have; chance is 1/8.

    Raises:
        ValueError: for images of another size or range.
    """
    images = check_range(images, training.mean)
    generator, size = torch.Generator().manual_seed(seed), tuple(images.shape[-2:])
    accuracies = {name: [] for name in BySize._fields}
    for image in images:
        maps = _dense(encoder, image[None] - training.mean)
        for name, part in _encoders(encoder).items():
            drawn = position_pairs(pairs, size, part.side, generator, step=encoder.step)
            first, second = (
                _embeddings_at(maps[name], corners // encoder.step)
                for corners in drawn[:2]
            )
            logits = getattr(training, name)(first, second)
            is_correct = logits.argmax(1) == drawn.position.to(images.device)
            accuracies[name].append(is_correct.float().mean())
    return BySize(
        *(
            float(torch.stack(shares).mean()) if shares else math.nan
            for shares in accuracies.values()
        )
    )


def _encoders(encoder: nn.Module) -> dict[str, nn.Module]:
    """Return the encoders of the patch sizes that an encoder embeds.

    Pairs are drawn in this order, so it determines the result of a training.
    """
    if isinstance(encoder, HierarchicalEncoder):
        return {"big": encoder, "small": encoder.small}
    return {"big" if encoder.side == BIG_PATCH else "small": encoder}


def _dense(encoder: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the feature maps (N, D, h, w) of an encoder by patch size."""
    maps = encoder.dense(images)
    if isinstance(maps, Tensor):
        return dict.fromkeys(_encoders(encoder), maps)
    return dict(zip(BySize._fields, maps, strict=True))


def _embeddings_at(maps: Tensor, positions: Tensor) -> Tensor:
    """Return the embeddings (m, D) at m positions, equally many of each map in turn."""
    n, _, height, width = maps.shape
    image = torch.arange(n).repeat_interleave(len(positions) // n)
    index = (image * height + positions[:, 0]) * width + positions[:, 1]
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    return rows.index_select(0, index.to(maps.device))


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Return a generator on the images' device, seeded from this one."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(
        int(torch.randint(2**62, (), generator=generator))
    )


def _order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch's images."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(count, generator=generator)
