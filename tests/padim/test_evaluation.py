import csv
import os
import shutil
import statistics

import numpy as np
import pytest
import small_mvtec
import torch
from PIL import Image
from refusals import refuses
from sklearn.metrics import f1_score, roc_auc_score
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from paperlib import backbones, viz
from paperlib.backbones import FeatureExtractor
from paperlib.metrics import aupro
from paperlib.padim import PaDiM, evaluation
from paperlib.padim.evaluation import GROUPS, PAPER, Result, Settings
from paperlib.validation import UnusableFile


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mvtec")
    small_mvtec.write(root, "carpet", "grass")
    small_mvtec.write(root, "bottle", "brick")
    return root


@pytest.fixture(scope="module")
def lite0():
    return backbones.load("efficientnet_lite0")


@pytest.fixture
def settings(root):
    return Settings(str(root), "efficientnet_lite0", "default", 20, 3, "centered")


def result(category, settings, value=0.5, **changes):
    return Result(
        settings, category, 6, 6, value, value, value, 3.0, 0.5, 1.0, 2.0
    )._replace(**changes)


def test_one_category_equals_the_steps_written_out(root, lite0, settings):
    def pictures(*parts):
        files = sorted((root / "bottle").joinpath(*parts).glob("*.png"))
        opened = [Image.open(file).convert("RGB") for file in files]
        resized = [
            TF.resize(picture, [256, 256], InterpolationMode.BICUBIC)
            for picture in opened
        ]
        return torch.stack(
            [TF.to_tensor(TF.center_crop(picture, [224, 224])) for picture in resized]
        )

    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (lite0.transform.mean, lite0.transform.std)
    )
    model = PaDiM(FeatureExtractor(*lite0[:2]), 20, seed=3, mode="bicubic")
    model.fit([(pictures("train", "good") - mean) / std])
    maps = model.anomaly_map(
        (torch.cat([pictures("test", "good"), pictures("test", "stain")]) - mean) / std
    )
    masks = [
        Image.open(file)
        for file in sorted((root / "bottle/ground_truth/stain").glob("*.png"))
    ]
    masks = [
        TF.center_crop(TF.resize(m, [256, 256], InterpolationMode.NEAREST), [224, 224])
        for m in masks
    ]
    masks = torch.cat(
        [
            torch.zeros(3, 224, 224, dtype=torch.bool),
            torch.cat([TF.to_tensor(m) for m in masks]) > 0,
        ]
    )
    labels, scores = [0, 0, 0, 1, 1, 1], maps.amax((1, 2))

    found = evaluation.evaluate(settings, "bottle", lite0, batch_size=4)
    torch.testing.assert_close(found.maps, maps, rtol=1e-3, atol=1e-3)
    row = found.result
    assert row[:4] == (settings, "bottle", 6, 6) and found.labels.tolist() == labels
    assert row.image_auroc == roc_auc_score(labels, scores)
    assert row.pixel_auroc == pytest.approx(
        roc_auc_score(masks.flatten(), maps.flatten()), abs=1e-5
    )
    assert row.aupro == pytest.approx(aupro(masks, maps), abs=1e-4)
    assert row.f1 == pytest.approx(f1_score(labels, found.scores >= row.threshold))
    assert row.pixel_auroc > 0.95  # it finds the stains
    assert row.fit_seconds > 0 and row.score_seconds > 0


def test_seed_dimensions_and_variant_matter(lite0, settings):
    def maps(**changes):
        return evaluation.evaluate(settings._replace(**changes), "carpet", lite0).maps

    first = maps()
    assert torch.equal(first, maps())
    for changes in ({"seed": 4}, {"dimensions": 21}, {"variant": "random"}):
        assert not torch.allclose(first, maps(**changes), rtol=1e-2)


def test_the_seed_turns_the_random_variants_pictures(lite0, settings, monkeypatch):
    seeds, make = [], evaluation.MVTecAD.__init__
    monkeypatch.setattr(
        evaluation.MVTecAD,
        "__init__",
        lambda self, *a, **k: (
            seeds.append((a[3], k.get("seed"))) or make(self, *a, **k)
        ),
    )
    evaluation.evaluate(
        settings._replace(variant="random", dimensions=1, seed=8), "bottle", lite0
    )
    assert seeds == [("random", 8)] * 2


