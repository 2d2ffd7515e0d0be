"""The equations of the MobileNet paper in plain code, as the page on it prints them."""

from itertools import product

import torch
from torch import nn


def standard_convolution(F, K):
    M, height, width = F.shape
    N, M, D_K, D_K = K.shape
    G = torch.zeros(N, height - D_K + 1, width - D_K + 1)
    multiply_adds = 0
    for n, row, column in product(*map(range, G.shape)):
        for m, i, j in product(range(M), range(D_K), range(D_K)):
            G[n, row, column] += K[n, m, i, j] * F[m, row + i, column + j]
            multiply_adds += 1
    return G, multiply_adds


def standard_macs(D_K, M, N, D_F):
    return D_K * D_K * M * N * D_F * D_F


def separable_macs(D_K, M, N, D_F):
    depthwise = D_K * D_K * M * D_F * D_F
    pointwise = M * N * D_F * D_F
    return depthwise + pointwise


def pointwise_convolution(F, K):
    return torch.einsum("nm,mhw->nhw", K, F)


def separable_block(M, N, stride):
    return nn.Sequential(
        nn.Conv2d(M, M, 3, stride, padding=1, groups=M, bias=False),
        nn.BatchNorm2d(M),
        nn.ReLU(),
        nn.Conv2d(M, N, 1, bias=False),
        nn.BatchNorm2d(N),
        nn.ReLU(),
    )


def shrunk_macs(D_K, M, N, D_F, alpha, rho):
    thin_M, thin_N = int(alpha * M), int(alpha * N)
    small_D_F = round(rho * D_F)
    return separable_macs(D_K, thin_M, thin_N, small_D_F)


def parameter_groups(network, weight_decay):
    decayed, not_decayed = [], []
    for module in network.modules():
        is_conv = isinstance(module, nn.Conv2d)
        is_depthwise = is_conv and module.groups == module.in_channels > 1
        group = not_decayed if is_depthwise else decayed
        group.extend(module.parameters(recurse=False))
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
