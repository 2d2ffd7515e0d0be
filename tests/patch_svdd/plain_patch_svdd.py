"""The equations of Patch SVDD, written to be read; the page prints these functions."""

import torch
import torch.nn.functional as F
from torch import nn


def auroc(normal_scores, anomalous_scores):
    points = 0
    for normal in normal_scores:
        for anomalous in anomalous_scores:
            if normal < anomalous:
                points += 1
            elif normal == anomalous:
                points += 0.5
    return points / (len(normal_scores) * len(anomalous_scores))


def svdd_loss(encoder, p, q):
    distances = (encoder(p) - encoder(q)).square().sum(dim=1).sqrt()
    return distances.mean()


def position_pair(image, K):
    number = torch.randint(8, ()).item()
    down, right = DIRECTIONS[number]
    move_down = down * (3 * K // 4 + torch.randint(K // 4, ()).item())
    move_right = right * (3 * K // 4 + torch.randint(K // 4, ()).item())
    height, width = image.shape[1:]
    top = torch.randint(max(0, -move_down), height - K + 1 - max(0, move_down), ())
    left = torch.randint(max(0, -move_right), width - K + 1 - max(0, move_right), ())
    first = image[:, top : top + K, left : left + K]
    top, left = top + move_down, left + move_right
    second = image[:, top : top + K, left : left + K]
    return first, second, number


# (down, right): the 3×3 grid in reading order, without its centre.
DIRECTIONS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def position_loss(encoder, classifier, p1, p2, y):
    logits = classifier(encoder(p1), encoder(p2))
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    of_true_class = probabilities[torch.arange(len(y)), y]
    return -of_true_class.log().mean()


def training_loss(encoders, classifiers, position_pairs, neighbour_pairs, weight):
    loss = 0
    for K in (64, 32):
        p1, p2, y = position_pairs[K]
        q1, q2 = neighbour_pairs[K]
        loss += position_loss(encoders[K], classifiers[K], p1, p2, y)
        loss += weight * svdd_loss(encoders[K], q1, q2)
    return loss


def small_encoder(D=64):
    channels = [3, 32, 64, 128, 128, 64, 32, 32, D]
    layers = []
    for i in range(8):
        stride = 2 if i == 0 else 1
        layers.append(nn.Conv2d(channels[i], channels[i + 1], 3, stride))
        layers.append(nn.LeakyReLU(0.1) if i < 7 else nn.Tanh())
    return nn.Sequential(*layers, nn.Flatten())


def embed_big_patch(small, conv1, conv2, patches):
    quarters = []
    for top in (0, 32):
        for left in (0, 32):
            quarter = patches[:, :, top : top + 32, left : left + 32]
            quarters.append(small(quarter))
    grid = torch.stack(quarters, dim=2).unflatten(2, (2, 2))
    hidden = F.leaky_relu(conv1(grid), 0.1)
    return torch.tanh(conv2(hidden)).flatten(1)


def nearest_distance(query, bank):
    distances = (bank - query).square().sum(dim=1).sqrt()
    return distances.min()


def spread_patch_scores(scores, K, S, size):
    total, count = torch.zeros(size, size), torch.zeros(size, size)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            rows, columns = slice(S * i, S * i + K), slice(S * j, S * j + K)
            total[rows, columns] += scores[i, j]
            count[rows, columns] += 1
    return total / count.clamp(min=1)


def anomaly_map(embeddings, banks, size):
    maps = {}
    for K, S in ((64, 16), (32, 4)):
        h, w, D = embeddings[K].shape
        queries = embeddings[K].reshape(h * w, D)
        scores = torch.stack([nearest_distance(query, banks[K]) for query in queries])
        maps[K] = spread_patch_scores(scores.reshape(h, w), K, S, size)
    product = maps[64] * maps[32]
    return product, product.max()
