"""The set-up: pyproject.toml, environment.yml, constraints and Makefile agree."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import set_up
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^([\w.-]+)==(\S+)", flags=re.M)
CONSTRAINTS = dict(PIN.findall((ROOT / "constraints.txt").read_text()))
LOCKS = {path.stem: path.read_text() for path in ROOT.glob("requirements/*.txt")}
RUNTIME = ROOT / "book" / "data" / "colab_runtime.yml"
COLAB = yaml.safe_load(RUNTIME.read_text())["packages"]


def requirements():
    extras = PROJECT["optional-dependencies"]
    every = [
        *PROJECT["dependencies"],
        *(line for lines in extras.values() for line in lines),
    ]
    return [
        Requirement(line) for line in every if not line.startswith("paperlib-book[")
    ]


def test_environment_yml_installs_every_extra_at_the_tested_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}" and pip == "pip"
    constraint, editable = packages["pip"]
    assert constraint == "--constraint constraints.txt"
    extras = re.fullmatch(r"--editable \.\[([\w,]+)\]", editable)[1].split(",")
    assert sorted(extras) == sorted(PROJECT["optional-dependencies"])


def test_constraints_pin_one_allowed_version_of_every_requirement():
    for requirement in requirements():
        version = CONSTRAINTS.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{requirement} against {version}"
        )


def test_the_locks_pin_each_package_once_at_the_version_of_the_constraints():
    pins = [pin for text in LOCKS.values() for pin in PIN.findall(text)]
    constraints = PIN.findall((ROOT / "constraints.txt").read_text())
    expected = [pin for pin in constraints if pin[0] != "opencv-python"]
    assert sorted(pins) == sorted(expected), "run `make lock`"
    assert not any("://" in text for text in LOCKS.values())  # no index's address


def test_each_lock_contains_the_packages_of_its_extra():
    extras = PROJECT["optional-dependencies"]
    book = [
        *PROJECT["dependencies"],
        *extras["notebooks"],
        *extras["book"],
        "setuptools",
    ]
    for names, locks in ((book, ["book"]), (extras["test"], ["book", "test"])):
        pinned = {name for lock in locks for name, _ in PIN.findall(LOCKS[lock])}
        declared = {canonicalize_name(Requirement(line).name) for line in names}
        missing = declared - pinned - {"paperlib-book", "opencv-python"}
        assert not missing, f"run `make lock`: {sorted(missing)} not in {locks}"
    assert "opencv-python-headless==" in LOCKS["book"]


def test_the_oldest_python_is_the_same_everywhere():
    oldest = ".".join(map(str, set_up.OLDEST))
    assert PROJECT["requires-python"] == f">={oldest}"
    assert f"--python-version {oldest} " in (ROOT / "Makefile").read_text()


def test_constraints_offer_both_builds_of_opencv_at_one_version():
    assert CONSTRAINTS["opencv-python"] == CONSTRAINTS["opencv-python-headless"]


def test_colab_satisfies_the_ranges_so_that_installing_replaces_nothing():
    notebook_side = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["notebooks"],
    ]
    for requirement in map(Requirement, notebook_side):
        assert all(part.operator == ">=" for part in requirement.specifier), (
            f"{requirement}: lower bounds only"
        )
        if requirement.name in COLAB:
            assert requirement.specifier.contains(COLAB[requirement.name]), (
                f"{requirement} would be upgraded on Colab"
            )


def test_no_text_installs_another_projects_paperlib():
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.split():
        if (
            name.endswith((".md", ".py", ".ipynb", ".yml", ".toml"))
            and (ROOT / name).is_file()
            and "test_setup" not in name
        ):
            assert not re.search(
                r"pip install (-q )?paperlib(?!-)\b",
                (ROOT / name).read_text(encoding="utf-8"),
            ), name


@pytest.mark.parametrize("version", [(3, 10, 14), (2, 7, 18)])
def test_an_old_python_is_refused_with_advice(version):
    with pytest.raises(
        ValueError,
        match=r"this is Python \d\.\d+; expected 3.11 or newer. Run.* `make PYTHON=",
    ):
        set_up.check_python(version)
    set_up.check_python((3, 11, 0))


def test_uv_uses_the_indexes_and_certificates_of_pip():
    """The order is that of `pip config list`: environment, then files."""
    pip_config = """\
:env:.cert='/environment.pem'
download.index-url='https://unused.example/simple'
global.cert='/file.pem'
global.extra-index-url='https://one.example/simple file:///two'
global.find-links='/wheels /more'
install.index-url='https://mirror.example/simple'
"""
    settings = set_up.uv_settings(pip_config)
    assert settings.pop("UV_SYSTEM_CERTS") == "1"
    assert settings == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "SSL_CERT_FILE": "/environment.pem",
        "UV_INDEX": "https://one.example/simple file:///two",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
    }
    assert set(set_up.uv_settings("")) == {"UV_SYSTEM_CERTS", "UV_INDEX_STRATEGY"}


def test_a_failing_command_is_named_without_a_traceback(tmp_path):
    """For example `python -m venv`, which cannot write to a file."""
    occupied = tmp_path / "venv"
    occupied.write_text("a file")
    script = ROOT / "book" / "tools" / "set_up.py"
    finished = subprocess.run(
        [sys.executable, script, occupied, "book"], capture_output=True, text=True
    )
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert f"above: {sys.executable} -m venv {occupied}" in finished.stderr


def test_every_make_target_is_described_and_ci_calls_make_test():
    makefile = (ROOT / "Makefile").read_text()
    described = set(re.findall(r'@echo "make ([\w-]+)', makefile))
    assert described >= {
        *"book test execute lab lint bench results colab test-long test-gpu".split()
    }
    assert described <= set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    ci = (ROOT / ".ci" / "run").read_text()
    assert "chromium" in ci and ci.rstrip().endswith("make test")


def test_tests_that_the_makefile_selects_exist():
    """With a name that no test has, pytest runs nothing and `make` fails."""
    chosen = re.findall(r"(tests/\S+\.py) -k (\w+)", (ROOT / "Makefile").read_text())
    assert chosen
    for path, name in chosen:
        assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), name


def test_no_two_test_files_share_a_name():
    """pytest imports test files by name, and `make test-long` collects all folders."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
