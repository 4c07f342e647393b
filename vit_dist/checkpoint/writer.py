"""Writes snapshots behind the training's back and commits them once every rank has written its share."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.checkpoint import CheckpointException

from vit_dist.checkpoint import store
from vit_dist.checkpoint.snapshot import Snapshot
from vit_dist.config import Config
from vit_dist.distributed import GlooGroup
from vit_dist.errors import UserError, first_line
from vit_dist.files import nearest_folder
from vit_dist.redact import redact

logger = logging.getLogger("vit_dist")
T = TypeVar("T")

MARGIN = 16 * 2**20  # bytes that must stay free: the run's own small files


class CheckpointWriter:
    """On every rank: one thread, at most one snapshot in flight. Rank 0 alone commits, deletes and speaks.

    A checkpoint that cannot be written is committed nowhere; that is said once, and training goes on. If it is the
    best model so far, its copy is kept and tried again before anything newer is taken.

    `committed` is the step of the checkpoint that the run goes on from.
    """

    def __init__(self, config: Config, channel: GlooGroup, rank: int = 0, committed: int | None = None) -> None:
        self.folder, self.channel, self.rank = config.output_dir, channel, rank
        self.limit, self.every = config.training["save_total_limit"], config.run.save_keep_every
        self.committed = committed  # the newest step on the disk; the same on every rank whenever nothing is in flight
        self.latest = committed  # the newest step that was to be written
        self.problem: str | None = None  # why the latest one was not committed
        self.progress: Callable[[], None] = lambda: None  # called whenever some more is written
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None
        self._unsaved: Snapshot | None = None

    def require_room(self, weights: int) -> None:
        """Raises UserError if not even the model's weights (bytes) have room. On rank 0, before anything is trained."""
        free = shutil.disk_usage(nearest_folder(self.folder)).free
        if free < weights + MARGIN:
            raise UserError(
                f"output_dir {self.folder}: {free / 1e6:,.0f} MB are free, and a checkpoint takes more than "
                f"{(weights + MARGIN) / 1e6:,.0f} MB (with Adam's state three times as much); make room, or choose "
                "another --output_dir"
            )

    def ready(self, best_step: int | None) -> bool:
        """Wait for what is in flight; then, whether a new snapshot may be taken (all ranks get the same answer).

        It may not while the best model so far waits for room on the disk: without it, nothing newer could be resumed.
        """
        self.wait()
        if self._unsaved is not None and self._unsaved.step != best_step:
            self._unsaved = None
        if self._unsaved is not None:
            self.submit(self._unsaved)
            self.wait()
        return self._unsaved is None

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write. Every rank must submit the same steps in the same order."""
        self.wait()
        self.latest = snapshot.step
        self._job = self._pool.submit(self._save, snapshot)

    def wait(self) -> None:
        """Until nothing is in flight. Raises what the thread could not handle, such as a lost process."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Nothing is written any more once it returns, however the run ended."""
        with contextlib.suppress(Exception):  # of a process that is gone; the run has its own error by then
            self.wait()

    def finish(self, best_step: int | None) -> None:
        """Wait for the last one. Raises UserError if the best model is not on the disk."""
        if not self.ready(best_step):
            goes_on = f"goes on from checkpoint-{self.committed}" if self.committed else "begins anew"
            raise UserError(
                f"the best model, of step {best_step}, could not be saved: {self.problem}; mend that and start the "
                f"same command again: it {goes_on}"
            )

    def _save(self, snapshot: Snapshot) -> None:
        """In the thread; all ranks take part, in the same order."""
        staged = self.folder / store.STAGING / f"checkpoint-{snapshot.step}"
        sizes, problem = self._together(lambda: self._begin(snapshot))
        if problem is None:
            _, problem = self._together(lambda: self._check(staged, sum(sizes)))
        if problem is None:
            written, problem = self._together(lambda: self._write(snapshot, staged))
        if problem is None:
            files = {name: facts for share in written for name, facts in share.items()}
            facts = {"step": snapshot.step, "best_step": snapshot.best_step, **snapshot.facts}
            _, problem = self._together(lambda: self._commit(staged, files, facts))
        if problem is None:
            self.committed, self._unsaved = snapshot.step, None
        else:
            self._unsaved = snapshot if snapshot.step == snapshot.best_step else None
        if self.rank == 0:
            self._tell(snapshot, problem)
        self.problem = problem

    def _together(self, act: Callable[[], T]) -> tuple[list[T], str | None]:
        """What `act` returns on each rank, and the first problem if it fails anywhere (all ranks participate)."""
        value, problem = None, None
        try:
            value = act()
        except (Exception, CheckpointException) as error:  # each library has its own for a full disk
            problem = describe(error)
        self.progress()
        reports: list[Any] = self.channel.gather((value, problem))
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(reports) if problem]
        return [value for value, _ in reports], problems[0] if problems else None

    def _begin(self, snapshot: Snapshot) -> int:
        if snapshot.not_finite():
            raise ValueError("weights or optimizer state are NaN or infinite")
        if self.rank == 0:
            store.begin(self.folder, snapshot.step)
        return snapshot.bytes

    def _check(self, staged: Path, needed: int) -> None:
        store.make_folder(staged)  # other nodes may not see rank 0's yet
        free = shutil.disk_usage(staged).free
        if free < needed + MARGIN:
            said = f"{os.strerror(errno.ENOSPC)}: {(needed + MARGIN) / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
            raise OSError(errno.ENOSPC, said)

    def _write(self, snapshot: Snapshot, staged: Path) -> dict[str, dict[str, Any]]:
        written: dict[str, dict[str, Any]] = {}
        # What all ranks write together comes first: a rank that fails by itself must not keep them waiting there.
        for part in sorted(snapshot.parts, key=lambda part: not part.collective):
            for path in part.write(staged, self.channel.group):
                written[str(path.relative_to(staged))] = store.settle(path, self.progress)
        return written

    def _commit(self, staged: Path, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
        if self.rank == 0:
            store.commit(staged, files, facts)

    def _tell(self, snapshot: Snapshot, problem: str | None) -> None:
        """On rank 0: what failed is said once, and old checkpoints go only after a new one is there."""
        if problem is not None:
            shutil.rmtree(self.folder / store.STAGING, ignore_errors=True)
            if self.problem is None:
                last = f"the last one is of step {self.committed}" if self.committed else "there is none yet"
                logger.warning(f"checkpoint-{snapshot.step} was not saved ({problem}); {last}; training goes on")
            return
        if self.problem is not None:
            logger.warning(f"checkpoint-{snapshot.step} was saved again")
        try:
            store.retain(self.folder, self.limit, self.every)
        except OSError as error:
            logger.warning(f"old checkpoints could not be deleted ({describe(error)})")


def describe(error: BaseException) -> str:
    """One line about what a library raised while writing."""
    failures = getattr(error, "failures", None)  # PyTorch's distributed checkpoint: {rank: (exception, traceback)}
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.errno:
        where = f" ({os.path.basename(error.filename)})" if isinstance(error.filename, str) else ""
        return f"{error.strerror}{where}"
    line = first_line(error)
    return redact(line) or type(error).__name__
