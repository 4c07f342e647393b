"""After training: evaluate the best model, predict on test once, and leave it all in the run folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit_dist import console, stop
from vit_dist.checkpoint import store
from vit_dist.config import Config
from vit_dist.data.dataset import ImageDataset
from vit_dist.data.pipeline import ImageData
from vit_dist.data.pixels import LEVELS
from vit_dist.distributed import on_main
from vit_dist.errors import UserError
from vit_dist.files import remove, settle_folder, sync_tree
from vit_dist.metrics import ClassificationMetrics
from vit_dist.run import failure, report, run_folder
from vit_dist.run.attempts import Attempt
from vit_dist.run.trackers import Trackers
from vit_dist.trainer import ExactTrainer


def finalize(
    config: Config,
    trainer: ExactTrainer,
    data: ImageData,
    metrics: ClassificationMetrics,
    trained: dict[str, float],
    facts: dict[str, Any],
    attempt: Attempt,
    trackers: Trackers | None,
) -> None:
    """Every rank evaluates and takes part in saving; rank 0 writes. `trackers` is rank 0's."""
    results: dict[str, Any] = {
        **training_results(trainer, trained),
        "world_size": facts["world_size"],
        "global_batch_size": facts["global_batch_size"],
        "skipped_images": sum(data.skipped.values()),
        **data.duplicates,
    }
    split, dataset, logits = "validation", data.validation, np.empty(0)
    for prefix, name, one in (("eval", "validation", data.validation), ("test", "test", data.test)):
        if one is not None:
            split, dataset = name, one
            logits, numbers = predict(trainer, one, metrics, prefix)
            results |= numbers
    folder = config.output_dir
    partial = folder / run_folder.PARTIAL_BEST
    on_main(lambda: remove(partial))
    trainer.export(partial)

    def write() -> None:
        try:
            report.finish_export(partial)
            seen = trainer.model_input(dataset, min(report.CHECKED_IMAGES, len(dataset)))
            levels = LEVELS if trainer.pixels is not None else 0.0
            report.check_export(partial, dataset, seen, logits, trainer.args.device, computed_in(trainer), levels)
            report.write_model_card(partial, config, data.description, data.classes, results, facts["versions"])
            sync_tree(partial)  # before status.json says that it is there
            remove(folder / run_folder.BEST)
            os.replace(partial, folder / run_folder.BEST)
            settle_folder(folder)
            report.write_predictions(folder / run_folder.PREDICTIONS, dataset, split, data.classes, logits)
            run_folder.write_json(folder / run_folder.RESULTS, results)
            failure.forget(folder)
        except OSError as error:
            raise UserError(
                f"results cannot be written: {error}; mend that and start the same command again"
            ) from error

    on_main(write)
    if trackers is not None:
        _tell(config, trainer, results, trackers)
    left = {"attempt": attempt.number, "step": trainer.state.global_step, "model": run_folder.BEST}
    on_main(lambda: run_folder.write_status(folder, "complete", **left))
    if not config.run.keep_checkpoints:  # `best` was reloaded and compared, and status.json says that it is there
        on_main(lambda: discard_checkpoints(folder))
    confused = report.confusions(np.asarray(dataset.table["label"]), logits.argmax(axis=1), data.classes)
    console.say(run_folder.describe(folder), *report.closing_lines(folder, split, confused, data.warnings))


def discard_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a complete run. Whatever is left after a failure does no harm."""
    try:
        for checkpoint in list(store.checkpoints(folder)):
            if store.is_committed(checkpoint):
                store.discard(checkpoint)
    except OSError as error:
        console.say(f"checkpoints in {folder} could not be deleted: {error.strerror}")


def finalize_preempted(
    config: Config, trainer: ExactTrainer, by: stop.Interrupted, attempt: Attempt, trackers: Trackers | None
) -> None:
    """The end of a run that was asked to stop: what a batch system reads first, then the rest (rank 0 writes)."""
    if trainer.args.process_index:
        return
    if trackers is not None:
        trackers.progress.close()
    step = trainer.writer.committed or 0
    with contextlib.suppress(OSError):  # a full disk, whose saves have said so
        run_folder.write_status(config.output_dir, "preempted", attempt=attempt.number, step=step, by=str(by))
    if not step:
        saved = "nothing was saved yet"
    elif step == attempt.begins_at:
        saved = f"nothing was saved after checkpoint-{step}, where this attempt began"
    else:
        saved = f"checkpoint-{step} is committed"
    console.say(f"stopped at step {trainer.state.global_step} ({by}): {saved}; the same command goes on")
    if trackers is not None and trackers.wandb is not None and (line := trackers.wandb.close(preempted=True)):
        console.say(line)


def computed_in(trainer: ExactTrainer) -> torch.dtype:
    """The type that autocast multiplies matrices in."""
    if trainer.args.bf16:
        return torch.bfloat16
    return torch.float16 if trainer.args.fp16 and trainer.args.device.type != "cpu" else torch.float32


def training_results(trainer: ExactTrainer, trained: dict[str, float]) -> dict[str, float]:
    """Upstream's `train_*`, right after a restart too: speed of this attempt's own steps, loss over all of them."""
    seconds, steps = trained["train_runtime"], trainer.state.global_step - trainer.first_step
    before, total = 0.0, 0.0
    for row in trainer.state.log_history:
        if "loss" in row:
            total, before = total + row["loss"] * (row["step"] - before), row["step"]
    results = {
        "epoch": trainer.state.epoch or 0.0,
        "train_steps": trainer.state.global_step,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        "train_runtime": seconds,
        "train_samples": len(trainer.train_dataset),  # type: ignore[arg-type]
    }
    if before:
        results["train_loss"] = total / before
    if steps:
        results["train_steps_per_second"] = steps / seconds
        results["train_samples_per_second"] = steps * trainer.batches.global_batch / seconds
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        results["best_step"] = trainer.state.best_global_step
    return results


def predict(
    trainer: ExactTrainer, dataset: ImageDataset, metrics: ClassificationMetrics, prefix: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits (n, classes) and metrics under `prefix_`, every image counted once (all ranks participate)."""
    output = trainer.predict(dataset, metric_key_prefix=prefix)
    numbers: dict[str, Any] = {
        k: v for k, v in (output.metrics or {}).items() if not k.endswith("model_preparation_time")
    }
    if numbers[f"{prefix}_samples"] != len(dataset):
        raise RuntimeError(f"{prefix}: {numbers[f'{prefix}_samples']} of {len(dataset)} images were evaluated")
    logits = np.asarray(output.predictions)
    rows = metrics.per_class(logits.argmax(axis=1), np.asarray(output.label_ids))
    numbers[f"{prefix}_per_class"] = {row.pop("class"): row for row in rows}
    return logits, numbers


def _tell(config: Config, trainer: ExactTrainer, results: dict[str, Any], trackers: Trackers) -> None:
    """The test row in metrics.jsonl, final numbers in the W&B summary."""
    test = {k: v for k, v in results.items() if k.startswith("test_") and isinstance(v, (int, float))}
    if test:
        trackers.metrics_file.append(trainer.state.global_step, {"epoch": trainer.state.epoch, **test})
    if trackers.wandb is not None:
        trackers.wandb.summary({k: v for k, v in results.items() if isinstance(v, (int, float))})
        line = trackers.wandb.close()
        if line:
            console.say(line)
