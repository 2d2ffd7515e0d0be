"""Files that earlier versions saved can be loaded, and give the maps that they gave.

tests/saved_files holds one file per format, made by version 0.1.0 at its first layout,
and the maps of that time. The weights of Patch SVDD's encoder are a pattern, so that
the file is small when compressed.
"""

import lzma
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from paperlib.backbones import FeatureExtractor
from paperlib.padim import PaDiM
from paperlib.patch_svdd import PatchSVDD

FILES = Path(__file__).parent / "saved_files"


def images(count, side):
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, 3, side, side, generator=generator)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU()
        ).eval()


@pytest.fixture(scope="module")
def maps():
    return load_file(FILES / "maps_1.safetensors")


def test_a_saved_padim_is_loaded(maps):
    extractor = FeatureExtractor(network(), ["1", "3"])
    detector = PaDiM.load(FILES / "padim_1.safetensors", extractor)
    found = detector.anomaly_map(images(9, 16)[8:])
    torch.testing.assert_close(found, maps["padim"], rtol=1e-5, atol=1e-6)


def test_a_saved_patch_svdd_is_loaded(maps, tmp_path):
    packed = (FILES / "patch_svdd_1.safetensors.xz").read_bytes()
    path = tmp_path / "patch_svdd_1.safetensors"
    path.write_bytes(lzma.decompress(packed))
    found = PatchSVDD.load(path).anomaly_maps(images(3, 72)[2:]).mult
    # Maps in double precision differ by 3e-5 from both of these in float32: processors
    # round differently.
    torch.testing.assert_close(found, maps["patch_svdd"], rtol=1e-5, atol=2e-5)
