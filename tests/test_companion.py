"""What the notebooks share: results of long runs, the slider and the drawings."""

import base64
import io
import json
import re

import companion
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Ellipse, Rectangle
from PIL import Image
from refusals import refuses
from skimage import data

from paperlib import viz
from paperlib.anomaly_map import minmax, upsample


@pytest.fixture
def ax():
    yield plt.subplots()[1]
    plt.close("all")


@pytest.fixture
def figures():
    """Close what a drawing opens by itself."""
    yield
    plt.close("all")


def numbers_in(ax):
    """Map the position (row, column) of each text to the text."""
    return {text.get_position()[::-1]: text.get_text() for text in ax.texts}


def legend_of(artist):
    return [text.get_text() for text in artist.get_texts()]


def make(values=(1, 2, 3)):
    return companion.Slider(
        lambda ax, a, b: ax.bar([0], [a * b]),
        {"first": list(values), "second": [10, 25]},
        lambda a, b: f"a bar of <height> {a * b}",
        figsize=(2, 1),
    )


def decode(frame):
    return Image.open(io.BytesIO(base64.b64decode(frame.split(",", 1)[1])))


def test_slider_holds_one_frame_for_each_combination_in_order():
    slider = make()
    heights = [a * b for a in (1, 2, 3) for b in (10, 25)]
    assert slider.texts == [f"a bar of <height> {height}" for height in heights]
    assert len(set(slider.frames)) == 6
    assert decode(slider.frames[0]).size == (160, 80)
    assert not plt.get_fignums()  # no figure stays open


def test_slider_frames_are_light_and_photographs_become_jpeg():
    noise = np.random.default_rng(0).random((200, 200, 3))

    def draw(ax, photo):
        return ax.imshow(noise) if photo else ax.plot([1, 2], color=viz.BLUE)

    slider = companion.Slider(draw, {"photo": [False, True]}, str, figsize=(4, 3))
    kinds = [frame.split(";")[0] for frame in slider.frames]
    assert kinds == ["data:image/png", "data:image/jpeg"]
    plot, photo = map(decode, slider.frames)
    assert plot.size == photo.size == (320, 240)
    assert len(slider.frames[0]) < 8000
    blue = np.array([int(viz.BLUE[i : i + 2], 16) for i in (1, 3, 5)])
    colours = np.array([colour for _, colour in plot.convert("RGB").getcolors(4096)])
    assert abs(colours - blue).sum(1).min() < 12


def test_slider_is_one_offline_fragment_with_alt_text_and_a_stable_id():
    page = make()._repr_html_()
    assert page == make()._repr_html_()
    assert page != make((1, 2, 4))._repr_html_()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page
    assert 'alt="a bar of &lt;height&gt; 10"' in page
    assert page.count('type="range"') == 2 and 'max="2"' in page and 'max="1"' in page
    data = json.loads(re.search(r"data=(\{.*?\});const", page)[1].replace("<\\/", "</"))
    assert data["values"] == [["1", "2", "3"], ["10", "25"]]
    assert len(data["frames"]) == 6


def test_slider_refuses_no_values_and_too_many():
    with refuses("0 frames; expected 1 to 60"):
        make(())
    with refuses("80 frames"):
        make(range(40))


def test_cuboid_draws_its_visible_cells(ax):
    right, top = companion.cuboid(ax, (1, 2), (3, 4, 5), viz.BLUE, cell=2)
    assert len(ax.patches) == 3 * 4 + 3 * 5 + 4 * 5
    assert right == pytest.approx(1 + 2 * (3 + 0.45 * 5))
    assert top == pytest.approx(2 + 2 * (4 + 0.45 * 5))
    corners = np.concatenate([patch.get_xy() for patch in ax.patches])
    assert corners.max(0) == pytest.approx([right, top])


def test_log_ticks_are_plain_numbers(ax):
    ax.plot([1, 1000], [1, 2])
    ax.set_xscale("log")
    companion.log_ticks(ax.xaxis, [2, 50, 600])
    ax.figure.canvas.draw()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2", "50", "600"]
    assert not ax.get_xticklabels(minor=True)


def test_results_are_stamped():
    measured = companion.read_result("mobilenet_cells")
    assert set(measured["stamp"]) == {"code", "versions", "device", "date", "recipe"}
    seeds = {row["seed"] for row in measured["runs"]}
    models = {row["model"] for row in measured["runs"]}
    assert len(seeds) >= 5 and len(measured["runs"]) == len(seeds) * len(models)
    for row in measured["runs"]:
        assert 0.5 < row["accuracy"] <= 1 and 0.5 < row["auroc"] <= 1


def test_an_unknown_result_names_those_there_are():
    message = "no result 'absent.json'; .*: .*mobilenet_cells.json.*make results"
    with refuses(message):
        companion.read_result("absent")


