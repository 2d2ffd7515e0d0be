"""When a notebook is stale, tested with a small library and notebook."""

import json
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import run_notebooks
import status
from freshness import code_hash, imported_modules, outside_names, script_hash

NOTEBOOK = """\
# %% [markdown]
# # A notebook

# %% tags=["nbval-check-output"]
from paperlib.outer import answer

print(answer())

# %%
1 + 1
"""
LIBRARY = {
    "__init__.py": '"""A library."""\n',
    "outer.py": (
        "from paperlib import middle\n\n\ndef answer():\n    '''Answer.'''\n    return"
        " middle.value() * 2\n"
    ),
    "middle.py": (
        "def value():\n    from .inner.deep import VALUE  # relative, and late\n\n   "
        " return VALUE\n"
    ),
    "inner/__init__.py": "",
    "inner/deep.py": "VALUE = 21\n",
    "unrelated.py": "VALUE = 1\n",
    "../book/data/results/run.json": "{}\n",
    "../notebooks/companion.py": "from paperlib import unrelated\n",
}


@pytest.fixture
def book(tmp_path):
    """A repository with a notebook that prints 42."""
    for name, source in LIBRARY.items():
        path = (tmp_path / "paperlib" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    (tmp_path / "notebooks" / "py").mkdir()
    (tmp_path / "notebooks" / "py" / "small.py").write_text(NOTEBOOK, encoding="utf-8")
    return tmp_path


@pytest.fixture
def stamped(book):
    """The same repository with outputs and a stamp, written without a kernel."""
    write_as_executed(book)
    return book


def write_as_executed(book):
    path = book / "notebooks" / "small.ipynb"
    notebook = run_notebooks.read_text(path)
    for number, cell in enumerate(
        (cell for cell in notebook.cells if cell.cell_type == "code"), start=1
    ):
        cell.execution_count = number
        cell.outputs = [
            nbformat.v4.new_output("stream", name="stdout", text=f"output {number}\n")
        ]
    facts = {
        "profile": "smoke",
        "device": "a processor",
        "versions": {"python": "3"},
        "date": "2026-01-01",
        "seconds": 1.5,
    }
    notebook.metadata["executed"] = {"code": code_hash(notebook, book), **facts}
    nbformat.write(notebook, path)


def state(book):
    return run_notebooks.state(book / "notebooks" / "small.ipynb", book)


def edit(path: Path, old: str, new: str):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_imports_are_followed(book):
    found = imported_modules(["import numpy\nfrom paperlib.outer import answer"], book)
    assert sorted(found) == [
        "paperlib",
        "paperlib.inner",
        "paperlib.inner.deep",
        "paperlib.middle",
        "paperlib.outer",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import paperlib.unrelated",
        "import paperlib.unrelated as u",
        "from paperlib import unrelated",
        "from paperlib.unrelated import VALUE",
        "import paperlib\npaperlib.unrelated.VALUE",
        "def f():\n    from paperlib import unrelated",
        "%matplotlib inline\n!ls\nfrom paperlib import unrelated",
    ],
)
def test_every_form_of_import_is_recognised(book, source):
    assert "paperlib.unrelated" in imported_modules([source], book)


def test_the_companion_module_counts_as_library(stamped):
    """With its imports, for the notebooks that import it."""
    assert "paperlib.unrelated" in imported_modules(["import companion"], stamped)
    edit(stamped / "notebooks" / "py" / "small.py", "1 + 1", "import companion")
    write_as_executed(stamped)
    edit(stamped / "notebooks" / "companion.py", "unrelated", "middle")
    assert state(stamped) == "stale"


def test_lazily_imported_names_are_followed(book):
    """They are declared under `if TYPE_CHECKING`, which imports nothing at run time."""
    lazy = (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from paperlib.outer"
        " import answer\n"
    )
    (book / "paperlib" / "__init__.py").write_text(lazy, encoding="utf-8")
    assert "paperlib.outer" in imported_modules(["from paperlib import answer"], book)
    assert "paperlib.outer" in imported_modules(
        ["import paperlib\npaperlib.answer()"], book
    )
    assert sorted(imported_modules(["import paperlib.unrelated"], book)) == [
        "paperlib",
        "paperlib.unrelated",
    ]


def test_other_packages_and_strings_are_listed(book):
    imports, strings = outside_names(
        [
            "import numpy as np\nfrom PIL import Image\nx = 'run'\nfrom paperlib import"
            " outer"
        ],
        book,
    )
    assert imports == {"numpy", "PIL"}
    assert "run" in strings


