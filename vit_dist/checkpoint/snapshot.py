"""The state of a training, copied to host memory at one step, and the files that it becomes.

The copy is all that training waits for. Each rank holds what it will write: rank 0 everything that is not sharded,
every rank its own shares. File formats and names are upstream's, see `load`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.utils import _pytree as pytree

from vit_dist.checkpoint.load import MODEL, OPTIMIZER
from vit_dist.checkpoint.store import make_folder


class CheckpointFile(Protocol):
    """Some files of a checkpoint; `tensors` are in host memory and no training step changes them."""

    collective: bool  # whether all ranks must write it together

    @property
    def tensors(self) -> Iterable[torch.Tensor]: ...

    def write(self, folder: Path, group: Any) -> Iterable[Path]:
        """Write into `folder` and return the files that this rank wrote. `group` is the writers' process group."""
        ...


@dataclass
class Snapshot:
    """One step's state: this rank's share."""

    step: int
    best_step: int | None  # of the best model so far
    facts: dict[str, Any]  # for the manifest
    parts: list[CheckpointFile]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in self.parts for t in part.tensors)

    def not_finite(self) -> bool:
        """Whether any number in it is NaN or infinite."""
        numbers = (t for part in self.parts for t in part.tensors if t.is_floating_point())
        return any(not torch.isfinite(t).all() for t in numbers)


class PinnedStager:
    """Copies to host memory; the memory is used again at the next copy.

    Cost: the state once more in host memory, for the whole training. A copy must not be in use when the next is taken.
    """

    def __init__(self, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
            )
        )

    def copy(self, state: Any) -> Any:
        """The same dicts and lists with every tensor copied; it ends when the copies have arrived."""
        return self._stager.stage(state)


def leaves(state: Any) -> list[torch.Tensor]:
    """The tensors in nested dicts and lists, of sharded ones this rank's share."""
    tensors = (leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor))
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


@dataclass
class Bytes:
    name: str
    data: bytes
    collective = False
    tensors = ()

    def write(self, folder: Path, group: Any) -> Iterable[Path]:
        (folder / self.name).write_bytes(self.data)
        return [folder / self.name]


@dataclass
class TorchFile:
    name: str
    state: Any
    collective = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        return leaves(self.state)

    def write(self, folder: Path, group: Any) -> Iterable[Path]:
        path = folder / self.name
        make_folder(path.parent)
        torch.save(self.state, path)
        return [path]


@dataclass
class Pretrained:
    """Model and image processor as `from_pretrained` takes them. For checkpoints that one rank writes."""

    model: Any
    processor: Any
    weights: dict[str, torch.Tensor]
    collective = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        return leaves(self.weights)

    def write(self, folder: Path, group: Any) -> Iterable[Path]:
        before = set(folder.iterdir())
        self.model.save_pretrained(folder, state_dict=self.weights)
        self.processor.save_pretrained(folder)
        return set(folder.iterdir()) - before


@dataclass
class DcpShard:
    """A folder of PyTorch's distributed checkpoint, to which every rank adds a file."""

    name: str
    state: dict[str, Any]
    rank: int
    collective = True

    @property
    def tensors(self) -> list[torch.Tensor]:
        return leaves(self.state)

    def write(self, folder: Path, group: Any) -> Iterable[Path]:
        path = folder / self.name
        make_folder(path)
        dcp.save(self.state, storage_writer=dcp.FileSystemWriter(path), process_group=group, no_dist=group is None)
        return [*path.glob(f"__{self.rank}_*.distcp"), *([path / ".metadata"] if self.rank == 0 else [])]


def plain(host: PinnedStager, model: Any, processor: Any, optimizer: torch.optim.Optimizer) -> list[CheckpointFile]:
    """Single and DDP, on rank 0."""
    weights, state = host.copy([model.state_dict(), optimizer.state_dict()])
    return [Pretrained(model, processor, weights), TorchFile("optimizer.pt", state)]


def fsdp(
    host: PinnedStager, model: nn.Module, optimizer: torch.optim.Optimizer, full: bool, rank: int
) -> list[CheckpointFile]:
    """FSDP2 and HSDP (all ranks participate). `full`: gathered on rank 0."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    weights = get_model_state_dict(model, options=options)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if full and rank:
        return []
    weights, state = host.copy([weights, state])
    if full:
        return [TorchFile(f"{MODEL}.bin", weights), TorchFile(f"{OPTIMIZER}.bin", state)]
    return [DcpShard(f"{MODEL}_0", {"model": weights}, rank), DcpShard(f"{OPTIMIZER}_0", {"optimizer": state}, rank)]


def zero(host: PinnedStager, engine: Any) -> list[CheckpointFile]:
    """ZeRO-1, 2 and 3 (all ranks participate): what DeepSpeed's engine would write, caught on the way."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    parts: list[CheckpointFile] = []

    class Collector(CheckpointEngine):
        def create(self, info: Any) -> None: ...

        def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

        def save(self, state_dict: Any, path: str) -> None:
            parts.append(TorchFile(str(Path(path).relative_to(folder)), host.copy(state_dict)))

        def load(self, path: str, map_location: Any = None) -> None:
            raise NotImplementedError

        def commit(self, info: Any) -> None: ...

        def is_decoupled(self) -> bool:
            return True  # so that it leaves the file `latest` to us

    usual, tag = engine.checkpoint_engine, f"global_step{engine.global_steps}"
    with tempfile.TemporaryDirectory() as folder:
        engine.checkpoint_engine = Collector()
        try:
            engine.save_checkpoint(folder, tag=tag)
        finally:
            engine.checkpoint_engine = usual
        copied = [path for path in Path(folder).rglob("*") if path.is_file()]  # its conversion scripts, on rank 0
        parts += [Bytes(str(path.relative_to(folder)), path.read_bytes()) for path in copied]
    return [*parts, Bytes("latest", tag.encode())] if copied else parts
