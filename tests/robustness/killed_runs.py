"""Runs that tests kill: each writes checkpoints, and a result at its end."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from paperlib import backbones
from paperlib.backbones import Backbone, FeatureExtractor
from paperlib.padim import PaDiM, evaluation
from paperlib.patch_svdd import HierarchicalEncoder, train, train_on_patches
from paperlib.training import train_classifier


def _encoder():
    images = torch.rand(3, 3, 127, 127, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return HierarchicalEncoder(4), images


def patch_svdd(
    folder: Path, steps: int = 40, on_record: Callable | None = None
) -> None:
    encoder, images = _encoder()
    train(
        encoder,
        images,
        steps=steps,
        on_record=on_record,
        crops=1,
        pairs=16,
        every=1,
        checkpoint=folder / "run.safetensors",
    )
    encoder.save(folder / "weights.safetensors")


def patch_svdd_as_published(
    folder: Path, repeat: int = 10, on_record: Callable | None = None
) -> None:
    encoder, images = _encoder()
    checkpoint = folder / "run.safetensors"
    train_on_patches(
        encoder,
        images,
        epochs=2,
        repeat=repeat,
        on_record=on_record,
        batch_size=2,
        every=1,
        checkpoint=checkpoint,
    )
    encoder.save(folder / "weights.safetensors")


def classifier(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 24, 24, generator=generator)
    labels = torch.randint(2, (60,), generator=generator)
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    checkpoint = folder / "run.safetensors"
    train_classifier(
        model,
        (images, labels),
        optimizer,
        epochs=20,
        batch_size=8,
        checkpoint=checkpoint,
    )
    save_file(model.state_dict(), folder / "weights.safetensors")


def padim_over_categories(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU()).eval()
    model.backbone_name = "small"
    backbone = Backbone(
        model, ("1",), backbones.Transform(32, (0.5,) * 3, (0.5,) * 3), "small"
    )
    settings = evaluation.Settings(
        str(folder.parent / "data"), "small", "default", 4, 0, "centered"
    )
    names = sorted(path.name for path in (folder.parent / "data").iterdir())
    evaluation.run(settings, names, backbone, folder, pictures=False, threads=1)


RUNS = {
    run.__name__: run
    for run in (patch_svdd, patch_svdd_as_published, classifier, padim_over_categories)
}


def kill_this_process(record: object) -> None:
    """End the process at a record of its training, after the checkpoint is written."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(name: str, folder: Path, *options: object) -> None:
    """Run one of the runs; an empty file marks its end."""
    torch.set_num_threads(1)
    RUNS[name](folder, *options)
    (folder / "end").touch()


def padim(seed: int, fitted: bool = True) -> PaDiM:
    """Fit a detector of 4 MB, whose epsilon identifies the seed."""
    torch.manual_seed(0)
    extractor = FeatureExtractor(nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1)), ["0"])
    return PaDiM(extractor, 64, seed, epsilon=seed + 1.0).fit(
        [torch.rand(6, 3, 32, 32)]
    )


def save_for_ever(path: Path) -> None:
    """Save two detectors by turns under one name."""
    torch.set_num_threads(1)
    models = [padim(seed) for seed in (0, 1)]
    path.with_name("ready").touch()
    while True:
        for model in models:
            model.save(path)
