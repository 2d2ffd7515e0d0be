"""Grade submitted notebooks into a table: `python book/grading grade FOLDER`.

Each submission runs in a kernel of its own, in an empty folder, with limits of time and
memory. It runs with your rights: grade what strangers submit inside a container, or as
a user who owns nothing.
"""

import asyncio
import csv
import io
import json
import logging
import os
import re
import secrets
import subprocess
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

import paperlib
from grading.run import SETTINGS, VERDICT, missing_limits
from grading.submission import KINDS, PACKAGE, Submission, exercises, read
from paperlib.storage import atomic_path

LARGEST = 100 * 2**20  # bytes of a file that are read
# Of paperlib and of this package: what a submission imports.
IMPORTED_FROM = (Path(paperlib.__file__).parents[1], Path(__file__).parents[1])
PASSED_ON = frozenset(
    "PATH HOME LANG LC_ALL TMPDIR TZ VIRTUAL_ENV LD_LIBRARY_PATH"
    " SYSTEMROOT USERPROFILE TEMP TMP".split()
)
NOTEBOOK_NAMES = (".ipynb", ".txt", ".json")  # some browsers append .txt
# How Moodle and Canvas name what they put into the zip of a class.
STUDENT = re.compile(r"(.+?)_\d+_assignsubmission_|([^_]+)_(?:LATE_)?\d+_\d+_")
# Runs before a submission. The kernel's own `exit` would end the kernel.
PRELUDE = """\
from sys import exit, exit as quit
from grading.run import prepare
check = prepare()"""


class Limits(NamedTuple):
    """What a submission may use, and how much of it is run."""

    seconds: float = 120
    memory: float = 4  # gigabytes, beyond those of a process that only imports PyTorch
    everything: bool = False  # run all statements, not only those that answers need


class Grade(NamedTuple):
    """The row of one submission."""

    name: str
    status: str  # "graded", or the reason why it is not
    verdicts: dict[str, str] = {}  # check → passed, failed, error, not attempted or …
    remarks: tuple[str, ...] = ()
    seconds: float = 0
    code: str = ""  # what was run, without comments
    seed: str = ""  # of the notebook's numbers
    has_other_seed: bool = False  # than the numbers that it was graded with


def files_of(
    folder: Path, table: Path | None = None
) -> Iterator[tuple[str, bytes | str]]:
    """Yield name and content of each submitted file, also of those in zip files.

    Hidden files and the table are skipped. The content is a str if the file was not
    read: the reason.
    """
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; expected a folder of submissions")
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    for path in paths:
        name = path.relative_to(folder).as_posix() if path != folder else path.name
        is_table = table is not None and path.absolute() == table.absolute()
        is_folder = path.is_dir() and not path.is_symlink()
        if is_table or is_folder or _is_hidden(name):
            continue
        try:
            if path.is_symlink():
                yield name, "a link, not a file; it was not followed"
            elif path.suffix.lower() == ".zip":
                yield from _members(name, path)
            elif path.stat().st_size > LARGEST:
                yield name, f"too large: more than {LARGEST / 1e6:.0f} MB"
            else:
                yield name, path.read_bytes()
        except OSError as error:
            yield name, f"could not be read: {error.strerror}"


