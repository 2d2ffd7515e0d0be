"""Remove the solutions from notebooks, or from all sources of the book, for students.

    python book/tools/student.py notebooks FOLDER NOTEBOOK ...
        write self-contained copies, as export_colab.py makes them
    python book/tools/student.py solutions FOLDER NOTEBOOK ...
        write the same with solutions, for the teacher
    python book/tools/student.py sources FOLDER
        write the book's sources; build these with jupyter-book
    python book/tools/student.py check FOLDER
        fail if a built book contains any part of a solution

Removed: cells with the tag `solution`, the folded answers of the quiz and of "Predict
first", the sentence that says where solutions are; from notebooks also all outputs,
because many of them answer a "Predict first". Kept: exercises with their dots, and the
questions. The book keeps its outputs, folded where they answer a question.

With `--seed 2027`, exercises have other numbers than the book: questions.yml says
where. A copy names its seed in a call of `check.use_seed`.
"""

import argparse
import ast
import functools
import html
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import yaml
from export_colab import export
from nbformat import NotebookNode

from paperlib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = Path(__file__).with_name("questions.yml")
IMPORT = re.compile(r"^from paperlib\.exercises import (\w+) as check$\n*", re.M)
SOLUTION = "solution"  # tag of a cell that students do not get
WHERE = re.compile(
    r"\s*The\s+solutions\s+are\s+hidden\s+below\s+each\s+group\s+of\s+exercises\."
)
ANSWER = re.compile(
    r"^(:{3,})\{dropdown\} (?:Answer|Solution)\n(?P<text>.*?)^\1$\n*", re.M | re.S
)
FOR_TEACHERS = ("book/instructor",)  # pages that a book for students leaves out
# Files of a built book that are searched.
TEXTS = {".html", ".ipynb", ".js", ".json", ".md", ".py", ".txt"}
# Tests are copied, because pages show some of them and the ledger names them; those
# that hold answers are not.
HOLD_ANSWERS = (
    "test_exercises_*.py",
    "exercise_checks.py",
    "questions.yml",
    "submissions.py",
    "test_grade.py",
    "test_submission.py",
)
NOT_COPIED = shutil.ignore_patterns(
    ".*", "_build", "__pycache__", "*.egg-info", "node_modules", *HOLD_ANSWERS
)


def without_solutions(notebook: NotebookNode) -> NotebookNode:
    """Return a copy of a notebook without solutions and folded answers; outputs of
    other cells stay.

    Raises:
        ValueError: if something of a solution would be left.
    """
    copy = nbformat.from_dict(notebook)
    copy.cells = [
        cell for cell in copy.cells if SOLUTION not in cell.metadata.get("tags", ())
    ]
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            cell.source = WHERE.sub("", ANSWER.sub("", cell.source)).strip("\n")
    copy.cells = [cell for cell in copy.cells if cell.source]
    if found := leaks(notebook, nbformat.writes(copy, version=4)):
        raise ValueError(
            "it would show students what they should find: " + "; ".join(found)
        )
    return copy


def with_numbers(notebook: NotebookNode, seed: int | None) -> NotebookNode:
    """Return a copy whose exercises and solutions have the numbers of a seed.

    Raises:
        ValueError: if a text of questions.yml does not occur once.
    """
    copy = nbformat.from_dict(notebook)
    if seed is None:
        return copy
    (first,) = (
        cell
        for cell in copy.cells
        if cell.cell_type == "code" and IMPORT.search(cell.source)
    )
    chapter = IMPORT.search(first.source)[1]
    module = importlib.import_module(f"paperlib.exercises.{chapter}")
    book, selected = module.numbers(), module.numbers(seed)
    questions = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))[chapter]
    for check, texts in questions.items():
        for text in texts:
            if isinstance(text, str):
                old, new = text.format(**vars(book[check])), text
            else:
                old, new = text
            _replace(copy, old, new.format(**vars(selected[check])))
    seed_line = f"check.use_seed({seed})  # the numbers of the exercises in this copy"
    first.source = IMPORT.sub(
        lambda found: f"{found[0].rstrip()}\n\n{seed_line}\n", first.source
    )
    return copy


def _replace(notebook: NotebookNode, old: str, new: str) -> None:
    """Replace a text that occurs once in a notebook, whatever its line breaks."""
    pattern = re.compile(r"\s+".join(map(re.escape, old.split())))
    found = [cell for cell in notebook.cells for _ in pattern.findall(cell.source)]
    if len(found) != 1:
        raise ValueError(
            f"{QUESTIONS.name}: expected this text once, found it {len(found)} times:"
            f" {old}"
        )
    found[0].source = pattern.sub(lambda _: new, found[0].source)


def hand_out(notebook: NotebookNode, seed: int | None = None) -> NotebookNode:
    """Return a copy without solutions, folded answers and outputs."""
    return without_outputs(without_solutions(with_numbers(notebook, seed)))


