"""A Chrome trace of a few steps."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_dist.checkpoint.store import make_folder
from vit_dist.errors import UserError
from vit_dist.files import refuse_links

logger = logging.getLogger("vit_dist")

WARM_UP = 5  # steps: compilation, allocations


def profiler(**kwargs: Any) -> torch.profiler.profile:
    """PyTorch's, without the lines that it writes to the screen when it starts and stops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return torch.profiler.profile(**kwargs)


class Profile(TrainerCallback):
    """Every rank: `steps` steps of this attempt, from the sixth on, in `<folder>/rank<N>.json.gz`."""

    def __init__(self, folder: Path, steps: int, rank: int) -> None:
        self.path, self.steps = folder / f"rank{rank}.json.gz", steps
        self._done = 0
        self._profiler: torch.profiler.profile | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (left := state.max_steps - state.global_step) < WARM_UP + self.steps:
            there = f"of {left - WARM_UP} steps only" if left > WARM_UP else "not made"
            logger.warning(f"the profile is {there}: it begins after {WARM_UP} steps, and {left} are left to train")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._done == WARM_UP and self._profiler is None:
            self._profiler = profiler()
            self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._done += 1
        if self._done == WARM_UP + self.steps:
            self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._profiler is not None:
            self._write()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        try:
            make_folder(self.path.parent)
            refuse_links([self.path.parent, self.path])
            profiler.export_chrome_trace(str(self.path))
            logger.info(f"profile of {min(self._done - WARM_UP, self.steps)} steps: {self.path} (ui.perfetto.dev)")
        except (OSError, RuntimeError, UserError) as error:
            logger.warning(f"the profile cannot be written to {self.path} ({error}); training goes on")
