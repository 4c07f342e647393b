"""The run folder on rank 0: what an earlier attempt left there, and the state of this one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from vit_dist.checkpoint import checkpoints, damage, obstacle, trainer_state
from vit_dist.config import Config, write_config
from vit_dist.distributed import first_to_fail, launched_rank
from vit_dist.errors import UserError
from vit_dist.files import replacing

CONFIG, CLASSES, RECORD, STATUS = "config.yaml", "classes.json", "run.json", "status.json"
METRICS, RESULTS = "metrics.jsonl", "all_results.json"

# Settings that may differ between two attempts of one run: they change where it runs or what is shown, not what it
# computes. Batch size and accumulation may change as long as their product over all processes does not.
FREE = {
    "output_dir", "fresh", "logging_dir", "cache_dir", "report_to", "run_name", "project", "disable_tqdm",
    "log_level", "log_level_replica", "log_on_each_node", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "save_total_limit", "resume_from_checkpoint", "local_rank", "ddp_timeout", "ddp_backend", "use_cpu",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size",
    "do_train", "do_eval", "do_predict", "verify_images", "eval_accumulation_steps", "deepspeed", "fsdp", "fsdp_config",
}  # fmt: skip


PINNED = ("data", "global_batch_size", "model_revision")  # facts that must not change between two attempts


@dataclass
class Attempt:
    """One start of a run."""

    number: int = 1
    checkpoint: str | None = None  # to resume from
    wandb_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    finished: str | None = None  # what a complete run has to say, if there is nothing to do
    replaces: str | None = None  # the earlier run that `--fresh` moves aside
    notes: list[str] = field(default_factory=list)


def inspect(config: Config, strategy: str, world_size: int) -> Attempt:
    """Decide what to do about the run folder, without changing anything in it.

    Raises UserError if the folder is not a run folder, or holds a run with other settings or one that this launch
    cannot resume.
    """
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another --output_dir")
    _check_asked_checkpoint(config)
    if not folder.exists() or not any(folder.iterdir()):
        return Attempt()
    status, record = read_json(folder / STATUS), read_json(folder / RECORD)
    if not any((folder / name).exists() for name in (STATUS, RECORD, CONFIG)):
        raise UserError(f"{folder} is not empty and not a run folder (no {STATUS}); choose another --output_dir")
    summary = describe(folder)
    if config.run.fresh:
        return Attempt(replaces=summary)
    attempt = Attempt(number=record.get("attempts", 0) + 1)
    complete = status.get("state") == "complete"
    if not complete:
        attempt.checkpoint, attempt.notes = _newest_checkpoint(config, strategy, world_size)
        before = record.get("strategy", strategy), record.get("world_size", world_size)
        if attempt.checkpoint and before != (strategy, world_size):
            attempt.notes.append(f"was {before[0]} on {before[1]} processes, goes on as {strategy} on {world_size}")
    changed = _changes(folder / CONFIG, config)
    if changed and (complete or attempt.checkpoint):
        raise UserError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Give the same settings to continue it, "
            "another --output_dir for a new run, or --fresh to start over"
        )
    if not changed:  # else nothing was saved that other settings could spoil: a new run
        attempt.wandb_id = record.get("wandb_id", attempt.wandb_id)
    if complete:
        attempt.finished = f"{summary}. Nothing to do; --fresh starts over and moves it to {_aside(folder)}"
    return attempt


def describe(folder: Path) -> str:
    """One line about a run folder."""
    status, results = read_json(folder / STATUS), read_json(folder / RESULTS)
    parts = [f"{folder}: {status.get('state', 'unknown')}"]
    parts += [
        f"{kind} accuracy {results[key]:.4f}" for kind in ("eval", "test") if (key := f"{kind}_accuracy") in results
    ]
    count = len(list(folder.glob("checkpoint-*")))
    parts += [f"{count} checkpoint{'s' if count != 1 else ''}"] if count else []
    return ", ".join(parts)


def facts(
    data: dict[str, Any], model_revision: str | None, world_size: int, global_batch: int, strategy: str, device: str
) -> dict[str, Any]:
    """What the run record states beyond the settings."""
    return {
        "world_size": world_size,
        "strategy": strategy,
        "device": device,
        "global_batch_size": global_batch,
        "data": data,
        "model_revision": model_revision,
        **environment(),
    }


@contextlib.contextmanager
def failure_recorded(folder: Path) -> Iterator[None]:
    """Any rank: if the block fails here first, status.json says so."""
    try:
        yield
    except BaseException as error:
        if first_to_fail():
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # a full disk may be what failed; the first error is the one to show
                write_status(folder, "failed", reason=reason, rank=launched_rank())
        raise


def open_attempt(config: Config, attempt: Attempt, classes: list[str], facts: dict[str, Any]) -> None:
    """Write the attempt's settings, class list and record; `facts` are fingerprints and batch arithmetic.

    Raises UserError if the data or the global batch are not those that the run began with, or nothing can be written.
    """
    folder = config.output_dir
    try:
        if attempt.replaces:
            aside = _aside(folder)
            folder.rename(aside)
            attempt.notes.append(f"--fresh: {attempt.replaces}; moved to {aside}; leave --fresh out to continue")
        before = read_json(folder / RECORD)
        changed = [key for key in PINNED if key in before and before[key] != facts[key]]
        if changed and attempt.checkpoint:
            raise UserError(_fact_message(folder, changed[0], before[changed[0]], facts[changed[0]]))
        if changed or before.get("wandb_id") != attempt.wandb_id:  # not a continuation
            (folder / METRICS).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_status(folder, "running", attempt=attempt.number)  # first: it marks the folder as a run's
        with replacing(folder / CONFIG) as partial:
            write_config(config, partial)
        write_json(folder / CLASSES, {"classes": classes, "sha256": facts["data"]["classes"]})
        write_json(folder / RECORD, {"attempts": attempt.number, "wandb_id": attempt.wandb_id, **facts})
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error}") from None


def _fact_message(folder: Path, key: str, before: Any, now: Any) -> str:
    if key == "global_batch_size":
        return (
            f"{folder} was trained with a global batch of {before} images, this launch makes {now}: set "
            "--per_device_train_batch_size and --gradient_accumulation_steps so that their product with the number "
            "of processes is the same"
        )
    changed = [name for name in now if before.get(name) != now[name]] if isinstance(now, dict) else []
    detail = f" ({', '.join(changed)})" if changed else ""
    return (
        f"{folder}: the {key} changed since the run began{detail}; use another --output_dir, or --fresh to start over"
    )


def write_status(folder: Path, state: str, **details: Any) -> None:
    """status.json: `state` is running, complete or failed; replaced in one step, so that no reader sees half of it."""
    facts = {
        "state": state,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    write_json(folder / STATUS, {**facts, **details})


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is none or it was cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def environment() -> dict[str, Any]:
    """Versions, and the commit of this package's checkout if it is one."""
    versions = {"python": platform.python_version()}
    for name in ("vit_dist", "torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "pillow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"versions": versions, "git_commit": git_commit()}


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


