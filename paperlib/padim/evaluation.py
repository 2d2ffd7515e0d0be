"""Evaluate PaDiM on MVTec AD (or data in its layout), next to the paper's results."""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from paperlib.backbones import Backbone
from paperlib.datasets import MVTEC_OBJECTS, MVTEC_TEXTURES, Batch, MVTecAD, batches
from paperlib.datasets.folders import CROP, RESIZE
from paperlib.metrics import aupro, auroc, best_threshold, pixel_auroc
from paperlib.padim.detector import PaDiM
from paperlib.storage import (
    atomic_path,
    file_version,
    fingerprint,
    read_csv,
    write_csv,
)
from paperlib.tables import align_columns, short_repr

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
GROUPS = {
    "all_texture": MVTEC_TEXTURES,
    "all_object": MVTEC_OBJECTS,
    "all": (*MVTEC_TEXTURES, *MVTEC_OBJECTS),
}
# PaDiM, Sec. IV-B. EfficientNet-B5: all 344 channels. Lite0 is not in the paper; it has
# ResNet-18's number.
DIMENSIONS = {
    "resnet18": 100,
    "wide_resnet50_2": 550,
    "efficientnet_b5": None,
    "efficientnet_lite0": 100,
}


class Settings(NamedTuple):
    """What a result depends on besides its category; `dimensions` may be None (all)."""

    data: str
    backbone: str
    weights: str
    dimensions: int | None
    seed: int
    variant: str
    bits: int | None = None

    def file_name(self, category: str, ending: str = "safetensors") -> str:
        """Return the name of a category's figure, scores or detector."""
        dimensions = "all" if self.dimensions is None else self.dimensions
        parts = (category, self.backbone, dimensions, self.variant, f"seed{self.seed}")
        return "-".join(map(str, parts)) + f".{ending}"

    def __str__(self) -> str:
        """Describe the settings in one line, without the folder of the data."""
        dimensions = (
            "all channels"
            if self.dimensions is None
            else f"{self.dimensions} dimensions"
        )
        variant = "Rd-MVTec AD" if self.variant == "random" else "centred crops"
        weights = "" if self.weights == "default" else f", weights {self.weights}"
        bits = "" if self.bits is None else f", {self.bits} bits"
        return (
            f"{self.backbone}, {dimensions}, seed {self.seed}{weights}, {variant}{bits}"
        )


class Result(NamedTuple):
    """One category's scores: areas and F1 between 0 and 1, times in seconds.

    Fields:
        settings: of the run.
        category: its name.
        train, test: numbers of images.
        image_auroc, pixel_auroc, aupro: as in `paperlib.metrics`; the last two are None
            without masks.
        threshold, f1: the image score that separates the test images best, and its F1.
        fit_seconds, score_seconds: including reading the files.
        files: identifies names, sizes and times of the files, as `fingerprint_files`.
    """

    settings: Settings
    category: str
    train: int
    test: int
    image_auroc: float
    pixel_auroc: float | None
    aupro: float | None
    threshold: float
    f1: float
    fit_seconds: float
    score_seconds: float
    files: str = ""


# Column of results.csv → what converts its text.
_COLUMNS = {
    "files": str,
    **Settings.__annotations__,
    **Result.__annotations__,
    "dimensions": lambda text: None if text == "all" else int(text),
    "bits": lambda text: int(text) if text else None,
    "pixel_auroc": lambda text: float(text) if text else None,
    "aupro": lambda text: float(text) if text else None,
}
del _COLUMNS["settings"]
_ADDED = {"bits": "", "files": ""}  # columns that older tables lack


class Scored(NamedTuple):
    """A category's result, test set, labels (n,), scores (n,), maps (n, H, W).

    Its detector has a threshold if `evaluate` was called with `calibrate`.
    """

    result: Result
    test: MVTecAD
    labels: Tensor
    scores: Tensor
    maps: Tensor
    detector: PaDiM | None = None
    __repr__ = short_repr


