"""The page "From a folder to an inspection": its numbers, and its code as written."""

import json
import os
import re
import subprocess
import sys
from statistics import mean

import pytest
from built import ROOT
from PIL import Image
from test_claims import words

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import inspection_page  # noqa: E402
from inspection_page import select  # noqa: E402

SOURCE = ROOT / "book" / "inspection.md"
TEXT = words(SOURCE)
RESULT = json.loads((ROOT / inspection_page.RESULT).read_text(encoding="utf-8"))
RUNS, RECIPE = RESULT["runs"], RESULT["stamp"]["recipe"]


# ---- tables ----


def test_the_page_includes_every_table(tmp_path):
    path = tmp_path / inspection_page.RESULT
    path.parent.mkdir(parents=True)
    (tmp_path / "book").mkdir(exist_ok=True)
    path.write_text(json.dumps(RESULT))
    inspection_page.write_parts(tmp_path)
    folder = tmp_path / inspection_page.FOLDER
    written = {file.name for file in folder.iterdir()}
    included = re.findall(r"\{include\} inspection_parts/(\S+)", SOURCE.read_text())
    assert written == set(included) and len(written) == 5
    for name in written:
        lines = (folder / name).read_text().splitlines()
        assert len(lines) > 4 and len({line.count("|") for line in lines}) == 1
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    inspection_page.write_parts(tmp_path)
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_percentages_state_mean_and_range():
    assert inspection_page.percent([1.0, 1.0]) == "100 %"
    assert inspection_page.percent([0.1, 0.2, 0.33]) == "21 % (10\u2060–\u206033)"
    assert inspection_page.percent([0.006], digits=1) == "0.6 %"


def test_tables_average_over_the_seeds():
    runs = [
        {"experiment": "drift", "seed": k, "dimmed": 0.1, "median": m, "alarms": a}
        for k, (m, a) in enumerate([(0.5, 0.04), (0.7, 0.08)])
    ]
    table = inspection_page.drift(runs)
    assert table.splitlines()[-1] == (
        "| 10 % | 0.60 (0.50\u2060–\u20600.70) | 6.0 % (4.0\u2060–\u20608.0) |"
    )


# ---- the code, as written ----

RUN = """
import re, shlex, sys
from paperlib.__main__ import main

blocks = re.findall(r"^```(sh|python)\\n(.*?)^```$", sys.stdin.read(), re.M | re.S)
names = {}
for kind, code in blocks:
    if kind == "python":
        exec(code, names)
        continue
    for line in code.replace("\\\\\\n", " ").splitlines():
        assert line.startswith("python -m paperlib "), line
        assert main(shlex.split(line)[3:]) == 0, line
"""


EXPORT = re.compile(r"^```python\nimport onnxruntime\n.*?^```$", re.M | re.S)


@pytest.mark.parametrize(
    "with_export", [False, pytest.param(True, marks=pytest.mark.long)]
)
def test_the_code_runs_as_written(tmp_path, with_export):
    """With fewer images, in one process, so that torch is loaded once. The export takes
    longer than everything before it.
    """
    text = SOURCE.read_text(encoding="utf-8")
    assert len(EXPORT.findall(text)) == 1
    if not with_export:
        text = EXPORT.sub("", text)
    for usual, fewer in (("[:150]", "[:8]"), ("[-20:]", "[-4:]"), ("[:40]", "[:4]")):
        assert text.count(usual) == 1
        text = text.replace(usual, fewer)
    mask = Image.new("L", (300, 300))
    mask.paste(255, (20, 20, 280, 280))
    mask.save(tmp_path / "mask.png")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=text,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "cells" / "good").iterdir())) == 8
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert set(re.findall(r"^\| `(\S+?)/?` \|", text, re.M)) <= written
    sizes = [
        (tmp_path / f"{name}.safetensors").stat().st_size for name in ("model", "half")
    ]
    assert 0.5 < sizes[1] / sizes[0] < 0.6
    if with_export:
        difference = re.search(r"relative difference of a score: (\S+)", done.stdout)[1]
        assert float(difference) < 1e-4 and "difference of 1e-4" in TEXT
    assert re.search(r"^median score / threshold: \d\.\d\d$", done.stdout, re.M)


# ---- numbers in the text ----


def shares(count, share, kind, **values):
    """Return a seed's share of alarms each; kind 0: functional cells, 1: defective."""
    values = {"dimensions": 100, "region": False, **values}
    runs = select(RUNS, "training_images", images=count, **values)
    assert len(runs) == 3
    return [100 * run["alarms"][share][kind] for run in runs]


def span(values, digits=0):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f} %"


def average(name, count, dimensions):
    values = {"images": count, "dimensions": dimensions, "region": False}
    return mean(run[name] for run in select(RUNS, "training_images", **values))