def test_a_signed_map_is_white_at_zero_over_the_brightness(ax):
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    activation = torch.tensor([[1.0, -3.0, 0.0], [2.0, 0.5, 0.0]])
    found = companion.draw_signed_map(ax, activation, rgb, "a title")
    assert found.get_clim() == (-3, 3)
    red, white, blue = found.cmap(found.norm([3, 0, -3]))[:, :3]
    assert red[0] > red[2] and blue[2] > blue[0] and white.min() > 0.95
    assert found.get_array().shape == (4, 6)
    background = ax.images[0].get_array()[..., 0]
    np.testing.assert_allclose(background, rgb.mean(2) / 255, atol=1e-6)
    assert ax.get_title() == "a title" and ax.images[1] is found
    companion.draw_signed_map(ax, activation, rgb / 255)  # floats
    again = ax.images[2].get_array()[..., 0]
    np.testing.assert_allclose(again, background, atol=1e-6)


def test_an_anomaly_map_has_the_given_limits_and_the_images_size(ax):
    image = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    found = companion.draw_map(ax, image, torch.ones(2, 3), (-1.0, 4.0), "a title")
    assert found.get_clim() == (-1, 4) and found.get_array().shape == (8, 12)
    np.testing.assert_allclose(ax.images[0].get_array()[..., 0], image)
    assert ax.get_title() == "a title" and ax.images[1] is found
    assert 0 < found.get_alpha() < 1  # the image shows through


def test_a_grid_has_a_number_in_each_square(ax):
    companion.draw_grid(ax, torch.tensor([[1.2, -2.0, 3.0]]), "a title", limit=5)
    assert numbers_in(ax) == {(0, 0): "1", (0, 1): "-2", (0, 2): "3"}
    assert ax.images[0].get_clim() == (-5, 5)
    assert ax.get_title() == "a title" and not ax.axison


def test_the_explanation_figure_has_the_two_classes_side_by_side(figures):
    image, maps = data.chelsea()[::4, ::4], torch.randn(2, 7, 7)
    guided = torch.randn(2, 3, *image.shape[:2])
    figure = companion.explanation_figure(
        image, maps, guided, guided * 2 - 1, ["cat", "cup"]
    )
    methods = [part.get_suptitle() for part in figure.subfigs]
    assert methods == [
        "heat map",
        "Guided Backpropagation",
        "overlay",
        "Guided Grad-CAM",
    ]
    pairs = np.reshape(figure.axes, (4, 2))  # the two classes side by side
    assert all([ax.get_title() for ax in pair] == ["cat", "cup"] for pair in pairs)
    for number in range(2):
        heat = viz.heatmap(minmax(upsample(maps[number], image.shape[:2])))
        expected = [
            heat,
            viz.gradient_image(guided[number]),
            viz.overlay(heat, image),
            viz.gradient_image(guided[number] * 2 - 1),
        ]
        for ax, wanted in zip(pairs[:, number], expected, strict=True):
            np.testing.assert_allclose(ax.images[0].get_array(), wanted, atol=1e-5)


def test_number_grids_stand_in_a_row_and_have_no_negative_zero(figures):
    grids = {"one": torch.tensor([[-0.0, 9.0]]), "two": torch.tensor([[-4, 7]])}
    companion.draw_number_grids(grids, (4, 2))
    one, two = plt.gcf().axes
    assert one.get_position().y0 == two.get_position().y0
    assert [one.get_title(), two.get_title()] == ["one", "two"]
    assert numbers_in(one) == {(0, 0): "0", (0, 1): "9"}
    assert numbers_in(two) == {(0, 0): "-4", (0, 1): "7"}
    assert one.images[0].get_clim() == two.images[0].get_clim() == (-9, 9)


def test_a_box_encloses_its_squares(ax):
    companion.draw_box(ax, (1, 2, 3, 5))
    (patch,) = ax.patches
    extents = patch.get_bbox()
    grid = [(y, x) for y in range(6) for x in range(6) if extents.contains(x, y)]
    assert grid == [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)]
    assert extents.extents.tolist() == [1.5, 0.5, 4.5, 2.5]


def test_error_curves_are_in_percent(ax):
    curves = {"mine": [50, 40, 60], "theirs": [70, 45, 80]}
    companion.draw_error_curves(ax, np.array([0.1, 0.2, 0.5]), curves, marked=[20])
    *lines, mark = ax.lines
    assert {line.get_label(): line.get_ydata().tolist() for line in lines} == curves
    assert all(np.allclose(line.get_xdata(), [10, 20, 50]) for line in lines)
    assert list(mark.get_xdata()) == [20, 20] and ax.texts[0].get_text() == "20"
    assert legend_of(ax.get_legend()) == list(curves)
    assert "%" in ax.get_xlabel() and "%" in ax.get_ylabel()
    assert ax.get_ylim() == (0, 100)


