"""The Trainer with what it needs to be exact: full global batches, committed checkpoints that it continues to the bit,
strict reloading, no hidden NaN."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DDPCommunicationHookType
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from vit_dist import stop
from vit_dist.batch import Batch, scaled_learning_rate
from vit_dist.callbacks.reproducible import LastStep, StepSeeds
from vit_dist.checkpoint import snapshot, store
from vit_dist.checkpoint.load import STATE, ask_for, hyperparameters, layout, load_model, load_optimizer
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import Config
from vit_dist.data.dataset import collate
from vit_dist.data.pipeline import ImageData
from vit_dist.data.sampler import GlobalBatchSampler
from vit_dist.distributed import Channel, any_rank, gather
from vit_dist.errors import UserError
from vit_dist.metrics import ClassificationMetrics
from vit_dist.model import reload_strictly, saved_weights


def build_arguments(config: Config, batch: Batch) -> TrainingArguments:
    """Make the `TrainingArguments`, which joins the process group. Call once.

    Without an accelerator the device is the CPU, said explicitly: left to itself, upstream would not see the
    launcher's other processes.
    """
    settings = dict(config.training)
    settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"] = (
        batch.per_device,
        batch.accumulation,
    )
    settings["learning_rate"] = scaled_learning_rate(config, batch)
    if settings.get("ddp_static_graph", False) is None:
        # The same graph at every step: DDP need not look for what is ready. It fails where a step begins without
        # synchronisation (torch 2.13, reducer.cpp, expect_autograd_hooks_).
        settings["ddp_static_graph"] = batch.accumulation == 1
    settings["use_cpu"] = settings["use_cpu"] or not torch.accelerator.is_available()
    if settings["dataloader_num_workers"] is None:
        settings["dataloader_num_workers"] = 0 if settings["use_cpu"] else _spare_cores()
    settings["dataloader_drop_last"] = False  # our sampler's business; upstream would drop evaluation images too
    settings["report_to"] = [name for name in reporters(config) if name != "wandb"] or "none"
    settings["save_total_limit"] = None  # our writer's business, which deletes after a commit and not before
    settings["disable_tqdm"] = True  # our own progress callback shows bars on a terminal
    settings["restore_callback_states_from_checkpoint"] = False
    if str(settings["lr_scheduler_type"]).endswith("reduce_lr_on_plateau"):
        settings["lr_scheduler_kwargs"] = _plateau_settings(settings)
    if "tensorboard" in settings["report_to"]:
        # upstream dropped `logging_dir` (after 5.10); this variable is what it reads now
        if "logging_dir" in settings:
            settings["logging_dir"] = str(config.logging_dir)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.logging_dir)
    try:
        return TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training arguments: {' '.join(str(error).split())}") from None


def _plateau_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's scheduler waits for a metric to fall; ours (accuracy) is to rise."""
    metric, greater = str(settings["metric_for_best_model"]), settings["greater_is_better"]
    rises = not metric.endswith("loss") if greater is None else greater
    try:
        given = json.loads(settings["lr_scheduler_kwargs"] or "{}")
    except ValueError:
        raise UserError(f"lr_scheduler_kwargs={settings['lr_scheduler_kwargs']}: not JSON") from None
    return {"mode": "max" if rises else "min", **given}


