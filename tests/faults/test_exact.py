"""Interrupted or not, on so many processes or others: the same images in each step, and the same bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Reference, losses, rows
from lab import ARGS, Lab, committed, fingerprint, status

from vit_dist import stop


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


# name: (processes, dropout, settings). Each is trained undisturbed, and once more with three interruptions: SIGTERM
# within an epoch, at the end of one, and SIGKILL; the latter with other numbers of data loading processes.
MATRIX = {
    "plain": (1, False, ["--random_resized_crop", "false", "--horizontal_flip", "false"]),
    "augmented": (2, False, []),
    "dropout": (2, True, ["--random_resized_crop", "false"]),
    "accumulated": (2, True, ["--per_device_train_batch_size", 2, "--lr_scheduler_type", "cosine"]),
    "bf16": (1, True, ["--bf16", "--per_device_train_batch_size", 4]),
    "constant rate, sgd, many epochs": (1, True, ["--lr_scheduler_type", "constant", "--optim", "sgd"]),
    "plateau": (2, True, ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"patience": 0}']),
    "epochs": (2, True, ["--eval_strategy", "epoch", "--save_strategy", "epoch"]),
    "rows by epoch, saves by step": (
        1,
        True,
        [
            "--eval_strategy",
            "epoch",
            "--logging_strategy",
            "epoch",
            "--save_strategy",
            "steps",
            "--load_best_model_at_end",
            "false",
        ],
    ),
    "bytes, compiled": (
        1,
        True,
        ["--image_source", "stream", "--torch_compile_backend", "aot_eager", "--bf16", "--bf16_residual"],
    ),
    "resident": (
        2,
        True,
        [
            "--data",
            "digits",
            "--max_train_samples",
            37,
            "--max_eval_samples",
            13,
            "--max_predict_samples",
            11,
            "--image_source",
            "resident",
        ],
    ),
    "early stopping": (2, True, ["--early_stopping_patience", 3, "--early_stopping_threshold", 10]),
}


@pytest.mark.draw(4)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "compiled" in name else []) for name in MATRIX]
)
def test_run_interrupted_three_times_ends_with_the_same_bits(
    root: Path, reference: Reference, photos: Path, checkpoint: Path, dropout_checkpoint: Path, name: str
) -> None:
    processes, dropout, more = MATRIX[name]
    model = dropout_checkpoint if dropout else checkpoint
    lab = Lab(root, ["--data", photos, "--model", model, *ARGS, *more])
    whole, again = reference(lab.args, processes), root / f"{name}_again"
    for fault, workers, expect in (
        ("before_optim:0:7:term", 2, stop.EXIT_CODE),  # step 7, within the second epoch
        ("before_optim:0:3:term", 0, stop.EXIT_CODE),  # step 10, the end of it
        ("before_optim:0:3:kill9", 2, None),  # step 13, back to 10
    ):
        lab.run(again, "--dataloader_num_workers", workers, processes=processes, fault=fault, expect=expect)
    assert committed(again)[-1] == 10
    lab.run(again, "--dataloader_num_workers", 1, processes=processes)
    assert fingerprint(whole) == fingerprint(again)
    if name == "early stopping":
        last = max(row["step"] for row in rows(whole))
        assert last < 30 and json.loads((whole / "all_results.json").read_text())["train_steps"] == last


# The same under the strategies that share the state out: dropout, augmentation, accumulation, bf16.
SHARDED = {
    "zero2": ["--per_device_train_batch_size", 2],
    "zero3": ["--bf16"],
    "fsdp2": ["--per_device_train_batch_size", 2],
    "zero1": [],
    "zero3 fp32": [],
    "fsdp2 bf16": ["--bf16"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in list(SHARDED)[3:] else []) for name in SHARDED]
)
def test_run_with_sharded_state_interrupted_twice_ends_with_the_same_bits(
    root: Path, photos: Path, dropout_checkpoint: Path, name: str
) -> None:
    """Stopped within an epoch, and killed between the writing of a save and its commit."""
    strategy = name.split()[0]
    lab = Lab(root, ["--data", photos, "--model", dropout_checkpoint, *ARGS, *SHARDED[name]])
    whole, again = root / f"{name}_whole", root / f"{name}_again"
    lab.run(whole, processes=2, strategy=strategy)
    faults = (
        ("before_optim:0:7:term" if strategy == "fsdp2" else "in_step_end:0:6:term", 2, stop.EXIT_CODE),
        ("after_write:1:2:kill9", 0, None),  # at step 15, written and not committed: back to 10
    )
    for fault, workers, expect in faults:
        lab.run(again, "--dataloader_num_workers", workers, processes=2, strategy=strategy, fault=fault, expect=expect)
    assert committed(again)[-1] == 10
    lab.run(again, processes=2, strategy=strategy)
    assert fingerprint(whole) == fingerprint(again)


def test_run_stopped_early_and_killed_trains_no_further_step(
    root: Path, reference: Reference, photos: Path, dropout_checkpoint: Path
) -> None:
    """The last checkpoint is that of the decision to stop: no step is trained after it."""
    lab = Lab(root, ["--data", photos, "--model", dropout_checkpoint, *ARGS, *MATRIX["early stopping"][2]])
    whole = fingerprint(reference(lab.args, 2))
    last = whole["results"]["train_steps"]
    folder = root / "early_killed"
    lab.run(folder, processes=2, fault=f"after_commit:0:{last // 5}:kill9", expect=None)
    assert committed(folder)[-1] == last
    lab.run(folder, processes=2)
    assert fingerprint(folder) == whole


def test_best_model_where_no_save_was_due_is_kept_after_a_kill(
    root: Path, photos: Path, dropout_checkpoint: Path
) -> None:
    """Evaluations every 2 steps, saves every 4, and step 6 is the best; 10, the end of an epoch, is the next best."""
    by_step = {2: 5.0, 4: 4.0, 6: 1.0, 8: 3.0, 10: 2.0, 12: 6.0, 14: 7.0, 16: 8.0}
    flags = ["--max_steps", 16, "--eval_steps", 2, "--save_steps", 4, "--save_total_limit", 1]
    lab = Lab(root, ["--data", photos, "--model", dropout_checkpoint, *ARGS, *flags])
    whole, again, fake = root / "unsaved_best_whole", root / "unsaved_best", json.dumps(by_step)
    lab.run(whole, FAKE_LOSS=fake)
    assert fingerprint(whole)["results"]["best_step"] == 6
    lab.run(again, fault="after_commit:0:3:kill9", expect=None, FAKE_LOSS=fake)
    assert committed(again)[-1] == 6, "2 and 4 were the best before"
    lab.run(again, fault="before_optim:0:5:term", expect=stop.EXIT_CODE, FAKE_LOSS=fake)
    assert committed(again) == [6, 11]
    lab.run(again, FAKE_LOSS=fake)
    assert fingerprint(whole) == fingerprint(again)


def test_run_without_best_model_interrupted_ends_with_the_same_bits(
    root: Path, photos: Path, dropout_checkpoint: Path
) -> None:
    flags = ["--load_best_model_at_end", "false", "--eval_steps", 3, "--max_steps", 20]
    lab = Lab(root, ["--data", photos, "--model", dropout_checkpoint, *ARGS, *flags])
    lab.run(root / "no_best_whole")
    lab.run(root / "no_best", fault="before_optim:0:12:term", expect=stop.EXIT_CODE)
    assert committed(root / "no_best")[-1] == 12
    lab.run(root / "no_best")
    assert fingerprint(root / "no_best_whole") == fingerprint(root / "no_best")


def test_metrics_damaged_before_a_resume_come_back_from_the_checkpoint(
    root: Path, reference: Reference, photos: Path, checkpoint: Path
) -> None:
    """A damaged metrics.jsonl stops nothing; a checkpoint knows the rows up to it."""
    lab = Lab(root, ["--data", photos, "--model", checkpoint, *ARGS])
    whole, folder = reference(lab.args), root / "rows"
    lab.run(folder, fault="before_optim:0:17:term", expect=stop.EXIT_CODE)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    del lines[4:]
    lines[1:3] = ["{}\n", "[5]\n", '{"stdp": 3, "loss": 1.0}\n', "\0\0\n"]
    (folder / "metrics.jsonl").write_text("".join(lines))
    lab.run(folder)
    found = [row for line in (folder / "metrics.jsonl").read_text().splitlines() if '"step"' in line
             for row in [json.loads(line)]]  # fmt: skip
    for name, wanted in (("loss", losses(whole)), ("eval_loss", {})):
        wanted = wanted or {row["step"]: row["eval_loss"] for row in rows(whole) if "eval_loss" in row}
        assert {row["step"]: row[name] for row in found if name in row} == wanted


def test_settings_changed_on_resume_take_effect(root: Path, photos: Path, checkpoint: Path) -> None:
    """The checkpoint's rate, decay and intervals do not come back over the new settings."""
    lab = Lab(root, ["--data", photos, "--model", checkpoint, *ARGS, "--lr_scheduler_type", "constant"])
    folder = root / "changed"
    lab.run(folder, fault="before_optim:0:7:term", expect=stop.EXIT_CODE)
    changes = {"learning_rate": "1e-4", "weight_decay": "0.3", "save_steps": 4, "eval_steps": 4, "max_steps": 40}
    flags = [part for key, value in changes.items() for part in (f"--{key}", value)]
    job = lab.run(folder, *flags, "--allow_change", *changes)
    assert "learning_rate changed from 0.003 to 0.0001 at step 7, as allowed" in job.output
    rates = {row["step"]: row["learning_rate"] for row in rows(folder) if "learning_rate" in row}
    assert {rate for step, rate in rates.items() if step <= 7} == {0.003}
    assert {rate for step, rate in rates.items() if step > 7} == {0.0001} and max(rates) == 40
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [5, *range(8, 41, 4)]
    state = torch.load(folder / f"checkpoint-{committed(folder)[-1]}/optimizer.pt", weights_only=True)
    assert 0.3 in {group["weight_decay"] for group in state["param_groups"]}
    recorded = json.loads((folder / "run.json").read_text())["changes"]
    assert {change["key"] for change in recorded} == set(changes)


