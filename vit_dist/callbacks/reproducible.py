"""What makes a step depend on nothing but the run's seed and its number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_dist.data.sampler import GlobalBatchSampler


class StepSeeds(TrainerCallback):
    """Every rank: dropout is a function of (seed, step, rank), the images of an epoch one of (seed, epoch).

    Nothing then needs to be restored after a restart, and no two ranks share a dropout mask.
    """

    def __init__(self, batches: GlobalBatchSampler) -> None:
        self.batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches.set_epoch(state.global_step // self.batches.steps_per_epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        key = np.random.SeedSequence((args.seed, state.global_step, args.process_index))
        seed = int(key.generate_state(1, np.uint64)[0])
        if args.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would note a stack for every kind of GPU
        else:
            torch.manual_seed(seed)  # all devices


class LastStep(TrainerCallback):
    """Every rank: the last step closes the logging window, and a run that goes on after it trains no further.

    Upstream looks at `max_steps` only after a step, so that a run that ends within an epoch would get one more step at
    every restart; `ResumableTrainer.get_batch_samples` holds back the batch. The same after early stopping.
    """

    def __init__(self) -> None:
        self._done = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._done = control.should_training_stop = control.should_training_stop or state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._done:  # the attempt that trained the last step has logged, evaluated and saved it
            control.should_log = control.should_evaluate = control.should_save = False
