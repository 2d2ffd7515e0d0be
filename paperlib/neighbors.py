r"""Exact distances to the nearest of many vectors, at the speed of a matrix product,
and a smaller bank to search.

A squared distance is $|q - b|^2 = |q|^2 - 2\,q \cdot b + |b|^2$, and the middle term of
all pairs is one matrix product. In floating point that formula alone is not exact: its
large terms cancel. Here it only says where to look.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperlib.precision import product_rounding
from paperlib.validation import check_finite, has_values

# vectors of the bank in one tile: with 512 queries its products, 4 MiB, stay in a CPU's
# cache
CHUNK = 2048
_CPU_PRODUCTS, _GPU_PRODUCTS = 512 * CHUNK, 2**25  # held at once
_MEMBERS = 32  # vectors of a tile that share one minimum
_LOOKED_AT = 2  # of these groups, how many are searched exactly


@torch.no_grad()
def nearest_distance(
    queries: Float[Tensor, "q d"],
    bank: Float[Tensor, "b e"],
    chunk: int = CHUNK,
    return_index: bool = False,
) -> Float[Tensor, " q"] | tuple[Float[Tensor, " q"], Int[Tensor, " q"]]:
    r"""Measure each query's distance to the nearest vector of the bank.

    $$\min_{b} \|q - b\|_2$$

    Queries and bank are centred, so that data far from zero keeps its digits, and
    multiplied tile by tile. The tiles name a few candidates for each query; the
    candidates' distances are computed from differences, which cancel nothing: a query
    that is in the bank is at exactly 0. Where rounding could have hidden a nearer
    vector than the candidates, the query is searched again in double precision.

    Args:
        queries: one vector a row.
        bank: one vector a row, of the same dtype, on the same device.
        chunk: vectors of the bank in one tile. It bounds the memory and does not change
            the result.
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
    _check(queries, bank)
    if chunk < 1:
        raise ValueError(
            f"chunk={chunk}; expected at least 1 vector of the bank in a tile"
        )
    distance, index, unsure = _search(queries, bank, chunk)
    if distance.dtype == torch.float32 and has_values(unsure) and unsure.any():
        again = unsure.nonzero().flatten()
        exact, row, _ = _search(queries[again].double(), bank.double(), chunk)
        distance[again], index[again] = exact.float(), row
    return (distance, index) if return_index else distance