def test_a_new_notebook_is_missing_then_fresh(book):
    assert state(book) == "missing"
    write_as_executed(book)
    assert state(book) == "fresh"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("outer.py", "* 2", "* 3"),
        ("middle.py", "return VALUE", "return -VALUE"),
        ("inner/deep.py", "21", "22"),
        ("inner/__init__.py", "", "import os\n"),
        ("__init__.py", '"""A library."""\n', '"""A library."""\nimport os\n'),
        ("inner/deep.py", "21", "21.0"),
    ],
)
def test_a_changed_import_makes_it_stale(stamped, name, old, new):
    edit(stamped / "paperlib" / name, old, new)
    assert state(stamped) == "stale"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("unrelated.py", "1", "2"),
        ("inner/deep.py", "21\n", "21  # a remark\n"),
        ("outer.py", "'''Answer.'''", "'''Say it in other words.'''"),
        ("outer.py", "middle.value() * 2", "(middle.value()\n        * 2)"),
        ("../book/data/results/run.json", "{}", "[]"),
        ("../notebooks/companion.py", "unrelated", "middle"),
    ],
)
def test_changes_without_effect_on_outputs_leave_it_fresh(stamped, name, old, new):
    edit(stamped / "paperlib" / name, old, new)
    assert state(stamped) == "fresh"


def test_changed_data_files_make_it_stale(stamped):
    edit(stamped / "notebooks" / "py" / "small.py", "1 + 1", 'result = "run"')
    write_as_executed(stamped)
    assert state(stamped) == "fresh"
    edit(stamped / "book" / "data" / "results" / "run.json", "{}", "[]")
    assert state(stamped) == "stale"


def test_changed_code_is_stale_and_changed_text_is_unpaired(stamped):
    text = stamped / "notebooks" / "py" / "small.py"
    edit(text, "A notebook", "Another title")
    assert state(stamped) == "unpaired"
    edit(text, "1 + 1", "1 + 2")
    assert state(stamped) == "stale"


def test_a_string_in_a_cell_is_not_a_docstring(stamped):
    edit(stamped / "notebooks" / "py" / "small.py", "1 + 1", '"shown"')
    write_as_executed(stamped)
    edit(stamped / "notebooks" / "py" / "small.py", '"shown"', '"shown differently"')
    assert state(stamped) == "stale"


def test_a_changed_tag_is_unpaired_and_a_changed_cell_boundary_is_stale(stamped):
    text = stamped / "notebooks" / "py" / "small.py"
    edit(text, ' tags=["nbval-check-output"]', "")
    assert state(stamped) == "unpaired"
    edit(text, "# %%\n1 + 1", "1 + 1")
    assert state(stamped) == "stale"


def test_cleared_outputs_are_stale(stamped):
    path = stamped / "notebooks" / "small.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].execution_count = None
    nbformat.write(notebook, path)
    assert state(stamped) == "stale"


def test_new_text_keeps_outputs_and_stamp(stamped):
    path = stamped / "notebooks" / "small.ipynb"
    before = nbformat.read(path, as_version=4)
    edit(
        stamped / "notebooks" / "py" / "small.py",
        "# # A notebook",
        "# # Another title\n\n# %% [markdown]\n# A cell more.",
    )
    assert run_notebooks.update([path], stamped) == []
    after = nbformat.read(path, as_version=4)
    assert state(stamped) == "fresh"
    assert after.cells[0].source == "# Another title"
    assert [cell.outputs for cell in after.cells[2:]] == [
        cell.outputs for cell in before.cells[1:]
    ]
    assert after.metadata == before.metadata


def test_cell_ids_are_stable(book):
    path = book / "notebooks" / "small.ipynb"
    ids = [cell.id for cell in run_notebooks.read_text(path).cells]
    assert ids == [cell.id for cell in run_notebooks.read_text(path).cells]
    edit(book / "notebooks" / "py" / "small.py", "1 + 1", "1 + 1\n\n# %%\n1 + 1")
    more = [cell.id for cell in run_notebooks.read_text(path).cells]
    assert more[:3] == ids
    assert len(set(more)) == 4


