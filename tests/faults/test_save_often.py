"""Checkpoints more often than evaluations, with the best model loaded at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab import ARGS, Lab, committed, fingerprint
from transformers import TrainingArguments

from vit_dist import stop
from vit_dist.arguments import build_arguments
from vit_dist.batch import split_batch
from vit_dist.config import load_config


def test_any_two_intervals_are_taken_together_with_the_best_model(tmp_path: Path) -> None:
    for save, evaluate in (("40", "200"), ("200", "40"), ("7", "5")):
        flags = ["--save_steps", save, "--eval_steps", evaluate, "--output_dir", str(tmp_path), "--report_to", "none"]
        config = load_config(flags)
        args = build_arguments(config, split_batch(config, 1))
        assert (args.save_steps, args.eval_steps) == (int(save), int(evaluate))
        assert args.load_best_model_at_end and args.metric_for_best_model == "accuracy" and args.greater_is_better


def test_upstream_still_refuses_them() -> None:
    """Once it no longer does, `build_arguments` need not work around it."""
    with pytest.raises(ValueError, match="round multiple"):
        TrainingArguments(
            eval_strategy="steps", save_strategy="steps", save_steps=40, eval_steps=200, load_best_model_at_end=True
        )


def test_resumption_between_evaluations_gives_the_same_bits(
    tmp_path: Path, photos: Path, dropout_checkpoint: Path
) -> None:
    """Saved every 2 steps, evaluated every 6: the best is 6 until the end, and is kept beside the newest."""
    flags = ["--max_steps", 16, "--save_steps", 2, "--eval_steps", 6]
    lab = Lab(tmp_path, ["--data", photos, "--model", dropout_checkpoint, *ARGS, *flags])
    whole, again, fake = tmp_path / "whole", tmp_path / "again", json.dumps({6: 1.0, 12: 2.0, 16: 3.0})
    lab.run(whole, FAKE_LOSS=fake)
    assert fingerprint(whole)["results"]["best_step"] == 6 and committed(whole) == [6, 16]
    lab.run(again, fault="after_commit:0:2:kill9", expect=None, FAKE_LOSS=fake)
    assert committed(again) == [2, 4]
    lab.run(again, fault="before_optim:0:7:term", expect=stop.EXIT_CODE, FAKE_LOSS=fake)  # in step 11
    assert committed(again) == [6, 11]
    lab.run(again, FAKE_LOSS=fake)
    assert fingerprint(whole) == fingerprint(again)
