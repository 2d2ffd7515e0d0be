r"""PaDiM: a Gaussian of normal features for every position of a picture, and the distance from it as anomaly score.

x_ij is the embedding at position (i, j): a pretrained network's feature maps, joined. There are P = h·w positions,
numbered row by row; D is the embedding's length. The Gaussians are estimated batch by batch, so memory does not grow
with the number of images.
"""

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paperlib import backbones
from paperlib.activations import autocast
from paperlib.anomaly_map import MODES, gaussian_blur, upsample
from paperlib.backbones import FeatureExtractor, concatenate_embeddings, project_embeddings
from paperlib.inputs import check_finite, check_images

COVARIANCE_EPSILON = 0.01  # PaDiM, Sec. IV-B: added to the variances
SMOOTHING_SIGMA = 4.0  # PaDiM, Sec. IV-B: of the Gaussian filter on anomaly maps, in pixels
REDUCTIONS = ("random", "pca")
FORMAT = "paperlib.padim.1"

# Positions are worked on a few at a time, so that what is read twice is still in the processor's cache: about 1.7 times
# faster than all at once at D = 100.
CHUNK = 2**20  # elements
# A symmetric or triangular matrix is cut into bands of this many rows, and a band ends at the diagonal: at D = 550 a
# quarter less time.
BAND = 128
LEAF = 16  # below this size a matrix is factorised by LAPACK, above it by products of its quarters


