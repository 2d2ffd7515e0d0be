# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,mystnb,-all
#     notebook_metadata_filter: kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PaDiM in code: one Gaussian per position
#
# Images of good parts look alike, position by position. For each position, PaDiM
# {cite:p}`defard2021` stores the mean and the covariance of the features that a
# pretrained network computes there. Features that lie far from this Gaussian are
# anomalous. Nothing is trained. This notebook finds cracks in real solar cells,
# computes the distance by hand, builds the method from a few lines of PyTorch, repeats
# the paper's ablations, and chooses a threshold without labels.
#
# - **Read first**: the [page on the paper](../book/05_padim.md), 60 minutes. You need
#   PyTorch basics, and you should know what a covariance matrix is.
# - **Time**: 140 minutes to read and run, 40 for the exercises. The whole notebook runs
#   in one to two minutes on an idle two-core machine, and longer on a busy one or on
#   Colab without a GPU.
# - **Two profiles**: *smoke* runs offline on a CPU with a small network,
#   EfficientNet-Lite0. *Full*, the default on a Colab GPU, downloads the paper's
#   smaller network, ResNet-18 {cite:p}`he2016`; `NETWORK = "wide_resnet50_2"` selects
#   the larger one. The numbers in the text are those of the smoke profile.

# %%
import companion  # stored results and drawings that the notebooks share
import matplotlib.pyplot as plt
import numpy as np
import torch

from paperlib import runtime, viz

run = runtime.start(seed=0)
viz.use_style()
NETWORK = run.choose(smoke="efficientnet_lite0", full="resnet18")

# %% [markdown]
# ## The result first: cracks in solar cells, found without a defective example
#
# When a current flows through it, a functional solar cell emits light; cracks and dead
# parts stay dark {cite:p}`buerhop2018,deitsch2019`. The ELPV data set holds 2,624 such
# *electroluminescence* images. PaDiM is fitted to 150 functional cells. Then it scores
# six cells that it has not seen: the first four defective and the first two functional
# ones of the test set. They were not selected by their result.

# %%
from paperlib import backbones
from paperlib.backbones import FeatureExtractor
from paperlib.datasets import elpv
from paperlib.padim import PaDiM
from paperlib.padim.evaluation import DIMENSIONS

backbone = backbones.load(NETWORK)
extractor = FeatureExtractor(backbone.model.to(run.device), backbone.layers)
image_size = backbone.transform.size
batch_size = run.choose(smoke=4, full=32)  # a CPU is fastest with small batches


def prepare(images):
    """Resize and normalise images, grey or RGB, of any size, for the network."""
    return backbone.transform(images).to(run.device)


def prepare_batches(images):
    return map(prepare, images.split(batch_size))


# %% [markdown]
# - A **backbone** is a pretrained network whose features another method uses. It was
#   trained to classify the photographs of ImageNet.
# - `FeatureExtractor` returns the output of three layers of the network instead of its
#   class scores. The section on forward hooks below shows how.
# - `prepare` turns images (n, H, W) into the network's input, (n, 3, 224, 224).
# - `prepare_batches` does so batch by batch, when the next batch is needed.
#
# For each cell the data set holds the probability of a defect, as estimated by experts.
# `draw_split` uses only the cells about which they were sure. It draws the indices of
# functional cells to fit, to hold out and to test, and of defective cells to test.

