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
from grading.submission import CHAPTERS  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status.

    Source: none, the book's own. Departures: none. Test:
    test_grade.py::test_the_command_line
    """
    parser = argparse.ArgumentParser(prog="python book/grading", description=__doc__)
    commands = parser.add_subparsers(required=True)
    grading = commands.add_parser(
        "grade",
        help="grade a folder of submitted notebooks",
        description=(
            "Grade every notebook below FOLDER, each in its own process and an empty"
            " folder. Submissions run with your rights: use a container, or a user who"
            " owns nothing, for what you would not run yourself."
        ),
    )
    grading.add_argument("folder", type=Path)
    grading.add_argument(
        "--out",
        type=Path,
        default=Path("grades.csv"),
        help="the table (default: grades.csv)",
    )
    grading.add_argument(
        "--chapter",
        choices=CHAPTERS,
        help="whose exercises (default: that of most submissions)",
    )
    grading.add_argument(
        "--timeout",
        type=float,
        default=120,
        metavar="SECONDS",
        help="for a submission (default: 120)",
    )
    grading.add_argument(
        "--memory",
        type=float,
        default=4,
        metavar="GB",
        help="for a submission (default: 4)",
    )
    grading.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="how many at once (default: 1)"
    )
    grading.add_argument(
        "--all-cells",
        action="store_true",
        help="run every cell, not only what the answers depend on (minutes each)",
    )
    options = parser.parse_args(arguments)
    try:
        limits = Limits(options.timeout, options.memory, options.all_cells)
        grade(options.folder, options.out, options.chapter, limits, options.jobs)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
