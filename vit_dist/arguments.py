"""The settings of a run as `TrainingArguments`, which also joins the process group."""

from __future__ import annotations

import difflib
import json
import os
import socket
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from vit_dist import distributed, strategy
from vit_dist.batch import Batch, scaled_learning_rate
from vit_dist.config import Config
from vit_dist.environment import integer
from vit_dist.errors import UserError
from vit_dist.schedule import sgd_arguments


def build_arguments(config: Config, batch: Batch) -> TrainingArguments:
    """Make the `TrainingArguments`, which joins the process group. Called again for another split of the batch.

    Without an accelerator the device is the CPU, said explicitly: left to itself, upstream would not see the
    launcher's other processes.
    """
    settings = dict(config.training)
    settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"] = (
        batch.per_device,
        batch.accumulation,
    )
    settings["learning_rate"] = scaled_learning_rate(config, batch)
    if settings.get("ddp_static_graph", False) is None:
        # The same graph at every step: DDP need not look for what is ready. It fails where a step begins without
        # synchronisation (torch 2.13, reducer.cpp, expect_autograd_hooks_).
        settings["ddp_static_graph"] = batch.accumulation == 1
    if integer("GPUS_PER_NODE", 0) and not settings["use_cpu"] and not torch.accelerator.is_available():
        raise UserError(
            f"{socket.gethostname()} has GPUs for this job, but PyTorch {torch.__version__} sees none: install a build "
            "for its driver, or train on its CPUs with --use_cpu"
        )
    settings["use_cpu"] = settings["use_cpu"] or not torch.accelerator.is_available()
    if settings["dataloader_num_workers"] is None:
        settings["dataloader_num_workers"] = 0 if settings["use_cpu"] else _spare_cores()
    if settings["dataloader_persistent_workers"] is None:
        settings["dataloader_persistent_workers"] = settings["dataloader_num_workers"] > 0
    if momentum := sgd_arguments(settings):
        settings["optim_args"] = momentum
    settings["torch_compile"] = bool(settings["torch_compile"])
    if not (strategy.is_sharded() or settings["fsdp"] or settings["deepspeed"]):
        # `blocks` compiles them in place: upstream compiles the wrapped model, in pieces where gradients are sent.
        settings |= {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
    settings["dataloader_drop_last"] = False  # our sampler's business; upstream would drop evaluation images too
    settings["report_to"] = [name for name in reporters(config) if name != "wandb"] or "none"
    settings["save_total_limit"] = None  # our writer's business, which deletes after a commit and not before
    settings["disable_tqdm"] = True  # our own progress callback shows bars on a terminal
    settings["restore_callback_states_from_checkpoint"] = False
    if str(settings["lr_scheduler_type"]).endswith("reduce_lr_on_plateau"):
        settings["lr_scheduler_kwargs"] = _plateau_settings(settings)
    if "tensorboard" in settings["report_to"]:
        # upstream dropped `logging_dir` (after 5.10); this variable is what it reads now
        if "logging_dir" in settings:
            settings["logging_dir"] = str(config.logging_dir)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.logging_dir)
    # Upstream wants `save_steps` to be a multiple of `eval_steps`, so that the best model is saved. Here a new best one
    # is always saved (`ResumableTrainer._determine_best_metric`): any two intervals will do, and upstream is not told.
    by_steps = str(settings["eval_strategy"]) == str(settings["save_strategy"]) == "steps"
    loads_best = settings["load_best_model_at_end"]
    try:
        with distributed.joining():
            args = TrainingArguments(**{**settings, "load_best_model_at_end": loads_best and not by_steps})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training arguments: {' '.join(str(error).split())}") from None
    args.load_best_model_at_end = loads_best
    return args


def _plateau_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's scheduler waits for a metric to fall; ours (accuracy) is to rise."""
    metric, greater = str(settings["metric_for_best_model"]), settings["greater_is_better"]
    rises = not metric.endswith("loss") if greater is None else greater
    try:
        given = json.loads(settings["lr_scheduler_kwargs"] or "{}")
    except ValueError:
        raise UserError(f"lr_scheduler_kwargs={settings['lr_scheduler_kwargs']}: not JSON") from None
    return {"mode": "max" if rises else "min", **given}


def reporters(config: Config) -> list[str]:
    """`--report_to` as a list; empty if it was not given (then Weights & Biases is used if the user is logged in).

    Raises UserError for one that there is not, or that is not installed.
    """
    asked = config.training["report_to"]
    names = [asked] if isinstance(asked, str) else list(asked or [])
    available = get_available_reporting_integrations()
    names = available if "all" in names else [name for name in names if name != "none"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise UserError(f"report_to {name}: there is no such tracker; {hint}")
        if name not in available:
            raise UserError(f"report_to {name}: not installed; pip install {name}")
    return names


def _spare_cores() -> int:
    """Data loading workers for this process: its share of the cores it may use, less one for itself, at most 16.

    More than are needed, perhaps: `build` takes fewer once it knows the images and the device.
    """
    return min(16, distributed.cores() - 1)
