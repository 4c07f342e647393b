"""The Trainer with what it needs to be exact: full global batches, strict reloading, no hidden NaN."""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DDPCommunicationHookType
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vit_dist.batch import scaled_learning_rate, split_batch
from vit_dist.callbacks.reproducible import LogBeforeSave, StepSeeds, StopAtEnd
from vit_dist.checkpoint import layout, load_foreign_model, load_foreign_optimizer
from vit_dist.config import Config
from vit_dist.data.dataset import collate
from vit_dist.data.pipeline import ImageData
from vit_dist.data.sampler import GlobalBatchSampler
from vit_dist.distributed import any_rank, gather, launched_world_size
from vit_dist.errors import UserError
from vit_dist.metrics import ClassificationMetrics
from vit_dist.model import reload_strictly, saved_weights


def build_arguments(config: Config) -> TrainingArguments:
    """Make the `TrainingArguments`, which joins the process group. Call once.

    Without an accelerator the device is the CPU, said explicitly: left to itself, upstream would not see the
    launcher's other processes.
    """
    settings = dict(config.training)
    batch = split_batch(config, launched_world_size())
    settings["gradient_accumulation_steps"] = batch.accumulation
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
        callbacks=[StepSeeds(batches), LogBeforeSave(), StopAtEnd()],
        bf16_all_reduce=config.scaling.ddp_bf16_all_reduce,
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

    def __init__(self, *, batches: GlobalBatchSampler, bf16_all_reduce: bool = False, **kwargs: Any) -> None:
        self.batches = batches
        self._compute_metrics = kwargs.pop("compute_metrics")
        super().__init__(compute_metrics=self._metrics_of_every_image, **kwargs)
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
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """No batch after the last step (see `StopAtEnd`)."""
        done = self.state.global_step >= self.state.max_steps
        return super().get_batch_samples(epoch_iterator, 0 if done else num_batches, device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; the best model is loaded also where the run folder was moved since it was saved."""
        output = super().train(*args, **kwargs)
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
        return Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the micro-batch, in float32."""
        inputs = dict(inputs)
        index, labels = inputs.pop("index"), inputs.pop("labels")
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
            ids = self.train_dataset.ids  # type: ignore[union-attr]
            mine = [f"{i} ({ids[i]})" for i in index[bad].tolist()]
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

    # Overridden private methods: upstream's read the raw file and drop the tensors whose names differ (see
    # `reload_strictly`), and load what their own strategy wrote only. tests/test_reload.py notices when upstream is
    # mended.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(Path(resume_from_checkpoint), model or self.model)

    def _load_best_model(self) -> None:
        self.state.best_model_checkpoint = str(self._best_checkpoint)
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_weights(self._best_checkpoint, self.model)
        self._best_loaded = True

    def _load_weights(self, checkpoint: Path, model: Any) -> None:
        """Single, DDP, FSDP (all ranks participate). DeepSpeed loads by its engine."""
        if layout(checkpoint) != self._layout:
            source = self.accelerator.unwrap_model(model)
            whole = saved_weights(source, checkpoint) if layout(checkpoint) == "plain" else None
            load_foreign_model(checkpoint, source, whole)
        elif self.is_fsdp_enabled:
            super()._load_from_checkpoint(str(checkpoint), model)
        else:
            reload_strictly(self.accelerator.unwrap_model(model), checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or layout(Path(checkpoint)) == self._layout:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        load_foreign_optimizer(Path(checkpoint), self.accelerator.unwrap_model(self.model), optimizer.optimizer)
        state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(state)  # type: ignore[union-attr]

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
