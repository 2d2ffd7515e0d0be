import io
import os
import stat
import tarfile
import zipfile

import pytest
from refusals import refuses

from paperlib.datasets import unpack
from paperlib.validation import UnusableFile

FILES = {
    "bottle/train/good/000.png": b"good" * 500,
    "bottle/license.txt": b"CC",
    "readme.txt": b"",
}


def tar(path, members, mode="w"):
    """Write members: name → bytes, or a TarInfo made ready."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = (
                content
                if isinstance(content, tarfile.TarInfo)
                else tarfile.TarInfo(name)
            )
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_every_kind_is_unpacked_completely(tmp_path, ending):
    path = tmp_path / f"data.{ending}"
    if ending == "zip":
        zipped(path, FILES.items())
    else:
        tar(path, FILES.items(), "w:" + ending.removeprefix("tar").removeprefix("."))
    assert unpack(path, tmp_path / "data") == tmp_path / "data"
    assert contents(tmp_path / "data") == FILES
    # No temporary folder.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", f"data.{ending}"]


def test_folders_and_permissions_are_the_users_own(tmp_path):
    locked = tarfile.TarInfo("locked")
    locked.type, locked.mode = tarfile.DIRTYPE, 0o000
    program = tarfile.TarInfo("locked/run")
    program.mode = 0o4755
    (tmp_path / "data").mkdir()  # an empty folder may be there
    unpack(
        tar(
            tmp_path / "a.tar",
            [("locked", locked), ("locked/run", program), ("empty/", b"")],
        ),
        tmp_path / "data",
    )
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in (tmp_path / "data", tmp_path / "data" / "locked"):
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert not (tmp_path / "data/locked/run").stat().st_mode & (
        stat.S_ISUID | stat.S_IXUSR
    )


def test_names_may_begin_with_a_dot(tmp_path):
    for name in FILES:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(FILES[name])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "source", ".")
        assert archive.getnames()[0] == "."
    unpack(tmp_path / "a.tar", tmp_path / "data")
    assert contents(tmp_path / "data") == FILES
    with refuses("contains '.', which may"):
        unpack(tar(tmp_path / "b.tar", [(".", b"a file")]), tmp_path / "more")


OUTSIDE = [
    "../evil",
    "a/../../evil",
    "/evil",
    "a/..",
    "C:/evil",
    "C:evil",
    "..\\evil",
    "a\\b",
    "\\\\host\\share\\evil",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_no_path_leads_out(tmp_path, name, kind):
    inner = tmp_path / "inner"
    inner.mkdir()
    members = [("fine.txt", b"fine"), (name, b"evil")]
    path = (tar if kind == "tar" else zipped)(inner / f"a.{kind}", members)
    with refuses("may lead out of the folder"):
        unpack(path, inner / "data")
    # No other file was written.
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", f"a.{kind}"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path, kind):
    special = tarfile.TarInfo("special")
    special.type, special.linkname = kind, "/etc"
    path = tar(
        tmp_path / "a.tar",
        [("fine", b"fine"), ("special", special), ("special/passwd", b"evil")],
    )
    with refuses("contains 'special', a link or a device"):
        unpack(path, tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("special")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc")
    with refuses("contains 'special', a link or a device"):
        unpack(tmp_path / "a.zip", tmp_path / "data")


def test_a_bomb_is_stopped_while_it_unpacks(tmp_path):
    bomb = zipped(tmp_path / "a.zip", [("zeros", bytes(5_000_000))])
    assert bomb.stat().st_size < 10_000
    with refuses("more than 4,000,000 bytes, .*; raise max_bytes"):
        unpack(bomb, tmp_path / "data", max_bytes=4_000_000)
    many = tar(tmp_path / "a.tar", [(f"{n}.txt", b"") for n in range(11)])
    with refuses("more than 10 files and folders"):
        unpack(many, tmp_path / "data", max_members=10)
    assert len(contents(unpack(many, tmp_path / "data", max_members=11))) == 11
    zeros = unpack(bomb, tmp_path / "zeros", max_bytes=5_000_000)
    assert contents(zeros) == {"zeros": bytes(5_000_000)}


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz", "zip"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_archives_are_refused_and_leave_no_files(tmp_path, ending, kept):
    members = [(f"{n}.bin", os.urandom(20_000)) for n in range(4)]
    path = tmp_path / f"data.{ending}"
    if ending == "zip":
        zipped(path, members)
    else:
        tar(path, members, "w:" + ending.removeprefix("tar").removeprefix("."))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * 80_000)])
    with refuses("download it again"):
        unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_damage_inside_is_refused(tmp_path):
    for path in (
        zipped(tmp_path / "a.zip", [("x", os.urandom(5000))]),
        tar(tmp_path / "a.tar.xz", [("x", os.urandom(5000))], "w:xz"),
    ):
        damaged = bytearray(path.read_bytes())
        damaged[2500] ^= 255
        path.write_bytes(damaged)
        with refuses("download it again"):
            unpack(path, tmp_path / "data")


def test_duplicate_names_are_refused(tmp_path):
    for members in (
        [("x", b"1"), ("x", b"2")],
        [("x", b"1"), ("x/y", b"2")],
        [("x/y", b"1"), ("x", b"2")],
    ):
        with refuses("twice, or as file and folder"):
            unpack(tar(tmp_path / "a.tar", members), tmp_path / "data")


def test_unsupported_archives_are_refused(tmp_path):
    path = tar(tmp_path / "a.tar", FILES.items())
    with refuses("absent.tar can't be unpacked .*No such file", UnusableFile):
        unpack(tmp_path / "absent.tar", tmp_path / "data")
    (tmp_path / "text").write_text("hello")
    with refuses("text can't be unpacked .*expected a complete tar", UnusableFile):
        unpack(tmp_path / "text", tmp_path / "data")
    with refuses("no folder .* create it first"):
        unpack(path, tmp_path / "absent" / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for there in ("full", "text"):
        with refuses("already exists, and is a link, a file or not empty"):
            unpack(path, tmp_path / there)
    assert contents(tmp_path / "full") == {"mine": b"mine"}


def test_an_encrypted_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", [("x", b"x")])
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with refuses("is encrypted"):
        unpack(path, tmp_path / "data")
