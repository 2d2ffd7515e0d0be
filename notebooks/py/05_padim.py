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
# # PaDiM, run: one Gaussian for each place of a picture
#
# Good parts look alike, place by place. PaDiM {cite:p}`defard2021` writes down, for each place, the mean and the
# covariance of what a pretrained network sees there, and calls anomalous what lies far away from that. There is nothing
# to train. This notebook finds cracks in real solar cells with it, works the distance out by hand, takes the covariance
# apart, repeats the paper's ablations, and ends with the question that no AUROC answers: where to put the threshold.
#
# - **Read first**: the [review of the paper](../book/05_padim.md), 25 minutes. You need PyTorch basics, and what a
#   covariance matrix is.
# - **Time**: 85 minutes to read and run, 40 for the exercises. All cells together run in one to two minutes on an idle
#   two-core machine, and longer on a busy one or on Colab without a GPU.
# - **On a GPU** the same cells use it. In the full profile (the default on a Colab GPU) the network is ResNet-18
#   {cite:p}`he2016`, the paper's smaller one; the constant `NETWORK` takes `"wide_resnet50_2"` as well.

# %%
import companion
import matplotlib.pyplot as plt
import numpy as np
import torch

from paperlib import runtime, viz

run = runtime.start(seed=0)
viz.use_style()
NETWORK = run.choose(smoke="efficientnet_lite0", full="resnet18")

# %% [markdown]
# ## The result first: cracks in real solar cells, found without having seen one
#
# Under a current a healthy solar cell glows; cracks and dead parts stay dark {cite:p}`buerhop2018,deitsch2019`. We show
# PaDiM 150 functional cells, and then six that it has not seen: the first four defective and the first two functional
# ones of the test set. They were not picked.

# %%
from paperlib import backbones
from paperlib.backbones import FeatureExtractor
from paperlib.datasets import elpv
from paperlib.padim import PaDiM
from paperlib.padim.evaluation import DIMENSIONS

backbone, batch = backbones.load(NETWORK), run.choose(smoke=4, full=32)  # a CPU is fastest with few pictures at a time
extractor, side = FeatureExtractor(backbone.model.to(run.device), backbone.layers), backbone.transform.size


def prepare(images):  # grey or RGB, 8 bits a channel, any size → a batch as the network takes it
    return backbone.transform(images).to(run.device)


def split(cells, seed):
    """Draw indices: functional cells to fit, to hold back and to test, and defective cells, where the experts agree."""
    generator = torch.Generator().manual_seed(seed)
    good, bad = (torch.nonzero(cells.probability == p).flatten() for p in (0, 1))
    good, bad = (of[torch.randperm(len(of), generator=generator)] for of in (good, bad))
    return {"train": good[:150], "spare": good[150:200], "good": good[200:275], "bad": bad[:75]}


mono = elpv("mono")
rows = split(mono, seed=0)
model = PaDiM(extractor, DIMENSIONS[NETWORK], seed=0).fit(map(prepare, mono.images[rows["train"]].split(batch)))

# %% tags=["hide-input", "ledger:padim-figure-1:measured"] mystnb={"image": {"alt": "Six solar cells in two rows of three, and under each the same cell with the anomaly map over it, dark for small and yellow for large distances, in one colour scale. Four defective cells: bright spots lie on dark cracks and dark areas. Two functional cells: the maps stay dark."}}
def draw_map(ax, image, one, limits, title=""):
    """Lay a map over a grey picture, in a colour scale that is the same for all of them."""
    viz.panel(ax, image, title)
    return ax.imshow(upsample(one.cpu(), image.shape[-2:]), cmap="inferno", vmin=limits[0], vmax=limits[1], alpha=0.6)


from paperlib.anomaly_map import gaussian_blur, upsample

shown = torch.cat([rows["bad"][:4], rows["good"][:2]])
maps = model.anomaly_map(prepare(mono.images[shown]))
scores, limits = maps.amax((1, 2)), (float(maps.min()), float(maps.max()))
fig, panels = plt.subplots(4, 3, figsize=(5, 8.1))
pairs = zip(panels[::2].flat, panels[1::2].flat, strict=True)
names = ["defective"] * 4 + ["functional"] * 2
for (above, below), i, one, score, kind in zip(pairs, shown, maps, scores, names, strict=True):
    viz.panel(above, mono.images[i], kind)
    drawn = draw_map(below, mono.images[i], one, limits, f"score {score:.1f}")
fig.colorbar(drawn, ax=panels, location="bottom", label="distance", shrink=0.8)
plt.show()
assert run.full or scores[:4].min() > scores[4:].max()

# %% [markdown]
# Nobody told it what a crack is. The score of a picture is the largest value of its map. Note the colour scale: it is
# *one* scale for all six. If each map were scaled to its own extremes, the functional cells would glow as well.
#
# ## What you will be able to do
#
# 1. Compute a Mahalanobis distance by hand, and say what $\Sigma^{-1}$ does in it.
# 2. Build a patch embedding from three layers, and the Gaussians from it, in a few lines of PyTorch.
# 3. Measure detection and localisation, and say why there are two numbers for localisation.
# 4. Decide between random channels, principal components, and a nearest-neighbour search: by accuracy, time and memory.
# 5. Choose a threshold without labels, and see where published scores leak.
# 6. Run it on a folder of your own pictures.

# %% [markdown]
# ## By hand: two vectors equally far, and one twice as far
#
# One place of the picture, and embeddings of only $D = 2$ numbers. Five normal pictures gave the vectors
# $x^1, \dots, x^5$ below. The paper's Eq. 1 and Eq. 2, without $\epsilon$ for now:
#
# $$
# \begin{aligned}
# \mu &= \frac1N \sum_k x^k \\
# \Sigma &= \frac{1}{N-1} \sum_k (x^k - \mu)(x^k - \mu)^{\mathsf T} \\
# M(x) &= \sqrt{(x - \mu)^{\mathsf T}\, \Sigma^{-1} (x - \mu)}
# \end{aligned}
# $$ (eq-gauss)
#
# :::{admonition} Predict first
# :class: tip
# The five vectors are (5, 4), (1, 0), (4, 1), (2, 3) and (3, 2). Two new ones are $a$ = (5, 4) and $b$ = (5, 0): both
# are
# $2\sqrt2$ away from the mean. Work out $\mu$, $\Sigma$ and $\Sigma^{-1}$ on paper. Which of $a$ and $b$ is stranger, and by
# how much?
# :::

# %% tags=["nbval-check-output"]
x = np.array([[5, 4], [1, 0], [4, 1], [2, 3], [3, 2]])
a, b = np.array([5, 4]), np.array([5, 0])
mu = x.sum(0) / 5
sigma = (x - mu).T @ (x - mu) / 4
inverse = np.linalg.inv(sigma)
squared = [(v - mu) @ inverse @ (v - mu) for v in (a, b)]
print("mean", mu, " covariance", sigma.tolist(), " inverse", inverse.round(3).tolist())
print(f"squared distances {squared[0]:.0f} and {squared[1]:.0f}, distances {squared[0] ** 0.5:.2f} and {squared[1] ** 0.5:.2f}")
assert np.array_equal(sigma, [[2.5, 1.5], [1.5, 2.5]]) and np.allclose(squared, [2, 8])
two = x[:2] - x[:2].mean(0)
print("with the first two vectors only, the determinant is", round(np.linalg.det(two.T @ two), 9))

# %% tags=["hide-input"] mystnb={"image": {"alt": "A plane with five blue points around their mean at (3, 2), and three ellipses for distances 1, 2 and 3 that stretch along the rising diagonal. The new point a at (5, 4) lies on the diagonal between the first and the second ellipse, the new point b at (5, 0) lies across it, close to the third. A dotted circle through both is centred at the mean."}}
fig, ax = plt.subplots(figsize=(6.4, 5))
grid = np.stack(np.meshgrid(np.linspace(-3.5, 9.5, 200), np.linspace(-2.5, 6.5, 200)), -1)
distance = np.sqrt(np.einsum("yxi,ij,yxj->yx", grid - mu, inverse, grid - mu))
lines = ax.contour(grid[..., 0], grid[..., 1], distance, levels=[1, 2, 3], colors=viz.GREY)
ax.clabel(lines, fmt="M = %d", manual=[(2, 1), (-0.1, 2), (0.5, 4)])
ax.add_patch(plt.Circle(mu, 8**0.5, fill=False, linestyle=":", color="black"))
ax.plot(*x.T, "o", color=viz.BLUE, label="normal vectors")
ax.plot(*mu, "+", color="black", ms=12, label="their mean")
for point, name in ((a, "a"), (b, "b")):
    ax.plot(*point, "^", color=viz.VERMILION, ms=13, mfc="none", mew=2)
    ax.annotate(name, point, (11, -4), textcoords="offset points", fontsize=13)
ax.set(xlabel="channel 1", ylabel="channel 2", aspect="equal")
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# $\mu = (3, 2)$; $\Sigma$ has 2.5 on its diagonal and 1.5 beside it; its determinant is 4, so $\Sigma^{-1}$ has 0.625 and
# $-0.375$. $M(a)^2 = 2$ and $M(b)^2 = 8$: $b$ is twice as far. $a$ even *is* one of the normal vectors.
# :::
#
# Each channel of $b$ is harmless by itself: 5 and 0 occur. Strange is that a large first channel comes with a small
# second one. The off-diagonal numbers of $\Sigma$ know that, and a distance channel by channel would not.
#
# With two vectors only, all that was seen lies on a line. The determinant is 0 and $\Sigma$ has no inverse. That is
# what
# $\epsilon I$ is for: Eq. 1 adds 0.01 to the diagonal.
#
# ## By hand: an embedding from two maps of different size
#
# The embedding of a place comes from several layers. Here one layer gives $N$ pictures 1 channel of 4×4 cells, another
# 2 channels of 2×2 cells: maps of shape (N, 1, 4, 4) and (N, 2, 2, 2). Each coarse cell is repeated over the four fine
# cells that it covers, and the channels are stacked: (N, 3, 4, 4).