# %% tags=["hide-input"]
def draw_split(cells, seed):
    """Draw indices of functional cells (probability 0) and defective ones (1)."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(indices):
        return indices[torch.randperm(len(indices), generator=generator)]

    functional = shuffle(torch.nonzero(cells.probability == 0).flatten())
    defective = shuffle(torch.nonzero(cells.probability == 1).flatten())
    return {
        "train": functional[:150],
        "held_out": functional[150:200],
        "functional": functional[200:275],
        "defective": defective[:75],
    }


# %% [markdown]
# We start with *mono* cells, which are cut from one crystal. *Poly* cells, which
# consist of many crystals, follow later.

# %%
mono = elpv("mono")
mono_split = draw_split(mono, seed=0)
train_images = mono.images[mono_split["train"]]
detector = PaDiM(extractor, DIMENSIONS[NETWORK], seed=0)
detector = detector.fit(prepare_batches(train_images))

example_indices = torch.cat([mono_split["defective"][:4], mono_split["functional"][:2]])
example_images = mono.images[example_indices]
example_maps = detector.anomaly_map(prepare(example_images))
example_scores = example_maps.amax((1, 2))

# %% [markdown]
# - `PaDiM(…, seed=0)` draws which 100 of the 176 channels of the three layers it keeps.
# - `fit` does all the learning: one pass over the 150 images.
# - `anomaly_map` returns one distance per pixel, (6, 224, 224).
# - `amax` takes the largest value of each map. This is the score of the image: (6,).

# %% tags=["hide-input", "ledger:padim-figure-1:measured"] mystnb={"image": {"alt": "Six solar cells in two rows of three, and under each the same cell with the anomaly map over it, dark for small and yellow for large distances, in one colour scale. Four defective cells: bright spots lie on dark cracks and dark areas. Two functional cells: the maps stay dark."}}
labels = ["defective"] * 4 + ["functional"] * 2
limits = (float(example_maps.min()), float(example_maps.max()))
fig, panels = plt.subplots(4, 3, figsize=(5, 8.5))
pairs = zip(panels[::2].flat, panels[1::2].flat, strict=True)
for i, (upper, lower) in enumerate(pairs):
    viz.panel(upper, example_images[i], labels[i])
    values, title = example_maps[i], f"score {example_scores[i]:.1f}"
    overlay = companion.draw_map(lower, example_images[i], values, limits, title)
fig.colorbar(overlay, ax=panels, location="bottom", label="distance", shrink=0.8)
fig.suptitle("Each defective cell scores higher than both functional ones")
plt.show()

# %% tags=["remove-cell"]
lowest, highest = example_scores[:4].min(), example_scores[4:].max()
run.expect(bool(lowest > highest), "each defective cell has a higher score")

# %% [markdown]
# PaDiM was never shown a crack. (One functional cell has the rather high score 64. The
# section on alignment returns to it.) All six maps share *one* colour scale. If each map
# were scaled to its own extremes, the functional cells would have bright spots as well.
#
# ## What you will be able to do
#
# 1. Compute a Mahalanobis distance by hand, and explain what $\Sigma^{-1}$ does in it.
# 2. Read layers of a network with hooks, build patch embeddings from them, and fit the
#    Gaussians, in a few lines of PyTorch.
# 3. Measure detection and localisation, and explain why localisation has two measures.
# 4. Decide between random channels, principal components and a nearest-neighbour
#    search, by accuracy, time and memory.
# 5. Choose a threshold without labels, and recognise scores that leak information from
#    the test set.
# 6. Run PaDiM on a folder of your own images.
#
# ## By hand: two vectors at the same Euclidean distance
#
# Take one position of the image, and *embeddings* (vectors that describe a patch) of
# only $D = 2$ channels. Five normal images have the vectors $x^1, \dots, x^5$. Their
# mean is $\mu$, and their covariance is Eq. 1, without $\epsilon$ for now. The
# *Mahalanobis distance* of a vector $x$ from the mean is Eq. 2:
#
# $$\mu = \frac1N \sum_k x^k$$
#
# $$\Sigma = \frac{1}{N-1} \sum_k (x^k - \mu)(x^k - \mu)^{\mathsf T} \tag{1}$$
#
# $$M(x) = \sqrt{(x - \mu)^{\mathsf T}\, \Sigma^{-1} (x - \mu)} \tag{2}$$
#
# :::{admonition} Predict first
# :class: tip
# The five vectors are (5, 4), (1, 0), (4, 1), (2, 3) and (3, 2). Two new vectors are
# $a$ = (5, 4) and $b$ = (5, 0). Both have the Euclidean distance $2\sqrt2$ from the
# mean. Compute $\mu$, $\Sigma$ and $\Sigma^{-1}$ on paper. Which of $a$ and $b$ has the
# larger Mahalanobis distance, and by what factor?
# :::

# %% tags=["nbval-check-output", "hide-output"]
x = np.array([[5, 4], [1, 0], [4, 1], [2, 3], [3, 2]])
a, b = np.array([5, 4]), np.array([5, 0])
toy_mean = x.sum(0) / 5
toy_covariance = (x - toy_mean).T @ (x - toy_mean) / 4
inverse = np.linalg.inv(toy_covariance)
squared_a = (a - toy_mean) @ inverse @ (a - toy_mean)
squared_b = (b - toy_mean) @ inverse @ (b - toy_mean)
print("mean      ", toy_mean)
print("covariance", toy_covariance.tolist())
print("inverse   ", inverse.round(3).tolist())
print(f"squared distances {squared_a:.0f} and {squared_b:.0f}")
print(f"distances {squared_a**0.5:.2f} and {squared_b**0.5:.2f}")

# %% tags=["remove-cell"]
assert np.array_equal(toy_covariance, [[2.5, 1.5], [1.5, 2.5]])
assert np.allclose([squared_a, squared_b], [2, 8])
deviations = x[:2] - x[:2].mean(0)
assert abs(np.linalg.det(deviations.T @ deviations)) < 1e-9

# %% [markdown]
# - `x` has one row per image, (5, 2). `x - toy_mean` subtracts the mean from each row.
# - `(x - toy_mean).T @ (x - toy_mean)` is the sum of Eq. 1: (2, 5) times (5, 2) is
#   (2, 2). Its entry in row $i$ and column $j$ adds up channel $i$ times channel $j$
#   over the images. Divided by $N - 1 = 4$ it is $\Sigma$.
# - `(a - toy_mean) @ inverse @ (a - toy_mean)` is the square of Eq. 2. NumPy treats the
#   vector on the left as a row and the one on the right as a column.

# %% tags=["hide-input", "hide-output"] mystnb={"image": {"alt": "A plane with five blue points around their mean at (3, 2), and three ellipses for distances 1, 2 and 3 that stretch along the rising diagonal. The new point a at (5, 4) lies on the diagonal between the first and the second ellipse, the new point b at (5, 0) lies across it, close to the third. A dotted circle through both is centred at the mean."}}
fig, ax = plt.subplots(figsize=(6.4, 5.2))
axis_1, axis_2 = np.linspace(-3.5, 9.5, 200), np.linspace(-2.5, 6.5, 200)
offsets = np.stack(np.meshgrid(axis_1, axis_2), -1) - toy_mean
plane = np.sqrt(np.einsum("yxi,ij,yxj->yx", offsets, inverse, offsets))
contours = ax.contour(axis_1, axis_2, plane, levels=[1, 2, 3], colors=viz.GREY)
ax.clabel(contours, fmt="M = %d", manual=[(2, 1), (-0.1, 2), (0.5, 4)])
ax.add_patch(plt.Circle(toy_mean, 8**0.5, fill=False, linestyle=":", color="black"))
ax.plot(*x.T, "o", color=viz.BLUE, label="normal vectors")
ax.plot(*toy_mean, "+", color="black", ms=12, label="their mean")
for name, point in {"a": a, "b": b}.items():
    ax.plot(*point, "^", color=viz.VERMILION, ms=13, mfc="none", mew=2)
    ax.annotate(name, point, (11, -4), textcoords="offset points", fontsize=13)
ax.set(xlabel="channel 1", ylabel="channel 2", aspect="equal")
ax.set_title("a and b lie on one circle, but on different ellipses")
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# $\mu = (3, 2)$. $\Sigma$ has 2.5 on its diagonal and 1.5 off the diagonal; its
# determinant is 4, so $\Sigma^{-1}$ has 0.625 and $-0.375$. $M(a)^2 = 2$ and $M(b)^2 =
# 8$: $b$ is twice as far away. $a$ *is* one of the normal vectors.
# :::
#
# Each channel of $b$ is normal by itself: 5 occurs in channel 1, and 0 in channel 2.
# The combination is unusual: a large first channel normally comes with a large second
# one. The off-diagonal entries of $\Sigma$ describe this. A distance that treats each
# channel separately cannot detect it.
#
# With two vectors only, all deviations lie on one line. The determinant is 0, and
# $\Sigma$ has no inverse. For this reason Eq. 1 in the paper adds $\epsilon I$, with
# $\epsilon = 0.01$, to the covariance.
#
# ## By hand: an embedding from two feature maps of different size
#
# The embedding of a position combines several layers. In this example one layer returns
# 1 channel of 4×4 positions, and another 2 channels of 2×2 positions: feature maps of
# shape (N, 1, 4, 4) and (N, 2, 2, 2). Each value of the coarse maps is repeated at the
# four fine positions that it covers. Then the channels are stacked: (N, 3, 4, 4).

# %% tags=["nbval-check-output"]
import torch.nn.functional as F

from paperlib.backbones import concatenate_embeddings


def concatenate_by_repeating(fine, coarse):
    enlarged = F.interpolate(coarse, fine.shape[2:], mode="nearest")
    return torch.cat([fine, enlarged], dim=1)


fine = torch.arange(16.0).view(1, 1, 4, 4)
coarse = torch.tensor([[20.0, 21, 22, 23], [30, 31, 32, 33]]).view(1, 2, 2, 2)
joined = concatenate_by_repeating(fine, coarse)
print(tuple(fine.shape), "and", tuple(coarse.shape), "become", tuple(joined.shape))
print("the embedding of row 1, column 2:", joined[0, :, 1, 2].tolist())

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four grids of numbers. First: one coarse map of 2 by 2 positions with the numbers 20 to 23. Then the three channels of the result, each 4 by 4: the first is the fine map with the numbers 0 to 15; the second shows 20 in its upper left quarter, 21 in the upper right, 22 in the lower left and 23 in the lower right; the third shows 30 to 33 in the same way. The position in row 1, column 2 is outlined in all three: 6, 21, 31."}}
grids = {
    "a coarse\nmap": coarse[0, 0],
    "channel 1\n(fine map)": joined[0, 0],
    "channel 2\n(repeated)": joined[0, 1],
    "channel 3\n(repeated)": joined[0, 2],
}
fig, panels = plt.subplots(1, 4, figsize=(6.4, 2.6), width_ratios=[1, 2, 2, 2])
for ax, (title, grid) in zip(panels, grids.items(), strict=True):
    ax.imshow(grid, cmap="Blues", vmin=-5, vmax=60)
    for (row, column), value in np.ndenumerate(grid.numpy()):
        ax.text(column, row, f"{value:.0f}", ha="center", va="center")
    ax.set_axis_off()
    ax.set_title(title)
outline = {"fill": False, "edgecolor": viz.VERMILION, "linewidth": 3}
for ax in panels[1:]:
    ax.add_patch(plt.Rectangle((1.5, 0.5), 1, 1, **outline))
fig.suptitle("The embedding of the outlined position is (6, 21, 31)")
plt.show()

# %% [markdown]
# ### The same with unfold and fold
#
# Common implementations of PaDiM build the embedding in a function `embedding_concat`,
# with `F.unfold` and `F.fold`. Here is such a function, step by step. `unfold`
# cuts the fine map into blocks, one per coarse position. The coarse vector is appended
# to each of the positions in its block. `fold` moves the blocks back to their grid.

# %%
def concatenate_by_folding(fine, coarse):
    n, n_fine, height, width = fine.shape
    factor = height // coarse.shape[2]
    blocks = F.unfold(fine, factor, stride=factor)
    blocks = blocks.view(n, n_fine, factor**2, -1)
    repeated = coarse.flatten(2).unsqueeze(2).expand(-1, -1, factor**2, -1)
    stacked = torch.cat([blocks, repeated], dim=1).flatten(1, 2)
    return F.fold(stacked, (height, width), factor, stride=factor)


assert torch.equal(concatenate_by_folding(fine, coarse), joined)

# %% tags=["remove-cell"]
assert joined[0, :, 1, 2].tolist() == [6, 21, 31]
assert torch.equal(concatenate_embeddings([fine, coarse]), joined)

# %% [markdown]
# | line | what it returns | shape in general | here |
# |---|---|---|---|
# | `fine` | the fine map | (n, C₁, H, W) | (1, 1, 4, 4) |
# | `coarse` | the coarse map, s times smaller | (n, C₂, H/s, W/s) | (1, 2, 2, 2) |
# | `F.unfold(…)` | one column per block, with its C₁·s² values | (n, C₁·s², L) | (1, 4, 4) |
# | `.view(…)` | channels, positions in a block, blocks | (n, C₁, s², L) | (1, 1, 4, 4) |
# | `repeated` | each coarse value, s² times | (n, C₂, s², L) | (1, 2, 4, 4) |
# | `stacked` | both, in the layout that `fold` expects | (n, (C₁ + C₂)·s², L) | (1, 12, 4) |
# | `F.fold(…)` | the blocks at their positions | (n, C₁ + C₂, H, W) | (1, 3, 4, 4) |
#
# - $s$ = `factor` = 2 is the ratio of the two grids, and $L = H W / s^2 = 4$ is the
#   number of blocks, the number of coarse positions.
# - With `stride=factor` the blocks do not overlap, so `fold` adds nothing up and only
#   reverses `unfold`.
# - `expand` repeats without copying; `flatten(1, 2)` joins channels and positions.
#
# Both functions return the same result. So does the library's `concatenate_embeddings`,
# which also accepts more than two layers and selects channels. It is used from here on.
#
# ## The whole method in one figure
#
# This is the paper's Figure 2, redrawn with the sizes of this notebook's network.
# Coarse positions are drawn as large as the area that they cover.

# %% tags=["hide-input", "ledger:padim-figure-2:redrawn"] mystnb={"image": {"alt": "Above, from left to right: a solar cell; three blocks of the same width and height, made of many small squares, of larger squares and of four large squares. Below: one deeper block of small squares that holds the channels of all three, of which one position is marked; and a plane with points and ellipses, the Gaussian of the marked position."}}
companion.draw_padim_overview(train_images[0], extractor(prepare(train_images[:1])))
plt.title("Three layers become one embedding per position, and one Gaussian")
plt.show()

# %% [markdown]
# ## From the paper to code: shapes, step by step
#
# ### Forward hooks: how to read a layer inside a network
#
# A network returns class scores, not its feature maps. A **forward hook** gives access
# to them. It is a function that PyTorch calls each time a layer has run, with the
# layer, its inputs and its output.

# %%
def record_outputs(model, layers, images):
    """Return the output of each layer for a batch of images."""
    outputs = []

    def store(module, inputs, output):
        outputs.append(output)

    hooks = [layer.register_forward_hook(store) for layer in layers]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return outputs


layer_modules = [backbone.model.get_submodule(name) for name in extractor.layers]
batch = prepare(train_images[:2])
recorded = record_outputs(backbone.model, layer_modules, batch)
torch.testing.assert_close(recorded, extractor(batch))
for name, output in zip(extractor.layers, recorded, strict=True):
    print(f"{name:10} {tuple(output.shape)}")

# %% [markdown]
# - `store` is the hook: it appends the layer's output to a list. It returns nothing, so
#   the forward pass is not changed.
# - `outputs = []` inside the function: each call starts with an empty list. With one
#   list for all calls, the second batch would be appended to the first.
# - `register_forward_hook` returns a handle, and `hook.remove()` removes the hook;
#   otherwise it would also run in every later call.
# - `model(images)` only triggers the hooks. Its class scores are not used. With
#   `no_grad`, no graph is stored, because nothing is trained.
# - `get_submodule` finds a layer by its name. In ResNet-18 they are the last blocks of
#   `layer1`, `layer2` and `layer3`.
#
# `FeatureExtractor` returns the same maps. In addition, it ends the forward pass after
# the last of the three layers, because the layers after it are not needed.
#
# ### All steps, from images to scores
#
# `extract_layers` returns the feature maps of the three layers for any number of
# images. `embed` concatenates them and flattens their positions: (N, P, D) for N
# images, P positions and D channels.

# %%
from paperlib.anomaly_map import upsample
from paperlib.padim import PatchGaussian, mahalanobis_distance


def extract_layers(images):
    """Return one tensor of feature maps (N, C, h, w) per layer."""
    outputs = [extractor(batch) for batch in prepare_batches(images)]
    return [torch.cat(layer) for layer in zip(*outputs, strict=True)]


def embed(layers, channels=None):
    """Return the embeddings (N, P, D) of all positions; None keeps every channel."""
    return concatenate_embeddings(layers, channels).flatten(2).transpose(1, 2)


# %%
train_layers = extract_layers(train_images)
embeddings = embed(train_layers, detector.channels)
gaussian = PatchGaussian(*embeddings.shape[1:]).update(embeddings)
mean, covariance = gaussian.mean(), gaussian.covariance()
cholesky = torch.linalg.cholesky(covariance)

new_embeddings = embed(extract_layers(example_images), detector.channels)
distances = mahalanobis_distance(new_embeddings, mean, cholesky)
coarse_maps = distances.unflatten(1, train_layers[0].shape[2:])
enlarged_maps = upsample(coarse_maps, image_size)

# %% tags=["hide-input", "nbval-check-output"]
print("layers         ", *[tuple(layer.shape) for layer in train_layers])
print("embeddings     ", tuple(embeddings.shape))
print("means          ", tuple(mean.shape))
print("covariances    ", tuple(covariance.shape))
print("distances, new ", tuple(distances.shape))
print("coarse maps    ", tuple(coarse_maps.shape))
print("enlarged maps  ", tuple(enlarged_maps.shape))
print("scores         ", tuple(enlarged_maps.amax((1, 2)).shape))

# %% [markdown]
# - `zip(*outputs)` regroups the outputs: from one list of three layers per batch to one
#   list of batches per layer. `torch.cat` joins the batches.
# - `embed`: (N, D, 56, 56) is flattened to (N, D, 3136) and transposed to
#   (N, 3136, D), one row per position. `detector.channels` are the 100 channels drawn
#   from 24 + 40 + 112 = 176.
# - `PatchGaussian` is Eq. 1 for all positions, $\epsilon I$ included.
# - `cholesky` holds the lower triangular $L$ with $L L^{\mathsf T} = \Sigma$, the
#   *Cholesky factor*. Then $M^2 = \lVert L^{-1}(x - \mu) \rVert^2$: to compute Eq. 2,
#   we solve one triangular system and need no inverse.
# - `unflatten` turns 3,136 distances back into 56×56, and `upsample` enlarges them to
#   224×224 pixels.
#
# Two steps are simpler than in the paper, which resizes images to 256×256 pixels, crops
# the central 224×224, and enlarges the maps bicubically instead of bilinearly
# (`mode="bicubic"` in `PaDiM`). One step is still missing: the paper smooths each map
# with a Gaussian filter, so that a single position does not decide the score.
#
# One position of the 56×56 map stands for $224 / 56 = 4$ pixels in each direction, 4×4
# = 16 pixels. Its *receptive field*, the area that can influence its embedding, is
# larger, because each convolution also reads neighbouring positions.
#
# The code below computes Eq. 1 and Eq. 2 term by term, with a Python loop, for the
# position in the middle, and smooths the maps with SciPy.

# %% tags=["nbval-check-output", "ledger:padim-eq-1:by-hand", "ledger:padim-eq-2:by-hand"]
from scipy.ndimage import gaussian_filter

position = 28 * 56 + 28  # row 28, column 28
vectors = embeddings[:, position].double().cpu().numpy()
n_images, n_channels = vectors.shape
mu = sum(vectors) / n_images
sigma = sum(np.outer(v - mu, v - mu) for v in vectors) / (n_images - 1)
sigma += 0.01 * np.eye(n_channels)
new_vector = new_embeddings[0, position].double().cpu().numpy()
squared = (new_vector - mu) @ np.linalg.inv(sigma) @ (new_vector - mu)
blurred = [gaussian_filter(values, 4) for values in enlarged_maps.cpu().numpy()]
print(f"distance in the middle: {squared**0.5:.2f}")
print(f"paperlib's:             {distances[0, position]:.2f}")
print(f"highest score, SciPy:   {blurred[0].max():.1f}")
print(f"paperlib's:             {example_scores[0]:.1f}")

# %% tags=["remove-cell"]
np.testing.assert_allclose(example_maps.cpu(), blurred, rtol=5e-3)
tolerance = {"rtol": 1e-3, "atol": 1e-3}
np.testing.assert_allclose(mean[position].cpu(), mu, **tolerance)
np.testing.assert_allclose(covariance[position].cpu(), sigma, **tolerance)
np.testing.assert_allclose(distances[0, position].item(), squared**0.5, **tolerance)

# %% [markdown]
# - `np.outer(v - mu, v - mu)` is $(x^k - \mu)(x^k - \mu)^{\mathsf T}$, a 100×100 matrix
#   per image; the sum over the 150 images is Eq. 1.
# - `squared` is the expression under the root of Eq. 2.
# - `gaussian_filter(values, 4)` smooths each map with a standard deviation of 4 pixels.
#   The results are the maps of `detector` at the beginning.
#
# ## From loop to batch: the same numbers
#
# The common implementation loops over the positions with `np.cov`, then inverts each
# matrix, and calls SciPy's `mahalanobis` once per position *and per image*. `paperlib`
# processes all positions at once.
#
# :::{admonition} Predict first
# :class: tip
# There are 3,136 positions, 100 channels, 150 images to fit and 6 to score. Which of
# the three loops takes longest: `np.cov`, the inversion, or `mahalanobis`? Which of
# them grows with the number of images to score?
# :::

# %%
from scipy.spatial.distance import mahalanobis


def compute_covariances(x):
    """Loop over the positions of x (N, D, P), the common implementation's layout."""
    identity = np.eye(x.shape[1])
    return [
        np.cov(x[:, :, p], rowvar=False) + 0.01 * identity  # Eq. 1
        for p in range(x.shape[2])
    ]


