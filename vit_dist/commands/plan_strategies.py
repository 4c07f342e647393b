"""What each strategy would need and reach on given machines, and which one is recommended."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from vit_dist.auto_batch import search
from vit_dist.batch import Batch
from vit_dist.commands.cluster_spec import ClusterSpec, valid_strategies
from vit_dist.config import Config
from vit_dist.cost import memory, traffic
from vit_dist.strategy import set_fsdp_wrap_policy

# The cheapest first; hsdp before fsdp2 on several nodes.
AUTO = ("single", "ddp", "zero1", "zero2", "fsdp2", "zero3_offload")
REASONS = {
    "single": "one GPU: nothing to share",
    "ddp": "the whole training state fits on each GPU: nothing has to be sharded",
    "zero1": "sharding the optimizer state is enough; DeepSpeed waits for all that it sends",
    "zero2": "sharding optimizer state and gradients is enough; DeepSpeed waits for all that it sends",
    "hsdp": "a node's GPUs hold the state together, and only gradients cross nodes",
    "fsdp2": "weights have to be sharded too, and gathered for each pass",
    "zero3_offload": "the optimizer has to move to the host, which makes each step wait for the CPU",
}


def compare_strategies(
    config: Config,
    machines: ClusterSpec,
    batch: Batch,
    model: PreTrainedModel,
    side: int,
    asked: str,
    images: int,
) -> tuple[dict[str, Any], Batch]:
    """`strategies`: bytes on a GPU, traffic of each; `strategy`: the one asked for or recommended, and
    `why`; `fits`; `disk`. With it the batch as that strategy splits it: each finds a micro-batch of its own if it is to
    be found. `side` in pixels; `images`: bytes of them that stay on each GPU.
    """
    set_fsdp_wrap_policy(model)
    checkpointing = bool(config.training.get("activation_checkpointing") or config.training["gradient_checkpointing"])
    saved = memory.activations(model, side, config.precision, checkpointing)
    tensors = memory.Tensors.of(model)
    each = {
        name: _Strategy(name, config, machines, tensors, saved, images).row(batch)
        for name in valid_strategies(machines)
    }
    table = {name: row for name, (row, _) in each.items()}
    chosen, why = _choose(asked, table, machines, config.finds_batch)
    return {
        "strategy": chosen,
        "why": why,
        "strategies": table,
        "fits": table[chosen]["fits"],
        "disk": {
            "checkpoint": table[chosen]["checkpoint"],
            "kept": config.training["save_total_limit"],
            "export": 4 * tensors.parameters,
        },
    }, each[chosen][1]


@dataclass(frozen=True)
class _Strategy:
    name: str
    config: Config
    machines: ClusterSpec
    tensors: memory.Tensors
    saved: memory.Activations
    images: int

    @property
    def shards(self) -> int:
        """GPUs that share one copy of what is sharded."""
        machines = self.machines
        whole = {"single": 1, "ddp": 1, "hsdp": machines.processes // machines.replicas}
        return whole.get(self.name, machines.processes)

    def state(self, accumulation: int) -> memory.State:
        return memory.state(
            self.name, self.tensors, shards=self.shards, precision=self.config.precision,
            optim=str(self.config.training["optim"]), accumulation=accumulation,
        )  # fmt: skip

    def total(self, share: int, images: int) -> int:
        """Bytes on a GPU that takes so many images of its `share` at once."""
        return self.state(share // images).total + self.saved.of(images) + self.images + memory.RESERVE

    def row(self, batch: Batch) -> tuple[dict[str, Any], Batch]:
        """Its line of the table, and the batch as it is split for it."""
        room = None if self.machines.memory is None else int(memory.USABLE * self.machines.memory)
        share = batch.per_device * batch.accumulation
        if self.config.finds_batch and room is not None and not self.machines.cpu:
            found = search(batch.sizes, partial(self.total, share), room)
            batch = batch.split_into(found.size or 1, f"auto, by the memory model: {found.reason}")
        total = self.total(share, batch.per_device)
        sent = self._collectives()
        known = self.machines.link is not None or not sent
        return {
            "per_device": batch.per_device,
            **asdict(self.state(batch.accumulation)),
            "activations": self.saved.of(batch.per_device),
            "images": self.images,
            "reserve": memory.RESERVE,
            "total": total,
            "fits": None if room is None else total <= room,
            "traffic": traffic.bytes_per_step(sent, batch.accumulation),
            "traffic_seconds": traffic.seconds_per_step(sent, self._group, batch.accumulation) if known else None,
            "checkpoint": memory.checkpoint_bytes(
                self.name, self.tensors, precision=self.config.precision, optim=str(self.config.training["optim"])
            ),
        }, batch

    def _collectives(self) -> list[traffic.Collective]:
        tensors, config = self.tensors, self.config
        return traffic.collectives(
            self.name, weights=tensors.parameters, trained=tensors.trained_parameters, blocks=tensors.groups,
            devices=self.machines.processes, shards=self.shards, size=4 if config.precision == "fp32" else 2,
            ddp_size=2 if config.scaling.ddp_bf16_all_reduce else 4,
        )  # fmt: skip

    def _group(self, one: traffic.Collective) -> traffic.Group:
        """The processes that run a collective. A replica's GPUs are neighbours; its counterparts are on other nodes."""
        machines = self.machines
        nodes = {"world": machines.nodes, "shards": -(-self.shards // machines.gpus),
                 "replicas": min(one.devices, machines.nodes)}[one.group]  # fmt: skip
        speed = (machines.node_link if nodes == 1 else None) or machines.link or math.inf
        if one.group == "replicas" and nodes > 1:
            speed /= min(self.shards, machines.gpus)  # as many rings share a node's network
        return traffic.Group(one.devices, nodes, speed)


def _choose(asked: str, table: dict[str, dict[str, Any]], machines: ClusterSpec, finds_batch: bool) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for"
    if "single" in table and table["single"]["fits"] in (None, True):
        return "single", "one process: nothing to share" if machines.cpu else REASONS["single"]
    if machines.memory is None:
        return "ddp", "nothing has to be sharded where it fits; give --gpu or --gpu_memory to know whether it does"
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
