"""DINOv3 trains like any other family: on one process and two, interrupted and resumed, and loaded without us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import losses
from lab import ARGS, Lab, committed, fingerprint
from safetensors.torch import load_file
from tiny_models import VIT, randomise

from vit_dist import stop
from vit_dist.blocks import repeated_blocks
from vit_dist.classifiers import DINOv3ViTForImageClassification
from vit_dist.rewrites import class_token_only


def model(**changes: Any) -> Any:
    settings = {**VIT, "num_hidden_layers": 2, "num_register_tokens": 2, **changes}
    return DINOv3ViTForImageClassification(transformers.DINOv3ViTConfig(**settings, num_labels=3))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub has it: a backbone without a head, and an image processor that needs torchvision."""
    folder = tmp_path_factory.mktemp("models") / "dinov3"
    config = transformers.DINOv3ViTConfig(**{**VIT, "num_hidden_layers": 2}, num_register_tokens=2)
    randomise(transformers.DINOv3ViTModel(config)).save_pretrained(folder)
    processor = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def lab(backbone: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("dinov3"), ["--data", photos, "--model", backbone, *ARGS])


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Path:
    lab.run(lab.root / "whole")
    return lab.root / "whole"


def test_the_head_sees_the_class_token_and_the_mean_patch_but_no_register() -> None:
    made = model().eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = made.dinov3(images).last_hidden_state
        assert tokens.shape[1] == 1 + 2 + 16
        wanted = made.classifier(torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1))
        assert torch.equal(made(pixel_values=images).logits, wanted)


def test_the_backbone_computes_what_upstream_computes() -> None:
    made = model().eval()
    upstream = transformers.DINOv3ViTModel(made.config).eval()
    upstream.load_state_dict(made.dinov3.state_dict())
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(made.dinov3(images).last_hidden_state, upstream(images).last_hidden_state)


def test_training_draws_nothing_at_random() -> None:
    made, images = model().train(), torch.rand(2, 3, 32, 32)
    assert made.config.pos_embed_rescale, "upstream's model rescales positions at random"
    assert torch.equal(made(pixel_values=images).logits, made(pixel_values=images).logits)


def test_its_blocks_are_found_and_its_last_block_computes_all_tokens() -> None:
    made = model()
    assert [type(block).__name__ for blocks in repeated_blocks(made) for block in blocks] == ["DINOv3ViTLayer"] * 2
    assert not class_token_only(made)
    made.gradient_checkpointing_enable()
    made.train()(pixel_values=torch.rand(1, 3, 32, 32)).logits.sum().backward()
    assert made.classifier.weight.grad is not None


def test_the_backbone_of_the_checkpoint_is_trained(lab: Lab, backbone: Path) -> None:
    lab.run(lab.root / "still", "--learning_rate", "1e-12", "--max_steps", 1, "--weight_decay", 0)
    before, after = (load_file(folder / "model.safetensors") for folder in (backbone, lab.root / "still" / "best"))
    for name, value in before.items():
        assert torch.allclose(value, after[f"dinov3.{name}"], atol=1e-6), name
    assert after.keys() - {f"dinov3.{name}" for name in before} == {"classifier.weight", "classifier.bias"}


def test_two_processes_have_the_curve_of_one(lab: Lab, whole: Path) -> None:
    lab.run(lab.root / "two", processes=2)
    one, two = losses(whole), losses(lab.root / "two")
    assert one.keys() == two.keys() and len(one) == 10
    assert all(abs(one[step] - two[step]) < 1e-5 for step in one), (one, two)


def test_an_interrupted_run_ends_with_the_same_bits(lab: Lab, whole: Path) -> None:
    folder = lab.root / "resumed"
    lab.run(folder, fault="before_optim:0:17:term", expect=stop.EXIT_CODE)
    assert 0 < max(committed(folder)) < 30
    lab.run(folder)
    assert fingerprint(folder) == fingerprint(whole)


def test_the_card_shows_the_import_with_which_plain_transformers_loads_it(whole: Path) -> None:
    card = (whole / "best" / "README.md").read_text()
    assert "import vit_dist.classifiers" in card
    assert json.loads((whole / "best" / "config.json").read_text())["architectures"] == [
        "DINOv3ViTForImageClassification"
    ]
    line = next(line for line in card.splitlines() if line.startswith("import vit_dist"))
    script = f"""
import sys, torch, transformers
import vit_dist
assert "vit_dist.classifiers" not in sys.modules and "torch.distributed.fsdp" not in vars(vit_dist)
{line}
model = transformers.AutoModelForImageClassification.from_pretrained({str(whole / "best")!r})
print(model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "torch.Size([1, 3])" in done.stdout, done.stderr


def test_a_plan_knows_it(backbone: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from vit_dist.commands import plan

    code = plan.main(["--data", str(photos), "--model", str(backbone), "--gpus", "2", "--gpu", "h100"])
    shown = capfd.readouterr().out
    assert code == 0 and "strategy ddp" in shown and "warning" not in shown
