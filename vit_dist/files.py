"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEAL = "sha256_of_the_rest"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` in one step, once it is whole and on the disk.

    Nothing is left if writing fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
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
    return facts.get(SEAL) == _digest({key: value for key, value in facts.items() if key != SEAL})


def sha256(file: Any, progress: Callable[[], None] = lambda: None) -> str:
    """Digest of an open binary file (hex); `progress` is called as it is read."""
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
        progress()
    return digest.hexdigest()


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
