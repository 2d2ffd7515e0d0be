"""Run a function in two processes, forked from one that has imported the library."""

import multiprocessing
from collections.abc import Callable

import torch

# Importing torch takes longer than most of what the processes compute.
multiprocessing.set_forkserver_preload(["paperlib.padim", "paperlib.patch_svdd"])


def run_twice(function: Callable, *arguments: object) -> None:
    """Call `function(rank, *arguments)` in each process; the first error is raised."""
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=2, start_method="forkserver"
    )
