"""configs/accelerate/: one owner for each setting, and nothing that a launcher or a recipe should say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS, run

from vit_dist.errors import UserError
from vit_dist.strategy import reject_launcher_overrides

FILES = {path.stem: path for path in CONFIGS.glob("*.yaml")}
PROCESSES = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(FILES[name].read_text())


def test_strategies_have_a_config_file_each() -> None:
    assert set(FILES) == {
        "single", "ddp", "ddp_multinode", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FILES if name != "single"])
def test_processes_belong_to_the_launcher(name: str) -> None:
    assert not set(PROCESSES) & settings(name).keys()


@pytest.mark.parametrize("name", FILES)
def test_precision_and_batch_belong_to_the_recipe(name: str) -> None:
    top = settings(name)
    assert not {"mixed_precision", "downcast_bf16", "dynamo_config", "use_cpu", "fp8_config"} & top.keys()
    zero = top.get("deepspeed_config", {})
    if zero:
        assert zero["gradient_accumulation_steps"] == zero["gradient_clipping"] == "auto"
    assert not {"fsdp_activation_checkpointing", "activation_checkpointing"} & top.get("fsdp_config", {}).keys()


@pytest.mark.parametrize("name", FILES)
def test_config_file_has_a_short_header(name: str) -> None:
    lines = FILES[name].read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# ") and len(lines) <= 20


def test_precision_of_the_launcher_is_refused() -> None:
    with pytest.raises(UserError, match="precision belongs to the recipe"):
        reject_launcher_overrides("fp32", {"ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(UserError, match="--torch_compile"):
        reject_launcher_overrides("fp32", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    reject_launcher_overrides("bf16", {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    reject_launcher_overrides("fp32", {"ACCELERATE_MIXED_PRECISION": "no"})


@pytest.mark.launch
def test_default_file_of_accelerate_with_a_precision_is_refused(tmp_path: Path, photos: Path, checkpoint: Path) -> None:
    """Plain `accelerate launch` reads it; what it says beyond the strategy is refused before anything starts."""
    home = tmp_path / "accelerate"
    home.mkdir()
    (home / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: bf16\n"
    )
    args = ["launch", "--main_process_port", 0, "-m", "vit_dist.train", "--data", photos, "--model", checkpoint]
    refused = run(
        *args, "--output_dir", tmp_path / "run", module="accelerate.commands.accelerate_cli", expect=1,
        HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert "asks for bf16" in refused.stderr and "default file" in refused.stderr
    assert not (tmp_path / "run").exists()
