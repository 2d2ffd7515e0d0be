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

    The status is 0 for success, 1 after an error message (other categories are still
    run), and 130 after an interrupt.

    Args:
        arguments: as on the command line; None for `sys.argv`.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        _print_error(error, options)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {options.stopped}", file=sys.stderr)
        return 130


def _print_error(error: Exception, options: argparse.Namespace) -> None:
    print(f"error: {_in_flags(str(error), vars(options))}", file=sys.stderr)


def _in_flags(message: str, options: Collection[str]) -> str:
    """Write the arguments of a message as the command line does: --seed 1 for seed=1.

    An argument that the command has no flag for remains as it is.
    """
    names = "|".join(options)
    return re.sub(rf"\b({names})=", lambda found: f"--{found[1]} ", message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m paperlib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _define_padim(
        commands.add_parser(
            "padim",
            help="fit and score PaDiM on MVTec AD, or any data set in its layout",
        )
    )
    _define_unpack(
        commands.add_parser("unpack", help="unpack a downloaded archive safely")
    )
    return parser


def _define_padim(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fit PaDiM to each category's normal images, score its test images, and print"
        " the results next to the paper's. Each category's row is written to"
        " results.csv when it is done: the same command run again reuses it, if the"
        " files are unchanged."
    )
    parser.set_defaults(
        run=_run_padim,
        stopped="rows of finished categories are stored: run the same command again,"
        " without --fresh, to resume with the next category",
    )
    _add_method_flags(parser)
    _add_run_flags(parser)


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that select the data and the variant of PaDiM."""
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder that contains one folder per category, or one category's folder:"
        " train/good, test/good and test/(defect), or train/normal, test/normal and"
        " test/abnormal",
    )
    parser.add_argument(
        "--category",
        nargs="+",
        metavar="NAME",
        help="categories to evaluate (default: all in FOLDER)",
    )
    parser.add_argument(
        "--backbone",
        default="resnet18",
        choices=evaluation.DIMENSIONS,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--weights",
        default="default",
        help="a file with the backbone's weights, or 'none' for random ones",
    )
    parser.add_argument(
        "--dimensions",
        type=_parse_dimensions,
        default=0,
        metavar="N",
        help="or 'all' (default: the paper's: 100, 550 or all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of channels, rotations and crops (default: 0)",
    )
    parser.add_argument(
        "--variant", default="centered", choices=VARIANTS, help="random: Rd-MVTec AD"
    )


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the output, the device, and the reading of images."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("padim-results"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--batch-size",
        type=_parse_count,
        default=32,
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--threads",
        type=_parse_count,
        default=2,
        metavar="N",
        help="threads that read images (default: 2)",
    )
    parser.add_argument(
        "--bits",
        type=_parse_count,
        metavar="N",
        help="depth of the data in 16-bit files, for example 12 (default: 16)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="evaluate again what results.csv holds"
    )
    parser.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="write the table only",
    )


def _define_unpack(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_unpack, stopped="nothing was unpacked")
    parser.add_argument("archive", type=Path, help="tar.xz, tar.gz, tar or zip")
    parser.add_argument("folder", type=Path, help="folder to unpack into: new or empty")


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


def _run_padim(options: argparse.Namespace) -> int:
    device = _usable_device(options.device)
    settings, names = _read_settings(options)
    runnable = _check_categories(options, settings, names)
    torch.manual_seed(options.seed)  # for random weights
    weights = None if options.weights == "none" else options.weights
    backbone = backbones.load(options.backbone, weights)
    backbone.model.to(device)
    results = []
    for name in runnable:
        try:
            results += evaluation.run(
                settings,
                [name],
                backbone,
                options.out,
                batch_size=options.batch_size,
                threads=options.threads,
                pictures=options.pictures,
                progress=True,
                fresh=options.fresh,
            )
        except ValueError as error:
            _print_error(error, options)
    if results:
        print(evaluation.report(results))
        print(f"Rows of all runs: {options.out / 'results.csv'}")
    return int(len(results) < len(names))


def _read_settings(
    options: argparse.Namespace,
) -> tuple[evaluation.Settings, list[str]]:
    """Return the settings of all categories, and the names of these, each once."""
    data, names = options.data.resolve(), options.category
    if (data / "train").is_dir():  # the folder of one category
        data, names = data.parent, names or [data.name]
    dimensions = (
        evaluation.DIMENSIONS[options.backbone]
        if options.dimensions == 0
        else options.dimensions
    )
    settings = evaluation.Settings(
        str(data),
        options.backbone,
        options.weights,
        dimensions,
        options.seed,
        options.variant,
        options.bits,
    )
    return settings, list(dict.fromkeys(names or categories(data)))


def _check_categories(
    options: argparse.Namespace, settings: evaluation.Settings, names: list[str]
) -> list[str]:
    """Report what is certain before any work; return the categories that can run."""
    runnable = []
    for name in names:
        try:
            _, test = evaluation.load_splits(settings, name)
            runnable.append(name)
            if not test.has_masks:
                truth = test.where.parent / "ground_truth"
                print(f"{name}: no masks in {truth}: image AUROC only", file=sys.stderr)
        except ValueError as error:
            _print_error(error, options)
    try:
        evaluation.check_matplotlib()
    except ValueError as error:
        if options.pictures:
            print(f"no figures: {error}", file=sys.stderr)
            options.pictures = False
    return runnable


def _run_unpack(options: argparse.Namespace) -> int:
    print(f"unpacked to {unpack(options.archive, options.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
