"""What a run would do and need, on machines that are not at hand. Starts nothing, needs no GPU, writes nothing.

vit-dist plan configs/recipes/cifar10.yaml --gpus 8 --nodes 2 --gpu h100
vit-dist plan --data ~/photos --gpus 4 --gpu_memory 24 --strategy zero2 --json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vit_dist import bundle, console
from vit_dist.batch import Batch, scaled_learning_rate, split_batch
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.run import run_folder
from vit_dist.verbs.parser import Parser

if TYPE_CHECKING:
    from vit_dist.cost import memory

GPU_MEMORY = {  # decimal GB, as they are sold; about 1 % less can be allocated
    "h200": 141, "h100": 80, "a100": 80, "a100-40": 40, "l40s": 48, "a6000": 48, "a10": 24, "l4": 24, "rtx4090": 24,
    "rtx3090": 24, "v100": 32, "t4": 16,
}  # fmt: skip
LINKS = {  # GB/s that a GPU can send, peak of one direction
    "nvlink": 450, "nvlink-a100": 300, "pcie4": 32, "pcie5": 64, "ib400": 50, "ib200": 25, "eth100": 12.5, "eth25": 3.1,
    "eth10": 1.25,
}  # fmt: skip
AUTO = (
    "single",
    "ddp",
    "zero1",
    "zero2",
    "fsdp2",
    "zero3_offload",
)  # the cheapest first; hsdp before fsdp2 on several nodes


@dataclass(frozen=True)
class Machines:
    nodes: int
    gpus: int  # on each node
    gpu: str | None
    memory: float | None  # bytes of one GPU
    replicas: int  # of the sharded model, with hsdp
    link: float | None  # bytes per second that a GPU sends to the others, over the slowest link between them

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend, 1 if the run would not fit."""
    console.set_up(0)
    try:
        parser = _parser()
        asked, rest = parser.parse_known_args(argv)
        plan = make(load_config(rest), _machines(asked), asked)
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
        help=f"slowest link between the GPUs, for the time that a step spends sending: {', '.join(LINKS)}, or GB/s",
    )
    names = ("auto", "single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp")
    parser.add_argument("--strategy", default="auto", choices=names, help="auto recommends one (default)")
    parser.add_argument("--replicas", type=int, help="hsdp: copies of the sharded model (default: as many as nodes)")
    parser.add_argument("--images_per_second", type=float, help="training speed of all GPUs, if it is known")
    parser.add_argument("--time_limit", help="time limit of the job, as h:mm:ss, to compare the run time with")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _machines(asked: argparse.Namespace) -> Machines:
    for name in ("gpus", "nodes"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name} {getattr(asked, name)}: give at least 1")
    if asked.gpu is not None and asked.gpu.lower() not in GPU_MEMORY:
        raise UserError(f"--gpu {asked.gpu}: not in the list ({', '.join(GPU_MEMORY)}); give --gpu_memory in GB")
    memory = asked.gpu_memory if asked.gpu_memory is not None else GPU_MEMORY.get((asked.gpu or "").lower())
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"--gpu_memory {memory:g}: give a number of GB above 0")
    if asked.images_per_second is not None and not 0 < asked.images_per_second < math.inf:
        raise UserError(f"--images_per_second {asked.images_per_second}: give a number above 0")
    _seconds(asked.time_limit)
    replicas, processes = asked.replicas or asked.nodes, asked.nodes * asked.gpus
    if not 1 <= replicas <= processes or processes % replicas:
        raise UserError(f"--replicas {replicas}: {processes} GPUs cannot be shared by as many; give a divisor")
    machines = Machines(
        asked.nodes, asked.gpus, asked.gpu, None if memory is None else memory * 1e9, replicas, _link(asked.link)
    )
    if asked.strategy != "auto" and asked.strategy not in _possible(machines):
        raise UserError(
            f"--strategy {asked.strategy} is not for {asked.nodes} x {asked.gpus} GPUs; there are "
            f"{', '.join(_possible(machines))}" + ("; hsdp needs --replicas 2 or more" if asked.gpus > 3 else "")
        )
    return machines


def _possible(machines: Machines) -> list[str]:
    if machines.processes == 1:
        return ["single", "zero2", "zero3_offload"]
    hsdp = ["hsdp"] if 1 < machines.replicas < machines.processes else []
    return ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", *hsdp]


