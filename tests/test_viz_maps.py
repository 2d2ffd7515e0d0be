import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from refusals import refuses

from paperlib import viz
from paperlib.anomaly_map import upsample
from paperlib.cam import Box


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def ramp(height=3, width=5):
    return torch.linspace(0, 1, height * width).view(height, width)


def picture(height=4, width=6):
    return np.random.default_rng(0).random((height, width, 3), dtype=np.float32)


def test_heatmap_is_viridis_in_rgb_by_default():
    heat = viz.heatmap(ramp())
    assert heat.shape == (3, 5, 3) and heat.dtype == np.float32
    np.testing.assert_allclose(
        heat, matplotlib.colormaps["viridis"](ramp().numpy())[..., :3], atol=1e-6
    )
    lightness = cv2.cvtColor(heat.reshape(1, -1, 3), cv2.COLOR_RGB2Lab)[0, :, 0]
    assert (np.diff(lightness) > 0).all()  # a higher value is always lighter


def test_another_colormap_is_used():
    heat = viz.heatmap(ramp(1, 64), "jet")
    blue, red = heat[0, 0], heat[-1, -1]
    assert blue[2] > 0.4 and blue[0] == 0 and red[0] > 0.4 and red[2] == 0


def test_heatmap_takes_batches_arrays_and_a_size():
    maps = torch.stack([ramp(), 1 - ramp()])
    assert np.array_equal(viz.heatmap(maps)[1], viz.heatmap((1 - ramp()).numpy()))
    for name in ("magma", "jet"):
        resized = viz.heatmap(maps, name, size=(6, 20))
        assert resized.shape == (2, 6, 20, 3)
        np.testing.assert_array_equal(
            resized[0], viz.heatmap(upsample(ramp(), (6, 20)), name)
        )
    assert viz.heatmap(ramp().requires_grad_().half(), size=8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            2 * ramp(),
            {},
            (
                r"map with values from 0 to 2; expected \[0, 1\]: scale it with"
                r" anomaly_map.minmax"
            ),
        ),
        (ramp() - 0.1, {}, "from -0.1 to 0.9"),
        (ramp() / 0, {}, "values from nan to nan"),
        (torch.zeros(3), {}, r"shape \(3,\); expected \(h, w\)"),
        (
            ramp(),
            {"colormap": "virdis"},
            "colormap='virdis'; expected one of",
        ),
    ],
)
def test_a_heatmap_that_cannot_be_drawn_is_refused(values, options, message):
    with refuses(message):
        viz.heatmap(values, **options)


def test_layouts_and_types_give_the_same_overlay():
    image, heat = picture(), viz.heatmap(ramp(), size=(4, 6))
    expected = viz.overlay(heat, image)
    np.testing.assert_allclose(expected, (heat + image) / 2, atol=1e-6)
    first = torch.from_numpy(image).movedim(-1, 0)
    for same in (
        torch.from_numpy(image),
        first,
        first.double(),
        first.requires_grad_(),
    ):
        np.testing.assert_allclose(viz.overlay(heat, same), expected, atol=1e-6)
    eight = (255 * image).astype(np.uint8)
    np.testing.assert_allclose(
        viz.overlay(heat, eight), (heat + eight / 255) / 2, atol=1e-6
    )
    np.testing.assert_allclose(
        viz.overlay(heat, torch.from_numpy(eight).movedim(-1, 0)),
        viz.overlay(heat, eight),
    )
    grey = image[..., 0]
    np.testing.assert_allclose(
        viz.overlay(heat, grey), (heat + grey[..., None]) / 2, atol=1e-6
    )
    np.testing.assert_array_equal(
        viz.overlay(heat, grey), viz.overlay(heat, torch.from_numpy(grey)[None])
    )
    batch = viz.overlay(np.stack([heat, heat]), torch.stack([first, 1 - first]))
    np.testing.assert_allclose(batch, [expected, (heat + 1 - image) / 2], atol=1e-6)


def test_an_overlay_is_clipped():
    image, heat = picture(), viz.heatmap(ramp(), "jet", size=(4, 6))
    np.testing.assert_allclose(
        viz.overlay(heat, image, (0.7, 0.5)),
        np.clip(0.7 * heat + 0.5 * image, 0, 1),
        atol=1e-6,
    )
    # The weights sum to 1.2: something is clipped.
    assert (0.7 * heat + 0.5 * image).max() > 1


@pytest.mark.parametrize(
    ("heat", "image", "message"),
    [
        (
            picture(),
            255 * picture(),
            r"image of shape .* range from .* to 25\d.*Divide 8-bit values by 255",
        ),
        (picture(), picture() - 0.5, "image of .* range from -0.4"),
        (picture(), picture() * np.nan, "image of .* range from nan"),
        (
            picture(),
            (255 * picture()).astype(np.int32),
            "dtype int32; expected uint8, or float",
        ),
        (
            picture(),
            picture(8, 6),
            (
                r"a heat map of 4×6 over .* 8×6; create it with heatmap\(map,"
                r" size="
            ),
        ),
        (
            picture(),
            np.zeros((4, 6, 4)),
            r"image of shape \(1, 4, 6, 4\) .* with 3 channels or 1$",
        ),
        (picture(), np.zeros((3, 6, 3)), "the axis of the colours is ambiguous"),
        (2 * picture(), picture(), "heat of shape .* range from"),
    ],
)
def test_an_overlay_that_cannot_be_drawn_is_refused(heat, image, message):
    with refuses(message):
        viz.overlay(heat, image)
    with refuses(r"weights=\(-1, 2\)"):
        viz.overlay(picture(), picture(), (-1, 2))


def test_a_gradient_image_has_mean_one_half_and_deviation_a_tenth():
    gradient = (
        40 * torch.randn(3, 50, 50, generator=torch.Generator().manual_seed(0)) + 7
    )
    shown = viz.gradient_image(gradient)
    assert shown.shape == (50, 50, 3) and shown.dtype == np.float32
    assert shown.mean() == pytest.approx(0.5, abs=1e-3)
    assert shown.std() == pytest.approx(0.1, abs=1e-3)
    np.testing.assert_allclose(
        shown, viz.gradient_image(gradient.movedim(0, -1).numpy()), atol=1e-6
    )
    # Each by its own scale.
    batch = viz.gradient_image(torch.stack([gradient, -1e-9 * gradient]))
    np.testing.assert_allclose(batch, [shown, 1 - shown], atol=1e-5)
    outlier = torch.zeros(3, 20, 20)
    outlier[0, 3, 4] = 1
    # clipped.
    assert viz.gradient_image(outlier).max() == 1
    assert viz.gradient_image(-outlier).min() == 0
    assert (viz.gradient_image(torch.full((3, 4, 5), 2.0)) == 0.5).all()
    with refuses("1 values of gradients are NaN"):
        viz.gradient_image(
            outlier.index_put(
                (torch.tensor(0), torch.tensor(0), torch.tensor(0)),
                torch.tensor(float("nan")),
            )
        )


def test_a_panel_shows_the_picture_and_its_boxes():
    _, ax = plt.subplots()
    viz.panel(ax, torch.from_numpy(picture()).movedim(-1, 0), "cat", [Box(1, 2, 4, 6)])
    np.testing.assert_allclose(ax.images[0].get_array(), picture())
    assert ax.get_title() == "cat" and not len(ax.get_xticks())
    (box,) = ax.patches
    # Rows 1 to 3 and columns 2 to 5, with the edge of a pixel half a pixel from its
    # centre.
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((1.5, 0.5), 4, 3)
    with refuses("expected one. Select one of a batch"):
        viz.panel(ax, np.stack([picture(), picture()]))
