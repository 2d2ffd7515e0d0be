"""Compare CAM, Grad-CAM and Guided Grad-CAM with pytorch-grad-cam, captum and torchcam.

All explain layer4 of a ResNet-50 with random weights, which do not affect the times.
The last row of Guided Grad-CAM is a lower bound: the forward and the backward pass of
the network, without any explanation.
"""

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from measure import COMMON, OURS, Contender, Part, peer
from torch import Tensor, nn

from paperlib.cam import cam
from paperlib.complexity import profile
from paperlib.gradcam import grad_cam, guided_grad_cam

COPIES = (
    "also checks its input and copies the layer's output, which an in-place layer would"
    " overwrite"
)
LAYER = "layer4"


class Task(NamedTuple):
    """A network, images, their target classes, and the cost of a forward pass."""

    model: nn.Module
    images: Tensor
    classes: Tensor
    macs: int
    bytes: int


def make_task(batch: int, device: torch.device) -> Task:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = torchvision.models.resnet50().eval().to(device)
    images = torch.randn(batch, 3, 224, 224).to(device)
    macs = profile(model, tuple(images.shape)).macs
    moved = 4 * (images.numel() + sum(p.numel() for p in model.parameters()))
    return Task(model, images, torch.arange(batch, device=device), macs, moved)


def common_grad_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Compute Grad-CAM as most published notebooks do.

    One image at a time, with hooks, a backward pass through the whole network, and the
    sum in NumPy.
    """
    recorded, maps = {}, []
    layer = model.get_submodule(LAYER)
    handles = [
        layer.register_forward_hook(
            lambda module, inputs, output: recorded.update(features=output)
        ),
        layer.register_full_backward_hook(
            lambda module, inputs, outputs: recorded.update(gradients=outputs[0])
        ),
    ]
    try:
        for image, target in zip(images, classes, strict=True):
            model.zero_grad()
            score = model(image[None])[0, target]
            score.backward(retain_graph=True)
            features, gradients = (
                recorded[name][0].detach().cpu().numpy()
                for name in ("features", "gradients")
            )
            total = np.zeros(features.shape[1:], dtype=np.float32)
            for weight, channel in zip(gradients.mean((1, 2)), features, strict=True):
                total += weight * channel
            maps.append(np.maximum(total, 0))
    finally:
        for handle in handles:
            handle.remove()
    return torch.from_numpy(np.stack(maps))


def common_cam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Compute CAM as most published notebooks do: a hook, and a product per image."""
    outputs, maps = [], []
    handle = model.get_submodule(LAYER).register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    try:
        weight = list(model.parameters())[-2].detach().cpu().numpy()
        for image, target in zip(images, classes.tolist(), strict=True):
            outputs.clear()
            model(image[None])
            features = outputs[0][0].detach().cpu().numpy()
            flat_map = weight[target] @ features.reshape(len(features), -1)
            maps.append(flat_map.reshape(features.shape[1:]))
    finally:
        handle.remove()
    return torch.from_numpy(np.stack(maps))


def torchcam_maps(
    kind: str, model: nn.Module, images: Tensor, classes: Tensor
) -> Callable[[], Tensor]:
    import torchcam.methods

    network = copy.deepcopy(model)  # torchcam's hooks remain registered
    options = {"fc_layer": "fc"} if kind == "CAM" else {}
    extractor = getattr(torchcam.methods, kind)(network, LAYER, **options)

    def run() -> Tensor:
        logits = network(images)
        return extractor(classes.tolist(), logits, normalized=False)[0].detach()

    return run


def pytorch_grad_cam_maps(
    model: nn.Module, images: Tensor, classes: Tensor
) -> Callable[[], Tensor]:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = model.get_submodule(LAYER)

    def run() -> Tensor:
        extractor = GradCAM(model, [layer])
        # This call also scales and resizes the maps.
        extractor(images, [ClassifierOutputTarget(int(c)) for c in classes])
        recorder = extractor.activations_and_grads
        activations = recorder.activations[0].cpu().numpy()
        gradients = recorder.gradients[0].cpu().numpy()
        maps = extractor.get_cam_image(images, layer, None, activations, gradients)
        recorder.release()
        return torch.from_numpy(maps).clamp_min(0)

    return run


def class_maps(full: bool, device: torch.device) -> Part:
    model, images, classes, macs, moved = make_task(8 if full else 4, device)
    contenders = [
        Contender(
            OURS,
            lambda: cam(model, images, classes).maps,
            note="also verifies that the map is exact",
        ),
        Contender(COMMON, lambda: common_cam(model, images, classes)),
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
    model, images, classes, macs, moved = make_task(8 if full else 4, device)
    contenders = [
        Contender(
            OURS, lambda: grad_cam(model, images, LAYER, classes).maps, note=COPIES
        ),
        Contender(COMMON, lambda: common_grad_cam(model, images, classes)),
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
    model, images, classes, macs, moved = make_task(8 if full else 4, device)
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

    def input_gradients() -> Tensor:
        inputs = images.clone().requires_grad_()
        score = model(inputs).gather(1, classes[:, None]).sum()
        return torch.autograd.grad(score, inputs)[0]

    contenders.append(
        Contender(
            "forward and backward alone",
            input_gradients,
            compared=False,
            note="lower bound, no peer",
        )
    )
    # The backward pass to the image has one more product of the same size per layer.
    return Part(
        f"Guided Grad-CAM, ResNet-50, {len(images)} images",
        contenders,
        2 * macs,
        2 * moved,
        missing,
        len(images),
    )


PARTS = {"cam": class_maps, "gradcam": gradient_maps, "guided": guided_maps}
