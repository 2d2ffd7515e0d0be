"""Run every self-contained notebook with Colab's Python and package versions.

`make test-long` runs these tests. They create an environment once, in _build/colab-env
(6 GB, two minutes), with Python 3.13 and the versions of colab_runtime.yml. This needs
the package index, and so do the set-up cells, as on Colab. Two differences from Colab
remain: torch and torchvision are the index's builds of the same public versions, and
there is no GPU. `google.colab` is an empty module.
"""

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from built import NOTEBOOKS, ROOT
from export_colab import export
from PIL import Image
from skimage import data

pytestmark = pytest.mark.long
ENVIRONMENT = ROOT / "_build" / "colab-env"
RUNTIME = yaml.safe_load(
    (ROOT / "book" / "data" / "colab_runtime.yml").read_text(encoding="utf-8")
)
COLAB_VERSIONS = {
    name: version.partition("+")[0] for name, version in RUNTIME["packages"].items()
}
OWN = re.compile(r"^(?P<name>FOLDER|PICTURE)(?P<more>(?:, \w+)*) = None", re.M)
TRAINING = "runtime.checkpoint_path("
SECONDS = 3600


def find_colab_python():
    """Find a Python of Colab's version on the path or in pyenv; None without one."""
    version = RUNTIME["python"]
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for candidate in (
        f"python{version}",
        *sorted(map(str, folder.glob(f"{version}*/bin/python"))),
    ):
        program = shutil.which(candidate)
        show = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if (
            program
            and subprocess.run(show, capture_output=True, text=True).stdout.strip()
            == version
        ):
            return program
    return None


