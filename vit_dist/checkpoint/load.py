"""Bringing a checkpoint back: which launches can resume from it, and loading one that another strategy wrote.

Four layouts; file formats and names are upstream's:

plain         model.safetensors, optimizer.pt                    single, ddp
fsdp_full     pytorch_model_fsdp.bin, optimizer.bin              fsdp2, hsdp with FULL_STATE_DICT
fsdp_sharded  pytorch_model_fsdp_0/, optimizer_0/                fsdp2, hsdp with SHARDED_STATE_DICT
zero          global_step<N>/*_optim_states.pt, a file per rank  zero1, zero2, zero3
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
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


def forbid_pickled_code() -> None:
    """From here on no `torch.load` of this process calls what a file names, whichever library asks for it.

    DeepSpeed loads its shares with `weights_only=False`; the types that they need are named here.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def layout(checkpoint: Path) -> str:
    return str(read_manifest(checkpoint).get("layout"))


def resume_incompatibility(checkpoint: Path, strategy: str, world_size: int) -> str | None:
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


def apply_hyperparameters(asked: list[dict[str, Any]], optimizer: Any, scheduler: Any) -> None:
    """After loading: the settings of now instead of the checkpoint's, where --allow_change let them differ."""
    for group, wanted, loaded in zip(optimizer.param_groups, asked, hyperparameters(optimizer), strict=True):
        if wanted != loaded:
            if loaded.get("initial_lr") and "initial_lr" in wanted:
                group["lr"] *= wanted["initial_lr"] / loaded["initial_lr"]
            group.update(wanted)
    rates = [wanted["initial_lr"] for wanted in asked if "initial_lr" in wanted]
    if hasattr(scheduler, "base_lrs") and len(rates) == len(scheduler.base_lrs):
        scheduler.base_lrs = rates


# What the metadata of a distributed checkpoint is made of: dataclasses, enums and plain values, by their exact names.
_METADATA_TYPES = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of a distributed checkpoint. PyTorch's own reader calls whatever such a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_TYPES:
            return super().find_class(module, name)
        if (module, name) == ("torch.serialization", "_get_layout"):  # how `torch.strided` is pickled
            return _LAYOUTS.__getitem__
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


class _CheckedReader(dcp.FileSystemReader):
    """Uses the metadata that was checked; upstream would read the file again, with an unrestricted unpickler."""

    def __init__(self, folder: Path, metadata: Any) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return self._metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Of files directly in this folder only: their names come out of the metadata."""
        for item in plan.items:
            name = self.storage_data[item.storage_index].relative_path
            path = Path(str(self.path)) / str(name)
            if os.path.basename(name) != name or path.is_symlink():
                raise pickle.UnpicklingError(f"{name!r} is not a file of this checkpoint")
        return super().read_data(plan, planner)


def _read_metadata(folder: Path) -> Any:
    """The metadata, from bytes whose digest is the manifest's. Raises UnpicklingError for anything else."""
    path = folder / ".metadata"
    data = path.read_bytes()
    expected = read_manifest(folder.parent).get("files", {}).get(f"{folder.name}/{path.name}", {})
    if expected.get("sha256") != hashlib.sha256(data).hexdigest():
        raise pickle.UnpicklingError(f"{path} is not the file that the manifest names")
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # such files are forged or cut short: any type may be built from any value
        raise pickle.UnpicklingError(f"{path} cannot be read ({type(error).__name__})") from None
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{path} holds no metadata of a checkpoint")
    return metadata


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
    reader = _CheckedReader(folder, _read_metadata(folder))
    try:
        dcp.load(state, storage_reader=reader, planner=_Planner())
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
