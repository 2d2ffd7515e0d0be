"""Repeat PaDiM's Tables I, II and VI, and SPADE, on solar cells (`make results`).

Detection is measured on functional and defective cells, localisation on synthetic
defects with masks, both over several seeds. Writes book/data/results/padim_cells.json,
which chapter 05 plots. Each experiment is saved when it is done, and experiments that
the file contains are skipped, so an interrupted command can be resumed; `--force`
repeats all of them.
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
# Cells: for training, unused, for the test per class, with synthetic defects.
TRAIN, SPARE, TEST, SYNTHETIC = 150, 50, 75, 24
CONTRAST = {"mono": 0.1, "poly": 0.2}  # of the synthetic defects; low, to be difficult
DIMENSIONS = (10, 25, 50, 100)
DRAWS = 10
# training cells in which SPADE searches the nearest embedding
NEAREST_IMAGES = 10
CHUNK = 25  # images scored at once
RECIPE = {
    "backbone": "efficientnet_lite0",
    "train": TRAIN,
    "test of each class": TEST,
    "painted": SYNTHETIC,
    "contrast": CONTRAST,
    "nearest images": NEAREST_IMAGES,
}
Maps = list[Tensor]


class Cells(NamedTuple):
    """The feature maps of a seed's training cells, test cells and synthetic defects."""

    train: Maps
    real: Maps
    labels: Tensor
    synthetic: Maps
    masks: Tensor


class Features:
    """A backbone's feature maps, computed image by image, which is fastest on a CPU."""

    def __init__(self):
        self.backbone = backbones.load("efficientnet_lite0")
        self.extract = FeatureExtractor(*self.backbone[:2])

    def __call__(self, images: Sequence[Tensor]) -> Maps:
        maps = [self.extract(self.backbone.transform(image[None])) for image in images]
        return [torch.cat(layer) for layer in zip(*maps, strict=True)]


