import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from refusals import refuses

from paperlib import runtime
from paperlib.datasets import open_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Imitate Colab: its module, its working folder, and the path of Drive."""
    monkeypatch.delenv("PAPERLIB_CHECKPOINTS", raising=False)
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(runtime, "DRIVE", tmp_path / "drive" / "MyDrive")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_checkpoints_are_stored_on_the_drive(colab):
    lost = runtime.checkpoint_path("a net", 3)
    assert lost.parent.resolve() == colab / "paperlib" and lost.parent.is_dir()
    runtime.DRIVE.mkdir(parents=True)
    kept = runtime.checkpoint_path("a net", 3)
    assert kept.parent == runtime.DRIVE / "paperlib" and kept.parent.is_dir()
    assert kept.name == lost.name
    assert kept.name.startswith("a-net-")
    assert kept.suffix == ".safetensors"


def test_outside_colab_checkpoints_are_stored_on_request_only(monkeypatch, tmp_path):
    monkeypatch.delenv("PAPERLIB_CHECKPOINTS", raising=False)
    assert runtime.checkpoint_path("a") is None
    monkeypatch.setenv("PAPERLIB_CHECKPOINTS", str(tmp_path / "mine"))
    assert runtime.checkpoint_path("a").parent == tmp_path / "mine"


def test_another_training_has_another_file(colab):
    few = torch.zeros(9)  # of so few numbers each counts
    paths = {runtime.checkpoint_path("c", few + torch.eye(9)[k]) for k in range(9)}
    paths |= {runtime.checkpoint_path("d", few), runtime.checkpoint_path("c", few, 2)}
    assert len(paths) == 11


def tree(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


@pytest.mark.parametrize("wrapping", ["", "my pictures/"])
@pytest.mark.parametrize("names", [["Cat/1.png", "Dog/2.png"], ["normal/1.png"]])
def test_a_zip_is_as_good_as_its_folder(tmp_path, wrapping, names):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in [*names, "__MACOSX/._1.png"]:
            archive.writestr(name if name.startswith("__") else wrapping + name, b"x")
    folder = open_folder(tmp_path / "a.zip")
    assert tree(folder) == names
    assert open_folder(folder) == folder
    # Nothing is written beside it.
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_unpacked_copies_are_removed_when_python_exits(tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("normal/1.png", b"x")
    code = (
        "from paperlib.datasets import open_folder\nfor _ in range(2):"
        " open_folder('a.zip')"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
    )
    assert not list(folder.iterdir())


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses("no folder or archive mine.zip .*on Colab, drop a zip"):
        open_folder("mine.zip")
