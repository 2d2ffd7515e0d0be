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
# # Patch SVDD in code: find what differs from every normal patch
#
# Patch SVDD {cite:p}`yi2020` compares a new product with good products, patch by patch.
# The farther a patch is from the nearest normal patch, the more anomalous it is. A
# network learns from normal images alone what "far" means. In this notebook you build
# its training step by step, see why a single centre for all patches collapses, train an
# encoder in less than a minute, and find defects with an encoder that was trained for
# longer. Then you measure what the training contributes, because a *random* encoder is
# a strong baseline.
#
# - **Read first**: the [page on the paper](../book/04_patch_svdd.md), 70 minutes. You
#   need PyTorch basics, and should know what a convolution without padding does to the
#   size of a feature map.
# - **Time**: 160 minutes to read and run, 35 for the exercises. The whole notebook runs
#   in two to three minutes on an idle two-core machine, and longer on a busy one or on
#   Colab without a GPU.
# - **Two profiles**: the *smoke* profile, shown here, is short enough for a CPU. The
#   *full* profile, the default on a Colab GPU, trains ten times as long and scores more
#   images.

# %%
import itertools
import random

import companion  # stored results and drawings that the notebooks share
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from paperlib import runtime, viz

run = runtime.start(seed=0)
viz.use_style()

# %% tags=["remove-cell"]
# GPUs round the inputs of convolutions, so two ways to embed a patch differ more.
TOLERANCE = {"rtol": 0, "atol": 1e-5 if run.device.type == "cpu" else 1e-2}

# %% [markdown]
# ## The result first: a defect has no similar patch among the normal cells
#
# The images show solar cells {cite:p}`buerhop2018,deitsch2019`. When a current flows
# through it, a cell glows; cracks and dead parts stay dark. There are two kinds: *mono*
# (one crystal, so the cell is evenly grey) and *poly* (many crystals, so the cell shows
# grains). This notebook uses mono cells unless stated otherwise.
#
# The encoder below was trained on functional cells only, in a longer run whose result
# is stored with the book. It never saw a defect, a mask, or the cells tested here.

# %%
from paperlib.datasets import TensorItems, elpv

cells, split_generator = elpv("mono"), torch.Generator().manual_seed(0)


def draw_indices(probability):
    """Return the indices of the cells with this probability of a defect, shuffled."""
    indices = torch.nonzero(cells.probability == probability).flatten()
    return indices[torch.randperm(len(indices), generator=split_generator)]


def stack_images(dataset):
    """Return the images of a data set, (n, 3, H, W), on the device."""
    return torch.stack([item.image for item in dataset]).to(run.device)


def load_cells(indices):
    """Return images of cells, resized to the paper's 256×256 pixels."""
    return stack_images(TensorItems(cells.images[indices], size=256))


# %% [markdown]
# Each cell has a probability of a defect, given by experts. Only cells with probability
# 0 (functional) or 1 (defective) are used. The first 40 functional cells were excluded
# from the encoder's training.

# %%
functional_indices, defective_indices = draw_indices(0), draw_indices(1)
N_TEST = run.choose(smoke=20, full=40)  # images of each class

train_images = load_cells(functional_indices[40:140])
held_out_images = load_cells(functional_indices[:N_TEST])
defective_images = load_cells(defective_indices[:N_TEST])
normal_images = train_images[:32]  # the detector stores the patches of these
mean_image = normal_images.mean(0)  # subtracted from each image before embedding
print(f"{len(normal_images)} functional cells in the bank; to test:", end=" ")
print(f"{len(held_out_images)} functional, {len(defective_images)} defective")

# %%
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD

weights_file = companion.result_file("patch_svdd_cells.safetensors")
trained_encoder = HierarchicalEncoder.load(weights_file).to(run.device)
detector = PatchSVDD(trained_encoder).fit(normal_images)

example_images = torch.cat([defective_images[:2], held_out_images[:1]])
example_maps = detector.anomaly_maps(example_images)
print(detector)

# %% [markdown]
# - `fit` cuts all patches out of the 32 normal images, embeds them and stores the
#   embeddings: this is the *bank*.
# - `anomaly_maps` embeds the patches of other images, and computes the distance of each
#   patch to the nearest patch in the bank. It returns one map for patches of 32×32
#   pixels (`small`), one for 64×64 (`big`), their `sum` and their product (`mult`).
#   `scores` holds the largest value of each product map. No threshold is set yet.

# %% tags=["remove-cell"]
run.expect(
    float(example_maps.scores[:2].min()) > float(example_maps.scores[2]),
    "both defective cells score higher than the functional one",
)

# %% tags=["hide-input", "ledger:patch-svdd-figure-1:measured", "ledger:patch-svdd-figure-7:measured"] mystnb={"image": {"alt": "Three columns, two defective solar cells and a functional one, each with its three maps below. The first defective cell has a dark bar, and all three of its maps are brightest at the bar's left end. The second has cracks and a dark triangle; its 32-pixel map is of medium brightness almost everywhere, its 64-pixel map is brightest in the lower left corner, and its product is dim, with a maximum of about half of the first cell's. The functional cell's maps are dark. A colour bar beside each row of maps gives the distance."}}
map_rows = {
    "32-pixel patches": example_maps.small,
    "64-pixel patches": example_maps.big,
    "product": example_maps.mult,
}
fig, panels = plt.subplots(4, 3, figsize=(6.4, 8))
for i, title in enumerate(("defective", "defective", "functional")):
    viz.panel(panels[0, i], example_images[i], title)
for axes, (title, row_maps) in zip(panels[1:], map_rows.items(), strict=True):
    limits = (0, float(row_maps.max()))
    for ax, values in zip(axes, row_maps.cpu(), strict=True):
        mappable = companion.draw_scores(ax, values, limits=limits)
        ax.set_xlabel(f"maximum {values.max():.2f}")
    axes[0].set_ylabel(title)
    unit = "distance²" if title == "product" else "distance"
    fig.colorbar(mappable, ax=list(axes), label=unit, shrink=0.9)
fig.suptitle("Defective patches are far from all normal patches")
plt.show()

# %% [markdown]
# Both defective cells score higher than the functional one. All patches of the
# functional cell have near neighbours among the other functional cells. On the first
# cell the maps are brightest at the dark bar. On the second cell they are less exact:
# the 32-pixel map hardly shows where the cracks are, and the product is dim on the
# common colour scale.
#
# The maps have two limits:
#
# - They do not show a sharp outline, because the value of a pixel is a mean over
#   patches that are 32 or 64 pixels wide.
# - Their values are distances between embeddings, not probabilities. Only their order
#   matters.
#
# ## What you will be able to do
#
# 1. Explain how OC-SVM, SVDD, Deep SVDD and Patch SVDD follow from one another, and why
#    one centre fails for patches.
# 2. Implement the paper's training: pairs, encoders, losses, loop and evaluation.
# 3. Turn embeddings into a map: nearest normal patch, mean over patches, product of two
#    sizes.
# 4. Read training curves, and recognise a collapse.
# 5. Judge what training contributes, compared with a random encoder, and what an
#    evaluation costs as the data set grows.
#
# ## By hand: directions, numbers of patches, and a score per pixel
#
# **Directions.** The training task is to name the direction from a first patch to a
# second one. The eight classes are the positions of a 3×3 grid in reading order,
# without its centre.
#
# **Numbers of patches.** Patches of side $K$ at stride $S$ start at the pixels $0, S,
# 2S, \dots$, and the last one must fit into the image. Along a side of $L$ pixels there
# are
#
# $$
# \lfloor (L - K) / S \rfloor + 1
# $$
#
# patches. For example, with $L = 256$ there are $(256 - 64)/16 + 1 = 13$ patches of 64
# pixels at stride 16, and $(256 - 32)/4 + 1 = 57$ patches of 32 pixels at stride 4.
#
# **Scores.** A patch has one score, and a pixel lies in several patches. The score of a
# pixel is the mean score of the patches that cover it. A pixel that no patch covers
# scores 0.
#
# :::{admonition} Predict first
# :class: tip
# Nine patches of 2×2 pixels fit into an image of 4×4 pixels at stride 1. Only the four
# at the upper left have scores here: 1 and 3 in the first row, 5 and 7 in the second.
# Fill in the sixteen pixels. Then show the output of the next notebook cell.
# :::

# %% tags=["nbval-check-output", "hide-output"]
from paperlib.anomaly_map import spread_patch_scores

toy_scores = torch.tensor([[1.0, 3], [5, 7]])
toy_map = spread_patch_scores(toy_scores, patch=2, stride=1, size=4)
print(*toy_map.int().tolist(), sep="\n")

# %% tags=["remove-cell"]
assert torch.equal(toy_map[:3, :3], torch.tensor([[1.0, 2, 3], [3, 4, 5], [5, 6, 7]]))
assert toy_map[3].sum() == 0

# %% tags=["hide-cell"] mystnb={"image": {"alt": "Three grids of numbers. Left, the classes: 0 1 2 above, 3 and 4 beside an empty centre, 5 6 7 below. Middle, four patch scores: 1 3 above, 5 7 below. Right, the sixteen pixels: first row 1 2 3 0, second 3 4 5 0, third 5 6 7 0, last row all 0."}}
from paperlib.patch_svdd import DIRECTIONS

position_classes = np.full((3, 3), "", dtype=object)
for number, (down, right) in enumerate(DIRECTIONS):
    position_classes[1 + down, 1 + right] = str(number)
grids = {
    "classes of\nthe direction": position_classes,
    "scores of\n2×2 patches": toy_scores.int().numpy(),
    "scores of\n4×4 pixels": toy_map.int().numpy(),
}
fig, panels = plt.subplots(1, 3, figsize=(6.4, 3))
fig.suptitle("A pixel's score is the mean of its patches")
for ax, (title, grid) in zip(panels, grids.items(), strict=True):
    # Classes are labels, not quantities, so their squares stay white.
    shades = np.zeros((3, 3)) if grid is position_classes else grid
    ax.imshow(shades, cmap="Blues", vmin=0, vmax=12)
    for (row, column), value in np.ndenumerate(grid):
        ax.text(column, row, value, ha="center", va="center", fontsize=13)
    edges = np.arange(-0.5, len(grid))
    ax.set(title=title, xticks=edges, yticks=edges)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# The rows are 1 2 3 0, then 3 4 5 0, 5 6 7 0 and 0 0 0 0. The pixel in the corner lies
# in one patch, a pixel at an edge in two, the pixel in the middle in all four. The last
# row and column lie in none of the four. Scores are averaged over patches, so a map is
# never sharper than its patches are wide.
# :::
#
# ## One class, one ball: SVDD and the one-class SVM
#
# SVDD {cite:p}`tax2004`, support vector data description, encloses normal points $x_1,
# \dots, x_n$ in a ball. It looks for the smallest ball, with centre $c$ and radius $R$,
# that may leave some points outside:
#
# $$
# \begin{aligned} & \min_{R,\, c,\, \xi} \; R^2 + \frac{1}{\nu n} \sum_i \xi_i \\
# & \text{with } \lVert x_i - c \rVert^2 \le R^2 + \xi_i, \quad \xi_i \ge 0 \end{aligned}
# $$
#
# - $\xi_i$ is 0 for a point inside the ball; for a point outside, it measures how far
#   outside the point is.
# - $\nu$ sets the penalty for these points: at most a share $\nu$ of all points ends up
#   outside.
# - The centre of the best ball is a weighted mean of the points, $c = \sum_i \alpha_i
#   x_i$. Only points on the ball's surface or outside it have a weight $\alpha_i > 0$;
#   they are called *support vectors*.
#
# Lagrange multipliers turn this problem into one over the weights alone, its *dual*
# (the formula below). The points occur in it only in inner products $x_i \cdot x_j$.
# So a *kernel* can replace the inner product: a function $k(x_i, x_j)$ that measures
# the similarity of two points, and equals the inner product in some other space, the
# *feature space*. The *linear kernel* is the inner product itself; the *Gaussian
# kernel* is $k(x, y) = \exp(-\gamma \lVert x - y \rVert^2)$. A ball in the feature
# space can be a curved region around the points. The dual is
#
# $$
# \begin{aligned} & \min_\alpha \sum_{i,j} \alpha_i \alpha_j\, k(x_i, x_j) - \sum_i \alpha_i\, k(x_i, x_i) \\
# & \text{with } \sum_i \alpha_i = 1, \quad 0 \le \alpha_i \le \frac{1}{\nu n} \end{aligned}
# $$
#
# The one-class SVM {cite:p}`schoelkopf2001` looks for a *hyperplane* instead: a flat
# boundary (in two dimensions a line) that separates the points from the origin. Its
# dual has the same constraints, and only the first sum. With a Gaussian kernel, $k(x,
# x) = 1$ for every point, so the second sum is always 1, and **both methods find the
# same boundary.** The code below solves SVDD's dual with a general-purpose optimiser
# and compares the weights with those of scikit-learn's `OneClassSVM`.

# %%
from scipy.optimize import minimize

rng = np.random.default_rng(0)
angles = rng.uniform(0, np.pi, 60)
points = 2 * np.c_[np.cos(angles), np.sin(angles)] + rng.normal(0, 0.15, (60, 2))
NU, GAMMA = 0.1, 0.5


def solve_svdd(kernel_matrix):
    """Return the weights alpha that minimise SVDD's dual."""
    n, diagonal = len(kernel_matrix), np.diag(kernel_matrix)

    def objective(alpha):
        value = alpha @ kernel_matrix @ alpha - alpha @ diagonal
        return value, 2 * kernel_matrix @ alpha - diagonal

    return minimize(
        objective,
        x0=np.full(n, 1 / n),
        jac=True,  # `objective` also returns its gradient
        method="SLSQP",
        bounds=[(0, 1 / (NU * n))] * n,
        constraints={"type": "eq", "fun": lambda alpha: alpha.sum() - 1},
        options={"ftol": 1e-12, "maxiter": 500},
    ).x


# %% [markdown]
# - `points`, (60, 2), lie on half a ring. `kernel_matrix`, (60, 60), holds
#   $k(x_i, x_j)$.
# - `objective` is the dual, written with matrix products, and its derivative with
#   respect to `alpha`, (60,).
# - `bounds` and `constraints` are the two constraints: the limits of each weight, and
#   their sum. The optimiser SLSQP starts from equal weights.
#
# The one-class SVM stores one coefficient per support vector. Divided by their sum,
# they must equal SVDD's weights:

