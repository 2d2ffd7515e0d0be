"""Write the files of book/live.md: still images, and scripts that a click loads.

They are written to _static/live in the built book and are not committed. The scripts
hold the weights, the engine, photographs and solar cells. They are classic scripts,
because a page opened from a file may not fetch anything: each assigns one value to
`live.data`.

The weights are those of EfficientNet-Lite0. Batch norm is folded into the
convolutions. The filters of most 1×1 layers are stored as int8 and the others as int16,
both with one scale per output channel; scales and biases are float32. The parts of a
layer follow each other in the order filter, scales, biases, in which
book/_static/live/network.js reads them.
"""

import base64
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage.data
import timm
import torch
from PIL import Image
from sphinx.application import Sphinx
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from paperlib import PaDiM, backbones  # noqa: E402
from paperlib.anomaly_map import upsample  # noqa: E402
from paperlib.cam import cam  # noqa: E402
from paperlib.complexity import profile  # noqa: E402
from paperlib.datasets import elpv  # noqa: E402
from paperlib.mobilenet import MobileNetV1  # noqa: E402
from paperlib.storage import write_text  # noqa: E402

PAGE = "book/live"
SCRIPTS = ("network.js", "image.js", "cam.js", "cost.js", "padim.js", "cells.js")
ENGINE = ROOT / "book" / "_static" / "tfjs"
# The page loads one of them; network.js chooses.
BACKENDS = {"wasm": "tf-backend-wasm.min.js", "webgl": "tf-backend-webgl.min.js"}
SAMPLES = {
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
    "astronaut": skimage.data.astronaut,
}
# 1×1 layers with 16 bits: the first stages are small, and their errors spread the most.
WIDE = ("blocks.0.", "blocks.1.", "blocks.2.", "blocks.3.")
WEIGHT_FILES = 8  # the progress bar advances after each
POSITIVE, NEGATIVE = (214, 69, 0), (0, 92, 204)  # colours of the map, as in image.js
OPACITY = 0.7
# Solar cells: to fit, and unseen ones of each class. Notebook 05 draws the same order.
TRAIN, UNSEEN, FIRST_UNSEEN = 100, 40, 200
WEBP_QUALITY = 70
QUANTILE = 0.95  # of leave-one-out scores: the threshold, as in cells.js
# Colours of layers in the chart of multiply-adds, as in live.css.
LAYER_COLOURS = {
    "standard": "#7a7a7a",
    "depthwise": "#d64500",
    "pointwise": "#1a73d9",
    "linear": "#2a9d5c",
}
Cells = dict[str, list[bytes]]  # images by name of their group


