"""What the scripts of `make results` share: runs of the same code are kept, others are
not.
"""

import json

import pytest
import results
import torch
from freshness import script_hash


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that names its own result, in a repository of its own."""
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
    kept = json.loads(
        (tmp_path / "book" / "data" / "results" / "small_cells.json").read_text()
    )
    assert kept["runs"] == first.runs and kept["stamp"] == first.stamp
    assert set(kept["stamp"]) == {"code", "versions", "device", "date", "recipe"}
    # An interrupted command goes on: the result that it wrote itself is not part of its
    # code.
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
