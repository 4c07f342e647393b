"""Push what runs without a network kept for Weights & Biases: run this where there is one.

vit-dist sync runs/cifar10 runs/other
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_dist import console, entry
from vit_dist.callbacks.wandb import base_url, logged_in, unreachable
from vit_dist.errors import UserError
from vit_dist.files import open_for_writing
from vit_dist.parser import Parser
from vit_dist.redact import redact
from vit_dist.run.lock import run_lock

# wandb has then sent all whole records, and leaves the attempt without its mark: it may be written yet.
CUT_SHORT = "ends with an incomplete record"


def sync(runs: Sequence[Path]) -> None:
    """Push each attempt that wandb has not marked as pushed, the oldest first; all attempts of a run are one W&B run,
    and each appends to what is there.

    Raises UserError if there is nothing, no account or no way, and at the first attempt that is refused: what
    follows it must not be pushed before it.
    """
    kept = {run: _attempts(run) for run in runs}
    waiting = {run: [attempt for attempt in attempts if not _is_pushed(attempt)] for run, attempts in kept.items()}
    if any(waiting.values()):
        _require_wandb()
    for run, attempts in waiting.items():
        if len(kept[run]) > len(attempts):
            console.say(f"{run}: {len(kept[run]) - len(attempts)} of {len(kept[run])} attempts were pushed before")
        if attempts and attempts[-1] == kept[run][-1] and (reason := _in_use(run)):
            console.say(f"{run}: {attempts.pop().name} is left for later: {reason}")
        for attempt in attempts:
            console.say(f"{run}: pushed {attempt.name}{_push(attempt)}")


def _attempts(run: Path) -> list[Path]:
    """wandb's folders of an offline run, the oldest first: their names begin with the time."""
    if not (run / "run.json").is_file():
        raise UserError(f"{run} is no run folder (no run.json in it); give the --output_dir of a training")
    found = sorted(run.glob("wandb/offline-run-*/"))
    if not found:
        raise UserError(f"{run} has nothing for W&B (no wandb/offline-run-* in it): it was online, or W&B was off")
    return found


def _is_pushed(attempt: Path) -> bool:
    return any(attempt.glob("*.wandb.synced"))  # wandb's own mark


def _in_use(run: Path) -> str | None:
    """Why the newest attempt may still grow. Pushing it now would leave out its rest: wandb would mark it as pushed."""
    try:
        with run_lock(run, timeout=0):
            return None
    except UserError as error:
        return str(error)


def _require_wandb() -> None:
    if not logged_in():
        raise UserError("not logged in to W&B: run `wandb login`, or set WANDB_API_KEY")
    if problem := unreachable(base_url(os.environ)):
        raise UserError(f"W&B cannot be reached ({problem}); run this where there is a network")


def _push(attempt: Path) -> str:
    """What there is to say of it. Raises UserError if it was not pushed."""
    environ = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    command = [sys.executable, "-m", "wandb", "sync", str(attempt.resolve())]
    where = attempt.parents[1]  # it logs into ./wandb
    done = subprocess.run(command, env=environ, cwd=where, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if not _is_pushed(attempt) and CUT_SHORT in said:
        for log in attempt.glob("*.wandb"):
            os.close(open_for_writing(log.with_suffix(".wandb.synced"), 0))
        return ", whose end is missing: the job was killed"
    if not _is_pushed(attempt):  # it leaves with 0 also where it could not
        lines = said.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{attempt}: wandb did not push it: {redact(lines[-1])}")
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sync`; exit codes as `entry.run` has them."""

    def body() -> int:
        parser = Parser(
            prog="vit-dist sync",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", type=Path, help="run folders (--output_dir of a training)"
        )
        sync(parser.parse_args(argv).runs)
        return 0

    return entry.run(body, "interrupted; the same command goes on with what was not pushed")


if __name__ == "__main__":
    sys.exit(main())
