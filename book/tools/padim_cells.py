"""Repeat PaDiM's Tables I, II and VI, and SPADE's way, on solar cells over several
seeds (`make results`).

Real cells for detection (functional against defective), synthetic defects with masks
for localisation. Writes book/data/results/padim_cells.json, which chapter 05 draws.
Every finished part is written at once, and a part that the file already holds is not
repeated, so an interrupted command goes on where it stopped; `--force` starts over.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import results
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, rotate

from paperlib import backbones
from paperlib.anomaly_map import gaussian_blur, upsample
from paperlib.backbones import FeatureExtractor, concatenate_embeddings
from paperlib.datasets import elpv, synthetic_defects
from paperlib.metrics import aupro, auroc, pixel_auroc
from paperlib.neighbors import nearest_distance
from paperlib.padim import PatchGaussian, mahalanobis_distance

SEEDS = 5
# Cells: to fit, held back, of each class to test, with a painted defect.
TRAIN, SPARE, TEST, PAINTED = 150, 50, 75, 24
CONTRAST = {"mono": 0.1, "poly": 0.2}  # of the synthetic defects: where it is hard
DIMENSIONS = (10, 25, 50, 100)
DRAWS = 10
# the training cells in which SPADE's way looks for the nearest embedding
NEAREST_IMAGES = 10
CHUNK = 25
RECIPE = {
    "backbone": "efficientnet_lite0",
    "train": TRAIN,
    "test of each class": TEST,
    "painted": PAINTED,
    "contrast": CONTRAST,
    "nearest images": NEAREST_IMAGES,
}
Maps = list[Tensor]


class Cells(NamedTuple):
    """What one seed works on: the feature maps of cells to fit and to test, and of
    synthetic defects with masks.
    """

    train: Maps
    real: Maps
    labels: Tensor
    painted: Maps
    masks: Tensor


class Features:
    """A backbone's feature maps of pictures, one at a time: a CPU is fastest so."""

    def __init__(self):
        self.backbone = backbones.load("efficientnet_lite0")
        self.extract = FeatureExtractor(*self.backbone[:2])

    def __call__(self, images: Sequence[Tensor]) -> Maps:
        parts = [self.extract(self.backbone.transform(image[None])) for image in images]
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def split(probability: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw indices of functional cells to fit, functional cells to test, and defective
    cells.
    """
    generator = torch.Generator().manual_seed(seed)
    good, bad = (torch.nonzero(probability == p).flatten() for p in (0, 1))
    good, bad = (of[torch.randperm(len(of), generator=generator)] for of in (good, bad))
    return good[:TRAIN], good[TRAIN + SPARE : TRAIN + SPARE + TEST], bad[:TEST]


def paint(images: Tensor, kind: str, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Paint a synthetic defect on each of some cells; return the pictures and their
    masks.
    """
    items = list(
        map(
            synthetic_defects(
                images, contrast=CONTRAST[kind], seed=seed, size=size
            ).__getitem__,
            range(len(images)),
        )
    )
    return torch.stack([item.image for item in items]), torch.stack(
        [item.mask for item in items]
    )


def embed(maps: Maps, channels: Tensor | None = None) -> Tensor:
    """(N, P, D) of feature maps."""
    return concatenate_embeddings(maps, channels).flatten(2).transpose(1, 2)


def evaluate(cells: Cells, represent: Callable[[Maps], Tensor]) -> dict:
    """Fit a Gaussian for each position to `represent(maps)` of the training cells, and
    measure.
    """
    real, painted = anomaly_maps(cells, represent)
    return measure(cells, real, painted)


def anomaly_maps(
    cells: Cells, represent: Callable[[Maps], Tensor]
) -> tuple[Tensor, Tensor]:
    """PaDiM's maps of real and of painted cells."""
    x = represent(cells.train)
    gaussian = PatchGaussian(*x.shape[1:]).update(x)
    mean, factor = gaussian.mean(), torch.linalg.cholesky(gaussian.covariance())

    def score(maps: Maps) -> Tensor:
        return smooth(mahalanobis_distance(represent(maps), mean, factor))

    return tuple(
        torch.cat([score(part) for part in chunks(maps)])
        for maps in (cells.real, cells.painted)
    )


def smooth(distances: Tensor) -> Tensor:
    """Enlarge and blur distances (N, P) of a square grid."""
    side = round(distances.shape[1] ** 0.5)
    return gaussian_blur(upsample(distances.unflatten(1, (side, side)), 224))


def chunks(maps: Maps) -> Iterator[Maps]:
    """A few images at a time."""
    return map(list, zip(*(layer.split(CHUNK) for layer in maps), strict=True))


def measure(cells: Cells, real: Tensor, painted: Tensor) -> dict:
    """Image AUROC on real cells, pixel AUROC and PRO on synthetic defects."""
    return {
        "image": auroc(cells.labels, real.amax((1, 2))),
        "pixel": pixel_auroc(cells.masks, painted),
        "pro": aupro(cells.masks, painted),
    }


def reductions(cells: Cells, seed: int) -> Iterator[tuple[str, int, dict]]:
    """Tables I and II: layers alone, added and joint; random channels, and most and
    least varying directions.
    """
    layers = [
        anomaly_maps(cells, lambda maps, k=k: maps[k].flatten(2).transpose(1, 2))
        for k in range(3)
    ]
    for number, maps in enumerate(layers, start=1):
        yield f"layer {number}", cells.train[number - 1].shape[1], measure(cells, *maps)
    yield (
        "layers added",
        0,
        measure(cells, *(sum(maps) for maps in zip(*layers, strict=True))),
    )
    x = embed(cells.train)
    total = x.shape[2]
    yield "all", total, evaluate(cells, embed)
    _, axes = torch.linalg.eigh(
        PatchGaussian(1, total).update(x.reshape(-1, 1, total)).covariance(0)[0]
    )
    del x
    for d in DIMENSIONS:
        yield (
            "random",
            d,
            evaluate(cells, lambda maps, d=d: embed(maps, draw(total, d, seed))),
        )
        yield "PCA", d, evaluate(cells, lambda maps, d=d: embed(maps) @ axes[:, -d:])
        yield (
            "least variance",
            d,
            evaluate(cells, lambda maps, d=d: embed(maps) @ axes[:, :d]),
        )


def draw(total: int, d: int, seed: int) -> Tensor:
    """Draw d of all channels, as `PaDiM` does."""
    return (
        torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:d]
        .sort()
        .values
    )


