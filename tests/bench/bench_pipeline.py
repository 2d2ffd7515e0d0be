"""Measure PaDiM with its backbone, memory layouts of the backbone, and image reading.

- PaDiM from images on: ResNet-18 with the same random weights for both contenders,
  d = 100, batches of 32 (8 in the quick run).
- the layout: the network of `Backbone.extractor`, with folded batch norms in the
  channels-last format; the network of `backbones.load`, whose batch norms are not
  folded; PyTorch's default format; and, in the full run, `torch.compile`. Its note
  reports after how many batches the compilation time is recovered.
- reading: photographs of 1000 × 750 pixels are read, resized and run through a network;
  with two threads of `batches` (ours), one thread, none (each image is read when its
  batch is computed), and two worker processes of a DataLoader. On a GPU also with
  pinned memory, from which copies to the device are asynchronous.
"""

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import OURS, Contender, Part, peer
from PIL import Image
from skimage import data
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.feature_extraction import create_feature_extractor

from paperlib import backbones
from paperlib.backbones import FeatureExtractor
from paperlib.datasets import FolderDataset, batches, folder
from paperlib.padim import PaDiM

SIDE, BATCH = 224, 8
NO_PEER = "no peer"


def resnet18(device: torch.device) -> backbones.Backbone:
    torch.manual_seed(0)
    backbone = backbones.load("resnet18", weights=None)
    return backbone._replace(model=backbone.model.to(device))


def random_images(count: int, device: torch.device) -> Tensor:
    return torch.randn(
        count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)
    ).to(device)


class Anomalib:
    """anomalib's PaDiM with the weights of our network and our selected channels."""

    def __init__(self, model: nn.Module, ours: PaDiM, batch: int):
        from anomalib.models.image.padim.torch_model import PadimModel

        device = next(model.parameters()).device
        self.batch = batch
        self.model = PadimModel(n_features=100, pre_trained=False).to(device).eval()
        network = self.model.feature_extractor.feature_extractor
        weights = model.state_dict()
        network.load_state_dict({name: weights[name] for name in network.state_dict()})
        self.model.idx = ours.channels.to(device)

    def fit(self, images: Tensor) -> Tensor:
        self.model.memory_bank = []
        with torch.no_grad():
            self.model.train()
            self.model.feature_extractor.eval()
            for batch in images.split(self.batch):
                self.model(batch)
            self.model.fit()
            self.model.eval()
        return self.model.gaussian.mean.T

    def maps(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [
                    self.model(batch).anomaly_map[:, 0]
                    for batch in images.split(self.batch)
                ]
            )


def whole(task: str, full: bool, device: torch.device) -> Part:
    backbone, missing = resnet18(device), {}
    batch_size = 32 if full else BATCH
    train = random_images(128 if full else 8, device)
    counts = {"whole fit": len(train), "whole score": batch_size, "whole score one": 1}
    count = counts[task]
    images = train[:count]
    ours = PaDiM(backbone.extractor(), 100).fit(train.split(batch_size))
    is_fit = task == "whole fit"

    def our_fit():
        return ours.fit(train.split(batch_size)).mean

    def our_maps():
        return torch.cat(
            [ours.anomaly_map(batch) for batch in images.split(batch_size)]
        )

    contenders = [Contender(OURS, our_fit if is_fit else our_maps)]
    with peer(missing, "anomalib"):
        anomalib = Anomalib(backbone.model, ours, batch_size)
        if not is_fit:
            anomalib.fit(train)
        contenders.append(
            Contender(
                "anomalib",
                lambda: anomalib.fit(train) if is_fit else anomalib.maps(images),
            )
        )
    verb = "fit" if is_fit else "score"
    what = f"PaDiM with its ResNet-18, {verb} {count} image{'s' * (count > 1)}, d = 100"
    return Part(what, contenders, 0, 0, missing, count)


