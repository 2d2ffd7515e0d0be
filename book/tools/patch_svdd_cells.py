"""Train Patch SVDD's encoders on solar cells, compare them with random ones and take
the recipe apart (`make results`).

Real cells for detection (functional against defective), synthetic defects with masks
for localisation. Writes the encoder that chapter 04 evaluates,
book/data/results/patch_svdd_cells.safetensors, and the measurements beside it,
patch_svdd_cells.json. Every finished run is written at once and a run that the file
already holds is not repeated; an interrupted run resumes from its checkpoint in
`_build`. `--force` starts over.
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

# Columns of the curves in the file of results.
CURVES = ("step", "loss", "accuracy_big", "accuracy_small", "svdd_big", "svdd_small")
CHECKPOINTS = results.ROOT / "_build" / "patch_svdd_cells"
KINDS = ("mono", "poly")
SIDE, SEEDS = 256, 3
# Cells of each kind: of each class to test, in the bank, with a synthetic defect.
TEST, BANK, PAINTED = 40, 60, 12
CONTRAST = {"mono": 0.2, "poly": 0.3}  # of the synthetic defects
# twice the published stride: a quarter of the patches, which costs little accuracy and
# saves minutes
STRIDE_SMALL = 8
# Of a seed's encoder, of the committed one, of the comparisons.
STEPS, LONG, SHORT = 200, 500, 100
RECIPE = {
    "side": SIDE,
    "test of each class": TEST,
    "bank": BANK,
    "painted": PAINTED,
    "contrast": CONTRAST,
    "small stride": STRIDE_SMALL,
    "steps": STEPS,
    "steps, committed": LONG,
    "steps, comparisons": SHORT,
}
# Name → what is changed. λ = 0.001 is the recipe; all see the same crops.
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
    """What one seed works on: of each kind functional cells to fit and test, defective
    ones, and painted ones.
    """

    train: Tensor  # both kinds
    bank: dict[str, Tensor]
    test: dict[str, Tensor]  # TEST functional cells, then TEST defective ones
    painted: dict[str, Tensor]
    masks: dict[str, Tensor]


def load(seed: int) -> Cells:
    """Split the cells on which the experts agree; the first functional ones in random
    order are for the test.
    """
    train_parts, bank, test, painted, masks = [], {}, {}, {}, {}
    for kind in KINDS:
        cells, generator = elpv(kind), torch.Generator().manual_seed(seed)
        good, bad = (torch.nonzero(cells.probability == p).flatten() for p in (0, 1))
        good, bad = (
            of[torch.randperm(len(of), generator=generator)] for of in (good, bad)
        )
        train_parts.append(resized(cells.images[good[TEST:]]))
        bank[kind] = train_parts[-1][:BANK]
        test[kind] = resized(cells.images[torch.cat([good[:TEST], bad[:TEST]])])
        made = synthetic_defects(
            cells.images[good[:PAINTED]], contrast=CONTRAST[kind], seed=seed, size=SIDE
        )
        items = [made[i] for i in range(PAINTED)]
        painted[kind] = torch.stack([item.image for item in items])
        masks[kind] = torch.stack([item.mask for item in items])
    return Cells(torch.cat(train_parts), bank, test, painted, masks)


def resized(images: Tensor) -> Tensor:
    """Grey bytes (N, 300, 300) to RGB in [0, 1], (N, 3, SIDE, SIDE)."""
    pictures = F.interpolate(
        images[:, None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True
    )
    return pictures.clamp(0, 1).expand(-1, 3, -1, -1)


def evaluate(encoder: nn.Module, cells: Cells) -> dict:
    """Image AUROC on real cells and pixel AUROC on synthetic defects, of each kind and
    each map.
    """
    measured = {}
    for kind in KINDS:
        images = torch.cat(
            [
                cells.test[kind],
                cells.painted[kind],
                cells.test[kind][PAINTED : 2 * PAINTED],
            ]
        )
        maps = anomaly_maps(encoder, cells.bank[kind], images)
        labels = torch.arange(2 * TEST) >= TEST
        masks = torch.cat([cells.masks[kind], torch.zeros_like(cells.masks[kind])])
        for name, of in maps.items():
            measured[f"{kind} image {name}"] = auroc(
                labels, of[: 2 * TEST].amax((1, 2))
            )
            measured[f"{kind} pixel {name}"] = pixel_auroc(masks, of[2 * TEST :])
    return measured


def anomaly_maps(encoder: nn.Module, bank: Tensor, images: Tensor) -> dict[str, Tensor]:
    """All maps that an encoder gives; the flat one gives the big one only."""
    if isinstance(encoder, HierarchicalEncoder):
        return (
            PatchSVDD(encoder, stride_small=STRIDE_SMALL)
            .fit(bank)
            .anomaly_maps(images)
            ._asdict()
        )
    mean = bank.mean(0)
    kept, found = (encoder.embed(part - mean, BIG_STRIDE) for part in (bank, images))
    scores = nearest_distance(found.flatten(0, 2), kept.flatten(0, 2)).view(
        found.shape[:3]
    )
    return {"big": spread_patch_scores(scores, BIG_PATCH, BIG_STRIDE, SIDE)}


def fresh(seed: int, *, flat: bool = False, as_released: bool = False) -> nn.Module:
    """Make an encoder with random weights, ours or PyTorch's default."""
    torch.manual_seed(seed)
    encoder = FlatEncoder() if flat else HierarchicalEncoder()
    if as_released:
        initialize(encoder, as_released=True)
    return encoder


