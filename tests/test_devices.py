"""Every public function on every device: no hidden copy to the host, no mix of devices,
no read in a loop.

`CALLS` calls each function once, on inputs that a `Place` makes where it is told to.
Where there is no GPU the place is a fake one: fake CUDA tensors have shapes and devices
but no values, refuse to meet tensors of another device, and can't be read. What needs
gradients, or numbers drawn on the host, runs on the meta device, whose tensors can't be
read either. Where there is a GPU, the same calls must give the CPU's results. What is
not called is in `EXEMPT`, with the reason; a new public function that is in neither
fails.
"""

import collections
import contextlib
import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import paperlib
from paperlib import (
    activations,
    anomaly_map,
    backbones,
    cam,
    devices,
    gradcam,
    inference,
    mobilenet,
    neighbors,
    padim,
    patch_svdd,
    runtime,
    training,
    validation,
)
from paperlib.padim import PatchGaussian
from paperlib.padim.gaussian import whiten, whitened_norm
from paperlib.patch_svdd.encoders import check_rgb
from paperlib.patch_svdd.images import check_range
from paperlib.patch_svdd.pairs import crop_patches, random_crops

aten = torch.ops.aten


class Place:
    """Makes inputs on a device: the same numbers on each, or none where tensors have no
    values.

    Args:
        device: where.
        fake: whether this is inside a FakeTensorMode, in which modules are built in
            place and not moved.
        n: images in a batch.
    """

    def __init__(self, device: str, *, fake: bool = False, n: int = 2):
        self.device, self.fake, self.n = torch.device(device), fake, n
        self.generator = None if fake else torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        if self.fake:
            return torch.rand(shape, device=self.device)
        return torch.rand(shape, generator=self.generator).to(self.device)

    def whole(self, high: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to high - 1."""
        if self.fake:
            return torch.randint(high, shape, device=self.device)
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def module(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A network in eval mode."""
        if self.fake:
            with self.device:
                return make().eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().eval().to(self.device)

    def pictures(self, side: int = 64) -> Tensor:
        return self(self.n, 3, side, side)

    def spd(self, p: int, d: int) -> Tensor:
        """Symmetric positive definite matrices (p, d, d)."""
        a = self(p, d, 2 * d)
        return a @ a.mT / (2 * d) + 0.1 * torch.eye(d, device=self.device)


def small() -> nn.Module:
    """A network that ends in global average pooling and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, 2, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def fed(at: Place) -> padim.PatchGaussian:
    return padim.PatchGaussian(4, 20).update(at(30, 4, 20))


def fitted_padim(at: Place) -> padim.PaDiM:
    extractor = backbones.FeatureExtractor(at.module(small), ["1", "4"])
    return padim.PaDiM(extractor, 10).fit([at(20, 3, 64, 64), at(20, 3, 64, 64)])


def encoder(at: Place) -> patch_svdd.HierarchicalEncoder:
    return at.module(lambda: patch_svdd.HierarchicalEncoder(8))


def classifier(at: Place) -> patch_svdd.PositionClassifier:
    return at.module(lambda: patch_svdd.PositionClassifier(8))


def fitted_svdd(at: Place) -> patch_svdd.PatchSVDD:
    return patch_svdd.PatchSVDD(encoder(at)).fit(at(3, 3, 96, 80))


def embeddings(at: Place) -> list[Tensor]:
    return [at(at.n, 3, 8, 8), at(at.n, 4, 4, 4)]


def gaussians(at: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Points, means and Cholesky factors."""
    return at(at.n, 4, 20), at(4, 20), torch.linalg.cholesky(at.spd(4, 20))


def recorded(at: Place) -> Tensor:
    model = at.module(small)
    with torch.no_grad(), activations.record_activations(model, "3") as kept:
        model(at.pictures())
    return kept["3"]


def through(
    manager: Callable[[nn.Module], contextlib.AbstractContextManager],
) -> Callable[[Place], Tensor]:
    def call(at: Place) -> Tensor:
        model = at.module(small)
        with torch.no_grad(), manager(model):
            return model(at.pictures())

    return call


def guided(at: Place) -> Tensor:
    images = at.pictures().requires_grad_()
    with activations.guided_relu():
        score = at.module(small)(images).sum()
    return torch.autograd.grad(score, images)[0]


def weights_of_channels(at: Place) -> Tensor:
    features = at(at.n, 6, 4, 4).requires_grad_()
    return gradcam.grad_cam_weights(features.square().sum((1, 2, 3)), features)


def losses(
    loss: Callable[[Place, Tensor, Tensor], Tensor],
) -> Callable[[Place], tuple[Tensor, Tensor]]:
    def call(at: Place) -> tuple[Tensor, Tensor]:
        a, b = at(6, 8).requires_grad_(), at(6, 8)
        value = loss(at, a, b)
        return value.detach(), torch.autograd.grad(value, a)[0]

    return call


def on_images(run: Callable[[nn.Module, Tensor], Any]) -> Callable[[Place], Any]:
    """Call with a network and a batch of images."""
    return lambda at: run(at.module(small), at.pictures())


def dense(at: Place) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return encoder(at).dense(at.pictures(96))


TRANSFORM = backbones.Transform(32, (0.5,) * 3, (0.2,) * 3)
CALLS: dict[str, Callable[[Place], Any]] = {
    "activations.record_activations": recorded,
    "guided_relu.guided_relu": guided,
    "activations.spatial_map": lambda at: activations.spatial_map(
        "x", at(at.n, 3, 8, 8), at.pictures()
    ),
    "activations.on_output": through(
        lambda model: activations.on_output(model[3], lambda output: output * 2)
    ),
    "activations.on_output_with_layout": through(
        lambda model: activations.on_output_with_layout(
            model[3], lambda output, layout: output * 2
        )
    ),
    "inference.differentiable": through(inference.differentiable),
    "inference.evaluating": through(inference.evaluating),
    "inference.map_tensors": lambda at: inference.map_tensors(
        {"images": [at.pictures(), 2]}, lambda tensor: tensor + 1
    )["images"][0],
    "inference.inference_state": through(inference.inference_state),
    "inference.override_autocast": through(
        lambda model: inference.override_autocast(enabled=False)
    ),
    "inference.without_compiler": through(lambda model: inference.without_compiler()),
    "anomaly_map.upsample": lambda at: anomaly_map.upsample(at(at.n, 5, 5), 16),
    "anomaly_map.minmax": lambda at: anomaly_map.minmax(at(at.n, 5, 5)),
    "anomaly_map.gaussian_blur": lambda at: anomaly_map.gaussian_blur(at(at.n, 32, 32)),
    "anomaly_map.spread_patch_scores": lambda at: anomaly_map.spread_patch_scores(
        at(at.n, 5, 5), 4, 2, 12
    ),
    "backbones.Transform.__call__": lambda at: TRANSFORM(at.pictures()),
    "backbones.Transform.resize": lambda at: TRANSFORM.resize(at.pictures()),
    "backbones.FeatureExtractor.forward": on_images(
        lambda m, x: backbones.FeatureExtractor(m, ["1", "4"])(x)
    ),
    "backbones.concatenate_embeddings": lambda at: backbones.concatenate_embeddings(
        embeddings(at), [5, 0]
    ),
    "cam.class_activation_map": lambda at: cam.class_activation_map(
        at(at.n, 6, 4, 4), at(5, 6), at.whole(5, at.n)
    ),
    "cam.cam": on_images(lambda m, x: cam.cam(m, x)),
    "training.predict": on_images(lambda m, x: training.predict(m, x)),
    "gradcam.grad_cam_weights": weights_of_channels,
    "gradcam.grad_cam_map": lambda at: gradcam.grad_cam_map(
        at(at.n, 6), at(at.n, 6, 4, 4)
    ),
    "gradcam.grad_cam": on_images(lambda m, x: gradcam.grad_cam(m, x, "4")),
    "gradcam.guided_backprop": on_images(lambda m, x: gradcam.guided_backprop(m, x)),
    "gradcam.guided_grad_cam": on_images(
        lambda m, x: gradcam.guided_grad_cam(m, x, "4")
    ),
    "validation.check_finite": lambda at: validation.check_finite(at(2, 3), "x"),
    "validation.check_images": lambda at: validation.check_images(at.pictures()),
    "validation.channels_first": lambda at: validation.channels_first(at.pictures()),
    "validation.rgb_batch": lambda at: validation.rgb_batch(at.pictures()),
    "validation.target_classes": lambda at: validation.target_classes(
        None, at(at.n, 5), at.n
    ),
    "mobilenet.MobileNetV1.forward": lambda at: at.module(
        lambda: mobilenet.MobileNetV1(0.25, 5)
    )(at.pictures()),
    "neighbors.nearest_distance": lambda at: neighbors.nearest_distance(
        at(50 * at.n, 8), at(70, 8), 32
    ),
    "neighbors.greedy_coreset": lambda at: neighbors.greedy_coreset(at(40, 8), 0.2, 0),
    "padim.PaDiM.fit": lambda at: [
        getattr(fitted_padim(at), name) for name in ("mean", "whitening")
    ],
    "padim.PaDiM.anomaly_map": lambda at: fitted_padim(at).anomaly_map(at.pictures()),
    "padim.PaDiM.forward": lambda at: fitted_padim(at)(at.pictures()),
    "padim.PaDiM.score": lambda at: fitted_padim(at).score(at.pictures()),
    "patch_svdd.PatchEncoder.__call__": lambda at: at.module(
        lambda: patch_svdd.PatchEncoder(8)
    )(at(3, 3, 32, 32)),
    "patch_svdd.FlatEncoder.__call__": lambda at: at.module(
        lambda: patch_svdd.FlatEncoder(8)
    )(at(3, 3, 64, 64)),
    "patch_svdd.HierarchicalEncoder.forward": lambda at: encoder(at)(at(3, 3, 64, 64)),
    "patch_svdd.HierarchicalEncoder.aggregate": lambda at: encoder(at).aggregate(
        at(at.n, 8, 20, 20), 2
    ),
    "patch_svdd.HierarchicalEncoder.dense": dense,
    "patch_svdd.HierarchicalEncoder.embed": lambda at: encoder(at).embed(
        at(at.n, 3, 96, 80), 4, 7
    ),
    "padim.PatchGaussian.update": lambda at: (
        fed(at).update(at(at.n, 4, 20)).covariance()
    ),
    "padim.PatchGaussian.merge": lambda at: fed(at).merge(fed(at)).covariance(),
    "padim.PatchGaussian.mean": lambda at: fed(at).mean(),
    "padim.PatchGaussian.covariance": lambda at: fed(at).covariance(),
    "padim.mahalanobis_distance": lambda at: padim.mahalanobis_distance(*gaussians(at)),
    "padim.leave_one_out_distance": lambda at: padim.leave_one_out_distance(
        at(at.n, 4), 9
    ),
    "padim.whitened_norm": lambda at: whitened_norm(*gaussians(at)),
    "padim.whiten": lambda at: whiten(fed(at), 0.01),
    "patch_svdd.mean_image": lambda at: patch_svdd.mean_image(at.pictures()),
    "patch_svdd.check_rgb": lambda at: check_rgb(at.pictures()),
    "patch_svdd.check_range": lambda at: check_range(at.pictures()),
    "patch_svdd.random_crops": lambda at: random_crops(
        at.pictures(), at(3, 64, 64), 3, (40, 40), torch.Generator().manual_seed(0)
    ),
    "patch_svdd.crop_patches": lambda at: crop_patches(
        at.pictures(),
        at(3, 64, 64),
        torch.tensor([0, 1]),
        32,
        torch.tensor([[1, 2], [3, 4]]),
    ),
    "patch_svdd.PatchSVDD.fit": lambda at: [
        getattr(fitted_svdd(at), name) for name in ("mean", "small", "big")
    ],
    "patch_svdd.PatchSVDD.forward": lambda at: fitted_svdd(at)(at(at.n, 3, 96, 80)),
    "patch_svdd.PatchSVDD.anomaly_map": lambda at: fitted_svdd(at).anomaly_map(
        at(at.n, 3, 96, 80)
    ),
    "patch_svdd.PatchSVDD.score": lambda at: fitted_svdd(at).score(at(at.n, 3, 96, 80)),
    "patch_svdd.PatchSVDD.anomaly_maps": lambda at: fitted_svdd(at).anomaly_maps(
        at(at.n, 3, 96, 80)
    ),
    "patch_svdd.PositionClassifier.forward": lambda at: classifier(at)(
        at(6, 8), at(6, 8)
    ),
    "patch_svdd.svdd_loss": losses(lambda at, a, b: patch_svdd.svdd_loss(a, b)),
    "patch_svdd.position_loss": losses(
        lambda at, a, b: patch_svdd.position_loss(classifier(at), a, b, at.whole(8, 6))
    ),
}

# Fake CUDA tensors have no gradients, and their mode prevents reading random numbers of
# the host. So these functions run on the meta device, whose tensors can't be read or
# mixed with others either.
ON_META = {
    *"guided_relu.guided_relu padim.PaDiM.fit padim.PaDiM.anomaly_map".split(),
    *"padim.PaDiM.forward padim.PaDiM.score gradcam.grad_cam_weights".split(),
    *"gradcam.grad_cam gradcam.guided_backprop gradcam.guided_grad_cam".split(),
    *"patch_svdd.random_crops patch_svdd.crop_patches patch_svdd.svdd_loss".split(),
    *"patch_svdd.position_loss".split(),
}

FILES = "reads or writes files, on the host"
TIMES = "times what it is given, where that lies"
TRAINS = "needs a generator of its device; test_a_gpu_trains runs it on a GPU"
READS = "gives Python numbers, which are read once, at the end"
EXEMPT = {
    "devices.chunk_sizes": "numbers",
    "__main__.main": "a command line",
    "activations.find_layer": "looks up a name",
    "guided_relu.GuidedReLU.check": "reads the names of a graph's nodes",
    "activations.raise_unless_ran": "reads no tensor",
    "inference.raise_if_hidden": "reads a module's type",
    "inference.hook_in_this_thread": "registers a hook; activations.on_output calls it",
    "inference.SharedSetting.block": "a setting of the process",
    "anomaly_map.score_quantile": "the detectors' normal_threshold calls it",
    "backbones.Backbone.extractor": "names of layers, and fold_batch_norms",
    "backbones.fold_batch_norms": "once per network, with digest_weights",
    "backbones.digest_weights": "reads all weights on the host, for a file",
    "inference.autocast_dtypes": "dtypes",
    "gradcam.Inputs.run": "gradcam.grad_cam calls it",
    "gradcam.read_inputs": "gradcam.grad_cam calls it",
    "backbones.load": FILES,
    "cam.bounding_boxes": "regions are found on the host; one map is copied there once",
    "training.derive_seed": "integers",
    "training.seeded": "seeds; see test_the_callers_cuda_generator_is_restored",
    "training.train_classifier": "steps an optimizer; see test_a_gpu_trains",
    "complexity.*_macs": "numbers in, numbers out",
    "complexity.Profile.*": "numbers in, numbers out",
    "complexity.check_size": "numbers in, numbers out",
    "complexity.Values.*": "values of complexity.profile, on the CPU: test_inputs.py",
    "complexity.without_data": "returns meta tensors",
    "complexity.to_meta": "returns meta tensors",
    "complexity.list_tensors": "reads no tensor",
    "complexity.profile": "runs on meta, in a thread of its own: test_complexity.py",
    "datasets.*": FILES,
    "image_files.*": FILES,
    "items.*": FILES,
    "distributed.*": "needs processes; test_distributed.py starts them",
    "padim.Settings.file_name": "text",
    "padim.check_matplotlib": "imports a package",
    "padim.evaluate": FILES,
    "padim.examples": FILES,
    "padim.fingerprint_files": FILES,
    "padim.load_splits": FILES,
    "padim.read_results": FILES,
    "padim.report": FILES,
    "padim.run": FILES,
    "padim.save_pictures": FILES,
    "padim.write_results": FILES,
    "padim.write_scores": FILES,
    "padim.PaDiM.inspect": "reads files; maps are copied to the host once per batch",
    "padim.inspect_batches": "as PaDiM.inspect",
    "padim.find_images": FILES,
    "padim.read_images": FILES,
    "padim.check_ready": "reads no tensor",
    "padim.resized_size": "numbers in, numbers out",
    "padim.margins": "numbers in, numbers out",
    "padim.strongest_region": "regions are found on the host",
    "padim.inspect_files": FILES,
    "padim.read_rows": FILES,
    "padim.to_json": "text",
    "padim.summary": "text",
    "padim.overlay": "draws on the host",
    "padim.write_gallery": FILES,
    "exercises.*": "checks of a reader's answers",
    "tables.*": "text",
    "validation.as_tensor": "converts what is not a tensor, on the host",
    "validation.has_values": "says whether a tensor can be read",
    "validation.as_device": "a device in",
    "validation.as_path": "a path in",
    "validation.check_choice": "names in",
    "validation.check_generator": "a generator in",
    "validation.check_in*": "numbers and indices, not read on a GPU",
    "validation.check_iterable": "no tensor in",
    "validation.check_module": "a module in",
    "validation.check_number": "a number in",
    "validation.check_[sv]*": "reads dtypes and devices",
    "validation.check_tensor": "reads dtypes and shapes",
    "validation.height_and_width": "numbers in",
    "inference.run_model": "calls the network",
    "anomaly_map.check_sigma": "a number in",
    "gradcam.check_maps": "reads dtypes and shapes",
    "complexity.measure_machine": TIMES,
    "complexity.time_*": TIMES,
    "complexity.Machine.attainable": "numbers in, numbers out",
    "complexity.totals": "numbers in, numbers out",
    "storage.*": FILES,
    "metrics.*": READS,
    "mobilenet.parameter_groups": "sorts parameters",
    "neighbors.covering_radius": READS,
    "padim.PaDiM.load": FILES,
    "padim.PaDiM.prepare": "calls Transform, and moves the batch once",
    "padim.PaDiM.normal_threshold": READS,
    "padim.PaDiM.save": FILES,
    "padim.PaDiM.*_extra_state": FILES,
    "padim.PaDiM.extra_repr": "text",
    "patch_svdd.*.load": FILES,
    "patch_svdd.*.save": FILES,
    "patch_svdd.encoder_from_weights": FILES,
    "patch_svdd.initialize": "draws weights in place; every encoder of CALLS does",
    "patch_svdd.load_released_weights": FILES,
    "padim.PatchGaussian.all_reduce": "needs processes; test_gaussian.py starts them",
    "patch_svdd.neighbor_pairs": "draws corners on the host, from a generator there",
    "patch_svdd.perturb": TRAINS,
    "patch_svdd.position_pairs": "draws corners on the host, from a generator there",
    "patch_svdd.PatchSVDD.*_extra_state": "numbers of the host",
    "patch_svdd.PatchSVDD.load": FILES,
    "patch_svdd.PatchSVDD.normal_threshold": READS,
    "patch_svdd.PatchSVDD.save": FILES,
    "patch_svdd.fast_dtype": "a dtype",
    "patch_svdd.position_accuracy": READS,
    "patch_svdd.train": TRAINS,
    "precision.*": "a setting of the process, and a number that follows from it",
    "patch_svdd.train_on_patches": TRAINS,
    "runtime.*": "says where a notebook runs, and names its files",
    "complexity.MacRecorder.*": "counts for complexity.profile, on the meta device",
    "viz.*": "draws, on the host",
}


def public_functions() -> Iterator[str]:
    """Name every public function, and every public method and call of a public class,
    by its paper or shared module.
    """
    for found in pkgutil.walk_packages(paperlib.__path__, "paperlib."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != found.name or name.startswith("_"):
                continue
            path = f"{found.name.split('.')[1]}.{name}"
            if inspect.isfunction(value):
                yield path
            elif inspect.isclass(value):
                for method, body in vars(value).items():
                    function = getattr(body, "__func__", body)
                    if inspect.isfunction(function) and (
                        not method.startswith("_") or method == "__call__"
                    ):
                        yield f"{path}.{method}"


def test_every_public_function_is_called_or_exempt():
    names = set(public_functions())
    exempt = {
        name for pattern in EXEMPT for name in fnmatch.filter(sorted(names), pattern)
    }
    forgotten = names - exempt - set(CALLS)
    assert forgotten == set(), "give each a call in CALLS, or a reason in EXEMPT"
    assert exempt & set(CALLS) == set(), "called and exempt"
    inherited = {"patch_svdd.PatchEncoder.__call__", "patch_svdd.FlatEncoder.__call__"}
    assert set(CALLS) - names == inherited, "called, and not there"
    unused = [pattern for pattern in EXEMPT if not fnmatch.filter(names, pattern)]
    assert unused == [], "exempts nothing"
    assert ON_META <= set(CALLS)


class OnTheWay(TorchDispatchMode):
    """Watches operations: copies from the device to the host, and reads of values."""

    READS = (
        aten._local_scalar_dense.default,
        aten.nonzero.default,
        aten.masked_select.default,
        aten.equal.default,
    )

    def __init__(self, device: torch.device):
        super().__init__()
        self.away, self.copies, self.reads = device.type, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.reads += func in self.READS
        given = func(*args, **kwargs)
        if self.away != "cpu":
            came = {x.device.type for x in tensors((args, kwargs))}
            went = {x.device.type for x in tensors(given)}
            if self.away in came and "cpu" in went:
                self.copies.append(str(func))
        return given


def tensors(found: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_results_are_on_the_device_of_the_input(name):
    if name in ON_META:
        watch = OnTheWay(torch.device("meta"))
        with watch:
            found = CALLS[name](Place("meta"))
    else:
        watch = OnTheWay(torch.device("cuda"))
        with FakeTensorMode(), watch:
            found = CALLS[name](Place("cuda", fake=True))
    assert watch.copies == []
    assert [x.device.type for x in tensors(found) if x.device.type != watch.away] == []
    assert tensors(found) or name in (
        "validation.check_finite",
        "patch_svdd.check_range",
    )


# On a GPU every read waits for all that was asked for before. A few at the door are
# fine; more for more images are not.
BATCHED = [
    *"backbones.FeatureExtractor.forward cam.cam training.predict".split(),
    *"gradcam.grad_cam gradcam.guided_grad_cam neighbors.nearest_distance".split(),
    *"padim.PaDiM.anomaly_map padim.PaDiM.fit".split(),
    *"patch_svdd.HierarchicalEncoder.embed padim.PatchGaussian.update".split(),
    *"patch_svdd.PatchSVDD.anomaly_maps".split(),
]


@pytest.mark.parametrize("name", BATCHED)
def test_reads_do_not_grow_with_the_batch(name):
    counted = []
    for n in (2, 6):
        with OnTheWay(torch.device("cpu")) as watch:
            CALLS[name](Place("cpu", n=n))
        counted.append(watch.reads)
    assert counted[0] == counted[1]


# PaDiM reads images once per batch, in fit also embeddings, and at the end the
# success of the factorisation.
READS_PER_CALL = {
    "score": (1, lambda detector, images: detector.score(images)),
    "anomaly_map": (1, lambda detector, images: detector.anomaly_map(images)),
    "fit": (2 * 2 + 1, lambda detector, images: detector.fit([images, images])),
}


@pytest.mark.parametrize("side", [64, 96])
@pytest.mark.parametrize("name", READS_PER_CALL)
def test_nested_calls_do_not_check_images_again(name, side):
    (budget, call), at = READS_PER_CALL[name], Place("cpu", n=4)
    extractor = backbones.FeatureExtractor(at.module(small), ["1", "4"])
    detector = padim.PaDiM(extractor, 10).fit([at.pictures(side)])
    with OnTheWay(torch.device("cpu")) as watch:
        call(detector, at.pictures(side))
    assert watch.reads == budget


@pytest.mark.parametrize("n", [2, 20])  # 20 images are embedded in three parts
def test_patch_svdd_reads_the_images_once(n):
    """By `tolist`, which is not counted; then, per size, three reads of a search.

    They look at the embeddings, the bank, and whether a query must be searched exactly.
    """
    detector, images = fitted_svdd(Place("cpu")), torch.rand(n, 3, 96, 80)
    with OnTheWay(torch.device("cpu")) as watch:
        detector.score(images)
    assert watch.reads == 2 * 3


def test_values_that_are_not_finite_are_refused_as_such():
    extractor = backbones.FeatureExtractor(small(), ["1", "4"])
    detector = padim.PaDiM(extractor, 10, transform=TRANSFORM)
    for value in (torch.nan, torch.inf):
        images = torch.rand(4, 3, 32, 32)
        images[2, 1, 3, 4] = value
        with pytest.raises(ValueError, match="NaN or infinite, in images number 2"):
            detector.fit([images])


def test_mps_is_refused_where_float64_is_needed(monkeypatch):
    gaussian = PatchGaussian(4, 3, device="mps")
    with pytest.raises(ValueError, match="'mps' has no float64"):
        gaussian.update(torch.rand(2, 4, 3))
    with pytest.raises(ValueError, match="'mps' has no float64"):
        validation.check_supports_float64("mps:0")
    with FakeTensorMode():
        images = torch.rand(1, 3, 64, 64, device="mps")
    with pytest.raises(ValueError, match="'mps' has no float64"):
        check_rgb(images)
    validation.check_supports_float64("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.start(0).device.type != "mps"


class Kernels(TorchDispatchMode):
    """Counts operations that launch a kernel: no views, no allocations."""

    OTHERS = frozenset(
        "device promote_types detach alias lift_fresh empty empty_like empty_strided"
        " new_empty new_empty_strided".split()
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in self.OTHERS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


# PaDiM on Wide ResNet-50-2, a batch of 32, and Patch SVDD's search of a full bank.
N, P, D = 32, 56 * 56, 550
WIDE_MAPS = ((256, 56), (512, 28), (1024, 14))  # channels, side
BUDGETS = {
    "update": (120, lambda rand: PatchGaussian(P, D).update(rand(N, P, D))),
    "concatenate": (
        20,
        lambda rand: backbones.concatenate_embeddings(
            [rand(N, channels, side, side) for channels, side in WIDE_MAPS],
            range(0, 1792, 3),
        ),
    ),
    "distance": (
        30,
        lambda rand: whitened_norm(rand(N, P, D), rand(P, D), rand(P, D, D)),
    ),
    "blur": (20, lambda rand: anomaly_map.gaussian_blur(rand(N, 224, 224))),
    "search": (
        300,
        lambda rand: neighbors.nearest_distance(rand(3249, 64), rand(200_000, 64)),
    ),
    "factorise": (
        200,
        lambda rand: whiten(PatchGaussian(P, D).update(rand(2, P, D)), 0.01),
    ),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_a_gpu_launches_few_kernels(name):
    budget, call = BUDGETS[name]
    with FakeTensorMode():
        # Empty, so that making the arguments is not counted.
        with Kernels() as kernels:
            call(lambda *shape: torch.empty(shape, device="cuda"))
    assert len(kernels.names) <= budget, collections.Counter(kernels.names)


def test_sizes_of_a_gpu_follow_its_free_memory(monkeypatch):
    cuda, gib = torch.device("cuda"), 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, elements in ((80 * gib, 2**28), (4 * gib, 2**26), (0, 2**24)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 0))
        assert devices.chunk_sizes(cuda).elements == elements
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.chunk_sizes(cuda).elements == 2**28
    assert devices.chunk_sizes(torch.device("cpu")).elements == 2**20


def test_the_watch_sees_copies_and_reads():
    with FakeTensorMode(), OnTheWay(torch.device("cuda")) as watch:
        x = torch.rand(3, device="cuda")
        x.cpu()
        assert len(watch.copies) == 1
        with pytest.raises(Exception, match="_local_scalar_dense"):
            x.sum().item()
        with pytest.raises(Exception, match="(?i)numpy"):
            x.numpy()
        with pytest.raises(Exception, match="(?i)device"):
            x + torch.rand(3)
    with OnTheWay(torch.device("cpu")) as watch:
        float(torch.rand(3).sum())
        torch.rand(3).nonzero()
    assert watch.reads == 2


# ---- where there is a GPU ----


def apart(found: Any, expected: Any) -> float:
    """The largest relative difference of two results' tensors, by norms."""
    largest = 0.0
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        a, b = a.cpu().double(), b.double()
        largest = max(largest, float((a - b).norm() / b.norm().clamp_min(1e-12)))
    return largest


@pytest.fixture
def full_precision():
    kept = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = kept[0]
    torch.set_float32_matmul_precision(kept[1])


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_the_same_each_time(name):
    """What the comparison with a GPU rests on."""
    assert apart(CALLS[name](Place("cpu")), CALLS[name](Place("cpu"))) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_gives_the_cpus_result(name, full_precision):
    found = CALLS[name](Place("cuda"))
    assert all(x.is_cuda for x in tensors(found))
    assert apart(found, CALLS[name](Place("cpu"))) < 1e-4


LOWERED = [
    *"cam.cam gradcam.grad_cam gradcam.guided_grad_cam".split(),
    *"padim.PaDiM.anomaly_map patch_svdd.PatchSVDD.anomaly_maps".split(),
    *"neighbors.nearest_distance backbones.FeatureExtractor.forward".split(),
    *"mobilenet.MobileNetV1.forward".split(),
]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["tf32", "autocast"])
@pytest.mark.parametrize("name", LOWERED)
def test_a_gpu_in_lower_precision_is_near(name, how, full_precision):
    expected = CALLS[name](Place("cpu"))
    if how == "tf32":
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        found = CALLS[name](Place("cuda"))
    else:
        with torch.autocast("cuda", torch.bfloat16):
            found = CALLS[name](Place("cuda"))
    pairs = zip(tensors(found), tensors(expected), strict=True)
    ours, exact = zip(*[p for p in pairs if p[1].is_floating_point()], strict=True)
    assert apart(ours, exact) < (1e-2 if how == "tf32" else 0.1)


@pytest.mark.gpu
def test_a_gpu_trains():
    images = Place("cuda")(6, 3, 128, 128)
    for train, extra in (
        (patch_svdd.train, {"steps": 3, "crops": 2, "pairs": 32}),
        (patch_svdd.train_on_patches, {"epochs": 1, "repeat": 4, "batch_size": 8}),
    ):
        torch.manual_seed(0)
        encoder = patch_svdd.HierarchicalEncoder(8).cuda()
        before = encoder.conv2.weight.detach().clone()
        found = train(encoder, images, **extra)
        assert found.mean.is_cuda and not torch.equal(encoder.conv2.weight, before)
        assert all(torch.isfinite(p).all() for p in encoder.parameters())
        accuracy = patch_svdd.position_accuracy(encoder, found, images, pairs=50)
        assert all(0 <= share <= 1 for share in accuracy)
    model = Place("cuda").module(small)
    training.train_classifier(
        model,
        (images, torch.tensor([0, 1] * 3)),
        torch.optim.SGD(model.parameters(), 0.01),
        epochs=1,
        batch_size=3,
    )
    assert next(model.parameters()).is_cuda


@pytest.mark.gpu
def test_a_gpu_holds_only_the_gaussians():
    """Four times as many images need no more memory."""
    extractor = backbones.FeatureExtractor(
        torchvision.models.resnet18().cuda().eval(), ["layer1", "layer2", "layer3"]
    )
    peaks = []
    for count in (64, 256):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        padim.PaDiM(extractor, 50).fit(
            torch.rand(32, 3, 224, 224, device="cuda") for _ in range(count // 32)
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.1 * peaks[0]