def _search(queries: Tensor, bank: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give distances, rows, and where a nearer vector may have been missed."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, bank = queries.to(dtype), bank.to(dtype)
    count, dimensions = bank.shape
    centre = bank.mean(0)
    members = min(_MEMBERS, chunk, count)
    lanes = math.ceil(min(chunk, count) / members)
    tile = members * lanes
    tiles, spread = [], bank.new_zeros(())
    for part in bank.split(tile):
        part = part - centre
        squares = part.square().sum(1)
        spread = torch.maximum(spread, squares.max())
        if len(part) < tile:  # what fills up the last tile is infinitely far
            fill = tile - len(part)
            part = torch.cat([part, part.new_zeros(fill, dimensions)])
            squares = torch.cat([squares, squares.new_full((fill,), math.inf)])
        tiles.append(((-2 * part).T.contiguous(), squares))
    groups = len(tiles) * lanes
    looked_at = min(_LOOKED_AT, groups)
    member = lanes * torch.arange(members, device=bank.device)
    # |b|² - 2 q·b is wrong by at most this times (|q| + |b|) |b|, and two of them are compared.
    rounding = 4 * (dimensions + 4) * product_rounding(dtype)
    limit = _CPU_PRODUCTS if bank.device.type == "cpu" else _GPU_PRODUCTS

    distances, rows, unsure = [], [], []
    for part in queries.split(max(1, limit // tile)) if len(queries) else ():
        centred = part - centre
        products = part.new_empty(len(part), tile)
        # Vectors j, j + lanes, j + 2 lanes, … of a tile form a group: the minimum over
        # them runs along memory.
        lowest = part.new_empty(len(part), len(tiles), lanes)
        for i, (vectors, squares) in enumerate(tiles):
            # with `out`, autocast lets it be
            torch.addmm(squares, centred, vectors, out=products)
            torch.amin(products.view(-1, members, lanes), 1, out=lowest[:, i])
        value, group = lowest.flatten(1).topk(min(looked_at + 1, groups), largest=False)
        found = group[:, :looked_at]
        candidates = (
            ((found // lanes * tile + found % lanes)[..., None] + member)
            .flatten(1)
            .clamp_max(count - 1)
        )
        differences = bank.index_select(0, candidates.flatten()).view(
            *candidates.shape, dimensions
        )
        exact, best = torch.linalg.vector_norm(
            differences.sub_(part[:, None]), dim=2
        ).min(1)
        distances.append(exact)
        rows.append(candidates.gather(1, best[:, None]).flatten())
        missed = torch.zeros_like(exact, dtype=torch.bool)
        # the nearest vector of the groups not looked at, at its nearest
        if looked_at < groups:
            squares = centred.square().sum(1)
            slack = rounding * (squares.sqrt() + spread.sqrt()) * spread.sqrt()
            missed = (exact > 0) & (
                value[:, looked_at] + squares - slack < exact.square()
            )
        unsure.append(missed)
    if not distances:
        empty = queries.new_empty(0)
        return empty, empty.long(), empty.bool()
    return torch.cat(distances), torch.cat(rows), torch.cat(unsure)


@torch.no_grad()
def greedy_coreset(
    bank: Float[Tensor, "b d"], fraction: float | int, seed: int
) -> Int[Tensor, " m"]:
    """Choose vectors of the bank that leave none of the others far away: the farthest
    one, again and again.

    The first is drawn at random. The largest distance from a vector of the bank to the
    nearest one chosen (`covering_radius`) is at most twice what the best choice of that
    many could reach.

    Args:
        bank: one vector a row.
        fraction: share of the bank to keep, above 0 and at most 1; the number is
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
    _check(bank, bank)
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction}; expected a share of the bank above 0 and at most"
            " 1 (0.1 for 10 %)"
        )
    bank = bank.to(torch.promote_types(bank.dtype, torch.float32))
    wanted = math.ceil(fraction * len(bank) - 1e-9)
    latest = torch.randint(
        len(bank), (1,), generator=torch.Generator().manual_seed(seed)
    ).to(bank.device)
    nearest = bank.new_full((len(bank),), math.inf)
    # Nothing that is made in the loop outlives its turn: small tensors kept between
    # large ones would break up the heap.
    chosen = latest.new_empty(wanted)
    for number in range(wanted):
        chosen[number] = latest[0]
        distance = torch.cdist(
            bank,
            bank.index_select(0, latest),
            compute_mode="donot_use_mm_for_euclid_dist",
        )[:, 0]
        nearest = torch.minimum(nearest, distance, out=nearest)
        # among vectors that are all at 0, one is not taken twice
        nearest.index_fill_(0, latest, -1)
        latest = nearest.argmax(0, keepdim=True)
    return chosen


def covering_radius(bank: Float[Tensor, "b d"], chosen: Int[Tensor, " m"]) -> float:
    """Measure the largest distance from a vector of the bank to the nearest of those
    chosen.

    It bounds the error of searching the chosen ones only: no query's distance grows by
    more.

    Args:
        bank: one vector a row.
        chosen: rows of the bank, from `greedy_coreset`.

    Raises:
        ValueError: as `nearest_distance`.

    Source: Gonzalez, Theoretical Computer Science 38 (1985), 293-306. Departures: none.
    Test: test_neighbors.py::test_covering_radius_bounds_the_error_of_a_coreset
    """
    return float(nearest_distance(bank, bank[chosen]).max())


def _check(queries: Tensor, bank: Tensor) -> None:
    came = f"queries {tuple(queries.shape)} and a bank {tuple(bank.shape)}"
    if (
        queries.ndim != 2
        or bank.ndim != 2
        or queries.shape[1] != bank.shape[1]
        or bank.shape[1] == 0
    ):
        raise ValueError(
            f"{came}; expected (Q, D) and (B, D) of one dimension D:"
            " are both from the same encoder?"
        )
    if len(bank) == 0:
        raise ValueError(f"{came}; expected a bank of at least one vector")
    if queries.dtype != bank.dtype or queries.device != bank.device:
        raise ValueError(
            f"queries are {queries.dtype} on {queries.device} and the bank"
            f" is {bank.dtype} on {bank.device}; expected the same."
            " Convert one with .to(…)"
        )
    if len(queries):
        check_finite(queries, "queries")
    check_finite(bank, "bank")