def _members(
    name: str, file: Path | io.BytesIO, depth: int = 1
) -> Iterator[tuple[str, bytes | str]]:
    """Yield the files in a zip file, also those of zip files inside it."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                inner = f"{name}/{member.filename}"
                if member.is_dir() or _is_hidden(member.filename):
                    continue
                if member.file_size > LARGEST or depth > 2:
                    yield inner, "too large, or too many zip files inside each other"
                elif inner.lower().endswith(".zip"):
                    yield from _members(
                        inner, io.BytesIO(archive.read(member)), depth + 1
                    )
                else:
                    yield inner, archive.read(member)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError) as error:
        yield name, f"a damaged or encrypted zip file: {error}"


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def load(name: str, content: bytes | str, everything: bool = False) -> Submission:
    """Read one file as a submission.

    Raises:
        ValueError: if it is not one; the message is the status in the table.
    """
    if isinstance(content, str):
        raise ValueError(content)
    if not name.lower().endswith(NOTEBOOK_NAMES):
        ending = PurePosixPath(name).suffix or "without an ending"
        raise ValueError(f"not a notebook: {ending}; expected a file .ipynb")
    return read(content, everything)


def student_of(name: str) -> str:
    """Return the student's name as Moodle and Canvas write it; otherwise the name of
    the folder, or of the file.
    """
    parts = [part for part in name.split("/") if not part.lower().endswith(".zip")]
    for part in name.split("/")[::-1]:
        if found := STUDENT.match(part):
            return found[1] or found[2]
    return parts[0].partition(".ipynb")[0] if parts else name


def grade_one(
    name: str,
    submission: Submission | str,
    chapter: str,
    limits: Limits,
    seed: int | None = None,
) -> Grade:
    """Grade one submission; a str is the reason why there is none to grade.

    The checks use the numbers of `seed`, whatever the notebook states.
    """
    if isinstance(submission, str):
        return Grade(name, submission)
    if submission.chapter != chapter:
        return Grade(name, f"another chapter: {submission.chapter}, not {chapter}")
    started, token = time.monotonic(), secrets.token_hex()
    status, cells = run(submission, limits, token, seed)
    verdicts = dict.fromkeys(
        exercises()[chapter], "not attempted" if status == "graded" else "not reached"
    )
    hints: dict[str, str] = {}
    first_error = ""
    for statement, cell in zip(submission.statements, cells, strict=True):
        reported, error = _outcome(cell, limits, token)
        if error:
            error = f"{error} (cell {statement.cell}{first_error})"
            raised = {"verdict": "error", "hint": error}
            reported |= dict.fromkeys(statement.checks - {*reported}, raised)
            if not statement.checks:
                first_error = first_error or f"; before that, {error}"
        for check, outcome in reported.items():
            # Dots that are left beside an answer do not replace it.
            if (
                outcome["verdict"] != "not attempted"
                or verdicts[check] == "not reached"
            ):
                verdicts[check], hints[check] = outcome["verdict"], outcome["hint"]
    numbers = {check: number for number, check in enumerate(verdicts, 1)}
    remarks = [
        f"{number}: {hints[check]}"
        for check, number in numbers.items()
        if hints.get(check) and verdicts[check] in ("failed", "error")
    ]
    own_seed, has_other_seed = submission.seed, submission.seed != seed
    if has_other_seed:
        remarks.insert(
            0,
            f"the notebook has the numbers of {_of_seed(own_seed)}; graded with"
            f" {_of_seed(seed)}",
        )
    is_attempted = {"passed", "failed", "error"} & {*verdicts.values()}
    code = "\n".join(s.source for s in submission.statements) if is_attempted else ""
    seconds = time.monotonic() - started
    stated = "" if own_seed is None else str(own_seed)
    return Grade(
        *(name, status, verdicts, tuple(remarks), seconds, code),
        *(stated, has_other_seed),
    )


def _of_seed(seed: int | None) -> str:
    return "the book" if seed is None else f"seed {seed}"


def run(
    submission: Submission, limits: Limits, token: str, seed: int | None = None
) -> tuple[str, list[NotebookNode]]:
    """Run a submission in its own kernel, one notebook cell per statement.

    Args:
        submission: what to run.
        limits: of time and memory.
        token: marks the verdicts of the checks, so that no other output is one.
        seed: of the numbers that the checks use; None: those of the book.

    Returns:
        "graded" or what went wrong, and the executed cells.
    """
    prelude = new_code_cell(PRELUDE)  # an error of this cell ends the run
    allows_errors = {"tags": ["raises-exception"]}
    cells = [
        new_code_cell(s.source, metadata=allows_errors) for s in submission.statements
    ]
    settings = {
        "module": f"{PACKAGE}.{submission.chapter}",
        "checks": list(exercises()[submission.chapter]),
        "token": token,
        "seed": seed,
        "memory": int(limits.memory * 1e9),
        "seconds": int(limits.seconds) + 1,
    }
    client = NotebookClient(
        new_notebook(cells=[prelude, *cells]),
        # The kernel of this Python, not one that is installed under the same name.
        km=AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[])),
        timeout_func=lambda c: None if c is prelude else _seconds_per_cell(limits),
        interrupt_on_timeout=True,
        shutdown_kernel="immediate",
        on_cell_executed=lambda **given: executed.append(given["cell_index"]),
    )
    started, status, executed = time.monotonic(), "graded", []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        folder = Path(work, "submission")
        folder.mkdir()
        environment = {name: os.environ[name] for name in PASSED_ON & os.environ.keys()}
        environment |= {
            "PYTHONPATH": os.pathsep.join(map(str, IMPORTED_FROM)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "IPYTHONDIR": work,
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "Agg",
            "PIP_NO_INDEX": "1",
            # CUDA reserves more address space than the memory limit allows.
            "CUDA_VISIBLE_DEVICES": "",
            "PAPERLIB_PROFILE": "smoke",
            SETTINGS: json.dumps(settings),
        }
        try:
            execution = client.async_execute(
                cleanup_kc=True,
                cwd=str(folder),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            # In a thread of its own, because the caller may run an event loop.
            with ThreadPoolExecutor(1) as pool:
                waiting = asyncio.wait_for(execution, limits.seconds)
                pool.submit(asyncio.run, waiting).result()
        except Exception:  # late, dead, or with outputs that nbclient can't read
            status = "not started: the machine is too slow or out of memory"
            if executed:
                is_late = time.monotonic() - started >= limits.seconds
                end = f"timed out after {limits.seconds:g} s" if is_late else "crashed"
                # The prelude is the first cell that was executed.
                status = (
                    f"{end} in cell {submission.statements[len(executed) - 1].cell}"
                )
    return status, cells


def _seconds_per_cell(limits: Limits) -> int:
    """Return a third of the time, so that an endless loop leaves time for the rest."""
    return max(1, int(limits.seconds / 3))


def _outcome(
    cell: NotebookNode, limits: Limits, token: str
) -> tuple[dict[str, dict[str, str]], str]:
    """Return the verdicts that an executed cell reports, by check, and its error."""
    reported, error = {}, ""
    for output in cell.outputs:
        verdict = output.get("data", {}).get(VERDICT, {})
        if output.output_type == "error":
            error = _one_line(f"{output.ename}: {output.evalue}".strip(": "))[:300]
            if output.ename == "KeyboardInterrupt":
                error = f"not done after {_seconds_per_cell(limits)} s"
        elif isinstance(verdict, dict) and verdict.get("token") == token:
            reported[verdict["check"]] = verdict
    return reported, error


def common_chapter(chapters: Iterable[str]) -> str:
    """Return the chapter of most submissions.

    Raises:
        ValueError: if there is no submission, or the most frequent chapter is not
            unique.
    """
    most = Counter(chapters).most_common(2)
    if not most:
        raise ValueError("none of the files is a submission: no exercises of this book")
    if len(most) == 2 and most[0][1] == most[1][1]:
        raise ValueError(
            f"as many submissions of {most[0][0]} as of {most[1][0]}; choose one with"
            " --chapter"
        )
    return most[0][0]


def common_seed(seeds: Iterable[int | None]) -> int | None:
    """Return the seed of most submissions; None for the numbers of the book.

    Raises:
        ValueError: if the most frequent seed is not unique.
    """
    most = Counter(seeds).most_common(2)
    if len(most) == 2 and most[0][1] == most[1][1]:
        raise ValueError(
            f"as many submissions with the numbers of {_of_seed(most[0][0])} as of"
            f" {_of_seed(most[1][0])}; choose one with --seed"
        )
    return most[0][0] if most else None


def equal_ones(grades: list[Grade]) -> list[list[str]]:
    """Return, for each submission, the names of the others with the same code."""
    names: dict[str, list[str]] = {}
    for grade in grades:
        names.setdefault(grade.code, []).append(grade.name)
    return [
        [name for name in names[grade.code] if grade.code and name != grade.name]
        for grade in grades
    ]


def write_table(
    grades: list[Grade], chapter: str, target: Path, delimiter: str = ","
) -> None:
    """Write the table atomically: one row per submission, and a row of means.

    The means are percentages of what can be reached, over the submissions that ran.
    """
    kinds, equal = exercises()[chapter], equal_ones(grades)
    groups = {kind: [c for c in kinds if kinds[c] == kind] for kind in KINDS}
    groups = {kind: checks for kind, checks in groups.items() if checks}
    groups["passed"] = list(kinds)

    def passed(grade: Grade, checks: list[str]) -> int:
        return sum(grade.verdicts[check] == "passed" for check in checks)

    table = [["student", "submission", "status", "seed"]]
    table[0] += [f"{group} (of {len(checks)})" for group, checks in groups.items()]
    table[0] += [f"{number} {check}" for number, check in enumerate(kinds, 1)]
    table[0] += ["same as", "seconds", "remarks"]
    for grade, others in zip(grades, equal, strict=True):
        row = [student_of(grade.name), grade.name, grade.status, grade.seed]
        for checks in groups.values():
            row.append(passed(grade, checks) if grade.verdicts else "")
        row += [grade.verdicts.get(check, "") for check in kinds]
        remarks = "; ".join(grade.remarks)
        table.append([*row, "; ".join(others), round(grade.seconds), remarks])
    if ran := [grade for grade in grades if grade.verdicts]:
        means = [
            round(100 * sum(passed(grade, c) for grade in ran) / len(ran) / len(c))
            for c in (*groups.values(), *([check] for check in kinds))
        ]
        table.append(["mean in %", "", f"{len(ran)} graded", "", *means, "", "", ""])
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([_safe(value) for value in row] for row in table)
    with atomic_path(target) as temporary:
        # With a byte order mark, spreadsheets read names in every script.
        temporary.write_text(text.getvalue(), encoding="utf-8-sig", newline="")


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _safe(value: object) -> str:
    """Return a text that no spreadsheet reads as a formula, on one line."""
    text = _one_line(str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def to_do(grades: list[Grade], limits: Limits) -> list[str]:
    """Say which rows need a look, and what to do about them."""

    def is_late(grade: Grade) -> bool:
        return "timed out" in grade.status or "not done after" in str(grade.remarks)

    longer = f"--timeout {2 * limits.seconds:g}"
    reasons = [
        (
            is_late,
            f"out of time: an endless loop, or a slow machine (try {longer},"
            " fewer --jobs)",
        ),
        (
            lambda grade: grade.status.startswith("crashed"),
            "crashed: answers after that are not reached",
        ),
        (
            lambda grade: "error" in grade.verdicts.values() and not is_late(grade),
            "with answers that raised an error: see remarks; where these miss an"
            " earlier cell, use --all-cells --timeout 600",
        ),
        (
            lambda grade: grade.has_other_seed,
            "with numbers of another seed than the class: an old copy, or a changed"
            " seed (choose the class's with --seed)",
        ),
        (lambda grade: not grade.verdicts, "not graded: see status"),
    ]
    counts = [(sum(map(applies, grades)), text) for applies, text in reasons]
    counts.append(
        (sum(map(bool, equal_ones(grades))), 'equal to others: see "same as"')
    )
    return [f"{n} {'file' if n == 1 else 'files'} {text}" for n, text in counts if n]


def grade(
    folder: Path,
    target: Path,
    chapter: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  a NamedTuple can't be changed
    jobs: int = 1,
    delimiter: str = ",",
    seed: int | None | Literal["common"] = "common",
    report: Callable[[str], None] = print,
) -> list[Grade]:
    """Grade all files and write the table after each.

    Args:
        folder: of the submissions, in folders of their own or not; or a zip file.
        target: the table, a CSV file.
        chapter: whose exercises; None: those of most submissions.
        limits: time and memory of one submission.
        jobs: how many run at the same time.
        delimiter: between the columns of the table.
        seed: of the numbers in the exercises; None: those of the book; "common": as
            most submissions of the chapter state.
        report: called with a line for each submission that is done.

    Raises:
        ValueError: if there is nothing to grade, an argument is out of range, or the
            chapter is ambiguous.
    """
    if jobs < 1 or limits.seconds <= 0 or limits.memory <= 0 or len(delimiter) != 1:
        raise ValueError(
            f"received {jobs} jobs, {limits.seconds:g} s, {limits.memory:g} GB and the"
            f" delimiter {delimiter!r}; expected numbers above 0 and one character"
        )
    if chapter is not None and chapter not in exercises():
        raise ValueError(
            f"chapter {chapter!r}; expected one of {', '.join(exercises())}"
        )
    if not target.parent.is_dir():
        raise ValueError(f"the table can't be written: {target.parent} is not a folder")
    # nbformat and nbclient log what the table says.
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    submissions: list[tuple[str, Submission | str]] = []
    for name, content in files_of(folder, target):
        try:
            submissions.append((name, load(name, content, limits.everything)))
        except ValueError as error:
            submissions.append((name, str(error)))
    if not submissions:
        raise ValueError(f"{folder} holds no files; expected submitted notebooks")
    chapter = chapter or common_chapter(
        s.chapter for _, s in submissions if isinstance(s, Submission)
    )
    if seed == "common":
        seed = common_seed(
            s.seed
            for _, s in submissions
            if isinstance(s, Submission) and s.chapter == chapter
        )
    report(
        f"{len(submissions)} files, chapter {chapter}, numbers of {_of_seed(seed)}, at"
        f" most {limits.seconds:g} s"
    )
    if missing := missing_limits():
        report(f"careful: {missing}")
    done: list[Grade] = []
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(grade_one, *s, chapter, limits, seed) for s in submissions]
        try:
            for task in tasks:
                done.append(task.result())
                n_passed = [*done[-1].verdicts.values()].count("passed")
                report(f"{_safe(done[-1].name)}: {done[-1].status}, {n_passed} passed")
                write_table(done, chapter, target, delimiter)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for line in [*to_do(done, limits), f"written: {target}"]:
        report(line)
    return done
