"""What the notebooks share: results of long runs, the slider and two drawings."""

import base64
import io
import json
import re

import companion
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from paperlib import viz


def make(values=(1, 2, 3)):
    return companion.Slider(
        lambda ax, a, b: ax.bar([0], [a * b]),
        {"first": list(values), "second": [10, 25]},
        lambda a, b: f"a bar of <height> {a * b}",
        figsize=(2, 1),
    )


def test_slider_holds_one_frame_for_each_combination_in_order():
    slider = make()
    assert slider.texts == [
        f"a bar of <height> {a * b}" for a in (1, 2, 3) for b in (10, 25)
    ]
    assert len(set(slider.frames)) == 6
    picture = Image.open(
        io.BytesIO(base64.b64decode(slider.frames[0].split(",", 1)[1]))
    )
    assert picture.size == (160, 80)
    assert not plt.get_fignums()  # no figure stays open


def test_slider_frames_are_light_and_photographs_become_jpeg():
    noise = np.random.default_rng(0).random((200, 200, 3))
    frames = companion.Slider(
        lambda ax, photo: (
            ax.imshow(noise) if photo else ax.plot([1, 2], color=viz.BLUE)
        ),
        {"photo": [False, True]},
        str,
        figsize=(4, 3),
    ).frames
    assert [frame.split(";")[0] for frame in frames] == [
        "data:image/png",
        "data:image/jpeg",
    ]
    plot, photo = (
        Image.open(io.BytesIO(base64.b64decode(frame.split(",", 1)[1]))).convert("RGB")
        for frame in frames
    )
    assert plot.size == photo.size == (320, 240)
    assert len(frames[0]) < 8000
    blue = tuple(int(viz.BLUE[i : i + 2], 16) for i in (1, 3, 5))
    assert (
        min(
            sum(abs(a - b) for a, b in zip(blue, colour, strict=True))
            for _, colour in plot.getcolors(4096)
        )
        < 12
    )


def test_slider_is_one_offline_fragment_with_alt_text_and_a_stable_id():
    page = make()._repr_html_()
    assert page == make()._repr_html_()
    assert page != make((1, 2, 4))._repr_html_()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    assert 'alt="a bar of &lt;height&gt; 10"' in page
    assert page.count('type="range"') == 2 and 'max="2"' in page and 'max="1"' in page
    data = json.loads(re.search(r"data=(\{.*?\});const", page)[1].replace("<\\/", "</"))
    assert (
        data["values"] == [["1", "2", "3"], ["10", "25"]] and len(data["frames"]) == 6
    )


def test_slider_refuses_no_values_and_too_many():
    with pytest.raises(ValueError, match="0 frames; expected 1 to 60"):
        make(())
    with pytest.raises(ValueError, match="80 frames"):
        make(range(40))


def test_cuboid_draws_its_visible_cells():
    _, ax = plt.subplots()
    right, top = companion.cuboid(ax, (1, 2), (3, 4, 5), viz.BLUE, cell=2)
    assert len(ax.patches) == 3 * 4 + 3 * 5 + 4 * 5
    assert right == pytest.approx(1 + 2 * (3 + 0.45 * 5)) and top == pytest.approx(
        2 + 2 * (4 + 0.45 * 5)
    )
    assert max(patch.get_xy()[:, 0].max() for patch in ax.patches) == pytest.approx(
        right
    )
    plt.close()


def test_log_ticks_are_plain_numbers():
    fig, ax = plt.subplots()
    ax.plot([1, 1000], [1, 2])
    ax.set_xscale("log")
    companion.log_ticks(ax.xaxis, [2, 50, 600])
    fig.canvas.draw()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "50", "600"]
    assert not ax.get_xticklabels(minor=True)
    plt.close()


def test_results_are_stamped():
    measured = companion.read_result("mobilenet_cells")
    assert set(measured["stamp"]) == {"code", "versions", "device", "date", "recipe"}
    seeds = {row["seed"] for row in measured["runs"]}
    models = {row["model"] for row in measured["runs"]}
    assert len(seeds) >= 5 and len(measured["runs"]) == len(seeds) * len(models)
    assert all(
        0.5 < row["accuracy"] <= 1 and 0.5 < row["auroc"] <= 1
        for row in measured["runs"]
    )


def test_an_unknown_result_names_those_there_are():
    with pytest.raises(
        ValueError,
        match=(
            "no result 'absent.json'; there are: .*mobilenet_cells.json.*make results"
        ),
    ):
        companion.read_result("absent")
