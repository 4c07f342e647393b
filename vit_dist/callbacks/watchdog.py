"""Ends a process that no one waits for any more, or that waits for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vit_dist.errors import UserError
from vit_dist.files import open_for_writing
from vit_dist.terminal import one_line

PERIOD = 0.5  # seconds
GRACE = 5.0  # seconds that a process has to end by itself


class Watchdog(TrainerCallback):
    """Every rank, a thread: leaves with exit code 1 when

    - the launcher is gone: workers of torchrun have sessions of their own and would go on without it. `ask_to_stop` is
      called first, so that the step at hand is committed if that takes no longer than `GRACE`;
    - another process has failed, and this one waits for it (the launcher may be on another node);
    - no step was made, no batch evaluated and no part of a checkpoint written for `timeout` seconds (0: for ever);
      what one process does alone at the end of a run is not watched. Every rank then leaves its stacks in `folder`,
      and `failed` is called on each before it goes. PyTorch's own time-out of collectives does not work on CPUs.

    The next attempt goes on from the last committed checkpoint; nothing is saved here.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        timeout: float,
        peer_failed: Callable[[], bool],
        failed: Callable[[str], None],
        ask_to_stop: Callable[[str], None],
    ) -> None:
        self.folder, self.rank, self.timeout = folder, rank, timeout
        self._peer_failed, self._failed, self._ask_to_stop = peer_failed, failed, ask_to_stop
        self._beat: float | None = None  # until training begins, which is waited for
        self._over = threading.Event()
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
        self._launcher = os.getppid() if launched else None

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, *args: Any, **kwargs: Any) -> None:
        """This process gets on. Called several times in a step."""
        self._beat = time.monotonic()

    def rest(self, *args: Any, **kwargs: Any) -> None:
        """Until the next `beat`, nothing is expected of this process."""
        self._beat = None
        faulthandler.cancel_dump_traceback_later()

    def keep_alive(self) -> None:
        """As `beat`, where something is expected; from any thread."""
        if self._beat is not None:
            self.beat()

    on_train_end = on_predict = rest
    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = (
        on_log
    ) = beat

    def _watch(self) -> None:
        failed_since, orphan_since = None, None
        while not self._over.wait(PERIOD):
            now, beat = time.monotonic(), self._beat
            if self.timeout and beat is not None:
                # Python's own watchdog needs no lock of the interpreter: it ends a process that holds it for ever, and
                # so this thread, too. Making it costs a thread, which is why `beat` does not.
                faulthandler.dump_traceback_later(self.timeout + 2 * GRACE, exit=True)
            if self._launcher is not None and os.getppid() != self._launcher:
                orphan_since = orphan_since or now
                self._ask_to_stop("the launcher's end")
                if now - orphan_since > GRACE:
                    self._leave("the launcher is gone")
            idle = now - beat if self.timeout and beat is not None else 0.0
            if self.timeout and idle > self.timeout:
                self._dump()
                with contextlib.suppress(Exception):
                    self._failed(f"no step for {idle:.0f} s (--hang_timeout)")
                time.sleep(2 * PERIOD)  # the others write theirs
                self._leave(f"no step for {idle:.0f} s; stacks are in {self._stacks}")
            if failed_since is None and self._peer_failed():
                failed_since = now
            if failed_since is not None and now - failed_since > GRACE:
                if self.timeout and idle > self.timeout / 2:
                    self._dump()
                self._leave("another process failed")

    @property
    def _stacks(self) -> Path:
        return self.folder / f"stacks-rank-{self.rank}.txt"

    def _dump(self) -> None:
        with contextlib.suppress(OSError, UserError), open(open_for_writing(self._stacks), "w") as file:
            faulthandler.dump_traceback(file)

    def _leave(self, why: str) -> None:
        if not self._over.is_set():
            with contextlib.suppress(Exception):
                sys.stderr.write(one_line(f"rank {self.rank} leaves: {why}") + "\n")
                sys.stderr.flush()
            os._exit(1)
