"""metrics.jsonl: the run's own record of its curve."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_dist.files import open_for_writing, replacing

logger = logging.getLogger("vit_dist")


class MetricsFile(TrainerCallback):
    """Rank 0: append each log row as one JSON object with `step` and upstream's names.

    After a restart the steps since the last checkpoint are replayed; their rows are already there and are not
    written again, so that the file has one row per step and kind, in order, whatever happened in between.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = {(row["step"], _kind(row)) for row in read_metrics(path)}
        self._file = open(open_for_writing(path, os.O_APPEND), "ab", buffering=0)  # noqa: SIM115 (as long as the run)
        self._unwritten = b""
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rows up to the checkpoint that the file has lost."""
        for row in state.log_history:
            self.append(int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self.append(state.global_step, logs)

    def append(self, step: int, logs: dict[str, Any]) -> None:
        if "train_runtime" in logs:  # the final summary, which all_results.json has
            return
        row = {"step": step, **{name: _number(value) for name, value in logs.items()}}
        if (step, _kind(row)) not in self._seen:
            self._seen.add((step, _kind(row)))
            self._unwritten += json.dumps(row).encode() + b"\n"
            self._to_disk(self._write)

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _to_disk(self, act: Callable[[], None]) -> None:
        """What a full disk does not take is kept, and written with the next row."""
        try:
            act()
        except OSError as error:
            if not self._warned:
                logger.warning(f"{self.path.name} cannot be written ({error.strerror}); training goes on")
            self._warned = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Rows up to a checkpoint are not logged again after a power cut."""
        self._to_disk(self._write)
        self._to_disk(lambda: os.fsync(self._file.fileno()))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a crash is taken off it, what is no row is passed over."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        descriptor = open_for_writing(path, 0)
        os.ftruncate(descriptor, whole)
        os.close(descriptor)
    rows = []
    for line in data[:whole].splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # blocks of zeros after a power cut
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Take the rows after `step` off the file."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    if path.exists():
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def last_steps(path: Path) -> dict[str, int]:
    """The last step that an earlier attempt logged, by kind of row."""
    steps = {"train": -1, "eval": -1, "test": -1}
    for row in read_metrics(path):
        steps[_kind(row)] = row["step"]
    return steps


def _kind(row: dict[str, Any]) -> str:
    return next((kind for kind in ("eval", "test") if any(name.startswith(f"{kind}_") for name in row)), "train")


def _number(value: Any) -> Any:
    """JSON has no NaN: null, so that every reader takes the line."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
