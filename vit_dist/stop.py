"""Requests to stop: a signal to any rank, or `--max_time`.

While training, a signal handler sets a flag and nothing else; the trainer asks for it where all ranks can agree: after
each step and before each batch of an evaluation. Before training there is nothing to commit, and the first signal ends
the process.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WORKER_GRACE = 30  # seconds that a data loading process outlives a SIGTERM: its owner may still need a batch

_begun = time.monotonic()


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and does; `str` says by whom. Not an Exception: libraries pass it on like Ctrl-C.

    `agreed`: every rank raises it at the same point; else this process leaves by itself.
    """

    def __init__(self, by: str, agreed: bool = True) -> None:
        super().__init__(by)
        self.agreed = agreed


@dataclass
class _Request:
    """What this process was asked."""

    owner: int = 0  # its pid
    deadline: float | None = None
    by: str | None = None
    deferred: bool = False


_request = _Request()


def install_handlers(max_time: float | None = None) -> None:
    """Take the signals over, and ask to stop by itself `max_time` seconds after the process began."""
    global _request
    _request = _Request(os.getpid(), None if max_time is None else _begun + max_time)
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # then it is the launcher that sends them
    for number in SIGNALS:
        if launched or signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or in the background of a script
            signal.signal(number, _note)


def enter_graceful() -> None:
    """From here on signals only set the flag. Raises Interrupted if one has come."""
    _request.deferred = True
    if _request.by is not None:
        raise Interrupted(_request.by, agreed=False)


def ignore() -> None:
    """From here on the process is ending, and no signal is to disturb that, or to change its exit code.

    Our handlers would not do: the interpreter gives them up when it ends, and the next signal would kill it.
    """
    _request.deferred = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def request(by: str) -> None:
    """Ask this process to stop, from any thread; heard while training."""
    _request.by = _request.by or by


def asked() -> str | None:
    """What asked this process to stop; None if nothing did."""
    if _request.by is None and _request.deadline is not None and time.monotonic() >= _request.deadline:
        _request.by = "--max_time"
    return _request.by


def _note(number: int, frame: Any) -> None:
    if os.getpid() != _request.owner:  # a forked process, whose business this is not
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    first, _request.by = _request.by is None, _request.by or signal.Signals(number).name
    if first and not _request.deferred:
        raise Interrupted(_request.by, agreed=False)


def ignore_signals(worker: int = 0) -> None:
    """`worker_init_fn` of data loading processes: batch systems signal every process of a job, and a worker that died
    of it would take the run down before its checkpoint. It ends with its owner, or `WORKER_GRACE` s after a SIGTERM.
    """
    # A batch that cannot be handed over (no room in /dev/shm) would be dropped, and its owner wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE))


def _give_up(error: Exception, batch: Any) -> None:
    """End this data loading process; its owner notices at once. A hook of `multiprocessing`, for subclasses."""
    os._exit(1)


def end_workers() -> None:
    """Kill the data loading processes that are left. Shielded as they are, the interpreter's own exit would wait
    `WORKER_GRACE` s for them, and PyTorch take their end for another failure.
    """
    children = multiprocessing.active_children()
    if children:
        heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in children:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, heard)
