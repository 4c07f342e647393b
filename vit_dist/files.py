"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vit_dist.errors import UserError

logger = logging.getLogger("vit_dist")

SEAL = "sha256_of_the_rest"
MOST_STATE = 64 << 20  # bytes of a state file; ours have less than a hundredth


def open_for_writing(path: Path, flags: int = os.O_TRUNC, mode: int = 0o664) -> int:
    """A descriptor of a file that is written in place, made if need be; never that of what a link leads to.

    Raises:
        UserError: the path is a link.
        OSError: as `os.open`.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, mode)
    except OSError as error:
        if path.is_symlink():
            raise UserError(link_message(path)) from None
        raise error


def refuse_links(paths: Iterable[Path]) -> None:
    """Raise UserError for the first of these paths that is a link: what is written there would land elsewhere."""
    for path in paths:
        if path.is_symlink():
            raise UserError(link_message(path))


def link_message(path: Path) -> str:
    return f"{path} is a link, and the run would write to what it leads to; remove the link, or choose another folder"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a state file; empty if there is none, or what is there is something else, cut short or nested
    without end. Never waits: a pipe is not read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > MOST_STATE:
                return {}
            value = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def is_run_folder(folder: Path) -> bool:
    """Whether the folder belongs to a run: it holds a `status.json` of the right shape, or a lock."""
    status, lock = read_object(folder / "status.json"), read_object(folder / ".lock")
    return status.keys() >= {"state", "attempt", "host", "pid"} or lock.keys() >= {"host", "pid", "job", "since"}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` in one step, once it is whole and on the disk.

    Nothing is left if writing fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that had this number, or a link that somebody put there
        os.close(open_for_writing(temporary, os.O_EXCL))  # never writable for everybody, whatever the umask
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        settle_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_folder(folder: Path) -> None:
    """`sync_folder` after a rename: the file is in its place, so a disk that cannot confirm it costs one warning."""
    try:
        sync_folder(folder)
    except OSError as error:
        if folder not in _unsettled:
            _unsettled.add(folder)
            logger.warning(
                f"{folder}: the disk did not confirm the names of new files ({error.strerror}); they are there, but "
                "may be gone after a power cut"
            )


_unsettled: set[Path] = set()


def sync_folders(folder: Path) -> None:
    """The same for the folders in it, itself last."""
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(path)


def sync_tree(folder: Path) -> None:
    """Bring all that is in a folder to the disk, then its names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folders(folder)


def nearest_folder(folder: Path) -> Path:
    """The folder, or the first above it, that is there."""
    folder = Path(os.path.abspath(folder))
    return next(path for path in (folder, *folder.parents) if path.exists())


def seal(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts`, which JSON can hold, with a digest that tells when any of them was changed later."""
    facts = json.loads(json.dumps(facts))  # as they will be read
    return {**facts, SEAL: _digest(facts)}


def is_sealed(facts: Mapping[str, Any]) -> bool:
    """Whether they are as `seal` left them."""
    try:
        return facts.get(SEAL) == _digest({key: value for key, value in facts.items() if key != SEAL})
    except RecursionError:
        return False


def sha256(file: Any, progress: Callable[[], None] = lambda: None) -> str:
    """Digest of an open binary file (hex); `progress` is called as it is read."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
        progress()
    return digest.hexdigest()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
