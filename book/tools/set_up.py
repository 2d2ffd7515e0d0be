"""set_up.py VENV EXTRA: make a virtual environment that holds paperlib and one of
pyproject.toml's extras.

Runs on the bare interpreter (nothing is installed yet), so it imports the standard
library alone.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 11)
# Extra → the files of requirements/ that hold its packages.
LOCKS = {"book": ["book"], "test": ["book", "test"]}


def check_python(version: tuple[int, ...]) -> None:
    """Refuse an interpreter that pyproject.toml's `requires-python` would refuse later,
    and less clearly.
    """
    if version < OLDEST:
        came, expected = (".".join(map(str, v[:2])) for v in (version, OLDEST))
        raise ValueError(
            f"this is Python {came}; expected {expected} or newer. Run `make"
            " PYTHON=python3.12 book`, say"
        )


def pip_install(python: Path, *arguments: str | Path) -> None:
    """Run pip in the environment of `python`; what it says of a failure has been
    printed by then.
    """
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            *arguments,
        ],
        check=True,
    )


def install_locked(
    python: Path, *locks: str, options: tuple[str | Path, ...] = ()
) -> None:
    """Install files of requirements/: exactly these packages, each from a file whose
    hash is listed there.

    Raises:
        RuntimeError: pip could not, or would not: a file with another hash is refused.
    """
    files = [
        word for lock in locks for word in ("-r", ROOT / "requirements" / f"{lock}.txt")
    ]
    try:
        pip_install(python, "--require-hashes", "--no-deps", *options, *files)
    except subprocess.CalledProcessError:
        raise RuntimeError(
            "pip refused or failed; its reason is above. Where an index serves builds"
            " of its own (other hashes), the same versions without hashes are:"
            f" {python} -m pip install -c constraints.txt -e '.[test]'"
        ) from None


def lacks_screen(error: str) -> bool:
    """Tell whether `import cv2` failed, with this message, for want of a screen's
    libraries.
    """
    # libGL, libgthread, libSM, libXext…: all are "cannot open shared object file" of an
    # X11 or GLib library.
    return "cannot open shared object file" in error


def mend_opencv(python: Path) -> None:
    """Put opencv-python-headless in place of opencv-python where the latter can't be
    imported.
    """
    tried = subprocess.run([python, "-c", "import cv2"], capture_output=True, text=True)
    if tried.returncode == 0:
        return
    if not lacks_screen(tried.stderr):
        raise RuntimeError(f"import cv2 fails:\n{tried.stderr}")
    print(
        "this machine lacks the libraries of opencv-python's windows; installing"
        " opencv-python-headless instead"
    )
    # Both packages own the folder cv2, so removing the first may have taken files of
    # the second: reinstall that.
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-q", "-y", "opencv-python"], check=True
    )
    install_locked(python, "headless", options=("--force-reinstall",))
    subprocess.run([python, "-c", "import cv2"], check=True)


def main(venv: str, extra: str) -> None:
    """Create `venv` where it is missing, install, and check."""
    check_python(sys.version_info)
    if extra not in LOCKS:
        raise ValueError(
            f"there is no extra {extra!r} to set up; expected one of {', '.join(LOCKS)}"
        )
    python = Path(venv).absolute() / "bin" / "python"
    if not python.exists():
        print(
            f"setting up {venv} (a few minutes, about 7 GB on Linux: PyTorch brings its"
            " CUDA libraries)",
            flush=True,
        )
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install_locked(python, *LOCKS[extra])
    # Apart, since pip can't hash a folder; with the setuptools that the lock has just
    # brought.
    pip_install(python, "--no-deps", "--no-build-isolation", "-e", ROOT)
    mend_opencv(python)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"set_up.py: {error}")