def test_a_call_is_timed_with_its_arguments(monkeypatch):
    clock, calls = [100.0], []

    def slow(a, b):
        calls.append((a, b))
        clock[0] += 2.5
        return a + b

    monkeypatch.setattr(companion.time, "perf_counter", lambda: clock[0])
    assert companion.call_and_time(slow, 3, 4) == (7, 2.5)
    assert calls == [(3, 4)]


def test_the_overview_of_padim_labels_its_layers(figures):
    shapes = [(2, 3, 8, 6), (2, 4, 4, 3), (2, 5, 2, 1)]
    companion.draw_padim_overview(torch.zeros(8, 6), [torch.zeros(s) for s in shapes])
    (ax,) = plt.gcf().axes
    texts = [text.get_text() for text in ax.texts]
    layers = [f"{c} channels of\n{h}×{w} positions" for _, c, h, w in shapes]
    assert set(layers) < set(texts) and "12 channels, of\nwhich 100 are kept" in texts
    # The ellipses lie one and two standard deviations from the mean.
    variances, axes = np.linalg.eigh([[2.0, 1.2], [1.2, 1.4]])
    angle = np.degrees(np.arctan(axes[1, 1] / axes[0, 1]))
    ellipses = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    for distance, ellipse in zip((1, 2), ellipses, strict=True):
        size = (ellipse.height / 2, ellipse.width / 2)
        assert size == pytest.approx(distance * np.sqrt(variances), rel=0.02)
        assert ellipse.angle == pytest.approx(angle, abs=1)
    (marked,) = (patch for patch in ax.patches if type(patch) is Rectangle)
    assert marked.get_bbox().extents.tolist() == [13, -17, 14, -16]


def test_reduction_curves_show_means_and_deviations(figures):
    runs = [
        (kind, method, dimensions, score, score / 2, score / 4)
        for kind in ("mono", "poly")
        for method, dimensions, scores in [
            ("random", 10, (0.5, 0.7)),
            ("random", 100, (0.8, 0.8)),
            ("PCA", 10, (0.6, 0.6)),
            ("least variance", 10, (0.4, 0.4)),
            ("all", 176, (0.9, 0.9)),
        ]
        for score in scores
    ]
    columns = ["kind", "method", "dimensions", "image", "pixel", "pro"]
    companion.draw_reduction_curves(pd.DataFrame(runs, columns=columns))
    figure = plt.gcf()
    panels = np.reshape(figure.axes, (3, 2))
    assert [ax.get_title() for ax in panels[0]] == ["mono", "poly"]
    for row, name, factor in zip(
        panels, ("image", "pixel", "PRO"), (1, 2, 4), strict=True
    ):
        assert name in row[0].get_ylabel() and row[1].get_ylabel() == ""
        for ax in row:
            random = ax.containers[0]
            assert random[0].get_ydata() == pytest.approx([60 / factor, 80 / factor])
            lower, upper = random[2][0].get_segments()[0][:, 1]
            spread = np.std([50, 70], ddof=1) / factor
            assert (upper - lower) / 2 == pytest.approx(spread)
            (line,) = (line for line in ax.lines if line.get_label() == "all 176")
            assert line.get_ydata() == pytest.approx([90 / factor] * 2)
    assert all(ax.get_xlabel() == "dimensions kept" for ax in panels[2])
    assert len(legend_of(figure.legends[0])) == 4
    # The error bars of three methods at the same dimensions do not cover each other.
    left, middle, right = (bars[0].get_xdata()[0] for bars in panels[0, 0].containers)
    assert left < middle < right


def test_costs_cross_where_both_methods_need_the_same_memory(figures):
    costs = pd.DataFrame(
        {"images": [50, 100], "fit, s": [1, 2], "factors, s": [3, 3]}
        | {"score, s": [4, 4], "search, s": [5, 10]}
        | {"PaDiM, MB": [8, 8], "k-NN, MB": [2, 4]}
    )
    companion.draw_costs(costs, gaussian_bytes=8_000_000, bytes_per_image=40_000)
    fit, score, memory = plt.gcf().axes
    assert [line.get_ydata().tolist() for line in fit.lines] == [[1, 2], [3, 3]]
    assert [line.get_ydata().tolist() for line in score.lines] == [[4, 4], [5, 10]]
    assert legend_of(score.get_legend()) == ["PaDiM", "nearest neighbours"]
    gaussians, measured, stored, measured_bank, crossing = memory.lines
    (images,) = set(crossing.get_xdata())
    at_crossing = np.interp(images, stored.get_xdata(), stored.get_ydata())
    assert images == 200 and at_crossing == gaussians.get_ydata()[0] == 8
    assert measured.get_ydata().tolist() == [8, 8]
    assert measured_bank.get_ydata().tolist() == [2, 4]
    assert fit.get_ylabel() == score.get_ylabel() == "seconds"
    assert memory.get_ylabel() == "megabytes"
    assert fit.get_ylim()[0] == memory.get_ylim()[0] == 0
    assert score.get_yscale() == "log"
