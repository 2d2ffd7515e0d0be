r"""Train Patch SVDD's encoders without a label: where does one patch lie from another,
and do neighbours lie close?

$$\mathcal L = \lambda\,\mathcal L_{\text{SVDD'}} + \mathcal L_{\text{SSL}}$$   summed over both patch sizes. `train`
draws its pairs on the map that one pass over a large crop gives; `train_on_patches`
cuts out and runs each patch, as published.
"""

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from paperlib.distributed import fail_together, process_group
from paperlib.patch_svdd.encoders import (
    BIG_PATCH,
    SMALL_PATCH,
    HierarchicalEncoder,
    initialize,
)
from paperlib.patch_svdd.images import check_range, mean_image
from paperlib.patch_svdd.losses import PositionClassifier, _svdd_part
from paperlib.patch_svdd.pairs import (
    crop_patches,
    neighbor_pairs,
    perturb,
    position_pairs,
    random_crops,
)
from paperlib.storage import load_checkpoint, save_checkpoint
from paperlib.validation import check_images

SVDD_WEIGHT = (
    1e-3  # λ of Eq. 6, in the README of the released code; the code's default is 1
)
LEARNING_RATE = 1e-4  # released code: of Adam
# released code: pairs a step, pairs of an image an epoch, epochs
BATCH, REPEAT, EPOCHS = (64, 100, 300)
LEARNING_RATES = {"muon": 0.02, "adam": 0.003}  # of `train`, found on solar cells
# L_SVDD' + L_SSL, L_SVDD' alone, L_SVDD alone
OBJECTIVES = ("patch_svdd", "neighbors", "centre")


class Record(NamedTuple):
    """Means over the steps since the record before: the loss, and of each patch size
    what made it up.

    Fields:
        step: number of steps taken so far.
        loss: what was minimised.
        accuracy_big, accuracy_small: share of right positions among the training pairs;
            chance is 1/8.
        svdd_big, svdd_small: mean distance between neighbours (to the centre for the
            objective `centre`).

    What the run does not measure is NaN.
    """

    step: int
    loss: float
    accuracy_big: float
    accuracy_small: float
    svdd_big: float
    svdd_small: float


class Training(NamedTuple):
    """What a training run leaves beside the encoder, which it has changed in place.

    Fields:
        history: the curves.
        big, small: the position classifiers of both patch sizes; None where the encoder
            has no such size.
        mean: (3, H, W), the mean of the training images.
    """

    history: list[Record]
    big: "PositionClassifier | None"
    small: "PositionClassifier | None"
    mean: Tensor


def fast_dtype(device: torch.device) -> torch.dtype:
    """Choose the dtype in which convolutions are fast: bfloat16 where the processor
    multiplies it, else float32.

    Source: this book. Departures: none.
    Test: test_patch_training.py::test_bfloat16_is_chosen_where_it_is_fast
    """
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and native() else torch.float32


class _Run(nn.Module):
    """All that a run trains: encoder, a classifier for each patch size, and for Deep
    SVDD each size's centre.
    """

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
        with _seeded_cpu(seed):
            if objective == "patch_svdd":
                for name in self.sizes:
                    made = PositionClassifier(
                        encoder.dimensions, train_last_weight=train_last_weight
                    )
                    self.add_module(name, made.to(weight))
        if objective == "centre":
            for name in self.sizes:
                self.register_buffer(
                    f"centre_{name}", weight.new_zeros(1, encoder.dimensions)
                )

    def classifier(self, name: str) -> PositionClassifier | None:
        return getattr(self, name, None)


