"""Recipes and flags: one set of keys, one set of checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from vit_dist.config import load_config, shipped_recipes, write_config
from vit_dist.errors import UserError
from vit_dist.options import REFUSED, SECRET_KEYS, STAGES, WITHOUT_EFFECT, DataOptions, ModelOptions, RunOptions


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_config_without_arguments_is_the_embedded_default() -> None:
    config = load_config([])
    assert (config.data.data, config.model.model) == ("digits", "tiny")
    assert str(config.output_dir) == "runs/digits"
    assert config.data.crop_min_scale == 0.6 and not config.data.horizontal_flip


def test_data_alone_takes_the_package_defaults() -> None:
    config = load_config(["--data", "/photos/birds/"])
    assert config.model.model == "google/vit-base-patch16-224-in21k"
    assert config.data.horizontal_flip
    assert str(config.output_dir) == "runs/birds"


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(recipe) -> None:
    path = recipe("learning_rate: 1e-3\nnum_train_epochs: 3\nhorizontal_flip: false\n")
    config = load_config([path, "--num_train_epochs", "4", "--learning-rate=2e-3"])
    assert (config.training["learning_rate"], config.training["num_train_epochs"]) == (2e-3, 4)
    assert not config.data.horizontal_flip
    assert str(config.output_dir) == "runs/recipe"


def test_values_in_a_recipe_are_checked_as_flags_are(recipe) -> None:
    config = load_config([recipe(
        "learning_rate: 1e-3\nbf16: yes\nwarmup_steps: 0.1\nreport_to: tensorboard\nmetrics: [precision]\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\ndata_config:\n"
    )])  # fmt: skip
    assert config.training["learning_rate"] == 0.001 and config.training["bf16"] is True
    assert config.training["report_to"] == ["tensorboard"] and config.run.metrics == ["precision"]
    assert config.training["lr_scheduler_kwargs"] == '{"num_cycles": 2}'
    assert config.data.data_config is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rat: 1e-3", r":2: unknown key 'learning_rat'; did you mean learning_rate\?"),
        ("learning_rate: fast", r":1: learning_rate: invalid float value: 'fast'"),
        ("\nseed: 1.5", r":2: seed: invalid int value"),
        ("seed: [1, 2]", r":1: seed takes one value, not a list"),
        ("seed: 1\nseed: 2", r":2: seed is given twice"),
        ("on_bad_image: ignore", r":1: on_bad_image: invalid choice: 'ignore'"),
        ("evaluation_strategy: epoch", r":1: unknown key 'evaluation_strategy': it is eval_strategy here"),
        ("- a\n- b", r"a recipe is a list of `key: value` lines"),
        ("a: [", r"is not valid YAML"),
        ("hub_token: hf_secret", r":1: hub_token: secrets are not taken"),
        ("help: true", r"unknown key 'help'"),
        ("learning_rate:", r":1: learning_rate needs a value"),
        ("max_steps: !!int two", r":1: max_steps: invalid int value: 'two'"),
        ("seed: {a: 1}", r":1: seed"),
    ],
)  # fmt: skip
def test_bad_recipe_is_one_line_with_file_and_line(recipe, text: str, message: str) -> None:
    path = recipe(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_config([path])
    assert path in str(caught.value) and "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)


def test_folder_with_the_name_of_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load_config(["digits"]).source.endswith("digits.yaml")
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="photos is no recipe; did you mean --data photos"):
        load_config(["photos"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnin_rate", "3"], r"unknown argument --learnin_rate; did you mean --learning_rate\?"),
        (["--learning_rate", "x"], "invalid float value: 'x'"),
        (["--dataset_name", "beans"], "unknown argument --dataset_name: it is --data here"),
        (["--hub_token", "hf_secret"], "secrets are not taken"),
        (["--hub-token=hf_secret"], "secrets are not taken"),
        (["cifar"], "did you mean cifar10"),
        (["nowhere.yaml"], "no recipe nowhere.yaml"),
        (["--train_val_split", "1.5"], "train_val_split=1.5"),
        (["--learning_rate", "-1"], "learning_rate=-1.0: give a number from 0"),
        (["--learning_rate", "nan"], "learning_rate=nan"),
        (["--num_train_epochs", "inf"], "num_train_epochs=inf"),
        (["--seed", "-1"], "seed=-1"),
        (["--max_steps", "0"], "max_steps=0: give at least 1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0"),
        (["--num_train_epochs", "0"], "num_train_epochs=0"),
        (["--crop_min_scale", "0"], "crop_min_scale=0"),
    ],
)
def test_bad_command_line_is_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(argv)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_break_a_promise_are_refused_with_the_reason(recipe, key: str) -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    if key in fields:
        with pytest.raises(UserError, match=f"{key}=True is not supported: "):
            load_config([recipe(f"{key}: true\n")])
    else:
        with pytest.raises(UserError, match=key):
            load_config([recipe(f"{key}: true\n")])


def test_evaluating_and_saving_go_together() -> None:
    def strategies(*argv: str) -> tuple[str, str, float, float | None]:
        training = load_config(list(argv)).training
        return training["eval_strategy"], training["save_strategy"], training["save_steps"], training["eval_steps"]

    assert strategies() == ("epoch", "epoch", 500, None)
    assert strategies("--eval_steps", "7") == ("steps", "steps", 7, 7)
    assert strategies("--save_steps", "9") == ("steps", "steps", 9, 9)
    assert strategies("--save_steps", "9", "--eval_steps", "3") == ("steps", "steps", 9, 3)
    assert strategies("--eval_strategy", "no", "--save_strategy", "epoch")[:2] == ("no", "epoch")
    assert strategies("--save_strategy", "best")[:2] == ("epoch", "best")
    assert strategies("--save_strategy", "no")[:2] == ("epoch", "no")
    assert not load_config(["--save_strategy", "no"]).training["load_best_model_at_end"]


def test_text_in_a_recipe_is_taken_as_it_stands(recipe) -> None:
    config = load_config(
        [recipe("run_name: 0123\ndata_revision: 1.10\neval_strategy: no\nlr_scheduler_kwargs: {a: 1e-6}\n")]
    )
    assert (config.training["run_name"], config.data.data_revision) == ("0123", "1.10")
    assert config.training["eval_strategy"] == "no"
    assert config.training["lr_scheduler_kwargs"] == '{"a": 1e-06}'


def test_resolved_settings_are_a_recipe_for_the_same_run(tmp_path: Path) -> None:
    config = load_config(["cifar10", "--learning_rate", "3e-5", "--metrics", "precision", "recall"])
    write_config(config, tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]).resolved() == config.resolved()
    assert not set(yaml.safe_load((tmp_path / "config.yaml").read_text())) & set(SECRET_KEYS)


def test_training_arguments_are_keys_and_options_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = load_config([]).resolved()
    upstream = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - set(SECRET_KEYS)
    assert upstream - {"resume_from_checkpoint"} <= resolved.keys()
    for part in (DataOptions, ModelOptions, RunOptions):
        for field in dataclasses.fields(part):
            assert field.metadata["help"], field.name
    with pytest.raises(SystemExit) as left:
        load_config(["--help", "all"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    titles = ["\ndata:", "\nmodel:", "\nrun:", "\ntraining (transformers.TrainingArguments):"]
    assert [shown.index(title) for title in titles] == sorted(shown.index(title) for title in titles)
    assert "hub_token" not in shown
    hidden = {*SECRET_KEYS, *REFUSED, *WITHOUT_EFFECT, *STAGES}
    assert all(f"--{name} " in shown or f"--{name}\n" in shown for name in resolved if name not in hidden)


def test_recipe_of_the_tutorial_has_all_its_settings() -> None:
    config = load_config(["cifar10"])
    wanted = {
        "num_train_epochs": 10, "learning_rate": 2e-5, "lr_scheduler_type": "constant", "weight_decay": 0.01,
        "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "eval_strategy": "epoch",
        "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
        "save_total_limit": 10, "optim": "adamw_torch",
    }  # fmt: skip
    assert {key: config.training[key] for key in wanted} == wanted
    assert config.model.model == "google/vit-base-patch16-224-in21k" and config.data.data == "uoft-cs/cifar10"
    assert config.run.logging_dir == "logs" and config.training["report_to"] == ["tensorboard"]


def test_recipes_are_lab_records() -> None:
    assert {"digits", "cifar10"} <= shipped_recipes().keys()
    for name, path in shipped_recipes().items():
        head = path.read_text().split("\n\n")[0]
        assert head.startswith("#") and "vit_dist" in head, f"{name}: headed by its command"
        assert "Hardware:" in head and "Result:" in head, f"{name}: hardware and result, or that it was not measured"
