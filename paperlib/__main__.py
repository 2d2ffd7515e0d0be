"""The command line: inspect images with PaDiM, evaluate it, or unpack an archive."""

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paperlib import __version__, backbones
from paperlib.datasets import VARIANTS, categories, unpack
from paperlib.image_files import check_depth, raise_problems
from paperlib.padim import PaDiM, evaluation, report
from paperlib.padim.detector import PADIM_FORMAT
from paperlib.padim.inspection import check_ready, find_images, read_images
from paperlib.storage import read_tensors

_FIT = """\
Fit PaDiM to images of normal parts. The threshold of its score is chosen on the same
images, each left out once. All images are read twice, and none is kept in memory.

FOLDER contains normal images only, of any sizes and formats:

  FOLDER/0001.png
  FOLDER/line 2/0001.jpg      folders within it are searched too
"""
_INSPECT = """\
Inspect images with a model that fit, or evaluate --save, wrote. The exit status is 0
with and without alarms; it is 1 if images are unreadable, whose rows state the reason.
The same command run again, after an interruption too, reuses the rows of unchanged
files.

It writes, in the folder of --out:

  results.csv       path, score, alarm (true or false), and the strongest region: top,
                    left, height and width in pixels of the original image
  results.json      the same, and the threshold
  index.html        a gallery in one file, for any browser, offline
  overlays/         the anomaly map over each image, at its original size
  thumbnails/       the images of the gallery
"""
_EVALUATE = """\
Fit PaDiM to each category's normal images, score its test images, and print the results
next to the paper's. Each category's row is written to results.csv when it is done: the
same command run again reuses it, if the files are unchanged. The threshold in
results.csv is chosen on the test set. One CSV file per category has the score of each
test image. Images are prepared as in the paper: resized to 256×256 pixels, of which the
central 224×224 are scored. A model of fit covers the whole image.

FOLDER contains one folder per category, or is one category's folder, such as:

  category/train/good               or train/normal: normal images
  category/test/good                or test/normal
  category/test/scratch             any name but good: defective images
  category/ground_truth/scratch     masks, (name)_mask.png or (name).png; optional
"""
# Folders of a data set that `fit` must not take for normal images.
_NOT_NORMAL = {"abnormal", "ground_truth", "test"}


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
    """Print an error, with --seed 1 instead of seed=1 for the command's flags."""
    names = "|".join(vars(options))
    message = re.sub(rf"\b({names})=", lambda found: f"--{found[1]} ", str(error))
    tqdm.write(f"error: {message}", file=sys.stderr)  # below an open progress bar


def _parse_dimensions(text: str) -> int | None:
    return None if text == "all" else _parse_count(text)


def _parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least 1")
    return int(text)


def _parse_size(text: str) -> int | tuple[int, int]:
    """Read `N`, or `HxW` as (H, W)."""
    sides = [_parse_count(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}; expected N or HxW, in pixels")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _parse_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a share, 0 < Q ≤ 1")
    return share


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


def _load_backbone(name: str, weights: str, seed: int) -> backbones.Backbone:
    torch.manual_seed(seed)  # for random weights
    return backbones.load(name, None if weights == "none" else weights)


def _dimensions(options: argparse.Namespace) -> int | None:
    """Return the number of dimensions, by default the paper's; None for all."""
    paper = evaluation.DIMENSIONS[options.backbone]
    return paper if options.dimensions == 0 else options.dimensions


def _run_fit(options: argparse.Namespace) -> int:
    device = _usable_device(options.device)
    if options.out.is_dir():
        file = options.out / "model.safetensors"
        raise ValueError(f"{options.out} is a folder; expected a file such as {file}")
    paths = _find_normal_images(options.folder, options.bits)
    backbone = _load_backbone(options.backbone, options.weights, options.seed)
    size = options.size or backbone.transform.size
    detector = PaDiM(
        backbone.extractor(tile=options.tile, overlap=options.overlap),
        _dimensions(options),
        options.seed,
        transform=replace(backbone.transform, size=size, bits=options.bits),
        region=options.roi,
    ).to(device)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def prepared(label: str) -> Iterator[Tensor]:
        """Read all images once, and raise for all unreadable ones; none is kept."""
        problems = []
        batches = read_images(detector, paths, options.batch_size, options.threads)
        with tqdm(None, label, len(paths), unit="image") as bar:
            for images in batches:
                problems += [f"{x.name}: {x.error}" for x in images if x.error]
                if not problems:
                    yield torch.cat([image.prepared for image in images])
                bar.update(len(images))
        raise_problems(problems, options.folder)

    detector.fit(prepared("fit"))
    threshold = detector.normal_threshold(
        prepared("threshold"), options.quantile, fitted=True
    )
    detector.save(options.out, torch.float16 if options.half else None)
    n, q = len(paths), options.quantile
    print(f"threshold {threshold:.4g}: quantile {q:g} of the scores of {n} images")
    if n * (1 - q) < 1 - 1e-9 and q < 1:
        print(
            f"warning: {n} images are few for --quantile {q:g}, which needs"
            f" {math.ceil(1 / (1 - q) - 1e-9)}: the threshold is close to their"
            " highest score. Check it on normal images that were not used here",
            file=sys.stderr,
        )
    print(f"model: {options.out}")
    return 0


