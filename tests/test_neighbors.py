import resource
from pathlib import Path

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from sklearn.neighbors import KDTree
from torch._subclasses.fake_tensor import FakeTensorMode

from paperlib import devices, neighbors, precision
from paperlib.neighbors import covering_radius, greedy_coreset, nearest_distance


def vectors(count, dimensions, seed=0, dtype=torch.float32):
    return torch.randn(
        count, dimensions, dtype=dtype, generator=torch.Generator().manual_seed(seed)
    )


def every_distance(queries, bank):
    """All differences in double precision, and the smallest of each row: no product,
    nothing cancels.
    """
    return torch.stack(
        [
            (query.double() - bank.double()).square().sum(1).sqrt().min()
            for query in queries
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    q=st.integers(1, 30),
    b=st.integers(1, 200),
    d=st.integers(1, 70),
    chunk=st.integers(1, 220),
    far=st.sampled_from([0.0, 1.0, 1000.0]),
    seed=st.integers(0, 99),
)
def test_equals_every_distance_in_double_precision(q, b, d, chunk, far, seed):
    queries, bank = vectors(q, d, seed) + far, vectors(b, d, seed + 100) + far
    distance, index = nearest_distance(queries, bank, chunk, return_index=True)
    expected = every_distance(queries, bank)
    torch.testing.assert_close(distance.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        (queries - bank[index]).double().norm(dim=1), expected, rtol=1e-6, atol=0
    )


def test_equals_scikit_learn_and_faiss_over_many_tiles():
    queries, bank = vectors(700, 24), vectors(9000, 24, 1)
    distance, index = nearest_distance(queries, bank, return_index=True)
    theirs, rows = KDTree(bank.double().numpy()).query(queries.double().numpy(), 1)
    torch.testing.assert_close(
        distance, torch.from_numpy(theirs[:, 0]).float(), rtol=1e-6, atol=0
    )
    assert index.tolist() == rows[:, 0].tolist()
    flat = faiss.IndexFlatL2(24)
    flat.add(bank.numpy())
    squares, rows = flat.search(queries.numpy(), 1)
    assert index.tolist() == rows[:, 0].tolist()
    torch.testing.assert_close(
        distance.square(), torch.from_numpy(squares[:, 0]), rtol=1e-4, atol=1e-5
    )
    double = nearest_distance(queries.double(), bank.double())
    torch.testing.assert_close(
        double, torch.from_numpy(theirs[:, 0]), rtol=1e-14, atol=0
    )


def test_a_vector_of_the_bank_is_at_zero_even_among_its_doubles():
    # Neighbours at 1e-4 of a bank at distance 100 from zero: 1e-8 in squares of 1e4,
    # twelve digits; float32 has seven.
    base = vectors(40, 64) + 100
    bank = torch.cat([base + 1e-4 * vectors(40, 64, seed) for seed in range(1, 60)])
    distance, index = nearest_distance(bank, bank, chunk=256, return_index=True)
    assert torch.equal(distance, torch.zeros(len(bank)))
    assert torch.equal(bank[index], bank)
    plain = (bank @ bank.T).mul(-2).add(bank.square().sum(1)).argmin(1)
    # The formula alone finds another vector.
    assert (bank[plain] != bank).any(1).float().mean() > 0.5


def test_a_near_tie_is_settled_in_double_precision():
    # 500 vectors on a sphere around the query, and one that is nearer by a relative
    # 1e-6, below what products resolve.
    query = 3 + vectors(1, 64)
    bank = query + 2 * torch.nn.functional.normalize(vectors(500, 64, 1), dim=1)
    for nearer in (3, 257, 499):
        moved = bank.clone()
        moved[nearer] += 2e-6 * (query[0] - bank[nearer])
        expected = every_distance(query, moved)
        distance, index = nearest_distance(query, moved, chunk=64, return_index=True)
        distances = (moved.double() - query.double()).norm(dim=1)
        assert index.item() == distances.argmin() == nearer
        torch.testing.assert_close(distance.double(), expected, rtol=1e-7, atol=0)


LOWERED = {
    # bfloat16 products where the processor has them.
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "the CPU's own": lambda: setattr(
        torch.backends.mkldnn.matmul, "fp32_precision", "bf16"
    ),
    "all backends": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
}


@pytest.fixture
def owners():
    """Restore the precision of products, which a test sets."""
    found = [
        owner
        for owner in (torch.backends, *precision._BACKENDS)
        if hasattr(owner, "fp32_precision")
    ]
    yield found
    torch.set_float32_matmul_precision("highest")
    for owner in found:
        owner.fp32_precision = "none"


@pytest.mark.parametrize("lower", LOWERED)
def test_lower_matmul_precision_costs_no_digit(owners, lower, monkeypatch):
    if lower != "medium" and not owners:
        pytest.skip("one setting for all backends before PyTorch 2.9")
    queries, bank = vectors(50, 64), vectors(3000, 64, 1)
    LOWERED[lower]()
    searched, search = [], neighbors._search
    monkeypatch.setattr(
        neighbors,
        "_search",
        lambda queries, *rest: searched.append(len(queries)) or search(queries, *rest),
    )
    coarse = nearest_distance(queries, bank)
    assert searched == [len(queries)], "no query needs a second search"
    torch.testing.assert_close(
        coarse.double(), every_distance(queries, bank), rtol=1e-6, atol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            nearest_distance(queries, bank), nearest_distance(queries, bank.clone())
        )
        torch.testing.assert_close(
            nearest_distance(queries, bank), coarse, rtol=1e-6, atol=0
        )


def test_dtypes_devices_and_no_query():
    queries, bank = vectors(5, 8), vectors(70, 8, 1)
    half = nearest_distance(queries.bfloat16(), bank.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half.double(), every_distance(queries.bfloat16(), bank.bfloat16())
    )
    assert nearest_distance(queries.double(), bank.double()).dtype == torch.float64
    distance, index = nearest_distance(queries[:0], bank, return_index=True)
    assert distance.shape == index.shape == (0,) and index.dtype == torch.int64
    with FakeTensorMode(), torch.device("cuda"):
        distance, index = nearest_distance(
            torch.rand(40, 8), torch.rand(5000, 8), return_index=True
        )
        assert distance.device.type == index.device.type == "cuda"
        assert greedy_coreset(torch.rand(9, 8), 0.5, 0).shape == (5,)


def test_memory_is_bounded_by_the_tile(monkeypatch):
    seen = []
    addmm = torch.addmm
    monkeypatch.setattr(
        neighbors.torch,
        "addmm",
        lambda *a, out: seen.append(out.numel()) or addmm(*a, out=out),
    )
    nearest_distance(vectors(3000, 4), vectors(5000, 4, 1))
    assert max(seen) <= 512 * 2048 and len(seen) == 6 * 3
    seen.clear()
    # Less than a tile: one query at a time.
    monkeypatch.setattr(devices, "_CPU", devices._CPU._replace(products=1))
    nearest_distance(vectors(3, 4), vectors(64, 4, 1))
    assert seen == [64] * 3


def test_a_query_at_zero_is_not_searched_again(monkeypatch):
    searched, search = [], neighbors._search
    monkeypatch.setattr(
        neighbors,
        "_search",
        lambda queries, *rest: searched.append(len(queries)) or search(queries, *rest),
    )
    base = vectors(40, 64)
    # Rounding could hide the nearest.
    bank = torch.cat([base + 1e-3 * vectors(40, 64, seed) for seed in range(1, 20)])
    assert not nearest_distance(bank, bank, 64).any() and searched == [len(bank)]
    nearest_distance(bank + 1e-4, bank, 64)
    assert searched[1:] == [len(bank)] * 2, "beside the bank, every query is"


def test_greedy_coreset_takes_the_farthest_each_time():
    bank = vectors(60, 5, dtype=torch.float64)
    chosen = greedy_coreset(bank, 0.4, seed=3).tolist()
    assert len(chosen) == 24 == len(set(chosen))
    for i in range(1, 24):
        nearest = torch.cdist(bank, bank[chosen[:i]]).amin(1)
        assert chosen[i] == nearest.argmax()
    assert greedy_coreset(bank, 0.4, seed=3).tolist() == chosen
    assert len({greedy_coreset(bank, 0.01, seed=s).item() for s in range(20)}) > 5
    assert sorted(greedy_coreset(bank, 1, seed=0).tolist()) == list(range(60))
    assert sorted(greedy_coreset(torch.ones(6, 2), 1.0, seed=0).tolist()) == list(
        range(6)
    )


def test_a_share_that_floating_point_rounds_up_takes_no_vector_more():
    assert 0.07 * 100 > 7
    assert len(greedy_coreset(torch.arange(100.0)[:, None], 0.07, 0)) == 7


def test_a_coreset_takes_no_memory_that_grows_with_its_size():
    """Small tensors that outlive an iteration fragment the heap: 8 images took 9 GB."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("no /proc here to read the memory from")
    bank, pages = vectors(20_000, 64), lambda: int(resident.read_text().split()[1])
    before = pages()
    # 100 turns; each leaves 5 MB where the heap is broken up.
    greedy_coreset(bank, 0.005, seed=0)
    assert (pages() - before) * resource.getpagesize() < 100e6


def test_covering_radius_bounds_the_error_of_a_coreset():
    queries, bank = vectors(200, 6), vectors(500, 6, 1)
    full, radii = nearest_distance(queries, bank), []
    for fraction in (0.05, 0.3, 1):
        chosen = greedy_coreset(bank, fraction, seed=0)
        radii.append(covering_radius(bank, chosen))
        assert radii[-1] == pytest.approx(
            every_distance(bank, bank[chosen]).max().item()
        )
        error = nearest_distance(queries, bank[chosen]) - full
        assert error.min() >= 0 and error.max() <= radii[-1] * (1 + 1e-6)
    assert radii[0] > radii[1] > radii[2] == 0


@pytest.mark.parametrize(
    ("queries", "bank", "options", "message"),
    [
        (
            (4, 3),
            (5, 2),
            {},
            r"queries \(4, 3\) and a bank \(5, 2\); expected .* with the same D",
        ),
        ((4, 3), (0, 3), {}, "a bank of at least one vector"),
        ((4, 3), (3,), {}, r"a bank \(3,\); .* \(Q, D\) and \(B, D\)"),
        ((4, 0), (5, 0), {}, "with the same D"),
        ((4, 3), (5, 3), {"chunk": 0}, "chunk=0"),
    ],
)
def test_invalid_vectors_are_refused(queries, bank, options, message):
    with refuses(message):
        nearest_distance(torch.zeros(queries), torch.zeros(bank), **options)


def test_nan_other_dtypes_and_fractions_are_refused():
    bank = vectors(5, 3)
    bad = bank.clone()
    bad[2, 1] = float("nan")
    with refuses("1 values of queries are NaN or infinite, in queries number 2"):
        nearest_distance(bad, bank)
    with refuses("1 values of bank are NaN or infinite"):
        nearest_distance(bank, bad)
    with refuses(
        "queries are torch.float64 on cpu and the bank is torch.float32",
    ):
        nearest_distance(bank.double(), bank)
    for fraction in (0, -0.1, 1.5):
        with refuses(f"fraction={fraction}"):
            greedy_coreset(bank, fraction, 0)


def test_the_radius_of_rows_without_values_is_refused():
    """As an index they would leave the result unwritten, and it would be any number."""
    with refuses("the chosen rows are on the meta device"):
        covering_radius(torch.rand(7, 4), torch.tensor([0, 3], device="meta"))
