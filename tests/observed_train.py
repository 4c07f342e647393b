"""`vit_dist.train` with a witness: the bytes that each rank holds, in a file for each rank (in the folder OBSERVED)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vit_dist import build, train


def size(tensor: Any) -> int:
    """Bytes of this rank's part of a tensor."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.numel() * tensor.element_size()


def parameter_bytes(model: torch.nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        share = getattr(parameter, "ds_tensor", None)  # ZeRO-3
        total += size(parameter if share is None else share)
        if share is not None and parameter.ds_persist:
            total += parameter.ds_numel * share.element_size()  # kept whole as well
    return total


def optimizer_bytes(optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    masters = getattr(inner, "single_partition_of_fp32_groups", getattr(inner, "fp32_partitioned_groups_flat", []))
    base = getattr(inner, "optimizer", inner)  # DeepSpeed's
    states = [value for state in base.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(map(size, masters)) + sum(map(size, states))


def deepspeed_gradients(optimizer: Any) -> int:
    """Before the step: shares that are reduced, and what the parameters themselves still have."""
    shares = [gradient for group in optimizer.averaged_gradients.values() for gradient in group or ()]
    parameters = getattr(optimizer, "bit16_groups", getattr(optimizer, "fp16_groups", []))
    whole = [p.grad for group in parameters for p in group if p.grad is not None]
    return sum(map(size, [*shares, *whole]))


class Witness(TrainerCallback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        zero = getattr(optimizer, "optimizer", None)
        if hasattr(zero, "averaged_gradients") and "gradients" not in self.seen:
            self.seen["gradients"] = 0
            step = zero.step

            def observed(*args: Any, **kwargs: Any) -> Any:
                self.seen["gradients"] = deepspeed_gradients(zero)
                return step(*args, **kwargs)

            zero.step = observed

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not hasattr(next(model.parameters()), "ds_id"):
            self.seen.setdefault("gradients", sum(map(size, gradients)))

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 2:
            self.seen |= {"parameters": parameter_bytes(model), "optimizer": optimizer_bytes(optimizer)}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(self.folder, f"{args.process_index}.json").write_text(json.dumps(self.seen))


def observe(folder: Path) -> None:
    """Let the runs of this process write what they hold to files in `folder`."""
    make = build.build_trainer

    def build_observed(*args: Any, **kwargs: Any) -> Any:
        built = make(*args, **kwargs)
        built.add_callback(Witness(folder))
        return built

    build.build_trainer = build_observed


if __name__ == "__main__":  # by the real launchers
    observe(Path(os.environ["OBSERVED"]))
    sys.exit(train.main())
