"""The listings of the page on Grad-CAM are what the library computes."""

import plain_gradcam as plain
import pytest
import torch
from torch import nn

from paperlib.activations import guided_relu
from paperlib.gradcam import grad_cam, guided_backprop, guided_grad_cam

LAYER = "3"  # after the second convolution


@pytest.fixture(params=range(4))
def network(request):
    """A network with a fully connected head, an image, and a class."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 5 * 7, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).double()
    return model, torch.randn(1, 3, 11, 15).double(), request.param


def test_grad_cam_equals_the_library(network):
    model, image, c = network
    expected = grad_cam(model, image, LAYER, c).maps
    assert expected.max() > 0
    found = plain.grad_cam(model, model[int(LAYER)], image, c)
    torch.testing.assert_close(found.detach(), expected)


def test_counterfactual_map_equals_the_library(network):
    model, image, c = network
    A = model[: int(LAYER) + 1](image).detach().requires_grad_()
    score = model[int(LAYER) + 1 :](A)[0, c]
    (gradient,) = torch.autograd.grad(score, A)
    expected = grad_cam(model, image, LAYER, c, counterfactual=True).maps
    assert expected.max() > 0
    torch.testing.assert_close(plain.counterfactual_map(gradient, A.detach()), expected)


def test_guided_relu_equals_the_library():
    f = torch.randn(2, 3, 4, 5, requires_grad=True)
    R = torch.randn(2, 3, 4, 5)
    with guided_relu():
        output = torch.relu(f)
    (expected,) = torch.autograd.grad(output, f, R)
    assert 0 < (expected != 0).float().mean() < 0.5
    torch.testing.assert_close(plain.GuidedReLU.apply(f), f.relu())
    (found,) = torch.autograd.grad(plain.GuidedReLU.apply(f), f, R)
    torch.testing.assert_close(found, expected)


def test_guided_backprop_equals_the_library(network):
    model, image, c = network
    expected = guided_backprop(model, image, c)
    torch.testing.assert_close(plain.guided_backprop(model, image, c), expected)
    score = model(image.requires_grad_())[0, c]
    (plain_gradient,) = torch.autograd.grad(score, image)
    assert not torch.allclose(plain_gradient, expected), "the model is left as it was"


def test_guided_grad_cam_equals_the_library(network):
    model, image, c = network
    expected = guided_grad_cam(model, image, LAYER, c)
    found = plain.guided_grad_cam(model, model[int(LAYER)], image, c)
    torch.testing.assert_close(found.detach(), expected)
