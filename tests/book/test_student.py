"""Notebooks and a book for students: without solutions and folded answers."""

import ast
import builtins
import re

import nbformat
import pytest
import student
from built import HTML, NOTEBOOKS, ROOT, why_not_built
from export_colab import export
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
ANSWER = ":::{dropdown} Answer\nBecause the sum is divided by the count.\n:::"
QUIZ = f"## Quiz\n\n**1.** Why?\n\n{ANSWER}\n\n## Summary\n\nAll."
TASK = (
    "Put your answer in. The solutions are hidden below\neach group of exercises.\n\n"
    ":::{dropdown} Solution\nThe second value is the larger one.\n:::"
)


def small(*cells):
    """Create a notebook with an exercise, its solution, other cells and a quiz."""
    answer = "def twice(x):\n    return x + 2 * x\n\n\nassert check.twice(twice)"
    return new_notebook(
        cells=[
            new_markdown_cell(TASK),
            new_code_cell("done = check.twice(...)", metadata={"tags": ["exercise"]}),
            new_code_cell(answer, metadata={"tags": ["solution", "hide-cell"]}),
            *cells,
            new_markdown_cell(QUIZ),
        ]
    )


def test_solutions_are_removed_and_other_cells_remain():
    sources = [cell.source for cell in student.without_solutions(small()).cells]
    assert sources == [
        "Put your answer in.",
        "done = check.twice(...)",
        "## Quiz\n\n**1.** Why?\n\n## Summary\n\nAll.",
    ]


@pytest.mark.parametrize(
    "cell",
    [
        new_code_cell(
            "twice = 3",
            outputs=[nbformat.v4.new_output("stream", text="    return x + 2 * x\n")],
        ),
        new_code_cell("print(1)", metadata={"hidden": "assert check.twice(twice)"}),
    ],
)
def test_a_remaining_solution_is_an_error(cell):
    with pytest.raises(ValueError, match="what they should find"):
        student.without_solutions(small(cell))


def test_missing_tags_are_an_error():
    notebook = small()
    for cell in notebook.cells:
        cell.metadata.pop("tags", None)
    with pytest.raises(ValueError, match="check the tags"):
        student.without_solutions(notebook)


@every_notebook
def test_a_students_copy_contains_no_solution(path, tmp_path):
    copy = nbformat.read(export(path, tmp_path, edit=student.hand_out), as_version=4)
    whole = nbformat.read(path, as_version=4)
    text = (tmp_path / path.name).read_text(encoding="utf-8")
    assert student.leaks(whole, text) == [] and "olutions are hidden" not in text
    texts = [cell.source for cell in copy.cells if cell.cell_type == "markdown"]
    assert any("**Predict first**" in source for source in texts)
    assert not re.search("<b>(Answer|Solution)</b>", text) and all(texts)
    removed = [c.source for c in whole.cells if student.WHERE.search(c.source)]
    assert len(removed) == 1
    # The page to read first is named, and linked if the book has an address.
    first = re.search(r"\*\*Read first\*\*: (the .*?)\(", texts[0])[1]
    assert first in ("the page on the paper ", "the [page on the paper]")
    code, exercises = (
        [c.source for c in cells]
        for cells in (
            (c for c in copy.cells if c.cell_type == "code"),
            (c for c in whole.cells if "exercise" in c.metadata.get("tags", ())),
        )
    )
    # The stubs are unchanged.
    assert [source for source in code if source in exercises] == exercises
    assert len(code) == 1 + sum(c.cell_type == "code" for c in whole.cells) - len(
        student.solution_cells(whole)
    )
    assert not any(c.outputs for c in copy.cells if c.cell_type == "code")
    quiz = re.search(
        r"^## Quiz$.*?(?=^## )", "\n\n".join(c.source for c in copy.cells), re.M | re.S
    )[0]
    assert len(re.findall(r"^\*\*\d+\.\*\*", quiz, re.M)) >= 6


@every_notebook
def test_a_seed_changes_numbers_and_nothing_else(path, tmp_path):
    """The copy names its seed where the checks are imported."""
    whole = nbformat.read(path, as_version=4)
    copy = student.hand_out(whole, seed=2027)
    plain = student.hand_out(whole)
    changed = [
        (old.source, new.source)
        for old, new in zip(plain.cells, copy.cells, strict=True)
        if old.source.split() != new.source.split()
    ]
    calls = [new for old, new in changed if "check.use_seed(2027)" in new]
    assert len(calls) == 1 and "import" in calls[0]
    assert 2 <= len(changed) <= 5
    with_solutions = student.with_numbers(whole, 2027)
    target = export(path, tmp_path, edit=lambda n: student.hand_out(n, 2027))
    text = target.read_text(encoding="utf-8")
    assert student.leaks(with_solutions, text) == student.leaks(whole, text) == []
    teachers = student.hand_to_teacher(whole, 2027)
    assert student.solution_cells(teachers) == student.solution_cells(with_solutions)
    assert student.solution_cells(teachers) != student.solution_cells(whole)
    # The notebook that was read is unchanged, and so is a copy without a seed.
    assert whole == nbformat.read(path, as_version=4)
    assert student.with_numbers(whole, None) == whole


