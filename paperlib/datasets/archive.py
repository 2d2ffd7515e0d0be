"""Unpack archives safely: atomically, and never outside the target folder."""

import atexit
import bz2
import errno
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

MAX_BYTES = 20 * 1024**3  # unpacked; MVTec AD takes about 5 GiB
MAX_MEMBERS = 200_000  # MVTec AD has fewer than 7,000
_MAX_READ = 1024 * 1024
_DECOMPRESSORS = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}
_ZIP_KINDS = {
    0: "file",  # written on Windows
    stat.S_IFREG: "file",
    stat.S_IFDIR: "file",
    stat.S_IFLNK: "link",
}
_CORRUPTION_ERRORS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    struct.error,
    UnicodeDecodeError,
    RecursionError,  # names nested too deep
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
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        # A folder of its own, with the permissions of the user's umask.
        content = Path(temporary, "content")
        content.mkdir()
        try:
            files, size = _write(archive, content, max_bytes, max_members)
        except (*_CORRUPTION_ERRORS, OSError) as error:
            # gzip and bz2 raise an OSError without a number for corrupt data. One with
            # a number is a problem of this computer, such as a full disk.
            if getattr(error, "errno", None) not in (None, errno.ENAMETOOLONG):
                raise
            raise ValueError(
                f"{archive} is not a complete tar or zip archive ({error});"
                " download it again"
            ) from error
        if folder.exists():
            folder.rmdir()  # Windows renames onto no folder, not even an empty one
        content.replace(folder)
    return Unpacked(folder, files, size)


def _write(
    archive: Path, target: Path, max_bytes: int, max_members: int
) -> tuple[int, int]:
    """Write the members below `target`; return the number of files and of bytes."""
    files = size = 0
    for number, (name, kind, n_bytes, opener) in enumerate(_members(archive), start=1):
        if number > max_members:
            raise ValueError(
                f"{archive} contains more than {max_members:,} files and folders;"
                " raise max_members to allow more"
            )
        if size + n_bytes > max_bytes:
            raise ValueError(
                f"{archive} contains more than {max_bytes:,} bytes;"
                " raise max_bytes to allow more"
            )
        _check_member(archive, name, kind)
        path = target / name
        try:
            if kind == "folder":
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # The content ends after n_bytes, whatever the compressed data hold.
            with opener() as content, path.open("xb") as output:
                shutil.copyfileobj(content, output)
                size += output.tell()
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"{archive} contains {name!r} twice, or as file and folder;"
                " nothing was unpacked"
            ) from error
        files += 1
    return files, size


def _check_member(archive: Path, name: str, kind: str) -> None:
    """Raise ValueError for a link, a device or an unsafe name, also on Windows."""
    if kind not in ("file", "folder"):
        raise ValueError(
            f"{archive} contains the {kind} {name!r}; expected only files and folders"
        )
    path = PureWindowsPath(name)
    is_unsafe = path.anchor or ".." in path.parts or "\\" in name or "\0" in name
    if is_unsafe or (kind == "file" and not path.parts):
        raise ValueError(
            f"{archive} contains {name!r}, which may lead out of the folder;"
            " nothing was unpacked"
        )


def _members(
    archive: Path,
) -> Iterator[tuple[str, str, int, Callable[[], IO[bytes]]]]:
    """Yield name, kind, size and a function that opens the content of each member."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if info.flag_bits & 1:
                    raise ValueError(f"{archive} is encrypted; unpack it yourself")
                kind = _ZIP_KINDS.get(stat.S_IFMT(info.external_attr >> 16), "device")
                kind = "folder" if info.is_dir() and kind == "file" else kind
                opener = partial(zipped.open, info)
                yield info.orig_filename, kind, info.file_size, opener
        return
    with archive.open("rb") as file:
        decompress = _DECOMPRESSORS.get(file.read(3), open)
    with (
        _BoundedReader(decompress(archive, "rb")) as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        for info in tar:
            kind = "link" if info.issym() or info.islnk() else "device"
            kind = "file" if info.isreg() else "folder" if info.isdir() else kind
            yield info.name, kind, info.size, partial(tar.extractfile, info)


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
        ValueError: if nothing is there, or an archive can't be unpacked safely.
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
    temporary = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = unpack(path, Path(temporary, "images")).folder
    shutil.rmtree(folder / "__MACOSX", ignore_errors=True)  # macOS adds it to each zip
    # A single folder of images is a class, such as `normal`; a single folder of folders
    # is the wrapper that zip programs add.
    while len(entries := [*folder.glob("[!.]*")]) == 1 and any(
        entry.is_dir() for entry in entries[0].glob("*")
    ):
        folder = entries[0]
    return folder
