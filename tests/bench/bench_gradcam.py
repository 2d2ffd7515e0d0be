"""CAM, Grad-CAM and Guided Grad-CAM beside pytorch-grad-cam, captum, torchcam and the
usual way: ResNet-50, layer4.

Weights are random: they change no time. The last row of Guided Grad-CAM is a floor of
another kind than that of the table: the network's own forward and backward pass to the
image, and nothing else.
"""

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from measure import OURS, USUAL, Contender, Part, peer
from torch import Tensor, nn

from paperlib.cam import cam
from paperlib.complexity import profile
from paperlib.gradcam import grad_cam, guided_grad_cam

COPIES = (
    "also checks its input and copies the layer's output, which an in-place layer would"
    " overwrite"
)
LAYER = "layer4"


class Given(NamedTuple):
    """A network, images, the classes asked for, and what a forward pass has to compute
    and to read.
    """

    model: nn.Module
    images: Tensor
    classes: Tensor
    macs: int
    bytes: int


def given(batch: int, device: torch.device) -> Given:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval().to(device)
    images = torch.randn(batch, 3, 224, 224).to(device)
    macs = profile(model, tuple(images.shape)).macs
    moved = 4 * (images.numel() + sum(p.numel() for p in model.parameters()))
    return Given(model, images, torch.arange(batch, device=device), macs, moved)


def usual_grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM as most published notebooks have it: hooks, one image after the other, a
    backward pass through the whole network, and the sum in numpy.
    """
    kept, maps = {}, []
    layer = model.get_submodule(LAYER)
    handles = [
        layer.register_forward_hook(
            lambda module, inputs, output: kept.update(features=output)
        ),
        layer.register_full_backward_hook(
            lambda module, inputs, outputs: kept.update(gradients=outputs[0])
        ),
    ]
    try:
        for image, one in zip(images, classes, strict=True):
            model.zero_grad()
            score = model(image[None])[0, one]
            score.backward(retain_graph=True)
            features, gradients = (
                kept[k][0].detach().cpu().numpy() for k in ("features", "gradients")
            )
            total = np.zeros(features.shape[1:], dtype=np.float32)
            for weight, channel in zip(gradients.mean((1, 2)), features, strict=True):
                total += weight * channel
            maps.append(np.maximum(total, 0))
    finally:
        for handle in handles:
            handle.remove()
    return torch.from_numpy(np.stack(maps))


def usual_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """CAM as most published notebooks have it: a hook, and a product in numpy for each
    image.
    """
    kept, maps = [], []
    handle = model.get_submodule(LAYER).register_forward_hook(
        lambda m, i, output: kept.append(output)
    )
    try:
        weight = list(model.parameters())[-2].detach().cpu().numpy()
        for image, one in zip(images, classes.tolist(), strict=True):
            kept.clear()
            model(image[None])
            features = kept[0][0].detach().cpu().numpy()
            maps.append(
                (weight[one] @ features.reshape(len(features), -1)).reshape(
                    features.shape[1:]
                )
            )
    finally:
        handle.remove()
    return torch.from_numpy(np.stack(maps))


def torchcam_maps(
    kind: str, model: nn.Module, images: Tensor, classes: Tensor
) -> Callable[[], Tensor]:
    import torchcam.methods

    own = copy.deepcopy(model)  # its hooks stay on
    extra = {"fc_layer": "fc"} if kind == "CAM" else {}
    extractor = getattr(torchcam.methods, kind)(own, LAYER, **extra)

    def run() -> Tensor:
        logits = own(images)
        return extractor(classes.tolist(), logits, normalized=False)[0].detach()

    return run


def pytorch_grad_cam_maps(
    model: nn.Module, images: Tensor, classes: Tensor
) -> Callable[[], Tensor]:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = model.get_submodule(LAYER)

    def run() -> Tensor:
        peer = GradCAM(model, [layer])
        # Scales and resizes its maps as well.
        peer(images, [ClassifierOutputTarget(int(c)) for c in classes])
        found = peer.activations_and_grads
        a, g = found.activations[0].cpu().numpy(), found.gradients[0].cpu().numpy()
        raw = peer.get_cam_image(images, layer, None, a, g)
        found.release()
        return torch.from_numpy(raw).clamp_min(0)

    return run


def class_maps(full: bool, device: torch.device) -> Part:
    model, images, classes, macs, moved = given(8 if full else 4, device)
    contenders = [
        Contender(
            OURS,
            lambda: cam(model, images, classes).maps,
            note="also proves that the map is exact here",
        ),
        Contender(USUAL, lambda: usual_cam(model, images, classes)),
    ]
    missing: dict[str, str] = {}
    with peer(missing, "torchcam"):
        contenders.append(
            Contender("torchcam", torchcam_maps("CAM", model, images, classes))
        )
    return Part(
        f"CAM, ResNet-50, {len(images)} images",
        contenders,
        macs,
        moved,
        missing,
        len(images),
    )


def gradient_maps(full: bool, device: torch.device) -> Part:
    model, images, classes, macs, moved = given(8 if full else 4, device)
    contenders = [
        Contender(
            OURS, lambda: grad_cam(model, images, LAYER, classes).maps, note=COPIES
        ),
        Contender(USUAL, lambda: usual_grad_cam(model, images, classes)),
    ]
    missing: dict[str, str] = {}
    with peer(missing, "pytorch-grad-cam"):
        contenders.append(
            Contender(
                "pytorch-grad-cam",
                pytorch_grad_cam_maps(model, images, classes),
                note="also resizes its maps",
            )
        )
    with peer(missing, "captum"):
        from captum.attr import LayerGradCam

        captum = LayerGradCam(model, model.get_submodule(LAYER))

        def captum_maps():
            maps = captum.attribute(images, classes, relu_attributions=True)
            return maps[:, 0].detach()

        contenders.append(Contender("captum", captum_maps))
    with peer(missing, "torchcam"):
        contenders.append(
            Contender("torchcam", torchcam_maps("GradCAM", model, images, classes))
        )
    return Part(
        f"Grad-CAM, ResNet-50, {len(images)} images",
        contenders,
        macs,
        moved,
        missing,
        len(images),
    )


def guided_maps(full: bool, device: torch.device) -> Part:
    model, images, classes, macs, moved = given(8 if full else 4, device)
    contenders = [
        Contender(OURS, lambda: guided_grad_cam(model, images, LAYER, classes))
    ]
    missing: dict[str, str] = {}
    with peer(missing, "captum"):
        from captum.attr import GuidedGradCam

        captum = GuidedGradCam(model, model.get_submodule(LAYER))

        def captum_products():
            products = captum.attribute(images, classes, interpolate_mode="bilinear")
            return products.detach()

        contenders.append(Contender("captum", captum_products))

    def passes() -> Tensor:
        source = images.clone().requires_grad_()
        return torch.autograd.grad(
            model(source).gather(1, classes[:, None]).sum(), source
        )[0]

    contenders.append(
        Contender(
            "forward and backward alone",
            passes,
            compared=False,
            note="a floor, no peer",
        )
    )
    # Backward to the image: one more product of the same size for each layer.
    return Part(
        f"Guided Grad-CAM, ResNet-50, {len(images)} images",
        contenders,
        2 * macs,
        2 * moved,
        missing,
        len(images),
    )


PARTS = {"cam": class_maps, "gradcam": gradient_maps, "guided": guided_maps}
