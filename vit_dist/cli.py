"""vit-dist: one verb per task.

vit-dist train [RECIPE] [--flag value ...]     one process per visible GPU, or one on the CPU
vit-dist plan [RECIPE] [--gpus N] [--nodes N]  what a run would do and need there; starts nothing
vit-dist doctor [RECIPE] [--flag value ...]    the same processes, to check what training would meet
vit-dist bench [RECIPE] [--flag value ...]     how fast this machine trains, and what holds it up
vit-dist cache [RECIPE] [--list]               photos decoded and shrunk once, ahead of training
vit-dist sweep SWEEP.yaml [--run N]            the members of a sweep and what became of them; trains one
vit-dist slurm [options of the job --] VERB .. checks train, doctor or sweep, then submits it as a batch job
vit-dist fetch [RECIPE] [--bundle FOLDER]      what a run takes from the hub, into a folder for machines without network
vit-dist sync RUN [RUN ...]                    what runs without network kept for Weights & Biases, pushed
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

VERBS = {
    "train": "fine-tune a Vision Transformer; `vit-dist train --help` lists its options",
    "plan": "show what a run would do and need on given GPUs; starts nothing, needs no GPU",
    "doctor": "check processes, data, caches, disk and network before a run, without training",
    "bench": "measure how fast one device of this machine trains a recipe, part by part",
    "cache": "decode and shrink a recipe's images once, ahead of training; list or remove such caches",
    "sweep": "show a sweep's members and what became of them, or train one here",
    "slurm": "check a command on the login node and submit it as a job; --print shows the job",
    "fetch": "bring model, data set and metrics into a folder, for machines without a network",
    "sync": "push what runs without a network kept for Weights & Biases",
}

LAUNCHED = ("train", "doctor")  # in a process for each visible GPU; the others run in this process


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; exit code 2 for a command that makes no sense."""
    open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help", "help"):
        lines = [f"  {name:<8}{help}" for name, help in VERBS.items()]
        sys.stdout.write("\n".join(["usage: vit-dist VERB ...", "", *lines, "", f"version {__version__}", ""]))
        return 0
    if verb == "--version":
        sys.stdout.write(f"{__version__}\n")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(VERBS)}"
        sys.stderr.write(f"error: unknown verb {one_line(verb[:80])}; {hint}\n")
        return 2
    spin_briefly()
    try:
        return _run(verb, argv[1:])
    except KeyboardInterrupt:  # while the libraries are loaded; from there on the verbs take care of it
        return 130
    except Exception as error:
        said = str(error) if isinstance(error, errors.UserError) else errors.of_the_machine(error)
        if said is None:
            raise
        sys.stderr.write(f"error: {said}\n")
        return 2


def _run(verb: str, argv: list[str]) -> int:
    """Start the processes of a run, or go on in this one."""
    if verb == "sweep" and "--version" not in argv:
        from vit_dist.verbs.sweep import main as sweep

        return sweep(argv, lambda arguments: _run("train", arguments))
    name = "vit_dist.train" if verb == "train" else f"vit_dist.verbs.{verb}"
    asked = None
    if verb in LAUNCHED and start.has_flags(argv):
        asked, argv = start.split_flags(argv)
    if "--version" in argv or verb == "train":
        code = first_look.tell(argv, __version__)
        if code is not None:
            return code
    if verb in LAUNCHED and not _only_help(argv):
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
