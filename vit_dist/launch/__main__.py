"""Starts training with `accelerate launch` and a strategy, or with torchrun; one process is started without them.

launch/accelerate.sh STRATEGY [train|doctor] [RECIPE] [--flag value ...]
launch/torchrun.sh [train|doctor] [RECIPE] [--flag value ...]

launch/accelerate.sh ddp --data ~/photos                        one process on each GPU of this machine
CUDA_VISIBLE_DEVICES=0,1 launch/accelerate.sh zero2 ...         on two of its GPUs
launch/accelerate.sh ddp --nproc 2 --data ~/photos              two processes, on CPUs if there is no GPU
launch/accelerate.sh ddp --nodes 2 --node_rank 0 --master_addr node1 ...   first of two nodes; 1 on the other
DRY_RUN=1 launch/accelerate.sh fsdp2                            shows the command and starts nothing

STRATEGY is a file of configs/accelerate without its ending, or the path of a configuration of your own.
`launch/accelerate.sh ddp train --help` lists the options of the training. `vit-dist train --strategy STRATEGY` does the
same. NNODES, NODE_RANK, MASTER_ADDR and others may stand in place of the flags: launch/README.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from vit_dist.errors import UserError
from vit_dist.launch import start, strategies
from vit_dist.launch.topology import FLAGS

MODULES = {"train": "vit_dist.train", "doctor": "vit_dist.commands.doctor"}


def main(argv: Sequence[str] | None = None) -> int:
    """Replaces this process by the launcher. Exit code 2 and one line for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        (sys.stdout if words else sys.stderr).write(usage())
        return 0 if words else 2
    try:
        strategy, *rest = words
        if strategy.startswith("-"):
            names = ", ".join(strategies.known())
            raise UserError(f"the strategy comes first: launch/accelerate.sh STRATEGY {strategy} ...; it is {names}")
        if rest[:1] == ["plan"]:
            raise UserError(f"plan starts nothing, so it needs no launcher: vit-dist plan {' '.join(rest[1:])}".strip())
        command = rest.pop(0) if rest and rest[0] in MODULES else "train"
        if "-h" in rest or "--help" in rest:  # help needs no processes and no GPU
            more = ["all"] if rest[-1] == "all" else []
            os.execv(sys.executable, [sys.executable, "-m", MODULES[command], "--help", *more])
        asked, arguments = start.split_flags(rest)
        if asked.strategy not in (None, strategy):
            raise UserError(f"two strategies, {strategy} and --strategy {asked.strategy}: leave one out")
        return start.execute(
            start.prepare(MODULES[command], arguments, replace(asked, strategy=strategy)), asked.dry_run
        )
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def usage() -> str:
    """The docstring, and a line for each strategy and flag."""
    lines = [(__doc__ or "").strip(), "", "strategies:"]
    for name, path in strategies.known().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"  {name:<15} {first}")
    lines += ["", "flags, and the variables that they replace:"]
    lines += [f"  --{name:<14}{variable:<16}{text}" for name, (variable, text) in FLAGS.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
