"""Wrong arguments: a call returns the right result, or raises ValueError.

`CALLS` calls each function of the contract once, with right arguments. Each argument is
then replaced by every wrong value of its kind, one at a time, as users would call it:
without the type checks of the tests. No error of a dependency and no warning may
reach the user, and a call that returns must return finite numbers: for another dtype,
an array or a list the same ones as for the tensor.

Functions as arguments are not replaced, nor numbers so large that memory or time are
short; Python and the operating system say what is wrong with these.
"""

import copy
import functools
import math
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from PIL import Image
from refusals import without_type_checks
from torch import Tensor, nn

import paperlib
from paperlib import (
    activations,
    anomaly_map,
    backbones,
    cam,
    complexity,
    datasets,
    gradcam,
    metrics,
    mobilenet,
    neighbors,
    padim,
    patch_svdd,
    training,
    viz,
)

LIBRARY = str(Path(paperlib.__file__).parent)
NAN, INF, HUGE = math.nan, math.inf, 2**70
REAL = (
    *(torch.uint8, torch.int64, torch.bool, torch.uint16),
    *(torch.float16, torch.bfloat16, torch.float64),
)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()


# ---- the wrong values of an argument, by the type of the right one ----

Values = Iterator[tuple[str, Any]]


def objects(right: Any) -> Values:
    for value in (None, "text", object(), {"a": 1}):
        yield f"{value!r:.12}", value


def tensors(right: Tensor) -> Values:
    for dtype in (*REAL, torch.complex64):
        if dtype != right.dtype:
            yield str(dtype), right.to(dtype)
    yield "0-d", right.new_ones(())
    yield "flat", right.flatten()
    yield "one axis more", right[None]
    for axis in range(right.ndim):
        yield f"axis {axis} empty", right.narrow(axis, 0, 0)
        yield f"axis {axis} dropped", right.select(axis, 0)
        yield f"axis {axis} doubled", torch.cat([right, right], axis)
        yield f"axis {axis} of 1", right.narrow(axis, 0, 1)
    yield "meta", right.to("meta")
    yield "sparse", right.to_sparse()
    if right.is_floating_point():
        yield "quantized", torch.quantize_per_tensor(right, 0.1, 0, torch.quint8)
        extremes = NAN, INF
    elif right.dtype == torch.bool:
        extremes = ()
    else:
        extremes = torch.iinfo(right.dtype).min, torch.iinfo(right.dtype).max
    for number in extremes:
        changed = right.detach().clone()
        changed.view(-1)[0] = number
        yield f"with {number}", changed
    yield "array", right.detach().numpy()
    yield "list", right.tolist()
    yield "ragged list", [[1.0], [1.0, 2.0]]
    yield "empty list", []
    yield "array of objects", np.array([None, "a"])
    yield from objects(right)


def numbers(right: float) -> Values:
    for value in (0, -1, -0.5, 1.5, True, NAN, INF, -INF, HUGE, "1", 1j, None, [1]):
        yield repr(value), value
    yield "tensor", torch.tensor([1.0, 2.0])
    yield "object", object()


def texts(right: str) -> Values:
    for value in ("", "unknown", "\0", 3, None, ["a"], b"a", object()):
        yield f"{value!r:.12}", value


