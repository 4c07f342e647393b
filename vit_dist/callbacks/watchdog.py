"""Ends a process that no one waits for any more, or that waits for ever."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
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
SHOW_STACKS = signal.SIGRTMIN + 1

# Runs in a process of its own, because a thread that holds the interpreter's lock for ever stops every other thread. It
# kills its parent if it hears nothing for `limit` seconds. Seconds in which either of them is suspended do not count:
# a timer within the parent (faulthandler's) would end a healthy process as soon as it is continued.
KEEPER = """
import os, select, signal, sys, time

owner, limit, stacks = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, signal.SIG_IGN)

def suspended():
    try:
        with open(f"/proc/{owner}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False

watched, silent, before = False, 0.0, time.monotonic()
while os.getppid() == owner:
    ready = select.select([0], [], [], 1.0)[0]
    now = time.monotonic()
    passed, before = now - before, now
    if ready:
        said = os.read(0, 65536)
        if not said:
            break
        watched, silent = said[-1:] == b"w", 0.0
    elif not watched or passed > 3.0 or suspended():
        silent = 0.0
    else:
        silent += passed
    if silent > limit:
        os.kill(owner, stacks)
        time.sleep(1.0)
        os.kill(owner, signal.SIGKILL)
        break
"""


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
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._over.set()
        if self._keeper is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._keeper.communicate(timeout=GRACE)  # it ends with its input

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        """This process gets on. Called several times in a step."""
        self._beat = time.monotonic()

    def pause(self, *args: Any, **kwargs: Any) -> None:
        """Until the next `heartbeat`, nothing is expected of this process."""
        self._beat = None
        self._tell_keeper(b"r")

    def touch(self) -> None:
        """As `heartbeat`, where something is expected; from any thread."""
        if self._beat is not None:
            self.heartbeat()

    on_train_end = on_predict = pause
    on_train_begin = on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = (
        on_log
    ) = heartbeat

    def _watch(self) -> None:
        failed_since, orphan_since, before = None, None, time.monotonic()
        while not self._over.wait(PERIOD):
            now = time.monotonic()
            if (suspended := now - before - PERIOD) > PERIOD:  # Ctrl-Z, `scontrol suspend`: it could not get on
                self._beat = None if self._beat is None else min(now, self._beat + suspended)
                failed_since = failed_since and failed_since + suspended
                orphan_since = orphan_since and orphan_since + suspended
            heartbeat = self._beat
            if self.timeout:
                self._tell_keeper(b"r" if heartbeat is None else b"w")
            if self._launcher is not None and os.getppid() != self._launcher:
                orphan_since = orphan_since or now
                self._ask_to_stop("the launcher's end")
                if now - orphan_since > GRACE:
                    self._leave("the launcher is gone")
            idle = now - heartbeat if self.timeout and heartbeat is not None else 0.0
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
            before = time.monotonic()

    def _tell_keeper(self, what: bytes) -> None:
        """Whether this process is watched. The keeper is started when there is something to watch."""
        if self._keeper is None and what == b"w":
            with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr with a descriptor, in a notebook
                faulthandler.register(SHOW_STACKS, file=sys.stderr)
            arguments = [str(os.getpid()), str(self.timeout + 2 * GRACE), str(int(SHOW_STACKS))]
            with contextlib.suppress(OSError):  # no more processes: it is not watched then
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", KEEPER, *arguments],
                    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                os.set_blocking(self._keeper.stdin.fileno(), False)  # type: ignore[union-attr]
        if self._keeper is not None and self._keeper.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it is gone
                os.write(self._keeper.stdin.fileno(), what)

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
