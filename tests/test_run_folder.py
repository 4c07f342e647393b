"""What an earlier attempt left decides what the next one may do. Without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vit_dist import run_folder
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError

FACTS: dict[str, Any] = {
    "world_size": 2, "strategy": "DDP", "global_batch_size": 64, "model_revision": None,
    "data": {"fingerprint": "f", "classes": "c"}, "versions": {}, "git_commit": None,
}  # fmt: skip


def inspect(config: Config) -> run_folder.Attempt:
    return run_folder.inspect(config, "single", 1)


def config(folder: Path, *flags: str) -> Config:
    return load_config(["--output_dir", str(folder), *flags])


def begin(folder: Path, *flags: str, **facts: Any) -> run_folder.Attempt:
    """One start of a run, up to training."""
    settings = config(folder, *flags)
    attempt = inspect(settings)
    run_folder.open_attempt(settings, attempt, ["a", "b"], {**FACTS, **facts})
    return attempt


def save_checkpoint(folder: Path, step: int) -> Path:
    import torch
    from safetensors.torch import save_file

    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"w": torch.ones(3)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def complete(folder: Path) -> None:
    run_folder.write_json(folder / run_folder.RESULTS, {"eval_accuracy": 0.5, "test_accuracy": 0.25})
    run_folder.write_status(folder, "complete")


def test_a_new_folder_is_a_first_attempt(tmp_path: Path) -> None:
    attempt = begin(tmp_path / "run")
    assert (attempt.number, attempt.checkpoint, attempt.finished) == (1, None, None)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "running"
    assert json.loads((tmp_path / "run/classes.json").read_text())["classes"] == ["a", "b"]


def test_the_same_run_before_a_checkpoint_keeps_its_id_and_rows(tmp_path: Path) -> None:
    first = begin(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    again = begin(tmp_path / "run")
    assert (again.number, again.wandb_id) == (2, first.wandb_id)
    assert (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("change", ["setting", "data"])
def test_another_run_before_a_checkpoint_begins_anew(tmp_path: Path, change: str) -> None:
    first = begin(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    if change == "setting":
        again = begin(tmp_path / "run", "--seed", "7")
        assert again.wandb_id != first.wandb_id
    else:
        begin(tmp_path / "run", data={"fingerprint": "other", "classes": "c"})
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    for step in (9, 10, 20, 100):
        save_checkpoint(tmp_path / "run", step)
    (tmp_path / "run/checkpoint-100/optimizer.pt").write_bytes(b"")
    for name in ("checkpoint-20/model.safetensors", "checkpoint-20/optimizer.pt"):
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(whole[: len(whole) // 2])
    attempt = inspect(config(tmp_path / "run"))
    assert attempt.checkpoint == str(tmp_path / "run/checkpoint-10")
    assert "no optimizer.pt" in attempt.notes[0] and "checkpoint-20 is not whole" in attempt.notes[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rate", "5e-2"], "learning_rate 0.001 -> 0.05"),
        (["--model", "other"], "model 'tiny' -> 'other'"),
        (["--data", "/photos"], "data 'digits' -> '/photos'"),
        (["--seed", "1"], "seed 42 -> 1"),
    ],
)
def test_a_changed_setting_is_refused_with_a_diff(tmp_path: Path, flags: list[str], said: str) -> None:
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    with pytest.raises(UserError, match="other settings") as caught:
        inspect(config(tmp_path / "run", *flags))
    assert said in str(caught.value) and "--fresh" in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataloader_num_workers", "2"],
        ["--report_to", "none"],
        ["--per_device_train_batch_size", "16"],
        ["--use_cpu"],
    ],
)
def test_what_does_not_change_the_result_may_change(tmp_path: Path, flags: list[str]) -> None:
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    assert inspect(config(tmp_path / "run", *flags)).checkpoint


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"global_batch_size": 128}, "global batch of 64 images, this launch makes 128"),
        ({"data": {"fingerprint": "g", "classes": "c"}}, "the data changed since the run began (fingerprint)"),
        ({"model_revision": "abc"}, "the model_revision changed"),
    ],
)
def test_other_data_or_batch_is_refused_on_resume(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    with pytest.raises(UserError) as caught:
        begin(tmp_path / "run", **facts)
    assert said in str(caught.value)
    begin(tmp_path / "run", world_size=4)


def test_a_finished_run_has_nothing_to_do_and_fresh_moves_it_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin(folder)
    complete(folder)
    said = inspect(config(folder)).finished
    assert said is not None and "test accuracy 0.2500" in said and f"{folder}.previous" in said
    replacing = inspect(config(folder, "--fresh", "--seed", "7"))
    assert (folder / "all_results.json").exists(), "moved when the new run begins, not before its data is read"
    run_folder.open_attempt(config(folder, "--fresh", "--seed", "7"), replacing, ["a", "b"], FACTS)
    assert json.loads((tmp_path / "run.previous/all_results.json").read_text())["test_accuracy"] == 0.25
    assert not (folder / "all_results.json").exists() and "test accuracy 0.2500" in replacing.notes[0]
    begin(folder, "--fresh")
    assert (tmp_path / "run.previous/all_results.json").exists(), (
        "a finished run is not overwritten by one that was not"
    )
    assert "seed: 7" in (tmp_path / "run.previous-2/config.yaml").read_text()
    assert "fresh" not in (folder / "config.yaml").read_text(), "the settings as a recipe do not start over"


@pytest.mark.parametrize("left", ["status.json", "config.yaml"])
def test_killed_while_the_first_files_were_written(tmp_path: Path, left: str) -> None:
    begin(tmp_path / "run")
    for path in (tmp_path / "run").iterdir():
        if path.name != left:
            path.unlink()
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    (tmp_path / "run/config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        begin(tmp_path / "run")


def test_another_runs_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of the run"):
        begin(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "other/checkpoint-5"))
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    save_checkpoint(tmp_path / "run", 9)
    assert begin(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-5")).checkpoint


def test_a_file_or_someone_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        inspect(config(tmp_path / "file"))
    with pytest.raises(UserError, match="not a run folder"):
        inspect(config(tmp_path))


def test_a_failure_is_recorded(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run_folder.failure_recorded(tmp_path / "run"):
        raise ZeroDivisionError("by zero")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["reason"], status["rank"]) == ("failed", "ZeroDivisionError: by zero", 0)


def test_a_best_checkpoint_that_is_gone_is_told_before_training(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    best, newest = save_checkpoint(tmp_path / "run", 4), save_checkpoint(tmp_path / "run", 6)
    (newest / "trainer_state.json").write_text(json.dumps({"global_step": 6, "best_global_step": 4}))
    settings = config(tmp_path / "run")
    assert inspect(settings).checkpoint == str(newest)
    (best / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="names checkpoint-4 as the best so far, which is missing or not whole"):
        inspect(settings)


def test_another_strategy_is_said(tmp_path: Path) -> None:
    begin(tmp_path / "run", strategy="ddp", world_size=2)
    save_checkpoint(tmp_path / "run", 4)
    assert inspect(config(tmp_path / "run")).notes == ["was ddp on 2 processes, goes on as single on 1"]
