"""The live page in Chromium, from a server and from a file, against PyTorch."""

import base64
import hashlib
import io

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from browser import (
    BROWSER_MARKS,
    FACTS,
    HEIGHT,
    WIDTHS,
    accessibility_faults,
    contrast_faults,
    stop_transitions,
)
from built import HTML, ROOT
from PIL import Image

from paperlib import backbones
from paperlib.anomaly_map import upsample
from paperlib.cam import bounding_boxes, cam
from paperlib.complexity import profile
from paperlib.mobilenet import MobileNetV1

pytestmark = BROWSER_MARKS

PATH = "book/live.html"
LOADED_BYTES = 9_000_000  # after the click
SAMPLES = {
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "astronaut": skimage.data.astronaut,
}
CURRENT = """() => {
  const {logits, probabilities, map, mean, bias, target, best, box, image} =
    live.current();
  return {logits: [...logits], probabilities: [...probabilities], map: [...map], mean,
    bias, target, best, box, size: [image.height, image.width]};
}"""


class Visit:
    """The live page in a tab of its own, with the network loaded."""

    def __init__(self, browser, address):
        self.page = browser.context.new_page()
        self.page.set_viewport_size({"width": WIDTHS["desktop"], "height": HEIGHT})
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and self.errors.append(message.text)
            ),
        )
        self.page.goto(address)
        self.page.locator("#live-start").click()
        assert self.status("The network is loaded").endswith("the cat.")

    def current(self):
        return self.page.evaluate(CURRENT)

    def status(self, start):
        """Wait for the status, which begins with these words."""
        self.page.wait_for_function(
            "!/^(Loading.*)?$/.test(document.querySelector('#live-status').textContent)"
        )
        text = self.page.locator("#live-status").inner_text()
        assert text.startswith(start), text
        return text

    def choose_sample(self, name):
        self.page.evaluate("live.say('')")
        self.page.locator(f"[data-sample={name}]").click()
        self.status(f"Classified {name}")
        return self.current()

    def choose_file(self, name, content, start=None):
        self.page.evaluate("live.say('')")
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.locator("#live-file").set_input_files(file)
        return self.status(start or f"Classified {name}")


@pytest.fixture(scope="module")
def address(browser):
    return browser.base + PATH


@pytest.fixture(scope="module")
def live(browser, address):
    """The page from a server; tests share it."""
    visit = Visit(browser, address)
    yield visit
    visit.page.close()
    assert visit.errors == []


@pytest.fixture(scope="module")
def expected():
    """PyTorch's class, probability and map of each sample."""
    backbone = backbones.load("efficientnet_lite0")
    results = {}
    for name, load in SAMPLES.items():
        maps, logits, targets = cam(backbone.model, backbone.transform(load()[None]))
        results[name] = maps[0], logits[0].softmax(0), int(targets)
    return results


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
def test_class_and_map_agree_with_pytorch(live, expected, name):
    map, probabilities, target = expected[name]
    result = live.choose_sample(name)
    assert result["best"] == result["target"] == target
    categories = live.page.evaluate("live.classes")
    assert live.page.locator("#live-class").inner_text() == categories[target]
    assert result["probabilities"][target] == pytest.approx(
        float(probabilities[target]), abs=0.03
    )
    correlation = np.corrcoef(result["map"], map.flatten())[0, 1]
    assert correlation >= 0.995
    # The mean of the map plus the bias is the score, also as it is printed.
    score = result["logits"][target]
    assert result["mean"] + result["bias"] == pytest.approx(score, abs=1e-3)
    printed = live.page.locator("#live-sum").inner_text()
    assert float(printed.split("=")[1]) == pytest.approx(score, abs=0.011)
    assert float(live.page.locator("#live-score").inner_text()) == pytest.approx(
        score, abs=0.006
    )


def test_it_runs_from_a_file_without_other_hosts(browser):
    visit = Visit(browser, (HTML / PATH).as_uri())
    try:
        assert visit.page.locator("#live-class").inner_text() == "Egyptian cat"
        assert visit.page.evaluate("tf.getBackend()") == "wasm"
        coffee = visit.choose_sample("coffee")
        assert coffee["probabilities"][coffee["best"]] > 0.5
        local = (HTML.as_uri(), "data:", "blob:")
        assert [url for url in visit.requests if not url.startswith(local)] == []
        assert visit.errors == []
    finally:
        visit.page.close()


