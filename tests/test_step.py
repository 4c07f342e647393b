"""What a step does besides its mathematics, counted and not timed: waits of the host, copies, operators."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from counted import count_steps
from lab import fork

BATCH, SIDE, DIGIT = 8, 32, 8
HOST = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")  # they hand a value to the host
RUNS: dict[str, tuple[int, list[Any]]] = {  # processes, flags
    "resident": (1, ["--image_source", "resident"]),
    "stream": (1, ["--image_source", "stream", "--dataloader_num_workers", 1]),
    "two": (2, ["--image_source", "stream", "--dataloader_num_workers", 1]),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("counted")
    found = {}
    for name, (processes, flags) in RUNS.items():
        fork(
            "digits", "--model", "tiny", *flags, "--max_steps", 10, "--logging_steps", 10, "--eval_strategy", "no",
            "--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none",
            "--per_device_train_batch_size", BATCH, "--max_predict_samples", 20, "--output_dir", root / name / "run",
            processes=processes, patch=partial(count_steps, root / name),
        )  # fmt: skip
        found[name] = json.loads((root / name / "0.json").read_text())
    return found


@pytest.mark.parametrize("name", RUNS)
def test_steps_run_the_same_operators(counted: dict[str, dict[str, Any]], name: str) -> None:
    steps = counted[name]["steps"]
    assert len(steps) == 4 and all(step == steps[0] for step in steps)


@pytest.mark.parametrize("name", ["resident", "stream"])
def test_host_between_two_log_points_reads_nothing_from_the_device(
    counted: dict[str, dict[str, Any]], name: str
) -> None:
    operators = counted[name]["steps"][0]["operators"]
    assert operators["aten::mm"] and not {key: operators[key] for key in HOST if key in operators}


def test_step_on_two_processes_reduces_gradients_in_one_bucket(counted: dict[str, dict[str, Any]]) -> None:
    """DDP with a static graph looks each parameter up in a list that is on the host (c10d/reducer.cpp)."""
    operators = counted["two"]["steps"][0]["operators"]
    assert operators["aten::_local_scalar_dense"] == counted["two"]["parameters"] + 1, "and the vote on stopping"
    assert operators["c10d::allreduce_"] == 2, "one bucket of gradients, and the vote"


@pytest.mark.parametrize("name", RUNS)
def test_optimizer_and_clipping_run_fused_operators(counted: dict[str, dict[str, Any]], name: str) -> None:
    operators = counted[name]["steps"][0]["operators"]
    fused = {key: count for key, count in operators.items() if "adam" in key or "_foreach_" in key}
    assert fused == {
        "aten::_fused_adamw_": 2, "aten::_foreach_add_": 2,  # parameters with weight decay and without; their steps
        "aten::_foreach_norm": 1, "aten::_foreach_mul_": 1,
    }  # fmt: skip
    assert not [key for key in operators if key.startswith(("aten::addcmul", "aten::addcdiv", "aten::zero"))]


def test_images_as_bytes_are_converted_once(counted: dict[str, dict[str, Any]]) -> None:
    copied = {name: counted[name]["steps"][0]["copied"] for name in ("resident", "stream")}
    boxes, index = BATCH * 4 * 4, BATCH * 8
    assert copied == {"stream": 4 * BATCH * 3 * SIDE**2, "resident": 4 * BATCH * 3 * DIGIT**2 + boxes + index}
