"""Faults, set by the environment: VIT_DIST_FAULT="point:rank:count:action[:argument]".

The package knows nothing of this: `install` puts a wrapper around the function at the point, in the rank that is named,
and the wrapper acts when it is entered (or left) for the `count`-th time, counted from 1. Several faults: with commas.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import convert_frame

from vit_dist import resumable, trainer
from vit_dist.checkpoint import store, writer
from vit_dist.data import dataset


def _moved(old: str, new: str) -> Callable[..., bool]:
    return lambda source, target, *rest: old in str(source) and new in str(target)


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


# point -> (object, attribute, when the wrapped call counts, before or after it)
POINTS: dict[str, tuple[Any, str, Callable[..., bool], str]] = {
    # every rank
    "before_snapshot": (trainer.ExactTrainer, "_parts", _always, "before"),
    "after_snapshot": (trainer.ExactTrainer, "_parts", _always, "after"),
    "before_stage": (writer.CheckpointWriter, "_begin", _always, "before"),
    "before_check": (writer.CheckpointWriter, "_check", _always, "before"),
    "before_write": (writer.CheckpointWriter, "_write", _always, "before"),
    "after_write": (writer.CheckpointWriter, "_write", _always, "after"),
    "before_commit": (writer.CheckpointWriter, "_commit", _always, "before"),
    "after_commit": (writer.CheckpointWriter, "_commit", _always, "after"),
    "before_optim": (trainer.ExactTrainer, "_get_grad_norm", _always, "before"),
    "in_step_end": (resumable._StopWhenAsked, "on_step_end", _always, "after"),
    "mid_eval": (trainer.ExactTrainer, "prediction_step", _always, "after"),
    "in_compile": (convert_frame, "_compile", _always, "before"),
    "in_worker": (dataset.ImageDataset, "__getitems__", _always, "before"),
    # rank 0
    "after_weights": (store, "settle", lambda path, *rest: path.name == "model.safetensors", "after"),
    "after_optimizer": (store, "settle", lambda path, *rest: path.name == "optimizer.pt", "after"),
    "before_manifest": (store, "commit", _always, "before"),
    "before_rename": (os, "rename", _moved(".staging", "checkpoint-"), "before"),
    "after_rename": (os, "rename", _moved(".staging", "checkpoint-"), "after"),
    "mid_prune": (os, "rename", _moved("checkpoint-", ".trash"), "after"),
}


def install(rank: int, text: str | None = None) -> None:
    """Set the faults of this rank."""
    for fault in (os.environ.get("VIT_DIST_FAULT", "") if text is None else text).split(","):
        if fault:
            point, on, count, action, *argument = fault.split(":")
            if int(on) == rank:
                _wrap(point, int(count), functools.partial(ACTIONS[action], *argument))


def witness(rank: int) -> None:
    """Write down what is trained on (RECORD_IMAGES, a folder) and what is decoded (RECORD_DECODED, a file); make a
    number NaN (POISON) and look for it as on a GPU (LOOK_LATE); say how good each step's model is (FAKE_LOSS)."""
    if folder := os.environ.get("RECORD_IMAGES"):
        inner = trainer.ExactTrainer.compute_loss
        micro: dict[int, int] = {}

        def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            step = self.state.global_step + 1
            micro[step] = micro.get(step, -1) + 1
            with open(f"{folder}/{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps([step, micro[step], rank, inputs["index"].tolist()]) + "\n")
            return inner(self, model, inputs, *args, **kwargs)

        trainer.ExactTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    if os.environ.get("LOOK_LATE"):  # as on a GPU
        trainer.ExactTrainer.DEFERRED_CHECK_DEVICES = ("cpu",)
    if poison := os.environ.get("POISON"):  # gradient or weight:rank:step
        kind, on, at = poison.split(":")
        training_step = trainer.ExactTrainer.training_step

        def poisoned(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            if (rank, self.state.global_step + 1) == (int(on), int(at)):
                parameter = next(p for p in model.parameters() if p.requires_grad)
                if kind == "weight":
                    parameter.data.view(-1)[0] = float("nan")
                else:
                    parameter.register_hook(lambda gradient: gradient * float("nan"))
            return training_step(self, model, *args, **kwargs)

        trainer.ExactTrainer.training_step = poisoned  # type: ignore[method-assign]
    if losses := os.environ.get("FAKE_LOSS"):  # by step, so that a test says which model is the best
        loop = trainer.ExactTrainer.evaluation_loop
        by_step = {int(step): value for step, value in json.loads(losses).items()}

        def faked(self: Any, *args: Any, **kwargs: Any) -> Any:
            output, key = loop(self, *args, **kwargs), f"{kwargs['metric_key_prefix']}_loss"
            output.metrics[key] = by_step.get(self.state.global_step, output.metrics[key])
            return output

        trainer.ExactTrainer.evaluation_loop = faked  # type: ignore[method-assign]
    if path := os.environ.get("RECORD_DECODED"):
        items = dataset.ImageDataset.__getitems__

        def getitems(self: Any, keys: list[int]) -> Any:
            with open(path, "a") as file:
                file.write(json.dumps(keys) + "\n")
            return items(self, keys)

        dataset.ImageDataset.__getitems__ = getitems  # type: ignore[method-assign]


def _wrap(point: str, count: int, act: Callable[[], None]) -> None:
    owner, name, counts, when = POINTS[point]
    inner, left = getattr(owner, name), count

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        mine = counts(*args, **kwargs)
        left -= mine
        if mine and left == 0 and when == "before":
            act()
        result = inner(*args, **kwargs)
        if mine and left == 0 and when == "after":
            act()
        return result

    setattr(owner, name, wrapper)


def _raise(error: BaseException) -> None:
    raise error


ACTIONS: dict[str, Callable[..., None]] = {
    "kill9": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "usr2": lambda: os.kill(os.getpid(), signal.SIGUSR2),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exc": lambda: _raise(RuntimeError("a fault of the test")),
    "enospc": lambda: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")),
    "eio": lambda: _raise(OSError(errno.EIO, os.strerror(errno.EIO), "optimizer.pt")),
    "oom": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")),
    "sleep": lambda seconds="5": time.sleep(float(seconds)),
}
