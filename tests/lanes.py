"""Run pytest in two processes side by side: python tests/lanes.py [arguments of pytest].

What each process prints is in a log, and is shown when the process ends. The exit code is 0 if all tests passed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LANES = 2


def main(argv: list[str]) -> int:
    files = [word for word in argv if Path(word.partition("::")[0]).is_file()]
    shared = Path(tempfile.mkdtemp(prefix="vit_dist-tests-"))
    seed = [] if any(word.startswith("--seed") for word in argv) else [f"--seed={int(time.time()) % 1000}"]
    running = {lane: _start(lane, shared, [*seed, *argv]) for lane in range(1, min(LANES, len(files) or LANES) + 1)}
    codes: dict[int, int] = {}
    while running:
        try:
            time.sleep(0.2)
        except KeyboardInterrupt:  # the processes have heard it, too
            continue
        for lane in [lane for lane, process in running.items() if process.poll() is not None]:
            codes[lane] = running.pop(lane).returncode
            _say(f"\n===== lane {lane} of pytest: exit code {codes[lane]} =====\n{_log(shared, lane).read_text()}")
    if any(codes.values()):
        _say(f"FAILED: {', '.join(f'lane {lane}: exit code {code}' for lane, code in codes.items() if code)}; {shared}")
        return max(code if code > 0 else 1 for code in codes.values() if code)
    shutil.rmtree(shared, ignore_errors=True)
    return 0


def _start(lane: int, shared: Path, argv: list[str]) -> subprocess.Popen[bytes]:
    log = _log(shared, lane)
    _say(f"lane {lane} of pytest: tail -f {log}")
    own = [f"--basetemp={shared}/lane{lane}", "-o", f"cache_dir=.pytest_cache/lane{lane}"]
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", f"--shared={shared}", *own, *argv],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def _log(shared: Path, lane: int) -> Path:
    return shared / f"lane{lane}.log"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
