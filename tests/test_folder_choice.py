"""Which folder a run without `--output_dir` has. Without training."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from fork_ranks import fork_ranks
from test_run_folder import FACTS, complete, save_checkpoint

from vit_dist import distributed
from vit_dist.config import load_config
from vit_dist.errors import UserError
from vit_dist.run import attempts, folder_choice, lock
from vit_dist.run.folder_choice import choose


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "_rendezvous", [])


def settle(*flags: str) -> Any:
    with contextlib.ExitStack() as held:
        return folder_choice.settle(load_config(list(flags)), held)


def begin(*flags: str, images: int = 8, world_size: int = 1) -> Path:
    """One start of a run, up to training, and its first checkpoint."""
    config = folder_choice.resolved(load_config(list(flags)), world_size)
    attempts.check(config)
    attempt = attempts.inspect(config, "single", world_size)
    facts = {**FACTS, "global_batch_size": images, "world_size": world_size}
    attempts.open_attempt(config, attempt, ["a", "b"], facts)
    save_checkpoint(config.output_dir, 5 + attempt.begins_at)
    return config.output_dir


def test_other_settings_get_a_new_folder_and_the_reason_is_shown() -> None:
    assert begin() == Path("runs/digits")
    other = folder_choice.resolved(load_config(["--seed", "7"]))
    assert other.output_dir == Path("runs/digits-2")
    assert other.output_dir_note == "runs/digits holds a run with other settings: seed 42 -> 7"
    assert begin("--seed", "7") == Path("runs/digits-2") and begin("--seed", "8") == Path("runs/digits-3")


def test_same_settings_find_the_folder_they_began_also_behind_a_gap() -> None:
    for seed in ("42", "7", "8"):
        begin("--seed", seed)
    Path("runs/digits-2").rename("elsewhere")
    assert [settle("--seed", seed).output_dir.name for seed in ("42", "8")] == ["digits", "digits-3"]
    assert settle("--seed", "9").output_dir.name == "digits-2"


def test_complete_run_is_found_by_the_same_settings() -> None:
    begin()
    complete(Path("runs/digits"))
    config = settle()
    assert config.output_dir == Path("runs/digits")
    assert "Nothing to do" in (attempts.inspect(config, "single", 1).finished or "")


def test_given_folder_keeps_refusing() -> None:
    begin()
    config = settle("--output_dir", "runs/digits", "--seed", "7")
    assert config.output_dir == Path("runs/digits")
    with pytest.raises(UserError, match="other settings: seed 42 -> 7"):
        attempts.inspect(config, "single", 1)


def test_other_global_batch_is_another_run_and_another_number_of_processes_is_not() -> None:
    begin("--per_device_train_batch_size", "8")
    larger = load_config(["--per_device_train_batch_size", "16"])
    assert choose(larger, 1).folder.name == "digits-2"
    assert choose(load_config(["--per_device_train_batch_size", "8"]), 2).folder.name == "digits"
    assert choose(load_config(["--per_device_train_batch_size", "4"]), 2).folder.name == "digits", "8 images as before"


def test_folder_of_something_else_is_left_alone() -> None:
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/thesis.tex").write_text("")
    Path("runs/digits-2").write_text("")
    config = settle()
    assert config.output_dir == Path("runs/digits-3") and "runs/digits holds something else" in config.output_dir_note


def test_refused_run_leaves_no_folder() -> None:
    assert settle("--seed", "7").output_dir == Path("runs/digits")
    assert not Path("runs/digits").exists()


def test_killed_before_its_record_was_written_frees_the_name() -> None:
    begin()
    for path in Path("runs/digits").iterdir():
        if path.name != "status.json" and path.is_file():
            path.unlink()
    Path("runs/digits/checkpoint-5").rename("elsewhere")
    assert settle("--seed", "7").output_dir == Path("runs/digits")


def test_allowed_change_goes_on_in_the_run_that_it_fits() -> None:
    begin()
    changed = ["--learning_rate", "0.5", "--allow_change", "learning_rate"]
    assert settle(*changed).output_dir == Path("runs/digits")
    with pytest.raises(UserError, match="fits none of runs/digits: other settings differ too"):
        settle(*changed, "--seed", "7")
    begin("--learning_rate", "0.25")
    with pytest.raises(UserError, match="fits 2 runs: runs/digits, runs/digits-2; name one of them with --output_dir"):
        settle(*changed)


def test_fresh_starts_over_the_run_with_the_same_settings() -> None:
    begin()
    begin("--seed", "7")
    again = settle("--seed", "7", "--fresh")
    assert again.output_dir == Path("runs/digits-2")
    assert attempts.inspect(again, "single", 1).replaces
    assert settle("--seed", "8", "--fresh").output_dir == Path("runs/digits-3")


def test_asked_checkpoint_names_its_folder() -> None:
    begin()
    begin("--seed", "7")
    asked = settle("--seed", "7", "--resume_from_checkpoint", "runs/digits-2/checkpoint-5")
    assert asked.output_dir == Path("runs/digits-2")


def test_batch_scripts_answer_holds_for_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    begin()
    monkeypatch.setenv(folder_choice.VARIABLE, "/elsewhere/digits-2")
    assert settle("--seed", "7").output_dir == Path("/elsewhere/digits-2")


def _hold(flags: list[str], start: Any, chosen: Any, leave: Any) -> None:
    start.wait()
    with contextlib.ExitStack() as held:
        config = folder_choice.settle(load_config(flags), held)
        chosen.put((flags[1], config.output_dir.name))
        leave.wait()


def test_commands_started_together_get_a_folder_each() -> None:
    fork = multiprocessing.get_context("fork")
    start, leave, chosen = fork.Event(), fork.Event(), fork.Queue()
    seeds = ["1", "2", "3", "4"]
    processes = [
        fork.Process(target=_hold, args=(["--seed", seed], start, chosen, leave), daemon=True) for seed in seeds
    ]
    for process in processes:
        process.start()
    start.set()
    found = dict(chosen.get(timeout=60) for _ in seeds)
    with pytest.raises(UserError, match="in use by process"):
        folder_choice.LOCK_TIMEOUT, before = 0.5, folder_choice.LOCK_TIMEOUT
        try:
            settle("--seed", next(seed for seed, name in found.items() if name == "digits"))
        finally:
            folder_choice.LOCK_TIMEOUT = before
    leave.set()
    for process in processes:
        process.join(60)
    assert set(found) == set(seeds)
    assert sorted(found.values()) == ["digits", "digits-2", "digits-3", "digits-4"]


def test_owner_that_has_not_yet_written_its_settings_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    fork = multiprocessing.get_context("fork")
    locked, leave = fork.Event(), fork.Event()
    other = fork.Process(target=_lock_then_write, args=(folder / lock.LOCK, locked, leave), daemon=True)
    other.start()
    assert locked.wait(60)
    assert settle("--seed", "7").output_dir.name == "digits-2"
    leave.set()
    other.join(60)


def _lock_then_write(path: Path, locked: Any, leave: Any) -> None:
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        locked.set()
        time.sleep(1)
        file.write('{"settings": "of another run"}')
        file.flush()
        leave.wait()


def _ranks(rank: int, world_size: int, out: str) -> None:
    with contextlib.ExitStack() as held:
        config = folder_choice.settle(load_config(["--seed", "7"]), held)
        distributed.dist.init_process_group("gloo")  # the same address again
        folders = distributed.gather(str(config.output_dir))
        distributed.leave()
    Path(out, str(rank)).write_text(" ".join(folders))


def test_all_ranks_use_the_answer_of_rank_0(tmp_path: Path) -> None:
    begin()
    (tmp_path / "out").mkdir()
    fork_ranks(_ranks, 2, str(tmp_path / "out"))
    said = {path.read_text() for path in (tmp_path / "out").iterdir()}
    assert said == {"runs/digits-2 runs/digits-2"}


def _refused(rank: int, world_size: int) -> None:
    with pytest.raises(UserError, match="fits none of runs/digits"), contextlib.ExitStack() as held:
        flags = ["--seed", "7", "--learning_rate", "0.5", "--allow_change", "learning_rate"]
        folder_choice.settle(load_config(flags), held)


def test_refusal_of_rank_0_reaches_all_ranks() -> None:
    begin()
    fork_ranks(_refused, 2)