def paths(right: Path) -> Values:
    folder = right.parent
    yield "missing", folder / "missing.png"
    yield "in a missing folder", folder / "no" / "missing.png"
    yield "a folder", folder
    contents = {
        "empty.png": b"",
        "text.png": b"not an image",
        "no_ending": right.read_bytes()[:-20] if right.is_file() else b"\x89PNG",
        "zip.safetensors": b"PK\x05\x06" + bytes(18),
        "pickle.pkl": b"\x80\x04N.",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
        yield name, folder / name
    yield "text", str(folder / "text.png")
    yield "below a file", folder / "empty.png" / "a"
    (folder / "circle").unlink(missing_ok=True)
    (folder / "circle").symlink_to("circle")
    yield "a link to itself", folder / "circle"
    locked = folder / "locked.png"  # readable for the superuser all the same
    locked.unlink(missing_ok=True)
    locked.touch(mode=0o000)
    yield "no permission", locked
    # `open` takes an integer for a file descriptor, and closes what it opened.
    for value in ("x" * 300, "", "a\0b", b"bytes", 3, None, [], object()):
        yield f"{value!r:.12}", value


def sequences(right: Any) -> Values:
    kind = type(right)
    for values in ((), (None,), ("a", 1), (*right, *right), ([1], 2), (-1,), (NAN,)):
        yield f"{values!r:.30}", kind(values)
    yield "1.5", kind([1.5])
    yield "huge", kind([HUGE])
    yield "number", 3
    yield "generator", (value for value in right)
    yield from objects(right)


def modules(right: nn.Module) -> Values:
    for module in (nn.Identity(), nn.Sequential(), nn.Conv2d(1, 2, 3)):
        yield repr(module), module
    yield "other input", nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
    yield "float64", copy.deepcopy(right).double()
    yield "meta", copy.deepcopy(right).to("meta")
    yield "class", nn.ReLU
    yield from objects(right)


KINDS: list[tuple[Any, Callable[[Any], Any]]] = [
    (bool, lambda right: ()),
    (Tensor, tensors),
    (nn.Module, modules),
    ((int, float), numbers),
    (Path, paths),
    (str, texts),
    (datasets.ELPV, objects),
    ((list, tuple), sequences),
    (Callable, lambda right: ()),
    (object, objects),
]
# Right values of `numbers`, with which a call takes long.
SLOW = (
    {"seconds": [1.5, HUGE], "workers": [HUGE], "threads": [HUGE]}
    | dict.fromkeys(("learning_rate", "svdd_weight"), [1.5, HUGE, None])
    | dict.fromkeys(
        (
            "steps",
            "epochs",
            "repeats",
            "repeat",
            "crops",
            "pairs",
            "count",
            "batch_size",
        ),
        [HUGE],
    )
)


def wrong_values(argument: str, right: Any) -> Values:
    """Name and list the wrong values for an argument."""
    values = next(values for kind, values in KINDS if isinstance(right, kind))
    for label, value in values(right):
        if not (type(value) in (int, float) and value in SLOW.get(argument, [])):
            yield label, value


# ---- the right calls ----


def extractor():
    return backbones.FeatureExtractor(small(), ["0", "1"])


@functools.cache
def mobile_net():
    return mobilenet.MobileNetV1(1 / 32, 3).eval()


@functools.cache
def fitted_padim() -> padim.PaDiM:
    return padim.PaDiM(extractor(), 4).fit([rand(4, 3, 16, 16)])


@functools.cache
def fitted_svdd() -> patch_svdd.PatchSVDD:
    torch.manual_seed(0)
    return patch_svdd.PatchSVDD(patch_svdd.HierarchicalEncoder(4)).fit(
        rand(3, 3, 72, 64)
    )


@functools.cache
def encoder():
    torch.manual_seed(0)
    return patch_svdd.HierarchicalEncoder(4)


def gaussian():
    return padim.PatchGaussian(2, 3).update(rand(8, 2, 3))


def score_of_activations():
    features = rand(2, 6, 4, 4).requires_grad_()
    return features.square().sum((1, 2, 3)), features


def anomaly_figure(**arguments):
    plt.close(viz.anomaly_figure(**arguments))


def record(model, layer):
    with activations.record_activations(model, layer) as records:
        pass
    return [*records.values()]


def train(images, labels, **options):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return training.train_classifier(model, (images, labels), optimizer, **options)


PNG, MASK = Path("a/image.png"), Path("a/mask.png")
LABELS, SCORES = torch.tensor([0, 1, 0, 1]), torch.tensor([0.1, 0.7, 0.2, 0.6])
MASKS = (rand(2, 6, 6) > 0.5).long()
PIXELS = (rand(20, 20, 3) * 255).byte()
TRANSFORM = backbones.Transform(16, (0.5,) * 3, (0.2,) * 3)
GENERATOR = torch.Generator
CELLS = datasets.ELPV(
    (rand(8, 9, 9) * 255).byte(),
    torch.tensor([0.0, 1] * 4),
    np.array(["mono"] * 8),
)


def call(function, **arguments):
    return lambda: (function, arguments)


CALLS: dict[str, Callable[[], tuple[Callable, dict[str, Any]]]] = {
    "complexity.conv2d_macs": call(
        complexity.conv2d_macs,
        kernel=3,
        in_channels=4,
        out_channels=8,
        out_size=7,
        groups=2,
    ),
    "complexity.conv2d_macs of pairs": call(
        complexity.conv2d_macs,
        kernel=(3, 3),
        in_channels=4,
        out_channels=8,
        out_size=(7, 7),
    ),
    "complexity.depthwise_separable_macs": call(
        complexity.depthwise_separable_macs,
        kernel=3,
        in_channels=4,
        out_channels=8,
        out_size=7,
    ),
    "complexity.profile": lambda: (
        complexity.profile,
        {
            "model": small(),
            "input_shape": (1, 3, 8, 8),
            "dtype": torch.float32,
            "rules": {},
        },
    ),
    "complexity.profile of inputs": lambda: (
        complexity.profile,
        {"model": small(), "inputs": rand(1, 3, 8, 8)},
    ),
    "complexity.Profile.table": lambda: (
        complexity.profile(small(), (1, 3, 8, 8)).table,
        {"depth": 1},
    ),
    "complexity.time_layers": lambda: (
        complexity.time_layers,
        {"model": small(), "images": rand(1, 3, 8, 8), "repeats": 1},
    ),
    "complexity.time_call": call(
        complexity.time_call, run=lambda: 0, device="cpu", seconds=1e-4
    ),
    "complexity.measure_machine": call(
        complexity.measure_machine, device="cpu", side=2, seconds=1e-4
    ),
    "mobilenet.MobileNetV1": call(
        mobilenet.MobileNetV1, width=0.1, num_classes=3, last_stride=1
    ),
    "mobilenet.MobileNetV1.forward": lambda: (
        mobile_net(),
        {"images": rand(1, 3, 32, 32)},
    ),
    "mobilenet.parameter_groups": lambda: (
        mobilenet.parameter_groups,
        {"model": small(), "weight_decay": 0.1},
    ),
    "activations.record_activations": lambda: (
        record,
        {"model": small(), "layer": "0"},
    ),
    "activations.find_layer": lambda: (
        activations.find_layer,
        {"model": small(), "layer": "0"},
    ),
    "cam.class_activation_map": call(
        cam.class_activation_map,
        features=rand(2, 6, 4, 4),
        weight=rand(5, 6),
        targets=torch.tensor([0, 3]),
    ),
    "cam.cam": lambda: (
        cam.cam,
        {
            "model": small(),
            "images": rand(2, 3, 16, 16),
            "targets": torch.tensor([0, 3]),
        },
    ),
    "cam.cam of a list": lambda: (
        cam.cam,
        {"model": small(), "images": rand(2, 3, 16, 16), "targets": [0, 3]},
    ),
    "cam.bounding_boxes": call(
        cam.bounding_boxes, map=rand(5, 6), threshold=0.5, connectivity=8
    ),
    "gradcam.grad_cam": lambda: (
        gradcam.grad_cam,
        {
            "model": small(),
            "images": rand(2, 3, 16, 16),
            "layer": "0",
            "targets": [0, 3],
            "reshape": lambda x: x,
            "explain": 0,
            "call": -1,
        },
    ),
    "gradcam.grad_cam of layers": lambda: (
        gradcam.grad_cam,
        {
            "model": small(),
            "images": (rand(2, 3, 16, 16),),
            "layer": ["0", "1"],
            "targets": torch.tensor([0, 3]),
        },
    ),
    "gradcam.guided_backprop": lambda: (
        gradcam.guided_backprop,
        {"model": small(), "images": rand(2, 3, 16, 16), "targets": 1},
    ),
    "gradcam.guided_grad_cam": lambda: (
        gradcam.guided_grad_cam,
        {"model": small(), "images": rand(2, 3, 16, 16), "layer": "0", "targets": 1},
    ),
    "gradcam.grad_cam_weights": lambda: (
        gradcam.grad_cam_weights,
        dict(zip(("score", "activations"), score_of_activations(), strict=True)),
    ),
    "gradcam.grad_cam_map": call(
        gradcam.grad_cam_map, weights=rand(2, 6), activations=rand(2, 6, 4, 4)
    ),
    "anomaly_map.upsample": call(
        anomaly_map.upsample, maps=rand(2, 5, 5), size=16, mode="bilinear"
    ),
    "anomaly_map.upsample to a pair": call(
        anomaly_map.upsample, maps=rand(2, 5, 5), size=(16, 8)
    ),
    "anomaly_map.minmax": call(anomaly_map.minmax, maps=rand(2, 5, 5)),
    "anomaly_map.gaussian_blur": call(
        anomaly_map.gaussian_blur, maps=rand(2, 8, 8), sigma=1.0
    ),
    "anomaly_map.spread_patch_scores": call(
        anomaly_map.spread_patch_scores,
        scores=rand(2, 5, 5),
        patch=4,
        stride=2,
        size=12,
    ),
    "neighbors.nearest_distance": call(
        neighbors.nearest_distance, queries=rand(6, 4), bank=rand(7, 4), chunk=3
    ),
    "neighbors.greedy_coreset": call(
        neighbors.greedy_coreset, bank=rand(7, 4), fraction=0.5, seed=0
    ),
    "neighbors.covering_radius": call(
        neighbors.covering_radius, bank=rand(7, 4), chosen=torch.tensor([0, 3])
    ),
    "backbones.load": call(
        backbones.load, name="efficientnet_lite0", weights=Path("a/lite0.pth")
    ),
    "backbones.Transform": call(
        backbones.Transform,
        size=16,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        crop=8,
        resampling="bilinear",
        bits=12,
    ),
    "backbones.Transform.__call__": call(TRANSFORM, images=rand(2, 3, 20, 20)),
    "backbones.Transform.__call__ of bytes": call(TRANSFORM, images=PIXELS[None]),
    "backbones.Transform.__call__ of a path": call(TRANSFORM, images=PNG),
    "backbones.Transform.__call__ of a list": call(TRANSFORM, images=[PNG]),
    "backbones.Transform.resize": call(TRANSFORM.resize, images=rand(2, 3, 20, 20)),
    "backbones.FeatureExtractor": lambda: (
        backbones.FeatureExtractor,
        {"model": small(), "layers": ["0", "1"], "reshape": lambda x: x},
    ),
    "backbones.FeatureExtractor.forward": lambda: (
        extractor(),
        {"images": rand(2, 3, 16, 16)},
    ),
    "backbones.concatenate_embeddings": call(
        backbones.concatenate_embeddings,
        maps=[rand(2, 3, 8, 8), rand(2, 4, 4, 4)],
        channels=[5, 0],
    ),
    "backbones.concatenate_embeddings of an index": call(
        backbones.concatenate_embeddings,
        maps=[rand(2, 3, 8, 8)],
        channels=torch.tensor([1, 0]),
    ),
    "padim.PatchGaussian": call(
        padim.PatchGaussian,
        positions=2,
        dimensions=3,
        dtype=torch.float32,
        device="cpu",
    ),
    "padim.PatchGaussian.update": lambda: (gaussian().update, {"x": rand(3, 2, 3)}),
    "padim.PatchGaussian.merge": lambda: (gaussian().merge, {"other": gaussian()}),
    "padim.PatchGaussian.covariance": lambda: (
        gaussian().covariance,
        {"epsilon": 0.01},
    ),
    "padim.mahalanobis_distance": call(
        padim.mahalanobis_distance,
        x=rand(2, 4, 3),
        mean=rand(4, 3),
        cholesky=torch.eye(3).expand(4, 3, 3) + 0,
    ),
    "padim.leave_one_out_distance": call(
        padim.leave_one_out_distance, distance=rand(2, 4), count=9
    ),
    "padim.PaDiM": lambda: (
        padim.PaDiM,
        {
            "extractor": extractor(),
            "dimensions": 4,
            "seed": 0,
            "epsilon": 0.01,
            "mode": "bilinear",
            "sigma": 4.0,
            "transform": TRANSFORM,
        },
    ),
    "padim.PaDiM.fit": lambda: (
        padim.PaDiM(extractor(), 4).fit,
        {"batches": [rand(4, 3, 16, 16)]},
    ),
    "padim.PaDiM.fit of a batch": lambda: (
        lambda images: padim.PaDiM(extractor(), 4).fit([images]).mean,
        {"images": rand(4, 3, 16, 16)},
    ),
    "padim.PaDiM.prepare": lambda: (
        padim.PaDiM(extractor(), 4, transform=TRANSFORM).prepare,
        {"images": PIXELS[None]},
    ),
    "padim.PaDiM.forward": lambda: (fitted_padim(), {"images": rand(2, 3, 16, 16)}),
    "padim.PaDiM.anomaly_map": lambda: (
        fitted_padim().anomaly_map,
        {"images": rand(2, 3, 16, 16)},
    ),
    "padim.PaDiM.score": lambda: (fitted_padim().score, {"images": rand(2, 3, 16, 16)}),
    "padim.PaDiM.normal_threshold": lambda: (
        fitted_padim().normal_threshold,
        {"batches": [rand(2, 3, 16, 16)], "quantile": 0.5},
    ),
    "padim.PaDiM.save": lambda: (
        fitted_padim().save,
        {"path": Path("a/saved.safetensors")},
    ),
    "padim.PaDiM.load": lambda: (
        padim.PaDiM.load,
        {"path": Path("a/padim.safetensors"), "extractor": extractor()},
    ),
    "patch_svdd.PatchEncoder": call(patch_svdd.PatchEncoder, dimensions=4),
    "patch_svdd.PatchEncoder.forward": lambda: (
        patch_svdd.PatchEncoder(4),
        {"patches": rand(2, 3, 32, 32)},
    ),
    "patch_svdd.PatchEncoder.embed": lambda: (
        patch_svdd.PatchEncoder(4).embed,
        {"images": rand(2, 3, 40, 40), "stride": 4},
    ),
    "patch_svdd.FlatEncoder": call(patch_svdd.FlatEncoder, dimensions=4),
    "patch_svdd.FlatEncoder.forward": lambda: (
        patch_svdd.FlatEncoder(4),
        {"patches": rand(2, 3, 64, 64)},
    ),
    "patch_svdd.HierarchicalEncoder": call(
        patch_svdd.HierarchicalEncoder, dimensions=4
    ),
    "patch_svdd.HierarchicalEncoder.forward": lambda: (
        encoder(),
        {"patches": rand(2, 3, 64, 64)},
    ),
    "patch_svdd.HierarchicalEncoder.embed": lambda: (
        encoder().embed,
        {"images": rand(1, 3, 72, 64), "stride_small": 4, "stride_big": 16},
    ),
    "patch_svdd.HierarchicalEncoder.save": lambda: (
        encoder().save,
        {"path": Path("a/saved.safetensors")},
    ),
    "patch_svdd.HierarchicalEncoder.load": call(
        patch_svdd.HierarchicalEncoder.load, path=Path("a/encoder.safetensors")
    ),
    "patch_svdd.load_released_weights": call(
        patch_svdd.load_released_weights, path=Path("a/enchier.pkl")
    ),
    "patch_svdd.PositionClassifier": call(patch_svdd.PositionClassifier, dimensions=4),
    "patch_svdd.PositionClassifier.forward": lambda: (
        patch_svdd.PositionClassifier(8),
        {"a": rand(6, 8), "b": rand(6, 8)},
    ),
    "patch_svdd.svdd_loss": call(patch_svdd.svdd_loss, a=rand(6, 8), b=rand(6, 8)),
    "patch_svdd.position_loss": lambda: (
        patch_svdd.position_loss,
        {
            "classifier": patch_svdd.PositionClassifier(8),
            "a": rand(6, 8),
            "b": rand(6, 8),
            "position": torch.arange(6),
        },
    ),
    "patch_svdd.initialize": lambda: (patch_svdd.initialize, {"encoder": encoder()}),
    "patch_svdd.mean_image": call(patch_svdd.mean_image, images=rand(3, 3, 72, 64)),
    "patch_svdd.perturb": lambda: (
        lambda **a: patch_svdd.perturb(**a).mean(),
        {"images": rand(3, 3, 72, 64), "generator": GENERATOR()},
    ),
    "patch_svdd.neighbor_pairs": lambda: (
        patch_svdd.neighbor_pairs,
        {
            "count": 2,
            "size": (72, 64),
            "patch": 32,
            "generator": GENERATOR(),
            "step": 1,
        },
    ),
    "patch_svdd.position_pairs": lambda: (
        patch_svdd.position_pairs,
        {
            "count": 2,
            "size": (128, 128),
            "patch": 32,
            "generator": GENERATOR(),
            "step": 1,
        },
    ),
    "patch_svdd.train": lambda: (
        lambda **a: patch_svdd.train(**a).mean,
        {
            "encoder": patch_svdd.PatchEncoder(4),
            "images": rand(3, 3, 64, 64),
            "steps": 1,
            "crops": 1,
            "side": 64,
            "pairs": 2,
            "svdd_weight": 0.1,
            "objective": "patch_svdd",
            "optimizer": "adam",
            "learning_rate": 0.01,
            "dtype": torch.float32,
            "seed": 0,
            "every": 1,
        },
    ),
    "patch_svdd.train_on_patches": lambda: (
        lambda **a: patch_svdd.train_on_patches(**a).mean,
        {
            "encoder": patch_svdd.PatchEncoder(4),
            "images": rand(3, 3, 64, 64),
            "epochs": 1,
            "repeat": 1,
            "batch_size": 2,
            "svdd_weight": 0.1,
            "learning_rate": 0.01,
            "seed": 0,
            "every": 1,
        },
    ),
    "patch_svdd.train to a file": lambda: (
        lambda **a: (
            patch_svdd.train(
                patch_svdd.PatchEncoder(4),
                rand(3, 3, 64, 64),
                steps=1,
                crops=1,
                pairs=2,
                **a,
            ).mean
        ),
        {"checkpoint": Path(f"a/{time.monotonic_ns()}")},
    ),
    "patch_svdd.PatchSVDD": lambda: (
        patch_svdd.PatchSVDD,
        {"encoder": encoder(), "stride_small": 4, "stride_big": 16},
    ),
    "patch_svdd.PatchSVDD.fit": lambda: (
        patch_svdd.PatchSVDD(encoder()).fit,
        {"images": rand(3, 3, 72, 64), "coreset": 0.02, "seed": 0},
    ),
    "patch_svdd.PatchSVDD.anomaly_maps": lambda: (
        fitted_svdd().anomaly_maps,
        {"images": rand(2, 3, 72, 64)},
    ),
    "patch_svdd.PatchSVDD.score": lambda: (
        fitted_svdd().score,
        {"images": rand(2, 3, 72, 64)},
    ),
    "patch_svdd.PatchSVDD.normal_threshold": lambda: (
        fitted_svdd().normal_threshold,
        {"images": rand(2, 3, 72, 64) ** 2, "quantile": 0.5},
    ),
    "patch_svdd.PatchSVDD.save": lambda: (
        fitted_svdd().save,
        {"path": Path("a/saved.safetensors")},
    ),
    "patch_svdd.PatchSVDD.load": call(
        patch_svdd.PatchSVDD.load, path=Path("a/svdd.safetensors")
    ),
    "metrics.auroc": call(metrics.auroc, labels=LABELS, scores=SCORES),
    "metrics.best_threshold": call(
        metrics.best_threshold, labels=LABELS, scores=SCORES
    ),
    "metrics.pixel_auroc": call(metrics.pixel_auroc, masks=MASKS, maps=rand(2, 6, 6)),
    "metrics.aupro": call(
        metrics.aupro, masks=MASKS, maps=rand(2, 6, 6), fpr_limit=0.5
    ),
    "metrics.intersection_over_union": call(
        metrics.intersection_over_union, a=(0, 0, 4, 4), b=torch.tensor([0, 0, 2, 4])
    ),
    "metrics.localization_error": call(
        metrics.localization_error,
        boxes=[(0, 0, 4, 4)],
        true_boxes=[(0, 0, 2, 4)],
        iou=0.5,
    ),
    "metrics.localization_error of tensors": call(
        metrics.localization_error,
        boxes=torch.tensor([[0, 0, 4, 4]]),
        true_boxes=torch.tensor([[0, 0, 4, 4]]),
    ),
    "training.predict": lambda: (
        training.predict,
        {"model": small(), "images": rand(2, 3, 16, 16), "batch_size": 1},
    ),
    "training.train_classifier": lambda: (
        train,
        {
            "images": rand(4, 3, 16, 16),
            "labels": torch.tensor([0, 1, 0, 1]),
            "epochs": 1,
            "batch_size": 2,
            "seed": 0,
            "workers": 0,
            "checkpoint": Path(f"a/{time.monotonic_ns()}"),
        },
    ),
    "training.train_classifier of": lambda: (
        training.train_classifier,
        {
            "model": small(),
            "data": (rand(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])),
            "optimizer": torch.optim.SGD(small().parameters(), 0.1),
            "epochs": 1,
        },
    ),
    "datasets.elpv": call(datasets.elpv, kind="mono"),
    "datasets.split_cells": lambda: (
        datasets.split_cells,
        {"cells": CELLS, "side": 4, "test_share": 0.5, "seed": 0},
    ),
    "datasets.textures": call(
        lambda **a: datasets.textures(**a)[0],
        kind="brick",
        split="test",
        count=2,
        side=8,
        size=8,
        seed=0,
    ),
    "datasets.synthetic_defects": call(
        lambda **a: datasets.synthetic_defects(**a)[0],
        normal=rand(2, 3, 20, 20),
        kinds=["crack"],
        contrast=0.5,
        seed=0,
        size=16,
    ),
    "datasets.SyntheticDefects": lambda: (
        lambda **a: datasets.SyntheticDefects(**a)[0],
        {
            "normal": datasets.TensorItems(rand(2, 3, 20, 20)),
            "kinds": ["crack"],
            "contrast": 0.5,
            "seed": 0,
        },
    ),
    "datasets.TensorItems": call(
        lambda **a: datasets.TensorItems(**a)[0],
        images=rand(2, 3, 20, 20),
        label=0,
        size=8,
    ),
    "datasets.batches": lambda: (
        lambda **a: list(datasets.batches(**a)),
        {"dataset": datasets.TensorItems(rand(2, 3, 20, 20)), "size": 2, "threads": 1},
    ),
    "datasets.MVTecAD": call(
        lambda **a: datasets.MVTecAD(**a)[0],
        root=Path("a/mvtec"),
        category="tile",
        split="test",
        variant="random",
        resize=8,
        crop=6,
        seed=0,
        bits=8,
    ),
    "datasets.folder": call(
        lambda **a: datasets.folder(**a)[0],
        root=Path("a/parts"),
        size=8,
        normal="normal",
        abnormal="abnormal",
        bits=8,
    ),
    "datasets.categories": call(datasets.categories, root=Path("a/mvtec")),
    "datasets.open_folder": call(datasets.open_folder, path=Path("a/parts")),
    "datasets.unpack": call(
        datasets.unpack,
        archive=Path("a/parts.zip"),
        folder=Path("a/unpacked"),
        max_bytes=10**6,
        max_members=10,
    ),
    "datasets.read_image": call(datasets.read_image, path=PNG, bits=8),
    "datasets.read_mask": call(datasets.read_mask, path=MASK),
    "viz.heatmap": call(viz.heatmap, map=rand(5, 5), colormap="viridis", size=8),
    "viz.overlay": call(
        viz.overlay, heat=rand(8, 8, 3), image=rand(8, 8, 3), weights=(0.5, 0.5)
    ),
    "viz.gradient_image": call(viz.gradient_image, gradient=rand(3, 8, 8)),
    "viz.anomaly_figure": call(
        anomaly_figure,
        images=rand(1, 3, 8, 8),
        maps=rand(1, 4, 4),
        masks=rand(1, 8, 8) > 0.5,
        labels=["a"],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Right files, in folder a of a temporary folder."""
    root = tmp_path_factory.mktemp("files")
    folder = root / "a"
    for part in ("parts/normal", "mvtec/tile/train/good", "mvtec/tile/test/good"):
        (folder / part).mkdir(parents=True)
        Image.fromarray(PIXELS.numpy()).save(folder / part / "0.png")
    Image.fromarray(PIXELS.numpy()).save(folder / "image.png")
    Image.fromarray((PIXELS[..., 0] > 99).byte().numpy() * 255).save(
        folder / "mask.png"
    )
    shutil.make_archive(str(folder / "parts"), "zip", folder / "parts")
    shutil.copy(backbones._lite0_weights(), folder / "lite0.pth")
    encoder().save(folder / "encoder.safetensors")
    torch.save(encoder().state_dict(), folder / "enchier.pkl")
    fitted_svdd().save(folder / "svdd.safetensors")
    fitted_padim().save(folder / "padim.safetensors")
    return root


def run(function: Callable, arguments: dict[str, Any]) -> Any:
    """Call as a user does; warnings raise."""
    with without_type_checks(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        return function(**arguments)


def numbers_in(result: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(result)
    return [
        torch.as_tensor(leaf).detach().double()
        for leaf in leaves
        if isinstance(leaf, Tensor | np.ndarray | float) and not is_meta(leaf)
    ]


def is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def fault(name: str, argument: str, value: Any) -> str | None:
    """Describe what is wrong about a call with a wrong value; None if it is right."""
    function, arguments = CALLS[name]()
    right = arguments[argument]
    try:
        result = run(function, arguments | {argument: value})
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        return None if LIBRARY in last else f"{error!r:.150} raised in {last}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            f for f in reversed(frames) if LIBRARY in f.filename or f == frames[0]
        )
        return f"{error!r:.150} at {Path(place.filename).name}:{place.lineno}"
    found = numbers_in(result)
    is_finite_input = all(x.isfinite().all() for x in numbers_in(value))
    if is_finite_input and not all(x.isfinite().all() for x in found):
        return "returns NaN or infinite values"
    if isinstance(right, Tensor):
        return compare(name, argument, right, value, found)
    return None


def compare(
    name: str, argument: str, right: Tensor, value: Any, found: list[Tensor]
) -> str | None:
    """Describe how a result differs from that of the same numbers in another dtype."""
    if isinstance(value, Tensor) and value.dtype in REAL and not is_meta(value):
        same = value.to(right.dtype)
    elif isinstance(value, np.ndarray | list) and np.shape(value) == right.shape:
        same = right
    else:
        return None
    function, arguments = CALLS[name]()
    try:
        expected = numbers_in(run(function, arguments | {argument: same}))
    except ValueError:  # of 8-bit values, for example, as floating point
        return None
    if len(found) != len(expected) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0.05, atol=0.02)
        for a, b in zip(found, expected, strict=True)
    ):
        return f"differs from the result of {right.dtype}"
    return None


TRAINS = {"patch_svdd.train", "patch_svdd.train_on_patches"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in TRAINS)) for name in CALLS],
)
def test_a_wrong_argument_is_refused_or_handled(name, files, monkeypatch):
    monkeypatch.chdir(files)
    function, arguments = CALLS[name]()
    run(function, arguments)
    faults = {
        f"{argument}={label}": found
        for argument, right in arguments.items()
        for label, value in wrong_values(argument, right)
        if (found := fault(name, argument, value))
    }
    assert faults == {}
