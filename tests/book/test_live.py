"""The live page in Chromium, from a server and from a file, against PyTorch."""

import base64
import hashlib
import io
import json

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
    launched,
    stop_transitions,
)
from built import HTML, ROOT
from PIL import Image

from paperlib import PaDiM, backbones
from paperlib.anomaly_map import gaussian_blur, upsample
from paperlib.cam import bounding_boxes, cam
from paperlib.complexity import profile
from paperlib.metrics import auroc
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


FITTED = """() => {
  const {limit, trainScores, unseen} = live.padim().cells;
  return {limit, trainScores, scores: unseen.map(cell => cell.score),
    isDefective: unseen.map(cell => cell.isDefective)};
}"""
# A camera whose image changes and which has no other use.
FAKE_CAMERA = """() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 64;
  const context = canvas.getContext('2d');
  setInterval(() => { // a stream has a frame per change
    context.fillStyle = `rgb(${performance.now() % 256} 0 0)`;
    context.fillRect(0, 0, 64, 64);
  }, 30);
  const getUserMedia = async () => (window.cameraStream = canvas.captureStream(10));
  Object.defineProperty(navigator, 'mediaDevices',
    {configurable: true, value: {getUserMedia}});
}"""
# Drop a file on an element, or paste it.
TRANSFER = """([kind, property, text]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  transfer.items.add(new File([bytes], `${kind}.png`, {type: 'image/png'}));
  const event = new Event(kind, {bubbles: true, cancelable: true});
  Object.defineProperty(event, property, {value: transfer});
  %s.dispatchEvent(event);
}"""
# WebGL without a graphics card, as this browser would otherwise have none.
SOFTWARE_WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
CAMERA_IS_OFF = "cameraStream.getTracks().every(track => track.readyState === 'ended')"


class Visit:
    """The live page in a tab of its own, with the network loaded.

    `before` is a script that runs before the click.
    """

    def __init__(self, browser, address, before="null"):
        self.page = browser.context.new_page()
        self.page.set_viewport_size({"width": WIDTHS["desktop"], "height": HEIGHT})
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                # Reading a result from WebGL waits for it, as it should.
                and "GPU stall due to ReadPixels" not in message.text
                and self.errors.append(message.text)
            ),
        )
        self.page.goto(address)
        self.page.evaluate(before)
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

    def fit_cells(self, count):
        """Fit PaDiM to solar cells; return its threshold and the unseen cells."""
        self.page.locator("#live-count").select_option(str(count))
        self.page.evaluate("document.querySelector('#live-fit-status').textContent=''")
        self.page.locator("#live-fit").click()
        self.page.wait_for_function(
            "document.querySelector('#live-fit-status').textContent.startsWith('Fitted')"
        )
        return self.page.evaluate(FITTED)

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
def cells():
    """The images that the page loads, by group, and the chosen channels."""
    text = (HTML / "_static" / "live" / "data_cells.js").read_text()
    content = json.loads(text[text.index("{") :].removesuffix(";\n"))
    channels = content.pop("channels")
    groups = {name: [decoded(url) for url in urls] for name, urls in content.items()}
    return groups, channels


@pytest.fixture(scope="module")
def detector(cells):
    """PaDiM of the library, fitted to the same cells."""
    groups, channels = cells
    detector = PaDiM(backbones.load("efficientnet_lite0").extractor())
    detector.fit(detector.prepare(groups["train"]).split(4))
    assert detector.channels.tolist() == channels
    return detector


@pytest.fixture(scope="module")
def fitted(live):
    """What the page computes from 100 cells, and how its progress bar moved."""
    live.page.evaluate(
        """() => {
          window.shares = [];
          const bar = document.querySelector('#live-fit-progress');
          new MutationObserver(() => shares.push(bar.value)).observe(
            bar, {attributeFilter: ['value']});
        }"""
    )
    assert live.page.locator("#live-padim img").is_visible()
    result = live.fit_cells(100)
    return {**result, "shares": live.page.evaluate("shares")}


def decoded(url):
    content = base64.b64decode(url.split(",")[1])
    return Image.open(io.BytesIO(content)).convert("RGB")


