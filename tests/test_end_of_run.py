"""What a complete run shows and leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from lab import ARGS, Lab, status
from test_run_folder import begin, complete, inspect, save_checkpoint
from test_run_folder import config as config_of

from vit_dist.checkpoint import store
from vit_dist.config import load_config, write_config
from vit_dist.errors import UserError
from vit_dist.run import report, results

AT_DEFAULT = [word for word in ARGS if word not in ("--save_total_limit", 2)]


@pytest.fixture
def short(photos: Path, checkpoint: Path, tmp_path: Path) -> Lab:
    return Lab(
        tmp_path, ["--data", photos, "--model", checkpoint, *AT_DEFAULT, "--max_steps", 10, "--learning_rate", "1e-6"]
    )


def test_complete_run_shows_confusions_and_paths_and_deletes_its_checkpoints(short: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = short.run(folder).output
    assert status(folder)["state"] == "complete" and not list(store.checkpoints(folder))
    last = output.splitlines()[-4:]
    assert "complete, eval accuracy" in last[0] and "test accuracy" in last[0]
    assert last[1].startswith("most frequent confusions in test: ") and " taken for " in last[1]
    assert last[2:] == [f"model: {folder}/best", f"predictions of test: {folder}/predictions.parquet"]
    assert "Nothing to do" in short.run(folder).output
    refused = short.run(folder, "--resume_from_checkpoint", folder / "checkpoint-5", expect=2).output
    assert f"a complete run is not resumed; train on from its model in a new one: --model {folder}/best" in refused
    longer = short.run(folder, "--max_steps", 20, "--allow_change", "max_steps", expect=2).output
    assert f"a complete run cannot be changed; train on from it in a new one: --model {folder}/best" in longer


def test_complete_run_is_refused_for_other_data_and_not_without_them(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(photos, tmp_path / "photos")
    run = Lab(tmp_path, ["--data", data, "--model", checkpoint, *AT_DEFAULT, "--max_steps", 2])
    folder = tmp_path / "run"
    run.run(folder)
    image = next(path for path in sorted((data / "train").rglob("*")) if path.is_file())
    more = shutil.copy(image, image.with_name(f"added{image.suffix}"))
    assert f"{folder}: the data changed since the run began (fingerprint, splits)" in run.run(folder, expect=2).output
    Path(more).unlink()
    assert "Nothing to do" in run.run(folder).output
    shutil.rmtree(data / "train")
    output = run.run(folder).output
    assert "the data cannot be compared with those of the run: " in output and "Nothing to do" in output


def test_checkpoints_are_kept_where_that_was_asked_for(short: Lab, tmp_path: Path) -> None:
    short.run(tmp_path / "run", "--keep_checkpoints")
    assert list(store.checkpoints(tmp_path / "run"))


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        ([], False),
        (["--save_total_limit", "2"], True),
        (["--save_keep_every", "5"], True),
        (["cifar10"], True),
        (["--keep_checkpoints"], True),
        (["--save_total_limit", "2", "--keep_checkpoints", "false"], False),
    ],
)
def test_a_limit_that_is_given_keeps_checkpoints(argv: list[str], kept: bool, tmp_path: Path) -> None:
    config = load_config(argv)
    assert config.run.keep_checkpoints == kept
    write_config(config, tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]).run.keep_checkpoints == kept


def test_killed_before_its_checkpoints_were_deleted_is_complete_all_the_same(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 5)
    save_checkpoint(tmp_path / "run", 9)
    complete(tmp_path / "run")
    assert "Nothing to do" in (inspect(config_of(tmp_path / "run")).finished or "")
    (tmp_path / "run/checkpoint-9.aside").mkdir()
    results.discard_checkpoints(tmp_path / "run")
    assert not list(store.checkpoints(tmp_path / "run")) and (tmp_path / "run/checkpoint-9.aside").is_dir()
    assert "Nothing to do" in (inspect(config_of(tmp_path / "run")).finished or "")


def test_resumption_that_a_complete_run_went_through_is_not_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin(folder)
    asked = ["--resume_from_checkpoint", str(save_checkpoint(folder, 5))]
    begin(folder, *asked)
    complete(folder)
    results.discard_checkpoints(folder)
    assert "Nothing to do" in (inspect(config_of(folder, *asked)).finished or "")
    with pytest.raises(UserError, match="a complete run is not resumed"):
        inspect(config_of(folder, "--resume_from_checkpoint", str(folder / "checkpoint-9")))


def test_confusions_are_counted_per_true_class() -> None:
    labels = np.repeat([0, 1, 2], [5, 4, 3])
    predicted = np.array([0, 1, 1, 1, 2, 1, 1, 0, 0, 2, 2, 1])
    said = report.confusions(labels, predicted, ["cat", "dog", "emu"])
    assert said == ["cat taken for dog: 3 of 5", "dog taken for cat: 2 of 4", "cat taken for emu: 1 of 5"]
    assert report.confusions(labels, labels, ["cat", "dog", "emu"]) == []


def test_settings_other_than_the_defaults_come_first(tmp_path: Path) -> None:
    write_config(load_config(["--data", "/photos", "--lr", "0.25", "--seed", "7"]), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    chosen, rest = (yaml.safe_load(part) for part in text.split("# defaults\n"))
    assert set(chosen) == {"data", "learning_rate", "seed", "output_dir"}
    assert rest["num_train_epochs"] == 3 and text.startswith("# other than the defaults\n")
