"""How long rank 0's device does nothing but communicate: DDP's own record, or a trace of a step now and then."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_dist.callbacks.profile import profiler

logger = logging.getLogger("vit_dist")

RARE = 200  # times as long as a trace took passes before the next: half a percent at most


class Communication(Protocol):
    advice: str  # what makes it less

    def waited(self, seconds: float, steps: int) -> float | None:
        """Seconds of these, which so many steps took, in which the device only communicates; None: not known."""


class RecordOfDdp:
    """What PyTorch measures in the first ten steps and then in one of a hundred: time of all-reduces that the backward
    does not cover, waiting for slower ranks included (c10d/logger.cpp). Of those that rows have seen the median of the
    last five counts: a single step says little, and the first ones are slow.
    """

    advice = (
        "more images per step and device (--per_device_train_batch_size, --gradient_accumulation_steps), or "
        "--ddp_bf16_all_reduce on GPUs"
    )

    def __init__(self, wrapped: Callable[[], Any]) -> None:
        """`wrapped` gives the model as training wraps it."""
        self.wrapped = wrapped
        self._seen: deque[float] = deque(maxlen=5)  # seconds of a step

    def waited(self, seconds: float, steps: int) -> float | None:
        if not isinstance(model := self.wrapped(), DistributedDataParallel):
            return None
        found: Any = model._get_ddp_logging_data()  # what there is of it in public; tests/test_speed.py reads it
        if "backward_comm_time" not in found:
            return None
        spent = max(0, found["backward_comm_time"] - found["backward_compute_comm_overlap_time"]) / 1e9
        if not self._seen or self._seen[-1] != spent:
            self._seen.append(spent)
        return min(seconds, statistics.median(self._seen) * steps)


class Traced(TrainerCallback):
    """For ZeRO and FSDP, which have no record: the third step of an attempt, and another whenever 200 times as long as
    the last one took has passed, under PyTorch's profiler. The other ranks wait for this one meanwhile.

    Not before step `first`, so that it does not meet `--profile`.
    """

    advice = (
        "more images at once on each device (--per_device_train_batch_size), or a strategy that sends less where the "
        "model fits (`vit-dist plan` compares them)"
    )

    def __init__(self, device: torch.device, first: int = 2) -> None:
        self.device, self.first = device, first
        self.share: float | None = None
        self._steps, self._begun, self._due = 0, 0.0, 0.0
        self._profiler: torch.profiler.profile | None = None

    def waited(self, seconds: float, steps: int) -> float | None:
        return None if self.share is None else self.share * seconds

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps >= self.first and time.monotonic() >= self._due:
            self._begun = time.monotonic()
            gpu = self.device.type == "cuda"
            self._settle()  # else kernels of the step before would be in the trace
            self._profiler = profiler(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU])
            self._guarded(self._profiler.start)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        if self._profiler is not None:
            self._settle()
            self._guarded(self._read)
            self._profiler = None
            now = time.monotonic()
            self._due = max(self._due, now + RARE * (now - self._begun))

    def _read(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        with tempfile.TemporaryDirectory(prefix="vit_dist-trace-") as folder:
            path = Path(folder) / "step.json"
            self._profiler.export_chrome_trace(str(path))
            self.share = alone(json.loads(path.read_bytes())["traceEvents"], self.device.type == "cuda")

    def _guarded(self, act: Callable[[], object]) -> None:
        """A trace that cannot be made or kept costs the figure, not the run."""
        try:
            act()
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning(f"how long communication is waited for is not measured: {error}")
            self._profiler, self._due = None, float("inf")

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def alone(events: Iterable[dict[str, Any]], gpu: bool) -> float | None:
    """Share of a Chrome trace's time in which collectives run and nothing is computed; None if it has no collective.

    On a GPU its kernels count, NCCL's against all others, copies included. Else gloo's operations against PyTorch's of
    the threads that are not gloo's, less what of these is a collective called within them. Waiting for slower ranks
    counts: collectives begin when they are asked for. Raises ValueError if a GPU's kernels are missing.
    """
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    called: list[dict[str, Any]] = []
    if gpu:
        kernels = [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        if not kernels:
            raise ValueError("the trace has none of the GPU's kernels")
        sending = [event for event in kernels if event["name"].startswith("nccl")]
        computing = [event for event in kernels if not event["name"].startswith("nccl")]
    else:
        sending = [event for event in timed if event["name"].startswith("gloo:")]
        threads = {event["tid"] for event in sending}
        own = [event for event in timed if event["tid"] not in threads]
        computing = [event for event in own if event["name"].startswith("aten::")]
        called = [event for event in own if event["name"].startswith(("c10d::", "_c10d_functional::"))]
    if not sending:
        return None
    edges = []  # when, of which kind, whether one more or one less of it is under way
    for kind, those in enumerate((sending, computing, called)):
        edges += [(event["ts"], kind, 1) for event in those]
        edges += [(event["ts"] + event["dur"], kind, -1) for event in those]
    edges.sort()
    waited, before, active = 0.0, edges[0][0], [0, 0, 0]
    for now, kind, change in edges:
        if active[0] and (not active[1] or active[2]):
            waited += now - before
        before = now
        active[kind] += change
    return waited / (edges[-1][0] - edges[0][0])
