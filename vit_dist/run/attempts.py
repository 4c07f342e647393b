"""One start of a run: what an earlier one left and what may differ from it decide how this one begins. On rank 0."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_dist.batch import Batch
from vit_dist.callbacks.metrics_file import truncate_metrics
from vit_dist.checkpoint import store
from vit_dist.checkpoint.load import resume_incompatibility
from vit_dist.config import Config, write_config
from vit_dist.environment import integer, job
from vit_dist.errors import UserError
from vit_dist.files import is_sealed, refuse_links, replacing, seal
from vit_dist.run.lock import LOCK
from vit_dist.run.run_folder import (
    BEST,
    CLASSES,
    CONFIG,
    JOBS,
    METRICS,
    RECORD,
    STATUS,
    WRITTEN,
    backup_path,
    describe,
    environment,
    is_new,
    read_json,
    versions,
    write_json,
    write_status,
)

# Settings that may differ between two attempts of one run: they change where it runs or what is shown, not what it
# computes. Batch size and accumulation may change as long as their product over all processes does not.
FREE = {
    "output_dir", "fresh", "logging_dir", "cache_dir", "report_to", "run_name", "project", "disable_tqdm",
    "log_level", "log_level_replica", "log_on_each_node", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "save_total_limit", "keep_checkpoints", "resume_from_checkpoint", "local_rank", "ddp_timeout", "ddp_backend",
    "use_cpu",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "global_batch_size",
    "do_train", "do_eval", "do_predict", "verify_images", "eval_accumulation_steps", "deepspeed", "fsdp", "fsdp_config",
    "max_time", "hang_timeout", "save_keep_every", "measure_peak", "profile",
}  # fmt: skip

PINNED = ("data", "global_batch_size", "model_revision")  # facts that must not change between two attempts
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")  # settings of the batch
FIXED = (  # a checkpoint's state would not fit: shapes, or what was best so far
    "optim", "lr_scheduler_type", "image_size", "from_scratch", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
OF_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
MOST_STALLED = 3  # attempts that begin at the same step and get no further


def new_id() -> str:
    """Names a run, in its checkpoints and at Weights & Biases."""
    return uuid.uuid4().hex[:12]


@dataclass
class Attempt:
    """One start of a run."""

    number: int = 1
    checkpoint: str | None = None  # to resume from
    begins_at: int = 0  # its step
    image_source: str | None = None  # where the pixels of its steps were made, if that is known
    stalled: int = 0  # earlier attempts that began there too
    changes: list[dict[str, Any]] = field(default_factory=list)  # what --allow_change let pass, of all attempts
    wandb_id: str = field(default_factory=new_id)
    finished: str | None = None  # what a complete run has to say, if there is nothing to do
    replaces: str | None = None  # the earlier run that `--fresh` moves aside
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # what run.json says of it, once it is open
    processes: list[tuple[str, int]] = field(default_factory=list)  # host and process id of each rank


def check(config: Config) -> None:
    """Raises UserError for a folder that no run may have: a file, somebody's work, or one that others may change."""
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another --output_dir")
    complete = read_json(folder / STATUS).get("state") == "complete"
    written = (LOCK, JOBS) if complete or config.run.fresh else WRITTEN
    refuse_links([*(folder / name for name in written), *folder.glob("stacks-rank-*.txt")])
    _check_asked_checkpoint(config)
    if not is_new(folder) and not any((folder / name).exists() for name in (STATUS, RECORD, CONFIG)):
        raise UserError(f"{folder} is not empty and not a run folder (no {STATUS}); choose another --output_dir")
    if folder.exists() and (problem := store.untrusted(folder)):  # also of a new one: it could not be resumed
        raise UserError(f"output_dir {folder}: {problem}; checkpoints in it could be anybody's")


def check_settings(config: Config) -> None:
    """Raises UserError if the folder holds a run that has begun with other settings; `inspect` will too, but it needs
    the processes, and looks into checkpoints.
    """
    folder = config.output_dir
    record = known_record(folder)
    complete = read_json(folder / STATUS).get("state") == "complete"
    begun = complete or any(store.checkpoints(folder))
    if begun and (not config.run.fresh or _began_it(record)):
        changed = changes(record, config)
        kept = {key: value for key, value in changed.items() if key not in config.run.allow_change}
        _refuse_changes(folder, kept, complete)