def test_vendored_files_are_the_listed_ones():
    folder = ROOT / "book" / "_static" / "tfjs"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in map(str.split, lines)}
    others = {"LICENSE", "SHA256SUMS"}
    assert set(sums) == {path.name for path in folder.iterdir()} - others
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert "Version 2.0" in (folder / "LICENSE").read_text()


def test_what_the_click_loads_is_limited(browser, live):
    local = (browser.base, "data:", "blob:")
    assert [url for url in live.requests if not url.startswith(local)] == []
    files = {url.split("?")[0] for url in live.requests if url.startswith(browser.base)}
    loaded = {url for url in files if "/data_" in url or "/tfjs/" in url}
    sizes = [(HTML / url.removeprefix(browser.base)).stat().st_size for url in loaded]
    listed = live.page.evaluate("live.files")
    assert len(loaded) == len(listed) > 10
    assert sum(sizes) == sum(listed.values())
    assert sum(sizes) < LOADED_BYTES


def test_the_layers_are_those_of_the_network(live):
    modules = dict(backbones.load("efficientnet_lite0").model.named_modules())
    layers = live.page.evaluate("live.lite0()")
    weighted = [name for name, m in modules.items() if hasattr(m, "kernel_size")]
    assert [layer["name"] for layer in layers] == [*weighted, "classifier"]
    for layer in layers[:-1]:
        module = modules[layer["name"]]
        assert module.kernel_size == (layer["kernel"],) * 2
        assert module.stride == (layer["stride"],) * 2
        assert (module.in_channels, module.out_channels) == (layer["in"], layer["out"])
        assert module.groups == (layer["in"] if layer["kind"] == "depthwise" else 1)


@pytest.mark.parametrize(
    ("width", "side"), [(1, 224), (0.75, 192), (0.5, 160), (0.25, 128), (0.35, 288)]
)
def test_multiply_adds_of_mobilenet_are_those_of_profile(live, width, side):
    layers = live.page.evaluate(
        "([width, side]) => live.countMacs(live.mobilenet(width), side)", [width, side]
    )
    profiled = profile(MobileNetV1(width), (1, 3, side, side))
    expected = [layer for layer in profiled.layers if layer.macs]
    assert [layer["macs"] for layer in layers] == [layer.macs for layer in expected]
    assert sum(layer["macs"] for layer in layers) == profiled.macs


@pytest.mark.parametrize("side", [224, 96])
def test_multiply_adds_of_lite0_are_those_of_profile(live, side):
    layers = live.page.evaluate("side => live.countMacs(live.lite0(), side)", side)
    model = backbones.load("efficientnet_lite0", weights=None).model
    expected = [n.macs for n in profile(model, (1, 3, side, side)).layers if n.macs]
    assert [layer["macs"] for layer in layers] == expected


def test_each_layer_is_measured(live):
    page = live.page
    before = page.evaluate("tf.memory().numTensors")
    page.locator("#live-side").fill("96")
    page.locator("#live-width").fill("25")
    total = page.locator("#live-cost-total").inner_text()
    macs = profile(MobileNetV1(0.25), (1, 3, 96, 96)).macs
    assert total == f"{macs / 1e6:,.2f} million multiply-adds in 28 layers"
    page.locator("#live-measure").click()
    page.wait_for_function("live.cost().times")
    times = page.evaluate("live.cost().times")
    assert len(times) == 28
    assert min(times) > 0
    printed = page.locator("#live-cost-types tr").last.locator("td").nth(3).inner_text()
    assert float(printed) == pytest.approx(sum(times), abs=0.006)
    assert page.locator("#live-bars-ms span").count() == 28
    assert page.evaluate("tf.memory().numTensors") == before
    page.locator("#live-network").select_option("lite0")  # the times are of another
    assert page.evaluate("live.cost().times") is None
    assert page.locator("#live-width").is_disabled()
    assert page.locator("#live-measured").is_hidden()


