import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from refusals import refuses

from paperlib import viz
from paperlib.anomaly_map import upsample


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def inputs(rows=2):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(rows, 3, 12, 20, generator=generator)
    maps = torch.rand(rows, 3, 5, generator=generator) * 7 + 2
    masks = torch.rand(rows, 12, 20, generator=generator) > 0.7
    return images, maps, masks


def test_the_anomaly_figure_has_one_row_per_image_and_one_colour_scale():
    images, maps, masks = inputs()
    figure = viz.anomaly_figure(
        images,
        maps,
        masks,
        labels=["hole", "good"],
        scale="distance",
    )
    *axes, scale = figure.axes
    axes = np.reshape(axes, (2, 4))
    assert [ax.get_title() for ax in axes[0]] == [
        "image",
        "mask",
        "anomaly map",
        "overlay",
    ]
    assert not any(ax.get_title() for ax in axes[1])
    assert [row[0].get_ylabel() for row in axes] == ["hole", "good"]
    # The extremes of both rows.
    scaled = (
        (upsample(maps, (12, 20)) - maps.min()) / (maps.max() - maps.min())
    ).clamp(0, 1)
    for row in range(2):
        shown = [ax.images[0].get_array() for ax in axes[row]]
        heat = viz.heatmap(scaled[row])
        mask = np.repeat(masks[row, ..., None].numpy(), 3, -1)
        for found, wanted in zip(
            shown,
            [images[row].movedim(0, -1), mask, heat, viz.overlay(heat, images[row])],
            strict=True,
        ):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert scale.get_ylabel() == "distance"
    assert figure.get_figwidth() <= 6.4  # what a phone can show
    np.testing.assert_allclose(scale.get_ylim(), [maps.min(), maps.max()], rtol=1e-6)
    (bar,) = (
        mesh
        for mesh in scale.collections
        if hasattr(mesh, "cmap") and mesh.get_array() is not None
    )
    np.testing.assert_allclose(
        bar.cmap(np.array([0.0, 1.0]))[:, :3],
        viz.heatmap(torch.tensor([[0.0, 1.0]]))[0],
        atol=1e-6,
    )


def test_masks_are_optional():
    images, maps, _ = inputs()
    figure = viz.anomaly_figure(images.movedim(1, -1).numpy(), maps.numpy())
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["image", "anomaly map", "overlay", "", "", "", ""]


def test_constant_maps_are_drawn():
    images, maps, masks = inputs(1)
    figure = viz.anomaly_figure(images, 0 * maps + 3, masks)
    assert len(figure.axes) == 5
    assert np.ptp(figure.axes[2].images[0].get_array(), (0, 1)).max() == 0
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i, m, k: ((i[:1], m), {}),
            r"image.*\(1, 12, 20, 3\).* maps \(2, 3, 5\) .*expected",
        ),
        (lambda i, m, k: ((i[0], m), {}), r"\(12, 20, 3\)"),
        (lambda i, m, k: ((i[:0], m[:0]), {}), "images of shape .* are empty"),
        (lambda i, m, k: ((i, m, k[:, :3]), {}), r"mask.*\(2, 3, 20\).* expected"),
        (lambda i, m, k: ((i, m), {"labels": ["a"]}), "1 labels; expected"),
        (lambda i, m, k: ((i, m / 0), {}), "values of maps are NaN or infinite"),
    ],
)
def test_an_anomaly_figure_that_cannot_be_drawn_is_refused(change, message):
    arguments, options = change(*inputs())
    with refuses(message):
        viz.anomaly_figure(*arguments, **options)
