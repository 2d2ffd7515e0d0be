"""Every self-contained notebook on what Colab has: Python 3.13 and exactly the versions
of colab_runtime.yml.

`make test-long`. The environment is made once, in _build/colab-env (6 GB, two minutes),
and needs the package index; the set-up cells need it too, as on Colab. Two things
differ from Colab and are not pretended: torch and torchvision are the index's builds of
the same public versions, and there is no GPU. `google.colab` is an empty module.
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
WANTED = {
    name: version.partition("+")[0] for name, version in RUNTIME["packages"].items()
}
OWN = re.compile(r"^(?P<name>FOLDER|PICTURE)(?P<more>(?:, \w+)*) = None", re.M)
TRAINING = "runtime.checkpoint_path("
SECONDS = 3600


def python_of_colab():
    """Find a Python of Colab's version on the path or in pyenv; None where there is
    none.
    """
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
    """Run pip of the environment; return what it prints."""
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
    """Make the environment where it is missing or other; give its packages, none of
    them a name that a notebook adds.
    """
    python = python_of_colab()
    if python is None:
        pytest.skip(
            f"no Python {RUNTIME['python']}, which Colab has; pyenv install"
            f" {RUNTIME['python']}"
        )
    stamp = ENVIRONMENT / "base.json"
    before = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if {name: before.get(name) for name in WANTED} != WANTED:
        subprocess.run([python, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip(
            "install", "-q", *(f"{name}=={version}" for name, version in WANTED.items())
        )
        before = installed()
        stamp.write_text(json.dumps(before))
    return before


@pytest.fixture
def fresh(base):
    """Bring the environment back to what Colab has: without what another notebook's
    set-up added.
    """
    if added := installed().keys() - base.keys():
        pip("uninstall", "-q", "-y", *added)
    assert installed() == base
    return base


class Copy:
    """A notebook's self-contained copy, and an empty folder outside the repository to
    run it in.
    """

    def __init__(self, path, folder):
        self.name = path.stem
        self.file = export(path, folder / "copy")
        self.folder = folder / "content"
        self.around = {}
        self.folder.mkdir()
        self.cells = nbformat.read(self.file, as_version=4).cells
        self.code = [
            number for number, cell in enumerate(self.cells) if cell.cell_type == "code"
        ]
        colab = folder / "modules" / "google" / "colab"
        startup = folder / "ipython" / "profile_default" / "startup"
        for made in (colab, startup, folder / "tmp", folder / "jupyter"):
            made.mkdir(parents=True)
        (colab / "__init__.py").touch()
        (startup / "colab.py").write_text("import google.colab\n")
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PAPERLIB", "PYTHON", "MPL"))
        }
        self.around = kept | {
            "PYTHONPATH": str(folder / "modules"),
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_DATA_DIR": str(folder / "jupyter"),
            "TMPDIR": str(folder / "tmp"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }

    def numbers(self, pattern):
        """Number the code cells in which a pattern is found."""
        return [
            number
            for number in self.code
            if re.search(pattern, self.cells[number].source, re.M)
        ]

    def run(self, *sessions):
        """Run sessions of steps (see colab_kernel.py) and give each step's result."""
        program = [
            ENVIRONMENT / "bin" / "python",
            ROOT / "tests" / "book" / "colab_kernel.py",
        ]
        plan = json.dumps({"sessions": sessions})
        done = subprocess.run(
            [*program, self.file, self.folder, plan],
            env=self.around,
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


def own_pictures(copy, folder):
    """Make pictures of a reader's own for a chapter, two kinds of texture; give the
    path that its cell takes.
    """
    kinds = (
        ("normal", "abnormal")
        if copy.name.startswith(("04", "05"))
        else ("brick", "gravel")
    )
    photographs, made = (data.brick(), data.gravel()), folder / "my pictures"
    for kind, photograph in zip(kinds, photographs, strict=True):
        (made / kind).mkdir(parents=True)
        for i in range(40 if kind != "abnormal" else 6):
            top, left = 7 * i, 5 * i
            crop = Image.fromarray(
                photograph[top : top + 200, left : left + 180 + i]
            ).convert("RGB")
            crop.save(made / kind / f"{i}.jpg", exif=_turned() if i % 2 else b"")
    if copy.numbers("^PICTURE"):
        return made / kinds[0] / "1.jpg"
    if not copy.numbers(r"open_folder\("):
        return made
    zipped = folder / "my pictures.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in sorted(made.rglob("*.jpg")):
            archive.write(path, path.relative_to(folder))
            archive.writestr(
                f"__MACOSX/{path.relative_to(folder).parent}/._{path.name}",
                b"not a picture",
            )
    shutil.rmtree(made)
    return zipped


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    return exif


every_notebook = pytest.mark.parametrize(
    "copy", NOTEBOOKS, ids=lambda path: path.stem, indirect=True
)


@every_notebook
def test_a_copy_runs_twice_beside_colabs_versions_and_then_on_own_pictures(
    copy, fresh, capsys
):
    assert list(copy.folder.iterdir()) == [] and ROOT not in copy.folder.parents
    asked = (
        "import sys, paperlib; print('google.colab' in sys.modules, paperlib.__file__)"
    )
    steps = [{"cells": copy.code, "ask": asked}, {"cells": copy.code}]
    (own,) = copy.numbers(OWN.pattern) or (None,)
    if own is not None:
        path = own_pictures(copy, copy.folder.parent)
        source = OWN.sub(
            lambda match: f"{match['name']}{match['more']} = {str(path)!r}",
            copy.cells[own].source,
        )
        steps.append(
            {
                "edit": {own: source},
                "cells": [number for number in copy.code if number >= own],
            }
        )
    first, *others = copy.run(steps)
    for result in (first, *others):
        assert result["error"] is None, result["error"]
        # pip may warn of its own settings.
        assert result["stderr"].keys() <= {str(copy.setup)}
    on_colab, library = first["answer"].split(maxsplit=1)
    assert on_colab == "True" and str(ROOT) not in library and "paperlib-" in library
    after = installed()
    # Of the listed packages, and of all others.
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
def test_a_training_that_was_stopped_goes_on_in_the_next_session(copy):
    """Stop the training cell after its first epoch, lose the kernel, and run again: no
    epoch is repeated.
    """
    training = copy.numbers(re.escape(TRAINING))[0]
    before = [number for number in copy.code if number < training]
    count = (
        "import torch\nfrom torch.optim.optimizer import"
        " register_optimizer_step_post_hook\ntaken ="
        " []\nregister_optimizer_step_post_hook(lambda *all: taken.append(1));"
    )
    prepare = {"cells": before, "ask": count}
    asked = "print(len(taken), len(history), len(split.train))"
    stop = {
        "cells": [training],
        "interrupt": "paperlib/*.safetensors",
        "ask": "print(len(taken))",
    }
    started, cut_off, again, resumed = copy.run(
        [prepare, stop], [prepare, {"cells": [training], "ask": asked}]
    )
    assert [result["error"] for result in (started, again, resumed)] == [None] * 3
    assert "KeyboardInterrupt" in cut_off["error"]
    steps, epochs, pictures = map(int, resumed["answer"].split())
    an_epoch = -(-pictures // 32)
    assert int(cut_off["answer"]) >= an_epoch  # it was stopped after an epoch …
    # … which, of two trainings of so many epochs, was not repeated.
    assert steps == (2 * epochs - 1) * an_epoch