def invert(covariances):
    return [np.linalg.inv(covariance) for covariance in covariances]


def compute_distances(x, means, inverses):
    """Loop over the images of x (N, D, P), and over the positions of each."""
    n_positions = x.shape[2]
    return [
        [mahalanobis(v[:, p], means[:, p], inverses[p]) for p in range(n_positions)]
        for v in x
    ]


# %% [markdown]
# - `x[:, :, p]` holds the embeddings of position $p$, (150, 100): one row per image.
# - **`rowvar=False`** states that the *columns* are the variables, here the channels,
#   and the rows are the observations, here the images. The result is (100, 100). The
#   default, `rowvar=True`, is the opposite: it would compute how the 150 *images* vary
#   together, (150, 150). For the five vectors of the first example:

# %% tags=["nbval-check-output"]
five_vectors = np.array([[5, 4], [1, 0], [4, 1], [2, 3], [3, 2]])
print("rowvar=False:", np.cov(five_vectors, rowvar=False).tolist())
print("default:      shape", np.cov(five_vectors).shape)

# %% [markdown]
# `paperlib` fits all positions at once. `companion.call_and_time` calls a function and
# returns its result and the seconds that it took.

# %%
def fit_gaussian(embeddings):
    """Return mean (P, D) and Cholesky factor (P, D, D) of embeddings (N, P, D)."""
    gaussian = PatchGaussian(*embeddings.shape[1:]).update(embeddings)
    return gaussian.mean(), torch.linalg.cholesky(gaussian.covariance())


# %%
fit_array = embeddings.cpu().numpy().transpose(0, 2, 1)
new_array = new_embeddings.cpu().numpy().transpose(0, 2, 1)
covariances, cov_time = companion.call_and_time(compute_covariances, fit_array)
inverses, inversion_time = companion.call_and_time(invert, covariances)
loop_distances, loop_time = companion.call_and_time(
    compute_distances, new_array, fit_array.mean(0), inverses
)
del covariances, inverses  # half a gigabyte
batch_statistics, fit_time = companion.call_and_time(fit_gaussian, embeddings)
batch_distances, batch_time = companion.call_and_time(
    mahalanobis_distance, new_embeddings, *batch_statistics
)

# %% tags=["hide-input", "hide-output"]
n_new = len(new_array)
print(f"loop   np.cov {cov_time:.2f} s, inversion {inversion_time:.2f} s")
print(f"       mahalanobis {loop_time / n_new:.3f} s per image")
print(f"batch  mean, covariance and Cholesky factor {fit_time:.2f} s")
print(f"       distances {batch_time / n_new:.3f} s per image")

# %% tags=["remove-cell"]
np.testing.assert_allclose(batch_distances.cpu(), np.array(loop_distances), rtol=1e-3)

# %% [markdown]
# :::{dropdown} Answer
# With six images to score, the inversion or `np.cov` takes longest, depending on the
# machine. Only `mahalanobis` grows with the number of images to score. Everything that
# does not depend on the new image belongs in the fit; common implementations invert
# every matrix again for each test set.
# :::
#
# Scoring an image is several times faster in the batch. Fitting gains less, and on some
# processors nothing: much of its time is spent on one inversion or factorisation per
# position, with or without the loop.
#
# The class `PaDiM` goes one step further. It stores the inverse factor $L^{-1}$, so
# that scoring is one matrix product per position. And it never holds all embeddings:
# `fit` receives batches, and each batch updates mean and covariance.
#
# ## Real cells, mono and poly: how well are they separated?
#
# A monocrystalline (*mono*) cell looks even. A polycrystalline (*poly*) cell shows the
# grains of its crystals, and they lie differently in each cell. Detection is measured
# by the **image AUROC**: the probability that a random defective cell has a higher
# score than a random functional one. Random scores reach 0.5.
#
# :::{admonition} Predict first
# :class: tip
# PaDiM compares a position with the same position of other cells. On which kind is its
# AUROC higher, and why?
# :::
#
# The features of all cells are computed once, because the following sections use them.

# %%
KINDS = ("mono", "poly")
datasets = {"mono": mono, "poly": elpv("poly")}
splits = {kind: draw_split(datasets[kind], seed=0) for kind in KINDS}
features = {"mono": {"train": train_layers}, "poly": {}}
for kind in KINDS:
    for part, indices in splits[kind].items():
        is_needed = kind == "mono" or part != "held_out"  # for mono's threshold
        if is_needed and part not in features[kind]:
            features[kind][part] = extract_layers(datasets[kind].images[indices])

# %%
from paperlib.anomaly_map import gaussian_blur


def upsample_and_blur(coarse_maps):
    return gaussian_blur(upsample(coarse_maps, image_size)).cpu()


def compute_anomaly_maps(layers, mean, cholesky):
    """Return anomaly maps (N, H, W) of the images' size."""
    embeddings = embed(layers, detector.channels)
    distances = mahalanobis_distance(embeddings, mean, cholesky)
    return upsample_and_blur(distances.unflatten(1, layers[0].shape[2:]))


# %%
from paperlib.metrics import auroc

is_defective = torch.arange(150) >= 75
statistics, test_scores, image_auroc = {}, {}, {}
for kind in KINDS:
    statistics[kind] = fit_gaussian(embed(features[kind]["train"], detector.channels))
    test_maps = [
        compute_anomaly_maps(features[kind][part], *statistics[kind])
        for part in ("functional", "defective")
    ]
    test_scores[kind] = torch.cat(test_maps).amax((1, 2))
    image_auroc[kind] = auroc(is_defective, test_scores[kind])

# %% [markdown]
# - `features[kind][part]` holds the three layers of one part of a split.
# - `statistics[kind]` holds the means (3136, 100) and Cholesky factors
#   (3136, 100, 100) of 150 functional cells.
# - `test_scores[kind]`: 75 functional cells first, then 75 defective ones, (150,).
# - `auroc` receives the truth first: `is_defective` is False 75 times, then True.
#
# One split is one sample. A stored run repeats everything below for five *seeds*; each
# seed draws other cells and other channels. The first seed is the one computed here.

# %% tags=["hide-output"]
import pandas as pd

results = companion.read_result("padim_cells")
measurements = pd.DataFrame(results["runs"])
tables = measurements.query("experiment == 'tables'")
random_100 = tables.query("method == 'random' and dimensions == 100")
print("image AUROC       this seed   five seeds, mean ± standard deviation")
for kind in KINDS:
    area, seeds = image_auroc[kind], random_100[random_100.kind == kind].image
    print(f"{kind} {area:20.3f} {seeds.mean():12.3f} ± {seeds.std():.3f}")
stamp = results["stamp"]
print(f"five seeds: stored on {stamp['date']}, {stamp['device']}")

# %% tags=["remove-cell"]
for kind in KINDS:
    stored_area = random_100[random_100.kind == kind].image.iloc[0]
    agrees = abs(image_auroc[kind] - stored_area) < 0.01
    run.expect(agrees, "this seed's AUROC is the stored one")
run.expect(image_auroc["mono"] > image_auroc["poly"], "mono has the higher AUROC")

# %% [markdown]
# :::{dropdown} Answer
# Mono. There are two likely reasons. A grain boundary is a dark line, like a crack. And
# because grains lie differently in each cell, the Gaussians of the poly cells are wide.
# :::
#
# An AUROC does not show what goes wrong. These are the worst mistakes: per kind the two
# functional cells with the highest scores, and the two defective cells with the lowest.
# Mono and poly cells have a colour scale each, because poly cells score lower.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four rows of two solar cells, each beside the same cell with its map. The upper two rows, mono: two functional cells with scores of 78 and 75 and bright spots in the maps; two defective cells with scores of 25 and 27 and dark maps. The lower two rows, poly: two functional cells with scores of 61 and 54, bright in spots; two defective cells with scores of 21 and 26, maps without a bright spot."}}
fig, panels = plt.subplots(4, 4, figsize=(5.7, 6.9))
for row_of_panels, kind in zip(panels.reshape(2, 4, 2), KINDS, strict=True):
    functional, defective = test_scores[kind].split(75)
    mistakes = [("functional", i) for i in functional.topk(2).indices.tolist()]
    mistakes += [("defective", i) for i in (-defective).topk(2).indices.tolist()]
    low, high = test_scores[kind].min() / 2, test_scores[kind].quantile(0.9)
    limits = (float(low), float(high))
    for (left, right), (part, i) in zip(row_of_panels, mistakes, strict=True):
        part_layers = [layer[i : i + 1] for layer in features[kind][part]]
        anomaly_map = compute_anomaly_maps(part_layers, *statistics[kind])[0]
        image = datasets[kind].images[splits[kind][part][i]]
        viz.panel(left, image, part)
        title = f"score {anomaly_map.max():.1f}"
        companion.draw_map(right, image, anomaly_map, limits, title)
    row_of_panels[0, 0].set_ylabel(kind)
    row_of_panels[2, 0].set_ylabel(kind)
title = "The worst mistakes: functional cells with a bright spot,\n"
fig.suptitle(title + "and defective cells without one")
plt.show()

# %% [markdown]
# Look at the images before you blame the model. The functional mono cells with high
# scores have short dark streaks or a dark dot, which the experts accepted. The
# defective mono cells with low scores show nothing unusual in the image: whatever made
# the experts reject them, PaDiM cannot see it. Some poly cells have two bus bars (the
# dark horizontal lines, which are contacts) and some three, and *one* Gaussian per
# position has to describe both.
#
# ## Where is the defect? Two measures of localisation
#
# The cells have labels, but no *masks*: images that mark the defective pixels. To
# measure **localisation**, defects are painted on functional test cells, so the masks
# are known: dark cracks, bright scratches, soft stains. They are **synthetic**, and are
# labelled as such wherever they appear.
#
# - **Pixel AUROC** is the AUROC over all pixels of all images.
# - **PRO-score** {cite:p}`bergmann2020`, in code `aupro`, is the area under the curve
#   of the *per-region overlap*. For one threshold, this is the share of each connected
#   defective region that is found, averaged over the regions. The score is its mean
#   over false positive rates from 0 to 0.3. The *false positive rate* is the share of
#   normal pixels that are reported as defective.
#
# Imagine two detectors that never raise a false alarm: one finds all stains and nothing
# else, the other all lines (cracks and scratches) and nothing else.
#
# :::{admonition} Predict first
# :class: tip
# Of the 24 defects 10 are stains, and 14 are lines, which cover a fifth as many pixels
# as a stain. Which detector has the higher pixel AUROC, and which the higher PRO-score?
# :::

