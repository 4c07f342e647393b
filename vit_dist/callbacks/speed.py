"""How fast training is and what it waits for, in every row of its log; one line of advice where something starves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_dist.callbacks.communication import ADVICE, DdpTimer
from vit_dist.clock import Clock

logger = logging.getLogger("vit_dist")

RATE, MFU = "images_per_second", "mfu"
WAIT_THRESHOLDS = {"data_wait": 0.2, "communication_wait": 0.25, "checkpoint_wait": 0.1}  # shares worth a word
KEYS = (RATE, MFU, *WAIT_THRESHOLDS)  # of a row; they differ from attempt to attempt
MIN_STEPS_FOR_HINT = 20  # steps of an attempt before a tuning hint is logged


@dataclass(frozen=True)
class Step:
    """What the share of the peak is reckoned from."""

    images: int  # in all, on all devices
    devices: int = 1
    flop: float | None = None  # of one image
    peak: float | None = None  # FLOP/s of one device


class Speed(TrainerCallback):
    """Rank 0, before all callbacks that show rows. To a row with a loss it adds, for the steps since the last one:

    `images_per_second`, evaluations not counted; `mfu`, the share of the matrix products' peak (PaLM, Chowdhery et al.
    2022, appendix B: operations of forward and backward, nothing counted twice), if the peak is known; `data_wait`,
    `checkpoint_wait` and, under DDP, `communication_wait`: shares of the time in which this rank's device
    waits. The first step, which compiles, is left out.
    """

    def __init__(self, clock: Clock, step: Step, loading: str, communication: DdpTimer | None = None) -> None:
        """`loading`: what to do if data comes too late."""
        self.clock, self.step, self.loading, self.communication = clock, step, loading, communication
        self._steps = self._since_start = 0
        self._seconds, self._waited = 0.0, dict.fromkeys(WAIT_THRESHOLDS, 0.0)  # since the start
        self._told: set[str] = set()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps += 1
        self._since_start += 1
        if self._since_start == 1:
            self._steps = 0
            self.clock.read()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" not in logs or not self._steps:
            return
        seconds, waited = self.clock.read()
        logs[RATE] = round(self._steps * self.step.images / seconds, 1)
        if self.step.flop and self.step.peak:
            logs[MFU] = round(logs[RATE] * self.step.flop / (self.step.peak * self.step.devices), 4)
        logs["data_wait"] = round(waited["data"] / seconds, 4)
        spent = max(0.0, seconds - waited["data"] - waited["checkpoint"])
        if self.communication and (sent := self.communication.waited(spent, self._steps)) is not None:
            logs["communication_wait"] = round(sent / seconds, 4)
        logs["checkpoint_wait"] = round(waited["checkpoint"] / seconds, 4)
        self._steps = 0
        self._seconds += seconds
        for key in WAIT_THRESHOLDS:
            self._waited[key] += logs.get(key, 0.0) * seconds
        if self._since_start >= MIN_STEPS_FOR_HINT:
            self._advise()

    def _advise(self) -> None:
        for key, most in WAIT_THRESHOLDS.items():
            if (share := self._waited[key] / self._seconds) > most and key not in self._told:
                self._told.add(key)
                logger.info(f"{share:.0%} of the time {self._advice(key)}")

    def _advice(self, key: str) -> str:
        if key == "data_wait":
            return f"goes into waiting for data: {self.loading}"
        if key == "communication_wait":
            return f"goes into communication: {ADVICE}"
        return "goes into checkpoints: save less often (--save_steps), or into a faster folder"


def data_advice(workers: int, cores: int) -> str:
    """What to do about batches that come too late, with this many data loading processes and cores."""
    if not workers:
        return (
            "--dataloader_num_workers 1 or more makes batches beside the steps where cores are idle; --image_source "
            "resident (images of one size), cache (large photos) or stream takes less of them"
        )
    if workers < cores - 1:
        return f"more --dataloader_num_workers than {workers}, there are {cores} cores"
    return "--image_source resident where all images have one size, cache where they are large, or more cores"