def neighbours(cells: Cells) -> Iterator[tuple[str, int, dict]]:
    """SPADE's way: the nearest training cells by their pooled last map, then the
    nearest embedding in them.
    """
    gallery = cells.train[-1].mean((2, 3))
    found = [
        torch.cdist(maps[-1].mean((2, 3)), gallery).topk(NEAREST_IMAGES, largest=False)
        for maps in (cells.real, cells.painted)
    ]
    distances = []
    for i, images in enumerate(found[1].indices):
        bank = embed([layer[images] for layer in cells.train]).flatten(0, 1)
        distances.append(
            nearest_distance(
                embed([layer[i : i + 1] for layer in cells.painted])[0], bank
            )
        )
    scores = measure(
        cells, found[0].values.mean(1)[:, None, None], smooth(torch.stack(distances))
    )
    yield "nearest neighbours", sum(layer.shape[1] for layer in cells.train), scores


def turned(
    images: Tensor, masks: Tensor, seed: int, most: float
) -> tuple[Tensor, Tensor]:
    """Resize to 256, turn by up to `most` degrees and crop 224: anywhere, or the middle
    where nothing is turned.
    """
    generator, shown = torch.Generator().manual_seed(seed), []
    for image, mask in zip(images, masks, strict=True):
        both = torch.cat(
            [
                F.interpolate(image[None], (256, 256), mode="bilinear", antialias=True)[
                    0
                ].clamp(0, 1),
                F.interpolate(mask[None, None].float(), (256, 256))[0],
            ]
        )
        if most:
            angle = float(torch.rand((), generator=generator) * 2 - 1) * most
            both = torch.cat(
                [
                    rotate(both[:3], angle, InterpolationMode.BILINEAR),
                    rotate(both[3:], angle),
                ]
            )
        top, left = (
            torch.randint(33, (2,), generator=generator).tolist() if most else (16, 16)
        )
        shown.append(both[:, top : top + 224, left : left + 224])
    shown = torch.stack(shown)
    return shown[:, :3].clamp(0, 1), shown[:, 3] > 0.5