# %% tags=["hide-input"]
from paperlib.datasets import synthetic_defects

N_PAINTED = 24  # functional test cells with a defect; the next 24 stay unpainted


def paint_defects(kind, contrast):
    """Return images, masks and descriptions of cells with synthetic defects."""
    normal = datasets[kind].images[splits[kind]["functional"][:N_PAINTED]]
    defects = synthetic_defects(normal, contrast=contrast, seed=0, size=image_size)
    items = [defects[i] for i in range(N_PAINTED)]
    images = torch.stack([item.image for item in items])
    masks = torch.stack([item.mask for item in items])
    return images, masks, [item.path for item in items]


# %% tags=["nbval-check-output", "hide-output"]
from paperlib.metrics import aupro, pixel_auroc

images, masks, descriptions = paint_defects("poly", 0.2)
is_stain = torch.tensor(["stain" in description for description in descriptions])
areas = masks.sum((1, 2)).float()
print(f"{is_stain.sum()} stains of {areas[is_stain].mean():.0f} pixels (mean)")
print(f"{(~is_stain).sum()} lines of {areas[~is_stain].mean():.0f} pixels (mean)")
for name, is_found in {"stains only": is_stain, "lines only": ~is_stain}.items():
    maps = (masks & is_found[:, None, None]).float()
    pixel, pro = pixel_auroc(masks, maps), aupro(masks, maps)
    print(f"finds {name:12} pixel AUROC {pixel:.2f}   PRO-score {pro:.2f}")

# %% [markdown]
# - `paint_defects` returns images (24, 3, 224, 224), masks (24, 224, 224) and a text
#   per defect.
# - `masks & is_found[:, None, None]` is the map of the imagined detector: 1 on the
#   defects that it finds, 0 elsewhere. `[:, None, None]` turns (24,) into (24, 1, 1),
#   so that one value per image applies to all its pixels.
#
# :::{dropdown} Answer
# The detector of stains has the higher pixel AUROC, although it misses 14 of 24
# defects: it finds most of the defective *pixels*. The detector of lines has the higher
# PRO-score, because it finds more *defects*: 14 of 24 instead of 10 of 24, or 0.58
# instead of 0.42. (The scores are higher, 0.65 and 0.50, because at a false positive
# rate of 1 everything is found, and the line up to there counts until 0.3: $0.42 + 0.58
# \cdot 0.15 = 0.50$.)
# :::
#
# ## From invisible to obvious: PaDiM on synthetic defects
#
# The *contrast* of a painted defect goes from 0 (nothing changes) to 1 (the defect
# covers what is under it). Type, position and shape stay the same.

# %%
CONTRASTS = {"mono": (0.05, 0.1), "poly": (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)}
unpainted = slice(N_PAINTED, 2 * N_PAINTED)
painted, unpainted_maps = {}, {}
for kind in KINDS:
    layers = [layer[unpainted] for layer in features[kind]["functional"]]
    unpainted_maps[kind] = compute_anomaly_maps(layers, *statistics[kind])
    for contrast in CONTRASTS[kind]:
        images, masks, _ = paint_defects(kind, contrast)
        layers = extract_layers(images)
        maps = compute_anomaly_maps(layers, *statistics[kind])
        painted[kind, contrast] = (images, masks, layers, maps)

# %% [markdown]
# Detection compares the 24 painted cells with 24 unpainted ones. Localisation is
# measured on the pixels of all 48.

# %%
is_painted = torch.arange(2 * N_PAINTED) < N_PAINTED
rows = []
for (kind, contrast), (_, masks, _, maps) in painted.items():
    all_maps = torch.cat([maps, unpainted_maps[kind]])
    all_masks = torch.cat([masks, torch.zeros_like(masks)])
    detection = auroc(is_painted, all_maps.amax((1, 2)))
    localisation = (pixel_auroc(all_masks, all_maps), aupro(all_masks, all_maps))
    rows.append((kind, contrast, detection, *localisation))
columns = ["kind", "contrast", "image AUROC", "pixel AUROC", "PRO-score"]
curves = pd.DataFrame(rows, columns=columns)
print(curves.round(3).to_string(index=False))

# %% tags=["remove-cell"]
stored = random_100.query("seed == 0").set_index("kind")[["pixel", "pro"]]
for kind, contrast in stamp["recipe"]["contrast"].items():
    measured = curves[(curves.kind == kind) & (curves.contrast == contrast)]
    measured = measured[["pixel AUROC", "PRO-score"]].to_numpy(float)
    agrees = np.allclose(measured, stored.loc[kind], atol=0.01)
    run.expect(agrees, "the first seed's localisation is the stored one")

# %% tags=["hide-input"]
first_index = {}  # of each type of defect
for i, description in enumerate(descriptions):
    first_index.setdefault(description.split()[1], i)
peaks = []
for contrast in CONTRASTS["poly"]:
    maps = painted["poly", contrast][3]
    peaks.append(maps.flatten(1).quantile(0.995, 1))
brightest = float(torch.cat(peaks).quantile(0.9))


def draw_defect(ax, defect, contrast):
    images, masks, _, maps = painted["poly", contrast]
    i = first_index[defect]
    heat = viz.heatmap((maps[i] / brightest).clamp(0, 1), "inferno")
    image = images[i].movedim(0, -1).numpy()
    gap = np.ones((image_size, 8, 3), np.float32)
    strip = np.concatenate([image, gap, viz.overlay(heat, image)], 1)
    viz.panel(ax, strip.clip(0, 1))
    pixels = np.arange(image_size)
    outline = {"levels": [0.5], "colors": "white", "linewidths": 0.8}
    ax.contour(pixels + image_size + 8, pixels, masks[i], **outline)


# %% tags=["hide-input"] mystnb={"image": {"alt": "Figure with two sliders, described in the text under it."}}
def describe_defect(defect, contrast):
    _, masks, _, maps = painted["poly", contrast]
    i = first_index[defect]
    inside, outside = maps[i][masks[i]].max(), maps[i][~masks[i]].max()
    return (
        f"A poly cell with a synthetic {defect} of contrast {contrast}, "
        "and PaDiM's map over it with the outline of the mask. "
        f"Highest distance on the {defect}: {inside:.1f}; elsewhere: {outside:.1f}."
    )


sliders = {"synthetic defect": ("crack", "stain"), "contrast": (0.1, 0.2, 0.5)}
companion.Slider(draw_defect, sliders, describe_defect, figsize=(6.4, 3.2), dpi=72)

# %% [markdown]
# On mono cells PaDiM localises defects well at a contrast of 0.1 or more. On poly cells
# the grains hide the defects, and a contrast of 0.3 or more is needed. (Random maps
# reach a pixel AUROC of 0.5 and a PRO-score of 0.15, so the two must not be compared
# with each other.)
#
# ## Table I, measured: layers alone, added, and joint
#
# Table I of the paper is an *ablation*: it removes parts of the method to measure what
# they contribute. It compares each layer alone, the sum of the three layers' maps, and
# the joint covariance of all three, in each case with every channel. Here is the same
# comparison on solar cells: five seeds, mean ± standard deviation in per cent. Pixel
# AUROC and PRO-score are for synthetic defects of a contrast that is hard to see (0.1
# on mono, 0.2 on poly), the image AUROC for real defects. The paper's values are those
# of another network on other data; only the order can be compared.

# %% tags=["hide-input", "ledger:padim-table-1:measured"]
QUOTED_I = {  # pixel AUROC, PRO-score in %: ResNet-18, mean over all MVTec AD classes
    "layer 1": (94.8, 86.8),
    "layer 2": (95.7, 88.5),
    "layer 3": (95.7, 88.3),
    "layers added": (96.0, 89.0),
    "all": (97.1, 90.8),
}
print(f"{'':13}{'mono':27}{'poly':27}the paper")
print(f"{'':12}" + 2 * "   pixel      PRO    image" + "   pixel  PRO")
for method, (quoted_pixel, quoted_pro) in QUOTED_I.items():
    line = f"{method.replace('all', 'joint'):12}"
    for kind in KINDS:
        runs = tables[(tables.method == method) & (tables.kind == kind)]
        for measure in ("pixel", "pro", "image"):
            percent = 100 * runs[measure]
            line += f"{percent.mean():5.1f}±{percent.std():3.1f}"
    print(f"{line}{quoted_pixel:7}{quoted_pro:6}")

# %% tags=["remove-cell"]
mean_pixel = tables.groupby(["kind", "method"]).pixel.mean()
for kind in KINDS:
    rising = mean_pixel[kind][["layer 1", "layer 2", "layer 3", "layers added", "all"]]
    run.expect(rising.is_monotonic_increasing, "each row has a higher pixel AUROC")

# %% [markdown]
# On mono the last two rows are nearly equal: there is little left to gain. On poly the
# standard deviation of several points is larger than their difference, because some
# seeds draw harder cells than others. So compare them seed by seed.
#
# :::{admonition} Predict first
# :class: tip
# The joint covariance uses the same three layers as the sum of the maps. What can it
# describe that the sum cannot? In how many of five seeds is its PRO-score higher on
# poly, where the task is hard?
# :::

# %% tags=["hide-output"]
pro_scores = tables.set_index(["method", "kind", "seed"]).pro.sort_index()
is_better = pro_scores["all"] > pro_scores["layers added"]
print("the joint covariance has a higher PRO-score than the added maps in")
for kind in KINDS:
    print(f"{is_better[kind].sum()} of {len(is_better[kind])} seeds on {kind}")

# %% tags=["remove-cell"]
run.expect(is_better["poly"].mean() > 0.5, "joint is better in most seeds on poly")

# %% [markdown]
# :::{dropdown} Answer
# How the layers vary together: which texture of layer 1 occurs with which shape of
# layer 3. A combination that never occurs is anomalous, although each part is common.
# The vector $b$ of the first example is such a combination. On poly the joint
# covariance is better in all five seeds.
# :::
#
# In pixel AUROC the order is that of the paper, except that layers 2 and 3 tie there.
# In localisation each row is better than the one before. On mono the last step is worth
# at most 0.1 points, on poly one to two.
#
# For real defects the conclusion does not hold: in image AUROC the joint covariance is
# no better than layer 3 alone. A likely reason on poly is that a crack and a grain
# boundary look alike at close range. The first layer responds to such detail, layer 3
# to larger shapes. Table I is about localisation, and so is its conclusion.
#
# ## Table II, measured: random channels against principal components
#
# **Principal component analysis** (PCA) finds orthogonal directions, sorted by the
# variance of the data along them. Table II compares two ways to keep $d$ dimensions:
# $d$ channels drawn at random, or the $d$ principal components with the *largest*
# variance. As a third way, we keep the $d$ components with the *smallest* variance,
# which compression would discard.
#
# :::{admonition} Predict first
# :class: tip
# The 25 largest principal components explain about 70 % of the variance of normal
# embeddings, the 25 smallest less than one per cent. Which of the two localises
# synthetic defects better?
# :::

# %% tags=["hide-input", "hide-output"] mystnb={"image": {"alt": "Two columns, mono and poly, of three line plots against the number of dimensions kept, 10 to 100, with bars of one standard deviation. From top to bottom: image AUROC on real cells, pixel AUROC and PRO-score on synthetic defects, for random channels, principal components of largest and of smallest variance; a dashed line shows all 176 dimensions."}}
companion.draw_reduction_curves(tables)
plt.gcf().suptitle(
    "With 10 dimensions, those of largest variance\n"
    "localise defects worst (lower two rows)"
)
plt.show()

# %% tags=["hide-input", "hide-output", "ledger:padim-table-2:measured"]
DIMENSIONS_KEPT = (10, 25, 50, 100)
keys = ["method", "dimensions", "kind", "seed"]
pro_scores = tables.set_index(keys).pro.sort_index()
gains = 100 * (pro_scores["random"] - pro_scores["PCA"])
print("PRO-score of random channels minus that of PCA, same seed, in points:")
print("mean ± standard deviation")
print("d   " + "".join(f"{d:15}" for d in DIMENSIONS_KEPT))
for kind in KINDS:
    line = kind
    for d in DIMENSIONS_KEPT:
        line += f"{gains[d, kind].mean():+9.1f} ± {gains[d, kind].std():.1f}"
    print(line)
