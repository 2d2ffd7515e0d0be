"""All stated minutes agree with book/data/minutes.yml and the notebooks' sections."""

import re

import minutes
import pytest
from built import NOTEBOOKS, ROOT

NAMES = [path.stem for path in NOTEBOOKS]
SYLLABUS = (ROOT / "book" / "syllabus.md").read_text(encoding="utf-8")
FRONT_PAGE = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
PLANNED = minutes.planned()
GUIDE = (ROOT / "book" / "instructor.md").read_text(encoding="utf-8")
LEVELS = {"warm-up": "Warm-up", "core": "Core", "stretch": "Stretch"}
NOT_SECTIONS = ("Opening", "Set-up", "Break", "Discussion")

every_chapter = pytest.mark.parametrize("name", NAMES)


def session(name):
    """Return a chapter's part of the syllabus, and its rows: title, minutes, place."""
    part = SYLLABUS.split("### Session ")[NAMES.index(name) + 1]
    assert f"../notebooks/{name}.ipynb" in part
    rows = re.findall(
        r"^\| (?P<title>[^|]+?) \| (?P<minutes>\d+) \| (?P<where>class|home) \|$",
        part,
        re.M,
    )
    return part, [(title, int(count), where) for title, count, where in rows]


def text(name):
    return "\n\n".join(
        cell.source for cell in minutes.read(name).cells if cell.cell_type == "markdown"
    )


@every_chapter
def test_every_section_has_its_minutes(name):
    """A difference of a minute or a fifth is allowed, for small edits of the text."""
    _, rows = session(name)
    planned = {
        title: count
        for title, count, _ in rows
        if not title.startswith((*NOT_SECTIONS, "Exercises: "))
    }
    estimated = {
        title: count
        for title, count in minutes.sections(minutes.read(name)).items()
        if title != "Exercises"
    }
    assert list(planned) == list(estimated)
    off = {
        t: (n, estimated[t])
        for t, n in planned.items()
        if abs(n - estimated[t]) > max(1, estimated[t] / 5)
    }
    assert off == {}, "section: (syllabus, `python book/tools/minutes.py`)"


@every_chapter
def test_exercises_have_the_minutes_that_the_notebook_states(name):
    _, rows = session(name)
    planned = {
        LEVELS[title.removeprefix("Exercises: ")]: n
        for title, n, _ in rows
        if title.startswith("Exercises: ")
    }
    assert planned == minutes.exercise_minutes(text(name))
    assert set(planned) == set(LEVELS.values())


@every_chapter
def test_a_session_is_ninety_minutes(name):
    part, rows = session(name)
    spent = {
        place: sum(count for _, count, where in rows if where == place)
        for place in ("class", "home")
    }
    assert spent["class"] == 90
    planned = {title.partition(":")[0]: count for title, count, _ in rows}
    assert planned["Opening"] >= 5 and planned["Set-up"] >= 5 and planned["Break"] >= 5
    assert (
        int(re.search(r"stretch exercise,\s+(\d+) minutes", part)[1]) == spent["home"]
    )
    assert rows[-1][0] == "Discussion" and rows[-1][1] >= 5


@every_chapter
def test_the_planned_minutes_are_the_estimated_ones(name):
    """They are multiples of five, and may differ by up to four minutes."""
    plan, estimates = PLANNED[name], minutes.sections(minutes.read(name))
    assert plan.keys() == {"page", "notebook", "exercises", "quiz"}
    assert (plan["exercises"], plan["quiz"]) == (
        estimates.pop("Exercises"),
        estimates.pop("Quiz"),
    )
    estimated = {"page": minutes.page(name), "notebook": sum(estimates.values())}
    off = {
        key: (plan[key], value)
        for key, value in estimated.items()
        if plan[key] % 5 or abs(plan[key] - value) > 4
    }
    assert off == {}, "(book/data/minutes.yml, `python book/tools/minutes.py`)"


