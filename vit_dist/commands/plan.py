"""What a run would do and need, on machines that are not at hand. Starts nothing, needs no GPU, writes nothing.

vit-dist plan configs/recipes/cifar10.yaml --gpus 8 --nodes 2 --gpu h100
vit-dist plan --data ~/photos --gpus 4 --gpu_memory 24 --strategy zero2 --json
vit-dist plan runs/photos                    # the run of this folder once more; the time is that of earlier runs
vit-dist plan cifar10 --bf16 --gpus 8 --nodes 2 --gpu h100 --link 40    # what each strategy sends, and for how long
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vit_dist import bundle, console, distributed
from vit_dist.batch import scaled_learning_rate, split_batch
from vit_dist.commands import earlier
from vit_dist.commands.cluster_spec import GPU_MEMORY, LINKS, ClusterSpec, read_cluster_spec
from vit_dist.commands.plan_text import render
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.parser import Parser
from vit_dist.run import run_folder
from vit_dist.terminal import show


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend, 1 if the run would not fit."""
    console.set_up(0)
    try:
        parser = _parser()
        asked, rest = parser.parse_known_args(argv)
        _seconds(asked.time_limit)
        config = load_config(of_run_folder(rest))
        plan = make(config, read_cluster_spec(asked, config.training["use_cpu"] or not _sees_gpu()), asked)
    except UserError as error:
        console.show_error(f"error: {error}")
        return 2
    show(json.dumps(plan, indent=2, allow_nan=False).split("\n") if asked.json else render(plan))
    return 0 if plan["fits"] is not False else 1


def of_run_folder(argv: Sequence[str]) -> list[str]:
    """The command line with a run folder's settings in place of the folder, if one comes first."""
    folder = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    if folder is None or not folder.is_dir() or not (folder / run_folder.CONFIG).is_file():
        return list(argv)
    return [str(folder / run_folder.CONFIG), "--output_dir", str(folder), *argv[1:]]


def _sees_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def _parser() -> Parser:
    parser = Parser(
        prog="vit-dist plan",
        usage="vit-dist plan [RECIPE | RUN_FOLDER] [--gpus N] [--nodes N] [--gpu NAME] [--flag value ...]",
        description="Show what a run would do and need: batch, steps, learning rate, memory, disk, time. Nothing is "
        "started. Without GPUs here and without a flag that names some, the plan is for this machine's CPU. All other "
        "flags are those of `vit-dist train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="GPUs on each node (default: 1)")
    parser.add_argument("--nodes", type=int, help="nodes (default: 1)")
    parser.add_argument("--gpu", help=f"what they are, for their memory: {', '.join(GPU_MEMORY)}")
    parser.add_argument("--gpu_memory", type=float, help="memory of one GPU in GB, for a GPU that is not in the list")
    parser.add_argument(
        "--link",
        help=f"slowest link of a ring through all GPUs: {', '.join(LINKS)}, or GB/s. Between nodes it is what a node "
        "sends, all its network cards together. Names are peaks of one link or card; give what an all-reduce of your "
        "machines reaches (busbw of nccl-tests) if you know it",
    )
    parser.add_argument("--node_link", help="several nodes: link within one, which hsdp uses (default: as --link)")
    names = ("auto", "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp")
    parser.add_argument("--strategy", default="auto", choices=names, help="auto recommends one (default)")
    parser.add_argument("--replicas", type=int, help="hsdp: copies of the sharded model (default: as many as nodes)")
    parser.add_argument("--images_per_second", type=float, help="training speed of all GPUs, if it is known")
    parser.add_argument("--time_limit", help="time limit of the job, as h:mm:ss, to compare the run time with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def make(config: Config, machines: ClusterSpec, asked: argparse.Namespace) -> dict[str, Any]:
    """The plan as plain values (bytes, seconds, images). Reads the data's index, a few images, the model's config."""
    # Slow to import; a mistake in the command should be told at once.
    from vit_dist.arguments import reporters
    from vit_dist.commands.plan_strategies import compare_strategies
    from vit_dist.data.pipeline import build_data
    from vit_dist.data.resident import resident_bytes
    from vit_dist.data.sampler import GlobalBatchSampler
    from vit_dist.metrics import ClassificationMetrics
    from vit_dist.model import differing_draws, meta_model, random_draws
    from vit_dist.schedule import curve, describe_rate, total_steps, warmup_steps
    from vit_dist.trainer import require_metric

    bundle.check(config)
    if config.finds_batch and machines.memory is None and not machines.cpu:
        raise UserError(
            "per_device_train_batch_size=auto: the memory of the GPUs is not known here; give --gpu or --gpu_memory, "
            "or a number of images"
        )
    batch = split_batch(config, machines.processes)
    rate = scaled_learning_rate(config, batch)
    quick = replace(config.data, verify_images=False)
    data = build_data(quick, config.model, config.data_seed, console.progress)
    require_metric(config.training["metric_for_best_model"], ClassificationMetrics(data.classes, config.run.metrics))
    reporters(config)
    model = meta_model(config.model, data.classes, data.input_size, cache_dir=config.data.cache_dir)
    sampler = GlobalBatchSampler(
        len(data.train), per_device_batch=batch.per_device, gradient_accumulation=batch.accumulation,
        world_size=batch.world_size, rank=0, seed=0, drop_last=config.training["dataloader_drop_last"],
    )  # fmt: skip
    steps = total_steps(config, sampler.steps_per_epoch)
    source = "processor" if machines.cpu and config.data.image_source == "auto" else config.data.image_source
    images = resident_bytes(data, source, machines.memory)
    weighed, batch = compare_strategies(config, machines, batch, model, data.input_size, asked.strategy, images)
    plan: dict[str, Any] = {
        "source": config.source,
        "machines": {**asdict(machines), "processes": machines.processes, "cores": distributed.cores()},
        "data": data.description,
        "images": {name: len(one) for name, one in (("train", data.train), ("validation", data.validation))},
        "model": config.model.model,
        "parameters": {
            "all": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "precision": config.precision,
        "batch": {**asdict(batch), "global": batch.total},
        "steps": {"epoch": sampler.steps_per_epoch, "all": steps, "warmup": warmup_steps(config, steps)},
        "learning_rate": {"description": describe_rate(config, rate, steps),
                          "recipe": config.training["learning_rate"], "actual": rate,
                          "schedule": str(config.training["lr_scheduler_type"]), "curve": curve(config, rate, steps)},
    }  # fmt: skip
    plan |= weighed
    plan["time"] = _time(config, machines, steps * batch.total, asked)
    draws = random_draws(model) if machines.processes > 1 else ""
    plan["warnings"] = [differing_draws(draws)] if draws else []
    plan["config"] = config.resolved()
    return plan


def _time(config: Config, machines: ClusterSpec, images: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of training, if a speed was given or an earlier run of the same model has measured one."""
    rate, source = asked.images_per_second, "--images_per_second"
    if rate is None and (known := earlier.find(config, machines)):
        rate, source = known
    limit = _seconds(asked.time_limit)
    seconds = None if not rate else images / rate
    return {"images_per_second": rate, "source": source if rate else None, "seconds": seconds, "limit": limit}


def _seconds(limit: str | None) -> float | None:
    if limit is None:
        return None
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", limit)
    if parts is None:
        raise UserError(f"--time_limit {limit}: give h:mm:ss, or d-hh:mm:ss")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


if __name__ == "__main__":
    sys.exit(main())