print("the paper, pixel AUROC / PRO-score (quoted):")
print("random 100 96.7 / 90.5, PCA 100 93.5 / 85.7, all 448 97.1 / 90.8")

# %% tags=["remove-cell"]
is_gain = bool((gains[10] > 0).all() and (gains[25] > 0).all())
run.expect(is_gain, "random channels beat PCA in every seed at 10 and 25")

# %% [markdown]
# :::{dropdown} Answer
# The 25 smallest components, where the two differ. They explain hardly any of the
# variance, but localise synthetic defects about as well as the 25 largest on mono, and
# better on poly. Real defects are another matter: with 10 components on poly, the
# largest *detect* them clearly better than the smallest.
# :::
#
# - **In PRO-score random channels beat PCA where few are kept**: on both kinds, and in
#   every seed, at $d = 10$ and $d = 25$. At $d = 50$ and above, the difference is
#   hardly larger than its spread; 50 of 176 is a larger share than the paper's 100 of
#   448.
# - **For real defects this does not hold.** At $d = 10$ PCA has the higher image AUROC
#   in four of five seeds on each kind, and at $d = 25$ and above the two means differ
#   by less than a point.
# - **100 of 176 channels lose little**: next to nothing on mono, one to two points on
#   poly.
#
# Does it matter *which* channels are drawn? The next table is for the cells of one
# split.

# %%
MEASURES = {"image": "image AUROC", "pixel": "pixel AUROC", "pro": "PRO-score"}
draws = measurements.query("experiment == 'draws'")
deviation = 100 * draws.groupby("kind")[list(MEASURES)].std()
print("ten draws of 100 channels, same cells: standard deviation in points")
print(deviation.round(2).rename(columns=MEASURES).to_string(index_names=False))

# %% [markdown]
# It hardly matters: the spread over ten draws is smaller than the spread over splits of
# the cells. (The paper reports a standard error between $10^{-4}$ and $10^{-7}$ for the
# mean of ten models.)
#
# ### Why PCA loses: the change that a defect causes
#
# A painted cell and the same cell unpainted differ only in the defect. So we know
# exactly how a defect changes an embedding, and we can measure the change along each
# principal direction. Directions are sorted by the variance of normal embeddings, the
# largest first.

# %%
images, masks, painted_layers, _ = painted["poly", 0.2]
unpainted_layers = [layer[:N_PAINTED] for layer in features["poly"]["functional"]]
coverage = masks.unfold(1, 4, 4).unfold(2, 4, 4).float().mean((3, 4))
is_on_defect = coverage.flatten(1) > 0.5
changes = (embed(painted_layers) - embed(unpainted_layers))[is_on_defect]

normal = embed(features["poly"]["train"])[:, ::5].flatten(0, 1)  # every fifth position
pooled = PatchGaussian(1, normal.shape[1]).update(normal[:, None])
variance, directions = torch.linalg.eigh(pooled.covariance(epsilon=0)[0])
variance, directions = variance.flip(0), directions.flip(1)  # eigh sorts ascending
energy = (changes @ directions).square().mean(0)

# %% [markdown]
# - `coverage` is the share of defective pixels per position: two calls of `unfold` cut
#   each mask into 56×56 blocks of 4×4 pixels, (24, 56, 56, 4, 4), and `mean` averages a
#   block.
# - `changes` keeps the positions that are more than half defective: one row per
#   position, (n, 176).
# - `pooled` is *one* Gaussian over all positions. `eigh` returns its eigenvalues (the
#   variances) and eigenvectors (the principal directions, one per column).
# - `changes @ directions` expresses each change in principal directions, and `energy`
#   is its mean square along each of them, (176,).

# %%
spectra = {
    "variance of normal embeddings": variance,
    "the defects' change": energy,
    "the change, in standard deviations": energy / variance,
}
shares = {}
print("in the first 25 directions:")
for name, values in spectra.items():
    shares[name] = (100 * values.cumsum(0) / values.sum()).cpu()
    print(f"{shares[name][24]:3.0f} % of {name}")


# %% tags=["hide-input"]
def squared_length(channels):
    """Return the changes' mean squared Mahalanobis length in some of the channels."""
    x, covariance = changes[:, channels].double(), pooled.covariance(epsilon=0)[0]
    inverse = torch.linalg.inv(covariance[channels][:, channels].double())
    return ((x @ inverse) * x).sum(1).mean().item()


n_all, generator = len(variance), torch.Generator().manual_seed(0)
draws_of_25 = [torch.randperm(n_all, generator=generator)[:25] for _ in range(20)]
lengths = [squared_length(draw.to(run.device)) for draw in draws_of_25]
all_channels = torch.arange(n_all, device=run.device)
random_share = 100 * np.mean(lengths) / squared_length(all_channels)
print("of the change in standard deviations:")
print(f"{100 - shares[name][-26]:3.0f} % in the last 25 directions")
print(f"{random_share:3.0f} % in 25 random channels, mean of 20 draws")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Line plot of cumulative shares in percent against the number of principal directions, from 0 to 176, largest variance first. The variance of normal embeddings rises steeply, to 69 % at 25 directions. The defects' change rises more slowly. The change in units of normal standard deviations rises nearly along the diagonal, slowest of the three."}}
for (name, share), style in zip(shares.items(), ("-", "--", ":"), strict=True):
    plt.plot(range(1, len(share) + 1), share, style, label=name)
plt.axvline(25, color="black", lw=1)
title = "25 directions hold 69 % of the variance,\n"
plt.title(title + "but 8 % of the change in standard deviations")
plt.xlabel("principal directions, largest variance first")
plt.ylabel("cumulative share, %")
plt.ylim(0, 102)
plt.legend()
plt.show()

# %% tags=["remove-cell"]
run.expect(bool(variance[-25:].sum() < 0.01 * variance.sum()), "25 smallest below 1 %")
normal_share, _, change_share = shares.values()
is_small = bool(normal_share[24] > 3 * change_share[24])
run.expect(is_small, "the first 25 directions hold little of the change")

# %% [markdown]
# The first 25 directions hold most of the variance of normal cells, and 44 % of what a
# defect changes. But the Mahalanobis distance measures each direction in its own
# standard deviation. In this unit, they hold only 8 % of the change, because it is
# spread almost evenly over all directions. Twenty-five random *channels* keep more of
# it, and the 25 smallest directions most. (This cannot be the whole explanation: the
# smallest directions do not localise better than random channels.)
#
# ## Alignment: what a rotation by 10° does
#
# Each Gaussian belongs to one position. In a rotated cell, a bus bar lies at positions
# where no training cell has one.

# %%
from torchvision.transforms.functional import InterpolationMode, rotate

ANGLES = (0, 1, 2, 4, 7, 10)
upright = mono.images[mono_split["functional"][:8], None].float() / 255
rotated = [rotate(upright, angle, InterpolationMode.BILINEAR) for angle in ANGLES]
rotated_maps = [
    compute_anomaly_maps(extract_layers(images), *statistics["mono"])
    for images in rotated
]
rotated_scores = torch.stack([maps.amax((1, 2)) for maps in rotated_maps])

held_out_maps = compute_anomaly_maps(features["mono"]["held_out"], *statistics["mono"])
held_out_scores = held_out_maps.amax((1, 2))
threshold = held_out_scores.quantile(0.98).item()

# %% [markdown]
# - `rotated_scores` has one row per angle and one column per cell, (6, 8).
# - `held_out` are 50 functional cells that were not used to fit. Their 98 % *quantile*,
#   the value that 98 % of their scores do not exceed, is the threshold in the figure.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: line plot of the score of eight functional mono cells against the angle by which they are turned, from 0 to 10 degrees; the median rises with the angle, past the line of the threshold. Below: a cell turned by 10 degrees with its map, dark in the middle of its stripes, brighter along the bus bars and brightest at the border."}}
layout = {"figsize": (5.6, 6.6), "height_ratios": [1, 1.2]}
_, (upper, lower) = plt.subplots(2, 1, **layout, gridspec_kw={"hspace": 0.06})
median = rotated_scores.median(1).values
label = "median of eight functional cells"
upper.plot(ANGLES, rotated_scores, color=viz.SKY, lw=1)
upper.plot(ANGLES, median, "o-", color=viz.BLUE, label=label)
label = "98 % of upright functional cells are below"
upper.axhline(threshold, ls="--", color="black", label=label)
upper.set(xlabel="rotation, degrees", ylabel="score", ylim=(0, None))
upper.set_title("At 1° or more, every rotated functional cell is a false alarm")
upper.legend()
limits = (threshold / 2, float(rotated_scores[-1].max()))
title = "the first cell, rotated by 10°"
companion.draw_map(lower, rotated[-1][0, 0], rotated_maps[-1][0], limits, title)
plt.show()

# %% tags=["remove-cell"]
exceeds = bool(rotated_scores[1:].min() > threshold)
run.expect(exceeds, "every rotated cell is an alarm")

# %% [markdown]
# A model of upright cells is useless for rotated ones: at 1° or more, all eight raise
# an alarm. (One of them does so even upright: it is the one with the score 64.) The
# fair comparison is the paper's Rd-MVTec AD: the *training* images are rotated as well
# (by up to ±10°, and cropped at a random position). A rotation is then normal, but each
# Gaussian describes many different parts of the cell, so it is wide.

# %% tags=["hide-input", "ledger:padim-table-6:measured"]
CROPS = {"upright": "centre crop", "turned": "rotated, random crop"}
print("mean ± standard deviation over five seeds, %")
print(f"{'':28}image AUROC  pixel AUROC    PRO-score")
print(f"{'':27}real defects    synthetic    synthetic")
for kind in KINDS:
    kind_runs = measurements[measurements.kind == kind]
    for experiment, crop in CROPS.items():
        runs = kind_runs[kind_runs.experiment == experiment]
        line = f"{kind} {crop:22}"
        for measure in MEASURES:
            percent = 100 * runs[measure]
            line += f"{percent.mean():7.1f} ± {percent.std():.1f}"
        print(line)
print("the paper, WR50, pixel AUROC / PRO-score (quoted):")
print("97.5 / 92.1 on MVTec AD, 92.2 / 73.1 on Rd-MVTec AD")

# %% [markdown]
# - **Detection** suffers on both kinds: borders and bus bars can now lie anywhere, and
#   the largest value of a map often lies on one of them.
# - **Localisation on mono** loses three points of PRO-score and half a point of pixel
#   AUROC: the paper's pattern, smaller.
# - **Localisation on poly** loses about one point, which is less than the difference
#   between two seeds. The grains were never aligned, so there was little to lose.
#
# ## What it costs: PaDiM and nearest neighbours, image by image
#
# SPADE {cite:p}`cohen2020` stores the embeddings of all normal images and searches for
# the nearest one (*k-nearest neighbours*, k-NN). Its memory is the training set;
# PaDiM's memory is a fixed number of Gaussians. Both are measured in one run, for a
# growing number of images. The search is exact. It is timed for 256 of the 3,136
# positions of one image, and the times shown are scaled up to all of them.
#
# :::{admonition} Predict first
# :class: tip
# 100 channels at 56×56 positions, 4 bytes per number. How many megabytes are the means
# and covariances? One image's three layers (24·56² + 40·28² + 112·14² numbers) take
# half a megabyte. How many images does it take before the search needs more memory?
# :::

# %%
from paperlib.neighbors import nearest_distance

query = embed([layer[:1] for layer in features["mono"]["defective"]])[0]
generator = torch.Generator().manual_seed(0)
timed_positions = torch.randperm(len(query), generator=generator)[:256]


def factorise(gaussian):
    return gaussian.mean(), torch.linalg.cholesky(gaussian.covariance())


def measure_costs(n_images):
    """Return seconds of PaDiM, seconds of a search, and PaDiM's megabytes."""
    layers = [layer[:n_images] for layer in train_layers]
    embeddings = embed(layers, detector.channels)
    empty = PatchGaussian(*embeddings.shape[1:])
    gaussian, fit_time = companion.call_and_time(empty.update, embeddings)
    factors, factor_time = companion.call_and_time(factorise, gaussian)
    selected = query[None, :, detector.channels]
    _, score_time = companion.call_and_time(mahalanobis_distance, selected, *factors)
    bank, queries = embed(layers).flatten(0, 1), query[timed_positions]
    _, search_time = companion.call_and_time(nearest_distance, queries, bank)
    search_time *= len(query) / len(queries)
    megabytes = sum(tensor.nbytes for tensor in factors) / 1e6
    return fit_time, factor_time, score_time, search_time, megabytes