def hand_to_teacher(notebook: NotebookNode, seed: int | None = None) -> NotebookNode:
    """Return a copy with solutions, and without outputs."""
    return without_outputs(with_numbers(notebook, seed))


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """Return a copy without outputs."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return copy


def solution_cells(notebook: NotebookNode) -> list[str]:
    """List the sources of the cells that students do not get."""
    return [
        cell.source
        for cell in notebook.cells
        if SOLUTION in cell.metadata.get("tags", ())
    ]


def folded_answers(notebook: NotebookNode) -> list[str]:
    """List the answers of the quiz and of "Predict first"."""
    return [
        answer["text"]
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for answer in ANSWER.finditer(cell.source)
    ]


def leaks(notebook: NotebookNode, text: str) -> list[str]:
    """Quote what of a notebook's solutions and folded answers stands in `text`, a
    student's copy of it as JSON.

    What the chapter itself says elsewhere is no secret.
    """
    return quoted(secrets(notebook), text)


def secrets(notebook: NotebookNode) -> list[str]:
    """List what only the solutions and folded answers of a notebook say, each in one
    line.

    Raises:
        ValueError: if there is nothing to look for.
    """
    solutions, answers = solution_cells(notebook), folded_answers(notebook)
    others = [
        cell.source
        for cell in notebook.cells
        if SOLUTION not in cell.metadata.get("tags", ())
    ]
    chapter = _one_line("\n".join(ANSWER.sub("", source) for source in others))
    lines = [line for source in solutions for line in secret_lines(source)]
    sentences = [
        part
        for answer in answers
        for part in re.split(r"(?<=[.:?!])\s+", answer)
        if len(part) > 20
    ]
    found = [
        secret
        for secret in map(_one_line, [*lines, *sentences])
        if secret not in chapter
    ]
    if not (solutions and answers and found):
        raise ValueError(
            "no cell has the tag `solution`, or no answer is folded;"
            " check the tags and the dropdowns"
        )
    return found


def quoted(secrets: list[str], text: str) -> list[str]:
    """List the secrets that stand in `text`, line breaks and JSON's escapes aside."""
    shown = _one_line(
        text.replace("\\n", "\n").replace('\\"', '"').replace('",\n', "\n")
    )
    return [
        secret
        for secret in secrets
        if secret in shown or json.dumps(secret)[1:-1] in shown
    ]


def _one_line(text: str) -> str:
    return re.sub(r"[\s\"]+", " ", text).strip()


def secret_lines(source: str) -> list[str]:
    """List a solution's statements that give something away: calls of checks with an
    answer, and what computes it.
    """
    statements = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)
    ]
    texts = (ast.get_source_segment(source, node) for node in statements)
    return [text for text in texts if text and len(text) > 12]


def write_sources(folder: Path, root: Path = ROOT, seed: int | None = None) -> None:
    """Copy the book's sources to `folder`, made anew, without solutions, and without
    what only teachers need. Exercises have the numbers of the seed.
    """
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(root, folder, ignore=NOT_COPIED)
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        try:
            notebook = with_numbers(nbformat.read(path, as_version=4), seed)
            notebook = without_solutions(notebook)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        write_text(path, nbformat.writes(notebook, version=4) + "\n")
    # The same cells as text, solutions included.
    shutil.rmtree(folder / "notebooks" / "py")
    for page in FOR_TEACHERS:
        (folder / page).with_suffix(".md").unlink()
    contents = folder / "book" / "_toc.yml"
    lines = contents.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [
        line
        for line in lines
        if line.strip().removeprefix("- file: ") not in FOR_TEACHERS
    ]
    write_text(contents, "".join(kept))
    for path in (folder / "book").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        for page in FOR_TEACHERS:
            text = re.sub(rf"\[([^\]]*)\]\({Path(page).name}\.md[^)]*\)", r"\1", text)
        write_text(path, text)


def check_built(folder: Path, root: Path = ROOT) -> list[str]:
    """Name every file below a built book's folder that holds something of a solution or
    of a folded answer.

    Raises:
        ValueError: if there is no built book.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in TEXTS and path.is_file()
    ]
    if not (folder / "index.html").is_file():
        raise ValueError(f"{folder} holds no built book; run `make student-book`")
    hidden = [
        secret
        for path in sorted((root / "notebooks").glob("*.ipynb"))
        for secret in secrets(nbformat.read(path, as_version=4))
    ]
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".html":
            text = html.unescape(re.sub(r"<[^>]*>", "", text))
        found += [
            f"{path.relative_to(folder)}: {leak}" for leak in quoted(hidden, text)
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    seed_help = "exercises have the numbers of this seed, such as 2027"
    for name, content in (
        ("notebooks", "self-contained notebooks without solutions"),
        ("solutions", "self-contained notebooks with solutions"),
    ):
        notebooks = commands.add_parser(name, help=content)
        notebooks.add_argument("folder", type=Path)
        notebooks.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
        notebooks.add_argument("--seed", type=int, help=seed_help)
    sources = commands.add_parser(
        "sources", help="a copy of the book's sources without solutions"
    )
    sources.add_argument("folder", type=Path)
    sources.add_argument("--seed", type=int, help=seed_help)
    check = commands.add_parser("check", help="look for solutions in a built book")
    check.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    try:
        if (seed := getattr(options, "seed", None)) is not None and seed < 0:
            raise ValueError(f"received the seed {seed}; expected at least 0")
        if options.what == "check":
            if found := check_built(options.folder):
                raise ValueError("solutions are in it:\n" + "\n".join(found))
            return 0
        if options.what == "sources":
            write_sources(options.folder, seed=options.seed)
            return 0
        edit = hand_out if options.what == "notebooks" else hand_to_teacher
        edit = functools.partial(edit, seed=options.seed)
        for path in options.notebooks:
            print(export(path, options.folder, edit=edit))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