def test_a_text_that_is_not_in_the_notebook_is_an_error():
    whole = nbformat.read(NOTEBOOKS[0], as_version=4)
    for cell in whole.cells:
        cell.source = cell.source.replace("exactly six times", "exactly 6 times")
    with pytest.raises(ValueError, match="once, found it 0 times: With how many"):
        student.with_numbers(whole, 2027)


def test_the_search_looks_for_solutions_and_answers():
    whole = small()
    secrets = student.secrets(whole)
    assert secrets == [
        "def twice(x): return x + 2 * x",
        "assert check.twice(twice)",
        "return x + 2 * x",
        "The second value is the larger one.",
        "Because the sum is divided by the count.",
    ]
    assert student.leaks(whole, nbformat.writes(whole, version=4)) == secrets
    assert student.quoted(secrets, "a page: return x +\n2 * x") == secrets[2:3]


@every_notebook
def test_no_later_cell_needs_a_solution(path):
    """Students' notebooks run without the solutions."""
    defined, only_in_solutions = set(dir(builtins)), set()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        names = [
            node
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Name)
        ]
        tree = list(ast.walk(ast.parse(cell.source)))
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        bound |= {n.name for n in tree if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        bound |= {
            a.asname or a.name
            for n in tree
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        }
        bound |= {n.arg for n in tree if isinstance(n, ast.arg)}
        if "solution" in cell.metadata.get("tags", ()):
            only_in_solutions |= bound - defined
        else:
            assert not {node.id for node in names if isinstance(node.ctx, ast.Load)} & (
                only_in_solutions - bound
            )
            defined |= bound
            only_in_solutions -= bound


def test_the_sources_for_students(tmp_path):
    """`make student-book` builds them; they contain no solution."""
    folder = tmp_path / "sources"
    student.write_sources(folder)
    texts = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.suffix in student.TEXTS
    }
    secrets = [
        secret
        for path in NOTEBOOKS
        for secret in student.secrets(nbformat.read(path, as_version=4))
    ]
    assert {
        name: quotes
        for name, text in texts.items()
        if (quotes := student.quoted(secrets, text))
    } == {}
    assert not (folder / "book" / "instructor.md").exists()
    pages = [name for name in texts if name.startswith(("book/", "notebooks/"))]
    assert [name for name in pages if "instructor.md" in texts[name]] == []
    assert "instructor" not in (folder / "book" / "_toc.yml").read_text()
    assert not (folder / "notebooks" / "py").exists()
    assert not list(folder.rglob("questions.yml"))  # it holds the seeds' solutions
    notebook = nbformat.read(folder / "notebooks" / NOTEBOOKS[0].name, as_version=4)
    # Outputs such as figures remain.
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) > 10


def test_the_book_does_not_contain_the_source_of_the_checks():
    if problem := why_not_built():
        pytest.skip(problem)
    for path in (HTML / "_modules" / "paperlib" / "exercises").glob("*.html"):
        assert "exact =" not in re.sub(
            r"<[^>]*>", "", path.read_text(encoding="utf-8")
        ), path.name


def test_the_command_line(tmp_path, capsys):
    assert student.main(["notebooks", str(tmp_path), str(NOTEBOOKS[0])]) == 0
    assert (tmp_path / NOTEBOOKS[0].name).is_file()
    assert student.main(["check", str(tmp_path)]) == 1
    assert "no built book" in capsys.readouterr().err
    assert student.main(["notebooks", str(tmp_path), str(ROOT / "nowhere.ipynb")]) == 1
    last = str(NOTEBOOKS[-1])
    assert student.main(["solutions", str(tmp_path), last, "--seed", "-1"]) == 1
    assert "expected at least 0" in capsys.readouterr().err
    assert student.main(["solutions", str(tmp_path), last, "--seed", "2027"]) == 0
    text = (tmp_path / NOTEBOOKS[-1].name).read_text(encoding="utf-8")
    assert "use_seed(2027)" in text and "# @title Solution" in text
