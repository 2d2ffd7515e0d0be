"""`make test-gpu` with an interpreter of the user's."""

import subprocess
import sys

import pytest
import run_gpu
import torch


def test_files_with_gpu_tests_are_found_and_their_imports_known():
    files = {path.name for path in run_gpu.find_gpu_tests()}
    assert {"test_devices.py", "test_padim.py", "test_training.py"} <= files
    for path in run_gpu.find_gpu_tests():
        assert run_gpu.find_missing(path) == []


def test_missing_packages_are_named(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text("import absent_package.part\nfrom torch import nn\nimport os\n")
    assert run_gpu.find_missing(path) == ["absent_package"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_named():
    command = [sys.executable, "tests/run_gpu.py"]
    done = subprocess.run(command, cwd=run_gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device" in done.stdout