def test_the_numbers_on_thresholds():
    few, many = (span(shares(count, "0.05", 0), digits=1) for count in (24, 300))
    assert (
        f"With 24 images and 5 % chosen, {few} of the functional cells raised an"
        f" alarm; with 300 images, {many}."
    ) in TEXT
    assert "Every mean is above the chosen share" in TEXT
    for share in ("0.1", "0.05", "0.01"):
        for count in (24, 40, 100, 150, 300):
            assert mean(shares(count, share, 0)) > 100 * float(share)
    few, some, many = (span(shares(count, "0.01", 1)) for count in (40, 100, 300))
    assert (
        f"With 1 % chosen, {few} of {RECIPE['defective']} defective cells were found"
        f" with 40 images, {some} with 100 images, and"
        f" {many.replace(' %', '')} % with 300."
    ) in TEXT
    found = [f"{mean(shares(300, share, 1)):.0f}" for share in ("0.1", "0.05", "0.01")]
    assert (
        "chosen shares of 10, 5 and 1 % false alarms find {}, {} and {} % of the"
        " defective cells"
    ).format(*found) in TEXT


def test_the_numbers_on_few_images():
    few, many = (
        [f"{average('auroc', count, d):.3f}" for d in (100, 20)] for count in (24, 300)
    )
    assert (
        f"With 24 images, 20 dimensions have an AUROC of {few[1]} and 100 dimensions"
        f" {few[0]}; with 300 images, {many[1]} and {many[0]}"
    ) in TEXT
    few, many = (f"{average('contrast', count, 100):.1f}" for count in (24, 300))
    assert (
        "With 24 images and 100 dimensions, the median score of a defective cell is"
        f" {few} times that of a functional one; with 300 images, {many} times."
    ) in TEXT
    assert "These differences are smaller than those between seeds" in TEXT
    for count in (24, 300):
        runs = {
            d: [
                run["auroc"]
                for run in select(
                    RUNS, "training_images", images=count, dimensions=d, region=False
                )
            ]
            for d in (100, 20)
        }
        between = mean(runs[100]) - mean(runs[20])
        assert max(runs[100]) - min(runs[100]) > between > 0


def test_the_numbers_on_small_defects():
    def found(name, diameter):
        runs = select(RUNS, "resolution", input=name)
        return f"{100 * mean(run['found'][diameter] for run in runs):.0f} %"

    assert (
        f"Of the 4-pixel spots, {found('224', '4')} are found at 224 pixels and"
        f" {found('448', '4')} at 448; of the 8-pixel spots, {found('224', '8')} and"
        f" {found('448', '8')}."
    ) in TEXT
    cost = [
        mean(run["cpu_ms"] for run in select(RUNS, "resolution", input=name))
        for name in ("448", "224")
    ]
    assert f"takes {cost[0] / cost[1]:.1f} times as long" in TEXT
    recipe = {
        "images for resolution": "fitted to {} cells",
        "dimensions for resolution": "$d = {}$",
        "cells with a spot": "{} cells per size and seed",
    }
    for name, words_ in recipe.items():
        assert words_.format(RECIPE[name]) in TEXT


def test_the_numbers_on_region_file_and_drift():
    inside, whole = (
        [f"{mean(shares(150, '0.05', kind, region=r)):.1f}" for kind in (0, 1)]
        for r in (True, False)
    )
    assert (
        f"a frame of {RECIPE['margin of the region']:.0%} per side".replace("%", " %")
        + f" changes little: {inside[0]} instead of {whole[0]} % of the functional and"
        f" {inside[1]} instead of {whole[1]} % of the defective cells raise an alarm"
    ) in TEXT
    (half,) = select(RUNS, "half")
    assert (
        f"{half['megabytes']['float32']:.0f} MB instead of 127 MB for $d = 100$."
        " `--half` stores the model in float16, which takes"
        f" {half['megabytes']['float16']:.0f} MB"
    ) in TEXT
    assert (
        f"No score of {half['images_scored']} cells changed by more than"
        f" {100 * half['largest_change']:.2g} %"
    ) in TEXT
    decisions = {0: "no decision changed", 1: "one decision changed"}
    assert decisions[half["decisions_changed"]] in TEXT
    first, *_, last = (
        (
            100 * dimmed,
            mean(run["median"] for run in select(RUNS, "drift", dimmed=dimmed)),
            100 * mean(run["alarms"] for run in select(RUNS, "drift", dimmed=dimmed)),
        )
        for dimmed in (0.0, 0.05, 0.1, 0.2)
    )
    assert (
        f"{last[0]:.0f} % less light moves the median from {first[1]:.2f} to"
        f" {last[1]:.2f} of the threshold, and the seeds differ by more than that; the"
        f" share of false alarms remains {first[2]:.1f} %"
    ) in TEXT
    assert f"{first[2]:.1f}" == f"{last[2]:.1f}"
    medians = [run["median"] for run in select(RUNS, "drift", dimmed=0.0)]
    assert max(medians) - min(medians) > first[1] - last[1]


def test_the_numbers_on_serving():
    ways = {run["way"]: run["speed"] for run in select(RUNS, "serving")}
    batch, onnx, onnx_batch = [*ways.values()][1:]
    assert (
        f"With PyTorch, batches of 8 are {batch:.1f} times as fast per image as single"
        f" images. onnxruntime is {onnx:.1f} times as fast as PyTorch with single"
        " images; with batches, both are equally fast."
    ) in TEXT
    assert f"{batch:.1f}" == f"{onnx_batch:.1f}"
    assert RECIPE["turns"] == 5 and "the range of five repetitions" in TEXT
    gaussians = 56 * 56 * (100 * 100 + 100) * 4 / 1e6
    assert f"{gaussians:.0f} MB for $d = 100$" in TEXT