def load_splits(settings: Settings, category: str) -> tuple[MVTecAD, MVTecAD]:
    """Load a category's training and test set, and check what can be known before.

    Raises:
        ValueError: that names category and folder, if the layout is wrong, there are
            fewer than two training images or no defective test image, or 16-bit images
            leave the top bits empty.
    """
    train, test = (
        MVTecAD(
            settings.data,
            category,
            split,
            settings.variant,
            seed=settings.seed,
            bits=settings.bits,
        )
        for split in ("train", "test")
    )
    if len(train) < 2:
        raise ValueError(
            f"category {category} has {len(train)} training image in {train.where};"
            " expected at least 2, for the covariance"
        )
    if not any(sample.label for sample in test.samples):
        raise ValueError(
            f"category {category} has no defective image in {test.where}; expected"
            " some in folders beside the normal ones, for the AUROC"
        )
    return train, test


def fingerprint_files(settings: Settings, *datasets: MVTecAD) -> str:
    """Identify names, sizes and times of all files that a result depends on."""
    paths = [
        path
        for dataset in datasets
        for sample in dataset.samples
        for path in (sample.path, sample.mask)
        if path is not None
    ]
    versions = map(file_version, [*paths, Path(settings.weights)])
    return fingerprint(*(part for version in versions for part in version))


def evaluate(
    settings: Settings,
    category: str,
    backbone: Backbone,
    *,
    batch_size: int = 32,
    threads: int = 2,
    progress: bool = False,
    splits: tuple[MVTecAD, MVTecAD] | None = None,
    calibrate: bool = False,
) -> Scored:
    """Fit PaDiM to one category's training images and score its test images.

    Images are resized and cropped as in the paper and normalised as the backbone was
    trained; maps are upsampled bicubically, as in the paper.

    Args:
        settings: folder of the categories, dimensions, seed, and variant of the data.
        category: its name.
        backbone: from `backbones.load`, its model on the device to run on.
        batch_size: images per batch.
        threads: that read images.
        progress: whether to show progress bars, of the images fitted and scored.
        splits: from `load_splits`, if they have been loaded before.
        calibrate: whether to set the detector's threshold, from the training images,
            each left out once; there must be three or more.

    Raises:
        ValueError: if the data or the settings can't be used, with the reason.

    Source: PaDiM, arXiv:2011.08785, Sec. IV. Departures: none.
    Test: test_evaluation.py::test_one_category_equals_the_steps_written_out
    """
    train, test = splits or load_splits(settings, category)
    detector = PaDiM(
        backbone.extractor(),
        settings.dimensions,
        settings.seed,
        mode="bicubic",
        transform=replace(
            backbone.transform,
            size=RESIZE,
            crop=CROP,
            resampling="bicubic",
            bits=settings.bits,
        ),
    )

    def prepared(dataset: MVTecAD, word: str) -> Iterator[tuple[Tensor, Batch]]:
        label = f"{category}: {word}"
        with tqdm(None, label, len(dataset), disable=not progress) as bar:
            for batch in batches(dataset, batch_size, threads):
                yield detector.prepare(batch), batch
                bar.update(len(batch.labels))

    started = time.perf_counter()
    detector.fit(images for images, _ in prepared(train, "fit"))
    fitted = time.perf_counter()
    if calibrate and detector.count > 2:
        training = (images for images, _ in prepared(train, "threshold"))
        detector.normal_threshold(training, fitted=True)
    scoring = time.perf_counter()
    parts = [
        (detector.anomaly_map(images).cpu(), batch.labels, batch.masks)
        for images, batch in prepared(test, "score")
    ]
    seconds = (fitted - started, time.perf_counter() - scoring)
    maps, labels, *masks = (
        torch.cat(part)
        for part in zip(*parts, strict=True)
        if isinstance(part[0], Tensor)
    )
    scores = maps.amax((1, 2))
    result = Result(
        settings,
        category,
        len(train),
        len(test),
        auroc(labels, scores),
        pixel_auroc(*masks, maps) if masks else None,
        aupro(*masks, maps) if masks else None,
        *best_threshold(labels, scores),
        *seconds,
        fingerprint_files(settings, train, test),
    )
    return Scored(result, test, labels, scores, maps, detector)


