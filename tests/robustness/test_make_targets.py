"""Every target of the Makefile, in a clone whose path has a space and an accent."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {
    "test-long": "runs this test",
    "test-gpu": "needs a CUDA device",
    "results": "trains for hours; test_results.py runs its parts",
    "lab": "serves until it is stopped; has a test of its own",
    "lock": "rewrites the pins from the package index",
    "unit": "part of test",
    "notebooks-test": "part of test",
    "pages-test": "part of test",
}
LAST = ["bench", "clean"]


def targets():
    """List the targets of .PHONY in an order in which each can run."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert set(phony) >= LEFT_OUT.keys() | set(LAST)
    return [name for name in phony if name not in LEFT_OUT.keys() | set(LAST)] + LAST


def make(clone, *arguments):
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }
    return subprocess.run(
        ["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone with its own virtual environment, for which the pins are downloaded."""
    folder = tmp_path_factory.mktemp("clones") / "a book é"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", targets())
def test_a_target_passes_at_an_awkward_path(clone, name):
    done = make(clone, name)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    changed = subprocess.run(
        ["git", "status", "--porcelain"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=True,
    )
    assert changed.stdout == "" or name in LAST, (
        f"make {name} changes committed files:\n{changed.stdout}"
    )


@pytest.mark.long
def test_jupyterlab_starts_at_an_awkward_path(clone):
    """Wait for the address that it prints, whatever the load; an end without an address
    is a failure.
    """
    arguments = [
        "make",
        "lab",
        "JUPYTER_ARGUMENTS=--no-browser --allow-root --ServerApp.port=0",
    ]
    started = subprocess.Popen(
        arguments,
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    try:
        for line in started.stdout:
            lines.append(line)
            if re.search(r"http://(localhost|127\.0\.0\.1):\d+/lab", line):
                return
        pytest.fail("make lab ended:\n" + "".join(lines))
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait()
