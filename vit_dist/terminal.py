"""Text on its way to a terminal or a log: what comes from outside cannot move the cursor or begin a line of its own."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable

# Control characters (C0, DEL, C1), line separators, marks that reorder or hide text, tags, and bytes that are no UTF-8.
# Joiners (U+200C, U+200D) stay: names in many scripts need them.
_ESCAPED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def one_line(text: str) -> str:
    """`text` with every character that a terminal would act on written as an escape (`\\n`, `\\x1b`, `\\u202e`)."""
    return text if text.isprintable() else _ESCAPED.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()


def markdown(text: str) -> str:
    """`text` as Markdown that shows it as it is, on one line: no link, no heading, no HTML comes out of it."""
    text = re.sub(r"[\\`*\[\]<|$]|~(?=~)|&(?=[#\w]+;)|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(text))
    text = re.sub(r"^(\s*[0-9]+)(?=[.)])", r"\1\\", text)  # what makes a list, a heading or a quotation
    return re.sub(r"^(\s*)(?=[-+=#>])", r"\1\\", text)


def markdown_code(text: str) -> str:
    """The same as a code span, whose fence is longer than any run of backticks in it."""
    text = one_line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def lines(text: str) -> str:
    """The same for a text of several lines that we made ourselves, a traceback for one: its line breaks stay."""
    return "\n".join(map(one_line, text.split("\n")))


def show(texts: Iterable[str]) -> None:
    """Write a result to stdout, each text as one line."""
    sys.stdout.write("".join(f"{one_line(text)}\n" for text in texts))


def open_standard_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (`>&-`) an empty one.

    Else the next file that is opened would get that number, and everything printed would go into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            stream = open(number, mode, closefd=False)  # noqa: SIM115 (for the life of the process)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by a test or a notebook
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
