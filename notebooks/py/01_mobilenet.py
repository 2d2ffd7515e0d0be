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
# # MobileNet in code: 8.6 times fewer multiply-adds for 1.1 points of accuracy
#
# A standard convolution filters and combines channels in one step. MobileNet
# {cite:p}`howard2017` splits this into two steps and needs eight to nine times fewer
# multiply-adds. This notebook recounts the multiply-adds and parameters of the paper's
# Tables 1 to 9 and finds the numbers that are misprinted. It trains small MobileNets on
# real images, and ends with a question that counts cannot answer: is the network
# faster?
#
# - **Read first**: the [page on the paper](../book/01_mobilenet.md), 40 minutes. You
#   need PyTorch basics: tensors, `nn.Module`, `nn.Conv2d`.
# - **Time**: 80 minutes to read and run, 35 for the exercises. The whole notebook runs
#   in one to two minutes on an idle two-core machine, and longer on a busy one or on
#   Colab without a GPU.
# - **Two profiles**: *smoke* runs offline on a CPU and trains for two epochs. *Full*,
#   the default on a Colab GPU, trains for twelve. The numbers in the text are those of
#   the smoke profile.

# %%
import itertools

import companion  # stored results and drawings that the notebooks share
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from paperlib import runtime, viz

run = runtime.start(seed=0)
viz.use_style()

# %% [markdown]
# ## The result first: accuracy falls with the logarithm of the cost
#
# Two hyperparameters make a MobileNet smaller. The **width multiplier** $\alpha$ is the
# share of its channels that every layer keeps. The **resolution multiplier** $\rho$
# scales the side of the input image: 224 pixels for $\rho = 1$, 128 for
# $\rho = 0.57$. Four values of each make 16 networks. The code computes what each one
# costs. The accuracies are from the paper, which prints them for 8 of the 16 networks.
#
# A **multiply-add** (MAC) is one multiplication and the addition that follows it. It is
# the unit of every count here.

# %% tags=["nbval-check-output"]
from paperlib.complexity import profile
from paperlib.mobilenet import MobileNetV1

WIDTHS, SIDES = (1, 0.75, 0.5, 0.25), (224, 192, 160, 128)


def cost(width=1, side=224, **variant):
    with torch.device("meta"):  # shapes without values: nothing is computed
        return profile(MobileNetV1(width, **variant), (1, 3, side, side))


profiles = {}  # (α, input side) → cost of that network
for width, side in itertools.product(WIDTHS, SIDES):
    profiles[width, side] = cost(width, side)

grid_macs = [network_cost.macs / 1e6 for network_cost in profiles.values()]
print(f"{len(profiles)} networks, from {min(grid_macs):.2f} ", end="")
print(f"to {max(grid_macs):.2f} million multiply-adds")

# %% [markdown]
# - The **meta device** of PyTorch stores the shape of a tensor, but no values. A
#   network on it needs no memory, and a forward pass computes only shapes.
# - `profile` runs such a forward pass for an input of shape (1, 3, side, side) and
#   counts each layer. `.macs` and `.params` are the totals, `.layers` one entry per
#   layer.

# %% tags=["hide-input"]
QUOTED = {  # (α, input side) → ImageNet top-1 accuracy in %, from Tables 6, 7 and 9
    (1, 224): 70.6,
    (1, 192): 69.1,
    (1, 160): 67.2,
    (1, 128): 64.4,
    (0.75, 224): 68.4,
    (0.5, 224): 63.7,
    (0.5, 160): 60.2,
    (0.25, 224): 50.6,
}
MARKERS = {  # α → colour and marker
    1: (viz.BLUE, "o"),
    0.75: (viz.VERMILION, "s"),
    0.5: (viz.GREEN, "D"),
    0.25: (viz.PURPLE, "^"),
}


# %% tags=["hide-input"]
def plot_accuracies(ax, quantity):
    """Plot the paper's accuracies against millions of "macs" or "params"."""
    for width, (colour, marker) in MARKERS.items():
        sides = [side for side in SIDES if (width, side) in QUOTED]
        accuracies = [QUOTED[width, side] for side in sides]
        costs = [getattr(profiles[width, side], quantity) / 1e6 for side in sides]
        ax.plot(costs, accuracies, marker, color=colour, ms=8, label=f"α = {width}")
        is_crowded = width == 1 and quantity == "macs"  # no room to the left
        offset = (7, -11) if is_crowded else (-31, -4)
        for side, x, y in zip(sides, costs, accuracies, strict=True):
            ax.annotate(side, (x, y), offset, textcoords="offset points", fontsize=11)
    missing = [profiles[key] for key in profiles if key not in QUOTED]
    costs = [getattr(network_cost, quantity) / 1e6 for network_cost in missing]
    style = dict(color=viz.GREY, ms=12, label="accuracy not printed")
    ax.plot(costs, [47] * len(costs), "|", **style)
    ax.set(xscale="log", ylabel="ImageNet top-1 accuracy, %")


# %% tags=["hide-input", "ledger:mobilenet-figure-4:paper-number", "ledger:mobilenet-figure-5:paper-number"] mystnb={"image": {"alt": "Two scatter plots with a logarithmic horizontal axis. Above: ImageNet accuracy against million multiply-adds; the eight printed accuracies rise from 50.6 % at 41 million to 70.6 % at 569 million, nearly on a line, with a drop at width 0.25; grey ticks on the axis mark the eight networks whose accuracy is not printed. Below: accuracy against million parameters; networks of one width share a vertical line because resolution changes no parameter."}}
fig, (macs_ax, params_ax) = plt.subplots(2, 1, sharey=True, figsize=(6.4, 7.2))

plot_accuracies(macs_ax, "macs")
macs_ax.set(xlabel="million multiply-adds")
macs_ax.set_title("Figure 4: half the cost, 3 to 4 points less, except at α = 0.25")
macs_ax.set_xlim(11, 1000)
companion.log_ticks(macs_ax.xaxis, (15, 50, 150, 500))
macs_ax.legend(loc="lower right", bbox_to_anchor=(1, 0.1))

plot_accuracies(params_ax, "params")
params_ax.set(xlabel="million parameters", xlim=(0.35, 5.5))
params_ax.set_title("Figure 5: resolution does not change the parameters")
companion.log_ticks(params_ax.xaxis, (0.5, 1, 2, 4))
plt.show()

# %% [markdown]
# These are the paper's Figures 4 and 5, with computed costs. **Top-1 accuracy** is the
# share of images whose most probable class is the true one, here on ImageNet (1,000
# classes of photographs). The number beside a point is the side of the input image in
# pixels. The paper calls the relation *log-linear*: accuracy is about linear in the
# logarithm of the cost. The exception is $\alpha = 0.25$, which loses more.
#
# ## What you will be able to do
#
# 1. Count the multiply-adds and parameters of a convolution by hand, standard and
#    separable.
# 2. State how much a separable layer saves, and what the saving does *not* depend on.
# 3. Recompute a published table of costs and find its mistakes.
# 4. Choose $\alpha$ and $\rho$ for a budget.
# 5. Explain why eight times fewer multiply-adds do not make a network eight times
#    faster.

# %% [markdown]
# ## By hand: 5,040 multiply-adds, or 1,280
#
# Take an input of 6×6 positions with $M = 5$ channels, and compute $N = 7$ output
# channels with a kernel of side $D_K = 3$, stride 1 and no padding. The kernel fits at
# 4×4 positions, so the side of the output is $D_G = 4$. (The paper pads the input and
# writes $D_F$ for the side of input and output; the cost counts *output* positions.)
#
# - **Standard**: each of the 7 filters spans all 5 channels and is applied at 4×4
#   positions.
# - **Depthwise**, then **pointwise**: 5 filters that span one channel each, then 7
#   filters of 1×1 that combine the channels.
#
# The figure draws filters on a smaller scale than feature maps.

# %% tags=["hide-input"]
ROWS = {  # title → (label, number of copies, size) of each group in the row
    "standard: 5,040 multiply-adds": [
        ("input 6×6×5", 1, (6, 6, 5)),
        ("7 filters 3×3×5", 7, (3, 3, 5)),
        ("output 4×4×7", 1, (4, 4, 7)),
    ],
    "separable, first depthwise: 720": [
        ("input 6×6×5", 1, (6, 6, 5)),
        ("5 filters 3×3×1", 5, (3, 3, 1)),
        ("4×4×5", 1, (4, 4, 5)),
    ],
    "then pointwise: 560": [
        ("4×4×5", 1, (4, 4, 5)),
        ("7 filters 1×1×5", 7, (1, 1, 5)),
        ("output 4×4×7", 1, (4, 4, 7)),
    ],
}

