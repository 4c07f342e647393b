"""Committed checkpoints: folders that are whole, or not there. Files only; no process group, no model.

A checkpoint is written under `.staging/`. Its manifest names every file with size and SHA-256 and is written last; one
rename then puts the folder in the run folder as `checkpoint-<step>`. What has no manifest was never committed. What
goes away is first renamed into `.trash/`, so that nothing half deleted bears a checkpoint's name. Both folders are
emptied when the next attempt begins.

The guarantees are those of a local file system and need `rename` to be atomic and `fsync` to be honest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vit_dist.files import (
    is_sealed,
    open_for_writing,
    read_object,
    remove,
    seal,
    settle_folder,
    sha256,
    sync_folders,
)

MANIFEST = "manifest.json"
STAGING, TRASH = ".staging", ".trash"
FORMAT = 1

_UMASK = os.umask(0)
os.umask(_UMASK)


def checkpoints(folder: Path) -> Iterator[Path]:
    """A run's checkpoint folders, newest step first, whole or not."""
    found = (path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-(0|[1-9][0-9]*)", path.name))
    yield from sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def named(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def is_committed(checkpoint: Path) -> bool:
    """Whether a commit put it here. Its files may have been damaged since: see `integrity_error`."""
    return (checkpoint / MANIFEST).is_file()


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into."""
    staged = folder / STAGING / f"checkpoint-{step}"
    _remove_link(staged.parent)
    shutil.rmtree(staged, ignore_errors=True)
    make_folder(staged)
    return staged


def _remove_link(path: Path) -> None:
    """What is written or deleted there must not be elsewhere."""
    if path.is_symlink():
        path.unlink()


def make_folder(folder: Path) -> None:
    """With its parents, writable for others only within the group: what is in it may be loaded one day."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            path.mkdir(mode=0o775, exist_ok=True)


def settle(path: Path, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Bring one written file to the disk; its size and digest, for the manifest. By the rank that wrote it.

    `progress` is called as the file is read.
    """
    os.chmod(path, 0o664 & ~_UMASK)  # safetensors makes its files readable for their owner only
    with path.open("rb") as file:
        digest = sha256(file, progress)
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def commit(staged: Path, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> Path:
    """Write the manifest and give the folder its name, which no reader sees before all of it is on the disk.

    `files` are relative names with what `settle` returned, of all ranks. Raises OSError, also for a file that nobody
    answers for; nothing is committed then.
    """
    unlisted = set(_files(staged)) ^ set(files)
    if unlisted:
        raise OSError(f"{min(unlisted)} is not what was to be written")
    manifest = staged / MANIFEST
    with open(open_for_writing(manifest, mode=0o644), "w", encoding="utf-8") as file:
        json.dump(seal({"format": FORMAT, **facts, "files": files}), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folders(staged)
    final = staged.parents[1] / staged.name
    if os.path.lexists(final):
        discard(final)
    os.rename(staged, final)
    settle_folder(final.parent)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()
    return final


def discard(checkpoint: Path) -> None:
    """Take a checkpoint out of the list, then delete it."""
    trash = checkpoint.parent / TRASH / checkpoint.name
    _remove_link(trash.parent)
    make_folder(trash.parent)
    remove(trash)
    os.rename(checkpoint, trash)
    settle_folder(checkpoint.parent)
    shutil.rmtree(trash.parent)


def quarantine(checkpoint: Path) -> Path:
    """Take a checkpoint out of the list and keep it under another name."""
    suffixes = itertools.chain([".aside"], (f".aside-{n}" for n in itertools.count(2)))
    aside = next(path for end in suffixes if not os.path.lexists(path := checkpoint.with_name(checkpoint.name + end)))
    os.rename(checkpoint, aside)
    settle_folder(checkpoint.parent)
    return aside


def clear(folder: Path) -> None:
    """Remove what an earlier attempt had begun to write or to delete."""
    for name in (STAGING, TRASH):
        with contextlib.suppress(OSError):
            remove(folder / name)


def retain(folder: Path, limit: int | None, every: int | None) -> None:
    """Discard the oldest checkpoints over `limit`; multiples of `every` are kept beside.

    The newest is kept with the best one that it names, and a further one only if it could be resumed from as well: if
    the best that it names is kept, too.
    """
    if limit is None:
        return
    found = {step_of(path): path for path in checkpoints(folder) if is_committed(path)}
    facts = {step: read_manifest(path) for step, path in found.items()}
    newest = max(found, default=None)
    if newest is None:
        return
    found = {step: path for step, path in found.items() if facts[step].get("run") == facts[newest].get("run")}
    kept: set[int] = set()
    step: int | None = newest
    while step is not None and step not in kept and step in found:  # a best one may have been saved before it was known
        kept.add(step)
        step = facts[step].get("best_step")
    for step in sorted(found, reverse=True):
        best = facts[step].get("best_step")
        if len(kept) < limit and (best is None or best == step or best in kept):
            kept.add(step)
    for step, path in found.items():
        if step not in kept and not (every and step % every == 0):
            discard(path)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest; empty if there is none or it cannot be read."""
    found = read_object(checkpoint / MANIFEST)
    return found if is_sealed(found) and _is_manifest(found) else {}


def _is_manifest(found: dict[str, Any]) -> bool:
    files, best = found.get("files"), found.get("best_step")
    return (
        isinstance(files, dict)
        and all(isinstance(facts, dict) and facts.keys() >= {"bytes", "sha256"} for facts in files.values())
        and all(isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str) for facts in files.values())
        and (best is None or isinstance(best, int))
    )


def integrity_error(checkpoint: Path) -> str | None:
    """Why a checkpoint is not what was committed, None if it is. Reads all of it."""
    if (checkpoint / MANIFEST).is_symlink():
        return f"{MANIFEST} is a link"
    if not (checkpoint / MANIFEST).exists():
        return f"no {MANIFEST}: it was not committed"
    manifest = read_manifest(checkpoint)
    if not manifest:
        return f"{MANIFEST} cannot be read"
    if manifest.get("format") != FORMAT or manifest.get("step") != step_of(checkpoint):
        return f"{MANIFEST} is of step {manifest.get('step')}, format {manifest.get('format')}"
    if problem := untrusted(checkpoint):
        return problem
    if problem := untrusted(checkpoint / MANIFEST):
        return f"{MANIFEST}: {problem}"
    found = set(_files(checkpoint))
    if strange := sorted(found - set(manifest["files"]) - {MANIFEST}):
        return f"{strange[0]} is not in its {MANIFEST}"
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if name not in found or path.is_symlink() or not path.is_file():  # what is elsewhere is not in it
            return f"{name} is missing"
        if problem := untrusted(path):
            return f"{name}: {problem}"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
    for name, expected in manifest["files"].items():
        try:
            with (checkpoint / name).open("rb") as file:
                digest = sha256(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if digest != expected["sha256"]:
            return f"{name} was changed (its SHA-256 is not the one in {MANIFEST})"
    return None


def untrusted(path: Path) -> str | None:
    """Why the contents of a folder or file may be somebody else's: parts of a checkpoint are pickles. None if they are
    not.
    """
    facts = path.stat()
    if facts.st_uid != os.geteuid():
        return f"it belongs to user {facts.st_uid}, and this process is user {os.geteuid()}"
    if facts.st_mode & stat.S_IWOTH:
        return f"everybody may write in it; chmod -R o-w {path}"
    return None


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