@pytest.mark.parametrize("size", [(37, 301), (224, 224), (100, 50), (1, 400)])
def test_images_are_resized_as_by_pytorch(live, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 4), dtype=np.uint8)
    resized = live.page.evaluate(
        "([text, height, width]) => [...live.resize("
        "{data: Uint8Array.from(atob(text), c => c.charCodeAt(0)), width, height})]"
        ".filter((_, k) => k % 7 === 0)",
        [base64.b64encode(pixels.tobytes()).decode(), *size],
    )
    rgb = torch.from_numpy(pixels[..., :3]).float().movedim(-1, 0)[None]
    expected = F.interpolate(rgb, (224, 224), mode="bilinear", antialias=True)[0]
    expected = expected.movedim(0, -1).flatten()[::7]
    torch.testing.assert_close(
        torch.tensor(resized, dtype=torch.float32), expected, atol=2e-3, rtol=0
    )


def test_map_is_enlarged_and_boxed_as_by_the_library(live):
    result = live.choose_sample("rocket")
    map = upsample(torch.tensor(result["map"]).view(7, 7), tuple(result["size"]))
    enlarged = live.page.evaluate(
        "([map, h, w]) => [...live.upsample(map, 7, 7, h, w)]"
        ".filter((_, k) => k % 11 === 0)",
        [result["map"], *result["size"]],
    )
    torch.testing.assert_close(
        torch.tensor(enlarged), map.flatten()[::11], atol=1e-3, rtol=1e-4
    )
    box = result["box"]
    assert (box["top"], box["left"], box["bottom"], box["right"]) == bounding_boxes(
        map, 0.2, largest=True
    )[0]
    threshold = live.page.locator("#live-threshold")
    threshold.fill("60")
    smaller = live.current()["box"]
    assert smaller["size"] < box["size"]
    threshold.fill("20")
    assert live.page.evaluate("live.largestBox([-1, 0, -2, -1], 2, 2, 0.2)") is None


def test_another_class_has_another_map(live):
    cat = live.choose_sample("cat")
    live.page.locator("#live-top button").nth(1).click()
    second = live.current()
    assert second["target"] == np.argsort(cat["probabilities"])[-2]
    pressed = live.page.locator("#live-top [aria-pressed=true]")
    assert pressed.inner_text().startswith(
        live.page.locator("#live-shown").inner_text()
    )
    search = live.page.locator("#live-search")
    search.fill("teapot")
    search.press("Enter")
    teapot = live.current()
    assert live.page.locator("#live-shown").inner_text() == "teapot"
    assert teapot["map"] != second["map"]
    assert teapot["mean"] + teapot["bias"] == pytest.approx(
        teapot["logits"][teapot["target"]], abs=1e-3
    )
    # The predicted class does not change with the class whose map is shown.
    assert live.page.locator("#live-class").inner_text() == "Egyptian cat"
    live.page.evaluate("live.say('')")
    search.fill("unicorn")
    search.press("Enter")
    assert "not one of the 1,000 classes" in live.status("“unicorn”")
    assert live.current()["target"] == teapot["target"]


def test_files_of_unusual_kinds(live):
    cat = Image.fromarray(skimage.data.chelsea())
    live.choose_file("upright.png", encoded(cat))
    upright = live.current()
    turned = cat.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is on the right, so the reader turns it clockwise
    live.choose_file("turned.jpg", encoded(turned, "JPEG", quality=95, exif=exif))
    result = live.current()
    assert result["size"] == upright["size"] == [300, 451]
    assert result["best"] == upright["best"]
    # Transparent pixels are white, as in the library.
    clear = cat.convert("RGBA")
    clear.putalpha(0)
    live.choose_file("clear.png", encoded(clear))
    clear_result = live.current()
    live.choose_file("white.png", encoded(Image.new("RGB", cat.size, "white")))
    assert clear_result["logits"] == live.current()["logits"]
    live.choose_file("line.png", encoded(Image.new("L", (3000, 1))))
    assert live.current()["size"] == [1, 1024]
    large = cat.resize((7600, 5300))  # 40 megapixels
    live.choose_file("large.jpg", encoded(large, "JPEG"))
    result = live.current()
    assert result["size"] == [714, 1024]
    assert result["best"] == upright["best"]
    message = live.choose_file("text.png", b"no image", start="text.png is not")
    assert "not an image that this browser can read" in message
    assert live.current()["best"] == upright["best"]


