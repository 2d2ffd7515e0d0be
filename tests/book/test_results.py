"""The result files of `make results`: runs of the same code are kept, others not."""

import json

import pytest
import results
import torch
from freshness import script_hash


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that names its result file, in a temporary repository."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "book" / "data" / "results")
    path = tmp_path / "small_cells.py"
    path.write_text('NAME = "small_cells"\nSTEPS = 3\n', encoding="utf-8")
    return path


def test_runs_of_the_same_code_are_kept_and_others_dropped(script, tmp_path):
    first = results.Results(str(script), {"steps": 3}, force=False)
    assert first.runs == [] and first.stamp["code"] == script_hash(script, tmp_path)
    first.runs.append({"name": "a", "value": 0.5})
    first.save()
    stored = json.loads(
        (tmp_path / "book" / "data" / "results" / "small_cells.json").read_text()
    )
    assert stored["runs"] == first.runs and stored["stamp"] == first.stamp
    assert set(stored["stamp"]) == {"code", "versions", "device", "date", "recipe"}
    # An interrupted command can be resumed, because its result file is not hashed.
    again = results.Results(str(script), {"steps": 3}, force=False)
    assert again.runs == first.runs and again.stamp["code"] == first.stamp["code"]
    assert results.Results(str(script), {"steps": 3}, force=True).runs == []
    script.write_text('NAME = "small_cells"\nSTEPS = 4\n', encoding="utf-8")
    assert results.Results(str(script), {"steps": 4}, force=False).runs == []


def test_the_command_line_is_read_and_one_thread_is_used():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert results.forced("What it does.\n\nMore.", ["--force"])
        assert not results.forced("What it does.", [])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
