"""The Patch SVDD detector: anomaly scores from the nearest normal patch.

The encoders are in `encoders`, their training in `training`. The maps equal those of
the published procedure at a fraction of the cost: embeddings of all patches in one
pass, exact neighbours by matrix products, and scores spread without a loop.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from paperlib.anomaly_map import spread_patch_scores
from paperlib.distributed import fail_together
from paperlib.neighbors import covering_radius, greedy_coreset, nearest_distance
from paperlib.patch_svdd.encoders import (
    BIG_PATCH,
    BIG_STRIDE,
    SMALL_PATCH,
    SMALL_STRIDE,
    Embeddings,
    FlatEncoder,
    HierarchicalEncoder,
    PatchEncoder,
    encoder_from_weights,
    load_released_weights,
)
from paperlib.patch_svdd.images import check_range, mean_image
from paperlib.patch_svdd.losses import PositionClassifier, position_loss, svdd_loss
from paperlib.patch_svdd.training import position_accuracy, train, train_on_patches
from paperlib.storage import read_tensors, write_tensors
from paperlib.validation import check_at_least_one

__all__ = [
    "Embeddings",
    "FlatEncoder",
    "HierarchicalEncoder",
    "PatchEncoder",
    "PatchMaps",
    "PatchSVDD",
    "PositionClassifier",
    "load_released_weights",
    "position_accuracy",
    "position_loss",
    "svdd_loss",
    "train",
    "train_on_patches",
]
SVDD_FORMAT = "paperlib.patch_svdd.1"
IMAGES_PER_SEARCH = 8
_FITTED = ("mean", "small", "big")  # tensors that `fit` sets


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

    @property
    def scores(self) -> Tensor:
        """Anomaly scores (N,): the maximum of `mult` per image (Eq. 10)."""
        return self.mult.amax((1, 2))


class PatchSVDD:
    r"""Detect anomalies by the distance of patches to the nearest normal patch.

    $$\mathcal A^{\text{patch}}(p) =
      \min_{p_{\text{normal}}} \|f(p) - f(p_{\text{normal}})\|_2$$

    Args:
        encoder: trained, or random, which is a strong baseline.
        stride_small: pixels from one 32×32 patch to the next.
        stride_big: pixels from one 64×64 patch to the next.

    After `fit` it has the following attributes.

    Attributes:
        mean: (3, H, W), the mean training image.
        small, big: the banks (B, D).
        coreset_radius: upper bound, per bank, on the error of a distance that the
            coreset causes (0 without a coreset).
        distributed: whether the banks are shards, spread over the processes of
            `torch.distributed`.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 8-10 and Alg. 2.
    Departures: none in the maps; Alg. 1 and 2 have one stride for both sizes, the
        released code has two.
    Test: test_patch_svdd.py::test_maps_equal_the_published_procedure
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        stride_small: int = SMALL_STRIDE,
        stride_big: int = BIG_STRIDE,
    ):
        if not isinstance(encoder, HierarchicalEncoder):
            raise ValueError(
                f"a {type(encoder).__name__};"
                " expected a HierarchicalEncoder, which embeds both sizes"
            )
        check_at_least_one(stride_small=stride_small, stride_big=stride_big)
        self.encoder, self.stride_small = encoder, stride_small
        self.stride_big = stride_big
        self.mean = self.small = self.big = None
        self.coreset_radius = Embeddings(0.0, 0.0)
        self.distributed = False

    def __repr__(self) -> str:
        """Describe the banks and their memory."""
        if self.mean is None:
            return "PatchSVDD, not fitted"
        height, width = self.mean.shape[1:]
        return (
            f"PatchSVDD of {height}×{width} images:"
            f" {len(self.small):,} small and {len(self.big):,} big patches"
            f" of {self.small.shape[1]} dimensions, {self.bank_bytes / 2**20:,.1f} MiB"
        )

    @property
    def bank_bytes(self) -> int:
        """Memory of both banks, in bytes; 0 before `fit`."""
        return 0 if self.mean is None else self.small.nbytes + self.big.nbytes

    def fit(
        self,
        images: Tensor,
        *,
        coreset: float = 1,
        seed: int = 0,
        distribute: bool = False,
    ) -> "PatchSVDD":
        """Embed all patches of normal images and store the embeddings.

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
        self.mean, (self.small, self.big), self.coreset_radius = mean, banks, radii
        self.distributed = distribute
        return self

    def _banks(
        self, images: Tensor, mean: Tensor, coreset: float, seed: int
    ) -> tuple[list[Tensor], Embeddings]:
        """Return both banks, and the covering radius of each."""
        if not 0 < coreset <= 1:
            raise ValueError(
                f"coreset={coreset}; expected a share of the bank above 0 and at most 1"
            )
        parts = [
            self.encoder.embed(part - mean, self.stride_small, self.stride_big)
            for part in images.split(IMAGES_PER_SEARCH)
        ]
        banks = [
            torch.cat([getattr(part, name).flatten(0, 2) for part in parts])
            for name in Embeddings._fields
        ]
        radii = [0.0, 0.0]
        if coreset < 1:
            for i, bank in enumerate(banks):
                chosen = greedy_coreset(bank, coreset, seed)
                radii[i], banks[i] = covering_radius(bank, chosen), bank[chosen]
        return banks, Embeddings(*radii)

    def anomaly_maps(self, images: Tensor) -> PatchMaps:
        """Compute anomaly maps of images from the nearest normal patches of both sizes.

        Args:
            images: (N, 3, H, W), RGB in [0, 1], of the training images' size, dtype and
                device.

        Returns:
            maps without gradients; `.scores` are the images' scores.

        Raises:
            ValueError: before `fit`, and for images of another size, dtype, device or
                range, or with NaN.
        """
        if self.mean is None:
            raise ValueError(
                "not fitted yet; call .fit(normal_images) first,"
                " or PatchSVDD.load(path)"
            )
        images = check_range(images, self.mean)
        maps = []
        for part in images.split(IMAGES_PER_SEARCH):
            embeddings = self.encoder.embed(
                part - self.mean, self.stride_small, self.stride_big
            )
            image_maps = []
            for patch_embeddings, bank, patch, stride in (
                (embeddings.small, self.small, SMALL_PATCH, self.stride_small),
                (embeddings.big, self.big, BIG_PATCH, self.stride_big),
            ):
                scores = nearest_distance(patch_embeddings.flatten(0, 2), bank).view(
                    patch_embeddings.shape[:3]
                )
                if self.distributed:
                    distributed.all_reduce(scores, distributed.ReduceOp.MIN)
                image_maps.append(
                    spread_patch_scores(scores, patch, stride, tuple(images.shape[-2:]))
                )
            maps.append(image_maps)
        small, big = (torch.cat(parts) for parts in zip(*maps, strict=True))
        return PatchMaps(small, big, small + big, small * big)

    def save(self, path: str | Path) -> None:
        """Write encoder, mean image and banks as a float32 safetensors file,
        atomically.

        Raises:
            ValueError: before `fit`, or for banks that are shards.
        """
        if self.mean is None:
            raise ValueError(
                "not fitted yet; call .fit(normal_images) before .save(path)"
            )
        if self.distributed:
            raise ValueError(
                f"the banks are shards, and this process holds {len(self.small):,}"
                " small patches of all: loaded alone they would return too large"
                " distances. To save, fit without distribute"
            )
        tensors = {
            f"encoder.{name}": tensor
            for name, tensor in self.encoder.state_dict().items()
        }
        tensors |= {name: getattr(self, name) for name in _FITTED}
        about = {
            "stride_small": self.stride_small,
            "stride_big": self.stride_big,
            "coreset_radius": self.coreset_radius,
        }
        write_tensors(
            path,
            {name: tensor.float() for name, tensor in tensors.items()},
            about,
            SVDD_FORMAT,
        )

    @classmethod
    def load(cls, path: str | Path) -> "PatchSVDD":
        """Read what `save` wrote, on the CPU.

        Raises:
            ValueError: naming the file, if it is another kind of file, corrupt, or
                inconsistent.
        """
        about, tensors = read_tensors(
            path, SVDD_FORMAT, "saved Patch SVDD", "fit and save again"
        )
        weights = {
            name.removeprefix("encoder."): t
            for name, t in tensors.items()
            if name.startswith("encoder.")
        }
        encoder = encoder_from_weights(weights, path)
        nothing = torch.empty(0)
        mean, small, big = (tensors.get(name, nothing) for name in _FITTED)
        radius = about.get("coreset_radius")
        strides = [about.get(name) for name in ("stride_small", "stride_big")]
        is_consistent = (
            all(
                t.dtype == torch.float32 and t.isfinite().all()
                for t in tensors.values()
            )
            and (mean.ndim == 3 and len(mean) == 3)
            and min(mean.shape[1:]) >= BIG_PATCH
            and all(bank.ndim == 2 and len(bank) for bank in (small, big))
            and small.shape[1] == big.shape[1] == encoder.dimensions
            and (isinstance(radius, list) and len(radius) == 2)
            and all(isinstance(stride, int) and stride > 0 for stride in strides)
        )
        if not is_consistent:
            raise ValueError(
                f"{path} is inconsistent:"
                " mean image, banks or strides are missing or of wrong shapes"
            )
        model = cls(encoder, stride_small=strides[0], stride_big=strides[1])
        model.mean, model.small, model.big = mean, small, big
        model.coreset_radius = Embeddings(*radius)
        return model
