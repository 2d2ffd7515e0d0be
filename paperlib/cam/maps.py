"""CAM: weight the pooled feature map by the last linear layer's weights."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperlib.cam.head import _CallRecorder, _check_average, _find_head
from paperlib.inference import (
    inference_state,
    override_autocast,
    raise_if_hidden,
    run_model,
)
from paperlib.precision import at_least_float32
from paperlib.tables import short_repr
from paperlib.validation import (
    ClassTargets,
    check_images,
    check_indices,
    check_same_kind,
    check_tensor,
    target_classes,
)


class CAM(NamedTuple):
    """The result of `cam`. For T targets per image, maps and targets are (N, T, …).

    Fields:
        maps: (N, h, w), signed, in units of the logit: their mean over space (their
            sum, where the network pools by a sum) is the logit without its bias.
        logits: (N, classes).
        targets: (N,) class indices.
    """

    maps: Float[Tensor, "n *t h w"]
    logits: Float[Tensor, "n classes"]
    targets: Int[Tensor, " n *t"]
    __repr__ = short_repr


def class_activation_map(
    features: Float[Tensor, "n c h w"],
    weight: Float[Tensor, "classes c"],
    targets: Int[Tensor, " n *t"],
) -> Float[Tensor, "n *t h w"]:
    r"""Sum the channels of the last feature map, weighted for one class.

    $$M_c(x, y) = \sum_k w_k^c f_k(x, y)$$
    with $f_k$ = `features[:, k]`, $w_k^c$ = `weight[c, k]`.

    Args:
        features: the input of global average pooling.
        weight: of the linear layer that follows the pooling.
        targets: one class per image, or T classes per image for T maps.

    Returns:
        signed maps: no ReLU, no scaling, no bias; float32 where the features are half
        precision.

    Example:
        >>> import torch
        >>> from paperlib.cam import class_activation_map
        >>> features = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]])  # (1, 2, 1, 2)
        >>> weight = torch.tensor([[1.0, 1.0], [0.5, -1.0]])  # (classes, C)
        >>> class_activation_map(features, weight, torch.tensor([1]))
        tensor([[[-2.5000,  1.0000]]])

    Source: Zhou et al., arXiv:1512.04150, Eq. 2. Departures: none.
    Test: test_cam.py::test_the_map_is_the_weighted_sum_of_channels
    """
    check_tensor(features, "features", "N, C, h, w")
    check_tensor(weight, "weights", "classes, C")
    targets = check_indices("targets", targets, len(weight), "classes")
    for other in (weight, targets):
        check_same_kind("features", features, "weight", other, dtype=False)
    if (
        weight.shape[1] != features.shape[1]
        or targets.shape[:1] != features.shape[:1]
        or targets.ndim > 2
    ):
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)} and"
            f" targets {tuple(targets.shape)};"
            " expected (N, C, h, w), (classes, C) and (N,) or (N, T)"
        )
    dtype = at_least_float32(features.dtype)
    n, c, h, w = features.shape
    rows = weight[targets].to(dtype).view(n, -1, c)
    # Autocast would compute the sum in half precision.
    with override_autocast(enabled=False):
        return (rows @ features.flatten(2).to(dtype)).view(*targets.shape, h, w)


def cam(
    model: nn.Module,
    images: Float[Tensor, "n c height width"],
    targets: ClassTargets = None,
) -> CAM:
    """Compute the class activation maps of a network.

    The network must end in global average pooling and one linear layer. It runs once,
    without gradients. Starting from the logits, the operations are followed backwards
    by the identity of tensors: through flattening and dropout to a linear layer or 1×1
    convolution, and to a global pooling; the input of the pooling is the feature map.
    If the logits are the output of the pooling (SqueezeNet), its channels are the maps.
    The function checks on this run that the maps average (or sum) to the logits.

    The model's state, mode and buffers are restored as by `grad_cam`.

    Args:
        model: for example torchvision's ResNet, DenseNet, EfficientNet or Swin, and
            most of timm's convolutional networks.
        images: (N, C, H, W), prepared as the model expects.
        targets: None for the predicted class; one class for all images; N classes; or N
            rows of T classes.

    Returns:
        maps at the resolution of the feature map, logits and targets.

    Raises:
        ValueError: for a network with another head (the message says which operation
            was found), images that are not a finite batch, targets that do not match
            the batch or the classes, and an nn.DataParallel over several devices.

    Example:
        >>> from skimage import data
        >>> from paperlib import backbones
        >>> from paperlib.cam import cam
        >>> backbone = backbones.load("efficientnet_lite0")
        >>> images = backbone.transform(data.chelsea()[None])
        >>> maps, logits, targets = cam(backbone.model, images)
        >>> maps.shape, targets.tolist()  # ImageNet's class 285: Egyptian cat
        (torch.Size([1, 7, 7]), [285])
        >>> cam(backbone.model, images, [[285, 281]]).maps.shape  # and 281: tabby
        torch.Size([1, 2, 7, 7])

    Source: Zhou et al., arXiv:1512.04150, Eq. 1.
    Departures: none in the map. Networks average over space, so its mean and not its
        sum is the logit; the bias is left out, as in the paper.
    Test: test_cam.py::test_maps_average_to_the_logits_of_many_networks
    """
    raise_if_hidden(model, "the model")
    with inference_state(model), torch.no_grad():
        images = check_images(images)
        with _CallRecorder() as calls:
            # A network may change its input in place.
            logits = run_model(model, images, images.clone())
        classes = target_classes(targets, logits, len(images))
        head = _find_head(calls.last, logits)
        _check_average(head, logits)
        maps = class_activation_map(head.features, head.weight, classes)
    return CAM(maps, logits.detach(), classes)
