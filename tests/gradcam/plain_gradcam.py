"""Grad-CAM straight from its equations; the page on the paper prints these lines."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


def grad_cam(model, layer, image, c):
    outputs = []

    def store_output(module, inputs, output):
        outputs.append(output)

    hook = layer.register_forward_hook(store_output)
    score = model(image)[0, c]
    hook.remove()
    (A,) = outputs
    (gradient,) = torch.autograd.grad(score, A)
    alpha = gradient.mean(dim=(2, 3))
    L = torch.einsum("nk,nkhw->nhw", alpha, A)
    return L.relu()


class GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(context, f):
        context.save_for_backward(f)
        return f.clamp(min=0)

    @staticmethod
    def backward(context, R):
        (f,) = context.saved_tensors
        return (f > 0) * (R > 0) * R


def guided_backprop(model, image, c):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.forward = GuidedReLU.apply
    image = image.clone().requires_grad_()
    score = model(image)[0, c]
    (gradient,) = torch.autograd.grad(score, image)
    return gradient


def guided_grad_cam(model, layer, image, c):
    L = grad_cam(model, layer, image, c)
    L = F.interpolate(L[:, None], size=image.shape[2:], mode="bilinear")
    return guided_backprop(model, image, c) * L


def counterfactual_map(gradient, A):
    alpha = (-gradient).mean(dim=(2, 3))
    L = torch.einsum("nk,nkhw->nhw", alpha, A)
    return L.relu()
