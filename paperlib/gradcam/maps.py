r"""Grad-CAM: a layer's channels, weighted by the gradient of a class score.

The model is restored: no hook, mode, `.grad` or buffer changes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperlib.activations import (
    Layer,
    find_layer,
    on_output,
    raise_unless_ran,
    spatial_map,
)
from paperlib.inference import inference_state, override_autocast
from paperlib.precision import at_least_float32
from paperlib.validation import ClassTargets, check_images, target_classes

# Grad-CAM, Sec. 4.1: share of the map's maximum above which a pixel is in the box
LOCALIZATION_THRESHOLD = 0.15
# Classes, or a function of the model's output that returns N scores
Targets = ClassTargets | Callable[[Any], Tensor]


class GradCAM(NamedTuple):
    r"""The result of `grad_cam`; T targets per image add an axis T after N.

    Fields:
        maps: (N, h, w), Eq. 2, at the layer's resolution, not scaled; positive where
            the layer increases the score.
        weights: (N, C), $\alpha_k^c$ of Eq. 1 (negated for a counterfactual, Sec. 3.3).
        logits: the model's output, detached: (N, classes) unless `targets` was a
            function.
        targets: (N,) class indices, or None where `targets` was a function.
    """

    maps: Float[Tensor, "n *t h w"]
    weights: Float[Tensor, "n *t c"]
    logits: Any
    targets: Int[Tensor, " n *t"] | None


def grad_cam_weights(
    score: Float[Tensor, " n"],
    activations: Float[Tensor, "n c h w"],
    *,
    retain_graph: bool = False,
) -> Float[Tensor, "n c"]:
    r"""Average each channel's gradient over space.

    $$\alpha_k^c = \frac{1}{Z}\sum_{i,j} \frac{\partial y^c}{\partial A^k_{ij}}$$
    with $y^c$ = `score`, $A^k$ = `activations[:, k]`, $Z$ = h·w.

    Args:
        score: one number per image, before any softmax, computed from `activations`.
        activations: a layer's output inside the graph of `score`.
        retain_graph: do not free the graph, for another score.

    Returns:
        signed weights, in units of the score per unit of activation; float32 where the
        activations are half precision.

    Raises:
        ValueError: if the score does not depend on the activations.

    Source: Selvaraju et al., arXiv:1610.02391v4, Eq. 1. Departures: none.
    Test: test_gradcam.py::test_equals_cam_on_gap_linear_head
    """
    return _weights(score, activations, "the activations", retain_graph=retain_graph)


def grad_cam_map(
    weights: Float[Tensor, "n *t c"],
    activations: Float[Tensor, "n c h w"],
    *,
    relu: bool = True,
) -> Float[Tensor, "n *t h w"]:
    r"""Sum a layer's channels with their weights, and apply a ReLU.

    $$L = \mathrm{ReLU}\Big(\sum_k \alpha_k^c A^k\Big)$$
    with $\alpha_k^c$ = `weights`, $A^k$ = `activations[:, k]`.

    Args:
        weights: one weight per channel; an axis T between N and C returns T maps per
            image.
        activations: a layer's output.
        relu: False omits the ReLU; negative values decrease the score.

    Returns:
        maps at the layer's resolution; float32 where the activations are half
        precision.

    Source: Selvaraju et al., arXiv:1610.02391v4, Eq. 2. Departures: none.
    Test: test_gradcam.py::test_maps_are_the_weighted_sum_of_channels
    """
    dtype = at_least_float32(activations.dtype)
    channels = activations.flatten(2).to(dtype)
    n, c, h, w = activations.shape
    # Autocast would compute the sum in half precision.
    with override_autocast(enabled=False):
        maps = (weights.reshape(n, -1, c).to(dtype) @ channels).view(
            *weights.shape[:-1], h, w
        )
    return maps.clamp_min(0) if relu else maps


def grad_cam(
    model: nn.Module,
    images: Float[Tensor, "n c height width"],
    layer: nn.Module | str,
    targets: Targets = None,
    *,
    counterfactual: bool = False,
    relu: bool = True,
) -> GradCAM:
    """Compute Grad-CAM maps: the positions of a layer that increase a class score.

    The network runs once. No graph is recorded before the layer, and the gradient is
    computed from the score to the layer only, so parameters may be frozen and get no
    `.grad`. Works inside `no_grad` and `inference_mode`. On a CPU, images in
    channels-last layout can be faster; results then differ by rounding.

    A model in train mode runs as in eval mode, and its mode is restored. Hooks act on
    the calling thread only, so threads may share a model that is in eval mode. If
    `torch.compile` is in use, the network runs uncompiled; this is a setting of the
    process, so compiled models in other threads run uncompiled, and slower, during the
    call.

    Inside `autocast` the forward pass is cast, and the gradients are computed in its
    precision. A weight is a mean over positions where gradients of both signs nearly
    cancel, so early layers are inaccurate. Relative error of the maps (Euclidean norm)
    for EfficientNet-Lite0 and two photographs on a CPU, against float32: below 2 % in
    bfloat16 and 0.5 % in float16 at `conv_head`, but 7 to 31 % and 2 to 15 % at
    `blocks.0` to `blocks.5`. For accurate maps there, disable it around the call:
    `torch.autocast(device_type, enabled=False)`.

    Args:
        model: any network; it need not end in pooling and a linear layer.
        images: (N, C, H, W), prepared as the model expects.
        layer: a module of the model or its dotted name, with an output (N, C, h, w).
            The last convolutional layer is the usual choice. If it runs several times,
            its last call counts.
        targets: None explains the predicted class; one class for all images; N classes;
            N rows of T classes for T maps per image from one forward pass; or a
            function of the model's output that returns N scores.
        counterfactual: negate the gradient: the regions whose removal would increase
            the score (Sec. 3.3).
        relu: False keeps negative values.

    Returns:
        maps, weights, logits and targets, all detached.

    Raises:
        ValueError: for images that are not a finite batch; a layer that is unknown,
            does not run in the calling thread, does not return (N, C, h, w) or does not
            influence the score; targets that do not match the batch or the classes; a
            ScriptModule; and an nn.DataParallel over several devices.

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

    Source: Selvaraju et al., arXiv:1610.02391v4, Eq. 1, 2 and 12. Departures: none.
    Test: test_gradcam.py::test_equals_captum_on_every_network,
        test_gradcam.py::test_counterfactual_negates_the_weights
    """
    target_layer = find_layer(model, layer)
    with _gradient_state(model, images) as images:
        with torch.no_grad(), _recorded(target_layer, images, _graph_start) as records:
            output = model(images.clone())  # a network may change its input in place
        scores, classes = _scores(output, targets, len(images))
        weights = _weights(scores, records[0], f"layer {target_layer.name!r}")
        weights = -weights if counterfactual else weights
        maps = grad_cam_map(weights, records[0].detach(), relu=relu)
    return GradCAM(maps, weights, _detached(output), classes)


@contextmanager
def _gradient_state(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Yield checked, detached images, with model and torch ready for a gradient."""
    with inference_state(model), torch.enable_grad():
        if any(
            tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())
        ):
            raise ValueError(
                "the model was created inside torch.inference_mode(),"
                " and torch computes no gradient through its tensors;"
                " create or load it outside, or pass copy.deepcopy(model)"
            )
        yield check_images(images)


