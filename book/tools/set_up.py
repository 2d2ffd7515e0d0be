"""set_up.py VENV EXTRA: make a virtual environment that holds paperlib and one of pyproject.toml's extras.

Runs on the bare interpreter (nothing is installed yet), so it imports the standard library alone.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 11)


def check_python(version: tuple[int, ...]) -> None:
    """Refuse an interpreter that pyproject.toml's `requires-python` would refuse later, and less clearly."""
    if version < OLDEST:
        came, expected = (".".join(map(str, v[:2])) for v in (version, OLDEST))
        raise ValueError(f"this is Python {came}; expected {expected} or newer. Run `make PYTHON=python3.12 book`, say")


def headless_requirement(error: str, version: str) -> str | None:
    """Name the package to install when `import cv2` failed for want of a screen's libraries.

    Args:
        error: what the failed import printed.
        version: the installed version of opencv-python.

    Returns:
        a requirement of the same version without windows, or None if the import failed for another reason.
    """
    # libGL, libgthread, libSM, libXext…: all are "cannot open shared object file" of an X11 or GLib library.
    return f"opencv-python-headless=={version}" if "cannot open shared object file" in error else None


def mend_opencv(python: Path) -> None:
    """Put opencv-python-headless in place of opencv-python where the latter can't be imported."""
    tried = subprocess.run([python, "-c", "import cv2"], capture_output=True, text=True)
    if tried.returncode == 0:
        return
    show = "from importlib.metadata import version; print(version('opencv-python'))"
    version = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    requirement = headless_requirement(tried.stderr, version)
    if requirement is None:
        raise RuntimeError(f"import cv2 fails:\n{tried.stderr}")
    print(f"this machine lacks the libraries of opencv-python's windows; installing {requirement} instead")
    # Both packages own the folder cv2, so removing the first may have taken files of the second: reinstall that.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "opencv-python"], check=True)
    reinstall = [python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", requirement]
    subprocess.run(reinstall, check=True)
    subprocess.run([python, "-c", "import cv2"], check=True)


def main(venv: str, extra: str) -> None:
    """Create `venv` where it is missing, install, and check."""
    check_python(sys.version_info)
    python = Path(venv).absolute() / "bin" / "python"
    if not python.exists():
        print(f"setting up {venv} (a few minutes, about 7 GB on Linux: PyTorch brings its CUDA libraries)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", "-e", f"{ROOT}[{extra}]"], check=True)
    mend_opencv(python)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(f"set_up.py: {error}")
