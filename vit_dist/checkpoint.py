"""What lies in a checkpoint folder, which launches can resume from it, and loading one that another strategy wrote.

Four layouts, all written by upstream, told apart by their files:

plain         model.safetensors, optimizer.pt                    single, ddp
fsdp_full     pytorch_model_fsdp.bin, optimizer.bin              fsdp2, hsdp with FULL_STATE_DICT
fsdp_sharded  pytorch_model_fsdp_0/, optimizer_0/                fsdp2, hsdp with SHARDED_STATE_DICT
zero          global_step<N>/*_optim_states.pt, a file per rank  zero1, zero2, zero3
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

MODEL, OPTIMIZER = "pytorch_model_fsdp", "optimizer"  # upstream's names for FSDP


def checkpoints(folder: Path) -> Iterator[Path]:
    """A run's checkpoint folders, newest first."""
    steps = {path: path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")}
    yield from sorted((p for p, step in steps.items() if step.isdigit()), key=lambda p: -int(steps[p]))


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state, empty if there is none or it was cut short."""
    try:
        found = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def layout(checkpoint: Path) -> str:
    if any(checkpoint.glob("global_step*")):
        return "zero"
    if (checkpoint / f"{MODEL}_0").is_dir():
        return "fsdp_sharded"
    return "fsdp_full" if (checkpoint / f"{MODEL}.bin").exists() else "plain"


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, None if nothing speaks against it. Upstream would take any folder of this name."""
    kind = layout(checkpoint)
    expected = {"plain": ["optimizer.pt"], "fsdp_full": [f"{MODEL}.bin", f"{OPTIMIZER}.bin"]}.get(kind, [])
    for name in ("trainer_state.json", "scheduler.pt", *expected):
        if not (checkpoint / name).is_file() or not (checkpoint / name).stat().st_size:
            return f"no {name}"
    if "global_step" not in trainer_state(checkpoint):
        return "trainer_state.json was cut short"
    if kind == "zero" and (reason := _zero_damage(checkpoint)):
        return reason
    if kind == "fsdp_sharded":
        for part in (f"{MODEL}_0", f"{OPTIMIZER}_0"):
            if reason := _shares_damage(checkpoint / part):
                return reason
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.bin"), *checkpoint.glob("global_step*/*.pt")]:
        if path.name != "training_args.bin" and not zipfile.is_zipfile(path):  # torch.save writes zip archives
            return f"{path.name} was cut short"
    weights = sorted(checkpoint.glob("*.safetensors"))
    try:
        for path in weights:
            with safe_open(path, framework="pt"):  # checks the header against the file's size
                pass
    except Exception as error:
        return f"{path.name}: {error}"
    return "no weights" if kind == "plain" and not weights else None


def _shares_damage(folder: Path) -> str | None:
    """The metadata, which rank 0 writes last, says where each tensor lies."""
    try:
        metadata: Any = dcp.FileSystemReader(folder).read_metadata()
        ends: dict[str, int] = {}
        for entry in metadata.storage_data.values():
            ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    except Exception:  # it is a pickle: anything can be wrong with half of one
        return f"{folder.name}/.metadata is missing or was cut short"
    for name, end in ends.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size < end:
            return f"{folder.name}/{name} is missing or was cut short"
    return None


def _zero_damage(checkpoint: Path) -> str | None:
    """Every rank writes its share; `latest` is written last and names the folder."""
    try:
        folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return "no latest"
    processes = len(list(checkpoint.glob("rng_state_*.pth"))) or 1  # upstream writes one for each rank, if several
    missing = sorted(set(range(processes)) - set(_zero_ranks(folder)))
    if missing:
        return f"the share of rank {missing[0]} is missing in {folder.name}"
    whole = (folder / "mp_rank_00_model_states.pt").is_file()  # ZeRO-3 has one for each rank instead
    sharded = len(list(folder.glob("zero_pp_rank_*_model_states.pt")))
    return None if whole or sharded == processes else f"model states are missing in {folder.name}"


def _zero_ranks(folder: Path) -> list[int]:
    found = (re.search(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states.pt$", path.name) for path in folder.glob("*.pt"))
    return [int(match[1]) for match in found if match]


def obstacle(checkpoint: Path, strategy: str, world_size: int) -> str | None:
    """Why this launch cannot resume from a checkpoint that is whole, and what can; None if it can."""
    wrote, zero = layout(checkpoint), strategy.startswith("zero")
    if wrote != "zero":
        return f"it was not written by DeepSpeed, and {strategy} reads no other; use ddp or fsdp2" if zero else None
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    ranks, sharded = len(_zero_ranks(folder)), any(folder.glob("zero_pp_rank_*_model_states.pt"))
    stages = "zero3 or zero3_offload" if sharded else "zero1 or zero2"
    if not zero or sharded != strategy.startswith("zero3"):
        return f"it was written by {stages} on {ranks} processes, and {strategy} cannot read it; use {stages} again"
    if ranks != world_size:
        return (
            f"DeepSpeed wrote it on {ranks} processes and cannot spread it over {world_size}; start {ranks} processes"
        )
    return None


def load_foreign_model(checkpoint: Path, model: nn.Module, whole: dict[str, Any] | None) -> None:
    """Load weights across strategies, every tensor or none (all ranks participate).

    `model` may be sharded (FSDP2) or not. `whole` are a plain checkpoint's weights under the module's names, None for
    a checkpoint that FSDP wrote. Cost: unless both sides are sharded, the weights once in host memory on every rank.
    """
    if whole is None and layout(checkpoint) == "fsdp_sharded":
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=str(checkpoint / f"{MODEL}_0"))
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=True))
        return
    if whole is None:
        whole = _torch_load(checkpoint / f"{MODEL}.bin")
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=True))


def load_foreign_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load optimizer state across strategies (all ranks participate). `optimizer` belongs to `model`."""
    kind = layout(checkpoint)
    if kind == "fsdp_sharded":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=str(checkpoint / f"{OPTIMIZER}_0"))
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    if kind == "fsdp_full":
        whole = _torch_load(checkpoint / f"{OPTIMIZER}.bin")
    else:
        whole = _by_name(_torch_load(checkpoint / "optimizer.pt"), model, optimizer)
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))


def _torch_load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _by_name(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """PyTorch numbers parameters in the optimizer's order; across strategies they go by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {order[index]: values for index, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [order[index] for index in group["params"]]} for group in state["param_groups"]
        ],
    }
