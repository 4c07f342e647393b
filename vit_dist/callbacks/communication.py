"""How long rank 0 waits for DDP's all-reduces: PyTorch's own timer."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

ADVICE = (
    "more images per step and device (--per_device_train_batch_size, --gradient_accumulation_steps), or "
    "--ddp_bf16_all_reduce on GPUs"
)


class DdpTimer:
    """Time of all-reduces that the backward does not cover, waiting for slower ranks included.

    PyTorch times the first ten steps and then one of a hundred (c10d/logger.cpp). The median of the last five different
    values counts: a single step says little, and the first ones are slow.
    """

    def __init__(self, wrapped: Callable[[], Any]) -> None:
        """`wrapped` gives the model as training wraps it."""
        self.wrapped = wrapped
        self._seen: deque[float] = deque(maxlen=5)  # seconds of a step

    def waited(self, seconds: float, steps: int) -> float | None:
        """Seconds of these, which so many steps took, that all-reduces alone took; None without DDP or a timed step."""
        if not isinstance(model := self.wrapped(), DistributedDataParallel):
            return None
        found: Any = model._get_ddp_logging_data()  # no public name has the times; tests/test_speed.py reads it
        if "backward_comm_time" not in found:
            return None
        spent = max(0, found["backward_comm_time"] - found["backward_compute_comm_overlap_time"]) / 1e9
        if not self._seen or self._seen[-1] != spent:
            self._seen.append(spent)
        return min(seconds, statistics.median(self._seen) * steps)
