"""Store the results of `make results`: runs, and a stamp of code and versions."""

import argparse
import datetime
import json
from pathlib import Path

import torch
from freshness import script_hash

from paperlib import runtime
from paperlib.storage import write_text

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "book" / "data" / "results"


class Results:
    """The runs of a script, stored in a JSON file; runs of other code are discarded.

    Args:
        script: the script's `__file__`.
        recipe: its constants, for the stamp.
        force: whether to repeat the runs that the file contains.
    """

    def __init__(self, script: str, recipe: dict, *, force: bool):
        source = Path(script)
        self.path = (FOLDER / source.name).with_suffix(".json")
        # Hashed before the runs, because the code may be edited while they take hours.
        self.stamp = {
            "code": script_hash(source, ROOT),
            "versions": runtime.versions(),
            "device": runtime.device_name(torch.device("cpu")),
            "date": datetime.date.today().isoformat(),
            "recipe": recipe,
        }
        stored = (
            json.loads(self.path.read_text(encoding="utf-8"))
            if self.path.is_file() and not force
            else {"stamp": {}}
        )
        # The recipe is part of the code.
        self.runs: list[dict] = (
            stored["runs"] if stored["stamp"].get("code") == self.stamp["code"] else []
        )

    def save(self) -> None:
        """Write stamp and runs atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            self.path,
            json.dumps({"stamp": self.stamp, "runs": self.runs}, indent=1) + "\n",
        )


def forced(description: str, arguments: list[str] | None = None) -> bool:
    """Return whether the command line contains `--force`.

    Also set PyTorch to one thread, on which other processes affect the times least.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument(
        "--force", action="store_true", help="repeat the runs that the file contains"
    )
    return parser.parse_args(arguments).force
