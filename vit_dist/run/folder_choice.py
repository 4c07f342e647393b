"""Which folder a run has that was started without `--output_dir`: its own if it has begun, else a new one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vit_dist import distributed
from vit_dist.batch import split_batch
from vit_dist.checkpoint import store
from vit_dist.config import Config
from vit_dist.errors import UserError
from vit_dist.listing import listed
from vit_dist.run import attempts, run_folder
from vit_dist.run.lock import LOCK_TIMEOUT, RunFolderInUse, run_lock

VARIABLE = "VIT_DIST_RUN_FOLDER"  # a batch script that has asked for the folder names it here for all processes
MOST_TRIES = 100  # commands that take a folder in the moment when this one has chosen it


@dataclass(frozen=True)
class Choice:
    """A run folder, and a line about it if it is not the first of its name."""

    folder: Path
    note: str = ""


def settle(config: Config, held: contextlib.ExitStack | None) -> Config:
    """`config` with the folder of the run; unchanged if `--output_dir` was given.

    Rank 0 chooses the folder and owns it until `held` is closed (None: it only chooses, and writes nothing); the other
    ranks get its answer. All ranks call this before the process group is made. Raises UserError on every rank.
    """
    if config.output_dir_given:
        return config
    if os.environ.get(VARIABLE):
        return _with(config, Choice(Path(os.environ[VARIABLE])))
    world_size = distributed.launched_world_size()

    def choose_and_own() -> list[str]:
        choice = choose(config, world_size) if held is None else take(config, world_size, held)
        return [str(choice.folder), choice.note]

    folder, note = distributed.decided_on_main("run_folder", choose_and_own)
    return _with(config, Choice(Path(folder), note))


def is_held(config: Config) -> bool:
    """Whether `settle` has made rank 0 the owner of the folder."""
    return not config.output_dir_given and not os.environ.get(VARIABLE)


def resolved(config: Config, world_size: int | None = None) -> Config:
    """`config` with the folder that `settle` would choose now; nothing is taken or written."""
    return config if config.output_dir_given else _with(config, choose(config, world_size))


def take(config: Config, world_size: int, held: contextlib.ExitStack) -> Choice:
    """Choose a folder and own it: two commands with other settings that start together get two folders.

    Raises UserError if a process with the same settings owns the folder.
    """
    busy: set[Path] = set()
    for _ in range(MOST_TRIES):
        choice, ours = choose(config, world_size, busy), digest(config)
        mine = contextlib.ExitStack()
        try:
            if not _own(choice.folder, ours, mine):
                busy.add(choice.folder)
                continue
            if choose(config, world_size, busy) == choice:  # else another command has just come or gone
                held.push(mine.pop_all().__exit__)
                return choice
        finally:
            mine.close()
    raise UserError(f"{config.output_dir}: {MOST_TRIES} other runs begin in this place; give an --output_dir")


def _own(folder: Path, ours: str, held: contextlib.ExitStack) -> bool:
    """Own `folder` until `held` is closed; False if a process with other settings owns it.

    An owner locks the file first and writes its settings then, so a lock without settings is read again: a process on
    a busy machine can stop between the two. Raises FolderInUse after `LOCK_TIMEOUT` seconds.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            held.enter_context(run_lock(folder, 0, settings=ours))
            return True
        except RunFolderInUse as other:
            if other.settings not in (ours, None):
                return False
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def choose(config: Config, world_size: int | None, busy: Collection[Path] = ()) -> Choice:
    """The folder of the run that these settings have begun, or the first free one of NAME, NAME-2, NAME-3, ...

    Changes that `--allow_change` names count as none. `busy` are folders of runs that have just begun with other
    settings. `world_size`: without it, only `global_batch_size` tells the batch. Reads, and changes nothing.
    Raises UserError if `--allow_change` fits no run, or several.
    """
    first, found = config.output_dir, _numbered(config.output_dir)
    if asked := _of_asked_checkpoint(config, found):
        return Choice(asked)
    changed = {
        folder: _changed(folder, config, world_size) for folder in found if folder not in busy and not _is_free(folder)
    }
    if same := [folder for folder, keys in changed.items() if keys == {}]:
        return Choice(same[0], _note(first, changed.get(first)) if same[0] != first else "")
    if allowed := _allowed(config, changed):
        return Choice(allowed)
    free = next(path for path in _names(first) if path not in busy and path not in changed and _is_free(path))
    return Choice(free, "" if free == first else _note(first, changed.get(first)))


