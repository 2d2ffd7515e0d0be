"""Grading: a row for everything that is submitted, each in its own process, and no pass
that was not earned.
"""

import asyncio
import csv
import io
import os
import resource
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from exercise_checks import CHAPTERS
from grading import __main__ as command
from grading import run
from grading.grade import (
    Grade,
    Limits,
    common_chapter,
    common_seed,
    files_of,
    grade,
    grade_one,
    load,
    student_of,
    to_do,
    write_table,
)
from grading.run import LARGEST_FILE, limit_resources
from grading.submission import exercises, read
from submissions import answered, hand_in, notebook, solved, stub

from paperlib.exercises import cam

QUICK = Limits(seconds=60)
SEPARABLE = "lambda k, m, n, s: k * k * m * s * s + m * n * s * s"
MARKS = {"p": "passed", "f": "failed", "e": "error", "-": "not attempted"}
MARKS["."] = "not reached"


def run_one(text, limits=QUICK):
    """Grade one submission against its own chapter."""
    submission = read(text.encode(), limits.everything)
    return grade_one("student.ipynb", submission, submission.chapter, limits)


def rows(table, delimiter=","):
    with table.open(encoding="utf-8-sig", newline="") as file:
        return {r["submission"]: r for r in csv.DictReader(file, delimiter=delimiter)}


def zipped(files):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def attempt(first="10_035_200", second="...", third="...", fifth="...", **options):
    """A submission of chapter 01 with some answers; its last exercise is untouched."""
    answers = {"standard_cost": first, "break_even": second}
    answers |= {"separable_function": third, "spared_weights": fifth}
    return answered("mobilenet", answers, **options)


def marks(row):
    """The verdicts of a row, one letter each."""
    letters = {verdict: letter for letter, verdict in MARKS.items()}
    return "".join(
        letters[v] for k, v in row.items() if k[0].isdigit() and v in letters
    )


FOREVER = "def forever():\n    while True:\n        pass"
STUBBORN = """import time
def stay():
    while True:
        try:
            time.sleep(100)
        except BaseException:
            pass"""
DIE = "import os, signal\ndef die():\n    os.kill(os.getpid(), signal.SIGKILL)"
# A teacher's check judges, whatever the notebook makes of it.
REPLACED = """import paperlib.exercises.mobilenet as theirs
theirs.break_even = lambda answer: True
class mine:
    standard_cost = staticmethod(lambda answer: True)
check = mine"""
IPYTHON = """!pip install \\
   timm
%matplotlib inline
files = !ls
from paperlib.exercises import mobilenet as check"""
BROKEN = """def separable(k, m, n, s)
    return 1

check.separable_function(separable)
check.spared_weights(44_640)"""
IMPORT = "from paperlib.exercises import mobilenet as check"
STAR = "from paperlib.exercises.mobilenet import *\nstandard_cost(10_035_200)"


def old_format(text):
    return nbformat.writes(nbformat.convert(nbformat.reads(text, as_version=4), 3))


