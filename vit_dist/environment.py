"""Environment variables, checked where they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from vit_dist.errors import UserError

JOB = "VIT_DIST_JOB_ID"


def integer(name: str, default: int, environ: Mapping[str, str] = os.environ, least: int = 0) -> int:
    """A count or a number of a process; `default` if the variable is not set or empty.

    Raises:
        UserError: it is set to something other than a whole number of at least `least`.
    """
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise UserError(
            f"{name}={text[:40]} in the environment: give a whole number of at least {least}, or unset the variable"
        )
    return int(text)


def job_cores(environ: Mapping[str, str] = os.environ) -> int:
    """CPU cores of this host that the job may use, all its processes together."""
    usable = len(os.sched_getaffinity(0))
    return max(1, min(usable, integer("VIT_DIST_CPUS", usable, environ)))


def job(environ: Mapping[str, str] = os.environ) -> str | None:
    """The batch system's name of this job, which names a folder; None outside of a job.

    Raises:
        UserError: it could lead elsewhere, or no folder can have this name.
    """
    name = environ.get(JOB)
    if not name:
        return None
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name):
        raise UserError(
            f"{JOB}={name[:80]}: give at most 64 letters, digits, dots, dashes and underscores, and begin with a "
            "letter, a digit or an underscore"
        )
    return name
