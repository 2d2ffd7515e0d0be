"""Prepare the process in which a submission runs: limits, and the teacher's checks.

The grader runs `check = prepare()` before the first statement of a submission, in the
submission's own kernel. The checks that it returns also send their verdicts to the
grader, as outputs of the notebook cell.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from IPython.display import display

from paperlib.exercises import given

VERDICT = "application/x-paperlib-verdict+json"  # type of the outputs with verdicts
SETTINGS = "PAPERLIB_GRADING"  # environment variable
MEMORY_OF_PROCESS = Path("/proc/self/statm")  # Linux has it
LARGEST_FILE = 256 * 2**20  # bytes that a submission may write into one file


def prepare() -> ModuleType:
    """Set the limits and return the module of the chapter's checks."""
    settings = json.loads(os.environ.pop(SETTINGS))
    # An endless loop that prints would fill the memory of the grader.
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    torch.set_num_threads(1)
    module = importlib.import_module(settings["module"])
    # The class's seed. `restore` undoes what a submission makes of it.
    if settings["seed"] is not None:
        given.use_seed(settings["seed"])
    modules = [m for name, m in sys.modules.items() if name.startswith("paperlib")]
    modules += [torch, torch.nn.functional, sys.modules["builtins"]]
    originals: list[tuple[ModuleType, dict[str, Any]]] = []

    def restore() -> None:
        """Undo what the submission has replaced in modules."""
        for changed, attributes in originals:
            vars(changed).update(attributes)

    for name in settings["checks"]:
        check = getattr(module, name)
        setattr(module, name, _reporting(check, restore, settings["token"]))
    originals += [(original, dict(vars(original))) for original in modules]
    limit_resources(settings["memory"], settings["seconds"])
    return module


def _reporting(
    check: Callable[[Any], bool], restore: Callable[[], None], token: str, send=display
) -> Callable[[Any], bool]:
    """Return a check that also sends its verdict and its hint to the grader."""

    def reporting(answer: Any) -> bool:
        restore()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            passed = check(answer) is True
        no_answer = answer is None or answer is ...
        verdict = "passed" if passed else "not attempted" if no_answer else "failed"
        hint = "" if passed else printed.getvalue().strip().removeprefix("not yet: ")
        data = {"token": token, "check": check.__name__, "verdict": verdict}
        send({VERDICT: data | {"hint": hint}}, raw=True)
        return passed

    return reporting


def missing_limits() -> str:
    """Say which limits do not hold on this system, and what to do; "" on Linux."""
    try:
        import resource  # noqa: F401
    except ImportError:  # Windows
        return (
            "this system limits neither memory nor processor time nor the size of"
            " files; only --timeout ends a submission. Grade in WSL, in a container or"
            " on Linux"
        )
    if not MEMORY_OF_PROCESS.exists():  # macOS
        return (
            "this system does not limit memory; --memory has no effect. Grade in a"
            " container or on Linux if a submission needs too much"
        )
    return ""


def limit_resources(memory: int, seconds: int) -> None:
    """Limit the size of files, processor time and memory of this process.

    Does nothing on a system without such limits; `missing_limits` says so.

    Args:
        memory: bytes that it may allocate beyond what it has now. The limit needs
            Linux: macOS does not enforce one, and has no `/proc`.
        seconds: of processor time, from now.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    limits = {
        resource.RLIMIT_FSIZE: LARGEST_FILE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: used + seconds,
    }
    if MEMORY_OF_PROCESS.exists():
        pages = int(MEMORY_OF_PROCESS.read_text(encoding="ascii").split()[0])
        limits[resource.RLIMIT_AS] = pages * os.sysconf("SC_PAGE_SIZE") + memory
    for limit, value in limits.items():
        # A lower limit that already holds may not be raised.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (value, value))