def test_examples_are_the_extremes():
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    scores = torch.tensor([2.0, 9.0, 1.0, 3.0, 5.0, 6.0])
    scored = evaluation.Scored(None, None, labels, scores, None)
    chosen = {
        "clearest defect": 1,
        "faintest defect": 3,
        "most suspicious normal": 5,
        "least suspicious normal": 2,
    }
    assert evaluation.examples(scored) == chosen


def test_a_run_writes_rows_and_pictures(tmp_path, lite0, settings, monkeypatch):
    drawn = []
    figure = viz.anomaly_figure
    monkeypatch.setattr(
        "paperlib.viz.anomaly_figure",
        lambda *a, **k: drawn.append((a, k)) or figure(*a, **k),
    )
    found = evaluation.run(
        settings, ["carpet", "bottle"], lite0, tmp_path / "new" / "out"
    )
    assert [row.category for row in found] == ["carpet", "bottle"]
    out = tmp_path / "new" / "out"
    names = [
        f"{c}-efficientnet_lite0-20-centered-seed3.png" for c in ("bottle", "carpet")
    ]
    files = sorted([*names, *(name.replace("png", "csv") for name in names)])
    assert sorted(path.name for path in out.iterdir()) == [*files, "results.csv"]
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["carpet", "bottle"]
    assert float(rows[1]["image_auroc"]) == found[1].image_auroc
    assert rows[0]["dimensions"] == "20"
    for name in names:
        picture = np.asarray(Image.open(out / name))
        assert picture.shape[0] > 600 and picture.std() > 20
    (images, maps, masks), options = drawn[0]
    assert images.shape == (4, 3, 224, 224)
    assert maps.shape == masks.shape == (4, 224, 224)
    assert masks.flatten(1).any(1).tolist() == [True, True, False, False]
    assert all(
        f"{float(m.max()):.1f}" in label
        for m, label in zip(maps, options["labels"], strict=True)
    )
    assert "stain/" in options["labels"][0] and "good/" in options["labels"][3]


def test_a_killed_run_is_resumed(tmp_path, lite0, settings, monkeypatch):
    whole, ran = evaluation.evaluate, []

    def killed(settings, category, *rest, **options):
        ran.append(category)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return whole(settings, category, *rest, **options)

    monkeypatch.setattr(evaluation, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(settings, ["bottle", "carpet"], lite0, tmp_path, pictures=False)
    (kept,) = evaluation.read_results(tmp_path / "results.csv")
    assert kept.category == "bottle"
    found = evaluation.run(
        settings, ["carpet", "bottle"], lite0, tmp_path, pictures=False
    )
    assert ran == ["bottle", "carpet", "carpet"]  # the first is not run again
    assert [row.category for row in found] == ["carpet", "bottle"] and found[1] == kept
    evaluation.run(settings, ["carpet", "bottle"], lite0, tmp_path, pictures=False)
    assert len(ran) == 3
    other = settings._replace(seed=4)  # other settings are other rows
    evaluation.run(other, ["bottle"], lite0, tmp_path, pictures=False)
    assert len(ran) == 4 and len(evaluation.read_results(tmp_path / "results.csv")) == 3


def test_every_layout_is_checked_before_the_first_category_runs(
    tmp_path, lite0, settings, monkeypatch
):
    small_mvtec.write(tmp_path / "data", "aa", "brick", train=2, good=1, defective=1)
    small_mvtec.write(tmp_path / "data", "zz", "brick", train=2, good=1, defective=1)
    mask = tmp_path / "data/zz/ground_truth/stain/000_mask.png"
    mask.rename(mask.with_name("001_mask.png"))
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: pytest.fail("it ran"))
    with refuses("test/stain/000.png has no mask"):
        evaluation.run(
            settings._replace(data=str(tmp_path / "data")),
            ["aa", "zz"],
            lite0,
            tmp_path / "out",
        )


