"""The command that starts the processes of a run, from flags to exec.

Flags of the launch (`--strategy`, `--nproc`, ...) may stand anywhere among those of the run.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

from vit_dist.environment import job_cores
from vit_dist.errors import UserError
from vit_dist.launch.gpus import Gpus, visible_gpus
from vit_dist.launch.network import check_network, check_packages, interface_of, is_here
from vit_dist.launch.strategies import TORCHRUN, find, fitted, launcher_words
from vit_dist.launch.topology import FLAGS, HERE, Asked, Topology, environment_of, host, read_topology
from vit_dist.parser import Parser

# What an outer launcher leaves would make a single process wait for others.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Start:
    """A command with changes of the environment, and remarks for the user."""

    command: list[str]
    variables: dict[str, str]
    notes: list[str]
    removed: tuple[str, ...] = ()

    def shown(self, environ: MutableMapping[str, str]) -> str:
        """A line to paste into a shell."""
        changed = [f"{name}={value}" for name, value in self.variables.items() if environ.get(name) != value]
        unset = [word for name in self.removed for word in ("-u", name)]
        return shlex.join(["env", *unset, *changed, *self.command])


def split_flags(argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> tuple[Asked, list[str]]:
    """The launch flags in `argv`, and all other words."""
    parser = Parser(prog="vit-dist train", add_help=False, allow_abbrev=False)
    parser.add_argument("--strategy")
    for name in FLAGS:
        parser.add_argument(f"--{name}")
    parser.add_argument("--dry_run", action="store_true")
    flags, rest = parser.parse_known_args(list(argv))
    if flags.strategy == "":
        raise UserError("--strategy needs a name, such as ddp or fsdp2")
    return Asked.of(flags, environ), rest


def has_flags(argv: Sequence[str]) -> bool:
    """Whether the command line itself says how to start processes; variables alone do not."""
    names = {f"--{name}" for name in ("strategy", "dry_run", *FLAGS)}
    return any(word.partition("=")[0] in names for word in argv)


def prepare(module: str, arguments: Sequence[str], asked: Asked) -> Start:
    """The start of `module` under the strategy that was asked for, checked on this node. Raises UserError."""
    environ = os.environ
    strategy = find(asked.strategy or TORCHRUN)
    asked = _as_single(asked) if strategy.name == "single" else asked
    gpus = visible_gpus(environ, ask_torch=asked.text("nproc") is None)
    topology = read_topology(asked, gpus, environ)
    chosen, words, note = fitted(strategy, topology, asked)
    check_packages(strategy.packages)
    check_network(topology, asked)
    variables = environment_of(topology, job_cores(environ), environ)
    interface = interface_of(topology)
    if interface and not environ.get("GLOO_SOCKET_IFNAME"):
        variables["GLOO_SOCKET_IFNAME"] = interface
    notes = [note] if note else []
    if topology.node_rank > 0 and is_here(topology.address):
        label = asked.label("master_addr")
        notes.append(f"{label}={topology.address} is {host()} itself; if node 0 is another machine, no process answers")
    run = ["-m", module, *arguments]
    if chosen is None:  # a signal to a launcher of one process would not reach it
        return Start([sys.executable, *run], variables, notes, OF_LAUNCHERS)
    return Start([sys.executable, *launcher_words(chosen, topology, words), *run], variables, notes)


def _as_single(asked: Asked) -> Asked:
    """With one process. Raises UserError if several were asked for."""
    if asked.number("nodes", 1, 1, 99999) > 1 or asked.number("nproc", 1, 1, 9999) > 1:
        raise UserError(
            f"single is one process, but {asked.label('nodes')} is {asked.text('nodes') or 1} and "
            f"{asked.label('nproc')} is {asked.text('nproc') or 1}; use ddp"
        )
    return replace(asked, values={**asked.values, "nproc": ("1", "--strategy single")})


def of_this_machine(module: str, arguments: Sequence[str], gpus: Gpus) -> Start | None:
    """Without launch flags: a process for each visible GPU; None for fewer than two."""
    if gpus.count < 2:
        return None
    topology = Topology(1, 0, gpus.count, HERE, None)
    words = launcher_words(find(TORCHRUN), topology, [])
    variables = environment_of(topology, job_cores(), os.environ)
    return Start([sys.executable, *words, "-m", module, *arguments], variables, [])


def execute(start: Start, dry_run: bool) -> int:
    """Replace this process by the command, so that signals reach it; or print it."""
    for note in start.notes:
        sys.stderr.write(f"note: {note}\n")
    if dry_run:
        sys.stdout.write(start.shown(os.environ) + "\n")
        return 0
    for name in start.removed:
        os.environ.pop(name, None)
    os.environ.update(start.variables)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(start.command[0], start.command)
