"""The console command, and the main job as a new user runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import results, run

from vit_dist import cli, train
from vit_dist.launch import start
from vit_dist.launch.gpus import Gpus


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_train_without_arguments_learns_the_digits(tmp_path: Path) -> None:
    done = run("train", "--output_dir", tmp_path / "digits", module="vit_dist.cli", timeout=900)
    found = results(tmp_path / "digits")
    assert found["test_accuracy"] >= 0.96, done.stdout
    assert (found["test_samples"], found["train_samples"] + found["eval_samples"]) == (359, 1438)


def test_train_on_several_gpus_starts_a_process_each() -> None:
    words = ["cifar10", "--run_name", "two words"]
    launch = start.of_this_machine("vit_dist.train", words, Gpus(8))
    assert launch is not None and launch.command[0] == sys.executable
    assert launch.command[launch.command.index("--nproc-per-node") + 1] == "8"
    assert launch.command[launch.command.index("vit_dist.train") :] == ["vit_dist.train", *words]
    assert start.of_this_machine("vit_dist.train", [], Gpus(1)) is None
    assert start.of_this_machine("vit_dist.train", [], Gpus(0, "none")) is None


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_strategy_and_processes_are_flags_of_the_verbs_that_train(
    capsys: pytest.CaptureFixture[str], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")  # what an outer launcher has left does not matter
    assert cli.main([verb, "--strategy", "fsdp2", "digits", "--nproc", "2", "--dry_run"]) == 0
    words = capsys.readouterr().out.split()
    module = "vit_dist.train" if verb == "train" else "vit_dist.commands.doctor"
    assert words[-3:] == ["-m", module, "digits"] and words[words.index("--num_processes") + 1] == "2"
    assert cli.main([verb, "--strategy", "fdsp2", "digits"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown strategy fdsp2; did you mean fsdp2?")


def test_strategy_given_to_a_started_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["digits", "--strategy", "fsdp2"]) == 2
    assert "--strategy starts processes; give it to `vit-dist train`" in capsys.readouterr().err


def test_unknown_verb_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command trian; did you mean train?\n"


def test_help_and_version_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0 and "train" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.strip()


@pytest.mark.launch
def test_unknown_argument_prints_one_line_and_exits_2() -> None:
    failed = run("train", "--learnin_rate", "1", module="vit_dist.cli", expect=2)
    assert failed.stderr == "error: unknown argument --learnin_rate; did you mean --learning_rate?\n"
