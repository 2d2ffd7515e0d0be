"""Estimate how long a page takes to read, and each section of a notebook to read and
run.

    python book/tools/minutes.py [NOTEBOOK ...]

An estimate, not a measurement: 100 words per minute for technical prose in a foreign
language, 8 lines per minute for code that is not folded, 1.5 minutes per figure, and
two to think for each "Predict first". What is folded (answers, solutions) does not
count. Exercises state their own minutes, the quiz takes three per question. The numbers
that the book states are in book/data/minutes.yml.
"""

import argparse
import ast
import re
from pathlib import Path

import jupytext
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
# Lines of code are short here: at most 88 characters.
WORDS, LINES = 100, 8  # per minute
FIGURE, PREDICT, QUESTION = 1.5, 2, 3  # minutes for one
NOT_READ = {"hide-input", "hide-cell", "remove-input", "remove-cell", "solution"}
PLAN = re.compile(
    r"^\*\*(?P<level>Warm-up|Core|Stretch) \((?P<minutes>\d+) minutes\)", re.M
)
STATED = re.compile(
    r"\*\*Time\*\*: (?P<read>\d+) minutes to read and run, (?P<exercises>\d+) for the"
    r" exercises"
)
FOLDED = re.compile(r"^(:{3,})\{dropdown\}.*?^\1$", re.M | re.S)
LISTING = re.compile(r"\{literalinclude\} (?P<path>\S+)\n:pyobject: (?P<name>\S+)")
NOT_PROSE = re.compile(r"^```.*?^```$|\$\$.*?\$\$|\$[^$]*\$", re.M | re.S)


def sections(notebook: NotebookNode) -> dict[str, int]:
    """Map each second-level heading to whole minutes, at least one; what stands before
    the first is the start.
    """
    amounts: dict[str, float] = {"Start": 0}
    texts: dict[str, str] = {"Start": ""}
    now = "Start"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            amounts[now] += FIGURE * ("image" in cell.metadata.get("mystnb", {}))
            if not NOT_READ & set(cell.metadata.get("tags", ())):
                amounts[now] += (
                    len([line for line in cell.source.splitlines() if line.strip()])
                    / LINES
                )
            continue
        for part in re.split(r"^(?=## )", cell.source, flags=re.M):
            if part.startswith("## "):
                now = part.partition("\n")[0].removeprefix("## ")
                amounts[now], texts[now] = 0, ""
            prose = FOLDED.sub("", part)
            amounts[now] += (
                len(re.findall(r"[A-Za-z]+", re.sub(r"\$[^$]*\$", "x", prose))) / WORDS
            )
            amounts[now] += PREDICT * prose.count("Predict first")
            texts[now] += part + "\n\n"
    minutes = {title: max(1, round(amount)) for title, amount in amounts.items()}
    for title, text in texts.items():
        if title == "Exercises":
            minutes[title] = sum(exercise_minutes(text).values())
        elif title == "Quiz":
            questions = re.findall(r"^\*\*\d+\.\*\*", text, flags=re.M)
            minutes[title] = QUESTION * len(questions)
    return minutes


def page(name: str, root: Path = ROOT) -> float:
    """Estimate how long a chapter's page takes to read, with its listings and figures.

    A figure's minutes include its caption.
    """
    shown = FOLDED.sub("", (root / "book" / f"{name}.md").read_text(encoding="utf-8"))
    words = len(re.findall(r"[A-Za-z]+", NOT_PROSE.sub("", shown)))
    lines = sum(
        _length(root / "book" / match["path"], match["name"])
        for match in LISTING.finditer(shown)
    )
    figures = len(re.findall(r"^```\{drawn\}", shown, re.M))
    return words / WORDS + lines / LINES + FIGURE * figures


def _length(path: Path, name: str) -> int:
    """Count the lines of a function or of a class's method that are not empty."""
    source = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for part in name.split("."):
        node = next(
            child
            for child in ast.iter_child_nodes(node)
            if getattr(child, "name", None) == part
        )
    return sum(
        bool(line.strip()) for line in ast.get_source_segment(source, node).splitlines()
    )


def planned(root: Path = ROOT) -> dict[str, dict[str, int]]:
    """Read the minutes that the book states: per chapter those of page, notebook,
    exercises and quiz.
    """
    return yaml.safe_load(
        (root / "book" / "data" / "minutes.yml").read_text(encoding="utf-8")
    )


def exercise_minutes(text: str) -> dict[str, int]:
    """Read the minutes that a notebook gives to each group of its exercises."""
    return {match["level"]: int(match["minutes"]) for match in PLAN.finditer(text)}


def stated(notebook: NotebookNode) -> tuple[int, int] | None:
    """Read how long a notebook says that it takes: to read and run, and for the
    exercises; None where it does not.
    """
    match = STATED.search(
        " ".join("\n".join(cell.source for cell in notebook.cells).split())
    )
    return (int(match["read"]), int(match["exercises"])) if match else None


def read(name: str, root: Path = ROOT) -> NotebookNode:
    """Read a notebook's text."""
    return jupytext.read(root / "notebooks" / "py" / f"{name}.py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "names",
        nargs="*",
        default=sorted(path.stem for path in (ROOT / "notebooks/py").glob("*.py")),
    )
    for name in parser.parse_args().names:
        found = sections(read(name))
        work = {
            title: found[title] for title in ("Exercises", "Quiz") if title in found
        }
        print(
            f"{name}: page {page(name):.0f}, {sum(found.values()) - sum(work.values())}"
            f" to read and run, {work}, stated {planned()[name]}"
        )
        for title, minutes in found.items():
            print(f"  {minutes:3}  {title}")