@pytest.mark.parametrize("change", ["content", "time", "removed", "added", "mask"])
def test_a_row_is_reused_only_for_the_same_files(
    tmp_path, lite0, settings, monkeypatch, capsys, change
):
    small_mvtec.write(tmp_path / "data", "part", "brick", train=4)
    settings = settings._replace(data=str(tmp_path / "data"))
    root, ran = tmp_path / "data/part", []

    def evaluated(settings, category, *_, **__):
        ran.append(category)
        splits = evaluation.load_splits(settings, category)
        files = evaluation.fingerprint_files(settings, *splits)
        row = result(category, settings, files=files)
        zeros = torch.zeros(len(splits[1]))
        return evaluation.Scored(row, splits[1], zeros, zeros, None)

    def run(**options):
        del ran[:]
        out = tmp_path / "out"
        evaluation.run(settings, ["part"], lite0, out, pictures=False, **options)
        return ran, capsys.readouterr().err

    monkeypatch.setattr(evaluation, "evaluate", evaluated)
    assert run() == (["part"], "")
    reused, said = run()
    assert not reused and said.startswith("part: reused from ") and "--fresh" in said
    assert run(fresh=True) == (["part"], "")
    path = root / "train/good/001.png"
    if change == "content":
        path.write_bytes(path.read_bytes() + b"0")
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "removed":
        path.unlink()
    elif change == "added":
        shutil.copy(path, root / "test/good/9.png")
    else:
        os.utime(root / "ground_truth/stain/000_mask.png", (1, 1))
    assert run() == (["part"], "")
    assert len(evaluation.read_results(tmp_path / "out/results.csv")) == 1


def test_a_set_without_masks_has_image_scores_only(tmp_path, lite0, settings):
    for category in ("aa", "bb"):
        small_mvtec.write(tmp_path / "data", category, "brick", train=3)
    shutil.rmtree(tmp_path / "data/aa/ground_truth")
    settings = settings._replace(data=str(tmp_path / "data"))
    found = evaluation.run(settings, ["aa", "bb", "aa"], lite0, tmp_path / "out")
    assert [row.category for row in found] == ["aa", "bb"]
    assert found[0].pixel_auroc is None and found[0].aupro is None
    assert found[1].aupro is not None and 0 <= found[0].image_auroc <= 1
    assert evaluation.read_results(tmp_path / "out/results.csv") == found
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    report = evaluation.report(found)
    assert len(cells(report, "aa ")) and "nan" not in report
    assert f"{100 * found[0].image_auroc:.1f}" in report


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("test/stain/*", "category part has no defective image in .*part.test"),
        (
            "train/good/00[1-9].png",
            "category part has 1 training image in .*part.train",
        ),
    ],
)
def test_invalid_data_are_refused_before_the_run(tmp_path, settings, pattern, message):
    small_mvtec.write(tmp_path, "part", "brick", train=3)
    for path in (tmp_path / "part").glob(pattern):
        path.unlink()
    shutil.rmtree(tmp_path / "part/ground_truth")
    with refuses(message):
        evaluation.load_splits(settings._replace(data=str(tmp_path)), "part")


def test_tables_of_the_last_version_are_read(tmp_path, settings):
    path = tmp_path / "results.csv"
    evaluation.write_results(path, [result("bottle", settings)])
    with open(path, newline="") as file:
        rows = [
            [row[name] for name in row if name not in ("bits", "files")]
            for row in csv.DictReader(file)
        ]
        names = [n for n in evaluation._COLUMNS if n not in ("bits", "files")]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    assert evaluation.read_results(path) == [result("bottle", settings)]


def test_results_come_back_as_they_were_written(tmp_path, settings, monkeypatch):
    path = tmp_path / "results.csv"
    assert evaluation.read_results(path) == []
    odd = settings._replace(data='/a, "b"\nc', dimensions=None)
    written = [
        result("bottle", settings, 1 / 3),
        result("ça,rpet", odd, 0.1 + 0.2, fit_seconds=1e-17),
    ]
    evaluation.write_results(path, written)
    assert evaluation.read_results(path) == written
    before = path.read_bytes()
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("no space"))
    )
    with pytest.raises(OSError, match="no space"):
        evaluation.write_results(path, written[:1])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "a,b\n1,2\n",
        lambda text: text.replace("0.5", "half"),
        lambda text: text.rsplit(",", 3)[0] + "\n",
        lambda text: text.replace("\n", ",x\n"),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path, settings, damage):
    path = tmp_path / "results.csv"
    evaluation.write_results(path, [result("bottle", settings)])
    path.write_text(damage(path.read_text()))
    message = r"results.csv is not a table of results .* move it away"
    with refuses(message, UnusableFile):
        evaluation.read_results(path)


