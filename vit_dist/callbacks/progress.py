"""What a person sees while training: bars on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from vit_dist import console
from vit_dist.callbacks.speed import MFU, RATE

logger = logging.getLogger("vit_dist")

SECONDS_BETWEEN_LINES = 5.0
SHARES = {
    MFU: "of the peak",
    "data_wait": "waiting for data",
    "communication_wait": "for communication",
    "checkpoint_wait": "for checkpoints",
}


class _Bar(tqdm):
    """A bar that ends before the terminal does: `^C` behind it stays in its line, which `close` clears."""

    ROOM = 4

    @property
    def format_dict(self) -> dict[str, Any]:
        facts = super().format_dict
        return {**facts, "ncols": facts["ncols"] and max(1, facts["ncols"] - self.ROOM)}


class Progress(ProgressCallback):
    """Rank 0. On a terminal upstream's bars, with our lines above them."""

    def __init__(self, global_batch: int, terminal: bool | None = None) -> None:
        super().__init__()
        self.global_batch = global_batch
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._started = (0, 0.0)  # step and time at which this attempt began
        self._next_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = (state.global_step, time.monotonic())
        if self.terminal:
            bar: Any = _Bar(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
            self.training_bar = bar
            self.current_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.terminal:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.terminal:
            if self.prediction_bar is None:
                bar: Any = _Bar(total=len(eval_dataloader), leave=self.training_bar is None, dynamic_ncols=True)
                self.prediction_bar = bar
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.terminal:
            super().on_train_end(args, state, control, **kwargs)

    def close(self) -> None:
        """Take the bars off the terminal, for a run that ends before its training does."""
        bars: tuple[Any, ...] = (self.prediction_bar, self.training_bar)
        self.prediction_bar = self.training_bar = None
        for bar in bars:
            if bar is not None:
                bar.leave = False
                bar.close()
        if any(bar is not None for bar in bars):
            sys.stderr.write(console.CLEAR_LINE)
            sys.stderr.flush()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "eval_accuracy" in logs:
            self._say(state, f"evaluation: accuracy {logs['eval_accuracy']:.4f}, loss {logs['eval_loss']:.4f}")
        elif "loss" in logs and (time.monotonic() >= self._next_line or state.global_step == state.max_steps):
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self._say(state, self._training_line(state, logs))

    def _training_line(self, state: TrainerState, logs: dict[str, float]) -> str:
        step, start = self._started
        seconds = max(time.monotonic() - start, 1e-9)
        rate = (state.global_step - step) / seconds  # of all that happens, evaluations too
        speed = logs.get(RATE, rate * self.global_batch)
        shares = [f"{logs[key]:.0%} {name}" for key, name in SHARES.items() if logs.get(key, 0) >= 0.005]
        shown = f" ({', '.join(shares)})" if shares else ""
        left = timedelta(seconds=round((state.max_steps - state.global_step) / rate)) if rate else "?"
        return (
            f"loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}, "
            f"{speed:,.0f} images/s{shown}, {left} left"
        )

    def _say(self, state: TrainerState, what: str) -> None:
        line = f"step {state.global_step:,}/{state.max_steps:,} (epoch {state.epoch or 0:.2f}) {what}"
        if self.terminal and self.training_bar is not None:
            self.training_bar.write(console.wrapped(line, sys.stdout), file=sys.stdout)
        else:
            logger.info(line)
