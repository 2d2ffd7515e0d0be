"""PaDiM straight from its equations, as the page on the paper prints it.

Shapes: N images, D channels, P positions, h×w the grid of the largest map.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, label


def feature_maps(model, layers, images):
    outputs = []

    def store(module, inputs, output):
        outputs.append(output)

    hooks = [layer.register_forward_hook(store) for layer in layers]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def concatenate(maps):
    size = maps[0].shape[2:]
    enlarged = [F.interpolate(part, size, mode="nearest") for part in maps]
    return torch.cat(enlarged, dim=1)


def fit_gaussians(x, epsilon=0.01):
    N, P, D = x.shape
    mu = x.mean(dim=0)
    sigma = torch.empty(P, D, D)
    for p in range(P):
        centred = x[:, p] - mu[p]
        sigma[p] = centred.T @ centred / (N - 1) + epsilon * torch.eye(D)
    return mu, sigma


def mahalanobis(x, mu, sigma):
    distances = torch.empty(x.shape[:2])
    for p in range(x.shape[1]):
        L = torch.linalg.cholesky(sigma[p])
        centred = (x[:, p] - mu[p]).T
        z = torch.linalg.solve_triangular(L, centred, upper=False)
        distances[:, p] = z.square().sum(dim=0).sqrt()
    return distances


def padim(extract, normal_images, new_images, channels):
    def embed(images):
        return concatenate(extract(images))[:, channels]

    normal, new = embed(normal_images), embed(new_images)
    h, w = new.shape[2:]
    mu, sigma = fit_gaussians(normal.flatten(2).transpose(1, 2))
    distances = mahalanobis(new.flatten(2).transpose(1, 2), mu, sigma)
    maps = distances.view(-1, 1, h, w)
    maps = F.interpolate(maps, new_images.shape[2:], mode="bilinear")[:, 0]
    maps = np.stack([gaussian_filter(m, sigma=4) for m in maps.numpy()])
    return maps, maps.max(axis=(1, 2))


def aupro(masks, maps, limit=0.3):
    regions = []
    for k, mask in enumerate(masks):
        numbers, count = label(mask, np.ones((3, 3)))
        regions += [(k, numbers == r) for r in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        fpr.append(found[~masks].mean())
        pro.append(np.mean([found[k][region].mean() for k, region in regions]))
    kept = [f for f in fpr if f <= limit]
    heights = [*pro[: len(kept)], np.interp(limit, fpr, pro)]
    return np.trapezoid(heights, [*kept, limit]) / limit
