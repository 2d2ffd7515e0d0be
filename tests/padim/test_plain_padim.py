"""The listings of the page compute what the library computes."""

import plain_padim as plain
import pytest
import torch
import torch.nn.functional as F
from naive_gaussian import naive_distance, naive_statistics
from torch import nn

from paperlib.backbones import FeatureExtractor, concatenate_embeddings
from paperlib.metrics import aupro
from paperlib.padim import PaDiM, PatchGaussian, mahalanobis_distance


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())
        for a, b in ((3, 6), (6, 8), (8, 10))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2)).eval()


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 7, 5, generator=generator) + 2


def test_hooks_store_what_the_extractor_returns(network):
    images = torch.randn(2, 3, 32, 24)
    stored = plain.feature_maps(network, network[:3], images)
    expected = FeatureExtractor(network, ("0", "1", "2"))(images)
    torch.testing.assert_close(stored, expected)
    assert not any(layer._forward_hooks for layer in network)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (8, 4, 4), (6, 3, 2)])
def test_concatenating_equals_the_library(sizes):
    maps = [torch.randn(2, 3 + k, side, side) for k, side in enumerate(sizes)]
    torch.testing.assert_close(plain.concatenate(maps), concatenate_embeddings(maps))


def test_equation_1_equals_the_library_and_numpy(embeddings):
    mu, sigma = plain.fit_gaussians(embeddings)
    gaussian = PatchGaussian(*embeddings.shape[1:]).update(embeddings)
    torch.testing.assert_close(mu, gaussian.mean())
    torch.testing.assert_close(sigma, gaussian.covariance())
    for found, truth in zip((mu, sigma), naive_statistics(embeddings), strict=True):
        torch.testing.assert_close(found, torch.tensor(truth).float())


def test_equation_2_equals_the_library_and_scipy(embeddings):
    mu, sigma = plain.fit_gaussians(embeddings[:12])
    distances = plain.mahalanobis(embeddings, mu, sigma)
    cholesky = torch.linalg.cholesky(sigma)
    torch.testing.assert_close(
        distances, mahalanobis_distance(embeddings, mu, cholesky)
    )
    truth = naive_distance(embeddings.numpy(), mu.numpy(), sigma.numpy())
    torch.testing.assert_close(distances, torch.tensor(truth).float())


def test_the_whole_method_equals_the_detector(network):
    images = torch.randn(24, 3, 32, 24)
    extractor = FeatureExtractor(network, ("0", "1", "2"))
    detector = PaDiM(extractor, 9).fit([images[:20]])
    maps, scores = plain.padim(extractor, images[:20], images[20:], detector.channels)
    expected = detector.anomaly_map(images[20:])
    torch.testing.assert_close(torch.tensor(maps), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        torch.tensor(scores), detector.score(images[20:]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("decimals", [0, 1, 6])  # few decimals: many equal values
@pytest.mark.parametrize("limit", [0.3, 0.05, 1])
def test_aupro_equals_the_library(decimals, limit):
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(3, 16, 16, generator=generator)
    masks = F.avg_pool2d(torch.randn(3, 16, 16, generator=generator), 5, 1, 2) > 0.25
    maps = (noise + masks).round(decimals=decimals)
    found = plain.aupro(masks.numpy(), maps.numpy(), limit)
    assert 0 < found < 1
    assert found == pytest.approx(aupro(masks, maps, limit), abs=1e-12)
