"""How much data is processed at a time: chunks of cache size on a CPU, large on a GPU.

A GPU waits for the host between small operations, so it gets as much at once as its
memory allows; a CPU is fastest on data that are still in its cache.

Example:
    >>> import torch
    >>> from paperlib.devices import chunk_sizes
    >>> chunk_sizes(torch.device("cpu")).bank_tile
    2048
"""

from typing import NamedTuple

import torch


class ChunkSizes(NamedTuple):
    """Sizes for one device.

    Fields:
        elements: numbers that a step of an algorithm allocates.
        bank_tile: vectors of a bank per tile of a search for neighbours.
        products: of queries and vectors of a tile that are in memory at once.
        activation_bytes: of a layer's largest output, by which batches are divided;
            None for whole batches.
    """

    elements: int
    bank_tile: int
    products: int
    activation_bytes: int | None


# Elements: data that are read twice are still in the cache, which is about 1.7 times as
# fast as all at once at D = 100. Products of a tile with 512 queries, 4 MiB, fit it.
# Activations: the input and the output of a layer stay below 32 MiB together; glibc's
# `malloc` maps larger blocks anew at each layer, and page faults cost more than the
# arithmetic.
_CPU = ChunkSizes(2**20, 2048, 512 * 2048, 2**24)
_GPU = ChunkSizes(2**28, 16384, 2**25, None)  # 1 GiB of float32
_LEAST_ELEMENTS = 2**24


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """Return the sizes for a device.

    On a CUDA device an algorithm's step uses at most a sixteenth of the free memory
    (it holds a few such blocks), and at most 1 GiB. Where the free memory can't be
    queried (other accelerators, fake and meta tensors), 1 GiB is assumed to be there.

    Args:
        device: of the data.
    """
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda" or not torch.cuda.is_available():
        return _GPU
    free, _ = torch.cuda.mem_get_info(device)
    elements = min(_GPU.elements, max(_LEAST_ELEMENTS, free // 64))
    return _GPU._replace(elements=elements)
