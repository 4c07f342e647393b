"""Settings of the optimizer: which weights decay, SGD's momentum, warm-up of schedule-free ones; and its groups."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import losses
from lab import ARGS, Lab
from test_reload import exact_trainer, save
from tiny_models import SETTINGS, TOWERS, VIT, classifiers, tiny_config
from torch import nn
from transformers import trainer_optimizer

from vit_dist.arguments import build_arguments
from vit_dist.batch import split_batch
from vit_dist.config import load_config
from vit_dist.cost.memory import GROUPS
from vit_dist.errors import UserError
from vit_dist.model import differing_draws, random_draws
from vit_dist.schedule import describe_rate
from vit_dist.weight_decay import decayed_names

SPARED = {  # of each kind, in some family
    "dinov2_with_registers": ["cls_token", "mask_token", "register_tokens", "position_embeddings", "lambda1"],
    "deit": ["distillation_token"],
    "beit": ["relative_position_bias_table", "lambda_1", "position_embeddings"],
    "siglip": ["probe", "position_embedding.weight"],
    "clip": ["class_embedding", "position_embedding.weight", "pre_layrnorm.weight"],
    "convnextv2": ["grn.weight", "layernorm.weight"],
    "swinv2": ["logit_scale", "continuous_position_bias_mlp.0.weight"],
    "swiftformer": ["layer_scale_1"],
    "levit": ["attention_biases"],
    "perceiver": ["latents"],
    "resnet": ["normalization.weight"],
}


@pytest.mark.parametrize("family", SETTINGS)
def test_only_matrices_of_layers_decay(family: str) -> None:
    model = classifiers(family)[0](tiny_config(family))
    decayed, names = decayed_names(model), dict(model.named_parameters())
    layers = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, transformers.pytorch_utils.Conv1D)
    for name in decayed:
        assert isinstance(model.get_submodule(name.rpartition(".")[0]), layers), name
        assert names[name].dim() > 1 and "bias" not in name.rpartition(".")[2]
    others = names.keys() - set(decayed)
    assert all(any(kind in name for name in others) for kind in SPARED.get(family, ()))
    matrices = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.squeeze().dim() > 1
    }
    assert matrices - set(decayed) <= {name for name in names if "position_bias_mlp" in name}
    assert set(decayed) <= set(upstreams(model)), "nothing decays that upstream spares"


def upstreams(model: Any) -> list[str]:
    return transformers.Trainer.get_decay_parameter_names(SimpleNamespace(), model)


def test_the_trainer_asks_for_the_decayed_names(vit: Any, tmp_path: Path) -> None:
    """A canary too: upstream's hook is called by this name."""
    trainer = exact_trainer(vit, tmp_path)
    trainer.args.weight_decay = 0.1
    trainer.create_optimizer()
    decayed, spared = trainer.optimizer.param_groups
    assert len(trainer.optimizer.param_groups) == GROUPS
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    token = vit.vit.embeddings.cls_token
    assert not any(parameter is token for parameter in decayed["params"])
    assert any(parameter is token for parameter in spared["params"])


def test_a_parameter_that_zero3_took_apart_has_the_shape_it_had() -> None:
    layer = nn.Linear(3, 4)
    layer.weight.data, layer.bias.data = torch.empty(0), torch.empty(0)
    layer.weight.ds_shape, layer.bias.ds_shape = torch.Size([4, 3]), torch.Size([4])  # type: ignore[attr-defined]
    assert decayed_names(nn.Sequential(layer)) == ["0.weight"]


def test_a_checkpoint_with_other_groups_is_refused(vit: Any, tmp_path: Path) -> None:
    trainer = exact_trainer(vit, tmp_path)
    trainer.create_optimizer_and_scheduler(4)
    groups = trainer._optimizer_groups()
    assert groups == {"decayed": 20, "not_decayed": len(list(vit.parameters())) - 20}
    checkpoint = save(trainer, vit, 20)  # its manifest says nothing of groups, like one of an earlier version
    with pytest.raises(UserError, match=r"not recorded.*another version of vit_dist wrote it") as error:
        trainer._load_optimizer_and_scheduler(str(checkpoint))
    assert len(str(error.value)) < 500
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert "optimizer_groups" not in manifest


def arguments(*flags: str) -> Any:
    config = load_config(["--data", "x", "--use_cpu", *flags])
    return build_arguments(config, split_batch(config, 1))


@pytest.mark.parametrize(
    ("flags", "momentum", "nesterov"),
    [
        ([], 0.9, False),
        (["--optim_args", "momentum=0"], 0.0, False),
        (["--optim_args", "nesterov=true"], 0.9, True),
        (["--optim_args", "momentum=0.8, nesterov=true"], 0.8, True),
    ],
)
def test_sgd_has_momentum_unless_another_is_given(
    flags: list[str], momentum: float, nesterov: bool, vit: Any, tmp_path: Path
) -> None:
    trainer = exact_trainer(vit, tmp_path)
    trainer.args = arguments("--optim", "sgd", *flags)
    trainer.create_optimizer()
    group = trainer.optimizer.param_groups[0]
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"]) == (momentum, nesterov)


