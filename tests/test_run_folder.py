"""What an earlier attempt left decides what the next one may do. Without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vit_dist.checkpoint import store
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.run import attempts, failure, run_folder

FACTS: dict[str, Any] = {
    "world_size": 2, "strategy": "DDP", "global_batch_size": 64, "model_revision": None,
    "data": {"fingerprint": "f", "classes": "c"}, "versions": {}, "git_commit": None,
}  # fmt: skip


def inspect(config: Config) -> attempts.Attempt:
    attempts.check(config)
    return attempts.inspect(config, "single", 1)


def config(folder: Path, *flags: str) -> Config:
    return load_config(["--output_dir", str(folder), *flags])


def begin(folder: Path, *flags: str, **facts: Any) -> attempts.Attempt:
    """One start of a run, up to training."""
    settings = config(folder, *flags)
    attempt = inspect(settings)
    if attempt.replaces:
        attempts.archive_run(settings, attempt)
    attempts.open_attempt(settings, attempt, ["a", "b"], {**FACTS, **facts})
    return attempt


def save_checkpoint(folder: Path, step: int, best: int | None = None, **more: Any) -> Path:
    """A small one, committed as the writer does it."""
    staged = store.begin(folder, step)
    (staged / "weights").write_bytes(bytes(100))
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best}))
    record = json.loads((folder / "run.json").read_text())
    facts = {
        "step": step, "run": record["wandb_id"], "layout": "plain", "strategy": "ddp", "world_size": 2,
        "best_step": best, "record": record, **more,
    }  # fmt: skip
    return store.commit(staged, {path.name: store.settle(path) for path in staged.iterdir()}, facts)


def complete(folder: Path) -> None:
    run_folder.write_json(folder / run_folder.RESULTS, {"eval_accuracy": 0.5, "test_accuracy": 0.25})
    run_folder.write_status(folder, "complete")


def test_new_folder_is_a_first_attempt(tmp_path: Path) -> None:
    attempt = begin(tmp_path / "run")
    assert (attempt.number, attempt.checkpoint, attempt.finished) == (1, None, None)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "running"
    assert json.loads((tmp_path / "run/classes.json").read_text())["classes"] == ["a", "b"]


def test_same_run_before_a_checkpoint_keeps_its_id_and_rows(tmp_path: Path) -> None:
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


def test_newest_whole_checkpoint_is_taken_and_newer_ones_set_aside(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    for step in (9, 10, 20, 100):
        save_checkpoint(tmp_path / "run", step)
    (tmp_path / "run/checkpoint-100/weights").write_bytes(b"")
    (tmp_path / "run/checkpoint-20/weights").write_bytes(bytes(99) + b"1")
    attempt = inspect(config(tmp_path / "run"))
    assert (attempt.checkpoint, attempt.begins_at) == (str(tmp_path / "run/checkpoint-10"), 10)
    assert "checkpoint-100 is passed over: weights has 0 bytes, not 100" in attempt.notes[0]
    assert "checkpoint-20 is passed over: weights was changed" in attempt.notes[1]
    begin(tmp_path / "run")
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-10", "checkpoint-100.aside", "checkpoint-20.aside", "checkpoint-9"]


def test_without_a_whole_checkpoint_the_run_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (save_checkpoint(tmp_path / "run", 5) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint .* is whole; --fresh .* checkpoint-5 .* was not committed"):
        inspect(config(tmp_path / "run"))


def test_checkpoint_of_another_run_is_skipped(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    begin(tmp_path / "other")
    save_checkpoint(tmp_path / "run", 5)
    save_checkpoint(tmp_path / "other", 9).rename(tmp_path / "run/checkpoint-9")
    attempt = inspect(config(tmp_path / "run"))
    assert attempt.begins_at == 5 and "checkpoint-9 is passed over: it is of another run" in attempt.notes[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rate", "5e-2"], "learning_rate 0.002 -> 0.05"),
        (["--model", "other"], "model 'tiny' -> 'other'"),
        (["--data", "/photos"], "data 'digits' -> '/photos'"),
        (["--seed", "1"], "seed 42 -> 1"),
    ],
)
def test_changed_setting_is_refused_with_a_diff(tmp_path: Path, flags: list[str], said: str) -> None:
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
def test_settings_that_do_not_change_the_result_may_change(tmp_path: Path, flags: list[str]) -> None:
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


def test_finished_run_has_nothing_to_do_and_fresh_moves_it_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin(folder)
    complete(folder)
    said = inspect(config(folder)).finished
    assert said is not None and "test accuracy 0.2500" in said and f"{folder}.previous" in said
    replacing = inspect(config(folder, "--fresh", "--seed", "7"))
    assert (folder / "all_results.json").exists(), "moved when the new run begins, not before its data is read"
    attempts.archive_run(config(folder, "--fresh", "--seed", "7"), replacing)
    attempts.open_attempt(config(folder, "--fresh", "--seed", "7"), replacing, ["a", "b"], FACTS)
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
    assert begin(tmp_path / "run").number > 1


def test_another_runs_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of the run"):
        begin(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "other/checkpoint-5"))
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    save_checkpoint(tmp_path / "run", 9)
    assert begin(tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-5")).checkpoint


def test_output_dir_that_is_a_file_or_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        inspect(config(tmp_path / "file"))
    with pytest.raises(UserError, match="not a run folder"):
        inspect(config(tmp_path))


def test_failure_record_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_API_KEY", "c0ffee-c0ffee")
    begin(tmp_path / "run")
    failure_context = lambda: {"step": 3, "committed": 2, "last_images": ["7 (cat/7.png)"]}  # noqa: E731
    with (
        pytest.raises(ZeroDivisionError),
        failure.recorded(tmp_path / "run", attempts.Attempt(number=4), failure_context),
    ):
        raise ZeroDivisionError("by zero at https://me:hunter2@host/ with c0ffee-c0ffee and hf_abcdefgh123")
    status = json.loads((tmp_path / "run/status.json").read_text())
    record = json.loads((tmp_path / "run/failure.json").read_text())
    assert [status[key] for key in ("state", "rank", "attempt", "step")] == ["failed", 0, 4, 2]
    assert record["reason"] == "ZeroDivisionError: by zero at https://***@host/ with *** and ***"
    assert record["step"] == 3 and record["last_images"] == ["7 (cat/7.png)"] and record["memory"]["resident"] > 1e6
    assert "test_run_folder.py" in "".join(record["traceback"]) and "torch" in record["versions"]
    assert not [text for text in (json.dumps(status), json.dumps(record)) if "hunter2" in text or "c0ffee" in text]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")]
)
def test_out_of_memory_says_what_to_do(tmp_path: Path, error: BaseException) -> None:
    begin(tmp_path / "run")
    said = r"lower --per_device_train_batch_size .* resident .* GB"
    with pytest.raises(UserError, match=said), failure.recorded(tmp_path / "run", attempts.Attempt(), dict):
        raise error
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_checkpoint_without_its_best_model_is_skipped(tmp_path: Path) -> None:
    """The steps since are done again, rather than the best model lost."""
    begin(tmp_path / "run")
    for step, best in ((2, 2), (4, 4), (6, 4)):
        save_checkpoint(tmp_path / "run", step, best)
    assert inspect(config(tmp_path / "run")).begins_at == 6
    (tmp_path / "run/checkpoint-4/weights").unlink()
    attempt = inspect(config(tmp_path / "run"))
    assert attempt.begins_at == 2
    assert "checkpoint-6 is passed over: its best model, checkpoint-4: weights is missing" in attempt.notes[0]


@pytest.mark.parametrize(
    ("key", "flags", "facts"),
    [
        ("learning_rate", ["--learning_rate", "5e-2"], {}),
        ("seed", ["--seed", "1"], {}),
        ("data", [], {"data": {"fingerprint": "g", "classes": "c"}}),
        ("global_batch_size", [], {"global_batch_size": 128}),
    ],
)
def test_allowed_change_is_recorded(tmp_path: Path, key: str, flags: list[str], facts: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    first = begin(folder)
    save_checkpoint(folder, 5)
    save_checkpoint(folder, 8)
    (folder / "metrics.jsonl").write_text('{"step": 5}\n{"step": 7}\n{"step": 8}\n{"step": 9}\n')
    with pytest.raises(UserError):
        begin(folder, *flags, **facts)
    again = begin(folder, *flags, "--allow_change", key, **facts)
    assert again.checkpoint == str(folder / "checkpoint-8") and again.wandb_id == first.wandb_id
    (change,) = json.loads((folder / "run.json").read_text())["changes"]
    assert (change["attempt"], change["key"]) == (2, key) and change["before"] != change["now"]
    assert (folder / "metrics.jsonl").read_text().count("step") == 3, "rows of other settings are made anew"
    assert not begin(folder, *flags, **facts).changes[1:], "and it is not asked for again"


def test_allowed_change_that_cannot_work_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin(folder)
    save_checkpoint(folder, 5)
    with pytest.raises(UserError, match="allow_change optim: a run cannot go on with another one"):
        begin(folder, "--optim", "sgd", "--allow_change", "optim")
    flags = ["--learning_rate", "5e-2", "--allow_change", "learning_rate"]
    save_checkpoint(folder, 6, layout="zero", strategy="zero2")
    with pytest.raises(UserError, match="DeepSpeed restores its own"):
        attempts.inspect(config(folder, *flags), "zero2", 2)
    complete(folder)
    with pytest.raises(UserError, match="a complete run cannot be changed; train on from it in a new one: --model"):
        begin(folder, *flags)


def test_lost_run_record_keeps_rows_and_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = begin(folder)
    save_checkpoint(folder, 5)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "run.json").unlink()
    again = begin(folder)
    assert (again.begins_at, again.wandb_id) == (5, first.wandb_id)
    assert (folder / "metrics.jsonl").exists() and begin(folder).begins_at == 5


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[:100],
    "another batch": lambda text: text.replace('"global_batch_size": 64', '"global_batch_size": 65'),
    "another run": lambda text: text.replace('"wandb_id": "', '"wandb_id": "0'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_run_record_still_refuses_other_settings(tmp_path: Path, damage: str) -> None:
    """Every checkpoint carries it."""
    folder = tmp_path / "run"
    first = begin(folder)
    save_checkpoint(folder, 5)
    path = folder / "run.json"
    before = path.read_text()
    path.write_text(DAMAGES[damage](before))
    assert path.read_text() != before
    with pytest.raises(UserError, match=r"learning_rate 0.002 -> 0.5"):
        begin(folder, "--learning_rate", "0.5")
    with pytest.raises(UserError, match="global batch of 64 images, this launch makes 128"):
        begin(folder, global_batch_size=128)
    with pytest.raises(UserError, match="the data changed since the run began"):
        begin(folder, data={"fingerprint": "other", "classes": "c"})
    assert attempts.batch_to_keep(config(folder)) == 64
    again = begin(folder)
    assert (again.number, again.begins_at, again.wandb_id) == (2, 5, first.wandb_id)


def test_run_without_any_record_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    complete(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json cannot be read, so whether this is the same run is not known"):
        begin(tmp_path / "run")


def test_killed_while_an_allowed_change_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files but the last are new: the change is taken, and recorded, by the next start."""
    folder, change = tmp_path / "run", ["--learning_rate", "0.5", "--allow_change", "learning_rate"]
    begin(folder)
    save_checkpoint(folder, 5)
    write_json = attempts.write_json

    def killed(path: Path, value: Any) -> None:
        if path.name == "run.json":
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attempts, "write_json", killed)
        begin(folder, *change)
    with pytest.raises(UserError, match=r"learning_rate 0.002 -> 0.5"):
        begin(folder, "--learning_rate", "0.5")
    begin(folder, *change)
    (recorded,) = json.loads((folder / "run.json").read_text())["changes"]
    assert (recorded["key"], recorded["before"], recorded["now"]) == ("learning_rate", 0.002, 0.5)


