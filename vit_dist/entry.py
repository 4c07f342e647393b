"""How a process of a job ends: its exit code, and the one error that is shown."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from vit_dist import console, distributed
from vit_dist.errors import UserError


def run(body: Callable[[], int], interrupted: str) -> int:
    """The exit code of `body`; 2 and one line for a user's error, 1 and the first failing rank's traceback else."""
    console.set_up(distributed.launched_rank())
    try:
        code = body()
        distributed.leave()
        return code
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _fail(interrupted, 130)
    except Exception:
        return _fail(f"rank {distributed.launched_rank()} failed\n{traceback.format_exc()}", 1)


def _fail(message: str, code: int) -> int:
    """Show the first failure of the job, and no other; then leave without another collective."""
    if distributed.first_to_fail():
        console.show_error(message)
    if distributed.launched_world_size() > 1:
        # Ordinary interpreter exit can wait for a process group whose peers are gone. The launcher ends the others.
        os._exit(code)
    return code
