"""The Trainer with what it needs to be exact: full global batches, a loss and metrics that count every image once, no
hidden NaN. What makes it resumable is in `resumable`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DDPCommunicationHookType
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from vit_dist import stop
from vit_dist.callbacks.reproducible import LastStep, StepSeeds
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import Config
from vit_dist.data.dataset import ImageDataset, collate
from vit_dist.data.pipeline import ImageData
from vit_dist.data.pixels import Pixels
from vit_dist.data.sampler import GlobalBatchSampler
from vit_dist.distributed import any_rank, gather
from vit_dist.errors import UserError
from vit_dist.metrics import ClassificationMetrics
from vit_dist.metrics.outcomes import SampleMetrics, sample_metrics, sample_rows
from vit_dist.resumable import ResumableTrainer
from vit_dist.schedule import total_steps, warmup_steps
from vit_dist.weight_decay import decayed_names


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
    pixels: Pixels | None = None,
    static_shapes: bool = False,
) -> ExactTrainer:
    batches = build_batches(config, args, len(data.train))
    if str(config.training["optim"]).rpartition(".")[2].lower().startswith("schedule_free"):
        # They warm up by themselves, and upstream hands them a share of all steps as if it were a number of steps.
        args.warmup_steps = warmup_steps(config, total_steps(config, batches.steps_per_epoch))
    make = functools.partial(
        ExactTrainer,
        batches=batches,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.processor,
        data_collator=collate,
        metrics=metrics,
        callbacks=[StepSeeds(batches), LastStep(), *_early_stopping(config)],
        bf16_all_reduce=config.scaling.ddp_bf16_all_reduce,
        writer=writer,
        pixels=pixels,
        static_shapes=static_shapes,
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
    computed = metrics(sample_metrics(torch.zeros(1, len(metrics.classes)), torch.zeros(1, dtype=torch.int64)))
    if name is not None and name.removeprefix("eval_") not in computed:
        raise UserError(
            f"metric_for_best_model={name} is not computed; --metrics adds to {', '.join(sorted(computed))}"
        )


class ExactTrainer(ResumableTrainer):
    """`transformers.Trainer` whose numbers do not depend on the number of processes or on restarts.

    `pixels` makes the model's input of batches of bytes, see `data.resident`. `static_shapes`: the model is compiled
    for full batches, so the last batch of an evaluation is filled up.
    """

    DEFERRED_CHECK_DEVICES = ("cuda",)  # kinds of devices that the host does not wait for at each step

    def __init__(
        self,
        *,
        batches: GlobalBatchSampler,
        metrics: ClassificationMetrics,
        bf16_all_reduce: bool = False,
        pixels: Pixels | None = None,
        static_shapes: bool = False,
        **kwargs: Any,
    ) -> None:
        self.batches, self.metrics, self.pixels, self.static_shapes = batches, metrics, pixels, static_shapes
        super().__init__(steps_per_epoch=batches.steps_per_epoch, **kwargs)
        # The loss is the mean over the micro-batch, and all micro-batches have the same size: upstream then divides
        # by the accumulation and needs no count of labels over all ranks, which costs a collective per step.
        self.model_accepts_loss_kwargs = False
        ddp: Any = self.accelerator.ddp_handler
        ddp.gradient_as_bucket_view = True  # saves a copy of the gradients, 4 bytes a parameter
        if bf16_all_reduce and self.args.device.type == "cpu":
            raise UserError("ddp_bf16_all_reduce: PyTorch has it for GPUs only; leave it out on CPUs")
        if bf16_all_reduce:
            ddp.comm_hook = DDPCommunicationHookType.BF16
        self._last_index = torch.empty(0, dtype=torch.int64)  # the images of the last micro-batch
        self._copies: torch.cuda.Stream | None = None
        self._outcomes: list[torch.Tensor] = []  # of an evaluation at hand, see `evaluation_loop`
        self._logits: list[torch.Tensor] | None = None
        # Since the last look at them: (step, index, loss) of each image, (step, norm) of each gradient.
        self._losses: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._norms: list[tuple[int, torch.Tensor]] = []
        # A look makes the host wait for the device. On GPUs it is taken where there is something to log, evaluate or
        # save: what is not finite is in no checkpoint, and up to `logging_steps` steps are lost.
        self.defers_finite_check = (
            self.args.device.type in self.DEFERRED_CHECK_DEVICES and not self.is_deepspeed_enabled
        )
        if self.defers_finite_check:
            self.add_callback(FiniteCheckCallback(self))

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Upstream's also decays tokens, position embeddings and layer scales."""
        return decayed_names(model)

    def get_train_dataloader(self) -> DataLoader:
        """Not prepared by Accelerate: the sampler already yields this rank's share."""
        args = self.args
        return _TrainLoader(
            self.writer.wait,
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=stop.ignore_signals,
        )

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        if self.args.dataloader_num_workers and not getattr(self, "_eval_dataloaders", None):
            self.writer.wait()  # see `_TrainLoader`
        return _shielded(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _shielded(super().get_test_dataloader(*args, **kwargs))

    def export(self, folder: str | Path) -> None:
        """Save the whole model and its image processor for `from_pretrained`, whatever the strategy (all ranks
        participate, rank 0 writes). Under DeepSpeed with bf16 the weights are bfloat16, as they were evaluated.
        """
        weights = self.accelerator.get_state_dict(self.deepspeed or self.model)
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=weights)
            self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]

    def model_input(self, dataset: ImageDataset, count: int) -> torch.Tensor:
        """What the model is given for the first images of a split: float32 (count, 3, side, side), on the CPU."""
        batch = dataset.__getitems__(list(range(count)))
        values = batch["pixel_values"].to(self.args.device)
        if self.pixels is not None:
            boxes, mirrored = batch.get("boxes"), batch.get("mirrored")
            values = self.pixels.eager(values, boxes, mirrored)
        return values.cpu()

    def failure_context(self) -> dict[str, Any]:
        """What this rank was at, for the record of a failure."""
        return {
            "step": self.state.global_step,
            "committed": self.writer.committed or 0,
            "last_images": [self._name(i) for i in self._last_index.tolist()],
        }

    def _name(self, index: int) -> str:
        return f"{index} ({self.train_dataset.ids[index]})"  # type: ignore[union-attr]

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
        self._losses.append((self.state.global_step + 1, index, losses.detach()))
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._check_losses()  # now: DeepSpeed takes the optimizer step at the end of its backward
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled and not self.defers_finite_check:
            self._check_losses()  # after the last micro-batch's backward, before the optimizer step
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, bytes made into the model's input. The host waits for neither.

        Overridden private method: upstream waits for each copy, and has no place of its own for work on the device.
        tests/test_sources.py notices when it is no longer called.
        """
        inputs = self._copied(inputs)
        boxes, mirrored = inputs.pop("boxes", None), inputs.pop("mirrored", None)
        if self.pixels is not None and inputs["pixel_values"].dtype == torch.uint8:
            inputs["pixel_values"] = self.pixels(inputs["pixel_values"], boxes, mirrored)
        return super()._prepare_inputs(inputs)  # DeepSpeed's precision

    def _copied(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the device. A GPU copies in a stream of its own, while it computes the step before."""
        device = self.args.device
        if device.type != "cuda" or all(value.device == device for value in batch.values()):
            return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        self._copies = self._copies or torch.cuda.Stream(device)
        with torch.cuda.stream(self._copies):
            batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        step = torch.cuda.current_stream(device)
        step.wait_stream(self._copies)
        for value in batch.values():
            value.record_stream(step)  # its memory belongs to the other stream, which must not use it again before
        return batch

    def raise_if_nonfinite(self) -> None:
        """What is not finite among the steps since the last look (all ranks participate; they wait for the device)."""
        steps = [step for step, _ in self._norms]
        norms = torch.stack([norm for _, norm in self._norms]).tolist() if steps else []
        self._norms.clear()
        bad = next(((step, norm) for step, norm in zip(steps, norms, strict=True) if not math.isfinite(norm)), None)
        if self._losses:
            self._check_losses(bad[0] if bad else None)
        if bad:
            self._check_norm(bad[1], bad[0])

    def _check_losses(self, until: int | None = None) -> None:
        """Raise UserError on every rank if any image's loss is NaN or infinite (all ranks participate).

        `until`: a step whose gradient was not finite; what comes after it follows from that.
        """
        batches, self._losses = self._losses, []
        index, loss = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[1:])
        bad = ~torch.isfinite(loss)
        if any_rank(bad.any()):
            steps = [step for step, _, losses in batches for _ in losses]
            places = torch.nonzero(bad).flatten().tolist()
            step = min((steps[place] for place in places), default=None)
            step = min(one for one in gather(step) if one is not None)  # later ones follow from it
            if until is not None and step > until:
                return
            mine = [self._name(int(index[place])) for place in places if steps[place] == step]
            found = {rank: images for rank, images in enumerate(gather(mine)) if images}
            where = "; ".join(
                f"rank {rank}: images {', '.join(images[:8])}{' and more' if len(images) > 8 else ''}"
                for rank, images in found.items()
            )
            raise UserError(
                f"the loss is NaN or infinite at step {step}, {self._kept}; {where}. Lower --learning_rate, look at "
                "these images, or use bf16 instead of fp16"
            )

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As upstream, but each rank keeps what it finds on its device until the end, and then one gather makes it
        whole: upstream's gathers logits, and makes the host wait, after every batch (all ranks participate).

        Logits are only kept for a prediction.
        """
        self._outcomes, self._logits = [], [] if description == "Prediction" else None
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        found, images = self._of_all_ranks(self._outcomes), len(dataloader.dataset)  # type: ignore[arg-type]
        outcomes = SampleMetrics.of(found, images)
        if bad := int(np.count_nonzero(~np.isfinite(outcomes.losses))):
            raise UserError(f"the model's outputs are NaN or infinite for {bad} of {images} evaluated images")
        logits = None
        if self._logits:
            logits = self._of_all_ranks(self._logits)
            logits = logits[np.unique(found[:, 0], return_index=True)[1]]
        prefix = kwargs["metric_key_prefix"]
        metrics = {f"{prefix}_{name}": value for name, value in self.metrics(outcomes).items()}
        self._outcomes, self._logits = [], None
        metrics = {**(output.metrics or {}), **metrics}
        return EvalLoopOutput(cast(np.ndarray, logits), outcomes.labels, metrics, images)

    def _of_all_ranks(self, parts: list[torch.Tensor]) -> np.ndarray:
        """Rows of all ranks (all participate), each of which has as many."""
        return self.accelerator.gather(torch.cat(parts)).cpu().numpy()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Nothing for upstream to gather: see `evaluation_loop`."""
        if self.is_in_train or self.writer.committed == self.state.global_step:  # else the last steps would be lost
            self.stop_if_asked()
        count = len(inputs["labels"])
        if self.static_shapes and count < self.args.eval_batch_size:  # another size would be compiled again
            rows = torch.arange(self.args.eval_batch_size).clamp(max=count - 1)
            inputs = {name: value[rows.to(value.device)] for name, value in inputs.items()}
        inputs = self._prepare_inputs(inputs)
        labels, index = inputs.pop("labels"), inputs.pop("index")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits[:count].float()
        self._outcomes.append(sample_rows(logits, labels[:count], index[:count]))
        if self._logits is not None:
            self._logits.append(logits)
        return None, None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None counted: upstream's estimate takes each pixel for a token, and walks all parameters at every step."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called between clipping and the optimizer step; the norm is the same on every rank."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.state.global_step + 1
        if self.defers_finite_check and isinstance(norm, torch.Tensor) and not self.args.fp16:
            self._norms.append((step, norm.detach()))
        elif norm is not None and not self.args.fp16:  # whose scaler skips such a step and lowers its scale
            self._check_norm(float(norm), step)
        return norm

    def _check_norm(self, norm: float, step: int) -> None:
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient is NaN or infinite at step {step}, {self._kept}, though the loss is finite. "
                "Lower --learning_rate or --max_grad_norm"
            )

    @property
    def _kept(self) -> str:
        return "noticed later, and nothing since was saved" if self.defers_finite_check else "before the optimizer step"


class FiniteCheckCallback(TrainerCallback):
    """Every rank, last of all callbacks: nothing that is not finite is logged, evaluated or saved."""

    def __init__(self, trainer: ExactTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends = state.global_step % self.trainer.batches.steps_per_epoch == 0 or control.should_training_stop
        if ends or control.should_log or control.should_evaluate or control.should_save:
            self.trainer.raise_if_nonfinite()


class _TrainLoader(DataLoader):
    """Calls `settle` before it forks its processes: a child has the locks of threads that it does not have, held for
    ever, and a thread writes checkpoints. With persistent workers it forks once.
    """

    def __init__(self, settle: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settle = settle

    def __iter__(self) -> Any:
        if self.num_workers and self._iterator is None:
            self._settle()
        return super().__iter__()


def _shielded(loader: Any) -> DataLoader:
    """A loader made by Accelerate, with processes that survive what stops a run (see `stop.ignore_signals`)."""
    getattr(loader, "base_dataloader", loader).worker_init_fn = stop.ignore_signals
    return loader