@pytest.mark.parametrize("key", ["metric_for_best_model", "greater_is_better"])
def test_metric_for_the_best_model_may_not_change(tmp_path: Path, key: str) -> None:
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    value = {"metric_for_best_model": "loss", "greater_is_better": "false"}[key]
    with pytest.raises(UserError, match=f"allow_change {key}: a run cannot go on with another one"):
        begin(tmp_path / "run", f"--{key}", value, "--allow_change", key)


def test_missing_best_model_is_ignored_where_none_is_loaded(tmp_path: Path) -> None:
    """What the trainer knows of the best step, without keeping it, is nothing to miss."""
    begin(tmp_path / "run", "--load_best_model_at_end", "false")
    checkpoint = save_checkpoint(tmp_path / "run", 6)
    assert json.loads((checkpoint / "manifest.json").read_text())["best_step"] is None
    assert begin(tmp_path / "run", "--load_best_model_at_end", "false").begins_at == 6


def test_strange_names_are_no_checkpoints(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    for name in ("checkpoint-\u00b2", "checkpoint-007", "checkpoint--1", "checkpoint-"):
        (tmp_path / "run" / name).mkdir()
    assert begin(tmp_path / "run").begins_at == 5


def test_going_back_is_done_once(tmp_path: Path) -> None:
    """The flag stands in a command that is started again and again."""
    folder = tmp_path / "run"
    begin(folder)
    for step in (5, 9):
        save_checkpoint(folder, step)
    back = ["--resume_from_checkpoint", str(folder / "checkpoint-5")]
    assert begin(folder, *back).begins_at == 5 and (folder / "checkpoint-9.aside").is_dir()
    save_checkpoint(folder, 9)
    again = begin(folder, *back)
    assert again.begins_at == 9 and "went back to checkpoint-5 before" in again.notes[0]
    with pytest.raises(UserError, match=r"is not named checkpoint-<step>; one that was set aside can be renamed back"):
        begin(folder, "--resume_from_checkpoint", str(folder / "checkpoint-9.aside"))


def test_fresh_is_meant_for_the_first_start_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("VIT_DIST_JOB_ID", "1")
    begin(folder)
    monkeypatch.setenv("VIT_DIST_JOB_ID", "2")
    begin(folder, "--fresh")
    save_checkpoint(folder, 5)
    assert begin(folder, "--fresh").begins_at == 5, "requeued"
    assert (tmp_path / "run.previous").is_dir() and not (tmp_path / "run.previous-2").exists()


def test_fresh_after_a_restart_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was obeyed already if this launch has begun the run, and not if it failed before that."""
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    begin(folder)
    save_checkpoint(folder, 5)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin(folder, "--fresh").begins_at == 5
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert attempts.batch_to_keep(config(folder, "--fresh")) is None
    assert begin(folder, "--fresh").begins_at == 0 and (tmp_path / "run.previous").is_dir()


def test_fresh_moves_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    (tmp_path / "disk/run").mkdir()
    begin(tmp_path / "run")
    begin(tmp_path / "run", "--fresh")
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk/run/run.json").exists()
    assert (tmp_path / "disk/run.previous/run.json").exists()


def test_unknown_allowed_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allow_change learning_rat: no such setting; did you mean learning_rate"):
        config(tmp_path, "--allow_change", "learning_rat")


def test_attempts_without_progress_stop_at_three(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number in (1, 2, 3):
        assert begin(folder).number == number
    run_folder.write_status(folder, "failed", reason="ValueError: again")
    with pytest.raises(UserError, match=r"3 attempts in a row began at step 0 .* failed, ValueError: again"):
        begin(folder)
    begin(folder, "--allow_change", "restarts")
    save_checkpoint(folder, 5)
    assert begin(folder).begins_at == 5
    for _ in range(5):  # a user's own Ctrl-C is no failure
        run_folder.write_status(folder, "preempted", by="SIGINT on rank 0")
        assert begin(folder).stalled == 0


@pytest.mark.parametrize("new", [True, False])
def test_run_folder_that_others_may_write_is_refused(tmp_path: Path, new: bool) -> None:
    """Also at the first start, or all later ones would refuse."""
    if new:
        (tmp_path / "run").mkdir()
    else:
        begin(tmp_path / "run")
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(UserError, match=r"everybody may write in it; chmod -R o-w"):
        inspect(config(tmp_path / "run"))


def test_another_strategy_is_said(tmp_path: Path) -> None:
    begin(tmp_path / "run", strategy="ddp", world_size=2)
    save_checkpoint(tmp_path / "run", 4)
    assert inspect(config(tmp_path / "run")).notes == ["was ddp on 2 processes, goes on as single on 1"]