def labels_and_scores(result):
    return torch.tensor(result["isDefective"]).int(), torch.tensor(result["scores"])


def correlation(a, b):
    return np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1]


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


def test_it_runs_from_a_file_without_other_hosts_and_is_accessible(browser):
    visit = Visit(browser, (HTML / PATH).as_uri())
    page = visit.page
    try:
        assert page.locator("#live-class").inner_text() == "Egyptian cat"
        assert page.evaluate("tf.getBackend()") == "wasm"
        coffee = visit.choose_sample("coffee")
        assert coffee["probabilities"][coffee["best"]] > 0.5
        result = visit.fit_cells(25)
        assert auroc(*labels_and_scores(result)) > 0.7
        page.locator("#live-good").set_input_files(uploads(bricks(20)))
        own_status(page, "20 good images.")
        page.locator("#live-own-fit").click()
        own_status(page, "Fitted to 20 images")
        inspect(page, "new.png", *bricks(1, shift=1))
        local = (HTML.as_uri(), "data:", "blob:")
        assert [url for url in visit.requests if not url.startswith(local)] == []
        assert visit.errors == []

        for width in sorted(WIDTHS.values()):
            page.set_viewport_size({"width": width, "height": HEIGHT})
            assert page.evaluate(FACTS)["sideways"] == []
        stop_transitions(page)
        assert accessibility_faults(page) == []
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        assert contrast_faults(page) == []
    finally:
        page.close()


@pytest.fixture(scope="module")
def software_webgl(chromium_type, browser):
    """A browser with WebGL, which is computed without a graphics card."""
    with launched(chromium_type, HTML, more=SOFTWARE_WEBGL) as started:
        yield started


@pytest.fixture(scope="module")
def webgl(software_webgl):
    """The page with the network in WebGL; tests share it."""
    visit = Visit(software_webgl, software_webgl.base + PATH + "?engine=webgl")
    yield visit
    visit.page.close()
    assert visit.errors == []


@pytest.mark.parametrize("name", ["coffee", "astronaut"])
def test_webgl_agrees_with_pytorch(webgl, expected, name):
    map, probabilities, target = expected[name]
    assert webgl.page.evaluate("[tf.getBackend(), live.engine]") == ["webgl"] * 2
    result = webgl.choose_sample(name)
    assert result["best"] == target
    assert result["probabilities"][target] == pytest.approx(
        float(probabilities[target]), abs=0.03
    )
    assert correlation(result["map"], map) >= 0.995
    assert result["mean"] + result["bias"] == pytest.approx(
        result["logits"][target], abs=1e-3
    )


FEATURES = """async () => {
  await live.loadCells();
  const detector = live.createDetector(live.cells.channels);
  const features = new Float32Array(detector.size);
  const cell = live.resize(await live.readUrl(live.cells.train[0]));
  live.extractFeatures(detector, cell, features);
  return [...features];
}"""


def test_webgl_and_wasm_have_the_same_features(live, webgl):
    features, expected = (
        torch.tensor(v.page.evaluate(FEATURES)) for v in (webgl, live)
    )
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=1e-3)


def test_memory_is_constant_in_webgl(webgl):
    webgl.choose_sample("cat")
    measure = """() => {
      const {numTensors, numBytes, numBytesInGPUAllocated} = tf.memory();
      return [numTensors, numBytes, numBytesInGPUAllocated];
    }"""
    before = webgl.page.evaluate(measure)
    for name in ("coffee", "cat"):
        webgl.choose_sample(name)
    assert webgl.page.evaluate(measure) == before
    # A standard, a depthwise and a pointwise convolution.
    times = webgl.page.evaluate(
        "live.countMacs(live.mobilenet(0.25), 96).slice(0, 3).map(live.timeLayer)"
    )
    assert min(times) > 0
    assert webgl.page.evaluate(measure)[:2] == before[:2]


def test_webgl_loads_no_other_engine(software_webgl, webgl):
    local = (software_webgl.base, "data:", "blob:")
    assert [url for url in webgl.requests if not url.startswith(local)] == []
    assert any("tf-backend-webgl" in url for url in webgl.requests)
    assert not any("wasm" in url for url in webgl.requests)