def split(probability: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the indices of training cells, functional test cells and defective cells."""
    generator = torch.Generator().manual_seed(seed)
    good, bad = (torch.nonzero(probability == p).flatten() for p in (0, 1))
    good, bad = (
        rows[torch.randperm(len(rows), generator=generator)] for rows in (good, bad)
    )
    return good[:TRAIN], good[TRAIN + SPARE : TRAIN + SPARE + TEST], bad[:TEST]


def paint(images: Tensor, kind: str, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Paint a synthetic defect on each cell; return the images and the masks."""
    dataset = synthetic_defects(images, contrast=CONTRAST[kind], seed=seed, size=size)
    items = [dataset[index] for index in range(len(images))]
    painted = torch.stack([item.image for item in items])
    return painted, torch.stack([item.mask for item in items])


def embed(maps: Maps, channels: Tensor | None = None) -> Tensor:
    """Concatenate feature maps to embeddings (N, P, D)."""
    return concatenate_embeddings(maps, channels).flatten(2).transpose(1, 2)


def evaluate(cells: Cells, represent: Callable[[Maps], Tensor]) -> dict:
    """Fit Gaussians to `represent(maps)` of the training cells, and measure."""
    real, synthetic = anomaly_maps(cells, represent)
    return measure(cells, real, synthetic)


def anomaly_maps(
    cells: Cells, represent: Callable[[Maps], Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute PaDiM's maps of the test cells and of the synthetic defects."""
    x = represent(cells.train)
    gaussian = PatchGaussian(*x.shape[1:]).update(x)
    mean, factor = gaussian.mean(), torch.linalg.cholesky(gaussian.covariance())

    def score(maps: Maps) -> Tensor:
        return smooth(mahalanobis_distance(represent(maps), mean, factor))

    return tuple(
        torch.cat([score(chunk) for chunk in chunks(maps)])
        for maps in (cells.real, cells.synthetic)
    )


def smooth(distances: Tensor) -> Tensor:
    """Enlarge and blur distances (N, P) of a square grid."""
    side = round(distances.shape[1] ** 0.5)
    return gaussian_blur(upsample(distances.unflatten(1, (side, side)), 224))


def chunks(maps: Maps) -> Iterator[Maps]:
    """Yield the maps of a few images at a time."""
    return map(list, zip(*(layer.split(CHUNK) for layer in maps), strict=True))


def measure(cells: Cells, real: Tensor, synthetic: Tensor) -> dict:
    """Measure image AUROC on real cells, pixel AUROC and PRO on synthetic defects."""
    return {
        "image": auroc(cells.labels, real.amax((1, 2))),
        "pixel": pixel_auroc(cells.masks, synthetic),
        "pro": aupro(cells.masks, synthetic),
    }


def reductions(cells: Cells, seed: int) -> Iterator[tuple[str, int, dict]]:
    """Repeat Tables I and II.

    Table I compares single layers, the sum of their maps, and concatenated layers;
    Table II compares random channels with the directions of largest and of smallest
    variance.
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
    """Run SPADE: find the nearest training cells, then the nearest embeddings in them.

    The distance between cells is that of their average-pooled last maps.
    """
    gallery = cells.train[-1].mean((2, 3))
    nearest_real, nearest_synthetic = (
        torch.cdist(maps[-1].mean((2, 3)), gallery).topk(NEAREST_IMAGES, largest=False)
        for maps in (cells.real, cells.synthetic)
    )
    distances = []
    for i, images in enumerate(nearest_synthetic.indices):
        bank = embed([layer[images] for layer in cells.train]).flatten(0, 1)
        distances.append(
            nearest_distance(
                embed([layer[i : i + 1] for layer in cells.synthetic])[0], bank
            )
        )
    scores = measure(
        cells,
        nearest_real.values.mean(1)[:, None, None],
        smooth(torch.stack(distances)),
    )
    yield "nearest neighbours", sum(layer.shape[1] for layer in cells.train), scores


def rotate_and_crop(
    images: Tensor, masks: Tensor, seed: int, max_angle: float
) -> tuple[Tensor, Tensor]:
    """Resize to 256, rotate by up to `max_angle` degrees and crop 224 pixels.

    The crop is random; without a rotation it is central.
    """
    generator, crops = torch.Generator().manual_seed(seed), []
    for image, mask in zip(images, masks, strict=True):
        both = torch.cat(
            [
                F.interpolate(image[None], (256, 256), mode="bilinear", antialias=True)[
                    0
                ].clamp(0, 1),
                F.interpolate(mask[None, None].float(), (256, 256))[0],
            ]
        )
        if max_angle:
            angle = float(torch.rand((), generator=generator) * 2 - 1) * max_angle
            both = torch.cat(
                [
                    rotate(both[:3], angle, InterpolationMode.BILINEAR),
                    rotate(both[3:], angle),
                ]
            )
        top, left = (
            torch.randint(33, (2,), generator=generator).tolist()
            if max_angle
            else (16, 16)
        )
        crops.append(both[:, top : top + 224, left : left + 224])
    crops = torch.stack(crops)
    return crops[:, :3].clamp(0, 1), crops[:, 3] > 0.5


def load(
    kind: str, seed: int, features: Features, max_angle: float | None = None
) -> Cells:
    """Compute the feature maps of a seed's cells.

    The cells are rotated by up to `max_angle` degrees and cropped; None does neither.
    """
    cells = elpv(kind)
    train, good, bad = split(cells.probability, seed)
    without_defect = good[SYNTHETIC : 2 * SYNTHETIC]
    train_images, test_images, plain_images = (
        cells.images[rows, None].float().div(255).expand(-1, 3, -1, -1)
        for rows in (train, torch.cat([good, bad]), without_defect)
    )
    synthetic_images, synthetic_masks = paint(
        cells.images[good[:SYNTHETIC]],
        kind,
        seed,
        size=224 if max_angle is None else 300,
    )
    sets = [train_images, test_images, synthetic_images, plain_images]
    masks = [torch.zeros(len(s), *s.shape[2:], dtype=torch.bool) for s in sets]
    masks[2] = synthetic_masks
    if max_angle is None:
        masks[3] = torch.zeros_like(synthetic_masks)
    else:
        sets, masks = zip(
            *(
                rotate_and_crop(s, m, 4 * seed + i, max_angle)
                for i, (s, m) in enumerate(zip(sets, masks, strict=True))
            ),
            strict=True,
        )
    train_maps, real_maps, *synthetic_and_plain = map(features, sets)
    return Cells(
        train_maps,
        real_maps,
        torch.arange(2 * TEST) >= TEST,
        [torch.cat(layers) for layers in zip(*synthetic_and_plain, strict=True)],
        torch.cat(masks[2:]),
    )


def experiments(
    features: Features,
) -> Iterator[tuple[dict, Callable[[], Iterator[tuple[str, int, dict]]]]]:
    """List the experiments: the key of each, and a function that yields its rows."""
    for seed in range(SEEDS):
        for kind in CONTRAST:
            yield (
                {"experiment": "tables", "kind": kind, "seed": seed},
                lambda kind=kind, seed=seed: reductions(
                    load(kind, seed, features), seed
                ),
            )
            for name, max_angle in (("upright", 0.0), ("turned", 10.0)):

                def rotated(kind=kind, seed=seed, max_angle=max_angle):
                    cells = load(kind, seed, features, max_angle)
                    yield (
                        "random",
                        100,
                        evaluate(cells, lambda maps: embed(maps, draw(176, 100, seed))),
                    )

                yield {"experiment": name, "kind": kind, "seed": seed}, rotated
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
    """Run the missing experiments."""
    stored = results.Results(__file__, RECIPE, force=results.forced(__doc__, arguments))
    done = {(row["experiment"], row["kind"], row["seed"]) for row in stored.runs}
    for key, rows in experiments(Features()):
        if tuple(key.values()) in done:
            continue
        for method, dimensions, metrics in rows():
            rounded = {name: round(value, 5) for name, value in metrics.items()}
            stored.runs.append(
                {**key, "method": method, "dimensions": dimensions, **rounded}
            )
            print(*stored.runs[-1].values(), flush=True)
        stored.save()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
