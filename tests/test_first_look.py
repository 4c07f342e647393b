"""What a new user meets first: help, version, short names, refusals in one go and at once."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import TrainingArguments

from vit_dist import first_look
from vit_dist.config import _parser, load_config
from vit_dist.errors import UserError
from vit_dist.launch.topology import FLAGS
from vit_dist.options import ALIASES, STAGES, WITHOUT_EFFECT

VALUES = {  # others than the default; "true" where none is named
    "neftune_noise_alpha": "5", "eval_accumulation_steps": "4", "average_tokens_across_devices": "false",
    "eval_do_concat_batches": "false", "dataloader_in_order": "false", "include_num_input_tokens_seen": "true",
    "include_for_metrics": "loss", "label_names": "x", "hub_strategy": "end",
    "length_column_name": "size", "hub_model_id": "me/x", "hub_revision": "main",
}  # fmt: skip


def shown(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        load_config(list(argv))
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_and_names_only_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("--help", capsys=capsys)
    lines = text.splitlines()
    assert text == first_look.HELP and len(lines) <= 60 and max(map(len, lines)) <= 120
    known = {action.dest for action in _parser()._actions} | set(ALIASES) | set(FLAGS) | {"strategy", "dry_run"}
    flags = set(re.findall(r"--([a-z0-9_]+)", text)) - {"flag"}
    assert len(flags & known) >= 20 and flags - known <= {"gpus", "gpu"}, "those of plan"
    assert "--help all" in text and "vit-dist train --data ~/photos" in text


def test_help_all_shows_the_rest_and_says_what_negated_flags_do(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown("--help", "all", capsys=capsys).split())
    assert "--crop_min_scale" in text and "--adam_beta2" in text
    assert "--no_verify_images Turn off --verify_images." in text
    assert text.count("Decode every image once before training") == 1
    assert not [key for key in (*WITHOUT_EFFECT, *STAGES) if f"--{key} " in text]


def test_help_shows_the_defaults_as_they_are() -> None:
    config = load_config(["--data", "x"])
    for text, key in (("--num_train_epochs, 3)", "num_train_epochs"), ("--learning_rate, 5e-5)", "learning_rate"),
                      ("--per_device_train_batch_size, 8)", "per_device_train_batch_size"),
                      ("--weight_decay, 0)", "weight_decay"), ("augmentation (42)", "seed")):  # fmt: skip
        assert text in first_look.HELP
        assert float(re.findall(r"[\d.e-]+(?=\)$)", text)[0]) == config.training[key]


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_setting_without_effect_is_refused_by_name(key: str) -> None:
    if key not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        pytest.skip("not in this release of transformers")
    with pytest.raises(UserError, match=rf"^{key}=.* has no effect here: .*; leave it out$"):
        load_config([f"--{key}", VALUES.get(key, "true")])


@pytest.mark.parametrize("key", STAGES)
def test_stage_that_cannot_be_switched_off_is_refused_and_true_is_taken(key: str, tmp_path: Path) -> None:
    load_config([f"--{key}"])
    with pytest.raises(UserError, match=f"{key}=False has no effect here: "):
        load_config([f"--{key}", "False"])
    (tmp_path / "recipe.yaml").write_text(f"{key}: false\n")
    with pytest.raises(UserError, match=f"{key}=False has no effect here: "):
        load_config([str(tmp_path / "recipe.yaml")])


def test_short_names_are_flags_and_recipe_keys(tmp_path: Path) -> None:
    flags = ["--lr", "1e-3", "--epochs=2", "--batch-size", "4", "--wd", "0.5", "--workers", "1", "--patience", "3"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1e-3\nepochs: 2\nbatch_size: 4\nwd: 0.5\nworkers: 1\npatience: 3\n")
    for config in (load_config(flags), load_config([str(recipe)])):
        resolved = config.resolved()
        assert [resolved[full] for full in ALIASES.values()] == [1e-3, 2, 4, 0.5, 1, 3]
    assert load_config([str(recipe), "--learning_rate", "1"]).training["learning_rate"] == 1
    assert load_config(["--allow_change", "lr"]).run.allow_change == ["learning_rate"]


@pytest.mark.parametrize("argv", [["--lr", "1", "--learning_rate", "1"], ["--learning-rate=1", "--lr=1"]])
def test_short_and_full_name_together_are_refused(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lr and --learning_rate are the same setting; give one of them"):
        load_config(argv)
    (tmp_path / "recipe.yaml").write_text("lr: 1\nlearning_rate: 1\n")
    with pytest.raises(UserError, match=r"recipe.yaml:2: lr and learning_rate are the same setting"):
        load_config([str(tmp_path / "recipe.yaml")])


def test_all_errors_of_a_recipe_are_shown_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1\nseed: x\ntrain_val_split: 2\nmax_steps: 0\nbf16_residual: 1\n")
    with pytest.raises(UserError) as caught:
        load_config([str(recipe)])
    said = str(caught.value)
    wanted = ["did you mean learning_rate?", "seed: invalid int value: 'x'", "train_val_split=2.0", "max_steps=0"]
    assert all(part in said for part in wanted) and "bf16_residual needs" not in said
    assert "\n" not in said and len(said) <= 500
    recipe.write_text("".join(f"unknown_key_number_{i}: 1\n" for i in range(30)))
    with pytest.raises(UserError, match=r"; and \d+ more$") as caught:
        load_config([str(recipe)])
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("start", [["-m", "vit_dist", "train"], ["-m", "vit_dist.train"]])
def test_missing_path_is_refused_before_the_libraries_are_loaded(start: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: /nope/photos\n")
    cases = {
        ("--data", "/nope"): "--data /nope: there is no such file or folder",
        ("--data=~/nope",): "--data ~/nope: there is no such file or folder",
        ("--data", "digits", "--model", "./nope"): "--model ./nope: there is no such folder",
        ("nope.yaml",): "no recipe nope.yaml",
        (str(recipe),): "--data /nope/photos: there is no such file or folder",
        ("--output_dir", str(recipe)): "is a file",
    }
    for argv, said in cases.items():
        begun = time.process_time_ns(), os.times().children_user
        done = subprocess.run([sys.executable, *start, *argv], capture_output=True, text=True, timeout=60)
        seconds = os.times().children_user - begun[1]
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert seconds < 0.5, f"{seconds} CPU seconds: the libraries were loaded"


@pytest.mark.parametrize(
    "argv",
    [[], ["--data", "beans"], ["--data", "user/set"], ["--model", "google/vit"], ["--run_name", "--data"], ["--data"],
     ["--run_name=--data", "/nope"], ["--output_dir", "/nope/run"], ["cifar10", "--data", "digits"]],
)  # fmt: skip
def test_what_is_not_certain_is_left_to_the_run(argv: list[str]) -> None:
    first_look.refuse(argv)


@pytest.mark.parametrize("verb", ["train", "plan", "doctor", "bench", "cache", "sweep", "slurm", "fetch", "sync"])
def test_every_verb_has_a_version(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from vit_dist import __version__, cli

    assert cli.main([verb, "--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_is_told_at_once_that_libraries_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert first_look.tell(["--data", "digits"], "1.0", {}) is None
    assert sys.stderr.getvalue() == "loading libraries\n"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert first_look.tell(["--data", "/nope"], "1.0", {"WORLD_SIZE": "2"}) is None
    assert not sys.stderr.getvalue(), "one of a launcher's processes speaks, once it knows which"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert first_look.tell([], "1.0", {}) is None and not sys.stderr.getvalue()
