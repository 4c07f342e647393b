"""The few lines that rank 0 prints before training: what will happen, and the arithmetic behind it."""

from __future__ import annotations

from pathlib import Path

from vit_dist import __version__
from vit_dist.batch import Batch
from vit_dist.build import Built
from vit_dist.config import Config
from vit_dist.model import differing_draws, random_draws
from vit_dist.run.attempts import Attempt
from vit_dist.run.trackers import Trackers
from vit_dist.schedule import describe_rate, total_steps


def describe(
    config: Config,
    attempt: Attempt,
    built: Built,
    batch: Batch,
    strategy: str,
    idle_gpus: int,
    reporting: Trackers | None,
) -> list[str]:
    args, batches, compiled = built.trainer.args, built.trainer.batches, built.compilation.note
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    if args.fp16 and args.device.type == "cpu":
        precision = "fp32 (fp16 does nothing on a CPU)"
    devices = f"{args.world_size} x {args.device.type}, {strategy}, {precision}"
    if idle_gpus:
        devices += f"; {idle_gpus} more GPUs are visible and idle: `vit-dist train` uses them all"
    if reporting and reporting.peak:
        compiled = f"{compiled}; " if compiled else ""
        compiled += f"matrix products reach {reporting.peak / 1e12:,.3g} TFLOP/s"
    steps = total_steps(config, batches.steps_per_epoch)
    metrics = ", ".join(["metrics.jsonl", *reporting.lines]) if reporting else ""
    lines = [("vit_dist", f"{__version__}, {config.source}, seed {args.seed}")]
    lines += [("data" if i == 0 else "", line) for i, line in enumerate(built.data.description)]
    lines += [
        ("model", built.model.description),
        ("devices", f"{devices}; {compiled}" if compiled else devices),
        ("batch", str(batch)),
        ("steps", f"{batches.steps_per_epoch:,} per epoch, {steps:,} in all"),
        ("rate", describe_rate(config, args.learning_rate, steps)),
        ("output", f"{config.output_dir}; {metrics}"),
    ]
    if args.world_size > 1 and (draws := random_draws(built.model.model)):
        lines.append(("note", differing_draws(draws)))
    lines += [("note", note) for note in attempt.notes]
    if attempt.checkpoint:
        lines.append(("resume", f"from {Path(attempt.checkpoint).name}, attempt {attempt.number}"))
    return [f"{title:<9}{line}" for title, line in lines]