def _refuse_changes(folder: Path, changed: dict[str, tuple[Any, Any]], complete: bool) -> None:
    if changed:
        listed = "; ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())
        if complete:
            raise UserError(
                f"{folder} holds a complete run with other settings: {listed}. Give another --output_dir for a new run "
                f"(with --model {folder / BEST} to train on from its model), or --fresh to start over"
            )
        raise UserError(
            f"{folder} holds a run with other settings: {listed}. Give the same settings to continue it, "
            f"--allow_change {' '.join(changed)} to go on with the new ones, another --output_dir for a new run, or "
            "--fresh to start over"
        )


def batch_to_keep(config: Config) -> int | None:
    """The global batch of the run that this command continues, if its settings ask for no other."""
    record, now = known_record(config.output_dir), _settings(config)
    before = record.get("settings")
    if not before or any(before.get(key) != now[key] for key in SPLIT) or (config.run.fresh and not _began_it(record)):
        return None
    return record.get("global_batch_size")


def split_to_keep(attempt: Attempt, batch: Batch, strategy: str, device: str) -> int | None:
    """The images at once with which the checkpoint was made, if the same split is possible on what there is now.

    The bits of a run depend on it. None: nothing to go on from, or on other devices, or with other settings.
    """
    if not attempt.checkpoint or any(change["attempt"] == attempt.number for change in attempt.changes):
        return None
    manifest = store.read_manifest(Path(attempt.checkpoint))
    if lacking := _lacks(manifest):
        raise UserError(
            f"{Path(attempt.checkpoint) / store.MANIFEST} lacks {', '.join(lacking)}: no run wrote it like that; move "
            "the checkpoint away to go on from an older one"
        )
    split, now = manifest["batch"], (strategy, batch.world_size, batch.total, device)
    made = (manifest["strategy"], manifest["world_size"], split["total"], manifest["record"]["device"])
    return split["per_device"] if made == now else None


def known_record(folder: Path) -> dict[str, Any]:
    """What run.json holds; if it is damaged or gone, what the newest checkpoint knows of it. Empty for a new run."""
    record = read_json(folder / RECORD)
    if is_sealed(record) and _is_record(record):
        return record
    known = (store.read_manifest(path).get("record") for path in store.checkpoints(folder))
    return next((record for record in known if record and _is_record(record)), {})


def _is_record(record: Any) -> bool:
    """Whether it has the shape of what `open_attempt` writes: a digest that fits can be forged."""
    kinds = {"attempts": int, "settings": dict, "changes": list, "stalled": int, "data": dict, "wandb_id": str}
    return isinstance(record, dict) and all(isinstance(record.get(key, kind()), kind) for key, kind in kinds.items())


def _lacks(manifest: dict[str, Any]) -> list[str]:
    """What a manifest does not say of its run, or says in another form."""
    kinds = {"strategy": str, "world_size": int, "batch": dict, "record": dict}
    lacking = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]
    parts = {"batch": ("per_device", "total"), "record": ("device",)}
    return lacking or [f"{key}.{part}" for key, names in parts.items() for part in names if part not in manifest[key]]