# %% tags=["hide-input", "ledger:mobilenet-figure-2:redrawn"] mystnb={"image": {"alt": "Top row, 5,040 multiply-adds: a 6 by 6 by 5 input, seven filters of 3 by 3 by 5, and the 4 by 4 by 7 output of a standard convolution. Middle row, depthwise, 720: the same input, five filters of 3 by 3 by 1, and the 4 by 4 by 5 result. Bottom row, pointwise, 560: that result, seven filters of 1 by 1 by 5, and again a 4 by 4 by 7 output. Filters are drawn smaller than feature maps."}}
fig, ax = plt.subplots(figsize=(5.6, 5.1))
for y, (title, groups) in zip((26, 12.5, 0), ROWS.items(), strict=True):
    x = 0.0
    for label, copies, size in groups:
        left = x
        for _ in range(copies):  # filters are drawn at 60 % of the feature maps' scale
            colour, scale = (viz.SKY, 1) if copies == 1 else (viz.ORANGE, 0.6)
            right, _ = companion.cuboid(ax, (x, y), size, colour, scale)
            x = right + 0.3
        ax.text((left + x) / 2, y - 0.5, label, ha="center", va="top", fontsize=11)
        x += 2.5
    title_height = 7 if title.startswith("then pointwise") else 9
    ax.text(0, y + title_height, title, weight="bold")
ax.set(xlim=(-0.5, 47), ylim=(-2.2, 37), aspect="equal")
ax.axis("off")
plt.show()

# %% tags=["nbval-check-output", "ledger:mobilenet-eq-2:by-hand", "ledger:mobilenet-eq-4:by-hand", "ledger:mobilenet-eq-5:by-hand"]
from paperlib.complexity import conv2d_macs, depthwise_separable_macs

# kernel area × channels in × channels out × output positions
standard_macs = (3 * 3) * 5 * 7 * (4 * 4)  # Eq. 2
depthwise_macs = (3 * 3) * 5 * (4 * 4)  # Eq. 4: no factor for channels out
pointwise_macs = (1 * 1) * 5 * 7 * (4 * 4)  # Eq. 2 with a 1×1 kernel
separable_macs = depthwise_macs + pointwise_macs  # Eq. 5

print(f"standard  {standard_macs}")
print(f"separable {depthwise_macs} + {pointwise_macs} = {separable_macs}")
print(f"{standard_macs / separable_macs:.2f} times less")

# %% tags=["remove-cell"]
sizes = dict(kernel=3, in_channels=5, out_channels=7, out_size=4)
assert standard_macs == conv2d_macs(**sizes) == 5040
assert separable_macs == depthwise_separable_macs(**sizes) == 1280


# %% [markdown]
# - **Standard**: one output value needs one product per weight of a filter, 3·3·5.
#   There are 7·4·4 output values.
# - **Depthwise**: each channel is filtered once, not once per output channel. So the
#   factor 7 is missing.
# - **Pointwise**: one output value needs one product per input channel, 5.
#
# The library's `conv2d_macs` and `depthwise_separable_macs` compute the same; they are
# used below.
#
# ## From the paper to code: counting one product at a time
#
# The paper's Eq. 1 defines the standard convolution. $F$ is the input, $K$ are the
# kernels, $G$ is the output; $k, l$ run over output positions, $m$ over input channels,
# $n$ over output channels, and $i, j$ over the kernel:
#
# $$
# G_{k,l,n} = \sum_{i,j,m} K_{i,j,m,n} \cdot F_{k+i-1,\,l+j-1,\,m} \tag{1}
# $$
#
# The depthwise convolution (Eq. 3) has no sum over $m$: channel $m$ of the output
# depends on channel $m$ of the input only.
#
# $$
# \hat G_{k,l,m} = \sum_{i,j} \hat K_{i,j,m} \cdot F_{k+i-1,\,l+j-1,\,m} \tag{3}
# $$
#
# The function below is Eq. 1 in PyTorch's order of axes. It also counts the products.

# %%
def convolve(image, kernels):
    """Compute Eq. 1 with stride 1 and no padding; also count the multiply-adds."""
    in_channels, height, width = image.shape
    out_channels, _, side, _ = kernels.shape
    output = torch.zeros(out_channels, height - side + 1, width - side + 1)
    products = 0
    for n, y, x in itertools.product(*map(range, output.shape)):
        for m, i, j in itertools.product(range(in_channels), range(side), range(side)):
            output[n, y, x] += kernels[n, m, i, j] * image[m, y + i, x + j]
            products += 1
    return output, products


image, kernels = torch.randn(5, 6, 6), torch.randn(7, 5, 3, 3)
standard_output, standard_products = convolve(image, kernels)

# %% [markdown]
# | name | what it is | shape |
# |---|---|---|
# | `image` | $F$: channels, rows, columns | (5, 6, 6) |
# | `kernels` | $K$: output channels, input channels, rows, columns | (7, 5, 3, 3) |
# | `standard_output` | $G$: 6 − 3 + 1 = 4 positions in each direction | (7, 4, 4) |
#
# - `itertools.product` replaces nested loops. The outer one visits each output value
#   (the code writes `y, x` for $k, l$); `map(range, output.shape)` makes one range per
#   axis.
# - The inner one visits each weight of filter $n$, over the input channels $m$ and the
#   kernel $i, j$. Python counts from 0, which removes the $-1$ of Eq. 1.
# - Each iteration adds one product to the output value and increments the counter.
#
# A depthwise convolution is $M$ convolutions of one channel each. A pointwise
# convolution is the standard one with a 1×1 kernel. So the same function computes the
# separable layer:

# %% tags=["nbval-check-output", "ledger:mobilenet-eq-1:by-hand", "ledger:mobilenet-eq-3:by-hand"]
depthwise_kernels, pointwise_kernels = torch.randn(5, 1, 3, 3), torch.randn(7, 5, 1, 1)
filtered_channels, depthwise_products = [], 0
for m in range(5):
    channel, products = convolve(image[m : m + 1], depthwise_kernels[m : m + 1])
    filtered_channels.append(channel)
    depthwise_products += products
filtered = torch.cat(filtered_channels)
separable_output, pointwise_products = convolve(filtered, pointwise_kernels)

torch_standard = F.conv2d(image[None], kernels)
torch_filtered = F.conv2d(image[None], depthwise_kernels, groups=5)
torch_separable = F.conv2d(torch_filtered, pointwise_kernels)
outputs = [standard_output[None], separable_output[None]]
torch.testing.assert_close(outputs, [torch_standard, torch_separable])
print(f"standard  {standard_products} products, counted one by one")
print(f"separable {depthwise_products} + {pointwise_products}")

# %% tags=["remove-cell"]
assert standard_products == standard_macs
assert depthwise_products == depthwise_macs
assert pointwise_products == pointwise_macs


# %% [markdown]
# | name | what it is | shape |
# |---|---|---|
# | `depthwise_kernels` | $\hat K$: one 3×3 filter per channel | (5, 1, 3, 3) |
# | `filtered` | $\hat G$: the five filtered channels | (5, 4, 4) |
# | `pointwise_kernels` | seven 1×1 kernels over all channels | (7, 5, 1, 1) |
# | `separable_output` | the output of both steps | (7, 4, 4) |
#
# - `image[m : m + 1]` keeps the channel axis, (1, 6, 6), which `convolve` expects.
# - `image[None]` adds a batch axis, (1, 5, 6, 6), because PyTorch's convolution expects
#   a batch. Its results agree with ours for both layers.
# - `groups=5` makes PyTorch's convolution depthwise: the 5 input channels form 5 groups
#   of one, and each group has its own filter. As a layer it is
#   `nn.Conv2d(M, M, 3, groups=M)`.
#
# ## What does the saving depend on?
#
# :::{admonition} Predict first
# :class: tip
# The example by hand saved a factor of 3.9, with $M = 5$ input channels, $N = 7$ output
# channels and 4×4 output positions. Which of the three change the factor? How large can
# it become with a 3×3 kernel?
# :::

# %% tags=["hide-output", "nbval-check-output"]
def compute_saving(in_channels, out_channels, side):
    """Compute how many times fewer multiply-adds a 3×3 separable layer needs."""
    standard = conv2d_macs(3, in_channels, out_channels, side)
    return standard / depthwise_separable_macs(3, in_channels, out_channels, side)


for n in (7, 512):
    savings = set()
    for m, side in itertools.product((1, 5, 64, 512), (1, 14, 112)):
        savings.add(round(compute_saving(m, n, side), 6))
    print(f"N = {n}: the factors found are {sorted(savings)}")

