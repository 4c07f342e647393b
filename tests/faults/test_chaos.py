"""A seeded mix of everything: whatever happened on the way, the bits at the end are those of an undisturbed run.

The table of faults is printed (pytest -rP). The same --seed draws the same faults, though what a signal at a random
time hits differs.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, committed, fingerprint, status
from points import POINTS
from test_disk import DAMAGE

from vit_dist.checkpoint import store

MINUTES = 2
SAVE_POINTS = sorted(
    name for name in POINTS if name not in ("in_compile", "in_worker", "in_step_end", "mid_eval", "before_optim")
)
STEP_POINTS = ("before_optim", "in_step_end", "mid_eval")


def draw(chance: random.Random, processes: int) -> tuple[str, str]:
    """(kind, fault for the environment): the latter empty if the fault comes from outside."""
    rank, count = chance.randrange(processes), chance.randint(1, 4)
    kind = chance.choice(
        ["kill a save", "kill a step", "kill at any time", "kill all", "stop at a step", "stop at any time",
         "full disk", "broken disk", "exception", "out of memory", "hang", "data loading process", "damage"]
    )  # fmt: skip
    save, step = chance.choice(SAVE_POINTS), chance.choice(STEP_POINTS)
    fault = {
        "kill a save": f"{save}:{rank}:{count}:kill9",
        "kill a step": f"{step}:{rank}:{chance.randint(1, 12)}:kill9",
        "stop at a step": f"{step}:{rank}:{chance.randint(1, 12)}:{chance.choice(['term', 'usr1', 'usr2', 'int'])}",
        "full disk": f"before_write:{rank}:{count}:enospc",
        "broken disk": f"before_commit:{rank}:{count}:eio",
        "exception": f"{step}:{rank}:{chance.randint(1, 12)}:exc",
        "out of memory": f"before_optim:{rank}:{chance.randint(1, 12)}:oom",
        "hang": f"before_optim:{rank}:{chance.randint(1, 12)}:sleep:30",
        "data loading process": f"in_worker:{rank}:{chance.randint(2, 9)}:kill9",
    }.get(kind, "")
    return kind, fault


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_run_with_random_faults_ends_with_the_same_bits(
    lab: Lab, whole: dict[int, Any], pytestconfig: pytest.Config
) -> None:
    seed = pytestconfig.getoption("seed")
    chance, tried, happened = random.Random(seed), Counter[str](), Counter[str]()
    begun, runs = time.monotonic(), 0
    while time.monotonic() - begun < MINUTES * 60:
        processes, runs = chance.choice([1, 2]), runs + 1
        folder = lab.root / f"run{runs}"
        for _ in range(chance.randint(2, 6)):
            kind, fault = draw(chance, processes)
            tried[kind] += 1
            if kind == "damage":
                happened[kind] += damage(chance, folder)
                continue
            before = committed(folder) if folder.exists() else []
            job = lab.start(
                folder, "--allow_change", "restarts", "--hang_timeout", "5s",
                "--dataloader_num_workers", 2 if kind == "data loading process" else 0,
                processes=processes, fault=fault,
            )  # fmt: skip
            if not fault:
                time.sleep(chance.uniform(0.2, 4.0))
                number = signal.SIGKILL if kind.startswith("kill") else chance.choice([signal.SIGTERM, signal.SIGUSR1])
                job.signal(number, None if kind == "kill all" else chance.randrange(processes))
            codes = job.wait()
            happened[kind] += any(codes) or "was not saved" in job.output
            assert max(committed(folder), default=0) >= max(before, default=0), (seed, runs, kind, job.output)
        lab.run(folder, "--allow_change", "restarts", processes=processes)
        assert fingerprint(folder) == whole[processes], (
            f"seed {seed}, run {runs}: {(folder.with_suffix('.log')).read_text()}"
        )
    lines = [f"| {kind} | {tried[kind]} | {happened[kind]} |" for kind in sorted(tried)]
    head = f"seed {seed}, {runs} runs, {sum(happened.values())} faults, {(time.monotonic() - begun) / 60:.0f} min"
    sys.stdout.write("\n".join(["", head, "| fault | drawn | happened |", "|---|---|---|", *lines, ""]))


def damage(chance: random.Random, folder: Path) -> bool:
    """Damage a file of the newest checkpoint of a run that is not done, if there is another one to go back to."""
    begun = (folder / "status.json").exists() and status(folder)["state"] != "complete"
    steps = committed(folder) if begun else []
    if len(steps) < 2:
        return False
    newest = store.named(folder, steps[-1])
    path = chance.choice(sorted(path for path in newest.iterdir() if path.is_file()))
    chance.choice(sorted(DAMAGE.items()))[1](path)
    return True