def digest(config: Config) -> str:
    """SHA-256 of the settings that distinguish runs."""
    settings = {key: value for key, value in config.resolved().items() if key not in attempts.FREE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _with(config: Config, choice: Choice) -> Config:
    training = {**config.training, "output_dir": str(choice.folder)}
    return dataclasses.replace(config, training=training, output_dir_note=choice.note)


def _names(first: Path) -> Iterator[Path]:
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))


def _numbered(first: Path) -> list[Path]:
    """Those of NAME, NAME-2, NAME-3, ... that are there, also behind a gap."""
    parent = first.parent
    names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    pattern = re.compile(re.escape(first.name) + "(?:-([1-9][0-9]{0,8}))?")
    numbers = {int(match[1] or 1): parent / name for name in names if (match := pattern.fullmatch(name))}
    return [numbers[number] for number in sorted(numbers)]


def _is_free(folder: Path) -> bool:
    """Whether no run has begun in it: it is not there, or empty, or was left before its record was written."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    marked = any((folder / name).exists() for name in (run_folder.STATUS, run_folder.CONFIG, run_folder.RECORD))
    complete = run_folder.read_json(folder / run_folder.STATUS).get("state") == "complete"
    begun = complete or attempts.known_record(folder) or any(store.checkpoints(folder))
    return run_folder.is_new(folder) or (marked and not begun)


def _changed(folder: Path, config: Config, world_size: int | None) -> Mapping[str, tuple[object, object]] | None:
    """What differs from the run in `folder`; None if it holds something else, or its record is lost."""
    record = attempts.known_record(folder) if folder.is_dir() else {}
    if not record:
        return None
    changes = dict(attempts.changes(record, config))
    before, now = record.get("global_batch_size"), _global_batch(config, folder, world_size)
    if before is not None and now is not None and before != now:
        changes["global_batch_size"] = (before, now)
    return changes


def _global_batch(config: Config, folder: Path, world_size: int | None) -> int | None:
    """Images of a step if the run in `folder` went on with these settings; None if that is not known."""
    if config.scaling.global_batch_size is not None:
        return config.scaling.global_batch_size
    if world_size is None:
        return None
    going_on = dataclasses.replace(config, run=dataclasses.replace(config.run, fresh=False))
    keep = attempts.batch_to_keep(_with(going_on, Choice(folder)))
    return keep or split_batch(config, world_size).total


def _allowed(config: Config, changed: Mapping[Path, Mapping[str, object] | None]) -> Path | None:
    """The run that differs only in what `--allow_change` names; None without `--allow_change`, or without runs."""
    allowed = set(config.run.allow_change) - {"restarts"}
    runs = {folder: keys for folder, keys in changed.items() if keys is not None}
    if not allowed or not runs:
        return None
    fitting = [folder for folder, keys in runs.items() if set(keys) <= allowed]
    if len(fitting) == 1:
        return fitting[0]
    named = f"allow_change {' '.join(config.run.allow_change)}"
    if fitting:
        raise UserError(
            f"{named} fits {len(fitting)} runs: {listed([*map(str, fitting)])}; name one of them with --output_dir"
        )
    raise UserError(f"{named} fits none of {listed([*map(str, runs)])}: other settings differ too; give --output_dir")


def _of_asked_checkpoint(config: Config, found: Collection[Path]) -> Path | None:
    """The run folder that `--resume_from_checkpoint` lies in, if it is one of `found`."""
    asked = config.training["resume_from_checkpoint"]
    folders = {path.resolve(): path for path in found}
    return folders.get(Path(asked).resolve().parent) if asked else None


def _note(first: Path, changed: Mapping[str, tuple[object, object]] | None) -> str:
    if not changed:
        return f"{first} holds something else" if changed is None and not _is_free(first) else f"{first} is in use"
    keys = [f"{key} {before!r} -> {now!r}"[:120] for key, (before, now) in list(changed.items())[:3]]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"{first} holds a run with other settings: {', '.join(keys)}{more}"
