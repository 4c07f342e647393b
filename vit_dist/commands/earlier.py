"""How fast an earlier run of the same model trained, for the plan of another one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from vit_dist.commands.cluster_spec import ClusterSpec, is_named
from vit_dist.config import Config
from vit_dist.run import run_folder

MOST = 200  # of the newest runs beside this one that are looked into
SAME = (  # settings that decide what an image costs
    "model", "image_size", "bf16", "fp16", "bf16_residual", "torch_compile", "gradient_checkpointing",
    "activation_checkpointing",
)  # fmt: skip


def find(config: Config, machines: ClusterSpec) -> tuple[float, str] | None:
    """Images/s on `machines` and where they were measured; None if no run here has the model, size and device.

    Looks into the run's own folder first, then into those beside it, the newest first.
    """
    for folder in [config.output_dir, *_beside(config.output_dir)]:
        results, record = (run_folder.read_json(folder / name) for name in (run_folder.RESULTS, run_folder.RECORD))
        rate, processes = results.get("train_samples_per_second"), results.get("world_size")
        settings, device = record.get("settings", {}), record.get("device")
        if not rate or not processes or not device or not _is_same_model(config.resolved(), settings):
            continue
        if machines.cpu:
            here = run_folder.read_json(folder / run_folder.STATUS).get("host") == socket.gethostname()
            if device == "cpu" and processes == 1 and here:
                return rate, f"measured in {folder} on this machine"
        elif device != "cpu" and is_named(machines.gpu, device):
            scaled = rate / processes * machines.processes
            return scaled, f"{folder} on {processes} x {device}, scaled to {machines.processes}"
    return None


def _beside(folder: Path) -> list[Path]:
    found = {path: path.stat().st_mtime for path in folder.parent.glob(f"*/{run_folder.RESULTS}") if path.is_file()}
    newest = sorted(found, key=lambda path: found[path], reverse=True)[:MOST]
    return [path.parent for path in newest if path.parent != folder]


def _is_same_model(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return bool(before) and all(before.get(key) == now.get(key) for key in SAME)