# %% [markdown]
# - `query` are the embeddings of one new image, (3136, 176).
# - `bank` holds one row per position of each normal image, (n_images · 3136, 176).
#   `nearest_distance` compares each query with every row. To keep the search simple,
#   `bank` repeats the values of the coarse layers, 2.2 MB per image. The memory below
#   counts what has to be stored: each layer on its own grid, 0.51 MB per image.
# - `factors` are PaDiM's means and Cholesky factors. Their size does not depend on
#   `n_images`.

# %% tags=["hide-output", "ledger:padim-table-7:measured"]
bytes_per_image = sum(layer[0].nbytes for layer in train_layers)
gaussian_bytes = sum(tensor.nbytes for tensor in statistics["mono"])
rows = [
    (n, *measure_costs(n), n * bytes_per_image / 1e6) for n in (20, 40, 80, 150)
]
columns = ["images", "fit, s", "factors, s", "score, s", "search, s"]
columns += ["PaDiM, MB", "k-NN, MB"]
costs = pd.DataFrame(rows, columns=columns)
print(costs.round(3).to_string(index=False))
print(f"equal memory at {gaussian_bytes / bytes_per_image:.0f} images")

# %% tags=["remove-cell"]
assert (costs["PaDiM, MB"] == gaussian_bytes / 1e6).all()

# %% tags=["hide-input", "hide-output"] mystnb={"image": {"alt": "Three line plots against the number of normal images, 20 to 150. Upper left, PaDiM's fit: the seconds for means and covariances rise with the number of images, those for the Cholesky factors stay the same. Upper right, seconds per image to score: PaDiM's are low and flat, those of the search rise with the number of images. Below, memory in megabytes: PaDiM's is flat at 127, that of nearest neighbours is a line through zero that is extended to where it crosses, at 246 images."}}
companion.draw_costs(costs, gaussian_bytes, bytes_per_image)
plt.gcf().suptitle("PaDiM's scoring time and memory do not grow with more images")
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# $4 \cdot 3136 \cdot (100^2 + 100)$ bytes are 127 MB. The layers of one image take
# 0.514 MB, so the search needs more memory for 247 images or more.
# :::
#
# - **Fitting** takes a fixed time per image, plus a fixed time for the 3,136 Cholesky
#   factors.
# - **Scoring** an image takes PaDiM the same time for any $N$. The time of the search
#   grows with $N$. SPADE searches only in the K nearest images, which limits the time,
#   but not the memory.
# - **Memory**: beyond the crossing PaDiM stores less, for any number of images.
#
# ### Table VIII, computed
#
# This section repeats the arithmetic for the paper's networks. Nothing is measured
# here: the sizes follow from the shapes.

# %%
from torchvision import models

NETWORK_NAMES = {"R18": "resnet18", "WR50": "wide_resnet50_2"}
network_gb = {}
for name, torchvision_name in NETWORK_NAMES.items():
    with torch.device("meta"):  # shapes only
        network = models.get_model(torchvision_name)
    network_gb[name] = 4 * sum(p.numel() for p in network.parameters()) / 1e9


def gaussian_gb(side, dimensions):
    return 4 * side**2 * (dimensions**2 + dimensions) / 1e9


def spade_gb(side, n_images):
    """Count the three layers of WR50, each with its own resolution."""
    numbers = 256 * side**2 + 512 * (side // 2) ** 2 + 1024 * (side // 4) ** 2
    return 4 * n_images * numbers / 1e9


# %% tags=["hide-input", "nbval-check-output", "ledger:padim-table-8:paper-number"]
QUOTED_VIII = [  # model and data, side of the map, network, dimensions, the paper's GB
    ("R18-Rd100, MVTec", 56, "R18", 100, 0.17),
    ("R18-Rd100, STC", 64, "R18", 100, 0.21),
    ("WR50-Rd550, MVTec", 56, "WR50", 550, 3.8),
    ("WR50-Rd550, STC", 64, "WR50", 550, 5.2),
]
print("GB                    ours   with the network   the paper")
for name, side, network_name, dimensions, quoted in QUOTED_VIII:
    alone_gb = gaussian_gb(side, dimensions)
    total_gb = alone_gb + network_gb[network_name]
    print(f"{name:20} {alone_gb:5.2f} {total_gb:13.2f} {quoted:15}")
    tolerated = 0.005 if dimensions == 100 else 0.05
    assert min(abs(alone_gb - quoted), abs(total_gb - quoted)) < tolerated
alone_gb = spade_gb(56, 242)
total_gb = alone_gb + network_gb["WR50"]
print(f"SPADE, MVTec, 242   {alone_gb:6.2f} {total_gb:13.2f} {1.4:15}")

# %% tags=["remove-cell"]
assert abs(alone_gb - 1.4) < 0.05

# %% [markdown]
# `R18-Rd100` means ResNet-18 with 100 channels drawn at random. STC, the ShanghaiTech
# Campus data set, consists of video frames. We obtain the paper's values if WR50's 3.8
# GB and SPADE's 1.4 GB do not include the network, and PaDiM's other three values do.
# (MVTec AD has 3,629 training images in 15 classes: 242 per class.)
#
# How many images does it take before SPADE stores more, and how many frames fit into
# the 37 GB that the paper reports for SPADE on STC?

# %% tags=["nbval-check-output"]
crossing_r18 = np.ceil(gaussian_gb(56, 100) / spade_gb(56, 1))
crossing_wr50 = np.ceil(gaussian_gb(56, 550) / spade_gb(56, 1))
print(f"SPADE stores more than R18-Rd100 for {crossing_r18:.0f} images or more")
print(f"SPADE stores more than WR50-Rd550 for {crossing_wr50:.0f} images or more")
n_frames = 274515 / 13  # per scene of STC
print(f"SPADE's 37 GB on STC hold {37 / spade_gb(64, 1):,.0f} frames")
print(f"all {n_frames:,.0f} would be {spade_gb(64, n_frames):.0f} GB")

# %% [markdown]
# A scene has four times as many frames, so only a part of them can have been stored.
#
# ## PaDiM and Patch SVDD on the same images
#
# Chapter 4 ends with detectors for the same cells. Its stored results include the
# AUROC of 40 functional cells, on which no encoder was trained, and 40 defective ones;
# 60 other functional cells are the bank. Here PaDiM is fitted to those 60 and scores
# those 80. The times are measured for both, networks included: fitting 60 images, and
# scoring one.
#
# :::{admonition} Predict first
# :class: tip
# One encoder was trained on functional solar cells (chapter 4), the other on ImageNet,
# without a single solar cell. Which one separates defective from functional cells
# better?
# :::

# %% tags=["hide-input"]
patch_svdd_auroc = {}
for result in companion.read_result("patch_svdd_cells")["runs"]:
    if result["seed"] == 0:
        patch_svdd_auroc[result["name"]] = result["auroc"]
padim_auroc = {}
for kind in KINDS:
    fit_layers = [layer[40:100] for layer in features[kind]["train"]]
    pairs = zip(features[kind]["train"], features[kind]["defective"], strict=True)
    # In this comparison, the first 40 cells of "train" are for the test.
    test_layers = [torch.cat([normal[:40], broken[:40]]) for normal, broken in pairs]
    statistics_60 = fit_gaussian(embed(fit_layers, detector.channels))
    scores = compute_anomaly_maps(test_layers, *statistics_60).amax((1, 2))
    padim_auroc[kind] = auroc(torch.arange(80) >= 40, scores)

# %% tags=["hide-input", "hide-output"]
ENCODERS = {"random": "random encoder", "committed": "trained on cells"}
print("image AUROC, 80 cells, split 0       mono    poly")
for name, label in ENCODERS.items():
    mono_auroc = patch_svdd_auroc[name]["mono image mult"]
    poly_auroc = patch_svdd_auroc[name]["poly image mult"]
    print(f"{'Patch SVDD, ' + label:32} {mono_auroc:8.3f} {poly_auroc:7.3f}")
mono_auroc, poly_auroc = padim_auroc["mono"], padim_auroc["poly"]
print(f"{'PaDiM, trained on ImageNet':32} {mono_auroc:8.3f} {poly_auroc:7.3f}")

# %% tags=["remove-cell"]
for kind in KINDS:
    others = [patch_svdd_auroc[name][f"{kind} image mult"] for name in ENCODERS]
    run.expect(padim_auroc[kind] > max(others), "PaDiM has the higher AUROC")

# %% tags=["hide-output"]
from paperlib.datasets import TensorItems
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD

encoder_file = companion.result_file("patch_svdd_cells.safetensors")
encoder = HierarchicalEncoder.load(encoder_file).to(run.device)
images = train_images[:61]  # 60 to fit, one to score
padim_inputs = [prepare(image) for image in images.split(1)]
resized = [item.image for item in TensorItems(images, size=256)]
svdd_inputs = torch.stack(resized).to(run.device)

padim, patch_svdd = PaDiM(extractor, 100), PatchSVDD(encoder, stride_small=8)
_, padim_fit = companion.call_and_time(padim.fit, padim_inputs[:60])
_, padim_score = companion.call_and_time(padim.anomaly_map, padim_inputs[60])
_, svdd_fit = companion.call_and_time(patch_svdd.fit, svdd_inputs[:60])
_, svdd_score = companion.call_and_time(patch_svdd.anomaly_maps, svdd_inputs[60:])
print("seconds              fit 60   score 1")
print(f"PaDiM             {padim_fit:9.2f} {padim_score:9.3f}")
print(f"Patch SVDD        {svdd_fit:9.2f} {svdd_score:9.3f}")

# %% [markdown]
# :::{dropdown} Answer
# The one trained on ImageNet, clearly, on these cells. It learned to distinguish a
# thousand classes, so its features describe many kinds of pattern. PaDiM is also
# faster, because it compares a position with one Gaussian instead of every patch of the
# bank.
# :::
#
# These are one kind of image, one split and small encoders. Patch SVDD does not need a
# pretrained network. Where no suitable one exists (other wavelengths, other sensors, a
# licence that forbids its use), only Patch SVDD can be used.
#
# ## The threshold: an AUROC does not provide one
#
# A factory needs a number above which a part is rejected. Common implementations choose
# the threshold with the best **F1** *on the labelled test set*. F1 is $2 \cdot
# \text{hits} / (\text{hits} + \text{alarms} + \text{defects})$, where *hits* are
# defective parts above the threshold and *alarms* are functional ones. This method
# needs defects, and shows how good a threshold could be with hindsight. Without
# defects, one uses a quantile of normal scores. But of *which* normal images?
#
# :::{admonition} Predict first
# :class: tip
# Take the 98 % quantile of the scores of the 150 *training* cells as the threshold.
# What share of new functional cells will be above it: 2 %, or something else?
# :::

# %%
from paperlib.metrics import best_threshold
from paperlib.padim import leave_one_out_distance

train_distances = mahalanobis_distance(embeddings, *statistics["mono"])
train_distances = train_distances.unflatten(1, train_layers[0].shape[2:])
left_out_distances = leave_one_out_distance(train_distances, len(train_distances))
functional_scores, defective_scores = test_scores["mono"].split(75)
score_groups = {
    "fitted": upsample_and_blur(train_distances).amax((1, 2)),
    "leave-one-out": upsample_and_blur(left_out_distances).amax((1, 2)),
    "held out": held_out_scores,
    "test, functional": functional_scores,
    "test, defective": defective_scores,
}
thresholds = {
    f"98 % of {name}": score_groups[name].quantile(0.98).item()
    for name in ("fitted", "leave-one-out", "held out")
}
f1_threshold, _ = best_threshold(is_defective, test_scores["mono"])
thresholds["best F1 on the test set"] = f1_threshold

# %% [markdown]
# - **fitted**: the scores of the 150 cells to which the Gaussians were fitted.
# - **leave-one-out**: the same cells, but each one scored as if it had been left out
#   of the fit. `leave_one_out_distance` computes this from the distance alone.
# - **held out**: 50 other functional cells, kept back for the threshold.

# %% tags=["hide-input", "hide-output"] mystnb={"image": {"alt": "Five rows of points along the axis of scores: training cells lie lowest and close together; the same cells, each as if left out, lie from 15 to 80, one at 128; functional cells that were held back and functional test cells lie in the same range; defective cells from 25 to 150. Vertical lines mark the thresholds: 12 for 98 % of the fitted cells, 50 for the best F1, 63 for those held back, 80 for those left out."}}
plt.figure(figsize=(6.4, 4.8))
for row, scores in enumerate(score_groups.values()):
    jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(scores))
    plt.plot(scores, -row + jitter, ".", ms=4)
