import json
import os
import pickle
import stat
import zipfile

import pytest
import torch
from refusals import refuses
from safetensors.torch import load_file, save_file

from paperlib import storage
from paperlib.image_files import read_image
from paperlib.storage import (
    fingerprint,
    is_dense,
    load_state,
    read_csv,
    read_tensors,
    write_csv,
    write_tensors,
    write_text,
)

FORMAT = "paperlib.thing.2"


def tensors():
    torch.manual_seed(0)
    whole = torch.randn(3, 4)
    return {
        "whole": whole,
        "row": whole[1],  # shares memory
        "same": whole,
        "turned": whole.T,  # not contiguous
        "number": torch.tensor(7),
        "empty": torch.empty(0, 2),
        "half": torch.randn(5).bfloat16(),
        "true": torch.tensor([True, False]),
    }


def read(path):
    return read_tensors(path, FORMAT, "saved thing", "make it again")


def test_written_values_are_read_back(tmp_path):
    path = tmp_path / "thing.safetensors"
    write_tensors(path, tensors(), {"list": [1, None], "word": "é"}, FORMAT)
    assert os.listdir(tmp_path) == [path.name]
    about, found = read(path)
    assert about == {"list": [1, None], "word": "é", "format": FORMAT}
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert load_file(path).keys() == found.keys()  # any reader of safetensors reads it
    path.write_bytes(b"")  # what was read does not hang on the file
    assert torch.equal(found["whole"], tensors()["whole"])


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "thing.safetensors"
    write_tensors(path, tensors(), {}, FORMAT)
    before = path.read_bytes()
    (tmp_path / ".thing.safetensors.tmp").write_bytes(
        b"half of a file that a killed run left"
    )

    def killed(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "save_file", killed)
        write_tensors(path, {}, {}, FORMAT)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_text_is_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / "note.txt"
    write_text(path, "first: é\n")
    assert path.read_bytes() == "first: é\n".encode()

    def fail(descriptor):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, "fsync", fail)
        write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "first: é\n"
    assert os.listdir(tmp_path) == [path.name]


def test_a_table_is_read_as_it_was_written(tmp_path):
    path, columns = tmp_path / "table.csv", ["a", "b"]
    assert read_csv(path, columns, dict, "numbers") == []
    # The name of a file may contain any character, and bytes that are no text.
    rows = [{"a": 1, "b": None, "c": "not a column"}, {"a": 'x,"\n', "b": "\udcff"}]
    write_csv(path, columns, rows)
    expected = [{"a": "1", "b": ""}, {"a": 'x,"\n', "b": "\udcff"}]
    assert read_csv(path, columns, dict, "numbers") == expected
    (first, _) = read_csv(path, [*columns, "d"], dict, "numbers", {"d": "0"})
    assert first == {"a": "1", "b": "", "d": "0"}
    for others in (["a"], [*columns, "d"]):
        with refuses("table.csv is not a table of numbers .*its columns are"):
            read_csv(path, others, dict, "numbers")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,b,b\n1,2,3\n", "its columns are"),
        ("a,b\n1,2,3\n", "a row has more values than the table has columns"),
        ('a,b\n1,"2\n', "unexpected end of data"),
        ('a,b\n1,"2"x\n', "expected after"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, text, reason):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with refuses(f"table.csv is not a table of numbers .*{reason}"):
        read_csv(path, ["a", "b"], dict, "numbers")


def test_a_row_that_a_killed_run_cut_off_can_be_read(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('a,b\n1,2\n3,"4')
    rows = read_csv(path, ["a", "b"], dict, "numbers", strict=False)
    assert rows == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_fingerprint_identifies_data_and_settings():
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    others = [images[:4], images.double(), images + 1e-3, images.flip(0)]
    found = {fingerprint(some, 2) for some in (images, images.clone(), *others)}
    assert len(found) == 5 and all(len(digits) == 8 for digits in found)
    assert fingerprint(images, 3) not in found
    # The names of files by this version must not change.
    assert fingerprint(3) == "ac11339f"


def test_every_damage_is_noticed(tmp_path):
    """One bit flipped, at every byte of the file, or the file cut short there: never a
    wrong tensor.
    """
    path = tmp_path / "thing.safetensors"
    write_tensors(
        path, {"a": torch.arange(8.0), "b": torch.ones(3)}, {"number": 5}, FORMAT
    )
    whole = path.read_bytes()
    refused = (
        "thing.safetensors (can't be read as a saved thing|is corrupt"
        "|is not a saved thing)"
    )
    for place in range(len(whole)):
        for damaged in (
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            whole[:place],
        ):
            path.write_bytes(damaged)
            with refuses(refused):
                read(path)
            assert path.read_bytes() == damaged  # nothing is overwritten


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "thing.safetensors"
    with refuses(
        r"thing.safetensors is no file \(.*\); expected a saved thing",
    ):
        read(path)
    pickle.dump({"a": 1}, path.open("wb"))
    with refuses("thing.safetensors can't be read"):
        read(path)
    for metadata in (
        None,
        {"paperlib": "[]"},
        {"paperlib": json.dumps({"format": "paperlib.thing.1"})},
        {"paperlib": json.dumps({"format": "paperlib.other.3"})},
        {"paperlib": json.dumps({"format": "paperlib.thing.10"})},
    ):
        save_file({"a": torch.ones(1)}, path, metadata)
        with refuses(
            r"not a saved thing of this version: its format is .*, not"
            " 'paperlib.thing.2'; make it again, or update paperlib",
        ):
            read(path)
    save_file({"a": torch.ones(1)}, path, {"paperlib": "[" * 100_000})
    with refuses("can't be read"):
        read(path)


def test_an_integer_is_no_path_and_its_file_descriptor_stays_open(tmp_path):
    """`open(3)` reads from an open file of the caller, and closes it."""
    (tmp_path / "file").touch()
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        for reader in (read, load_state, read_image):
            with refuses(f"{descriptor} is no path; expected a str"):
                reader(descriptor)
        os.fstat(descriptor)
    finally:
        os.close(descriptor)


def test_a_file_is_readable_to_whom_the_users_mask_says(tmp_path):
    path, plain = tmp_path / "thing.safetensors", tmp_path / "plain"
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            write_tensors(path, tensors(), {}, FORMAT)
            plain.unlink(missing_ok=True)
            plain.touch()
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_files_of_a_killed_run_are_removed(tmp_path):
    path, left = tmp_path / "thing.safetensors", tmp_path / ".thing.safetensors.tmp"
    left.mkdir()
    (left / ".tmp1SiPOv").write_bytes(
        b"half a file, under a name that safetensors chose"
    )
    write_tensors(path, tensors(), {}, FORMAT)
    assert os.listdir(tmp_path) == [path.name] and read(path)


def test_compressed_and_sparse_content_is_reported(tmp_path):
    path, packed = tmp_path / "weights.pth", tmp_path / "packed.pth"
    torch.save(tensors(), path)
    assert load_state(path).keys() == tensors().keys()
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name) + bytes(10_000))
    with refuses("it is compressed, and decompresses to"):
        load_state(packed)
    one = torch.ones(1)
    assert all(is_dense(tensor) for tensor in tensors().values())
    for tensor in (one.expand(2), one.to_sparse(), one.to("meta")):
        assert not is_dense(tensor)