# %% tags=["remove-cell"]
for n in (7, 512):
    assert abs(1 / compute_saving(64, n, side=14) - (1 / n + 1 / 9)) < 1e-12

# %% tags=["hide-input", "hide-output"] mystnb={"image": {"alt": "Line plot of the factor saved against the number of output channels N from 1 to 1024 on a logarithmic axis, for kernels of side 3, 5 and 7. Each curve rises and levels off at its kernel's area: 9, 25 and 49. Two marks on the lowest curve show N = 7 with a factor 3.94 and N = 512 with a factor 8.84."}}
n_outputs = torch.logspace(0, 10, 60, base=2)
for kernel, line_style in ((3, "-"), (5, "--"), (7, ":")):
    curve = 1 / (1 / n_outputs + 1 / kernel**2)
    label = f"{kernel}×{kernel} kernel, at most {kernel**2}"
    plt.plot(n_outputs, curve, line_style, label=label)
for n, offset in ((7, (8, -11)), (512, (-50, -16))):
    saving = compute_saving(64, n, side=14)
    plt.plot(n, saving, "o", color=viz.BLUE)
    text = f"N = {n}: {saving:.2f}"
    plt.annotate(text, (n, saving), offset, textcoords="offset points")
plt.xscale("log")
companion.log_ticks(plt.gca().xaxis, (1, 4, 16, 64, 256, 1024))
plt.gca().set(xlabel="output channels N", ylabel="times fewer multiply-adds")
plt.title("The saving approaches the area of the kernel")
plt.ylim(0, 50)
plt.legend()
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# Only $N$. The loop over 4 numbers of input channels and 3 image sides finds a single
# factor per $N$: 3.94 for $N = 7$, 8.84 for $N = 512$. With many output channels only
# the area of the kernel matters, so a 3×3 kernel never saves more than a factor of 9.
# :::
#
# Divide the separable cost (Eq. 5) by the standard one (Eq. 2). The output positions
# $D_F^2$ and the input channels $M$ cancel:
#
# $$
# \frac{D_K^2 \, M \, D_F^2 + M \, N \, D_F^2}{D_K^2 \, M \, N \, D_F^2} = \frac{1}{N} + \frac{1}{D_K^2}
# $$
#
# ## Table 1: the whole network, and a misprinted stride
#
# The paper's Figure 3 compares the two building blocks. **Batch norm** normalises each
# channel to mean 0 and variance 1 (over the batch in training, with stored averages in
# evaluation), then applies a learned scale and shift. **ReLU** sets negative values to
# 0. These are the blocks as the library builds them:

# %% tags=["hide-input"]
from torch import nn


def name_module(module):
    if isinstance(module, nn.BatchNorm2d):
        return "batch norm"
    if not isinstance(module, nn.Conv2d):
        return type(module).__name__
    height, width = module.kernel_size
    kind = "depthwise convolution" if module.groups > 1 else "convolution"
    return f"{height}×{width} {kind}"


# %% tags=["hide-input", "ledger:mobilenet-figure-3:redrawn"] mystnb={"image": {"alt": "Two columns of boxes. Left, the standard block: 3×3 convolution, batch norm, ReLU. Right, the separable block: 3×3 depthwise convolution, batch norm, ReLU, 1×1 convolution, batch norm, ReLU."}}
fig, ax = plt.subplots(figsize=(5.6, 4))
style = dict(ha="center", va="center", fontsize=11)
for column, separable in enumerate((False, True)):
    block = MobileNetV1(separable=separable).features.block3
    title = "separable block" if separable else "standard block"
    ax.text(column, 0.8, title, ha="center", weight="bold")
    for row, module in enumerate(block):
        colour = viz.ORANGE if isinstance(module, nn.Conv2d) else "white"
        box = dict(boxstyle="round,pad=0.35", facecolor=colour, edgecolor=viz.GREY)
        ax.text(column, -row, name_module(module).center(28), bbox=box, **style)
ax.set(xlim=(-0.6, 1.6), ylim=(-5.6, 1.2))
ax.axis("off")
ax.set_title("A separable block has two convolutions,\neach with batch norm and ReLU")
plt.show()

# %% [markdown]
# A standard convolution (the *stem*), 13 separable blocks and one linear layer make up
# Table 1: 28 layers with weights, if depthwise and pointwise layers are counted
# separately. The table below leaves out layers without multiply-adds, but its parameter
# total includes the 21,888 scales and shifts of batch norm.

# %% tags=["nbval-check-output", "ledger:mobilenet-table-1:paper-number"]
baseline = cost()
print(baseline.table(costly_only=True))

layers = [layer for layer in baseline.layers if layer.macs]
printed_cost = cost(last_stride=2)
print(f"\n{len(layers)} layers")
print(f"with the last stride as printed (2): {printed_cost.macs / 1e6:.2f} million")
assert len(layers) == 28 and baseline.macs == 568_740_352

# %% [markdown]
# :::{admonition} The paper's slip: the last stride
# :class: warning
# Table 1 prints "s2" for the last depthwise layer, with a 7×7 input. The next row's
# input is 7×7 as well, so the stride must be 1. The total agrees: 568.74 million with
# stride 1 (the paper prints 569), 533.83 million with stride 2. The library's default
# is 1; `MobileNetV1(last_stride=2)` is the network as printed.
# :::
#
# ### Strided depthwise convolutions replace pooling
#
# Which layers shrink the feature maps from 224 to 7? With **stride 2** a kernel moves
# two positions at a time in both directions. So it computes a quarter of the output
# positions, and both sides are halved.

# %% tags=["nbval-check-output"]
output_sides = {layer.name: layer.output_shape[-1] for layer in layers}
for name, module in MobileNetV1().named_modules():
    if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
        side = output_sides[name]
        print(f"{name:26} {name_module(module):26} output {side}×{side}")

# %% [markdown]
# There are five: the stem, and four **depthwise** layers. Each pointwise layer has
# stride 1. VGG uses max-pooling layers instead; AlexNet uses a first convolution with
# stride 4, then max pooling. MobileNet's only pooling is the average over all positions
# before the linear layer.
#
# ## Table 2: where the work is
#
# :::{admonition} Predict first
# :class: tip
# The 13 depthwise layers do the 3×3 filtering. What is their share of the
# multiply-adds? Estimate it from one block of Table 1, without adding up the column.
# :::

# %%
TABLE2 = {  # type of layer → the paper's shares of mult-adds and of parameters, %
    "pointwise conv": (94.86, 74.59),
    "depthwise conv": (3.06, 1.06),
    "conv": (1.19, 0.02),
    "linear": (0.18, 24.33),
}
# The paper's shares of parameters leave out batch norm and the last layer's bias.
N_BIASES = 1000
n_weights = sum(layer.params for layer in layers) - N_BIASES

shares = {}  # type of layer → our two shares, %
for kind in TABLE2:
    kind_macs = sum(layer.macs for layer in layers if layer.kind == kind)
    kind_params = sum(layer.params for layer in layers if layer.kind == kind)
    if kind == "linear":
        kind_params -= N_BIASES
    shares[kind] = 100 * kind_macs / baseline.macs, 100 * kind_params / n_weights

# %% tags=["hide-input", "hide-output", "nbval-check-output", "ledger:mobilenet-table-2:paper-number"]
print("                 mult-adds, %         parameters, %")
print("                 ours    paper        ours    paper")
for kind, (paper_macs, paper_params) in TABLE2.items():
    macs_share, params_share = shares[kind]
    is_slip = abs(macs_share - paper_macs) > 0.01
    mark = "(!)" if is_slip else "   "
    print(f"{kind:15} {macs_share:6.2f}   {paper_macs:5.2f} {mark}", end="")
    print(f"   {params_share:6.2f}   {paper_params:5.2f}")
    assert is_slip == (kind == "conv") and abs(params_share - paper_params) <= 0.006

paper_total = sum(paper_macs for paper_macs, _ in TABLE2.values())
print(f"\nthe paper's first column adds up to {paper_total:.2f} %")

# %% [markdown]
# :::{dropdown} Answer
# About 3 %. The 1×1 convolutions have 95 % of the multiply-adds and 75 % of the
# parameters.
# :::
#
# :::{admonition} The paper's slip: 1.19 %
# :class: warning
# The first layer has 1.91 % of the multiply-adds, not 1.19 %. With 1.91 the paper's
# column adds up to 100.01, which is 100 within rounding; as printed it is 0.71 short.
# Most likely two digits were swapped.
# :::
#
# ### Why the work is in 1×1 layers: no im2col
#
# The paper puts the work into 1×1 layers on purpose. A 1×1 convolution *is* a matrix
# product, the operation with the best-tuned routines. A convolution with a larger
# kernel becomes a matrix product only after a step called **im2col** ("image to
# columns"): for each output position, the input values under the kernel are copied into
# one column of a large matrix.

