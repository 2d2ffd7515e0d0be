r"""Exact nearest-neighbour distances by matrix products, and coresets.

A squared distance is $|q - b|^2 = |q|^2 - 2\,q \cdot b + |b|^2$, and the middle term of
all pairs is one matrix product. In floating point that formula is inexact, because its
large terms cancel. So it only selects candidates, whose distances are computed from
differences.

Example:
    >>> import torch
    >>> from paperlib.neighbors import greedy_coreset, nearest_distance
    >>> bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.1]])
    >>> nearest_distance(torch.tensor([[0.0, 1.0], [3.0, 0.0]]), bank)
    tensor([1., 3.])
    >>> sorted(greedy_coreset(bank, 2 / 3, seed=0).tolist())  # indices of 2 rows
    [0, 2]
"""

import math
from typing import Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from paperlib.devices import chunk_sizes
from paperlib.precision import at_least_float32, full_precision
from paperlib.validation import (
    check_finite,
    check_indices,
    check_integers,
    check_number,
    check_same_kind,
    check_tensor,
    check_values,
    has_values,
)

_GROUP_SIZE = 32  # vectors per group, of which only the minimum is stored
_SEARCHED_GROUPS = 2  # groups per query that are searched exactly


@overload
def nearest_distance(
    queries: Tensor,
    bank: Tensor,
    chunk: int | None = None,
    return_index: Literal[False] = False,
) -> Tensor: ...


