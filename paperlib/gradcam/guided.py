"""Guided backpropagation, and its product with Grad-CAM (Sec. 3.2)."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperlib.activations import Layer, Reshape, find_layer
from paperlib.gradcam.gradients import (
    Targets,
    _gradient_state,
    _gradients,
    _raise_unreached,
    _recorded,
    _scores,
    _uses_float16,
)
from paperlib.gradcam.inputs import Images, Inputs, read_inputs
from paperlib.gradcam.maps import _weights, grad_cam_map
from paperlib.guided_relu import guided_relu


def guided_backprop(
    model: nn.Module,
    images: Images,
    targets: Targets = None,
    *,
    positive_gradients: bool = False,
    explain: int | str | None = None,
) -> Float[Tensor, " n *axes"]:
    """Compute guided backpropagation, a gradient of the class score to the image.

    Every ReLU also sets negative gradients to zero, whether it is a module, a function
    or a method; `guided_relu` states the rule. The state of model and caller is
    restored as by `grad_cam`.

    Args:
        model: a network with ReLUs as activations.
        images: (N, C, H, W), prepared as the model expects; as in `grad_cam`.
        targets: as in `grad_cam`.
        positive_gradients: True accepts SiLU, GELU and other activations, and sets
            negative gradients at their output to zero.
        explain: as in `grad_cam`.

    Returns:
        gradients with respect to the explained input, in units of the score per unit of
        input: (N, C, H, W), or (N, T, C, H, W) for T targets per image; float32 where a
        float16 network computed them.

    Raises:
        ValueError: as `grad_cam`, for a network with activations other than ReLU and
            ReLU6, and for activations that run in other threads or inside C++
            functions.

    Example:
        >>> from skimage import data
        >>> from paperlib import backbones
        >>> from paperlib.gradcam import guided_backprop
        >>> backbone = backbones.load("efficientnet_lite0")
        >>> images = backbone.transform(data.chelsea()[None])
        >>> guided_backprop(backbone.model, images, 285).shape
        torch.Size([1, 3, 224, 224])

    Source: Springenberg et al., arXiv:1412.6806, Sec. 3.4.
    Departures: ReLU6 is not in the paper.
    Test: test_gradcam.py::test_guided_backprop_by_hand
    """
    with _gradient_state(model):
        inputs = read_inputs(images, explain)
        return _guided(model, inputs, targets, positive_gradients)[0]


def guided_grad_cam(
    model: nn.Module,
    images: Images,
    layer: nn.Module | str,
    targets: Targets = None,
    *,
    positive_gradients: bool = False,
    reshape: Reshape | None = None,
    explain: int | str | None = None,
    call: int = -1,
) -> Float[Tensor, " n *axes"]:
    """Multiply guided backpropagation by the Grad-CAM map.

    The product has the resolution of the first and the class-discrimination of the
    second.

    One forward pass serves both: a plain backward pass to the layer, then a guided one
    to the image. The map is resized to the image bilinearly (corners not aligned), or
    linearly along as many axes as it has.

    Args:
        model: a network of ReLUs.
        images: (N, C, H, W), prepared as the model expects; as in `grad_cam`.
        layer: as in `grad_cam`, one layer.
        targets: as in `grad_cam`.
        positive_gradients: as in `guided_backprop`.
        reshape: as in `grad_cam`.
        explain: as in `grad_cam`.
        call: as in `grad_cam`.

    Returns:
        of the shape that `guided_backprop` returns.

    Raises:
        ValueError: as `grad_cam` and `guided_backprop`, and for a map that has another
            number of spatial axes than the explained input.

    Example:
        >>> from skimage import data
        >>> from paperlib import backbones
        >>> from paperlib.gradcam import guided_grad_cam
        >>> backbone = backbones.load("efficientnet_lite0")
        >>> images = backbone.transform(data.chelsea()[None])
        >>> guided_grad_cam(backbone.model, images, "conv_head", [[285, 281]]).shape
        torch.Size([1, 2, 3, 224, 224])

    Source: Selvaraju et al., arXiv:1610.02391v4, Sec. 3.2. Departures: none.
    Test: test_gradcam.py::test_guided_grad_cam_is_the_product_of_its_factors
    """
    layers = [find_layer(model, layer)]
    with _gradient_state(model):
        inputs = read_inputs(images, explain)
        gradients, (maps,) = _guided(
            model, inputs, targets, positive_gradients, layers, reshape, call
        )
        maps = _resize(maps, inputs.explained, gradients.ndim - inputs.explained.ndim)
        return gradients * maps.to(gradients.dtype)


def _guided(
    model: nn.Module,
    inputs: Inputs,
    targets: Targets,
    positive_gradients: bool,
    layers: Sequence[Layer] = (),
    reshape: Reshape | None = None,
    call: int = -1,
) -> tuple[Tensor, list[Tensor]]:
    """Compute guided gradients and the layers' Grad-CAM maps in one forward pass."""
    leaf = inputs.explained.requires_grad_()
    with guided_relu(positive_gradients=positive_gradients) as guide:
        with _recorded(layers, call, Tensor.clone) as records:
            scores, _ = _scores(inputs.run(model, leaf), targets, len(leaf))
            guide.check(scores)
        activations = [record.activations(leaf, reshape) for record in records]
        uses_float16 = guide.uses_float16 or _uses_float16(
            model, (leaf, scores), records
        )
        guide.on = False
        weights = _weights(
            scores, records, reshape, uses_float16=uses_float16, retain_graph=True
        )
        guide.on = True
        gradients = _gradients(scores, [leaf], _reached, uses_float16=uses_float16)
    return gradients[0], list(map(grad_cam_map, weights, activations))


def _reached(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    if gradients[0] is None:
        _raise_unreached("the images")
    return [gradients[0]]


def _resize(maps: Tensor, images: Tensor, n_target_axes: int) -> Tensor:
    """Resize maps `(N, *t, *spatial)` to `(N, *t, 1, *spatial)` of the images."""
    leading, spatial = maps.shape[: 1 + n_target_axes], maps.shape[1 + n_target_axes :]
    size = images.shape[2:]
    if len(spatial) != len(size):
        raise ValueError(
            f"the layer's maps have the spatial axes {tuple(spatial)}, and the images"
            f" {tuple(size)}; expected as many. Pass reshape=<function from the layer's"
            " output to (N, C, *spatial)>, or choose another layer"
        )
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    flat = maps.reshape(-1, 1, *spatial)
    return F.interpolate(flat, size, mode=mode).view(*leading, 1, *size)
