"""The listings of the page on Patch SVDD equal the library."""

import plain_patch_svdd as plain
import pytest
import torch

from paperlib import anomaly_map, metrics, neighbors
from paperlib import patch_svdd as library


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return library.HierarchicalEncoder(dimensions=6)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_auroc_counts_pairs():
    scores = (10 * random(40)).round()  # with ties
    labels = torch.arange(40) % 3 == 0
    by_pairs = plain.auroc(scores[~labels].tolist(), scores[labels].tolist())
    assert by_pairs == pytest.approx(metrics.auroc(labels, scores))


def test_the_loss_of_neighbours(encoder):
    p, q = random(7, 3, 32, 32), random(7, 3, 32, 32, seed=1)
    expected = library.svdd_loss(encoder.small(p), encoder.small(q))
    torch.testing.assert_close(plain.svdd_loss(encoder.small, p, q), expected)


def test_the_position_loss(encoder):
    p1, p2 = random(9, 3, 32, 32), random(9, 3, 32, 32, seed=1)
    y = torch.arange(9) % 8
    classifier = library.PositionClassifier(6)
    loss = plain.position_loss(encoder.small, classifier, p1, p2, y)
    a, b = encoder.small(p1), encoder.small(p2)
    expected = library.position_loss(classifier, a, b, y)
    torch.testing.assert_close(loss, expected)


def test_a_position_pair_lies_in_its_direction():
    """The pixel values are row and column, so a patch contains its position."""
    assert tuple(plain.DIRECTIONS) == library.DIRECTIONS
    image = torch.stack(torch.meshgrid(*[torch.arange(90)] * 2, indexing="ij"))
    torch.manual_seed(0)
    pairs = [plain.position_pair(image, 32) for _ in range(4000)]
    assert all(patch.shape == (2, 32, 32) for pair in pairs for patch in pair[:2])
    corners = torch.stack([torch.stack([a, b])[:, :, 0, 0] for a, b, _ in pairs])
    numbers = torch.tensor([number for *_, number in pairs])
    moves = corners[:, 1] - corners[:, 0]
    ours = {
        (n, *move) for n, move in zip(numbers.tolist(), moves.tolist(), strict=True)
    }
    drawn = library.position_pairs(
        20_000, (90, 90), 32, torch.Generator().manual_seed(0)
    )
    moves = drawn.second - drawn.first
    theirs = zip(drawn.position.tolist(), moves.tolist(), strict=True)
    assert ours == {(n, *move) for n, move in theirs}
    for corner in (corners[:, 0], corners[:, 1]):
        assert corner.min() == 0 and corner.max() == 90 - 32


def test_the_loss_of_a_step_of_training(encoder):
    """As `train_on_patches` computes it, from the pairs that it draws."""
    torch.manual_seed(1)
    images = torch.rand(4, 3, 127, 127)
    options = {"epochs": 1, "repeat": 2, "batch_size": 8, "svdd_weight": 0.3}
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    seen = []
    training = library.training
    originals = training.crop_patches, training.position_pairs
    with pytest.MonkeyPatch.context() as patch:

        def crop(*arguments):
            seen.append(originals[0](*arguments))
            return seen[-1].clone()

        def pairs(*arguments, **settings):
            drawn = originals[1](*arguments, **settings)
            seen.append(drawn.position)
            return drawn

        patch.setattr(training, "perturb", lambda patches, generator: patches)
        patch.setattr(training, "crop_patches", crop)
        patch.setattr(training, "position_pairs", pairs)
        patch.setattr(torch.optim.Adam, "step", lambda self: None)
        result = library.train_on_patches(encoder, images, every=1, **options)
    assert all(torch.equal(start[k], v) for k, v in encoder.state_dict().items())
    big, small = (seen[i : i + 5] for i in (0, 5))
    loss = plain.training_loss(
        {64: encoder, 32: encoder.small},
        {64: result.big, 32: result.small},
        {K: (p1, p2, y) for K, (y, p1, p2, *_) in ((64, big), (32, small))},
        {K: (q1, q2) for K, (*_, q1, q2) in ((64, big), (32, small))},
        weight=0.3,
    )
    assert result.history[0].loss == pytest.approx(loss.item(), rel=1e-5)


def test_the_small_encoder_has_the_papers_sizes():
    shapes = [tuple(weight.shape) for weight in plain.small_encoder().parameters()]
    published = library.HierarchicalEncoder().small.parameters()
    assert shapes == [tuple(weight.shape) for weight in published]


def test_both_encoders(encoder):
    small = plain.small_encoder(D=6)
    small.load_state_dict(
        dict(zip(small.state_dict(), encoder.small.state_dict().values(), strict=True))
    )
    patches = random(3, 3, 64, 64)
    quarter = patches[..., :32, 32:]
    torch.testing.assert_close(small(quarter), encoder.small(quarter))
    big = plain.embed_big_patch(small, encoder.conv1, encoder.conv2, patches)
    torch.testing.assert_close(big, encoder(patches), rtol=1e-4, atol=1e-5)


def test_the_nearest_distance():
    queries, bank = random(5, 6), random(50, 6, seed=1)
    one_by_one = torch.stack([plain.nearest_distance(q, bank) for q in queries])
    torch.testing.assert_close(one_by_one, neighbors.nearest_distance(queries, bank))


@pytest.mark.parametrize(("K", "S"), [(32, 4), (64, 16), (10, 7)])
def test_scores_are_spread_over_pixels(K, S):
    n = (100 - K) // S + 1
    scores = random(n, n)
    expected = anomaly_map.spread_patch_scores(scores, K, S, 100)
    torch.testing.assert_close(plain.spread_patch_scores(scores, K, S, 100), expected)


def test_the_map_and_the_score_of_an_image(encoder):
    normal, image = random(3, 3, 100, 100), random(1, 3, 100, 100, seed=1)
    detector = library.PatchSVDD(encoder).fit(normal)
    embedded = encoder.embed(image - normal.mean(0))
    product, score = plain.anomaly_map(
        {32: embedded.small[0], 64: embedded.big[0]},
        {32: detector.small, 64: detector.big},
        100,
    )
    maps = detector.anomaly_maps(image)
    torch.testing.assert_close(product, maps.mult[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score, maps.scores[0], rtol=1e-4, atol=1e-5)
