"""The command line: evaluate PaDiM on a data set, or unpack an archive."""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from paperlib import backbones
from paperlib.datasets import VARIANTS, categories, unpack
from paperlib.padim import evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    The status is 0 for success, 1 after an error message, and 130 after an interrupt.

    Args:
        arguments: as on the command line; None for `sys.argv`.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {_in_flags(str(error), vars(options))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "\nstopped; run the same command again to resume with the next category",
            file=sys.stderr,
        )
        return 130
    return 0


def _in_flags(message: str, options: Collection[str]) -> str:
    """Write the arguments of a message as the command line does: --seed 1 for seed=1.

    An argument that the command has no flag for remains as it is.
    """
    names = "|".join(options)
    return re.sub(rf"\b({names})=", lambda found: f"--{found[1]} ", message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m paperlib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    padim = commands.add_parser(
        "padim",
        help="fit and score PaDiM on MVTec AD, or any data set in its layout",
        description=(
            "Fit PaDiM to each category's normal images, score its test images,"
            " and print the results next to the paper's. Each category's row is written"
            " to results.csv when it is done: the same command run again skips it."
        ),
    )
    padim.set_defaults(run=_run_padim)
    padim.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder that contains one folder per category",
    )
    padim.add_argument(
        "--category",
        nargs="+",
        metavar="NAME",
        help="categories to evaluate (default: all in FOLDER)",
    )
    padim.add_argument(
        "--backbone",
        default="resnet18",
        choices=evaluation.DIMENSIONS,
        help="default: %(default)s",
    )
    padim.add_argument(
        "--weights",
        default="default",
        help="a file with the backbone's weights, or 'none' for random ones",
    )
    padim.add_argument(
        "--dimensions",
        type=_parse_dimensions,
        default=0,
        metavar="N",
        help="or 'all' (default: the paper's: 100, 550 or all)",
    )
    padim.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of channels, rotations and crops (default: 0)",
    )
    padim.add_argument(
        "--variant", default="centered", choices=VARIANTS, help="random: Rd-MVTec AD"
    )
    padim.add_argument(
        "--out",
        type=Path,
        default=Path("padim-results"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    padim.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    padim.add_argument(
        "--batch-size",
        type=_parse_count,
        default=32,
        metavar="N",
        help="default: %(default)s",
    )
    padim.add_argument(
        "--threads",
        type=_parse_count,
        default=2,
        metavar="N",
        help="threads that read images (default: 2)",
    )
    padim.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="write the table only",
    )

    archive = commands.add_parser("unpack", help="unpack a downloaded archive safely")
    archive.set_defaults(run=_run_unpack)
    archive.add_argument("archive", type=Path, help="tar.xz, tar.gz, tar or zip")
    archive.add_argument(
        "folder", type=Path, help="folder to unpack into: new or empty"
    )
    return parser


def _parse_dimensions(text: str) -> int | None:
    return None if text == "all" else _parse_count(text)


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1")
    return int(text)


def _usable_device(name: str) -> torch.device:
    """Return the device if it can compute in float64, as PaDiM does."""
    # PyTorch raises RuntimeError for an unknown device or a missing driver,
    # AssertionError or ImportError for a device that it was not built with, and
    # TypeError for MPS, which has no float64.
    try:
        torch.ones(1, dtype=torch.float64, device=name).sum().item()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={name!r} can't be used ({reason});"
            " expected cpu, cuda:0 or another device with float64"
        ) from error
    return torch.device(name)


def _run_padim(options: argparse.Namespace) -> None:
    device = _usable_device(options.device)
    names = options.category or categories(options.data)
    dimensions = (
        evaluation.DIMENSIONS[options.backbone]
        if options.dimensions == 0
        else options.dimensions
    )
    settings = evaluation.Settings(
        str(options.data.resolve()),
        options.backbone,
        options.weights,
        dimensions,
        options.seed,
        options.variant,
    )
    torch.manual_seed(options.seed)  # for random weights
    weights = None if options.weights == "none" else options.weights
    backbone = backbones.load(options.backbone, weights)
    backbone.model.to(device)
    results = evaluation.run(
        settings,
        names,
        backbone,
        options.out,
        batch_size=options.batch_size,
        threads=options.threads,
        pictures=options.pictures,
        progress=True,
    )
    print(evaluation.report(results))
    print(f"Rows of all runs: {options.out / 'results.csv'}")


def _run_unpack(options: argparse.Namespace) -> None:
    print(f"unpacked to {unpack(options.archive, options.folder)}")


if __name__ == "__main__":
    sys.exit(main())