def examples(scored: Scored) -> dict[str, int]:
    """Select test images to show: the extremes of the scores of both classes.

    Args:
        scored: from `evaluate`.

    Returns:
        reason for the choice → index of the image.
    """
    chosen = {}
    for label, highest, lowest in (
        (1, "clearest defect", "faintest defect"),
        (0, "most suspicious normal", "least suspicious normal"),
    ):
        numbers = torch.nonzero(scored.labels == label).flatten()
        chosen[highest] = int(numbers[scored.scores[numbers].argmax()])
        chosen[lowest] = int(numbers[scored.scores[numbers].argmin()])
    return chosen


def check_matplotlib() -> None:
    """Raise ValueError if matplotlib, which draws the figures, is missing."""
    if find_spec("matplotlib") is None:
        raise ValueError(
            "figures need matplotlib; run `pip install matplotlib`,"
            " or pass --no-pictures"
        )


def save_pictures(scored: Scored, path: Path) -> None:
    """Draw the examples with mask, map and overlay into a PNG file.

    Args:
        scored: from `evaluate`.
        path: of the file; an existing one is replaced.

    Raises:
        ValueError: if matplotlib is missing.
    """
    check_matplotlib()
    import matplotlib.pyplot as plt

    from paperlib import viz

    reasons = examples(scored)
    numbers = list(reasons.values())
    items = [scored.test[number] for number in numbers]
    labels = [
        f"{why}\n{Path(item.path).parent.name}/{Path(item.path).stem}:"
        f" {scored.scores[number]:.1f}"
        for (why, number), item in zip(reasons.items(), items, strict=True)
    ]
    figure = viz.anomaly_figure(
        torch.stack([item.image for item in items]),
        scored.maps[numbers],
        torch.stack([item.mask for item in items]) if scored.test.has_masks else None,
        labels=labels,
        scale="anomaly score (smoothed Mahalanobis distance)",
    )
    for ax in figure.axes:
        ax.yaxis.label.set_size(8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    plt.close(figure)


def run(
    settings: Settings,
    categories: Sequence[str],
    backbone: Backbone,
    out: Path,
    *,
    batch_size: int = 32,
    threads: int = 2,
    pictures: bool = True,
    progress: bool = False,
    fresh: bool = False,
    save: bool = False,
) -> list[Result]:
    """Evaluate categories; store each result at once, and reuse those stored before.

    A stored row is reused, and that is said on standard error, if settings and files
    are the same: names, sizes and times.

    Args:
        settings: of all categories.
        categories: their names; repeated ones are run once.
        backbone: from `backbones.load`.
        out: folder for results.csv, in which rows of other settings remain, and per
            category for one figure and a CSV file with the score of each test image.
            Simultaneous runs need different folders: each would
            overwrite the other's newest row.
        batch_size, threads, progress: as for `evaluate`.
        pictures: whether to draw figures.
        fresh: whether to evaluate again what is stored.
        save: whether to write each category's detector. Its threshold is chosen on the
            training images, and that of the result on the test images.

    Returns:
        one result per category, in the order of `categories`.

    Raises:
        ValueError: as `load_splits` for any category and as `check_matplotlib`, before
            the first is run; as `evaluate`; and for a results.csv that this function
            did not write.
        FileExistsError: if `out` is a file.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = out / "results.csv"
    splits = {category: load_splits(settings, category) for category in categories}
    files = {name: fingerprint_files(settings, *pair) for name, pair in splits.items()}
    done = {
        result.category: result
        for result in ([] if fresh else read_results(table))
        if result.settings == settings
        and result.files == files.get(result.category)
        and not (save and not (out / settings.file_name(result.category)).is_file())
    }
    if pictures and done.keys() < files.keys():
        check_matplotlib()
    for category in files:
        if category in done:
            print(
                f"{category}: reused from {table}, its files are unchanged;"
                " --fresh (fresh=True) evaluates it again",
                file=sys.stderr,
            )
            continue
        scored = evaluate(
            settings,
            category,
            backbone,
            batch_size=batch_size,
            threads=threads,
            progress=progress,
            splits=splits[category],
            calibrate=save,
        )
        if pictures:
            save_pictures(scored, out / settings.file_name(category, "png"))
        write_scores(out / settings.file_name(category, "csv"), scored)
        if save:
            scored.detector.save(out / settings.file_name(category))
        done[category] = scored.result
        others = [
            row
            for row in read_results(table)
            if (row.settings, row.category) != (settings, category)
        ]
        write_results(table, [*others, scored.result])
    return [done[category] for category in files]


def read_results(path: Path) -> list[Result]:
    """Read what `write_results` wrote; return [] if there is no file.

    Raises:
        UnusableFile: naming the file, if it is another kind of file.
    """
    return read_csv(path, _COLUMNS, _parse_result, "results", _ADDED)


def _parse_result(row: dict[str, str]) -> Result:
    values = {name: convert(row[name]) for name, convert in _COLUMNS.items()}
    settings = Settings(*(values.pop(name) for name in Settings._fields))
    return Result(settings, **values)


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write results as CSV, one row each, atomically and without rounding."""
    rows = (
        {**result._asdict(), **result.settings._asdict()}
        | {"dimensions": result.settings.dimensions or "all"}
        for result in results
    )
    write_csv(path, _COLUMNS, rows)


def write_scores(path: Path, scored: Scored) -> None:
    """Write the path, label and score of each test image as CSV, atomically."""
    columns = "path", "label", "score"
    paths = (sample.path for sample in scored.test.samples)
    rows = zip(paths, scored.labels.tolist(), scored.scores.tolist(), strict=True)
    write_csv(path, columns, (dict(zip(columns, row, strict=True)) for row in rows))


def report(results: Sequence[Result]) -> str:
    """Format results as a table, in percent, next to the paper's.

    The paper's are Tables III and V, or VI for the random variant. Means are over the
    categories present, each once; the paper's means are shown only next to complete
    groups. If there are categories of another data set, a last row has the mean of all.

    Args:
        results: of one run, at least one.

    Raises:
        ValueError: if there is no result.

    Source: PaDiM, arXiv:2011.08785, Tables III, V and VI. Departures: none.
    Test: test_evaluation.py::test_the_report_stands_beside_the_papers_tables
    """
    if not results:
        raise ValueError("no result to report; expected at least one")
    results = list({result.category: result for result in results}.values())
    settings = results[0].settings
    is_centered = settings.variant == "centered"
    tables = ("table_V", "table_III") if is_centered else ("table_VI",)
    quoted = {
        f"{model.removeprefix('PaDiM-')} ({table.removeprefix('table_')})": numbers
        for table in tables
        for model, numbers in PAPER[table].items()
    }
    rows = [("category", "test", "AUROC", "pixel", "PRO", *quoted)]

    def add_row(title: str, parts: Sequence[Result], name: str) -> None:
        """Add the means of some results, and the paper's numbers under a name."""
        means = (
            _format_mean([getattr(part, field) for part in parts])
            for field in ("image_auroc", "pixel_auroc", "aupro")
        )
        papers = (_format_quoted(numbers.get(name)) for numbers in quoted.values())
        n_test = sum(part.test for part in parts)
        rows.append((title, str(n_test), *means, *papers))

    for result in results:
        add_row(result.category, [result], result.category)
    for group, members in GROUPS.items():
        parts = [result for result in results if result.category in members]
        if parts:
            title = f"{group} ({len(parts)} of {len(members)})"
            add_row(title, parts, group if len(parts) == len(members) else "")
    if len(results) > 1 and not {r.category for r in results} <= {*GROUPS["all"]}:
        add_row(f"mean of {len(results)}", results, "")
    legend = (
        "Table V (image AUROC) and Table III (pixel AUROC / PRO)"
        if is_centered
        else "Table VI (pixel AUROC / PRO)"
    )
    return "\n".join(
        [
            f"{settings}; in %",
            align_columns(rows, "<" + ">" * (len(rows[0]) - 1)),
            "threshold and f1 in results.csv were chosen on the test set,"
            " so f1 is too high for new images",
            f"right: the paper's {legend}",
            f"from {PAPER['source'].split(', Tables')[0]}",
        ]
    )


def _format_mean(values: Sequence[float | None]) -> str:
    """Format the mean in percent, or nothing if a category has no masks."""
    return "" if None in values else f"{100 * statistics.fmean(values):.1f}"


def _format_quoted(values: float | list[float] | None) -> str:
    if values is None:
        return ""
    return " / ".join(map(str, values)) if isinstance(values, list) else str(values)
