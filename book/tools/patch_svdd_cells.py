"""Train Patch SVDD on solar cells: random encoders, ablations (`make results`).

Detection is measured on functional and defective cells, localisation on synthetic
defects with masks. Writes the encoder that chapter 04 evaluates to
book/data/results/patch_svdd_cells.safetensors, and the measurements to
patch_svdd_cells.json in the same folder. Each run is saved when it is done, and runs
that the file contains are skipped; an interrupted run is resumed from its checkpoint in
`_build`. `--force` repeats all runs.
"""

import time
from typing import NamedTuple

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.anomaly_map import spread_patch_scores
from paperlib.datasets import elpv, synthetic_defects
from paperlib.metrics import auroc, pixel_auroc
from paperlib.neighbors import nearest_distance
from paperlib.patch_svdd import (
    BIG_PATCH,
    BIG_STRIDE,
    FlatEncoder,
    HierarchicalEncoder,
    PatchSVDD,
    initialize,
    position_accuracy,
    train,
)

# Columns of the training curves in the result file.
CURVES = ("step", "loss", "accuracy_big", "accuracy_small", "svdd_big", "svdd_small")
CHECKPOINTS = results.ROOT / "_build" / "patch_svdd_cells"
KINDS = ("mono", "poly")
SIDE, SEEDS = 256, 3
# Cells per kind: for the test per class, in the bank, with synthetic defects.
TEST, BANK, SYNTHETIC = 40, 60, 12
CONTRAST = {"mono": 0.2, "poly": 0.3}  # of the synthetic defects
# Twice the published stride: a quarter of the patches, which saves minutes for little
# loss of accuracy.
STRIDE_SMALL = 8
# Training steps of a seed's encoder, of the committed one, and of the comparisons.
STEPS, LONG, SHORT = 200, 500, 100
RECIPE = {
    "side": SIDE,
    "test of each class": TEST,
    "bank": BANK,
    "painted": SYNTHETIC,
    "contrast": CONTRAST,
    "small stride": STRIDE_SMALL,
    "steps": STEPS,
    "steps, committed": LONG,
    "steps, comparisons": SHORT,
}
# Name → changed arguments of the recipe, whose λ is 0.001. All use the same crops.
COMPARISONS = {
    "L_SVDD": {"objective": "centre"},
    "L_SVDD'": {"objective": "neighbors"},
    **{
        f"λ = {weight:g}": {"svdd_weight": weight}
        for weight in (0, 1e-3, 1e-2, 1e-1, 1)
    },
    "Adam": {"optimizer": "adam"},
    "PyTorch's first weights": {"as_released": True},
    "flat": {"flat": True},
}


class Cells(NamedTuple):
    """The images of a seed, per kind: for training, bank and test, and with defects."""

    train: Tensor  # both kinds
    bank: dict[str, Tensor]
    test: dict[str, Tensor]  # TEST functional cells, then TEST defective ones
    synthetic: dict[str, Tensor]
    masks: dict[str, Tensor]


def load(seed: int) -> Cells:
    """Split the cells on which the experts agree, in random order."""
    train_images, bank, test, synthetic, masks = [], {}, {}, {}, {}
    for kind in KINDS:
        cells, generator = elpv(kind), torch.Generator().manual_seed(seed)
        good, bad = (torch.nonzero(cells.probability == p).flatten() for p in (0, 1))
        good, bad = (
            rows[torch.randperm(len(rows), generator=generator)] for rows in (good, bad)
        )
        train_images.append(resize(cells.images[good[TEST:]]))
        bank[kind] = train_images[-1][:BANK]
        test[kind] = resize(cells.images[torch.cat([good[:TEST], bad[:TEST]])])
        dataset = synthetic_defects(
            cells.images[good[:SYNTHETIC]],
            contrast=CONTRAST[kind],
            seed=seed,
            size=SIDE,
        )
        items = [dataset[i] for i in range(SYNTHETIC)]
        synthetic[kind] = torch.stack([item.image for item in items])
        masks[kind] = torch.stack([item.mask for item in items])
    return Cells(torch.cat(train_images), bank, test, synthetic, masks)


