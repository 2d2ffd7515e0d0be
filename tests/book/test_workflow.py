"""The workflow is valid, and inserts the repository to which the pages link."""

import subprocess
import sys

import pytest
import set_repository
import yaml
from built import ROOT
from export_colab import pages_url

WORKFLOW = ROOT / ".github" / "workflows" / "book.yml"
CONFIG = (ROOT / "_config.yml").read_text(encoding="utf-8")


def test_workflow_is_valid():
    # The schema is part of the package.
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    result = subprocess.run(
        [*command, "vendor.github-workflows", str(WORKFLOW)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_only_the_repository_of_the_configuration_changes():
    changed = set_repository.with_repository(CONFIG, "a-fork/vision.papers")
    address = yaml.safe_load(changed)["repository"]["url"]
    assert address == "https://github.com/a-fork/vision.papers"
    assert changed.replace("https://github.com/a-fork/vision.papers", "") == CONFIG
    again = set_repository.with_repository(changed, "other/book")
    assert yaml.safe_load(again)["repository"]["url"] == "https://github.com/other/book"


def test_the_committed_configuration_names_no_repository():
    assert yaml.safe_load(CONFIG)["repository"]["url"] == ""


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
        set_repository.with_repository(CONFIG, name)


def test_a_configuration_without_the_line_is_refused():
    with pytest.raises(ValueError, match="expected one"):
        set_repository.with_repository(
            "title: x\nrepository:\n  branch: main\n", "owner/name"
        )


def test_the_command_does_not_change_the_file_after_an_error(tmp_path, capsys):
    config = tmp_path / "_config.yml"
    config.write_text(CONFIG, encoding="utf-8")
    assert set_repository.main(["not a name"], config) == 1
    assert config.read_text(encoding="utf-8") == CONFIG
    assert "expected OWNER/NAME" in capsys.readouterr().err
    assert set_repository.main(["owner/name"], config) == 0
    assert 'url: "https://github.com/owner/name"' in config.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["_config.yml"]


def test_pages_address_of_a_repository():
    assert (
        pages_url("https://github.com/Owner/papers") == "https://owner.github.io/papers"
    )
    assert pages_url("") == ""
