"""Where metrics go while training, on rank 0: the run's own file, the screen, and Weights & Biases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel

from vit_dist.arguments import reporters
from vit_dist.callbacks.communication import DdpTimer
from vit_dist.callbacks.metrics_file import MetricsFile, last_steps
from vit_dist.callbacks.progress import Progress
from vit_dist.callbacks.speed import Speed, Step, data_advice
from vit_dist.callbacks.wandb import WandbCallback, logged_in
from vit_dist.config import Config
from vit_dist.cost.flops import count_flops
from vit_dist.cost.peak import matmul_flops
from vit_dist.distributed import cores
from vit_dist.run.attempts import Attempt
from vit_dist.run.run_folder import METRICS
from vit_dist.trainer import ExactTrainer


@dataclass
class Trackers:
    metrics_file: MetricsFile
    wandb: WandbCallback | None
    progress: Progress
    lines: list[str]  # what the plan says of each
    peak: float | None  # FLOP/s of the device in matrix products, if it was measured


def open_trackers(
    config: Config, attempt: Attempt, facts: dict[str, Any], trainer: ExactTrainer, side: int
) -> Trackers:
    """Add rank 0's callbacks to the trainer. `side` of the model's input in pixels."""
    speed = _speed(config, trainer, side)
    trainer.add_callback(speed)  # before those that show what it adds
    path = config.output_dir / METRICS
    logged = last_steps(path)
    metrics_file = MetricsFile(path)
    lines = [
        f"{name} in {config.logging_dir}" if name == "tensorboard" else name for name in trainer.args.report_to or []
    ]
    wandb = None
    if wants_wandb(config):
        wandb = WandbCallback(
            run_id=attempt.wandb_id,
            run_name=config.training["run_name"] or config.output_dir.name,
            config={**config.resolved(), **facts},
            directory=config.output_dir,
            last_step=logged,
        )
        lines.append(wandb.open())
    else:
        asked = config.training["report_to"] is not None
        lines.append("W&B off" if asked else "W&B off (not logged in: `wandb login`, or --report_to wandb)")
    progress = Progress(trainer.batches.global_batch, False if config.training["disable_tqdm"] else None)
    for callback in (metrics_file, progress, wandb):
        if callback is not None:
            trainer.add_callback(callback)
    return Trackers(metrics_file, wandb, progress, lines, speed.step.peak)


def _speed(config: Config, trainer: ExactTrainer, side: int) -> Speed:
    args, asked, flop, peak = trainer.args, config.run.measure_peak, None, None
    if asked or (asked is None and args.device.type == "cuda"):
        flop = count_flops(cast(PreTrainedModel, trainer.model), side).training
        peak = matmul_flops(args.device, config.precision)
    step = Step(trainer.batches.global_batch, args.world_size, flop, peak)
    timer = DdpTimer(lambda: trainer.model_wrapped) if args.world_size > 1 else None
    return Speed(trainer.clock, step, data_advice(args.dataloader_num_workers, cores()), timer)


def wants_wandb(config: Config) -> bool:
    """Asked for, or not forbidden and the user is logged in (or has asked for offline runs)."""
    if config.training["report_to"] is None:
        return logged_in() or os.environ.get("WANDB_MODE") == "offline"
    return "wandb" in reporters(config)
