"""Figures of the page on Grad-CAM."""

import itertools

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, FILL, INK, MUTED, blank
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from paperlib.activations import guided_relu

# The nine numbers of the notebook: a ReLU's input and the gradient at its output.
RELU_INPUT = torch.tensor([[1.0, -1, 5], [2, -5, -7], [-3, 2, 4]])
GRADIENT = torch.tensor([[-2.0, 3, -1], [6, -3, 1], [2, -1, 3]])


def relu_rules() -> Figure:
    """What the gradient, the deconvnet and guided backpropagation pass on at a ReLU."""
    rules = {
        "gradient": GRADIENT * (RELU_INPUT > 0),
        "deconvnet": GRADIENT.relu(),
        "guided backpropagation": _guided(),
    }
    figure, axes = plt.subplots(2, 3, figsize=(5.2, 4.0))
    _grid(axes[0, 0], RELU_INPUT, "input of the ReLU", kept=RELU_INPUT > 0)
    _grid(axes[0, 1], GRADIENT, "arriving gradient", kept=GRADIENT > 0)
    blank(axes[0, 2])
    for ax, (name, values) in zip(axes[1], rules.items(), strict=True):
        _grid(ax, values, name.replace(" ", "\n"), kept=values != 0)
    return figure


def _guided() -> Tensor:
    """Run guided backpropagation of the library through one ReLU."""
    x = RELU_INPUT.clone().requires_grad_()
    with guided_relu():
        (gradient,) = torch.autograd.grad(torch.relu(x), x, GRADIENT)
    return gradient


def _grid(ax: Axes, values: Tensor, title: str, kept: Tensor) -> None:
    """Print a matrix as a grid whose kept numbers are filled."""
    blank(ax).set_title(title)
    ax.set(xlim=(-0.05, 3.05), ylim=(3.05, -0.05), aspect="equal")
    for i, j in itertools.product(range(3), range(3)):
        colour = BLUE if kept[i, j] else FILL
        ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor=INK, lw=0.8))
        ax.text(
            j + 0.5,
            i + 0.5,
            f"{values[i, j] + 0:g}".replace("-", "−"),
            ha="center",
            va="center",
            color="white" if kept[i, j] else MUTED,
        )
