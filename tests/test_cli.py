"""The console command, and the main job as a new user runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import results, run

from vit_dist import cli


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_train_without_arguments_learns_the_digits(tmp_path: Path) -> None:
    done = run("train", "--output_dir", tmp_path / "digits", module="vit_dist.cli", timeout=900)
    found = results(tmp_path / "digits")
    assert found["test_accuracy"] >= 0.96, done.stdout
    assert (found["test_samples"], found["train_samples"] + found["eval_samples"]) == (359, 1438)


def test_train_on_several_gpus_starts_a_process_each() -> None:
    command = cli.launch_command(["cifar10", "--run_name", "two words"], gpus=8)
    assert command is not None and command[0] == sys.executable
    assert command[command.index("--nproc-per-node") + 1] == "8"
    assert command[command.index("vit_dist.train") :] == ["vit_dist.train", "cifar10", "--run_name", "two words"]
    assert cli.launch_command([], gpus=1) is None and cli.launch_command([], gpus=0) is None


def test_unknown_verb_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb trian; did you mean train?\n"


def test_help_and_version_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and "train" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip()


@pytest.mark.launch
def test_unknown_argument_prints_one_line_and_exits_2() -> None:
    failed = run("train", "--learnin_rate", "1", module="vit_dist.cli", expect=2)
    assert failed.stderr == "error: unknown argument --learnin_rate; did you mean --learning_rate?\n"