# %% tags=["nbval-check-output"]
columns = F.unfold(image[None], 3)[0]  # im2col
by_im2col = kernels.flatten(1) @ columns
by_product = pointwise_kernels.flatten(1) @ image.flatten(1)

torch_pointwise = F.conv2d(image[None], pointwise_kernels)
expected = [torch_standard[0].flatten(1), torch_pointwise[0].flatten(1)]
torch.testing.assert_close([by_im2col, by_product], expected)
print(f"3×3: the input has {image.numel()} values, the columns {columns.numel()}")

# %% [markdown]
# | kernel | product | shapes | result |
# |---|---|---|---|
# | 3×3 | `kernels.flatten(1) @ columns` | (7, 45) and (45, 16) | (7, 16): 4·4 positions |
# | 1×1 | `pointwise_kernels.flatten(1) @ image.flatten(1)` | (7, 5) and (5, 36) | (7, 36): 6·6 positions |
#
# Both products equal PyTorch's convolutions.
#
# - `F.unfold` is PyTorch's im2col. A column holds the 3·3·5 = 45 values under the
#   kernel at one of 16 positions.
# - Neighbouring kernels overlap, so most values are copied several times: 720 numbers
#   instead of 180. For a large feature map with padding, the matrix has nine times as
#   many values as the input.
# - The 1×1 kernel multiplies the input as it lies in memory. `flatten` copies nothing.
#
# ## Table 3: one layer, three savings in a row
#
# The layer has $M = N = 512$ channels on a 14×14 feature map. Each row adds one change
# to the row above it. The resolution multiplier $\rho = 0.714$ turns a side of 14 into
# 10, because $0.714 \cdot 14 = 9.996$.

# %%
channels, thin_channels = 512, int(0.75 * 512)
layer_macs = [
    conv2d_macs(3, channels, channels, 14),
    depthwise_separable_macs(3, channels, channels, 14),
    depthwise_separable_macs(3, thin_channels, thin_channels, 14),
    depthwise_separable_macs(3, thin_channels, thin_channels, 10),
]
thin_params = 9 * thin_channels + thin_channels**2
layer_params = [
    9 * channels**2,
    9 * channels + channels**2,
    thin_params,
    thin_params,
]

# %% tags=["hide-input", "nbval-check-output", "ledger:mobilenet-eq-6:paper-number", "ledger:mobilenet-eq-7:paper-number", "ledger:mobilenet-table-3:paper-number"]
TABLE3 = {  # change → the paper's million mult-adds and million parameters
    "standard convolution": (462, 2.36),
    "separable": (52.3, 0.27),
    "and α = 0.75": (29.6, 0.15),
    "and ρ = 0.714": (15.1, 0.15),
}
print(f"{'':22} million mult-adds  million parameters")
print(f"{'':22}     ours    paper       ours   paper")
rows = zip(TABLE3.items(), layer_macs, layer_params, strict=True)
for (change, (paper_macs, paper_params)), n_macs, n_params in rows:
    million_macs, million_params = n_macs / 1e6, n_params / 1e6
    print(f"{change:22} {million_macs:8.2f} {paper_macs:8}", end="")
    print(f"   {million_params:8.3f} {paper_params:7}")
    assert abs(million_macs - paper_macs) < (0.5 if paper_macs > 100 else 0.05)
    assert abs(million_params - paper_params) <= 0.005

# %% [markdown]
# - $\alpha$ (Eq. 6) multiplies input *and* output channels: 512 become 384. The
#   pointwise part is multiplied by $\alpha^2$, the depthwise part by $\alpha$.
# - $\rho$ (Eq. 7) shrinks the side of the feature map, so both parts are multiplied by
#   $\rho^2$. The parameters stay the same: the same filters are applied at fewer
#   positions.
#
# ## Tables 4 to 9: every MobileNet the paper lists, counted again
#
# Parameters are counted as in the paper, without the scales and shifts of batch norm.
# The accuracies are the paper's; recomputing them needs ImageNet and days of training.
# The *shallow* network lacks the five blocks with 512 input and output channels at
# 14×14 positions.

# %% tags=["hide-input"]
# tables, network, arguments of `cost`, accuracy in %, million mult-adds and parameters
PAPER = [
    ("4", "full convolution", dict(separable=False), 71.7, 4866, 29.3),
    ("4-8", "1.0 MobileNet-224", dict(), 70.6, 569, 4.2),
    ("5, 6", "0.75 MobileNet-224", dict(width=0.75), 68.4, 325, 2.6),
    ("5", "shallow MobileNet", dict(shallow=True), 65.3, 307, 2.9),
    ("6", "0.5 MobileNet-224", dict(width=0.5), 63.7, 149, 1.3),
    ("6", "0.25 MobileNet-224", dict(width=0.25), 50.6, 41, 0.5),
    ("7", "1.0 MobileNet-192", dict(side=192), 69.1, 418, 4.2),
    ("7", "1.0 MobileNet-160", dict(side=160), 67.2, 290, 4.2),
    ("7", "1.0 MobileNet-128", dict(side=128), 64.4, 186, 4.2),
    ("9", "0.5 MobileNet-160", dict(width=0.5, side=160), 60.2, 76, 1.32),
]

# %% tags=["hide-input", "nbval-check-output", "ledger:mobilenet-table-4:paper-number", "ledger:mobilenet-table-5:paper-number", "ledger:mobilenet-table-6:paper-number", "ledger:mobilenet-table-7:paper-number"]
print(f"{'':27}top-1  million multiply-adds       million params")
print("table  network             paper   paper     ours   differ.   paper   ours")
for tables, name, variant, accuracy, paper_macs, paper_params in PAPER:
    network_cost = cost(**variant)
    million_macs = network_cost.macs / 1e6
    n_params = sum(layer.params for layer in network_cost.layers if layer.macs)
    million_params = n_params / 1e6
    difference = million_macs - paper_macs
    mark = "   " if round(million_macs) == paper_macs else "(!)"
    print(f"{tables:6} {name:19} {accuracy:5.1f} {paper_macs:7}", end="")
    print(f" {million_macs:8.2f} {difference:+6.2f} {mark}", end="")
    print(f" {paper_params:6} {million_params:6.2f}")
    assert abs(difference) < 1.3 and abs(million_params - paper_params) <= 0.05

# %% [markdown]
# The network with full convolutions needs 4,867 / 569 = **8.6 times** the multiply-adds
# of MobileNet and is 71.7 − 70.6 = **1.1 points** more accurate.
#
# In all ten networks, our count of multiply-adds is within 1.3 million of the paper's,
# and our count of parameters within its rounding. Three rows, marked (!), differ after
# rounding:
#
# - 290.68 and 76.52 million were printed as 290 and 76. They were truncated, although
#   568.74 was rounded to 569. (149.50 is 149.497, so 149 is rounded correctly.)
# - The network with full convolutions needs 4,867.29 million, but the paper prints
#   4,866. Without the last layer's 1.02 million it is 4,866.27, so that layer seems to
#   have been left out in this row.
#
# ## Tables 8 and 9: the other networks, counted by the same program
#
# The paper takes the costs of four other networks from elsewhere. torchvision
# implements all four, so the same program can count them.

# %%
from torchvision import models


def build_googlenet():
    return models.googlenet(aux_logits=False, init_weights=False)


RIVALS = {  # network → its constructor, the paper's million mult-adds and parameters
    "GoogLeNet": (build_googlenet, 1550, 6.8),
    "VGG-16": (models.vgg16, 15300, 138),
    "SqueezeNet": (models.squeezenet1_0, 1700, 1.25),
    "AlexNet": (models.alexnet, 720, 60),
}

# %% tags=["hide-input", "nbval-check-output", "ledger:mobilenet-table-8:paper-number", "ledger:mobilenet-table-9:paper-number"]
other_macs = {}  # network → our count in millions
print("             million mult-adds            million parameters")
print("              ours   paper   paper/ours     ours    paper")
for name, (build_network, paper_macs, paper_params) in RIVALS.items():
    with torch.device("meta"):
        network_cost = profile(build_network())
    million_macs, million_params = network_cost.macs / 1e6, network_cost.params / 1e6
    other_macs[name] = million_macs
    ratio = paper_macs / million_macs
    print(f"{name:11} {million_macs:8.0f}  {paper_macs:5}   {ratio:7.2f}", end="")
    print(f"      {million_params:7.2f}   {paper_params}")
    assert abs(million_params / paper_params - 1) < 0.03
    is_close = abs(million_macs / paper_macs - 1) < 0.04
    assert is_close == (name != "SqueezeNet")

