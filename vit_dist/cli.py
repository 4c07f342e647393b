"""vit-dist: one command per task.

vit-dist train [RECIPE] [--flag value ...]     trains: one process per visible GPU, or one on the CPU
vit-dist plan [RECIPE] [--gpus N] [--nodes N]  shows steps, memory and time of a run on given GPUs; starts nothing
vit-dist doctor [RECIPE] [--flag value ...]    checks processes, data, disk and network; trains nothing
vit-dist bench [RECIPE] [--flag value ...]     measures the throughput of this machine and its bottleneck
vit-dist cache [RECIPE] [--list]               decodes and shrinks photos once, ahead of training
vit-dist sweep SWEEP.yaml [--run N]            lists the members of a sweep with their results; trains one
vit-dist slurm [options --] COMMAND ...        checks train, doctor or sweep, then submits it as a batch job
vit-dist fetch [RECIPE] [--bundle FOLDER]      downloads data, model and metrics for machines without a network
vit-dist sync RUN [RUN ...]                    uploads offline Weights & Biases runs
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from vit_dist import __version__, errors, first_look
from vit_dist.launch import start
from vit_dist.launch.gpus import visible_gpus
from vit_dist.terminal import one_line, open_standard_streams
from vit_dist.threads import spin_briefly

COMMANDS = {
    "train": "fine-tune a Vision Transformer; `vit-dist train --help` lists its options",
    "plan": "show steps, memory and time of a run on given GPUs; starts nothing, needs no GPU",
    "doctor": "check processes, data, caches, disk and network before a run; trains nothing",
    "bench": "measure the throughput of one device of this machine, part by part",
    "cache": "decode and shrink a recipe's images once, ahead of training; list or remove such caches",
    "sweep": "list the members of a sweep with their results, or train one here",
    "slurm": "check a command on the login node and submit it as a job; --print shows the job",
    "fetch": "download data, model and metrics into a folder, for machines without a network",
    "sync": "upload offline Weights & Biases runs",
}

LAUNCHED = ("train", "doctor")  # in a process for each visible GPU; the others run in this process


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit code 2 for a command that makes no sense."""
    open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "help"):
        lines = [f"  {name:<8}{help}" for name, help in COMMANDS.items()]
        sys.stdout.write("\n".join(["usage: vit-dist COMMAND ...", "", *lines, "", f"version {__version__}", ""]))
        return 0
    if command == "--version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(COMMANDS)}"
        sys.stderr.write(f"error: unknown command {one_line(command[:80])}; {hint}\n")
        return 2
    spin_briefly()
    try:
        return _run(command, argv[1:])
    except KeyboardInterrupt:  # while the libraries are loaded; from there on the commands take care of it
        return 130
    except Exception as error:
        said = str(error) if isinstance(error, errors.UserError) else errors.of_the_machine(error)
        if said is None:
            raise
        sys.stderr.write(f"error: {said}\n")
        return 2


def _run(command: str, argv: list[str]) -> int:
    """Start the processes of a run, or go on in this one."""
    if command == "sweep" and "--version" not in argv:
        from vit_dist.commands.sweep import main as sweep

        return sweep(argv, lambda arguments: _run("train", arguments))
    name = "vit_dist.train" if command == "train" else f"vit_dist.commands.{command}"
    asked = None
    if command in LAUNCHED and start.has_flags(argv):
        asked, argv = start.split_flags(argv)
    if "--version" in argv or command == "train":
        code = first_look.tell(argv, __version__)
        if code is not None:
            return code
    if command in LAUNCHED and not _only_help(argv):
        launch = None
        if asked:
            launch = start.prepare(name, argv, asked)
        elif "WORLD_SIZE" not in os.environ:  # else a launcher has started this process
            launch = start.of_this_machine(name, argv, visible_gpus())
        if launch:
            return start.execute(launch, bool(asked and asked.dry_run))
    return importlib.import_module(name).main(argv)


def _only_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


if __name__ == "__main__":
    sys.exit(main())
