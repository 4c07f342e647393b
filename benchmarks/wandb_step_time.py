"""What Weights & Biases costs a step, also when its server does not answer.

    python benchmarks/wandb_step_time.py [OUT.json]

The digits recipe on one process, 200 steps of 8 images with a row every 10, turn by turn: without W&B, with a server
that answers 500, one that falls silent once the run has begun, and one that answers (on the loopback interface; the
stand-in of the tests). Seconds from the 20th step to the last over their number, of each run; medians, and their ratio
to that without W&B. The ratio holds for steps of this length; one row costs the same whatever the step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

ROUNDS, STEPS, SKIPPED = 2, 200, 20
STATES = ("off", "answers 500", "silent once the run has begun", "answers")
FLAGS = [
    "digits", "--max_steps", str(STEPS), "--logging_steps", "10", "--per_device_train_batch_size", "8",
    "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false",
    "--dataloader_num_workers", "0",
]  # fmt: skip


def observed_run(argv: list[str]) -> None:
    """One run of `vit_dist.train`; prints the seconds of a step."""
    from vit_dist import train
    from vit_dist.callbacks.wandb import WandbCallback
    from vit_dist.trainer import ExactTrainer

    begun: list[float] = []
    step = ExactTrainer.training_step

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun.append(time.perf_counter())
        return step(self, *args, **kwargs)

    ExactTrainer.training_step = stepped  # type: ignore[method-assign]
    WandbCallback.__init__.__kwdefaults__["finish_timeout"] = 2.0  # the end is not what is measured
    train.main(argv)
    sys.stdout.write(f"\n{(begun[-1] - begun[SKIPPED]) / (len(begun) - 1 - SKIPPED)}\n")


def seconds_per_step(folder: Path, state: str) -> float:
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "faults")]
    from test_wandb_down import Servers

    servers = Servers()
    environment = {} if state == "off" else servers(state)
    report = ["--report_to", "none" if state == "off" else "wandb"]
    done = subprocess.run(
        [sys.executable, __file__, "--observe", *FLAGS, *report, "--output_dir", str(folder)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    for api in servers.apis:
        api.released.set()
        api.shutdown()
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return float(done.stdout.splitlines()[-1])


def main(out: str | None = None) -> None:
    seconds: dict[str, list[float]] = {state: [] for state in STATES}
    with tempfile.TemporaryDirectory() as root:
        for turn in range(ROUNDS):
            for state in STATES if turn % 2 == 0 else STATES[::-1]:
                seconds[state].append(seconds_per_step(Path(root) / f"{state} {turn}".replace(" ", "_"), state))
    medians = {state: statistics.median(times) for state, times in seconds.items()}
    record(
        __file__, out, ("torch", "transformers", "wandb"),
        seconds_per_step={state: [round(s, 5) for s in times] for state, times in seconds.items()},
        median_over_off={state: round(median / medians["off"], 3) for state, median in medians.items()},
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--observe"]:
        observed_run(sys.argv[2:])
    else:
        main(*sys.argv[1:])
