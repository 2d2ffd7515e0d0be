"""Grade a folder of submitted notebooks into a table:
`python book/grading grade FOLDER`.

Each submission runs in a process of its own, in an empty folder, with limits of time
and memory. It runs with your rights all the same: grade what strangers hand in inside a
container, or as a user who owns nothing.
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import paperlib
from grading.submission import CHAPTERS, Submission, exercises, read
from paperlib.storage import atomic_path

# Of paperlib and of this package.
IMPORTED_FROM = (Path(paperlib.__file__).parents[1], Path(__file__).parents[1])
LARGEST = 100 * 2**20  # bytes of a submission that are read
PASSED_ON = (
    *"PATH HOME LANG LC_ALL TMPDIR TZ VIRTUAL_ENV SYSTEMROOT LD_LIBRARY_PATH".split(),
)
GIGABYTE = 10**9
# Verdicts of a submission, and characters of one.
MOST_EVENTS, LONGEST_EVENT = 10_000, 4000


class Grade(NamedTuple):
    """One submission's row."""

    name: str
    status: str  # "graded", or why it is not
    # Check → passed, failed, not attempted, error, or not reached.
    verdicts: dict[str, str]
    hints: dict[str, str]
    seconds: float


class Limits(NamedTuple):
    """What a submission may take, and how much of it is run."""

    seconds: float = 120
    memory: float = 4  # gigabytes above what an idle process holds
    everything: bool = False  # run all cells, not only what the answers depend on


def files_of(folder: Path, table: Path | None = None) -> list[Path]:
    """List what was handed in: every file below `folder`, except hidden ones and the
    table itself.

    Raises:
        ValueError: if there is no such folder, or nothing in it.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_a_folder_without_files_is_refused
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give the folder that holds the submitted notebooks"
        )
    below = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    )

    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    found = [
        path
        for path in below
        if not is_hidden(path)
        and (table is None or path.absolute() != table.absolute())
    ]
    if not found:
        raise ValueError(
            f"{folder} holds no files; put the submitted notebooks there, in folders if"
            " you like"
        )
    return found


def load(path: Path, everything: bool = False) -> Submission:
    """Read one file as a submission.

    Raises:
        ValueError: if it is none; the message is what the table says.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_what_is_no_submission_gets_a_row
    """
    if path.is_symlink():
        raise ValueError("a link, not a file; it was not followed")
    if path.suffix.lower() != ".ipynb":
        raise ValueError(
            f"not a notebook: its name ends in {path.suffix or 'nothing'}, not in"
            " .ipynb"
        )
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"too large: {path.stat().st_size / 1e6:.0f} MB, at most"
            f" {LARGEST / 1e6:.0f}"
        )
    try:
        return read(path.read_text(encoding="utf-8-sig"), everything)
    except UnicodeDecodeError as error:
        raise ValueError("damaged: not text in UTF-8") from error
    except OSError as error:
        raise ValueError(f"could not be read: {error.strerror}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"could not be read: {type(error).__name__}") from error


def run_alone(
    submission: Submission, limits: Limits
) -> tuple[str, list[dict[str, str]]]:
    """Run a submission in its own process.

    Returns:
        how that ended ("graded", or what went wrong), and the verdicts in the order in
        which they came.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """
    task = {
        "chapter": submission.chapter,
        "statements": [statement._asdict() for statement in submission.statements],
    }
    surroundings = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    surroundings |= {
        "PYTHONPATH": os.pathsep.join(map(str, IMPORTED_FROM)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        # memory limits and CUDA's address space do not go together
        "CUDA_VISIBLE_DEVICES": "",
        "PAPERLIB_PROFILE": "smoke",
    }
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(
        prefix="submission-", ignore_cleanup_errors=True
    ) as empty:
        command = [
            sys.executable,
            "-m",
            "grading.run",
            str(writing),
            str(int(limits.memory * GIGABYTE)),
            str(limits.seconds / 3),
        ]
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=empty,
                    env=surroundings,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            lines: list[str] = []
            reader = threading.Thread(
                target=_collect, args=(reading, lines), daemon=True
            )
            reader.start()
            ended = "graded"
            try:
                process.communicate(json.dumps(task).encode(), timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                ended = f"timed out after {limits.seconds:g} s"
            finally:
                _kill_all(process)
            # Not longer: a process that slipped away may hold the pipe open.
            reader.join(2)
            events = list(_events(lines[:MOST_EVENTS]))
            said.seek(0)
            last = (
                said.read()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
            )
    if ended == "graded" and {"end": "reached"} not in events:
        code = process.returncode
        how = (
            f"stopped by {signal.Signals(-code).name}"
            if code and code < 0
            else f"exit status {code}"
        )
        ended = f"crashed ({how}{f': {last[0][:200]}' if last else ''})"
    return ended, [event for event in events if "check" in event]


def _kill_all(process: subprocess.Popen) -> None:
    """End the process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _collect(reading: int, lines: list[str]) -> None:
    """Read the pipe to its end, and keep a bounded part of it."""
    with open(reading, encoding="utf-8", errors="replace") as pipe:
        while line := pipe.readline(LONGEST_EVENT):
            if len(lines) < MOST_EVENTS:
                lines.append(line)


