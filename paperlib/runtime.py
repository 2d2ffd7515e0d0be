"""Where a notebook runs: its profile, device and versions, its checkpoints and its
progress lines.
"""

import hashlib
import os
import platform
import random
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PROFILES = ("smoke", "full")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "matplotlib")


class Runtime(NamedTuple):
    """What `start` chose: the profile's name and the torch device."""

    profile: str
    device: torch.device

    @property
    def full(self) -> bool:
        """Whether this is the full profile."""
        return self.profile == "full"

    def choose(self, *, smoke, full):
        """Return `full` in the full profile, `smoke` otherwise:
        `epochs = run.choose(smoke=2, full=30)`.
        """
        return full if self.full else smoke


def default_profile() -> str:
    """Name the profile to run in: `PAPERLIB_PROFILE` if it is set, else full on a Colab
    GPU, else smoke.

    Smoke runs offline on two CPU cores in about a minute and a half a chapter; full may
    download weights and train for longer.

    Raises:
        ValueError: if `PAPERLIB_PROFILE` is neither `smoke` nor `full`.

    Source: this book. Departures: none.
    Test: test_runtime.py::test_profile_comes_from_the_environment
    """
    name = os.environ.get("PAPERLIB_PROFILE", "")
    if not name:
        return (
            "full"
            if "google.colab" in sys.modules and torch.cuda.is_available()
            else "smoke"
        )
    if name not in PROFILES:
        raise ValueError(
            f"PAPERLIB_PROFILE is {name!r}; expected one of {', '.join(PROFILES)}."
            " Set it to one or unset it."
        )
    return name


def start(seed: int = 0) -> Runtime:
    """Choose profile and device, seed every generator, and print what a reader needs to
    compare numbers.

    Args:
        seed: the seed given to `random`, `numpy.random` and `torch`.

    Returns:
        the profile and the device: the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: if `PAPERLIB_PROFILE` is neither `smoke` nor `full`.

    Source: this book. Departures: none.
    Test: test_runtime.py::test_start_seeds_and_prints
    """
    run = Runtime(
        default_profile(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"profile {run.profile}, seed {seed}, on {device_name(run.device)}\n{found}")
    return run


def versions() -> dict[str, str]:
    """Give the versions of Python, paperlib and the packages whose versions can change
    a number in the book.

    Returns:
        name → version, in a fixed order; a package that is not installed is left out.

    Source: this book. Departures: none.
    Test: test_runtime.py::test_versions_are_the_installed_ones
    """
    from paperlib import __version__

    found = {"python": platform.python_version(), "paperlib": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Describe a device for a reader: the card's name, or the processor's model and the
    threads torch uses.

    Args:
        device: a CUDA device or the CPU.

    Source: this book. Departures: none.
    Test: test_runtime.py::test_device_name_names_the_processor
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()} ({threads} thread{'s' if threads != 1 else ''})"


def _cpu_model() -> str:
    # platform.processor() is empty on many Linux systems, where the kernel tells
    # instead.
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


# where Colab shows a mounted Drive; it stays when the session ends
DRIVE = Path("/content/drive/MyDrive")
SAMPLED = 4096  # numbers of a tensor that tell it from another


def checkpoint_folder() -> Path | None:
    """Make the folder for what should outlive a cell that is stopped, and where
    possible the session.

    It is `PAPERLIB_CHECKPOINTS` if that is set. Else, on Colab, it is `paperlib` on
    your Drive if that is mounted, and `paperlib` in the working folder if not (which a
    restarted kernel finds again, and a new session does not).

    Returns:
        the folder; None elsewhere, where nothing is kept.

    Source: this book. Departures: none.
    Test: test_notebook_runtime.py::test_a_training_is_kept_on_the_drive
    """
    named = os.environ.get("PAPERLIB_CHECKPOINTS")
    if not named and "google.colab" not in sys.modules:
        return None
    folder = (
        Path(named)
        if named
        else DRIVE / "paperlib"
        if DRIVE.is_dir()
        else Path("paperlib")
    )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoint_path(
    name: str, *made_from: Tensor | str | int | float | bool
) -> Path | None:
    """Name the file in `checkpoint_folder()` for a training, so that a run that was
    stopped or cut off goes on where it was.

    Args:
        name: of the training.
        made_from: what would make it another training: its data, the number of steps.
            Each set has a file of its own.

    Returns:
        the file, for a `checkpoint` argument; None where nothing is kept.

    Source: this book. Departures: none.
    Test: test_notebook_runtime.py::test_a_training_is_kept_on_the_drive
    """
    folder = checkpoint_folder()
    if folder is None:
        return None
    digest = hashlib.sha256()
    for part in made_from:
        if isinstance(part, Tensor):
            flat = part.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().tolist()
            part = f"{tuple(part.shape)} {part.dtype} {sample}"
        digest.update(f"{part}\0".encode())
    plain = re.sub(r"[^\w.-]+", "-", name)
    return folder / f"{plain}-{digest.hexdigest()[:8]}.safetensors"


def progress_line() -> Callable[[str, int, int], None]:
    """Make a line that tells how far a long cell is; in a notebook it changes in place.

    Returns:
        a function to call with a word, what is done, and of how much. When all is done
        the line stays.

    Source: this book. Departures: none.
    Test: test_notebook_runtime.py::test_progress_is_one_line_that_changes
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    handle = None

    def show(word: str, done: int, total: int) -> None:
        nonlocal handle
        text = f"[{'#' * round(20 * done / total):.<20}] {done} of {total}  {word}"
        if shell is None:
            print(f"\r{text}", end="\n" if done == total else "", flush=True)
            return
        from IPython.display import display

        bundle = {"text/plain": text}
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)
        if done == total:
            handle = None  # the next part gets a line of its own

    return show
