"""PaDiM from pictures on, network and all; what the network's layout brings; reading
files beside the network.

- PaDiM from pictures: ResNet-18 with the same random weights on both sides, d = 100,
  batches of 8.
- the layout: `backbones.load` keeps the channels last. Beside it PyTorch's default
  layout and, in the full bench, `torch.compile` of the channels-last network, whose
  note tells after how many batches it has paid for its compiling.
- reading: photographs of 1000 × 750 pixels, read, resized and run through a network,
  two threads by `batches` (ours) beside one thread, none (each picture read when its
  batch is due) and two worker processes of a DataLoader. On a GPU also from page-locked
  ("pinned") memory, from which the copy to the device need not be waited for.
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
    found = backbones.load("resnet18", weights=None)
    return found._replace(model=found.model.to(device))


def pictures(count: int, device: torch.device) -> Tensor:
    return torch.randn(
        count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)
    ).to(device)


class Anomalib:
    """anomalib's PaDiM from pictures on, with our network's weights and our choice of
    channels.
    """

    def __init__(self, model: nn.Module, ours: PaDiM):
        from anomalib.models.image.padim.torch_model import PadimModel

        device = next(model.parameters()).device
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
            for batch in images.split(BATCH):
                self.model(batch)
            self.model.fit()
            self.model.eval()
        return self.model.gaussian.mean.T

    def maps(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [self.model(batch).anomaly_map[:, 0] for batch in images.split(BATCH)]
            )


def whole(task: str, full: bool, device: torch.device) -> Part:
    backbone, missing = resnet18(device), {}
    train = pictures(128 if full else 8, device)
    part = {
        "whole fit": slice(None),
        "whole score": slice(8),
        "whole score one": slice(1),
    }
    seen = train[part[task]]
    ours = PaDiM(FeatureExtractor(*backbone[:2]), 100).fit(train.split(BATCH))
    fit = task == "whole fit"

    def our_fit():
        return ours.fit(train.split(BATCH)).mean

    def our_maps():
        return torch.cat([ours.anomaly_map(batch) for batch in seen.split(BATCH)])

    contenders = [Contender(OURS, our_fit if fit else our_maps)]
    with peer(missing, "anomalib"):
        other = Anomalib(backbone.model, ours)
        if not fit:
            other.fit(train)
        contenders.append(
            Contender("anomalib", lambda: other.fit(train) if fit else other.maps(seen))
        )
    verb = "fit" if fit else "score"
    what = (
        f"PaDiM with its ResNet-18, {verb} {len(seen)} picture{'s' * (len(seen) > 1)},"
        " d = 100"
    )
    return Part(what, contenders, 0, 0, missing, len(seen))


def layout(name: str, count: int, full: bool, device: torch.device) -> Part:
    torch.manual_seed(0)
    found = backbones.load(name, weights=None)
    model, images = found.model.to(device), pictures(count, device)
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def maps(network: nn.Module) -> Tensor:
        return torch.cat(
            [part.flatten() for part in FeatureExtractor(network, found.layers)(images)]
        )

    contenders = [
        Contender(OURS, lambda: maps(model)),
        Contender("PyTorch's default layout", lambda: maps(usual), note=NO_PEER),
    ]
    if full:
        # Its padding follows from the size of its input, so it can't be traced without
        # one.
        whole = {"leaf_modules": [Conv2dSame]}
        run = compiled(
            create_feature_extractor(
                model, list(found.layers), tracer_kwargs=whole
            ).eval()
        )
        start = time.perf_counter()
        run(images)
        took = time.perf_counter() - start
        least = min(timed(lambda: maps(model)) for _ in range(3)) - min(
            timed(lambda: run(images)) for _ in range(3)
        )
        pays = (
            f"pays after {took / least:,.0f} such batches"
            if least > 0
            else "never pays"
        )
        contenders.append(
            Contender(
                "compiled as well",
                lambda: run(images),
                note=f"compiled in {took:.0f} s, {pays}; {NO_PEER}",
            )
        )
    return Part(
        f"{name} as far as PaDiM needs it, {count} picture{'s' * (count > 1)}",
        contenders,
        0,
        0,
        {},
        count,
    )


def compiled(graph: nn.Module) -> Callable[[Tensor], Tensor]:
    """A network's joined maps through torch.compile with the weights frozen in, which
    folds the batch norms.
    """
    import torch._inductor.config

    torch._inductor.config.freezing = True
    # what a first compile takes, not a second
    torch._inductor.config.force_disable_caches = True
    run = torch.compile(graph)

    @torch.no_grad()
    def joined(images: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in run(images).values()])

    return joined


def timed(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def photographs(count: int) -> FolderDataset:
    """Cuts of one photograph as JPEG files of 1000 × 750 pixels, in a temporary folder
    that lives with the process.
    """
    photographs.kept = temporary = tempfile.TemporaryDirectory()
    Path(temporary.name, "normal").mkdir()
    random, scene = np.random.default_rng(0), Image.fromarray(data.astronaut())
    for number in range(count):
        x, y = random.integers(0, 200, 2)
        cut = scene.crop((x, y, x + 300, y + 225)).resize((1000, 750))
        cut.save(Path(temporary.name, "normal", f"{number}.jpg"), quality=90)
    return folder(temporary.name)


def first(items: list) -> Tensor:
    return torch.stack([item.image for item in items])


def reading(full: bool, device: torch.device) -> Part:
    count = 128 if full else 24
    items, backbone = photographs(count), resnet18(device)
    extract = FeatureExtractor(*backbone[:2])

    def run(read: Iterable[Tensor]) -> float:
        # non_blocking matters for pinned memory alone.
        return float(
            sum(
                extract(images.to(device, non_blocking=True))[-1].sum()
                for images in read
            )
        )

    def waiting() -> Iterator[Tensor]:
        for start in range(0, count, BATCH):
            yield first(
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
        Contender("no thread", lambda: run(waiting()), note=NO_PEER),
        Contender(
            "a DataLoader's two processes",
            lambda: run(DataLoader(items, BATCH, num_workers=2, collate_fn=first)),
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
        f"reading {count} photographs beside the network",
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
