"""What a run would do and need, on machines that are not at hand. Starts nothing, needs no GPU, writes nothing.

vit-dist plan configs/recipes/cifar10.yaml --gpus 8 --nodes 2 --gpu h100
vit-dist plan --data ~/photos --gpus 4 --gpu_memory 24 --strategy zero2 --json
vit-dist plan cifar10 --bf16 --gpus 8 --nodes 2 --gpu h100 --bench bench.json --link 40    # how well it would scale
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vit_dist import bundle, console
from vit_dist.batch import Batch, scaled_learning_rate, split_batch
from vit_dist.config import Config, load_config
from vit_dist.cost import measured, scaling
from vit_dist.errors import UserError
from vit_dist.run import run_folder
from vit_dist.verbs.machines import GPU_MEMORY, LINKS, Machines, possible, read_machines
from vit_dist.verbs.parser import Parser
from vit_dist.verbs.plan_text import percent, render

Range = dict[str, float]  # low, high: with nothing overlapped, with all that can be
USABLE = 0.92  # of the memory: fragmentation takes the rest
# The cheapest first; hsdp before fsdp2 on several nodes.
AUTO = ("single", "ddp", "zero1", "zero2", "fsdp2", "zero3_offload")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend, 1 if the run would not fit."""
    console.set_up(0)
    try:
        parser = _parser()
        asked, rest = parser.parse_known_args(argv)
        _seconds(asked.time_limit)
        plan = make(load_config(rest), read_machines(asked), asked)
    except UserError as error:
        console.show_error(f"error: {error}")
        return 2
    sys.stdout.write(
        json.dumps(plan, indent=2, allow_nan=False) + "\n" if asked.json else "\n".join(render(plan)) + "\n"
    )
    return 0 if plan["fits"] is not False else 1


