"""Every committed notebook: paired with its text, up to date, complete, small."""

import ast
import re
from html.parser import HTMLParser

import nbformat
import pytest
import run_notebooks
import status
from built import NOTEBOOKS, ROOT, documents
from freshness import imported_modules

CODE_LINES, CODE_COLUMNS = 25, 88  # per notebook cell; the book's column fits them
NOTEBOOK_BYTES = 1_500_000
IMAGE_TYPES = ("image/png", "image/jpeg", "image/svg+xml", "image/gif")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [
        cell
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and cell.source.strip()
    ]


def first_line(cell):
    """Return the first line, which identifies a cell in messages."""
    return cell.source.splitlines()[0]


class Images(HTMLParser):
    """Collect the alt text of every <img>."""

    def __init__(self, html):
        super().__init__()
        self.alts = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.alts.append((dict(attributes).get("alt") or "").strip())


def description_errors(cell):
    """List the images in a cell's output that have no description."""
    has_description = bool(
        cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "").strip()
    )
    errors, n_images = [], 0
    for output in cell.outputs:
        data = output.get("data", {})
        if html := data.get("text/html"):
            errors += ["an <img> without alt"] * Images(html).alts.count("")
        elif any(kind in data for kind in IMAGE_TYPES):
            n_images += 1
    if n_images and not has_description:
        errors.append('an image; add mystnb={"image": {"alt": "…"}} to the cell')
    if n_images > 1:
        errors.append(
            f"{n_images} images share one description; draw one per notebook cell"
        )
    return errors


def test_every_notebook_has_a_text_and_the_reverse():
    assert [path.stem for path in NOTEBOOKS] == run_notebooks.names(ROOT)


def test_every_notebook_is_in_the_table_of_contents():
    assert {f"notebooks/{path.stem}" for path in NOTEBOOKS} <= set(documents())


@every_notebook
def test_notebook_and_text_contain_the_same_cells(path):
    text = run_notebooks.shared_part(run_notebooks.read_text(path))
    notebook = run_notebooks.shared_part(nbformat.read(path, as_version=4))
    for ours, theirs in zip(text, notebook, strict=True):
        assert ours == theirs, "the text and the notebook differ; run `make execute`"


@every_notebook
def test_outputs_belong_to_the_code(path):
    assert run_notebooks.state(path, ROOT) == "fresh", "run `make execute`"


@every_notebook
def test_every_cell_was_run_once_in_order(path):
    assert [cell.execution_count for cell in code_cells(path)] == list(
        range(1, len(code_cells(path)) + 1)
    )
    assert any(cell.outputs for cell in code_cells(path))


@every_notebook
def test_no_output_is_an_error_or_a_warning(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error", first_line(cell)
            assert output.get("name") != "stderr", first_line(cell)


@every_notebook
def test_cells_are_short(path):
    long = {
        first_line(cell): len(cell.source.splitlines()) for cell in code_cells(path)
    }
    assert {name: lines for name, lines in long.items() if lines > CODE_LINES} == {}


@every_notebook
def test_code_fits_the_column(path):
    wide = {
        first_line(cell): line
        for cell in code_cells(path)
        for line in cell.source.splitlines()
        if len(line) > CODE_COLUMNS
    }
    assert wide == {}
    assert not any("fmt: skip" in cell.source for cell in code_cells(path))


@every_notebook
def test_every_image_has_a_description(path):
    errors = {first_line(cell): description_errors(cell) for cell in code_cells(path)}
    assert {name: error for name, error in errors.items() if error} == {}


@every_notebook
def test_notebook_files_are_small(path):
    assert path.stat().st_size < NOTEBOOK_BYTES


@every_notebook
def test_the_notebook_redefines_nothing_of_the_library(path):
    """Two functions of the same name would confuse readers."""
    sources = [cell.source for cell in code_cells(path)]
    public = {
        name
        for module in imported_modules(sources, ROOT).values()
        for name in re.findall(
            r"^(?:def|class) ([a-zA-Z]\w*)", module.read_text(encoding="utf-8"), re.M
        )
    }
    defined = {
        name
        for source in sources
        for name in re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", source, re.M)
    }
    assert defined & public == set()


@every_notebook
def test_no_cell_reassigns_an_imported_name(path):
    """Later cells would use the wrong object, perhaps only in the full profile."""
    tree = ast.parse(
        (path.parent / "py" / f"{path.stem}.py").read_text(encoding="utf-8")
    )
    imports = [
        alias
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    imported = {alias.asname or alias.name.partition(".")[0] for alias in imports}
    assigned = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert imported and imported & assigned == set()


def test_the_status_page_agrees_with_the_stamps():
    committed = (ROOT / status.PAGE).read_text(encoding="utf-8")
    assert committed == status.page(ROOT), "run `make execute` (it writes the page too)"


def test_the_losses_of_the_t_sne_figure_are_trained_with_one_budget():
    """Chapter 04 compares encoders by loss, so nothing else may differ."""
    text = run_notebooks.read_text(ROOT / "notebooks" / "04_patch_svdd.ipynb")
    code = "\n".join(cell.source for cell in text.cells if cell.cell_type == "code")
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "train"
    ]
    compared = [
        call
        for call in calls
        if ast.unparse(call.args[0]) == "live"
        or "encoders[" in ast.unparse(call.args[0])
    ]
    assert len(compared) == 2  # the live training, and the stored ones
    for call in compared:
        named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        unpacked = [ast.unparse(k.value) for k in call.keywords if k.arg is None]
        assert unpacked[0] == "BUDGET"
        assert not {"steps", "crops", "side", "pairs"} & set(named)
    (live,) = [call for call in compared if ast.unparse(call.args[0]) == "live"]
    assert ast.unparse(live.args[1]) == "train_images"
    assert "(train_images, kind)" in code  # the same images for the other losses