@overload
def nearest_distance(
    queries: Tensor,
    bank: Tensor,
    chunk: int | None = None,
    *,
    return_index: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def nearest_distance(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "b d"],
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

    Example:
        >>> import torch
        >>> from paperlib.neighbors import nearest_distance
        >>> bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> queries = torch.tensor([[3.0, 3.0], [0.0, 2.0]])
        >>> nearest_distance(queries, bank, return_index=True)
        (tensor([1., 2.]), tensor([1, 0]))

    Source: Patch SVDD, arXiv:2006.16067, Eq. 8.
    Departures: none; the released code searches the small patches approximately (NGT)
        and the large ones with a KD-tree, one query at a time.
    Test: test_neighbors.py::test_equals_every_distance_in_double_precision
    """
    _check_vectors(queries, bank)
    if chunk is None:
        chunk = chunk_sizes(bank.device).bank_tile
    check_integers(chunk=chunk)
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
    group_size = min(_GROUP_SIZE, chunk, len(bank))
    tile = group_size * math.ceil(min(chunk, len(bank)) / group_size)
    centre = bank.mean(0)
    tiles, max_norm = _make_tiles(bank, centre, tile)
    max_products = chunk_sizes(bank.device).products
    results = [
        _search_tiles(part, bank, centre, tiles, max_norm, group_size)
        for part in queries.split(max(1, max_products // tile))
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _make_tiles(
    bank: Tensor, centre: Tensor, size: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Prepare the centred bank for products, in tiles of equal size.

    Returns:
        per tile -2 b as columns and |b|² (infinite for padding); the largest |b|.
    """
    tiles, max_square = [], bank.new_zeros(())
    for part in bank.split(size):
        centred = F.pad(part - centre, (0, 0, 0, size - len(part)))
        squares = centred.square().sum(1)
        max_square = torch.maximum(max_square, squares.max())
        squares[len(part) :] = math.inf
        tiles.append(((-2 * centred).T.contiguous(), squares))
    return tiles, max_square.sqrt()


def _group_minima(
    centred: Tensor, tiles: list[tuple[Tensor, Tensor]], group_size: int
) -> Tensor:
    """Return the minimum of |b|² - 2 q·b per query and group, (Q, groups).

    Vectors j, j + g, j + 2g, … of a tile form a group (g groups per tile), so that the
    minimum over a group reads contiguous memory.
    """
    n_groups = len(tiles[0][1]) // group_size
    products = centred.new_empty(len(centred), group_size * n_groups)
    minima = centred.new_empty(len(centred), len(tiles), n_groups)
    for i, (vectors, squares) in enumerate(tiles):
        torch.addmm(squares, centred, vectors, out=products)
        groups = products.view(len(centred), group_size, n_groups)
        torch.amin(groups, 1, out=minima[:, i])
    return minima.flatten(1)


def _search_tiles(
    queries: Tensor,
    bank: Tensor,
    centre: Tensor,
    tiles: list[tuple[Tensor, Tensor]],
    max_norm: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the groups of the smallest products exactly; see `_search`."""
    centred = queries - centre
    minima = _group_minima(centred, tiles, group_size)
    n_smallest = min(_SEARCHED_GROUPS + 1, minima.shape[1])
    smallest, groups = minima.topk(n_smallest, largest=False)
    searched = groups[:, :_SEARCHED_GROUPS]
    n_groups = minima.shape[1] // len(tiles)  # per tile
    first_rows = searched // n_groups * n_groups * group_size + searched % n_groups
    offsets = n_groups * torch.arange(group_size, device=bank.device)
    candidates = (first_rows[..., None] + offsets).flatten(1).clamp_max(len(bank) - 1)
    differences = bank.index_select(0, candidates.flatten()).view(
        *candidates.shape, bank.shape[1]
    )
    distances, nearest = torch.linalg.vector_norm(
        differences.sub_(queries[:, None]), dim=2
    ).min(1)
    rows = candidates.gather(1, nearest[:, None]).flatten()
    # The rounding error of a group's minimum is at most this times (|q| + |b|) |b|; the
    # factor 2 allows for both minima of a comparison.
    rounding = 2 * (bank.shape[1] + 4) * torch.finfo(bank.dtype).eps
    squares = centred.square().sum(1, keepdim=True)
    error_bound = rounding * (squares.sqrt() + max_norm) * max_norm
    # A lower bound for all groups that were not searched: none, or one column.
    lower_bound = smallest[:, _SEARCHED_GROUPS:] + squares - error_bound
    may_be_nearer = (lower_bound < distances[:, None].square()).any(1)
    return distances, rows, may_be_nearer & (distances > 0)


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

    Example:
        >>> import torch
        >>> from paperlib.neighbors import greedy_coreset
        >>> bank = torch.tensor([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
        >>> rows = greedy_coreset(bank, fraction=0.5, seed=0)
        >>> bank[rows].round().flatten().sort().values
        tensor([0., 5., 9.])

    Source: Gonzalez, Theoretical Computer Science 38 (1985), 293-306; for banks of
        patches, PatchCore, arXiv:2106.08265, Alg. 1.
    Departures: PatchCore projects the vectors to fewer dimensions first.
    Test: test_neighbors.py::test_greedy_coreset_takes_the_farthest_each_time
    """
    _check_vectors(bank, bank)
    check_number("fraction", fraction, "a share of the bank", above=0, most=1)
    check_integers(0, seed=seed)
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
    check_tensor(bank, "the vectors of the bank", "B, D")
    check_values(bank, "the vectors of the bank")
    chosen = check_indices("chosen", chosen, len(bank), "rows of the bank")
    check_values(chosen, "the chosen rows")
    return float(nearest_distance(bank, bank[chosen]).max())


def _check_vectors(queries: Tensor, bank: Tensor) -> None:
    check_tensor(queries, "queries")
    check_tensor(bank, "the vectors of the bank")
    received = f"queries {tuple(queries.shape)} and a bank {tuple(bank.shape)}"
    is_matrix = queries.ndim == bank.ndim == 2
    if not is_matrix or queries.shape[1] != bank.shape[1] or 0 in bank.shape:
        raise ValueError(
            f"{received}; expected a bank of at least one vector, and (Q, D) and (B, D)"
            " with the same D. Compute both with the same encoder"
        )
    check_same_kind("queries", queries, "the bank", bank)
    check_finite(bank, "bank")
    if queries is not bank:
        check_finite(queries, "queries")