# %% [markdown]
# :::{admonition} The paper's slip: SqueezeNet's cost is twice our count
# :class: warning
# For three networks the two counts agree within 4 % (torchvision's versions differ a
# little from the originals). SqueezeNet does not: the paper's 1,700 million is about
# twice our count. Counting each multiplication and each addition separately would
# explain this. The paper does not state the source of the number.
# :::
#
# ## The claims in the paper's text, recomputed

# %% tags=["hide-input", "nbval-check-output"]
CLAIMS = [  # claim, number in the text, what the tables give, tolerance for rounding
    ("points below full convolution", 1, 71.7 - 70.6, 0.5),
    ("points above the shallow network", 3, 68.4 - 65.3, 0.5),
    ("times smaller than VGG-16", 32, 138 / 4.2, 1),
    ("times less work than VGG-16", 27, 15300 / 569, 0.5),
    ("times less work than GoogLeNet (at least)", 2.5, 1550 / 569, 0.3),
    ("times smaller than AlexNet", 45, 60 / 1.32, 0.5),
    ("times less work than AlexNet", 9.4, 720 / 76, 0.1),
    ("times less work than SqueezeNet", 22, 1700 / 76, 0.5),
    ("% better than AlexNet, in points", 4, 60.2 - 57.2, 0.5),
    ("% better than SqueezeNet, in points", 4, 60.2 - 57.5, 0.5),
]
print("claim                                  paper's text   tables")
for claim, text_number, table_number, tolerance in CLAIMS:
    follows = abs(table_number - text_number) <= tolerance
    mark = "" if follows else "   (!) does not follow"
    print(f"{claim:43} {text_number:7} {table_number:8.1f}{mark}")
    assert follows == (not claim.startswith("% better"))

ratio = other_macs["SqueezeNet"] / (cost(0.5, 160).macs / 1e6)
print(f"\nSqueezeNet by our count: {ratio:.1f} times the work of 0.5 MobileNet-160")

# %% [markdown]
# Eight of the ten claims follow from the tables. The paper's text calls the 0.5
# MobileNet-160 4 % better than AlexNet and SqueezeNet; in the tables it is 3.0 and 2.7
# points better (60.2 % against 57.2 % and 57.5 %). And the factor of 22 over SqueezeNet
# is about 11 if both networks are counted in the same way.
#
# ## One number, many conventions
#
# A **FLOP** is one multiplication *or* one addition, so a multiply-add is two FLOPs. If
# you search for MobileNet's cost, you will find 569 million, 579, 1,137 and others. All
# of them can be right: they count different operations. We ran the tools named in the
# table to find out which operations each one counts. Check the convention before you
# compare two published counts.

# %% tags=["hide-input"]
import pandas as pd

table = pd.DataFrame(baseline.conventions())
table = table[["total", "name", "used_by"]].rename(columns={"used_by": "used by"})
table.style.hide(axis="index").format(thousands=",").set_uuid("conventions")

# %% [markdown]
# ## A real image: what each layer of a trained network costs
#
# No weights of MobileNetV1 are available offline, but those of a successor are included
# in the book's packages: EfficientNet-Lite0 {cite:p}`tan2019,liu2020lite`, built from
# the same depthwise and pointwise layers and trained on ImageNet
# {cite:p}`russakovsky2015`. The image is *Chelsea*, from scikit-image.

# %%
from skimage import data
from timm.data import ImageNetInfo

from paperlib import backbones

lite0 = backbones.load("efficientnet_lite0")
lite0.model.to(run.device)

photograph = data.chelsea()  # (300, 451, 3), 8 bits per channel
batch = lite0.transform(photograph[None]).to(run.device)
with torch.inference_mode():
    probabilities = lite0.model(batch).softmax(1)[0]
class_name = ImageNetInfo().index_to_description(int(probabilities.argmax()))

# %% tags=["remove-cell"]
is_cat = class_name == "Egyptian cat" and bool(probabilities.max() > 0.75)
run.expect(is_cat, "the network recognises the cat")

# %% [markdown]
# - `photograph[None]` adds the batch axis, (1, 300, 451, 3).
# - `lite0.transform` resizes it to 224×224 pixels and normalises it with the mean and
#   standard deviation of the network's training: (1, 3, 224, 224).
# - The network returns one *logit* per class, (1, 1000), a score that can be any
#   number. `softmax` turns logits into probabilities that sum to 1.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Above: a photograph of a ginger cat's face, titled with the network's answer, Egyptian cat, and its probability. Below: a bar for each of the network's layers in order, in million multiply-adds, coloured by kind; the orange pointwise layers are up to 20 million each, the blue depthwise layers between them below 5."}}
COLOURS = {  # kind of layer → colour
    "pointwise conv": viz.ORANGE,
    "depthwise conv": viz.BLUE,
    "conv": viz.GREEN,
    "linear": viz.PURPLE,
}
lite0_layers = [layer for layer in profile(lite0.model).layers if layer.macs]
total = sum(layer.macs for layer in lite0_layers) / 1e6

fig, (image_ax, bar_ax) = plt.subplots(2, 1, figsize=(6.4, 5.6), height_ratios=[1, 1.3])
resized = lite0.transform.resize(photograph[None])[0]
image_ax.imshow(resized.movedim(0, -1))
image_ax.set_title(f"{class_name}, {probabilities.max():.0%}")
image_ax.axis("off")
for kind, colour in COLOURS.items():
    indices = [i for i, layer in enumerate(lite0_layers) if layer.kind == kind]
    heights = [lite0_layers[i].macs / 1e6 for i in indices]
    bar_ax.bar(indices, heights, width=0.9, color=colour, label=kind)
bar_ax.set(xlabel="layer", ylabel="million multiply-adds", ylim=(0, 29))
bar_ax.set_title(f"{total:.0f} million in total, most of them in pointwise layers")
bar_ax.legend(ncols=2, loc="upper right")
plt.show()


# %% [markdown]
# The network predicts *Egyptian cat* with a probability of 79 %. The pattern of the
# costs is that of MobileNet: cheap depthwise layers alternate with expensive pointwise
# layers.
#
# ## Explore both multipliers
#
# The cost falls a little less than in proportion to $\alpha^2$, and almost exactly in
# proportion to $\rho^2$ (only the linear layer does not shrink with the image). Here,
# the parameters include those of batch norm. Move the sliders.

# %% tags=["hide-input"]
def draw_layer_costs(ax, width, side):
    """Draw one bar per kind of layer."""
    network_cost = profiles[width, side]
    for kind, colour in COLOURS.items():
        kind_layers = [layer for layer in network_cost.layers if layer.kind == kind]
        million_macs = sum(layer.macs for layer in kind_layers) / 1e6
        ax.barh(kind, million_macs, color=colour)
        ax.text(million_macs, kind, f" {million_macs:.1f}", va="center")
    title = f"α = {width}, {side}×{side}: {network_cost.macs / 1e6:.0f} million"
    ax.set(xlim=(0, 600), xlabel="million multiply-adds", title=title)


def describe_costs(width, side):
    """Describe the costs in words, for the line under the figure."""
    network_cost = profiles[width, side]
    share = network_cost.macs / profiles[1, 224].macs
    text = (
        f"α = {width} at {side} pixels: {network_cost.macs / 1e6:.1f} million "
        f"multiply-adds ({share:.0%} of the full network; "
        f"α²ρ² = {(width * side / 224) ** 2:.0%}), "
        f"{network_cost.params / 1e6:.2f} million parameters, "
    )
    if (width, side) in QUOTED:
        return text + f"{QUOTED[width, side]} % on ImageNet in the paper."
    return text + "accuracy not printed in the paper."


# %% tags=["hide-input"] mystnb={"image": {"alt": "Bar chart with two sliders, described in the text under it."}}
multipliers = {"width multiplier α": WIDTHS, "input side, pixels": SIDES}
companion.Slider(draw_layer_costs, multipliers, describe_costs)