def _aside(folder: Path) -> Path:
    """<folder>.previous, or the first of <folder>.previous-2, -3, ... that is free: nothing is ever overwritten."""
    first = folder.resolve().with_name(folder.resolve().name + ".previous")
    return next(p for n in itertools.count(1) if not (p := first if n == 1 else Path(f"{first}-{n}")).exists())


def _check_asked_checkpoint(config: Config) -> None:
    asked = config.training["resume_from_checkpoint"]
    if asked and Path(asked).resolve().parent != config.output_dir.resolve():
        raise UserError(
            f"resume_from_checkpoint={asked} is not a checkpoint of the run in {config.output_dir}; to train on from "
            f"another run's weights, start a new run with --model {asked}"
        )


def _newest_checkpoint(config: Config, strategy: str, world_size: int) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint, and a note on each newer one that is not.

    Raises UserError if this launch cannot resume from it: going on from another one would lose work.
    """
    asked = config.training["resume_from_checkpoint"]
    notes: list[str] = []
    for path in [Path(asked)] if asked else checkpoints(config.output_dir):
        reason = damage(path)
        if reason and asked:
            raise UserError(f"resume_from_checkpoint={asked}: {reason}")
        if reason:
            notes.append(f"{path} is not whole ({reason}) and is passed over")
        elif (best := trainer_state(path).get("best_global_step")) and damage(config.output_dir / f"checkpoint-{best}"):
            raise UserError(
                f"{path} names checkpoint-{best} as the best so far, which is missing or not whole: bring it back, or "
                f"remove {path} to go on from an older one"
            )
        elif reason := obstacle(path, strategy, world_size):
            raise UserError(f"{path} cannot be resumed by this launch ({strategy}, {world_size} processes): {reason}")
        else:
            return str(path), notes
    return None, notes


def _changes(path: Path, config: Config) -> list[str]:
    """Settings that differ from those in a run's config.yaml, where that matters."""
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        return [f"{path} cannot be read"]
    now = config.resolved()
    return [
        f"{key} {before[key]!r} -> {now[key]!r}"
        for key in now
        if key not in FREE and key in before and before[key] != now[key]
    ]