Step = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class _Step(nn.Module):
    """A step's loss as a module's forward: what DistributedDataParallel takes, to
    average the gradients behind it.
    """

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
    world: int = 1,
) -> list[Record]:
    """Take the steps that are missing; a step's randomness follows from seed and
    number, so a run can stop anywhere.
    """
    history: list[Record] = []
    device = next(run.parameters()).device
    with fail_together(device if world > 1 else None):
        if checkpoint is not None and Path(checkpoint).exists():
            columns = len(Record._fields)
            progress = load_checkpoint(checkpoint, run, optimizers, recipe, columns)
            for row in progress["history"]:
                values = (math.nan if value is None else value for value in row)
                history.append(Record(*values))
    rates = [
        [group["lr"] for group in optimizer.param_groups] for optimizer in optimizers
    ]
    parameters = [
        parameter for parameter in run.parameters() if parameter.requires_grad
    ]
    taken = history[-1].step if history else 0
    if world > 1:
        of_all = torch.tensor([taken, -taken], device=parameters[0].device)
        distributed.all_reduce(of_all, distributed.ReduceOp.MAX)
        most, least = of_all.tolist()
        if most != -least:
            raise ValueError(
                f"the processes would go on from step {-least} to {most}, this one"
                f" from {taken}; the checkpoint {checkpoint} has to be the same file"
                " for all: give a folder that every machine sees, or delete it"
            )
    call = (
        step_loss
        if world == 1
        else DistributedDataParallel(_Step(run, step_loss), broadcast_buffers=False)
    )
    rows: list[Tensor] = []
    for step in range(taken, steps):
        loss, seen = call(
            step, torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        )
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, value in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = value * rate(step / steps)
            optimizer.step()
        nothing = loss.new_tensor(math.nan)
        rows.append(
            torch.stack(
                [
                    loss.detach(),
                    *(seen.get(name, nothing) for name in Record._fields[2:]),
                ]
            )
        )
        # read once a record: reading waits for a GPU
        if (step + 1) % every == 0 or step + 1 == steps:
            means = torch.stack(rows).mean(0)
            if world > 1:
                distributed.all_reduce(means.div_(world))
            history.append(Record(step + 1, *means.tolist()))
            rows = []
            if not math.isfinite(history[-1].loss):
                raise ValueError(
                    f"the loss is {history[-1].loss} at step {step + 1};"
                    " expected a number. Lower the learning rate"
                )
            if checkpoint is not None and (world == 1 or distributed.get_rank() == 0):
                told = [
                    [None if value != value else value for value in row]
                    for row in history
                ]
                save_checkpoint(checkpoint, run, optimizers, recipe, {"history": told})
            if on_record is not None:
                on_record(history[-1])
    for parameter in parameters:
        parameter.grad = None
    return history


