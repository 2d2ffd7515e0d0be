"""What the long runs of `make results` share: a stamp of what made them, and a file
that grows run by run.
"""

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
    """The runs of one script, kept in the JSON file of its name; those of other code
    are dropped.

    Args:
        script: the script's `__file__`.
        recipe: its constants, for the stamp.
        force: whether to repeat what the file holds.
    """

    def __init__(self, script: str, recipe: dict, *, force: bool):
        source = Path(script)
        self.path = (FOLDER / source.name).with_suffix(".json")
        # Of the code as it is now, whatever is edited while the runs take their time.
        self.stamp = {
            "code": script_hash(source, ROOT),
            "versions": runtime.versions(),
            "device": runtime.device_name(torch.device("cpu")),
            "date": datetime.date.today().isoformat(),
            "recipe": recipe,
        }
        old = (
            json.loads(self.path.read_text(encoding="utf-8"))
            if self.path.is_file() and not force
            else {"stamp": {}}
        )
        # The recipe is part of the code.
        self.runs: list[dict] = (
            old["runs"] if old["stamp"].get("code") == self.stamp["code"] else []
        )

    def save(self) -> None:
        """Write stamp and runs, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            self.path,
            json.dumps({"stamp": self.stamp, "runs": self.runs}, indent=1) + "\n",
        )


def forced(description: str, arguments: list[str] | None = None) -> bool:
    """Read the command line of a long run: only `--force`. Results are made on one
    thread, which other load disturbs least.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument(
        "--force", action="store_true", help="repeat the runs that the file holds"
    )
    return parser.parse_args(arguments).force