styles = (":", "--", "-", "-.")
for (name, score), style in zip(thresholds.items(), styles, strict=True):
    plt.axvline(score, color="black", ls=style, lw=1.5, label=name)
plt.yticks([-row for row in range(len(score_groups))], list(score_groups))
plt.title("Fitted cells score far below new functional ones")
plt.xlabel("score")
plt.xlim(0, None)
plt.gcf().legend(ncols=2, loc="outside upper center")
plt.show()

# %% tags=["hide-input", "hide-output"]
print("threshold                   value    false alarms   defects found     F1")
for name, score in thresholds.items():
    reaches = torch.ge if name.startswith("best") else torch.gt
    alarms, hits = reaches(functional_scores, score), reaches(defective_scores, score)
    alarm_rate, hit_rate = alarms.float().mean(), hits.float().mean()
    f1 = 2 * hits.sum() / (hits.sum() + alarms.sum() + len(hits))
    print(f"{name:25} {score:8.1f} {alarm_rate:13.0%} {hit_rate:15.0%} {f1:8.2f}")

# %% tags=["remove-cell"]
held_out_images = mono.images[mono_split["held_out"]]
library_threshold = detector.normal_threshold(prepare_batches(held_out_images), 0.98)
assert abs(library_threshold / thresholds["98 % of held out"] - 1) < 1e-3
is_alarm = (functional_scores > thresholds["98 % of fitted"]).float()
run.expect(bool(is_alarm.min() == 1), "every functional test cell is an alarm")


# %% [markdown]
# :::{dropdown} Answer
# All of them. A cell that was used to fit a Gaussian cannot be farther from it than
# $(N - 1)/\sqrt N = 12.2$, whatever it looks like. With 100 dimensions for 150 cells,
# nearly all cells come close to this bound.
# :::
#
# There are two remedies.
#
# - **Hold cells out.** With 50 of them, a 98 % quantile depends on one or two cells, so
#   the share of false alarms is partly luck.
# - **Leave one out.** A formula corrects each training cell's distance to what it would
#   be without this cell in the fit. No Gaussian is fitted again, and all 150 cells are
#   used: `normal_threshold(…, fitted=True)` in `PaDiM`.
#
# Here, the first gives 7 % false alarms and the second 0 %, instead of the 2 % that
# were asked for: one cell alone scores 128 when it is left out. With so few cells, a
# 98 % quantile is uncertain.
#
# The best F1 is higher than what either of them reaches. This is the advantage of
# hindsight.
#
# ## Data leakage: scores scaled over the test set
#
# *Min-max scaling* maps the smallest value to 0 and the largest to 1. Common
# implementations scale all maps by the minimum and maximum *of the test set*, and then
# report a defect "above 0.5". AUROC and best F1 do not change, because the order does
# not change. But what does 0.5 mean?

# %%
def scale(scores):  # as in the common implementations
    return (scores - scores.min()) / (scores.max() - scores.min())


all_scores = test_scores["mono"]
mild_scores = all_scores[all_scores < all_scores.quantile(0.9)]
test_sets = {"the whole test set": all_scores, "without its worst tenth": mild_scores}
middles = [(scores.min() + scores.max()) / 2 for scores in test_sets.values()]
between = sum(middles) / 2
score = all_scores[(all_scores - between).abs().argmin()].item()
print(f"the score of one cell: {score:.1f}, whichever cells are tested with it")
for name, scores in test_sets.items():
    scaled, n_cells = scale(scores), len(scores)
    value, n_above = scaled[(scores - score).abs().argmin()], (scaled > 0.5).sum()
    print(f"{name:23}  scaled {value:.2f}, above 0.5: {n_above} of {n_cells} cells")

# %% tags=["remove-cell"]
scaled_scores = []
for scores in test_sets.values():
    scaled_scores.append(scale(scores)[(scores - score).abs().argmin()])
is_flipped = bool((scaled_scores[0] > 0.5) != (scaled_scores[1] > 0.5))
run.expect(is_flipped, "the cell passes in one test set and fails in the other")
scaled_auroc = auroc(is_defective, scale(all_scores))
assert abs(scaled_auroc - auroc(is_defective, all_scores)) < 1e-6

# %% [markdown]
# - `test_sets` holds the same scores twice, the second time without the highest tenth.
# - `score` is the score closest to `between`, a value between the middles of the two
#   ranges of scores: min-max scaling maps a middle to 0.5.
#
# The same cell passes or fails depending on which other cells were tested. On a
# production line, tomorrow's parts are not known yet. Scale maps for display if you
# must, but never for a decision.
#
# ## MVTec AD, if you have it
#
# The paper's data is free for non-commercial research, but not part of this book.
# Download it from MVTec, unpack it, and set `MVTEC_AD` in the environment (or `MVTEC`
# below) to the folder that contains `bottle`, `cable` and the other classes. The code
# below then fits and scores each class, and prints the results beside the paper's.

# %%
import os
from pathlib import Path

from paperlib.datasets import categories
from paperlib.padim import evaluation

MVTEC = os.environ.get("MVTEC_AD")  # or the path of the folder
if MVTEC is None:
    print("MVTEC_AD is not set: nothing was run")
else:  # finished classes are not run again
    settings = evaluation.Settings(
        MVTEC, NETWORK, "default", DIMENSIONS[NETWORK], 0, "centered"
    )
    evaluated = evaluation.run(
        settings,
        categories(MVTEC),
        backbone,
        runtime.checkpoint_folder() or Path("padim-results"),
        batch_size=batch_size,
        pictures=False,
        progress=True,
    )
    print(evaluation.report(evaluated))

# %% [markdown]
# The command `python -m paperlib evaluate --data FOLDER --backbone efficientnet_lite0`
# does the same; its default is the paper's ResNet-18, whose weights it downloads. It
# also saves images with their maps, and resumes after an interruption.
#
# ## Claimed and measured
#
# The claims are the paper's, about MVTec AD with ResNet-18 or WR50. The measurements
# are from solar cells with EfficientNet-Lite0, over five seeds, with 100 random
# channels unless stated otherwise.

# %% tags=["hide-input"]
JOINT, ADDED = ("tables", "all", 176), ("tables", "layers added", 0)
RANDOM, PCA = ("tables", "random", 100), ("tables", "PCA", 100)
SPADE = ("neighbours", "nearest neighbours", 176)
TURNED, UPRIGHT = ("turned", "random", 100), ("upright", "random", 100)
CLAIMS = [  # claim, measure, the paper's difference in points, what to compare
    ("joint covariance over added maps", "pixel", 97.1 - 96.0, JOINT, ADDED),
    ("joint covariance over added maps", "pro", 90.8 - 89.0, JOINT, ADDED),
    ("all channels over 100 random ones", "pixel", 97.1 - 96.7, JOINT, RANDOM),
    ("100 random channels over PCA", "pixel", 96.7 - 93.5, RANDOM, PCA),
    ("100 random channels over PCA", "pro", 90.5 - 85.7, RANDOM, PCA),
    ("PaDiM over k-NN", "image", 95.3 - 85.5, RANDOM, SPADE),
    ("PaDiM over k-NN", "pixel", 97.5 - 96.5, RANDOM, SPADE),
    ("k-NN over PaDiM (objects)", "pro", 93.4 - 91.6, SPADE, RANDOM),
    ("aligned over rotated", "pixel", 97.5 - 92.2, UPRIGHT, TURNED),
    ("aligned over rotated", "pro", 92.1 - 73.1, UPRIGHT, TURNED),
]

# %% tags=["hide-input", "ledger:padim-table-5:measured"]
keys = ["kind", "experiment", "method", "dimensions", "seed"]
percent_by_key = 100 * measurements.set_index(keys)[list(MEASURES)].sort_index()
print(f"{'difference in points':46}paper   {'mono':16}poly")
for claim, measure, quoted, better, worse in CLAIMS:
    line = f"{claim:34}{MEASURES[measure]:11}{quoted:+6.1f}"
    for kind in KINDS:
        percent = percent_by_key[measure][kind]
        difference = percent[better] - percent[worse]  # seed by seed
        wins = f"({(difference > 0).sum()} of {len(difference)})"
        line += f"{difference.mean():+7.2f} {wins}"
    print(line)

# %% [markdown]
# The number of seeds in which the difference has the paper's sign is in brackets.
# *k-NN* is our own version of SPADE: the ten nearest cells by the mean of the last
# layer, then the nearest embedding in them. The score of a cell is its mean distance to
# those ten.
#
# - **In every seed of both kinds** PaDiM detects better than k-NN.
# - **In every seed on poly**, where the task is hard, the joint covariance is better
#   than the added maps, and all 176 channels are better than 100. **In every seed on
#   mono**, rotated cells lose pixel AUROC and PRO-score.
# - **In no other comparison do all seeds agree.** On mono everything is close to its
#   maximum. 100 of 176 channels are too many to separate a random choice from PCA (with
#   25 they differ, see above). And SPADE's higher PRO-score on objects does not appear
#   here.
#
# None of this confirms or refutes the paper's numbers: they are those of another
# network on other data.
#
# ### The paper's own arithmetic
#
# The paper's tables can be compared with each other without any data. A difference of
# less than 0.1 may come from rounding, and counts as agreement.

# %% tags=["hide-input", "nbval-check-output"]
SPADE_AUROC = [  # Table III, all classes
    97.5, 93.7, 97.6, 87.4, 88.5, 98.4, 97.2, 99.0,
    99.1, 98.1, 96.5, 98.9, 97.9, 94.1, 96.5,
]
mean_spade_auroc = sum(SPADE_AUROC) / 15
mean_r18_pro = (5 * 91.3 + 10 * 89.4) / 15  # 5 textures and 10 objects
CHECKS = [  # name, printed, what follows from the printed numbers
    ("Table I, layer 3, AUROC over all classes", 95.7, (5 * 94.8 + 10 * 97.1) / 15),
    ("Table II, Rd 100, PRO-score over all classes", 90.5, mean_r18_pro),
    ("Table III, SPADE, AUROC over all classes", 96.5, mean_spade_auroc),
    ("Table III, R18-Rd100, PRO-score, all classes", 90.1, mean_r18_pro),
    ("Table IV, margin over SPADE on STC", 2.1, 91.2 - 89.9),
    ("Table V, least margin of EfficientNet-B5", 2.6, 97.9 - 95.8),
    ("Table VI, loss of SPADE", 8.8, 96.5 - 87.2),
    ("Table VI, loss of PaDiM-WR50-Rd550", 5.3, 97.5 - 92.2),
]
print(f"{'':44}printed  computed")
for name, printed, computed in CHECKS:
    follows = abs(printed - computed) < 0.1
    note = "" if follows else "  does not follow"
    print(f"{name:45} {printed:5.1f} {computed:9.2f}{note}")
    assert follows == ("R18-Rd100" in name or "WR50" in name)

