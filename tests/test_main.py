import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_mvtec
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from paperlib.__main__ import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mvtec")
    small_mvtec.write(root, "grid", "brick")
    small_mvtec.write(root, "wood", "gravel", train=3, good=1, defective=1)
    return root


def padim(root, out, *more):
    command = ["padim", "--data", str(root), "--out", str(out)]
    return main([*command, "--backbone", "efficientnet_lite0", *more])


def test_padim_prints_rows_beside_the_papers(root, tmp_path, capsys):
    assert padim(root, tmp_path / "out", "--dimensions", "10", "--device", "cpu") == 0
    printed = capsys.readouterr()
    grid, wood = (
        next(line for line in printed.out.splitlines() if line.startswith(c))
        for c in ("grid", "wood")
    )
    assert "94.9 / 90.9" in grid and "97.3 / 94.6" in grid and "93.6 / 90.3" in wood
    assert "efficientnet_lite0, 10 dimensions, seed 0, centred crops" in printed.out
    bars = [line.split("\r")[-1] for line in printed.err.rstrip("\n").split("\n")]
    for bar, (label, count) in zip(
        bars,
        (("grid: fit", 6), ("grid: score", 6), ("wood: fit", 3), ("wood: score", 2)),
        strict=True,
    ):
        assert bar.startswith(f"{label}: 100%") and f"| {count}/{count} [" in bar
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert padim(root, tmp_path / "out", "--dimensions", "10", "--device", "cpu") == 0
    again = capsys.readouterr()
    assert again.out == printed.out  # read, not run
    for line, name in zip(again.err.splitlines(), ("grid", "wood"), strict=True):
        assert line.startswith(f"{name}: reused from ") and "--fresh" in line
    options = ("--dimensions", "10", "--category", "wood", "wood", "--fresh")
    assert padim(root, tmp_path / "out", *options) == 0
    fresh = capsys.readouterr()
    assert "reused" not in fresh.err and fresh.err.count("wood: fit:   0%") == 1
    assert fresh.out.count("wood ") == 1


def test_options_reach_the_run(root, tmp_path, capsys):
    options = [
        *"--category wood --weights none --dimensions all --seed 7 --variant".split(),
        *"random --no-pictures --batch-size 2 --threads 1".split(),
    ]
    assert padim(root, tmp_path, *options) == 0
    printed = capsys.readouterr().out
    assert "all channels, seed 7, weights none, Rd-MVTec AD" in printed
    assert "grid" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    first = (tmp_path / "results.csv").read_text().splitlines()[1].split(",")
    # Random weights follow the seed.
    assert padim(root, tmp_path / "again", *options) == 0
    second = (tmp_path / "again" / "results.csv").read_text().splitlines()[1].split(",")
    assert first[:14] == second[:14]


def test_the_papers_dimensions_are_the_default(root, tmp_path, capsys):
    assert padim(root, tmp_path, "--category", "wood", "--no-pictures") == 0
    assert "efficientnet_lite0, 100 dimensions" in capsys.readouterr().out


def test_mistakes_are_explained_without_a_traceback(root, tmp_path, capsys):
    for options, message in (
        (
            ["--category", "cable"],
            "error: --category 'cable'; expected one of grid, wood",
        ),
        (["--weights", str(tmp_path / "absent.pth")], "absent.pth can't be read as a"),
        (["--device", "warp"], "error: --device 'warp' can't be used"),
        (["--dimensions", "500"], "error: --dimensions 500 of 176 channels"),
    ):
        assert padim(root, tmp_path / "out", *options) == 1
        assert message in capsys.readouterr().err
    assert padim(tmp_path / "absent", tmp_path / "out") == 1
    capsys.readouterr()
    (tmp_path / "file").touch()
    assert padim(root, tmp_path / "file") == 1
    assert "error: [Errno 17] File exists: " in capsys.readouterr().err
    for options in (
        ["--dimensions", "0"],
        ["--dimensions", "few"],
        ["--backbone", "vgg"],
        ["--variant", "x"],
    ):
        with pytest.raises(SystemExit) as stopped:
            padim(root, tmp_path, *options)
        assert stopped.value.code == 2


@pytest.mark.parametrize("name", ["xpu", "hpu", "meta", ""])
def test_a_missing_device_is_explained(root, tmp_path, capsys, name):
    """PyTorch raises AssertionError, ImportError and RuntimeError for these."""
    if name == "xpu" and torch.xpu.is_available():
        pytest.skip("there is an XPU here")
    assert padim(root, tmp_path, "--device", name) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: --device '{name}' can't be used (")
    assert said.count("\n") == 1 and "expected cpu, cuda:0 or" in said