def _parser() -> Parser:
    parser = Parser(
        prog="vit-dist plan",
        usage="vit-dist plan [RECIPE] [--gpus N] [--nodes N] [--gpu NAME] [--flag value ...]",
        description="Show what a run would do and need: batch, steps, learning rate, memory, disk, time. Nothing is "
        "started. All other flags are those of `vit-dist train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs on each node (default: 1)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    parser.add_argument("--gpu", help=f"what they are, for their memory: {', '.join(GPU_MEMORY)}")
    parser.add_argument("--gpu_memory", type=float, help="memory of one GPU in GB, for a GPU that is not in the list")
    parser.add_argument(
        "--link",
        help=f"slowest link of a ring through all GPUs: {', '.join(LINKS)}, or GB/s. Between nodes it is what a node "
        "sends, all its network cards together. Names are peaks of one link or card; give what an all-reduce of your "
        "machines reaches (busbw of nccl-tests) if you know it",
    )
    parser.add_argument("--node_link", help="several nodes: link within one, which hsdp uses (default: as --link)")
    parser.add_argument(
        "--bench", metavar="FILE", help="one GPU's step as `vit-dist bench --json FILE` measured it with the same "
        "recipe: with --link, efficiency and images/s of each strategy, with sending hidden not at all and at best",
    )  # fmt: skip
    names = ("auto", "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp")
    parser.add_argument("--strategy", default="auto", choices=names, help="auto recommends one (default)")
    parser.add_argument("--replicas", type=int, help="hsdp: copies of the sharded model (default: as many as nodes)")
    parser.add_argument("--images_per_second", type=float, help="training speed of all GPUs, if it is known")
    parser.add_argument("--time_limit", help="time limit of the job, as h:mm:ss, to compare the run time with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def make(config: Config, machines: Machines, asked: argparse.Namespace) -> dict[str, Any]:
    """The plan as plain values (bytes, seconds, images). Reads the data's index and the model's configuration."""
    # Slow to import; a mistake in the command should be told at once.
    from vit_dist.arguments import reporters
    from vit_dist.cost.flops import count_flops
    from vit_dist.data.pipeline import build_data
    from vit_dist.data.sampler import GlobalBatchSampler
    from vit_dist.metrics import ClassificationMetrics
    from vit_dist.model import skeleton
    from vit_dist.schedule import curve, describe_rate, total_steps, warmup_steps
    from vit_dist.trainer import require_metric

    bundle.check(config)
    bench = measured.read(asked.bench) if asked.bench else None
    batch = split_batch(config, machines.processes)
    rate = scaled_learning_rate(config, batch)
    quick = replace(config.data, verify_images=False)
    data = build_data(quick, config.model, config.data_seed, console.progress)
    require_metric(config.training["metric_for_best_model"], ClassificationMetrics(data.classes, config.run.metrics))
    reporters(config)
    model = skeleton(config.model, data.classes, data.input_size, cache_dir=config.data.cache_dir)
    sampler = GlobalBatchSampler(
        len(data.train), per_device_batch=batch.per_device, gradient_accumulation=batch.accumulation,
        world_size=batch.world_size, rank=0, seed=0, drop_last=config.training["dataloader_drop_last"],
    )  # fmt: skip
    steps = total_steps(config, sampler.steps_per_epoch)
    plan: dict[str, Any] = {
        "source": config.source,
        "machines": {**asdict(machines), "processes": machines.processes},
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
    if bench:
        flops = count_flops(model, data.input_size)
        bench.check(precision=config.precision, gflop_per_image=flops.training / 1e9, gpu=machines.gpu)
    plan["bench"] = asdict(bench) if bench else None
    plan |= _memory(config, machines, batch, data.input_size, model, bench, asked.strategy)
    plan["time"] = _time(config, machines, steps * batch.total, plan, asked)
    plan["config"] = config.resolved()
    return plan


def _memory(
    config: Config, machines: Machines, batch: Batch, side: int, model: Any, bench: measured.Measured | None, asked: str
) -> dict[str, Any]:
    """`strategies`: bytes on a GPU, traffic and efficiency of each; `strategy`: the one asked for or recommended, and
    why.
    """
    from vit_dist.cost import memory
    from vit_dist.strategy import mark_blocks

    mark_blocks(model)
    tensors, precision, optim = memory.Tensors.of(model), config.precision, str(config.training["optim"])
    checkpointing = bool(config.training.get("activation_checkpointing") or config.training["gradient_checkpointing"])
    saved = memory.activations(model, side, precision, checkpointing)
    table: dict[str, dict[str, Any]] = {}
    for name in possible(machines):
        shards = {"single": 1, "ddp": 1, "hsdp": machines.processes // machines.replicas}.get(name, machines.processes)
        state = memory.state(
            name, tensors, shards=shards, precision=precision, optim=optim, accumulation=batch.accumulation
        )
        total = state.total + saved.of(batch.per_device) + memory.RESERVE
        sends = scaling.sends(
            name, weights=tensors.parameters, trained=tensors.trained_parameters, blocks=tensors.groups,
            devices=machines.processes, shards=shards, size=4 if precision == "fp32" else 2,
            ddp_size=2 if config.scaling.ddp_bf16_all_reduce else 4,
        )  # fmt: skip
        table[name] = {
            **asdict(state),
            "activations": saved.of(batch.per_device),
            "reserve": memory.RESERVE,
            "total": total,
            "fits": None if machines.memory is None else total <= USABLE * machines.memory,
            "traffic": scaling.traffic(sends, batch.accumulation),
            "efficiency": None if name == "zero3_offload" else _efficiency(machines, batch, shards, sends, bench),
            "checkpoint": memory.checkpoint_bytes(name, tensors, precision=precision, optim=optim),
        }
    chosen, why = _choose(asked, table, machines)
    why += _compared(chosen, table, config.scaling.ddp_bf16_all_reduce)
    kept = config.training["save_total_limit"]
    return {
        "strategy": chosen,
        "why": why,
        "strategies": table,
        "fits": table[chosen]["fits"],
        "disk": {"checkpoint": table[chosen]["checkpoint"], "kept": kept, "export": 4 * tensors.parameters},
    }


def _efficiency(
    machines: Machines, batch: Batch, shards: int, sends: list[scaling.Send], bench: measured.Measured | None
) -> Range | None:
    """Of all GPUs, against as many alone. Needs a link where there are several GPUs."""
    if bench is None or (machines.link is None and sends):
        return None

    def link(send: scaling.Send) -> scaling.Link:
        # A replica's GPUs stand side by side, and its counterparts in other nodes where there are any.
        nodes = {"world": machines.nodes, "shards": -(-shards // machines.gpus),
                 "replicas": min(send.devices, machines.nodes)}[send.ring]  # fmt: skip
        speed = (machines.node_link if nodes == 1 else None) or machines.link or math.inf
        if send.ring == "replicas" and nodes > 1:
            speed /= min(shards, machines.gpus)  # as many rings as a replica has GPUs in a node share its network
        return scaling.Link(speed, scaling.latency(send.devices, nodes))

    step = scaling.Step.of(batch.per_device / bench.step_images_per_second, batch.accumulation)
    return dict(zip(("low", "high"), scaling.bounds(step, sends, link), strict=True))


def _compared(chosen: str, table: dict[str, dict[str, Any]], halved: bool) -> str:
    """What sharding is predicted to cost where it is not needed, or what it gains all the same.

    `halved`: DDP sends bfloat16.
    """
    ranges = {name: row["efficiency"] for name, row in table.items() if row["efficiency"] and row["fits"]}
    if "ddp" not in ranges or len(ranges) < 2:
        return ""
    ddp = ranges.pop("ddp")
    fastest = max(ranges, key=lambda name: ranges[name]["low"])
    if chosen == "ddp" and ranges[fastest]["low"] > ddp["high"]:
        found = f"{fastest} reaches {percent(ranges[fastest])} where ddp reaches {percent(ddp)}"
        hint = "" if halved else "; --ddp_bf16_all_reduce halves what it sends"
        return f"; but over this link {found}{hint}"
    other = "fsdp2" if chosen == "ddp" else chosen
    if other not in ranges or ranges[other]["low"] >= ddp["low"] or percent(ranges[other]) == percent(ddp):
        return ""
    needless = "" if chosen == "ddp" else "the state fits on each GPU: "  # else the reason has it
    return f"; {needless}{other} would reach {percent(ranges[other])} where ddp reaches {percent(ddp)}"


def _choose(asked: str, table: dict[str, dict[str, Any]], machines: Machines) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for"
    if "single" in table and table["single"]["fits"] in (None, True):
        return "single", "one GPU: nothing to share"
    if machines.memory is None:
        return "ddp", "nothing is faster where it fits; give --gpu or --gpu_memory to know whether it does"
    order = [name for name in AUTO if name in table]
    if "hsdp" in table:
        order.insert(order.index("fsdp2"), "hsdp")
    for name in order:
        if table[name]["fits"]:
            passed = order[: order.index(name)]
            reason = REASONS[name]
            return name, f"{', '.join(passed)} would not fit; {reason}" if passed else reason
    return order[
        -1
    ], "nothing fits; lower --per_device_train_batch_size, add --activation_checkpointing, or use more GPUs"


REASONS = {
    "single": "one GPU: nothing to share",
    "ddp": "the whole training state fits on each GPU, and then nothing is faster",
    "zero1": "sharding the optimizer state is enough; DeepSpeed waits for all that it sends",
    "zero2": "sharding optimizer state and gradients is enough; DeepSpeed waits for all that it sends",
    "hsdp": "a node's GPUs hold the state together, and only gradients cross nodes",
    "fsdp2": "weights have to be sharded too; half as much traffic again as DDP",
    "zero3_offload": "the optimizer has to move to the host, which makes each step wait for the CPU",
}


def _time(
    config: Config, machines: Machines, images: int, plan: dict[str, Any], asked: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of training, if a speed was given, predicted, or measured on GPUs by an earlier run of this folder."""
    rate, source = asked.images_per_second, "--images_per_second"
    bench, efficiency = plan["bench"], plan["strategies"][plan["strategy"]]["efficiency"]
    if rate is None and bench and efficiency:
        # The lower bound, and no more than the batches that come.
        one = min(efficiency["low"] * bench["step_images_per_second"], bench["train_images_per_second"])
        rate, source = machines.processes * one, f"predicted from {bench['file']}, nothing overlapped"
    earlier, record = (
        run_folder.read_json(config.output_dir / name) for name in (run_folder.RESULTS, run_folder.RECORD)
    )
    known = earlier.get("train_samples_per_second") and earlier.get("world_size")
    if rate is None and known and record.get("device", "cpu") != "cpu":
        rate = earlier["train_samples_per_second"] / earlier["world_size"] * machines.processes
        source = f"{config.output_dir} on {earlier['world_size']} x {record['device']}, scaled to {machines.processes}"
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
