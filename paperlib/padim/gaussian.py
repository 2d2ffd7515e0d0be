"""A Gaussian per position, estimated in batches, and Mahalanobis distances.

There are P positions, numbered row by row, with an embedding of length D at each.
Estimates are stable for data far from zero. Matrix products are computed in full
precision whatever the caller has set, in chunks that suit the device.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Float, Int
from torch import Tensor

from paperlib.devices import chunk_sizes
from paperlib.distributed import check_same, fail_together
from paperlib.precision import at_least_float32, full_precision
from paperlib.validation import (
    NotFitted,
    check_finite,
    check_integers,
    check_number,
    check_same_kind,
    check_supports_float64,
    check_tensor,
    has_values,
)

COVARIANCE_EPSILON = 0.01  # PaDiM, Sec. IV-B: added to the variances
# A symmetric or triangular matrix is computed in bands of this many rows that end at
# the diagonal: at D = 550 a quarter less time.
BAND = 128
# On a CPU a matrix below this size is factorised by LAPACK, and above it by products of
# its quarters.
LEAF = 16


class PatchGaussian:
    r"""Mean and covariance of the embeddings at each position, updated batch by batch.

    $$\Sigma_{ij} = \frac{1}{N-1}\sum_{k=1}^{N}
      (x_{ij}^k-\mu_{ij})(x_{ij}^k-\mu_{ij})^\mathrm{T} + \epsilon I$$

    A batch is centred by its mean and added to the scatter matrices with a correction
    for the distance between the means (Chan et al.), so no digits cancel for data far
    from zero. Means are float64.

    Args:
        positions: of the feature map, P.
        dimensions: of an embedding, D.
        dtype: of the centred products; with float64 merged parts equal the whole to
            1e-12 instead of 1e-6.
        device: of the sums; by default that of the first batch.

    Raises:
        ValueError: for sizes below 1, or a dtype other than float32 and float64.

    Example:
        >>> import torch
        >>> from paperlib.padim import PatchGaussian
        >>> gaussian = PatchGaussian(positions=4, dimensions=3)
        >>> for x in torch.rand(10, 4, 3).split(5):  # batches of embeddings
        ...     gaussian = gaussian.update(x)
        >>> gaussian.mean().shape, gaussian.covariance().shape
        (torch.Size([4, 3]), torch.Size([4, 3, 3]))

    Source: PaDiM, arXiv:2011.08785, Sec. III-B, Eq. 1; the update is Chan, Golub &
        LeVeque's, COMPSTAT 1982.
    Departures: none.
    Test: test_gaussian.py::test_batches_give_numpys_mean_and_covariance
    """

    def __init__(
        self,
        positions: int,
        dimensions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        check_integers(positions=positions, dimensions=dimensions)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}; expected torch.float32 or torch.float64")
        self.positions, self.dimensions, self.dtype = positions, dimensions, dtype
        self.device = device
        self.count = 0  # images
        # Dtype of the results. Any dtype of embeddings takes the place of bool.
        self.result_dtype = torch.bool
        self._consumed = False  # True once `whiten` has overwritten the sums

    def __repr__(self) -> str:
        """Show the sizes and the number of images."""
        sizes = f"positions={self.positions}, dimensions={self.dimensions}"
        state = ", consumed by whiten" * self._consumed
        return f"PatchGaussian({sizes}: {self.count} images{state})"

    def update(self, x: Float[Tensor, "n p d"]) -> "PatchGaussian":
        """Add a batch of embeddings (N, P, D), N ≥ 1.

        Raises:
            ValueError: for another shape or device, an empty batch, or NaN; nothing is
                changed then.
        """
        check_tensor(x, "x")
        if x.shape[1:] != (self.positions, self.dimensions) or not len(x):
            raise ValueError(
                f"x of shape {tuple(x.shape)};"
                f" expected (N, {self.positions}, {self.dimensions}), N ≥ 1"
            )
        check_finite(x, "x")
        self._allocate(x.device, "x")
        total = self.count + len(x)
        x = x.detach().transpose(0, 1)
        elements = (x.shape[1] + 1) * self.dimensions
        for rows in _chunks(self.positions, elements, x.device):
            self._add_batch(rows, x[rows], total)
        self.count = total
        self.result_dtype = torch.promote_types(self.result_dtype, x.dtype)
        return self

    def merge(self, other: "PatchGaussian") -> "PatchGaussian":
        """Merge the statistics of another `PatchGaussian`, which is not changed.

        Raises:
            ValueError: if its sizes, dtype or device differ.
        """
        if not isinstance(other, PatchGaussian):
            raise ValueError(f"{other!r:.80}; expected a PatchGaussian")
        other._check_not_consumed()
        types = [(g.positions, g.dimensions, g.dtype) for g in (self, other)]
        if types[0] != types[1]:
            raise ValueError(
                f"(positions, dimensions, dtype) {types[1]};"
                f" expected {types[0]} as here"
            )
        if not other.count:
            return self
        self._allocate(other._mean.device, "a PatchGaussian")
        total = self.count + other.count
        mean_difference = (other._mean - self._mean) * math.sqrt(
            self.count * other.count / total
        )
        for rows in _chunks(self.positions, self.dimensions**2, self._mean.device):
            self._products[rows] += other._products[rows]
            self._add_products(rows, mean_difference[rows, None].to(self.dtype))
        self._mean.lerp_(other._mean, other.count / total)
        self.count = total
        self.result_dtype = torch.promote_types(self.result_dtype, other.result_dtype)
        return self

    def all_reduce(self, group: Any = None) -> "PatchGaussian":
        """Combine the statistics of all processes of a `torch.distributed` group.

        Every process must call this once, after its last update: a second call would
        count every image again. A process may have no image; with NCCL it then needs
        its `device`.

        Raises:
            ValueError: if no process group is initialised, or sizes or dtypes differ
                between processes.
        """
        device = self._mean.device if self.count else self.device or "cpu"
        with fail_together(torch.device(device), group):
            self._allocate()
        sizes = [self.positions, self.dimensions, _DTYPES.index(self.dtype)]
        check_same(
            sizes,
            self._mean.device,
            f"positions {self.positions}, dimensions {self.dimensions}, {self.dtype}:"
            " another process has other values; expected the same in all",
            group,
        )
        index, count = (
            torch.tensor(number, device=self._mean.device)
            for number in (_DTYPES.index(self.result_dtype), self.count)
        )
        distributed.all_reduce(index, distributed.ReduceOp.MAX, group)
        distributed.all_reduce(count, group=group)
        total = int(count)
        if total:
            mean = self._mean * (self.count / total)
            distributed.all_reduce(mean, group=group)
            mean_difference = (self._mean - mean) * math.sqrt(self.count)
            for rows in _chunks(self.positions, self.dimensions**2, self._mean.device):
                self._add_products(rows, mean_difference[rows, None].to(self.dtype))
            distributed.all_reduce(self._products, group=group)
            self._mean.copy_(mean)
            self.count, self.result_dtype = total, _DTYPES[index]
        return self

    def mean(self) -> Float[Tensor, "p d"]:
        """Return μ, in the dtype of the embeddings.

        Raises:
            ValueError: before the first image.
        """
        self._check_enough(least=1)
        return self._mean.to(self.result_dtype)

    def covariance(self, epsilon: float = COVARIANCE_EPSILON) -> Float[Tensor, "p d d"]:
        """Return Σ + εI of Eq. 1, unbiased (N - 1), in the dtype of the embeddings.

        Raises:
            ValueError: for fewer than 2 images, or a negative epsilon.
        """
        self._check_enough(least=2)
        check_number("epsilon", epsilon, "a variance to add", least=0)
        lower = (self._products / (self.count - 1)).tril_()
        full = lower + lower.tril(-1).mT
        full.diagonal(dim1=1, dim2=2).add_(float(epsilon))
        return full.to(self.result_dtype)

    def _check_not_consumed(self) -> None:
        if self._consumed:
            raise ValueError(
                "this PatchGaussian was consumed by whiten, which overwrites its sums;"
                " fit a new one, or call its methods before whiten"
            )

    def _check_enough(self, least: int) -> None:
        self._check_not_consumed()
        if self.count < least:
            error = ValueError if self.count else NotFitted
            raise error(
                f"{self.count} image{'s' * (self.count != 1)}; a mean needs at least 1,"
                " and a sample covariance, which divides by N - 1, at least 2."
                " Add more images"
            )

    def _allocate(self, device: torch.device | None = None, what: str = "") -> None:
        """Allocate the sums once; raise if `what` is on another device than they."""
        self._check_not_consumed()
        if not hasattr(self, "_mean"):
            p, d = self.positions, self.dimensions
            check_supports_float64(self.device or device or "cpu")
            with (
                torch.inference_mode(False),
                torch.device(self.device or device or "cpu"),
            ):
                self._mean = torch.zeros(p, d, dtype=torch.float64)
                # valid up to the diagonal only
                self._products = torch.zeros(p, d, d, dtype=self.dtype)
        if device not in (None, self._mean.device):
            raise ValueError(
                f"{what} on {device}; the sums are on {self._mean.device}."
                " Move one of them"
            )

    def _add_batch(self, rows: slice, x: Float[Tensor, "p n d"], total: int) -> None:
        """Add a batch at some positions, after which there are `total` images."""
        n, mean_before = x.shape[1], self._mean[rows]
        x = x.to(torch.promote_types(at_least_float32(x.dtype), self.dtype))
        centred = x.new_empty(len(x), n + 1, self.dimensions, dtype=self.dtype)
        mean = x.mean(1)
        torch.sub(x, mean[:, None], out=centred[:, :n])
        mean = mean.double()
        if x.dtype == torch.float32:
            # A float32 mean has a rounding error. Its remainder is small, so float32
            # represents it well: four times faster than converting all of x.
            remainder = centred[:, :n].mean(1)
            centred[:, :n] -= remainder[:, None]
            mean += remainder
        torch.mul(
            mean - mean_before, math.sqrt(self.count * n / total), out=centred[:, n]
        )
        self._add_products(rows, centred)
        mean_before.lerp_(mean, n / total)

    def _add_products(self, rows: slice, vectors: Float[Tensor, "p n d"]) -> None:
        """Add the sums of outer products of vectors (P', N, D), in bands."""
        products = self._products[rows]
        with full_precision():
            for start in range(0, self.dimensions, BAND):
                stop = start + BAND
                products[:, start:stop, :stop].baddbmm_(
                    vectors[..., start:stop].mT, vectors[..., :stop]
                )


_DTYPES = (torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64)


def mahalanobis_distance(
    x: Float[Tensor, "n p d"],
    mean: Float[Tensor, "p d"],
    cholesky: Float[Tensor, "p d d"],
) -> Float[Tensor, "n p"]:
    r"""Compute the Mahalanobis distance of embeddings from their position's Gaussian.

    $$M(x_{ij}) = \sqrt{(x_{ij}-\mu_{ij})^\mathrm{T}\,\Sigma_{ij}^{-1}\,
      (x_{ij}-\mu_{ij})} = \lVert z_{ij} \rVert$$
    where $L z = x - \mu$ and $\Sigma = L L^\mathrm{T}$: a triangular system is solved,
    without an inverse.

    Args:
        x: embeddings (N, P, D).
        mean: μ, (P, D).
        cholesky: L, (P, D, D), lower triangular: `torch.linalg.cholesky` of
            `PatchGaussian.covariance()`.

    Returns:
        the distance, not its square, (N, P).

    Raises:
        ValueError: if shapes do not match, dtypes differ or are half precision, or x
            contains NaN.

    Example:
        >>> import torch
        >>> from paperlib.padim import mahalanobis_distance
        >>> x = torch.tensor([[[6.0, 0.0]]])  # one image, one position
        >>> covariance = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]])
        >>> cholesky = torch.linalg.cholesky(covariance)
        >>> mahalanobis_distance(x, torch.zeros(1, 2), cholesky)
        tensor([[3.]])

    Source: PaDiM, arXiv:2011.08785, Sec. III-C, Eq. 2. Departures: none.
    Test: test_gaussian.py::test_distance_equals_scipys
    """
    for name, values in (("x", x), ("mean", mean), ("cholesky", cholesky)):
        check_tensor(values, name)
    n, p, d = x.shape if x.ndim == 3 else (0, 0, 0)
    if not p or not d or mean.shape != (p, d) or cholesky.shape != (p, d, d):
        raise ValueError(
            f"x {tuple(x.shape)}, mean {tuple(mean.shape)}, cholesky"
            f" {tuple(cholesky.shape)}; expected (N, P, D), (P, D) and (P, D, D)"
        )
    check_same_kind("x", x, "mean", mean)
    check_same_kind("x", x, "cholesky", cholesky)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x {x.dtype}; expected float32 or float64")
    check_finite(x, "x")
    centred = (x - mean).permute(1, 2, 0)
    whitened = torch.linalg.solve_triangular(cholesky, centred, upper=False)
    return torch.linalg.vector_norm(whitened, dim=1).T


def leave_one_out_distance(distance: Tensor, count: int) -> Tensor:
    r"""Compute the leave-one-out distances of a Gaussian's training images.

    $$M_{-k} = \frac{N}{N-1}\sqrt{\frac{N-2}{N-1}}\;\frac{M}{\sqrt{1 - N M^2/(N-1)^2}}$$

    The distances of training images are too small: M never exceeds $(N-1)/\sqrt{N}$,
    whatever the image. Leaving one out changes the covariance by one outer product,
    whose effect on the inverse is known (Sherman & Morrison), so no Gaussian is fitted
    again.

    Args:
        distance: M of images among the N, of any shape.
        count: N, at least 3.

    Returns:
        the corrected distances, of the same shape.

    Raises:
        ValueError: for a count below 3, or distances above the bound, which training
            images cannot have.
    """
    check_tensor(distance, "distances")
    check_integers(3, count=count)
    check_integers(distances=distance.numel())
    # In float64, because the difference is small where N is below D.
    share = 1 - distance.double().square() * (count / (count - 1) ** 2)
    if has_values(share) and share.min() < -1e-3:  # beyond rounding
        raise ValueError(
            f"distances up to {distance.max():.4g}; those of {count} training images"
            f" are at most {(count - 1) / math.sqrt(count):.4g}."
            " Pass the images of fit, or leave fitted=False for others"
        )
    scale = count / (count - 1) * math.sqrt((count - 2) / (count - 1))
    return (scale * distance / share.clamp_min(1e-12).sqrt()).to(distance.dtype)


# ---- the arithmetic ----


def whitened_norm(
    x: Float[Tensor, "n p d"],
    mean: Float[Tensor, "p d"],
    whitening: Float[Tensor, "p d d"],
) -> Float[Tensor, "n p"]:
    r"""Compute the Mahalanobis distance with the inverse factor: products only.

    Args:
        x: embeddings (N, P, D).
        mean: μ, (P, D).
        whitening: $L^{-1}$, (P, D, D), from `whiten`; only the lower triangle is read.

    Returns:
        the distance, not its square, (N, P).

    Source: PaDiM, arXiv:2011.08785, Sec. III-C, Eq. 2. Departures: none.
    Test: test_gaussian.py::test_distance_equals_scipys
    """
    n, p, d = x.shape
    distances = x.new_empty(p, n)
    x = x.transpose(0, 1)
    with full_precision():
        for rows in _chunks(p, n * d, x.device):
            centred, factor = x[rows] - mean[rows, None], whitening[rows]
            squares = [
                torch.bmm(centred[..., :stop], factor[:, stop - BAND : stop, :stop].mT)
                .square()
                .sum(2)
                for stop in range(BAND, d + BAND, BAND)
            ]
            distances[rows] = sum(squares).sqrt()
    return distances.T


def whiten(gaussian: PatchGaussian, epsilon: float) -> Float[Tensor, "p d d"]:
    """Compute the inverse of each covariance's Cholesky factor.

    The factors overwrite the sums, a few positions at a time, so that no second
    (P, D, D) is allocated. This consumes the Gaussian: each of its methods raises
    ValueError from then on, also if this function fails half-way.

    Args:
        gaussian: of at least 2 images; consumed.
        epsilon: added to the variances.

    Returns:
        lower triangular matrices (P, D, D), in the dtype of the embeddings.

    Raises:
        ValueError: for fewer than 2 images, a Gaussian that is consumed, or variances
            so large that epsilon is lost in rounding.
    """
    gaussian._check_enough(least=2)
    gaussian._consumed = True
    products, dtype = gaussian._products, gaussian.result_dtype
    failed = torch.zeros((), dtype=torch.int32, device=products.device)
    variance = torch.zeros((), dtype=products.dtype, device=products.device)
    chunks = _chunks(gaussian.positions, gaussian.dimensions**2, products.device)
    for rows in chunks:
        covariance = products[rows] / (gaussian.count - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        variance = torch.maximum(variance, diagonal.max())
        with full_precision():
            products[rows], info = _inverse_cholesky(covariance)
        failed = torch.maximum(failed, info.max())
    # Read once, because reading waits for the GPU.
    if has_values(failed) and failed:
        raise ValueError(
            f"a covariance with variances up to {variance:.3g} is not positive"
            f" definite in {products.dtype}: epsilon={epsilon} is lost in rounding."
            " Scale the features down or raise epsilon"
        )
    return products.to(dtype)


def _inverse_cholesky(
    covariance: Float[Tensor, "p d d"],
) -> tuple[Float[Tensor, "p d d"], Int[Tensor, " *leaves"]]:
    r"""Return $L^{-1}$ and LAPACK's codes, above 0 where there is no factor $L$.

    Only the part below the diagonal is read. On a GPU all matrices are factorised by
    one call. On a CPU a matrix is split into quarters:
    $L_{21} = \Sigma_{21} L_{11}^{-\mathrm{T}}$,
    $L_{22}$ is the factor of $\Sigma_{22} - L_{21}L_{21}^\mathrm{T}$, and the inverse
    has the block $-L_{22}^{-1} L_{21} L_{11}^{-1}$ below its diagonal. Nearly all
    operations are batched matrix products. On two CPUs (one thread, D from 50 to 550)
    this was 0.7 to 3 times as fast as LAPACK, which factorises one matrix after
    another.
    """
    d = covariance.shape[-1]
    if d <= LEAF or covariance.device.type != "cpu":
        lower, info = torch.linalg.cholesky_ex(covariance)
        eye = torch.eye(d, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(
            lower, eye.expand_as(lower), upper=False
        )
        return inverse, info
    h = d // 2
    inverse = torch.zeros_like(covariance)
    first, first_info = _inverse_cholesky(covariance[:, :h, :h])
    below = torch.bmm(covariance[:, h:, :h], first.mT)
    last, last_info = _inverse_cholesky(
        torch.baddbmm(covariance[:, h:, h:], below, below.mT, alpha=-1)
    )
    inverse[:, :h, :h], inverse[:, h:, h:] = first, last
    inverse[:, h:, :h] = torch.bmm(torch.bmm(last, below), first).neg_()
    return inverse, torch.maximum(first_info, last_info)


def _chunks(positions: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Split positions with so many elements each into slices that suit the device.

    A compiler gets all positions at once: it divides the work itself.
    """
    if torch.compiler.is_compiling():
        return iter([slice(0, positions)])
    step = max(1, chunk_sizes(device).elements // max(1, elements))
    return (
        slice(start, min(start + step, positions))
        for start in range(0, positions, step)
    )
