"""The Patch SVDD detector: anomaly scores from the nearest normal patch.

The encoders are in `encoders`, their training in `training`. The maps equal those of
the published procedure at a fraction of the cost: embeddings of all patches in one
pass, exact neighbours by matrix products, and scores spread without a loop.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from paperlib.anomaly_map import Detection, score_quantile, spread_patch_scores
from paperlib.distributed import fail_together
from paperlib.neighbors import covering_radius, greedy_coreset, nearest_distance
from paperlib.patch_svdd.encoders import (
    BIG_PATCH,
    BIG_STRIDE,
    SMALL_PATCH,
    SMALL_STRIDE,
    BySize,
    Embeddings,
    HierarchicalEncoder,
    encoder_from_weights,
)
from paperlib.patch_svdd.images import check_range, mean_image
from paperlib.storage import read_tensors, write_tensors
from paperlib.tables import short_repr
from paperlib.validation import (
    NotFitted,
    UnusableFile,
    check_integers,
    check_number,
    check_same_kind,
)

SVDD_FORMAT = "paperlib.patch_svdd.1"
IMAGES_PER_PASS = 8  # of the encoder
_FITTED = ("mean", "small", "big")  # buffers that `fit` sets
_STRIDES = ("stride_small", "stride_big")


class PatchMaps(NamedTuple):
    r"""Anomaly maps of N images, (N, H, W) each; larger is more anomalous.

    Fields:
        small: mean distance of the 32×32 patches over a pixel, $M_{\text{small}}$.
        big: the same of the 64×64 patches, $M_{\text{big}}$.
        sum: small + big.
        mult: $M_{\text{small}} \odot M_{\text{big}}$, the paper's $M_{\text{multi}}$
            (Eq. 9).
    """

    small: Tensor
    big: Tensor
    sum: Tensor
    mult: Tensor
    __repr__ = short_repr

    @property
    def scores(self) -> Tensor:
        """Anomaly scores (N,): the maximum of `mult` per image (Eq. 10)."""
        return self.mult.amax((1, 2))


class PatchSVDD(nn.Module):
    """Detect anomalies by the distance of patches to the nearest normal patch.

    The score of a patch is the distance of its embedding to the bank of normal
    embeddings (`nearest_distance`), and the score of a pixel is the mean over the
    patches that cover it (`spread_patch_scores`).

    Args:
        encoder: trained, or random, which is a strong baseline.
        stride_small: pixels from one 32×32 patch to the next.
        stride_big: pixels from one 64×64 patch to the next.

    Attributes:
        mean: (3, H, W), the mean training image; None before `fit` or `load`, like the
            next two.
        small, big: the banks (B, D).
        coreset_radius: upper bound, per bank, on the error of a distance that the
            coreset causes (0 without a coreset).
        threshold: the score above which an image is anomalous; None until
            `normal_threshold` sets it.
        distributed: whether the banks are shards, spread over the processes of
            `torch.distributed`.

    Example:
        >>> import torch
        >>> from paperlib import PatchSVDD, datasets
        >>> from paperlib.patch_svdd import HierarchicalEncoder
        >>> bricks = datasets.textures("brick", count=6)
        >>> images = torch.stack([item.image for item in bricks])[..., :96, :96]
        >>> _ = torch.manual_seed(0)
        >>> detector = PatchSVDD(HierarchicalEncoder(16)).fit(images[:4])
        >>> threshold = detector.normal_threshold(images[4:])
        >>> scratched = images[4:].clone()
        >>> scratched[..., 40:44, :] = 0
        >>> scores, maps = detector(scratched)
        >>> maps.shape, bool((scores > threshold).all())
        (torch.Size([2, 96, 96]), True)
        >>> detector.save("bricks.safetensors")
        >>> PatchSVDD.load("bricks.safetensors")
        PatchSVDD of 96×96 images: 1,156 small and 36 big patches of 16 dimensions, ...

    Source: Patch SVDD, arXiv:2006.16067, Eq. 8-10 and Alg. 2.
    Departures: none in the maps; Alg. 1 and 2 have one stride for both sizes, the
        released code has two.
    Test: test_patch_svdd.py::test_maps_equal_the_published_procedure
    """

    def __init__(
        self,
        encoder: HierarchicalEncoder,
        *,
        stride_small: int = SMALL_STRIDE,
        stride_big: int = BIG_STRIDE,
    ):
        super().__init__()
        if not isinstance(encoder, HierarchicalEncoder):
            raise ValueError(
                f"a {type(encoder).__name__};"
                " expected a HierarchicalEncoder, which embeds both sizes"
            )
        check_integers(stride_small=stride_small, stride_big=stride_big)
        self.encoder = encoder
        self.stride_small, self.stride_big = stride_small, stride_big
        for name in _FITTED:
            self.register_buffer(name, None)
        self.coreset_radius, self.threshold = BySize(0.0, 0.0), None
        self.distributed = False
        self.register_load_state_dict_pre_hook(_allocate_buffers)

    def __repr__(self) -> str:
        """Describe the banks and their memory."""
        if self.mean is None:
            return "PatchSVDD, not fitted"
        height, width = self.mean.shape[1:]
        return (
            f"PatchSVDD of {height}×{width} images:"
            f" {len(self.small):,} small and {len(self.big):,} big patches"
            f" of {self.small.shape[1]} dimensions, {self.bank_bytes / 2**20:,.1f} MiB,"
            f" threshold {self.threshold}"
        )

    @property
    def bank_bytes(self) -> int:
        """Memory of both banks, in bytes; 0 before `fit`."""
        return 0 if self.mean is None else self.small.nbytes + self.big.nbytes

    def get_extra_state(self) -> dict[str, Any]:
        """Return coreset radius and threshold, for `state_dict`."""
        return {
            "coreset_radius": list(self.coreset_radius),  # torch.load accepts lists
            "threshold": self.threshold,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned; older files have no threshold."""
        self.coreset_radius = BySize(*state["coreset_radius"])
        self.threshold = state.get("threshold")

    def fit(
        self,
        images: Tensor,
        *,
        coreset: float = 1,
        seed: int = 0,
        distribute: bool = False,
    ) -> "PatchSVDD":
        """Embed all patches of normal images and store the embeddings.

        A previous fit is replaced, and its threshold forgotten, only on success.
        Printing the result shows the memory of the banks (also `bank_bytes`): for
        256×256 images and D = 64, 0.83 MiB per image.

        Args:
            images: normal ones only, (N, 3, H, W), RGB in [0, 1], of the encoder's
                dtype and on its device.
            coreset: share of each bank to store; below 1 a greedy coreset is selected,
                and `coreset_radius` is the largest distance from a patch that was left
                out to the nearest stored one.
            seed: of the coreset.
            distribute: True if `images` are this process's part of the normal images.
                Each process of `torch.distributed` stores the embeddings of its images,
                after subtracting the mean image of all; `anomaly_maps` must then be
                called by all of them, with the same images, and returns distances to
                the nearest patch of any process. One image per process is enough. If
                one process raises, all of them do.

        Returns:
            itself.

        Raises:
            ValueError: as `mean_image` and `HierarchicalEncoder.embed`, and for a share
                outside (0, 1]; with `distribute`, if no process group is initialised.
        """
        device = next(self.encoder.parameters()).device if distribute else None
        mean = mean_image(images, group_device=device)
        with fail_together(device):
            banks, radii = self._banks(images, mean, coreset, seed)
        self.mean, self.small, self.big = mean, *banks
        self.coreset_radius, self.threshold = radii, None
        self.distributed = distribute
        return self

    def _banks(
        self, images: Tensor, mean: Tensor, coreset: float, seed: int
    ) -> tuple[list[Tensor], BySize]:
        """Return both banks, and the covering radius of each."""
        check_number("coreset", coreset, "a share of the bank", above=0, most=1)
        check_integers(0, seed=seed)
        banks = [embeddings.flatten(0, 2) for embeddings in self._embed(images, mean)]
        radii = [0.0, 0.0]
        if coreset < 1:
            for i, bank in enumerate(banks):
                chosen = greedy_coreset(bank, coreset, seed)
                radii[i], banks[i] = covering_radius(bank, chosen), bank[chosen]
        return banks, BySize(*radii)

    def forward(self, images: Tensor) -> Detection:
        """Return scores and anomaly maps (see `score` and `anomaly_map`) in one pass.

        Raises:
            NotFitted, ValueError: as `anomaly_maps`.
        """
        maps = self.anomaly_maps(images)
        return Detection(maps.scores, maps.mult)

    def anomaly_map(self, images: Tensor) -> Float[Tensor, "n h w"]:
        """Return one anomaly map per image: `mult` of `anomaly_maps`, the paper's.

        Raises:
            NotFitted, ValueError: as `anomaly_maps`.
        """
        return self(images).maps

    def score(self, images: Tensor) -> Float[Tensor, " n"]:
        """Return one score per image, the maximum of its anomaly map.

        Raises:
            NotFitted, ValueError: as `anomaly_maps`.
        """
        return self(images).scores

    def anomaly_maps(self, images: Tensor) -> PatchMaps:
        """Compute anomaly maps of images from the nearest normal patches of both sizes.

        Args:
            images: (N, 3, H, W), RGB in [0, 1], of the training images' size, dtype and
                device.

        Returns:
            maps without gradients; `.scores` are the images' scores.

        Raises:
            NotFitted: before `fit`.
            ValueError: for images of another size, dtype, device or range, or with NaN.
        """
        self._check_fitted()
        images = check_range(images, self.mean)
        # Half-precision images are computed in the precision of the mean image.
        images = images.to(torch.promote_types(images.dtype, self.mean.dtype))
        check_same_kind("images", images, "the mean image", self.mean)
        small, big = self._patch_maps(images)
        return PatchMaps(small, big, small + big, small * big)

    def _patch_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maps of the small and the big patches, with one search each."""
        size, maps = tuple(images.shape[-2:]), []
        for embeddings, bank, patch, stride in zip(
            self._embed(images, self.mean),
            (self.small, self.big),
            (SMALL_PATCH, BIG_PATCH),
            (self.stride_small, self.stride_big),
            strict=True,
        ):
            scores = nearest_distance(embeddings.flatten(0, 2), bank)
            if self.distributed:
                distributed.all_reduce(scores, distributed.ReduceOp.MIN)
            scores = scores.view(embeddings.shape[:3])
            maps.append(spread_patch_scores(scores, patch, stride, size))
        return maps[0], maps[1]

    def normal_threshold(
        self, images: Tensor | Iterable[Tensor], quantile: float = 0.99
    ) -> float:
        """Choose, set and return the threshold of the score, from normal images.

        It classifies a share of 1 - `quantile` of normal images as anomalous. Pass
        images that were used neither in `fit` nor in training the encoder. A training
        image has score 0, since its patches are in the bank. Leaving its patches out
        would not help, because the encoder has learned from the image too.

        Args:
            images: normal images as for `fit`, or an iterable of batches of them.
            quantile: share of normal images below the threshold.

        Returns:
            `threshold`, in the unit of `score`.

        Raises:
            NotFitted, ValueError: as `anomaly_maps`, for no batch, a quantile outside
                [0, 1], or images with score 0, which `fit` has seen.
        """

        def score(images: Tensor) -> Tensor:
            scores = self.score(images)
            if not scores.all():
                raise ValueError(
                    f"{int((scores == 0).sum())} of {len(scores)} images have score 0,"
                    " as the images of fit; pass normal images that fit has not seen"
                )
            return scores

        self.threshold = score_quantile(images, score, quantile)
        return self.threshold

    def save(self, path: str | Path) -> None:
        """Write encoder, mean image, banks and threshold to one file, atomically.

        The file is a safetensors file of float32 tensors.

        Raises:
            NotFitted: before `fit`.
            ValueError: for banks that are shards.
        """
        self._check_fitted()
        if self.distributed:
            raise ValueError(
                f"the banks are shards, and this process holds {len(self.small):,}"
                " small patches of all: loaded alone they would return too large"
                " distances. To save, fit without distribute"
            )
        tensors = {
            name: value.float()
            for name, value in self.state_dict().items()
            if isinstance(value, Tensor)
        }
        about = {name: getattr(self, name) for name in _STRIDES}
        write_tensors(path, tensors, about | self.get_extra_state(), SVDD_FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> "PatchSVDD":
        """Read what `save` wrote, on the CPU.

        Raises:
            UnusableFile: naming the file, if it is missing, corrupt, inconsistent, or
                another kind of file.
        """
        about, tensors = read_tensors(
            path, SVDD_FORMAT, "saved Patch SVDD", "fit and save again"
        )
        encoder = encoder_from_weights(
            {
                name.removeprefix("encoder."): tensor
                for name, tensor in tensors.items()
                if name.startswith("encoder.")
            },
            path,
        )
        if not _is_consistent(about, tensors, encoder.dimensions):
            raise UnusableFile(
                f"{path} is inconsistent: mean image, banks, strides or threshold are"
                " missing or of wrong shapes; fit and save again"
            )
        detector = cls(encoder, **{name: about[name] for name in _STRIDES})
        detector.mean, detector.small, detector.big = (tensors[k] for k in _FITTED)
        detector.set_extra_state(about)
        return detector

    def _embed(self, images: Tensor, mean: Tensor) -> Embeddings:
        """Embed images that have been checked."""
        parts = [
            self.encoder.embed(
                part - mean, self.stride_small, self.stride_big, values=False
            )
            for part in images.split(IMAGES_PER_PASS)
        ]
        return Embeddings(*map(torch.cat, zip(*parts, strict=True)))

    def _check_fitted(self) -> None:
        if self.mean is None:
            raise NotFitted(
                "this PatchSVDD is not fitted; call .fit(normal_images) first,"
                " or PatchSVDD.load(path)"
            )


def _allocate_buffers(
    detector: PatchSVDD, state: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Give the buffers the shapes of the state that `load_state_dict` is loading."""
    like = detector.encoder.conv2.bias.detach()
    for name in _FITTED:
        if prefix + name in state:
            setattr(detector, name, like.new_empty(state[prefix + name].shape))


def _is_consistent(
    about: dict[str, Any], tensors: dict[str, Tensor], dimensions: int
) -> bool:
    """Return whether `save` may have written a file, whose checksum may be forged."""
    mean, small, big = (tensors.get(name, torch.empty(0)) for name in _FITTED)
    radius, threshold = about.get("coreset_radius"), about.get("threshold", 0.0)
    return (
        all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
        and (mean.ndim == 3 and len(mean) == 3 and min(mean.shape[1:]) >= BIG_PATCH)
        and all(bank.ndim == 2 and len(bank) for bank in (small, big))
        and small.shape[1] == big.shape[1] == dimensions
        and (isinstance(radius, list) and len(radius) == 2)
        and (threshold is None or isinstance(threshold, float))
        and all(type(about.get(name)) is int and about[name] > 0 for name in _STRIDES)
    )
