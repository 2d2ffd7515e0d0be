r"""Grad-CAM: a layer's channels, weighted by the gradient of a class score.

The model is restored: no hook, mode, `.grad` or buffer changes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperlib.activations import Reshape, find_layer
from paperlib.gradcam.gradients import (
    Targets,
    _gradient_state,
    _gradients,
    _mean_over_space,
    _raise_unreached,
    _Record,
    _run_from_layers,
    _scores,
    _uses_float16,
)
from paperlib.gradcam.inputs import Images, read_inputs
from paperlib.inference import map_tensors, override_autocast
from paperlib.precision import at_least_float32
from paperlib.tables import short_repr
from paperlib.validation import check_iterable, check_same_kind, check_tensor

# Grad-CAM, Sec. 4.1: share of the map's maximum above which a pixel is in the box
LOCALIZATION_THRESHOLD = 0.15


class GradCAM(NamedTuple):
    r"""The result of `grad_cam`; T targets per image add an axis T after N.

    Fields:
        maps: (N, h, w), Eq. 2, at the layer's resolution, not scaled; positive where
            the layer increases the score. (N, l) for a layer with one spatial axis,
            and (N, d, h, w) for one with three.
        weights: (N, C), $\alpha_k^c$ of Eq. 1 (negated for a counterfactual, Sec. 3.3).
        logits: the model's output, detached: (N, classes) unless `targets` was a
            function.
        targets: (N,) class indices, or None where `targets` was a function.
    """

    maps: Float[Tensor, " n *axes"]
    weights: Float[Tensor, "n *t c"]
    logits: Any
    targets: Int[Tensor, " n *t"] | None
    __repr__ = short_repr


def grad_cam_weights(
    score: Float[Tensor, " n"],
    activations: Float[Tensor, "n c *spatial"],
    *,
    retain_graph: bool = False,
) -> Float[Tensor, "n c"]:
    r"""Average each channel's gradient over space.

    $$\alpha_k^c = \frac{1}{Z}\sum_{i,j} \frac{\partial y^c}{\partial A^k_{ij}}$$
    with $y^c$ = `score`, $A^k$ = `activations[:, k]`, and $Z$ the number of positions.

    Args:
        score: one number per image, before any softmax, computed from `activations`.
        activations: a layer's output (N, C, h, w) inside the graph of `score`, or one
            with one or three spatial axes.
        retain_graph: do not free the graph, for another score.

    Returns:
        signed weights, in units of the score per unit of activation; float32 where the
        activations are half precision.

    Raises:
        ValueError: if the score does not depend on the activations.

    Source: Selvaraju et al., arXiv:1610.02391v4, Eq. 1. Departures: none.
    Test: test_gradcam.py::test_equals_cam_on_gap_linear_head
    """

    check_tensor(score, "scores", "N")
    check_maps(activations)

    def pool(gradients):
        if gradients[0] is None:
            _raise_unreached("the activations")
        return [_mean_over_space(gradients[0])]

    uses_float16 = torch.float16 in (score.dtype, activations.dtype)
    return _gradients(
        score,
        [activations],
        pool,
        uses_float16=uses_float16,
        retain_graph=retain_graph,
    )[0]


def check_maps(activations: Tensor) -> None:
    """Raise ValueError unless activations are maps (N, C, *spatial), not empty."""
    check_tensor(activations, "activations")
    if not 3 <= activations.ndim <= 5 or not activations.numel():
        raise ValueError(
            f"activations {tuple(activations.shape)}; expected (N, C, *spatial) with"
            " one to three spatial axes, not empty"
        )


def grad_cam_map(
    weights: Float[Tensor, "n *t c"],
    activations: Float[Tensor, "n c *spatial"],
    *,
    relu: bool = True,
) -> Float[Tensor, " n *axes"]:
    r"""Sum a layer's channels with their weights, and apply a ReLU.

    $$L = \mathrm{ReLU}\Big(\sum_k \alpha_k^c A^k\Big)$$
    with $\alpha_k^c$ = `weights`, $A^k$ = `activations[:, k]`.

    Args:
        weights: one weight per channel; an axis T between N and C returns T maps per
            image.
        activations: a layer's output, with one to three spatial axes.
        relu: False omits the ReLU; negative values decrease the score.

    Returns:
        maps at the layer's resolution; float32 where the activations are half
        precision.

    Source: Selvaraju et al., arXiv:1610.02391v4, Eq. 2. Departures: none.
    Test: test_gradcam.py::test_maps_are_the_weighted_sum_of_channels
    """
    check_maps(activations)
    check_tensor(weights, "weights")
    check_same_kind("weights", weights, "activations", activations, dtype=False)
    shape = weights.shape
    if len(shape) not in (2, 3) or (shape[0], shape[-1]) != activations.shape[:2]:
        raise ValueError(
            f"weights {tuple(shape)} for activations {tuple(activations.shape)};"
            " expected (N, C) or (N, T, C) with the same N and C"
        )
    dtype = at_least_float32(activations.dtype)
    channels = activations.flatten(2).to(dtype)
    n, c, *spatial = activations.shape
    # Autocast would compute the sum in half precision.
    with override_autocast(enabled=False):
        maps = (weights.reshape(n, -1, c).to(dtype) @ channels).view(
            *weights.shape[:-1], *spatial
        )
    return maps.clamp_min(0) if relu else maps


@overload
def grad_cam(
    model: nn.Module,
    images: Images,
    layer: nn.Module | str,
    targets: Targets = None,
    *,
    counterfactual: bool = False,
    relu: bool = True,
    reshape: Reshape | None = None,
    explain: int | str | None = None,
    call: int = -1,
) -> GradCAM: ...
@overload
def grad_cam(
    model: nn.Module,
    images: Images,
    layer: Sequence[nn.Module | str],
    targets: Targets = None,
    *,
    counterfactual: bool = False,
    relu: bool = True,
    reshape: Reshape | None = None,
    explain: int | str | None = None,
    call: int = -1,
) -> list[GradCAM]: ...
def grad_cam(
    model: nn.Module,
    images: Images,
    layer: nn.Module | str | Sequence[nn.Module | str],
    targets: Targets = None,
    *,
    counterfactual: bool = False,
    relu: bool = True,
    reshape: Reshape | None = None,
    explain: int | str | None = None,
    call: int = -1,
) -> GradCAM | list[GradCAM]:
    """Compute Grad-CAM maps: the positions of a layer that increase a class score.

    The network runs once; it runs twice if it sets the gradient mode around the layer
    (`torch.enable_grad()` in its `forward`). No graph is recorded before the layer, and
    the gradient is computed from the score to the layer only, so parameters may be
    frozen and get no `.grad`. Works inside `no_grad` and `inference_mode`. On a CPU,
    images in channels-last layout can be faster; results then differ by rounding.

    A model in train mode runs as in eval mode, and its mode is restored. Hooks act on
    the calling thread only, so threads may share a model that is in eval mode. If
    `torch.compile` is in use, the network runs uncompiled; this is a setting of the
    process, so compiled models in other threads run uncompiled, and slower, during the
    call. Two more settings of the process change if the network needs it: cuDNN is
    disabled while a recurrent layer runs on a GPU, and reentrant checkpoints keep their
    graph, in the calling thread only.

    In float16, gradients below 6e-8 would become zero. The score is therefore
    multiplied by a power of two, the largest of six without overflow, and the gradient
    divided by it in float32.

    Inside `autocast` the forward pass is cast, and the gradients are computed in its
    precision. A weight is a mean over positions where gradients of both signs nearly
    cancel, so early layers are inaccurate. Relative error of the maps (Euclidean norm)
    for EfficientNet-Lite0 and two photographs on a CPU, against float32: below 2 % in
    bfloat16 and 0.5 % in float16 at `conv_head`, but 7 to 31 % and 2 to 15 % at
    `blocks.0` to `blocks.5`. For accurate maps there, disable it around the call:
    `torch.autocast(device_type, enabled=False)`.

    Args:
        model: any network; it need not end in pooling and a linear layer.
        images: (N, C, H, W), prepared as the model expects; or signals (N, C, L),
            volumes (N, C, D, H, W) and other floating-point batches. A tuple of
            positional inputs or a dictionary of keyword inputs for a model with
            several.
        layer: a module of the model or its dotted name, with an output (N, C, h, w),
            or one with one or three spatial axes. The last convolutional layer is the
            usual choice. A sequence of layers returns a map of each from one forward
            pass.
        targets: None explains the predicted class; one class for all images; N classes;
            N rows of T classes for T maps per image from one forward pass; or a
            function of the model's output that returns N scores.
        counterfactual: negate the gradient: the regions whose removal would increase
            the score (Sec. 3.3).
        relu: False keeps negative values.
        reshape: a function from the layer's output to `(N, C, *spatial)`, for tokens,
            maps with channels last, and layers that return something other than one
            tensor. It rearranges or selects values; it is applied to the gradient, too.
        explain: which of several inputs is explained, by position or keyword; None for
            the first. It must be a floating-point batch, and its length is N.
        call: which call of a layer counts if it runs several times: 0 for the first, -1
            for the last.

    Returns:
        maps, weights, logits and targets, all detached; a list of them, in the order of
        the layers, for a sequence of layers.

    Raises:
        ValueError: for images that are not a finite batch; inputs that the model does
            not accept; a layer that is unknown, does not run in the calling thread or
            so many times, does not return `(N, C, *spatial)` or does not influence the
            score; targets that do not match the batch or the classes; a ScriptModule;
            and an nn.DataParallel over several devices. Without `reshape`, also for a
            layer that returns what its last linear layer or layer norm computed, whose
            channels are last.

    Example:
        Two classes per image, from a layer by its name:

        >>> from skimage import data
        >>> from paperlib import backbones
        >>> from paperlib.gradcam import grad_cam
        >>> backbone = backbones.load("efficientnet_lite0")
        >>> images = backbone.transform(data.chelsea()[None])  # (1, 3, 224, 224)
        >>> result = grad_cam(backbone.model, images, "conv_head", [[285, 281]])
        >>> result.maps.shape  # Egyptian cat and tabby
        torch.Size([1, 2, 7, 7])

        A model that returns a dictionary, with a function as targets:

        >>> import torch
        >>> class Detector(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.features = torch.nn.Conv2d(3, 4, 3, stride=2)
        ...     def forward(self, images):
        ...         return {"scores": self.features(images).mean((2, 3))}
        >>> images = torch.zeros(2, 3, 9, 9)
        >>> score = lambda output: output["scores"][:, 0]
        >>> result = grad_cam(Detector(), images, "features", score)
        >>> result.maps.shape, result.weights.mul(16).round().tolist()[0]
        (torch.Size([2, 4, 4]), [1.0, 0.0, 0.0, 0.0])

        A vision transformer, whose layers return a class token and 4×4 image tokens:

        >>> import timm
        >>> options = {"img_size": 64, "num_classes": 10}
        >>> vit = timm.create_model("vit_tiny_patch16_224", **options)
        >>> to_maps = lambda tokens: tokens[:, 1:].mT.unflatten(2, (4, 4))
        >>> images = torch.zeros(2, 3, 64, 64)
        >>> last, earlier = grad_cam(
        ...     vit, images, ["blocks.11.norm1", "blocks.5"], 3, reshape=to_maps
        ... )
        >>> last.maps.shape, earlier.weights.shape
        (torch.Size([2, 4, 4]), torch.Size([2, 192]))

    Source: Selvaraju et al., arXiv:1610.02391v4, Eq. 1, 2 and 12. Departures: none.
    Test: test_gradcam.py::test_equals_captum_on_every_network,
        test_gradcam.py::test_counterfactual_negates_the_weights
    """
    is_single = isinstance(layer, str | nn.Module)
    if not is_single:
        check_iterable(layer, "a layer or a sequence of layers")
    layers = [find_layer(model, part) for part in ([layer] if is_single else layer)]
    if not layers:
        raise ValueError("layer is an empty sequence; expected at least one layer")
    with _gradient_state(model):
        inputs = read_inputs(images, explain)
        output, records = _run_from_layers(model, inputs, layers, call)
        images = inputs.explained
        activations = [record.activations(images, reshape) for record in records]
        scores, classes = _scores(output, targets, len(images))
        uses_float16 = _uses_float16(model, (images, scores), records)
        weights = _weights(scores, records, reshape, uses_float16=uses_float16)
        if counterfactual:
            weights = [-part for part in weights]
        output = map_tensors(output, Tensor.detach)
        results = [
            GradCAM(grad_cam_map(*pair, relu=relu), pair[0], output, classes)
            for pair in zip(weights, activations, strict=True)
        ]
    return results[0] if is_single else results


def _weights(
    scores: Tensor,
    records: Sequence[_Record],
    reshape: Reshape | None,
    *,
    uses_float16: bool,
    retain_graph: bool = False,
) -> list[Tensor]:
    """Average the gradients of the scores over space, for each layer."""

    def pool(gradients):
        remaining = iter(gradients)
        return [
            _mean_over_space(record.gradient(remaining, reshape)) for record in records
        ]

    return _gradients(
        scores,
        [source for record in records for source in record.sources],
        pool,
        uses_float16=uses_float16,
        retain_graph=retain_graph,
    )
