"""Patch SVDD and PaDiM in two processes: what they find together is what one finds
alone.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from refusals import refuses
from safetensors.torch import load_file, save_file
from two_processes import run_twice

from paperlib.backbones import FeatureExtractor
from paperlib.distributed import fail_together, process_group
from paperlib.padim import PaDiM, PatchGaussian
from paperlib.padim.gaussian import whiten
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD, train

TRAINING = {
    "steps": 3,
    "crops": 2,
    "side": 128,
    "pairs": 16,
    "every": 2,
    "dtype": torch.float32,
}


def encoder() -> HierarchicalEncoder:
    torch.manual_seed(0)
    return HierarchicalEncoder(8).double()


def pictures(seed: int, count: int, side: int = 130) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=generator)


def trained(images: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    """Weights, curves and classifiers of a short training, by name."""
    model = encoder()
    found = train(model, images, **TRAINING, **extra)
    tensors = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {
        f"big.{name}": tensor for name, tensor in found.big.state_dict().items()
    }
    return tensors | {"history": torch.tensor(found.history, dtype=torch.float64)}


def mapped(part: torch.Tensor, seen: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    """Return maps, mean and the number of patches in the bank."""
    detector = PatchSVDD(encoder()).fit(part, **extra)
    maps = detector.anomaly_maps(seen)
    return {
        "small": maps.small,
        "big": maps.big,
        "mean": detector.mean,
        "kept": torch.tensor(len(detector.small)),
    }


def padim() -> PaDiM:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 5, 16), torch.nn.Tanh()
    ).double()
    return PaDiM(FeatureExtractor(network, ["1"]), 4)


def gaussians(part: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    model = padim().fit(list(part.split(2)), **extra)
    return {
        "random.mean": model.mean,
        "random.distance": model.anomaly_map(pictures(3, 2)),
    }


def shares(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven ones."""
    return images[:2], images[2:]