# %% tags=["nbval-check-output"] mystnb={"image": {"alt": "Four grids of numbers. First: one coarse map of 2 by 2 cells with the numbers 20 to 23. Then the three channels of the result, each 4 by 4: the first is the fine map with the numbers 0 to 15; the second shows 20 in its upper left quarter, 21 in the upper right, 22 in the lower left and 23 in the lower right; the third shows 30 to 33 in the same way. The cell in row 1, column 2 is outlined in all three: 6, 21, 31."}}
from paperlib.backbones import concatenate_embeddings

fine = torch.arange(16.0).view(1, 1, 4, 4)
coarse = torch.tensor([[20, 21], [22, 23], [30, 31], [32, 33]]).view(1, 2, 2, 2).float()
joined = concatenate_embeddings([fine, coarse])
print(tuple(fine.shape), "and", tuple(coarse.shape), "give", tuple(joined.shape))
print("the embedding of row 1, column 2:", joined[0, :, 1, 2].tolist())
fig, panels = plt.subplots(1, 4, figsize=(6.4, 2.2), width_ratios=[1, 2, 2, 2])
for ax, values in zip(panels, (coarse[0, 0], *joined[0]), strict=True):
    ax.imshow(values, cmap="Blues", vmin=-5, vmax=60)
    for (y, x), value in np.ndenumerate(values.numpy()):
        ax.text(x, y, f"{value:.0f}", ha="center", va="center")
    ax.set_axis_off()
for ax, title in zip(panels, ("a coarse\nmap", "channel 1", "channel 2", "channel 3"), strict=True):
    ax.set_title(title)
for ax in panels[1:]:
    ax.add_patch(plt.Rectangle((1.5, 0.5), 1, 1, fill=False, edgecolor=viz.VERMILION, linewidth=3))
plt.show()
assert joined[0, :, 1, 2].tolist() == [6, 21, 31]

# %% [markdown]
# ## The whole method in one picture
#
# The paper's Figure 2, redrawn with the sizes of this notebook's network. Coarse cells are drawn as large as what they
# cover.

# %% tags=["hide-input", "ledger:padim-figure-2:redrawn"] mystnb={"image": {"alt": "Above, from left to right: a solar cell; three blocks of the same width and height, made of many small cells, of larger cells and of four large cells. Below: one deeper block of small cells that holds the channels of all three, of which one cell is marked; and a plane with points and ellipses, the Gaussian of the marked cell."}}
from matplotlib.patches import Ellipse