def inspect(config: Config, strategy: str, world_size: int) -> Attempt:
    """Decide what to do about the run folder, without changing anything in it.

    Raises UserError if it holds a run with other settings, or one that this launch cannot resume.
    """
    folder = config.output_dir
    if is_new(folder):
        return Attempt()
    status, record = read_json(folder / STATUS), known_record(folder)
    summary = describe(folder)
    if config.run.fresh and not _began_it(record):
        return Attempt(replaces=summary)
    attempt = Attempt(number=record.get("attempts", 0) + 1)
    complete = status.get("state") == "complete"
    lost = complete and status.get("model") == BEST and not any((folder / BEST).glob("*.safetensors"))
    if lost and not any(store.checkpoints(folder)):
        raise UserError(
            f"{summary}, but its model ({folder / BEST}) was deleted, and there is no checkpoint to export it from; "
            f"bring it back, or train anew: --fresh moves what is left to {backup_path(folder)}"
        )
    complete = complete and not lost
    if lost:
        attempt.notes.append(f"{BEST}/ was deleted: it is exported again, and the results are made again")
    if not complete:
        attempt.checkpoint, notes = _newest_checkpoint(config, strategy, world_size, record)
        attempt.notes += notes
        attempt.begins_at = store.step_of(Path(attempt.checkpoint)) if attempt.checkpoint else 0
        attempt.image_source = record.get("image_source") if attempt.checkpoint else None
        before = record.get("strategy", strategy), record.get("world_size", world_size)
        if attempt.checkpoint and before != (strategy, world_size):
            attempt.notes.append(f"was {before[0]} on {before[1]} processes, goes on as {strategy} on {world_size}")
        if not lost:
            _count_stalled(config, attempt, status, record)
    begun = complete or attempt.checkpoint is not None  # else nothing was saved that other settings could spoil
    if begun and not record:
        raise UserError(
            f"{folder / RECORD} cannot be read, so whether this is the same run is not known; bring it back, or start "
            "over with --fresh"
        )
    changed = changes(record, config)
    attempt.changes = list(record.get("changes", []))
    if begun:
        _allow(config, attempt, changed, strategy)
    if begun:
        _refuse_changes(folder, changed, complete)
    if not changed:  # else it is a new run
        attempt.wandb_id = record.get("wandb_id") or attempt.wandb_id
    if complete and attempt.changes != record.get("changes", []):
        raise UserError(
            f"{summary}: a complete run cannot be changed; train on from it in a new one: --model {folder / 'best'} "
            "--output_dir ANOTHER"
        )
    asked = config.training["resume_from_checkpoint"]
    if complete and asked and record.get("went_back_to") != Path(asked).name:
        raise UserError(
            f"{summary}: a complete run is not resumed; train on from its model in a new one: "
            f"--model {folder / 'best'} --output_dir ANOTHER, or start over with --fresh"
        )
    if complete:
        attempt.finished = f"{summary}. Nothing to do; --fresh starts over and moves it to {backup_path(folder)}"
    return attempt


def common_facts(config: Config, strategy: str, device: str) -> dict[str, Any]:
    """What all processes of an attempt must have in common, by name: `device` is its type."""
    settings = {key: value for key, value in config.resolved().items() if key not in FREE or key == "output_dir"}
    return {"strategy": strategy, "device": device, **versions(), **settings}


def facts(
    data: dict[str, Any],
    model_revision: str | None,
    world_size: int,
    global_batch: int,
    strategy: str,
    device: str,
    image_source: str,
) -> dict[str, Any]:
    """What the run record states beyond the settings."""
    return {
        "world_size": world_size,
        "strategy": strategy,
        "device": device,
        "image_source": image_source,
        "global_batch_size": global_batch,
        "data": data,
        "model_revision": model_revision,
        **environment(),
    }


def archive_run(config: Config, attempt: Attempt) -> None:
    """What `--fresh` does with the earlier run. The folder may be a link: what it leads to is moved."""
    folder = config.output_dir.resolve()
    aside = backup_path(folder)
    try:
        folder.rename(aside)
        folder.mkdir(mode=0o775)
        (aside / LOCK).unlink(missing_ok=True)
        name = job()
        if name and (aside / JOBS / name).is_dir():  # what this very job prints belongs to the new run
            (folder / JOBS).mkdir(mode=0o775)
            (aside / JOBS / name).rename(folder / JOBS / name)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be moved to {aside}: {error}") from None
    attempt.notes.append(f"--fresh: {attempt.replaces}; moved to {aside}; leave --fresh out to continue")


