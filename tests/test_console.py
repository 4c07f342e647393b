"""What a process prints, and where it is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

KEEPS = """
import os, signal, sys, time
from pathlib import Path
from vit_dist import console
console.keep(Path(sys.argv[1]))
print("to stdout", flush=True)
os.system("echo of a child >&2")
deadline = time.monotonic() + 60
while "child" not in Path(sys.argv[1]).read_text() and time.monotonic() < deadline:
    time.sleep(0.01)  # the keeper has begun: from here on it ignores signals
os.killpg(0, signal.SIGUSR1)
"""


def test_output_of_a_killed_process_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "a log.txt"
    kept.write_text("before\n")
    done = subprocess.run(
        [sys.executable, "-c", KEEPS, kept], capture_output=True, text=True, timeout=120, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == -signal.SIGUSR1, "the whole group was signalled, but for the one that keeps"
    assert done.stdout == "to stdout\nof a child\n"
    assert kept.read_text() == "before\n" + done.stdout
