"""Where remembered things lie, the lock under which one process makes them for many, and the digest they carry."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from filelock import FileLock

from vit_dist.errors import UserError
from vit_dist.files import replacing

_DIGEST_BYTES = 32


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


def write_sealed(path: Path, content: bytes | memoryview) -> None:
    """Replace the file by `content`, preceded by its SHA-256."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)


def read_sealed(path: Path) -> memoryview | None:
    """What `write_sealed` wrote; None if there is no such file or a bit of it has changed since."""
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return rest if hashlib.sha256(rest).digest() == digest else None
