"""Guided backpropagation, and its product with Grad-CAM (Sec. 3.2)."""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperlib.activations import Layer, find_layer
from paperlib.anomaly_map import upsample
from paperlib.gradcam.maps import (
    Targets,
    _gradient_state,
    _gradients,
    _recorded,
    _scores,
    _weights,
    grad_cam_map,
)
from paperlib.guided_relu import guided_relu


def guided_backprop(
    model: nn.Module,
    images: Float[Tensor, "n c height width"],
    targets: Targets = None,
    *,
    positive_gradients: bool = False,
) -> Float[Tensor, "n *t c height width"]:
    r"""Compute guided backpropagation, a gradient of the class score to the image.

    Negative gradients are set to zero at every ReLU, which propagates
    $R^l = [f^l > 0]\,[R^{l+1} > 0]\,R^{l+1}$; for a ReLU6 the gradient is also zero
    where $f^l \ge 6$. Modules, functions and methods are recognised; see `guided_relu`.
    The state of model and caller is restored as by `grad_cam`.

    Args:
        model: a network with ReLUs as activations.
        images: (N, C, H, W), prepared as the model expects; the input of `grad_cam`.
        targets: as in `grad_cam`.
        positive_gradients: True accepts SiLU, GELU and other activations, and sets
            negative gradients at their output to zero.

    Returns:
        gradients, in units of the score per unit of input: (N, C, H, W), or
        (N, T, C, H, W) for T targets per image.

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
    return _guided(model, images, None, targets, positive_gradients)[0]


def guided_grad_cam(
    model: nn.Module,
    images: Float[Tensor, "n c height width"],
    layer: nn.Module | str,
    targets: Targets = None,
    *,
    positive_gradients: bool = False,
) -> Float[Tensor, "n *t c height width"]:
    """Multiply guided backpropagation by the Grad-CAM map.

    The product has the resolution of the first and the class-discrimination of the
    second.

    One forward pass serves both: a plain backward pass to the layer, then a guided one
    to the image. The map is resized to the image bilinearly (corners not aligned).

    Args:
        model: a network of ReLUs.
        images: (N, C, H, W), prepared as the model expects.
        layer: as in `grad_cam`.
        targets: as in `grad_cam`.
        positive_gradients: as in `guided_backprop`.

    Returns:
        of the shape that `guided_backprop` returns.

    Raises:
        ValueError: as `grad_cam` and `guided_backprop`.

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
    gradients, maps = _guided(
        model, images, find_layer(model, layer), targets, positive_gradients
    )
    with torch.inference_mode(False):
        maps = upsample(maps, tuple(images.shape[-2:])).to(gradients.dtype)
        return gradients * maps.unsqueeze(-3)


def _guided(
    model: nn.Module,
    images: Tensor,
    layer: Layer | None,
    targets: Targets,
    positive_gradients: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute guided gradients and, with a layer, Grad-CAM maps in one forward pass."""
    maps = None
    with (
        _gradient_state(model, images) as images,
        guided_relu(positive_gradients=positive_gradients) as guide,
    ):
        leaf = images.requires_grad_()
        recording = _recorded(layer, images, Tensor.clone) if layer else nullcontext()
        with recording as records:
            # A network may change its input in place, and a leaf must not change.
            output = model(leaf.clone())
            scores, _ = _scores(output, targets, len(images))
            guide.check(scores)
        if layer:
            guide.on = False
            what = f"layer {layer.name!r}"
            weights = _weights(scores, records[0], what, retain_graph=True)
            maps = grad_cam_map(weights, records[0].detach())
            guide.on = True
        return _gradients(scores, leaf, "the images"), maps
