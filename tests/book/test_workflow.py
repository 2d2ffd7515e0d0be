"""The workflow is valid, and one step fills in the address to which links lead."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import set_repository
import yaml
from addresses import colab_url, pages_url
from bs4 import BeautifulSoup
from built import NOTEBOOKS as PATHS
from built import ROOT
from jupyter_book.config import get_final_config
from set_repository import CONFIG, PLACEHOLDER, PUBLISHED

WORKFLOW = ROOT / ".github" / "workflows" / "book.yml"
FILLED = (CONFIG, "README.md", "book/running.md")
SCRIPTS = ("book/tools/set_repository.py", "book/tools/addresses.py")
NO_BUTTON = "use_repository_button: false"
NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in PATHS]


def test_workflow_is_valid():
    # The schema is part of the package.
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    result = subprocess.run(
        [*command, "vendor.github-workflows", str(WORKFLOW)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.fixture
def copy(tmp_path):
    """The files that the step reads, without an address."""
    for name in (*FILLED, *SCRIPTS, *NOTEBOOKS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    url = yaml.safe_load((ROOT / CONFIG).read_text())["repository"]["url"]
    if url:  # in a fork
        for path in (tmp_path / name for name in FILLED):
            text = path.read_text(encoding="utf-8").replace(f'"{url}"', '""')
            text = text.replace(url, PLACEHOLDER)
            text = text.replace("use_repository_button: true", NO_BUTTON)
            text = PUBLISHED.sub("<!-- published -->", text)
            path.write_text(text, encoding="utf-8")
    return tmp_path


def run_step(folder, name):
    """Run the command of README, as written, without any installed package."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paragraph = readme.split("## Publish your own copy")[1]
    (script,) = re.findall(r"^python3 (\S+) OWNER/NAME$", paragraph, re.M)
    command = [sys.executable, "-S", "-E", script, name]
    subprocess.run(command, cwd=folder, check=True)


def test_only_lines_with_an_address_change(copy):
    before = {name: (copy / name).read_text().splitlines() for name in FILLED}
    run_step(copy, "a-fork/vision.papers")
    changed = {}
    for name, lines in before.items():
        after = (copy / name).read_text().splitlines()
        assert len(after) == len(lines)
        changed[name] = [line for line in after if line not in lines]
    assert changed[CONFIG] == [
        '  url: "https://github.com/a-fork/vision.papers"',
        "  use_repository_button: true",
    ]
    assert len(changed["README.md"]) == 3
    assert len(changed["book/running.md"]) == 1


def test_the_links_of_a_published_readme(copy):
    run_step(copy, "A-fork/papers")
    readme, running = ((copy / name).read_text() for name in FILLED[1:])
    assert PLACEHOLDER not in readme + running
    assert "git clone https://github.com/A-fork/papers" in readme
    assert "git clone https://github.com/A-fork/papers`" in running
    assert '@ git+https://github.com/A-fork/papers"' in readme
    assert "<https://a-fork.github.io/papers/>" in readme
    start = "https://colab.research.google.com/github/A-fork/papers/blob/gh-pages/colab"
    expected = [f"{start}/{Path(name).name}" for name in NOTEBOOKS]
    assert re.findall(r"\[\d\]\((https://colab\.\S+)\)", readme) == expected


def test_another_name_leaves_nothing_of_the_first(copy):
    run_step(copy, "owner/book")
    once = {name: (copy / name).read_text() for name in FILLED}
    run_step(copy, "owner/book-two")
    run_step(copy, "owner/book")
    assert {name: (copy / name).read_text() for name in FILLED} == once


def test_the_theme_receives_the_address(copy):
    """Jupyter Book turns the configuration into the options of the theme."""
    for name, has_button in ((None, False), ("a-fork/papers", True)):
        if name:
            run_step(copy, name)
        config, _ = get_final_config(
            user_yaml=copy / CONFIG, cli_config={"latex_individualpages": False}
        )
        options = config["html_theme_options"]
        address = f"https://github.com/{name}" if name else ""
        assert options["repository_url"] == address
        assert options["use_repository_button"] == has_button


def test_readme_and_configuration_name_the_same_repository():
    """None in this repository; a fork commits its own."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILLED}
    url = yaml.safe_load(texts[CONFIG])["repository"]["url"]
    assert f"git clone {url or PLACEHOLDER}" in texts["README.md"]
    assert f"git clone {url or PLACEHOLDER}" in texts["book/running.md"]
    (line,) = PUBLISHED.findall(texts["README.md"])
    assert (pages_url(url) in line) if url else line == "<!-- published -->"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "owner",
        "https://github.com/owner/name",
        "owner/name/more",
        'o/n"\nx: "',
        "-o/n",
    ],
)
def test_an_invalid_repository_name_is_refused(name):
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        set_repository.with_repository((ROOT / CONFIG).read_text(), name)


def test_a_file_without_the_line_to_set_is_refused():
    with pytest.raises(ValueError, match="found 0 lines `url: .*expected one"):
        set_repository.with_repository(
            "title: x\nrepository:\n  branch: main\n", "owner/name"
        )
    with pytest.raises(ValueError, match="found 0 lines `<!-- published -->`"):
        set_repository.with_published_links("# Title\n", "", [])


def test_the_command_changes_no_file_after_an_error(copy, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert set_repository.main(["not a name"], copy) == 1
    assert "expected OWNER/NAME" in capsys.readouterr().err
    (copy / "README.md").write_text("# Title\n")
    assert set_repository.main(["owner/name"], copy) == 1
    assert (copy / CONFIG).read_bytes() == before[copy / CONFIG]
    assert {path for path in copy.rglob("*") if path.is_file()} == set(before)


def test_addresses_of_a_published_book():
    assert (
        pages_url("https://github.com/Owner/papers") == "https://owner.github.io/papers"
    )
    assert pages_url("https://github.com/Owner/owner.github.io") == (
        "https://owner.github.io"
    )
    assert pages_url("") == ""


@pytest.mark.long
def test_the_pages_of_a_published_copy_lead_to_it(tmp_path):
    """Build a book of two pages from a copy of the committed files."""
    book = tmp_path / "copy"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (book / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, book / name)
    run_step(book, "a-fork/papers")
    toc = "format: jb-book\nroot: book/running\nchapters:\n- file: notebooks/02_cam\n"
    (book / "book" / "_toc.yml").write_text(toc)
    # Without -W and -n: the pages link to pages that are left out.
    program = Path(sys.executable).with_name("jupyter-book")
    done = subprocess.run(
        [program, "build", ".", "--toc", "book/_toc.yml"],
        cwd=book,
        env={**os.environ, "PYTHONPATH": str(book)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    html = book / "_build" / "html"
    running, notebook = (
        BeautifulSoup((html / name).read_text(encoding="utf-8"), "html.parser")
        for name in ("book/running.html", "notebooks/02_cam.html")
    )
    assert "git clone https://github.com/a-fork/papers" in running.get_text()
    for page in (running, notebook):
        (button,) = page.select("a.btn-source-repository-button")
        assert button["href"] == "https://github.com/a-fork/papers"
    (button,) = notebook.select("a.btn-launch-colab-button")
    assert button["href"] == colab_url("https://github.com/a-fork/papers", "02_cam")
    copy = (html / "colab" / "02_cam.ipynb").read_text(encoding="utf-8")
    assert "(https://a-fork.github.io/papers/book/02_cam.html)" in copy
