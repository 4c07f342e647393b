"""Sweeps: what a file means, what each member trains with, and what is said of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import yaml
from conftest import results
from lab import fork

from vit_dist import cli
from vit_dist.commands import sweep
from vit_dist.errors import UserError
from vit_dist.launch.gpus import Gpus

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a sweep file; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        path = tmp_path / "try.yaml"
        path.write_text(text)
        return path

    return write


def test_sweep_has_all_combinations_then_the_listed_runs(write: Write) -> None:
    found = sweep.read(write(
        "grid:\n  learning_rate: [1e-4, 3.0e-4]\n  seed: [1, 2]\n"
        "runs:\n  - {seed: 7}\n  - metrics: [a, b]\n    bf16: yes\n"
    ))  # fmt: skip
    assert [found.member_name(number) for number in range(len(found.members))] == [
        "learning_rate=1e-4,seed=1", "learning_rate=1e-4,seed=2",
        "learning_rate=3.0e-4,seed=1", "learning_rate=3.0e-4,seed=2",
        "seed=7", "metrics=a+b,bf16=yes",
    ]  # fmt: skip
    assert found.arguments(2)[:2] == ["--learning_rate=3.0e-4", "--seed=1"], "the very text of the file"
    assert found.arguments(5)[:4] == ["--metrics", "a", "b", "--bf16=yes"]


def test_sweep_members_have_a_folder_and_a_name_each(write: Write) -> None:
    found = sweep.read(write("recipe: digits\nname: mine\ngrid: {model: [tiny, google/vit-base, ./my model]}\n"))
    folders = [config.output_dir for config in sweep.check(found)]
    assert folders == [Path("runs/mine") / f"model={name}" for name in ("tiny", "google-vit-base", ".-my-model")]
    assert [config.training["run_name"] for config in sweep.check(found)] == [folder.name for folder in folders]
    elsewhere = sweep.check(found, ["--seed", "3", "--output_dir", "/scratch/a b", "--run_name", "x"])
    assert elsewhere[1].output_dir == Path("/scratch/a b/model=google-vit-base")
    assert {config.training["run_name"] for config in elsewhere} == {"x"}


def test_flags_are_for_all_members_and_win(write: Write) -> None:
    found = sweep.read(write("recipe: digits\ngrid: {learning_rate: [1e-4, 3e-4], seed: [1]}\n"))
    configs = sweep.check(found, ["--seed", "5", "--num_train_epochs=2"])
    assert [(c.training["learning_rate"], c.training["seed"], c.training["num_train_epochs"]) for c in configs] == [
        (1e-4, 5, 2), (3e-4, 5, 2),
    ]  # fmt: skip


def test_sweep_member_arguments_are_printed_without_torch(write: Write) -> None:
    path = write("recipe: my recipe.yaml\nname: a name\ngrid: {seed: [1, 2]}\n")
    code = (
        "import sys; from vit_dist.commands.sweep import main; main(); assert not {'torch', 'numpy'} & set(sys.modules)"
    )

    def printed(*words: str) -> str:
        command = [sys.executable, "-c", code, str(path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    words = printed("--member", "1", "--", "--run_name", "it's 2 words; $HOME *", "--logging_dir", "")
    assert words.split("\0") == [
        "my recipe.yaml", "--seed=2", "--output_dir=runs/a name/seed=2", "--run_name=seed=2", "--run_name",
        "it's 2 words; $HOME *", "--logging_dir", "", "",
    ]  # fmt: skip
    assert (printed("--count"), printed("--name")) == ("2\n", "a name\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", r":1: unknown key 'seed': a sweep has recipe, name, grid, runs"),
        ("grid:\n  seed: 1", r":2: seed takes a list of values"),
        ("grid:\n  seed: []", r":2: seed takes a list of values"),
        ("grid:\n  seed: [1, null]", r":2: seed needs a value"),
        ("grid:\n  seed: [1]\n  seed: [2]", r":3: seed is given twice"),
        ("grid: [1]", r":1: grid is a list of"),
        ("runs: {seed: 1}", r":1: runs is a list of members"),
        ("runs:\n- seed: 1\n- 3", r":3: a member of runs has settings"),
        ("runs:\n- seed: 1\n- seed: 1", r"members 0 and 1 would be the same run, seed=1"),
        ("grid: {model: [a/b, a b]}", r"members 0 and 1 would be the same run, model=a-b"),
        ("grid:\n  output_dir: [a, b]", r":2: output_dir is made from"),
        (f"grid: {{model: [{'m' * 200}]}}", r"member 0 has too many settings"),
        ("recipe: [a]\ngrid: {seed: [1]}", r":1: recipe takes one word"),
        ("name: a/b\ngrid: {seed: [1]}", r":1: name 'a/b' cannot be a folder's name"),
        ("recipe: digits", r"has no members"),
        ("", r"has no members"),
        ("- 1", r"a sweep is a list of"),
        ("a: [", r"is not valid YAML"),
    ],
)
def test_sweep_file_that_is_wrong_is_one_line(write: Write, text: str, message: str) -> None:
    path = write(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        sweep.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_sweep_with_wrong_settings_names_all_of_them(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("recipe: digits\ngrid:\n  learning_rat: [1]\n  seed: [1, x]\n  hub_token: [hf_secret]\n")
    assert sweep.main([str(path)]) == 2
    told = capsys.readouterr()
    assert f"{path}:3: unknown key 'learning_rat'; did you mean learning_rate?; " in told.err
    assert "; line 4: seed: invalid int value: 'x'; line 5: hub_token: secrets are not taken" in told.err
    assert (told.out, told.err.count("\n"), "hf_secret" in told.err) == ("", 1, False)
    path = write("recipe: digits\ngrid: {learning_rate: [1, -1], adam_beta1: [0.9, 2]}\n")
    assert sweep.main([str(path)]) == 2
    told = capsys.readouterr()
    assert "members 1, 3: adam_beta1=2.0: give a number" in told.err and "members 2, 3: learning_rate=-1.0" in told.err
    assert sweep.main([str(path), "--sed", "1"]) == 2
    assert capsys.readouterr().err == "error: unknown argument --sed; did you mean --seed?\n", "once, not for each"
    assert list(path.parent.iterdir()) == [path], "nothing was written"


def test_sweep_member_or_file_that_is_missing_is_refused(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("grid: {seed: [1, 2]}\n")
    for number in ("2", "-1"):
        assert sweep.main([str(path), f"--member={number}"]) == 2
        assert capsys.readouterr().err == f"error: {path} has no member {number}; its members are 0 to 1\n"
    assert sweep.main(["nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no sweep file nowhere.yaml")


def test_sweep_table_shows_state_and_results_of_members(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("recipe: digits\ngrid: {seed: [1, 2]}\nruns: [{learning_rate: 1e-2}]\n")
    for folder, state, found in (("seed=1", "complete", {"eval_accuracy": 0.98, "test_accuracy": 0.9666}),
                                 ("learning_rate=1e-2", "preempted", {})):  # fmt: skip
        member = Path("runs/try") / folder
        member.mkdir(parents=True)
        (member / "status.json").write_text(json.dumps({"state": state}))
        (member / "all_results.json").write_text(json.dumps(found))
    assert sweep.main([str(path), "--num_train_epochs", "2"]) == 0
    first, *rows, here, batch = capsys.readouterr().out.splitlines()
    assert first == "sweep try: 3 members, folders in runs/try"
    assert [row.split() for row in rows] == [
        ["member", "seed", "learning_rate", "state", "validation", "test"],
        ["0", "1", "-", "complete", "0.9800", "0.9666"],
        ["1", "2", "-", "not", "started", "-", "-"],
        ["2", "-", "1e-2", "preempted", "-", "-"],
    ]
    assert here.endswith(f"vit-dist sweep {path} --num_train_epochs 2 --run NUMBER")
    assert batch.endswith(f"vit-dist slurm sweep {path} --num_train_epochs 2")


def test_sweep_member_trains_on_all_gpus_in_the_sweeps_group(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("recipe: digits\ngrid: {seed: [1, 2]}\n")
    started: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        started.append([*command, os.environ["WANDB_RUN_GROUP"]])
        raise SystemExit(0)  # it does not come back

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(cli, "visible_gpus", lambda: Gpus(2))
    with mock.patch.dict(os.environ):  # not replaced: modules keep a reference to it
        for group in ("try", "mine"):
            with pytest.raises(SystemExit):
                cli.main(["sweep", str(path), "--run", "1", "--bf16"])
            assert started[-1][-6:] == [
                "digits", "--seed=2", "--output_dir=runs/try/seed=2", "--run_name=seed=2", "--bf16", group,
            ]  # fmt: skip
            os.environ["WANDB_RUN_GROUP"] = "mine"


def test_sweep_member_trains_with_its_settings_and_is_listed(write: Write) -> None:
    path = write("recipe: digits\ngrid: {learning_rate: [1e-4, 3e-3]}\n")
    few = ("--max_train_samples", 64, "--max_eval_samples", 32, "--max_predict_samples", 32, "--max_steps", 1)
    fork("sweep", path, "--run", 1, *few, "--report_to", "none", module="vit_dist.cli")
    folder = Path("runs/try/learning_rate=3e-3")
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 3e-3
    shown = fork("sweep", path, *map(str, few), module="vit_dist.cli").stdout
    assert f"complete     {results(folder)['eval_accuracy']:.4f}" in shown


def test_shipped_sweeps_are_lab_records() -> None:
    assert [path.stem for path in SHIPPED] == ["lr"]
    for path in SHIPPED:
        head = path.read_text().split("\n\n")[0]
        assert head.startswith("#") and f"configs/sweeps/{path.name}" in head, "headed by its command"
        assert "Hardware:" in head and "Result:" in head
        assert f"--array=0-{len(sweep.check(sweep.read(path))) - 1}%" in head
