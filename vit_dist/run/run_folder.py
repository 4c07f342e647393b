"""What lies in a run folder beside checkpoints, and how it is written and read. Rank 0 writes."""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vit_dist import console
from vit_dist.checkpoint import store
from vit_dist.checkpoint.store import make_folder
from vit_dist.environment import job
from vit_dist.errors import UserError
from vit_dist.files import read_object, refuse_links, replacing
from vit_dist.redact import redact
from vit_dist.run.lock import LOCK
from vit_dist.terminal import one_line

CONFIG, CLASSES, RECORD, STATUS = "config.yaml", "classes.json", "run.json", "status.json"
METRICS, RESULTS = "metrics.jsonl", "all_results.json"
JOBS = "jobs"  # what each job of a batch system printed; not of the run
BEST, PARTIAL_BEST, PREDICTIONS, FAILURE = "best", ".best.partial", "predictions.parquet", "failure.json"
WRITTEN = (  # every name in the folder that a run writes, but for checkpoints, which are renamed and never written
    LOCK, store.STAGING, store.TRASH, CONFIG, CLASSES, RECORD, STATUS, METRICS, RESULTS, JOBS, BEST, PARTIAL_BEST,
    PREDICTIONS, FAILURE, "logs", "profile", "wandb",
)  # fmt: skip


def describe(folder: Path) -> str:
    """One line about a run folder."""
    status, results = read_json(folder / STATUS), read_json(folder / RESULTS)
    parts = [f"{folder}: {status.get('state', 'unknown')}"]
    parts += [
        f"{kind} accuracy {found:.4f}"
        for kind in ("eval", "test")
        if isinstance(found := results.get(f"{kind}_accuracy"), (int, float))
    ]
    parts += [f"stopped early at step {results.get('train_steps')}"] if results.get("stopped_early") else []
    count = sum(map(store.is_committed, store.checkpoints(folder)))
    parts += [f"{count} checkpoint{'s' if count != 1 else ''}"] if count else []
    return ", ".join(parts)


def environment() -> dict[str, Any]:
    """Versions, and the commit of this package's checkout if it is one."""
    return {"versions": versions(), "git_commit": git_commit()}


def versions() -> dict[str, str]:
    """Of Python and the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("vit_dist", "torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, `+` appended if files were changed since; else None."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:
            return None  # installed somewhere inside another project's checkout
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty else "")


def write_status(folder: Path, state: str, **details: Any) -> None:
    """status.json: `state` is running, preempted, failed or complete; replaced in one step, so that no reader sees half
    of it. In a job also `jobs/<job>/status`, with a line `key=value` for each, for shells.
    """
    facts: dict[str, Any] = {
        "state": state,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job(),
    }
    facts |= {key: redact(value) if isinstance(value, str) else value for key, value in details.items()}
    write_json(folder / STATUS, facts)
    if facts["job"] and (logs := folder / JOBS / facts["job"]).is_dir():
        lines = [f"{key}={one_line(str(value))}\n" for key, value in facts.items() if value is not None]
        with replacing(logs / "status") as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is none or it was cut short."""
    return read_object(path)


def is_new(folder: Path) -> bool:
    return not folder.exists() or not any(path.name not in (LOCK, JOBS) for path in folder.iterdir())


def keep_output(folder: Path, rank: int, environ: Mapping[str, str] = os.environ) -> None:
    """In a job of a batch system (VIT_DIST_JOB_ID), keep what this rank prints in jobs/<job>/rank-<rank>.log."""
    name = job(environ)
    if name is None:
        return
    path = folder / JOBS / name / f"rank-{rank}.log"
    try:
        make_folder(path.parent)
        refuse_links([path.parents[1], path.parent])
        console.keep(path)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error}") from None


def backup_path(folder: Path) -> Path:
    """<folder>.previous, or the first of <folder>.previous-2, -3, ... that is free: nothing is ever overwritten."""
    first = folder.resolve().with_name(folder.resolve().name + ".previous")
    return next(
        p
        for n in itertools.count(1)
        if not (p := first if n == 1 else Path(f"{first}-{n}")).exists() and not p.is_symlink()
    )