def _of_process(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", ".*_buffers", FutureWarning)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    images = pictures(1, 5)
    path = f"{folder}/checkpoint"
    training = trained(images, distribute=True, checkpoint=path)
    found = {f"train.{k}": t for k, t in training.items()}
    maps = mapped(shares(images)[rank], pictures(2, 3), distribute=True)
    found |= {f"svdd.{k}": t for k, t in maps.items()}
    found |= {
        f"padim.{k}": t
        for k, t in gaussians(shares(images)[rank], distribute=True).items()
    }
    try:
        train(encoder(), images, **{**TRAINING, "crops": 3}, distribute=True)
    except ValueError as error:
        assert "crops=3 for 2 processes; expected a multiple of 2" in str(error)
    else:
        raise AssertionError("three crops were shared between two processes")
    try:  # the first process alone finds what it wrote
        alone = f"{folder}/checkpoint" if rank == 0 else f"{folder}/nothing"
        train(encoder(), images, **TRAINING, distribute=True, checkpoint=alone)
    except ValueError as error:
        assert f"this process would resume from step {3 * (1 - rank)}," in str(error)
    else:
        raise AssertionError("two processes trained on from two steps")
    detector = PatchSVDD(encoder()).fit(shares(images)[rank], distribute=True)
    try:
        detector.save(f"{folder}/shard")
    except ValueError as error:
        assert "the banks are shards" in str(error)
        assert not Path(f"{folder}/shard").exists()
    else:
        raise AssertionError("a shard was saved as if it were the bank")
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()},
        f"{folder}/{rank}.safetensors",
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("together")
    run_twice(_of_process, str(folder))
    assert (folder / "checkpoint").is_file()
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def part(found: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {
        key.partition(".")[2]: tensor
        for key, tensor in found.items()
        if key.startswith(f"{name}.")
    }


def test_two_processes_train_as_one(together):
    alone = trained(pictures(1, 5))
    first = encoder().state_dict()
    moved = (alone["encoder.conv2.weight"] - first["conv2.weight"]).norm()
    assert moved > 0.01 * first["conv2.weight"].norm()
    for found in together:
        torch.testing.assert_close(part(found, "train"), alone, rtol=1e-7, atol=1e-9)


def test_a_bank_in_two_shards_gives_the_maps_of_one(together):
    images = pictures(1, 5)
    alone = mapped(images, pictures(2, 3))
    kept = [int(part(found, "svdd")["kept"]) for found in together]
    assert sum(kept) == int(alone.pop("kept")) and kept[0] != kept[1]
    for found in together:
        own = part(found, "svdd")
        own.pop("kept")
        torch.testing.assert_close(own, alone, rtol=1e-9, atol=1e-12)


def test_padim_fitted_by_two_processes_is_that_of_one(together):
    alone = gaussians(pictures(1, 5))
    for found in together:
        torch.testing.assert_close(part(found, "padim"), alone, rtol=1e-7, atol=1e-9)


# ---- errors ----


def with_nan() -> torch.Tensor:
    images = pictures(1, 3)
    images[1, 0, 5, 5] = torch.nan
    return images


def failing_batches() -> Iterable[torch.Tensor]:
    yield pictures(1, 2)
    raise OSError("the second file is missing")


def fit_svdd(images: torch.Tensor, **options) -> PatchSVDD:
    return PatchSVDD(encoder()).fit(images, distribute=True, **options)


def fit_padim(batches: Iterable) -> PaDiM:
    return padim().fit(batches, distribute=True)


def reduce_consumed() -> None:
    gaussian = PatchGaussian(2, 3).update(torch.randn(4, 2, 3))
    whiten(gaussian, 0.01)
    gaussian.all_reduce()


def train_from(checkpoint: str, images: torch.Tensor) -> None:
    train(encoder(), images, **TRAINING, distribute=True, checkpoint=checkpoint)


# Name → what the first process does, what the second does, and the error of each.
IMAGES = pictures(1, 3)
STOPPED = "process 1 of 2 raised an error, so this one stops too"
REFUSALS: dict[str, tuple[Callable, Callable, str, str]] = {
    "Patch SVDD: NaN": (
        lambda: fit_svdd(IMAGES),
        lambda: fit_svdd(with_nan()),
        STOPPED,
        "NaN or infinite, in images number 1",
    ),
    "Patch SVDD: no image": (
        lambda: fit_svdd(IMAGES),
        lambda: fit_svdd(IMAGES[:0]),
        STOPPED,
        "expected at least one image",
    ),
    "Patch SVDD: dtype": (
        lambda: fit_svdd(IMAGES),
        lambda: fit_svdd(IMAGES.float()),
        STOPPED,
        "images are torch.float32 on cpu and the encoder is torch.float64",
    ),
    "Patch SVDD: coreset": (
        lambda: fit_svdd(IMAGES),
        lambda: fit_svdd(IMAGES, coreset=0),
        STOPPED,
        "coreset=0",
    ),
    "Patch SVDD: sizes": (
        lambda: fit_svdd(IMAGES),
        lambda: fit_svdd(IMAGES[..., :100]),
        "images of 130×130 pixels, and of another size in another process",
        "images of 130×100 pixels, and of another size in another process",
    ),
    "Patch SVDD: all equal": (
        lambda: fit_svdd(IMAGES[:1]),
        lambda: fit_svdd(IMAGES[:1].expand(2, -1, -1, -1)),
        "the 3 training images are all equal",
        "the 3 training images are all equal",
    ),
    "training: NaN": (
        lambda: train(encoder(), IMAGES, **TRAINING, distribute=True),
        lambda: train(encoder(), with_nan(), **TRAINING, distribute=True),
        STOPPED,
        "NaN or infinite, in images number 1",
    ),
    "training: checkpoint": (
        lambda: train_from("absent", IMAGES),
        lambda: train_from(__file__, IMAGES),
        STOPPED,
        "test_distributed.py can't be read",
    ),
    "PaDiM: NaN": (
        lambda: fit_padim([IMAGES]),
        lambda: fit_padim([IMAGES, with_nan()]),
        STOPPED,
        "NaN or infinite, in images number 1",
    ),
    "PaDiM: a file": (
        lambda: fit_padim([IMAGES]),
        lambda: fit_padim(failing_batches()),
        STOPPED,
        "OSError: the second file is missing",
    ),
    "PaDiM: no batch": (
        lambda: fit_padim([IMAGES]),
        lambda: fit_padim([]),
        STOPPED,
        "no batch received",
    ),
    "PaDiM: one tensor": (
        lambda: fit_padim([IMAGES]),
        lambda: fit_padim(IMAGES),
        STOPPED,
        "one tensor of shape",
    ),
    "PaDiM: sizes": (
        lambda: fit_padim([IMAGES[..., :100]]),
        lambda: fit_padim([IMAGES[:, :, :100]]),
        "images of 130×100 pixels, and of another size in another process",
        "images of 100×130 pixels, and of another size in another process",
    ),
    "a consumed Gaussian": (
        lambda: PatchGaussian(2, 3).update(torch.randn(4, 2, 3)).all_reduce(),
        reduce_consumed,
        STOPPED,
        "consumed by whiten",
    ),
}


def _refusing_process(rank: int, folder: str, names: list[str]) -> None:
    """One of two processes; write the error of each call."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),  # ends a test that would otherwise hang
    )
    errors = {}
    for name in names:
        try:
            REFUSALS[name][rank]()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    Path(f"{folder}/{rank}.json").write_text(json.dumps(errors), encoding="utf-8")
    torch.distributed.destroy_process_group()


def errors_of_two(folder: Path, names: list[str]) -> list[dict[str, str]]:
    run_twice(_refusing_process, str(folder), names)
    texts = [(folder / f"{rank}.json").read_text(encoding="utf-8") for rank in (0, 1)]
    return [json.loads(text) for text in texts]


def test_an_error_in_a_process_is_raised_in_every_process(tmp_path):
    first, second = errors_of_two(tmp_path, list(REFUSALS))
    for name, (_, _, of_first, of_second) in REFUSALS.items():
        assert of_first in first.get(name, "no error"), name
        assert of_second in second.get(name, "no error"), name


def _one_image_each(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    images = pictures(1, 2)
    found = mapped(images[rank : rank + 1], pictures(2, 3), distribute=True)
    found |= gaussians(images[rank : rank + 1], distribute=True)
    # The same picture twice in one process is no reason to refuse it either.
    repeated = pictures(1, 2)[[0, 0, 1]][2 * rank : 2 + rank]
    found["repeated"] = PatchSVDD(encoder()).fit(repeated, distribute=True).mean
    save_file(found, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_one_image_per_process_is_enough(tmp_path):
    images = pictures(1, 2)
    run_twice(_one_image_each, str(tmp_path))
    alone = mapped(images, pictures(2, 3)) | gaussians(images)
    alone["repeated"] = images[[0, 0, 1]].mean(0)
    del alone["kept"]
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        del found["kept"]
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-9)


def test_a_process_alone_raises_as_without_the_block():
    with fail_together(None):
        pass
    with pytest.raises(KeyError, match="a"), fail_together(None):
        raise KeyError("a")


def test_a_missing_process_group_is_an_error():
    message = (
        "no process group; start with torchrun and call"
        " torch.distributed.init_process_group first"
    )
    for call in (
        process_group,
        lambda: train(encoder(), pictures(1, 2), **TRAINING, distribute=True),
        lambda: PatchSVDD(encoder()).fit(pictures(1, 2), distribute=True),
        lambda: padim().fit([pictures(1, 2)], distribute=True),
    ):
        with refuses(message):
            call()
