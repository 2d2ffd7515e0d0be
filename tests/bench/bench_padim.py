"""PaDiM's fit and scoring from raw feature maps, each contender with its own joining.

ResNet-18's shapes (64, 128 and 256 channels at 56², 28², 14²), d = 100, random
features.

- paperlib: `PaDiM` with an extractor that hands out the maps, in batches of 32.
- the review's way: maps joined by unfold and fold, all channels before 100 are
  selected; `np.cov` in a loop over positions; to score, every covariance inverted
  again, SciPy's distance one image and position after the other.
- anomalib: its own joining, Gaussian and anomaly map.
- the backbone: ResNet-18 with random weights as far as layer3, which the rest of PaDiM
  should stay below.
"""

import functools
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from measure import OURS, USUAL, Contender, Part, peer
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

from paperlib.backbones import FeatureExtractor
from paperlib.padim import PaDiM

RESNET18 = ((64, 56), (128, 28), (256, 14))
WIDE_RESNET50 = ((256, 56), (512, 28), (1024, 14))
SIDE, BATCH = 224, 32
BACKBONE = "the backbone alone"


class HandedOut(FeatureExtractor):
    """Returns stored maps; the first pixel of a batch holds the index of the first."""

    def __init__(self, maps: list[Tensor]):
        super().__init__(
            nn.Sequential(*(nn.Identity() for _ in maps)),
            [str(i) for i in range(len(maps))],
        )
        self.maps = maps

    def forward(self, images: Tensor) -> list[Tensor]:
        start = int(images[0, 0, 0, 0])
        return [part[start : start + len(images)] for part in self.maps]


