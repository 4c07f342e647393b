"""What is printed, and by whom: rank 0 speaks, other ranks are silent unless they fail first."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from transformers.utils import logging as transformers_logging

from vit_dist.files import open_for_writing
from vit_dist.terminal import lines, one_line, open_standard_streams, show

logger = logging.getLogger("vit_dist")

SECONDS_BETWEEN_LINES = 5.0
CLEAR_LINE = "\r\x1b[K"
# Batch systems and terminals signal every process of a job; this one ends when nobody can write to it any more.
OUTLIVE = """trap '' TERM INT HUP USR1 USR2; exec tee -a "$1" """


def set_up(rank: int) -> None:
    """Route our lines to stdout on rank 0, and keep libraries to their errors on every rank."""
    open_standard_streams()
    logger.handlers = [_Lines(sys.stdout)]
    logger.propagate = False
    logging.raiseExceptions = False  # `| head` closes stdout; training goes on
    logger.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    with contextlib.suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if rank:
        warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # its bars are for weights, which the plan line tells
    # read when these are imported, which is later
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # bars for taking rows out of a table
    if rank:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Deprecations of PyTorch's collectives and meshes, called by Accelerate and DeepSpeed, and a note on views out of
    # the patch embeddings that FSDP2 gathers: no ViT changes them in place. None of them is the user's to mend.
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it sets its own level
    for name in ("datasets", "accelerate", "huggingface_hub", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def keep(path: Path) -> None:
    """From here on, all that this process and its children write to stdout and stderr is also appended to a file.

    By `tee`, outside of this process, so that the last words of one that is killed are kept too.
    """
    log = open_for_writing(path, os.O_APPEND)
    tee = subprocess.Popen(["sh", "-c", OUTLIVE, "tee", f"/dev/fd/{log}"], stdin=subprocess.PIPE, pass_fds=[log])
    os.close(log)
    assert tee.stdin is not None
    sys.stdout.flush()
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    tee.stdin.close()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, a line for each row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class _Lines(logging.StreamHandler):
    """Writes a record as one line, whatever the names in it contain; a terminal gets it wrapped at words."""

    def format(self, record: logging.LogRecord) -> str:
        return wrapped(one_line(super().format(record)), self.stream)


def wrapped(line: str, stream: TextIO) -> str:
    """`line`, broken between words where the terminal behind `stream` ends; as it is elsewhere, and rows of a table."""
    width = _width(stream)
    is_row = re.search(r"\S {2,}\S.* {2,}\S", line)
    if not width or len(line) <= width or "\n" in line or is_row:
        return line
    title = re.match(r"\S* {2,}", line)
    indent = " " * (len(title[0]) if title else 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _width(stream: TextIO) -> int | None:
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # no terminal, or nothing with a descriptor
        return None


def say(*texts: str) -> None:
    """Log each text as one line."""
    for text in texts:
        logger.info("%s", text)


def show_error(message: str) -> None:
    """To stderr, from any rank. A message of several lines is ours; text from outside in it must be one line."""
    line_start = "" if _width(sys.stderr) is None else CLEAR_LINE  # what a terminal shows for Ctrl-C
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stderr.write(line_start + wrapped(lines(message.rstrip("\n")), sys.stderr) + "\n")
        sys.stderr.flush()


def describe_failure(error: BaseException) -> str:
    """The traceback. Further lines of an exception's message are indented: they cannot pass for lines of ours."""
    text = []
    for part in traceback.format_exception(error):
        ours = part.startswith(("  File ", "Traceback ", "\nDuring handling", "\nThe above exception"))
        indent = "" if ours else "    "
        text.append(part.rstrip("\n").replace("\n", f"\n{indent}"))
    return "\n".join(text)


def progress(what: str, doing: str = "checking images") -> Callable[[int, int], None]:
    """A callback `(done, total)` that prints a line every few seconds.

    Whichever rank does the work prints: work like this is done by one process while the others wait.
    """
    begun = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            show([f"{doing} of {what}: {done:,}/{total:,} ({done / (now - begun):,.0f}/s)"])

    return report
