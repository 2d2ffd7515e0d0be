"""What a session with a notebook needs: trainings that are kept, cells that tell how far they are, one's own pictures.

A session in the cloud ends when its page is closed for long, and what lies on its disk goes with it.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from paperlib.datasets import unpack

DRIVE = Path("/content/drive/MyDrive")  # where Colab shows a mounted Drive; it stays when the session ends
SAMPLED = 4096  # numbers of a tensor that tell it from another


def kept() -> Path | None:
    """Make the folder for what should outlive a cell that is stopped, and where possible the session.

    It is `PAPERLIB_CHECKPOINTS` if that is set. Else, on Colab, it is `paperlib` on your Drive if that is mounted, and
    `paperlib` in the working folder if not (which a restarted kernel finds again, and a new session does not).

    Returns:
        the folder; None elsewhere, where nothing is kept.

    Source: this book. Departures: none. Test: test_session.py::test_a_training_is_kept_on_the_drive
    """
    named = os.environ.get("PAPERLIB_CHECKPOINTS")
    if not named and "google.colab" not in sys.modules:
        return None
    folder = Path(named) if named else DRIVE / "paperlib" if DRIVE.is_dir() else Path("paperlib")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoint(name: str, *made_from: Tensor | str | int | float | bool) -> Path | None:
    """Name the file in `kept()` for a training, so that a run that was stopped or cut off goes on where it was.

    Args:
        name: of the training.
        made_from: what would make it another training: its data, the number of steps. Each set has a file of its own.

    Returns:
        the file, for a `checkpoint` argument; None where nothing is kept.

    Source: this book. Departures: none. Test: test_session.py::test_a_training_is_kept_on_the_drive
    """
    folder = kept()
    if folder is None:
        return None
    digest = hashlib.sha256()
    for part in made_from:
        if isinstance(part, Tensor):
            flat = part.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().tolist()
            part = f"{tuple(part.shape)} {part.dtype} {sample}"
        digest.update(f"{part}\0".encode())
    plain = re.sub(r"[^\w.-]+", "-", name)
    return folder / f"{plain}-{digest.hexdigest()[:8]}.safetensors"


def progress() -> Callable[[str, int, int], None]:
    """Make a line that tells how far a long cell is; in a notebook it changes in place.

    Returns:
        a function to call with a word, what is done, and of how much. When all is done the line stays.

    Source: this book. Departures: none. Test: test_session.py::test_progress_is_one_line_that_changes
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    handle = None

    def show(word: str, done: int, total: int) -> None:
        nonlocal handle
        text = f"[{'#' * round(20 * done / total):.<20}] {done} of {total}  {word}"
        if shell is None:
            print(f"\r{text}", end="\n" if done == total else "", flush=True)
            return
        from IPython.display import display

        bundle = {"text/plain": text}
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            handle.update(bundle, raw=True)
        if done == total:
            handle = None  # the next part gets a line of its own

    return show


def opened(path: str | Path) -> Path:
    """Give the folder of your pictures: itself, or what is in its archive, unpacked to a temporary folder.

    Each call unpacks the archive again; the copies are not removed.

    Folders can't be dropped onto Colab, and a zip can. A zip of one folder gives what is in that folder.

    Args:
        path: of a folder, or of a zip or tar.

    Raises:
        ValueError: if there is nothing, or an archive can't be unpacked safely.

    Source: this book. Departures: none. Test: test_session.py::test_a_zip_is_as_good_as_its_folder
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return path
    if not path.is_file():
        raise ValueError(
            f"no folder or archive {path} (looked for it from {Path.cwd()}); on Colab, drop a zip onto the Files panel "
            "at the left or mount your Drive there, and copy the path from the menu of the file"
        )
    folder = unpack(path, Path(tempfile.mkdtemp(), "pictures")).folder
    shutil.rmtree(folder / "__MACOSX", ignore_errors=True)  # macOS adds it to each zip
    while True:
        inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        # A single folder of pictures is a kind, such as `normal`; a single folder of folders is a wrapping.
        if len(inside) != 1 or not inside[0].is_dir() or not any(entry.is_dir() for entry in inside[0].iterdir()):
            return folder
        folder = inside[0]