def images(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.tensor(float(start), device=device).expand(stop - start, 3, SIDE, SIDE)


def features(n: int, shapes: tuple, seed: int) -> list[Tensor]:
    """Feature maps of n images; channels are mixed, so that covariances are no
    diagonal.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, c, side, side, generator=generator) for c, side in shapes]
    return [part.add_(0.5 * part.roll(1, 1)) for part in made]


# ---- the review's way, written from its description ----


def unfold_and_fold(large: Tensor, small: Tensor) -> Tensor:
    """Join two maps: each cell of the small one beside the cells of the large one that
    it covers.
    """
    n, c, h, w = large.shape
    s = h // small.shape[2]
    patches = F.unfold(large, s, stride=s).view(n, c, s * s, *small.shape[2:])
    beside = small[:, :, None].expand(-1, -1, s * s, -1, -1)
    both = torch.cat([patches, beside], 1)
    return F.fold(
        both.reshape(n, -1, small.shape[2] * small.shape[3]), (h, w), s, stride=s
    )


def usual_embedding(maps: list[Tensor], channels: Tensor) -> np.ndarray:
    joined = maps[0]
    for part in maps[1:]:
        joined = unfold_and_fold(joined, part)
    return joined[:, channels].flatten(2).numpy()


def usual_fit(maps: list[Tensor], channels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x = usual_embedding(maps, channels)
    _, d, positions = x.shape
    covariances = np.zeros((d, d, positions), np.float32)
    for i in range(positions):
        covariances[:, :, i] = np.cov(x[:, :, i], rowvar=False) + 0.01 * np.eye(d)
    return x.mean(0), covariances


def usual_maps(
    maps: list[Tensor], channels: Tensor, fitted: tuple[np.ndarray, np.ndarray]
) -> Tensor:
    x, (mean, covariances) = usual_embedding(maps, channels), fitted
    distances = []
    for i in range(x.shape[2]):
        inverse = np.linalg.inv(covariances[:, :, i])
        distances.append([mahalanobis(one[:, i], mean[:, i], inverse) for one in x])
    side = maps[0].shape[2]
    grid = torch.tensor(np.array(distances)).T.reshape(len(x), 1, side, side)
    large = F.interpolate(grid, size=SIDE, mode="bilinear", align_corners=False)
    smooth = np.stack([gaussian_filter(one, 4) for one in large[:, 0].numpy()])
    return torch.from_numpy(smooth).float()


# ---- contenders ----


class Work:
    """What the contenders of all three parts share: features to fit and to score, and
    what each has fitted.
    """

    def __init__(
        self,
        train: int,
        test: int,
        device: torch.device,
        shapes: tuple = RESNET18,
        dimensions: int = 100,
    ):
        self.train, self.test, self.device = train, test, device
        self.maps = [part.to(device) for part in features(train, shapes, 0)]
        self.seen = [part.to(device) for part in features(test, shapes, 1)]
        self.model = PaDiM(HandedOut(self.maps), dimensions)
        total = sum(channels for channels, _ in shapes)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.channels = order[:dimensions].sort().values
        self.fitted: dict[str, object] = {}
        positions = shapes[0][1] ** 2
        # A product that gives a symmetric matrix.
        pair = positions * dimensions * (dimensions + 1) // 2
        self.macs = {"fit": train * pair, "score": test * pair, "score one": pair}
        read = 4 * sum(channels * side**2 for channels, side in shapes)
        sums = 4 * pair  # of each position half a matrix
        self.bytes = {
            "fit": train * read + 2 * sums,
            "score": test * read + sums,
            "score one": read + sums,
        }

    def batches(self, n: int) -> list[Tensor]:
        return [
            images(start, min(start + BATCH, n), self.device)
            for start in range(0, n, BATCH)
        ]

    def our_fit(self) -> Tensor:
        self.fitted[OURS] = self.model.fit(self.batches(self.train))
        return self.model.mean

    def our_maps(self, parts: list[Tensor]) -> Tensor:
        if OURS not in self.fitted:
            self.our_fit()
        self.model.extractor = HandedOut(parts)
        try:
            return torch.cat(
                [self.model.anomaly_map(batch) for batch in self.batches(len(parts[0]))]
            )
        finally:
            self.model.extractor = HandedOut(self.maps)

    def usual_fit(self) -> Tensor:
        self.fitted[USUAL] = usual_fit(self.maps, self.channels)
        return torch.from_numpy(self.fitted[USUAL][0].T.copy())

    def usual_maps(self, parts: list[Tensor]) -> Tensor:
        if USUAL not in self.fitted:
            self.usual_fit()
        return usual_maps(parts, self.channels, self.fitted[USUAL])


class Anomalib:
    """anomalib's PaDiM from feature maps on; its import fails where it is not
    installed.
    """

    def __init__(self, work: Work):
        from anomalib.models.components.stats import MultiVariateGaussian
        from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
        from anomalib.models.image.padim.torch_model import PadimModel

        self.work, self.names = work, [f"layer{i + 1}" for i in range(len(work.maps))]
        self.holder = SimpleNamespace(
            layers=self.names, idx=work.channels.to(work.device)
        )
        self.embed = PadimModel.generate_embedding
        self.gaussian = MultiVariateGaussian()
        self.generator = AnomalyMapGenerator().to(work.device)
        self.fitted = None

    def embedding(self, parts: list[Tensor]) -> Tensor:
        return self.embed(self.holder, dict(zip(self.names, parts, strict=True)))

    def fit(self) -> Tensor:
        bank = [
            self.embedding(list(parts))
            for parts in zip(*(m.split(BATCH) for m in self.work.maps), strict=True)
        ]
        self.fitted = self.gaussian.fit(torch.vstack(bank))
        return self.fitted[0].T

    def maps(self, parts: list[Tensor]) -> Tensor:
        if self.fitted is None:
            self.fit()
        mean, inverse = self.fitted
        made = [
            self.generator(
                embedding=self.embedding(list(batch)),
                mean=mean,
                inv_covariance=inverse,
                image_size=(SIDE, SIDE),
            )
            for batch in zip(*(part.split(BATCH) for part in parts), strict=True)
        ]
        return torch.cat(made)[:, 0]


def part(task: str, full: bool, device: torch.device) -> Part:
    work, missing = Work(*((209, 83) if full else (64, 16)), device), {}
    seen = [m[:1] for m in work.seen] if task == "score one" else work.seen
    resnet = FeatureExtractor(
        torchvision.models.resnet18().to(device), ["layer1", "layer2", "layer3"]
    )
    count = {"fit": work.train, "score": work.test, "score one": 1}[task]
    pictures = torch.randn(
        min(count, BATCH), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)
    ).to(device)

    def backbone() -> int:
        resnet(pictures)
        return 0

    fit = task == "fit"
    contenders = [
        Contender(
            OURS,
            work.our_fit if fit else lambda: work.our_maps(seen),
            None if fit else work.our_fit,
        )
    ]
    if device.type == "cpu":
        contenders.append(
            Contender(
                USUAL,
                work.usual_fit if fit else lambda: work.usual_maps(seen),
                None if fit else work.usual_fit,
            )
        )
    else:
        missing[USUAL] = "runs on the CPU only"
    with peer(missing, "anomalib"):
        other = Anomalib(work)
        contenders.append(
            Contender(
                "anomalib",
                other.fit if fit else lambda: other.maps(seen),
                None if fit else other.fit,
            )
        )
    share = len(pictures) / count
    note = "what comes before, no peer" + (
        "" if share == 1 else f"; timed on {len(pictures)} images"
    )
    contenders.append(
        Contender(BACKBONE, backbone, share=share, compared=False, note=note)
    )
    words = {
        "fit": f"PaDiM, fit {count} images",
        "score": f"PaDiM, score {count} images",
        "score one": "PaDiM, score 1 image",
    }
    return Part(
        f"{words[task]}, d = 100",
        contenders,
        work.macs[task],
        work.bytes[task],
        missing,
        count,
    )


PARTS = {
    task.replace(" ", "_"): functools.partial(part, task)
    for task in ("fit", "score", "score one")
}
