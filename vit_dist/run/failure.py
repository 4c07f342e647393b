"""How a run that does not finish is remembered: status.json says that it ended, failure.json why."""

from __future__ import annotations

import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vit_dist import stop
from vit_dist.callbacks.watchdog import Watchdog
from vit_dist.config import Config
from vit_dist.data import shared_memory
from vit_dist.distributed import Peers, first_to_fail, is_lost_connection, launched_rank
from vit_dist.environment import job
from vit_dist.errors import LostProcess, UserError
from vit_dist.redact import redact
from vit_dist.run.attempts import Attempt
from vit_dist.run.run_folder import FAILURE, environment, write_json, write_status

_recorded: set[tuple[Path, int]] = set()  # failures that this process has written, by folder and attempt
OUT_OF_MEMORY = (
    "out of memory: lower --per_device_train_batch_size or make it `auto` (with --global_batch_size the steps stay the "
    "same), try --bf16 or --activation_checkpointing, or shard the model (--strategy zero2 or fsdp2); "
    "`vit-dist plan` shows what fits"
)


@contextlib.contextmanager
def interruption_recorded(folder: Path, attempt: Attempt) -> Iterator[None]:
    """Any rank, before training: if it is asked to stop, status.json says so. Later all ranks stop together.

    A launcher also asks the others to stop when a process is gone. One that was asked itself says so before it ends, so
    the first to say anything, who misses another process, was asked because that one was killed.
    """
    try:
        yield
    except stop.Interrupted as asked:
        if asked.agreed:
            raise
        lost = _describe_lost(attempt.processes, patience=0.0, known=True)  # before the others can know that we end
        if not first_to_fail():
            raise
        if lost:
            if not attempt.replaces:
                write(folder, asked, attempt, dict, lost)
            raise LostProcess(lost) from asked
        if not attempt.replaces:
            by = f"{asked} on rank {launched_rank()}"
            with contextlib.suppress(OSError):
                write_status(folder, "preempted", attempt=attempt.number, step=attempt.begins_at, by=by)
        raise
    except Exception as error:
        if isinstance(error, LostProcess) or not is_lost_connection(error):
            raise
        lost = _describe_lost(attempt.processes)
        if first_to_fail() and not attempt.replaces:
            write(folder, error, attempt, dict, lost)
        raise LostProcess(lost) from error


@contextlib.contextmanager
def recorded(
    folder: Path,
    attempt: Attempt,
    failure_context: Callable[[], dict[str, Any]],
) -> Iterator[None]:
    """Any rank: if the block fails here first, status.json and failure.json say so.

    `failure_context` says what this rank was at, `committed` being the step that the run goes on from. A rank that was
    killed cannot write anything itself; another one does.
    """
    try:
        yield
    except stop.Interrupted:
        raise
    except BaseException as error:
        lost = is_lost_connection(error) and _describe_lost(attempt.processes)
        if first_to_fail():
            write(folder, error, attempt, failure_context, lost or None)
        if lost:
            raise LostProcess(lost) from error
        if is_out_of_shared_memory(error):
            raise UserError(
                f"a data loading process ended, and {shared_memory.FOLDER} has {shared_memory.free_bytes() or 0:,} "
                f"bytes free: {shared_memory.CURE}, or lower --dataloader_num_workers. Rank {launched_rank()}"
            ) from error
        if is_out_of_memory(error):
            numbers = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory().items())
            raise UserError(f"{OUT_OF_MEMORY}. Rank {launched_rank()}: {numbers}") from error
        raise


def watchdog(config: Config, attempt: Attempt) -> Watchdog:
    """See there; a hang is recorded like any failure."""

    def failed(why: str) -> None:
        if first_to_fail():
            write(config.output_dir, TimeoutError(why), attempt, dict)

    return Watchdog(config.output_dir, launched_rank(), config.hang_timeout, Peers().failed, failed, stop.request)


def write(
    folder: Path,
    error: BaseException,
    attempt: Attempt,
    failure_context: Callable[[], dict[str, Any]],
    lost: str | None = None,
) -> None:
    """status.json and failure.json of the process that failed first; never raises for a full disk.

    `lost`: it is another process that failed, and this one noticed. Only the first failure of an attempt counts: while
    the watchdog records a hang, the main thread may lose a connection because of it.
    """
    if (folder, attempt.number) in _recorded:
        return
    _recorded.add((folder, attempt.number))
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "attempt": attempt.number,
        "rank": launched_rank(),
        "host": socket.gethostname(),
        "job": job(),
        "reason": redact(lost or reason),
        "traceback": redact("".join(traceback.format_exception(error))).splitlines(),
        **environment(),
    }
    for more in (failure_context, lambda: {"memory": memory()}):
        with contextlib.suppress(Exception):  # after an error of CUDA nothing on the device can be read
            facts |= more()
    if lost:
        facts |= {"rank": None, "noticed_by_rank": launched_rank(), "last_images": []}
    with contextlib.suppress(OSError):  # a full disk may be what failed; the first error is the one to show
        step = facts.get("committed", attempt.begins_at)
        write_status(folder, "failed", attempt=attempt.number, step=step, reason=lost or reason, rank=facts["rank"])
        write_json(folder / FAILURE, facts)


def forget(folder: Path) -> None:
    """A run that is complete has not failed."""
    (folder / FAILURE).unlink(missing_ok=True)


def _describe_lost(processes: Sequence[tuple[str, int]], patience: float = 2.0, known: bool = False) -> str:
    """Which of the job's processes on this host are gone; a dead one may be seen a moment later than its connection.

    Empty if none is, and only those that are `known` to be gone count.
    """
    host, deadline = socket.gethostname(), time.monotonic() + patience
    while True:
        dead = [(rank, pid) for rank, (at, pid) in enumerate(processes) if at == host and _gone(pid)]
        gone = [f"rank {rank} (process {pid} on {host})" for rank, pid in dead]
        if gone or time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    if known and not gone:
        return ""
    who = " and ".join(gone) or "a process of another host"
    return f"{who} is gone: killed from outside, or out of memory"


def _gone(pid: int) -> bool:
    """Ended, waited for by its parent or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """On the GPU, or on the host as PyTorch's CPU allocator says it."""
    host = isinstance(error, RuntimeError) and "not enough memory" in str(error)
    return host or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def is_out_of_shared_memory(error: BaseException) -> bool:
    """A data loading process is gone, and it was PyTorch's batches that had no room."""
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
        return False
    free = shared_memory.free_bytes()
    return "Bus error" in str(error) or (free is not None and free < shared_memory.LITTLE)


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
