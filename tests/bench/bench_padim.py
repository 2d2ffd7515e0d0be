"""Compare implementations of PaDiM's fit and scoring, from feature maps on.

The maps are random, with ResNet-18's shapes (64, 128 and 256 channels at 56², 28² and
14² positions); d = 100. Each contender concatenates them itself.

- paperlib: `PaDiM` with an extractor that returns stored maps, in batches of 32.
- the common implementation: all channels are concatenated with unfold and fold before
  100 are selected; `np.cov` in a loop over positions; scoring inverts every covariance
  again and calls SciPy's distance per image and position.
- anomalib: its concatenation, Gaussian and anomaly map.
- the backbone: ResNet-18 with random weights up to layer3; the rest of PaDiM should
  take less time than this.
"""

import functools
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from measure import COMMON, OURS, Contender, Part, peer
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

from paperlib.backbones import FeatureExtractor
from paperlib.padim import PaDiM

RESNET18 = ((64, 56), (128, 28), (256, 14))
WIDE_RESNET50 = ((256, 56), (512, 28), (1024, 14))
SIDE, BATCH = 224, 32
BACKBONE = "the backbone alone"


class StoredMaps(FeatureExtractor):
    """Return stored maps; the first pixel of a batch holds its first image's index."""

    def __init__(self, maps: list[Tensor]):
        super().__init__(
            nn.Sequential(*(nn.Identity() for _ in maps)),
            [str(i) for i in range(len(maps))],
        )
        self.maps = maps

    def forward(self, images: Tensor) -> list[Tensor]:
        start = int(images[0, 0, 0, 0])
        return [layer[start : start + len(images)] for layer in self.maps]


