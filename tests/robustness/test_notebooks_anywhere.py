"""Notebooks run twice in a kernel, from any folder, and without a writable home.

They also run in the full profile, whose networks then have random weights.
"""

import os
import re
from pathlib import Path

import jupytext
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from torchvision import models

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "notebooks" / "py").glob("*.py"))
# The kernel runs this before the notebook. What would take hours without a GPU becomes
# smaller: of images and steps (numbers above 64) there are at most twice as many as in
# the smoke profile, and networks are trained on images for two epochs. Networks,
# layers, batches, strides and all code are those of the full profile.
SIZES_FOR_A_CPU = """
from paperlib import runtime, training

train_fully = training.train_classifier


def choose(self, *, smoke, full):
    return min(full, 2 * smoke) if isinstance(full, int) and full > 64 else full


def train_classifier(model, training_set, *arguments, epochs, **options):
    are_images = training_set[0].shape[-1] > 1  # not pooled features
    epochs = min(epochs, 2) if are_images else epochs
    return train_fully(model, training_set, *arguments, epochs=epochs, **options)


runtime.Runtime.choose = choose
training.train_classifier = train_classifier
"""


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


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """Write random weights of the notebooks' networks as PyTorch's cache stores them.

    A file in the cache is read without a comparison with its published hash.
    """
    folder = tmp_path_factory.mktemp("torch")
    cache = folder / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.manual_seed(0)
    for name in {
        network
        for notebook in NAMES
        for source in code(notebook)
        for network in re.findall(r'^NETWORK = .*full="(\w+)"', source, re.M)
    }:
        address = models.get_model_weights(name).IMAGENET1K_V1.url
        state = models.get_model(name).state_dict()
        torch.save(state, cache / address.rpartition("/")[2])
    assert len(list(cache.iterdir())) >= 2
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_no_measured_value_stops_the_full_profile(
    tmp_path, random_weights, cases, name
):
    """Random weights contradict nearly all that the text says about trained ones."""
    kernels = tmp_path / "ipython"
    startup = kernels / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "sizes.py").write_text(SIZES_FOR_A_CPU)
    sources = code(name)
    notebook = run(
        sources,
        tmp_path,
        tmp_path / "runtime",
        PAPERLIB_PROFILE="full",
        TORCH_HOME=str(random_weights),
        IPYTHONDIR=str(kernels),
    )
    printed = [
        output.get("text", "") for cell in notebook.cells for output in cell.outputs
    ]
    assert any("profile full" in text for text in printed)
    cases("notebooks: full profile, random weights").survive(len(sources))


@pytest.mark.parametrize("name", NAMES)
def test_the_set_up_comes_first(name):
    """`runtime.start` refuses a wrong profile before anything else is done with it."""
    assert any("runtime.start(" in source for source in code(name)[:2])