fig, ax = plt.subplots(figsize=(6.4, 5.6))
ax.imshow(mono.images[rows["train"][0]], cmap="gray", extent=(0, 8, 0, 8))
layers = extractor(prepare(mono.images[:1]))
places = zip((10, 20.5, 31), (8, 4, 2), (viz.SKY, viz.GREEN, viz.ORANGE), layers, strict=True)
for x, cells, colour, layer in places:
    companion.cuboid(ax, (x, 0), (cells, cells, 1 if cells < 8 else 2), colour, 8 // cells)
    ax.text(x + 4, -0.6, f"{layer.shape[1]} channels of\n{layer.shape[2]}×{layer.shape[3]} cells", ha="center", va="top", fontsize=11)
for x, colour, depth in ((13.2, viz.ORANGE, 4), (11.4, viz.GREEN, 4), (10, viz.SKY, 3)):  # from the back to the front
    companion.cuboid(ax, (x, x - 31), (8, 8, depth), colour)
ax.annotate("", (16.5, -7.6), (20, -4), arrowprops={"arrowstyle": "->"})
ax.add_patch(plt.Rectangle((13, -17), 1, 1, color=viz.VERMILION))
ax.text(14, -21.6, f"{sum(layer.shape[1] for layer in layers)} channels,\nsome are drawn", ha="center", va="top", fontsize=11)
ax.annotate("", (29.5, -16.5), (14.2, -16.5), arrowprops={"arrowstyle": "->", "color": viz.VERMILION})
cloud = np.random.default_rng(0).multivariate_normal([33.5, -16.5], [[2.0, 1.2], [1.2, 1.4]], 40)
ax.plot(*cloud.T, ".", color=viz.BLUE, ms=4)
for scale in (1, 2):
    ax.add_patch(Ellipse((33.5, -16.5), 2 * scale * 1.74, 2 * scale * 0.69, angle=38, fill=False, color=viz.GREY))
ax.text(33.5, -21.6, "one Gaussian\nfor each cell", ha="center", va="top", fontsize=11)
ax.set(xlim=(-0.5, 43), ylim=(-25.5, 12), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# ## From the paper to code: shapes, step by step
#
# The functional cells once more, step by step. `features` gives the maps of the three layers. `embed` stacks them and
# puts the places in one row: (N, P, D) for N pictures, P places and D channels.

# %% tags=["nbval-check-output"]
from paperlib.padim import PatchGaussian, mahalanobis_distance


def features(images):
    parts = [extractor(prepare(some)) for some in images.split(batch)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def embed(maps, channels=None):
    return concatenate_embeddings(maps, channels).flatten(2).transpose(1, 2)


train = features(mono.images[rows["train"]])
x = embed(train, model.channels)
gaussian = PatchGaussian(*x.shape[1:]).update(x)
mean, cholesky = gaussian.mean(), torch.linalg.cholesky(gaussian.covariance())
new = embed(features(mono.images[shown]), model.channels)
distance = mahalanobis_distance(new, mean, cholesky)
coarse_map = distance.unflatten(1, train[0].shape[2:])
steps = {"layers": train, "all channels": [concatenate_embeddings(train)], "embeddings": [x], "means": [mean],
         "covariances": [gaussian.covariance()], "distances, new": [distance], "maps": [coarse_map],
         "enlarged": [upsample(coarse_map, side)], "scores": [upsample(coarse_map, side).amax((1, 2))]}  # fmt: skip
for step, tensors in steps.items():
    print(f"{step:15}", *[tuple(tensor.shape) for tensor in tensors])

# %% [markdown]
# One cell of the 56×56 map stands for $224 / 56 = 4$ pixels in each direction, 4×4 = 16 pixels. It has *seen* more:
# behind it lie three layers of convolutions, the last of which looks at most of the picture.
#
# Now Eq. 1 and Eq. 2 word for word, for the place in the middle, and the blur from SciPy.

# %% tags=["nbval-check-output", "ledger:padim-eq-1:by-hand", "ledger:padim-eq-2:by-hand"]
from scipy.ndimage import gaussian_filter

place = 28 * 56 + 28  # row 28, column 28
vectors = x[:, place].double().cpu().numpy()
N, D = vectors.shape
mu = sum(vectors) / N
sigma = sum(np.outer(v - mu, v - mu) for v in vectors) / (N - 1) + 0.01 * np.eye(D)
v = new[0, place].double().cpu().numpy()
naive = np.sqrt((v - mu) @ np.linalg.inv(sigma) @ (v - mu))

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
np.testing.assert_allclose(gaussian.mean()[place].cpu(), mu, **CLOSE)
np.testing.assert_allclose(gaussian.covariance()[place].cpu(), sigma, **CLOSE)
np.testing.assert_allclose(distance[0, place].item(), naive, **CLOSE)
blurred = [gaussian_filter(one, 4) for one in upsample(coarse_map, side).cpu().numpy()]
np.testing.assert_allclose(maps.cpu(), blurred, rtol=5e-3)  # `maps` are those of the first figure, from `PaDiM`
print(f"{N} vectors of {D} numbers: mean, covariance, distance and map are those of paperlib")

# %% [markdown]
# ## From loop to batch: the same numbers, faster scoring
#
# The widely copied script loops over the places with `np.cov`, then inverts each matrix and calls SciPy's
# `mahalanobis` for each place *and each picture*. `paperlib` does all places at once: centred products in one batched
# matrix product, one Cholesky factor a place, one triangular system.
#
# :::{admonition} Predict first
# :class: tip
# 3,136 places, 100 channels, 150 pictures to fit, 6 to score. Which of the three loops takes longest: `np.cov`, the
# inversion, or `mahalanobis`? Which grows with the number of pictures to score?
# :::

# %%
import time

from scipy.spatial.distance import mahalanobis


def now():
    """The time when all that was asked of the device is done."""
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# %%
X, new_X = (t.cpu().numpy().transpose(0, 2, 1) for t in (x, new))  # the script's layout: (N, D, P)
times = [now()]
covariances = [np.cov(X[:, :, p], rowvar=False) + 0.01 * np.eye(D) for p in range(X.shape[2])]
times.append(now())
inverses = [np.linalg.inv(covariance) for covariance in covariances]
times.append(now())
means = X.mean(0)
loop = [[mahalanobis(v[:, p], means[:, p], inverses[p]) for p in range(X.shape[2])] for v in new_X]
times.append(now())
again = PatchGaussian(*x.shape[1:]).update(x)
factor = torch.linalg.cholesky(again.covariance())
times.append(now())
batched = mahalanobis_distance(new, again.mean(), factor)
times.append(now())
np.testing.assert_allclose(batched.cpu(), np.array(loop), rtol=1e-3)
cov, inv, loops, fit, score = np.diff(times)
print(f"loop   np.cov {cov:.2f} s, inversion {inv:.2f} s, mahalanobis {loops / len(new):.3f} s a picture")
print(f"batch  both together {fit:.2f} s, distances {score / len(new):.3f} s a picture")
del covariances, inverses  # half a gigabyte

# %% [markdown]
# :::{dropdown} Answer
# For six pictures it is the inversion or `np.cov`, depending on the machine; but only `mahalanobis` grows with the
# number of pictures to score. The script inverts every matrix again for each test set, too. What does not depend on the
# new picture belongs in the fit.
# :::
#
# Scoring a picture is several times faster in the batch. Fitting gains little or nothing: most of its time goes to one
# inversion or factorisation per place, in the batch as in the loop.
#
# `PaDiM` goes one step further and keeps the inverse factor $L^{-1}$, so that scoring is a matrix product. And it never
# holds all embeddings: `fit` takes batches, and each one updates mean and covariance.
#
# ## Real cells, mono and poly: how well are they told apart?
#
# Monocrystalline cells are even; polycrystalline ones show the grains of their crystals, and each cell has other
# grains. We compute the features of all cells once, since the rest of the notebook works on them.
#
# :::{admonition} Predict first
# :class: tip
# PaDiM compares a place with the same place of other cells. On which kind will it do better, and why?
# :::

# %%
from paperlib.metrics import aupro, auroc, best_threshold, pixel_auroc

data = {"mono": mono, "poly": elpv("poly")}
splits = {kind: split(cells, seed=0) for kind, cells in data.items()}
stored = {"mono": {"train": train}, "poly": {}}
for kind, parts in splits.items():
    for part in parts.keys() - stored[kind].keys() - ({"spare"} if kind == "poly" else set()):
        stored[kind][part] = features(data[kind].images[parts[part]])


def gaussians(maps, channels=model.channels):
    x = embed(maps, channels)
    fitted = PatchGaussian(*x.shape[1:]).update(x)
    return fitted.mean(), torch.linalg.cholesky(fitted.covariance())


def anomaly_maps(maps, fitted, channels=model.channels):
    distance = mahalanobis_distance(embed(maps, channels), *fitted)
    return gaussian_blur(upsample(distance.unflatten(1, maps[0].shape[2:]), side)).cpu()


# %% [markdown]
# One split says little. `make results` repeats what follows for five seeds, each of which draws other cells *and* other
# channels, and writes a stamped file. Here the first of them is run live, and must agree with the file.

# %%
import pandas as pd

results = companion.read_result("padim_cells")
measured = pd.DataFrame(results["runs"])
random_100 = measured.query("experiment == 'tables' and method == 'random' and dimensions == 100")
fitted = {kind: gaussians(parts["train"]) for kind, parts in stored.items()}
scored, labels = {}, torch.arange(150) >= 75
print("image AUROC       this seed   five seeds, mean ± standard deviation")
for kind, parts in stored.items():
    scored[kind] = torch.cat([anomaly_maps(parts[part], fitted[kind]).amax((1, 2)) for part in ("good", "bad")])
    area = auroc(labels, scored[kind])
    of_kind = random_100.query("kind == @kind").image
    print(f"{kind} {area:20.3f} {of_kind.mean():12.3f} ± {of_kind.std():.3f}")
    assert run.full or abs(area - of_kind.iloc[0]) < 0.01
print("functional against defective cells, none used to fit;", results["stamp"]["date"], results["stamp"]["device"])

# %% [markdown]
# :::{dropdown} Answer
# Mono. A grain boundary is a dark line, and so is a crack; and since grains lie elsewhere in each cell, the Gaussians
# of the poly cells are wide.
# :::
#
# Numbers do not show what goes wrong. Here are the mistakes: the functional cells with the highest scores, and the
# defective ones with the lowest.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four rows of two solar cells, each with its map. The upper two rows, mono: two functional cells with scores of 78 and 75, bright spots on short dark streaks; two defective cells with scores of 25 and 27, dark maps. The lower two rows, poly: two functional cells with scores of 61 and 54, bright in spots; two defective cells with scores of 21 and 26, maps without a bright spot."}}
fig, panels = plt.subplots(4, 2, figsize=(4.6, 8.8))
for line, kind in zip(panels.reshape(2, 4), data, strict=True):
    good, bad = scored[kind][:75], scored[kind][75:]
    worst = [("good", i) for i in good.topk(2).indices.tolist()] + [("bad", i) for i in (-bad).topk(2).indices.tolist()]
    drawn = [anomaly_maps([layer[i : i + 1] for layer in stored[kind][part]], fitted[kind])[0] for part, i in worst]
    low, high = scored[kind].min() / 2, scored[kind].quantile(0.9)
    for ax, (part, i), one in zip(line, worst, drawn, strict=True):
        name = "functional" if part == "good" else "defective"
        draw_map(ax, data[kind].images[splits[kind][part][i]], one, (low, high), f"{name}, score {one.max():.1f}")
    line[0].set_ylabel(kind)
    line[2].set_ylabel(kind)
plt.show()

# %% [markdown]
# Look before you blame the model. The functional mono cells with high scores have short dark streaks, which the experts
# let pass. The defective ones with low scores show nothing dark: whatever the experts knew of them, PaDiM cannot see it
# there. On poly there are cells with two bus bars and cells with three, and *one* Gaussian has to cover both.
#
# ## Where is the defect? Two numbers, and why one is not enough
#
# The cells come with labels and without masks. To measure *localisation* we paint defects on functional test cells,
# whose masks are then known: dark cracks, bright scratches, soft stains. They are **synthetic**, and are called so
# wherever they appear.
#
# **Pixel AUROC** is the AUROC over all pixels of all pictures. **PRO-score** {cite:p}`bergmann2020` is the mean share
# found of each connected region, averaged over false positive rates up to 0.3. Imagine two detectors, both perfect
# where they see anything: one sees stains only, the other sees lines only.
#
# :::{admonition} Predict first
# :class: tip
# Of the 24 defects 10 are stains, and 14 are lines with a fifth of a stain's pixels. Which detector has the higher
# pixel AUROC, and which the higher PRO-score?
# :::

# %% tags=["nbval-check-output"]
from paperlib.datasets import synthetic_defects

PAINTED = 24  # of the functional test cells get a defect, the next 24 stay as they are


def paint(kind, contrast):
    cells = data[kind].images[splits[kind]["good"][:PAINTED]]
    items = list(map(synthetic_defects(cells, contrast=contrast, seed=0, size=side).__getitem__, range(PAINTED)))
    pictures, masks = (torch.stack([getattr(item, what) for item in items]) for what in ("image", "mask"))
    return pictures, masks, [item.path for item in items]


pictures, masks, paths = paint("poly", 0.2)
stain = torch.tensor(["stain" in path for path in paths])
area = masks.sum((1, 2)).float()
print(f"{stain.sum()} stains of {area[stain].mean():.0f} pixels, {(~stain).sum()} lines of {area[~stain].mean():.0f} (mean)")
for name, seen in (("stains only", stain), ("lines only", ~stain)):
    perfect = (masks & seen[:, None, None]).float()
    print(f"sees {name:12} pixel AUROC {pixel_auroc(masks, perfect):.2f}   PRO-score {aupro(masks, perfect):.2f}")

# %% [markdown]
# :::{dropdown} Answer
# The one that sees stains only has the higher pixel AUROC, though it misses 14 defects of 24: it finds most of the
# defective *pixels*. The PRO-score is higher for the one that finds more *defects*.
# :::
#
# ## From invisible to obvious: PaDiM on synthetic defects
#
# The contrast of a painted defect goes from 0 (nothing can be seen) to 1 (all is covered). Kind, place and shape stay
# the same.

# %%
CONTRASTS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
measures, found = [], {}
for kind in data:
    plain = [layer[PAINTED : 2 * PAINTED] for layer in stored[kind]["good"]]
    plain_maps = anomaly_maps(plain, fitted[kind])
    for contrast in CONTRASTS if kind == "poly" else (0.05, 0.1):
        pictures, masks, _ = paint(kind, contrast)
        painted = features(pictures)
        found[kind, contrast] = pictures, masks, painted, anomaly_maps(painted, fitted[kind])
        both = torch.cat([found[kind, contrast][-1], plain_maps])
        truth, is_bad = torch.cat([masks, torch.zeros_like(masks)]), torch.arange(2 * PAINTED) < PAINTED
        image = auroc(is_bad, both.amax((1, 2)))
        measures.append((kind, contrast, image, pixel_auroc(truth, both), aupro(truth, both)))
curves = pd.DataFrame(measures, columns=["kind", "contrast", "image AUROC", "pixel AUROC", "PRO-score"])
print(curves.round(3).to_string(index=False))
stamped = random_100.query("seed == 0").set_index("kind")[["pixel", "pro"]]
for kind, contrast in results["stamp"]["recipe"]["contrast"].items():
    live = curves[(curves.kind == kind) & (curves.contrast == contrast)].iloc[0, 3:].astype(float)
    assert run.full or np.allclose(live, stamped.loc[kind], atol=0.01)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Figure with two sliders, described in the text under it."}}
examples = {paths[i].split()[1]: i for i in reversed(range(PAINTED))}  # the first of each kind
high = float(torch.cat([found["poly", c][-1].flatten(1).quantile(0.995, 1) for c in CONTRASTS]).quantile(0.9))


def draw(ax, kind, contrast):
    pictures, masks, _, maps = found["poly", contrast]
    i = examples[kind]
    heat = viz.heatmap((maps[i] / high).clamp(0, 1), "inferno")
    picture = pictures[i].movedim(0, -1).numpy()
    both = [picture, np.ones((side, 8, 3), np.float32), viz.overlay(heat, picture)]
    viz.panel(ax, np.concatenate(both, 1).clip(0, 1))
    ax.contour(np.arange(side) + side + 8, np.arange(side), masks[i], levels=[0.5], colors="white", linewidths=0.8)


def describe(kind, contrast):
    maps, masks = found["poly", contrast][-1], found["poly", contrast][1]
    i = examples[kind]
    inside, outside = maps[i][masks[i]].max(), maps[i][~masks[i]].max()
    return (f"A poly cell with a synthetic {kind} of contrast {contrast}, and PaDiM's map over it with the outline of the mask. "
            f"Highest distance on the {kind}: {inside:.1f}; elsewhere: {outside:.1f}.")  # fmt: skip


sliders = {"synthetic defect": ("crack", "stain"), "contrast": (0.1, 0.2, 0.5)}
companion.Slider(draw, sliders, describe, figsize=(6.4, 3.2), dpi=72)

# %% [markdown]
# On mono a contrast of 0.1 is enough; on poly the grains hide it, and it takes 0.3 or more. (By chance a pixel AUROC is
# 0.5 and a PRO-score 0.15, so that the two must not be compared with each other.)
#
# ## Table I, measured: layers alone, added, and joint
#
# The paper compares three single layers, the three maps added up, and the one joint covariance, all without reduction.
# The same on cells, five seeds, with the synthetic defects at a contrast that is hard (0.1 on mono, 0.2 on poly): pixel
# AUROC and PRO-score in percent. Beside them the image AUROC on real cells. The paper's numbers are another network's
# on other data; only the order can be compared.
#
# :::{admonition} Predict first
# :class: tip
# The joint covariance sees the same three layers as the three maps that are added. What can it know more?
# :::

# %% tags=["ledger:padim-table-1:measured"]
QUOTED_I = {  # the paper, ResNet-18 on MVTec AD: pixel AUROC and PRO-score in %, mean over all classes
    "layer 1": (94.8, 86.8), "layer 2": (95.7, 88.5), "layer 3": (95.7, 88.3), "layers added": (96.0, 89.0),
    "all": (97.1, 90.8),
}  # fmt: skip
tables = measured.query("experiment == 'tables'")
heads = [f"{kind}: {what}" for kind in data for what in ("pixel", "PRO", "image")]
print(" " * 13 + "".join(f"{head:>13}" for head in (*heads, "paper: pixel", "PRO")))
for method, (quoted_auroc, quoted_pro) in QUOTED_I.items():
    print(f"{method:13}", end="")
    for kind in data:
        of = 100 * tables[(tables.method == method) & (tables.kind == kind)][["pixel", "pro", "image"]]
        print("".join(f"{of[key].mean():7.1f} ± {of[key].std():3.1f}" for key in of), end="")
    print(f"{quoted_auroc:13}{quoted_pro:13}")
pairs = tables.pivot(index=["kind", "seed"], columns=["method", "dimensions"], values="pro").droplevel(1, axis=1)
better = pairs["all"] > pairs["layers added"]
average = tables.groupby(["kind", "method"]).pixel.mean()
for kind in data:
    rising = list(average[kind][["layer 1", "layer 2", "layer 3", "layers added"]])
    assert rising == sorted(rising)
assert better["poly"].mean() > 0.5
wins = [f"{better[kind].sum()} of {len(better[kind])} seeds on {kind}" for kind in data]
print("the joint covariance has a higher PRO-score than the added maps in", ", ".join(wins))

# %% [markdown]
# :::{dropdown} Answer
# How the layers go together: which texture of layer 1 comes with which shape of layer 3. A pair that never occurs is
# strange, though each of its parts is common: the vector $b$ of the first example.
# :::
#
# The order is the paper's, but for layer 3, which there ties with layer 2 in pixel AUROC and is 0.2 points below it in
# PRO-score. In localisation each layer is better here than the one before it, the added maps are better than any layer,
# and the joint covariance is at the top. But look at the size: on mono the last step is worth nothing, since nothing is
# left to gain, and on poly it is worth one to two points while two seeds may differ by ten. Only *seed by seed* does it
# show.
#
# And look at real defects. There, everything together is no better than the last layer alone. Telling a crack from a
# grain takes a view of shapes, which the first layer does not have. Table I is about localisation, and so is its
# lesson.
#
# ## Table II, measured: random channels against principal components
#
# Keep $d$ of the 176 dimensions: $d$ channels drawn at random; the $d$ principal components with the *largest*
# variance; or the $d$ with the *smallest*, which nobody would keep to compress a picture.
#
# :::{admonition} Predict first
# :class: tip
# The 25 largest principal components hold about 70 % of the variance of normal embeddings, the 25 smallest less than one
# percent. Which of the two finds defects better?
# :::

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two columns, mono and poly, of three line plots against the number of dimensions kept, 10 to 100, with bars of one standard deviation. From top to bottom: image AUROC on real cells, pixel AUROC and PRO-score on synthetic defects, for random channels, principal components of largest and of smallest variance; a dashed line shows all 176 dimensions."}}
fig, panels = plt.subplots(3, 2, figsize=(6.4, 7.4), sharex=True)
titles = {"image": "image AUROC, %\nreal defects", "pixel": "pixel AUROC, %\nsynthetic defects", "pro": "PRO-score, %\nsynthetic defects"}
curve = {"random": ("o", "random channels"), "PCA": ("s", "PCA, largest variance"), "least variance": ("^", "PCA, smallest variance")}
for line, kind in zip(panels.T, data, strict=True):
    of_kind = tables.query("kind == @kind")
    for ax, (key, title) in zip(line, titles.items(), strict=True):
        for shift, (method, (marker, label)) in zip((0.96, 1, 1.04), curve.items(), strict=True):
            grouped = of_kind[of_kind.method == method].groupby("dimensions")[key]
            at = np.array(list(grouped.groups)) * shift
            ax.errorbar(at, 100 * grouped.mean(), 100 * grouped.std(), marker=marker, ms=5, capsize=3, lw=1.5, label=label)
        ax.axhline(100 * of_kind[of_kind.method == "all"][key].mean(), ls="--", color="black", lw=1, label="all 176")
        ax.set_xscale("log")
        companion.log_ticks(ax.xaxis, (10, 25, 50, 100))
        ax.set_ylabel(title if kind == "mono" else "")
    line[0].set_title(kind)
    line[2].set_xlabel("dimensions kept")
fig.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% tags=["ledger:padim-table-2:measured"]
print("PRO-score of random channels minus PCA's, same seed, in points: mean ± standard deviation")
for kind in data:
    of_kind = tables.query("kind == @kind").pivot(index="seed", columns=["method", "dimensions"], values="pro")
    gains = {d: 100 * (of_kind["random", d] - of_kind["PCA", d]) for d in (10, 25, 50, 100)}
    print(f"{kind}  ", "   ".join(f"d = {d}: {gain.mean():+.1f} ± {gain.std():.1f}" for d, gain in gains.items()))
    assert (gains[10] > 0).all() and (gains[25] > 0).all()
draws = measured.query("experiment == 'draws'").groupby("kind")
for kind, of_kind in draws:
    spread = of_kind[["image", "pixel", "pro"]].std() * 100
    print(f"{kind}: ten draws of 100 channels, same cells: standard deviation of image AUROC {spread.image:.2f}, "
          f"pixel AUROC {spread.pixel:.2f}, PRO-score {spread.pro:.2f} points")  # fmt: skip
print("the paper, pixel AUROC / PRO-score: random 100 96.7 / 90.5, PCA 100 93.5 / 85.7, all 448 97.1 / 90.8 (quoted)")

# %% [markdown]
# :::{dropdown} Answer
# The 25 smallest, where the two differ. They hold next to nothing of the variance and find synthetic defects about as
# well as the 25 largest on mono, and better on poly.
# :::
#
# **In PRO-score random channels beat PCA where few are kept**: on both kinds, and in every seed, at $d = 10$ and
# $d = 25$. From 50 on the difference is hardly larger than its spread: 50 of 176 is a larger share than the paper's 100 of
# 448. Real defects do not follow: at $d = 10$ PCA has the higher image AUROC in four seeds of five on either kind, and
# from 25 on the two means differ by less than a point. **Which channels are drawn hardly matters**: ten draws differ by
# less than two splits of the cells do. (The paper gives a standard error between $10^{-4}$ and $10^{-7}$ for the mean
# of ten models.) And **100 of 176 lose little**: next to nothing on mono, one to two points on poly.
#
# ### Why PCA loses: the step that a defect makes
#
# A painted cell and the same cell unpainted differ by the defect alone. So we know exactly what step a defect makes in
# the embedding, and can ask in which directions it goes. Directions are sorted by the variance of normal embeddings,
# the largest first.

# %% mystnb={"image": {"alt": "Line plot of cumulative shares in percent against the number of principal directions, from 0 to 176, largest variance first. The variance of normal embeddings rises steeply, to 69 % at 25 directions. The defects' step rises more slowly. The step in units of normal standard deviations rises nearly along the diagonal, slowest of the three."}}
pictures, masks, painted, _ = found["poly", 0.2]
whole = [layer[:PAINTED] for layer in stored["poly"]["good"]]
cells = masks.unfold(1, 4, 4).unfold(2, 4, 4).float().mean((3, 4)).flatten(1) > 0.5  # map cells mostly on the defect
step = (embed(painted) - embed(whole))[cells]
normal = embed(stored["poly"]["train"])[:, ::5].flatten(0, 1)[:, None]  # every fifth place
variance, axes = torch.linalg.eigh(PatchGaussian(1, normal.shape[2]).update(normal).covariance(0)[0])
variance, axes = variance.flip(0), axes.flip(1)  # eigh sorts ascending
energy = (step @ axes).square().mean(0)
in_deviations = "the step, in standard deviations"
shares = {"variance of normal embeddings": variance, "the defects' step": energy, in_deviations: energy / variance}
for (name, values), style in zip(shares.items(), ("-", "--", ":"), strict=True):
    shares[name] = (100 * values.cumsum(0) / values.sum()).cpu()
    plt.plot(range(1, len(values) + 1), shares[name], style, label=name)
plt.axvline(25, color="black", lw=1)
plt.gca().set(xlabel="principal directions, largest variance first", ylabel="cumulative share, %", ylim=(0, 102))
plt.legend()
plt.show()
print("in the first 25 directions:")
for name, values in shares.items():
    print(f"{values[24]:3.0f} % of {name}")
assert variance[-25:].sum() < 0.01 * variance.sum()
assert run.full or shares["variance of normal embeddings"][24] > 3 * shares[in_deviations][24]

# %% [markdown]
# The first 25 directions hold most of what normal cells vary in, and very little of what gives a defect away, once each
# direction is measured in its own standard deviations, as the Mahalanobis distance does. In that unit the step is
# spread almost evenly, so that every direction that is dropped costs about the same, and PCA drops 151 of 176.
# Twenty-five random *channels* are mixtures of all directions.

# %% [markdown]
# ## Alignment: what a turn of 10° does
#
# Each Gaussian knows its place. Turn a functional cell, and a bus bar comes to lie where none has ever been.

# %% mystnb={"image": {"alt": "Above: line plot of the score of eight functional mono cells against the angle by which they are turned, from 0 to 10 degrees; the median rises with the angle, past the line of the threshold. Below: a cell turned by 10 degrees with its map, dark in the middle of its stripes, brighter along the bus bars and brightest at the border."}}
from torchvision.transforms.functional import InterpolationMode, rotate

ANGLES, upright = (0, 1, 2, 4, 7, 10), mono.images[splits["mono"]["good"][:8], None].float() / 255
turned = [rotate(upright, angle, InterpolationMode.BILINEAR) for angle in ANGLES]
turned_maps = [anomaly_maps(features(images), fitted["mono"]) for images in turned]
by_angle = torch.stack([maps.amax((1, 2)) for maps in turned_maps])
spare_maps = anomaly_maps(stored["mono"]["spare"], fitted["mono"])
limit = spare_maps.amax((1, 2)).quantile(0.98)
_, (above, below) = plt.subplots(2, 1, figsize=(6.4, 7.4), height_ratios=[1, 1.2], gridspec_kw={"hspace": 0.06})
above.plot(ANGLES, by_angle, color=viz.SKY, lw=1)
above.plot(ANGLES, by_angle.median(1).values, "o-", color=viz.BLUE, label="median of eight functional cells")
above.axhline(limit, ls="--", color="black", label="98 % of upright functional cells are below")
above.set(xlabel="turned by, degrees", ylabel="score", ylim=(0, None))
above.legend()
draw_map(below, turned[-1][0, 0], turned_maps[-1][0], (float(limit) / 2, float(by_angle[-1].max())), "the first, turned by 10°")
plt.show()
assert by_angle[-1].median() > by_angle[0].max()

# %% [markdown]
# A model of upright cells is useless on turned ones: every one is an alarm. The fair question is the paper's: let the
# *training* pictures be turned as well (Rd-MVTec AD: ±10°, and a crop at a random place). Then nothing is strange about
# a turn, but each Gaussian has seen many things.

# %% tags=["ledger:padim-table-6:measured"]
print("                          image AUROC, %    pixel AUROC, %      PRO-score, %")
print("                          real defects      synthetic defects")
for kind in data:
    for name in ("upright", "turned"):
        of = 100 * measured.query("kind == @kind and experiment == @name")[["image", "pixel", "pro"]]
        words = "centre crop" if name == "upright" else "turned, random crop"
        print(f"{kind} {words:20}", "".join(f"{of[key].mean():9.1f} ± {of[key].std():.1f}    " for key in of))
print("\nthe paper, WR50 on MVTec AD (quoted): 97.5 / 92.1, on Rd-MVTec AD: 92.2 / 73.1 (pixel AUROC / PRO-score)")

# %% [markdown]
# Detection suffers on both kinds: borders and bus bars now lie anywhere, and the largest value of a map is often
# theirs. In localisation mono loses three points of PRO-score and half a point of pixel AUROC: the paper's pattern,
# smaller. Poly loses about one point, less than two seeds differ by: its grains were never aligned, so there was little
# to lose.
#
# ## What it costs: PaDiM and nearest neighbours, picture by picture
#
# SPADE {cite:p}`cohen2020` keeps the embeddings of all normal pictures and looks for the nearest one. Its memory is the
# training set; PaDiM's is a fixed number of Gaussians. Both in one run, for a growing number of pictures. The search is
# exact, and timed for 256 of the 3,136 places of one picture; the seconds shown are for all of them.
#
# :::{admonition} Predict first
# :class: tip
# 100 channels on 56×56 places, 4 bytes a number. How many megabytes are the means and covariances? A picture's three
# layers (24·56² + 40·28² + 112·14² numbers) take half a megabyte. From how many pictures on does SPADE's way need more
# memory?
# :::

# %% tags=["ledger:padim-table-7:measured"]
from paperlib.neighbors import nearest_distance

one_picture = sum(layer[0].nbytes for layer in train)
gaussian_bytes = fitted["mono"][0].nbytes + fitted["mono"][1].nbytes
query, costs = embed([layer[:1] for layer in stored["mono"]["bad"]])[0], []
some = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))[:256]
for count in (20, 40, 80, 150):
    first = [layer[:count] for layer in train]
    x, times = embed(first, model.channels), [now()]
    statistics = PatchGaussian(*x.shape[1:]).update(x)
    times.append(now())
    mean, factor = statistics.mean(), torch.linalg.cholesky(statistics.covariance())
    times.append(now())
    mahalanobis_distance(query[None, :, model.channels], mean, factor)
    times.append(now())
    bank, start = embed(first).flatten(0, 1), now()
    nearest_distance(query[some], bank)
    search = (now() - start) * len(query) / len(some)
    fit, factors, score = np.diff(times)
    costs.append((count, fit, factors, score, search, mean.nbytes + factor.nbytes, count * one_picture))
    assert costs[-1][5] == gaussian_bytes
names = "pictures,fit s,factors s,score s,search s,PaDiM bytes,k-NN bytes"
costs = pd.DataFrame(costs, columns=names.split(","))
print(costs.round(3).to_string(index=False))
print(f"equal memory at {gaussian_bytes / one_picture:.0f} pictures")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three line plots against the number of normal pictures, 20 to 150. Upper left, PaDiM's fit: the seconds for means and covariances rise with the number of pictures, those for the Cholesky factors stay the same. Upper right, seconds a picture to score: PaDiM's are low and flat, those of the search rise in proportion. Below, memory in megabytes: PaDiM's is flat at 127, that of nearest neighbours is a line through zero that is extended to where it crosses, at 246 pictures."}}
panels = list(plt.figure(figsize=(6.4, 6)).subplot_mosaic("ab;cc").values())
panels[0].plot(costs["pictures"], costs["fit s"], "o-", label="means, covariances")
panels[0].plot(costs["pictures"], costs["factors s"], "D-", color=viz.GREEN, label="Cholesky factors")
panels[1].plot(costs["pictures"], costs["score s"], "o-", label="PaDiM")
panels[1].plot(costs["pictures"], costs["search s"], "s--", label="nearest neighbours")
panels[2].plot([20, 400], [gaussian_bytes / 1e6] * 2, "-", color=viz.BLUE, label="PaDiM")
panels[2].plot(costs["pictures"], costs["PaDiM bytes"] / 1e6, "o", color=viz.BLUE)
panels[2].plot([20, 400], [20 * one_picture / 1e6, 400 * one_picture / 1e6], "--", color=viz.VERMILION, label="nearest neighbours")
panels[2].plot(costs["pictures"], costs["k-NN bytes"] / 1e6, "s", color=viz.VERMILION)
panels[2].axvline(gaussian_bytes / one_picture, color="black", lw=1, ls=":")
for ax, title, unit in zip(panels, ("PaDiM's fit", "score one picture", "memory"), ("seconds", "seconds", "megabytes"), strict=True):
    ax.set(xlabel="normal pictures", ylabel=unit, title=title)
    ax.margins(y=0.8)  # room for the legend
    ax.set_ylim(0)
    ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# $4 \cdot 3136 \cdot (100^2 + 100)$ bytes are 127 MB. A picture's layers take 0.514 MB, so from 247 pictures on.
# :::
#
# Fitting is a line: so much for each picture, plus a fixed price for the 3,136 Cholesky factors. Scoring does not know
# $N$. The search grows with $N$; SPADE limits it by looking only into the K nearest pictures, which caps the time but
# not the memory. Beyond the crossing PaDiM stores less, for any number of pictures.
#
# ### Table VIII, computed
#
# The same arithmetic for the paper's networks. Nothing is measured here: the sizes follow from the shapes.

# %%
from torchvision import models

with torch.device("meta"):
    weights = {name: 4 * sum(p.numel() for p in models.get_model(full).parameters())
               for name, full in (("R18", "resnet18"), ("WR50", "wide_resnet50_2"))}  # fmt: skip


def gaussian_gb(cells, d):
    return 4 * cells**2 * (d * d + d) / 1e9


def spade_gb(cells, pictures):  # WR50's three layers, each on its own grid
    return 4 * pictures * sum(c * (cells // s) ** 2 for c, s in ((256, 1), (512, 2), (1024, 4))) / 1e9


# %% tags=["nbval-check-output", "ledger:padim-table-8:paper-number"]
QUOTED_VIII = [  # model and data, cells of the grid's side, network, d, the paper's GB
    ("R18-Rd100, MVTec", 56, "R18", 100, 0.17), ("R18-Rd100, STC", 64, "R18", 100, 0.21),
    ("WR50-Rd550, MVTec", 56, "WR50", 550, 3.8), ("WR50-Rd550, STC", 64, "WR50", 550, 5.2),
]  # fmt: skip
print("GB                    ours   with the network   the paper")
for name, cells, network, d, quoted in QUOTED_VIII:
    alone, whole = gaussian_gb(cells, d), gaussian_gb(cells, d) + weights[network] / 1e9
    print(f"{name:20} {alone:5.2f} {whole:13.2f} {quoted:15}")
    assert min(abs(alone - quoted), abs(whole - quoted)) < (0.005 if d == 100 else 0.05)
spade, picture = spade_gb(56, 242), spade_gb(56, 1)
print(f"SPADE, MVTec, 242   {spade:6.2f} {spade + weights['WR50'] / 1e9:13.2f} {1.4:15}")
print(f"SPADE stores more than R18-Rd100 from {np.ceil(gaussian_gb(56, 100) / picture):.0f} pictures on, "
      f"more than WR50-Rd550 from {np.ceil(gaussian_gb(56, 550) / picture):.0f}")  # fmt: skip
frames = 274515 / 13  # in a scene of STC
print(f"SPADE's 37 GB on STC are {37 / spade_gb(64, 1):,.0f} frames; all {frames:,.0f} would be {spade_gb(64, frames):.0f} GB")
assert abs(spade - 1.4) < 0.05

# %% [markdown]
# The printed figures follow, once one knows that 3.8 GB, and SPADE's 1.4, are without the network and PaDiM's other three with it (MVTec AD has
# 3,629 training pictures in 15 classes: 242 each). The 37 GB of SPADE on STC are what about 5,000 frames take: a scene
# has four times as many, so a part of them must have been used.
#
# ## PaDiM and Patch SVDD on the same pictures
#
# Chapter 04 ends with detectors for the same cells. Its stamped file holds their AUROC for 40 functional cells, on which
# no encoder was trained, and 40 defective ones, with 60 more in the bank. Here PaDiM fits those 60 and scores those 80.
# The times are of both, networks included: fitting 60 pictures, and scoring one.
#
# :::{admonition} Predict first
# :class: tip
# One encoder learned from some 1,400 solar cells, the other from ImageNet, without a single solar cell. Which tells
# broken cells better?
# :::

# %%
from pathlib import Path

from paperlib.datasets import TensorItems
from paperlib.patch_svdd import HierarchicalEncoder, PatchSVDD

rivals = {run_of["name"]: run_of["auroc"] for run_of in companion.read_result("patch_svdd_cells")["runs"] if run_of["seed"] == 0}
areas = {}
for kind, parts in stored.items():
    of_60 = gaussians([layer[40:100] for layer in parts["train"]])
    tested = [torch.cat([good[:40], bad[:40]]) for good, bad in zip(parts["train"], parts["bad"], strict=True)]
    areas[kind] = auroc(torch.arange(80) >= 40, anomaly_maps(tested, of_60).amax((1, 2)))
    others = [rivals[name][f"{kind} image mult"] for name in ("random", "committed")]
    assert run.full or areas[kind] > max(others)
print("image AUROC, 80 cells, split 0       mono    poly")
for name, said in (("random", "Patch SVDD, random encoder"), ("committed", "Patch SVDD, trained on cells")):
    print(f"{said:32} {rivals[name]['mono image mult']:8.3f} {rivals[name]['poly image mult']:7.3f}")
print(f"{'PaDiM, trained on ImageNet':32} {areas['mono']:8.3f} {areas['poly']:7.3f}")

# %%
encoder = HierarchicalEncoder.load(companion.result_file("patch_svdd_cells.safetensors")).to(run.device)
at_256 = torch.stack([item.image for item in TensorItems(mono.images[rows["train"][:61]], size=256)]).to(run.device)
ways = {  # a detector, and what it takes: 60 pictures to fit and one to score
    "PaDiM": (PaDiM(extractor, 100), [prepare(mono.images[rows["train"][k : k + 1]]) for k in range(61)]),
    "Patch SVDD": (PatchSVDD(encoder, stride_small=8), at_256.split(1)),
}
rows_of = []
for name, (detector, pictures) in ways.items():
    times = [now()]
    detector.fit(pictures[:60] if name == "PaDiM" else torch.cat(pictures[:60]))
    times.append(now())
    (detector.anomaly_map if name == "PaDiM" else detector.anomaly_maps)(pictures[60])
    times.append(now())
    rows_of.append(f"{name:17} {times[1] - times[0]:9.2f} {times[2] - times[1]:9.3f}")
print("seconds              fit 60   score 1", *rows_of, sep="\n")

# %% [markdown]
# :::{dropdown} Answer
# ImageNet's, clearly, on these cells: its features were pressed to tell a thousand kinds of thing apart. It is faster as
# well, since it compares a place with one Gaussian and not with every patch of the bank.
# :::
#
# That is one kind of picture, one split and small encoders. Patch SVDD needs no pretrained network: where none fits (other
# wavelengths, other modalities, a licence), it is the one of the two that can still be trained.
#
# ## The threshold: no AUROC gives you one
#
# A factory needs a number above which a part is rejected. The usual code takes the threshold with the best F1 *on the
# labelled test set*: it needs defects, and tells how good a threshold could be with hindsight. Without defects one
# takes a quantile of normal scores. But of *which* normal pictures?
#
# :::{admonition} Predict first
# :class: tip
# Take the 98 % quantile of the scores of the 150 *training* cells as the threshold. What share of new functional cells
# will be above it: 2 %, or something else?
# :::

# %% mystnb={"image": {"alt": "Five rows of points along the axis of scores: training cells lie lowest and close together; the same cells, each as if left out, lie from 15 to 80, one at 128; functional cells that were held back and functional test cells lie in the same range; defective cells from 25 to 150. Vertical lines mark the thresholds: 12 for 98 % of the fitted cells, 50 for the best F1, 63 for those held back, 80 for those left out."}}
from paperlib.padim import leave_one_out_distance

mean, factor = fitted["mono"]
inside = mahalanobis_distance(embed(train, model.channels), mean, factor).unflatten(1, train[0].shape[2:])
outside = leave_one_out_distance(inside, len(inside))
of = {name: gaussian_blur(upsample(distance, side)).amax((1, 2)).cpu()
      for name, distance in (("fitted", inside), ("fitted, left out", outside))}  # fmt: skip
of |= {"held back": spare_maps.amax((1, 2)), "test, functional": scored["mono"][:75], "test, defective": scored["mono"][75:]}
thresholds = {f"98 % of {name}": values.quantile(0.98).item() for name, values in list(of.items())[:3]}
thresholds["best F1 on the test set"] = best_threshold(labels, scored["mono"])[0]
plt.figure(figsize=(6.4, 4.4))
for height, values in enumerate(of.values()):
    plt.plot(values, -height + np.random.default_rng(0).uniform(-0.2, 0.2, len(values)), ".", ms=4)
for (name, at), style in zip(thresholds.items(), (":", "--", "-", "-."), strict=True):
    plt.axvline(at, color="black", ls=style, lw=1.5, label=name)
plt.gca().set(yticks=[-i for i in range(len(of))], yticklabels=list(of), xlabel="score", xlim=(0, None))
plt.gcf().legend(ncols=2, loc="outside upper center")
plt.show()

# %%
print("threshold                      at    false alarms   defects found     F1")
for name, at in thresholds.items():
    above = torch.ge if name.startswith("best") else torch.gt
    alarms, hits = (above(of[f"test, {kind}"], at) for kind in ("functional", "defective"))
    f1 = 2 * hits.sum() / (hits.sum() + alarms.sum() + len(hits))
    print(f"{name:25} {at:8.1f} {alarms.float().mean():13.0%} {hits.float().mean():15.0%} {f1:8.2f}")
ours = model.normal_threshold(map(prepare, mono.images[splits["mono"]["spare"]].split(batch)), 0.98)
assert abs(ours / thresholds["98 % of held back"] - 1) < 1e-3
assert (of["test, functional"] > thresholds["98 % of fitted"]).float().mean() > 0.5

# %% [markdown]
# :::{dropdown} Answer
# All of them. The Gaussians were fitted to those 150 cells, with 100 dimensions, and so *no* training cell can be
# farther away than $(N - 1)/\sqrt N = 12.2$, however odd it is.
# :::
#
# Two remedies. Hold some cells back; with 50 of them a 98 % quantile rests on one or two cells, and the share of false
# alarms that one gets is a matter of luck. Or correct each training cell to what its distance would be had it been left
# out of the fit: there is a formula for it, no refit is needed (`normal_threshold(…, fitted=True)` in `PaDiM`), and all
# 150 cells count. The best F1 is higher than what either threshold reaches: that is what hindsight is worth.
#
# ## A leak: scores scaled over the test set
#
# The usual code scales all maps of the test set to 0…1 by the smallest and the largest value *of the test set*, and
# then says "above 0.5". AUROC and F1 come out the same, because the order does not change. But what does 0.5 mean?

# %%
def scaled(scores):  # what the usual code does
    return (scores - scores.min()) / (scores.max() - scores.min())


everyone, milder = scored["mono"], scored["mono"][scored["mono"] < scored["mono"].quantile(0.9)]
middles = [(scores.min() + scores.max()) / 2 for scores in (everyone, milder)]  # what 0.5 means in each set
cell = int((everyone - sum(middles) / 2).abs().argmin())  # one and the same cell
score = everyone[cell]
in_milder = scaled(milder)[(milder - score).abs().argmin()]
print(f"its score: {score:.1f} whatever comes with it")
print(f"scaled with the whole test set: {scaled(everyone)[cell]:.2f}; scaled without its worst tenth: {in_milder:.2f}")
print("cells above 0.5:", " and ".join(f"{(scaled(some) > 0.5).sum()} of {len(some)}" for some in (everyone, milder)))
assert abs(auroc(labels, scaled(everyone)) - auroc(labels, everyone)) < 1e-6
assert run.full or (scaled(everyone)[cell] > 0.5) != (in_milder > 0.5)

# %% [markdown]
# The same cell passes or fails by what else was tested that day. On a line the parts of tomorrow are not known yet.
# Scale for a picture if you must, never for a decision.
#
# ## MVTec AD, if you have it
#
# The paper's data is free for research, and not part of this book: download it from its makers, unpack it, and set
# `MVTEC_AD` in the environment (or below) to the folder that holds `bottle`, `cable` and the rest. Then this cell fits
# and scores each class, and sets the result beside the paper's numbers.

# %%
import os

from paperlib.datasets import categories
from paperlib.padim import evaluation

MVTEC = os.environ.get("MVTEC_AD")  # or the path of the folder
if MVTEC is None:
    print("no MVTec AD here: nothing was run, and nothing is claimed about it")
else:
    settings = evaluation.Settings(MVTEC, NETWORK, "default", DIMENSIONS[NETWORK], 0, "centered")
    out = runtime.checkpoint_folder() or Path("padim-results")  # finished classes are not run again
    evaluated = evaluation.run(settings, categories(MVTEC), backbone, out, batch_size=batch, pictures=False,
                               progress=runtime.progress_line())  # fmt: skip
    print(evaluation.report(evaluated))

# %% [markdown]
# The command `python -m paperlib padim --data FOLDER` does the same with progress, pictures and a table that goes on
# where it stopped.
#
# ## Claimed and measured
#
# The claims are the paper's, about MVTec AD with ResNet-18 or WR50. Measured is what we found on solar cells with
# EfficientNet-Lite0, over five seeds: 100 random channels where nothing else is said.

# %% tags=["ledger:padim-table-5:measured"]
keys = ["kind", "experiment", "method", "dimensions", "seed"]
table = 100 * measured.set_index(keys)[["image", "pixel", "pro"]].sort_index()
joint, added = ("tables", "all", 176), ("tables", "layers added", 0)
random, pca = ("tables", "random", 100), ("tables", "PCA", 100)
search, turned, upright = ("neighbours", "nearest neighbours", 176), ("turned", "random", 100), ("upright", "random", 100)
CLAIMS = [  # claim, the paper's difference in points, what to compare
    ("joint covariance over added maps, pixel AUROC", 97.1 - 96.0, "pixel", joint, added),
    ("joint covariance over added maps, PRO-score", 90.8 - 89.0, "pro", joint, added),
    ("all channels over 100 random ones, pixel AUROC", 97.1 - 96.7, "pixel", joint, random),
    ("100 random channels over PCA, pixel AUROC", 96.7 - 93.5, "pixel", random, pca),
    ("100 random channels over PCA, PRO-score", 90.5 - 85.7, "pro", random, pca),
    ("PaDiM over SPADE's way, image AUROC", 95.3 - 85.5, "image", random, search),
    ("PaDiM over SPADE's way, pixel AUROC", 97.5 - 96.5, "pixel", random, search),
    ("SPADE's way over PaDiM, PRO-score (objects)", 93.4 - 91.6, "pro", search, random),
    ("aligned over turned, pixel AUROC", 97.5 - 92.2, "pixel", upright, turned),
    ("aligned over turned, PRO-score", 92.1 - 73.1, "pro", upright, turned),
]
print("difference in points                               paper    mono               poly")
for claim, quoted, key, one, other in CLAIMS:
    print(f"{claim:50} {quoted:+5.1f}", end="")
    for kind in data:
        gap = table[key][kind][one] - table[key][kind][other]  # seed by seed
        print(f"   {gap.mean():+6.2f} ({(gap > 0).sum()} of {len(gap)})", end="")
    print()

# %% [markdown]
# In brackets: in how many seeds the difference has the paper's sign. *SPADE's way* is ours: the ten nearest cells by
# the mean of the last layer, then the nearest embedding in them. A cell's score is its
# mean distance to those ten.
#
# In every seed of both kinds PaDiM detects better than nearest neighbours. In every seed the joint covariance and all
# 176 channels are better on poly, where the task is hard, and turned mono cells lose pixel AUROC and PRO-score. In no
# other comparison do all seeds agree: on mono everything is near its ceiling; 100 channels of 176 are too many to tell
# a random choice from PCA (25 are few enough, see above); and SPADE's better PRO-score on objects does not show here.
# None of this confirms or refutes the paper's numbers: they are another network's on other data.
#
# ### The paper's own arithmetic
#
# Its tables can be checked against each other without any data.

# %% tags=["nbval-check-output"]
# Table III, all classes:
SPADE_AUROC = [97.5, 93.7, 97.6, 87.4, 88.5, 98.4, 97.2, 99.0, 99.1, 98.1, 96.5, 98.9, 97.9, 94.1, 96.5]
CHECKS = [  # what, printed, what follows from the printed numbers
    ("Table I, layer 3, AUROC over all classes", 95.7, (5 * 94.8 + 10 * 97.1) / 15),
    ("Table II, Rd 100, PRO-score over all classes", 90.5, (5 * 91.3 + 10 * 89.4) / 15),
    ("Table III, SPADE, AUROC over all classes", 96.5, sum(SPADE_AUROC) / 15),
    ("Table III, R18-Rd100, PRO-score over all classes", 90.1, (5 * 91.3 + 10 * 89.4) / 15),
    ("Table IV, margin over SPADE on STC", 2.1, 91.2 - 89.9),
    ("Table V, least margin of EfficientNet-B5", 2.6, 97.9 - 95.8),
    ("Table VI, loss of SPADE", 8.8, 96.5 - 87.2),
    ("Table VI, loss of PaDiM-WR50-Rd550", 5.3, 97.5 - 92.2),
]
for what, printed, follows in CHECKS:
    holds = abs(printed - follows) < 0.1
    print(f"{what:50} {printed:5.1f}   {follows:6.2f}{'' if holds else '   (!) does not follow'}")
    assert holds == ("R18-Rd100" in what or "WR50" in what)
mean = sum(SPADE_AUROC) / 15
print(f"SPADE's stated loss follows from the mean of its classes: {mean:.1f} - 87.2 = {mean - 87.2:.1f}")

# %% [markdown]
# ## Where it fails

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four solar cells in two rows, each with its map, in one colour scale. A functional cell at 0.7 times its brightness: dark, it passes. The same moved by 15 pixels to the side: bright stripes at the left and right edge, an alarm. A functional poly cell given to the model of mono cells: bright all over, an alarm. A defective cell whose map is dark: it passes."}}
cells = mono.images[splits["mono"]["good"][:1], None].float() / 255
weakest = splits["mono"]["bad"][scored["mono"][75:].argmin()]
cases = {
    "0.7 times as bright": 0.7 * cells,
    "moved by 15 pixels": cells.roll(15, 3),
    "another product": data["poly"].images[splits["poly"]["good"][:1], None] / 255,
    "a defect not seen": mono.images[weakest][None, None] / 255,
}
fig, panels = plt.subplots(2, 2, figsize=(5.8, 5.9))
for ax, (title, image) in zip(panels.flat, cases.items(), strict=True):
    one = anomaly_maps(features(image), fitted["mono"])[0]
    drawn = draw_map(ax, image[0, 0], one, (0, 2 * float(limit)), f"{title}\n{one.max():.0f}: {'alarm' if one.max() > limit else 'passes'}")
fig.colorbar(drawn, ax=panels, label="distance", shrink=0.9)
plt.show()
print(f"threshold {limit:.0f}: 98 % of functional cells that were held back")

# %% [markdown]
# - **A moved part** is an alarm along the edges that it moved across. So is a turned one.
# - **Another product**, or a second variant of the same, is an alarm everywhere. Fit one model for each.
# - **A dimmer picture** passes here, because the training cells differ in brightness themselves. What normal pictures do not
#   vary in, PaDiM does not forgive.
# - **A defect that the network does not see** at these layers is not found, however many normal pictures there are.
#
# ## Your own folder, in ten lines
#
# A folder with a subfolder `normal`, and if you have some, `abnormal`. By default the code writes a few solar cells out
# as files first, so that it starts where you would.

# %%
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = None  # or the path of a folder (or its zip) that holds a folder `normal`, and perhaps `abnormal`
by_default = FOLDER is None
if FOLDER is None:
    temporary = tempfile.TemporaryDirectory()
    FOLDER = temporary.name
    for name, chosen in (("normal", splits["mono"]["spare"]), ("abnormal", splits["mono"]["bad"][:10])):
        Path(FOLDER, name).mkdir()
        for i in chosen.tolist():
            Image.fromarray(mono.images[i].numpy()).save(Path(FOLDER, name, f"{i:04}.png"), compress_level=1)

# %% tags=["nbval-check-output"]
from torch.utils.data import Subset

from paperlib.datasets import batches, folder, open_folder

items = folder(open_folder(FOLDER))  # the normal pictures come first
normal = sum(sample.label == 0 for sample in items.samples)
cut = normal * 4 // 5
fit, held, rest = (Subset(items, range(*ends)) for ends in ((0, cut), (cut, normal), (normal, len(items))))
mine = PaDiM(extractor, DIMENSIONS[NETWORK]).fit(prepare(b.images) for b in batches(fit, batch))
limit = mine.normal_threshold((prepare(b.images) for b in batches(held, batch)), quantile=0.95)
mine.save(path := Path(tempfile.mkdtemp(), "mine.safetensors"))  # to keep it, name a folder of your own
loaded = PaDiM.load(path, extractor)
for some in map(prepare, (b.images for b in batches(rest, batch))):
    torch.testing.assert_close(loaded.score(some), mine.score(some))
    if not by_default:
        print([f"{score:.1f}{' alarm' if score > limit else ''}" for score in mine.score(some).tolist()])
print(f"fitted {mine.count} pictures, saved {path.stat().st_size / 1e6:.0f} MB, loaded: the same scores")

# %% [markdown]
# `PaDiM.load(path)` works from the path alone for networks that the library knows by name. The file is safetensors:
# numbers and their names. The usual code pickles the statistics, and loading a pickle runs the code in it.
#
# ## Exercises
#
# Each cell calls a check that tells you what is off without giving the answer away. Put your answer in place of the
# dots: a number, or the name of a function that you define above the check. Solutions are folded under each group.
#
# **Warm-up (5 minutes).**
#
# **1.** How many megabytes (a million bytes) does PaDiM store for $d = 50$ on a 28×28 grid, in float32? The network
# does not count.
#
# **2.** $\Sigma$ is diagonal with variances 4 and 0.25, and $x - \mu = (4, 1)$. What is the Mahalanobis distance?

# %% tags=["exercise"]
from paperlib.exercises import padim as check

done = check.stored_megabytes(...)
done = check.distance_by_hand(...)

# %% tags=["solution", "hide-cell"]
assert check.stored_megabytes(4 * 28 * 28 * (50 * 50 + 50) / 1e6)
assert check.distance_by_hand((4**2 / 4 + 1**2 / 0.25) ** 0.5)

# %% [markdown]
# **Core (20 minutes).**
#
# **3.** Write `f(maps)`: stack feature maps (N, C, h, w) of different sizes on the grid of the first, the largest. All
# sizes divide it.
#
# **4.** Write `f(x, epsilon)`, Eq. 1 for all places without a loop over them: x (N, P, D), covariances (P, D, D).
#
# **5.** Write `f(scores, rate)`: from scores of normal pictures, a threshold that a share `rate` of them exceeds.
#
# **6.** ResNet-18 gives 64, 128 and 256 channels on 56×56, 28×28 and 14×14 cells. From how many pictures on does
# storing all three layers of every picture, each on its own grid, take more memory than PaDiM's Gaussians with
# $d = 100$?

# %% tags=["exercise"]
done = check.embedding_function(...)
done = check.covariance_function(...)
done = check.threshold_function(...)
done = check.crossover(...)


# %% tags=["solution", "hide-cell"]
def stack(maps):
    side = maps[0].shape[-1]
    repeats = [side // layer.shape[-1] for layer in maps]
    enlarged = [m.repeat_interleave(r, 2).repeat_interleave(r, 3) for m, r in zip(maps, repeats, strict=True)]
    return torch.cat(enlarged, 1)


def eq_1(x, epsilon):
    centred = x - x.mean(0)
    return torch.einsum("npi,npj->pij", centred, centred) / (len(x) - 1) + epsilon * torch.eye(x.shape[2])


assert check.embedding_function(stack)
assert check.covariance_function(eq_1)
assert check.threshold_function(lambda scores, rate: torch.quantile(scores, 1 - rate))
assert check.crossover(56 * 56 * (100 * 100 + 100) // (64 * 56**2 + 128 * 28**2 + 256 * 14**2) + 1)

# %% [markdown]
# **Stretch (15 minutes).**
#
# **7.** Two machines have fitted different pictures of one product. For one place each gives its number of pictures,
# its mean (D,) and its *scatter*, the sum $\sum (x - \mu)(x - \mu)^{\mathsf T}$, (D, D). Write `f(n1, mean1, scatter1,
# n2, mean2, scatter2)` that gives number, mean and scatter of all pictures together. No picture may be looked at again.

# %% tags=["exercise"]
done = check.merge_function(...)


# %% tags=["solution", "hide-cell"]
def merge(n1, mean1, scatter1, n2, mean2, scatter2):
    n, apart = n1 + n2, mean2 - mean1
    return n, mean1 + apart * n2 / n, scatter1 + scatter2 + torch.outer(apart, apart) * n1 * n2 / n


assert check.merge_function(merge)

# %% [markdown]
# ## Quiz
#
# **1.** Why does the paper add $\epsilon I$ to the covariance?
#
# :::{dropdown} Answer
# $N$ vectors span at most $N - 1$ directions around their mean. With fewer pictures than dimensions the covariance has no
# inverse. With $\epsilon$ it has one, and a direction without any variance counts as one of variance 0.01.
# :::
#
# **2.** A network gives maps of 64×64, 32×32 and 16×16 cells for pictures of 256×256. How many Gaussians are there, and
# how many pixels does one stand for?
#
# :::{dropdown} Answer
# 64·64 = 4,096: the largest map sets the grid. Each stands for 4×4 pixels.
# :::
#
# **3.** You keep all principal components in place of all channels. What changes?
#
# :::{dropdown} Answer
# Nothing: it is a rotation, and the covariance turns with it. Only leaving some out changes something, and PCA leaves
# out those of smallest variance, where a small deviation counts most.
# :::
#
# **4.** You collect ten times as many normal pictures. What happens to the time to fit, the memory, the time to score,
# for PaDiM and for a nearest-neighbour search?
#
# :::{dropdown} Answer
# PaDiM: the fit takes ten times as long (less the fixed price of the factors), memory and scoring stay. The search: no
# Gaussians to fit, but ten times the pictures to embed, ten times the memory, and ten times the time unless it is
# limited to some pictures.
# :::
#
# **5.** A colleague chose the threshold at the 99 % quantile of the training pictures' scores. Nearly every good part
# stops the line. Why?
#
# :::{dropdown} Answer
# The Gaussians were fitted to these very pictures, so they lie too close to them. Take pictures that were held back, or
# correct for it by leaving one out.
# :::
#
# **6.** Method A has a pixel AUROC of 98 % and a PRO-score of 80 %, method B 97 % and 90 %. Which one do you take to
# find hairline cracks?
#
# :::{dropdown} Answer
# B. A pixel AUROC can be earned with large defects alone; the PRO-score counts each region alike, and hairline cracks
# are small regions.
# :::
#
# **7.** A paper reports an F1 of 0.97 for maps scaled over the test set. What do you ask?
#
# :::{dropdown} Answer
# How the threshold was chosen. If on the same test set, 0.97 is what was possible with hindsight. The scaling by itself
# does not change the F1; it makes the threshold meaningless for the next picture.
# :::
#
# ## Summary
#
# - A pretrained network describes each place of a picture; one mean and one covariance a place describe what is normal;
#   the Mahalanobis distance tells what is not. One pass over the pictures, nothing to train.
# - The off-diagonal numbers carry what a channel-by-channel distance misses.
# - A hundred channels drawn at random do nearly as well as all 176. PCA keeps where normal pictures differ from each other; a defect shows
#   where they do not.
# - Memory and scoring time do not grow with the number of pictures. Memory grows with $d^2$.
# - It needs alignment, a held-out threshold, and one scale for all pictures.
#
# **Next**: PatchCore {cite:p}`roth2022` goes back to nearest neighbours, keeps a few well-chosen vectors, and compares
# a patch with *any* place. {cite:t}`rippel2021` tell why directions of small variance matter.
#
# **Use it on your own images**: set `FOLDER` above. Keep some normal pictures back for the threshold; take pictures
# from a fixed camera; and look at the maps before you believe a number.