def load(kind: str, seed: int, features: Features, most: float | None = None) -> Cells:
    """Compute the feature maps of one seed's cells, turned by up to `most` degrees;
    None takes the pictures whole.
    """
    cells = elpv(kind)
    train, good, bad = split(cells.probability, seed)
    pictures = [
        cells.images[i, None].float().div(255).expand(-1, 3, -1, -1)
        for i in (train, torch.cat([good, bad]))
    ]
    painted, masks = paint(
        cells.images[good[:PAINTED]], kind, seed, size=224 if most is None else 300
    )
    whole = (
        cells.images[good[PAINTED : 2 * PAINTED], None]
        .float()
        .div(255)
        .expand(-1, 3, -1, -1)
    )
    sets = [*pictures, painted, whole]
    marks = [torch.zeros(len(s), *s.shape[2:], dtype=torch.bool) for s in sets]
    marks[2] = masks
    if most is None:
        marks[3] = torch.zeros_like(masks)
    else:
        sets, marks = zip(
            *(
                turned(s, m, 4 * seed + i, most)
                for i, (s, m) in enumerate(zip(sets, marks, strict=True))
            ),
            strict=True,
        )
    fit, real, *rest = map(features, sets)
    labels = torch.arange(2 * TEST) >= TEST
    return Cells(
        fit,
        real,
        labels,
        [torch.cat(layers) for layers in zip(*rest, strict=True)],
        torch.cat(marks[2:]),
    )


def parts(
    features: Features,
) -> Iterator[tuple[dict, Callable[[], Iterator[tuple[str, int, dict]]]]]:
    """What there is to run: a name for each part, and what gives its rows."""
    for seed in range(SEEDS):
        for kind in CONTRAST:
            yield (
                {"experiment": "tables", "kind": kind, "seed": seed},
                lambda kind=kind, seed=seed: reductions(
                    load(kind, seed, features), seed
                ),
            )
            for name, most in (("upright", 0.0), ("turned", 10.0)):

                def aligned(kind=kind, seed=seed, most=most):
                    cells = load(kind, seed, features, most)
                    yield (
                        "random",
                        100,
                        evaluate(cells, lambda maps: embed(maps, draw(176, 100, seed))),
                    )

                yield {"experiment": name, "kind": kind, "seed": seed}, aligned
            yield (
                {"experiment": "neighbours", "kind": kind, "seed": seed},
                lambda kind=kind, seed=seed: neighbours(load(kind, seed, features)),
            )
    for kind in CONTRAST:

        def draws(kind=kind):
            cells = load(kind, 0, features)
            for number in range(DRAWS):
                yield (
                    f"draw {number}",
                    100,
                    evaluate(
                        cells, lambda maps, n=number: embed(maps, draw(176, 100, n))
                    ),
                )

        yield {"experiment": "draws", "kind": kind, "seed": 0}, draws


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing."""
    found = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["experiment"], row["kind"], row["seed"]) for row in found.runs}
    for names, rows in parts(Features()):
        if tuple(names.values()) in done:
            continue
        for method, dimensions, measured in rows():
            rounded = {key: round(value, 5) for key, value in measured.items()}
            found.runs.append(
                {**names, "method": method, "dimensions": dimensions, **rounded}
            )
            print(*found.runs[-1].values(), flush=True)
        found.save()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
