"""vit-dist: one verb per task.

vit-dist train [RECIPE] [--flag value ...]    one process per visible GPU, or one on the CPU
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from vit_dist import __version__

VERBS = {"train": "fine-tune a Vision Transformer; `vit-dist train --help` lists its options"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; exit code 2 for a command that makes no sense."""
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
        sys.stderr.write(f"error: unknown verb {verb}; {hint}\n")
        return 2
    return _train(argv[1:])


def _train(argv: list[str]) -> int:
    """Start one process per visible GPU, or train in this one if there is at most one or a launcher is at work."""
    command = launch_command(argv, 0 if "WORLD_SIZE" in os.environ or _only_help(argv) else _visible_gpus())
    if command is not None:
        os.execv(command[0], command)
    from vit_dist.train import main as train

    return train(argv)


def launch_command(argv: list[str], gpus: int) -> list[str] | None:
    """The torchrun command for several GPUs of this machine; None for fewer than two."""
    if gpus < 2:
        return None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    return [*launcher, "-m", "vit_dist.train", *argv]


def _visible_gpus() -> int:
    import torch  # counts through NVML and starts no CUDA context

    return torch.cuda.device_count()


def _only_help(argv: list[str]) -> bool:
    return "--help" in argv or "-h" in argv


if __name__ == "__main__":
    sys.exit(main())