# PyTorch has it from 2.9 on
class _MatrixMuon(getattr(torch.optim, "Muon", torch.optim.Optimizer)):
    """Muon for convolutions: weights (out, in, k, k) are taken as the matrix (out,
    in·k·k) that shares their memory.
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
    """Rise to 1 in the first 30 % and fall to 0, along cosines."""
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
    distribute: bool = False,
) -> Training:
    r"""Train encoders in place on the dense maps of large crops: minutes on a CPU.

    A step perturbs a few crops, embeds all of their patches at stride 2 in one pass
    (the flat encoder's at stride 8), and draws thousands of pairs from the maps.
    Weights follow Muon, biases and the classifiers' last layers Adam, both with one
    cycle of the learning rate. Equal arguments give equal weights on a CPU (with equal
    numbers of threads), also when the run was killed and called again; on a GPU they
    agree up to rounding.

    Args:
        encoder: hierarchical (both sizes at once), small or flat; fresh, or trained
            before.
        images: normal ones only, (N, 3, H, W), RGB in [0, 1]; their mean image is
            subtracted.
        steps: of the optimizer.
        crops: random crops a step, each of a random image.
        side: of a crop in pixels, at least 127; images that are smaller are taken
            whole.
        pairs: of each crop, each patch size and each loss.
        svdd_weight: λ. Larger pulls neighbours closer; far too large and all embeddings
            become one.
        objective: "patch_svdd" (λ L_SVDD' + L_SSL); for comparison "neighbors" (L_SVDD'
            alone) and "centre" (L_SVDD alone, with one centre a patch size, the mean
            embedding before training).
        optimizer: "muon", or "adam" for all weights, which is slower to learn here.
        learning_rate: at the top of the cycle; None for 0.02 with Muon (its vectors get
            0.15 of that), 0.003 with Adam.
        dtype: of the convolutions; None for `fast_dtype`. Weights and losses stay
            float32.
        seed: of the classifiers' first weights and of all draws.
        checkpoint: a file that is written at each record, and continued from where it
            exists.
        every: steps between records.
        on_record: called with each record, to show progress.
        distribute: True shares the crops of each step among the processes of
            `torch.distributed`, which all call this with the same arguments, and
            averages their gradients (DistributedDataParallel): every process ends with
            what one alone would have trained, up to rounding. The first one writes the
            checkpoint, and all go on from it: on several machines it has to lie in a
            folder that each of them sees.

    Returns:
        the curves, the classifiers and the mean image.

    Raises:
        ValueError: for images as `mean_image` refuses them or too small for a pair (127
            pixels), an unknown objective, numbers below 1, a checkpoint of another run,
            or a loss that is no longer finite; with `distribute`, where no process
            group is initialised, the crops can't be shared out evenly, or only some
            processes find the checkpoint.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 3-6 and Alg. 1.
    Departures: pairs are drawn on the map of one pass, so that corners and moves are
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
            f"optimizer='muon' takes PyTorch 2.9 or newer, this is {torch.__version__};"
            " pass 'adam'"
        )
    learning_rate = (
        LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
    )
    _check_numbers(steps=steps, crops=crops, pairs=pairs, every=every)
    rank, world = process_group() if distribute else (0, 1)
    with fail_together(next(encoder.parameters()).device if distribute else None):
        if crops % world:
            expected = f"expected a multiple of {world}, the same for each"
            raise ValueError(f"crops={crops} for {world} processes; {expected}")
        mean = mean_image(images)
        images = _matching(images, encoder)
    share = crops // world
    mine, my_pairs = (
        slice(rank * share * each, (rank + 1) * share * each) for each in (1, pairs)
    )
    size = tuple(min(side, length) for length in images.shape[-2:])
    # Muon's matrices share the memory
    encoder.to(memory_format=torch.contiguous_format)
    run = _Run(encoder, seed, objective)
    if objective == "centre":
        with torch.no_grad():
            for name, found in _by_size(
                encoder, encoder.dense(images[:32] - mean)
            ).items():
                getattr(run, f"centre_{name}").copy_(found.mean((0, 2, 3)))
    dtype = fast_dtype(images.device) if dtype is None else dtype

    def step_loss(
        step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Every process draws the whole step and takes its own share of it, so that
        # together they do what one would.
        crop = perturb(
            random_crops(images, mean, crops, size, generator),
            _on_device(generator, images.device),
        )[mine]
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            maps = encoder.dense(crop.contiguous(memory_format=torch.channels_last))
        loss, seen = images.new_zeros(()), {}
        for name, embedded in _by_size(encoder, maps).items():
            rows, patch = embedded.permute(0, 2, 3, 1).flatten(0, 2), run.sizes[name]

            def pick(corners: Tensor, rows=rows, shape=embedded.shape) -> Tensor:
                cells = corners[my_pairs] // encoder.step
                first = (
                    torch.arange(share).repeat_interleave(pairs) * shape[2] * shape[3]
                )
                index = first + cells[:, 0] * shape[3] + cells[:, 1]
                return rows.index_select(0, index.to(rows.device)).to(images.dtype)

            near = neighbor_pairs(
                crops * pairs, size, patch, generator, step=encoder.step
            )
            a = pick(near.first)
            b = (
                getattr(run, f"centre_{name}")
                if objective == "centre"
                else pick(near.second)
            )
            part, seen[f"svdd_{name}"] = _svdd_part(a, b)
            loss = loss + (svdd_weight if objective == "patch_svdd" else 1) * part
            if objective == "patch_svdd":
                drawn = position_pairs(
                    crops * pairs, size, patch, generator, step=encoder.step
                )
                position = drawn.position[my_pairs].to(rows.device)
                logits = run.classifier(name)(pick(drawn.first), pick(drawn.second))
                loss = loss + F.cross_entropy(logits, position)
                seen[f"accuracy_{name}"] = _accuracy(logits, position)
        return loss, seen

    # Muon gives all directions of a matrix the same size; that means nothing for a
    # vector, nor for weights that are normalised before use.
    last = {
        id(run.classifier(name).fc3.weight)
        for name in run.sizes
        if run.classifier(name)
    }
    matrices = [p for p in run.parameters() if p.ndim > 1 and id(p) not in last]
    others = [p for p in run.parameters() if p.ndim == 1 or id(p) in last]
    if optimizer == "muon":
        optimizers = [
            _MatrixMuon(matrices, lr=learning_rate),
            torch.optim.Adam(others, lr=0.15 * learning_rate),
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
        "images": _fingerprint(images),
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
) -> Training:
    """Train encoders in place as published: pairs of patches, each cut out, perturbed
    and run by itself.

    A step takes a batch of four sets at once: position pairs of both sizes, perturbed,
    and neighbours of both sizes, as they are. An encoder of one size is trained on the
    two sets of its size. Resumption and seeds are as in `train`.

    Args:
        encoder: hierarchical, small or flat.
        images: as in `train`.
        epochs: an epoch goes over all images `repeat` times in random order.
        repeat: pairs of an image, of each set, in an epoch.
        batch_size: pairs of each set in a step.
        svdd_weight: λ.
        learning_rate: Adam's, constant.
        as_released: True clips pairs at the border and leaves the last layer's weights
            of the classifiers as PyTorch draws them by default.
        seed: of the classifiers' first weights and of all draws.
        checkpoint: as in `train`.
        every: steps between records.
        on_record: called with each record, to show progress.

    Returns:
        the curves, the classifiers and the mean image.

    Raises:
        ValueError: as `train`.

    Source: Patch SVDD, arXiv:2006.16067, Alg. 1, and the released code.
    Departures: without `as_released` pairs stay inside the image, the classifiers' last
        layers are trained and start from Kaiming weights; the default λ is that of the
        released README (1e-3), not that of its code (1).
    Test: test_patch_training.py::test_published_training_takes_the_released_steps
    """
    _check_numbers(epochs=epochs, repeat=repeat, batch_size=batch_size, every=every)
    mean = mean_image(images)
    images = _matching(images, encoder)
    run, size = (
        _Run(encoder, seed, train_last_weight=not as_released),
        tuple(images.shape[-2:]),
    )
    if as_released:
        with _seeded_cpu(seed):
            for name in run.sizes:
                initialize(run.classifier(name), as_released=True)
    order_of = functools.lru_cache(1)(
        lambda epoch: _order(len(images) * repeat, seed, epoch) % len(images)
    )
    per_epoch = math.ceil(len(images) * repeat / batch_size)

    def step_loss(
        step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, batch = divmod(step, per_epoch)
        rows = order_of(epoch)[batch * batch_size : (batch + 1) * batch_size]
        loss, seen = images.new_zeros(()), {}
        for name, patch in run.sizes.items():
            embed = encoder if patch == encoder.side else encoder.small
            patches = functools.partial(crop_patches, images, mean, rows, patch)
            drawn = position_pairs(len(rows), size, patch, generator, clip=as_released)
            device_generator = _on_device(generator, images.device)
            first, second = (
                perturb(patches(corners), device_generator)
                for corners in (drawn.first, drawn.second)
            )
            position = drawn.position.to(images.device)
            logits = run.classifier(name)(embed(first), embed(second))
            near = neighbor_pairs(len(rows), size, patch, generator, clip=as_released)
            part, seen[f"svdd_{name}"] = _svdd_part(
                embed(patches(near.first)), embed(patches(near.second))
            )
            loss = loss + F.cross_entropy(logits, position) + svdd_weight * part
            seen[f"accuracy_{name}"] = _accuracy(logits, position)
        return loss, seen

    trained = [parameter for parameter in run.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.Adam(trained, lr=learning_rate)]
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
        "images": _fingerprint(images),
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
    """Measure how often the classifiers tell the position of patches of images that
    they have not seen.

    Args:
        encoder: trained.
        training: what `train` or `train_on_patches` returned with it.
        images: held out, of the size of the training images, RGB in [0, 1]; they are
            not perturbed.
        pairs: drawn of each image, at corners and moves that are multiples of the
            encoder's step.
        seed: of the draw.

    Returns:
        share of right answers for 64×64 and for 32×32 patches, NaN for a size that the
        encoder has not; chance is 1/8.

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
    right = {"big": [], "small": []}
    for image in images:
        for name, embedded in _by_size(
            encoder, encoder.dense(image[None] - training.mean)
        ).items():
            patch = BIG_PATCH if name == "big" else SMALL_PATCH
            drawn = position_pairs(pairs, size, patch, generator, step=encoder.step)
            first, second = (
                embedded[0][:, *(corners // encoder.step).T].T for corners in drawn[:2]
            )
            right[name].append(
                _accuracy(
                    getattr(training, name)(first, second),
                    drawn.position.to(embedded.device),
                )
            )
    return tuple(
        float(torch.stack(found).mean()) if found else math.nan
        for found in right.values()
    )


def progress_bar(steps: int) -> Callable[[Record], None]:
    """Make an `on_record` that keeps one line of standard output up to date: steps,
    loss, accuracies.

    Args:
        steps: of the whole run.

    Source: this book. Departures: none.
    Test: test_patch_training.py::test_the_progress_bar_tells_how_far_it_is
    """

    def show(record: Record) -> None:
        done = round(20 * record.step / steps)
        told = "".join(
            f", {name} {value:.0%}"
            for name, value in (
                ("K=64", record.accuracy_big),
                ("K=32", record.accuracy_small),
            )
            if value == value
        )
        end = "\n" if record.step >= steps else ""
        print(
            f"\r[{'#' * done}{'.' * (20 - done)}] {record.step}/{steps}"
            f"  loss {record.loss:.3f}{told}",
            end=end,
            flush=True,
        )

    return show


def _by_size(
    encoder: nn.Module, maps: Tensor | tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Name what an encoder's `dense` gives by the patches' size."""
    if isinstance(encoder, HierarchicalEncoder):
        small, big = maps
        return {"big": big, "small": small}
    return {"big" if encoder.side == BIG_PATCH else "small": maps}


def _accuracy(logits: Tensor, position: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == position).float().mean()


def _on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Give a generator on the images' device that continues the draw."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(
        int(torch.randint(2**62, (), generator=generator))
    )


@contextlib.contextmanager
def _seeded_cpu(seed: int) -> Iterator[None]:
    """Seed the CPU's default generator; restore it afterwards.

    `torch.manual_seed` is no substitute: it also seeds every GPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(
        count,
        generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63),
    )


def _fingerprint(images: Tensor) -> list:
    """Tell one set of images from another, by number, size and a sample of the pixels."""
    sample = images[:, :, ::16, ::16].float().cpu().contiguous()
    return [*images.shape, zlib.crc32(sample.numpy().tobytes())]


def _matching(images: Tensor, encoder: nn.Module) -> Tensor:
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