def reporters(config: Config) -> list[str]:
    """`--report_to` as a list; empty if it was not given (then Weights & Biases is used if the user is logged in).

    Raises UserError for one that there is not, or that is not installed.
    """
    asked = config.training["report_to"]
    names = [asked] if isinstance(asked, str) else list(asked or [])
    available = get_available_reporting_integrations()
    names = available if "all" in names else [name for name in names if name != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise UserError(f"report_to {name}: there is no such tracker; {hint}")
        if name not in available:
            raise UserError(f"report_to {name}: not installed; pip install {name}")
    return names


def _spare_cores() -> int:
    """Data loading workers for this process: its share of the cores it may use, less one for itself, at most 8."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, len(os.sched_getaffinity(0)) // processes - 1))


def build_batches(config: Config, args: TrainingArguments, num_images: int) -> GlobalBatchSampler:
    return GlobalBatchSampler(
        num_images,
        per_device_batch=args.per_device_train_batch_size,
        gradient_accumulation=args.gradient_accumulation_steps,
        world_size=args.world_size,
        rank=args.process_index,
        seed=config.data_seed,
        shuffle=str(config.training["train_sampling_strategy"]) == "random",
        drop_last=config.training["dataloader_drop_last"],
    )


def build_trainer(
    config: Config,
    args: TrainingArguments,
    data: ImageData,
    model: torch.nn.Module,
    metrics: ClassificationMetrics,
    writer: CheckpointWriter,
) -> ExactTrainer:
    batches = build_batches(config, args, len(data.train))
    make = functools.partial(
        ExactTrainer,
        batches=batches,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.processor,
        data_collator=collate,
        compute_metrics=metrics,
        callbacks=[StepSeeds(batches), LastStep(), *_early_stopping(config)],
        bf16_all_reduce=config.scaling.ddp_bf16_all_reduce,
        writer=writer,
    )
    try:
        trainer = make()
        # Made once in advance and dropped: what they do not take should be told before anything is written.
        trainer.create_optimizer_and_scheduler(1000)
    except (ValueError, TypeError, ImportError, AssertionError, OSError, KeyError) as error:
        raise UserError(f"training arguments: {' '.join(str(error).split())}") from error
    trainer.optimizer = trainer.lr_scheduler = None
    for upstream in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(upstream)
    return trainer


def _early_stopping(config: Config) -> list[TrainerCallback]:
    patience = config.run.early_stopping_patience
    return [] if patience is None else [EarlyStoppingCallback(patience, config.run.early_stopping_threshold)]


def require_metric(name: str | None, metrics: ClassificationMetrics) -> None:
    """Raise UserError now, not after the first epoch, if the metric that chooses the best model is not computed."""
    num_classes = len(metrics.classes)
    computed = metrics(EvalPrediction(np.zeros((1, num_classes), np.float32), np.zeros(1, np.int64)))
    if name is not None and name.removeprefix("eval_") not in computed:
        raise UserError(
            f"metric_for_best_model={name} is not computed; --metrics adds to {', '.join(sorted(computed))}"
        )


class ExactTrainer(Trainer):
    """`transformers.Trainer` whose numbers do not depend on the number of processes or on restarts."""

    def __init__(
        self,
        *,
        batches: GlobalBatchSampler,
        writer: CheckpointWriter,
        bf16_all_reduce: bool = False,
        **kwargs: Any,
    ) -> None:
        self.batches, self.writer = batches, writer
        self.facts: dict[str, Any] = {}  # for the manifests of checkpoints
        self._compute_metrics = kwargs.pop("compute_metrics")
        super().__init__(compute_metrics=self._metrics_of_every_image, **kwargs)
        self.add_callback(_Continue(self))
        self.add_callback(_StopWhenAsked(self))
        self.votes = Channel()
        self._host = snapshot.Host(self.args.device)
        self._to_evaluate: dict[str, bool] | None = None  # an evaluation that was interrupted, and what follows it
        # The loss is the mean over the micro-batch, and all micro-batches have the same size: upstream then divides
        # by the accumulation and needs no count of labels over all ranks, which costs a collective per step.
        self.model_accepts_loss_kwargs = False
        ddp: Any = self.accelerator.ddp_handler
        ddp.gradient_as_bucket_view = True  # saves a copy of the gradients, 4 bytes a parameter
        if bf16_all_reduce and self.args.device.type == "cpu":
            raise UserError("ddp_bf16_all_reduce: PyTorch has it for GPUs only; leave it out on CPUs")
        if bf16_all_reduce:
            ddp.comm_hook = DDPCommunicationHookType.BF16
        self._best_loaded = False
        self._last_index = torch.empty(0, dtype=torch.int64)  # the images of the last micro-batch
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []  # (index, loss) of each image since the last step

    @property
    def first_step(self) -> int:
        """The step at which this attempt began: 0, or its checkpoint's."""
        return self._initial_global_step

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by Accelerate: the sampler already yields this rank's share."""
        args = self.args
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=stop.shield_worker,
        )

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _shielded(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _shielded(super().get_test_dataloader(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """No batch after the last step (see `LastStep`)."""
        done = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        return super().get_batch_samples(epoch_iterator, 0 if done else num_batches, device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; the best model is loaded also where the run folder was moved since it was saved.

        Raises stop.Interrupted on every rank, once what was asked for is committed.
        """
        output = super().train(*args, **kwargs)
        self.writer.wait()
        if self.args.load_best_model_at_end and self.state.best_global_step and not self._best_loaded:
            self._load_best_model()
        return output

    def export(self, folder: str | Path) -> None:
        """Save the whole model and its image processor for `from_pretrained`, whatever the strategy (all ranks
        participate, rank 0 writes). Under DeepSpeed with bf16 the weights are bfloat16, as they were evaluated.
        """
        weights = self.accelerator.get_state_dict(self.deepspeed or self.model)
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    @property
    def _best_checkpoint(self) -> Path:
        return store.named(self.writer.folder, self.state.best_global_step or 0)

    def stop_if_asked(self) -> None:
        """Raise stop.Interrupted on every rank if any of them was asked to stop (all ranks participate)."""
        if self.votes.any(stop.asked() is not None):
            raise stop.Interrupted(self._who_asked())

    def whereabouts(self) -> dict[str, Any]:
        """What this rank was at, for the record of a failure."""
        return {"step": self.state.global_step, "last_images": [self._name(i) for i in self._last_index.tolist()]}

    def _name(self, index: int) -> str:
        return f"{index} ({self.train_dataset.ids[index]})"  # type: ignore[union-attr]

    def _who_asked(self) -> str:
        reasons = self.votes.gather(stop.asked())
        return next(f"{by} on rank {rank}" for rank, by in enumerate(reasons) if by)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the micro-batch, in float32."""
        inputs = dict(inputs)
        index, labels = inputs.pop("index"), inputs.pop("labels")
        self._last_index = index
        outputs = model(**inputs)
        losses = F.cross_entropy(
            outputs.logits.float(), labels, reduction="none", label_smoothing=self.args.label_smoothing_factor
        )
        self._losses.append((index, losses.detach()))
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._stop_unless_finite()  # now: DeepSpeed takes the optimizer step at the end of its backward
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self._stop_unless_finite()  # after the last micro-batch's backward, before the optimizer step
        return loss

    def _stop_unless_finite(self) -> None:
        """Raise UserError on every rank if any image's loss is NaN or infinite (all ranks participate)."""
        index, loss = (torch.cat(parts) for parts in zip(*self._losses, strict=True))
        self._losses.clear()
        bad = ~torch.isfinite(loss)
        if any_rank(bad.any()):
            mine = [self._name(i) for i in index[bad].tolist()]
            found = {rank: images for rank, images in enumerate(gather(mine)) if images}
            where = "; ".join(
                f"rank {rank}: images {', '.join(images[:8])}{' and more' if len(images) > 8 else ''}"
                for rank, images in found.items()
            )
            raise UserError(
                f"the loss is NaN or infinite at step {self.state.global_step + 1}, before the optimizer step; "
                f"{where}. Lower --learning_rate, look at these images, or use bf16 instead of fp16"
            )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Logits and (labels, index); no loss, which upstream would average with padding duplicates counted."""
        if self.is_in_train or self.writer.committed == self.state.global_step:  # else the last steps would be lost
            self.stop_if_asked()
        inputs = self._prepare_inputs(inputs)
        labels, index = inputs.pop("labels"), inputs.pop("index")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        return None, logits.float(), (labels, index)

    def _metrics_of_every_image(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics over the whole split; RuntimeError unless every image is there exactly once, in order."""
        labels, index = prediction.label_ids  # type: ignore[misc]
        if not np.array_equal(index, np.arange(len(index))):
            raise RuntimeError(f"evaluation did not see every image once: {len(index)} rows, {len(set(index))} images")
        bad = np.flatnonzero(~np.isfinite(prediction.predictions).all(axis=1))
        if len(bad):
            raise UserError(f"the model's outputs are NaN or infinite for {len(bad)} of {len(index)} evaluated images")
        return self._compute_metrics(EvalPrediction(predictions=prediction.predictions, label_ids=labels))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None counted: upstream's estimate takes each pixel for a token, and walks all parameters at every step."""
        return 0

    # Overridden private methods: upstream's write into the live folder, read the raw file and drop the tensors whose
    # names differ (see `reload_strictly`), and load what their own strategy wrote only. tests/test_reload.py notices
    # when upstream is mended.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Copy the state and let the writer commit it (all ranks participate). Once for a step."""
        if self.writer.latest == self.state.global_step or not self.writer.ready(self.state.best_global_step):
            return
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self._best_checkpoint)
        self.writer.submit(
            snapshot.Snapshot(
                step=self.state.global_step,
                best_step=self.state.best_global_step,
                facts={**self.facts, "layout": self._layout},
                parts=self._parts(),
            )
        )

    def _parts(self) -> list[snapshot.Part]:
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
            parts.append(snapshot.TorchFile("scheduler.pt", self._host.copy(self.lr_scheduler.state_dict())))  # type: ignore[union-attr]
            if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                parts.append(snapshot.TorchFile("scaler.pt", self._host.copy(scaler.state_dict())))
            state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            parts.append(snapshot.Bytes(STATE, state.encode()))
        return parts

    def _note_state(self) -> None:
        """Put what upstream keeps outside of `TrainerState` into it (all ranks participate)."""
        exportable = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        own = {
            "losses": self.votes.gather(float(self._tr_loss)),  # the sum since the last logged step, by rank
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

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; if it is interrupted, the step is committed first, with a note that it is to be evaluated."""
        try:
            return super()._evaluate(*args, **kwargs)
        except stop.Interrupted:
            self._to_evaluate = {"save": self.control.should_save}
            self._save_checkpoint(self.model_wrapped, None)
            self.writer.wait()
            raise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_best_model(self) -> None:
        self.writer.finish(self.state.best_global_step)
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
        optimizer = cast(Any, self.optimizer)
        asked = hyperparameters(optimizer)
        try:
            if self.is_deepspeed_enabled or layout(Path(checkpoint)) == self._layout == "plain":
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                load_optimizer(Path(checkpoint), self.accelerator.unwrap_model(self.model), optimizer.optimizer)
                state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
                self.lr_scheduler.load_state_dict(state)  # type: ignore[union-attr]
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{checkpoint}: optimizer or scheduler state holds what is no state; nothing of it was run. Set "
                "the folder aside to go on from an older one"
            ) from error
        ask_for(asked, optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing random is restored: every step seeds itself (`StepSeeds`), and a damaged file must not matter."""

    @property
    def _layout(self) -> str:
        """What this run's own checkpoints are, as `checkpoint.layout` has it."""
        if self.is_deepspeed_enabled:
            return "zero"
        if not self.is_fsdp_enabled:
            return "plain"
        return "fsdp_full" if "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type) else "fsdp_sharded"

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called between clipping and the optimizer step; the norm is the same on every rank."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 the scaler skips such a step by itself and lowers its scale.
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise UserError(
                f"the gradient is NaN or infinite at step {self.state.global_step + 1}, before the optimizer step, "
                "though the loss is finite. Lower --learning_rate or --max_grad_norm"
            )
        return norm


def _shielded(loader: Any) -> DataLoader:
    """A loader made by Accelerate, with processes that survive what stops a run (see `stop.shield_worker`)."""
    getattr(loader, "base_dataloader", loader).worker_init_fn = stop.shield_worker
    return loader


class _Continue(TrainerCallback):
    """Every rank, when upstream has set its counters and the model is ready: what it does not restore."""

    def __init__(self, trainer: ExactTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._restore_state()


class _StopWhenAsked(TrainerCallback):
    """Every rank, after each step: if any was asked to stop, save at this step, and leave when it is committed.

    A step that ends an epoch is saved at the end of the epoch, which follows at once: what is due there (a row or an
    evaluation, with `epoch` strategies) would not be made up for. Must come after upstream's flow callback. Cost: one
    small all-reduce between the CPUs for each step.
    """

    def __init__(self, trainer: ExactTrainer) -> None:
        self.trainer = trainer
        self.by: str | None = None
        self._due = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.by is None and self.trainer.votes.any(stop.asked() is not None):
            self.by = self.trainer._who_asked()
        due = control.should_save or self.by is not None
        ends_epoch = state.global_step % self.trainer.batches.steps_per_epoch == 0
        control.should_save, self._due = due and not ends_epoch, due and ends_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save, self._due = control.should_save or self._due or self.by is not None, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.by is not None:
            self.trainer.writer.wait()
            raise stop.Interrupted(self.by)
