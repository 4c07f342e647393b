"""Run a function on several gloo ranks without paying for the imports again: forked from the test process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from lab import rank_environment, store_process


def fork_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(rank, world_size, *args)` on each rank, with the environment that torchrun gives.

    An exception on a rank fails the caller with that rank's traceback.
    """
    import torch.multiprocessing as mp

    launcher, port = store_process()
    try:
        mp.start_processes(_rank, (world_size, port, function, args), nprocs=world_size, start_method="fork")
    finally:
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)


def _rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(rank_environment(rank, world_size, port))
    import torch

    torch.set_num_threads(1)
    function(rank, world_size, *args)