def test_an_image_can_be_dropped_or_pasted(live):
    data = encoded(Image.fromarray(skimage.data.coffee()).resize((300, 200)))
    for kind, target, property in (
        ("drop", "document.querySelector('#live-cam')", "dataTransfer"),
        ("paste", "window", "clipboardData"),
    ):
        live.page.evaluate("live.say('')")
        live.page.evaluate(
            f"""text => {{
              const transfer = new DataTransfer();
              const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
              const file = new File([bytes], '{kind}.png',
                {{type: 'image/png'}});
              transfer.items.add(file);
              const event = new Event('{kind}', {{bubbles: true, cancelable: true}});
              Object.defineProperty(event, '{property}', {{value: transfer}});
              {target}.dispatchEvent(event);
            }}""",
            base64.b64encode(data).decode(),
        )
        live.status(f"Classified {kind}.png: espresso")


def test_memory_is_constant(live):
    live.choose_sample("cat")
    before = live.page.evaluate("tf.memory()")
    for name in (*SAMPLES, *SAMPLES, "cat", "coffee"):
        live.choose_sample(name)
    after = live.page.evaluate("tf.memory()")
    assert before["numTensors"] > 90
    assert (after["numTensors"], after["numBytes"]) == (
        before["numTensors"],
        before["numBytes"],
    )


def test_the_camera_starts_and_stops(live):
    page = live.page
    page.evaluate(
        """() => {
          const canvas = document.createElement('canvas');
          canvas.width = canvas.height = 64;
          const context = canvas.getContext('2d');
          setInterval(() => { // a stream has a frame per change
            context.fillStyle = `rgb(${performance.now() % 256} 0 0)`;
            context.fillRect(0, 0, 64, 64);
          }, 30);
          navigator.mediaDevices.getUserMedia = async () =>
            (window.cameraStream = canvas.captureStream(10));
        }"""
    )
    page.evaluate("live.say('')")
    page.locator("#live-camera").click()
    live.status("The camera is running")
    page.wait_for_function('live.current().name === "the camera\'s image"')
    page.evaluate("live.say('')")
    page.locator("#live-stop").click()
    live.status("The camera is off")
    assert page.evaluate(
        "cameraStream.getTracks().every(track => track.readyState === 'ended')"
    )
    assert page.evaluate("document.activeElement.id") == "live-camera"


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (
            "{getUserMedia: async () => {throw new DOMException('', 'NotFoundError')}}",
            "The camera can't be used (NotFoundError)",
        ),
        ("undefined", "This browser offers no camera"),
    ],
)
def test_without_a_camera_the_page_says_so(live, devices, words):
    live.page.evaluate(
        "Object.defineProperty(navigator, 'mediaDevices',"
        f" {{configurable: true, value: {devices}}})"
    )
    live.page.evaluate("live.say('')")
    live.page.locator("#live-camera").click()
    live.status(words)
    assert live.page.locator("#live-camera").is_visible()


def test_without_simd_the_page_says_so(browser, address):
    page = browser.context.new_page()
    try:
        page.goto(address)
        page.evaluate("live.hasSimd = () => false")
        page.locator("#live-start").click()
        status = page.locator("#live-status", has_text="no WebAssembly with SIMD")
        status.wait_for()
        assert page.locator("#live-cam img").is_visible()
    finally:
        page.close()


def test_loaded_page_is_accessible(browser, address):
    visit = Visit(browser, address)
    try:
        page = visit.page
        for width in sorted(WIDTHS.values()):
            page.set_viewport_size({"width": width, "height": HEIGHT})
            assert page.evaluate(FACTS)["sideways"] == []
        stop_transitions(page)
        assert accessibility_faults(page) == []
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        assert contrast_faults(page) == []
    finally:
        visit.page.close()
