import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_mvtec
import small_parts
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from paperlib import __version__
from paperlib.__main__ import _parse_size, main
from paperlib.backbones import load
from paperlib.padim import PaDiM


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
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["results.csv", "wood-efficientnet_lite0-all-random-seed7.csv"]
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


# ---- fit and inspect ----


def run_module(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "paperlib", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with 24 good images, 8 others, and a model that a shell has fitted."""
    folder = tmp_path_factory.mktemp("small pärts")
    small_parts.write(folder)
    done = run_module(
        *("fit", "good pärts", "--out", "new/m.safetensors", "--bits", 12), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"threshold \d+\.?\d*: quantile 0.99 of the scores of 24 images\n"
        r"model: new/m.safetensors\n",
        done.stdout,
    )
    assert "warning: 24 images are few for --quantile 0.99, which needs 100" in (
        done.stderr
    )
    assert re.search(r"fit: 100%.* 24/24 .*image/s", done.stderr)
    return folder


@pytest.fixture
def in_parts(parts, monkeypatch):
    monkeypatch.chdir(parts)
    return parts


def test_a_folder_is_inspected_from_a_shell(parts):
    done = run_module(
        *("inspect", "new/m.safetensors", "to inspect", "--out", "my report"), cwd=parts
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8 images: 4 alarms; my report/index.html\n"
    assert "inspect: 100%" in done.stderr
    lines = (parts / "my report/results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("path,score,alarm,top,left,height,width,error")
    alarms = sorted(line.split(",")[0] for line in lines if ",true," in line)
    others = sorted(line.split(",")[0] for line in lines if ",false," in line)
    assert [Path(path).name[:5] for path in alarms] == ["tüv 2", "tüv 3"] * 2
    assert [Path(path).name[:5] for path in others] == ["tüv 0", "tüv 1"] * 2
    assert len(list((parts / "my report/overlays").iterdir())) == 8


def test_json_is_all_that_standard_output_holds(in_parts, tmp_path, capsys):
    (tmp_path / "broken.png").touch()
    images = ["to inspect/a", str(tmp_path / "broken.png")]
    options = ["--out", str(tmp_path / "out"), "--json", "--no-pictures"]
    assert main(["inspect", "new/m.safetensors", *images, *options]) == 1
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    alarms = [image["alarm"] for image in results["images"]]
    assert alarms == [False, False, True, True, None]
    assert "cannot identify" in results["images"][-1]["error"]
    assert printed.out == (tmp_path / "out/results.json").read_text()
    assert "5 images: 2 alarms, 1 can't be read" in printed.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["results.csv", "results.json"]
    # The same command again; then with another model, and with another depth.
    for n_reused, more in (("4", []), ("", ["--bits", "16"]), ("", ["--fresh"])):
        main(["inspect", "new/m.safetensors", *images, *options, *more])
        said = capsys.readouterr().err
        assert ("rows reused" in said) == bool(n_reused)
        assert said.startswith(f"{n_reused} of 5" if n_reused else "")


def test_the_model_holds_what_it_was_fitted_with(in_parts, tmp_path, capsys):
    options = ["--size", "96", "--dimensions", "5", "--seed", "3", "--quantile", "0.9"]
    options += ["--weights", "none", "--bits", "12", "--out", str(tmp_path / "m.sft")]
    assert main(["fit", "good pärts/line 2", *options]) == 0
    printed = capsys.readouterr()
    assert "quantile 0.9 of the scores of 8 images" in printed.out
    assert "8 images are few for --quantile 0.9, which needs 10" in printed.err
    command = ["inspect", str(tmp_path / "m.sft"), "to inspect/b", "--out"]
    assert main([*command, str(tmp_path / "out"), "--weights", "none"]) == 0
    assert "4 images: " in capsys.readouterr().out
    assert main([*command, str(tmp_path / "other")]) == 1
    assert "with other weights than these; pass the weights" in capsys.readouterr().err
    backbone = load("efficientnet_lite0")
    detector = PaDiM.load("new/m.safetensors", backbone.extractor())
    assert (detector.count, detector.dimensions) == (24, 100)
    assert detector.transform.bits == 12


def test_what_fit_can_not_use_is_refused_before_any_work(
    in_parts, tmp_path, capsys, monkeypatch
):
    def never(*_):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr("paperlib.backbones.load", never)
    good, normal = in_parts / "good pärts", tmp_path / "train" / "normal"
    for name, files in (
        ("empty", []),
        ("two", ["tüv 1.jpg", "tüv 2.tif"]),
        ("train/normal", ["tüv 1.jpg"] * 3),
        ("test/scratch", ["tüv 1.jpg"]),
    ):
        (tmp_path / name).mkdir(parents=True)
        for number, file in enumerate(files):
            shutil.copy(good / file, tmp_path / name / f"{number} {file}")
    for folder, message in (
        ("absent", "no file or folder "),
        ("empty", "no image in "),
        ("two", "2 images in "),
        (".", f"normal images only. Pass the folder of these, for example {normal}"),
        ("two/0 tüv 1.jpg", "is a file; expected a folder of normal images"),
        (good, "Pass --bits 12 if that is the camera's depth"),
    ):
        options = ["--out", str(tmp_path / "m.safetensors")]
        assert main(["fit", str(tmp_path / folder), *options]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said
    assert main(["fit", str(good), "--bits", "12", "--out", str(tmp_path)]) == 1
    assert "is a folder; expected a file such as" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_fit_names_all_unreadable_images_at_once(in_parts, tmp_path, capsys):
    for number, file in enumerate(sorted((in_parts / "good pärts").glob("*.*"))[:8]):
        data = file.read_bytes()
        whole = len(data) if number not in (1, 6) else len(data) // 2
        (tmp_path / f"{number}{file.suffix}").write_bytes(data[:whole])
    options = ["--bits", "12", "--batch-size", "2", "--out", str(tmp_path / "m.sft")]
    assert main(["fit", str(tmp_path), *options]) == 1
    said = capsys.readouterr().err
    assert f"error: 2 problems in {tmp_path}; fix or remove these files:" in said
    named = re.findall(r"^  \S+/(\d)\.\w+: \S", said, re.M)
    assert named == ["1", "6"]
    assert "threshold:" not in said and not (tmp_path / "m.sft").exists()


def test_what_inspect_can_not_use_is_refused_before_any_work(
    in_parts, tmp_path, capsys
):
    detector = PaDiM.load("new/m.safetensors")
    detector.threshold = None
    detector.save(tmp_path / "m.safetensors")
    model = "new/m.safetensors"
    shutil.copytree(in_parts / "to inspect", in_parts / "in results")
    for arguments, message in (
        ([str(tmp_path / "m.safetensors"), "to inspect"], "call normal_threshold"),
        ([model, "absent"], "no file or folder absent"),
        ([model, str(tmp_path)], "no image in "),
        ([model, "in results"], "in the folder of the results, in results,"),
        (["to inspect/a/absent", "to inspect"], "is no file"),
        ([model, "to inspect", "--bits", "3"], "--bits 3; expected 8 to 16"),
    ):
        out = "in results" if "in results" in arguments else str(tmp_path / "out")
        assert main(["inspect", *arguments, "--out", out]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


def test_an_interrupted_inspection_says_how_to_resume(in_parts, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("paperlib.padim.report.inspect_files", interrupted)
    assert main(["inspect", "new/m.safetensors", "to inspect"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_sizes_and_shares_are_read(capsys):
    assert _parse_size("320") == 320 and _parse_size("192x320") == (192, 320)
    wrong = "--size 0", "--size 1x2x3", "--size 3x", "--quantile 0"
    for option in (*wrong, "--quantile 1.5", "--quantile high"):
        with pytest.raises(SystemExit):
            main(["fit", "folder", "--out", "m.safetensors", *option.split()])
        assert option.split()[0] in capsys.readouterr().err


def test_evaluate_saves_models_and_the_score_of_each_image(root, tmp_path, capsys):
    command = [*"evaluate --category wood --dimensions 5 --no-pictures".split()]
    command += ["--backbone", "efficientnet_lite0", "--data", str(root)]
    command += ["--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "chosen on the test set" in printed
    name = "wood-efficientnet_lite0-5-centered-seed0"
    rows = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "path,label,score" and len(rows) == 3
    assert [row.split(",")[1] for row in rows[1:]] == ["0", "1"]
    assert not (tmp_path / f"{name}.safetensors").exists()
    assert main([*command, "--save"]) == 0  # not reused: there is no model
    assert "reused" not in capsys.readouterr().err
    detector = PaDiM.load(tmp_path / f"{name}.safetensors")
    path, _, score = rows[2].split(",")
    (result,) = detector.inspect(path)
    assert result.score == pytest.approx(float(score), rel=1e-4)
    assert detector.threshold > 0
    assert main([*command, "--save"]) == 0
    assert "reused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", "FOLDER/line 2/0001.jpg --quantile"),
        ("inspect", "results.csv index.html --json"),
        ("evaluate", "category/train/good --variant"),
        ("padim", "category/train/good --variant"),
        ("unpack", "tar.xz"),
    ],
)
def test_help_shows_the_layout(capsys, command, words):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words.split())


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"paperlib {__version__}\n"
