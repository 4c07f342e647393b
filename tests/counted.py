"""A counter for a forked run: the operators of steps 4 to 7, in a file for each rank.

The run takes the path of GPUs, which looks at losses where something is logged; between two log points an operator that
hands a value to the host would make it wait for the device.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from vit_dist import build, trainer


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.copied = 0  # bytes that become another type's or device's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name
        self.counts[name] += 1
        if name == "aten::_to_copy":
            self.copied += found.nbytes
        return found


class Steps(TrainerCallback):
    """Last of the callbacks, so that what others do at the end of a step counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[dict[str, Any]] = []
        self.count: Count | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()
        if 3 <= state.global_step < 7:
            self.count = Count()
            self.count.__enter__()

    def _close(self) -> None:
        if self.count is not None:
            self.count.__exit__(None, None, None)
            self.found.append({"operators": self.count.counts, "copied": self.count.copied})
            self.count = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        facts = {"steps": self.found, "parameters": len(list(kwargs["model"].parameters()))}
        (self.folder / f"{args.process_index}.json").write_text(json.dumps(facts))


def count_steps(folder: Path) -> None:
    """Let the runs of this process write their counts to files in `folder`."""
    make = build.build_trainer

    def with_steps(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.add_callback(Steps(folder))
        return made

    trainer.ExactTrainer.DEFERRED_CHECK_DEVICES = ("cpu",)  # type: ignore[misc]
    build.build_trainer = with_steps