def a_class():
    """24 submissions as they come: (name in the folder, content, student, start of the
    status, verdicts, part of the remarks).
    """
    moodle = "_assignsubmission_file_"
    inner = zipped({"ok/01.ipynb": attempt("10_035_199 + 1"), "__MACOSX/01.ipynb": "x"})
    return [
        (
            f"class.zip/Ada Byron_101{moodle}/01_mobilenet.ipynb",
            solved("mobilenet"),
            "Ada Byron",
            "graded",
            "pppppp",
            "",
        ),
        (
            f"class.zip/Ben Ng_102{moodle}01_mobilenet.ipynb",
            attempt("10_035_198 + 2", "18"),
            "Ben Ng",
            "graded",
            "pp----",
            "",
        ),
        (
            f"class.zip/Cleo_103{moodle}/a.ipynb",
            attempt("20_070_400", "17"),
            "Cleo",
            "graded",
            "ff----",
            "counts the pair once",
        ),
        (f"class.zip/Dan_104{moodle}/all.zip", inner, "Dan", "graded", "p-----", ""),
        (
            f"class.zip/Eve_105{moodle}/half.ipynb",
            stub("mobilenet")[:200],
            "Eve",
            "not a notebook",
            "",
            "",
        ),
        (
            "canvas.zip/doejane_LATE_5512_90210_01_mobilenet-1.ipynb",
            attempt("10_035_197 + 3", third=SEPARABLE),
            "doejane",
            "graded",
            "p-p---",
            "",
        ),
        (
            "canvas.zip/millerzoe_77_991_01.ipynb",
            attempt("1", "2", before=REPLACED),
            "millerzoe",
            "graded",
            "ff----",
            "",
        ),
        ("stub.ipynb", stub("mobilenet"), "stub", "graded", "------", ""),
        (
            "broken cell.ipynb",
            notebook([IMPORT, "check.standard_cost(10_035_200)", BROKEN]),
            "broken cell",
            "graded",
            "p-e-p-",
            "before that, SyntaxError: expected ':'",
        ),
        (
            "endless.ipynb",
            attempt("10_035_200", "forever()", fifth="44_640", before=FOREVER),
            "endless",
            "graded",
            "pe--p-",
            "not done after 10 s (cell 3)",
        ),
        (
            "endless function.ipynb",
            attempt(
                "10_035_196 + 4",
                third="lambda *_: forever()",
                fifth="44_640",
                before=FOREVER,
            ),
            "endless function",
            "graded",
            "p-e-p-",
            "3: not done after 10 s",
        ),
        (
            "stubborn.ipynb",
            attempt("10_035_195 + 5", "stay()", before=STUBBORN),
            "stubborn",
            "timed out after 30 s in cell 3",
            "p.....",
            "",
        ),
        (
            "dying.ipynb",
            attempt("10_035_194 + 6", "die()", before=DIE),
            "dying",
            "crashed in cell 3",
            "p.....",
            "",
        ),
        (
            "leaving.ipynb",
            attempt("10_035_193 + 7", "exit()", fifth="44_640"),
            "leaving",
            "graded",
            "pe--p-",
            "SystemExit",
        ),
        (
            "greedy.ipynb",
            attempt(
                "10_035_192 + 8",
                "len(bytearray(10**11))",
                fifth="torch.ones(10**11).sum()",
                before="import torch",
            ),
            "greedy",
            "graded",
            "pe--e-",
            "memory",
        ),
        (
            "Müller, Zoë/meine Lösung (final) – Kopie.ipynb",
            attempt("10_035_191 + 9"),
            "Müller, Zoë",
            "graded",
            "p-----",
            "",
        ),
        (
            "downloaded.ipynb.txt",
            attempt("10_035_190 + 10"),
            "downloaded",
            "graded",
            "p-----",
            "",
        ),
        (
            "no import.ipynb",
            notebook(["check.standard_cost(10_035_200)", "check.break_even(nothing)"]),
            "no import",
            "graded",
            "pe----",
            "NameError",
        ),
        ("other.ipynb", stub("cam"), "other", "another chapter: cam", "", ""),
        (
            "twin a.ipynb",
            attempt("10035200", "18", before="x = 1  # mine"),
            "twin a",
            "graded",
            "pp----",
            "",
        ),
        (
            "twin b.ipynb",
            attempt("10_035_200", "(18)", after="print(2)"),
            "twin b",
            "graded",
            "pp----",
            "",
        ),
        ("star.ipynb", notebook([STAR]), "star", "graded", "p-----", ""),
        (
            "ipython.ipynb",
            notebook(
                [
                    IPYTHON,
                    "files = !ls\ncheck.standard_cost(10_035_200)\ntorch.relu?",
                    "r = %time check.break_even(18)",
                ]
            ),
            "ipython",
            "graded",
            "pp----",
            "",
        ),
        (
            "version 3.ipynb",
            old_format(attempt("10_035_189 + 11")),
            "version 3",
            "graded",
            "p-----",
            "",
        ),
    ]


def hand_in_class(folder, members):
    """Write the files of a class; returns the submissions' names in the table."""
    archives = {"class.zip": {}, "canvas.zip": {}}
    names = []
    for name, content, *_ in members:
        archive, _, inner = name.partition("/")
        if archive in archives:
            archives[archive][inner] = content
        else:
            hand_in(folder, {name: content})
        names.append(name + "/ok/01.ipynb" if isinstance(content, bytes) else name)
    hand_in(folder, {name: zipped(files) for name, files in archives.items() if files})
    return names


