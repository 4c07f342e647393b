"""One owner of a run folder at a time: a lock that the kernel lets go of when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from vit_dist.checkpoint.store import make_folder
from vit_dist.environment import job
from vit_dist.errors import UserError
from vit_dist.files import open_for_writing

logger = logging.getLogger("vit_dist")

LOCK = ".lock"


class RunFolderInUse(UserError):
    """Another process owns the run folder; `settings` is the digest of what it was started with, if that is known."""

    def __init__(self, message: str, settings: str | None) -> None:
        super().__init__(message)
        self.settings = settings


LOCK_TIMEOUT = 10.0  # seconds: processes whose launcher was killed need some to notice it


@contextlib.contextmanager
def run_lock(
    folder: Path,
    timeout: float = LOCK_TIMEOUT,
    environ: Mapping[str, str] = os.environ,
    settings: str | None = None,
) -> Iterator[None]:
    """Hold the run folder, made if need be. Raises FolderInUse, naming the owner, if another process holds it.

    `settings` is a digest of them, for others to read.

    The lock is one of POSIX (`fcntl`): on the file systems of clusters it holds between nodes where those support it.
    It belongs to this process alone, not to children. Nothing else may open the file here: closing it would let go.
    """
    is_new = not folder.exists()
    path = folder / LOCK
    try:
        make_folder(folder)
        descriptor = _acquire(path, timeout)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error}") from None
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job(environ),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings,
    }
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be written: {error}") from None
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:  # not if the folder was moved aside meanwhile
                path.unlink()
                if is_new:  # a run that was refused leaves nothing, if nothing else is there
                    folder.rmdir()
        os.close(descriptor)


def _acquire(path: Path, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while True:
        descriptor = open_for_writing(path, 0, mode=0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
            os.close(descriptor)  # its owner removed it between our two calls
        except FileNotFoundError:
            os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(f"{path}: no locks here ({error.strerror}); two runs in one folder would not be noticed")
                return descriptor
            owner = os.read(descriptor, 1000)
            os.close(descriptor)
            if time.monotonic() > deadline:
                message = f"{path.parent} is in use by {_describe(owner)}; wait for it, or stop it"
                raise RunFolderInUse(message, _settings(owner)) from None
        time.sleep(0.2)


def _describe(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        job = f", job {known['job']}" if known["job"] else ""
        return f"process {known['pid']} on {known['host']}{job}, since {known['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _settings(owner: bytes) -> str | None:
    try:
        return json.loads(owner).get("settings")
    except (ValueError, AttributeError):
        return None
