"""Where the time of training goes on one rank: how long its device waits for what."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Clock:
    """Seconds between two readings, in all and by what was waited for.

    On a GPU the marks are events in its stream: what the host does while the device computes is not waited for, and
    setting a mark waits for nothing. Reading does, and is meant for log points. Marks that the device has passed are
    dropped as new ones are set, so that nothing grows where nobody reads (other ranks than 0).
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._waited: dict[str, float] = defaultdict(float)
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._begun = time.perf_counter()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """What happens inside is waited for; `evaluation` is not counted at all."""
        begin = self._mark()
        try:
            yield
        finally:
            self._pending.append((what, begin, self._mark()))
            self._add_up(wait=False)

    def batches(self, iterator: Iterator[T]) -> Iterator[T]:
        """The same batches, each of them waited for (`data`)."""
        while True:
            with self.waiting("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading without evaluations, and those of them that were waited."""
        now = time.perf_counter()
        self._add_up(wait=True)
        waited, self._waited = self._waited, defaultdict(float)
        seconds, self._begun = now - self._begun - waited.pop("evaluation", 0.0), now
        return max(seconds, 1e-9), waited

    def _add_up(self, wait: bool) -> None:
        while self._pending and (wait or not self._on_gpu or self._pending[0][2].query()):
            what, begin, end = self._pending.popleft()
            self._waited[what] += self._seconds(begin, end)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        if not self._on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