def _link(asked: str | None) -> float | None:
    if asked is None:
        return None
    try:
        speed = LINKS.get(asked.lower()) or float(asked)
    except ValueError:
        speed = 0.0
    if not 0 < speed < math.inf:
        raise UserError(f"--link {asked}: give GB/s, or one of {', '.join(LINKS)}")
    return speed * 1e9


def make(config: Config, machines: Machines, asked: argparse.Namespace) -> dict[str, Any]:
    """The plan as plain values (bytes, seconds, images). Reads the data's index and the model's configuration."""
    # Slow to import; a mistake in the command should be told at once.
    from vit_dist.arguments import reporters
    from vit_dist.data.pipeline import build_data
    from vit_dist.data.sampler import GlobalBatchSampler
    from vit_dist.metrics import ClassificationMetrics
    from vit_dist.model import skeleton
    from vit_dist.schedule import curve, describe_rate, total_steps, warmup_steps
    from vit_dist.trainer import require_metric

    bundle.check(config)
    if config.finds_batch and machines.memory is None:
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
    model = skeleton(config.model, data.classes, data.input_size, cache_dir=config.data.cache_dir)
    sampler = GlobalBatchSampler(
        len(data.train), per_device_batch=batch.per_device, gradient_accumulation=batch.accumulation,
        world_size=batch.world_size, rank=0, seed=0, drop_last=config.training["dataloader_drop_last"],
    )  # fmt: skip
    steps = total_steps(config, sampler.steps_per_epoch)
    needed, batch = _memory(config, machines, batch, data.input_size, model, asked.strategy)
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
    plan |= needed
    plan["time"] = _time(config, machines, steps * batch.total, asked)
    plan["config"] = config.resolved()
    return plan