def test_the_printed_means_of_the_paper_follow_from_its_rows():
    """The averages of Table III; the last digit may differ by rounding."""
    for model, rows in PAPER["table_III"].items():
        assert set(rows) == {*GROUPS["all"], *GROUPS}
        for group, members in GROUPS.items():
            for column in (0, 1):
                mean = statistics.fmean(rows[name][column] for name in members)
                assert abs(mean - rows[group][column]) < 0.11, (model, group)
    for model, rows in PAPER["table_V"].items():
        mean = (5 * rows["all_texture"] + 10 * rows["all_object"]) / 15
        assert abs(mean - rows["all"]) < 0.2, model
    (rows,) = PAPER["table_VI"].values()
    for column in (0, 1):
        mean = (5 * rows["all_texture"][column] + 10 * rows["all_object"][column]) / 15
        assert abs(mean - rows["all"][column]) < 0.2
    assert "arXiv:2011.08785v1" in PAPER["source"]


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split("  ")


def test_the_report_stands_beside_the_papers_tables(settings):
    results = [
        result(name, settings, 0.9 + 0.001 * n) for n, name in enumerate(GROUPS["all"])
    ]
    text = evaluation.report(results)
    title = text.splitlines()[0]
    assert title == "efficientnet_lite0, 20 dimensions, seed 3, centred crops; in %"
    assert max(map(len, text.splitlines())) <= 120
    heading = text.splitlines()[1].split("  ")
    columns = [h.strip() for h in heading if h.strip()]
    assert columns == [
        "category",
        "test",
        "AUROC",
        "pixel",
        "PRO",
        "WR50-Rd550 (V)",
        "EfficientNet-B5 (V)",
        "R18-Rd100 (III)",
        "WR50-Rd550 (III)",
    ]
    assert [c.strip() for c in cells(text, "bottle ") if c.strip()] == [
        "6",
        "90.5",
        "90.5",
        "90.5",
        "98.1 / 93.9",
        "98.3 / 94.8",
    ]
    found = [c.strip() for c in cells(text, "all_texture (5 of 5)") if c.strip()]
    assert found == [
        "30",
        "90.2",
        "90.2",
        "90.2",
        "98.8",
        "99.0",
        "95.6 / 91.3",
        "96.9 / 93.2",
    ]
    found = [c.strip() for c in cells(text, "all (15 of 15)") if c.strip()]
    assert found == [
        "90",
        "90.7",
        "90.7",
        "90.7",
        "95.3",
        "97.9",
        "96.7 / 90.1",
        "97.5 / 92.1",
    ]


def test_the_papers_mean_stands_only_beside_a_complete_one(settings):
    text = evaluation.report([result("carpet", settings), result("my own", settings)])
    assert [c.strip() for c in cells(text, "all_texture (1 of 5)") if c.strip()] == [
        "6",
        "50.0",
        "50.0",
        "50.0",
    ]
    assert [c.strip() for c in cells(text, "my own") if c.strip()] == [
        "6",
        "50.0",
        "50.0",
        "50.0",
    ]
    assert "all_object" not in text
    assert [c.strip() for c in cells(text, "mean of 2") if c.strip()] == [
        *("12", "50.0", "50.0", "50.0")
    ]
    twice = [result("carpet", settings), result("carpet", settings)]
    assert evaluation.report(twice) == evaluation.report(twice[:1])
    alone = evaluation.report([result("my own", settings)])
    source = "from Defard, Setkov, Loesch, Audigier: PaDiM, arXiv:2011.08785v1"
    assert alone.splitlines()[-1] == source
    with refuses("no result"):
        evaluation.report([])


def test_the_random_variant_stands_beside_table_vi(settings):
    rows = [
        result(name, settings._replace(variant="random", dimensions=None))
        for name in GROUPS["all"]
    ]
    text = evaluation.report(rows)
    assert "all channels" in text
    assert "Rd-MVTec AD" in text
    assert "Table VI" in text
    assert "Table III" not in text
    assert [c.strip() for c in cells(text, "all (15 of 15)") if c.strip()][
        -1
    ] == "92.2 / 73.1"
    assert [c.strip() for c in cells(text, "carpet") if c.strip()] == [
        "6",
        "50.0",
        "50.0",
        "50.0",
    ]
