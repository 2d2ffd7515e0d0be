"""Notebooks run twice in a kernel, from any folder, and without a writable home."""

import os
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks" / "py").glob("*.py"))


def code(name):
    return [
        cell.source
        for cell in jupytext.read(ROOT / "notebooks" / "py" / f"{name}.py").cells
        if cell.cell_type == "code"
    ]


def run(sources, folder, runtime, **environment):
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": folder}},
    )
    # The kernel has what a reader's has: paperlib, the folder of the notebooks, and a
    # folder for the connection file.
    added = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")]),
        "PAPERLIB_PROFILE": "smoke",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    before = os.environ.get("JUPYTER_RUNTIME_DIR")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(runtime)
    try:
        client.execute(env=os.environ | added)
    finally:
        (
            os.environ.pop("JUPYTER_RUNTIME_DIR")
            if before is None
            else os.environ.update(JUPYTER_RUNTIME_DIR=before)
        )
    return notebook


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_twice_in_one_kernel_in_any_folder_with_no_home_to_write_to(
    tmp_path, cases, name
):
    """The second run starts with the names, figures and random state of the first."""
    sources = code(name)
    # Not even root can write to /proc. IPython uses a temporary folder if its folder is
    # not writable, but root has all permissions, so the test sets one.
    kernels = tmp_path / "runtime" / "ipython"
    run(
        sources + sources,
        tmp_path,
        tmp_path / "runtime",
        HOME="/proc",
        MPLCONFIGDIR="",
        IPYTHONDIR=str(kernels),
    )
    left = {path.name for path in tmp_path.iterdir()} - {"runtime"}
    assert not left, f"{name} leaves {sorted(left)} in the folder where it runs"
    cases("notebooks: twice, anywhere, no home").survive(2 * len(sources))


@pytest.mark.parametrize("name", NAMES)
def test_the_set_up_comes_first(name):
    """`runtime.start` refuses a wrong profile before anything else is done with it."""
    assert any("runtime.start(" in source for source in code(name)[:2])
