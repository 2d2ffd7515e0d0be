"""Numbers stated in the chapters, recomputed from the papers' tables and results."""

import json
import re

import pytest
import yaml
from built import NOTEBOOKS, ROOT

from paperlib.complexity import profile
from paperlib.mobilenet import MobileNetV1

PAGES = {path.stem: ROOT / "book" / f"{path.stem}.md" for path in NOTEBOOKS}
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"


def words(path):
    """Return the text of a page, or of a notebook's text twin, in one line."""
    text = path.read_text(encoding="utf-8")
    return " ".join(re.sub(r"^# ?", "", text, flags=re.M).split())


def twin(name):
    return words(ROOT / "notebooks" / "py" / f"{name}.py")


def facts(paper):
    return yaml.safe_load((ROOT / "book" / "data" / f"{paper}.yml").read_text("utf-8"))


def measured(name):
    path = ROOT / "book" / "data" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def value(number):
    return float(number.replace(",", ""))


def decimals(number):
    return len(number.partition(".")[2])


def tables(path):
    """Return the tables of a page, each a list of rows, each a list of cells."""
    rows, page_tables = [], []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            page_tables.append(rows)
            rows = []
    return page_tables


def numbers_of(cell):
    """Return the numbers of a cell such as `97.6 / **93.4**`, and which are bold."""
    all_bold = re.fullmatch(r"\*\*[^*]+\*\*", cell) is not None
    parts = [part.strip() for part in cell.split("/")]
    bold = [all_bold or part.startswith("**") for part in parts]
    return list(zip((part.strip("*") for part in parts), bold, strict=True))


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_a_bold_number_is_the_only_one_of_its_value_in_its_column(path):
    ties = []
    for table in tables(path):
        # A row of means is bold as a whole.
        compared = [row for row in table if "**mean**" not in row]
        for column in zip(*compared, strict=True):
            cells = [numbers_of(cell) for cell in column]
            plain = {(i, n) for cell in cells for i, (n, b) in enumerate(cell) if not b}
            bold = {(i, n) for cell in cells for i, (n, b) in enumerate(cell) if b}
            ties += sorted(
                (column[0], n) for i, n in bold & plain if re.match(r"\d", n)
            )
    assert ties == []


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_differences_and_quotients_are_correct(path):
    text = words(path)
    wrong = []
    for a, b, c in re.findall(rf"(?<![\d.]){NUMBER} [−-] {NUMBER} = {NUMBER}", text):
        if round(value(a) - value(b), decimals(c)) != value(c):
            wrong.append(f"{a} − {b} = {c}")
    for a, b, c in re.findall(rf"(?<![\d.]){NUMBER} / {NUMBER} = {NUMBER} %", text):
        if round(100 * value(a) / value(b), decimals(c)) != value(c):
            wrong.append(f"{a} / {b} = {c} %")
    assert wrong == []


def test_the_saving_by_separable_convolutions_agrees_with_table_4():
    full, separable = facts("mobilenet")["table_4_depthwise_vs_full"]["rows"]
    times = full["madds_million"] / separable["madds_million"]
    points = full["accuracy_pct"] - separable["accuracy_pct"]
    saved, cost = f"{times:.1f} times fewer multiply-adds", f"{points:.1f} points"
    assert f"{saved}, at a cost of {cost}" in words(ROOT / "book" / "index.md")
    assert f"{saved} for {cost} of accuracy" in twin("01_mobilenet")


def test_the_training_time_of_chapter_1_agrees_with_the_stored_runs():
    runs = measured("mobilenet_cells")["runs"]
    recipe = measured("mobilenet_cells")["stamp"]["recipe"]
    seconds = sum(run["cpu_seconds_per_epoch"] for run in runs) * recipe["epochs"]
    assert f"takes {seconds / 60:.0f} minutes on one processor thread" in twin(
        "01_mobilenet"
    )


def test_the_time_figure_of_chapter_1_is_described_by_its_numbers():
    result, page = measured("mobilenet_cells"), words(PAGES["01_mobilenet"])
    side, macs, seconds = result["stamp"]["recipe"]["side"], {}, {}
    for run in result["runs"]:
        name, arguments = run["model"], run["arguments"]
        seconds[name] = seconds.get(name, 0) + run["cpu_seconds_per_epoch"]
        if name not in macs:
            network = MobileNetV1(num_classes=2, **arguments)
            macs[name] = profile(network, (1, 3, side, side)).macs
    (full,) = (name for name in macs if "full" in name)
    for name in macs.keys() - {full}:
        width, share, time = (
            name.partition(" ")[0],
            100 * macs[name] / macs[full],
            100 * seconds[name] / seconds[full],
        )
        assert (
            f"MobileNet of width {width}: {share:.1f} % of the multiply-adds,"
            f" {time:.0f} % of the"
        ) in page


def test_the_effect_of_average_pooling_agrees_with_tables_1_and_2():
    data, page = facts("cam"), words(PAGES["02_cam"])
    classified = {
        name: top1
        for name, top1, _ in data["table_1_classification_error_ilsvrc_val"]["rows"]
    }
    localised = {
        name: top1
        for name, top1, _ in data["table_2_localization_error_ilsvrc_val"]["rows"]
    }
    cost = classified["GoogLeNet-GAP"] - classified["GoogLeNet"]
    assert f"it costs {cost:.1f} points of top-1 accuracy" in page
    top1, boxes = (
        errors["GoogLeNet-GMP"] - errors["GoogLeNet-GAP"]
        for errors in (classified, localised)
    )
    assert (
        f"by {top1:.1f} points in classification"
        f" and by {boxes:.1f} points in localisation"
    ) in page
    assert sorted(localised, key=localised.get)[:2] == ["GoogLeNet-GAP", "VGGnet-GAP"]
    heading = "### GoogLeNet and VGGnet with GAP localise best"
    assert heading in PAGES["02_cam"].read_text("utf-8")


def test_the_share_of_correct_boxes_among_correct_classes():
    rows = {
        tuple(row["cells"][:2]): row["cells"][2:]
        for row in facts("gradcam")["table_1_localization"]["rows"]
    }
    page = words(PAGES["03_gradcam"])
    for method in ("Grad-CAM (ours)", "CAM"):
        classified, _, boxed, _ = rows["VGG-16", method]
        share = 100 * (100 - boxed) / (100 - classified)
        assert f"{100 - boxed:.2f} / {100 - classified:.2f} = {share:.0f} %" in page
        assert f"100 − {boxed:.2f}" in page and f"100 − {classified:.2f}" in page