# %% [markdown]
# ## Trained here: does the separable network lose accuracy?
#
# Tables 4 and 6 compare accuracies on ImageNet. We ask the same question for 2,223 real
# solar cells {cite:p}`buerhop2018,deitsch2019`: is a cell functional or defective? When
# a current flows through it, a functional cell emits light; cracks and dead parts stay
# dark. Cells on which the experts were unsure are left out. (The data set does not
# state which cells belong to the same module, so cells of one module can be in both the
# training and the test set.)
#
# Three networks are compared: MobileNet with $\alpha$ = 0.25 and 0.5, and *0.25 full
# convolution*, in which each separable block of the first is replaced by a standard
# convolution with the same numbers of channels. The code below trains the first and the
# last from random weights; the stored results further down are of all three.
#
# The recipe follows Section 3.2 of the paper:
#
# - **RMSprop**, an optimiser that divides each gradient by the root of a running
#   average of its square.
# - **Little augmentation**: only random mirroring, in `train_classifier`.
# - **No weight decay on depthwise filters.** *Weight decay* pulls weights towards 0.
#   `parameter_groups` returns two groups for the optimiser, one of them without decay.
#   Each is a dictionary, with its list of tensors under the key `params`.
#
# The result is measured on cells that are *held out*: not used in training.
# **Accuracy** is the share of correct answers; always answering "functional"
# reaches 0.68. **AUROC** is the probability that a defective cell has a higher score
# than a functional one; random scores reach 0.5.
#
# :::{admonition} Predict first
# :class: tip
# The network with full convolutions has 7.5 times the multiply-adds and 8.3 times the
# weights of the 0.25 MobileNet. Will it be clearly better?
# :::

# %% tags=["hide-input"]
from paperlib.datasets import elpv, split_cells

cells = elpv()
split = split_cells(cells, side=128, seed=0)
split = split._make(tensor.to(run.device) for tensor in split)
defective_share = split.test_labels.float().mean()
print(f"{len(split.train)} cells to train on, {len(split.test)} held out; ", end="")
print(f"{defective_share:.0%} are defective")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six solar cells as grey squares: above, three functional ones that glow evenly; below, three defective ones with dark cracks or dark areas."}}
fig, axes = plt.subplots(2, 3, figsize=(5.4, 3.9))
classes = {"functional": 0, "defective": 1}  # title → probability of a defect
for row_axes, (title, probability) in zip(axes, classes.items(), strict=True):
    indices = torch.nonzero(cells.probability == probability).flatten()[:3].tolist()
    for ax, index in zip(row_axes, indices, strict=True):
        viz.panel(ax, cells.images[index])
    row_axes[0].set_ylabel(title)
fig.suptitle("Cracks and dead parts stay dark")
plt.show()

# %% [markdown]
# The three dark lines are wires, and the dark corners are the shape of the wafer;
# neither is a defect. The defects are the irregular dark line (left) and the diagonal
# cracks.

# %%
from paperlib.metrics import auroc
from paperlib.mobilenet import parameter_groups
from paperlib.training import predict, train_classifier


def train_network(model, training_set, epochs, checkpoint):
    """Train with the recipe above; return one record per epoch."""
    optimizer = torch.optim.RMSprop(
        parameter_groups(model, 4e-5), lr=3e-3, alpha=0.9, momentum=0.9
    )
    return train_classifier(
        model,
        training_set,
        optimizer,
        epochs=epochs,
        checkpoint=checkpoint,
        progress=run.full,
    )


# %% tags=["hide-output"]
VARIANTS = {"0.25 MobileNet": {}, "0.25 full convolution": {"separable": False}}
epochs = run.choose(smoke=2, full=12)
training_set = (split.train, split.train_labels)
test_aurocs = {}  # network → AUROC on held-out cells

for name, variant in VARIANTS.items():
    torch.manual_seed(0)
    model = MobileNetV1(0.25, num_classes=2, **variant)
    model.to(run.device, memory_format=torch.channels_last)
    checkpoint = runtime.checkpoint_path(name, epochs, *training_set)
    history = train_network(model, training_set, epochs, checkpoint)

    logits = predict(model, split.test)
    accuracy = (logits.argmax(1) == split.test_labels).float().mean().item()
    test_aurocs[name] = auroc(split.test_labels, logits[:, 1] - logits[:, 0])
    print(f"{name:22} {epochs} epochs: loss {history[-1].loss:.2f}", end="")
    print(f", held out: accuracy {accuracy:.2f}, AUROC {test_aurocs[name]:.2f}")

# %% tags=["remove-cell"]
for name, test_auroc in test_aurocs.items():
    run.expect(test_auroc > 0.65, f"{name} is better than chance")

# %% [markdown]
# - `training_set` holds images (1668, 3, 128, 128) and labels (1668,), 1 for defective.
#   An *epoch* is one pass over all of them.
# - `train_classifier` is the usual loop: forward pass, cross-entropy loss, backward
#   pass, step of the optimiser.
# - `alpha=0.9` is RMSprop's decay of the running average, not the width multiplier;
#   `momentum=0.9` averages the steps. These two, the learning rate and the weight
#   decay are our choices; the paper states none.
# - `logits` has two columns, (555, 2). The larger one is the answer; their difference
#   is the score for the AUROC.
# - On Colab, `checkpoint_path` names a file, from which an interrupted training
#   resumes. Elsewhere it is None.
#
# After two epochs both networks are clearly better than chance. A comparison needs
# longer training and several *seeds*; each seed draws different initial weights and a
# different split. Training all three networks for 12 epochs with five seeds each takes
# 26 minutes on one processor thread, so the results are stored in a file.

# %% tags=["hide-input"]
measured = companion.read_result("mobilenet_cells")
stamp = measured["stamp"]
runs = {}  # network → its runs, one per seed
for result in measured["runs"]:
    runs.setdefault(result["model"], []).append(result)

trained_costs = {}  # network → its cost
for name, results in runs.items():
    variant, side = results[0]["arguments"], stamp["recipe"]["side"]
    trained_costs[name] = cost(side=side, num_classes=2, **variant)

QUANTITIES = {  # key → title
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "cpu_seconds_per_epoch": "seconds per epoch",
}
statistics = {}  # network and key → mean and standard deviation over the seeds
for name, key in itertools.product(runs, QUANTITIES):
    values = torch.tensor([result[key] for result in runs[name]])
    statistics[name, key] = values.mean().item(), values.std().item()

# %% tags=["hide-input", "hide-output"]
header = "  ".join(f"{title:13}" for title in QUANTITIES.values())
print(f"{'network':21} {'MACs':>7} {'params':>7}  {header}")
for name, network_cost in trained_costs.items():
    million_macs, million_params = network_cost.macs / 1e6, network_cost.params / 1e6
    print(f"{name:21} {million_macs:5.1f} M {million_params:5.2f} M", end="")
    for key in QUANTITIES:
        mean, deviation = statistics[name, key]
        print(f"  {mean:5.3f} ± {deviation:.3f}", end="")
    print()
n_seeds = len(runs["0.25 MobileNet"])
print(f"mean ± standard deviation over {n_seeds} seeds; ", end="")
print(f"stored on {stamp['date']}, {stamp['device']}")
for name, results in runs.items():
    final_losses = torch.tensor([result["loss"][-1] for result in results])
    print(f"{name:21} training loss of the last epoch {final_losses.mean():.2f}")

# %% tags=["remove-cell"]
separable_auroc, _ = statistics["0.25 MobileNet", "auroc"]
full_auroc, _ = statistics["0.25 full convolution", "auroc"]
run.expect(separable_auroc > full_auroc, "the MobileNet has the higher AUROC")

# %% tags=["hide-input", "hide-output"] mystnb={"image": {"alt": "Three panels, one above the other, with one point and error bar for each network, against million multiply-adds on a logarithmic axis: held-out accuracy, AUROC, and processor seconds per epoch. The 0.25 MobileNet, at 13 million, has accuracy and AUROC no lower than those of the network with full convolutions at 100 million and takes about 0.4 of its time; the 0.5 MobileNet, at 49 million, scores like the 0.25 one and takes as long as the full convolutions."}}
STYLES = ((viz.BLUE, "o"), (viz.GREEN, "^"), (viz.VERMILION, "s"))
fig, axes = plt.subplots(3, 1, figsize=(6.4, 7), sharex=True)
for ax, (key, title) in zip(axes, QUANTITIES.items(), strict=True):
    for name, (colour, marker) in zip(runs, STYLES, strict=True):
        mean, deviation = statistics[name, key]
        million_macs = trained_costs[name].macs / 1e6
        style = dict(fmt=marker, ms=8, capsize=4, color=colour, label=name)
        ax.errorbar(million_macs, mean, deviation, **style)
    ax.set_ylabel(title)
