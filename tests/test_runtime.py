import random
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from refusals import refuses

import paperlib
from paperlib import runtime


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_profile_comes_from_the_environment(monkeypatch, name):
    monkeypatch.setenv("PAPERLIB_PROFILE", name)
    run = runtime.start()
    assert run.profile == name
    assert run.full == (name == "full")
    assert run.choose(smoke=2, full=30) == {"smoke": 2, "full": 30}[name]


def test_a_measured_value_stops_the_smoke_profile_only(capsys):
    full, smoke = (
        runtime.Runtime(name, torch.device("cpu")) for name in ("full", "smoke")
    )
    full.expect(False, "the map lies on the cat")
    assert capsys.readouterr().out == "Not so in this run: the map lies on the cat.\n"
    with pytest.raises(AssertionError, match="the map lies on the cat"):
        smoke.expect(False, "the map lies on the cat")
    smoke.expect(True, "the map lies on the cat")
    full.expect(True, "the map lies on the cat")
    assert capsys.readouterr().out == ""


def test_nonsense_profile_is_refused_with_the_valid_names(monkeypatch):
    monkeypatch.setenv("PAPERLIB_PROFILE", "fast")
    with refuses("'fast'.*smoke, full"):
        runtime.start()


@pytest.mark.parametrize(
    ("colab", "cuda", "expected"),
    [
        (False, False, "smoke"),
        (False, True, "smoke"),
        (True, False, "smoke"),
        (True, True, "full"),
    ],
)
def test_only_a_colab_gpu_is_full_by_default(monkeypatch, colab, cuda, expected):
    monkeypatch.delenv("PAPERLIB_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", object())
    assert runtime.default_profile() == expected


def test_start_seeds_and_prints(monkeypatch, capsys):
    monkeypatch.setenv("PAPERLIB_PROFILE", "smoke")
    draws = []
    for _ in range(2):
        runtime.start(seed=3)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    generator = torch.Generator().manual_seed(3)
    expected = (
        random.Random(3).random(),
        np.random.RandomState(3).rand(),
        torch.rand((), generator=generator).item(),
    )
    assert draws == [expected, expected]
    text = capsys.readouterr().out
    assert "profile smoke, seed 3" in text
    assert f"torch {metadata.version('torch')}" in text


def test_versions_are_the_installed_ones():
    found = runtime.versions()
    assert (
        found["paperlib"] == paperlib.__version__ == metadata.version("paperlib-book")
    )
    assert found["python"].startswith(
        f"{sys.version_info.major}.{sys.version_info.minor}."
    )
    assert found["timm"] == metadata.version("timm")


def test_device_name_names_the_processor():
    name = runtime.device_name(torch.device("cpu"))
    assert f"({torch.get_num_threads()} thread" in name
    assert len(name.split("(")[0].strip()) > 2