def test_more_steps_for_a_run_done_training_are_trained(root: Path, photos: Path, checkpoint: Path) -> None:
    lab = Lab(root, ["--data", photos, "--model", checkpoint, *ARGS])
    folder = root / "longer"
    lab.run(folder, "--max_steps", 10, fault="mid_eval:0:11:term", expect=stop.EXIT_CODE)  # the test split
    lab.run(folder, "--max_steps", 20, "--allow_change", "max_steps")
    assert json.loads((folder / "all_results.json").read_text())["train_steps"] == 20


def order(folder: Path) -> dict[int, list[int]]:
    """Images of each step in the order of the global batch: micro-batches, in each the ranks, in each its images."""
    found: dict[int, list[tuple[int, int, list[int]]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, micro, rank, index = json.loads(line)
            found.setdefault(step, []).append((micro, rank, index))
    return {step: list(itertools.chain(*(index for *_, index in sorted(parts)))) for step, parts in found.items()}


def test_number_of_processes_changed_on_resume_keeps_images_and_rates(
    root: Path, photos: Path, checkpoint: Path
) -> None:
    """1 -> 2 -> 4 -> 1: the global batch stays, its split follows; images, rates and steps are those of one process."""
    args = ["--data", photos, "--model", checkpoint, *(a for a in ARGS if a != "--global_batch_size")]
    args.remove(8)
    lab = Lab(root, [*args, "--per_device_train_batch_size", 8, "--logging_steps", 1])
    whole, folder = root / "one", root / "elastic"
    for name in ("one", "elastic"):
        (root / f"{name}.seen").mkdir()
    lab.run(whole, RECORD_IMAGES=str(root / "one.seen"))
    seen = {"RECORD_IMAGES": str(root / "elastic.seen")}
    for processes, step in ((1, 7), (2, 15), (4, 22), (1, None)):
        begun = committed(folder)[-1] if folder.exists() else 0
        fault = "" if step is None else f"before_optim:0:{step - begun}:term"
        job = lab.run(folder, processes=processes, fault=fault, expect=stop.EXIT_CODE if step else 0, **seen)
        split = f"8 = {8 // processes} per device x {processes} device"
        assert split in job.output
        if step:
            assert status(folder)["step"] == step
            if begun == 0:
                before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                refused = lab.run(folder, processes=3, expect=None)
                assert 2 in refused.codes.values(), "or 75, if the first one's end was heard before its own"
                assert "batch of 8 images cannot be shared by 3 processes; it can by 1, 2, 4, 8" in refused.output
                assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert order(root / "one.seen") == order(root / "elastic.seen")
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    rates = [{row["step"]: row["learning_rate"] for row in rows(f) if "learning_rate" in row} for f in (whole, folder)]
    assert rates[0] == rates[1] and list(rates[0]) == list(range(1, 31))


def test_resumed_run_decodes_no_image_that_it_skips(root: Path, photos: Path, checkpoint: Path) -> None:
    lab = Lab(root, ["--data", photos, "--model", checkpoint, *ARGS])
    folder, seen = root / "skip", root / "skip.decoded"
    lab.run(folder, fault="before_optim:0:7:term", expect=stop.EXIT_CODE)
    lab.run(folder, fault="before_optim:0:1:term", expect=stop.EXIT_CODE, RECORD_DECODED=str(seen))
    decoded: list[Any] = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(decoded) == 1 and len(decoded[0]) == 8, "step 8 alone, of the second epoch's five"
