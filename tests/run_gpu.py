"""Run the tests that need a CUDA device, then the benchmark on it (`make test-gpu`).

Works with any interpreter that has PyTorch and pytest, without a network: test files
whose imports are missing are named and skipped, and the benchmark leaves out the peers
that are missing. It writes book/data/speed_gpu.json.
"""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Folders of helpers that the tests import, as in pyproject.toml.
FOLDERS = ["", "tests", "tests/padim", "book", "book/tools", "tests/bench"]
NEEDED = ("torch", "torchvision", "timm", "safetensors", "jaxtyping", "scipy", "pytest")


def imported_names(path: Path) -> set[str]:
    """Return the top-level names that a file imports at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def find_missing(path: Path) -> list[str]:
    """Return the packages that a test file imports and this interpreter lacks."""
    return sorted(name for name in imported_names(path) if find_spec(name) is None)


def find_gpu_tests() -> list[Path]:
    """Return the files that contain tests for a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def main() -> int:
    sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS]
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"{sys.executable} lacks {', '.join(missing)}; install them first")
        return 1
    import torch

    if not torch.cuda.is_available():
        print(
            f"{sys.executable}: no CUDA device; expected a GPU and a build of PyTorch"
            " for it"
        )
        return 1
    runnable = []
    for path in find_gpu_tests():
        if missing := find_missing(path):
            print(f"skipped: {path.relative_to(ROOT)} needs {', '.join(missing)}")
        else:
            runnable.append(path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
    }
    # Without the run-time checks of annotations, whose package may be missing.
    markers = "-o", "addopts=--strict-markers", "-m", "gpu", "-p", "no:cacheprovider"
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", *markers, *runnable]
    bench = [sys.executable, "tests/bench", "--device", "cuda", *sys.argv[1:]]
    return max(
        subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        for command in (tests, bench)
    )


if __name__ == "__main__":
    sys.exit(main())
