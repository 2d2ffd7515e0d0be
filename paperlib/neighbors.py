r"""Exact nearest-neighbour distances by matrix products, and coresets.

A squared distance is $|q - b|^2 = |q|^2 - 2\,q \cdot b + |b|^2$, and the middle term of
all pairs is one matrix product. In floating point that formula is inexact, because its
large terms cancel. So it only selects candidates, whose distances are computed from
differences.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlib.precision import at_least_float32, full_precision
from paperlib.validation import check_finite, has_values

# Vectors of the bank per tile, and products in memory at once. On a CPU the products of
# a tile with 512 queries, 4 MiB, fit the cache; a GPU wants few, large products.
_CPU_TILE, _CPU_PRODUCTS = 2048, 512 * 2048
_GPU_TILE, _GPU_PRODUCTS = 16384, 2**25
_GROUP_SIZE = 32  # vectors per group, of which only the minimum is stored
_SEARCHED_GROUPS = 2  # groups per query that are searched exactly


@torch.no_grad()
def nearest_distance(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "b e"],
    chunk: int | None = None,
    return_index: bool = False,
) -> Float[Tensor, " q"] | tuple[Float[Tensor, " q"], Int[Tensor, " q"]]:
    r"""Compute each query's distance to the nearest vector of the bank.

    $$\min_{b} \|q - b\|_2$$

    Queries and bank are centred, so that data far from zero lose no precision, and
    multiplied tile by tile. The products select a few candidates per query; the
    candidates' distances are computed from differences, so a query that is in the bank
    has distance exactly 0. Where rounding could have hidden a nearer vector, as among
    near-duplicates, that query alone is searched in double precision.

    Args:
        queries: one vector per row.
        bank: one vector per row, of the same dtype, on the same device.
        chunk: vectors of the bank per tile; None chooses by device. It bounds the
            memory and does not change the result.
        return_index: also return the row of the bank that is nearest (any of several
            that are equally near).

    Returns:
        distances, not squared, float32 where the vectors are half precision; with
        `return_index` the rows as well.

    Raises:
        ValueError: if the bank is empty or of another dimension, dtype or device than
            the queries, `chunk` is below 1, or a value is NaN or infinite.

    Source: Patch SVDD, arXiv:2006.16067, Eq. 8.
    Departures: none; the released code searches the small patches approximately (NGT)
        and the large ones with a KD-tree, one query at a time.
    Test: test_neighbors.py::test_equals_every_distance_in_double_precision
    """
    _check_vectors(queries, bank)
    if chunk is None:
        chunk = _CPU_TILE if bank.device.type == "cpu" else _GPU_TILE
    if chunk < 1:
        raise ValueError(
            f"chunk={chunk}; expected at least 1 vector of the bank per tile, or None"
        )
    with full_precision():
        distance, index, unsure = _search(queries, bank, chunk)
    if distance.dtype == torch.float32 and has_values(unsure) and unsure.any():
        rows = unsure.nonzero().flatten()
        exact_distance, exact_index, _ = _search(
            queries[rows].double(), bank.double(), chunk
        )
        distance[rows], index[rows] = exact_distance.float(), exact_index
    return (distance, index) if return_index else distance


def _search(queries: Tensor, bank: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances, rows of the bank, and whether a vector may be nearer."""
    dtype = at_least_float32(queries.dtype)
    queries, bank = queries.to(dtype), bank.to(dtype)
    count, dimensions = bank.shape
    centre = bank.mean(0)
    group_size = min(_GROUP_SIZE, chunk, count)
    groups_per_tile = math.ceil(min(chunk, count) / group_size)
    tile = group_size * groups_per_tile
    tiles, max_square = [], bank.new_zeros(())
    for part in bank.split(tile):
        part = part - centre
        squares = part.square().sum(1)
        max_square = torch.maximum(max_square, squares.max())
        if len(part) < tile:  # padding vectors are infinitely far
            fill = tile - len(part)
            part = torch.cat([part, part.new_zeros(fill, dimensions)])
            squares = torch.cat([squares, squares.new_full((fill,), math.inf)])
        tiles.append(((-2 * part).T.contiguous(), squares))
    n_groups = len(tiles) * groups_per_tile
    n_searched = min(_SEARCHED_GROUPS, n_groups)
    member_offsets = groups_per_tile * torch.arange(group_size, device=bank.device)
    # The error of |b|² - 2 q·b is at most this times (|q| + |b|) |b|; two are compared.
    rounding = 2 * (dimensions + 4) * torch.finfo(dtype).eps
    max_products = _CPU_PRODUCTS if bank.device.type == "cpu" else _GPU_PRODUCTS

    distances, rows, unsure = [], [], []
    for part in queries.split(max(1, max_products // tile)) if len(queries) else ():
        centred = part - centre
        products = part.new_empty(len(part), tile)
        # Vectors j, j + g, j + 2g, … of a tile form a group (g = groups_per_tile), so
        # that the minimum over a group reads contiguous memory.
        minima = part.new_empty(len(part), len(tiles), groups_per_tile)
        for i, (vectors, squares) in enumerate(tiles):
            torch.addmm(squares, centred, vectors, out=products)
            torch.amin(
                products.view(-1, group_size, groups_per_tile), 1, out=minima[:, i]
            )
        group_minima, group = minima.flatten(1).topk(
            min(n_searched + 1, n_groups), largest=False
        )
        searched_groups = group[:, :n_searched]
        tile_index = searched_groups // groups_per_tile
        first_rows = tile_index * tile + searched_groups % groups_per_tile
        candidates = (first_rows[..., None] + member_offsets).flatten(1)
        candidates = candidates.clamp_max(count - 1)
        differences = bank.index_select(0, candidates.flatten()).view(
            *candidates.shape, dimensions
        )
        distance, nearest = torch.linalg.vector_norm(
            differences.sub_(part[:, None]), dim=2
        ).min(1)
        distances.append(distance)
        rows.append(candidates.gather(1, nearest[:, None]).flatten())
        may_be_nearer = torch.zeros_like(distance, dtype=torch.bool)
        # Compare with a lower bound for all groups that were not searched.
        if n_searched < n_groups:
            squares = centred.square().sum(1)
            error_bound = (
                rounding * (squares.sqrt() + max_square.sqrt()) * max_square.sqrt()
            )
            may_be_nearer = (distance > 0) & (
                group_minima[:, n_searched] + squares - error_bound < distance.square()
            )
        unsure.append(may_be_nearer)
    if not distances:
        empty = queries.new_empty(0)
        return empty, empty.long(), empty.bool()
    return torch.cat(distances), torch.cat(rows), torch.cat(unsure)


@torch.no_grad()
def greedy_coreset(
    bank: Float[Tensor, "b d"], fraction: float, seed: int
) -> Int[Tensor, " m"]:
    """Select a coreset of the bank by farthest-point sampling (greedy k-centre).

    The first vector is drawn at random; then the farthest from those chosen is added.
    The largest distance from a vector of the bank to the nearest one chosen
    (`covering_radius`) is at most twice the optimum for that number.

    Args:
        bank: one vector per row.
        fraction: share of the bank to select, above 0 and at most 1; the number is
            rounded up.
        seed: of the first choice.

    Returns:
        rows of the bank in the order in which they were chosen, without repetition.

    Raises:
        ValueError: for an empty bank, a fraction outside (0, 1], or NaN or infinite
            values.

    Source: Gonzalez, Theoretical Computer Science 38 (1985), 293-306; for banks of
        patches, PatchCore, arXiv:2106.08265, Alg. 1.
    Departures: PatchCore projects the vectors to fewer dimensions first.
    Test: test_neighbors.py::test_greedy_coreset_takes_the_farthest_each_time
    """
    _check_vectors(bank, bank)
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction}; expected a share of the bank above 0 and at most"
            " 1 (0.1 for 10 %)"
        )
    bank = bank.to(at_least_float32(bank.dtype))
    size = math.ceil(fraction * len(bank) - 1e-9)
    generator = torch.Generator().manual_seed(seed)
    latest = torch.randint(len(bank), (1,), generator=generator).to(bank.device)
    nearest = bank.new_full((len(bank),), math.inf)
    # Do not allocate tensors in this loop that outlive an iteration: they fragment the
    # heap.
    chosen = latest.new_empty(size)
    for number in range(size):
        chosen[number] = latest[0]
        distances = torch.cdist(
            bank,
            bank.index_select(0, latest),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        nearest = torch.minimum(nearest, distances[:, 0], out=nearest)
        # So no vector is chosen twice, even if all distances are 0.
        nearest.index_fill_(0, latest, -1)
        latest = nearest.argmax(0, keepdim=True)
    return chosen


def covering_radius(bank: Float[Tensor, "b d"], chosen: Int[Tensor, " m"]) -> float:
    """Compute the largest distance from a vector of the bank to the nearest one chosen.

    It bounds the error of searching the coreset only: no distance increases by more.

    Args:
        bank: one vector per row.
        chosen: rows of the bank, from `greedy_coreset`.

    Raises:
        ValueError: as `nearest_distance`.

    Source: Gonzalez, Theoretical Computer Science 38 (1985), 293-306. Departures: none.
    Test: test_neighbors.py::test_covering_radius_bounds_the_error_of_a_coreset
    """
    return float(nearest_distance(bank, bank[chosen]).max())


def _check_vectors(queries: Tensor, bank: Tensor) -> None:
    received = f"queries {tuple(queries.shape)} and a bank {tuple(bank.shape)}"
    if (
        queries.ndim != 2
        or bank.ndim != 2
        or queries.shape[1] != bank.shape[1]
        or bank.shape[1] == 0
    ):
        raise ValueError(
            f"{received}; expected (Q, D) and (B, D) with the same D."
            " Compute both with the same encoder"
        )
    if len(bank) == 0:
        raise ValueError(f"{received}; expected a bank of at least one vector")
    if queries.dtype != bank.dtype or queries.device != bank.device:
        raise ValueError(
            f"queries are {queries.dtype} on {queries.device} and the bank"
            f" is {bank.dtype} on {bank.device}; expected the same."
            " Convert one with .to(…)"
        )
    if len(queries):
        check_finite(queries, "queries")
    check_finite(bank, "bank")
