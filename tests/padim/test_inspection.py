import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_parts
import torch
from bs4 import BeautifulSoup
from PIL import Image
from torch import nn

from paperlib import backbones
from paperlib.anomaly_map import Box, Detection
from paperlib.backbones import Transform
from paperlib.datasets import TensorItems, batches, textures
from paperlib.padim import PaDiM, report
from paperlib.padim.inspection import find_images, strongest_region
from paperlib.validation import NotFitted, UnusableFile

ROOT = Path(__file__).resolve().parents[2]


class Brightness(nn.Module):
    """A detector whose anomaly map is the prepared image: what is white is a defect."""

    count = 2

    def __init__(self, size=64, crop=None, threshold=0.5):
        super().__init__()
        self.transform = Transform(size, (0, 0, 0), (1, 1, 1), crop)
        self.size, self.threshold = (crop or size,) * 2, threshold

    def prepare(self, images):
        return self.transform(images)

    def forward(self, images):
        return Detection(images.amax((1, 2, 3)), images[:, 0])

    inspect = PaDiM.inspect

    def _check_fitted(self):
        pass


def image_with(box, size, value=255):
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box.top : box.bottom, box.left : box.right] = value
    return Image.fromarray(pixels)


# ---- regions ----


@pytest.mark.parametrize("crop", [None, 48])
@pytest.mark.parametrize("size", [(192, 384), (640, 128), (64, 64), (40, 50)])
def test_regions_are_in_pixels_of_the_original_image(size, crop):
    """Within the pixels of the original that one pixel of the map stands for."""
    height, width = size
    true = Box(height // 4, width // 2, height // 2, width * 3 // 4)
    (result,) = Brightness(crop=crop).inspect(image_with(true, size))
    one_pixel = [height / 64, width / 64] * 2
    distance = np.abs(np.subtract(result.region, true))
    assert (distance <= np.ceil(one_pixel)).all(), (result.region, true)
    assert result.alarm and result.score > 0.9


def test_a_region_covers_the_pixels_of_its_map():
    """Rows 10/3 to 20/3 and columns 7/3 to 14/3, rounded outwards."""

    class Peak(Brightness):
        def forward(self, images):
            maps = torch.zeros(len(images), 3, 3)
            maps[:, 1, 1] = 1
            return Detection(maps.amax((1, 2)), maps)

    (result,) = Peak(3).inspect(Image.new("RGB", (7, 10)))
    assert result.region == (3, 2, 7, 5)


def test_a_region_at_the_border_ends_with_the_image():
    (result,) = Brightness(48).inspect(image_with(Box(0, 60, 31, 101), (31, 101)))
    assert result.region[0] == 0 and result.region[2:] == (31, 101)


def test_regions_of_a_turned_file_are_those_that_viewers_show(tmp_path):
    true = Box(20, 60, 60, 180)
    image = image_with(true, (160, 240))
    image.save(tmp_path / "flat.png")
    exif = Image.Exif()
    exif[274] = 6  # turn by 90° clockwise to show it
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    flat, turned = Brightness(80).inspect(
        [tmp_path / "flat.png", tmp_path / "turned.png"]
    )
    assert flat.region == turned.region == true


def test_items_that_are_cropped_already_are_the_original():
    detector = Brightness(64, crop=48)
    images = torch.zeros(1, 48, 48, 3, dtype=torch.uint8)
    images[0, 5:9, 7:20] = 255
    (result,) = detector.inspect(TensorItems(images))
    assert result.region == (5, 7, 9, 20)


def test_the_strongest_region_surrounds_the_maximum():
    values = np.zeros((8, 9))
    values[0:5, 0:2] = 6.0  # larger, and weaker
    values[2, 4] = values[3, 5] = 9.0  # touch at a corner
    values[4, 6] = 5.0
    assert strongest_region(values, 5.0) == Box(2, 4, 4, 6)
    # Nothing is above: 7.7, the middle between the mean of what is above 0, and 9.
    assert strongest_region(values, 9.0) == Box(2, 4, 4, 6)
    values[1, 4] = 7.6
    assert strongest_region(values, 9.0) == Box(2, 4, 4, 6)
    values[1, 4] = 8.5
    assert strongest_region(values, 9.0) == Box(1, 4, 4, 6)
    assert strongest_region(np.zeros((3, 4)), 2.0) == Box(0, 0, 1, 1)
    assert strongest_region(np.ones((3, 4)), 2.0) == Box(0, 0, 1, 1)


def test_an_alarm_is_a_score_above_the_threshold():
    levels = [100, 101, 102]
    images = [image_with(Box(0, 0, 64, 64), (64, 64), level) for level in levels]
    threshold = float(Brightness()(Brightness().prepare(images[1])).scores)
    results = Brightness(threshold=threshold).inspect(images, batch_size=2)
    assert [result.alarm for result in results] == [False, False, True]
    assert [result.path for result in results] == ["image 0", "image 1", "image 2"]


# ---- what is accepted ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_parts.write(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def parts(folders):
    return folders[1]


@pytest.fixture(scope="module")
def detector(folders):
    backbone = backbones.load("efficientnet_lite0")
    transform = replace(backbone.transform, bits=12)
    detector = PaDiM(backbone.extractor(), transform=transform)
    images = detector.prepare(find_images(folders[:1])).split(8)
    detector.fit(images).normal_threshold(images, fitted=True)
    return detector


def test_defects_are_found_where_they_are(detector, parts):
    results = detector.inspect(parts, batch_size=3)
    assert [result.path for result in results] == list(map(str, find_images([parts])))
    defective = {str(path) for path in parts.rglob("tüv [23]*")}
    assert {result.path for result in results if result.alarm} == defective
    maximum = detector.score(detector.prepare(results[0].path))
    assert results[0].score == pytest.approx(float(maximum), rel=1e-5)
    for result in results:
        if result.alarm:
            with Image.open(result.path) as image:
                rows, columns = small_parts.defect(*image.size[::-1])
            top, left, bottom, right = result.region
            overlap = (min(bottom, rows.stop) - max(top, rows.start)) * (
                min(right, columns.stop) - max(left, columns.start)
            )
            assert overlap > 0.5 * (rows.stop - rows.start) * (
                columns.stop - columns.start
            )


def test_every_form_of_image_is_inspected_alike(parts):
    detector = Brightness()
    path = sorted(parts.rglob("*.png"))[0]
    with Image.open(path) as image:
        array = np.array(image.convert("RGB"))
    expected = detector.inspect(path)[0][1:]
    item = TensorItems(torch.from_numpy(array)[None])
    for images in (str(path), Image.fromarray(array), [array], array[None], item):
        assert detector.inspect(images)[0][1:] == expected
    (batch,) = batches(item)
    result = detector.inspect(batch)
    assert result[0][1:] == expected and result[0].path == "image 0"
    assert [x[1:] for x in detector.inspect([path, array, item[0]])] == [expected] * 3
    assert detector.inspect([]) == []
    with pytest.raises(ValueError, match="images\\[None\\]"):
        detector.inspect(array)


def test_unreadable_files_are_results_with_a_reason(parts, tmp_path):
    (tmp_path / "empty.png").touch()
    paths = [
        tmp_path / "empty.png",
        tmp_path / "absent.png",
        next(parts.rglob("*.png")),
    ]
    empty, absent, whole = Brightness().inspect(paths, batch_size=2)
    assert empty[:4] == (str(paths[0]), None, None, None)
    assert "cannot identify image file" in empty.error and "No such" in absent.error
    assert whole.error == "" and whole.score > 0
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no image in"):
        Brightness().inspect(tmp_path / "none")


def test_an_unusable_detector_says_what_is_missing(detector, parts):
    with pytest.raises(NotFitted):
        PaDiM(detector.extractor).inspect(parts)
    extractor = backbones.FeatureExtractor(detector.extractor.model, ["blocks.1"])
    images = torch.randn(3, 3, 64, 64)
    other = PaDiM(extractor, 5).fit([images])
    with pytest.raises(ValueError, match="normal_threshold"):
        other.inspect(parts)
    other.normal_threshold([images], fitted=True)
    with pytest.raises(ValueError, match="transform=…"):
        other.inspect(parts)


def test_files_are_found_once_and_not_in_the_report(tmp_path):
    for name in ("10.png", "9.png", "report/x.png", "b/1.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = find_images([tmp_path, tmp_path / "9.png"], without=tmp_path / "report")
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == ["9.png", "10.png", "b/1.jpg"]
    assert find_images([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    for source in ("absent", "report"):
        with pytest.raises(ValueError, match=source):
            find_images([tmp_path / source], without=tmp_path / "report")


def test_the_versions_are_stored(detector, tmp_path):
    from safetensors import safe_open

    detector.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["paperlib"])
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"].keys() == {"paperlib", "torch", "torchvision", "timm"}
    assert about["backbone"] == "efficientnet_lite0" and about["threshold"] > 0


# ---- the report ----


def inspect_files(parts, out, **options):
    options = {"batch_size": 2} | options
    return report.inspect_files(Brightness(), find_images([parts]), out, **options)


def table(out):
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_one_row_per_image(parts, tmp_path):
    (tmp_path / 'broken, "1".png').write_bytes(b"no image")
    paths = [*find_images([parts]), tmp_path / 'broken, "1".png']
    results = report.inspect_files(Brightness(), paths, tmp_path / "out")
    rows = table(tmp_path / "out")
    assert [*rows[0]][:3] == ["path", "score", "alarm"]
    assert [row["path"] for row in rows] == [*map(str, paths)]
    for row, result in zip(rows[:-1], results[:-1], strict=True):
        assert float(row["score"]) == result.score
        assert row["alarm"] == ("true" if result.alarm else "false")
        top, left, bottom, right = result.region
        sides = [top, left, bottom - top, right - left]
        assert [int(row[name]) for name in ("top", "left", "height", "width")] == sides
    assert rows[-1]["score"] == rows[-1]["alarm"] == rows[-1]["top"] == ""
    assert "cannot identify" in rows[-1]["error"]
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["threshold"] == 0.5 and len(written["images"]) == 9
    assert written["images"][-1]["score"] is written["images"][-1]["alarm"] is None
    assert written["images"][0]["score"] == results[0].score
    assert report.summary(results).endswith("1 can't be read")


def test_overlays_have_the_size_of_the_original(parts, tmp_path):
    inspect_files(parts, tmp_path)
    overlays = sorted((tmp_path / "overlays").iterdir())
    assert len(overlays) == 8  # the names in both folders are the same
    sizes = sorted(Image.open(path).size for path in find_images([parts]))
    assert sorted(Image.open(path).size for path in overlays) == sizes


def test_an_overlay_outlines_what_exceeds_the_threshold():
    image = Image.new("RGB", (512, 256), "grey")
    values = np.full((64, 64), 4.0)
    values[16:32, 16:32] = 10.4
    values[20:28, 20:28] = 16.0
    drawn = np.asarray(report.overlay(image, values, 10.0, (64, 64))).astype(int)
    is_white = (drawn > 250).all(-1)
    rows, columns = is_white.any(1).nonzero()[0], is_white.any(0).nonzero()[0]
    # 16 of 64 rows and columns from the 16th on, in 256 rows and 512 columns.
    edges = [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]
    assert np.abs(np.subtract(edges, [64, 128, 128, 256])).max() <= 4
    assert (drawn[:32] == 128).all()  # below half of the threshold nothing is drawn
    assert drawn[96, 192, 1] > 150 > drawn[96, 192, 2]  # yellow inside
    below = report.overlay(image, np.minimum(values, 9.99), 10.0, (64, 64))
    assert not (np.asarray(below) > 250).all(-1).any()
    # A crop of the resized image: the map lies in its centre.
    cropped = np.asarray(report.overlay(image, values, 10.0, (128, 128)))
    rows = (cropped > 250).all(-1).any(1).nonzero()[0]
    assert abs(rows[0] - 96) <= 2 and abs(rows[-1] + 1 - 128) <= 2


def test_an_alarm_is_outlined_however_small_it_is():
    values = np.full((64, 64), 1.0)
    values[30, 30] = 10.01
    image = Image.new("RGB", (40, 40), "grey")
    arguments = (image, values, 10.0, (64, 64))
    assert not (np.asarray(report.overlay(*arguments)) > 250).all(-1).any()
    drawn = np.asarray(report.overlay(*arguments, Box(18, 18, 20, 20)))
    is_white = (drawn > 250).all(-1)
    assert is_white[18:20, 18:20].all() and is_white.sum() == 4


def test_the_gallery_works_alone(parts, tmp_path):
    (tmp_path / "broken <b>.png").write_bytes(b"no image")
    paths = [tmp_path / "broken <b>.png", *find_images([parts])]
    results = report.inspect_files(Brightness(), paths, tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|\bsrc=(?!\"data:image/jpeg;base64,)", text)
    page = BeautifulSoup(text, "html.parser")
    assert len(page("img")) == 16 and all(image["alt"].strip() for image in page("img"))
    assert all((tmp_path / "out" / unquoted(a["href"])).is_file() for a in page("a"))
    assert len(page("b")) == 0  # a name is no markup
    items = page.ul("li", recursive=False)
    first = items[0].get_text(" ")
    assert "broken <b>.png" in first and "Can't be read : cannot identify" in first
    scores = [result.score for result in results[1:]]
    in_order = [float(item["data-score"]) for item in items[1:]]
    assert in_order == sorted(scores, reverse=True)
    kinds = ["alarm" if score > 0.5 else "normal" for score in in_order]
    assert [item["class"] for item in items] == [["unreadable"], *([k] for k in kinds)]
    assert "No alarm, score" in items[-1].get_text() or kinds[-1] == "alarm"
    form = page.form
    assert form.has_attr("hidden") and len(form("label")) == len(form("select")) == 2


def unquoted(link):
    from urllib.parse import unquote

    return unquote(link)


def test_without_pictures_there_are_tables_only(parts, tmp_path):
    inspect_files(parts, tmp_path, pictures=False)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["results.csv", "results.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_inspected(tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff part.png"))
    image_with(Box(0, 0, 9, 9), (32, 32)).save(path)
    for reused in (0, 1):
        results = report.inspect_files(Brightness(), [path], tmp_path / "out")
        assert results[0].path == str(path) and results[0].alarm, reused
    assert len((tmp_path / "out/index.html").read_text(encoding="utf-8")) > 1000


# ---- resuming ----


def stop_after(monkeypatch, n_batches):
    """Interrupt the run when the pictures of a batch are about to be written."""
    inspected = report.inspect_batches

    def interrupted(*arguments):
        for number, batch in enumerate(inspected(*arguments)):
            if number == n_batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(report, "inspect_batches", interrupted)


def outputs(out):
    """All files that a run wrote, without times."""
    return {
        path.relative_to(out): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(
    parts, tmp_path, monkeypatch, capsys
):
    inspect_files(parts, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            inspect_files(parts, tmp_path / "out")
    assert len(table(tmp_path / "out")) == 6
    with (tmp_path / "out/results.csv").open("a", encoding="utf-8") as file:
        file.write("a row that was cut o")
    read = []
    monkeypatch.setattr(
        Brightness, "prepare", lambda self, x: read.append(x) or self.transform(x)
    )
    inspect_files(parts, tmp_path / "out")
    assert len(read) == 2
    assert "6 of 8 rows reused from" in capsys.readouterr().err
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")


def test_a_row_is_reused_only_if_nothing_changed(parts, tmp_path, capsys):
    copy = tmp_path / "parts"
    copy.mkdir()
    for number in range(3):
        image_with(Box(0, 0, 9, 9), (32, 32)).save(copy / f"{number}.png")
    (copy / "broken.png").touch()
    out = tmp_path / "out"

    def n_reused(**options):
        inspect_files(copy, out, **options)
        found = re.match(r"(\d+) of 4", capsys.readouterr().err)
        return int(found[1]) if found else 0

    assert [n_reused(), n_reused()] == [0, 3]  # the unreadable one is tried again
    time.sleep(0.01)
    image_with(Box(0, 0, 9, 9), (32, 32)).save(copy / "1.png")
    next((out / "overlays").glob("2-*")).unlink()
    assert [n_reused(), n_reused()] == [1, 3]
    assert [n_reused(model="b"), n_reused(model="b", fresh=True)] == [0, 0]
    (copy / "2.png").unlink()
    inspect_files(copy, out)
    assert len(table(out)) == 3  # rows of other files are removed


def test_another_table_is_not_overwritten(parts, tmp_path):
    text = "category,threshold\ntile,3.5\n"
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UnusableFile, match="results.csv is not a table of inspections"):
        inspect_files(parts, tmp_path)
    assert (tmp_path / "results.csv").read_text() == text


@pytest.mark.long
def test_a_killed_run_resumes(detector, tmp_path):
    """SIGKILL, at several moments of a run of the command line."""
    for number, item in enumerate(textures("gravel", "test", count=60)):
        small_parts.save(item.image, tmp_path / "images", number, 0)
    detector.save(tmp_path / "m.safetensors")

    def start(out):
        options = ["--out", str(tmp_path / out), "--batch-size", "2"]
        command = [sys.executable, "-m", "paperlib", "inspect", "m.safetensors"]
        return subprocess.Popen(
            [*command, "images", *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )

    assert start("whole").wait() == 0
    n_before = 0
    for n in (1, 9, 21, 33):
        process = start("out")
        while n_before < 60 and process.poll() is None:
            rows = tmp_path / "out/results.csv"
            if rows.exists() and len(rows.read_text().splitlines()) > n + 1:
                break
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        whole = [row for row in table(tmp_path / "out") if row["fingerprint"]]
        assert all(row["alarm"] in ("true", "false") for row in whole)
        assert len(whole) >= n_before
        n_before = len(whole)
    assert start("out").wait() == 0
    expected, found = (table(tmp_path / out) for out in ("whole", "out"))
    assert [row["path"] for row in found] == [row["path"] for row in expected]
    for a, b in zip(found, expected, strict=True):
        assert float(a["score"]) == pytest.approx(float(b["score"]), rel=1e-4)
