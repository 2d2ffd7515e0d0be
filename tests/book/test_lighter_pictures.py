"""Compressed images look the same."""

import base64
import copy
import io

import nbformat
import numpy as np
import pytest
from pictures import lighten, lighten_outputs
from PIL import Image


def encode(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


@pytest.fixture
def plot():
    """An image like a matplotlib plot: white background, few colours, opaque RGBA."""
    y, x = np.mgrid[0:200, 0:300]
    ground = np.full((200, 300, 4), 255)
    line = np.clip(3 - np.abs(y - 100 - 60 * np.sin(x / 40)), 0, 1)[..., None]
    ground[..., :3] = 255 - line * (255 - np.array([31, 119, 180]))
    return Image.fromarray(ground.astype(np.uint8))


@pytest.fixture
def photograph():
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 18, 3), dtype=np.uint8))
    return coarse.resize((300, 200), Image.Resampling.BICUBIC)


def test_a_plot_remains_png_and_becomes_smaller(plot):
    before = encode(plot)
    kind, after = lighten(before)
    assert kind == "image/png"
    assert len(after) < 0.7 * len(before)
    assert np.abs(decode(after) - decode(before)).max() <= 8


def test_a_photograph_becomes_jpeg_and_looks_the_same(photograph):
    before = encode(photograph)
    kind, after = lighten(before)
    assert kind == "image/jpeg"
    assert len(after) < len(before)
    assert np.abs(decode(after) - decode(before)).mean() < 2


def test_transparent_images_are_not_changed(plot):
    plot.putpixel((0, 0), (0, 0, 0, 0))
    before = encode(plot)
    assert lighten(before) == ("image/png", before)


def test_no_image_becomes_larger():
    before = encode(Image.new("P", (4, 4)))
    assert lighten(before) == ("image/png", before)


def test_outputs_keep_their_text(photograph):
    data = {
        "image/png": base64.b64encode(encode(photograph)).decode(),
        "text/plain": "<Figure>",
    }
    cell = nbformat.v4.new_code_cell(
        outputs=[nbformat.v4.new_output("display_data", data=data)]
    )
    notebook = nbformat.v4.new_notebook(
        cells=[cell, nbformat.v4.new_markdown_cell("text")]
    )
    lighten_outputs(notebook)
    assert sorted(notebook.cells[0].outputs[0].data) == ["image/jpeg", "text/plain"]
    nbformat.validate(notebook)


def test_images_in_html_become_smaller_unless_they_are_compared(plot):
    address = "data:image/png;base64," + base64.b64encode(encode(plot)).decode()
    html = f'<img src="{address}" alt="a curve"><script>frames = ["{address}"]</script>'
    output = nbformat.v4.new_output("display_data", data={"text/html": html})
    free = nbformat.v4.new_code_cell(outputs=[output])
    compared = nbformat.v4.new_code_cell(
        outputs=[copy.deepcopy(output)], metadata={"tags": ["nbval-check-output"]}
    )
    notebook = nbformat.v4.new_notebook(cells=[free, compared])
    lighten_outputs(notebook)
    light = free.outputs[0].data["text/html"]
    assert len(light) < 0.7 * len(html)
    assert light.count("data:image/png;base64,") == 2 and light.endswith('"]</script>')
    assert compared.outputs[0].data["text/html"] == html
