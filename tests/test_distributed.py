"""Patch SVDD and PaDiM in two processes: what they find together is what one finds alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paperlib.backbones import FeatureExtractor
from paperlib.padim import PaDiM
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD, train
from paperlib.patch_training import process_group

TRAINING = {"steps": 3, "crops": 2, "side": 128, "pairs": 16, "every": 2, "dtype": torch.float32}


def encoder() -> HierarchicalEncoder:
    torch.manual_seed(0)
    return HierarchicalEncoder(8).double()


def pictures(seed: int, count: int, side: int = 130) -> torch.Tensor:
    return torch.rand(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(images: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    """Weights, curves and classifiers of a short training, by name."""
    model = encoder()
    found = train(model, images, **TRAINING, **extra)
    tensors = {f"encoder.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"big.{name}": tensor for name, tensor in found.big.state_dict().items()}
    return tensors | {"history": torch.tensor(found.history, dtype=torch.float64)}


def mapped(part: torch.Tensor, seen: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    """Maps, mean and the number of patches kept."""
    detector = PatchSVDD(encoder()).fit(part, **extra)
    maps = detector.anomaly_maps(seen)
    return {"small": maps.small, "big": maps.big, "mean": detector.mean, "kept": torch.tensor(len(detector.small))}


def gaussians(part: torch.Tensor, **extra) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 5, 16), torch.nn.Tanh()).double()
    found = {}
    for reduction in ("random", "pca"):
        model = PaDiM(FeatureExtractor(network, ["1"]), 4, reduction=reduction).fit(list(part.split(2)), **extra)
        found |= {f"{reduction}.mean": model.mean, f"{reduction}.distance": model.anomaly_map(pictures(3, 2))}
    return found


def shares(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven ones."""
    return images[:2], images[2:]


def _of_process(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    images = pictures(1, 5)
    found = {f"train.{k}": t for k, t in trained(images, distribute=True, checkpoint=f"{folder}/checkpoint").items()}
    found |= {f"svdd.{k}": t for k, t in mapped(shares(images)[rank], pictures(2, 3), distribute=True).items()}
    found |= {f"padim.{k}": t for k, t in gaussians(shares(images)[rank], distribute=True).items()}
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
        assert f"would go on from step 0 to 3, this one from {3 * (1 - rank)}" in str(error)
    else:
        raise AssertionError("two processes trained on from two steps")
    detector = PatchSVDD(encoder()).fit(shares(images)[rank], distribute=True)
    try:
        detector.save(f"{folder}/shard")
    except ValueError as error:
        assert "the banks are shards" in str(error) and not Path(f"{folder}/shard").exists()
    else:
        raise AssertionError("a shard was saved as if it were the bank")
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("together")
    torch.multiprocessing.spawn(_of_process, (str(folder),), nprocs=2)
    assert (folder / "checkpoint").is_file()
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]


def part(found: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.partition(".")[2]: tensor for key, tensor in found.items() if key.startswith(f"{name}.")}


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


def test_without_processes_it_says_so():
    message = "no process group; start with torchrun and call torch.distributed.init_process_group first"
    for call in (
        process_group,
        lambda: train(encoder(), pictures(1, 2), **TRAINING, distribute=True),
        lambda: PatchSVDD(encoder()).fit(pictures(1, 2), distribute=True),
    ):
        with pytest.raises(ValueError, match=message):
            call()