def _memory(
    config: Config, machines: Machines, batch: Batch, side: int, model: Any, asked: str
) -> tuple[dict[str, Any], Batch]:
    """`strategies`: bytes on a GPU and traffic of each; `strategy`: the one asked for or recommended, and why.

    With it the batch, split for that strategy if the micro-batch is to be found; each has its own in the table.
    """
    from vit_dist.auto_batch import search
    from vit_dist.cost import memory
    from vit_dist.strategy import mark_blocks

    mark_blocks(model)
    tensors, precision, optim = memory.Tensors.of(model), config.precision, str(config.training["optim"])
    checkpointing = bool(config.training.get("activation_checkpointing") or config.training["gradient_checkpointing"])
    saved = memory.activations(model, side, precision, checkpointing)
    room = None if machines.memory is None else int(memory.USABLE * machines.memory)
    share = batch.sizes[-1]

    def shards(name: str) -> int:
        return {"single": 1, "ddp": 1, "hsdp": machines.processes // machines.replicas}.get(name, machines.processes)

    def state(name: str, images: int) -> memory.State:
        return memory.state(
            name, tensors, shards=shards(name), precision=precision, optim=optim, accumulation=share // images
        )

    def total(name: str, images: int) -> int:
        return state(name, images).total + saved.of(images) + memory.RESERVE

    table: dict[str, dict[str, Any]] = {}
    splits = dict.fromkeys(_possible(machines), batch)
    for name in splits:
        if config.finds_batch and room is not None:
            found = search(batch.sizes, functools.partial(total, name), room)
            splits[name] = batch.split_into(found.size or 1, f"auto, by the memory model: {found.reason}")
        images = splits[name].per_device
        table[name] = {
            "per_device": images,
            **asdict(state(name, images)),
            "activations": saved.of(images),
            "reserve": memory.RESERVE,
            "total": total(name, images),
            "fits": None if room is None else total(name, images) <= room,
            "traffic": memory.traffic(
                name, tensors, shards=shards(name), world_size=machines.processes, precision=precision
            ),
            "checkpoint": memory.checkpoint_bytes(name, tensors, precision=precision, optim=optim),
        }
    chosen, why = _choose(asked, table, machines, config.finds_batch)
    kept = config.training["save_total_limit"]
    needed = {
        "strategy": chosen,
        "why": why,
        "strategies": table,
        "fits": table[chosen]["fits"],
        "disk": {"checkpoint": table[chosen]["checkpoint"], "kept": kept, "export": 4 * tensors.parameters},
    }
    return needed, splits[chosen]


def _choose(asked: str, table: dict[str, dict[str, Any]], machines: Machines, finds_batch: bool) -> tuple[str, str]:
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
    lower = "not even one image at once;" if finds_batch else "lower --per_device_train_batch_size,"
    return order[-1], f"nothing fits; {lower} add --activation_checkpointing, or use more GPUs"


REASONS = {
    "single": "one GPU: nothing to share",
    "ddp": "the whole training state fits on each GPU, and then nothing is faster",
    "zero1": "sharding the optimizer state is enough, for the traffic of DDP",
    "zero2": "sharding optimizer state and gradients is enough, for the traffic of DDP",
    "hsdp": "a node's GPUs hold the state together, and only gradients cross nodes",
    "fsdp2": "weights have to be sharded too; half as much traffic again as DDP",
    "zero3_offload": "the optimizer has to move to the host, which makes each step wait for the CPU",
}


def _time(config: Config, machines: Machines, images: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of training, if a speed was given or an earlier run of this folder measured one on GPUs."""
    rate, source = asked.images_per_second, "--images_per_second"
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


def render(plan: dict[str, Any]) -> list[str]:
    """The plan for people."""
    machines, batch, steps, rate = plan["machines"], plan["batch"], plan["steps"], plan["learning_rate"]
    where = f"{machines['nodes']} node{'s' if machines['nodes'] > 1 else ''} x {machines['gpus']} GPU"
    where += "s" if machines["gpus"] > 1 else ""
    if machines["memory"]:
        where += f" of {machines['memory'] / 1e9:g} GB"
    count = plan["parameters"]
    lines = [("plan", plan["source"])]
    lines += [("data" if i == 0 else "", line) for i, line in enumerate(plan["data"])]
    lines += [
        ("model", f"{plan['model']}, {count['all']:,} parameters, {count['trained']:,} trained"),
        ("devices", f"{where}, {plan['precision']}"),
        ("batch", str(Batch(**{key: value for key, value in batch.items() if key != "global"}))),
        ("steps", f"{steps['epoch']:,} per epoch, {steps['all']:,} in all, {steps['warmup']:,} of warm-up"),
        ("rate", rate["description"]),
    ]  # fmt: skip
    if rate["curve"]:
        lines.append(("", "  ".join(f"{step:,}: {value:.1e}" for step, value in rate["curve"].items())))
    lines.append(("strategy", f"{plan['strategy']}: {plan['why']}"))
    if machines["link"] and (sent := plan["strategies"][plan["strategy"]]["traffic"]):
        wait = f"{sent / machines['link'] * 1e3:,.1f} ms at {machines['link'] / 1e9:g} GB/s, less what overlaps"
        lines.append(("", f"a step sends {sent / 1e9:.2f} GB from each GPU: {wait} with the backward"))
    lines.append(("memory", "on one GPU, in GB; traffic in GB that a GPU sends per step"))
    columns = ("parameters", "gradients", "optimizer", "buffers", "activations", "reserve", "total", "traffic")
    lines.append(("", "".join([f"{'':<15}", *(f"{name:>12}" for name in columns), "  fits"])))
    for name, row in plan["strategies"].items():
        mark = "*" if name == plan["strategy"] else " "
        fits = {None: "?", True: "yes", False: "no"}[row["fits"]]
        host = f"  ({row['host'] / 1e9:.2f} on the host)" if row["host"] else ""
        numbers = "".join(f"{row[column] / 1e9:>12.2f}" for column in columns)
        host += f"  {row['per_device']} per device" if batch["note"] else ""
        lines.append(("", f"{mark}{name:<14}{numbers}  {fits}{host}"))
    disk = plan["disk"]
    folders = disk["kept"] + 1 if disk["kept"] else None  # the new one is written before an old one goes
    space = f"{folders * disk['checkpoint'] / 1e9:.2f} GB for {folders}" if folders else "all are kept"
    lines.append(
        ("disk", f"{disk['checkpoint'] / 1e9:.2f} GB per checkpoint, {space}; best/ {disk['export'] / 1e9:.2f} GB")
    )
    time = plan["time"]
    if time["seconds"] is not None:
        limit = time["limit"]
        judged = "" if limit is None else ", within the limit" if time["seconds"] < limit else ", MORE than the limit"
        lines.append(("time", f"{_clock(time['seconds'])} of training at {time['images_per_second']:,.0f} images/s "
                              f"({time['source']}){judged}"))  # fmt: skip
    else:
        lines.append(("time", "not known; give --images_per_second, or plan the folder of a finished run"))
    return [f"{title:<9}{line}" for title, line in lines]


def _clock(seconds: float) -> str:
    hours, rest = divmod(math.ceil(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
