"""Unpack archives safely: atomically, and never outside the target folder."""

import atexit
import bz2
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

from paperlib.validation import UnusableFile, as_path, check_integers

MAX_BYTES = 20 * 1024**3  # unpacked; MVTec AD takes about 5 GiB
MAX_MEMBERS = 200_000  # MVTec AD has fewer than 7,000
_MAX_READ = 1024 * 1024
_DECOMPRESSORS = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}


class _Member(NamedTuple):
    """A file or folder of an archive; `is_special` for links and devices."""

    name: str
    size: int
    is_folder: bool
    is_special: bool
    open: Callable[[], IO[bytes]]


def unpack(
    archive: str | Path,
    folder: str | Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
) -> Path:
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
        the folder.

    Raises:
        UnusableFile: if the archive is missing, corrupt, truncated, of another kind,
            encrypted, too large, or contains anything but files and folders within it.
        ValueError: if the folder is a link or not empty, or its parent is missing.
    """
    archive, folder = as_path(archive), as_path(folder)
    check_integers(max_bytes=max_bytes, max_members=max_members)
    if folder.is_symlink() or (
        folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ValueError(
            f"{folder} already exists, and is a link, a file or not empty;"
            " pass another folder, or remove it"
        )
    if not folder.parent.is_dir():
        raise ValueError(f"no folder {folder.parent} to unpack into; create it first")
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        # A folder of its own, with the permissions of the user's umask.
        content = Path(temporary, "content")
        content.mkdir()
        try:
            _write(archive, content, max_bytes, max_members)
        except UnusableFile:
            raise
        # The decompressors raise many kinds of errors for corrupt data.
        except Exception as error:
            raise UnusableFile(
                f"{archive} can't be unpacked ({error or type(error).__name__});"
                " expected a complete tar or zip archive without a password."
                " Check the path, or download it again"
            ) from error
        if folder.exists():
            folder.rmdir()  # Windows renames onto no folder, not even an empty one
        content.replace(folder)
    return folder


def _write(archive: Path, target: Path, max_bytes: int, max_members: int) -> None:
    """Write the members of an archive below `target`."""
    size = 0
    for number, member in enumerate(_members(archive), start=1):
        _check_member(archive, member)
        size += member.size
        if number > max_members or size > max_bytes:
            raise UnusableFile(
                f"{archive} contains more than {max_bytes:,} bytes, or more than"
                f" {max_members:,} files and folders; raise max_bytes or max_members"
            )
        path = target / member.name
        folder = path if member.is_folder else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not member.is_folder:
                # The content ends after `size` bytes, whatever the data hold.
                with member.open() as content, path.open("xb") as output:
                    shutil.copyfileobj(content, output)
        except (FileExistsError, NotADirectoryError) as error:
            raise UnusableFile(
                f"{archive} contains {member.name!r} twice, or as file and folder;"
                " nothing was unpacked"
            ) from error


def _check_member(archive: Path, member: _Member) -> None:
    """Raise for a link, a device or an unsafe name, also on Windows."""
    if member.is_special:
        raise UnusableFile(
            f"{archive} contains {member.name!r}, a link or a device;"
            " expected only files and folders"
        )
    path = PureWindowsPath(member.name)
    is_unsafe = path.anchor or ".." in path.parts or set(member.name) & {"\\", "\0"}
    if is_unsafe or not (path.parts or member.is_folder):
        raise UnusableFile(
            f"{archive} contains {member.name!r}, which may lead out of the folder;"
            " nothing was unpacked"
        )


def _members(archive: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                is_link = stat.S_ISLNK(info.external_attr >> 16)
                opener = partial(zipped.open, info)
                name, size = info.orig_filename, info.file_size
                yield _Member(name, size, info.is_dir(), is_link, opener)
        return
    with archive.open("rb") as file:
        decompress = _DECOMPRESSORS.get(file.read(3), open)
    with (
        _BoundedReader(decompress(archive, "rb")) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        for info in tar:
            is_special = not (info.isreg() or info.isdir())
            opener = partial(tar.extractfile, info)
            yield _Member(info.name, info.size, info.isdir(), is_special, opener)


class _BoundedReader(io.BufferedReader):
    """Refuses to read more than 1 MiB at once.

    tarfile reads a long name at once, however long its header says that it is.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a name of {size:,} bytes")
        return super().read(size)


def open_folder(path: str | Path) -> Path:
    """Return a folder of images, or unpack its archive into a temporary folder.

    Each call unpacks the archive again; the copies are removed when Python exits. Colab
    accepts uploads of a zip, not of a folder. For a zip of one folder that folder is
    returned.

    Args:
        path: of a folder, or of a zip or tar.

    Raises:
        UnusableFile: if nothing is there, or an archive can't be unpacked safely.
    """
    path = as_path(path).expanduser()
    if path.is_dir():
        return path
    if not path.is_file():
        raise UnusableFile(
            f"no folder or archive {path} (looked for it from {Path.cwd()}); on Colab,"
            " drop a zip onto the Files panel at the left or mount your Drive there,"
            " and copy the path from the menu of the file"
        )
    temporary = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = unpack(path, Path(temporary, "images"))
    shutil.rmtree(folder / "__MACOSX", ignore_errors=True)  # macOS adds it to each zip
    # A single folder of images is a class, such as `normal`; a single folder of folders
    # is the wrapper that zip programs add.
    while len(entries := [*folder.glob("[!.]*")]) == 1 and any(
        entry.is_dir() for entry in entries[0].glob("*")
    ):
        folder = entries[0]
    return folder