class PatchGaussian:
    r"""Mean and covariance of the embeddings at each position, updated batch by batch.

    $$\Sigma_{ij} = \frac{1}{N-1}\sum_{k=1}^{N}(x_{ij}^k-\mu_{ij})(x_{ij}^k-\mu_{ij})^\mathrm{T} + \epsilon I$$

    A batch is centred by its own mean and joins the sums of squares with one more product, that of the distance between
    the means (Chan et al.): far from zero no digits cancel. Means are float64.

    Args:
        positions: P.
        dimensions: D.
        dtype: of the centred products; float64 makes parts agree with the whole to 1e-12 instead of 1e-6.
        device: where the sums are kept; by default that of the first batch.

    Raises:
        ValueError: for sizes below 1, or another dtype than float32 and float64.

    Source: PaDiM, arXiv:2011.08785, Sec. III-B, Eq. 1; the update is Chan, Golub & LeVeque's, COMPSTAT 1982.
    Departures: none. Test: test_padim.py::test_batches_give_numpys_mean_and_covariance
    """

    def __init__(
        self,
        positions: int,
        dimensions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if positions < 1 or dimensions < 1:
            raise ValueError(f"positions={positions}, dimensions={dimensions}; expected at least 1 of each")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}; expected torch.float32 or torch.float64")
        self.positions, self.dimensions, self.dtype, self.device = positions, dimensions, dtype, device
        self.count = 0  # images
        self.fed: torch.dtype | None = None  # dtype of the results

    def update(self, x: Float[Tensor, "*n_p_d"]) -> "PatchGaussian":
        """Take in one more batch (N, P, D); any N from 1.

        Raises:
            ValueError: for another shape or device, no image, or NaN; nothing has changed then.
        """
        if x.ndim != 3 or x.shape[1:] != (self.positions, self.dimensions) or not len(x):
            raise ValueError(f"x of shape {tuple(x.shape)}; expected (N, {self.positions}, {self.dimensions}), N ≥ 1")
        check_finite(x, "x")
        self._allocate(x.device)
        if x.device != self._mean.device:
            raise ValueError(f"x on {x.device}; the sums are on {self._mean.device}. Move one of them")
        n, total = len(x), self.count + len(x)
        x = x.detach().transpose(0, 1)
        for rows in _chunks(self.positions, (n + 1) * self.dimensions):
            part, own = x[rows].to(torch.promote_types(_dtype(x.dtype), self.dtype)), self._mean[rows]
            centred = torch.empty(len(part), n + 1, self.dimensions, dtype=self.dtype, device=x.device)
            mean = part.mean(1)
            torch.sub(part, mean[:, None], out=centred[:, :n])
            mean = mean.double()
            if part.dtype == torch.float32:
                # A float32 mean is off by its last digit. What is left over is small, so float32 holds its digits: four
                # times faster than converting all of x.
                left = centred[:, :n].mean(1)
                centred[:, :n] -= left[:, None]
                mean += left
            torch.mul(mean - own, math.sqrt(self.count * n / total), out=centred[:, n])
            self._add_products(rows, centred)
            own.lerp_(mean, n / total)
        self.count = total
        self.fed = x.dtype if self.fed is None else torch.promote_types(self.fed, x.dtype)
        return self

    def merge(self, other: "PatchGaussian") -> "PatchGaussian":
        """Take in the images of another one, which stays as it is; as if all of them had come here.

        Raises:
            ValueError: if its sizes, dtype or device differ.
        """
        kinds = [(g.positions, g.dimensions, g.dtype) for g in (self, other)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"(positions, dimensions, dtype) {kinds[1]}; expected {kinds[0]} as here")
        if not other.count:
            return self
        self._allocate(other._mean.device)
        if other._mean.device != self._mean.device:
            raise ValueError(f"a PatchGaussian on {other._mean.device}; this one is on {self._mean.device}. Move one")
        total = self.count + other.count
        apart = (other._mean - self._mean) * math.sqrt(self.count * other.count / total)
        for rows in _chunks(self.positions, self.dimensions**2):
            self._products[rows] += other._products[rows]
            self._add_products(rows, apart[rows, None].to(self.dtype))
        self._mean.lerp_(other._mean, other.count / total)
        self.count = total
        self.fed = other.fed if self.fed is None else torch.promote_types(self.fed, other.fed)
        return self

    def all_reduce(self, group: Any = None) -> "PatchGaussian":
        """Give every process of a `torch.distributed` group the statistics of all their images.

        To be called by all of them, once, after the last update: a second call would count every image again. A process
        may have had no image; with NCCL it must have been given its `device`.

        Raises:
            ValueError: if no process group is initialised, or sizes or dtypes differ between processes.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError("no process group; call torch.distributed.init_process_group first, in every process")
        self._allocate(torch.device("cpu"))
        kind = [self.positions, self.dimensions, _DTYPES.index(self.dtype)]
        fed = -1 if self.fed is None else _DTYPES.index(self.fed)
        most = torch.tensor([*kind, *(-k for k in kind), fed], device=self._mean.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group)
        *most, fed = most.tolist()
        if most[:3] != kind or [-k for k in most[3:]] != kind:  # then the largest and the smallest differ, for everyone
            raise ValueError(
                f"positions {self.positions}, dimensions {self.dimensions}, {self.dtype}: another process has others; "
                "expected the same in all of them"
            )
        total = torch.tensor(self.count, device=self._mean.device)
        distributed.all_reduce(total, group=group)
        total = int(total)
        if total:
            mean = self._mean * (self.count / total)
            distributed.all_reduce(mean, group=group)
            apart = (self._mean - mean) * math.sqrt(self.count)
            for rows in _chunks(self.positions, self.dimensions**2):
                self._add_products(rows, apart[rows, None].to(self.dtype))
            distributed.all_reduce(self._products, group=group)
            self._mean.copy_(mean)
            self.count, self.fed = total, _DTYPES[fed]
        return self

    def mean(self) -> Float[Tensor, "p d"]:
        """Return μ, in the dtype of the x that was fed.

        Raises:
            ValueError: before the first image.
        """
        if not self.count:
            raise ValueError("no image yet; call update first")
        return self._mean.to(self.fed)

    def covariance(self, epsilon: float | int = COVARIANCE_EPSILON) -> Float[Tensor, "p d d"]:
        """Return Σ + εI of Eq. 1, unbiased (N - 1), in the dtype of the x that was fed.

        Raises:
            ValueError: for fewer than 2 images, or a negative epsilon.
        """
        self._check_enough(epsilon)
        lower = (self._products / (self.count - 1)).tril_()
        full = lower + lower.tril(-1).mT
        full.diagonal(dim1=1, dim2=2).add_(epsilon)
        return full.to(self.fed)

    def _check_enough(self, epsilon: float | int) -> None:
        if self.count < 2:
            raise ValueError(
                f"{self.count} image{'s' * (self.count != 1)}; a sample covariance divides by N - 1 and takes at least "
                "2. Feed more images"
            )
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon={epsilon}; expected a variance to add, at least 0")

    def _allocate(self, device: torch.device) -> None:
        if not hasattr(self, "_mean"):
            p, d, device = self.positions, self.dimensions, self.device or device
            with torch.inference_mode(False):
                self._mean = torch.zeros(p, d, dtype=torch.float64, device=device)
                self._products = torch.zeros(p, d, d, dtype=self.dtype, device=device)  # right up to the diagonal only

    def _add_products(self, rows: slice, vectors: Float[Tensor, "p n d"]) -> None:
        """Add the sum of outer products of vectors (P', N, D), band by band."""
        products = self._products[rows]
        with _full_precision():
            for start, stop in _bands(self.dimensions):
                products[:, start:stop, :stop].baddbmm_(vectors[..., start:stop].mT, vectors[..., :stop])


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mahalanobis_distance(
    x: Float[Tensor, "*n_p_d"], mean: Float[Tensor, "*p_d"], cholesky: Float[Tensor, "*p_d_d"]
) -> Float[Tensor, "n p"]:
    r"""Measure how far embeddings lie from their position's Gaussian, in standard deviations.

    $$M(x_{ij}) = \sqrt{(x_{ij}-\mu_{ij})^\mathrm{T}\,\Sigma_{ij}^{-1}\,(x_{ij}-\mu_{ij})} = \lVert z_{ij} \rVert$$
    where $L z = x - \mu$ and $\Sigma = L L^\mathrm{T}$: a triangular system instead of an inverse.

    Args:
        x: embeddings (N, P, D).
        mean: μ, (P, D).
        cholesky: L, (P, D, D), lower triangular, as `torch.linalg.cholesky` of `PatchGaussian.covariance()` gives it.

    Returns:
        the distance, not its square, (N, P).

    Raises:
        ValueError: if shapes do not fit, dtypes differ or are half precision, or x holds NaN.

    Source: PaDiM, arXiv:2011.08785, Sec. III-C, Eq. 2. Departures: none.
    Test: test_padim.py::test_distance_equals_scipys
    """
    n, p, d = x.shape if x.ndim == 3 else (0, 0, 0)
    if not p or not d or mean.shape != (p, d) or cholesky.shape != (p, d, d):
        raise ValueError(
            f"x {tuple(x.shape)}, mean {tuple(mean.shape)}, cholesky {tuple(cholesky.shape)}; expected (N, P, D), "
            "(P, D) and (P, D, D)"
        )
    if len({x.dtype, mean.dtype, cholesky.dtype}) > 1 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x {x.dtype}, mean {mean.dtype}, cholesky {cholesky.dtype}; expected one, float32 or float64")
    check_finite(x, "x")
    distances = []
    for rows in _chunks(p, n * d):
        centred = (x[:, rows] - mean[rows]).permute(1, 2, 0)
        whitened = torch.linalg.solve_triangular(cholesky[rows], centred, upper=False)
        distances.append(torch.linalg.vector_norm(whitened, dim=1))
    return torch.cat(distances).T


def leave_one_out_distance(distance: Tensor, count: int) -> Tensor:
    r"""Correct the distances of images that a Gaussian was fitted to: how far each would lie had it been left out.

    $$M_{-k} = \frac{N}{N-1}\sqrt{\frac{N-2}{N-1}}\;\frac{M}{\sqrt{1 - N M^2/(N-1)^2}}$$

    Images that took part in the fit lie too close to it: M never exceeds $(N-1)/\sqrt{N}$, however strange the image.
    Leaving one out changes the covariance by one outer product, whose effect on the inverse is known (Sherman &
    Morrison), so no Gaussian need be fitted again.

    Args:
        distance: M of images among the N, of any shape.
        count: N, at least 3.

    Returns:
        the corrected distances, of the same shape.

    Raises:
        ValueError: for a count below 3.

    Source: this book. Departures: ε counts as ε(N-1)/(N-2) in the Gaussian left with N - 1 images.
    Test: test_padim.py::test_leaving_out_equals_fitting_again
    """
    if count < 3:
        raise ValueError(f"{count} images; leaving one out takes at least 3")
    # In float64: where N is below D the difference is small.
    share = 1 - distance.double().square() * (count / (count - 1) ** 2)
    scale = count / (count - 1) * math.sqrt((count - 2) / (count - 1))
    return (scale * distance / share.clamp_min(1e-12).sqrt()).to(distance.dtype)


class PaDiM:
    """Detect and localise anomalies after one look at normal images; nothing is trained.

    `fit` estimates the Gaussians and factorises them once; scoring is then one product a position with the inverse
    factor. That is faster than solving triangular systems, by how much depends on the batch (tests/bench). Products
    and sums are never taken in bfloat16 or TF32, whatever the caller has set.

    Args:
        extractor: a FeatureExtractor: of a named backbone, `FeatureExtractor(*load("resnet18")[:2])` say, or of any
            network. For the paper's single-layer models give it one layer.
        dimensions: D, how many embedding dimensions are kept (the paper: 100 of 448 for ResNet-18, 550 of 1,792 for
            Wide ResNet-50-2); None keeps all channels.
        seed: of the random choice.
        epsilon: added to the variances.
        reduction: "random" keeps channels drawn at random; "pca" projects on the leading principal components of all
            training embeddings, for which `fit` reads the batches twice.
        mode: how maps are enlarged, "bilinear" or "bicubic".
        sigma: of the Gaussian that smooths anomaly maps, in pixels of the image.

    Attributes (after `fit` or `load`):
        mean: μ, (P, D). whitening: $L^{-1}$, (P, D, D), lower triangular. channels: indices of those kept, ascending,
        or None with "pca". basis: (all channels, D) with "pca", else None. grid: (h, w). size: (H, W) of the images.
        count: N, the images fitted.

    Raises:
        ValueError: for settings outside of what is said above.

    Source: Defard et al., arXiv:2011.08785, Sec. III and IV-B.
    Departures: maps are enlarged bilinearly by default, the paper says bicubic (`mode="bicubic"`).
    Test: test_padim.py::test_maps_equal_the_equations_written_out
    """

    def __init__(
        self,
        extractor: Any,
        dimensions: int | None = 100,
        seed: int = 0,
        epsilon: float | int = COVARIANCE_EPSILON,
        *,
        reduction: str = "random",
        mode: str = "bilinear",
        sigma: float | int = SMOOTHING_SIGMA,
    ):
        _check_extractor(extractor)
        if dimensions is not None and dimensions < 1:
            raise ValueError(f"dimensions={dimensions}; expected at least 1, or None for all channels")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon={epsilon}; expected a variance to add, above 0")
        if reduction not in REDUCTIONS or mode not in MODES:
            raise ValueError(f"reduction={reduction!r}, mode={mode!r}; expected one of {REDUCTIONS} and of {MODES}")
        if reduction == "pca" and dimensions is None:
            raise ValueError("dimensions=None keeps all channels, which leaves nothing to PCA; give their number")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma={sigma}; expected a standard deviation in pixels, at least 0")
        self.extractor, self.dimensions, self.seed, self.epsilon = extractor, dimensions, seed, epsilon
        self.reduction, self.mode, self.sigma = reduction, mode, sigma
        self.count = 0

    def fit(self, batches: Iterable) -> "PaDiM":
        """Estimate the Gaussians from batches of normal images (N, 3, H, W), already transformed; returns self.

        Batches may come from a generator, of any lengths, and are read once (twice with "pca"). What was fitted before
        is replaced, and kept if anything fails.

        Raises:
            ValueError: for batches that are not finite images of one size, fewer than 2 images in all, more dimensions
                than channels, or features of so large a variance that epsilon is lost in rounding.
        """
        if isinstance(batches, Tensor):
            raise ValueError(
                f"one tensor of shape {tuple(batches.shape)}; expected an iterable of batches. Pass images.split(32)"
            )
        basis = self._principal_components(batches) if self.reduction == "pca" else None
        channels = gaussian = size = grid = None
        for images in batches:
            size = _check_size(images, size)
            maps = self._maps(images)
            if gaussian is None:
                if basis is None:
                    channels = self._draw(sum(part.shape[1] for part in maps))
                grid = tuple(maps[0].shape[2:])
            x = _embed(maps, channels, basis)
            if gaussian is None:
                gaussian = PatchGaussian(x.shape[1], x.shape[2], _dtype(x.dtype))
            gaussian.update(x)
        if gaussian is None:
            raise ValueError("no batch came; a generator gives its batches only once")
        mean, whitening = gaussian.mean(), _whiten(gaussian, self.epsilon)
        self.mean, self.whitening, self.channels, self.basis = mean, whitening, channels, basis
        self.grid, self.size, self.count = grid, size, gaussian.count
        return self

    def anomaly_map(self, images: Tensor) -> Float[Tensor, "n h w"]:
        """Return an anomaly map of the images' size for each of them: distances, enlarged and smoothed, not scaled.

        Raises:
            ValueError: before `fit`, for images that are no finite batch of the fitted size, or on another device.
        """
        return self._enlarge(self._distances(images))

    def score(self, images: Tensor) -> Float[Tensor, " n"]:
        """Return one score an image, the maximum of its anomaly map.

        Raises:
            ValueError: as `anomaly_map`.
        """
        return self.anomaly_map(images).amax((1, 2))

    def normal_threshold(self, batches: Iterable, quantile: float | int = 0.99, *, fitted: bool = False) -> float:
        """Choose the score above which an image counts as anomalous, from normal images alone.

        A share of 1 - `quantile` of normal images will be called anomalous. Give images that were not fitted: those
        that were fitted score too low, and the lower the fewer they are. Where no others are left, pass them with
        `fitted=True`: each image is then scored as if it had been left out (see `leave_one_out_distance`).

        Args:
            batches: of normal images, as for `fit`.
            quantile: share of normal images that shall pass.
            fitted: whether they are the images of `fit`.

        Returns:
            a threshold in the unit of `score`.

        Raises:
            ValueError: as `anomaly_map`, for no batch, or a quantile outside [0, 1].
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile={quantile}; expected a share of the normal images, between 0 and 1")
        scores = []
        for images in batches:
            distances = self._distances(images)
            if fitted:
                distances = leave_one_out_distance(distances, self.count)
            scores.append(self._enlarge(distances).amax((1, 2)))
        if not scores:
            raise ValueError("no batch came; a generator gives its batches only once")
        return float(torch.cat(scores).double().quantile(quantile))

    def to(self, device: torch.device | str) -> "PaDiM":
        """Move the Gaussians and the extractor's model to a device; returns self."""
        self.extractor.model.to(device)
        if self.count:
            self.mean, self.whitening = self.mean.to(device), self.whitening.to(device)
            self.basis = None if self.basis is None else self.basis.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write everything but the network's weights as one safetensors file, whole or not at all.

        Raises:
            ValueError: before `fit`.
        """
        self._check_fitted()
        path, model = Path(path), self.extractor.model
        tensors = {"mean": self.mean, "whitening": self.whitening}
        tensors |= {"channels": self.channels} if self.basis is None else {"basis": self.basis}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {
            "format": FORMAT, "backbone": getattr(model, "backbone_name", None), "layers": self.extractor.layers,
            "weights": _fingerprint(model), "settings": {name: getattr(self, name) for name in _SETTINGS},
            "grid": self.grid, "size": self.size, "count": self.count,
        }  # fmt: skip
        text = json.dumps(about)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata={"paperlib": text, "sha256": _digest(text, tensors)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, extractor: FeatureExtractor | None = None) -> "PaDiM":
        """Read what `save` wrote; no pickle is ever loaded.

        Args:
            path: the file.
            extractor: the one it was fitted with. None loads the backbone by its name with its default weights.

        Raises:
            ValueError: naming the file, if it is no such file, damaged, of a newer format, or fitted with another
                network, other weights or other layers; or if its network has no name and no extractor is given.
        """
        about, tensors = _read(Path(path))
        if extractor is None:
            if about["backbone"] is None:
                raise ValueError(f"{path} was fitted with a network of your own; pass extractor=FeatureExtractor(…)")
            try:
                extractor = FeatureExtractor(backbones.load(about["backbone"]).model, about["layers"])
            except ValueError as error:
                raise ValueError(f"{path} needs its backbone, or extractor=…: {error}") from error
        _check_extractor(extractor)
        if list(extractor.layers) != about["layers"]:
            raise ValueError(f"{path} was fitted on layers {about['layers']}; the extractor has {extractor.layers}")
        if _fingerprint(extractor.model) != about["weights"]:
            name = about["backbone"] or "a network of your own"
            raise ValueError(f"{path} was fitted with {name}, with other weights than these; pass its own extractor")
        model = cls(extractor, **about["settings"])
        device = next((p.device for p in extractor.model.parameters()), torch.device("cpu"))
        model.mean, model.whitening = tensors["mean"].to(device), tensors["whitening"].to(device)
        model.channels = tensors.get("channels")
        model.basis = tensors["basis"].to(device) if "basis" in tensors else None
        model.grid, model.size, model.count = tuple(about["grid"]), tuple(about["size"]), about["count"]
        return model

    def _distances(self, images: Tensor) -> Float[Tensor, "n h w"]:
        self._check_fitted()
        _check_size(images, self.size)
        if images.device != self.mean.device:
            raise ValueError(f"images on {images.device}; the Gaussians are on {self.mean.device}. Call .to(device)")
        x = _embed(self._maps(images), self.channels, self.basis)
        if x.shape[1:] != self.mean.shape:
            raise ValueError(f"embeddings {tuple(x.shape[1:])} a position; expected {tuple(self.mean.shape)} as fitted")
        return _whitened_norm(x.to(self.mean.dtype), self.mean, self.whitening).view(-1, *self.grid)

    def _enlarge(self, distances: Tensor) -> Tensor:
        return gaussian_blur(upsample(distances, self.size, self.mode), self.sigma)

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = self.extractor(images)
        # A network under autocast gives half precision: too coarse for what is added up from here on.
        return [part.to(_dtype(part.dtype)) for part in maps]

    def _draw(self, total: int) -> Tensor:
        if self.dimensions is None:
            return torch.arange(total)
        if self.dimensions > total:
            raise ValueError(
                f"dimensions={self.dimensions} of {total} channels that layers {', '.join(self.extractor.layers)} give "
                "together; expected no more, or None for all"
            )
        return (
            torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[: self.dimensions].sort().values
        )

    def _principal_components(self, batches: Iterable) -> Float[Tensor, "total d"]:
        """Find the directions of largest variance of all embeddings, whatever their position."""
        if isinstance(batches, Iterator):
            raise ValueError("PCA reads the batches twice and a generator gives them once; pass a list or a DataLoader")
        pooled = size = None
        for images in batches:
            size = _check_size(images, size)
            x = _embed(self._maps(images), None, None)
            self._draw(x.shape[2])  # says so if there are too few channels
            pooled = pooled or PatchGaussian(1, x.shape[2], _dtype(x.dtype))
            pooled.update(x.transpose(0, 1).reshape(-1, 1, x.shape[2]))
        if pooled is None:
            raise ValueError("no batch came")
        _, vectors = torch.linalg.eigh(pooled.covariance(0)[0].double())  # in ascending order
        return vectors.flip(1)[:, : self.dimensions].to(pooled.fed).contiguous()

    def _check_fitted(self) -> None:
        if not self.count:
            raise ValueError("this PaDiM is not fitted; call fit(batches) with normal images, or PaDiM.load(path)")


def summed_anomaly_map(models: Sequence[PaDiM], images: Tensor) -> Float[Tensor, "n h w"]:
    """Add up the maps of several models, one a layer say: the paper's "Layer 1+2+3", which knows no correlations
    between layers.

    Args:
        models: fitted, of one image size.
        images: as for `PaDiM.anomaly_map`.

    Raises:
        ValueError: for no model, and as `PaDiM.anomaly_map`.

    Source: PaDiM, arXiv:2011.08785, Sec. V-A, Table I. Departures: none.
    Test: test_padim.py::test_layers_are_summed
    """
    if not models:
        raise ValueError("no model; expected at least one")
    return sum(model.anomaly_map(images) for model in models)


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def _embed(maps: list[Tensor], channels: Tensor | None, basis: Tensor | None) -> Float[Tensor, "n p d"]:
    joined = concatenate_embeddings(maps, channels) if basis is None else project_embeddings(maps, basis)
    return joined.flatten(2).transpose(1, 2)


def _whitened_norm(
    x: Float[Tensor, "n p d"], mean: Float[Tensor, "p d"], whitening: Float[Tensor, "p d d"]
) -> Float[Tensor, "n p"]:
    """Mahalanobis distance with the inverse factor at hand; of triangular rows only the filled part is read."""
    n, p, d = x.shape
    distances = x.new_empty(p, n)
    x = x.transpose(0, 1)
    with _full_precision():
        for rows in _chunks(p, n * d):
            centred, factor = x[rows] - mean[rows, None], whitening[rows]
            squares = [
                torch.bmm(centred[..., :stop], factor[:, start:stop, :stop].mT).square().sum(2)
                for start, stop in _bands(d)
            ]
            distances[rows] = sum(squares).sqrt()
    return distances.T


def _whiten(gaussian: PatchGaussian, epsilon: float | int) -> Float[Tensor, "p d d"]:
    """Replace the sums of products by the inverse Cholesky factors of the covariances, a few positions at a time."""
    gaussian._check_enough(epsilon)
    products, fed = gaussian._products, gaussian.fed
    for rows in _chunks(gaussian.positions, gaussian.dimensions**2):
        covariance = products[rows] / (gaussian.count - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
        try:
            with _full_precision():
                products[rows] = _inverse_cholesky(covariance)
        except torch.linalg.LinAlgError as error:
            variance = covariance.diagonal(dim1=1, dim2=2).max()
            raise ValueError(
                f"a covariance with variances up to {variance:.3g} is not positive definite in {products.dtype}: "
                f"epsilon={epsilon} is lost in rounding. Scale the features down or raise epsilon"
            ) from error
    return products.to(fed)


def _inverse_cholesky(covariance: Float[Tensor, "p d d"]) -> Float[Tensor, "p d d"]:
    r"""Return $L^{-1}$ with $\Sigma = L L^\mathrm{T}$, reading below the diagonal only.

    By quarters: $L_{21} = \Sigma_{21} L_{11}^{-\mathrm{T}}$, $L_{22}$ is the factor of
    $\Sigma_{22} - L_{21}L_{21}^\mathrm{T}$, and the inverse has $-L_{22}^{-1} L_{21} L_{11}^{-1}$ below its diagonal.
    Batched products do nearly all of it, 2 to 4 times faster than LAPACK one matrix after another.
    """
    d = covariance.shape[-1]
    if d <= LEAF:
        lower = torch.linalg.cholesky(covariance)
        eye = torch.eye(d, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    h = d // 2
    inverse = torch.zeros_like(covariance)
    first = inverse[:, :h, :h] = _inverse_cholesky(covariance[:, :h, :h])
    below = torch.bmm(covariance[:, h:, :h], first.mT)
    last = inverse[:, h:, h:] = _inverse_cholesky(torch.baddbmm(covariance[:, h:, h:], below, below.mT, alpha=-1))
    inverse[:, h:, :h] = torch.bmm(torch.bmm(last, below), first).neg_()
    return inverse


def _chunks(positions: int, elements: int) -> Iterator[slice]:
    """Cut the positions into slices of about CHUNK elements, `elements` for each position."""
    step = max(1, CHUNK // max(1, elements))
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


def _bands(dimensions: int) -> list[tuple[int, int]]:
    return [(start, min(start + BAND, dimensions)) for start in range(0, dimensions, BAND)]


def _dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# Since torch 2.9 each backend has a setting of its own beside the common one, and reading or using the common one fails
# where they disagree.
_BACKENDS = [
    backend
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    if hasattr(backend, "fp32_precision")
]
_PRECISION = threading.Lock()
_FULL: dict[str, Any] = {"blocks": 0, "before": None}


@contextmanager
def _full_precision() -> Iterator[None]:
    """Take matrix products in their own precision: no autocast, no TF32, no bfloat16 inside float32 products."""
    # The setting belongs to the process, not to a thread: the first block in sets it, the last one out puts it back.
    with _PRECISION:
        if _FULL["blocks"] == 0:
            common, own = _matmul_precision()
            lowered = common != "highest" or not {"ieee", "none"}.issuperset(own)
            _FULL["before"] = (common, own) if lowered else None
            if lowered:
                torch.set_float32_matmul_precision("highest")  # of the backends, too
        _FULL["blocks"] += 1
    try:
        with autocast(enabled=False):
            yield
    finally:
        with _PRECISION:
            _FULL["blocks"] -= 1
            if _FULL["blocks"] == 0 and _FULL["before"]:
                common, own = _FULL["before"]
                if common:
                    torch.set_float32_matmul_precision(common)
                for backend, precision in zip(_BACKENDS, own, strict=True):
                    if backend.fp32_precision != precision:
                        backend.fp32_precision = precision


def _matmul_precision() -> tuple[str | None, list[str]]:
    """Return the common setting, None where it can't be read, and each backend's."""
    try:
        common = torch.get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, [backend.fp32_precision for backend in _BACKENDS]


# ---- checks and files -----------------------------------------------------------------------------------------------

_SETTINGS = ("dimensions", "seed", "epsilon", "reduction", "mode", "sigma")


def _check_extractor(extractor: Any) -> None:
    if not isinstance(extractor, FeatureExtractor):
        raise ValueError(
            f"an extractor of type {type(extractor).__name__}; expected a FeatureExtractor. From a backbone: "
            "FeatureExtractor(*load(name)[:2])"
        )


def _check_size(images: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the images' height and width, if they are images and of the size that is given."""
    if isinstance(images, (tuple, list)):
        raise ValueError(f"a batch of type {type(images).__name__}; expected a tensor of images alone, without labels")
    found = tuple(check_images(images).shape[2:])
    if size is not None and found != size:
        raise ValueError(f"images of {found[0]}×{found[1]} pixels; expected {size[0]}×{size[1]}, as fitted")
    return found


def _fingerprint(model: nn.Module) -> str:
    """Digest a network's weights, by order and not by name (wrappers put prefixes before names)."""
    state = {str(i): tensor.detach().cpu().contiguous() for i, tensor in enumerate(model.state_dict().values())}
    return _digest("", state)


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read and check a saved model; whatever is wrong with the file is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("paperlib", "null")
            about = json.loads(text)
            if isinstance(about, dict) and about.get("format") == FORMAT:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a saved PaDiM ({error}); fit and save again") from error
    format = about.get("format") if isinstance(about, dict) else None
    if format != FORMAT:
        newer = isinstance(format, str) and re.fullmatch(r"paperlib\.padim\.\d+", format)
        found = f"has the format {format!r}, newer than {FORMAT!r}; update paperlib" if newer else "is no saved PaDiM"
        raise ValueError(f"{path} {found}, or fit and save again")
    if metadata.get("sha256") != _digest(text, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match their checksum; copy it again, or fit and save")
    return about, tensors
