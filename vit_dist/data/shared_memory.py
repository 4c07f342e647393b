"""Room for batches on their way from data loading processes, which PyTorch keeps in /dev/shm."""

from __future__ import annotations

import os
from dataclasses import dataclass

from transformers import TrainingArguments

FOLDER = "/dev/shm"
PREFETCH = 2  # batches of a process that wait, PyTorch's default
LITTLE = 4 << 20  # bytes free: less than a batch of most runs
MARGIN = 1 << 20  # bytes for everything else of a batch


@dataclass(frozen=True)
class Room:
    """What this process's data loading processes need, and what there is for them."""

    workers: int
    bytes_per_worker: int
    free: int  # this process's share

    @property
    def fitting(self) -> int:
        """As many processes as have room, at most those that were to be started."""
        return min(self.workers, self.free // self.bytes_per_worker)

    @property
    def needed(self) -> str:
        need, free = self.workers * self.bytes_per_worker, self.free
        return (
            f"{self.workers} data loading processes need {need / 1e6:,.0f} MB of shared memory for their batches, and "
            f"{FOLDER} has {free / 1e6:,.1f} MB for them"
        )


CURE = "enlarge it (docker run --shm-size 8g, a memory-backed volume in Kubernetes, mount -o remount,size=8g)"


def free_bytes() -> int | None:
    """Free bytes of /dev/shm; None where there is none."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def room(args: TrainingArguments, side: int, as_bytes: bool, processes: int) -> Room | None:
    """None if nothing has to be looked at.

    Args:
        args: batch sizes, data loading processes and prefetched batches.
        side: of an image in pixels.
        as_bytes: one byte a value; else four.
        processes: that share the host.
    """
    free = free_bytes()
    if not args.dataloader_num_workers or free is None:
        return None
    # An evaluation within an epoch has batches of its own while those of training wait.
    images = args.per_device_train_batch_size + args.per_device_eval_batch_size
    batches = images * 3 * side**2 * (1 if as_bytes else 4) + MARGIN
    prefetched = args.dataloader_prefetch_factor or PREFETCH
    return Room(args.dataloader_num_workers, prefetched * batches, free // processes)
