"""The exceptions that are shown as one line."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Sequence

from vit_dist.terminal import one_line


class _Shown(Exception):
    """Control characters and line breaks in the message are escaped: names of files and classes come from outside."""

    def __str__(self) -> str:
        return one_line(str(self.args[0]) if self.args else "")


class UserError(_Shown):
    """Something the user gave cannot work.

    The message is one clear line: what is wrong, where (file, key, class), and what to do. The entry point
    prints it without a traceback and leaves with exit code 2.

    Args:
        message: the line.
        details: further lines, shown indented below it; a list of files for one.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message, tuple(details))

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *map(one_line, self.args[1])])


# What the machine lacks, and not the program: shown as one line wherever it is met.
_OF_THE_MACHINE = {
    errno.ENOSPC: "the disk is full; make room, or point --output_dir, --cache_dir or HF_HOME to another disk",
    errno.EDQUOT: "the disk quota is used up; make room, or point --output_dir, --cache_dir or HF_HOME to another disk",
    errno.EROFS: "the file system is read-only; point --output_dir, --cache_dir or HF_HOME to another place",
    errno.ENAMETOOLONG: "the name is too long for the file system; give a shorter one",
    errno.EMFILE: "this process may not open more files; raise the limit (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give",
    errno.ELOOP: "a link leads back to itself, or stands where a file or folder is needed; remove the link",
}


_OUT_OF_MEMORY = "no memory is left on this machine, or the limit is too low (ulimit -v, the job's memory)"
_SAID = {  # by libraries, in errors of no type of their own
    "Could not determine home directory": "the home directory of this user is not known; set HOME",
    "uid not found": "this user has no entry in the list of users; set HOME and USER",
    "Not enough disk space": _OF_THE_MACHINE[errno.ENOSPC],
    "allocate memory": _OUT_OF_MEMORY,
    "not enough memory": _OUT_OF_MEMORY,
    "failed to map segment": _OUT_OF_MEMORY,
    "can't start new thread": "no further thread can be started; raise the limit of processes (ulimit -u) or of memory",
}


def of_the_machine(error: BaseException | None) -> str | None:
    """One line for an error that no change of the program can help; None for every other one."""
    for _ in range(5):  # libraries raise their own from it
        if error is None:
            break
        limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        if isinstance(error, MemoryError) or (limited and isinstance(error, SystemError)):  # extensions that forget why
            return _OUT_OF_MEMORY
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            where = f"{str(error.filename)[:200]}: " if error.filename else ""
            return one_line(f"{where}{_OF_THE_MACHINE[error.errno]}")
        if isinstance(error, (RuntimeError, OSError, ImportError, KeyError)):
            for said, line in _SAID.items():
                if said in str(error):
                    return line
        error = error.__cause__
    return None


def first_line(error: BaseException, longest: int = 250) -> str:
    """The first line of an error's message without colours, shortened; the error's type if it has no message."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0].strip()[:longest] if lines else type(error).__name__


class LostProcess(_Shown):
    """Another process of the job is gone, which is not this one's fault: its traceback would say nothing.

    The message is one clear line; exit code 1.
    """
