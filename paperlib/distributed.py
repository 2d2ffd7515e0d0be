"""Helpers for `distribute=True`: the process group, and errors in every process."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import distributed


def process_group(group: "distributed.ProcessGroup | None" = None) -> tuple[int, int]:
    """Return this process's rank in `torch.distributed`, and the number of processes.

    Args:
        group: of processes; None for the default group.

    Raises:
        ValueError: if no process group is initialised.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "no process group; start with torchrun and call"
            " torch.distributed.init_process_group first, in every process"
        )
    return distributed.get_rank(group), distributed.get_world_size(group)


@contextlib.contextmanager
def fail_together(
    device: torch.device | None, group: "distributed.ProcessGroup | None" = None
) -> Iterator[None]:
    """Raise in every process if the block raises in one of them.

    Use it for checks before a collective operation: if one process raised alone, the
    others would wait for it until they time out. The block itself must not contain a
    collective operation.

    Args:
        device: where the processes communicate; None for a single process, where the
            block runs unchanged.
        group: of processes; None for the default group.

    Raises:
        Exception: that of the block, in the process where it failed.
        ValueError: in the other processes, with the rank of one that failed; and if no
            process group is initialised.
    """
    if device is None:
        yield
        return
    rank, world = process_group(group)
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = torch.tensor(0 if error is None else rank + 1, device=device)
    distributed.all_reduce(failed, distributed.ReduceOp.MAX, group)
    if error is not None:
        raise error
    if failed:
        raise ValueError(
            f"process {int(failed) - 1} of {world} raised an error,"
            " so this one stops too; see the error of that process"
        )


def check_same(
    values: Sequence[int],
    device: torch.device,
    message: str,
    group: "distributed.ProcessGroup | None" = None,
) -> None:
    """Raise in every process unless all of them pass the same numbers.

    Args:
        values: this process's numbers, equally many in every process.
        device: where the processes communicate.
        message: of the error.
        group: of processes; None for the default group.

    Raises:
        ValueError: if any number differs.
    """
    # The maximum of the negatives is the minimum, in the same operation.
    extremes = [*values, *(-value for value in values)]
    maxima = torch.tensor(extremes, device=device)
    distributed.all_reduce(maxima, distributed.ReduceOp.MAX, group)
    if maxima.tolist() != extremes:
        raise ValueError(message)


def check_same_size(size: tuple[int, int], device: torch.device) -> None:
    """Raise in every process unless the images of all of them have the same size.

    Args:
        size: height and width of this process's images, in pixels.
        device: where the processes communicate.

    Raises:
        ValueError: if the sizes differ.
    """
    check_same(
        size,
        device,
        f"images of {size[0]}×{size[1]} pixels, and of another size in another"
        " process; expected the same size in every process. Resize them",
    )