def assert_class(folder, members, limits, **options):
    """Grade a class and compare every row, the means and the last lines."""
    names = hand_in_class(folder / "in", members)
    said = []
    grade(folder / "in", folder / "g.csv", None, limits, report=said.append, **options)
    found = rows(folder / "g.csv", options.get("delimiter", ","))
    means = found.pop("")
    assert set(found) == set(names)
    kinds = list(exercises()["mobilenet"].values())
    for name, (_, _, student, status, verdicts, remark) in zip(
        names, members, strict=True
    ):
        row = found[name]
        assert (name, row["student"], marks(row)) == (name, student, verdicts)
        assert row["status"].startswith(status) and remark in row["remarks"], row
        right = [k for k, v in zip(kinds, verdicts, strict=False) if v == "p"]
        points = {k: str(right.count(k)) if verdicts else "" for k in set(kinds)}
        assert row["warm-up (of 2)"] == points["warm-up"]
        assert row["core (of 3)"] == points["core"]
        assert row["stretch (of 1)"] == points["stretch"]
        assert row["passed (of 6)"] == (str(len(right)) if verdicts else "")
    graded = [verdicts for *_, verdicts, _ in members if verdicts]
    firsts = sum(verdicts[0] == "p" for verdicts in graded)
    assert means["status"] == f"{len(graded)} graded"
    assert means["1 standard_cost"] == str(round(100 * firsts / len(graded)))
    everything = sum(verdicts.count("p") for verdicts in graded)
    assert means["passed (of 6)"] == str(round(100 * everything / len(graded) / 6))
    assert said[-1] == f"written: {folder / 'g.csv'}"
    return found, said


def test_a_few_submissions(tmp_path):
    """Two per archive and folder; `test_a_class` has all kinds."""
    chosen = ("Cleo", "Dan", "doejane", "broken cell", "ipython", "other")
    members = [member for member in a_class() if member[2] in chosen]
    found, said = assert_class(tmp_path, members, QUICK, delimiter=";")
    assert not any(row["same as"] for row in found.values())
    assert any("raised an error" in line for line in said)


@pytest.mark.long
def test_a_class(tmp_path):
    """24 submissions, with everything that goes wrong."""
    found, said = assert_class(tmp_path, a_class(), Limits(seconds=30), jobs=2)
    same = {name: row["same as"] for name, row in found.items() if row["same as"]}
    assert same == {"twin a.ipynb": "twin b.ipynb", "twin b.ipynb": "twin a.ipynb"}
    assert [line.split(" ", 2)[0] for line in said[-6:-1]] == ["3", "1", "4", "2", "2"]


@pytest.mark.long
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_solutions_of_the_notebook_pass(chapter):
    """In the context of the notebook; the dots beside them take nothing away."""
    result = run_one(solved(chapter))
    assert result.status == "graded" and result.remarks == ()
    assert result.verdicts == dict.fromkeys(exercises()[chapter], "passed")


def test_file_sizes_and_time_are_limited_where_there_is_no_proc(monkeypatch, tmp_path):
    """As on macOS. The limits are recorded, not set: this process has to go on."""
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    limit_resources(2**30, 60)
    assert limits.pop(resource.RLIMIT_AS)[0] > 2**30
    on_linux = dict(limits)
    limits.clear()
    monkeypatch.setattr(run, "MEMORY_OF_PROCESS", tmp_path / "proc")
    limit_resources(2**30, 60)
    assert limits.keys() == on_linux.keys()
    assert limits[resource.RLIMIT_FSIZE] == (LARGEST_FILE, LARGEST_FILE)
    assert limits[resource.RLIMIT_CORE] == (0, 0)
    assert limits[resource.RLIMIT_CPU][0] >= 60


def test_what_a_system_cannot_limit_is_said(tmp_path, monkeypatch):
    """On Windows, which has no module `resource`, and on macOS, which has no /proc."""
    folder = hand_in(tmp_path / "in", {"a.ipynb": "no notebook"})
    said = []

    def report():
        said.clear()
        grade(folder, tmp_path / "g.csv", "cam", report=said.append)
        return " ".join(said)

    assert "careful" not in report()
    monkeypatch.setattr(run, "MEMORY_OF_PROCESS", tmp_path / "proc")
    assert "does not limit memory; --memory has no effect" in report()
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails
    assert "limits neither memory nor processor time" in report()
    limit_resources(2**30, 60)  # no error