def open_attempt(config: Config, attempt: Attempt, classes: list[str], facts: dict[str, Any]) -> Attempt:
    """Write the attempt's settings, class list and record; `facts` are fingerprints and batch arithmetic.

    Raises UserError if the data or the global batch are not those that the run began with, or nothing can be written.
    """
    folder, asked = config.output_dir, config.training["resume_from_checkpoint"]
    try:
        before = known_record(folder)
        changed = {key: (before[key], facts[key]) for key in PINNED if key in before and before[key] != facts[key]}
        if attempt.checkpoint:
            _allow(config, attempt, changed, facts["strategy"])
            for key, (was, now) in changed.items():
                raise UserError(_fact_message(folder, key, was, now))
        if not attempt.checkpoint and (changed or before.get("wandb_id") != attempt.wandb_id):  # not a continuation
            (folder / METRICS).unlink(missing_ok=True)
            attempt.wandb_id = new_id() if changed else attempt.wandb_id
        folder.mkdir(parents=True, exist_ok=True)
        write_status(folder, "running", attempt=attempt.number, step=attempt.begins_at)  # first: it marks the folder
        _clear(folder, attempt)
        with replacing(folder / CONFIG) as partial:
            write_config(config, partial)
        write_json(folder / CLASSES, {"classes": classes, "sha256": facts["data"]["classes"]})
        attempt.record = {
            "attempts": attempt.number,
            "job": job(),
            "launch": _launch(),
            "went_back_to": Path(asked).name if asked else before.get("went_back_to"),
            "wandb_id": attempt.wandb_id,
            "began_at": attempt.begins_at,
            "stalled": attempt.stalled,
            "changes": attempt.changes,
            "settings": _settings(config),
            **facts,
        }
        write_json(folder / RECORD, seal(attempt.record))  # last: until then this attempt has not begun
        return attempt
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error}") from None


def check_data(folder: Path, data: dict[str, Any]) -> None:
    """Raises UserError if the images of `data` (a data record) are not those of the run in `folder`."""
    before = known_record(folder).get("data", {})
    changed = {key for key in ("fingerprint", "classes", "splits") if key in before and before[key] != data[key]}
    if changed:
        raise UserError(_fact_message(folder, "data", before, {key: data[key] for key in sorted(changed)}))


def _clear(folder: Path, attempt: Attempt) -> None:
    """Remove what an earlier attempt had begun; checkpoints that this one goes back behind are set aside."""
    store.clear(folder)
    for path in list(store.checkpoints(folder)):
        if store.step_of(path) > attempt.begins_at or not store.is_committed(path):
            attempt.notes.append(f"{path.name} is kept as {store.quarantine(path).name}")
    if any(change["attempt"] == attempt.number for change in attempt.changes):
        truncate_metrics(folder / METRICS, attempt.begins_at)  # the rows after it were made with other settings


def _allow(config: Config, attempt: Attempt, changed: dict[str, tuple[Any, Any]], strategy: str) -> None:
    """Take what --allow_change names out of `changed`, and put it on record."""
    for key in config.run.allow_change:
        if key in changed and key in FIXED:
            raise UserError(f"allow_change {key}: a run cannot go on with another one; begin a new run")
        if key in changed and key in OF_OPTIMIZER and strategy.startswith("zero"):
            raise UserError(f"allow_change {key}: DeepSpeed restores its own; not under {strategy}")
        if key in changed:
            before, now = changed.pop(key)
            attempt.changes.append({"attempt": attempt.number, "key": key, "before": before, "now": now})
            shown = f" from {before!r} to {now!r}" if not isinstance(now, dict) else ""
            attempt.notes.append(f"{key} changed{shown} at step {attempt.begins_at}, as allowed")