def index_images(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.tensor(float(start), device=device).expand(stop - start, 3, SIDE, SIDE)


def random_maps(n: int, shapes: tuple, seed: int) -> list[Tensor]:
    """Draw the feature maps of n images, with correlated neighbouring channels."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(n, c, side, side, generator=generator) for c, side in shapes]
    return [layer.add_(0.5 * layer.roll(1, 1)) for layer in maps]


# ---- the common implementation, written from its description ----


def unfold_and_fold(large: Tensor, small: Tensor) -> Tensor:
    """Concatenate two maps: each coarse position with the fine ones that it covers."""
    n, c, h, w = large.shape
    s = h // small.shape[2]
    patches = F.unfold(large, s, stride=s).view(n, c, s * s, *small.shape[2:])
    repeated = small[:, :, None].expand(-1, -1, s * s, -1, -1)
    both = torch.cat([patches, repeated], 1)
    return F.fold(
        both.reshape(n, -1, small.shape[2] * small.shape[3]), (h, w), s, stride=s
    )


def common_embedding(maps: list[Tensor], channels: Tensor) -> np.ndarray:
    embedding = maps[0]
    for layer in maps[1:]:
        embedding = unfold_and_fold(embedding, layer)
    return embedding[:, channels].flatten(2).numpy()


def common_fit(maps: list[Tensor], channels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x = common_embedding(maps, channels)
    _, d, positions = x.shape
    covariances = np.zeros((d, d, positions), np.float32)
    for i in range(positions):
        covariances[:, :, i] = np.cov(x[:, :, i], rowvar=False) + 0.01 * np.eye(d)
    return x.mean(0), covariances


def common_maps(
    maps: list[Tensor], channels: Tensor, fitted: tuple[np.ndarray, np.ndarray]
) -> Tensor:
    x, (mean, covariances) = common_embedding(maps, channels), fitted
    distances = []
    for i in range(x.shape[2]):
        inverse = np.linalg.inv(covariances[:, :, i])
        distances.append([mahalanobis(row[:, i], mean[:, i], inverse) for row in x])
    side = maps[0].shape[2]
    grid = torch.tensor(np.array(distances)).T.reshape(len(x), 1, side, side)
    large = F.interpolate(grid, size=SIDE, mode="bilinear", align_corners=False)
    smooth = np.stack([gaussian_filter(m, 4) for m in large[:, 0].numpy()])
    return torch.from_numpy(smooth).float()


# ---- contenders ----


class Task:
    """The feature maps to fit and to score, and what each contender has fitted."""

    def __init__(
        self,
        train: int,
        test: int,
        device: torch.device,
        shapes: tuple = RESNET18,
        dimensions: int = 100,
    ):
        self.train, self.test, self.device = train, test, device
        self.maps = [layer.to(device) for layer in random_maps(train, shapes, 0)]
        self.test_maps = [layer.to(device) for layer in random_maps(test, shapes, 1)]
        self.model = PaDiM(StoredMaps(self.maps), dimensions)
        total = sum(channels for channels, _ in shapes)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.channels = order[:dimensions].sort().values
        self.fitted: dict[str, object] = {}
        positions = shapes[0][1] ** 2
        # Symmetric matrices need half of their elements.
        macs = positions * dimensions * (dimensions + 1) // 2
        self.macs = {"fit": train * macs, "score": test * macs, "score one": macs}
        map_bytes = 4 * sum(channels * side**2 for channels, side in shapes)
        matrix_bytes = 4 * macs
        self.bytes = {
            "fit": train * map_bytes + 2 * matrix_bytes,
            "score": test * map_bytes + matrix_bytes,
            "score one": map_bytes + matrix_bytes,
        }

    def batches(self, n: int) -> list[Tensor]:
        return [
            index_images(start, min(start + BATCH, n), self.device)
            for start in range(0, n, BATCH)
        ]

    def our_fit(self) -> Tensor:
        self.fitted[OURS] = self.model.fit(self.batches(self.train))
        return self.model.mean

    def our_maps(self, maps: list[Tensor]) -> Tensor:
        if OURS not in self.fitted:
            self.our_fit()
        self.model.extractor = StoredMaps(maps)
        try:
            return torch.cat(
                [self.model.anomaly_map(batch) for batch in self.batches(len(maps[0]))]
            )
        finally:
            self.model.extractor = StoredMaps(self.maps)

    def common_fit(self) -> Tensor:
        self.fitted[COMMON] = common_fit(self.maps, self.channels)
        return torch.from_numpy(self.fitted[COMMON][0].T.copy())

    def common_maps(self, maps: list[Tensor]) -> Tensor:
        if COMMON not in self.fitted:
            self.common_fit()
        return common_maps(maps, self.channels, self.fitted[COMMON])


class Anomalib:
    """anomalib's PaDiM from feature maps on; raises ImportError if not installed."""

    def __init__(self, task: Task):
        from anomalib.models.components.stats import MultiVariateGaussian
        from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator
        from anomalib.models.image.padim.torch_model import PadimModel

        self.task, self.names = task, [f"layer{i + 1}" for i in range(len(task.maps))]
        # generate_embedding is a method; this object stands in for its `self`.
        self.model = SimpleNamespace(
            layers=self.names, idx=task.channels.to(task.device)
        )
        self.embed = PadimModel.generate_embedding
        self.gaussian = MultiVariateGaussian()
        self.generator = AnomalyMapGenerator().to(task.device)
        self.fitted = None

    def embedding(self, maps: list[Tensor]) -> Tensor:
        return self.embed(self.model, dict(zip(self.names, maps, strict=True)))

    def fit(self) -> Tensor:
        bank = [
            self.embedding(list(batch))
            for batch in zip(*(m.split(BATCH) for m in self.task.maps), strict=True)
        ]
        self.fitted = self.gaussian.fit(torch.vstack(bank))
        return self.fitted[0].T

    def anomaly_maps(self, maps: list[Tensor]) -> Tensor:
        if self.fitted is None:
            self.fit()
        mean, inverse = self.fitted
        batches = [
            self.generator(
                embedding=self.embedding(list(batch)),
                mean=mean,
                inv_covariance=inverse,
                image_size=(SIDE, SIDE),
            )
            for batch in zip(*(layer.split(BATCH) for layer in maps), strict=True)
        ]
        return torch.cat(batches)[:, 0]


def part(name: str, full: bool, device: torch.device) -> Part:
    task, missing = Task(*((209, 83) if full else (64, 16)), device), {}
    maps = task.test_maps
    if name == "score one":
        maps = [layer[:1] for layer in maps]
    resnet = FeatureExtractor(
        torchvision.models.resnet18().to(device), ["layer1", "layer2", "layer3"]
    )
    count = {"fit": task.train, "score": task.test, "score one": 1}[name]
    images = torch.randn(
        min(count, BATCH), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)
    ).to(device)

    def backbone() -> int:
        resnet(images)
        return 0

    is_fit = name == "fit"
    contenders = [
        Contender(
            OURS,
            task.our_fit if is_fit else lambda: task.our_maps(maps),
            None if is_fit else task.our_fit,
        )
    ]
    if device.type == "cpu":
        contenders.append(
            Contender(
                COMMON,
                task.common_fit if is_fit else lambda: task.common_maps(maps),
                None if is_fit else task.common_fit,
            )
        )
    else:
        missing[COMMON] = "runs on the CPU only"
    with peer(missing, "anomalib"):
        anomalib = Anomalib(task)
        contenders.append(
            Contender(
                "anomalib",
                anomalib.fit if is_fit else lambda: anomalib.anomaly_maps(maps),
                None if is_fit else anomalib.fit,
            )
        )
    share = len(images) / count
    note = "preceding step, no peer" + (
        "" if share == 1 else f"; timed on {len(images)} images"
    )
    contenders.append(
        Contender(BACKBONE, backbone, share=share, compared=False, note=note)
    )
    descriptions = {
        "fit": f"PaDiM, fit {count} images",
        "score": f"PaDiM, score {count} images",
        "score one": "PaDiM, score 1 image",
    }
    return Part(
        f"{descriptions[name]}, d = 100",
        contenders,
        task.macs[name],
        task.bytes[name],
        missing,
        count,
    )


PARTS = {
    name.replace(" ", "_"): functools.partial(part, name)
    for name in ("fit", "score", "score one")
}
