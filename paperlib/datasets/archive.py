"""Unpack archives safely: atomically, and never outside the target folder."""

import errno
import lzma
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

MAX_BYTES = 20 * 1024**3  # unpacked; MVTec AD takes about 5 GiB
MAX_MEMBERS = 200_000  # MVTec AD has fewer than 7,000
_READ_BYTES = 1024 * 1024
_MAX_NAME_BYTES = 1024 * 1024  # of one member's extended header in a tar
_CORRUPTION_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    struct.error,
    UnicodeDecodeError,
)


class Unpacked(NamedTuple):
    """The result of `unpack`: the folder, the number of files, and their total size."""

    folder: Path
    files: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.files:,} files of {self.size / 1e6:,.1f} MB unpacked"
            f" to {self.folder}"
        )


class _Member(NamedTuple):
    """A file (with content) or folder; `kind` is "" unless it is another kind."""

    name: str
    content: IO[bytes] | None
    kind: str


def unpack(
    archive: str | Path,
    folder: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
) -> Unpacked:
    """Unpack a tar (plain, gz, bz2 or xz) or zip into a new or empty folder.

    Files are written to a temporary folder next to it, which is renamed when complete;
    after an error nothing remains. Only files and folders are unpacked, with the user's
    default permissions: a link, a device, a duplicate name, or a name that leads out of
    the folder raises.

    Args:
        archive: the file, such as mvtec_anomaly_detection.tar.xz as downloaded.
        folder: to unpack to; its parent must exist.
        max_bytes: limit on the total size of all files, counted as they are written.
        max_members: limit on the number of files and folders.

    Returns:
        the folder, the number of files and their bytes; printing it reports them.

    Raises:
        ValueError: if the archive is missing, corrupt, truncated, of another kind,
            encrypted, too large, or contains anything but files and folders within it;
            if the folder is not empty, or its parent is missing.

    Source: this book. Departures: none.
    Test: test_archive.py::test_no_path_leads_out
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise ValueError(f"no archive {archive}; check the path")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"{folder} already exists and is not empty;"
            " pass another folder, or remove it"
        )
    if not folder.parent.is_dir():
        raise ValueError(f"no folder {folder.parent} to unpack into; create it first")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        files, size = _write(archive, temporary, max_bytes, max_members)
        if folder.exists():
            folder.rmdir()  # Windows renames onto no folder, not even an empty one
        temporary.replace(folder)
    except _CORRUPTION_ERRORS as error:
        raise ValueError(
            f"{archive} is corrupt or incomplete ({error}); download it again"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{archive} contains names nested too deep; nothing was unpacked"
        ) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{archive} contains a name too long for this file system;"
                " nothing was unpacked"
            ) from error
        if error.errno is None:  # raised by gzip and bz2 for corrupt data
            raise ValueError(
                f"{archive} is corrupt or incomplete ({error}); download it again"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Unpacked(folder, files, size)


def _write(
    archive: Path, target: Path, max_bytes: int, max_members: int
) -> tuple[int, int]:
    """Write the members below `target`; return the number of files and of bytes."""
    files = size = 0
    for number, member in enumerate(_members(archive), start=1):
        if number > max_members:
            raise ValueError(
                f"{archive} contains more than {max_members:,} files and folders;"
                " raise max_members to allow more"
            )
        path = target / _check_member(archive, member)
        try:
            if member.content is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            output = open(path, "xb")  # noqa: SIM115 (closed below)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{archive} contains {member.name!r} twice, or as file and folder;"
                " nothing was unpacked"
            ) from error
        with output, member.content:
            while chunk := member.content.read(_READ_BYTES):
                size += len(chunk)
                if size > max_bytes:
                    raise ValueError(
                        f"{archive} contains more than {max_bytes:,} bytes;"
                        " raise max_bytes to allow more"
                    )
                output.write(chunk)
        files += 1
    return files, size


def _check_member(archive: Path, member: _Member) -> str:
    """Return the member's path, or raise if it is unsafe, also on Windows."""
    parts = PureWindowsPath(member.name)
    if member.kind:
        raise ValueError(
            f"{archive} contains the {member.kind} {member.name!r};"
            " expected only files and folders"
        )
    nameless = member.content is not None and not parts.parts
    if (
        parts.anchor
        or ".." in parts.parts
        or "\\" in member.name
        or "\0" in member.name
        or nameless
    ):
        raise ValueError(
            f"{archive} contains {member.name!r}, which may lead out of the folder;"
            " nothing was unpacked"
        )
    return member.name


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
        return
    try:
        opened = tarfile.open(archive, tarinfo=_TarInfo)  # noqa: SIM115 (closed below)
    except tarfile.ReadError as error:
        raise ValueError(
            f"{archive} is not a complete tar or zip archive; download it again"
        ) from error
    with opened as tar:
        for info in tar:
            kind = (
                ""
                if info.isreg() or info.isdir()
                else "link"
                if info.issym() or info.islnk()
                else "device"
            )
            yield _Member(
                info.name, tar.extractfile(info) if info.isreg() else None, kind
            )


class _TarInfo(tarfile.TarInfo):
    """Rejects extended headers above 1 MiB, which tarfile would read into memory."""

    def _proc_member(self, tar):
        header_types = (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if self.type in header_types and self.size > _MAX_NAME_BYTES:
            raise ValueError(
                f"{tar.name} contains a name of {self.size:,} bytes;"
                " nothing was unpacked"
            )
        return super()._proc_member(tar)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            if info.flag_bits & 1:
                raise ValueError(f"{archive} is encrypted; unpack it yourself")
            kind = stat.S_IFMT(info.external_attr >> 16)
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
            what = "" if plain else "link" if kind == stat.S_IFLNK else "device"
            yield _Member(
                info.orig_filename, None if info.is_dir() else zipped.open(info), what
            )


def open_folder(path: str | Path) -> Path:
    """Return a folder of images, or unpack its archive into a temporary folder.

    Each call unpacks the archive again; the copies are not removed. Colab accepts
    uploads of a zip, not of a folder. For a zip of one folder that folder is returned.

    Args:
        path: of a folder, or of a zip or tar.

    Raises:
        ValueError: if nothing is there, or an archive can't be unpacked safely.

    Source: this book. Departures: none.
    Test: test_notebook_runtime.py::test_a_zip_is_as_good_as_its_folder
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return path
    if not path.is_file():
        raise ValueError(
            f"no folder or archive {path} (looked for it from {Path.cwd()}); on Colab,"
            " drop a zip onto the Files panel at the left or mount your Drive there,"
            " and copy the path from the menu of the file"
        )
    folder = unpack(path, Path(tempfile.mkdtemp(), "pictures")).folder
    shutil.rmtree(folder / "__MACOSX", ignore_errors=True)  # macOS adds it to each zip
    while True:
        entries = [
            entry for entry in folder.iterdir() if not entry.name.startswith(".")
        ]
        # A single folder of images is a class, such as `normal`; a single folder of
        # folders is the wrapper that zip programs add.
        if (
            len(entries) != 1
            or not entries[0].is_dir()
            or not any(entry.is_dir() for entry in entries[0].iterdir())
        ):
            return folder
        folder = entries[0]
