"""A measurement with what it needs to be believed: command, date, hardware, versions."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def record(script: str, out: str | None, packages: tuple[str, ...], device: str = "cpu", **measured: Any) -> None:
    """Print it, and write it to `out` if that is given."""
    result = {
        "command": f"python benchmarks/{Path(script).name}",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "device": device},
        "versions": {name: version(name) for name in packages},
        **measured,
    }
    text = json.dumps(result, indent=1) + "\n"
    sys.stdout.write(text)
    if out:
        Path(out).write_text(text)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