def _began_it(record: dict[str, Any], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this very job began the run and was started again: `--fresh` was meant for its first start."""
    restarted = integer("TORCHELASTIC_RESTART_COUNT", 0, environ) > 0 and record.get("launch") == _launch(environ)
    return restarted or (record.get("job") is not None and record["job"] == job(environ))


def _launch(environ: Mapping[str, str] = os.environ) -> str | None:
    """Tells one start of torchrun from another, restarts of its processes included."""
    started = environ.get("TORCHELASTIC_RUN_ID")
    return None if started is None else f"{started}:{environ.get('MASTER_PORT')}"


def _count_stalled(config: Config, attempt: Attempt, status: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises UserError if the attempts before this one began at the same step, and none got on."""
    wished = status.get("state") == "preempted" and str(status.get("by")).startswith("SIGINT")
    if record.get("began_at") == attempt.begins_at and not wished:
        attempt.stalled = record.get("stalled", 0) + 1
    if "restarts" in config.run.allow_change:
        attempt.stalled = 0
    if attempt.stalled >= MOST_STALLED:
        ended = {"failed": f"failed, {status.get('reason')}", "preempted": f"asked to stop by {status.get('by')}"}
        raise UserError(
            f"{config.output_dir}: {attempt.stalled} attempts in a row began at step {attempt.begins_at} and saved "
            f"nothing further (the last: {ended.get(str(status.get('state')), 'it was killed')}); mend the cause or "
            "give it more time, and start with --allow_change restarts"
        )


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


def manifest_facts(attempt: Attempt, batch: Batch) -> dict[str, Any]:
    """What a checkpoint's manifest states about its run: what is decided by, and the whole record."""
    return {
        "run": attempt.wandb_id,
        "strategy": attempt.record["strategy"],
        "world_size": attempt.record["world_size"],
        "batch": {**dataclasses.asdict(batch), "total": batch.total},
        "record": attempt.record,
    }


def _check_asked_checkpoint(config: Config) -> None:
    asked = config.training["resume_from_checkpoint"]
    if asked and not re.fullmatch(r"checkpoint-[0-9]+", Path(asked).name):
        raise UserError(
            f"resume_from_checkpoint={asked} is not named checkpoint-<step>; one that was set aside can be renamed back"
        )
    if asked and Path(asked).resolve().parent != config.output_dir.resolve():
        raise UserError(
            f"resume_from_checkpoint={asked} is not a checkpoint of the run in {config.output_dir}; to train on from "
            f"another run's weights, start a new run with --model {asked}"
        )


def _newest_checkpoint(
    config: Config, strategy: str, world_size: int, record: dict[str, Any]
) -> tuple[str | None, list[str]]:
    """The newest checkpoint that is as it was committed, and so is the best one that it names; notes on the others.

    Raises UserError if none of several is, or if this launch cannot resume from it: going on from another one would
    lose work.
    """
    asked = config.training["resume_from_checkpoint"]
    notes: list[str] = []
    if asked and record.get("went_back_to") == Path(asked).name:
        notes.append(
            f"went back to {Path(asked).name} before, and goes on from there; set newer ones aside to do it again"
        )
        asked = None
    broken: dict[Path, str | None] = {}

    def problem(path: Path) -> str | None:
        if path not in broken:
            run = store.read_manifest(path).get("run")
            other = "it is of another run" if run != record.get("wandb_id", run) else None
            broken[path] = (store.integrity_error(path) or other) if path.is_dir() else "it is missing"
        return broken[path]

    def problem_of_both(path: Path) -> str | None:
        best = store.read_manifest(path).get("best_step")
        beside = store.named(path.parent, best) if best else path
        found = problem(path) or problem(beside)  # of the best one only the weights are needed
        return f"its best model, {beside.name}: {found}" if found and not problem(path) else found

    for path in [Path(asked)] if asked else store.checkpoints(config.output_dir):
        reason = problem_of_both(path)
        if reason and asked:
            raise UserError(f"resume_from_checkpoint={asked}: {reason}")
        if reason:
            notes.append(f"{path.name} is passed over: {reason}")
        elif reason := resume_incompatibility(path, strategy, world_size):
            raise UserError(f"{path} cannot be resumed by this launch ({strategy}, {world_size} processes): {reason}")
        else:
            return str(path), notes
    if any(store.checkpoints(config.output_dir)):
        raise UserError(f"no checkpoint in {config.output_dir} is whole; --fresh starts over. {'; '.join(notes)}")
    return None, notes


def _settings(config: Config) -> dict[str, Any]:
    """All settings, as they are when they have been written and read."""
    return json.loads(json.dumps(config.resolved()))


def changes(record: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from those that the run had, where that matters: (before, now)."""
    before, now = record.get("settings", {}), _settings(config)
    return {
        key: (before[key], now[key]) for key in now if key not in FREE and key in before and before[key] != now[key]
    }