def learn(
    name: str, seed: int, steps: int, options: dict, cells: Cells, code: str
) -> tuple[nn.Module, dict]:
    """Train an encoder, or resume from its checkpoint; return it with its curves."""
    kinds = {
        key: value for key, value in options.items() if key in ("flat", "as_released")
    }
    others = {key: value for key, value in options.items() if key not in kinds}
    encoder = fresh(seed, **kinds)
    folder = CHECKPOINTS / code  # other code does not resume this run
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = (
        folder
        / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}.safetensors"
    )
    start = None if checkpoint.exists() else time.process_time()
    training = train(
        encoder,
        cells.train,
        steps=steps,
        seed=seed,
        shared_shift=True,  # grey cells have no tint that could be a shortcut
        checkpoint=checkpoint,
        progress=True,
        **others,
    )
    # None if it resumed from a checkpoint.
    found = {
        "steps": steps,
        "cpu_seconds": (start and round(time.process_time() - start, 1)),
        "curves": [
            [
                None if value != value else round(value, 4)
                for value in (getattr(record, name) for name in CURVES)
            ]
            for record in training.history
        ],
    }
    if training.big is not None:
        # Of 64×64 and of 32×32 patches of functional cells that were not trained on.
        found["positions"] = {}
        for kind, images in cells.test.items():
            shares = position_accuracy(encoder, training, images[:TEST])
            found["positions"][kind] = [
                None if value != value else round(value, 4)
                for value in (shares.big, shares.small)
            ]
    return encoder, found


def plan() -> list[tuple[str, int]]:
    """What there is to run, name and seed, the most important first."""
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


def run(name: str, seed: int, cells: Cells, kept: results.Results) -> dict:
    """Make one encoder and measure it."""
    code = kept.stamp["code"]
    if name.startswith("random"):
        encoder, found = fresh(seed, as_released=name != "random"), {}
    elif name in COMPARISONS:
        encoder, found = learn(name, seed, SHORT, COMPARISONS[name], cells, code)
    else:
        encoder, found = learn(
            name, seed, LONG if name == "committed" else STEPS, {}, cells, code
        )
    if name == "committed":
        encoder.save(kept.path.with_suffix(".safetensors"))
    rounded = {key: round(value, 5) for key, value in evaluate(encoder, cells).items()}
    return {"name": name, "seed": seed, **found, "auroc": rounded}


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    kept = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["name"], row["seed"]) for row in kept.runs}
    cells: dict[int, Cells] = {}
    for name, seed in plan():
        if (name, seed) in done:
            continue
        if seed not in cells:
            cells = {seed: load(seed)}  # one seed's at a time
        row = run(name, seed, cells[seed], kept)
        kept.runs.append(row)
        kept.save()
        told = {
            key: value
            for key, value in row["auroc"].items()
            if key.endswith(("mult", "image big"))
        }
        print(f"{name}, seed {seed}: {row.get('positions', '')} {told}", flush=True)


if __name__ == "__main__":
    main()
