"""The page on speed: its tables agree with the stored measurements."""

import json
import re
import sys

import pytest
from built import ROOT

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import speed_page  # noqa: E402

SPEED = json.loads((ROOT / "book" / "data" / "speed.json").read_text(encoding="utf-8"))


def row(contender: str, **values) -> dict:
    defaults = {
        "bench": "padim",
        "part": "fit",
        "what": "PaDiM, fit 64 images",
        "images": 64,
        "contender": contender,
        "turns": 3,
        "wall": 2.0,
        "wall_low": 1.5,
        "wall_high": 4.0,
        "cpu": 0.64,
        "ratio": 1.0,
        "ratio_low": 0.9,
        "ratio_high": 1.2,
        "difference": 0.0,
        "macs": 10**8,
        "bytes": 10**6,
        "peak": 12.34,
        "note": "",
    }
    return defaults | values


MACHINE = {"macs_per_second": 2e9, "bytes_per_second": 1e9}
ROWS = [
    row("paperlib"),
    row(speed_page.COMMON, ratio=4.25, ratio_low=4, ratio_high=5, difference=2.2e-7),
    row("anomalib", ratio=6.0, note="blurs otherwise"),
    row(
        "the backbone alone",
        ratio=0.5,
        difference=None,
        note="preceding step, no peer",
    ),
]


def test_the_summary_names_the_fastest_peer_and_no_other_rows():
    text = speed_page.summary([*ROWS, row("other", ratio=7.5)])
    assert (
        "| PaDiM, fit 64 images | 4.25× (4 to 5) | 6× (0.9 to 1.2), anomalib |" in text
    )


def test_the_lead_counts_what_the_ratios_say():
    rows = [
        *ROWS,
        row("paperlib", part="score", what="score"),
        row("captum", part="score", ratio=0.8, ratio_low=0.7, ratio_high=0.9),
        row("paperlib", part="map", what="map"),
        row(speed_page.COMMON, part="map", ratio=2.25),
        row("torchcam", part="map", ratio=1.0, ratio_low=0.9, ratio_high=1.1),
    ]
    rows[2] = row("anomalib", ratio=6.0, ratio_low=5, ratio_high=7)
    text = speed_page.lead(rows)
    assert "in 2 of 2 tasks; at the median the common implementation takes 3.25" in text
    assert "faster in 1 of 3 tasks, about equal in 1 and slower in 1 (captum)" in text
    assert "that library takes 1 times" in text
    assert "score: captum 0.8;" in speed_page.describe_ratios(rows)


def test_the_page_states_when_paperlib_counts_as_faster():
    page = (ROOT / "book" / "speed.md").read_text(encoding="utf-8")
    assert "the other library takes more than 1.1 times as long in every turn" in page
    for low, count in ((1.09, "faster in 0 of 1"), (1.11, "faster in 1 of 1")):
        rows = [row("paperlib"), row(speed_page.COMMON)]
        rows.append(row("other", ratio=2, ratio_low=low, ratio_high=3))
        assert count in speed_page.lead(rows)


def test_the_common_fit_is_faster_with_many_dimensions_as_the_page_says():
    page = (ROOT / "book" / "speed.md").read_text(encoding="utf-8")
    curves = {c["name"]: c["points"] for c in SPEED["curves"]["padim"]["curves"]}
    points = curves["padim_dimensions_seconds"]
    ours, common = (dict(points[name]) for name in ("paperlib", speed_page.COMMON))
    assert "at d = 200\nthe common fit is a little faster" in page
    assert 0.8 < common[200] / ours[200] < 1 < common[100] / ours[100]


