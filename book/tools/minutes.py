"""Estimate how long each section of a notebook takes to read and run.

    python book/tools/minutes.py [NOTEBOOK ...]

An estimate, not a measurement: 150 words a minute for technical prose, 15 lines a minute for code that is not folded,
a minute for each picture, and two to think for each "Predict first". What is folded (answers, solutions) does not
count. Exercises say their own minutes, the quiz takes a minute a question.
"""

import argparse
import re
from pathlib import Path

import jupytext
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
WORDS, LINES = 150, 15  # a minute
PICTURE, PREDICT = 1, 2  # minutes for one
NOT_READ = {"hide-input", "hide-cell", "remove-input", "remove-cell", "solution"}
PLAN = re.compile(r"^\*\*(?P<level>Warm-up|Core|Stretch) \((?P<minutes>\d+) minutes\)", re.M)
STATED = re.compile(r"\*\*Time\*\*: (?P<read>\d+) minutes to read and run, (?P<exercises>\d+) for the exercises")
FOLDED = re.compile(r"^(:{3,})\{dropdown\}.*?^\1$", re.M | re.S)


def sections(notebook: NotebookNode) -> dict[str, int]:
    """Map each second-level heading to whole minutes, at least one; what stands before the first is the start."""
    amounts: dict[str, float] = {"Start": 0}
    texts: dict[str, str] = {"Start": ""}
    now = "Start"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            amounts[now] += PICTURE * ("image" in cell.metadata.get("mystnb", {}))
            if not NOT_READ & set(cell.metadata.get("tags", ())):
                amounts[now] += len([line for line in cell.source.splitlines() if line.strip()]) / LINES
            continue
        for part in re.split(r"^(?=## )", cell.source, flags=re.M):
            if part.startswith("## "):
                now = part.partition("\n")[0].removeprefix("## ")
                amounts[now], texts[now] = 0, ""
            prose = FOLDED.sub("", part)
            amounts[now] += len(re.findall(r"[A-Za-z]+", re.sub(r"\$[^$]*\$", "x", prose))) / WORDS
            amounts[now] += PREDICT * prose.count("Predict first")
            texts[now] += part + "\n\n"
    minutes = {title: max(1, round(amount)) for title, amount in amounts.items()}
    for title, text in texts.items():
        if title == "Exercises":
            minutes[title] = sum(exercise_minutes(text).values())
        elif title == "Quiz":
            minutes[title] = len(re.findall(r"^\*\*\d+\.\*\*", text, flags=re.M))
    return minutes


def exercise_minutes(text: str) -> dict[str, int]:
    """Read the minutes that a notebook gives to each group of its exercises."""
    return {match["level"]: int(match["minutes"]) for match in PLAN.finditer(text)}


def stated(notebook: NotebookNode) -> tuple[int, int] | None:
    """Read how long a notebook says that it takes: to read and run, and for the exercises; None where it does not."""
    match = STATED.search(" ".join("\n".join(cell.source for cell in notebook.cells).split()))
    return (int(match["read"]), int(match["exercises"])) if match else None


def read(name: str, root: Path = ROOT) -> NotebookNode:
    """Read a notebook's text."""
    return jupytext.read(root / "notebooks" / "py" / f"{name}.py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in (ROOT / "notebooks/py").glob("*.py")))
    for name in parser.parse_args().names:
        found = sections(read(name))
        work = {title: found[title] for title in ("Exercises", "Quiz") if title in found}
        print(
            f"{name}: {sum(found.values()) - sum(work.values())} to read and run, {work}, stated {stated(read(name))}"
        )
        for title, minutes in found.items():
            print(f"  {minutes:3}  {title}")
