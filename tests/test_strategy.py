"""What `strategy.py` makes of a launch: a name, or one line that says why not. No processes are started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vit_dist.errors import UserError
from vit_dist.strategy import prepare, set_fsdp_wrap_policy

FSDP = {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def args(**changed: Any) -> Any:
    settings = {
        "deepspeed_plugin": None, "fsdp": None, "fsdp_plugin_args": None, "fp16": False, "optim": "adamw_torch_fused",
        "device": torch.device("cuda"), "world_size": 2,
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **changed})


def zero(stage: int = 2, **config: Any) -> Any:
    return SimpleNamespace(
        zero_stage=stage, offload_optimizer_device="none", offload_param_device="none",
        deepspeed_config={"zero_optimization": {"stage": stage}, **config},
    )  # fmt: skip


def test_strategy_follows_from_the_launch() -> None:
    assert prepare(args(), {}) == "single"
    assert prepare(args(), {"WORLD_SIZE": "2"}) == "ddp"
    assert prepare(args(), FSDP) == "fsdp2"
    assert prepare(args(fsdp=True, fsdp_plugin_args={"fsdp_version": 2}), {"WORLD_SIZE": "2"}) == "fsdp2"
    assert [prepare(args(deepspeed_plugin=zero(stage)), {}) for stage in (1, 2, 3)] == ["zero1", "zero2", "zero3"]


def test_zero_is_given_what_its_defaults_get_wrong() -> None:
    plugin = zero(3)
    prepare(args(deepspeed_plugin=plugin), {})
    assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] is False
    own = zero(2, zero_force_ds_cpu_optimizer=True)
    prepare(args(deepspeed_plugin=own), {})
    assert own.deepspeed_config["zero_force_ds_cpu_optimizer"] is True, "a file of one's own decides"


@pytest.mark.parametrize(
    ("changed", "environ", "told"),
    [
        ({}, {**FSDP, "FSDP_VERSION": "1"}, "only FSDP2 is supported"),
        ({"world_size": 1}, FSDP, "nothing to shard over with one process"),
        ({}, {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "set it to false"),
        ({"device": torch.device("cpu")}, {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "needs GPUs to offload from"),
        ({"device": torch.device("cpu"), "fp16": True}, FSDP, "fp16 needs a GPU"),
        ({"optim": "adafactor"}, FSDP, "looks at whole matrices"),
        ({"optim": "adafactor", "deepspeed_plugin": zero()}, {}, "looks at whole matrices"),
        ({"deepspeed_plugin": zero(0)}, {}, "zero_stage 0 shards nothing"),
        ({"deepspeed_plugin": zero(optimizer={"type": "SGD"})}, {}, "'optimizer': that belongs to the recipe"),
        ({"deepspeed_plugin": zero(scheduler={"type": "WarmupLR"})}, {}, "use --lr_scheduler_type"),
        (
            {},
            {"WORLD_SIZE": "4", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "parallelism are not supported",
        ),
    ],
)
def test_impossible_strategy_is_one_line(
    changed: dict[str, Any], environ: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)  # Accelerate reads its own
    with pytest.raises(UserError, match=told):
        prepare(args(**changed), environ)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kind", "config", "blocks"),
    [
        (ViTForImageClassification, ViTConfig(**SMALL), {"ViTLayer"}),
        (Dinov2ForImageClassification, Dinov2Config(**SMALL), {"Dinov2Layer"}),
        (SwinForImageClassification, SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 2]),
         {"SwinStage", "SwinLayer"}),
        (ConvNextForImageClassification, ConvNextConfig(hidden_sizes=[8] * 4, depths=[2] * 4),
         {"ConvNextStage", "ConvNextLayer"}),
    ],
)  # fmt: skip
def test_fsdp_wraps_the_blocks_that_repeat(kind: Any, config: Any, blocks: set[str]) -> None:
    with torch.device("meta"):
        model = kind(config)
    set_fsdp_wrap_policy(model)
    assert model._no_split_modules == blocks
    model.get_input_embeddings()  # Accelerate's FSDP2 asks every model for it
