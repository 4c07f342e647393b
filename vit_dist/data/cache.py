"""Where remembered things lie, and the lock under which one process makes them for many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from filelock import FileLock

from vit_dist.errors import UserError


def cache_folder(cache_dir: str | None) -> Path:
    """`<cache_dir>/vit_dist`, by default below the Hugging Face cache (`HF_HOME`); made if missing.

    Raises `UserError` if it cannot be made.
    """
    folder = Path(cache_dir or datasets.config.HF_CACHE_HOME).expanduser() / "vit_dist"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder} ({error.strerror}): pass --cache_dir or set HF_HOME"
        ) from error
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; other processes, on any node that shares the folder, wait their turn.

    The operating system frees the lock of a process that dies. Raises `UserError` if the cache is read-only.
    """
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {path.parent} ({error}): pass --cache_dir or set HF_HOME"
        ) from error
    try:
        yield
    finally:
        lock.release()