def _find_normal_images(folder: Path, bits: int | None) -> list[Path]:
    """List the images to fit, after the checks that need no network."""
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file; expected a folder of normal images. Unpack an archive"
            " with python -m paperlib unpack"
        )
    paths = find_images([folder])
    parts = {part for path in paths for part in path.relative_to(folder).parts[:-1]}
    if other := sorted(parts & _NOT_NORMAL):
        usual = [folder / name for name in ("train/good", "train/normal", "normal")]
        example = next(filter(Path.is_dir, usual), usual[0])
        raise ValueError(
            f"{folder} contains the folder {other[0]}; expected normal images only."
            f" Pass the folder of these, for example {example}"
        )
    if len(paths) < 3:
        raise ValueError(
            f"{len(paths)} image{'s' * (len(paths) > 1)} in {folder}; expected at least"
            " 3, to leave each out once for the threshold"
        )
    check_depth(paths, folder, bits)
    return paths


def _run_inspect(options: argparse.Namespace) -> int:
    device = _usable_device(options.device)
    paths = find_images(options.images, without=options.out)
    detector = _load_detector(options.model, options.weights).to(device)
    if options.bits is not None and detector.transform is not None:
        detector.transform = replace(detector.transform, bits=options.bits)
    check_ready(detector)
    where = " ".join(map(str, options.images))
    check_depth(paths, where, detector.transform.bits)
    with options.model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    results = report.inspect_files(
        detector,
        paths,
        options.out,
        model=f"{digest} {detector.transform.bits}",
        pictures=options.pictures,
        batch_size=options.batch_size,
        threads=options.threads,
        progress=True,
        fresh=options.fresh,
    )
    if options.json:
        print(report.to_json(results, detector.threshold), end="")
    written = options.out / ("index.html" if options.pictures else "results.csv")
    print(
        f"{report.summary(results)}; {written}",
        file=sys.stderr if options.json else sys.stdout,
    )
    return int(any(result.error for result in results))


def _load_detector(path: Path, weights: str) -> PaDiM:
    """Load a model, with weights other than the backbone's default ones if passed."""
    if weights == "default":
        return PaDiM.load(path)
    about, _ = read_tensors(path, PADIM_FORMAT, "saved PaDiM", "fit and save again")
    name, seed = about["backbone"], about["settings"]["seed"]
    tiles = {"tile": about.get("tile"), "overlap": about.get("overlap", 0)}
    return PaDiM.load(path, _load_backbone(name, weights, seed).extractor(**tiles))