def test_tables_contain_floor_spread_notes_and_a_gpu_column():
    text = speed_page.tables(ROWS, MACHINE, None)
    assert "Floor: 50 ms." in text and "anomalib: blurs otherwise" in text
    assert (
        f"| {speed_page.COMMON} | 640 | 1,500 to 4,000 | 4.25 (4 to 5) | 12.3 | 2e-07"
        " |\n" in text
    )
    backbone = "| the backbone alone | 640 | 1,500 to 4,000 | 0.5 (0.9 to 1.2) | 12.3"
    assert f"{backbone} | – |" in text
    assert "GPU" not in text
    gpu = {"rows": [row("paperlib", wall=0.0123)]}
    with_gpu = speed_page.tables(ROWS, MACHINE, gpu)
    assert f"| 12.3 |\n| {speed_page.COMMON}" in with_gpu
    assert "| relative difference | GPU ms |" in with_gpu
    assert with_gpu.count("| – |\n") == 3


def test_missing_peers_are_named():
    stamp = SPEED["stamp"] | {"missing": {"anomalib": "not installed (no module)"}}
    assert "Missing: anomalib, not installed (no module)." in speed_page.where(stamp)


def test_curves_are_drawn_and_described(tmp_path):
    (tmp_path / "book" / "data").mkdir(parents=True)
    curve = {
        "name": "a",
        "x": "images",
        "y": "seconds to fit",
        "points": {"paperlib": [[1, 0.5], [4, 2.25]]},
    }
    data = SPEED | {"curves": {"padim": {"stamp": SPEED["stamp"], "curves": [curve]}}}
    (tmp_path / "book" / "data" / "speed.json").write_text(
        json.dumps(data), encoding="utf-8"
    )
    speed_page.write_parts(tmp_path)
    folder = tmp_path / speed_page.FOLDER
    alt = ":alt: seconds to fit against images: paperlib from 0.5 at 1 to 2.25 at 4\n"
    written = (folder / "curves.txt").read_text(encoding="utf-8")
    assert alt in written and "\nPaDiM: seconds to fit against images.\n" in written
    svg = (folder / "a.svg").read_bytes()
    (folder / "left.over").touch()
    (folder / "a.json").unlink()
    speed_page.write_parts(tmp_path)
    assert (folder / "a.svg").read_bytes() == svg
    assert not (folder / "left.over").exists()
    (tmp_path / "book" / "data" / "speed.json").unlink()
    with pytest.raises(
        ValueError, match=r"book/data/speed.json is missing; run `make bench`"
    ):
        speed_page.write_parts(tmp_path)


def test_the_committed_measurements_are_complete():
    assert {row["bench"] for row in SPEED["rows"]} == set(speed_page.TITLES)
    for part in speed_page.parts(SPEED["rows"]).values():
        assert part[0]["contender"] == "paperlib" and part[0]["ratio"] == 1
        peers = [row for row in part if speed_page.is_peer(row)]
        slower = [row["contender"] for row in peers if row["ratio_high"] < 1]
        assert not slower or part[0]["note"], (
            f"{part[0]['what']}: {slower} are faster, and no note says why"
        )
        assert all(
            row["difference"] < 1e-2 for row in part if row["difference"] is not None
        )


def test_the_cost_of_a_million_images_follows_from_the_measured_rates():
    text = speed_page.million(SPEED["rows"])
    assert "| its Gaussians | 122 MiB | – |" in text
    assert re.search(r"embedding \| – \| 815 GiB \|", text)
    # The 57² patches of one image are compared with those of a million images, at the
    # measured rate of bank × 3,249 distances.
    (search,) = (
        row
        for row in SPEED["rows"]
        if (row["part"], row["contender"]) == ("neighbours", "paperlib")
    )
    bank_sizes = {  # of the quick and the full run
        "nearest of 60,000 for 3,249": 60_000,
        "nearest of 200,000 for 3,249": 200_000,
    }
    (count,) = (
        size for start, size in bank_sizes.items() if search["what"].startswith(start)
    )
    expected = search["cpu"] * (1e6 * 3249 * 3249) / (count * 3249) / 3600
    row = r"searching that bank for one image \| – \| – \| ([\d.,]+) h"
    hours = float(re.search(row, text)[1].replace(",", ""))
    assert hours == pytest.approx(expected, rel=0.06)  # the page has two digits
