"""The syllabus against the notebooks: every section, its minutes, ninety minutes a session."""

import re

import minutes
import pytest
from built import NOTEBOOKS, ROOT

NAMES = [path.stem for path in NOTEBOOKS]
SYLLABUS = (ROOT / "book" / "syllabus.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "book" / "instructor.md").read_text(encoding="utf-8")
LEVELS = {"warm-up": "Warm-up", "core": "Core", "stretch": "Stretch"}
NOT_SECTIONS = ("Opening", "Discussion")

every_chapter = pytest.mark.parametrize("name", NAMES)


def session(name):
    """A chapter's part of the syllabus, and its rows: section → minutes, class or home."""
    part = SYLLABUS.split("### Session ")[NAMES.index(name) + 1]
    assert f"../notebooks/{name}.ipynb" in part
    rows = re.findall(r"^\| (?P<title>[^|]+?) \| (?P<minutes>\d+) \| (?P<where>class|home) \|$", part, re.M)
    return part, [(title, int(count), where) for title, count, where in rows]


def text(name):
    return "\n\n".join(cell.source for cell in minutes.read(name).cells if cell.cell_type == "markdown")


@every_chapter
def test_every_section_has_its_minutes(name):
    """A minute or a fifth of difference is allowed: a reworded sentence should not need a new plan."""
    _, rows = session(name)
    planned = {title: count for title, count, _ in rows if not title.startswith((*NOT_SECTIONS, "Exercises: "))}
    estimated = {title: count for title, count in minutes.sections(minutes.read(name)).items() if title != "Exercises"}
    assert list(planned) == list(estimated)
    off = {t: (n, estimated[t]) for t, n in planned.items() if abs(n - estimated[t]) > max(1, estimated[t] / 5)}
    assert off == {}, "section: (syllabus, `python book/tools/minutes.py`)"


@every_chapter
def test_exercises_have_the_minutes_that_the_notebook_states(name):
    _, rows = session(name)
    planned = {LEVELS[title.removeprefix("Exercises: ")]: n for title, n, _ in rows if title.startswith("Exercises: ")}
    assert planned == minutes.exercise_minutes(text(name)) and set(planned) == set(LEVELS.values())


@every_chapter
def test_a_session_is_ninety_minutes(name):
    part, rows = session(name)
    spent = {place: sum(count for _, count, where in rows if where == place) for place in ("class", "home")}
    assert spent["class"] == 90
    assert int(re.search(r"stretch exercise,\s+(\d+) minutes", part)[1]) == spent["home"]
    assert rows[-1][0] == "Discussion" and rows[-1][1] >= 5


@every_chapter
def test_the_notebook_states_the_time_it_takes(name):
    stated = minutes.stated(minutes.read(name))
    assert stated is not None, "expected **Time**: N minutes to read and run, M for the exercises"
    found = minutes.sections(minutes.read(name))
    reading = sum(count for title, count in found.items() if title not in ("Exercises", "Quiz"))
    assert abs(stated[0] - reading) <= 4 and stated[1] == found["Exercises"]


@every_chapter
def test_a_chapter_has_what_a_class_needs(name):
    """Five exercises in three levels, six questions with answers, and something to predict."""
    whole = text(name)
    exercises, _, quiz = whole.partition("## Exercises")[2].partition("## Quiz")
    assert len(re.findall(r"^(?:\*\*)?\d+\.(?:\*\*)? ", exercises, re.M)) >= 5
    assert set(minutes.exercise_minutes(exercises)) == set(LEVELS.values())
    quiz = quiz.partition("\n## ")[0]
    questions = re.findall(r"^\*\*\d+\.\*\* ", quiz, re.M)
    answers = re.findall(r"^:::\{dropdown\} Answer\n(.+?)^:::$", quiz, re.M | re.S)
    assert len(questions) == len(answers) >= 6
    assert all(len(answer.split()) >= 8 for answer in answers)  # explained, not only given
    assert whole.count("Predict first") >= 4


@every_chapter
def test_the_guide_quotes_sections_that_exist(name):
    part = GUIDE.split("## Session ")[NAMES.index(name) + 1].partition("## Grading")[0]
    rows = re.findall(r"^\| .+ \| (.+) \|$", part, re.M)[1:]
    assert len(rows) >= 5 and part.count("**Live**") == 1 and part.count("**Discuss**") == 1
    titles = list(minutes.sections(minutes.read(name)))
    named = {quoted.strip("… :?") for row in rows for quoted in re.findall(r'^"([^"]+)"', row)}
    assert named and {quoted for quoted in named if not any(quoted in title for title in titles)} == set()
