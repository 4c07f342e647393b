"""Checkpoints through the Trainer: what is loaded is what was saved. With a canary for the upstream fault."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from test_model import FAMILIES
from transformers import Trainer, TrainingArguments

from vit_dist.checkpoint.snapshot import PinnedStager, Snapshot, plain
from vit_dist.checkpoint.store import named
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import load_config
from vit_dist.data.sampler import GlobalBatchSampler
from vit_dist.distributed import GlooGroup
from vit_dist.metrics import ClassificationMetrics
from vit_dist.trainer import ExactTrainer


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")


def lost_tensors(trainer: Trainer, model: torch.nn.Module, folder: Path) -> list[str]:
    """Overwrite every parameter, load `folder` as a resume does; the tensors that did not come back."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    overwrite(model)
    trainer._load_from_checkpoint(str(folder))
    return [name for name, value in model.state_dict().items() if not torch.equal(value, saved[name])]


def overwrite(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)


def exact_trainer(model: Any, folder: Path) -> ExactTrainer:
    batches = GlobalBatchSampler(4, per_device_batch=2, gradient_accumulation=1, world_size=1, rank=0, seed=0)
    writer = CheckpointWriter(load_config(["--output_dir", str(folder)]), GlooGroup())
    metrics = ClassificationMetrics(["a", "b"])
    return ExactTrainer(batches=batches, model=model, args=arguments(folder), metrics=metrics, writer=writer)


def save(trainer: ExactTrainer, model: Any, step: int) -> Path:
    """A checkpoint of the model, as the trainer commits it."""
    processor = SimpleNamespace(save_pretrained=lambda folder: None)
    parts = plain(PinnedStager(torch.device("cpu")), model, processor, torch.optim.SGD(model.parameters()))
    trainer.writer.submit(Snapshot(step, None, {"layout": "plain"}, parts))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    overwrite(model)  # while it is being written
    trainer.writer.wait()
    model.load_state_dict(saved)
    return named(trainer.writer.folder, step)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_state_is_complete(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = FAMILIES[family]()
    trainer = exact_trainer(model, tmp_path)
    assert lost_tensors(trainer, model, save(trainer, model, 20)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_best_model_is_loaded_with_all_tensors(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = FAMILIES[family]()
    trainer = exact_trainer(model, tmp_path)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    save(trainer, model, 20)
    overwrite(model)
    trainer.state.best_global_step, trainer.args.load_best_model_at_end = 20, True
    trainer._load_best_model()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "beit", "swin"])
def test_canary_stock_trainer_still_loses_the_encoder(family: str, tmp_path: Path) -> None:
    """If this fails, upstream was mended (transformers#43701): drop `ExactTrainer`'s two private overrides."""
    torch.manual_seed(0)
    model, _ = FAMILIES[family]()
    trainer = Trainer(model=model, args=arguments(tmp_path / "run"))
    trainer.save_model(str(tmp_path / "saved"))
    lost = lost_tensors(trainer, model, tmp_path / "saved")
    assert len(lost) > len(model.state_dict()) / 4, "upstream's raw load_state_dict now finds its tensors"


def test_canary_upstream_reads_what_the_trainer_sets(vit: Any, tmp_path: Path) -> None:
    """Names without which `ExactTrainer` would silently count labels in a collective, keep gradients twice, or fork."""
    assert hasattr(Trainer(model=vit, args=arguments(tmp_path)), "model_accepts_loss_kwargs")
    for method, name in (
        (Trainer.training_step, "model_accepts_loss_kwargs"),
        (Trainer._get_num_items_in_batch, "model_accepts_loss_kwargs"),
        (Trainer.get_eval_dataloader, "_eval_dataloaders"),
    ):
        assert name in method.__code__.co_names + method.__code__.co_consts, f"{method.__name__} reads {name} no more"
    assert "gradient_as_bucket_view" in {field.name for field in dataclasses.fields(DistributedDataParallelKwargs)}
    trainer = exact_trainer(vit, tmp_path)
    assert trainer.accelerator.ddp_handler.to_kwargs()["gradient_as_bucket_view"] is True
    assert trainer.model_accepts_loss_kwargs is False


def test_canary_upstream_keeps_evaluation_loaders_where_they_are_looked_for(vit: Any, tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )  # fmt: skip
    trainer = Trainer(model=vit, args=args, eval_dataset=torch.utils.data.TensorDataset(torch.zeros(2)))
    loader = trainer.get_eval_dataloader()
    assert list(trainer._eval_dataloaders.values()) == [loader]


def test_canary_the_overridden_methods_exist_upstream() -> None:
    for name in ("_load_from_checkpoint", "_load_best_model", "_load_optimizer_and_scheduler", "_load_rng_state",
                 "_save_checkpoint", "_evaluate", "_determine_best_metric", "_maybe_log_save_evaluate",
                 "_get_grad_norm", "get_decay_parameter_names"):  # fmt: skip
        assert name in vars(Trainer), f"upstream renamed {name}: ExactTrainer's override is never called"
