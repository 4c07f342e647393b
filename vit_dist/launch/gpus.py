"""The GPUs that processes of this node may use, as nvidia-smi and CUDA_VISIBLE_DEVICES have them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from vit_dist.errors import UserError, first_line
from vit_dist.listing import shortened


@dataclass(frozen=True)
class Gpus:
    count: int
    why_none: str = ""  # the reason if there is none


def visible_gpus(environ: Mapping[str, str] = os.environ, ask_torch: bool = True) -> Gpus:
    """Raises UserError for a CUDA_VISIBLE_DEVICES that names a GPU that nvidia-smi does not list.

    CUDA itself would ignore it and all that follow it. Takes 0.1 s. Where nvidia-smi is missing or fails, PyTorch
    counts, in a second or more, unless `ask_torch` is false.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return Gpus(0, f"CUDA_VISIBLE_DEVICES='{visible}' hides all")
    if shutil.which("nvidia-smi", path=environ.get("PATH")) is None:
        count = _torch_count() if ask_torch else 0
        return Gpus(count, "" if count else "there is no nvidia-smi")
    listed, problem = _listed()
    present = sum(line.startswith("GPU ") for line in listed.splitlines())
    if problem and ask_torch and (count := _torch_count()):
        return Gpus(count)  # a container may have the driver and no working nvidia-smi
    if visible is None or not present:
        return Gpus(present, "" if present else problem or "nvidia-smi lists none")
    ids = [one.strip() for one in visible.split(",")]
    for one in ids:
        by_number = re.fullmatch("[0-9]{1,4}", one) and int(one) < present
        by_uuid = re.match("(GPU|MIG)-", one) and one in listed
        if not (by_number or by_uuid):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={shortened(visible, 100)} asks for GPU '{shortened(one)}', which nvidia-smi -L "
                f"does not list among the {present} of {socket.gethostname()}; name GPUs that are there"
            )
    return Gpus(len(ids))


def _listed() -> tuple[str, str]:
    """A line for each GPU and each MIG device of it, and what went wrong."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi says: {first_line(error)}"
    if done.returncode:
        told = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        return "", f"nvidia-smi says: {told[:200]}"
    return done.stdout, ""


def _torch_count() -> int:
    """Of other makers' GPUs; imports PyTorch, which a process of the run needs anyway."""
    import torch

    return torch.cuda.device_count()