def _events(lines: list[str]) -> Iterator[dict[str, str]]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def grade_file(path: Path, name: str, chapter: str, limits: Limits) -> Grade:
    """Grade one file against one chapter.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """
    started = time.monotonic()
    try:
        submission = load(path, limits.everything)
        if submission.chapter != chapter:
            raise ValueError(f"another chapter: {submission.chapter}, not {chapter}")
    except ValueError as error:
        return Grade(name, str(error), {}, {}, time.monotonic() - started)
    status, events = run_alone(submission, limits)
    return Grade(
        name,
        status,
        *final_verdicts(chapter, status, events),
        time.monotonic() - started,
    )


def final_verdicts(
    chapter: str, status: str, events: list[dict[str, str]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Take the last answer to each exercise; a stub that was left standing beside an
    answer is none.

    Returns:
        check → verdict, for all of the chapter's checks, and check → hint.

    Source: none, the book's own. Departures: none.
    Test: test_grade.py::test_the_last_answer_counts_and_a_stub_beside_it_does_not
    """
    verdicts = dict.fromkeys(
        exercises(chapter), "not attempted" if status == "graded" else "not reached"
    )
    hints = {}
    for event in events:
        check, verdict = event["check"], event.get("verdict", "error")
        if check in verdicts and (
            verdict != "not attempted" or verdicts[check] == "not reached"
        ):
            verdicts[check], hints[check] = verdict, event.get("hint", "")
    return verdicts, hints


def common_chapter(paths: list[Path]) -> str:
    """Find the chapter that most of the submissions answer.

    Raises:
        ValueError: if none answers any, or two are answered equally often.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_a_submission_of_another_chapter_is_told
    """
    found: Counter[str] = Counter()
    for path in paths:
        try:
            found[load(path).chapter] += 1
        except ValueError:
            continue
    most = found.most_common(2)
    if not most:
        raise ValueError(
            f"no submission answers a chapter's exercises; looked at {len(paths)} files"
        )
    if len(most) == 2 and most[0][1] == most[1][1]:
        raise ValueError(
            f"as many submissions of {most[0][0]} as of {most[1][0]}; say which with"
            " --chapter"
        )
    return most[0][0]


def write_table(grades: list[Grade], chapter: str, target: Path) -> None:
    """Write the table, whole or not at all: a row a submission, a column an exercise.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_the_table_is_safe_to_open
    """
    names = exercises(chapter)
    text = io.StringIO()
    writer = csv.writer(text)
    columns = [f"{number} {name}" for number, name in enumerate(names, 1)]
    writer.writerow(
        ["submission", "status", "passed", "of", *columns, "seconds", "remarks"]
    )
    for grade in grades:
        remarks = "; ".join(
            f"{names.index(name) + 1}: {hint}"
            for name, hint in grade.hints.items()
            if hint
        )
        verdicts = [grade.verdicts.get(name, "") for name in names]
        row = [
            grade.name,
            grade.status,
            verdicts.count("passed"),
            len(names),
            *verdicts,
            f"{grade.seconds:.1f}",
            remarks,
        ]
        writer.writerow([_safe(value) for value in row])
    with atomic_path(target) as temporary:
        # With its byte order mark spreadsheets read names in every script.
        temporary.write_text(text.getvalue(), encoding="utf-8-sig", newline="")


def to_do(grades: list[Grade], limits: Limits) -> list[str]:
    """Say what of a table needs a look, and what to do about it; nothing if everything
    was graded.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_the_last_lines_say_what_is_left_to_do
    """

    def count(some: list[Grade]) -> str:
        return f"{len(some)} file" + "s" * (len(some) != 1)

    def is_late(grade: Grade) -> bool:
        return grade.status.startswith("timed out") or any(
            "TooLong" in hint for hint in grade.hints.values()
        )

    late = [g for g in grades if is_late(g)]
    broken = [g for g in grades if g not in late and "error" in g.verdicts.values()]
    died = [g for g in grades if g.status.startswith("crashed")]
    refused = [g for g in grades if not g.verdicts]
    lines = []
    if late:
        longer = f"--timeout {2 * limits.seconds:g}"
        lines.append(
            f"{count(late)} ran out of time: an endless loop, or a slow machine (try"
            f" {longer}, fewer --jobs)"
        )
    if died:
        lines.append(
            f"{count(died)} ended before the last answer: see status; answers not"
            " reached count as none"
        )
    if broken:
        again = (
            ""
            if limits.everything
            else "; where those miss an earlier cell, --all-cells --timeout 600"
        )
        lines.append(
            f"{count(broken)} with answers that did not run: see remarks{again}"
        )
    if refused:
        lines.append(f"{count(refused)} not graded: status says why")
    return lines


def _safe(value: object) -> str:
    """Keep a spreadsheet from taking a text for a formula, and a row on one line."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def grade(
    folder: Path,
    target: Path,
    chapter: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  a NamedTuple can't be changed
    jobs: int = 1,
    say: Callable[[str], None] = print,
) -> list[Grade]:
    """Grade every file below a folder and write the table after each.

    Args:
        folder: where the submissions are, in folders of their own or not.
        target: the table, a CSV file.
        chapter: whose exercises; None: that of most submissions.
        limits: time and memory of one submission.
        jobs: how many run at once.
        say: called with a line for each submission that is done.

    Raises:
        ValueError: if there is nothing to grade, an argument is out of range, or the
            chapter can't be told.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_each_submission_costs_only_itself
    """
    if chapter is not None and chapter not in CHAPTERS:
        raise ValueError(f"chapter {chapter!r}; expected one of {', '.join(CHAPTERS)}")
    if jobs < 1 or limits.seconds <= 0 or limits.memory <= 0:
        raise ValueError(
            f"jobs {jobs}, {limits.seconds:g} s and {limits.memory:g} GB; each must be"
            " above zero"
        )
    if not target.parent.is_dir():
        raise ValueError(f"the table can't be written: {target.parent} is no folder")
    paths = files_of(folder, target)
    chapter = chapter or common_chapter(paths)
    say(f"{len(paths)} files, chapter {chapter}, at most {limits.seconds:g} s each")
    done: dict[Path, Grade] = {}

    def one(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        done[path] = grade_file(path, name, chapter, limits)

    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(one, path) for path in paths]
        try:
            for path, task in zip(paths, tasks, strict=True):
                task.result()
                row = done[path]
                passed = list(row.verdicts.values()).count("passed")
                say(
                    f"{_safe(row.name)}: {row.status}"
                    + (f", {passed} of {len(row.verdicts)}" if row.verdicts else "")
                )
                write_table(
                    [done[known] for known in paths if known in done], chapter, target
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for line in to_do([done[path] for path in paths], limits):
        say(line)
    say(f"written: {target}, a row for each file")
    return [done[path] for path in paths]
