"""The workflow is valid, and publishes what the built pages link to."""

import os
import subprocess
import sys

import pytest
import set_repository
import yaml
from built import ROOT
from export_colab import pages_url

WORKFLOW = ROOT / ".github" / "workflows" / "book.yml"
CONFIG = (ROOT / "_config.yml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))


def commands(workflow, job):
    return "\n".join(step.get("run", "") for step in workflow["jobs"][job]["steps"])


def validate(path):
    # The schema is part of the package: nothing is fetched.
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.github-workflows",
        str(path),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_workflow_is_valid():
    result = validate(WORKFLOW)
    assert result.returncode == 0, result.stdout


def test_the_schema_check_can_fail(tmp_path):
    broken = tmp_path / "book.yml"
    broken.write_text(
        WORKFLOW.read_text(encoding="utf-8").replace("runs-on:", "run-on:"),
        encoding="utf-8",
    )
    assert validate(broken).returncode != 0


def test_it_runs_on_pushes_pull_requests_and_weekly(workflow):
    triggers = workflow[True]  # YAML reads the key `on` as true
    assert triggers["push"]["branches"] == ["main"]
    assert "pull_request" in triggers
    assert triggers["schedule"][0]["cron"].split()[4] != "*"


def test_it_runs_what_a_developer_runs(workflow):
    assert ".ci/run" in commands(workflow, "test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_only_main_is_published_and_only_after_the_tests(workflow):
    publish = workflow["jobs"]["publish"]
    assert publish["needs"] == "test"
    assert "refs/heads/main" in publish["if"]
    assert workflow["permissions"] == {"contents": "read"}


def test_the_address_is_filled_in_before_the_build(workflow):
    steps = [step.get("run", "") for step in workflow["jobs"]["publish"]["steps"]]
    fill = next(
        i for i, run in enumerate(steps) if "book/tools/set_repository.py" in run
    )
    build = next(i for i, run in enumerate(steps) if "make book" in run)
    assert fill < build
    step = workflow["jobs"]["publish"]["steps"][fill]
    assert step["env"]["REPOSITORY"] == "${{ github.repository }}"


def test_a_repository_is_filled_in_and_nothing_else_changes():
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
def test_another_form_of_name_is_refused(name):
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        set_repository.with_repository(CONFIG, name)


def test_a_configuration_without_the_line_is_refused():
    with pytest.raises(ValueError, match="expected one"):
        set_repository.with_repository(
            "title: x\nrepository:\n  branch: main\n", "owner/name"
        )


def test_the_command_writes_the_file_or_leaves_it(tmp_path, capsys):
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
