"""Figures of the front page: what the five chapters do, in one look each."""

import functools
import itertools

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from drawing import BLUE, GREY, INK, ORANGE, VERMILION, blank
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from skimage import data
from sklearn.datasets import load_sample_image

from paperlib import backbones, viz
from paperlib.anomaly_map import minmax, upsample
from paperlib.backbones import FeatureExtractor, concatenate_embeddings
from paperlib.cam import bounding_boxes, cam
from paperlib.complexity import profile
from paperlib.datasets import elpv
from paperlib.gradcam import grad_cam, guided_grad_cam
from paperlib.mobilenet import MobileNetV1
from paperlib.padim import PaDiM, PatchGaussian

LAYER = "bn2"  # of EfficientNet-Lite0: the last with spatial dimensions
CAT, ESPRESSO, BELL_COTE = 285, 967, 442  # of ImageNet's 1,000 classes
N_NORMAL = 150  # solar cells to fit
DEFECT = 3  # number of the defective cell, chosen because its cracks are easy to see
CARD = (1.9, 1.5)  # inches


def hero() -> list[Figure]:
    """Two questions of the book: where is the class, and where is the defect?"""
    image = _cat_and_cup()
    maps = grad_cam(_backbone().model, _prepare(image), LAYER, [[CAT, ESPRESSO]]).maps
    why, axes = plt.subplots(1, 3, figsize=(4.6, 1.8))
    _show(axes[0], image, "an image")
    _show(axes[1], _overlay(maps[0, 0], image), "why “cat”?")
    _show(axes[2], _overlay(maps[0, 1], image), "why “espresso”?")

    cell = _defective_cell()
    anomaly_map = _detector().anomaly_map(_prepare(cell))[0]
    where, axes = plt.subplots(1, 2, figsize=(3.1, 1.8))
    _show(axes[0], cell[0], "a solar cell")
    _show(axes[1], _overlay(anomaly_map, cell), "where is it broken?")
    return [why, where]


def mobilenet() -> Figure:
    """Multiply-adds of MobileNet and of the same network with full convolutions."""
    networks = {"full": MobileNetV1(separable=False), "separable": MobileNetV1()}
    millions = [profile(network).macs / 1e6 for network in networks.values()]
    figure, ax = plt.subplots(figsize=CARD)
    ax.bar(networks.keys(), millions, color=[GREY, BLUE], width=0.6)
    for i, value in enumerate(millions):
        ax.text(i, value, f"{value:,.0f}", ha="center", va="bottom")
    ax.set(yticks=[], ylim=(0, 1.2 * max(millions)))
    ax.set_title("million multiply-adds", fontsize=10)
    ax.spines["left"].set_visible(False)
    return figure


def class_activation_map() -> Figure:
    """The class activation map of a photograph, and the box that follows from it."""
    image = load_sample_image("china.jpg")
    maps = cam(_backbone().model, _prepare(image), BELL_COTE).maps
    box = bounding_boxes(upsample(maps, image.shape[:2])[0], largest=True)[0]
    figure, ax = plt.subplots(figsize=CARD)
    _show(ax, _overlay(maps[0], image))
    corner, size = (box.left, box.top), (box.right - box.left, box.bottom - box.top)
    ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", lw=2))
    return figure


def guided() -> Figure:
    """Guided Grad-CAM of the cat: fine lines, of one class."""
    image = _prepare(_cat_and_cup())
    gradient = guided_grad_cam(_backbone().model, image, LAYER, CAT)[0]
    strength = gradient.abs().sum(0)[: gradient.shape[1] // 2]  # the cat's half
    figure, ax = plt.subplots(figsize=CARD)
    blank(ax).imshow(strength, cmap="magma", vmax=strength.quantile(0.995))
    return figure


def positions() -> Figure:
    """A patch and its eight neighbours: on which side does a patch belong?"""
    cell = _defective_cell()[0]
    side, gap = 72, 18
    figure, ax = plt.subplots(figsize=CARD)
    blank(ax).set(xlim=(-0.1, 3.5), ylim=(3.5, -0.1), aspect="equal")
    for i, j in itertools.product(range(3), range(3)):
        top, left = 24 + i * (side + gap), 24 + j * (side + gap)
        patch = cell[top : top + side, left : left + side]
        x, y = 1.2 * j, 1.2 * i
        colour = VERMILION if i == j == 1 else INK
        ax.imshow(patch, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y))
        ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, lw=1.5))
    return figure


