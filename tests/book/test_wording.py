"""The check of wording: what it finds, what it leaves alone, how its list shrinks."""

import subprocess

import pytest
import wording


@pytest.mark.parametrize(
    "text",
    [
        "returns one score an image",
        "one\nweight a channel",
        "# one\n# number a row",
        "8 bits a channel",
        "seconds a layer",
        "draws a row a class",
        "Give it 4e-5, say.",
        "to 256 pixels as in the paper, say",
        "the review's way of counting",
        "so the idea, about one class",
        "Mended: a crash",
        "Puts it back at the end.",
        "the run goes on where it stopped",
        "writes the file whole or not at\nall",
        "a layer with places",
        "every hidden number",
        "the farthest one, again and again",
        "No GPU was at hand",
    ],
)
def test_a_wording_is_found(text):
    assert len(list(wording.find(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "one score per image",
        "one of a batch of images",
        "say what is wrong, and what to do",
        "A row has a pixel",
        "the network recommends an image",
        "the image of a class, saying nothing",
    ],
)
def test_a_usual_wording_is_left_alone(text):
    assert list(wording.find(text)) == []


def test_a_finding_names_its_line():
    (finding,) = wording.find("first\nsecond\nMend it.\n")
    assert finding == (3, "Mend", '"fix"')


@pytest.fixture
def repository(tmp_path):
    """A repository with a clean page, one with a finding, and an empty list."""
    (tmp_path / "book" / "tools").mkdir(parents=True)
    (tmp_path / wording.TODO).write_text("# A comment.\n", encoding="utf-8")
    (tmp_path / "clean.md").write_text("One score per image.\n", encoding="utf-8")
    (tmp_path / "old.md").write_text("One score an image.\n", encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def test_only_files_off_the_list_are_checked(repository):
    assert wording.check(repository) == [
        'old.md:1: "One score an image"; write use "per": "one score per image"'
    ]
    (repository / wording.TODO).write_text("old.md\n", encoding="utf-8")
    assert wording.check(repository) == []


def test_the_list_shrinks(repository):
    """A file that is clean, or gone, has to leave it."""
    (repository / wording.TODO).write_text(
        "clean.md\ngone.md\nold.md\n", encoding="utf-8"
    )
    clean, gone = sorted(wording.check(repository))
    assert (
        "clean.md has no finding any more" in clean and "gone.md does not exist" in gone
    )