def layout(name: str, count: int, full: bool, device: torch.device) -> Part:
    torch.manual_seed(0)
    backbone = backbones.load(name, weights=None)
    model, images = backbone.model.to(device), random_images(count, device)
    ours = backbone.extractor()
    contiguous = copy.deepcopy(ours).to(memory_format=torch.contiguous_format)
    unfolded = FeatureExtractor(model, backbone.layers)

    def maps(extractor: FeatureExtractor) -> Tensor:
        return torch.cat([layer.flatten() for layer in extractor(images)])

    contenders = [
        Contender(OURS, lambda: maps(ours)),
        Contender("batch norms not folded", lambda: maps(unfolded), note=NO_PEER),
        Contender("PyTorch's default layout", lambda: maps(contiguous), note=NO_PEER),
    ]
    if full:
        # Conv2dSame pads by the size of its input, which symbolic tracing can't follow.
        options = {"leaf_modules": [Conv2dSame]}
        run = compiled(
            create_feature_extractor(
                model, list(backbone.layers), tracer_kwargs=options
            ).eval()
        )
        compilation = timed(lambda: run(images))
        saving = min(timed(lambda: maps(ours)) for _ in range(3)) - min(
            timed(lambda: run(images)) for _ in range(3)
        )
        gain = (
            f"faster in total after {compilation / saving:,.0f} batches"
            if saving > 0
            else "never faster"
        )
        contenders.append(
            Contender(
                "with torch.compile",
                lambda: run(images),
                note=f"compiled in {compilation:.0f} s, {gain}; {NO_PEER}",
            )
        )
    return Part(
        f"{name} up to the last layer that PaDiM uses,"
        f" {count} image{'s' * (count > 1)}",
        contenders,
        0,
        0,
        {},
        count,
    )


def compiled(graph: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile a network with frozen weights, which folds the batch norms.

    The compiled function concatenates the network's maps.
    """
    import torch._inductor.config

    torch._inductor.config.freezing = True
    # A cached compilation would not show the time of the first.
    torch._inductor.config.force_disable_caches = True
    run = torch.compile(graph)

    @torch.no_grad()
    def concatenated(images: Tensor) -> Tensor:
        return torch.cat([layer.flatten() for layer in run(images).values()])

    return concatenated


def timed(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def photographs(count: int) -> FolderDataset:
    """Write crops of a photograph as JPEG files of 1000 × 750 pixels.

    They are in a temporary folder, which is deleted when the process ends.
    """
    photographs.folder = temporary = tempfile.TemporaryDirectory()
    Path(temporary.name, "normal").mkdir()
    random, scene = np.random.default_rng(0), Image.fromarray(data.astronaut())
    for number in range(count):
        x, y = random.integers(0, 200, 2)
        crop = scene.crop((x, y, x + 300, y + 225)).resize((1000, 750))
        crop.save(Path(temporary.name, "normal", f"{number}.jpg"), quality=90)
    return folder(temporary.name)


def stack(items: list) -> Tensor:
    return torch.stack([item.image for item in items])


def reading(full: bool, device: torch.device) -> Part:
    count = 128 if full else 24
    items, backbone = photographs(count), resnet18(device)
    extract = backbone.extractor()

    def run(read: Iterable[Tensor]) -> float:
        # non_blocking has an effect for pinned memory only.
        return float(
            sum(
                extract(images.to(device, non_blocking=True))[-1].sum()
                for images in read
            )
        )

    def without_threads() -> Iterator[Tensor]:
        for start in range(0, count, BATCH):
            yield stack(
                [items[number] for number in range(start, min(start + BATCH, count))]
            )

    contenders = [
        Contender(
            OURS, lambda: run(b.images for b in batches(items, BATCH, threads=2))
        ),
        Contender(
            "one thread",
            lambda: run(b.images for b in batches(items, BATCH, threads=1)),
            note=NO_PEER,
        ),
        Contender("no threads", lambda: run(without_threads()), note=NO_PEER),
        Contender(
            "DataLoader, two processes",
            lambda: run(DataLoader(items, BATCH, num_workers=2, collate_fn=stack)),
        ),
    ]
    if device.type == "cuda":
        pinned = Contender(
            "pinned",
            lambda: run(b.images.pin_memory() for b in batches(items, BATCH)),
            note=NO_PEER,
        )
        contenders.append(pinned)
    return Part(
        f"reading {count} photographs while the network runs",
        contenders,
        0,
        0,
        {},
        count,
        wall=True,
    )


PARTS = {
    task: functools.partial(whole, task)
    for task in ("whole fit", "whole score", "whole score one")
}
PARTS |= {
    "layout": functools.partial(layout, "efficientnet_lite0", 16),
    "layout of one": functools.partial(layout, "efficientnet_lite0", 1),
    "layout of a resnet": functools.partial(layout, "resnet18", 8),
    "reading": reading,
}