# %% [markdown]
# SPADE's loss of 8.8 in Table VI does follow from the mean of its classes:
# 96.0 − 87.2 = 8.8.
#
# ## Where it fails

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four solar cells in two rows, each with its map, in one colour scale. A functional cell at 0.7 times its brightness: dark, it passes. The same moved by 15 pixels to the side: bright stripes at the left and right edge, an alarm. A functional poly cell given to the model of mono cells: bright all over, an alarm. A defective cell whose map is dark: it passes."}}
cell = mono.images[mono_split["functional"][2:3], None].float() / 255
poly_index = splits["poly"]["functional"][:1]
missed_index = mono_split["defective"][defective_scores.argmin()]
cases = {
    "functional, darker": 0.7 * cell,
    "functional, moved by 15 pixels": cell.roll(15, 3),
    "functional, another product": datasets["poly"].images[poly_index, None] / 255,
    "defective": mono.images[missed_index][None, None] / 255,
}
fig, panels = plt.subplots(2, 2, figsize=(5.8, 6.4))
for ax, (case, image) in zip(panels.flat, cases.items(), strict=True):
    anomaly_map = compute_anomaly_maps(extract_layers(image), *statistics["mono"])[0]
    score = anomaly_map.max().item()
    title = f"{case}\n{score:.0f}: {'alarm' if score > threshold else 'passes'}"
    limits = (0, 2 * threshold)
    overlay = companion.draw_map(ax, image[0, 0], anomaly_map, limits, title)
fig.colorbar(overlay, ax=panels, label="distance", shrink=0.9, extend="max")
fig.suptitle("Two false alarms, and one defect that passes")
plt.show()
print(f"threshold {threshold:.0f}: 98 % of the held-out cells are below")

# %% [markdown]
# - **A part that has moved** raises an alarm along the edges that moved. So does a
#   rotated part.
# - **Another product**, or a second variant of the same product, raises an alarm
#   everywhere. Fit one model per variant.
# - **A darker image** passes here, with nearly the same score as the unchanged one (32
#   and 33), because the training cells differ in brightness. A change in a property
#   that does not vary among the normal images would raise an alarm.
# - **A defect to which these layers do not respond** is not found, however many normal
#   images there are.
#
# ## Your own folder
#
# PaDiM needs a folder with a subfolder `normal` and, if you have abnormal images, a
# subfolder `abnormal`. By default the first block writes a few solar cells to files, so
# that the code starts from a folder, as you would.

# %%
import tempfile

from PIL import Image

# Or the path of a folder (or its zip) with a folder `normal`, and perhaps `abnormal`:
FOLDER = None
folder_path, is_default_folder = FOLDER, FOLDER is None
if is_default_folder:
    temporary = tempfile.TemporaryDirectory()
    folder_path = temporary.name
    parts = {
        "normal": mono_split["held_out"],
        "abnormal": mono_split["defective"][:10],
    }
    for name, indices in parts.items():
        Path(folder_path, name).mkdir()
        for i in indices.tolist():
            path = Path(folder_path, name, f"{i:04}.png")
            Image.fromarray(mono.images[i].numpy()).save(path, compress_level=1)

# %%
from torch.utils.data import Subset

from paperlib.datasets import batches, folder, open_folder

dataset = folder(open_folder(folder_path))  # the normal images come first
n_normal = sum(sample.label == 0 for sample in dataset.samples)

own_detector = PaDiM(extractor, DIMENSIONS[NETWORK], transform=backbone.transform)


def read_batches(start, stop):
    for batch in batches(Subset(dataset, range(start, stop)), batch_size):
        yield own_detector.prepare(batch)


own_detector.fit(read_batches(0, n_normal))
own_threshold = own_detector.normal_threshold(
    read_batches(0, n_normal), 0.95, fitted=True
)

# %% [markdown]
# - All normal images are used to fit, and again for the threshold, with `fitted=True`:
#   each is scored as if it had been left out.
# - `read_batches` is a generator: it reads a batch of files when it is needed, so the
#   images never have to fit into memory together.
# - `normal_threshold` is the 95 % quantile of these scores.

# %%
path = Path(tempfile.mkdtemp(), "detector.safetensors")  # or a permanent folder
own_detector.save(path)
loaded = PaDiM.load(path, extractor)
for images in read_batches(n_normal, len(dataset)):
    scores = loaded.score(images)
    torch.testing.assert_close(scores, own_detector.score(images))
    for own_score in scores.tolist():
        print(f"{own_score:.0f}", "alarm" if own_score > own_threshold else "passes")
megabytes = path.stat().st_size / 1e6
print(f"threshold {own_threshold:.0f}")
print(f"fitted {n_normal} images, saved {megabytes:.0f} MB, loaded: the same scores")

# %% [markdown]
# The scores are several times those of the other sections: 50 images vary in at most 49
# of the 100 dimensions, and in the others the variance is only $\epsilon$. Scores of
# different fits are not comparable; each has its own threshold.
#
# The file has half of the 127 MB, because it stores one triangle of each factor.
# `PaDiM.load(path)` works from the path alone for networks that the library knows by
# name. The file also stores how images are prepared: `loaded.prepare("cell.png")`
# returns the batch that `loaded.score` expects. It is a safetensors file, which holds
# only tensors and text. Common implementations save the statistics as a *pickle*, and
# loading a pickle can run any code that it contains.
#
# ## Exercises
#
# Each check tells you what is wrong without revealing the answer. Replace the dots with
# your answer: a number, or the name of a function that you define above the check. The
# checks judge what an answer returns, not how: they also accept a loop where the text
# asks for none. The solutions are hidden below each group of exercises.
#
# **Warm-up (5 minutes).**
#
# **1.** How many megabytes (a million bytes) does PaDiM store for $d = 50$ on a grid of
# 28×28 positions, in float32 (4 bytes per number)? Count means and covariances; the
# network does not count.
#
# **2.** $\Sigma$ is diagonal with variances 4 and 0.25, and $x - \mu = (4, 1)$. What is
# the Mahalanobis distance?

# %% tags=["exercise"]
from paperlib.exercises import padim as check

done = check.stored_megabytes(...)

# %% tags=["exercise"]
done = check.distance_by_hand(...)

# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
assert check.stored_megabytes(4 * 28 * 28 * (50 * 50 + 50) / 1e6)
assert check.distance_by_hand((4**2 / 4 + 1**2 / 0.25) ** 0.5)

# %% [markdown]
# **Core (20 minutes).**
#
# **3.** Write `f(maps)`: concatenate a list of any number of feature maps (N, C, h, w)
# on the grid of the first one, which is the largest. Repeat the values of the others.
# All grids are square, and their sides divide that of the first. `F.interpolate` is one
# way; try another one.
#
# **4.** Write `f(x, epsilon)`, Eq. 1 for all positions without a loop over them (the
# check cannot see whether there is one). `x` is (N, P, D), the result (P, D, D).
#
# **5.** Write `f(scores, rate)`: from the scores of normal images, return a threshold
# that a share `rate` of them exceeds.
#
# **6.** ResNet-18 returns 64, 128 and 256 channels at 56×56, 28×28 and 14×14 positions.
# What is the smallest number of images for which storing all three layers of every
# image, each on its own grid, takes more memory than storing PaDiM's means and
# covariances with $d = 100$?

# %% tags=["exercise"]
done = check.embedding_function(...)

# %% tags=["exercise"]
done = check.covariance_function(...)

# %% tags=["exercise"]
done = check.threshold_function(...)

# %% tags=["exercise"]
done = check.crossover(...)


# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
def stack(maps):
    side = maps[0].shape[-1]
    enlarged = []
    for layer in maps:
        factor = side // layer.shape[-1]
        enlarged.append(layer.repeat_interleave(factor, 2).repeat_interleave(factor, 3))
    return torch.cat(enlarged, 1)


def eq_1(x, epsilon):
    centred = x - x.mean(0)
    products = torch.einsum("npi,npj->pij", centred, centred)
    return products / (len(x) - 1) + epsilon * torch.eye(x.shape[2])


gaussian_numbers = 56 * 56 * (100 * 100 + 100)
numbers_per_image = 64 * 56**2 + 128 * 28**2 + 256 * 14**2
assert check.embedding_function(stack)
assert check.covariance_function(eq_1)
assert check.threshold_function(lambda scores, rate: torch.quantile(scores, 1 - rate))
assert check.crossover(gaussian_numbers // numbers_per_image + 1)

# %% [markdown]
# **Stretch (15 minutes).**
#
# **7.** Two machines have fitted different images of one product. For one position each
# of them returns its number of images, its mean (D,) and its *scatter*, the sum $\sum
# (x - \mu)(x - \mu)^{\mathsf T}$, (D, D). Write `f(n1, mean1, scatter1, n2, mean2,
# scatter2)`, which returns the number, the mean and the scatter of all images together,
# without reading any image again.

# %% tags=["exercise"]
done = check.merge_function(...)


# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
def merge(n1, mean1, scatter1, n2, mean2, scatter2):
    n = n1 + n2
    difference = mean2 - mean1
    mean = mean1 + difference * n2 / n
    between = torch.outer(difference, difference) * n1 * n2 / n
    return n, mean, scatter1 + scatter2 + between


assert check.merge_function(merge)

# %% [markdown]
# ## Quiz
#
# **1.** Why does the paper add $\epsilon I$ to the covariance?
#
# :::{dropdown} Answer
# Around their mean, $N$ vectors vary in $N - 1$ directions at most. With fewer images
# than dimensions the covariance has no inverse. With $\epsilon$ it has one, and a
# direction without any variance has the variance 0.01.
# :::
#
# **2.** A network returns maps of 64×64, 32×32 and 16×16 positions for images of
# 256×256 pixels. How many Gaussians are there, and how many pixels does one stand for?
#
# :::{dropdown} Answer
# 64·64 = 4,096: the largest map determines the grid. Each stands for 4×4 pixels.
# :::
#
# **3.** You keep all principal components instead of all channels. What changes?
#
# :::{dropdown} Answer
# Nothing. It is a rotation, and the covariance rotates with it ($\epsilon I$ is the
# same in every rotation). Only dropping components changes the distance, and PCA drops
# those of smallest variance, where a small deviation counts most.
# :::
#
# **4.** You collect ten times as many normal images. What happens to the time to fit,
# the memory and the time to score, for PaDiM and for a nearest-neighbour search?
#
# :::{dropdown} Answer
# PaDiM: the fit takes nearly ten times as long (the time for the factors stays the
# same); memory and time to score do not change. The search has no Gaussians to fit, but
# ten times the images to embed, ten times the memory, and ten times the time to score,
# unless it is limited to some images.
# :::
#
# **5.** A colleague chose the 99 % quantile of the training images' scores as the
# threshold. Nearly every good part is rejected. Why?
#
# :::{dropdown} Answer
# The Gaussians were fitted to these very images, so their distances are too small. Use
# images that were held out, or correct the distances by leaving one out.
# :::
#
# **6.** Method A has a pixel AUROC of 98 % and a PRO-score of 80 %, method B 97 % and
# 90 %. Which one do you choose to find hairline cracks?
#
# :::{dropdown} Answer
# B. Large defects alone can raise a pixel AUROC. The PRO-score counts each region the
# same, and hairline cracks are small regions.
# :::
#
# **7.** A paper reports an F1 of 0.97 for maps scaled over the test set. What do you
# ask?
#
# :::{dropdown} Answer
# How the threshold was chosen. If it was chosen on the same test set, 0.97 is what was
# possible with hindsight. The scaling by itself does not change the F1; it makes the
# threshold meaningless for the next image.
# :::
#
# ## Summary
#
# - A pretrained network describes each position of an image by a vector. One mean and
#   one covariance per position describe what is normal, and the Mahalanobis distance
#   measures how far a new vector is from it. This takes one pass over the images and no
#   training.
# - The off-diagonal entries of the covariance detect unusual combinations, which a
#   distance per channel misses.
# - 100 channels drawn at random do nearly as well as all 176. PCA keeps the directions
#   in which normal images differ from each other; a defect changes the others as well.
# - Memory and time to score do not grow with the number of images. Memory grows with
#   $d^2$.
# - PaDiM needs alignment, a threshold from held-out images, and one scale for all
#   images.
#
# **Next**: PatchCore {cite:p}`roth2022` returns to nearest neighbours, keeps a few
# well-chosen vectors, and compares a patch with *any* position. {cite:t}`rippel2021`
# explain why directions of small variance matter.
#
# **Use it on your own images**: set `FOLDER` above. Hold out some normal images for the
# threshold, use images from a fixed camera, and look at the maps before you trust a
# number.
