"""What others put into a run folder, a checkpoint or the environment is neither run nor written through."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lab import Job, Lab, committed
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from vit_dist import stop
from vit_dist.checkpoint import store
from vit_dist.checkpoint.load import load_optimizer
from vit_dist.files import SEAL, seal

# Forged checkpoints


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def pickled_call(module: str, name: str, *args: Any) -> bytes:
    """A pickle that calls `module.name(*args)`, written by hand: such a name need not be importable here."""
    body = pickle.dumps(args, 2)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + body[2:-1] + b"R."


def sharded(folder: Path, metadata: Callable[[Path], bytes] | None = None) -> tuple[Path, Any, Any]:
    """A committed FSDP checkpoint, its model and optimizer; `metadata` replaces what describes the optimizer."""
    staged, model = store.begin(folder, 5), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=staged / "optimizer_0", no_dist=True)
    if metadata is not None:
        (staged / "optimizer_0/.metadata").write_bytes(metadata(staged))
    files = {str(p.relative_to(staged)): store.settle(p) for p in staged.rglob("*") if p.is_file()}
    return store.commit(staged, files, {"step": 5, "layout": "fsdp_sharded"}), model, optimizer


def test_metadata_that_calls_a_loader_of_torch_distributed_is_refused(tmp_path: Path) -> None:
    """`torch_save_to_dcp` loads a file beside it without restriction."""
    marker = tmp_path / "marker"
    payload = tmp_path / "payload"
    torch.save(Call(open, str(marker), "w"), payload)

    def metadata(staged: Path) -> bytes:
        return pickle.dumps(Call(format_utils.torch_save_to_dcp, str(payload), str(tmp_path / "out")))

    checkpoint, model, optimizer = sharded(tmp_path / "run", metadata)
    assert store.damage(checkpoint) is None
    with pytest.raises(pickle.UnpicklingError, match="torch_save_to_dcp is not part of"):
        load_optimizer(checkpoint, model, optimizer)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "namedtuple"),  # compiles its arguments
        ("collections.abc", "Callable"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        ("torch.distributed.checkpoint.format_utils", "dcp_to_torch_save"),
        ("torch.distributed.checkpoint", "load"),
        ("pathlib", "os"),
    ],
)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, module: str, name: str) -> None:
    checkpoint, model, optimizer = sharded(tmp_path, lambda staged: pickled_call(module, name, "touch marker"))
    with pytest.raises(pickle.UnpicklingError, match="is not part of a checkpoint's metadata"):
        load_optimizer(checkpoint, model, optimizer)


@pytest.mark.parametrize("data", [b"", b"\x80\x04", pickle.dumps({"a": 1}), pickled_call("torch", "Size", "x")])
def test_metadata_that_is_cut_short_or_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    checkpoint, model, optimizer = sharded(tmp_path, lambda staged: data)
    with pytest.raises(pickle.UnpicklingError, match=r"cannot be read|holds no metadata"):
        load_optimizer(checkpoint, model, optimizer)


def test_metadata_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    checkpoint, model, optimizer = sharded(tmp_path)
    load_optimizer(checkpoint, model, optimizer)
    assert store.damage(checkpoint) is None
    path = checkpoint / "optimizer_0/.metadata"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(pickle.UnpicklingError, match="is not the file that the manifest names"):
        load_optimizer(checkpoint, model, optimizer)


def test_metadata_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    def metadata(staged: Path) -> bytes:
        path = staged / "optimizer_0/.metadata"
        found = pickle.loads(path.read_bytes())
        for info in found.storage_data.values():
            info.relative_path = "../../elsewhere"
        return pickle.dumps(found)

    checkpoint, model, optimizer = sharded(tmp_path, metadata)
    with pytest.raises(pickle.UnpicklingError, match="is not a file of this checkpoint"):
        load_optimizer(checkpoint, model, optimizer)


def forge(checkpoint: Path, *names: str) -> None:
    """A manifest that fits what lies there now."""
    manifest = store.read_manifest(checkpoint)
    manifest["files"] |= {name: store.settle(checkpoint / name) for name in names}
    del manifest[SEAL]
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_forged_deepspeed_shares_are_not_run(lab: Lab, tmp_path: Path) -> None:
    """DeepSpeed asks for an unrestricted load. What it wrote itself loads all the same: see test_strategies.py."""
    folder, marker = tmp_path / "run", tmp_path / "marker"
    args = ["--max_steps", 3, "--save_steps", 2, "--eval_steps", 2]
    lab.run(folder, *args, processes=2, strategy="zero2", fault="before_optim:0:2:term", expect=stop.EXIT_CODE)
    assert committed(folder) == [2]
    shares = list((folder / "checkpoint-2").rglob("*optim_states.pt"))
    for path in shares:
        torch.save({"optimizer_state_dict": Call(open, str(marker), "w"), "ds_version": "0"}, path)
    forge(folder / "checkpoint-2", *(str(path.relative_to(folder / "checkpoint-2")) for path in shares))
    job: Job = lab.run(folder, *args, processes=2, strategy="zero2", expect=None)
    assert set(job.codes.values()) == {2}, job.output
    assert "holds something other than weights and state" in job.output
    assert not marker.exists()