def folded_layers(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, weight and bias of each layer; batch norm is part of both."""
    pending = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            pending = name, module.weight
        elif isinstance(module, nn.BatchNorm2d):
            layer, weight = pending
            factor = module.weight / (module.running_var + module.eps).sqrt()
            bias = module.bias - module.running_mean * factor
            yield layer, weight * factor[:, None, None, None], bias
        elif isinstance(module, nn.Linear):
            yield name, module.weight[:, :, None, None], module.bias


def quantise(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return integers (h, w, in, out) and one scale per output channel.

    For a depthwise layer, the last two axes are (channels, 1). With 8 bits, the scale
    is the one of least squared error: it may clip the largest weights of a channel.
    """
    highest = 2 ** (bits - 1) - 1
    # Some channels of the network are zero; any scale but 0 represents them.
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    scale, least = largest / highest, None
    for share in np.linspace(1, 0.5, 26) if bits == 8 else ():
        candidate = share * largest / highest
        error = (_round(weight, candidate, highest) * candidate - weight).square()
        error = error.sum((1, 2, 3), keepdim=True)
        least = error if least is None else least
        scale = torch.where(error < least, candidate, scale)
        least = torch.minimum(error, least)
    is_depthwise = weight.shape[1] == 1
    order = (2, 3, 0, 1) if is_depthwise else (2, 3, 1, 0)
    integers = _round(weight, scale, highest).permute(order).numpy()
    return integers.astype(f"<i{bits // 8}"), scale.flatten().numpy()


def _round(weight: Tensor, scale: Tensor, highest: int) -> Tensor:
    return (weight / scale).round().clamp(-highest, highest)


def packed_weights(model: nn.Module) -> bytes:
    """Return filters, scales and biases of all layers, one after the other."""
    parts = []
    with torch.no_grad():
        for name, weight, bias in folded_layers(model):
            is_pointwise = weight.shape[2:] == (1, 1)
            is_narrow = is_pointwise and not name.startswith(WIDE)
            integers, scale = quantise(weight, bits=8 if is_narrow else 16)
            parts += [integers, scale.astype("<f4"), bias.numpy().astype("<f4")]
    return b"".join(part.tobytes() for part in parts)


def still_of_cam(backbone: backbones.Backbone) -> bytes:
    """Return the image that the page shows before the network is loaded, as JPEG."""
    image = SAMPLES["cat"]()
    with torch.no_grad():
        result = cam(backbone.model, backbone.transform(image[None]))
    values = upsample(result.maps[0] / result.maps.abs().max(), image.shape[:2]).numpy()
    return encoded(overlay(image, values), "JPEG", quality=85)


def result_for_cat(backbone: backbones.Backbone) -> dict[str, float]:
    """Return class and probability, by which the page checks its engine."""
    with torch.no_grad():
        logits = backbone.model(backbone.transform(SAMPLES["cat"]()[None]))
    probability, target = logits[0].softmax(0).max(0)
    return {"target": int(target), "probability": round(float(probability), 4)}


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Draw a map with values in [-1, 1] over an image (H, W, 3), as image.js does."""
    colour = np.where(values[..., None] > 0, POSITIVE, NEGATIVE)
    opacity = OPACITY * np.abs(values)[..., None].clip(max=1)
    return (1 - opacity) * image + opacity * colour


def fit_cells(backbone: backbones.Backbone, cells: Cells) -> PaDiM:
    """Fit PaDiM to the training cells and set its threshold, as the page does."""
    detector = PaDiM(backbone.extractor())
    train = [detector.prepare(decoded(cell)) for cell in cells["train"]]
    detector.fit(train).normal_threshold(train, QUANTILE, fitted=True)
    return detector


def still_of_padim(detector: PaDiM, cells: Cells) -> bytes:
    """Return maps of two unseen defective cells and a functional one, as JPEG."""
    shown = [*cells["defective"][:2], cells["functional"][0]]
    images = [decoded(cell) for cell in shown]
    maps = detector.anomaly_map(detector.prepare(images)) / (2 * detector.threshold)
    panels = [
        overlay(np.asarray(image), values)
        for image, values in zip(images, maps.numpy(), strict=True)
    ]
    return encoded(np.concatenate(panels, 1), "JPEG", quality=85)


def still_of_cost() -> str:
    """Return a chart of the multiply-adds per layer of MobileNetV1, as SVG."""
    model = MobileNetV1()
    bars = []
    for layer in profile(model).layers:
        if layer.macs:
            module = model.get_submodule(layer.name)
            bars.append((layer.macs, LAYER_COLOURS[layer_type(module)]))
    largest = max(macs for macs, _ in bars)
    rectangles = "".join(
        f'<rect x="{20 * k}" y="{100 * (1 - macs / largest):.2f}" width="19"'
        f' height="{100 * macs / largest:.2f}" fill="{colour}"/>'
        for k, (macs, colour) in enumerate(bars)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" preserveAspectRatio="none"'
        f' viewBox="0 0 {20 * len(bars)} 100">{rectangles}</svg>\n'
    )


def layer_type(module: nn.Module) -> str:
    """Return the type of a layer by which cost.js colours it."""
    if isinstance(module, nn.Linear):
        return "linear"
    if module.groups > 1:
        return "depthwise"
    return "pointwise" if module.kernel_size == (1, 1) else "standard"


def encoded(image: np.ndarray, kind: str, **options: int) -> bytes:
    """Encode an image of numbers from 0 to 255."""
    stream = io.BytesIO()
    pixels = np.asarray(image).round().astype(np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def draw_cells(backbone: backbones.Backbone) -> Cells:
    """Draw solar cells to fit and unseen ones; return 224×224 pixels as WebP."""
    cells = elpv("mono")
    generator = torch.Generator().manual_seed(0)
    functional, defective = (
        indices[torch.randperm(len(indices), generator=generator)]
        for indices in (cells.probability.eq(p).nonzero().flatten() for p in (0, 1))
    )
    chosen = {
        "train": functional[:TRAIN],
        "functional": functional[FIRST_UNSEEN : FIRST_UNSEEN + UNSEEN],
        "defective": defective[:UNSEEN],
    }
    return {
        name: [
            encoded(255 * image[0], "WEBP", quality=WEBP_QUALITY, method=6)
            for image in backbone.transform.resize(cells.images[indices])
        ]
        for name, indices in chosen.items()
    }


def contents(backbone: backbones.Backbone) -> dict[str, object]:
    """Return the value of each script of the network, by name."""
    packed = packed_weights(backbone.model)
    size = -(-len(packed) // WEIGHT_FILES)
    return {
        "samples": {
            name: data_url(
                encoded(load(), "JPEG", quality=88, subsampling=0, optimize=True),
                "image/jpeg",
            )
            for name, load in SAMPLES.items()
        },
        "classes": EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"],
        **{
            f"weights{k}": base64.b64encode(packed[k * size : (k + 1) * size]).decode()
            for k in range(WEIGHT_FILES)
        },
    }


def write_script(folder: Path, name: str, value: object) -> int:
    """Write a value as a script; return its bytes."""
    text = f'live.data["{name}"] = {json.dumps(value)};\n'
    write_text(folder / f"data_{name}.js", text)
    return len(text.encode())


def script_of_engine(path: str) -> dict[str, int]:
    """Return the bytes of a script of TensorFlow.js by the address the page uses."""
    return {f"../tfjs/{path}": (ENGINE / path).stat().st_size}


def write_files(folder: Path) -> None:
    """Write the scripts, their list (files.js) and the still images."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = backbones.load("efficientnet_lite0")
    sizes = script_of_engine("tf-core.min.js")
    for name, value in contents(backbone).items():
        sizes[f"data_{name}.js"] = write_script(folder, name, value)
    engines = {name: script_of_engine(path) for name, path in BACKENDS.items()}
    binary = (ENGINE / "tfjs-backend-wasm-simd.wasm").read_bytes()
    url = data_url(binary, "application/octet-stream")
    engines["wasm"]["data_wasm.js"] = write_script(folder, "wasm", url)
    cells = draw_cells(backbone)
    detector = fit_cells(backbone, cells)
    value = {name: [data_url(c, "image/webp") for c in cells[name]] for name in cells}
    value["channels"] = detector.channels.tolist()
    size = write_script(folder, "cells", value)
    lists = {
        "files": sizes,
        "engines": engines,
        "cellsSize": size,
        "expected": result_for_cat(backbone),
    }
    lines = [f"live.{name} = {json.dumps(value)};\n" for name, value in lists.items()]
    write_text(folder / "files.js", "".join(lines))
    (folder / "cam.jpg").write_bytes(still_of_cam(backbone))
    (folder / "padim.jpg").write_bytes(still_of_padim(detector, cells))
    write_text(folder / "cost.svg", still_of_cost())


def _write(app: Sphinx, exception: Exception | None) -> None:
    """Write the files unless those of an earlier build are of the same sources."""
    if exception is not None or app.builder.name != "html":
        return
    folder = Path(app.outdir, "_static", "live")
    sources = [Path(__file__).read_bytes(), torch.__version__, timm.__version__]
    sources += [path.read_bytes() for path in sorted(ENGINE.iterdir())]
    digest = hashlib.sha256(repr(sources).encode()).hexdigest()
    mark = folder / ".sources"
    if not mark.is_file() or mark.read_text() != digest:
        write_files(folder)
        write_text(mark, digest)


def _add_files(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    if page == PAGE:
        app.add_css_file("live/live.css")
        for k, name in enumerate((*SCRIPTS[:1], "files.js", *SCRIPTS[1:])):
            app.add_js_file(f"live/{name}", loading_method="defer", priority=600 + k)


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", _add_files)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