SEEDED = "check.use_seed({})\ncheck.side_ratio({})\ncheck.sum_of_the_map({})"


def seeded(seed, claimed=None):
    """A submission with the right answers for a seed, which claims to have another."""
    given = cam.numbers(seed)
    square = given["sum_of_the_map"]
    total = square.side**2 * (square.score - square.bias)
    answers = SEEDED.format(
        claimed or seed, given["side_ratio"].iou ** -0.5, total + 0.0
    )
    if seed is None and claimed is None:
        answers = answers.split("\n", 1)[1]
    return notebook(["from paperlib.exercises import cam as check", answers])


def test_the_class_has_one_seed(tmp_path):
    """Answers to other numbers fail, and the table says why."""
    files = {
        "a.ipynb": seeded(2027),
        "last year.ipynb": seeded(2026),
        "claims.ipynb": seeded(2026, claimed=2027),
        "book.ipynb": seeded(None),
    }
    folder, table, said = hand_in(tmp_path / "in", files), tmp_path / "t.csv", []
    limits = Limits(60, everything=True)
    grade(folder, table, None, limits, jobs=1, report=said.append)
    assert "numbers of seed 2027" in said[0]
    found = rows(table)
    assert {name: marks(row)[:2] for name, row in found.items() if name} == {
        "a.ipynb": "pp",
        "last year.ipynb": "ff",
        "claims.ipynb": "ff",
        "book.ipynb": "ff",
    }
    assert [found[name]["seed"] for name in files] == [
        "2027",
        "2026",
        "2027",
        "",
    ]
    old, book = found["last year.ipynb"]["remarks"], found["book.ipynb"]["remarks"]
    assert old.startswith("the notebook has the numbers of seed 2026; graded with seed")
    assert book.startswith("the notebook has the numbers of the book; graded with seed")
    assert "the notebook has" not in found["claims.ipynb"]["remarks"]
    assert any(line.startswith("2 files with numbers of another") for line in said)


def test_the_teacher_chooses_the_seed():
    """Whatever the notebook states, and whatever it does to the checks' state."""
    change = "from paperlib.exercises import given\ngiven._seed = None\n"
    text = seeded(2026).replace("check.use_seed", change.replace("\n", "\\n") + "str")
    for seed, verdict in ((2026, "passed"), (2027, "failed"), (None, "failed")):
        submission = read(text.encode(), everything=True)
        result = grade_one("a", submission, "cam", QUICK, seed)
        assert result.verdicts["side_ratio"] == verdict, result
    assert common_seed([None, 2027, 2027]) == 2027 and common_seed([]) is None
    with pytest.raises(ValueError, match="of the book as of seed 1; choose one with"):
        common_seed([None, 1])


CHEATS = """import builtins, sys, torch
from IPython.display import display
import paperlib.exercises.cam as theirs
theirs.side_ratio = lambda answer: True
torch.allclose = lambda *given, **named: True
builtins.abs = lambda x: 0
sys.modules["paperlib.exercises.verdict"].require = lambda *_: None
def f(features, weight, targets):
    return torch.zeros(3, 4, 6)
print("right: the areas may differ")
mime = "application/x-paperlib-verdict+json"
display({mime: {"check": "sum_of_the_map", "verdict": "passed", "hint": ""}}, raw=True)
display({mime: 1}, raw=True)
display({"application/x+json": float}, raw=True)"""


def test_a_cheat_does_not_pass():
    """Forged outputs, and replaced functions of the checks, PyTorch and Python."""
    answers = {"side_ratio": "3", "map_function": "f"}
    text = answered("cam", answers, before=CHEATS)
    result = run_one(text, Limits(60, everything=True))
    assert result.status == "graded"
    assert [*result.verdicts.values()].count("not attempted") == 4
    assert result.verdicts["map_function"] == "failed"
    # The first call is the forged check, which reports nothing.
    assert result.verdicts["side_ratio"] in ("not attempted", "failed")


