"""The command line: `python book/grading grade FOLDER` grades submitted notebooks into
a CSV file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a folder, this file is no part of its package: the folder above has to be on
# the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from grading.grade import Limits, grade  # noqa: E402
from grading.submission import exercises  # noqa: E402


def read_seed(text: str) -> int | str | None:
    """Read a seed, `book` (None: the book's numbers) or `common`."""
    if text == "common":
        return text
    return None if text == "book" else int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python book/grading", description=__doc__)
    commands = parser.add_subparsers(required=True)
    grading = commands.add_parser(
        "grade",
        help="grade submitted notebooks",
        description=(
            "Grade every notebook below FOLDER, also in zip files, each in its own"
            " process and an empty folder. Submissions run with your rights: use a"
            " container, or a user who owns nothing, for what you would not run"
            " yourself."
        ),
    )
    add = grading.add_argument
    add("folder", type=Path, help="of the submissions; or the zip file of a class")
    add("--out", type=Path, default=Path("grades.csv"), help="(default: grades.csv)")
    add("--delimiter", default=",", help="of the table; tab for a tab (default: ,)")
    add("--chapter", choices=exercises(), help="(default: that of most submissions)")
    add(
        "--seed",
        type=read_seed,
        default="common",
        help="of the exercises' numbers, or book (default: that of most submissions)",
    )
    add("--timeout", type=float, default=120, help="seconds each (default: 120)")
    add("--memory", type=float, default=4, help="GB each, on Linux (default: 4)")
    add("--jobs", type=int, default=1, help="how many at the same time (default: 1)")
    all_cells = "run all cells, not only what the answers need (minutes each)"
    add("--all-cells", action="store_true", help=all_cells)
    options = parser.parse_args(arguments)
    limits = Limits(options.timeout, options.memory, options.all_cells)
    delimiter = "\t" if options.delimiter == "tab" else options.delimiter
    folder, table, chapter = options.folder, options.out, options.chapter
    try:
        grade(folder, table, chapter, limits, options.jobs, delimiter, options.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