@pytest.mark.parametrize(
    ("before", "query", "engine", "place"),
    [
        # The browser has WebGL, but no graphics card.
        ("live.timeLimit = Infinity", "", "wasm", "on one thread (WebAssembly)"),
        # Each of these computes in WebGL on the processor, which is slow.
        pytest.param(
            "live.hasGraphicsCard = () => true; live.timeLimit = Infinity",
            "",
            "webgl",
            "on the graphics card (WebGL)",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "live.hasGraphicsCard = () => true; live.timeLimit = 0",
            "",
            "wasm",
            "on one thread (WebAssembly)",
            marks=pytest.mark.long,
        ),
        (
            "live.hasGraphicsCard = () => true; live.timeLimit = Infinity;"
            " live.expected.probability = 0.5",
            "",
            "wasm",
            "on one thread (WebAssembly)",
        ),
        (
            "live.hasGraphicsCard = () => true",
            "?engine=wasm",
            "wasm",
            "on one thread (WebAssembly)",
        ),
    ],
    ids=["software", "card", "slow", "wrong", "selected"],
)
def test_the_engine_is_chosen(software_webgl, before, query, engine, place):
    address = software_webgl.base + PATH + query
    visit = Visit(software_webgl, address, before)
    try:
        status = visit.page.locator("#live-status").inner_text()
        assert f"runs {place}. " in status
        assert visit.page.evaluate("[tf.getBackend(), live.engine]") == [engine] * 2
        assert visit.page.locator("#live-class").inner_text() == "Egyptian cat"
        assert visit.errors == []
    finally:
        visit.page.close()


@pytest.mark.long
def test_a_withdrawn_graphics_card_is_reported(software_webgl):
    visit = Visit(software_webgl, software_webgl.base + PATH + "?engine=webgl")
    try:
        visit.page.evaluate(
            "live.say('');"
            "tf.backend().getGPGPUContext().gl.getExtension('WEBGL_lose_context')"
            ".loseContext()"
        )
        visit.page.locator("[data-sample=coffee]").click()
        visit.status("The browser has withdrawn the graphics card")
        assert visit.current()["best"] == visit.page.evaluate("live.expected.target")
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


def test_what_the_clicks_load_is_limited(browser, live, fitted):
    local = (browser.base, "data:", "blob:")
    assert [url for url in live.requests if not url.startswith(local)] == []
    files = {url.split("?")[0] for url in live.requests if url.startswith(browser.base)}
    loaded = {url for url in files if "/data_" in url or "/tfjs/" in url}
    sizes = [(HTML / url.removeprefix(browser.base)).stat().st_size for url in loaded]
    listed = live.page.evaluate(
        "({...live.files, ...live.engines.wasm, cells: live.cellsSize})"
    )
    assert len(loaded) == len(listed) > 10
    assert sum(sizes) == sum(listed.values())
    # Also where WebGL is loaded first and then found to be wrong or slow.
    webgl = live.page.evaluate("live.size(live.engines.webgl)")
    assert sum(sizes) + webgl < LOADED_BYTES


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