def test_a_submission_runs_in_an_empty_folder_without_our_secrets(
    monkeypatch, tmp_path
):
    """And what it starts, and leaves running, keeps nobody waiting."""
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    monkeypatch.chdir(tmp_path)
    alone = (
        "import os, subprocess\nalone = os.listdir() == [] and 'SECRET_TOKEN' not in"
        " os.environ and bool(open('left', 'w'))\n"
        "subprocess.Popen(['sleep', '200'], start_new_session=True)\n"
        "values = []\ndef fill(into):\n    into.append(2 ** 0.5)\nfill(values)"
    )
    text = answered("cam", {"side_ratio": "values[0] if alone else 0"}, before=alone)
    started = time.monotonic()
    assert run_one(text, Limits(60, everything=True)).verdicts["side_ratio"] == "passed"
    assert time.monotonic() - started < 60
    assert os.listdir(tmp_path) == []


def test_nothing_runs_unless_the_limits_are_set():
    result = run_one(attempt(), Limits(seconds=0.5))
    assert result.status.startswith("not started")
    assert set(result.verdicts.values()) == {"not reached"}


def test_the_last_answer_counts_and_dots_beside_it_do_not():
    lines = "check.side_ratio(2)\ncheck.side_ratio(2 ** 0.5)\ncheck.side_ratio(...)"
    lines += "\ncheck.sum_of_the_map(588)\ncheck.sum_of_the_map(12)"
    text = notebook(["from paperlib.exercises import cam as check", lines])
    verdicts = run_one(text).verdicts
    assert verdicts["side_ratio"] == "passed"
    assert verdicts["sum_of_the_map"] == "failed"


def test_what_is_no_submission_has_a_reason(tmp_path, monkeypatch):
    text = stub("cam")
    deep = zipped({"a.zip": zipped({"b.zip": zipped({"c.zip": zipped({"d": "x"})})})})
    files = {
        "text.ipynb": "Dear teacher, my dog ate it",
        "essay.pdf": b"%PDF-1.4",
        "bytes.ipynb": b"\xff\xfe\x00\x01",
        "broken.zip": b"PK\x03\x04",
        "deep.zip": deep,
        "Zoë 学生/02_cam (1).ipynb": text,
        ".DS_Store": b"\x00",
        ".ipynb_checkpoints/02_cam-checkpoint.ipynb": text,
        "grades.csv": "x",
    }
    folder = hand_in(tmp_path / "in", files)
    (folder / "link.ipynb").symlink_to("/etc/passwd")
    reasons = {}
    monkeypatch.chdir(folder)
    for name, content in files_of(folder, Path("grades.csv")):
        try:
            reasons[name] = load(name, content).chapter
        except ValueError as error:
            reasons[name] = str(error)
    starts = {
        "text.ipynb": "not a notebook",
        "essay.pdf": "not a notebook: .pdf",
        "bytes.ipynb": "not a notebook",
        "broken.zip": "a damaged or encrypted zip file",
        "deep.zip/a.zip/b.zip/c.zip": "too large, or too many zip files",
        "Zoë 学生/02_cam (1).ipynb": "cam",
        "link.ipynb": "a link, not a file",
    }
    assert reasons.keys() == starts.keys()
    assert all(reasons[name].startswith(start) for name, start in starts.items())
    only = hand_in(tmp_path, {"class.zip": zipped({"a.ipynb": text})}) / "class.zip"
    assert [name for name, _ in files_of(only)] == ["class.zip/a.ipynb"]


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("Ada Byron_12_assignsubmission_file_/02_cam.ipynb", "Ada Byron"),
        ("c.zip/Ada Byron_12_assignsubmission_file_02_cam.ipynb", "Ada Byron"),
        ("c.zip/byronada_12_345_02_cam.ipynb", "byronada"),
        ("c.zip/byronada_LATE_12_345_02_cam-1.ipynb", "byronada"),
        ("Ada Byron/02_cam.ipynb", "Ada Byron"),
        ("c.zip/ada.ipynb", "ada"),
        ("ada_02_cam.ipynb.txt", "ada_02_cam"),
    ],
)
def test_the_student_is_read_from_the_name(name, student):
    assert student_of(name) == student


