"""A notebook's environment: profile, device, versions, checkpoints.

Example:
    >>> from paperlib import runtime
    >>> run = runtime.start(seed=0)
    profile ..., seed 0, on ...
"""

import os
import platform
import random
import re
import sys
import textwrap
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paperlib.storage import fingerprint
from paperlib.validation import check_choice

PACKAGES = ("torch", "torchvision", "timm", "numpy", "matplotlib")


class Runtime(NamedTuple):
    """The result of `start`: the profile's name and the torch device."""

    profile: str
    device: torch.device

    @property
    def full(self) -> bool:
        """Whether this is the full profile."""
        return self.profile == "full"

    def choose(self, *, smoke, full):
        """Return `full` in the full profile, else `smoke`."""
        return full if self.full else smoke

    def expect(self, holds: bool, statement: str) -> None:
        """Check what the text says about a measured value.

        Args:
            holds: whether the statement is true in this run.
            statement: about the smoke profile's result. Other networks and longer
                trainings of the full profile may contradict it without a fault.

        Raises:
            AssertionError: if it does not hold in the smoke profile. The full profile
                prints the statement and goes on.

        Example:
            >>> import torch
            >>> from paperlib.runtime import Runtime
            >>> run = Runtime("full", torch.device("cpu"))
            >>> run.expect(0.4 > 0.5, "the map lies on the cat")
            Not so in this run: the map lies on the cat.
        """
        if not holds:
            if not self.full:
                raise AssertionError(f"not so in this run: {statement}")
            print(f"Not so in this run: {statement}.")


def default_profile() -> str:
    """Return `PAPERLIB_PROFILE` if it is set, else full on a Colab GPU, else smoke.

    Smoke runs offline, on two CPU cores in about 90 seconds per chapter; full may
    download weights and train for longer.

    Raises:
        ValueError: if `PAPERLIB_PROFILE` is neither `smoke` nor `full`.
    """
    has_colab_gpu = "google.colab" in sys.modules and torch.cuda.is_available()
    default = "full" if has_colab_gpu else "smoke"
    name = os.environ.get("PAPERLIB_PROFILE") or default
    check_choice("PAPERLIB_PROFILE", name, ("smoke", "full"))
    return name


def start(seed: int = 0) -> Runtime:
    """Choose profile and device, seed all generators, and print the environment.

    Args:
        seed: of `random`, `numpy.random` and `torch`.

    Returns:
        the profile and the device: the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: if `PAPERLIB_PROFILE` is neither `smoke` nor `full`.

    Example:
        >>> from paperlib import runtime
        >>> run = runtime.start(seed=0)
        profile smoke, seed 0, on ...
        python 3..., paperlib ..., torch ...
        >>> run.choose(smoke=60, full=600)  # for example training steps
        60
    """
    run = Runtime(
        default_profile(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"profile {run.profile}, seed {seed}, on {device_name(run.device)}")
    print(textwrap.fill(packages, 76))
    return run


def versions() -> dict[str, str]:
    """Return the versions of Python, paperlib and the packages that affect results.

    Returns:
        name → version, in a fixed order; a package that is not installed is left out.
    """
    from paperlib import __version__

    return {
        "python": platform.python_version(),
        "paperlib": __version__,
        **{name: metadata.version(name) for name in PACKAGES if find_spec(name)},
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the processor's model and torch's threads.

    Args:
        device: a CUDA device or the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()} ({threads} thread{'s' if threads != 1 else ''})"


def _cpu_model() -> str:
    # platform.processor() is empty on many Linux systems.
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    match = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    name = " ".join(match[1].split()) if match else platform.processor()
    return name or platform.machine()


# A Drive mounted in Colab; its files remain when the session ends.
DRIVE = Path("/content/drive/MyDrive")


def checkpoint_folder() -> Path | None:
    """Create and return the folder for checkpoints.

    It is `PAPERLIB_CHECKPOINTS` if that is set. Else, on Colab, it is `paperlib` on
    your Drive if that is mounted, or `paperlib` in the working folder (which survives a
    restart of the kernel, but not the end of the session).

    Returns:
        the folder; None elsewhere, where no checkpoint is stored.
    """
    name = os.environ.get("PAPERLIB_CHECKPOINTS")
    if not name and "google.colab" not in sys.modules:
        return None
    parent = DRIVE if DRIVE.is_dir() else Path()
    folder = Path(name) if name else parent / "paperlib"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoint_path(name: str, *made_from: Tensor | str | float | bool) -> Path | None:
    """Return the checkpoint file of a training, from which an interrupted run resumes.

    Args:
        name: of the training.
        made_from: what distinguishes this training from others: its data, the number of
            steps. Each combination has its own file.

    Returns:
        the file, for a `checkpoint` argument; None if there is no folder.
    """
    folder = checkpoint_folder()
    if folder is None:
        return None
    file_name = re.sub(r"[^\w.-]+", "-", name)
    return folder / f"{file_name}-{fingerprint(*made_from)}.safetensors"