def _run_padim(options: argparse.Namespace) -> int:
    device = _usable_device(options.device)
    settings, names = _read_settings(options)
    runnable = _check_categories(options, settings, names)
    backbone = _load_backbone(options.backbone, options.weights, options.seed)
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
                save=options.save,
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
    settings = evaluation.Settings(
        str(data),
        options.backbone,
        options.weights,
        _dimensions(options),
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


# ---- commands and options: `argparse` receives the entries of the tables ----


class _Command(NamedTuple):
    """A command of the command line.

    Fields:
        run: returns the exit status.
        stopped: what an interrupt leaves behind.
        help: for the list of commands.
        description: for the command's own help.
        options: argument or flag → settings of `add_argument`.
        aliases: other names.
    """

    run: Callable[[argparse.Namespace], int]
    stopped: str
    help: str
    description: str
    options: dict[str, dict[str, Any]]
    aliases: Sequence[str] = ()


def _model_options(backbone: str, seeded: str) -> dict[str, dict[str, Any]]:
    return {
        "--backbone": {
            "default": backbone,
            "choices": evaluation.DIMENSIONS,
            "help": "default: %(default)s",
        },
        "--dimensions": {
            "type": _parse_dimensions,
            "default": 0,
            "metavar": "N",
            "help": "or 'all' (default: the paper's: 100, 550 or all)",
        },
        "--seed": {
            "type": int,
            "default": 0,
            "help": f"seed {seeded} (default: 0)",
        },
        **_WEIGHTS,
    }


_WEIGHTS = {
    "--weights": {
        "default": "default",
        "help": "a file with the backbone's weights, or 'none' for random ones",
    }
}


def _output_options(folder: str, verb: str) -> dict[str, dict[str, Any]]:
    return {
        "--out": {
            "type": Path,
            "default": Path(folder),
            "metavar": "FOLDER",
            "help": "default: %(default)s",
        },
        "--fresh": {
            "action": "store_true",
            "help": f"{verb} again what results.csv holds",
        },
        "--no-pictures": {
            "dest": "pictures",
            "action": "store_false",
            "help": "write the tables only",
        },
    }


def _reading_options(bits: str) -> dict[str, dict[str, Any]]:
    count = {"type": _parse_count, "metavar": "N"}
    return {
        "--device": {
            "default": "cuda" if torch.cuda.is_available() else "cpu",
            "help": "default: %(default)s",
        },
        "--batch-size": {**count, "default": 32, "help": "default: %(default)s"},
        "--threads": {
            **count,
            "default": 2,
            "help": "threads that read images (default: 2)",
        },
        "--bits": {
            **count,
            "help": "depth of the data in 16-bit files, for example 12"
            f" (default: {bits})",
        },
    }


_COMMANDS = {
    "fit": _Command(
        _run_fit,
        "no model was written",
        "fit PaDiM to a folder of normal images, and choose a threshold",
        _FIT,
        {
            "folder": {"type": Path, "metavar": "FOLDER", "help": "of normal images"},
            "--out": {
                "required": True,
                "type": Path,
                "metavar": "MODEL",
                "help": "file to write, for example model.safetensors",
            },
            "--size": {
                "type": _parse_size,
                "metavar": "N",
                "help": "side of the square that images are resized to, or HxW, height"
                " and width, in pixels (default: the backbone's)",
            },
            "--quantile": {
                "type": _parse_share,
                "default": 0.99,
                "metavar": "Q",
                "help": "share of normal images below the threshold"
                " (default: %(default)s)",
            },
            "--roi": {
                "type": Path,
                "metavar": "MASK",
                "help": "mask image, white where anomalies are searched for",
            },
            "--tile": {
                "type": _parse_count,
                "metavar": "N",
                "help": "side in pixels of the tiles in which the network sees large"
                " images, for example --size 832 --tile 256 --overlap 64",
            },
            "--overlap": {
                "type": int,
                "default": 0,
                "metavar": "N",
                "help": "of neighbouring tiles, in pixels (default: %(default)s)",
            },
            "--half": {
                "action": "store_true",
                "help": "store the model in float16: half the size, almost the same"
                " scores",
            },
            **_model_options("efficientnet_lite0", "of the channels"),
            **_reading_options("16"),
        },
    ),
    "inspect": _Command(
        _run_inspect,
        "rows of inspected images are stored: run the same command again, without"
        " --fresh, to resume with the next batch",
        "inspect images with a model that fit wrote",
        _INSPECT,
        {
            "model": {"type": Path, "metavar": "MODEL", "help": "file that fit wrote"},
            "images": {
                "nargs": "+",
                "type": Path,
                "metavar": "FOLDER_OR_FILE",
                "help": "images, or folders that are searched, with all folders in"
                " them",
            },
            "--json": {
                "action": "store_true",
                "help": "print results.json to standard output",
            },
            **_WEIGHTS,
            **_output_options("report", "inspect"),
            **_reading_options("as fitted"),
        },
    ),
    "evaluate": _Command(
        _run_padim,
        "rows of finished categories are stored: run the same command again, without"
        " --fresh, to resume with the next category",
        "fit and score PaDiM on MVTec AD, or any data set in its layout",
        _EVALUATE,
        {
            "--data": {
                "required": True,
                "type": Path,
                "metavar": "FOLDER",
                "help": "folder that contains one folder per category, or one"
                " category's folder",
            },
            "--category": {
                "nargs": "+",
                "metavar": "NAME",
                "help": "categories to evaluate (default: all in FOLDER)",
            },
            "--variant": {
                "default": "centered",
                "choices": VARIANTS,
                "help": "random: Rd-MVTec AD",
            },
            "--save": {
                "action": "store_true",
                "help": "write each category's model too, for inspect",
            },
            **_model_options("resnet18", "of channels, rotations and crops"),
            **_output_options("padim-results", "evaluate"),
            **_reading_options("16"),
        },
        aliases=["padim"],
    ),
    "unpack": _Command(
        _run_unpack,
        "nothing was unpacked",
        "unpack a downloaded archive safely",
        "Unpack a downloaded archive safely.",
        {
            "archive": {"type": Path, "help": "tar.xz, tar.gz, tar or zip"},
            "folder": {"type": Path, "help": "folder to unpack into: new or empty"},
        },
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m paperlib", description=__doc__)
    version = f"paperlib {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            aliases=command.aliases,
            help=command.help,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=command.run, stopped=command.stopped)
        for option, settings in command.options.items():
            subparser.add_argument(option, **settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
