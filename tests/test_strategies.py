"""One training problem under every strategy: the same curve, exact metrics, exact resumption, one export.

DDP, ZeRO-2 and FSDP2 are started by the real launcher once for all tests. Everything else is forked (see lab.py),
with what the launcher tells the processes of a strategy. A run is cut by hand where a kill right after a checkpoint
would leave it; real kills are in faults/ and at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import CONFIGS, command, losses, results, rows, run, write_photos
from lab import Job, fork, launch_environment, still_running
from lab import Lab as Forks
from observed_train import observe
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from vit_dist.checkpoint.load import layout, resume_incompatibility
from vit_dist.checkpoint.store import checkpoints, integrity_error
from vit_dist.config import load_config
from vit_dist.cost import memory
from vit_dist.data.pipeline import build_data
from vit_dist.metrics import ClassificationMetrics
from vit_dist.metrics.outcomes import sample_metrics
from vit_dist.strategy import set_fsdp_wrap_policy

TESTS = Path(__file__).parent
STEPS = 20
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
STRATEGIES = ("ddp", *ZERO, "fsdp2", "fsdp2_full")
LAYOUTS = {"ddp": "plain", "fsdp2": "fsdp_sharded", "fsdp2_full": "fsdp_full", "hsdp": "fsdp_sharded"}
ARGS = [
    "--max_steps", STEPS, "--learning_rate", "3e-3", "--logging_steps", 1, "--eval_steps", 10, "--save_total_limit", 9,
    "--metric_for_best_model", "loss", "--dataloader_num_workers", 0, "--report_to", "none",
]  # fmt: skip
pytestmark = pytest.mark.launch  # of most of its runs
LAUNCHED = ("ddp", "zero2", "fsdp2")


def processes(strategy: str) -> int:
    return {"single": 1, "hsdp": 4}.get(strategy, 2)


@dataclass
class Lab:
    """Starts runs of the one problem, and remembers them."""

    root: Path
    args: list[Any]

    def launch(self, name: str, strategy: str, *args: Any, expect: int = 0, **env: str) -> Any:
        """`strategy` in the folder `name`, by the real launcher."""
        done = run(
            *self.args, "--output_dir", self.root / name, *args, launcher="accelerate", processes=processes(strategy),
            config=CONFIGS / f"{strategy}.yaml", expect=expect, **env,
        )  # fmt: skip
        (self.root / f"{name}.log").write_text(done.stdout + done.stderr)
        return done

    def fork(self, name: str, strategy: str, *args: Any, **options: Any) -> Job:
        """The same without the launcher."""
        asked = self.root / "fsdp2_full.yaml" if strategy == "fsdp2_full" else strategy
        return Forks(self.root, self.args).run(
            self.root / name, *args, processes=processes(strategy), strategy=asked, **options
        )

    def whole(self, strategy: str, accumulation: int = 1) -> Path:
        """A run from start to end, which is observed (observed_train.py)."""
        folder = self.root / f"{strategy}_{accumulation}"
        if folder.exists():
            return folder
        split = ["--per_device_train_batch_size", 8 // processes(strategy) // accumulation, "--global_batch_size", 8]
        seen = folder.with_suffix(".seen")
        seen.mkdir()
        if accumulation > 1 or strategy not in LAUNCHED:
            self.fork(folder.name, strategy, *split, patch=partial(observe, seen))
            return folder
        self.launch(folder.name, strategy, *split, module="observed_train", OBSERVED=str(seen), PYTHONPATH=str(TESTS))
        return folder

    def cut(self, source: Path, name: str) -> Path:
        """A copy of a run as it was right after its first checkpoint."""
        folder = self.root / name
        shutil.copytree(source, folder)
        shutil.rmtree(folder / f"checkpoint-{STEPS}")
        shutil.rmtree(folder / "best")
        (folder / "all_results.json").unlink()
        (folder / "status.json").write_text(json.dumps({"state": "running"}))
        return folder

    def resumed(self, source: Path, strategy: str, name: str, accumulation: int) -> Path:
        folder = self.cut(source, name)
        per_device = 8 // processes(strategy) // accumulation
        job = self.fork(name, strategy, "--per_device_train_batch_size", per_device, "--global_batch_size", 8)
        assert "from checkpoint-10" in job.output
        return folder


@pytest.fixture(scope="module")
def lab(photos: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("strategies")
    config = (CONFIGS / "fsdp2.yaml").read_text()
    (root / "fsdp2_full.yaml").write_text(config.replace("SHARDED_STATE_DICT", "FULL_STATE_DICT"))
    return Lab(root, ["--data", photos, "--model", checkpoint, *ARGS])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best" / "model.safetensors")


def difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES[:-1])
def test_strategy_has_the_curve_of_one_process(
    lab: Lab, strategy: str, accumulation: int, record_property: Callable[[str, object], None]
) -> None:
    one, other = losses(lab.whole("single")), losses(lab.whole(strategy, accumulation))
    assert list(one) == list(other) == list(range(1, STEPS + 1))
    assert max(one.values()) - min(one.values()) > 0.5, "a curve that does not move proves nothing"
    record_property("largest difference", max(abs(one[step] - other[step]) for step in one))
    assert other == pytest.approx(one, abs=5e-4)
    assert difference(lab.whole("single"), lab.whole(strategy, accumulation)) < 5e-4


def test_hsdp_has_the_curve_of_one_process(lab: Lab) -> None:
    """Four processes: two replicas of two shards."""
    assert losses(lab.whole("hsdp")) == pytest.approx(losses(lab.whole("single")), abs=5e-4)


@pytest.mark.parametrize("strategy", (*STRATEGIES[:-1], "hsdp"))
def test_run_record_names_the_strategy(lab: Lab, strategy: str) -> None:
    record = json.loads((lab.whole(strategy) / "run.json").read_text())
    assert (record["strategy"], record["global_batch_size"]) == (strategy, 8)
    assert layout(lab.whole(strategy) / "checkpoint-10") == LAYOUTS.get(strategy, "zero")


@pytest.mark.parametrize("strategy", (*STRATEGIES[:-1], "hsdp"))
def test_export_of_a_strategy_has_the_same_metrics_in_one_process(lab: Lab, strategy: str) -> None:
    folder = lab.whole(strategy)
    model = AutoModelForImageClassification.from_pretrained(folder / "best").eval()
    config = load_config(list(map(str, lab.args)))
    data = build_data(config.data, config.model, config.data_seed, lambda what: lambda done, total: None)
    for name, dataset in (("eval", data.validation), ("test", data.test)):
        assert dataset is not None
        batch = dataset.__getitems__(list(range(len(dataset))))
        with torch.no_grad():
            logits = model(batch["pixel_values"]).logits.numpy()
        labels = batch["labels"].numpy()
        own = ClassificationMetrics(data.classes)(sample_metrics(logits, labels))
        for key, value in own.items():
            assert results(folder)[f"{name}_{key}"] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_strategy_resumed_ends_with_the_same_bits(lab: Lab, strategy: str) -> None:
    accumulation = 1 if strategy == "fsdp2_full" else 2
    whole = lab.whole(strategy, accumulation)
    again = lab.resumed(whole, strategy, f"{strategy}_again", accumulation)
    assert (whole / "best/model.safetensors").read_bytes() == (again / "best/model.safetensors").read_bytes()
    assert results(again)["best_step"] == STEPS, "else the weights are those of the checkpoint itself"
    timing = ("runtime", "per_second")
    kept = [[{k: v for k, v in row.items() if not k.endswith(timing)} for row in rows(f)] for f in (whole, again)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("wrote", "resumes"),
    [("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "single"), ("fsdp2_full", "single"),
     ("fsdp2", "fsdp2_full")],
)  # fmt: skip
def test_checkpoint_resumed_by_another_strategy_ends_with_the_same_weights(lab: Lab, wrote: str, resumes: str) -> None:
    folder = lab.resumed(lab.whole(wrote), resumes, f"{wrote}_to_{resumes}", 1)
    assert results(folder)["best_step"] == STEPS
    assert difference(lab.whole("single"), folder) < 5e-4


@pytest.mark.parametrize(("wrote", "resumes"), [("zero1", "zero2"), ("zero3", "zero3_offload")])
def test_zero_checkpoint_resumed_by_its_neighbour_ends_with_the_same_weights(
    lab: Lab, wrote: str, resumes: str
) -> None:
    folder = lab.resumed(lab.whole(wrote), resumes, f"{wrote}_to_{resumes}", 1)
    assert results(folder)["best_step"] == STEPS
    assert difference(lab.whole("single"), folder) < 5e-4


def test_zero_checkpoint_resumed_by_ddp_is_refused_and_kept(lab: Lab) -> None:
    folder = lab.cut(lab.whole("zero2"), "zero2_not_ddp")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    refused = lab.fork(folder.name, "ddp", "--per_device_train_batch_size", 4, expect=None)
    assert 2 in refused.codes.values() and 0 not in refused.codes.values()
    errors = [line for line in refused.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "checkpoint-10 cannot be resumed" in errors[0], refused.output
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_checkpoint_that_cannot_be_resumed_is_refused_with_the_fix(lab: Lab) -> None:
    zero2, zero3, ddp, fsdp2 = (lab.whole(name) / "checkpoint-10" for name in ("zero2", "zero3", "ddp", "fsdp2"))
    assert "written by zero1 or zero2 on 2 processes, and ddp" in (resume_incompatibility(zero2, "ddp", 2) or "")
    assert "use zero3 or zero3_offload again" in (resume_incompatibility(zero3, "zero2", 2) or "")
    assert "not written by DeepSpeed" in (resume_incompatibility(ddp, "zero2", 2) or "")
    assert "cannot spread it over 4; start 2 processes" in (resume_incompatibility(zero2, "zero1", 4) or "")
    for checkpoint, strategy, world_size in (
        (zero2, "zero1", 2), (zero3, "zero3_offload", 2), (ddp, "hsdp", 8), (fsdp2, "single", 1), (fsdp2, "ddp", 3),
    ):  # fmt: skip
        assert resume_incompatibility(checkpoint, strategy, world_size) is None


@pytest.mark.parametrize(
    ("strategy", "file"),
    (
        ("zero2", "global_step10/zero_pp_rank_1_mp_rank_00_optim_states.pt"), ("zero2", "latest"),
        ("zero2", "global_step10/mp_rank_00_model_states.pt"),
        ("zero3", "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero3", "global_step10/zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("fsdp2", "optimizer_0/.metadata"), ("fsdp2", "pytorch_model_fsdp_0/__1_0.distcp"),
        ("fsdp2_full", "optimizer.bin"), ("ddp", "model.safetensors"),
    ),
)  # fmt: skip
def test_checkpoint_with_a_missing_or_truncated_share_is_damaged(
    lab: Lab, tmp_path: Path, strategy: str, file: str
) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    shutil.copytree(lab.whole(strategy) / "checkpoint-10", checkpoint)
    assert integrity_error(checkpoint) is None
    if file != "latest":
        os.truncate(checkpoint / file, (checkpoint / file).stat().st_size // 2)
        assert integrity_error(checkpoint), "cut short"
    (checkpoint / file).unlink()
    assert integrity_error(checkpoint), "missing"


def test_deepspeed_file_that_contradicts_the_settings_is_refused(lab: Lab) -> None:
    own = lab.root / "own.yaml"
    own.write_text((CONFIGS / "zero2.yaml").read_text().replace("gradient_clipping: auto", "gradient_clipping: 0.01"))
    refused = fork(
        *lab.args, "--output_dir", lab.root / "disagrees", "--per_device_train_batch_size", 4, processes=2, expect=2,
        **launch_environment(own),
    )  # fmt: skip
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "gradient_clipping=0.01 vs hf max_grad_norm=1.0" in errors[0], refused.stderr
    assert not list((lab.root / "disagrees").glob("*"))


@pytest.mark.parametrize("strategy", (*STRATEGIES[:-1], "hsdp"))
def test_memory_estimate_equals_the_bytes_of_a_rank(lab: Lab, strategy: str) -> None:
    seen = json.loads((lab.whole(strategy).with_suffix(".seen") / "0.json").read_text())
    config = ViTConfig.from_pretrained(lab.whole(strategy) / "best")
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    set_fsdp_wrap_policy(model)
    shards = 1 if strategy == "ddp" else 2
    expected = memory.state(
        strategy, memory.Tensors.of(model), shards=shards, precision="fp32", optim="adamw_torch_fused"
    )
    optimizer = expected.optimizer
    if strategy == "zero3_offload":  # on the host with the gradients' shares, which are written there
        optimizer = expected.host - memory.FP32 * (memory.Tensors.of(model).parameters // shards)
    padding = 64 if strategy.startswith("zero") else 0  # DeepSpeed aligns its flat tensors
    assert seen["parameters"] == expected.parameters
    assert abs(seen["gradients"] - expected.gradients) <= padding
    assert abs(seen["optimizer"] - optimizer) <= padding


@pytest.mark.parametrize("strategy", ("ddp", "zero2", "zero3", "fsdp2"))
def test_bf16_with_activation_checkpointing_keeps_the_best_model(lab: Lab, strategy: str) -> None:
    name = f"{strategy}_bf16"
    lab.fork(
        name, strategy, "--bf16", "--activation_checkpointing", "--per_device_train_batch_size", 4,
        "--greater_is_better", "true",  # the highest loss, which is that of step 10
    )  # fmt: skip
    one, other = losses(lab.whole("single")), losses(lab.root / name)
    assert other == pytest.approx(one, abs=0.1)
    evaluated = {row["step"]: row["eval_loss"] for row in rows(lab.root / name) if "eval_loss" in row}
    assert results(lab.root / name)["best_step"] == 10 and evaluated[10] != evaluated[20]
    assert results(lab.root / name)["eval_loss"] == pytest.approx(evaluated[10], abs=1e-7)
    kinds = {tensor.dtype for tensor in weights(lab.root / name).values()}
    assert kinds == {torch.bfloat16 if strategy.startswith("zero") else torch.float32}


@pytest.mark.draw(1)
@pytest.mark.parametrize("strategy", ("ddp", "zero2", "fsdp2"))
def test_killed_rank_under_the_launcher_ends_the_others_within_seconds(lab: Lab, strategy: str) -> None:
    folder = lab.root / f"{strategy}_killed"
    launched = subprocess.Popen(
        command("accelerate", 2, *lab.args, "--output_dir", folder, "--max_steps", 100_000, "--eval_strategy", "no",
                config=CONFIGS / f"{strategy}.yaml"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not losses(folder) and time.monotonic() < deadline and launched.poll() is None:
        time.sleep(0.05)
    family = psutil.Process(launched.pid).children(recursive=True)
    workers = [one for one in family if one.environ().get("RANK") == "1" and "vit_dist.train" in one.cmdline()]
    killed = time.monotonic()
    workers[0].kill()
    output = launched.communicate(timeout=60)[0]
    assert time.monotonic() - killed < 10, output
    assert launched.returncode != 0
    assert not still_running(family, 1), "a process was left behind"


@pytest.mark.parametrize("strategy", ("zero3", "fsdp2"))
def test_rank_killed_in_a_save_of_shares_leaves_the_checkpoint_before(lab: Lab, strategy: str) -> None:
    """Rank 1 has written its share of step 20 and dies: step 20 was never saved."""
    folder = lab.root / f"{strategy}_half_saved"
    args = ["--per_device_train_batch_size", 4, "--global_batch_size", 8]
    lab.fork(folder.name, strategy, *args, fault="after_write:1:2:kill9", expect=None)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-10"] and integrity_error(
        folder / "checkpoint-10"
    ) is None
    assert "from checkpoint-10" in lab.fork(folder.name, strategy, *args).output
    whole = lab.whole(strategy)
    assert (whole / "best/model.safetensors").read_bytes() == (folder / "best/model.safetensors").read_bytes()
    assert losses(folder) == losses(whole)


@pytest.mark.parametrize("strategy", ("zero2", "fsdp2"))
def test_exception_on_one_rank_is_the_only_one_shown(lab: Lab, strategy: str, tmp_path: Path, checkpoint: Path) -> None:
    data = write_photos(tmp_path / "photos", {"train": 37, "validation": 5})
    broken = sorted((data / "train" / "cat").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    failed = fork(
        "--data", data, "--model", checkpoint, *ARGS, "--verify_images", "false", "--output_dir", tmp_path / "run",
        "--per_device_train_batch_size", 4, processes=2, expect=1, **launch_environment(strategy),
    )  # fmt: skip
    shown = [line for line in failed.stderr.splitlines() if line.startswith("rank ") and line.endswith(" failed")]
    assert len(shown) == 1 and f"cat/{broken.name}" in failed.stderr
