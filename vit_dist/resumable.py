"""A Trainer that can be stopped at any step and goes on to the bit: it saves snapshots, restores all of what a step
needs, and leaves when any rank was asked to."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from vit_dist import stop
from vit_dist.checkpoint import snapshot, store
from vit_dist.checkpoint.load import (
    STATE,
    apply_hyperparameters,
    forbid_pickled_code,
    hyperparameters,
    layout,
    load_model,
    load_optimizer,
)
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.clock import Clock
from vit_dist.distributed import GlooGroup
from vit_dist.errors import UserError, first_line
from vit_dist.model import reload_strictly, saved_weights


class ResumableTrainer(Trainer):
    """`transformers.Trainer` with committed checkpoints, from which it continues as if nothing had happened.

    Randomness is not restored: it must be a function of seed and step (`callbacks.reproducible`).
    """

    def __init__(self, *, writer: CheckpointWriter, steps_per_epoch: int, **kwargs: Any) -> None:
        self.writer, self.steps_per_epoch = writer, steps_per_epoch
        self.facts: dict[str, Any] = {}  # for the manifests of checkpoints
        self.first_step = 0  # at which this attempt began: 0, or its checkpoint's
        super().__init__(**kwargs)
        self.clock = Clock(self.args.device)
        self.add_callback(_Continue(self))
        self.add_callback(_StopWhenAsked(self))
        self.cpu_group = GlooGroup()
        self._host = snapshot.PinnedStager(self.args.device)
        self._to_evaluate: dict[str, bool] | None = None  # an evaluation that was interrupted, and what follows it
        self._best_loaded = False
        self._save_at_epoch_end = self._in_epoch = False  # see `_StopWhenAsked`

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """No batch after the last step (see `LastStep`)."""
        done = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        batches = self.clock.batches(epoch_iterator)  # here: Accelerate replaces the loader of an epoch that is resumed
        return super().get_batch_samples(batches, 0 if done else num_batches, device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; the best model is loaded also where the run folder was moved since it was saved.

        Raises stop.Interrupted on every rank, once what was asked for is committed.
        """
        forbid_pickled_code()
        try:
            output = super().train(*args, **kwargs)
            self.writer.wait()
            if self._best_step and not self._best_loaded:
                self._load_best_model()
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{self.writer.folder}: a checkpoint holds something other than weights and state, which was not "
                f"loaded ({first_line(error)}). Move that checkpoint away to go on from an older one"
            ) from error
        return output

    @property
    def _best_step(self) -> int | None:
        """Of the model that is loaded at the end, as far as is known; None if the last one is kept."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    @property
    def _best_checkpoint(self) -> Path:
        return store.named(self.writer.folder, self._best_step or 0)

    @property
    def ends_epoch(self) -> bool:
        """Whether the step at hand is the last of its epoch, and the end of the epoch is still to come."""
        return self._in_epoch and self.state.global_step % self.steps_per_epoch == 0

    def stop_if_asked(self) -> None:
        """Raise stop.Interrupted on every rank if any of them was asked to stop (all ranks participate)."""
        if self.cpu_group.any(stop.asked() is not None):
            raise stop.Interrupted(self._who_asked())

    def _who_asked(self) -> str:
        reasons = self.cpu_group.gather(stop.asked())
        return next(f"{by} on rank {rank}" for rank, by in enumerate(reasons) if by)

    # Overridden private methods: upstream's write into the live folder, read the raw file and drop the tensors whose
    # names differ (see `reload_strictly`), and load what their own strategy wrote only. tests/test_reload.py notices
    # when upstream is mended.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the state and let the writer commit it (all ranks participate). Once for a step."""
        if self.writer.latest == self.state.global_step:
            return
        with self.clock.waiting("checkpoint"):
            if not self.writer.ready(self._best_step):
                return
            if self._best_step:
                self.state.best_model_checkpoint = str(self._best_checkpoint)
            self.writer.submit(
                snapshot.Snapshot(
                    step=self.state.global_step,
                    best_step=self._best_step,
                    facts={**self.facts, "layout": self._layout, "optimizer_groups": self._optimizer_groups()},
                    parts=self._parts(),
                )
            )

    def _parts(self) -> list[snapshot.CheckpointFile]:
        """This rank's share of the state (all ranks participate)."""
        rank, parts = self.args.process_index, []
        model, optimizer = self.accelerator.unwrap_model(self.model), self.optimizer
        if self.is_deepspeed_enabled:
            parts = snapshot.zero(self._host, self.deepspeed)
        elif self.is_fsdp_enabled:
            parts = snapshot.fsdp(self._host, model, optimizer.optimizer, self._layout == "fsdp_full", rank)  # type: ignore[union-attr]
        elif rank == 0:
            parts = snapshot.plain(self._host, model, self.processing_class, optimizer)  # type: ignore[arg-type]
        self._note_state()
        if rank == 0:
            # Without the stager: these have no tensors, and PyTorch 2.11's fails on what a scheduler keeps.
            parts.append(snapshot.TorchFile("scheduler.pt", copy.deepcopy(self.lr_scheduler.state_dict())))  # type: ignore[union-attr]
            if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                parts.append(snapshot.TorchFile("scaler.pt", copy.deepcopy(scaler.state_dict())))
            state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            parts.append(snapshot.Bytes(STATE, state.encode()))
        return parts

    def _note_state(self) -> None:
        """Put what upstream keeps outside of `TrainerState` into it (all ranks participate)."""
        exportable = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        own = {
            "losses": self.cpu_group.gather(float(self._tr_loss)),  # the sum since the last logged step, by rank
            "logged": self._globalstep_last_logged,
            "to_evaluate": self._to_evaluate,
        }
        states: Any = {type(one).__name__: one.state() for one in exportable}
        states[type(self).__name__] = {"args": {}, "attributes": own}
        self.state.stateful_callbacks = states

    def _restore_state(self) -> None:
        """Undo `_note_state` on a resumed run, and evaluate if that is what was interrupted (all ranks participate)."""
        callbacks: Any = self.state.stateful_callbacks
        stored = {name: entry["attributes"] for name, entry in callbacks.items()}
        own = stored.pop(type(self).__name__, None)
        if own is None:  # a new run
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                for name, value in stored.get(type(callback).__name__, {}).items():
                    setattr(callback, name, value)
        losses = own["losses"]
        same = len(losses) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if same else sum(losses) / len(losses)
        self._globalstep_last_logged = own["logged"]
        self.state.compute_steps(self.args, self.state.max_steps)  # the intervals: a change of them may be allowed
        early = (one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback))
        self.control.should_training_stop = any(
            one.early_stopping_patience_counter >= one.early_stopping_patience for one in early
        )
        if own["to_evaluate"] is not None:
            self.control.should_evaluate, self.control.should_save = True, own["to_evaluate"]["save"]
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, 0, None, time.time())

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As upstream; a new best model is saved also where no save is due, or it could not be loaded at the end."""
        found = super()._determine_best_metric(*args, **kwargs)
        if found and self.args.load_best_model_at_end:
            self._save_at_epoch_end = self._save_at_epoch_end or self.ends_epoch
            self.control.should_save = self.control.should_save or not self.ends_epoch
        return found

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; if it is interrupted, the step is committed first, with a note that it is to be evaluated."""
        try:
            with self.clock.waiting("evaluation"):
                return super()._evaluate(*args, **kwargs)
        except stop.Interrupted:
            self._to_evaluate = {"save": self.control.should_save}
            self._save_checkpoint(self.model_wrapped, None)
            self.writer.wait()
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_best_model(self) -> None:
        self.writer.finish(self._best_step)
        self.state.best_model_checkpoint = str(self._best_checkpoint)
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_weights(self._best_checkpoint, self.model)
        self._best_loaded = True

    def _load_weights(self, checkpoint: Path, model: Any) -> None:
        """Single, DDP, FSDP (all ranks participate). DeepSpeed loads by its engine."""
        source, kind = self.accelerator.unwrap_model(model), layout(checkpoint)
        if kind == self._layout == "plain":
            reload_strictly(source, checkpoint)
        else:
            load_model(checkpoint, source, saved_weights(source, checkpoint) if kind == "plain" else None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved, now = store.read_manifest(Path(checkpoint)).get("optimizer_groups"), self._optimizer_groups()
        if saved != now:
            # By number, PyTorch would give each parameter another one's moments.
            raise UserError(
                f"{checkpoint} has its parameters in other groups of the optimizer ({saved or 'not recorded'}, here "
                f"{now}): another version of vit_dist wrote it, which decayed other weights. Go on with that version, "
                "or begin a new run"
            )
        optimizer = cast(Any, self.optimizer)
        asked = hyperparameters(optimizer)
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            if layout(Path(checkpoint)) == self._layout == "plain":
                # Upstream reads it to the device, which in 5.17 fails on `cpu:0`; it gets there by itself.
                whole = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
                optimizer.load_state_dict(whole)
            else:
                load_optimizer(Path(checkpoint), self.accelerator.unwrap_model(self.model), optimizer.optimizer)
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            self.lr_scheduler.load_state_dict(state)  # type: ignore[union-attr]
        apply_hyperparameters(asked, optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing random is restored: every step seeds itself (`StepSeeds`), and a damaged file must not matter."""

    def _optimizer_groups(self) -> dict[str, int]:
        """How many of the trained tensors the optimizer decays, and how many it does not."""
        model = self.accelerator.unwrap_model(self.model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        decayed = len(trained.intersection(self.get_decay_parameter_names(model)))
        return {"decayed": decayed, "not_decayed": len(trained) - decayed}

    @property
    def _layout(self) -> str:
        """What this run's own checkpoints are, as `checkpoint.layout` has it."""
        if self.is_deepspeed_enabled:
            return "zero"
        if not self.is_fsdp_enabled:
            return "plain"
        return "fsdp_full" if "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type) else "fsdp_sharded"


class _Continue(TrainerCallback):
    """Every rank, when upstream has set its counters and the model is ready: what it does not restore."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.first_step = state.global_step
        self.trainer._restore_state()


class _StopWhenAsked(TrainerCallback):
    """Every rank, after each step: if any was asked to stop, save at this step, and leave when it is committed.

    A step that ends an epoch is saved at the end of the epoch, which follows at once: what is due there (a row or an
    evaluation, with `epoch` strategies) would not be made up for. Must come after upstream's flow callback. Cost: one
    small all-reduce between the CPUs for each step.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.by: str | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._in_epoch = True
        if self.by is None and trainer.cpu_group.any(stop.asked() is not None):
            self.by = trainer._who_asked()
        due = control.should_save or self.by is not None
        control.should_save, trainer._save_at_epoch_end = due and not trainer.ends_epoch, due and trainer.ends_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        control.should_save = control.should_save or trainer._save_at_epoch_end or self.by is not None
        trainer._in_epoch = trainer._save_at_epoch_end = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.by is not None:
            self.trainer.writer.wait()
            raise stop.Interrupted(self.by)