def test_run_writes_outputs_stamp_and_status(book, capsys):
    assert run_notebooks.main([], book) == 0
    notebook = nbformat.read(book / "notebooks" / "small.ipynb", as_version=4)
    assert notebook.cells[1].outputs[0].text == "42\n"
    stamp = notebook.metadata["executed"]
    assert stamp["code"] == code_hash(notebook, book)
    assert {"python", "torch", "numpy", "paperlib"} <= stamp["versions"].keys()
    assert stamp["seconds"] > 0
    assert stamp["device"]
    assert stamp["profile"] in ("smoke", "full")
    assert len(stamp["date"]) == 10
    assert (book / "book" / "status.md").read_text(encoding="utf-8") == status.page(
        book
    )
    assert "| 1 of 2 |" in status.page(book)
    # No other file remains, and a second call runs nothing.
    assert sorted(path.name for path in (book / "notebooks").iterdir()) == [
        "companion.py",
        "py",
        "small.ipynb",
    ]
    capsys.readouterr()
    assert run_notebooks.main([], book) == 0
    assert "small: fresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code",
    [
        "raise RuntimeError('broken')",
        "import sys; print('careful', file=sys.stderr)",
        "import os; os._exit(3)",
    ],
)
def test_a_failing_notebook_leaves_the_old_file(stamped, code, capsys):
    path = stamped / "notebooks" / "small.ipynb"
    before = path.read_bytes()
    edit(stamped / "notebooks" / "py" / "small.py", "1 + 1", code)
    assert run_notebooks.main([], stamped) == 1
    assert path.read_bytes() == before
    assert "the old file is kept" in capsys.readouterr().err
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "companion.py",
        "py",
        "small.ipynb",
    ]


def test_a_killed_run_leaves_the_old_file(stamped):
    path = stamped / "notebooks" / "small.ipynb"
    before = path.read_bytes()
    started = stamped / "started"
    edit(
        stamped / "notebooks" / "py" / "small.py",
        "1 + 1",
        f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)",
    )
    code = (
        "import sys, pathlib, run_notebooks as r; sys.exit(r.main([],"
        f" pathlib.Path({str(stamped)!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(run_notebooks.__file__).parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # On a busy machine a kernel may need a minute to start.
        for _ in range(1800):
            if started.exists():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert started.exists()
    finally:
        process.kill()
        process.wait()
    assert path.read_bytes() == before


def test_check_lists_what_is_not_fresh_and_runs_nothing(stamped, capsys):
    assert run_notebooks.main(["--check"], stamped) == 0
    edit(stamped / "paperlib" / "inner" / "deep.py", "21", "22")
    assert run_notebooks.main(["--check"], stamped) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "small: stale"
    assert not (stamped / "book" / "status.md").exists()


def test_an_unknown_name_is_refused(stamped, capsys):
    assert run_notebooks.main(["--check", "smal"], stamped) == 1
    assert "expected one of small" in capsys.readouterr().err


def test_status_of_an_unstamped_notebook_is_refused(stamped):
    path = stamped / "notebooks" / "small.ipynb"
    notebook = jupytext.read(path)
    del notebook.metadata["executed"]
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match="make execute"):
        status.page(stamped)


def test_the_status_page_lists_long_runs(stamped):
    """Their own result file does not count as a change of their code."""
    script = stamped / "book" / "tools" / "small_cells.py"
    result = stamped / "book" / "data" / "results" / "small_cells.json"
    script.parent.mkdir()
    script.write_text(
        'from paperlib.outer import answer\n\nNAME = "small_cells"\n', encoding="utf-8"
    )
    assert "Runs too long" not in status.page(stamped)
    stamp = {
        "code": script_hash(script, stamped),
        "device": "a processor",
        "versions": {"torch": "2"},
        "date": "today",
    }
    run = {
        "name": "committed",
        "steps": 500,
        "cpu_seconds": 600.0,
        "curves": [[0, 4.16], [500, 2.5]],
        "positions": {"mono": [0.41, 0.35]},
    }
    result.write_text(json.dumps({"stamp": stamp, "runs": [run]}), encoding="utf-8")
    assert "| `small_cells.json` | unchanged | 1 | today |" in status.page(stamped)
    assert "**a processor**, torch 2:" in status.page(stamped)
    assert "500 steps" not in status.page(stamped)
    result.with_suffix(".safetensors").write_bytes(bytes(1_600_000))
    assert "1.6 MB" in status.page(stamped)
    assert "500 steps in 10 processor minutes, loss 4.16" in status.page(stamped)
    assert "41 and 35 % (mono cells)" in status.page(stamped)
    edit(stamped / "paperlib" / "inner" / "deep.py", "21", "22")
    assert "| `small_cells.json` | changed | 1 | today |" in status.page(stamped)