def test_the_rate_line_shows_the_momentum_of_sgd_alone() -> None:
    sgd = load_config(["--data", "x", "--optim", "sgd"])
    assert describe_rate(sgd, 0.1, 10) == "0.1, linear; sgd with momentum=0.9"
    assert "momentum" not in describe_rate(load_config(["--data", "x"]), 0.1, 10)
    assert arguments().optim_args is None


def test_a_share_of_warm_up_steps_reaches_schedule_free_optimizers_as_steps(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: dict[str, Any] = {}

    class Stub(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, warmup_steps: int, **kwargs: Any) -> None:
            told["warmup_steps"] = warmup_steps
            super().__init__(params, lr)

    stub = ModuleType("schedulefree")
    stub.AdamWScheduleFree = stub.SGDScheduleFree = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "schedulefree", stub)
    monkeypatch.setattr(trainer_optimizer, "is_schedulefree_available", lambda *version: True)
    from vit_dist import build, strategy
    from vit_dist.checkpoint.writer import CheckpointWriter
    from vit_dist.distributed import GlooGroup

    config = load_config(
        ["--data", str(photos), "--model", "tiny", "--optim", "schedule_free_adamw", "--warmup_steps", "0.1",
         "--max_steps", "60", "--use_cpu", "--report_to", "none", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    batch = split_batch(config, 1)
    args = build_arguments(config, batch)
    build.build(config, args, batch, strategy.prepare(args), CheckpointWriter(config, GlooGroup()))
    assert told == {"warmup_steps": 6}


def test_random_draws_are_found_in_modules_of_every_kind() -> None:
    def draws(cls: Any, config: Any) -> str:
        return random_draws(cls(config))

    assert draws(transformers.ViTForImageClassification, transformers.ViTConfig(**VIT, hidden_dropout_prob=0.0)) == ""
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        config = transformers.ViTConfig(**{**VIT, "hidden_dropout_prob": 0.0, dropout: 0.2})
        assert draws(transformers.ViTForImageClassification, config) == "dropout 0.2"
    clip = {**TOWERS, "vision_config": {**VIT, "attention_dropout": 0.3}}
    assert draws(transformers.CLIPForImageClassification, transformers.CLIPConfig(**clip)) == "dropout 0.3"
    for cls, config in (
        (transformers.SwinForImageClassification, tiny_config("swin", drop_path_rate=0.1)),
        (transformers.ConvNextForImageClassification, tiny_config("convnext", drop_path_rate=0.1)),
        (transformers.Dinov2ForImageClassification, tiny_config("dinov2", num_hidden_layers=2, drop_path_rate=0.1)),
        (transformers.BeitForImageClassification, tiny_config("beit", num_hidden_layers=2, drop_path_rate=0.1)),
    ):
        assert re.search(r"drop path 0\.1", draws(cls, config)), cls
    assert draws(*(transformers.PPLCNetForImageClassification, tiny_config("pp_lcnet"))) == ""


@pytest.fixture(scope="module")
def lab(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("optimizer"), ["--data", photos, *ARGS, "--logging_steps", 1])


def test_tiny_has_the_same_curve_on_one_and_two_processes(lab: Lab) -> None:
    for processes in (1, 2):
        job = lab.run(lab.root / f"tiny{processes}", "--model", "tiny", processes=processes)
        assert "each process draws its own" not in job.output
    one, two = (losses(lab.root / f"tiny{processes}") for processes in (1, 2))
    assert len(one) == 30 and one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5


def test_a_model_with_dropout_is_announced_on_two_processes_and_in_their_plan(
    lab: Lab, photos: Path, dropout_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from vit_dist.commands import plan

    warning = differing_draws("dropout 0.1")
    flags = ["--model", str(dropout_checkpoint), "--max_steps", "1"]
    assert warning in lab.run(lab.root / "drop2", *flags, processes=2).output
    assert warning not in lab.run(lab.root / "drop1", *flags).output
    for gpus, shown in (("2", True), ("1", False)):
        plan.main(["--data", str(photos), *flags, "--gpus", gpus, "--gpu", "h100"])
        assert (warning in capfd.readouterr().out) == shown


def test_an_image_size_far_above_the_images_own_is_announced(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from vit_dist.commands import plan

    for size, shown in (("96", True), ("64", False)):
        plan.main(["--data", str(photos), "--model", "tiny", "--image_size", size, "--gpu", "h100"])
        assert ("times the images' own 42 px" in capfd.readouterr().out) == shown
