"""Run a function on several gloo ranks without paying for the imports again: forked from the test process."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def fork_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(rank, world_size, *args)` on each rank, with the environment that torchrun gives.

    An exception on a rank fails the caller with that rank's traceback.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, (world_size, port, function, args), nprocs=world_size, start_method="fork")


def _rank(rank: int, world_size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    function(rank, world_size, *args)