def gaussian() -> Figure:
    """Embeddings of normal cells at one position, their Gaussian, and a defect's."""
    embed = FeatureExtractor(*_backbone()[:2])
    defect = concatenate_embeddings(embed(_prepare(_defective_cell())))
    position = divmod(int(_peak()), defect.shape[-1])
    normal = [
        concatenate_embeddings(embed(batch))[:, :, *position]
        for batch in _prepare(_normal_cells()).split(8)
    ]
    x, far = torch.cat(normal), defect[0, :, *position]
    # Two channels that deviate clearly, but not so much that the drawing is empty.
    channels = ((far - x.mean(0)).abs() / x.std(0)).topk(40).indices[[20, 39]]
    x, far = x[:, channels], far[channels]
    fitted = PatchGaussian(1, 2)
    fitted.update(x[:, None])
    mean, covariance = fitted.mean()[0].float(), fitted.covariance()[0].float()

    figure, ax = plt.subplots(figsize=CARD)
    ax.scatter(*x.T, s=8, color=BLUE)
    lengths, axes = torch.linalg.eigh(covariance)
    angle = float(torch.rad2deg(torch.atan2(axes[1, 1], axes[0, 1])))
    for deviations in (1, 2, 3):
        width, height = 2 * deviations * lengths.flip(0).sqrt()
        style = {"fill": False, "edgecolor": INK, "lw": 1}
        ax.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, **style))
    ax.scatter(*far, marker="X", s=70, color=ORANGE)
    ax.autoscale_view()
    ax.set(xticks=[], yticks=[])
    return figure


@functools.cache
def _backbone() -> backbones.Backbone:
    return backbones.load("efficientnet_lite0")


def _prepare(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    images = torch.as_tensor(image)
    is_batch = images.shape[-1] != 3  # of grey images
    return _backbone().transform(images if is_batch else images[None])


def _cat_and_cup() -> np.ndarray:
    """A cat's face above a cup of coffee, as in chapter 3."""
    cat = data.chelsea()[30:255]
    cup = cv2.resize(data.coffee()[60:360], (451, 225), interpolation=cv2.INTER_AREA)
    return np.vstack([cat, cup])


@functools.cache
def _split() -> tuple[torch.Tensor, torch.Tensor]:
    """Normal cells to fit and a defective one, in chapter 5's order."""
    cells = elpv("mono")
    generator = torch.Generator().manual_seed(0)
    normal, defective = (
        indices[torch.randperm(len(indices), generator=generator)]
        for indices in (
            torch.nonzero(cells.probability == value).flatten() for value in (0, 1)
        )
    )
    return cells.images[normal[:N_NORMAL]], cells.images[defective[DEFECT : DEFECT + 1]]


def _normal_cells() -> torch.Tensor:
    return _split()[0]


def _defective_cell() -> torch.Tensor:
    return _split()[1]


@functools.cache
def _detector() -> PaDiM:
    detector = PaDiM(FeatureExtractor(*_backbone()[:2]), dimensions=100, seed=0)
    return detector.fit(_prepare(_normal_cells()).split(4))


def _peak() -> int:
    """The position with the largest distance, counted row by row."""
    embeddings = _detector().extractor(_prepare(_defective_cell()))
    size = embeddings[0].shape[-2:]
    anomaly_map = _detector().anomaly_map(_prepare(_defective_cell()))
    return int(torch.nn.functional.adaptive_max_pool2d(anomaly_map, size).argmax())


def _overlay(heat: torch.Tensor, image: np.ndarray | torch.Tensor) -> np.ndarray:
    picture = torch.as_tensor(image).squeeze()
    heat = minmax(upsample(heat[None].relu(), tuple(picture.shape[:2])))[0]
    return viz.overlay(viz.heatmap(heat), picture.numpy())


def _show(ax: Axes, image: np.ndarray | torch.Tensor, title: str = "") -> None:
    blank(ax).imshow(np.asarray(image), cmap="gray", interpolation="antialiased")
    ax.set_title(title)