axes[0].set_xscale("log")  # of all panels, now that none is empty
axes[0].set_title("7.5 times the work: no gain in accuracy, 2.6 times the time")
axes[2].set(xlabel="million multiply-adds", ylabel="CPU seconds\nper epoch")
axes[2].set_ylim(0, None)
companion.log_ticks(axes[2].xaxis, (15, 30, 50, 100))
legend = axes[0].get_legend_handles_labels()
fig.legend(*legend, loc="outside upper center", ncols=3, columnspacing=1)
plt.show()

# %% [markdown]
# :::{dropdown} Answer
# No. Over five seeds the separable network's AUROC is even a little higher:
# **7.5 times fewer multiply-adds cost no accuracy** on this small set. (Look at the
# scale: the axis of accuracy spans less than four points.)
# :::
#
# Doubling the width brings no gain that exceeds the spread over the seeds. Do not
# conclude too much from this: after 12 epochs with one recipe for all, the training
# loss of the full convolution is still the highest of the three, 0.45 against 0.41.
# Longer training or another learning rate might change the order, and on ImageNet the
# paper's network lost 1.1 points.
#
# Look at the lowest panel. The full convolution does 7.5 times the work of the 0.25
# MobileNet in only 2.6 times the time. And the 0.5 MobileNet, with half the work of the
# full convolution, takes about as long. Why?

# %% [markdown]
# ## Multiply-adds are not milliseconds
#
# A processor does two things at once: it computes, and it moves numbers between memory
# and its arithmetic units. A layer that does little with each number that it loads
# waits for memory, however few multiply-adds it has. Its **arithmetic intensity** is
# the number of multiply-adds per byte moved. The **roofline** {cite:p}`williams2009` is
# the highest speed that a machine can reach at a given intensity: bandwidth (bytes per
# second) times intensity, up to the machine's peak.
#
# - A 3×3 **depthwise** layer with stride 1 uses each input value for nine outputs but,
#   ideally, loads it only once. So it reads one number and writes one per 9
#   multiply-adds. With 4 bytes per number, that is 9/8 multiply-adds per byte.
# - A depthwise layer with **stride 2** has four input values per output value, so it
#   reads four numbers per number that it writes: 9/20 per byte.
# - A **pointwise** layer uses each number that it reads once per output channel, so its
#   intensity is much higher.
#
# :::{admonition} Predict first
# :class: tip
# The depthwise layers have 3 % of the multiply-adds. What is their share of the time?
# :::

# %%
from paperlib.complexity import measure_machine, time_layers

network = MobileNetV1().to(run.device)  # or your own network
images = torch.randn(1, 3, 224, 224).to(run.device)  # the network's input
machine = measure_machine(run.device, seconds=2)
timings = time_layers(network, images, repeats=20)

# %% tags=["hide-input", "hide-output"]
total_macs = sum(timing.macs for timing in timings)
total_seconds = sum(timing.seconds for timing in timings)
print("kind              share of MACs   share of time")
for kind in dict.fromkeys(timing.kind for timing in timings):
    kind_macs = sum(timing.macs for timing in timings if timing.kind == kind)
    kind_seconds = sum(timing.seconds for timing in timings if timing.kind == kind)
    macs_share, time_share = kind_macs / total_macs, kind_seconds / total_seconds
    print(f"{kind:18} {macs_share:10.1%} {time_share:15.1%}")

# %% [markdown]
# - `measure_machine` measures the peak speed and the bandwidth for two seconds each and
#   keeps the fastest run. The roofline follows from these two numbers.
# - `time_layers` runs the network 20 times and returns one entry per layer: its median
#   seconds, multiply-adds and bytes.
#
# :::{dropdown} Answer
# On the machine named at the top of this page, several times their share of the
# multiply-adds. (The paper states that 95 % of the time is spent in 1×1 convolutions;
# here it is less.)
# :::
#
# Batch norm and ReLU, which are not part of the paper's count, take time as well: they
# read and write every number once and do almost nothing with it. Expect this pattern on
# your machine, but not these numbers.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Scatter plot with two logarithmic axes: billion multiply-adds per second against multiply-adds per byte. A line rises from the left and turns flat: the roofline measured on the machine. Blue depthwise layers sit on the left, those with stride 2 at 0.45 multiply-adds per byte and those with stride 1 at 1.1; orange pointwise layers are to the right of them and higher."}}
intensities = torch.logspace(-1, 2.5, 100).tolist()
roof = [machine.attainable(intensity) / 1e9 for intensity in intensities]
fig, ax = plt.subplots()
ax.plot(intensities, roof, color="black", label="roofline, measured here")
counted = [timing for timing in timings if timing.macs]
for kind in dict.fromkeys(timing.kind for timing in counted):
    kind_timings = [timing for timing in counted if timing.kind == kind]
    intensities = [timing.intensity for timing in kind_timings]
    speeds = [timing.macs / timing.seconds / 1e9 for timing in kind_timings]
    colour = COLOURS.get(kind, viz.GREY)
    ax.plot(intensities, speeds, "o", color=colour, label=kind)
ax.set(xscale="log", xlabel="multiply-adds per byte")
ax.set(yscale="log", ylabel="billion multiply-adds per second")
ax.set_title("Most depthwise layers run far below even their low roof")
companion.log_ticks(ax.xaxis, (0.1, 1, 10, 100))
ticks = [digit * 10**power for power in range(-1, 6) for digit in (1, 3)]
companion.log_ticks(ax.yaxis, ticks)
ax.set_ylim(min(timing.macs / timing.seconds / 1e9 for timing in counted) / 2)
text_style = dict(color=viz.BLUE, fontsize=11, transform=ax.get_xaxis_transform())
ax.text(0.9, 0.02, "stride 1", ha="left", **text_style)
ax.text(0.6, 0.02, "stride 2", ha="right", **text_style)
ax.legend()
plt.show()

# %% [markdown]
# Each layer with multiply-adds is one point; the line is the roofline. The distance to
# the line shows how well the layer's *routine* (its implementation in PyTorch) uses the
# machine. Among the convolutions, the best pointwise layers are closest to it. Most
# depthwise layers stay well below even the low roof that their intensity allows: they
# are not matrix products, for which the best-tuned routines exist, and each call has a
# fixed cost. So there are two reasons: low intensity, and the routine.
#
# Layout and batch size change the times, too. By default PyTorch stores an image
# channel after channel (*contiguous*, NCHW). **Channels last** (NHWC) stores all
# channels of a pixel side by side, which suits 1×1 convolutions. The code below times a
# separable network of width 0.5 and the full convolution of the same width in both
# layouts, for a forward pass and for a training step.

# %%
from paperlib.complexity import time_call

LAYOUTS = ("contiguous_format", "channels_last")
timed_rows = []
for separable, batch_size, layout in itertools.product((True, False), (1, 16), LAYOUTS):
    memory_format = getattr(torch, layout)
    network = MobileNetV1(0.5, separable=separable)
    network.to(run.device, memory_format=memory_format)
    images = torch.randn(batch_size, 3, 128, 128)
    images = images.to(run.device, memory_format=memory_format)

    network.eval()
    with torch.inference_mode():
        forward = time_call(lambda: network(images), run.device)
    network.train()
    training = time_call(lambda: network(images).sum().backward(), run.device)

    million_macs = profile(network, (1, 3, 128, 128)).macs / 1e6
    milliseconds = [1e3 * seconds / batch_size for seconds in (forward, training)]
    timed_rows.append((separable, million_macs, batch_size, layout, *milliseconds))

# %% tags=["hide-input"]
print("width 0.5, 128×128 pixels                       milliseconds per image")
print("network           MACs batch  layout            forward  training step")
for separable, million_macs, batch_size, layout, forward, training in timed_rows:
    name = "separable" if separable else "full convolution"
    print(f"{name:16}{million_macs:4.0f} M {batch_size:5}  {layout:17}", end="")
    print(f"{forward:8.2f} {training:14.2f}")

