r"""The PaDiM detector: anomaly maps from Mahalanobis distances of embeddings.

x_ij is the embedding at position (i, j): a pretrained network's feature maps,
concatenated. There are P = h·w positions, numbered row by row; D is the embedding's
length. The Gaussians are estimated batch by batch, so memory does not grow with the
number of images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperlib import __version__, backbones
from paperlib.anomaly_map import (
    MODES,
    NO_BATCH,
    Detection,
    check_sigma,
    gaussian_blur,
    score_quantile,
    upsample,
)
from paperlib.backbones import (
    FeatureExtractor,
    Images,
    Transform,
    concatenate_embeddings,
    digest_weights,
    fold_batch_norms,
)
from paperlib.distributed import check_same_size, fail_together
from paperlib.image_files import read_mask
from paperlib.padim.gaussian import (
    COVARIANCE_EPSILON,
    PatchGaussian,
    leave_one_out_distance,
    whiten,
    whitened_norm,
)
from paperlib.padim.inspection import Inspection, inspect_batches
from paperlib.precision import at_least_float32
from paperlib.storage import read_tensors, write_tensors
from paperlib.validation import (
    NotFitted,
    UnusableFile,
    as_tensor,
    check_choice,
    check_images,
    check_integers,
    check_iterable,
    check_number,
    check_values,
    has_values,
)

SMOOTHING_SIGMA = 4.0  # PaDiM, Sec. IV-B: Gaussian filter on anomaly maps, in pixels
PADIM_FORMAT = "paperlib.padim.1"


class PaDiM(nn.Module):
    """Detect and localise anomalies with Gaussians of pretrained features.

    `fit` estimates the Gaussians and factorises them once; scoring is then one product
    per position with the inverse factor. That is faster than solving triangular
    systems, by a factor that depends on the batch (tests/bench). Products and sums are
    never computed in bfloat16 or TF32, whatever the caller has set.

    It is an nn.Module: `.to(device)` moves the network and the Gaussians, and
    `state_dict()` holds both, so it can be loaded into an unfitted detector of the same
    extractor. `save` writes the Gaussians without the network's weights. The network
    runs in eval mode, whatever the mode of the detector.

    Args:
        extractor: a FeatureExtractor, for example `load("resnet18").extractor()`. For
            the paper's single-layer models pass one layer.
        dimensions: D, the number of embedding dimensions (the paper: 100 of 448 for
            ResNet-18, 550 of 1,792 for Wide ResNet-50-2); None for all channels.
        seed: of the random choice of channels.
        epsilon: added to the variances.
        mode: how maps are upsampled, "bilinear" or "bicubic".
        sigma: of the Gaussian that smooths anomaly maps, in pixels of the image.
        transform: how `prepare` gets from files to the network's input; None for that
            of the extractor, if `Backbone.extractor` made it.
        region: the region of interest, in which anomalies are searched for: a mask
            (H, W), True inside, or the path of a mask image. It is prepared as an image
            is. Maps are 0 outside.

    Attributes:
        mean: μ, (P, D); None before `fit` or `load`, like the next two.
        whitening: $L^{-1}$, (P, D, D), lower triangular.
        channels: indices of the selected channels, ascending.
        grid: (h, w).
        region: (H, W), the region of interest in pixels of the prepared images, or
            None. (`Inspection.region` is another thing: the box of a defect.)
        size: (H, W) of the images.
        count: N, the number of training images; 0 before `fit`.
        threshold: the score above which an image is anomalous; None until
            `normal_threshold` sets it.

    Raises:
        ValueError: for arguments outside these ranges.

    Example:
        >>> from paperlib import PaDiM, backbones, datasets
        >>> backbone = backbones.load("efficientnet_lite0")
        >>> bricks = datasets.textures("brick", count=12)
        >>> detector = PaDiM(backbone.extractor(), dimensions=20)
        >>> images = detector.prepare(bricks)  # or paths, or Pillow images
        >>> detector = detector.fit(images[:8].split(4))
        >>> threshold = detector.normal_threshold(images[8:].split(4))
        >>> scores, maps = detector(images[:2])
        >>> scores.shape, maps.shape, bool((scores < threshold).all())
        (torch.Size([2]), torch.Size([2, 224, 224]), True)
        >>> detector.save("bricks.safetensors")
        >>> PaDiM.load("bricks.safetensors").threshold == threshold
        True

    Source: Defard et al., arXiv:2011.08785, Sec. III and IV-B.
    Departures: maps are upsampled bilinearly by default; in the paper bicubic
        (`mode="bicubic"`).
    Test: test_padim.py::test_maps_equal_the_equations_written_out
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        dimensions: int | None = 100,
        seed: int = 0,
        epsilon: float = COVARIANCE_EPSILON,
        *,
        mode: str = "bilinear",
        sigma: float = SMOOTHING_SIGMA,
        transform: Transform | None = None,
        region: Tensor | np.ndarray | str | Path | None = None,
    ):
        super().__init__()
        if not isinstance(extractor, FeatureExtractor):
            raise ValueError(
                f"an extractor of type {type(extractor).__name__}; expected"
                " a FeatureExtractor. From a backbone: load(name).extractor()"
            )
        check_choice("mode", mode, MODES)
        if dimensions is not None:  # None for all channels
            check_integers(dimensions=dimensions)
        check_integers(0, seed=seed)
        check_number("epsilon", epsilon, "a variance to add", above=0)
        check_sigma(sigma)
        self.extractor, self.dimensions, self.seed = extractor, dimensions, seed
        self.epsilon, self.mode, self.sigma = epsilon, mode, sigma
        self.transform = transform or extractor.transform
        for name in _FITTED:
            self.register_buffer(name, None)
        self.register_buffer("region", _read_region(region, self.transform))
        self.grid = self.size = (0, 0)
        self.count, self.threshold = 0, None
        self._channel_list: list[int] = []  # read on the host once, not per batch
        self.register_load_state_dict_pre_hook(_allocate_buffers)

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters, where images are expected."""
        parameters = self.extractor.parameters()
        return next((p.device for p in parameters), torch.device("cpu"))

    def prepare(self, images: Images) -> Float[Tensor, "n 3 h w"]:
        """Prepare images as the detector's: one way for `fit`, scores and files.

        Args:
            images: one or several, as `Transform` accepts them: paths, Pillow images,
                arrays, items, or a batch of items. Items of another size, for example
                of `folder(root, size=448)`, are resized to the transform's; for larger
                inputs pass `transform=replace(backbone.transform, size=448)`.

        Returns:
            a batch for `fit` and the other methods, on the detector's device.

        Raises:
            ValueError: if the detector has no transform, or as `Transform`.
        """
        if self.transform is None:
            raise ValueError(
                "this detector has no transform; pass PaDiM(…, transform=…),"
                " or make the extractor with load(name).extractor()"
            )
        prepared = self.transform(images)
        if prepared.device != self.device:
            check_values(prepared, "images")
        return prepared.to(self.device)

    def fit(self, batches: Iterable[Tensor], *, distribute: bool = False) -> "PaDiM":
        """Estimate the Gaussians from batches of normal images, and return self.

        Prepare the images with `prepare`: other scales are accepted and detect less.

        Batches may be of any lengths, may come from a generator, and are read once. A
        previous fit is replaced, and its threshold forgotten, only on success.

        Args:
            batches: of images (N, 3, H, W), as `prepare` returns them.
            distribute: True if the batches are this process's part of the images. All
                processes of `torch.distributed` call this with at least one batch, and
                each ends with the Gaussians of all. One image per process is enough. If
                one process raises, all of them do.

        Raises:
            ValueError: for batches that are not finite images of one size, fewer than 2
                images in all, more dimensions than channels, or features of so large a
                variance that epsilon is lost in rounding.
        """
        device = self.device if distribute else None
        with fail_together(device):
            gaussian, channels, grid, size = self._estimate(batches)
        if device is not None:
            check_same_size(size, device)
            gaussian.all_reduce()
        mean, whitening = gaussian.mean(), whiten(gaussian, self.epsilon)
        self._set_fitted((mean, whitening, channels), grid, size, gaussian.count)
        return self

    def forward(self, images: Tensor) -> Detection:
        """Return scores and anomaly maps (see `score` and `anomaly_map`) in one pass.

        Raises:
            NotFitted, ValueError: as `anomaly_map`.
        """
        maps = self._upsample_and_smooth(self._distances(images))
        return Detection(maps.amax((1, 2)), maps)

    def anomaly_map(self, images: Tensor) -> Float[Tensor, "n h w"]:
        """Return one anomaly map per image: upsampled and smoothed distances.

        Raises:
            NotFitted: before `fit`.
            ValueError: if the images are not a finite batch of the fitted size on the
                fitted device.
        """
        return self(images).maps

    def score(self, images: Tensor) -> Float[Tensor, " n"]:
        """Return one score per image, the maximum of its anomaly map.

        Raises:
            NotFitted, ValueError: as `anomaly_map`.
        """
        return self(images).scores

    def normal_threshold(
        self,
        batches: Tensor | Iterable[Tensor],
        quantile: float = 0.99,
        *,
        fitted: bool = False,
    ) -> float:
        """Choose, set and return the threshold of the score, from normal images.

        It classifies a share of 1 - `quantile` of normal images as anomalous. Pass
        images that were not used in `fit`: training images score too low, the more so
        the fewer there are. If there are no others, pass them with `fitted=True`: each
        is then scored as if it had been left out (see `leave_one_out_distance`).

        Args:
            batches: of normal images, as for `fit`, or one batch.
            quantile: share of normal images below the threshold.
            fitted: whether these are the training images.

        Returns:
            `threshold`, in the unit of `score`.

        Raises:
            NotFitted, ValueError: as `anomaly_map`, for no batch, or a quantile outside
                [0, 1].
        """

        def score(images: Tensor) -> Tensor:
            distances = self._distances(images)
            if fitted:
                distances = leave_one_out_distance(distances, self.count)
            return self._upsample_and_smooth(distances).amax((1, 2))

        self.threshold = score_quantile(batches, score, quantile)
        return self.threshold

    def inspect(
        self, images: Images, *, batch_size: int = 32, threads: int = 2
    ) -> list[Inspection]:
        """Compare the scores of images with the threshold, and locate their defects.

        Args:
            images: a folder, whose images are found recursively and inspected in
                natural order; the path of a file; or one or several images in any form
                that `prepare` accepts. Arrays are batches.
            batch_size: images per batch.
            threads: that read and prepare images.

        Returns:
            one `Inspection` per image, also for files that can't be read.

        Raises:
            ValueError: if no threshold is set, the detector has no transform, or as
                `prepare` for images in memory.
            NotFitted: before `fit`.

        Example:
            >>> from paperlib import PaDiM, backbones, datasets
            >>> detector = PaDiM(backbones.load("efficientnet_lite0").extractor(), 20)
            >>> bricks = datasets.textures("brick", count=12)
            >>> batches = detector.prepare(bricks).split(4)
            >>> threshold = detector.fit(batches).normal_threshold(batches, fitted=True)
            >>> stained = datasets.synthetic_defects(bricks, kinds=["stain"])
            >>> result = detector.inspect([stained[0], "absent.png"])
            >>> result[0].region, result[1].alarm  # the second can't be read
            (Box(top=109, left=48, bottom=159, right=106), None)
        """
        self._check_fitted()
        parts = inspect_batches(self, images, batch_size, threads)
        return [inspected.inspection for part in parts for inspected in part]

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write one safetensors file, atomically, without the network's weights.

        Args:
            path: of the file.
            dtype: of the stored factors; `torch.float16` halves the file, and changes
                scores by a few hundredths of a per cent. None for that of the detector.

        Raises:
            NotFitted: before `fit`.
            ValueError: for factors that the dtype can't represent.
        """
        self._check_fitted()
        model = self.extractor.model
        about = {
            "backbone": getattr(model, "backbone_name", None),
            "layers": self.extractor.layers,
            "tile": self.extractor.tile,
            "overlap": self.extractor.overlap,
            "weights": digest_weights(model),
            "folded": hasattr(model, "weights_digest"),
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "transform": self.transform and asdict(self.transform),
            **{name: getattr(self, name) for name in _NUMBERS},
            "versions": {
                "paperlib": __version__,
                **{package.__name__: package.__version__ for package in _PACKAGES},
            },
        }
        tensors = {name: getattr(self, name) for name in _FITTED}
        tensors["whitening"] = _pack(self.whitening, dtype)
        if self.region is not None:
            tensors["region"] = self.region
        write_tensors(path, tensors, about, PADIM_FORMAT)

    @classmethod
    def load(
        cls, path: str | Path, extractor: FeatureExtractor | None = None
    ) -> "PaDiM":
        """Read what `save` wrote; no pickle is ever loaded.

        Args:
            path: the file.
            extractor: the one it was fitted with. None loads the backbone by its name
                with its default weights. The transform is always that of the file, if
                it has one.

        Raises:
            UnusableFile: naming the file, if it is missing, another kind of file,
                corrupt, of a newer format, or fitted with another network, other
                weights or other layers; or if its network has no name and no extractor
                is passed.
        """
        about, tensors = read_tensors(
            path, PADIM_FORMAT, "saved PaDiM", "fit and save again"
        )
        if not _is_consistent(about, tensors):
            raise UnusableFile(
                f"{path} is inconsistent: its tensors or settings are missing"
                " or of wrong shapes; fit and save again"
            )
        if extractor is None:
            extractor = _load_extractor(path, about)
        try:
            transform = about.get("transform")  # older files have none
            transform = transform and Transform(**transform)
            # Older files have settings that no longer exist.
            settings = {name: about["settings"][name] for name in _SETTINGS}
            detector = cls(extractor, **settings, transform=transform)
        except (TypeError, ValueError) as error:
            raise UnusableFile(
                f"{path} can't be used with these settings or this extractor ({error});"
                " pass another extractor, or fit and save again"
            ) from error
        _check_same_network(path, about, extractor)
        if "region" in tensors:
            detector.region = tensors["region"].to(detector.device)
        tensors["whitening"] = _unpack(tensors["whitening"], tensors["mean"])
        fitted = tuple(tensors[name].to(detector.device) for name in _FITTED)
        detector._set_fitted(fitted, *(about.get(name) for name in _NUMBERS))
        return detector

    def extra_repr(self) -> str:
        """Describe the settings and what the detector was fitted on."""
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        settings += f"\n{self.transform}" * (self.transform is not None)
        if self.region is not None:
            settings += f"\nregion of interest: {self.region.float().mean():.0%}"
        fit = "fitted on {} images of {}×{} pixels".format(self.count, *self.size)
        fit += f", threshold {self.threshold}"
        return f"{settings}\n{fit if self.count else 'not fitted'}"

    def get_extra_state(self) -> dict[str, Any]:
        """Return grid, size, count and threshold, for `state_dict`."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned, after the buffers."""
        if state["count"]:
            self._set_fitted((self.mean, self.whitening, self.channels), **state)

    def _estimate(
        self, batches: Iterable[Tensor]
    ) -> tuple[PatchGaussian, Tensor, tuple[int, int], tuple[int, int]]:
        """Return the Gaussian of all batches, the channels, the grid and the size."""
        if isinstance(batches, Tensor):
            raise ValueError(
                f"one tensor of shape {tuple(batches.shape)};"
                " expected an iterable of batches. Pass images.split(32)"
            )
        check_iterable(batches)
        gaussian = size = None
        for images in batches:
            size = _check_size(images, size)
            _check_region(self.region, size)
            maps = self._maps(images)
            channels = self._draw_channels(sum(part.shape[1] for part in maps))
            x = _embed(maps, channels)
            gaussian = gaussian or PatchGaussian(*x.shape[1:], x.dtype)
            gaussian.update(x)
        if gaussian is None:
            raise ValueError(NO_BATCH)
        return gaussian, channels, tuple(maps[0].shape[2:]), size

    def _set_fitted(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        grid: Sequence[int],
        size: Sequence[int],
        count: int,
        threshold: float | None = None,
    ) -> None:
        self.mean, self.whitening, channels = tensors
        self._channel_list = channels.tolist()
        self.channels = channels.to(self.mean.device)
        self.grid, self.size = tuple(grid), tuple(size)
        self.count, self.threshold = count, threshold

    def _distances(self, images: Tensor) -> Float[Tensor, "n h w"]:
        self._check_fitted()
        _check_size(images, self.size)
        if images.device != self.mean.device:
            raise ValueError(
                f"images on {images.device}; the Gaussians are on {self.mean.device}."
                " Call .to(device)"
            )
        x = _embed(self._maps(images), self._channel_list)
        return whitened_norm(x.to(self.mean.dtype), self.mean, self.whitening).view(
            -1, *self.grid
        )

    def _upsample_and_smooth(self, distances: Tensor) -> Tensor:
        maps = gaussian_blur(upsample(distances, self.size, self.mode), self.sigma)
        return maps if self.region is None else maps.where(self.region, 0)

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.transform is not None and has_values(images):
            _check_prepared(images, self.transform)
        # A network under autocast returns half precision: too coarse for the sums that
        # follow.
        return [
            part.to(at_least_float32(part.dtype)) for part in self.extractor(images)
        ]

    def _draw_channels(self, total: int) -> Tensor:
        """Draw the channels, in ascending order; raise if there are too few."""
        dimensions = self.dimensions or total
        if dimensions > total:
            raise ValueError(
                f"dimensions={dimensions} of {total} channels"
                f" of layers {', '.join(self.extractor.layers)};"
                f" expected at most {total}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(total, generator=generator)[:dimensions].sort().values

    def _check_fitted(self) -> None:
        if not self.count:
            raise NotFitted(
                "this PaDiM is not fitted; call fit(batches) with normal images,"
                " or PaDiM.load(path)"
            )


def _embed(maps: list[Tensor], channels: Tensor | list[int]) -> Float[Tensor, "n p d"]:
    return concatenate_embeddings(maps, channels).flatten(2).transpose(1, 2)


# ---- checks and files ----

_PACKAGES = (torch, torchvision, timm)  # what the network's features depend on
_FITTED = ("mean", "whitening", "channels")
_NUMBERS = ("grid", "size", "count", "threshold")
_SETTINGS = ("dimensions", "seed", "epsilon", "mode", "sigma")


def _allocate_buffers(
    detector: PaDiM, state: Mapping[str, Any], prefix: str, *unused: Any
) -> None:
    """Give the buffers the shapes of the state that `load_state_dict` is loading."""
    for name in (*_FITTED, "region"):
        value = state.get(prefix + name)
        if value is not None:
            setattr(detector, name, torch.empty_like(value, device=detector.device))


def _is_consistent(about: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Return whether `save` may have written a file, whose checksum may be forged."""
    try:
        (h, w), (height, width) = about["grid"], about["size"]
        sizes = [h, w, height, width, about["count"]]
        mean, whitening, channels = (tensors[name] for name in _FITTED)
        p, d = mean.shape
        region = tensors.get("region", torch.zeros(height, width, dtype=torch.bool))
        layers_and_settings = [*about["layers"], *about["settings"]]
        threshold = about.get("threshold", 0.0)  # older files have none
    except (KeyError, TypeError, ValueError):
        return False
    return (
        (channels.shape == (d,) and channels.dtype == torch.int64)
        and {"backbone", "weights"} <= set(about)
        and all(isinstance(name, str) for name in layers_and_settings)
        and set(_SETTINGS) <= set(about["settings"])
        and all(type(number) is int and number > 0 for number in sizes)
        and p == h * w
        and (threshold is None or type(threshold) is float)
        and whitening.shape in ((p, d * (d + 1) // 2), (p, d, d))  # older files
        and whitening.dtype in (mean.dtype, torch.float16)
        and mean.dtype in (torch.float32, torch.float64)
        and (region.shape, region.dtype) == ((height, width), torch.bool)
        and all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    )


def _pack(whitening: Tensor, dtype: torch.dtype | None) -> Float[Tensor, "p m"]:
    """Return the lower triangles, row by row, in the dtype of a file."""
    rows, columns = torch.tril_indices(*whitening.shape[1:], device=whitening.device)
    packed = whitening[:, rows, columns].to(dtype)
    if (
        dtype not in (None, torch.float16, whitening.dtype)
        or not packed.isfinite().all()
    ):
        raise ValueError(
            f"dtype={dtype} for factors of {whitening.dtype} up to"
            f" {whitening.abs().max():.3g}; expected None, or torch.float16 if they are"
            " below 65504"
        )
    return packed


def _unpack(packed: Tensor, mean: Float[Tensor, "p d"]) -> Float[Tensor, "p d d"]:
    """Return lower triangular matrices from what `_pack` returned."""
    if packed.ndim == 3:  # older files
        return packed
    p, d = mean.shape
    whitening = mean.new_zeros(p, d, d)
    rows, columns = torch.tril_indices(d, d)
    whitening[:, rows, columns] = packed.to(mean.dtype)
    return whitening


def _read_region(
    region: Tensor | np.ndarray | str | Path | None, transform: Transform | None
) -> Bool[Tensor, "h w"] | None:
    """Return the region of interest in pixels of the prepared images."""
    if region is None:
        return None
    mask = read_mask(region) if isinstance(region, (str, Path)) else region
    mask = as_tensor(mask, "region").bool()
    if mask.ndim != 2 or not mask.any():
        source = f" {region}" if isinstance(region, (str, Path)) else ""
        raise ValueError(
            f"region{source} of shape {tuple(mask.shape)} with {int(mask.sum())} pixels"
            " inside; expected a mask (H, W) that is True where anomalies are searched"
            " for"
        )
    if transform is None:
        return mask
    return transform.resize(mask[None].float())[0, 0] > 0.5


def _check_region(region: Tensor | None, size: tuple[int, int]) -> None:
    if region is not None and region.shape != size:
        raise ValueError(
            f"images of {size[0]}×{size[1]} pixels with a region of interest of"
            f" {region.shape[0]}×{region.shape[1]}; expected the same."
            " Use detector.prepare for the images"
        )


def _load_extractor(path: str | Path, about: dict[str, Any]) -> FeatureExtractor:
    """Load the backbone that a file names."""
    if not isinstance(about["backbone"], str):
        raise UnusableFile(
            f"{path} was fitted with a network of your own;"
            " pass extractor=FeatureExtractor(…)"
        )
    try:
        model = backbones.load(about["backbone"]).model
        if about.get("folded"):  # older files are not
            model = fold_batch_norms(model, about["layers"])
        return FeatureExtractor(
            model,
            about["layers"],
            tile=about.get("tile"),
            overlap=about.get("overlap", 0),
        )
    except ValueError as error:
        raise UnusableFile(
            f"{path} needs its backbone, or extractor=…: {error}"
        ) from error


def _check_same_network(
    path: str | Path, about: dict[str, Any], extractor: FeatureExtractor
) -> None:
    if list(extractor.layers) != about["layers"]:
        raise UnusableFile(
            f"{path} was fitted on layers {about['layers']};"
            f" the extractor has {extractor.layers}"
        )
    tiles = extractor.tile, extractor.overlap
    if tiles != (about.get("tile"), about.get("overlap", 0)):
        raise UnusableFile(
            f"{path} was fitted with tile={about.get('tile')},"
            f" overlap={about.get('overlap', 0)}; the extractor has {tiles}"
        )
    if digest_weights(extractor.model) != about["weights"]:
        raise UnusableFile(
            f"{path} was fitted with {about['backbone'] or 'a network of your own'},"
            " with other weights than these; pass the weights, or the extractor, it was"
            " fitted with"
        )


def _check_size(images: Tensor, expected: tuple[int, int] | None) -> tuple[int, int]:
    """Return the images' height and width; raise unless they have the expected size."""
    # The extractor checks the values: on a GPU each check waits for it.
    received = tuple(check_images(images, values=False).shape[2:])
    if expected is not None and received != expected:
        raise ValueError(
            f"images of {received[0]}×{received[1]} pixels;"
            f" expected {expected[0]}×{expected[1]}, as fitted"
        )
    return received


def _check_prepared(images: Tensor, transform: Transform) -> None:
    """Raise if the values show that images were not prepared by a transform.

    Only what is certain is refused: values far above white, and values in [0, 1] that
    are all on the grid of 8-bit images divided by 255. Prepared images are on it only
    if the normalisation maps the grid to itself, as mean = std = 0.5 does.
    """
    channels = list(zip(transform.mean, transform.std, strict=True))
    white = max(max(m, 1 - m) / s for m, s in channels)
    low, high = (value.item() for value in torch.aminmax(images))
    keeps_grid = any(_are_integers(torch.tensor([255 * m, 1]) / s) for m, s in channels)
    # The extractor names values that are not finite.
    if 8 * white < high < torch.inf or (
        0 <= low < high <= 1 and not keeps_grid and _is_8_bit(255 * images.float())
    ):
        raise ValueError(
            f"images with the values of 8-bit images, from {low:g} to {high:g};"
            " expected prepared images. Use detector.prepare(images)"
        )


def _is_8_bit(values: Tensor) -> bool:
    """Return whether values are integers, and not only 0 and 255."""
    return _are_integers(values) and bool(((values > 0.5) & (values < 254.5)).any())


def _are_integers(values: Tensor) -> bool:
    return bool(((values - values.round()).abs() < 1e-3).all())