def resize(images: Tensor) -> Tensor:
    """Convert grey bytes (N, 300, 300) to RGB in [0, 1], (N, 3, SIDE, SIDE)."""
    resized = F.interpolate(
        images[:, None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True
    )
    return resized.clamp(0, 1).expand(-1, 3, -1, -1)


def evaluate(encoder: nn.Module, cells: Cells) -> dict:
    """Measure the AUROC of images and pixels, per kind of cell and per map."""
    areas = {}
    for kind in KINDS:
        images = torch.cat(
            [
                cells.test[kind],
                cells.synthetic[kind],
                cells.test[kind][SYNTHETIC : 2 * SYNTHETIC],
            ]
        )
        maps = anomaly_maps(encoder, cells.bank[kind], images)
        labels = torch.arange(2 * TEST) >= TEST
        masks = torch.cat([cells.masks[kind], torch.zeros_like(cells.masks[kind])])
        for name, values in maps.items():
            scores = values[: 2 * TEST].amax((1, 2))
            areas[f"{kind} image {name}"] = auroc(labels, scores)
            areas[f"{kind} pixel {name}"] = pixel_auroc(masks, values[2 * TEST :])
    return areas


def anomaly_maps(encoder: nn.Module, bank: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Compute all maps of an encoder; a flat one has only the map of big patches."""
    if isinstance(encoder, HierarchicalEncoder):
        return (
            PatchSVDD(encoder, stride_small=STRIDE_SMALL)
            .fit(bank)
            .anomaly_maps(images)
            ._asdict()
        )
    mean = bank.mean(0)
    references, queries = (
        encoder.embed(batch - mean, BIG_STRIDE) for batch in (bank, images)
    )
    distances = nearest_distance(queries.flatten(0, 2), references.flatten(0, 2))
    scores = distances.view(queries.shape[:3])
    return {"big": spread_patch_scores(scores, BIG_PATCH, BIG_STRIDE, SIDE)}


def random_encoder(
    seed: int, *, flat: bool = False, as_released: bool = False
) -> nn.Module:
    """Create an encoder with random weights, Kaiming's or PyTorch's default."""
    torch.manual_seed(seed)
    encoder = FlatEncoder() if flat else HierarchicalEncoder()
    if as_released:
        initialize(encoder, as_released=True)
    return encoder


def train_encoder(
    name: str, seed: int, steps: int, options: dict, cells: Cells, code: str
) -> tuple[nn.Module, dict]:
    """Train an encoder, or resume from its checkpoint; return it and its curves."""
    encoder_options = {
        key: value for key, value in options.items() if key in ("flat", "as_released")
    }
    train_options = {
        key: value for key, value in options.items() if key not in encoder_options
    }
    encoder = random_encoder(seed, **encoder_options)
    folder = CHECKPOINTS / code  # only the same code may resume
    folder.mkdir(parents=True, exist_ok=True)
    stem = "".join(c if c.isalnum() else "_" for c in name)
    checkpoint = folder / f"{stem}_{seed}.safetensors"
    start = None if checkpoint.exists() else time.process_time()
    training = train(
        encoder,
        cells.train,
        steps=steps,
        seed=seed,
        shared_shift=True,  # grey cells have no tint that could be a shortcut
        checkpoint=checkpoint,
        progress=True,
        **train_options,
    )
    record = {
        "steps": steps,
        # None if the run was resumed.
        "cpu_seconds": (start and round(time.process_time() - start, 1)),
        "curves": [
            [
                None if value != value else round(value, 4)
                for value in (getattr(entry, column) for column in CURVES)
            ]
            for entry in training.history
        ],
    }
    if training.big is not None:
        # Accuracy for 64×64 and 32×32 patches of functional cells outside the training
        # set.
        record["positions"] = {}
        for kind, images in cells.test.items():
            shares = position_accuracy(encoder, training, images[:TEST])
            record["positions"][kind] = [
                None if value != value else round(value, 4)
                for value in (shares.big, shares.small)
            ]
    return encoder, record


def plan() -> list[tuple[str, int]]:
    """List all runs by name and seed, the most important first."""
    default = "random, PyTorch's first weights"
    return [
        ("random", 0),
        ("trained", 0),
        ("committed", 0),
        ("random", 1),
        ("trained", 1),
        (default, 0),
        *((name, 0) for name in COMPARISONS),
        *((name, 2) for name in ("random", "trained")),
    ]


def run(name: str, seed: int, cells: Cells, stored: results.Results) -> dict:
    """Create an encoder and measure it."""
    code = stored.stamp["code"]
    if name.startswith("random"):
        encoder, record = random_encoder(seed, as_released=name != "random"), {}
    elif name in COMPARISONS:
        encoder, record = train_encoder(
            name, seed, SHORT, COMPARISONS[name], cells, code
        )
    else:
        encoder, record = train_encoder(
            name, seed, LONG if name == "committed" else STEPS, {}, cells, code
        )
    if name == "committed":
        encoder.save(stored.path.with_suffix(".safetensors"))
    rounded = {key: round(value, 5) for key, value in evaluate(encoder, cells).items()}
    return {"name": name, "seed": seed, **record, "auroc": rounded}


def main(arguments: list[str] | None = None) -> None:
    """Run the missing combinations of name and seed."""
    stored = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["name"], row["seed"]) for row in stored.runs}
    cells: dict[int, Cells] = {}
    for name, seed in plan():
        if (name, seed) in done:
            continue
        if seed not in cells:
            cells = {seed: load(seed)}  # those of one seed, to save memory
        row = run(name, seed, cells[seed], stored)
        stored.runs.append(row)
        stored.save()
        areas = {
            key: value
            for key, value in row["auroc"].items()
            if key.endswith(("mult", "image big"))
        }
        print(f"{name}, seed {seed}: {row.get('positions', '')} {areas}", flush=True)


if __name__ == "__main__":
    main()
