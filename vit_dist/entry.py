"""How a process of a job ends: its exit code, and the one error that is shown."""

from __future__ import annotations

import os
from collections.abc import Callable

from vit_dist import console, distributed, errors, stop
from vit_dist.errors import LostProcess, UserError
from vit_dist.redact import redact
from vit_dist.terminal import open_standard_streams


def run(body: Callable[[], int], interrupted: str) -> int:
    """The exit code of `body`: 2 and one line for a user's error, 75 if it was asked to stop (130 where only Ctrl-C is
    heard), 1 and the first failing rank's traceback else.
    """
    open_standard_streams()
    try:
        distributed.check_environment()
        console.set_up(distributed.launched_rank())
    except UserError as error:  # which process this is cannot be known
        console.show_error(f"error: {error}")
        return 2
    try:
        return _run(body, interrupted)
    finally:
        stop.end_workers()


def _run(body: Callable[[], int], interrupted: str) -> int:
    try:
        code = body()
        stop.ignore()  # what was asked for is done; a signal now would only change the exit code
        distributed.leave()
        return code
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except LostProcess as error:
        return _fail(f"error: {error}; {interrupted}", 1)
    except stop.Interrupted as asked:
        if asked.agreed:  # all ranks are here, and what there was to say is said
            stop.ignore()
            distributed.leave()
            return stop.EXIT_CODE
        return _fail(f"stopped ({asked} on rank {distributed.launched_rank()}); {interrupted}", stop.EXIT_CODE)
    except KeyboardInterrupt:
        return _fail(interrupted, 130)
    except Exception as error:
        if (said := errors.of_the_machine(error)) is not None:
            return _fail(f"error: {said}", 2)
        return _fail(f"rank {distributed.launched_rank()} failed\n{console.describe_failure(error)}", 1)


def _fail(message: str, code: int) -> int:
    """Show the first failure of the job, and no other; then leave without another collective."""
    stop.ignore()  # the launcher may be ending us already, because another process failed alike
    if distributed.first_to_fail():
        console.show_error(redact(message))
    if distributed.launched_world_size() > 1:
        # Ordinary interpreter exit can wait for a process group whose peers are gone. The launcher ends the others.
        os._exit(code)
    return code
