"""Where a notebook runs: its profile (smoke or full), its device, and the versions it prints."""

import os
import platform
import random
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

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
        """Return `full` in the full profile, `smoke` otherwise: `epochs = run.choose(smoke=2, full=30)`."""
        return full if self.full else smoke


def default_profile() -> str:
    """Name the profile to run in: `PAPERLIB_PROFILE` if it is set, else full on a Colab GPU, else smoke.

    Smoke runs offline on two CPU cores in about a minute and a half a chapter; full may download weights and train
    for longer.

    Raises:
        ValueError: if `PAPERLIB_PROFILE` is neither `smoke` nor `full`.

    Source: this book. Departures: none. Test: test_runtime.py::test_profile_comes_from_the_environment
    """
    name = os.environ.get("PAPERLIB_PROFILE", "")
    if not name:
        return "full" if "google.colab" in sys.modules and torch.cuda.is_available() else "smoke"
    if name not in PROFILES:
        raise ValueError(
            f"PAPERLIB_PROFILE is {name!r}; expected one of {', '.join(PROFILES)}. Set it to one or unset it."
        )
    return name


def start(seed: int = 0) -> Runtime:
    """Choose profile and device, seed every generator, and print what a reader needs to compare numbers.

    Args:
        seed: the seed given to `random`, `numpy.random` and `torch`.

    Returns:
        the profile and the device: the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: if `PAPERLIB_PROFILE` is neither `smoke` nor `full`.

    Source: this book. Departures: none. Test: test_runtime.py::test_start_seeds_and_prints
    """
    run = Runtime(default_profile(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"profile {run.profile}, seed {seed}, on {device_name(run.device)}\n{found}")
    return run


def versions() -> dict[str, str]:
    """Give the versions of Python, paperlib and the packages whose versions can change a number in the book.

    Returns:
        name → version, in a fixed order; a package that is not installed is left out.

    Source: this book. Departures: none. Test: test_runtime.py::test_versions_are_the_installed_ones
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
    """Describe a device for a reader: the card's name, or the processor's model and the threads torch uses.

    Args:
        device: a CUDA device or the CPU.

    Source: this book. Departures: none. Test: test_runtime.py::test_device_name_names_the_processor
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()} ({threads} thread{'s' if threads != 1 else ''})"


def _cpu_model() -> str:
    # platform.processor() is empty on many Linux systems, where the kernel tells instead.
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
