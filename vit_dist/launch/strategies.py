"""Strategies: how the training state is spread over processes. Each is a file for Accelerate, or plain torchrun."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from vit_dist.errors import UserError
from vit_dist.launch.topology import Asked, Topology
from vit_dist.listing import shortened

TORCHRUN = "torchrun"  # DDP without a file of Accelerate's
AGENT = "vit_dist.launch.agent"


@dataclass(frozen=True)
class Strategy:
    name: str
    file: Path | None = None  # None: started by torchrun
    own: bool = False  # a file of the user's

    @property
    def packages(self) -> list[str]:
        """What has to be installed."""
        more = [] if self.file is None else ["accelerate"]
        return ["torch", *more, *(["deepspeed"] if self.name.startswith("zero") and not self.own else [])]


def root() -> Path:
    """The folder with slurm/, launch/ and configs/accelerate/ in it: of the installed package, or of a checkout."""
    installed = Path(__file__).parents[1] / "cluster"
    return installed if installed.is_dir() else Path(__file__).parents[2]


def known() -> dict[str, Path]:
    """The files of configs/accelerate, by strategy."""
    return {path.stem: path for path in sorted((root() / "configs" / "accelerate").glob("*.yaml"))}


def find(name: str) -> Strategy:
    """Raises UserError for an unknown name, or a file that is no configuration of Accelerate."""
    files, shown = known(), shortened(name, 100)
    if name in files:
        return Strategy(name, files[name])
    if name == TORCHRUN:
        return Strategy(name)
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"--strategy {shown}: there is no such file; strategies are {', '.join(files)}")
        if "distributed_type" not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(
                f"--strategy {shown} is no configuration of Accelerate (no distributed_type); in launch/accelerate.sh "
                "the strategy comes first"
            )
        return Strategy(path.stem, path, own=True)
    near = difflib.get_close_matches(name, files, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown strategy {shown}; {hint}strategies are {', '.join(files)}")


def fitted(strategy: Strategy, topology: Topology, asked: Asked) -> tuple[Strategy | None, list[str], str]:
    """The strategy for this many processes (None: one process, started without a launcher), words for `accelerate
    launch`, and a note. Raises UserError for a strategy that this topology cannot have.
    """
    processes = topology.processes
    if strategy.name != "hsdp" and not strategy.own and asked.label("replicas") == "--replicas":
        raise UserError(f"--replicas is for hsdp, not for {strategy.name}: leave it out, or pass --strategy hsdp")
    if strategy.own:
        return strategy, [], ""
    match strategy.name:
        case "single":
            return None, [], ""
        case "torchrun":
            return (strategy if processes > 1 else None), [], ""
        case "ddp":
            if processes == 1:
                return None, [], "one process: nothing to average, so it is started as single"
            return (find("ddp_multinode") if topology.nodes > 1 else strategy), [], ""
        case "ddp_multinode" if topology.nodes == 1:
            raise UserError(
                f"ddp_multinode is for several nodes, but {asked.label('nodes')} is 1; set NNODES, NODE_RANK and "
                "MASTER_ADDR on every node, or use ddp"
            )
        case "fsdp2" if processes == 1:
            raise UserError("fsdp2 has nothing to shard over with one process; set --nproc to 2 or more, or use single")
        case "hsdp":
            return strategy, _hsdp_words(topology, asked), ""
    return strategy, [], ""


def _hsdp_words(topology: Topology, asked: Asked) -> list[str]:
    processes = topology.processes
    replicas = asked.number("replicas", topology.nodes, 1, processes)
    if replicas == 1:
        raise UserError("hsdp with 1 replica is fsdp2; use fsdp2, or set --replicas (HSDP_REPLICAS) to 2 or more")
    if processes % replicas or processes == replicas:
        raise UserError(
            f"hsdp cannot shard each of {replicas} replicas over {processes} / {replicas} processes; start more "
            "processes, or use ddp or fsdp2"
        )
    # Accelerate takes the sizes from the command line only if --use_fsdp stands there too.
    return [
        "--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config",
        "--parallelism_config_dp_replicate_size", str(replicas),
        "--parallelism_config_dp_shard_size", str(processes // replicas),
    ]  # fmt: skip


def launcher_words(strategy: Strategy, topology: Topology, more: list[str]) -> list[str]:
    """The words between the interpreter and `-m MODULE`."""
    words: list[object] = ["-m", AGENT]
    if strategy.file is None:
        words += ["torch.distributed.run", "--nnodes", topology.nodes, "--nproc-per-node", topology.per_node]
        if topology.port is None:
            words.append("--standalone")  # takes a free port itself, so that two runs on a machine do not meet
        else:
            words += ["--node-rank", topology.node_rank, "--master-addr", topology.address]
            words += ["--master-port", topology.port]
    else:
        # All counts on the command line, where they win over the file's. --num_processes is of all nodes.
        # --config_file always, or ~/.cache/huggingface/accelerate/default_config.yaml would decide. Port 0: a free one.
        words += ["accelerate.commands.launch", "--config_file", strategy.file]
        words += ["--num_processes", topology.processes, "--num_machines", topology.nodes]
        words += ["--machine_rank", topology.node_rank]
        words += ["--main_process_ip", topology.address, "--main_process_port", topology.port or 0]
        words += [*(["--same_network"] if topology.nodes > 1 else []), *more]
    return [str(word) for word in words]