class LikeMPS(TorchFunctionMode):
    """Raise what PyTorch raises for float64 on `mps`; run the rest on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                "doesn't support float64. Please use float32 instead."
            )
        args = ["cpu" if arg == torch.device("mps") else arg for arg in args]
        return func(*args, **kwargs)


def test_a_device_without_float64_is_explained(root, tmp_path, capsys):
    with LikeMPS():
        assert padim(root, tmp_path, "--category", "wood", "--device", "mps") == 1
    said = capsys.readouterr().err
    assert "error: --device 'mps' can't be used (Cannot convert a MPS Tensor to" in said
    assert "another device with float64" in said


def test_an_interrupted_run_explains_how_to_resume(root, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("paperlib.padim.evaluation.evaluate", interrupted)
    assert padim(root, tmp_path) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_an_interrupted_unpacking_unpacks_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("paperlib.__main__.unpack", interrupted)
    assert main(["unpack", "a.zip", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "\nstopped; nothing was unpacked\n"


def test_certain_errors_are_reported_first_and_other_categories_run(
    tmp_path, capsys, monkeypatch
):
    for name in ("single", "clean", "whole", "deep"):
        small_mvtec.write(
            tmp_path / "data", name, "brick", train=3, good=1, defective=1
        )
    data = tmp_path / "data"
    for n in (1, 2):
        (data / f"single/train/good/00{n}.png").unlink()
    shutil.rmtree(data / "clean/ground_truth")
    shutil.rmtree(data / "clean/test/stain")
    for path in sorted((data / "deep").rglob("*.png")):
        if "ground_truth" not in path.parts:
            values = np.asarray(Image.open(path)).astype(np.uint16) * 16
            Image.fromarray(values).save(path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert padim(data, tmp_path / "out", "--dimensions", "5") == 1
    printed = capsys.readouterr()
    certain = printed.err.partition("whole: fit")[0]
    assert f"category single has 1 training image in {data / 'single/train'}" in certain
    assert f"category clean has no defective image in {data / 'clean/test'}" in certain
    assert "no figures: figures need matplotlib" in certain
    assert "3 images of 16 bits in" in certain and "Pass --bits 12 if" in certain
    assert "\nwhole " in printed.out and "single" not in printed.out
    options = ["--dimensions", "5", "--category", "deep", "--no-pictures"]
    assert padim(data, tmp_path / "out", *options, "--bits", "12") == 0
    printed = capsys.readouterr()
    assert "no figures" not in printed.err and "12 bits; in %" in printed.out


@pytest.mark.parametrize("nested", ["", "/scratch"])
def test_normal_and_abnormal_folders_are_evaluated(root, tmp_path, capsys, nested):
    part = tmp_path / "my parts"
    for source, target in (
        ("train/good", "train/normal"),
        ("test/good", "test/normal"),
        ("test/stain", f"test/abnormal{nested}"),
    ):
        shutil.copytree(root / "grid" / source, part / target)
    options = ["--dimensions", "5", "--no-pictures"]
    assert padim(part, tmp_path / "out", *options) == 0
    printed = capsys.readouterr()
    (line,) = [x for x in printed.out.splitlines() if x.startswith("my parts")]
    assert len(line.split()) == 4  # name, number of images and image AUROC
    assert "my parts: no masks in " in printed.err
    assert padim(tmp_path, tmp_path / "again", *options) == 0  # the folder above
    assert line in capsys.readouterr().out


def test_the_module_runs_and_unpacks(root, tmp_path, capsys):
    import tarfile

    with tarfile.open(tmp_path / "mvtec.tar.xz", "w:xz") as archive:
        archive.add(root, ".")
    command = [
        sys.executable,
        "-m",
        "paperlib",
        "unpack",
        str(tmp_path / "mvtec.tar.xz"),
        str(tmp_path / "data"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in root.rglob("*") if path.is_file()]
    assert done.stdout == f"unpacked to {tmp_path / 'data'}\n"
    for path in files:
        assert (
            tmp_path / "data" / path.relative_to(root)
        ).read_bytes() == path.read_bytes()
    assert main(command[3:]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "not empty" in said
    with pytest.raises(SystemExit):
        main(["padim", "--help"])
    assert "--variant" in capsys.readouterr().out
