"""The few lines that rank 0 prints before training: what will happen, and the arithmetic behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vit_dist import __version__
from vit_dist.config import Config
from vit_dist.data.pipeline import ImageData
from vit_dist.model import BuiltModel
from vit_dist.run_folder import Attempt
from vit_dist.trackers import Trackers
from vit_dist.trainer import ExactTrainer


def describe(
    config: Config,
    attempt: Attempt,
    data: ImageData,
    built: BuiltModel,
    trainer: ExactTrainer,
    strategy: str,
    idle_gpus: int,
    reporting: Trackers | None,
) -> list[str]:
    args, batches = trainer.args, trainer.batches
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    if args.fp16 and args.device.type == "cpu":
        precision = "fp32 (fp16 does nothing on a CPU)"
    devices = f"{args.world_size} x {args.device.type}, {strategy}, {precision}"
    if idle_gpus:
        devices += f"; {idle_gpus} more GPUs are visible and idle: `vit-dist train` uses them all"
    metrics = ", ".join(["metrics.jsonl", *reporting.lines]) if reporting else ""
    lines = [("vit_dist", f"{__version__}, {config.source}, seed {args.seed}")]
    lines += [("data" if i == 0 else "", line) for i, line in enumerate(data.description)]
    lines += [
        ("model", built.description),
        ("devices", devices),
        ("batch", batch_arithmetic(trainer)),
        ("steps", f"{batches.steps_per_epoch:,} per epoch, {total_steps(trainer):,} in all"),
        ("rate", learning_rate(trainer)),
        ("output", f"{config.output_dir}; {metrics}"),
    ]
    lines += [("note", note) for note in attempt.notes]
    if attempt.checkpoint:
        lines.append(("resume", f"from {Path(attempt.checkpoint).name}, attempt {attempt.number}"))
    return [f"{title:<9}{line}" for title, line in lines]


def batch_arithmetic(trainer: ExactTrainer) -> str:
    args = trainer.args
    return (
        f"{trainer.batches.global_batch} = {args.per_device_train_batch_size} per device x {args.world_size} "
        f"device{'s' if args.world_size > 1 else ''} x {args.gradient_accumulation_steps} accumulation"
    )


def total_steps(trainer: ExactTrainer) -> int:
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * trainer.batches.steps_per_epoch)


def learning_rate(trainer: ExactTrainer) -> str:
    args: Any = trainer.args
    warmup = args.get_warmup_steps(total_steps(trainer))
    return f"{args.learning_rate:g}, {args.lr_scheduler_type.value}" + (f", {warmup} warm-up steps" if warmup else "")