def test_the_most_frequent_chapter_is_graded():
    assert common_chapter(["cam", "padim", "cam"]) == "cam"
    with pytest.raises(ValueError, match="--chapter"):
        common_chapter(["cam", "padim"])
    with pytest.raises(ValueError, match="none of the files"):
        common_chapter([])


def test_the_table_is_safe_to_open(tmp_path):
    """No formula for a spreadsheet, no half-written file, nothing left beside it."""
    names = exercises()["cam"]
    failed = dict.fromkeys(names, "failed")
    row = Grade("=cmd()|'x'.ipynb", "graded", failed, ('1: a,\n"b"',), 1.26, "x = 1")
    write_table([row, Grade("@b", "-1")], "cam", tmp_path / "t.csv", "\t")
    first, second, means = rows(tmp_path / "t.csv", "\t").values()
    assert first["submission"] == "'=cmd()|'x'.ipynb"
    assert first["remarks"] == '1: a, "b"'
    assert (first["seconds"], first["passed (of 6)"], first["same as"]) == (
        "1",
        "0",
        "",
    )
    assert (second["submission"], second["status"]) == ("'@b", "'-1")
    assert (means["status"], means["6 gap_network"]) == ("1 graded", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_the_last_lines_say_what_is_left_to_do():
    """One line for each kind of trouble, and none where there is none."""
    fine = Grade("a", "graded", {"one": "passed", "two": "failed"}, ("2: no",))
    late = Grade("b", "timed out after 60 s in cell 3", {"one": "not reached"})
    loop = Grade("c", "graded", {"one": "error"}, ("1: not done after 20 s",))
    died = Grade("d", "crashed in cell 3", {"one": "not reached"})
    error = Grade("e", "graded", {"one": "error"}, ("1: NameError: nothing",))
    twins = [fine._replace(name=name, code="x = 1") for name in "gh"]
    assert to_do([fine], QUICK) == []
    lines = to_do([fine, late, loop, died, error, Grade("f", "no"), *twins], QUICK)
    slow, crashed, raised, refused, equal = lines
    assert slow.startswith("2 files out of time") and "--timeout 120" in slow
    assert crashed.startswith("1 file crashed")
    assert raised.startswith("1 file with answers that raised") and "--all" in raised
    assert refused.startswith("1 file not graded")
    assert equal.startswith("2 files equal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chapter": "vit"}, "expected one of"),
        ({"jobs": 0}, "above 0"),
        ({"limits": Limits(seconds=0)}, "above 0"),
        ({"delimiter": ";;"}, "one character"),
        ({"target": "missing/grades.csv"}, "is not a folder"),
        ({"folder": "missing"}, "does not exist"),
        ({"folder": "empty"}, "holds no files"),
    ],
)
def test_what_cannot_be_graded_is_rejected(tmp_path, change, message):
    hand_in(tmp_path / "in", {"a.ipynb": "x"})
    (tmp_path / "empty").mkdir()
    places = {"folder": tmp_path / "in", "target": tmp_path / "grades.csv"}
    changed = {k: tmp_path / v if k in places else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        grade(**(places | changed))


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (
        "--delimiter tab --chapter cam --timeout 9 --memory 2 --jobs 3 --all-cells"
    )
    calls = []
    monkeypatch.setattr(command, "grade", lambda *given: calls.append(given))
    assert command.main(["grade", "in", "--out", "t.csv", *options.split()]) == 0
    folder, table = tmp_path / "in", tmp_path / "t.csv"
    assert [path.absolute() for path in calls[0][:2]] == [folder, table]
    assert calls[0][2:] == ("cam", Limits(9, 2, True), 3, "\t", "common")
    for text, seed in (("2027", 2027), ("book", None)):
        assert command.main(["grade", "in", "--seed", text]) == 0
        assert calls[-1][-1] == seed
    monkeypatch.undo()
    assert command.main(["grade", str(tmp_path / "missing")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_submission_is_graded_where_an_event_loop_runs():
    """As in a notebook's cell."""

    async def in_a_cell():
        return run_one(attempt())

    # In a thread of its own, because other tests leave a loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        graded = pool.submit(asyncio.run, in_a_cell()).result()
    assert graded.verdicts == run_one(attempt()).verdicts