# %% tags=["nbval-check-output"]
from sklearn.metrics.pairwise import linear_kernel, rbf_kernel
from sklearn.svm import OneClassSVM

svdd_alpha = solve_svdd(rbf_kernel(points, gamma=GAMMA))
one_class_svm = OneClassSVM(kernel="rbf", gamma=GAMMA, nu=NU, tol=1e-9).fit(points)
svm_alpha = np.zeros(60)
svm_alpha[one_class_svm.support_] = one_class_svm.dual_coef_[0]
svm_alpha /= svm_alpha.sum()
assert abs(svdd_alpha - svm_alpha).max() < 1e-5
n_support = (svdd_alpha > 1e-4).sum()
print(f"the same weights; {n_support} of 60 points are support vectors")


# %% tags=["hide-input"]
def compute_kernel(name, a, b):
    """Return the kernel matrix of two sets of points."""
    return linear_kernel(a, b) if name == "linear" else rbf_kernel(a, b, gamma=GAMMA)


def evaluate_svdd(name, grid):
    """Return squared distances to SVDD's centre, minus the ball's squared radius."""
    kernel_matrix = compute_kernel(name, points, points)
    alpha = solve_svdd(kernel_matrix)

    def measure_squared_distance(x):
        self_kernel = (x**2).sum(1) if name == "linear" else 1  # k(x, x)
        cross_term = compute_kernel(name, x, points) @ alpha
        return self_kernel - 2 * cross_term + alpha @ kernel_matrix @ alpha

    # Points whose weight lies strictly between its bounds are on the ball's surface.
    on_surface = (alpha > 1e-5) & (alpha < 1 / (NU * 60) - 1e-5)
    squared_radius = measure_squared_distance(points)[on_surface].mean()
    return measure_squared_distance(grid) - squared_radius


def evaluate_svm(name, grid):
    """Return the decision function of the one-class SVM."""
    svm = OneClassSVM(kernel=name, gamma=GAMMA, nu=NU, tol=1e-9).fit(points)
    return svm.decision_function(grid)


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels with the same 60 points on half a ring. Above, a circle encloses them and much empty space, and a straight dashed line separates them from the origin. Below, one curved boundary follows the half ring; the solid line of SVDD and the dashed line of the one-class SVM coincide."}}
grid_x, grid_y = np.meshgrid(np.linspace(-4, 4, 160), np.linspace(-2, 4, 120))
grid_points = np.c_[grid_x.ravel(), grid_y.ravel()]
solid = {"colors": viz.BLUE, "linewidths": 4}
dashed = {"colors": viz.VERMILION, "linestyles": [(0, (5, 4))]}
fig, panels = plt.subplots(2, 1, figsize=(5, 7.4), sharex=True)
for ax, kernel_name in zip(panels, ("linear", "rbf"), strict=True):
    svdd_values = evaluate_svdd(kernel_name, grid_points)
    svm_values = evaluate_svm(kernel_name, grid_points)
    ax.plot(*points.T, "o", ms=4, color=viz.GREY)
    ax.contour(grid_x, grid_y, svdd_values.reshape(120, 160), [0], **solid)
    ax.contour(grid_x, grid_y, svm_values.reshape(120, 160), [0], **dashed)
    ax.plot(0, 0, "k+", ms=9)
    ax.set(ylabel="second feature", aspect="equal")
panels[0].set_title("linear kernel: a ball or a line")
panels[1].set_title("Gaussian kernel: the same boundary")
panels[1].set_xlabel("first feature")
svdd_line = plt.Line2D([], [], color=viz.BLUE)
svm_line = plt.Line2D([], [], color=viz.VERMILION, ls="--")
origin = plt.Line2D([], [], color="black", ls="", marker="+", ms=9)
lines, names = (svdd_line, svm_line, origin), ("SVDD", "one-class SVM", "origin")
fig.legend(lines, names, loc="outside lower center", ncols=3)
plt.show()

# %% tags=["remove-cell"]
# With the Gaussian kernel, the last one, the two agree everywhere, not only at 0.
scaled_svm_values = svm_values / one_class_svm.dual_coef_.sum()
assert np.abs(-svdd_values / 2 - scaled_svm_values).max() < 1e-4

# %% [markdown]
# With a linear kernel the two differ: SVDD finds a ball around the points, and the
# one-class SVM a line between the points and the origin.
#
# Both methods need features in which similar objects are near each other. Deep SVDD
# {cite:p}`ruff2018` learns such features: training pulls the embeddings
# $f_\theta(x_i)$ of all training images to one centre $c$, the mean of their embeddings
# before training, $c = \tfrac1n \sum_i f_{\theta_0}(x_i)$ (Eq. 3; equations have the
# paper's numbers, so they are not in order here). Patch SVDD starts from the same idea,
# applied to patches.
#
# ## One centre for all patches: what happens to the embeddings?
#
# Here are two losses that pull embeddings together: towards one centre (Eq. 2), or, in
# Patch SVDD, only towards a patch $p_{i'}$ close to the patch $p_i$ (Eq. 4). The code
# computes each of them as a mean of unsquared norms.
#
# $$
# \mathcal L_{\text{SVDD}} = \sum_i \lVert f_\theta(p_i) - c \rVert_2 \tag{2}
# $$
#
# $$
# \mathcal L_{\text{SVDD'}} = \sum_{i, i'} \lVert f_\theta(p_i) - f_\theta(p_{i'}) \rVert_2 \tag{4}
# $$
#
# :::{admonition} Predict first
# :class: tip
# We train an encoder for 16 steps with each of these losses, and a third one with Eq. 4
# plus a task: name the direction from one patch to another (the next section). We
# measure the *spread*: the mean distance of a held-out cell's patch embeddings from
# their mean. Which of the three spreads shrink towards 0?
# :::

# %%
from paperlib.patch_svdd import svdd_loss, train

OBJECTIVES = {
    "centre": "one centre (Eq. 2)",
    "neighbors": "neighbours (Eq. 4)",
    "patch_svdd": "neighbours and task",
}
SHORT_BUDGET = {"steps": 16, "crops": 4, "side": 128, "pairs": 256, "every": 4}
probe_image = held_out_images[:1] - train_images[:8].mean(0)


def measure_spread(embeddings):
    """Return the mean distance of embeddings (n, D) from their mean."""
    return svdd_loss(embeddings, embeddings.mean(0, keepdim=True)).item()


def measure_probe_spread(encoder):
    """Return the spread of the 32-pixel patches of the held-out cell."""
    return measure_spread(encoder.embed(probe_image, 16, 16).small.flatten(0, 2))


# %% [markdown]
# - `svdd_loss` is the mean of norms. With the mean embedding as second argument it
#   computes the spread.
# - `encoder.embed(probe_image, 16, 16).small` has the shape (1, 15, 15, 64): the
#   patches of 32 pixels at stride 16, $(256 - 32)/16 + 1 = 15$ per side. `flatten`
#   turns them into a list of 225 embeddings.
#
# - `SHORT_BUDGET`: each of the 16 steps crops four squares of 128 pixels out of the
#   images, and draws 256 pairs of patches per crop, size and loss. `every` is the
#   number of steps between two records.
#
# The three encoders start from the same weights. The library's `train` calls
# `on_record` at each record, so that we can measure the spread during training. How
# `train` works is the subject of *Dense training*; here only its effect matters.

# %%
spread_curves = {}
for objective in OBJECTIVES:
    torch.manual_seed(0)
    encoder = HierarchicalEncoder().to(run.device)
    curve = [measure_probe_spread(encoder)]
    train(
        encoder,
        train_images[:8],
        objective=objective,
        on_record=lambda record: curve.append(measure_probe_spread(encoder)),
        **SHORT_BUDGET,
    )
    spread_curves[objective] = curve

# %% tags=["hide-cell", "ledger:patch-svdd-eq-2:measured", "ledger:patch-svdd-eq-3:measured"] mystnb={"image": {"alt": "Line plot with a logarithmic vertical axis: spread of the embeddings, relative to before training, against training steps from 0 to 16. The curve of one centre falls to about 0.2 and that of neighbours alone to about 0.03. The curve with a task stays near 1."}}
_, ax = plt.subplots()
for objective, label in OBJECTIVES.items():
    relative_spread = np.divide(spread_curves[objective], spread_curves[objective][0])
    ax.semilogy(range(0, 17, 4), relative_spread, marker=".", label=label)
ax.set(xlabel="training step", ylim=(0.01, 10))
ax.set_ylabel("spread of patch embeddings\nrelative to before training")
ax.set_title("Only the task keeps embeddings apart")
companion.log_ticks(ax.yaxis, (0.01, 0.1, 1, 10))
ax.legend()
plt.show()
spread_left = {name: curve[-1] / curve[0] for name, curve in spread_curves.items()}

# %% tags=["remove-cell"]
run.expect(
    max(spread_left["centre"], spread_left["neighbors"]) < 0.3,
    "most of the spread is lost with one centre and with neighbours alone",
)
run.expect(spread_left["neighbors"] < 0.1, "nearly all is lost with neighbours alone")
run.expect(spread_left["neighbors"] < spread_left["centre"], "neighbours are faster")
run.expect(spread_left["patch_svdd"] > 0.4, "the spread stays with a task")

# %% [markdown]
# :::{dropdown} Answer
# The first two. Both losses only pull embeddings together, and a network that returns
# the same vector for every patch (for Eq. 2, the vector $c$) makes either of them 0.
# Without a centre the embeddings collapse too, and here even faster: after 16 steps
# most of the spread is lost with one centre, and nearly all of it with neighbours
# alone. With a task the spread stays, because a constant cannot solve the task.
# :::
#
# With either of these two losses alone, the embeddings of all patches end up close to
# one point, whether the patches are defective or not. Then distances no longer
# distinguish them.
#
# ## Pairs on a real image: in which direction is the second patch?
#
# The second loss is the task: embed two patches, subtract the embeddings, and let a
# small classifier $C_\phi$ name the direction (Eq. 5):
#
# $$
# \begin{aligned} & \mathcal L_{\text{SSL}} = \text{cross-entropy}\big( \\
# & \quad y,\; C_\phi(f_\theta(p_1), f_\theta(p_2))\big) \end{aligned} \tag{5}
# $$
#
# Let $K$ be the side of a patch in pixels, 64 or 32. Along each axis of its direction,
# the second patch is moved by $\tfrac34 K$ plus a random 0 to $\tfrac14 K - 1$ pixels.
# In the pairs for $\mathcal L_{\text{SVDD'}}$, the second patch is moved by at most
# $K/32$ pixels along each axis: one for $K = 32$, two for $K = 64$.

# %% tags=["hide-input", "ledger:patch-svdd-figure-4:redrawn"] mystnb={"image": {"alt": "Two copies of a solar cell in grey. Left, a black square of 64 pixels in the middle and around it eight coloured groups of squares, numbered 0 to 7 in reading order, each group made of four squares that lie a few pixels apart and overlap the black one a little. Right, two squares of 64 pixels at almost the same position, one black and one orange, at most two pixels apart."}}
from paperlib.patch_svdd import neighbor_pairs, position_pairs

pair_generator = torch.Generator().manual_seed(0)
drawn_pairs = position_pairs(400, (256, 256), 64, pair_generator)
neighbor_pair = neighbor_pairs(1, (256, 256), 64, pair_generator)

fig, panels = plt.subplots(1, 2, figsize=(6.4, 3.8))
fig.suptitle("Eight directions, and almost equal neighbours")
viz.panel(panels[0], train_images[0], "position pairs, K = 64")
viz.panel(panels[1], train_images[0], "a neighbour pair, K = 64")
colors = (viz.BLUE, viz.ORANGE, viz.GREEN, viz.VERMILION)
colors += (viz.PURPLE, viz.SKY, viz.YELLOW, "white")
for number, color in enumerate(colors):
    has_class = drawn_pairs.position == number
    moves = (drawn_pairs.second - drawn_pairs.first)[has_class][:4].tolist()
    for down, right in moves:
        companion.draw_square(panels[0], (96 + down, 96 + right), 64, color)
    down, right = moves[0]
    style = {"color": "white", "fontsize": 15, "ha": "center", "va": "center"}
    panels[0].text(128 + right, 128 + down, number, **style)
companion.draw_square(panels[0], (96, 96), 64, "black", 2.5)
for corner, color in zip(neighbor_pair[:2], ("black", viz.ORANGE), strict=True):
    companion.draw_square(panels[1], corner[0].tolist(), 64, color, 1.5)
plt.show()

# %% [markdown]
# Left: the black square is the first patch; each coloured square is a second patch,
# four per class. They overlap the first patch by 1 to 16 pixels. Doersch's original
# task {cite:p}`doersch2015` leaves a gap between the patches; the released code of
# Patch SVDD does not.
#
# Near the border of the image the released code *clips*: a second patch that would
# leave the image is moved inside. How often does clipping make the distance too short,
# or even move both patches to the same position? The folded code counts all cases:


# %% tags=["nbval-check-output", "hide-input"]
def count_short_pairs(patch, side=256):
    """Return the shares of pairs that clipping leaves too close and at one position.

    Too close is less than 3/4 of a patch. All positions and moves are counted.
    """
    last, moves = side - patch, range(3 * patch // 4, patch)
    # Along one axis, downwards; upwards is symmetric.
    starts = range(last + 1)
    lengths = [min(start + move, last) - start for start in starts for move in moves]
    near_share = np.mean(np.array(lengths) < moves[0])
    same_share = np.mean(np.array(lengths) == 0)
    # Four of the classes move along one axis, four along both.
    near_either = 1 - (1 - near_share) ** 2
    return (near_share + near_either) / 2, (same_share + same_share**2) / 2


for patch_side in (64, 32):
    near_share, same_share = count_short_pairs(patch_side)
    print(f"K = {patch_side}: clipping leaves {near_share:.1%} of the pairs", end=" ")
    print(f"too close, {same_share:.2%} at the same position")


# %% tags=["remove-cell"]
def draw_distances(patch, clip):
    """Draw pairs; return their distances along both axes, and which axes they use."""
    generator = torch.Generator().manual_seed(0)
    drawn = position_pairs(100_000, (256, 256), patch, generator, clip=clip)
    return (drawn.second - drawn.first).abs(), torch.tensor(DIRECTIONS)[
        drawn.position
    ] != 0


for patch_side in (64, 32):
    near_share, same_share = count_short_pairs(patch_side)
    lengths, is_used = draw_distances(patch_side, clip=True)
    is_short = ((lengths < 3 * patch_side // 4) & is_used).any(1)
    assert abs(is_short.double().mean() - near_share) < 0.01
    assert abs((lengths.amax(1) == 0).double().mean() - same_share) < 0.002
    lengths, _ = draw_distances(patch_side, clip=False)
    assert lengths.amax(1).min() >= 3 * patch_side // 4

# %% [markdown]
# A third of the pairs of large patches are closer together than intended. A few have no
# direction at all, but still have a label. The library draws the first patch only where
# the second one fits, so neither can happen; `clip=True` reproduces the behaviour of
# the released code.
#
# ## The shortcut: can colour reveal the position?
#
# A lens does not image all colours alike. The colour channels are slightly displaced
# against each other (chromatic aberration), and their brightness may change from one
# part of the image to another (colour shading). An encoder may infer the position of a
# patch from such a trace, and solve the task without looking at the product. The remedy
# of Patch SVDD is a random shift of each patch's colours: one number per colour
# channel, normally distributed with standard deviation 0.02 (white is 1).
#
# :::{admonition} Predict first
# :class: tip
# We test colour shading. Grey gravel gets a synthetic tint: red grows by 2 % from left
# to right, blue by 2 % from top to bottom. A linear classifier sees only the mean
# colours of both patches. For what share of the pairs does it name the direction
# correctly (guessing: one in eight): without a shift, with one shift that both patches
# of a pair share, and with one shift per patch?
# :::

# %%
from skimage import data
from sklearn.linear_model import LogisticRegression

grey = torch.tensor(data.gravel()[:256, :256] / 255, dtype=torch.float32)
ramp = torch.linspace(-0.01, 0.01, 256)
red, blue = grey * (1 + ramp), grey * (1 + ramp[:, None])  # a tint
tinted_image = torch.stack([red, grey, blue])
mean_colors = F.avg_pool2d(tinted_image, 32, stride=1)  # of all 32×32 patches


def compute_tint_differences(pairs, shifts):
    """Return the difference in red and blue, less green, between a pair's patches."""
    first = mean_colors[:, pairs.first[:, 0], pairs.first[:, 1]]
    second = mean_colors[:, pairs.second[:, 0], pairs.second[:, 1]]
    red, green, blue = (second + shifts[1]) - (first + shifts[0])
    # Scaled by 1000, the features let the classifier converge fast.
    return torch.stack([red - green, blue - green], 1) * 1000


# %% [markdown]
# - `mean_colors`, (3, 225, 225), holds the mean colour of each 32×32 patch: average
#   pooling at stride 1.
# - `first` and `second`, (3, n), are the colours of both patches of n pairs.
# - `shifts`, (2, 3, n), is one number per patch, colour and pair. If both patches share
#   a shift, `shifts[0]` equals `shifts[1]`, and it cancels in the difference.
#
# The classifier learns from 4,000 pairs and is tested on 2,000 others:

# %% tags=["hide-output"]
shift_generator = torch.Generator().manual_seed(0)
draws = 0.02 * torch.randn(2, 3, 6000, generator=shift_generator)
tint_pairs = position_pairs(6000, (256, 256), 32, shift_generator)
kinds_of_shift = {
    "no shift": torch.zeros(2, 3, 6000),
    "one per pair": draws[:1].expand(2, -1, -1),
    "one per patch": draws,
}
tint_accuracies = {}
for name, shifts in kinds_of_shift.items():
    tints = compute_tint_differences(tint_pairs, shifts)
    tint_classifier = LogisticRegression(max_iter=2000)
    tint_classifier.fit(tints[:4000], tint_pairs.position[:4000])
    tint_accuracy = tint_classifier.score(tints[4000:], tint_pairs.position[4000:])
    print(f"{name:13}: {tint_accuracy:.0%} of the directions are correct", end=" ")
    print("from the tint alone (chance 12.5 %)")
    tint_accuracies[name] = tint_accuracy

# %% tags=["remove-cell"]
assert min(tint_accuracies["no shift"], tint_accuracies["one per pair"]) > 0.9
assert tint_accuracies["one per patch"] < 0.2

# %% [markdown]
# :::{dropdown} Answer
# Without a shift, nearly all: the tint, too weak to be seen, works like a coordinate
# system. A shift that both patches share changes nothing, because the classifier looks
# at differences. With one shift per patch the accuracy is close to chance.
#
# The shift hides a tint, but not displaced channels. Against those,
# {cite:t}`doersch2015` dropped colour channels.
# :::
#
# ## Two sizes: the large patch is embedded through its quarters
#
# A defect may be as thin as a hair or as large as a missing corner, so there are two
# encoders, for patches of $K = 32$ and $K = 64$ pixels. The large encoder cuts its
# patch into quarters, embeds each with the small encoder, and combines the four
# embeddings
# (Eq. 7):
#
# $$
# f_{\text{big}}(p) = g_{\text{big}}\big(f_{\text{small}}(p_1), \dots, f_{\text{small}}(p_4)\big) \tag{7}
# $$

# %% tags=["hide-input", "ledger:patch-svdd-figure-5:redrawn"] mystnb={"image": {"alt": "From left to right: a patch of 64 by 64 pixels of a solar cell with a cross that divides it into quarters; an arrow f small; four squares of 8 by 8 coloured fields, the four embeddings of 64 numbers; an arrow g big; one square of 8 by 8 coloured fields, the embedding of the large patch."}}
large_patch = defective_images[1, :, 96:160, 32:96]
centred_patch = (large_patch - mean_image[:, 96:160, 32:96])[None]
quarter_embeddings = []
with torch.no_grad():
    for y, x in itertools.product((0, 32), (0, 32)):
        quarter = centred_patch[..., y : y + 32, x : x + 32]
        quarter_embeddings.append(trained_encoder.small(quarter)[0].cpu())
    large_embedding = trained_encoder(centred_patch)[0].cpu()
companion.draw_hierarchy(large_patch, quarter_embeddings, large_embedding)
plt.show()

# %% [markdown]
# **Why does the small encoder return a single vector?** No convolution uses padding.
# The first one, 3×3 with stride 2, turns 32 pixels into $\lfloor (32 - 3)/2 \rfloor + 1
# = 15$ positions. Each of the other seven, 3×3 with stride 1, reduces the side by 2.
# The eight layers, called one after the other, print the chain:

# %% tags=["nbval-check-output"]
sides, features = [32], torch.zeros(1, 3, 32, 32, device=run.device)
for layer in trained_encoder.small.children():
    features = layer(features)
    sides.append(features.shape[-1])
print(*sides, sep=" → ")

# %% tags=["remove-cell"]
assert sides == [32, 15, 13, 11, 9, 7, 5, 3, 1]

# %% [markdown]
# One position is left, with 64 channels: the embedding of the patch. Its receptive
# field is 31×31 of the patch's 32×32 pixels (a stride of 2 does not reach the last row
# and column). It depends on nothing outside the patch.
#
# The released code cuts 3,249 small and 169 large patches out of an image of 256×256
# pixels, and runs the encoder on each. But without padding the embedding of a patch
# does not depend on its surroundings, and neighbouring patches share most of their
# computation. One pass over the whole image returns all embeddings. Only the 2×2 layer
# of $g_{\text{big}}$ has to skip positions, because the quarters of a patch lie 32
# pixels apart.

# %%
STRIDES = {32: 4, 64: 16}  # pixels from one patch to the next, per side of a patch
size_encoders = {32: trained_encoder.small, 64: trained_encoder}
HEIGHT, WIDTH = 80, 96  # a part of an image: running patch by patch is slow
corners = {}
for K, S in STRIDES.items():
    tops, lefts = range(0, HEIGHT - K + 1, S), range(0, WIDTH - K + 1, S)
    corners[K] = list(itertools.product(tops, lefts))


def embed_one_by_one(image, K):
    """Embed each K×K patch of an image (1, 3, H, W) separately."""
    patches = [image[..., y : y + K, x : x + K] for y, x in corners[K]]
    with torch.no_grad():
        return torch.cat([size_encoders[K](patch) for patch in patches])


# %% [markdown]
# Patch by patch and in one pass, the embeddings must be equal:

# %% tags=["nbval-check-output", "ledger:patch-svdd-eq-7:by-hand"]
small_image = (defective_images[:1] - mean_image)[..., :HEIGHT, :WIDTH]
dense = trained_encoder.embed(small_image, stride_small=4, stride_big=16)
for K, embeddings in ((32, dense.small), (64, dense.big)):
    one_by_one = embed_one_by_one(small_image, K)
    torch.testing.assert_close(embeddings.flatten(0, 2), one_by_one, **TOLERANCE)
    print(f"K = {K}: one pass returns {tuple(embeddings.shape)};", end=" ")
    print(f"patch by patch {tuple(one_by_one.shape)}, the same embeddings")

# %% [markdown]
# - `corners[K]` lists the top left corners (row, column) of all patches.
# - `embed_one_by_one` runs the encoder once per patch, and concatenates the embeddings:
#   (number of patches, 64).
# - `embed` returns a grid, (1, h, w, 64); `flatten(0, 2)` turns it into a list in the
#   same order. `assert_close` raises an error if any pair of values differs by more
#   than 1e-5.
#
# ## From distances to a map: nearest normal patch, mean over patches, product
#
# The embeddings of all patches of the normal images form the *bank*. The score of a
# patch is its distance to the nearest vector of the bank (Eq. 8). The score of a pixel
# is the mean over its patches. The maps of both sizes are multiplied (Eq. 9), and the
# largest value of the product is the score of the image (Eq. 10):
#
# $$
# \mathcal A(p) = \min_{b \in \text{bank}} \lVert f_\theta(p) - b \rVert_2 \tag{8}
# $$
#
# $$
# \mathcal M_{\text{multi}} = \mathcal M_{\text{small}} \odot \mathcal M_{\text{big}} \tag{9}
# $$
#
# $$
# \mathcal A(x) = \max_{i,j} \mathcal M_{\text{multi}}(x)_{ij} \tag{10}
# $$
#
# The product is large only where both sizes agree. The released code also computes the
# **sum** of the two maps, which is large where either size responds, and reports the
# AUROC of all four maps: 32, 64, sum and product.
#
# Shapes for the class *bottle* of MVTec AD (209 training and 83 test images of 256×256
# pixels, $D = 64$):
#
# | | $K = 64$, $S = 16$ | $K = 32$, $S = 4$ |
# |---|---|---|
# | embeddings of the training images | (209, 13, 13, 64) | (209, 57, 57, 64) |
# | bank | (35321, 64) | (679041, 64) |
# | embeddings of the test images | (83, 13, 13, 64) | (83, 57, 57, 64) |
# | distances to the nearest vector | (83, 13, 13) | (83, 57, 57) |
# | maps | (83, 256, 256) | (83, 256, 256) |
#
# The sum and the product of the two maps have their shape too, (83, 256, 256), and the
# maximum of the product is the score, (83,).
#
# Here are all steps as loops, on the corner of a test image, with two normal corners
# for the bank:


# %%
def map_with_loops(test_image, bank_images, K):
    """Return the map of one patch size, and how many patches cover each pixel."""
    bank = torch.cat([embed_one_by_one(image[None], K) for image in bank_images])
    queries = embed_one_by_one(test_image, K)
    total, count = torch.zeros(HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH)
    for (top, left), query in zip(corners[K], queries, strict=True):
        distances = [(query - vector).square().sum().sqrt() for vector in bank]
        total[top : top + K, left : left + K] += min(distances).item()  # Eq. 8
        count[top : top + K, left : left + K] += 1
    return total / count.clamp_min(1), count


# %% [markdown]
# - `bank`, (442, 64) for $K = 32$, are the embeddings of both normal corners;
#   `queries`, (221, 64), those of the test image.
# - The loop visits each patch, finds the smallest distance to the bank, and adds it to
#   all pixels of the patch in `total`, (80, 96). `count` adds 1 to the same pixels.
# - `total / count` is the mean. `clamp_min(1)` avoids 0/0 at pixels without a patch.
#
# The library must return the same maps and score:

# %% tags=["nbval-check-output", "ledger:patch-svdd-eq-8:by-hand", "ledger:patch-svdd-eq-9:by-hand", "ledger:patch-svdd-eq-10:by-hand", "ledger:patch-svdd-algorithm-2:by-hand"]
corner_bank = normal_images[:2, :, :HEIGHT, :WIDTH]
test_corner = defective_images[:1, :, :HEIGHT, :WIDTH]
small_detector = PatchSVDD(trained_encoder).fit(corner_bank)
maps = small_detector.anomaly_maps(test_corner)

mean_corner = corner_bank.mean(0)
centred_corner, centred_bank = test_corner - mean_corner, corner_bank - mean_corner
small_map, _ = map_with_loops(centred_corner, centred_bank, 32)
big_map, big_count = map_with_loops(centred_corner, centred_bank, 64)
product_map = small_map * big_map  # Eq. 9
loop_results = (small_map, big_map, small_map + big_map, product_map)
for map_by_loop, map_by_library in zip(loop_results, maps, strict=True):
    torch.testing.assert_close(map_by_library[0].cpu(), map_by_loop, **TOLERANCE)
print("the loops return the four maps of the library;")
print(f"the pixel at the corner lies in {big_count[0, 0]:.0f} large patch,", end=" ")
print(f"the pixel in the middle in {big_count[40, 48]:.0f};")
print(small_detector)

# %% tags=["remove-cell"]
torch.testing.assert_close(maps.scores[0].cpu(), product_map.max(), **TOLERANCE)

# %% [markdown]
# ## The training in plain PyTorch: encoders, pairs, losses, loop, evaluation
#
# This section writes out the whole training, following the paper. The loss is the
# weighted sum of the two losses (Eq. 6), added up over both patch sizes: four terms.
#
# $$
# \mathcal L = \lambda\, \mathcal L_{\text{SVDD'}} + \mathcal L_{\text{SSL}} \tag{6}
# $$
#
# **Encoders.** The parameters have the same names as in the released code, so that its
# weights can be loaded.

# %%
from torch import nn


class SmallEncoder(nn.Module):
    """Embed patches of 32×32 pixels as D numbers."""

    def __init__(self, D=64):
        super().__init__()
        channels = (3, 32, 64, 128, 128, 64, 32, 32, D)
        for i in range(8):
            stride = 2 if i == 0 else 1
            layer = nn.Conv2d(channels[i], channels[i + 1], 3, stride)
            self.add_module(f"conv{i + 1}", layer)

    def forward(self, patches):
        *layers, last = self.children()
        for layer in layers:
            patches = F.leaky_relu(layer(patches), 0.1)
        return torch.tanh(last(patches)).flatten(1)


# %%
class BigEncoder(nn.Module):
    """Embed patches of 64×64 pixels through their quarters (Eq. 7)."""

    def __init__(self, D=64):
        super().__init__()
        self.enc = SmallEncoder(D)
        self.conv1, self.conv2 = nn.Conv2d(D, 128, 2), nn.Conv2d(128, D, 1)

    def forward(self, patches):
        n = len(patches)
        quarters = patches.unfold(2, 32, 32).unfold(3, 32, 32)
        quarters = quarters.permute(0, 2, 3, 1, 4, 5).reshape(4 * n, 3, 32, 32)
        grid = self.enc(quarters).view(n, 2, 2, -1).permute(0, 3, 1, 2)
        hidden = F.leaky_relu(self.conv1(grid), 0.1)
        return torch.tanh(self.conv2(hidden)).flatten(1)


# %%
class DirectionClassifier(nn.Module):
    """Classify the direction from the first patch to the second (Eq. 5)."""

    def __init__(self, D=64):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 128), nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 8)

    def forward(self, first, second):
        hidden = F.leaky_relu(self.fc1(first - second), 0.1)
        hidden = F.leaky_relu(self.fc2(hidden), 0.1)
        weight = self.fc3.weight / self.fc3.weight.norm(dim=0)
        return F.linear(hidden, weight, self.fc3.bias)


# %% [markdown]
# | step | shape, for a batch of n patches |
# |---|---|
# | `SmallEncoder`: input; output of the last layer; embedding | (n, 3, 32, 32); (n, 64, 1, 1); (n, 64) |
# | `BigEncoder`: input | (n, 3, 64, 64) |
# | after both `unfold` | (n, 3, 2, 2, 32, 32): row and column of the quarter, then its pixels |
# | `quarters` as one batch | (4n, 3, 32, 32) |
# | `grid`: four embeddings in their arrangement | (n, 64, 2, 2) |
# | `hidden`; embedding | (n, 128, 1, 1); (n, 64) |
# | `DirectionClassifier`: difference; logits | (n, 64); (n, 8) |
#
# - `children()` returns the layers in the order in which they were added. A LeakyReLU
#   with slope 0.1 follows each of them, except the last, which is followed by a tanh.
# - The quarters of all patches pass through the small encoder in one call.
# - The classifier receives the difference of both embeddings. It returns *logits*: one
#   score per class before the softmax.
# - `weight` is the last layer's matrix, (8, 128), with each column divided by its norm,
#   so that every hidden unit has the same influence. (In the released code no gradient
#   flows through this line, so these weights are never trained.)
#
# **Pairs.** A `torch.utils.data.Dataset` needs two methods: `__len__` returns how many
# items there are, and `__getitem__` returns one of them. Here every item is a newly
# drawn pair.

# %%
from torch.utils.data import DataLoader, Dataset, StackDataset


class ImagePairs(Dataset):
    """Pairs of K×K patches, `repeat` per image; a subclass draws them."""

    def __init__(self, images, K, repeat):
        self.images, self.K, self.repeat = images, K, repeat

    def __len__(self):
        return len(self.images) * self.repeat

    def cut_pair(self, index, down, right):
        """Cut out a patch anywhere, and one moved by (down, right); both fit."""
        image, K = self.images[index % len(self.images)], self.K
        height, width = image.shape[1:]
        top = random.randint(max(0, -down), height - K - max(0, down))
        left = random.randint(max(0, -right), width - K - max(0, right))
        first = image[:, top : top + K, left : left + K]
        top, left = top + down, left + right
        return first, image[:, top : top + K, left : left + K]


# %%
def shift_colours(patch):
    """Add one random number per channel, and one per value."""
    return patch + 0.02 * torch.randn(3, 1, 1) + 0.02 * torch.randn(patch.shape)


class PositionPairs(ImagePairs):
    """Pairs for the task, each patch with its own colour shift, and their class."""

    def __getitem__(self, index):
        direction = random.randrange(8)
        moves = [
            sign * (3 * self.K // 4 + random.randrange(self.K // 4))
            for sign in DIRECTIONS[direction]
        ]
        first, second = self.cut_pair(index, *moves)
        return shift_colours(first), shift_colours(second), direction


class NeighbourPairs(ImagePairs):
    """Pairs of patches at most K/32 pixels apart, and not equal."""

    def __getitem__(self, index):
        steps = range(-(self.K // 32), self.K // 32 + 1)
        moves = [move for move in itertools.product(steps, steps) if any(move)]
        return self.cut_pair(index, *random.choice(moves))


# %% [markdown]
# - `len(images) * repeat`: in an epoch every image contributes `repeat` pairs (100 in
#   the released code). `index % len(images)` is the image that belongs to an index.
# - `cut_pair` draws the corner of the first patch from the positions that keep the
#   second one inside the image. If the second patch lies higher (`down` is negative),
#   the first needs `-down` rows above it. Both patches have the shape (3, K, K).
# - `PositionPairs`: a sign is −1, 0 or 1, so along an axis with sign 0 the patch is not
#   moved. `shift_colours` is called separately for each patch, as the previous
#   experiment requires.
# - `NeighbourPairs`: `any(move)` excludes (0, 0). These patches are not perturbed.
#
# `StackDataset` joins the four data sets into one: an item is a dictionary with one
# pair from each. `DataLoader` draws the items in random order and stacks them into
# batches.


# %%
def join_pairs(images, repeat):
    """Join the four data sets of pairs into one; images are centred, (N, 3, H, W)."""
    return StackDataset(
        position_64=PositionPairs(images, 64, repeat),
        position_32=PositionPairs(images, 32, repeat),
        neighbours_64=NeighbourPairs(images, 64, repeat),
        neighbours_32=NeighbourPairs(images, 32, repeat),
    )


few_images = train_images[:8].cpu()  # this section runs on the CPU
centred_images = few_images - few_images.mean(0)
loader = DataLoader(join_pairs(centred_images, 3), batch_size=8, shuffle=True)
print(f"{len(loader.dataset)} items, {len(loader)} batches per epoch; one batch:")
for name, parts in next(iter(loader)).items():
    print(f"{name:14}", *[tuple(part.shape) for part in parts])

# %% [markdown]
# **Losses and loop.** `encoders` and `classifiers` are dictionaries with the keys 64
# and 32.


# %%
def compute_loss(batch, encoders, classifiers, weight):
    """Return the loss of Eq. 6, summed over both sizes: four terms."""
    loss = 0
    for K in (64, 32):
        first, second, direction = batch[f"position_{K}"]
        logits = classifiers[K](encoders[K](first), encoders[K](second))
        loss += F.cross_entropy(logits, direction)  # Eq. 5
        first, second = batch[f"neighbours_{K}"]
        difference = encoders[K](first) - encoders[K](second)
        loss += weight * difference.norm(dim=1).mean()  # Eq. 4
    return loss


# %%
def train_plainly(big_encoder, classifiers, batches, weight=1e-3):
    """Train in place with Adam, one step per batch; return the losses."""
    encoders = {64: big_encoder, 32: big_encoder.enc}
    modules = nn.ModuleList([big_encoder, *classifiers.values()])
    optimizer = torch.optim.Adam(modules.parameters(), lr=1e-4)
    losses = []
    for batch in batches:
        loss = compute_loss(batch, encoders, classifiers, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% [markdown]
# - Each batch is used for one step. Both patches of a pair pass through the same
#   encoder, so it receives gradients from both.
# - `cross_entropy` applies the softmax to the logits, (n, 8), and averages $-\log$ of
#   the probability of the true class. A classifier that guesses has the loss $\ln 8
#   \approx 2.08$ per size.
# - `norm(dim=1)` is one distance per pair, (n,). `weight` is $\lambda$. Its value,
#   0.001, is the example in the README of the released code, whose own default is 1.
# - The small encoder is a part of the large one, so `ModuleList` lists its parameters
#   once. Adam updates them with the gradients of all four terms.
#
# **Evaluation.** The score of an image is the largest value of its product map:

# %%
from paperlib.neighbors import nearest_distance


@torch.no_grad()
def embed_all(encoder, image, K, S):
    """Embed all K×K patches of an image (3, H, W), each separately: (h, w, D)."""
    patches = image.unfold(1, K, S).unfold(2, K, S)  # (3, h, w, K, K)
    h, w = patches.shape[1:3]
    return encoder(patches.permute(1, 2, 0, 3, 4).flatten(0, 1)).view(h, w, -1)


def score_plainly(big_encoder, bank_images, images, S):
    """Return one score per image (Eq. 8 to 10); both sizes at stride S."""
    product, mean = 1, bank_images.mean(0)
    for K, encoder in ((64, big_encoder), (32, big_encoder.enc)):
        grids = [embed_all(encoder, image - mean, K, S) for image in bank_images]
        bank = torch.cat([grid.flatten(0, 1) for grid in grids])
        size_maps = []
        for image in images:
            grid = embed_all(encoder, image - mean, K, S)
            distances = nearest_distance(grid.flatten(0, 1), bank)
            distances = distances.view(grid.shape[:2])
            size_maps.append(spread_patch_scores(distances, K, S, image.shape[-2:]))
        product = product * torch.stack(size_maps)
    return product.amax((1, 2))


# %% [markdown]
# - Each `unfold` cuts windows of length K at stride S along one axis, and appends their
#   pixels as a new axis. `permute` and `flatten` turn the grid of patches into a batch,
#   (h · w, 3, K, K).
# - `nearest_distance` and `spread_patch_scores` do what the loops of the last section
#   did: the smallest distance to the bank per patch, and the mean per pixel.
# - `torch.stack(size_maps)` has the shape (n, 256, 256), one map per image. The product
#   over both sizes is Eq. 9, and its maximum per image Eq. 10.
#
# **Is this the library's training?** Given the same pairs and the same initial weights,
# both must take the same steps. These are the names:
#
# | here | in the library |
# |---|---|
# | `SmallEncoder`, `BigEncoder` | `PatchEncoder`, `HierarchicalEncoder` |
# | `BigEncoder.enc` | `HierarchicalEncoder.small` |
# | `DirectionClassifier` | `PositionClassifier` |
# | `train_plainly` | `train_on_patches` |
# | `score_plainly` | `PatchSVDD.fit`, then `score` |
#
# The folded code draws the pairs as the library does: step by step, from a generator
# that is seeded with the number of the step.

# %% tags=["hide-input"]
from paperlib.patch_svdd import PositionClassifier, perturb, train_on_patches
from paperlib.patch_svdd.pairs import crop_patches
from paperlib.training import derive_seed


def draw_library_batches(images, repeat, batch_size, seed):
    """Yield the batches of the first epoch, with the library's pairs."""
    order_generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    order = torch.randperm(len(images) * repeat, generator=order_generator)
    for step, numbers in enumerate(order.split(batch_size)):
        generator = torch.Generator().manual_seed(derive_seed(seed, step))
        rows, batch = numbers % len(images), {}
        size, mean = images.shape[-2:], images.mean(0)
        for K in (64, 32):
            drawn = position_pairs(len(rows), size, K, generator)
            first, second = (
                perturb(crop_patches(images, mean, rows, K, corner), generator)
                for corner in drawn[:2]
            )
            batch[f"position_{K}"] = first, second, drawn.position
            batch[f"neighbours_{K}"] = [
                crop_patches(images, mean, rows, K, corner)
                for corner in neighbor_pairs(len(rows), size, K, generator)[:2]
            ]
        yield batch


# %% [markdown]
# `numbers` are the items of a batch, `rows` their images, and `crop_patches` cuts one
# patch per row and subtracts the mean image. The comparison runs in double precision,
# so that rounding errors cannot hide a difference:

# %%
torch.manual_seed(0)
library_encoder, plain_encoder = HierarchicalEncoder().double(), BigEncoder().double()
plain_encoder.load_state_dict(library_encoder.state_dict())
torch.manual_seed(0)  # the seed of the library's classifiers
first_classifiers = {64: PositionClassifier(), 32: PositionClassifier()}
plain_classifiers = {64: DirectionClassifier(), 32: DirectionClassifier()}
for K, classifier in plain_classifiers.items():
    classifier.load_state_dict(first_classifiers[K].state_dict())
    classifier.double()

# %% tags=["ledger:patch-svdd-eq-4:by-hand", "ledger:patch-svdd-eq-5:by-hand", "ledger:patch-svdd-eq-6:by-hand", "ledger:patch-svdd-algorithm-1:by-hand"]
settings = {"repeat": 3, "batch_size": 8, "seed": 0}
precise_images = few_images.double()
same_pairs = draw_library_batches(precise_images, **settings)
plain_losses = train_plainly(plain_encoder, plain_classifiers, same_pairs)

published = train_on_patches(
    library_encoder, precise_images, epochs=1, every=1, **settings
)
print("plain  :", *[f"{loss:.6f}" for loss in plain_losses])
print("library:", *[f"{record.loss:.6f}" for record in published.history])
for name, weight in library_encoder.state_dict().items():
    plain_weight = plain_encoder.state_dict()[name]
    torch.testing.assert_close(plain_weight, weight, rtol=0, atol=1e-9)

# %% tags=["remove-cell"]
library_losses = [record.loss for record in published.history]
np.testing.assert_allclose(library_losses, plain_losses, rtol=1e-6)
for K, trained_classifier in ((64, published.big), (32, published.small)):
    for name, weight in trained_classifier.state_dict().items():
        plain_weight = plain_classifiers[K].state_dict()[name]
        torch.testing.assert_close(plain_weight, weight, rtol=0, atol=1e-9)

# %% [markdown]
# In all three steps the losses are the same, and so are the weights afterwards. (The
# losses are close to $2 \ln 8 = 4.16$: the classifiers still guess.) The scores agree,
# too. To save time, all patches lie at stride 32 here:

# %%
few_tests = torch.cat([held_out_images[:1], defective_images[:2]]).double().cpu()
plain_scores = score_plainly(plain_encoder, precise_images[:2], few_tests, S=32)
coarse_detector = PatchSVDD(library_encoder, stride_small=32, stride_big=32)
library_scores = coarse_detector.fit(precise_images[:2]).score(few_tests)
print("plain  :", *[f"{score:.4f}" for score in plain_scores])
print("library:", *[f"{score:.4f}" for score in library_scores])

# %% tags=["remove-cell"]
torch.testing.assert_close(plain_scores, library_scores, rtol=0, atol=1e-4)

# %% [markdown]
# ## Dense training: what the library changes
#
# The released schedule for bottle is long: 209 images with 100 pairs each, in batches
# of 64, are 327 steps per epoch, and 300 epochs are 98,100 steps. The library's `train`
# needs minutes instead. It changes five things:
#
# | | released code | `train` |
# |---|---|---|
# | patches | each one cut out and embedded | all those of a few large crops, in one pass |
# | moves | any number of pixels | multiples of 2 pixels |
# | colour shift | one per patch; none for neighbours | two per crop |
# | initial weights | uniform, PyTorch's default | normal, Kaiming's |
# | optimiser | Adam, learning rate 1e-4 | Muon, one-cycle learning rate |
#
# - **One pass** over a crop shares the computation of neighbouring patches. Pairs are
#   read from the crop's feature map, which has a stride of 2, so moves are multiples of
#   2.
# - **Two shifts**: a shift is the same in the whole feature map. So each crop is
#   embedded twice: the first patches are read from one feature map, the second patches
#   from the other. Neighbours are read from the first.
# - **Kaiming's initialisation** {cite:p}`he2015` chooses the variance of the weights so
#   that the signal keeps its size from layer to layer; the default shrinks it to about
#   a thousandth in eight layers.
# - **Muon** ([Jordan et al., 2024](https://kellerjordan.github.io/posts/muon/)) updates
#   each weight matrix by a semi-orthogonal matrix: the gradient (averaged over some
#   steps), with all its singular values set to about 1. So directions with small
#   gradients are learned as fast as the others. A convolution's weights are flattened
#   to a matrix first. Biases and the classifiers' last layers are trained with Adam.
# - **One-cycle** ([Smith and Topin, 2018](https://arxiv.org/abs/1708.07120)): the
#   learning rate rises from a small value to its maximum in the first 30 % of the
#   steps, and then falls to 0.
#
# The library's `train_on_patches` follows the released code with three differences,
# unless it is called with `as_released=True`: Kaiming's initial weights, no clipped
# pairs, and trained last layers of the classifiers.
#
# We first compare the cost. The code below measures the processor time of one step: the
# plain one with 64 pairs per data set (without cutting them out), and the dense one
# with four crops and 1,024 pairs per crop.

# %% tags=["hide-input"]
import time

from paperlib.complexity import time_call


def measure_seconds(function, *arguments):
    """Return the processor seconds of a call, the smaller of two readings.

    Processor time hardly depends on what other programs do. A GPU has its own clock.
    """
    if run.device.type == "cuda":
        return time_call(lambda: function(*arguments), run.device)
    readings = []
    for _ in range(2):
        start = time.process_time()
        function(*arguments)
        readings.append(time.process_time() - start)
    return min(readings)


# %%
def take_dense_steps(shared_shift):
    """Take two steps of the library's training."""
    size = {"steps": 2, "crops": 4, "side": 160, "pairs": 1024}
    encoder = HierarchicalEncoder().to(run.device)
    train(encoder, train_images[:8], shared_shift=shared_shift, **size)


# %%
timed_encoder = BigEncoder().to(run.device)
timed_classifiers = {K: DirectionClassifier().to(run.device) for K in (64, 32)}
timed_loader = DataLoader(join_pairs(centred_images, 8), batch_size=64)
timed_batch = {
    name: [part.to(run.device) for part in parts]
    for name, parts in next(iter(timed_loader)).items()
}
plain_step = (timed_encoder, timed_classifiers, [timed_batch])
step_seconds = {
    "patch by patch": (64, measure_seconds(train_plainly, *plain_step)),
    "dense": (4096, measure_seconds(take_dense_steps, False) / 2),
    "dense, shared shift": (4096, measure_seconds(take_dense_steps, True) / 2),
}
print("one step              pairs per set   seconds   seconds per 1,000 pairs")
for name, (n_pairs, seconds) in step_seconds.items():
    per_thousand = 1000 * seconds / n_pairs
    print(f"{name:21} {n_pairs:13,} {seconds:9.2f} {per_thousand:25.3f}")
released_hours = 98_100 * step_seconds["patch by patch"][1] / 3600
print(f"the released schedule for bottle, patch by patch: {released_hours:.0f} hours")

# %% tags=["remove-cell"]
cost = {name: seconds / pairs for name, (pairs, seconds) in step_seconds.items()}
run.expect(
    cost["patch by patch"] > 20 * cost["dense"],
    "a pair of the dense training costs less than a twentieth",
)
run.expect(
    1.2 * cost["dense, shared shift"]
    < cost["dense"]
    < 2.2 * cost["dense, shared shift"],
    "two shifts take up to twice as long as a shared one",
)

# %% [markdown]
# A pair costs far less in the dense training. Its pairs are less independent, though:
# they come from four crops, not from 64 images. The last row is `shared_shift=True`:
# each crop is embedded once, and both patches of a pair share a shift, which leaves the
# tint as a shortcut. That is up to twice as fast, and suitable for grey images only,
# which have no tint. Solar cells are such images, and the stored runs of this chapter
# shared their shifts.
#
# What the optimiser and the initial weights contribute was measured in these runs: 100
# steps each, one seed, one change at a time. The number is the share of directions that
# the classifiers name correctly for pairs from cells that were not used in training.

# %% tags=["hide-input"]
long_run = companion.read_result("patch_svdd_cells")
RECIPES = {
    "λ = 0.001": "train() as it is",
    "Adam": "Adam instead of Muon",
    "PyTorch's first weights": "PyTorch's initial weights",
}
direction_shares = {  # per run: shares for K = 64 and K = 32, mono cells
    result["name"]: result["positions"]["mono"]
    for result in long_run["runs"]
    if result["seed"] == 0 and "positions" in result
}
print("100 steps, mono cells          K = 64   K = 32   (chance 12.5 %)")
for name, label in RECIPES.items():
    large_share, small_share = direction_shares[name]
    shares_text = [f"{100 * share:.1f} %" for share in (large_share, small_share)]
    print(f"{label:28} {shares_text[0]:>8} {shares_text[1]:>8}")

# %% tags=["remove-cell"]
assert abs(direction_shares["Adam"][0] - direction_shares["λ = 0.001"][0]) < 0.02
assert (
    0.04
    < direction_shares["λ = 0.001"][0] - direction_shares["PyTorch's first weights"][0]
)

# %% [markdown]
# The initialisation matters: with PyTorch's initial weights fewer directions are
# correct after the same number of steps. One run each with Muon and Adam (with the same
# learning-rate cycle, up to 0.003) shows no difference.
#
# ## Train it live: from guessing to naming directions
#
# Now an encoder is trained with `train`, in less than a minute. One budget, `BUDGET`,
# is used for this training and for those that are compared with it below.

# %%
from paperlib.patch_svdd import position_accuracy

STEPS = run.choose(smoke=120, full=1200)
BUDGET = {"steps": STEPS, "crops": 1, "side": 192, "pairs": 1024, "shared_shift": True}

torch.manual_seed(0)
live = HierarchicalEncoder().to(run.device)
training = train(
    live,
    train_images,
    **BUDGET,
    every=max(1, STEPS // 15),
    checkpoint=runtime.checkpoint_path("patch svdd", *BUDGET.values(), train_images),
    progress=run.full,
)
test_accuracy = position_accuracy(live, training, held_out_images[:8])
print(f"unseen functional cells: K = 64 {test_accuracy.big:.0%},", end=" ")
print(f"K = 32 {test_accuracy.small:.0%} of the directions are correct")

# %% [markdown]
# - Every step crops a square of 192 pixels and draws 1,024 pairs of each kind from it.
#   The cells are grey, so both patches of a pair may share a shift, and the crop is
#   embedded once.
# - If a checkpoint folder is set (as on Colab), an interrupted training resumes from
#   its last record, and a finished one is not repeated.
# - `training.history` holds one record per `every` steps: the loss, both accuracies on
#   the training pairs, and the mean distances of neighbours.
# - `position_accuracy` draws new pairs from images that were not used in training.

# %% tags=["hide-input", "ledger:patch-svdd-eq-6:measured"] mystnb={"image": {"alt": "Two line plots against the training step. Above, the loss starts at 4.2, stays there for some thirty steps and then falls. Below, the share of correct directions starts at 12.5 percent; the curve of the 64-pixel patches rises to more than a third, that of the 32-pixel patches to about a fifth."}}
steps, losses, accuracies_small, accuracies_big, *_ = np.array(training.history).T
_, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 5.6), sharex=True)
upper.plot(steps, losses)
upper.axhline(2 * np.log(8), color="black", lw=1, ls=":", label="guessing")
upper.set(ylabel="loss", title="The loss leaves the level of guessing")
lower.plot(steps, 100 * accuracies_big, "o-", ms=4, label="K = 64")
lower.plot(steps, 100 * accuracies_small, "s-", ms=4, label="K = 32")
lower.axhline(12.5, color="black", lw=1, ls=":", label="guessing")
lower.set(xlabel="training step", ylabel="correct directions, %", ylim=(0, None))
upper.legend()
lower.legend()
plt.show()

# %% tags=["remove-cell"]
run.expect(test_accuracy.big > 0.3, "large patches: three in ten correct")
run.expect(test_accuracy.small > 0.155, "small patches: above guessing")
run.expect(3.9 < losses[:4].mean() < 4.4, "the loss starts at the level of guessing")

# %% [markdown]
# A loss of $2 \ln 8 = 4.16$ corresponds to guessing at both sizes (the terms with
# $\lambda = 0.001$ add less than 0.04). For some 30 steps the loss hardly falls;
# then the encoder begins to distinguish directions. It cannot name all of them
# correctly, because a solar cell looks the same along its bars. Do not expect 100 %.
#
# ## Seen in two dimensions: which loss separates the patches?
#
# t-SNE {cite:p}`vandermaaten2008` draws embeddings in a plane so that neighbours stay
# neighbours. A dot is a 64-pixel patch of one of three held-out images, coloured by its
# row in the image. Three panels show solar cells under the three losses, each trained
# with the same `BUDGET` on the same images; the one with the task is the encoder just
# trained. The fourth panel shows a texture, brick, trained with the same loss, steps,
# pairs and number of images.
#
# :::{admonition} Predict first
# :class: tip
# In which panels do dots of one colour form groups?
# :::

# %%
from paperlib.datasets import textures

crop_settings = {"side": 128, "size": 256}
n_train = len(train_images)
brick = stack_images(textures("brick", "train", count=n_train, **crop_settings))
brick_test = stack_images(textures("brick", "test", count=3, **crop_settings))

encoders, trainings = {"patch_svdd": live}, {"patch_svdd": training}
for kind in ("centre", "neighbors", "brick"):
    is_brick = kind == "brick"
    normals, objective = (brick, "patch_svdd") if is_brick else (train_images, kind)
    torch.manual_seed(0)
    encoders[kind] = HierarchicalEncoder().to(run.device)
    path = runtime.checkpoint_path(f"svdd {kind}", *BUDGET.values(), normals)
    options = {"objective": objective, "checkpoint": path, "progress": run.full}
    trainings[kind] = train(encoders[kind], normals, **BUDGET, **options)

brick_encoder, brick_training = encoders["brick"], trainings["brick"]
brick_accuracy = position_accuracy(brick_encoder, brick_training, brick_test)
print(f"unseen brick, K = 64: {brick_accuracy.big:.0%} of the directions", end=" ")
print("are correct; chance 12.5 %")

# %% [markdown]
# Two numbers per encoder are measured too: the spread of its embeddings, and how often
# the nearest neighbour of a patch, among patches of other images, lies in the same row.

# %%
N_ROWS = 13  # rows (and columns) of 64-pixel patches at stride 16
patch_numbers = torch.arange(3 * N_ROWS**2, device=run.device)
patch_rows = patch_numbers % N_ROWS**2 // N_ROWS  # of all patches of three images


def embed_and_match(encoder, images, other_images):
    """Embed the large patches of three images.

    Also return the share whose nearest patch of the other images is in the same row.
    """
    mean = other_images.mean(0)
    embeddings = encoder.embed(images - mean).big.flatten(0, 2)
    bank = encoder.embed(other_images - mean).big.flatten(0, 2)
    _, nearest = nearest_distance(embeddings, bank, return_index=True)
    nearest_rows = nearest % N_ROWS**2 // N_ROWS
    return embeddings, (nearest_rows == patch_rows).float().mean()


# %% [markdown]
# - `embeddings`, (507, 64): three images of 13×13 patches. `bank`, (676, 64): four
#   images.
# - Patches are numbered image by image and row by row. So `% N_ROWS**2`, the remainder
#   of a division by 169, is the number within the image; `// N_ROWS`, the quotient of a
#   division by 13, is the row.

# %% tags=["hide-output"]
NAMES = {
    "centre": "one centre",
    "neighbors": "neighbours",
    "patch_svdd": "with a task",
    "brick": "brick, with a task",
}
torch.manual_seed(0)
random_encoder = HierarchicalEncoder().to(run.device)  # the initial weights of all four
embeddings_after, same_row, ratios = {}, {}, {}
print("64-pixel patches      spread, after / before", end="")
print("   same row, before   after   (chance 8 %)")
for kind, name in NAMES.items():
    image_sets = (held_out_images[:3], train_images[:4])
    if kind == "brick":
        image_sets = (brick_test, brick[:4])
    embeddings_before, row_before = embed_and_match(random_encoder, *image_sets)
    embeddings, same_row[kind] = embed_and_match(encoders[kind], *image_sets)
    embeddings_after[kind] = embeddings
    ratios[kind] = measure_spread(embeddings) / measure_spread(embeddings_before)
    print(f"{name:20} {ratios[kind]:#23.2g} {row_before:18.0%} {same_row[kind]:7.0%}")

# %% tags=["remove-cell"]
run.expect(
    max(same_row["centre"], same_row["neighbors"]) < same_row["patch_svdd"] - 0.1,
    "with a task more nearest neighbours lie in the same row",
)
run.expect(same_row["patch_svdd"] > 0.5, "most lie in the same row with a task")
run.expect(max(ratios["centre"], ratios["neighbors"]) < 0.01, "the spread collapses")
run.expect(same_row["brick"] < 0.2, "brick's patches have no row of their own")
run.expect(brick_accuracy.big > 0.2, "brick's encoder names directions")

# %% tags=["hide-cell", "ledger:patch-svdd-figure-8:measured", "ledger:patch-svdd-figure-10:measured", "ledger:patch-svdd-figure-2:measured"] mystnb={"image": {"alt": "Four scatter plots of t-SNE, coloured by the row of the patch. Under one centre and under neighbours alone the colours mix, but for a few small groups. With the task the dots form groups of one or a few colours. For brick the dots lie on a ring, and colours mix all around it."}}
from sklearn.manifold import TSNE

row_colors = {
    "c": patch_rows.cpu(),
    "cmap": plt.get_cmap("viridis", N_ROWS),
    "vmin": -0.5,
    "vmax": N_ROWS - 0.5,
}
fig, panels = plt.subplots(2, 2, figsize=(5.8, 5.6))
for ax, (kind, name) in zip(panels.flat, NAMES.items(), strict=True):
    vectors = embeddings_after[kind].cpu().numpy()
    coordinates = TSNE(init="pca", random_state=0).fit_transform(vectors)
    mappable = ax.scatter(*coordinates.T, s=10, **row_colors)
    ax.set(title=name, xticks=[], yticks=[])
    ax.set_xlabel(f"same row: {same_row[kind]:.0%}")
fig.colorbar(mappable, ax=panels, label="row of the patch", ticks=range(N_ROWS))
fig.suptitle("Only cells with the task form groups of one row")
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# In one: solar cells with the task. There, the nearest neighbour of most patches, among
# other cells, lies in the same one of 13 rows (by chance: one in 13), and the dots of a
# row form groups. Before training, the share is about four in ten, because random
# weights already distinguish a patch with a bar or a border from others. The two losses
# that only pull embeddings together lose much of this ability, and the task adds to it.
# Brick's encoder names directions, because mortar runs in lines. But the nearest
# neighbours of its patches lie in any row: a crop of brick starts at a random place, so
# no patch has a fixed position.
#
# t-SNE hides the scale. The first two panels are as large as the others, but the spread
# of their embeddings is less than a hundredth of what it was before training. At that
# scale each is a single cluster, as in the paper's Fig. 10.
# :::
#
# ## Nearest neighbours as images: what does the encoder consider similar?
#
# From here on, we again use the encoder of the first figure, which was trained for
# longer. The figure illustrates Eq. 8: of each test cell it shows the patch with the
# largest distance, and below it the nearest patch of the functional cells.

# %%
query_images = torch.cat([held_out_images[:3], defective_images[:3]])
queries = trained_encoder.embed(query_images - mean_image).big.flatten(0, 2)
distances, indices = nearest_distance(queries, detector.big, return_index=True)
patch_distances = distances.view(6, N_ROWS**2)  # one row per image
nearest_indices = indices.view(6, N_ROWS**2)


def cut_patch(image, number):
    """Cut out a 64×64 patch; patches are numbered row by row."""
    row, column = divmod(number, N_ROWS)
    return image[:, 16 * row : 16 * row + 64, 16 * column : 16 * column + 64]


# %% tags=["hide-input", "ledger:patch-svdd-figure-3:measured"] mystnb={"image": {"alt": "Twelve patches in four rows of three: test patches, and under each the nearest functional patch. The three functional ones, at the top, are plain grey, two of them with a border of the cell and one of these with faint lines; their neighbours look alike, without the lines, at distances of 0.94 to 1.28. The three defective ones, a thick dark bar, cracks and a dark triangle, have neighbours that look different, at distances of 1.81 to 2.46."}}
fig, panels = plt.subplots(4, 3, figsize=(5.6, 8))
axes_pairs = zip(panels[::2].flat, panels[1::2].flat, strict=True)
for i, (upper, lower) in enumerate(axes_pairs):
    number = int(patch_distances[i].argmax())
    title = "functional" if i < 3 else "defective"
    viz.panel(upper, cut_patch(query_images[i], number), title)
    image_number, nearest_number = divmod(int(nearest_indices[i, number]), N_ROWS**2)
    nearest_patch = cut_patch(normal_images[image_number], nearest_number)
    viz.panel(lower, nearest_patch, f"distance {patch_distances[i, number]:.2f}")
for ax, name in zip(panels[:, 0], ("test patch", "nearest") * 2, strict=True):
    ax.set_ylabel(name)
fig.suptitle("The farthest patch, and its neighbour")
plt.show()

# %% tags=["remove-cell"]
largest_distances = patch_distances.amax(1)
run.expect(
    bool(largest_distances[3:].min() > 1.3 * largest_distances[:3].max()),
    "the largest distances of the defective cells are clearly larger",
)

# %% [markdown]
# Even the farthest patch of a functional cell has a neighbour that looks alike. Those
# of the defective cells look different from their neighbours, and the distances are
# larger: 1.8 to 2.5, against 0.9 to 1.3. Over all test cells the two ranges overlap;
# the section after the next measures how much.
#
# ## From an image to a score, step by step
#
# The figure shows all steps for one defective cell. The 57×57 and 13×13 distances (Eq.
# 8) are averaged at each pixel, the two maps are multiplied (Eq. 9), and the largest
# value is the score (Eq. 10). Each map has its own colour scale.

# %% tags=["hide-input", "ledger:patch-svdd-figure-6:redrawn"] mystnb={"image": {"alt": "Six panels in the order of the steps. Above: a defective cell with a dark bar, a fine grid of 57 by 57 distances, and a coarse one of 13 by 13. Below: the small map, the big map, and their product with a circle on its largest value."}}
defective_image = defective_images[:1]
embeddings_by_size = trained_encoder.embed(defective_image - mean_image)
stages = []
for name, n_patches in (("small", 57), ("big", 13)):  # per side
    queries = getattr(embeddings_by_size, name).flatten(0, 2)
    distances = nearest_distance(queries, getattr(detector, name))
    distance_map = distances.view(n_patches, n_patches)
    stages.append((distance_map, f"{n_patches}×{n_patches} distances"))
image_maps = detector.anomaly_maps(defective_image)
stages.append((image_maps.small[0], "small map"))
stages.append((image_maps.big[0], "big map"))
stages.append((image_maps.mult[0], "product"))

fig, axes = plt.subplots(2, 3, figsize=(6.4, 5.2))
fig.suptitle("From 57×57 and 13×13 distances to one score")
panels = axes.flat
viz.panel(panels[0], defective_image[0], "image")
for ax, (values, title) in zip(panels[1:], stages, strict=True):
    companion.draw_scores(ax, values, title)
row, column = divmod(int(image_maps.mult[0].argmax()), 256)
circle = {"mfc": "none", "mec": viz.VERMILION, "ms": 14, "mew": 2}
panels[5].plot(column, row, "o", **circle)
panels[5].set_xlabel(f"score {image_maps.scores[0]:.2f}, circled")
plt.show()

# %% [markdown]
# ## Trained against random: the baseline for every number
#
# :::{admonition} Predict first
# :class: tip
# Take an encoder whose weights were never trained. The bank holds its embeddings of
# functional cells, and defects are found by the nearest neighbour as before. What AUROC
# do you expect? 0.5 corresponds to guessing.
# :::
#
# AUROC (Eq. 1) is the share of pairs of one functional and one defective cell that the
# scores rank correctly. To save time, small patches lie at stride 8 here.

# %%
COMPARED = {
    "trained": (trained_encoder, normal_images),
    "trained, 8 in the bank": (trained_encoder, normal_images[:8]),
    "random": (random_encoder, normal_images),
}
stride_small = run.choose(smoke=8, full=4)
test_images = torch.cat([held_out_images, defective_images])
labels = torch.tensor([0] * len(held_out_images) + [1] * len(defective_images))

test_maps = {}
for name, (encoder, bank_images) in COMPARED.items():
    compared_detector = PatchSVDD(encoder, stride_small=stride_small).fit(bank_images)
    test_maps[name] = compared_detector.anomaly_maps(test_images)

# %% tags=["hide-output", "ledger:patch-svdd-eq-1:by-hand", "ledger:patch-svdd-table-3:measured"]
from paperlib.metrics import auroc

aurocs, map_kinds = {}, ("small", "big", "sum", "mult")
print(f"AUROC of {len(held_out_images)} functional and", end=" ")
print(f"{len(defective_images)} defective cells, {len(normal_images)} in the bank")
print("encoder                    small     big     sum    mult")
for name, encoder_maps in test_maps.items():
    scores = {k: getattr(encoder_maps, k).amax((1, 2)).cpu() for k in map_kinds}
    aurocs[name] = {kind: auroc(labels, scores[kind]) for kind in map_kinds}
    print(f"{name:23}", "".join(f"{value:8.2f}" for value in aurocs[name].values()))
    # Eq. 1, pair by pair:
    functional_scores = scores["mult"][labels == 0]
    defective_scores = scores["mult"][labels == 1]
    is_ranked_correctly = defective_scores[:, None] > functional_scores
    assert abs(is_ranked_correctly.double().mean() - aurocs[name]["mult"]) < 1e-6

# %% tags=["remove-cell"]
run.expect(min(aurocs["random"].values()) > 0.7, "random weights find defects")
run.expect(
    all(aurocs["trained"][k] > aurocs["random"][k] for k in map_kinds),
    "on these cells the trained encoder is higher in every column",
)

# %% [markdown]
# - `amax((1, 2))` is the largest value of each map: one score per image and kind of
#   map.
# - `defective_scores[:, None] > functional_scores` compares all pairs by broadcasting:
#   (20, 1) with (20,) results in (20, 20). The mean of the comparisons is Eq. 1.
#
# :::{dropdown} Answer
# Far above 0.5: 0.75 or more with every map. Convolutions with random weights still
# distinguish dark from bright and edges from plain areas, and the nearest neighbour
# does the rest. On these few cells the trained encoder is higher in every column. The
# authors compare with a random encoder too; their numbers could not be found.
# :::
#
# Is that the effect of training? One draw of cells shows little. The stored long run
# repeats the comparison with three seeds, each with its own split and initial weights,
# on both kinds of solar cells. It trains for 200 steps, and adds synthetic defects with
# masks to measure the pixel AUROC.

# %% tags=["hide-input"]
LABELS = {
    "random": "random",
    "trained": "trained, 200 steps",
    "committed": "used above, 500 steps",
}
results = {}  # name of a run → its AUROCs, one dictionary per seed
for result in long_run["runs"]:
    results.setdefault(result["name"], []).append(result["auroc"])
print("AUROC of the product map, mean ± standard deviation over seeds")
print(f"{'':29} functional against defective  synthetic defects, pixels")
print(f"{'encoder':21} seeds ", *[f"{k:13} " for k in ("mono", "poly") * 2])
for name, label in LABELS.items():
    seeds = results[name]
    print(f"{label:21} {len(seeds):5}", end="  ")
    for measure, kind in itertools.product(("image", "pixel"), ("mono", "poly")):
        seed_aurocs = [seed[f"{kind} {measure} mult"] for seed in seeds]
        text = f"{np.mean(seed_aurocs):.3f}"
        if len(seeds) > 1:
            text += f" ± {np.std(seed_aurocs, ddof=1):.3f}"
        print(f"{text:13}", end="  ")
    print()
stamp = long_run["stamp"]
print(f"{stamp['date']}, {stamp['device']},", stamp["recipe"]["bank"], "in the bank")

# %% tags=["hide-input"]
for kind in ("mono", "poly"):
    trained_auroc, random_auroc = (
        np.array([seed[f"{kind} pixel mult"] for seed in results[name]])
        for name in ("trained", "random")
    )
    n_better = (trained_auroc > random_auroc).sum()
    print(f"{kind}, pixels: trained above random in {n_better} of 3 seeds")

# %% [markdown]
# **These runs do not show that training helps to distinguish functional from defective
# cells.** The trained mean is 0.02 higher on mono and 0.03 lower on poly, and the three
# seeds of one encoder differ by up to 0.1. Synthetic defects are *localised* better
# with training, in two of three seeds for each kind, and the trained encoders' pixel
# AUROC varies less from seed to seed. Report the number of a trained encoder only
# together with that of a random one.
#
# Not even a fixed seed repeats a training everywhere. Another processor, or another
# number of threads, adds floating-point numbers in another order; the sums are rounded
# differently, and every further step amplifies the difference. When these runs were
# repeated on another processor, the random encoders' results stayed the same, and those
# of trained ones changed by as much as from one seed to the next.
#
# What training did change is what t-SNE showed: the embedding encodes better which row
# a patch lies in. The task requires that. Whether it helps to find a defect is another
# question, and the answer differs from product to product.
#
# This is not a result about the paper. Images, amount of training, optimiser, initial
# weights and shared shifts all differ. As for the amount, 200 steps of 8 crops with
# 1,024 pairs are 1.6 million pairs per data set; the released schedule for bottle has
# 6.3 million, each from a patch of its own.
#
# ## Ablation: which part of the recipe matters?
#
# In the same stored run, encoders were also trained for 100 steps with one change at a
# time, one seed each. Two columns hold the paper's numbers, where they could be found:
# means over the 15 classes of MVTec AD. Those under *maps* are read off the bars of a
# figure, ± 0.003, so they can differ from those under *loss* for the same encoder.
# Compare the order, not the values. Two seeds of one recipe often differ by 0.05, and
# some by 0.1: **smaller differences mean nothing here.**

# %% tags=["hide-input", "ledger:patch-svdd-table-2:measured", "ledger:patch-svdd-figure-12:measured", "ledger:patch-svdd-figure-14:measured"]
ROWS = {  # label → run, map, and the paper's detection and segmentation
    "loss: random": ("random", "mult"),
    "  one centre": ("L_SVDD", "mult", 0.703, 0.832),
    "  neighbours": ("L_SVDD'", "mult", 0.739, 0.880),
    "  neighbours, task": ("λ = 0.001", "mult", 0.921, 0.957),
    "maps: 64, flat": ("flat", "big", 0.810, 0.879),
    "  64, hierarchical": ("λ = 0.001", "big", 0.894, 0.932),
    "  32": ("λ = 0.001", "small", 0.902, 0.957),
    "  product": ("λ = 0.001", "mult", 0.920, 0.957),
    "λ: 0": ("λ = 0", "mult"),
    **{f"  {n}": (f"λ = {n}", "mult") for n in ("0.001", "0.01", "0.1", "1")},
}
MEASURES = ("mono image", "poly image", "mono pixel", "poly pixel")
seed_0 = {name: aurocs_per_seed[0] for name, aurocs_per_seed in results.items()}
print(f"{'AUROC':20} images        pixels        the paper's")
print(f"{'':20} mono   poly   mono   poly   images pixels  directions")
for label, (name, part, *quoted) in ROWS.items():
    row_aurocs = [seed_0[name][f"{measure} {part}"] for measure in MEASURES] + quoted
    columns = "  ".join(f"{value:.3f}" for value in row_aurocs)
    large_share = f"{direction_shares[name][0]:.0%}" if name in direction_shares else ""
    print(f"{label:20} {columns:42} {large_share:>8}")

# %% [markdown]
# *Images*: functional against defective cells. *Pixels*: synthetic defects. *Flat* is
# an encoder of four 5×5 convolutions for 64-pixel patches, without hierarchy. The last
# column is the share of directions named correctly for 64-pixel patches of held-out
# mono cells.
#
# - **The loss.** For images, the paper's order (one centre, neighbours, with the task)
#   does not appear, and on mono no trained encoder of this table is more than 0.01
#   above the random one. On mono, the task and neighbours alone are equal (0.77 and
#   0.76); on poly, the task is the lowest of the three (0.66 against 0.77 of neighbours
#   alone). For pixels the task adds 0.06 (mono) and 0.09 (poly) to neighbours alone.
# - **The hierarchy.** For pixels the hierarchical encoder scores 0.06 higher than the
#   flat one for the same patches, on both kinds of cells, little more than the spread
#   of seeds. It also names more directions. For images it is 0.05 higher on mono, and
#   lower on poly (0.58 against 0.70). For pixels the product and the 32-pixel patches
#   are equal within the spread, as in the paper.
# - **$\lambda$.** Up to 0.01, there is no change large enough for one seed to show. At
#   1 everything has collapsed: directions are guessed. The AUROC does not show it,
#   because the bank still compares what little is left, about as well as with
#   neighbours alone. In the paper's Fig. 14, detection on cable improves as $\lambda$
#   falls, and detection on wood improves as it rises. Here the AUROC of poly images is
#   highest where the encoder has collapsed, and mono shows no order: its lowest value
#   (0.63 at $\lambda = 0.1$) belongs to the encoder that names most directions.

# %% tags=["remove-cell"]
assert direction_shares["λ = 1"][0] < 0.15
assert 0.28 < direction_shares["flat"][0] < direction_shares["λ = 0.001"][0]

# %% [markdown]
# ## From hours to minutes: what one pass saves, and what a bounded bank saves
#
# A review of the released code reports about ten hours for one evaluation of 3,000
# training and 1,000 test images, and the released code evaluates after every epoch. We
# time its steps and ours on one image: embedding patch by patch in batches of 64,
# spreading scores in a loop, and searching a KD-tree one query at a time. (The released
# code uses the tree for large patches and an approximate index, NGT, for small ones.
# NGT cannot be installed everywhere; the tree replaces it here.)
#
# With $N$ training and $M$ test images, $e$ seconds to embed one, $s$ to spread its
# scores and $q(N)$ to search for its patches among those of $N$ images, an evaluation
# takes
#
# $$
# \begin{aligned} T(N, M) = {} & (N + M)\, e \\ & {} + M\, \big(q(N) + s\big) \end{aligned}
# $$
#
# :::{admonition} Predict first
# :class: tip
# Which of $e$, $s$ and $q$ falls the most when all patches are embedded in one pass and
# the search computes all distances with a matrix product,
# $\lVert q - b \rVert^2 = \lVert q \rVert^2 - 2\, q \cdot b + \lVert b \rVert^2$?
# And which of the two searches will be faster when the bank gets very large?
# :::
#
# The published steps: cut out every patch, spread each score, search for each query.


# %%
def embed_patch_by_patch(image, encoder, K, S):
    """Cut out the K×K patches at stride S and embed them in batches of 64."""
    patches = image.unfold(2, K, S).unfold(3, K, S)[0]
    patches = patches.permute(1, 2, 0, 3, 4).flatten(0, 1)
    with torch.no_grad():
        return torch.cat([encoder(batch) for batch in patches.split(64)])


def spread_in_a_loop(scores):
    """Return a map: per pixel, the mean score of the 32×32 patches that cover it."""
    total, count = torch.zeros(256, 256), torch.zeros(256, 256)
    for (i, j), score in np.ndenumerate(scores.numpy()):
        total[4 * i : 4 * i + 32, 4 * j : 4 * j + 32] += score
        count[4 * i : 4 * i + 32, 4 * j : 4 * j + 32] += 1
    return total / count.clamp_min(1)


def search_one_by_one(tree, vectors):
    """Search a KD-tree for the nearest neighbour of each vector."""
    return [tree.query(vector[None]) for vector in vectors]


# %% [markdown]
# `tree.query` receives queries of shape (1, 64), and returns their distances and the
# indices of their neighbours, both (1, 1). First embedding and spreading are timed,
# then the search in banks of 2, 8 and 32 images:

# %%
centred_image, patch_scores = defective_image - mean_image, torch.rand(57, 57)
one_pass_time = measure_seconds(trained_encoder.embed, centred_image)
embedding_times = {"published": 0, "ours": one_pass_time}
for encoder, K, S in ((trained_encoder.small, 32, 4), (trained_encoder, 64, 16)):
    part_time = measure_seconds(embed_patch_by_patch, centred_image, encoder, K, S)
    embedding_times["published"] += part_time
spreading_times = {
    "published": measure_seconds(spread_in_a_loop, patch_scores),
    "ours": measure_seconds(spread_patch_scores, patch_scores, 32, 4, 256),
}

# %% tags=["remove-cell"]
our_map = spread_patch_scores(patch_scores, 32, 4, 256)
torch.testing.assert_close(our_map, spread_in_a_loop(patch_scores))

# %%
from sklearn.neighbors import KDTree

BANK_SIZES = (2, 8, 32)  # training images in the bank
queries = trained_encoder.embed(centred_image).small.flatten(0, 2)
tree_queries = queries[::40].cpu().numpy()  # the tree's time is scaled up from these
search_times = {"published": [], "ours": []}
for n_images in BANK_SIZES:
    bank = detector.small[: n_images * 57**2]
    tree = KDTree(bank.cpu().numpy())
    tree_time = measure_seconds(search_one_by_one, tree, tree_queries)
    search_times["published"].append(tree_time / len(tree_queries) * len(queries))
    search_times["ours"].append(measure_seconds(nearest_distance, queries, bank))

# %% tags=["remove-cell"]
tree_distances = tree.query(tree_queries)[0][:, 0]
our_distances = nearest_distance(queries, bank)[::40].cpu()
np.testing.assert_allclose(tree_distances, our_distances, atol=1e-4)

# %% tags=["hide-cell"]
time_rows = {"embedding": embedding_times, "spreading": spreading_times}
for i, n_images in enumerate(BANK_SIZES):
    row_name = f"searching {n_images * 57**2:,} patches"
    time_rows[row_name] = {way: times[i] for way, times in search_times.items()}
print("seconds per image             published      ours   times faster")
for name, times in time_rows.items():
    factor = times["published"] / times["ours"]
    print(f"{name:28} {times['published']:10.4f} {times['ours']:9.4f} {factor:12.0f}")

# %% tags=["remove-cell"]
gains = {name: times["published"] / times["ours"] for name, times in time_rows.items()}
first_gain, *_, last_gain = list(gains.values())[2:]
run.expect(gains["embedding"] > 8, "embedding in one pass is many times faster")
run.expect(gains["spreading"] == max(gains.values()), "spreading gains the most")
run.expect(first_gain > last_gain, "the gain of the search falls with the bank")

# %% [markdown]
# What do these times mean for large sets? The formula for $T(N, M)$ extrapolates:
# $q(N)$ as a power of $N$ for the tree, fitted to the three measurements, and in
# proportion to $N$ for the products.

# %%
exponent, offset = np.polyfit(np.log(BANK_SIZES), np.log(search_times["published"]), 1)


def search_in_tree(n_train):
    return np.exp(offset) * n_train**exponent


def search_by_products(n_train):
    return search_times["ours"][-1] * n_train / BANK_SIZES[-1]


def search_bounded_bank(n_train):
    return search_by_products(np.minimum(n_train, 60))


def estimate_seconds(n_train, n_test, way, search):
    """Estimate the time of one evaluation by the formula above."""
    embedding, spreading = embedding_times[way], spreading_times[way]
    per_test_image = search(n_train) + spreading
    return (n_train + n_test) * embedding + n_test * per_test_image


# %% tags=["hide-cell"] mystnb={"image": {"alt": "Log-log plot of hours for one evaluation against the number of training images from 2 to 3,000, the measured range up to 32 shaded. The published way starts far above ours. The line of ours with all vectors is steeper and meets the published one near the right end; with a bank of at most 60 images it stays far below."}}
WAYS = {
    "published": ("published", search_in_tree),
    "ours, the same maps": ("ours", search_by_products),
    "ours, bank of at most 60 images": ("ours", search_bounded_bank),
}
set_sizes = np.array([2, 8, 32, 100, 300, 1000, 3000])
_, ax = plt.subplots()
for (label, (way, search)), marker in zip(WAYS.items(), "os^", strict=True):
    hours = estimate_seconds(set_sizes, set_sizes / 3, way, search) / 3600
    ax.loglog(set_sizes, hours, marker=marker, ms=5, label=label)
    minutes = estimate_seconds(40, 20, way, search) / 60
    print(f"{label:34} 40 + 20: {minutes:4.1f} minutes;", end=" ")
    print(f"3,000 + 1,000: {hours[-1]:5.1f} hours")
print(f"search time grows like N^{exponent:.2f} with the tree, like N with products")
ax.axvspan(set_sizes[0], BANK_SIZES[-1], color=viz.GREY, alpha=0.15)
ax.set(title="A bounded bank keeps large evaluations short")
ax.set_xlabel("training images N, and N / 3 to test (shaded: measured)")
ax.set_ylabel("hours for one evaluation")
companion.log_ticks(ax.xaxis, set_sizes)
companion.log_ticks(ax.yaxis, (0.0001, 0.001, 0.01, 0.1, 1, 10))
ax.legend()
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# The time for spreading falls by the largest factor, more than a hundred. Embedding in
# one pass is some twenty times faster. The gain of the search is smaller, and it falls
# as the bank grows: about ten times with two images, and less with 32. With 2 or 8
# images in the bank, embedding saves the most seconds; with 32 images, the two are
# similar or the search saves more.
#
# In a very large bank the tree is faster. It skips most of the bank, because embeddings
# of overlapping patches occupy only a few of their 64 dimensions, while matrix products
# compute every distance. So the time of the tree grows more slowly, and the two curves
# come closer. Where they meet depends on the machine and on the fit: in our runs, at
# more than a thousand images.
# :::
#
# - **For sets of up to a few hundred images** our code computes the exact maps, with
#   the whole bank, faster than the published code: several times faster for a hundred
#   images. 40 training and 20 test images take less than a minute.
# - **For 3,000 + 1,000 images** computing all distances takes too long on a processor:
#   many hours, of the same order as with the tree. (This extrapolates a hundredfold, so
#   only the order is reliable. The published method is timed with an exact tree on one
#   core instead of the approximate index, so it need not agree with the ten hours.)
#   Store only a part of the bank: with a bounded bank, hours become less than an
#   hour on one core. `fit(images, coreset=0.1)` keeps a tenth of the vectors, chosen by
#   farthest-point sampling (greedy k-centre), and reports by how much a distance may be
#   too large (`coreset_radius`). Leaving out patches can cost accuracy: the folded table
#   under *Trained against random* has a row with a quarter of the cells.
# - **Never evaluate after every epoch.** That multiplies these times by the number of
#   epochs, several hundred.
#
# ## Code against pseudo-code
#
# The paper's two boxes of pseudo-code and the released code differ in three points.
# Algorithm 1 ends by saving the bank; the code saves only the encoder and embeds the
# training images again at every evaluation. Algorithm 1 draws both losses from the same
# patch; the code draws separate pairs for each. Both boxes have one stride $S$; the
# code has 4 and 16. The [page on the paper](../book/04_patch_svdd.md) prints the
# corrected algorithm, and the tests of `paperlib` compare the library with a
# written-out version. Our `PatchSVDD` stores the bank in one file:
# `detector.save(path)`, `PatchSVDD.load(path)`.
#
# ## Claimed and measured
#
# The table lists what the paper claims and what this run measured. The paper's AUROC
# values are in the table of *Ablation*.

# %% tags=["hide-input"]
CLAIMS = {
    "one centre collapses": "centre",
    "neighbours alone collapse": "neighbors",
    "a task keeps embeddings apart": "patch_svdd",
}
print(f"{'claim':30} measured")
for claim, objective in CLAIMS.items():
    print(f"{claim:30} {spread_left[objective]:8.2f} of the spread left")
# The large patches add next to nothing to the search.
our_seconds = embedding_times["ours"] + spreading_times["ours"]
our_seconds += search_times["ours"][-1]
claim = "an image takes 0.48 seconds"
print(f"{claim:30} {our_seconds:8.2f} seconds (exact, 32 images in the bank)")

# %% [markdown]
# - The mechanism is clear: without the task the embeddings collapse, with it they do
#   not.
# - The task helps to localise: on poly by more than two seeds usually differ, on mono
#   by about as much. For whole images these cells do not show what MVTec AD showed, and
#   poly shows the opposite.
# - Our time is for an exact search on one or two processor cores, with a bank of 32
#   images. The paper's time is for an approximate search with a bank of hundreds of
#   images, on different hardware.
#
# ## Where it fails
#
# The figure shows the defective cell with the lowest score and the functional cell with
# the highest. Each map has its own colour scale, whose ends are printed above it:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two rows of a cell and its map. Above, a defective cell with a small dark spot at the lower right; its map, from 0.03 to 0.43, is brightest in the lower right corner, away from the spot. Below, a functional cell; its map, from 0.04 to 1.11, is bright at the two lower corners and dark elsewhere."}}
trained_maps = test_maps["trained"].mult.cpu()
failures = {
    "defective, lowest score": (defective_images, trained_maps[labels == 1], False),
    "functional, highest score": (held_out_images, trained_maps[labels == 0], True),
}
fig, panels = plt.subplots(2, 2, figsize=(5.2, 6))
fig.suptitle("A defect scores below a functional cell")
failed_scores = []
for axes, (title, (class_images, score_maps, descending)) in zip(
    panels, failures.items(), strict=True
):
    worst = int(score_maps.amax((1, 2)).argsort(descending=descending)[0])
    worst_map = score_maps[worst]
    failed_scores.append(float(worst_map.max()))
    viz.panel(axes[0], class_images[worst], title)
    limits = f"from {worst_map.min():.2f} to {worst_map.max():.2f}"
    title = f"score {failed_scores[-1]:.2f}\n{limits}"
    companion.draw_scores(axes[1], worst_map, title)
plt.show()

# %% tags=["remove-cell"]
run.expect(
    failed_scores[0] < failed_scores[1],
    "the defective cell with the lowest score scores below a functional one",
)

# %% [markdown]
# The defective cell scores lower than the functional one, so no threshold separates
# them. In the defective cell a dark spot is visible at the lower right, but the map is
# not bright there. In the functional cell the map is bright only at the two lower
# corners, where no defect is visible; presumably no cell in the bank has similar
# corners. Typical failures are:
#
# - **Faint or small defects** change a patch too little. A spot of a few pixels hardly
#   changes the embedding of 32×32 pixels.
# - **Unusual but functional** parts score high. The bank contains nothing similar to a
#   bright stripe or an unusual print, and the detector cannot know that the difference
#   does not matter. More normal images help.
# - **Parts at the wrong position.** The bank ignores positions: a bar in the wrong row
#   finds a similar normal patch in another row. PaDiM, the next chapter, compares
#   position by position.
# - **Maps are blurred** by the width of a patch, so the area of a defect measured on a
#   map is too large.
#
# And four warnings from people who ran the released code:
#
# - **Evaluate once, not after each epoch**, as the review of the released code advises.
#   Watch the loss and the position accuracy instead; they cost nothing.
# - **Tune $\lambda$ for each product.** That review used 0.001 on images of its own;
#   larger values were worse. In the paper, cable (an object) gains from a small
#   $\lambda$, and wood (a texture) from a large one. (The author of the official
#   repository adds, in its issue #10: an AUROC of exactly 0.5 for both tasks means that
#   the encoder has become a constant. Before that, as at $\lambda = 1$ above, the AUROC
#   does not show it.)
# - **Longer is not always better.** In the same issue a user reports that carpet, grid,
#   tile and screw of MVTec AD got worse in training. The author answers that $\lambda$
#   was too large for grid, and shows a run in which screw improves with training. The
#   loss does not show when detection gets worse, and in practice there is no test set
#   with defects to decide when to stop.
# - **Released encoders are not a recipe.** The settings that each class was trained
#   with were not found; issue #5 asks for them and has no answer.
#
# ## Use it on MVTec AD, or on your own images
#
# MVTec AD, the paper's data set, is free for research and not part of this book. Set
# `MVTEC_AD` in the environment (or `MVTEC` in the folded code below) to the folder that
# holds `bottle`, `cable` and the other classes. For your own images, which must all
# show the same view, set `FOLDER` in the last notebook cell of this section to a folder
# that contains a folder `normal` and, if you have abnormal images, a folder `abnormal`.
# Colour images need one shift per patch, which is the default of `train`.

# %% tags=["hide-input"]
from paperlib.datasets import MVTecAD, batches
from paperlib.metrics import pixel_auroc


def evaluate_category(root, category):
    """Train and score one category; return image AUROC and pixel AUROC."""
    size = {"resize": 256, "crop": 256}
    good = next(batches(MVTecAD(root, category, "train", **size), 400))
    test = next(batches(MVTecAD(root, category, "test", **size), 400))
    torch.manual_seed(0)
    encoder = HierarchicalEncoder().to(run.device)
    name, images = f"patch svdd {category}", good.images.to(run.device)
    train(
        encoder,
        images,
        steps=STEPS,
        checkpoint=runtime.checkpoint_path(name, STEPS, good.images),
        progress=True,
    )
    category_maps = (
        PatchSVDD(encoder).fit(images).anomaly_maps(test.images.to(run.device))
    )
    image_auroc = auroc(test.labels, category_maps.scores.cpu())
    return image_auroc, pixel_auroc(test.masks, category_maps.mult.cpu())


# %% tags=["hide-input"]
import os

# The paper's AUROC in %: detection, segmentation.
PAPER_AUROCS = {
    "bottle": (98.6, 98.1),
    "cable": (90.3, 96.8),
    "tile": (97.8, 91.4),
    "wood": (96.5, 90.8),
}
MVTEC = os.environ.get("MVTEC_AD")  # or the path of the folder
if not MVTEC:
    print("MVTEC_AD is not set: MVTec AD was not evaluated")
else:
    for category, quoted in PAPER_AUROCS.items():
        detection, segmentation = evaluate_category(MVTEC, category)
        print(f"{category:10} detection {detection:.1%}", end=" ")
        print(f"(paper {quoted[0]} %),", end=" ")
        print(f"segmentation {segmentation:.1%} ({quoted[1]} %)")

# %% tags=["hide-input"]
from torch.utils.data import Subset

from paperlib.datasets import folder, open_folder


def score_folder(path):
    """Train on four fifths of a folder's normal images, and score all other images."""
    dataset = folder(open_folder(path), size=256)  # the normal images come first
    n_normal = sum(sample.label == 0 for sample in dataset.samples)
    n_train = n_normal * 4 // 5
    images = stack_images(Subset(dataset, range(n_train)))
    other_images = stack_images(Subset(dataset, range(n_train, len(dataset))))
    torch.manual_seed(0)
    encoder = HierarchicalEncoder().to(run.device)
    checkpoint = runtime.checkpoint_path("own patch svdd", STEPS, images)
    train(encoder, images, steps=STEPS, checkpoint=checkpoint, progress=True)
    scores = PatchSVDD(encoder).fit(images).anomaly_maps(other_images).scores.tolist()
    n_held_back = n_normal - n_train
    return scores[:n_held_back], scores[n_held_back:]


# %%
# The path of a folder (or its zip) that contains `normal`, and perhaps `abnormal`:
FOLDER = None
if FOLDER is None:
    print("FOLDER is None: nothing was run")
else:
    normal_scores, abnormal_scores = score_folder(FOLDER)
    print("normal, held back:", *[f"{score:.2f}" for score in normal_scores])
    print("abnormal:", *[f"{score:.2f}" for score in abnormal_scores])

# %% [markdown]
# ## Exercises
#
# Each check tells you what is wrong without revealing the answer. Replace the dots with
# your answer: a number, or the name of a function that you define above the check. The
# checks judge what an answer returns, not how: they also accept a loop where the text
# asks for none. The solutions are hidden below each group of exercises.
#
# **Warm-up (5 minutes).**
#
# **1.** How many patches of 64×64 pixels fit into an image of 400×300 pixels at stride
# 16?
#
# **2.** The second patch of a pair starts 27 pixels lower and 30 further left than the
# first. Which class is that?

# %% tags=["exercise"]
from paperlib.exercises import patch_svdd as check

done = check.patches_of_an_image(...)

# %% tags=["exercise"]
done = check.class_of_a_pair(...)

# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
assert check.patches_of_an_image(((400 - 64) // 16 + 1) * ((300 - 64) // 16 + 1))
assert check.class_of_a_pair(DIRECTIONS.index((1, -1)))

# %% [markdown]
# **Core (15 minutes).**
#
# **3.** Write `f(a, b)`: the loss of Eq. 4 for embeddings (n, D) of n patches and of
# their neighbours, averaged over the pairs.
#
# **4.** Write `f(scores, patch, stride, size)`: return a map of `size` = (height,
# width) in which each pixel has the mean of the scores (h, w) of the patches that cover
# it, and 0 where there is none. `F.fold` adds up overlapping blocks; it accepts them as
# columns, (1, patch · patch, h · w). Fold the scores, fold ones in the same way,
# divide, and pad the border with zeros.
#
# **5.** Write `f(queries, bank)`: the distance of each query (Q, D) to the nearest
# vector of the bank (B, D), Eq. 8. Return a tensor (Q,).

# %% tags=["exercise"]
done = check.loss_function(...)

# %% tags=["exercise"]
done = check.spread_function(...)

# %% tags=["exercise"]
done = check.nearest_function(...)


# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
def average_norms(a, b):
    return (a - b).norm(dim=1).mean()


def spread_scores(scores, patch, stride, size):
    height, width = ((n - 1) * stride + patch for n in scores.shape)
    blocks = scores.flatten().expand(1, patch**2, -1).contiguous()
    fold = {"output_size": (height, width), "kernel_size": patch, "stride": stride}
    means = F.fold(blocks, **fold) / F.fold(torch.ones_like(blocks), **fold)
    return F.pad(means[0, 0], (0, size[1] - width, 0, size[0] - height))


def measure_nearest(queries, bank):
    return (queries[:, None] - bank).norm(dim=2).min(1).values


assert check.loss_function(average_norms)
assert check.spread_function(spread_scores)
assert check.nearest_function(measure_nearest)

# %% [markdown]
# **Stretch (15 minutes).**
#
# **6.** `BigEncoder` embeds all quarters in one call. Write `f(encoder, patches)` for
# the library's `HierarchicalEncoder`: Eq. 7 with one call per quarter, from patches (N,
# 3, 64, 64) to large embeddings (N, D). Use `encoder.small` (called `enc` in
# `BigEncoder`), `encoder.conv1` (2×2) and `encoder.conv2` (1×1), with LeakyReLU of
# slope 0.1 between the two and a tanh at the end. You can test it with
# `trained_encoder`.
#
# **7.** Consider one evaluation with 3,000 training and 1,000 test images of 1024×1024
# pixels. How many distances between small patches (K = 32, stride 4) does Eq. 8 need?
# (Three digits are enough.)

# %% tags=["exercise"]
done = check.hierarchy_function(...)

# %% tags=["exercise"]
done = check.distances_of_an_evaluation(...)


# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
def embed_large_patches(encoder, patches):
    quarters = [
        encoder.small(patches[..., y : y + 32, x : x + 32])
        for y, x in itertools.product((0, 32), (0, 32))
    ]
    grid = torch.stack(quarters, -1).unflatten(-1, (2, 2))  # (N, D, 2, 2)
    hidden = F.leaky_relu(encoder.conv1(grid), 0.1)
    return torch.tanh(encoder.conv2(hidden)).flatten(1)


assert check.hierarchy_function(embed_large_patches)
n_patches = ((1024 - 32) // 4 + 1) ** 2  # of an image
assert check.distances_of_an_evaluation(3000 * n_patches * 1000 * n_patches)

# %% [markdown]
# ## Quiz
#
# **1.** With which kernel are OC-SVM and SVDD the same, and why?
#
# :::{dropdown} Answer
# With a Gaussian kernel, or any with $k(x, x)$ constant: the second sum in the dual of
# SVDD is then the same for all weights, and the rest is the one-class SVM.
# :::
#
# **2.** Why does $\mathcal L_{\text{SVDD'}}$ alone not keep patches apart, although it
# has no centre?
#
# :::{dropdown} Answer
# It only pulls. A constant makes it 0, and nothing in it pushes embeddings apart. The
# classification task does: a constant cannot name a direction.
# :::
#
# **3.** Deep SVDD removes the biases from its network. Why, and why can Patch SVDD keep
# them?
#
# :::{dropdown} Answer
# With biases, a network can become constant by setting its weights to 0. Without them
# that is harder. Patch SVDD's second loss makes a constant expensive ($\ln 8$ for each
# size), so it needs no such measure. It even ends in a tanh, one of the bounded
# activations that Deep SVDD rules out for the same reason.
# :::
#
# **4.** The loss of your run stays at 4.16. What does that number mean?
#
# :::{dropdown} Answer
# $2 \ln 8$: at both sizes the classifier guesses. Either the training has not had an
# effect yet, or the embedding has collapsed ($\lambda$ too large), or nothing in the
# images reveals a direction.
# :::
#
# **5.** Why does one pass over an image return exactly the embeddings of its patches,
# and would it also do so with padded convolutions?
#
# :::{dropdown} Answer
# Without padding an output depends on its own 32×32 pixels only, wherever it lies. With
# padding, a separate patch would be surrounded by zeros, but the same patch inside an
# image by its neighbours.
# :::
#
# **6.** An AUROC of 0.93 is reported for a trained encoder. What do you ask for?
#
# :::{dropdown} Answer
# The AUROC of a random encoder with the same bank and the same test images, and the
# spread over seeds.
# :::
#
# **7.** You double the side of the images, and the number of training and of test
# images as well. How much longer does the search take?
#
# :::{dropdown} Answer
# About 64 times as long, if every distance is computed: each test image and each
# training image has four times as many patches, and there are twice as many images of
# both kinds.
# :::
#
# ## Summary
#
# - A patch is anomalous if no normal patch is near it. The distances of all patches
#   form a map. They need an embedding in which similar patches are near each other.
# - One centre for all patches makes the embeddings collapse, and so does pulling
#   neighbours together without a task. A task without labels, naming a direction, keeps
#   them apart.
# - The training consists of two encoders, two classifiers, four data sets of pairs and
#   four loss terms. Both patches of a position pair need their own colour shift.
# - Without padding one pass embeds all patches. Exact search and spreading return the
#   published maps; the cost of the search grows with both sets.
# - A random encoder is a strong baseline. Report the result of a trained encoder only
#   beside that of a random one.
#
# **Next**: chapter 05, PaDiM {cite:p}`defard2021`, uses the embedding of a network
# pretrained on ImageNet and trains nothing.
#
# **Further reading**: {cite:t}`ruff2018` on Deep SVDD, {cite:t}`doersch2015` on the
# task and its shortcuts, {cite:t}`roth2022` on searching a subsampled bank (a coreset)
# of pretrained patch embeddings.