def pip(*words):
    """Run pip in the environment; return its output."""
    command = [
        ENVIRONMENT / "bin" / "python",
        "-m",
        "pip",
        "--disable-pip-version-check",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def installed():
    """Map the packages of the environment to their versions."""
    return {
        package["name"].lower(): package["version"]
        for package in json.loads(pip("list", "--format", "json"))
    }


@pytest.fixture(scope="module")
def base():
    """Create the environment if it is missing or outdated; return its packages."""
    python = find_colab_python()
    if python is None:
        pytest.skip(
            f"Python {RUNTIME['python']}, Colab's version, was not found;"
            f" run `pyenv install {RUNTIME['python']}`"
        )
    stamp = ENVIRONMENT / "base.json"
    packages = json.loads(stamp.read_text()) if stamp.is_file() else {}
    versions = {name: packages.get(name) for name in COLAB_VERSIONS}
    if versions != COLAB_VERSIONS:
        subprocess.run([python, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip(
            "install",
            "-q",
            *(f"{name}=={version}" for name, version in COLAB_VERSIONS.items()),
        )
        packages = installed()
        stamp.write_text(json.dumps(packages))
    return packages


@pytest.fixture
def fresh(base):
    """Uninstall the packages that another notebook's set-up has added."""
    if added := installed().keys() - base.keys():
        pip("uninstall", "-q", "-y", *added)
    assert installed() == base
    return base


class Copy:
    """A notebook's self-contained copy, and an empty folder in which it runs."""

    def __init__(self, path, folder):
        self.name = path.stem
        self.file = export(path, folder / "copy")
        self.folder = folder / "content"
        self.folder.mkdir()
        self.cells = nbformat.read(self.file, as_version=4).cells
        self.code = [
            number for number, cell in enumerate(self.cells) if cell.cell_type == "code"
        ]
        colab = folder / "modules" / "google" / "colab"
        startup = folder / "ipython" / "profile_default" / "startup"
        for path in (colab, startup, folder / "tmp", folder / "jupyter"):
            path.mkdir(parents=True)
        (colab / "__init__.py").touch()
        (startup / "colab.py").write_text("import google.colab\n")
        variables = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PAPERLIB", "PYTHON", "MPL"))
        }
        self.environment = variables | {
            "PYTHONPATH": str(folder / "modules"),
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_DATA_DIR": str(folder / "jupyter"),
            "TMPDIR": str(folder / "tmp"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }

    def numbers(self, pattern):
        """List the numbers of the code cells that match a pattern."""
        return [
            number
            for number in self.code
            if re.search(pattern, self.cells[number].source, re.M)
        ]

    def run(self, *sessions):
        """Run sessions of steps (see colab_kernel.py); return each step's result."""
        program = [
            ENVIRONMENT / "bin" / "python",
            ROOT / "tests" / "book" / "colab_kernel.py",
        ]
        plan = json.dumps({"sessions": sessions})
        done = subprocess.run(
            [*program, self.file, self.folder, plan],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    @property
    def setup(self):
        (number,) = (
            number for number, cell in enumerate(self.cells) if cell.id == "setup"
        )
        return number


@pytest.fixture
def copy(request, tmp_path, fresh):
    return Copy(request.param, tmp_path)


def write_reader_images(copy, folder):
    """Write images of two textures as a reader's own; return the path for the cell."""
    kinds = (
        ("normal", "abnormal")
        if copy.name.startswith(("04", "05"))
        else ("brick", "gravel")
    )
    photographs, target = (data.brick(), data.gravel()), folder / "my pictures"
    for kind, photograph in zip(kinds, photographs, strict=True):
        (target / kind).mkdir(parents=True)
        for i in range(40 if kind != "abnormal" else 6):
            top, left = 7 * i, 5 * i
            crop = Image.fromarray(
                photograph[top : top + 200, left : left + 180 + i]
            ).convert("RGB")
            exif = _rotated_exif() if i % 2 else b""
            crop.save(target / kind / f"{i}.jpg", exif=exif)
    if copy.numbers("^PICTURE"):
        return target / kinds[0] / "1.jpg"
    if not copy.numbers(r"open_folder\("):
        return target
    zip_file = folder / "my pictures.zip"
    with zipfile.ZipFile(zip_file, "w") as archive:
        for path in sorted(target.rglob("*.jpg")):
            archive.write(path, path.relative_to(folder))
            archive.writestr(
                f"__MACOSX/{path.relative_to(folder).parent}/._{path.name}",
                b"not an image",
            )
    shutil.rmtree(target)
    return zip_file


def _rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    return exif


every_notebook = pytest.mark.parametrize(
    "copy", NOTEBOOKS, ids=lambda path: path.stem, indirect=True
)


@every_notebook
def test_a_copy_runs_twice_with_colabs_versions_and_then_on_reader_images(
    copy, fresh, capsys
):
    assert list(copy.folder.iterdir()) == [] and ROOT not in copy.folder.parents
    query = (
        "import sys, paperlib; print('google.colab' in sys.modules, paperlib.__file__)"
    )
    steps = [{"cells": copy.code, "ask": query}, {"cells": copy.code}]
    (path_cell,) = copy.numbers(OWN.pattern) or (None,)
    if path_cell is not None:
        path = write_reader_images(copy, copy.folder.parent)
        source = OWN.sub(
            lambda match: f"{match['name']}{match['more']} = {str(path)!r}",
            copy.cells[path_cell].source,
        )
        steps.append(
            {
                "edit": {path_cell: source},
                "cells": [number for number in copy.code if number >= path_cell],
            }
        )
    first, *others = copy.run(steps)
    for result in (first, *others):
        assert result["error"] is None, result["error"]
        # pip may print warnings about its settings.
        assert result["stderr"].keys() <= {str(copy.setup)}
    on_colab, library = first["answer"].split(maxsplit=1)
    assert on_colab == "True" and str(ROOT) not in library and "paperlib-" in library
    after = installed()
    # No package was replaced.
    assert {name: after.get(name) for name in fresh} == fresh
    with capsys.disabled():
        times = " + ".join(f"{result['seconds']:.0f}" for result in (first, *others))
        print(
            f"\n{copy.name}: {times} s; added"
            f" {', '.join(sorted(after.keys() - fresh.keys()))}"
        )


@pytest.mark.parametrize(
    "copy", [NOTEBOOKS[0]], ids=lambda path: path.stem, indirect=True
)
def test_an_interrupted_training_resumes_in_the_next_session(copy):
    """Interrupt the training cell after an epoch and restart the kernel.

    No epoch is repeated.
    """
    training = copy.numbers(re.escape(TRAINING))[0]
    before = [number for number in copy.code if number < training]
    count = (
        "import torch\nfrom torch.optim.optimizer import"
        " register_optimizer_step_post_hook\ntaken ="
        " []\nregister_optimizer_step_post_hook(lambda *all: taken.append(1));"
    )
    prepare = {"cells": before, "ask": count}
    query = "print(len(taken), len(history), len(split.train))"
    stop = {
        "cells": [training],
        "interrupt": "paperlib/*.safetensors",
        "ask": "print(len(taken))",
    }
    first, interrupted, second, resumed = copy.run(
        [prepare, stop], [prepare, {"cells": [training], "ask": query}]
    )
    assert [result["error"] for result in (first, second, resumed)] == [None] * 3
    assert "KeyboardInterrupt" in interrupted["error"]
    steps, epochs, n_images = map(int, resumed["answer"].split())
    steps_per_epoch = -(-n_images // 32)
    assert int(interrupted["answer"]) >= steps_per_epoch
    # The cell trains two networks for the same number of epochs; one epoch was done.
    assert steps == (2 * epochs - 1) * steps_per_epoch
