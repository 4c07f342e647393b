"""torchrun's agent as users see it: a user's error is the last line, and node 0 leaves last.

python -m vit_dist.launch.agent torch.distributed.run ...         as torchrun
python -m vit_dist.launch.agent accelerate.commands.launch ...    as accelerate launch

Both start the processes from this one, which gets and passes on signals as it would without us.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from yaml import YAMLError

from vit_dist.errors import first_line
from vit_dist.threads import spin_briefly

USER_ERROR = 2  # exit code of a process whose error has been shown in one line
LONGEST_STAY = 30.0  # seconds that node 0 waits for the others, which were done a moment ago


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher that is named first. Exit code 2 if that is what the first failed process left with."""
    name, *arguments = sys.argv[1:] if argv is None else argv
    spin_briefly()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv = [name, *arguments]
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_news)
    _leave_in_order()
    try:
        importlib.import_module(name).main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != USER_ERROR:
            raise
        return USER_ERROR
    except (ValueError, YAMLError) as error:  # of the launcher itself: its arguments, or Accelerate's file
        sys.stderr.write(f"error: {name} refuses its arguments or file: {first_line(error, 300)}\n")
        return USER_ERROR
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """Not what follows a user's error: that its process has failed, and that the others are ended."""
    message = record.getMessage()
    return not message.startswith((f"failed (exitcode: {USER_ERROR})", "Sending process"))


def _leave_in_order() -> None:
    """After torchrun's exit barrier, node 0 stays until the others have left it: they read from its store, and print a
    traceback if it is gone (torch 2.13). tests/test_launcher.py notices when the agent no longer calls this barrier.
    """
    from torch.distributed.elastic.utils import store as store_util

    upstream = store_util.barrier

    def barrier(store: Any, world_size: int, key_prefix: str, *args: Any, **kwargs: Any) -> None:
        upstream(store, world_size, key_prefix, *args, **kwargs)
        with contextlib.suppress(Exception):  # all are done, whatever becomes of the connection now
            left = f"{key_prefix}/vit_dist_left"
            store.add(left, 1)
            deadline = time.monotonic() + LONGEST_STAY
            while _is_node_0() and store.add(left, 0) < world_size and time.monotonic() < deadline:
                time.sleep(0.02)

    store_util.barrier = barrier


def _is_node_0() -> bool:
    return os.environ.get("VIT_DIST_NODE_RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
