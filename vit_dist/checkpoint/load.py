"""Bringing a checkpoint back: which launches can resume from it, and loading one that another strategy wrote.

Four layouts; file formats and names are upstream's:

plain         model.safetensors, optimizer.pt                    single, ddp
fsdp_full     pytorch_model_fsdp.bin, optimizer.bin              fsdp2, hsdp with FULL_STATE_DICT
fsdp_sharded  pytorch_model_fsdp_0/, optimizer_0/                fsdp2, hsdp with SHARDED_STATE_DICT
zero          global_step<N>/*_optim_states.pt, a file per rank  zero1, zero2, zero3
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vit_dist.checkpoint.store import read_manifest

MODEL, OPTIMIZER = "pytorch_model_fsdp", "optimizer"  # upstream's names for FSDP
STATE = "trainer_state.json"
LAYOUTS = ("plain", "fsdp_full", "fsdp_sharded", "zero")


def layout(checkpoint: Path) -> str:
    return str(read_manifest(checkpoint).get("layout"))


def obstacle(checkpoint: Path, strategy: str, world_size: int) -> str | None:
    """Why this launch cannot resume from a checkpoint that is whole, and what can; None if it can."""
    manifest, zero = read_manifest(checkpoint), strategy.startswith("zero")
    wrote, ranks = str(manifest.get("strategy")), manifest.get("world_size")
    if layout(checkpoint) not in LAYOUTS:
        return f"its layout is {layout(checkpoint)!r}, which this version does not know"
    if layout(checkpoint) != "zero":
        return f"it was not written by DeepSpeed, and {strategy} reads no other; use ddp or fsdp2" if zero else None
    sharded = wrote.startswith("zero3")
    stages = "zero3 or zero3_offload" if sharded else "zero1 or zero2"
    if not zero or sharded != strategy.startswith("zero3"):
        return f"it was written by {stages} on {ranks} processes, and {strategy} cannot read it; use {stages} again"
    if ranks != world_size:
        return (
            f"DeepSpeed wrote it on {ranks} processes and cannot spread it over {world_size}; start {ranks} processes"
        )
    return None


def load_model(checkpoint: Path, model: nn.Module, whole: dict[str, Any] | None) -> None:
    """Load weights across strategies, every tensor or none (all ranks participate).

    `model` may be sharded (FSDP2) or not. `whole` are a plain checkpoint's weights under the module's names, None for
    a checkpoint that FSDP wrote. Cost: unless both sides are sharded, the weights once in host memory on every rank.
    """
    if whole is None and layout(checkpoint) == "fsdp_sharded":
        state = {"model": get_model_state_dict(model)}
        _read(state, checkpoint / f"{MODEL}_0")
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=True))
        return
    if whole is None:
        whole = _torch_load(checkpoint / f"{MODEL}.bin")
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=True))


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load optimizer state across strategies (all ranks participate). `optimizer` belongs to `model`."""
    kind = layout(checkpoint)
    if kind == "fsdp_sharded":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        _read(state, checkpoint / f"{OPTIMIZER}_0")
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    if kind == "fsdp_full":
        whole = _torch_load(checkpoint / f"{OPTIMIZER}.bin")
    else:
        whole = _by_name(_torch_load(checkpoint / "optimizer.pt"), model, optimizer)
    set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(full_state_dict=True))


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Of each parameter group, as the settings of a run make them."""
    keys = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
    return [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]


def ask_for(asked: list[dict[str, Any]], optimizer: Any, scheduler: Any) -> None:
    """After loading: the settings of now instead of the checkpoint's, where --allow_change let them differ."""
    for group, wanted, loaded in zip(optimizer.param_groups, asked, hyperparameters(optimizer), strict=True):
        if wanted != loaded:
            if loaded.get("initial_lr") and "initial_lr" in wanted:
                group["lr"] *= wanted["initial_lr"] / loaded["initial_lr"]
            group.update(wanted)
    rates = [wanted["initial_lr"] for wanted in asked if "initial_lr" in wanted]
    if hasattr(scheduler, "base_lrs") and len(rates) == len(scheduler.base_lrs):
        scheduler.base_lrs = rates


class _Metadata(pickle.Unpickler):
    """Of a distributed checkpoint: PyTorch's own unpickler would call anything that such a file names."""

    MODULES = ("torch.distributed.checkpoint.", "collections")
    NAMES = ("torch.Size", "pathlib.PosixPath", "torch.serialization._get_layout")

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (is_dtype or whole in self.NAMES or module.startswith(self.MODULES)) or "." in name:
            raise pickle.UnpicklingError(f"{whole} has no business there")
        return super().find_class(module, name)

    @classmethod
    def check(cls, folder: Path) -> None:
        """Raises UnpicklingError, before upstream reads the file again."""
        with (folder / ".metadata").open("rb") as file:
            cls(file).load()


class _Planner(dcp.DefaultLoadPlanner):
    """Upstream's reads values that are no tensors with `weights_only=False` (torch 2.13, default_planner.py)."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def _read(state: dict[str, Any], folder: Path) -> None:
    """Load a distributed checkpoint in place (all ranks participate); no pickle in it runs code.

    Raises what failed first, on whichever rank.
    """
    _Metadata.check(folder)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), planner=_Planner())
    except dcp.CheckpointException as failures:  # a BaseException
        raise next(iter(failures.failures.values()))[0] from None


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
