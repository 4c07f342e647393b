"""metrics.jsonl over restarts, and what is shown on a terminal and without one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from vit_dist.callbacks.metrics_file import MetricsFile, last_steps, read_metrics
from vit_dist.callbacks.progress import Progress


def test_replayed_rows_are_not_written_again_and_a_torn_line_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (1, 2, 3):
        first.append(step, {"loss": 1.0 / step})
    first.append(2, {"eval_loss": 0.5})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert last_steps(path) == {"train": 3, "eval": 2, "test": -1}
    again = MetricsFile(path)
    for step in (2, 3, 4):
        again.append(step, {"loss": 9.0})
    found = read_metrics(path)
    assert [(row["step"], row.get("loss", row.get("eval_loss"))) for row in found] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (2, 0.5), (4, 9.0),
    ]  # fmt: skip


def test_metrics_lines_are_strict_json(tmp_path: Path) -> None:
    rows = MetricsFile(tmp_path / "metrics.jsonl")
    rows.append(1, {"loss": float("nan"), "grad_norm": float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    tmp_path: Path, terminal: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state, control = TrainerState(max_steps=20, epoch=0.0, is_world_process_zero=True), TrainerControl()
    shown = Progress(global_batch=8, terminal=terminal)
    logger = logging.getLogger("vit_dist")
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger="vit_dist"):
        shown.on_train_begin(args, state, control)
        for state.global_step in range(1, 21):
            shown.on_step_end(args, state, control)
            shown.on_log(args, state, control, logs={"loss": 0.5, "learning_rate": 1e-3})
        shown.on_log(args, state, control, logs={"eval_accuracy": 0.875, "eval_loss": 0.25})
        shown.on_train_end(args, state, control)
    out, err = capfd.readouterr()
    lines = (out if terminal else caplog.text).strip().splitlines()
    assert len(lines) == 3, "the first, the last, and the evaluation: not one line a step"
    assert "step 20/20" in lines[-1] and "accuracy 0.8750, loss 0.2500" in lines[-1]
    assert ("100%" in err) == terminal, "bars on a terminal only"


def test_rows_that_a_full_disk_did_not_take_are_written_later(tmp_path: Path) -> None:
    """However many they are, and if only a part of one was taken."""
    file, full = MetricsFile(tmp_path / "metrics.jsonl"), [False]
    raw = file._file

    class Disk:
        def write(self, data: bytes) -> int:
            if full[0]:
                raise OSError(28, "No space left on device")
            return raw.write(data[: max(1, len(data) // 2)])

    file._file = Disk()  # type: ignore[assignment]
    for step in range(1000):
        full[0] = 10 <= step < 900
        file.append(step, {"loss": step / 7})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1000))
