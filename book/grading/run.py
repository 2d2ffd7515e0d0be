"""Run one submission's statements and report each check: the process that the grader
starts, once a submission.

    python -m grading.run DESCRIPTOR MEMORY_BYTES SECONDS

Chapter and statements come from stdin. SECONDS is for one statement, so that an endless
loop in one exercise leaves time for the next.

What the statements print goes nowhere. Verdicts leave through a pipe of their own, as
lines of JSON, the moment they are known: a submission that is stopped later keeps those
it has.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from grading.submission import GRADER, PACKAGE, Statement

WORST_FILE = 256 * 2**20  # bytes that a submission may write into one file


class TooLong(BaseException):
    """Raised in a statement whose time is over; no `except Exception` of a submission
    catches it.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """


def limit_memory(extra: int) -> None:
    """Limit the memory and the size of files, on Linux only.

    The process may allocate `extra` bytes more than it has now, and write `WORST_FILE`
    bytes into a file. The present size is read from `/proc`; on a system without it,
    such as macOS, nothing is limited.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))
        resource.setrlimit(resource.RLIMIT_FSIZE, (WORST_FILE, WORST_FILE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


class Checks:
    """Calls the grader's checks on answers and reports each verdict.

    The checks were imported before the submission ran. What it puts in place of a
    function of PyTorch, of Python or of paperlib is put back before each check.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_a_cheat_does_not_pass
    """

    def __init__(self, chapter: str, report: Callable[[dict[str, str]], None]):
        self.module = importlib.import_module(f"{PACKAGE}.{chapter}")
        self.report = report
        self.told: set[str] = set()  # checks that the present statement has reported
        ours = [
            found
            for name, found in sys.modules.items()
            if name.partition(".")[0] == "paperlib"
        ]
        self.originals = [
            (found, dict(vars(found)))
            for found in (*ours, torch, F, sys.modules["builtins"])
        ]

    def __call__(self, name: str, *answers: Any, **named: Any) -> bool:
        """Stand in the place of the check `name`."""
        given = [*answers, *named.values()]
        self.put_back()
        if not given or given[0] is None or given[0] is ...:
            return self.tell(name, "not attempted")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            passed = getattr(self.module, name)(given[0]) is True
        hints = [
            line
            for line in output.getvalue().splitlines()
            if line.startswith("not yet: ")
        ]
        return self.tell(
            name,
            "passed" if passed else "failed",
            "" if passed or not hints else hints[-1][9:],
        )

    def tell(self, name: str, verdict: str, hint: str = "") -> bool:
        """Report a verdict, and return whether the answer is right."""
        self.told.add(name)
        self.report({"check": name, "verdict": verdict, "hint": hint})
        return verdict == "passed"

    def put_back(self) -> None:
        """Undo what the submission replaced in modules."""
        for module, names in self.originals:
            _restore(module, names)


def _restore(module: ModuleType, names: dict[str, Any]) -> None:
    now = vars(module)
    for name, value in names.items():
        if now.get(name) is not value:
            now[name] = value


def run(statements: list[Statement], checks: Checks, seconds: float) -> None:
    """Run the statements one by one, as a notebook's cells; one that fails does not
    keep the next from running.

    Args:
        statements: what to run.
        checks: what stands in the place of the chapter's checks.
        seconds: how long one statement may take.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    space, first_error = vars(main), ""
    space["display"] = lambda *_, **__: None  # IPython's

    def stop(*_: object) -> None:
        raise TooLong(f"not done after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    for statement in statements:
        checks.told = set()
        error = statement.error
        if not error:
            space[GRADER] = checks
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                exec(compile(statement.source, "<notebook>", "exec"), space)
            except MemoryError:
                error = "MemoryError: more memory than allowed"
            # SystemExit, too: it ends a submission's statement, not the grading
            except BaseException as caught:
                error = f"{type(caught).__name__}: {caught}".strip(": ").splitlines()[0]
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        for name in statement.checks:
            if error and name not in checks.told:
                earlier = f" (before that: {first_error})" if first_error else ""
                checks.tell(name, "error", f"{error}{earlier}")
        if error and not statement.checks:
            first_error = first_error or error


def main(arguments: list[str]) -> None:
    """Run what stands on stdin; see the module's first lines.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """
    descriptor = int(arguments[0])
    memory = int(arguments[1])
    seconds = float(arguments[2])
    task = json.load(sys.stdin)
    torch.set_num_threads(1)
    with os.fdopen(descriptor, "w", encoding="utf-8") as pipe:

        def report(event: dict[str, str], dumps=json.dumps) -> None:
            pipe.write(dumps(event) + "\n")
            pipe.flush()

        checks = Checks(task["chapter"], report)
        limit_memory(memory)
        run(
            [Statement(**statement) for statement in task["statements"]],
            checks,
            seconds,
        )
        report({"end": "reached"})
        pipe.flush()
        os._exit(0)  # threads that the submission left running end with it


if __name__ == "__main__":
    main(sys.argv[1:])
