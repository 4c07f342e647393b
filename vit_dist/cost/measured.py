"""The step that `vit-dist bench --json FILE` measured, read back and compared with the run that is planned."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_dist.errors import UserError

NUMBERS = (
    "batch", "gflop_per_image", "step_images_per_second", "train_images_per_second", "copy_bytes_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One device's step."""

    file: str
    device: str
    precision: str
    batch: int  # images of a micro-batch
    gflop_per_image: float  # forward and backward
    step_images_per_second: float  # without waiting for batches
    train_images_per_second: float  # end to end
    copy_bytes_per_second: float  # read and written

    def check(self, *, precision: str, gflop_per_image: float, gpu: str | None) -> None:
        """Raises UserError if it says nothing of that run. Another batch size is no error: seconds follow images."""

        def differs(key: str, mine: object, planned: object) -> UserError:
            return UserError(f"--bench {self.file}: {key} is {mine}, the plan has {planned}; measure what is planned")

        if self.precision != precision:
            raise differs("precision", self.precision, precision)
        if not math.isclose(self.gflop_per_image, gflop_per_image, rel_tol=1e-3):
            mine, planned = f"{self.gflop_per_image:.4g}", f"{gflop_per_image:.4g} (another model or image size)"
            raise differs("gflop_per_image", mine, planned)
        if not is_named(gpu, self.device):
            raise differs("device", self.device, f"--gpu {gpu}")


def is_named(gpu: str | None, device: str) -> bool:
    """Whether `--gpu` may mean a device: h100 "NVIDIA H100 80GB HBM3", rtx4090 "NVIDIA GeForce RTX 4090", but l4 not
    "NVIDIA L40S". None may be any.
    """
    name = re.sub(r"(?<=\D)(?=\d)", " ?", (gpu or "").lower().partition("-")[0])
    return bool(re.search(rf"\b{name}(?!\d)", device.lower()))


def read(path: str) -> Measured:
    """Raises UserError, one line that names file and key."""
    try:
        found: Any = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--bench {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--bench {path}: not JSON ({error})") from None
    values: dict[str, Any] = found if isinstance(found, dict) else {}
    for key in ("device", "precision", *NUMBERS):
        if key not in values:
            raise UserError(f"--bench {path}: has no {key!r}; make it with `vit-dist bench --json FILE`")
        number = isinstance(values[key], int | float) and 0 < values[key] < math.inf
        if not (number if key in NUMBERS else isinstance(values[key], str)):
            wanted = "a number above 0" if key in NUMBERS else "a text"
            raise UserError(f"--bench {path}: {key} is {values[key]!r}, not {wanted}")
    return Measured(path, **{key: values[key] for key in ("device", "precision", *NUMBERS)})
