"""Shapes, dtypes, layouts and values of any kind: right within stated rounding, or
refused with what was wrong.

Nothing depends on how images are batched, cut into chunks, ordered, laid out in memory,
or shared among threads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refuses
from torch import nn

from paperlib import devices
from paperlib.anomaly_map import gaussian_blur, minmax, spread_patch_scores, upsample
from paperlib.backbones import FeatureExtractor, concatenate_embeddings
from paperlib.cam import bounding_boxes, cam, class_activation_map
from paperlib.gradcam import grad_cam, guided_backprop, guided_grad_cam
from paperlib.metrics import aupro, auroc, best_threshold, pixel_auroc
from paperlib.neighbors import covering_radius, greedy_coreset, nearest_distance
from paperlib.padim import PaDiM, PatchGaussian, mahalanobis_distance
from paperlib.padim.gaussian import whiten, whitened_norm
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD, mean_image
from paperlib.training import predict

# Relative to the largest value: float32 has 2^-24, and a few dozen numbers are added
# up.
ROUNDING = {torch.float16: 2e-3, torch.float32: 2e-5, torch.float64: 1e-11}
FEW = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=300)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype).eval()


def extractor(dtype=torch.float32):
    return FeatureExtractor(network(dtype), ["1", "3"])


def pictures(n, height=24, width=20, seed=0, dtype=torch.float32):
    return torch.rand(
        n, 3, height, width, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def encoder():
    torch.manual_seed(0)
    return HierarchicalEncoder(4).eval()


def same(a, b, dtype=torch.float32, scale=None):
    scale = max(float(b.abs().max()), 1e-30) if scale is None else scale
    return (
        a.shape == b.shape
        and float((a.double() - b.double()).abs().max()) <= ROUNDING[dtype] * scale
    )


def layouts(x):
    """The same numbers, laid out in memory in other ways."""
    yield "channels last", x.contiguous(memory_format=torch.channels_last)
    yield "every second of a larger one", torch.stack([x, x], -1).flatten(-2)[..., ::2]
    yield "turned", x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield (
        "expanded",
        x[:, :1].expand(-1, 3, -1, -1) if torch.equal(x[:, :1].expand_as(x), x) else x,
    )


# ---- layout, dtype, batch ----

# Functions of a batch of images that return one result per image.
METHODS = {
    "grad_cam": lambda images: grad_cam(network(images.dtype), images, "3", 1).maps,
    "guided_backprop": lambda images: guided_backprop(network(images.dtype), images, 1),
    "guided_grad_cam": lambda images: guided_grad_cam(
        network(images.dtype), images, "3", 1
    ),
    "cam": lambda images: cam(network(images.dtype), images, 1).maps,
    "features": lambda images: concatenate_embeddings(extractor(images.dtype)(images)),
    "predict": lambda images: predict(network(images.dtype), images, 2),
    "padim": lambda images: PADIM[images.dtype].anomaly_map(images),
}


class _Fitted(dict):
    def __missing__(self, dtype):
        found = self[dtype] = PaDiM(extractor(dtype), 9).fit(
            pictures(30, seed=1, dtype=dtype).split(8)
        )
        return found


PADIM = _Fitted()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layout_batch_and_order_change_nothing(name, dtype, cases):
    counter = cases("numbers: layout, dtype, batch, order")
    method = METHODS[name]
    images = pictures(7, dtype=dtype)
    whole = method(images)
    assert whole.dtype == dtype and bool(torch.isfinite(whole).all())
    for what, other in layouts(images):
        assert same(method(other), whole, dtype), what
        counter.survive()
    for size in (1, 2, 5):
        parts = torch.cat([method(part) for part in images.split(size)])
        assert same(parts, whole, dtype), f"batches of {size}"
        counter.survive()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    assert same(method(images[order]), whole[order], dtype)
    assert same(method(images[[2, 2, 2]]), whole[[2, 2, 2]], dtype)  # duplicates
    counter.survive(2)
    if dtype == torch.float32:
        assert same(METHODS[name](images.double()), whole), "double precision"
        counter.survive()


@pytest.mark.parametrize("name", METHODS)
def test_no_image_and_other_types_are_refused(name, cases):
    counter, method = cases("numbers: refused"), METHODS[name]
    model = network()
    calls = {
        "grad_cam": lambda x: grad_cam(model, x, "3", 1),
        "guided_backprop": lambda x: guided_backprop(model, x, 1),
        "guided_grad_cam": lambda x: guided_grad_cam(model, x, "3", 1),
        "cam": lambda x: cam(model, x, 1),
        "features": extractor(),
        "predict": lambda x: predict(model, x),
        "padim": PADIM[torch.float32].anomaly_map,
    }
    assert method is METHODS[name]
    bad = {
        "no image": pictures(0),
        "one image without its batch": pictures(1)[0],
        "bytes": pictures(2).mul(255).byte(),
        "an empty side": torch.zeros(1, 3, 0, 5),
        "five axes": pictures(2)[None],
    }
    # predict hands everything to the model; only the empty batch is its own.
    if name == "predict":
        bad = {"no image": bad["no image"]}
    for what, images in bad.items():
        with refuses("images"):
            calls[name](images)
            pytest.fail(what)
        counter.survive()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "predict"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_saying_which_image(name, value, cases):
    images = pictures(6)
    images[4, 1, 7, 3] = value
    images[2, 0, 0, 0] = value
    with refuses(
        r"2 values of images are NaN or infinite, in images number 2, 4",
    ):
        METHODS[name](images)
    cases("numbers: refused").survive()


def test_nan_is_refused_wherever_numbers_come_in(cases):
    counter = cases("numbers: refused")
    bad = torch.ones(5, 4, 6)
    bad[3, 2, 1] = math.nan
    gaussian = PatchGaussian(4, 6).update(torch.randn(9, 4, 6))
    before = gaussian.mean()
    lower = torch.linalg.cholesky(gaussian.covariance())
    maps = bad.clone()
    for call in (
        lambda: gaussian.update(bad),
        lambda: mahalanobis_distance(bad, gaussian.mean(), lower),
        lambda: nearest_distance(bad[3], torch.ones(2, 6)),
        lambda: nearest_distance(torch.ones(2, 6), bad[3]),
        lambda: greedy_coreset(bad[3], 0.5, 0),
        lambda: minmax(maps),
        lambda: mean_image(torch.full((2, 3, 64, 64), math.nan)),
        lambda: auroc(torch.tensor([0, 1]), torch.tensor([0.5, math.nan])),
        lambda: best_threshold(torch.tensor([0, 1]), torch.tensor([0.5, math.nan])),
        lambda: pixel_auroc(torch.eye(6).bool()[None], torch.full((1, 6, 6), math.nan)),
        lambda: aupro(torch.eye(6).bool()[None], torch.full((1, 6, 6), math.nan)),
        lambda: bounding_boxes(torch.full((4, 4), math.nan)),
    ):
        with refuses("NaN|finite"):
            call()
        counter.survive()
    assert torch.equal(gaussian.mean(), before) and gaussian.count == 9


# ---- Gaussians and PaDiM ----


@FEW
@given(
    n=st.integers(2, 12),
    p=st.integers(1, 5),
    d=st.integers(1, 40),
    cuts=st.integers(1, 6),
    seed=st.integers(0, 99),
    far=st.sampled_from([0.0, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_gaussian_knows_no_batches_and_no_order(n, p, d, cuts, seed, far, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, d, generator=g, dtype=torch.float64).to(dtype) + far
    whole = PatchGaussian(p, d, dtype).update(x)
    other = PatchGaussian(p, d, dtype)
    for part in x[torch.randperm(n, generator=g)].split(cuts):
        other.update(part)
    halves = PatchGaussian(p, d, dtype).update(x[:1])
    halves.merge(PatchGaussian(p, d, dtype).update(x[1:]))
    turned = PatchGaussian(p, d, dtype).update(
        x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    )
    for found in (other, halves, turned):
        assert same(found.mean(), whole.mean(), dtype, scale=max(far, 1))
        assert same(found.covariance(), whole.covariance(), dtype, scale=1 + far * 1e-3)


@pytest.mark.parametrize(
    "change", ["constant", "all equal", "two kinds", "one channel", "black"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_covariances_are_scored(change, dtype, cases):
    """With fewer images than dimensions, distances are finite because of epsilon."""
    images = pictures(5, dtype=dtype)
    fitted = {
        "constant": images.mean((2, 3), keepdim=True).expand_as(images),
        "all equal": images[:1].repeat(5, 1, 1, 1),
        "two kinds": images[[0, 1, 0, 1, 0]],
        "one channel": images[:, :1].expand_as(images),
        "black": torch.zeros_like(images),
    }[change]
    model = PaDiM(extractor(dtype), None).fit([fitted])
    maps = model.anomaly_map(images)
    assert bool(torch.isfinite(maps).all()) and float(maps.min()) >= 0
    double = PaDiM(extractor(torch.float64), None).fit([fitted.double()])
    double = double.anomaly_map(images.double())
    scale = float(double.max()) * (20 if dtype == torch.float32 else 1)
    assert same(maps, double, dtype, scale=scale)
    if change in ("all equal", "black"):
        assert float(model.anomaly_map(fitted).max()) < 1e-3
    cases("numbers: singular and extreme").survive()


@pytest.mark.parametrize(
    "epsilon",
    [5e-324, 1e-300, 1e-45, 1e-30, 1e-12, 1e-3, 1, 1e6, 1e30, 1e38, 1e200, 1.7e308],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_epsilon_is_scored_or_refused(epsilon, dtype, cases):
    if epsilon > 1e38:
        with refuses("epsilon=.* at most 3.4e[+]38"):
            PaDiM(extractor(dtype), None, epsilon=epsilon)
        return
    model = PaDiM(extractor(dtype), None, epsilon=epsilon)
    # 4 images, 14 dimensions: without epsilon nothing is positive definite.
    images = pictures(4, dtype=dtype)
    try:
        maps = model.fit([images]).anomaly_map(images)
    except ValueError as error:
        assert "epsilon" in str(error)
        assert model.count == 0  # nothing half fitted is left
    else:
        assert bool(torch.isfinite(maps).all()) and float(maps.min()) >= 0
        assert epsilon > (1e-9 if dtype == torch.float32 else 1e-17)
        variance = PaDiM(extractor(dtype), None, epsilon=1).fit([images])
        if epsilon >= 1e30:  # then the covariance is epsilon I
            embedding = concatenate_embeddings(extractor(dtype)(images))
            x = embedding.flatten(2).transpose(1, 2)
            plain = (x - variance.mean).norm(dim=2).view(4, *variance.grid) / math.sqrt(
                epsilon
            )
            assert same(gaussian_blur(upsample(plain, (24, 20))), maps, dtype)
    cases("numbers: singular and extreme").survive()


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e18])
def test_features_of_any_size_are_scored_or_refused(scale, cases):
    x = torch.randn(20, 3, 5, generator=torch.Generator().manual_seed(0)) * scale
    gaussian = PatchGaussian(3, 5).update(x)
    try:
        whitening = whiten(PatchGaussian(3, 5).update(x), 0.01)
    except ValueError as error:
        assert "epsilon" in str(error) and scale > 1
    else:
        found = whitened_norm(x, gaussian.mean(), whitening)
        double = PatchGaussian(3, 5, torch.float64).update(x.double())
        lower = torch.linalg.cholesky(double.covariance())
        truth = mahalanobis_distance(x.double(), double.mean(), lower)
        assert bool(torch.isfinite(found).all())
        assert same(found, truth, scale=float(truth.max()) * 10)
    cases("numbers: singular and extreme").survive()


def test_chunks_change_no_map(monkeypatch, cases):
    counter, images = cases("numbers: chunk and thread count"), pictures(9)
    whole = PaDiM(extractor(), None).fit(images.split(4)).anomaly_map(images)
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(devices, "_CPU", devices._CPU._replace(elements=chunk))
        maps = PaDiM(extractor(), None).fit(images.split(4)).anomaly_map(images)
        assert same(maps, whole, scale=10 * whole.max())
        counter.survive()


def test_threads_change_nothing_beyond_rounding(cases):
    counter = cases("numbers: chunk and thread count")
    images = pictures(9)
    before = torch.get_num_threads()
    patches = pictures(3, 96, 80, seed=4)
    bank, queries = torch.randn(5000, 8), torch.randn(700, 8)
    masks = pictures(4)[:, 0] > 0.9

    def everything():
        detector = PatchSVDD(encoder(), stride_small=16, stride_big=16).fit(patches)
        yield PaDiM(extractor(), None).fit(images.split(4)).anomaly_map(images)
        yield from detector.anomaly_maps(patches.flip(0))
        yield nearest_distance(queries, bank)
        yield grad_cam(network(), images, "3", 1).maps
        scores = pictures(4, seed=2)[:, 1]
        yield torch.tensor([aupro(masks, scores), pixel_auroc(masks, scores)])

    try:
        torch.set_num_threads(1)
        one = list(everything())
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for a, b in zip(everything(), one, strict=True):
                assert same(a, b, scale=10 * float(b.abs().max()))
                counter.survive()
    finally:
        torch.set_num_threads(before)


# ---- Patch SVDD and neighbours ----


def test_patch_maps_know_no_batches_no_order_and_no_layout(monkeypatch, cases):
    counter = cases("numbers: layout, dtype, batch, order")
    images = pictures(5, 80, 72)
    test = pictures(4, 80, 72, 9)
    options = {"stride_small": 8, "stride_big": 8}
    whole = PatchSVDD(encoder(), **options).fit(images).anomaly_maps(test)
    others = [other for _, other in layouts(images)]
    for fitted in (images.flip(0), images[[3, 1, 4, 0, 2]], *others):
        found = PatchSVDD(encoder(), **options).fit(fitted).anomaly_maps(test)
        assert all(same(a, b) for a, b in zip(found, whole, strict=True))
        counter.survive()
    detector = PatchSVDD(encoder(), **options).fit(images)
    for together in (1, 3):
        monkeypatch.setattr("paperlib.patch_svdd.detector.IMAGES_PER_PASS", together)
        found = detector.anomaly_maps(test)
        assert all(same(a, b) for a, b in zip(found, whole, strict=True))
        counter.survive()
    for _, other in layouts(test):
        assert all(
            same(a, b) for a, b in zip(detector.anomaly_maps(other), whole, strict=True)
        )
        counter.survive()
    with refuses("images are torch.float64 .* the mean image is torch.float32"):
        detector.anomaly_maps(test.double())
    half = test.half()  # less the mean image it is float32
    found, truth = detector.anomaly_maps(half), detector.anomaly_maps(half.float())
    assert all(same(a, b) for a, b in zip(found, truth, strict=True))
    counter.survive(2)


@FEW
@given(
    q=st.integers(0, 9),
    b=st.integers(1, 90),
    d=st.integers(1, 9),
    chunk=st.sampled_from([1, 2, 7, 64, 5000]),
    scale=st.sampled_from([0.0, 1e-15, 1.0, 1e12]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 999),
)
def test_neighbours_of_any_number_dtype_and_chunk(q, b, d, chunk, scale, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    queries, bank = (
        scale * torch.randn(n, d, generator=g, dtype=torch.float64) for n in (q, b)
    )
    queries, bank = queries.to(dtype), bank.to(dtype)
    found, index = nearest_distance(queries, bank, chunk, return_index=True)
    truth = torch.zeros(0)
    if q:
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries.double(), bank.double(), compute_mode=exact)
        truth = distances.min(1).values
    assert found.shape == index.shape == (q,)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    if q:
        assert same(found, truth, found.dtype, scale=max(float(truth.max()), 1e-30))
        there = (queries.double() - bank.double()[index]).norm(dim=1)
        assert same(there, truth, found.dtype, scale=max(float(truth.max()), 1e-30))
    order = torch.randperm(b, generator=g)
    if q:
        assert same(nearest_distance(queries, bank[order], chunk), found, found.dtype)


@pytest.mark.parametrize("count", [1, 2, 33])
def test_banks_of_one_vector_again_and_again(count, cases):
    bank = torch.full((count, 5), 0.3)
    assert nearest_distance(bank, bank).tolist() == [0.0] * count
    chosen = greedy_coreset(bank, 0.5, 1)
    assert len(chosen) == len(set(chosen.tolist())) == math.ceil(count / 2)
    assert covering_radius(bank, chosen) == 0
    cases("numbers: singular and extreme").survive()


# ---- maps and scores ----


@FEW
@given(
    n=st.integers(0, 4),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    sigma=st.sampled_from([0, 0.1, 1, 4, 30]),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 99),
)
def test_maps_of_any_number_size_and_layout(n, h, w, sigma, dtype, seed):
    maps = torch.randn(
        n, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)
    large = (2 * h + 40, 3 * w + 40)
    for call in (
        minmax,
        lambda m: upsample(m, large),
        lambda m: upsample(m, (1, 1)),
        lambda m: gaussian_blur(m, sigma),
        lambda m: spread_patch_scores(m, 5, 3, large),
    ):
        found = call(maps)
        assert len(found) == n
        assert found.dtype == dtype
        assert bool(torch.isfinite(found).all())
        if n:
            assert same(call(maps.mT.contiguous().mT), found, dtype)
            assert same(torch.stack([call(one) for one in maps]), found, dtype)
            assert same(call(maps.double()), found, dtype)


@FEW
@given(
    n=st.integers(1, 3),
    t=st.integers(1, 3),
    c=st.integers(1, 9),
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_class_maps_of_any_number_and_layout(n, t, c, h, w, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, c, h, w, generator=g).to(dtype)
    weight = torch.randn(5, c, generator=g).to(dtype)
    targets = torch.randint(5, (n,), generator=g)
    found = class_activation_map(features, weight, targets)
    truth = torch.einsum("nchw,nc->nhw", features.double(), weight.double()[targets])
    assert same(
        found, truth, dtype, scale=float(features.abs().max() * weight.abs().max()) * c
    )
    for _, other in zip(range(2), layouts(features), strict=False):
        again = class_activation_map(other[1], weight, targets)
        assert same(again, found, dtype, scale=float(truth.abs().max()) + c)


@FEW
@given(
    n=st.integers(2, 40),
    ties=st.booleans(),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-40, 1, 1e38]),
)
def test_scores_depend_only_on_the_order(n, ties, seed, scale):
    """Of the scores: shifted, scaled, in half or double precision, and of the images in
    any order, the area is one.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.tensor([0, 1]), torch.randint(2, (n - 2,), generator=g)])
    scores = torch.randint(6 if ties else 2048, (n,), generator=g).double()
    area = auroc(labels, scores)
    order = torch.randperm(n, generator=g)
    casts = scores.half(), scores.float()
    for other in (*casts, scores * scale, -1 / (1 + scores), scores - 1000):
        assert auroc(labels, other) == area
        assert auroc(labels[order], other[order]) == area
    assert auroc(1 - labels, scores) == pytest.approx(1 - area, abs=1e-12)
    threshold, f1 = best_threshold(labels, scores)
    assert best_threshold(labels[order], scores[order]) == (threshold, f1)


@FEW
@given(
    n=st.integers(1, 3),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    limit=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_areas_of_maps_know_no_order_and_no_layout(n, seed, ties, limit):
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, 9, 7, generator=g) > 0.8
    masks[0, 0, 0], masks[0, 8, 6] = True, False
    maps = torch.randint(4 if ties else 2000, (n, 9, 7), generator=g).float()
    whole = aupro(masks, maps, limit), pixel_auroc(masks, maps)
    for turn in (
        lambda x: x.flip(0),
        lambda x: x.mT,
        lambda x: x.flip(2),
        lambda x: x.mT.contiguous().mT,
    ):
        found = (
            aupro(turn(masks), turn(maps), limit),
            pixel_auroc(turn(masks), turn(maps)),
        )
        assert found == pytest.approx(whole, abs=1e-9)
    assert aupro(masks, maps.half(), limit) == pytest.approx(whole[0], abs=1e-9)
    # One more normal image.
    padded = (
        F.pad(masks, (0, 0, 0, 0, 0, 1)),
        F.pad(maps, (0, 0, 0, 0, 0, 1), value=-1),
    )
    assert pixel_auroc(*padded) >= whole[1] - 1e-12