# %% [markdown]
# - **At equal width the separable network is faster** in every row, but nowhere by the
#   factor of eight by which the multiply-adds differ.
# - **Twice as many layers.** Each of its blocks has two batch norms and two ReLUs where
#   the full convolution has one of each, and each layer's fixed cost is paid twice as
#   often.
# - **A training step** reads and writes even more per multiply-add.
# - **Channels last** changes the times. By how much depends on the network, the batch
#   size and the machine; for the full convolution in batches it helps little here.
#
# This is also why, in the training above, the 0.5 MobileNet took as long as the full
# convolution of width 0.25 with twice its multiply-adds: it has twice as many layers,
# and its feature maps have twice as many channels, which every batch norm and ReLU
# reads and writes.
#
# With a poor routine for depthwise layers the order may even be reversed, so measure on
# the machine that you will use.
#
# ## Where it fails
#
# - **Counts mislead across kinds of layers.** Compare times on the device and with the
#   batch size that you will use.
# - **Width 0.25 falls below the trend.** From 0.5 to 0.25 the paper's accuracy drops by
#   13.1 points, nearly twice as much as from 1 to 0.5 (6.9).
# - **ReLU after every narrow layer discards information.** For this reason MobileNetV2
#   has none after its narrow layers.
# - **A count is not an accuracy.** In Table 5 the shallow network costs nearly the same
#   as the 0.75 MobileNet and is three points worse.
#
# ## Exercises
#
# Each check tells you what is wrong without revealing the answer. Replace the dots with
# your answer: a number, or the name of a function that you define above the check. The
# checks judge what an answer returns, not how: they also accept a loop where the text
# asks for none. The solutions are hidden below each group of exercises.
#
# **Warm-up (5 minutes)**
#
# 1. How many multiply-adds does a 5×5 standard convolution from 16 to 32 channels need
#    for a 28×28 output?
# 2. With how many output channels does a 3×3 separable layer cost exactly six times
#    less than a standard one?

# %% tags=["exercise"]
from paperlib.exercises import mobilenet as check

correct = check.standard_cost(...)

# %% tags=["exercise"]
correct = check.break_even(...)

# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
assert check.standard_cost(5 * 5 * 16 * 32 * 28 * 28)  # 10,035,200
assert check.break_even(18)  # 1/6 - 1/9 = 1/18

# %% [markdown]
# **Core (15 minutes)**
#
# 3. Write `f(kernel, in_channels, out_channels, out_size)`, which returns the cost of a
#    separable layer (Eq. 5). `kernel` and `out_size` are the sides of square kernels
#    and outputs.
# 4. At 192×192 pixels, what is the largest width, a multiple of 0.05, with which
#    MobileNet needs at most 200 million multiply-adds? Use `cost(width, side).macs`.
# 5. How many weights of `MobileNetV1()` does `parameter_groups` exclude from weight
#    decay?

# %% tags=["exercise"]
correct = check.separable_function(...)

# %% tags=["exercise"]
correct = check.largest_width(...)

# %% tags=["exercise"]
correct = check.spared_weights(...)

# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
def separable_cost(kernel, in_channels, out_channels, out_size):
    return (kernel**2 + out_channels) * in_channels * out_size**2


assert check.separable_function(separable_cost)

widths = [step * 0.05 for step in range(1, 21)]
fitting_widths = [width for width in widths if cost(width, 192).macs <= 200e6]
assert check.largest_width(max(fitting_widths))

with_decay, without_decay = parameter_groups(MobileNetV1(), 4e-5)
assert check.spared_weights(sum(p.numel() for p in without_decay["params"]))

# %% [markdown]
# **Stretch (15 minutes)**
#
# 6. Write `f(images, filters)`, a depthwise convolution with stride 1 and padding 1 for
#    images (N, C, H, W) and filters (C, 3, 3). Use neither `groups` nor a loop over
#    pixels or channels (the check cannot see whether you use them). A loop over the
#    nine weights of a filter is fine: each weight multiplies a shifted copy of the
#    padded image.

# %% tags=["exercise"]
correct = check.depthwise_function(...)

# %% tags=["solution", "hide-cell"] mystnb={"code_prompt_show": "Solution", "code_prompt_hide": "Hide solution"}
def depthwise_convolution(images, filters):
    height, width = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1))
    output = torch.zeros_like(images)
    for i, j in itertools.product(range(3), range(3)):
        shifted = padded[:, :, i : i + height, j : j + width]
        output += shifted * filters[:, i, j, None, None]
    return output


assert check.depthwise_function(depthwise_convolution)

# %% [markdown]
# ## Quiz
#
# **1.** A separable layer with a 3×3 kernel has 256 output channels. You double its
# input channels. What happens to the factor that it saves?
#
# :::{dropdown} Answer
# Nothing. $1/N + 1/D_K^2$ contains neither $M$ nor $D_F$; both costs double.
# :::
#
# **2.** In which layers are 95 % of MobileNet's multiply-adds?
#
# :::{dropdown} Answer
# In the 1×1 (pointwise) convolutions. Each is a matrix product of all positions with an
# $M \times N$ matrix.
# :::
#
# **3.** You set $\alpha = 0.5$. Why does the cost fall to 26 % and not to 25 %?
#
# :::{dropdown} Answer
# The cost of the pointwise layers is multiplied by $\alpha^2$. The cost of the
# depthwise layers, the first layer (its three input channels stay) and the last one
# (its 1,000 outputs stay) is multiplied by $\alpha$ only.
# :::
#
# **4.** Which of the two multipliers changes the number of parameters?
#
# :::{dropdown} Answer
# The width multiplier. Resolution changes how often a filter is applied, but not the
# filter: in Table 7 every row has 4.2 million parameters.
# :::
#
# **5.** A blog post states that MobileNet needs 1,137 million operations; the paper
# states 569 million. Which one is right?
#
# :::{dropdown} Answer
# Both. 1,137 million counts a multiplication and an addition as two operations (FLOPs),
# 569 million counts multiply-adds.
# :::
#
# **6.** A colleague replaces all convolutions with separable ones, counts 8 times fewer
# multiply-adds, and measures half the time. Give one reason.
#
# :::{dropdown} Answer
# Depthwise layers move nearly as many numbers as before, do little with each of them,
# and have less well-tuned routines. Batch norm and activations did not become cheaper
# either; there are twice as many of them.
# :::
#
# ## Summary
#
# - Filtering and combining in two steps costs the fraction $1/N + 1/D_K^2$ of
#   doing both in one step: 8.84 times less for $N = 512$ and a 3×3 kernel.
# - Four strided depthwise layers and the strided first layer replace pooling. 95 % of
#   the work is in 1×1 layers, which are matrix products and need no im2col.
# - The MobileNet counts of Tables 2 to 9 follow from Table 1 if the last stride
#   is 1. The paper's slips are small: 1.19 % printed for 1.91 %, two counts truncated
#   instead of rounded, and one count without the last layer. The cost that it quotes
#   for SqueezeNet is twice our count.
# - $\alpha$ reduces work and parameters, $\rho$ reduces work only.
# - The time has two lower bounds, one from the multiply-adds and one from the bytes. A
#   layer without a well-tuned routine reaches neither.
#
# **Next**: MobileNetV2 {cite:p}`sandler2018` and EfficientNet {cite:p}`tan2019`
# continue from here. EfficientNet-Lite0 is the offline backbone of chapters 2, 3
# and 5.
#
# ## Use it on your own network and your own images
#
# `profile(your_network, (1, 3, 224, 224)).table()` counts any `nn.Module`, and the code
# for the roofline above accepts any network, too. To train a MobileNet on your own
# images, set `FOLDER` to the path of a folder, or of a zip file, that contains one
# folder of images per class. A quarter of them is held out. The network starts from
# random weights, so it needs hundreds of images. Compare its accuracy with the share of
# the most common class.

# %% tags=["hide-input"]
from torchvision import transforms
from torchvision.datasets import ImageFolder

from paperlib.datasets import open_folder, read_image


def load_images(folder, limit=4000):
    """Load at most `limit` images at random: they have to fit into memory."""
    steps = [
        transforms.Resize((128, 128)),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.25] * 3),
    ]
    transform = transforms.Compose(steps)
    dataset = ImageFolder(open_folder(folder), transform, loader=read_image)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(dataset), generator=generator)[:limit]
    images = torch.stack([dataset[i][0] for i in order.tolist()])
    labels = torch.tensor(dataset.targets)[order]
    return images.to(run.device), labels.to(run.device), dataset.classes


# %%
FOLDER = None  # the path, such as "pets.zip"
EPOCHS = 12

if FOLDER is None:
    print("FOLDER is None: nothing was run")
else:
    images, labels, class_names = load_images(FOLDER)
    n_train = 3 * len(images) // 4
    training_set = images[:n_train], labels[:n_train]
    torch.manual_seed(0)
    model = MobileNetV1(0.25, num_classes=len(class_names)).to(run.device)
    checkpoint = runtime.checkpoint_path("own images", EPOCHS, *training_set)
    train_network(model, training_set, EPOCHS, checkpoint)

    test_labels = labels[n_train:]
    is_correct = predict(model, images[n_train:]).argmax(1) == test_labels
    accuracy = is_correct.float().mean().item()
    majority_share = test_labels.bincount().max().item() / len(test_labels)
    print(f"{class_names}: {n_train} images to train on, {len(test_labels)} held out")
    print(f"accuracy {accuracy:.0%}; the most common class has {majority_share:.0%}")