@contextmanager
def _recorded(
    layer: Layer, images: Tensor, copy: Callable[[Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Record a copy of a layer's last output; the network continues with another.

    So in-place operations before and after the layer do not change the record. Raises
    ValueError at the end of the block if the layer did not run in this thread.
    """
    records: list[Tensor] = []

    def record(output):
        records[:] = [copy(spatial_map(layer.name, output, images))]
        return records[0].clone()

    with on_output(layer.module, record) as other_threads:
        yield records
    raise_unless_ran(layer.name, bool(records), other_threads)


def _graph_start(output: Tensor) -> Tensor:
    """Return a leaf with the layer's values: the graph starts here."""
    torch.set_grad_enabled(True)
    return output.detach().clone().requires_grad_()


def _scores(output: Any, targets: Targets, n: int) -> tuple[Tensor, Tensor | None]:
    """Select the scores to explain, (N,) or (N, T), and their classes."""
    if not callable(targets):
        classes = target_classes(targets, output, n)
        return output.gather(1, classes.view(n, -1)).view(classes.shape), classes
    scores = targets(output)
    if (
        not isinstance(scores, Tensor)
        or scores.shape != (n,)
        or not scores.is_floating_point()
    ):
        received = (
            f"{tuple(scores.shape)} of {scores.dtype}"
            if isinstance(scores, Tensor)
            else f"a {type(scores).__name__}"
        )
        raise ValueError(
            f"the function given as targets returned {received};"
            f" expected a floating-point tensor ({n},)"
        )
    return scores, None


def _gradients(
    scores: Tensor,
    source: Tensor,
    what: str,
    *,
    retain_graph: bool = False,
    pool: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Differentiate the scores by `source`; rows of T scores add an axis T after N.

    Args:
        scores: (N,) or (N, T).
        source: in the graph of the scores.
        what: name of `source` in errors.
        retain_graph: do not free the graph.
        pool: applied to the gradient of each target.
    """
    columns = scores.unbind(1) if scores.ndim == 2 else (scores,)
    gradients: list[Tensor] = []
    for i, column in enumerate(columns):
        gradient = None
        if scores.requires_grad:
            retain = retain_graph or i + 1 < len(columns)
            with override_autocast(enabled=False):
                seed = torch.ones_like(column)
                (gradient,) = torch.autograd.grad(
                    column, source, seed, retain_graph=retain, allow_unused=True
                )
        if gradient is None:
            raise ValueError(
                f"the score does not depend on {what},"
                " or the model has no gradient there (no_grad, detach, argmax,"
                " rounding); explain another score or another layer"
            )
        gradients.append(pool(gradient))
    return torch.stack(gradients, 1) if scores.ndim == 2 else gradients[0]


def _weights(
    scores: Tensor, activations: Tensor, what: str, *, retain_graph: bool = False
) -> Tensor:
    """Average the gradients of the scores over space."""
    # Half precision is too coarse for a mean over thousands of positions.
    dtype = at_least_float32(activations.dtype)
    return _gradients(
        scores,
        activations,
        what,
        retain_graph=retain_graph,
        pool=lambda gradient: gradient.mean((2, 3), dtype=dtype),
    )


def _detached(output: Any) -> Any:
    """Detach a model's output: tensors, alone or in dictionaries, lists and tuples."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return {key: _detached(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        parts = [_detached(value) for value in output]
        return (
            type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        )
    return output
