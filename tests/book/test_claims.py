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


def test_what_training_adds_in_chapter_4_agrees_with_the_stored_runs():
    runs = measured("patch_svdd_cells")["runs"]
    mono, poly = (
        sum(run["auroc"][key] for run in runs if run["name"] == "trained") / 3
        - sum(run["auroc"][key] for run in runs if run["name"] == "random") / 3
        for key in ("mono image mult", "poly image mult")
    )
    first = {run["name"]: run["auroc"] for run in runs if run["seed"] == 0}
    task, alone, flat = (first[name] for name in ("λ = 0.001", "L_SVDD'", "flat"))
    added = {key: task[key] - alone[key] for key in task}
    hierarchical = {key: task[key] - flat[key] for key in flat}
    lowest = min(
        areas["mono image mult"] for name, areas in first.items() if name[0] == "λ"
    )
    assert lowest == first["λ = 0.1"]["mono image mult"]
    key = "poly image mult"
    statements = [
        f"{mono:.2f} higher on mono and {-poly:.2f} lower on poly",
        f"({task[key]:.2f} against {alone[key]:.2f} of neighbours alone)",
        f"adds {added['mono pixel mult']:.2f} (mono) and"
        f" {added['poly pixel mult']:.2f} (poly) to neighbours alone",
        *(
            f"scores {hierarchical[f'{kind} pixel big']:.2f} higher than the flat one"
            for kind in ("mono", "poly")
        ),
        f"it is {hierarchical['mono image big']:.2f} higher on mono, and lower on poly"
        f" ({task['poly image big']:.2f} against {flat['poly image big']:.2f})",
        rf"({lowest:.2f} at $\lambda = 0.1$)",
    ]
    text, guide = twin("04_patch_svdd"), words(ROOT / "book" / "instructor.md")
    assert [statement for statement in statements if statement not in text] == []
    assert f"differs by {max(mono, -poly):.2f} or less" in guide


def test_the_random_encoder_of_the_guide_is_that_of_chapter_4():
    notebook = (ROOT / "notebooks" / "04_patch_svdd.ipynb").read_text("utf-8")
    product = re.search(r"random(?: +0\.\d\d){3} +(0\.\d\d)", notebook).group(1)
    guide = words(ROOT / "book" / "instructor.md")
    assert f"random weights alone reach {product} in the first table" in guide