@every_chapter
def test_every_place_states_the_planned_minutes(name):
    plan, part = PLANNED[name], session(name)[0]
    page = " ".join((ROOT / "book" / f"{name}.md").read_text(encoding="utf-8").split())
    assert re.findall(r"Reading time: (\d+) minutes", page) == [str(plan["page"])]
    assert re.findall(rf"\(\.\./book/{name}\.md\),\s+(\d+) minutes", text(name)) == [
        str(plan["page"])
    ]
    assert minutes.stated(minutes.read(name)) == (plan["notebook"], plan["exercises"])
    assert re.findall(r"\*\*Before\*\*: .*?, (\d+) minutes", part) == [
        str(plan["page"])
    ]
    (row,) = re.findall(rf"^\| \[[^|]+\]\({name}\.md\).*$", FRONT_PAGE, re.M)
    assert row.endswith(
        f"| {plan['page']} + {plan['notebook']} + {plan['exercises']} |"
    )


def test_front_page_and_syllabus_add_up_the_planned_minutes():
    pages = [plan["page"] for plan in PLANNED.values()]
    statement = f"takes {min(pages)} to {max(pages)} minutes"
    assert statement in " ".join(FRONT_PAGE.split())
    total = {name: sum(plan.values()) for name, plan in PLANNED.items()}
    assert f"in about {sum(total.values()) / 60:.0f} hours" in SYLLABUS
    for numbers, names in (("2 and 3", NAMES[1:3]), ("4 and 5", NAMES[3:])):
        half_hours = round(sum(total[name] for name in names) / 30)
        assert f"chapters {numbers}, about {half_hours / 2:g} hours" in SYLLABUS


def test_a_fast_reader_needs_two_thirds(monkeypatch):
    """The syllabus states this for 150 words and 20 lines of code per minute."""

    def reading_minutes():
        chapters = [minutes.sections(minutes.read(name)) for name in NAMES]
        return sum(
            count
            for titles in chapters
            for title, count in titles.items()
            if title not in ("Exercises", "Quiz")
        )

    default = reading_minutes()
    monkeypatch.setattr(minutes, "WORDS", 150)
    monkeypatch.setattr(minutes, "LINES", 20)
    text = " ".join(SYLLABUS.split())
    assert "at 150 words and 20 lines per minute, needs about two thirds" in text
    assert 0.6 < reading_minutes() / default < 0.72


def test_the_syllabus_states_the_pace():
    text = " ".join(SYLLABUS.split())
    assert (
        f"{minutes.WORDS} words and {minutes.LINES} lines of code per minute,"
        f" {minutes.FIGURE} minutes per figure" in text
    )
    assert (minutes.PREDICT, minutes.QUESTION) == (2, 3)
    assert 'two to think for each "Predict first"' in text
    assert "the quiz takes three per question" in text


@every_chapter
def test_a_chapter_has_exercises_a_quiz_and_predictions(name):
    """Five exercises in three levels, six questions with answers, four predictions."""
    notebook_text = text(name)
    exercises, _, quiz = notebook_text.partition("## Exercises")[2].partition("## Quiz")
    assert len(re.findall(r"^(?:\*\*)?\d+\.(?:\*\*)? ", exercises, re.M)) >= 5
    assert set(minutes.exercise_minutes(exercises)) == set(LEVELS.values())
    quiz = quiz.partition("\n## ")[0]
    questions = re.findall(r"^\*\*\d+\.\*\* ", quiz, re.M)
    answers = re.findall(r"^:::\{dropdown\} Answer\n(.+?)^:::$", quiz, re.M | re.S)
    assert len(questions) == len(answers) >= 6
    # The answers are explained.
    assert all(len(answer.split()) >= 8 for answer in answers)
    assert notebook_text.count("Predict first") >= 4


@every_chapter
def test_the_guide_quotes_sections_that_exist(name):
    part = GUIDE.split("## Session ")[NAMES.index(name) + 1].partition("## Grading")[0]
    rows = re.findall(r"^\| .+ \| (.+) \|$", part, re.M)[1:]
    assert len(rows) >= 5
    assert part.count("**Live**") == 1
    assert part.count("**Discuss**") == 1
    titles = list(minutes.sections(minutes.read(name)))
    named = {
        quoted.strip("… :?")
        for row in rows
        for quoted in re.findall(r'^"([^"]+)"', row)
    }
    assert named
    assert {
        quoted for quoted in named if not any(quoted in title for title in titles)
    } == set()
