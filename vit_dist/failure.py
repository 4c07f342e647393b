"""How a run that does not finish is remembered: status.json says that it ended, failure.json why."""

from __future__ import annotations

import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vit_dist import stop
from vit_dist.attempts import Attempt
from vit_dist.callbacks.watchdog import Watchdog
from vit_dist.config import Config
from vit_dist.distributed import Peers, first_to_fail, launched_rank
from vit_dist.errors import UserError
from vit_dist.redact import redact
from vit_dist.run_folder import environment, write_json, write_status

FAILURE = "failure.json"
OUT_OF_MEMORY = (
    "out of memory: lower --per_device_train_batch_size (with --global_batch_size the steps stay the same), try "
    "--bf16 or --activation_checkpointing, or shard the model (launch/accelerate.sh zero2 or fsdp2); `vit-dist plan` "
    "shows what fits"
)


@contextlib.contextmanager
def interruption_recorded(folder: Path, attempt: Attempt) -> Iterator[None]:
    """Any rank: if it is asked to stop before training, status.json says so. Later all ranks stop together."""
    try:
        yield
    except stop.Interrupted as asked:
        if not asked.agreed and not attempt.replaces and first_to_fail():
            by = f"{asked} on rank {launched_rank()}"
            with contextlib.suppress(OSError):
                write_status(folder, "preempted", attempt=attempt.number, step=attempt.begins_at, by=by)
        raise


@contextlib.contextmanager
def recorded(folder: Path, whereabouts: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Any rank: if the block fails here first, status.json and failure.json say so."""
    try:
        yield
    except stop.Interrupted:
        raise
    except BaseException as error:
        if first_to_fail():
            write(folder, error, whereabouts)
        if is_out_of_memory(error):
            numbers = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory().items())
            raise UserError(f"{OUT_OF_MEMORY}. Rank {launched_rank()}: {numbers}") from error
        raise


def watchdog(config: Config) -> Watchdog:
    """See there; a hang is recorded like any failure."""

    def failed(why: str) -> None:
        if first_to_fail():
            write(config.output_dir, TimeoutError(why), dict)

    return Watchdog(config.output_dir, launched_rank(), config.hang_timeout, Peers().failed, failed, stop.request)


def write(folder: Path, error: BaseException, whereabouts: Callable[[], dict[str, Any]]) -> None:
    """status.json and failure.json of the process that failed first; never raises for a full disk."""
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rank": launched_rank(),
        "host": socket.gethostname(),
        "reason": redact(reason),
        "traceback": redact("".join(traceback.format_exception(error))).splitlines(),
        **environment(),
    }
    for more in (whereabouts, lambda: {"memory": memory()}):
        with contextlib.suppress(Exception):  # after an error of CUDA nothing on the device can be read
            facts |= more()
    with contextlib.suppress(OSError):  # a full disk may be what failed; the first error is the one to show
        write_status(folder, "failed", reason=reason, rank=launched_rank())
        write_json(folder / FAILURE, facts)


def is_out_of_memory(error: BaseException) -> bool:
    """On the GPU, or on the host as PyTorch's CPU allocator says it."""
    host = isinstance(error, RuntimeError) and "not enough memory" in str(error)
    return host or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def memory() -> dict[str, int]:
    """Bytes in use by this process."""
    pages = Path("/proc/self/status")
    lines = pages.read_text().splitlines() if pages.exists() else []
    kept = {"VmRSS": "resident", "VmHWM": "most_resident"}
    found = {
        kept[name]: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if name in kept
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu_free": free, "gpu_total": total, "gpu_most_allocated": torch.cuda.max_memory_allocated()}
    return found