def test_an_interrupted_batch_does_not_end_the_measurement(live):
    """The clock counts in steps of 1 ms, and jumps by 20 ms in the first batch."""
    times = live.page.evaluate(
        """() => {
          const now = performance.now.bind(performance);
          let calls = 0;
          performance.now = () => Math.floor(now()) + (++calls > 3 ? 20 : 0);
          const layer = live.countMacs(live.mobilenet(0.25), 96).at(-1);
          const times = [live.timeLayer(layer), live.timeLayer(layer)];
          delete performance.now;
          return times;
        }"""
    )
    assert min(times) > 0


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
    coffee = Image.fromarray(skimage.data.coffee()).resize((300, 200))
    cam = "document.querySelector('#live-cam')"
    for kind, target, property in (
        ("drop", cam, "dataTransfer"),
        ("paste", "window", "clipboardData"),
    ):
        live.page.evaluate("live.say('')")
        live.page.evaluate(
            TRANSFER % target,
            [kind, property, base64.b64encode(encoded(coffee)).decode()],
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
    page.evaluate(FAKE_CAMERA)
    page.evaluate("live.say('')")
    page.locator("#live-camera").click()
    live.status("The camera is running")
    page.wait_for_function('live.current().name === "the camera\'s image"')
    page.evaluate("live.say('')")
    page.locator("#live-stop").click()
    live.status("The camera is off")
    assert page.evaluate(CAMERA_IS_OFF)
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


def test_padim_agrees_with_the_library(live, fitted, cells, detector):
    groups, _ = cells
    assert {name: len(group) for name, group in groups.items()} == {
        "train": 100,
        "functional": 40,
        "defective": 40,
    }
    unseen = [*groups["defective"], *groups["functional"]]
    assert fitted["isDefective"] == [True] * 40 + [False] * 40
    scores = torch.cat([detector.score(detector.prepare(cell)) for cell in unseen])
    labels, own_scores = labels_and_scores(fitted)
    assert correlation(own_scores, scores) >= 0.98
    assert auroc(labels, own_scores) == pytest.approx(auroc(labels, scores), abs=0.02)
    printed = float(live.page.locator("#live-auroc").inner_text())
    assert printed == pytest.approx(auroc(labels, own_scores), abs=5e-4)
    train = detector.prepare(groups["train"]).split(4)
    threshold = detector.normal_threshold(train, 0.95, fitted=True)
    assert fitted["limit"] == pytest.approx(threshold, rel=0.05)
    assert fitted["limit"] == pytest.approx(np.quantile(fitted["trainScores"], 0.95))


def test_maps_agree_with_the_library(live, fitted, cells, detector):
    groups, _ = cells
    map = live.page.evaluate(
        "[...live.anomalyMap(live.padim().cells.unseen[1].distances).map]"
    )
    expected = detector.anomaly_map(detector.prepare(groups["defective"][1]))
    assert correlation(map, expected) >= 0.98


def test_the_blur_is_that_of_the_library(live):
    map = torch.rand(12, 40, generator=torch.Generator().manual_seed(0))
    blurred = live.page.evaluate(
        "map => [...live.blur(Float32Array.from(map), 12, 40, 4)]",
        map.flatten().tolist(),
    )
    torch.testing.assert_close(
        torch.tensor(blurred), gaussian_blur(map).flatten(), atol=1e-5, rtol=1e-5
    )


def test_progress_is_shown_while_the_page_fits(fitted):
    shares = fitted["shares"]
    assert shares == sorted(shares)
    assert len(set(shares)) > 100
    assert shares[-1] == pytest.approx(1)


def test_the_threshold_decides_about_the_unseen_cells(live, fitted):
    page = live.page
    scores, is_defective = (
        np.array(fitted[name]) for name in ("scores", "isDefective")
    )
    slider = page.locator("#live-limit")
    for share in (0.3, 0.5, 0.9):
        slider.fill(str(share * float(slider.get_attribute("max"))))
        limit = slider.evaluate("slider => slider.valueAsNumber")
        alarms = scores > limit
        for name, count in (
            ("true-alarms", alarms & is_defective),
            ("misses", ~alarms & is_defective),
            ("false-alarms", alarms & ~is_defective),
            ("true-passes", ~alarms & ~is_defective),
        ):
            assert int(page.locator(f"#live-{name}").inner_text()) == count.sum()
        assert page.locator("#live-padim .live-alarm").count() == alarms.sum()
        label = page.locator("#live-roc").get_attribute("aria-label")
        shares = [100 * alarms[is_defective == group].mean() for group in (True, False)]
        assert [float(word) for word in label.split() if word.isdigit()] == (
            pytest.approx(shares, abs=0.5)
        )
        # The plot spans x from 50 to 290 and y from 240 to 10.
        point = page.locator("#live-roc-point")
        x, y = (float(point.get_attribute(name)) for name in ("cx", "cy"))
        assert (y, x) == pytest.approx(
            (240 - 2.3 * shares[0], 50 + 2.4 * shares[1]), abs=1e-6
        )
    page.locator("#live-limit-reset").click()
    assert float(page.locator("#live-limit-value").inner_text()) == pytest.approx(
        fitted["limit"], abs=0.051
    )


def test_a_chosen_cell_is_shown_large(live, fitted):
    page = live.page
    assert page.locator("#live-defective button").count() == 40
    button = page.locator("#live-functional button").nth(5)
    button.focus()
    page.keyboard.press("Enter")
    score = button.inner_text().strip()
    text = page.locator("#live-cell-text", has_text=f"Functional cell, score {score}")
    text.wait_for()
    pressed = page.locator("#live-padim [aria-pressed=true]")
    assert pressed.count() == 1
    assert pressed.get_attribute("aria-label") == button.get_attribute("aria-label")
    assert score in page.locator("#live-cell").get_attribute("aria-label")


def test_memory_is_constant_after_a_second_fit(live, fitted):
    session = live.page.context.new_cdp_session(live.page)

    def measure():
        session.send("HeapProfiler.collectGarbage")
        heap = session.send("Runtime.getHeapUsage")
        tensors = live.page.evaluate("tf.memory()")
        return (
            [tensors["numTensors"], tensors["numBytes"]],
            live.page.evaluate("live.memoryOfFits()"),
            # the arrays are not part of the heap, but stored apart
            heap["usedSize"] + heap.get("backingStorageSize", 0),
        )

    *before, bytes_before = measure()
    live.fit_cells(25)  # after the 100 cells of the fixture
    *after, bytes_after = measure()
    assert after == before
    assert bytes_after < bytes_before + 2_000_000  # one set of factors has 18 MB


def bricks(count, shift=0):
    """Nearly equal images of a wall, as arrays."""
    generator = np.random.default_rng(shift)
    wall = skimage.data.brick()
    images = []
    for _ in range(count):
        top, left = generator.integers(0, 6, 2)
        noise = generator.normal(0, 3, (400, 400))
        images.append((wall[top:, left:][:400, :400] + noise).clip(0, 255))
    return [Image.fromarray(image.astype(np.uint8)).convert("RGB") for image in images]


def uploads(images):
    return [
        {"name": f"{k}.png", "mimeType": "image/png", "buffer": encoded(image)}
        for k, image in enumerate(images)
    ]


def own_status(page, words):
    page.locator("#live-own-status", has_text=words).wait_for()
    return page.locator("#live-own-status").inner_text()


def inspect(page, name, image):
    file = {"name": name, "mimeType": "image/png", "buffer": encoded(image)}
    page.locator("#live-new").set_input_files(file)
    own_status(page, f"{name}: ")
    return page.evaluate("live.padim().inspected.score")


def test_padim_is_fitted_to_the_readers_images(live):
    page = live.page
    images = bricks(22)
    files = page.locator("#live-good")
    files.set_input_files(uploads(images[:19]))
    own_status(page, "19 good images.")
    assert page.locator("#live-own-fit").is_disabled()
    assert "20 to 40 are needed" in page.locator("#live-good-count").inner_text()
    broken = {"name": "text.png", "mimeType": "image/png", "buffer": b"no image"}
    files.set_input_files([*uploads(images[19:21]), broken])
    own_status(page, "text.png is not an image that this browser can read")
    assert page.locator("#live-good-strip canvas").count() == 21
    drop = "document.querySelector('#live-%s')"
    text = base64.b64encode(encoded(images[-1])).decode()
    page.evaluate(TRANSFER % (drop % "collect"), ["drop", "dataTransfer", text])
    own_status(page, "22 good images.")
    assert page.locator("#live-good-strip canvas").count() == 22
    page.locator("#live-own-fit").click()
    assert "leave-one-out" in own_status(page, "Fitted to 22 images")

    detector = PaDiM(backbones.load("efficientnet_lite0").extractor())
    detector.fit(detector.prepare(images).split(4))
    train = detector.prepare(images).split(4)
    threshold = detector.normal_threshold(train, quantile=1, fitted=True)
    limit = page.evaluate("live.padim().own.limit")
    assert limit == pytest.approx(threshold, rel=0.1)
    new = bricks(6, shift=1)
    for k, image in enumerate(new[3:]):
        pixels = np.array(image)
        pixels[150 : 160 + 20 * k, 200:260] = 20  # a dark spot
        new[3 + k] = Image.fromarray(pixels)
    scores = [inspect(page, f"{k}.png", image) for k, image in enumerate(new)]
    expected = [float(detector.score(detector.prepare(image))) for image in new]
    assert correlation(scores, expected) >= 0.98
    assert min(scores[3:]) > max(*scores[:3], limit)
    text = base64.b64encode(encoded(new[0])).decode()
    page.evaluate(TRANSFER % (drop % "inspect"), ["drop", "dataTransfer", text])
    assert own_status(page, "drop.png: ").endswith(f"{scores[0]:.1f}.")
    inspect(page, "5.png", new[5])
    assert page.locator("#live-verdict").inner_text() == "Alarm"
    assert "region above the threshold" in page.locator("#live-own-box").inner_text()
    page.locator("#live-own-limit").fill(
        page.locator("#live-own-limit").get_attribute("max")
    )
    assert page.evaluate("live.padim().inspected.score") == scores[-1]

    page.locator("#live-clear").click()
    assert page.evaluate("live.padim().good") == 0
    files.set_input_files(uploads(bricks(41)))
    own_status(page, "Only the first 40 images are used")
    assert page.evaluate("live.padim().good") == 40
    page.locator("#live-clear").click()


def test_good_images_can_be_taken_by_the_camera(live):
    page = live.page
    page.evaluate(FAKE_CAMERA)
    page.locator("#live-own-camera").click()
    own_status(page, "The camera is running")
    page.locator("#live-take").click()
    own_status(page, "1 good image.")
    page.evaluate("live.takePause = 0")
    page.locator("#live-take-all").click()
    page.wait_for_function("live.padim().good === 31")
    page.locator("#live-own-stop").click()
    own_status(page, "The camera is off")
    assert page.evaluate(CAMERA_IS_OFF)
    assert page.locator("#live-own-camera").is_visible()
    assert page.locator("#live-take").is_hidden()
    page.locator("#live-clear").click()


def test_only_one_part_has_the_camera(live):
    page = live.page
    page.evaluate(FAKE_CAMERA)
    page.locator("#live-own-camera").click()
    own_status(page, "The camera is running")
    page.evaluate("window.firstStream = cameraStream")
    page.evaluate("live.say('')")
    page.locator("#live-camera").click()
    live.status("The camera is running")
    own_status(page, "The camera is off")
    assert page.evaluate("firstStream.getTracks()[0].readyState") == "ended"
    page.locator("#live-stop").click()
    assert page.evaluate(CAMERA_IS_OFF)


def test_each_part_has_a_still_image(browser, address):
    page = browser.context.new_page()
    try:
        page.goto(address)
        for part in ("cam", "padim"):
            image = page.locator(f"#live-{part} img")
            assert image.is_visible()
            assert image.evaluate("image => image.naturalWidth") > 400
        assert page.locator("#live-bars-macs span").count() == 28
    finally:
        page.close()
    # The bars replace a chart, which shows the same without the script.
    chart = (HTML / "_static" / "live" / "cost.svg").read_text()
    macs = [layer.macs for layer in profile(MobileNetV1()).layers if layer.macs]
    heights = [float(part.split('"')[0]) for part in chart.split('height="')[1:]]
    assert heights == pytest.approx([100 * n / max(macs) for n in macs], abs=0.006)


@pytest.mark.parametrize("page", ["index", "01_mobilenet", "02_cam", "05_padim"])
def test_other_pages_lead_here(page):
    assert "live.html" in (HTML / "book" / f"{page}.html").read_text()


def test_without_simd_the_page_says_so(browser, address):
    page = browser.context.new_page()
    try:
        page.goto(address)
        page.evaluate("live.hasSimd = () => false")
        page.locator("#live-start").click()
        status = page.locator("#live-status", has_text="no WebAssembly with SIMD")
        status.wait_for()
        assert page.locator("#live-cam img").is_visible()
        page.locator("#live-fit").click()
        status = page.locator("#live-fit-status", has_text="no WebAssembly with SIMD")
        status.wait_for()
        assert page.locator("#live-padim img").is_visible()
    finally:
        page.close()
