"""The set-up: what pyproject.toml, environment.yml, the constraints and the Makefile
say must agree.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import lock
import pytest
import set_up
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M
    )
)
LOCKS = {
    name: lock.split((ROOT / "requirements" / f"{name}.txt").read_text())
    for name in lock.LOCKS
}
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


def test_the_locks_hold_the_constraints_each_once_and_with_hashes():
    locked = [
        (name, version)
        for blocks in LOCKS.values()
        for name, version in lock.pins(blocks).items()
    ]
    assert sorted(locked) == sorted(CONSTRAINTS.items()), "run `make lock`"
    for name, block in (item for blocks in LOCKS.values() for item in blocks.items()):
        # A release has a file at least, and a hash is 64 hexadecimal digits; `split`
        # has refused a pin without.
        assert re.fullmatch(r"[^\n]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", block), (
            name
        )


def test_each_lock_holds_what_its_extra_declares():
    extras = PROJECT["optional-dependencies"]
    book = [
        *PROJECT["dependencies"],
        *extras["notebooks"],
        *extras["book"],
        "setuptools",
    ]
    for names, locks in ((book, ["book"]), (extras["test"], ["book", "test"])):
        held = {name for part in locks for name in LOCKS[part]}
        wanted = {canonicalize_name(Requirement(line).name) for line in names} - {
            "paperlib-book"
        }
        assert wanted <= held, (
            f"run `make lock`: {sorted(wanted - held)} not in {locks}"
        )
    assert set_up.LOCKS == {"book": ["book"], "test": ["book", "test"]}
    assert "opencv-python-headless" not in LOCKS["book"] | LOCKS["test"], (
        "it overwrites opencv-python's files"
    )


def test_a_lock_with_two_versions_or_a_pin_without_a_hash_is_refused():
    good = "# a comment\nsix==1.17.0 ; python_version < '4' \\\n    --hash=sha256:ab\n"
    assert lock.pins(lock.split(good)) == {"six": "1.17.0"}
    with pytest.raises(ValueError, match="six got two pins"):
        lock.split(good + "six==1.16.0 \\\n    --hash=sha256:cd\n")
    with pytest.raises(ValueError, match="hupper came without a hash"):
        lock.split(good + "hupper==1.0\n")


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


def test_nothing_tells_a_reader_to_install_somebody_elses_paperlib():
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
def test_an_old_python_is_refused_with_what_to_do(version):
    with pytest.raises(
        ValueError,
        match=r"this is Python \d\.\d+; expected 3.11 or newer. Run `make PYTHON=",
    ):
        set_up.check_python(version)
    set_up.check_python((3, 11, 0))


def test_an_extra_that_has_no_lock_is_refused():
    with pytest.raises(
        ValueError, match="no extra 'boook' to set up; expected one of book, test"
    ):
        set_up.main("never-made", "boook")


class FakePython:
    """Stands in for subprocess.run: answers an import of cv2, and records what was
    installed.
    """

    def __init__(self, error):
        self.error, self.calls = error, []

    def __call__(self, command, **options):
        words = [str(word) for word in command]
        self.calls.append(words)
        failed = (
            "import cv2" in words[-1]
            and self.error
            and not any("install" in call for call in self.calls)
        )
        return subprocess.CompletedProcess(
            command, 1 if failed else 0, "", self.error if failed else ""
        )


def test_a_machine_without_libgl_gets_the_headless_build(monkeypatch):
    fake = FakePython(
        "ImportError: libGL.so.1: cannot open shared object file: No such file or"
        " directory"
    )
    monkeypatch.setattr(set_up.subprocess, "run", fake)
    set_up.mend_opencv(Path("python"))
    pip = [call[3:] for call in fake.calls if call[1:3] == ["-m", "pip"]]
    assert [call[0] for call in pip] == ["uninstall", "install"]
    assert pip[1][-1] == str(ROOT / "requirements" / "headless.txt")
    assert "--require-hashes" in pip[1]


def test_a_working_opencv_is_left_alone_and_another_failure_is_not_hidden(monkeypatch):
    fake = FakePython("")
    monkeypatch.setattr(set_up.subprocess, "run", fake)
    set_up.mend_opencv(Path("python"))
    assert len(fake.calls) == 1
    monkeypatch.setattr(
        set_up.subprocess,
        "run",
        FakePython("ImportError: numpy.core.multiarray failed to import"),
    )
    with pytest.raises(RuntimeError, match="multiarray"):
        set_up.mend_opencv(Path("python"))


def test_every_make_target_is_described_and_ci_calls_make_test():
    makefile = (ROOT / "Makefile").read_text()
    described = set(re.findall(r'@echo "make ([\w-]+)', makefile))
    assert described >= {
        *"book test execute lab lint bench results colab test-long test-gpu".split()
    }
    assert described <= set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    ci = (ROOT / ".ci" / "run").read_text()
    assert "chromium" in ci and ci.rstrip().endswith("make test")


def test_no_two_test_files_share_a_name():
    """pytest imports a test file by its name alone, and `make test-long` collects all
    folders at once.
    """
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
