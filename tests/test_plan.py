"""`vit-dist plan`: what a run would do elsewhere, without starting anything."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import results
from lab import fork
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from vit_dist.commands import plan
from vit_dist.commands.cluster_spec import is_named
from vit_dist.cost import memory, traffic
from vit_dist.strategy import set_fsdp_wrap_policy


def planned(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert plan.main(["--json", *map(str, args)]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def big_checkpoint(folder: Path) -> Path:
    """The configuration and processor of a model of about 2 billion parameters; there are no weights."""
    from transformers import ViTImageProcessorPil

    config = ViTConfig(hidden_size=4096, num_hidden_layers=10, num_attention_heads=32, intermediate_size=16384)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)
    return folder


def test_plan_arithmetic_equals_the_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path, checkpoint: Path
) -> None:
    flags = ["--data", photos, "--model", checkpoint, "--output_dir", tmp_path / "run", "--num_train_epochs", 2,
             "--global_batch_size", 8, "--per_device_train_batch_size", 4, "--learning_rate_reference_batch", 2,
             "--learning_rate_scaling", "sqrt", "--report_to", "none", "--lr_scheduler_type", "cosine"]  # fmt: skip
    found = planned(capsys, "--gpus", 2, *flags)
    assert found["batch"] == {"per_device": 4, "world_size": 2, "accumulation": 1, "note": "", "global": 8}
    assert found["steps"] == {"epoch": 5, "all": 10, "warmup": 0}
    assert found["learning_rate"]["actual"] == pytest.approx(2 * found["learning_rate"]["recipe"])
    done = fork(*flags)
    assert "8 = 4 per device x 1 device x 2 accumulation" in done.stdout
    assert f"{found['learning_rate']['actual']:g} = " in done.stdout and "sqrt, from a batch of 2" in done.stdout
    assert results(tmp_path / "run")["train_steps"] == 10
    record = tmp_path / "run" / "run.json"
    assert json.loads(record.read_text())["device"] == "cpu"
    assert planned(capsys, "--gpus", 2, *flags)["time"]["seconds"] is None, "a CPU's speed says nothing of GPUs"
    record.write_text(json.dumps({**json.loads(record.read_text()), "device": "NVIDIA H100"}))
    again = planned(capsys, "--gpus", 2, "--time_limit", "0:00:01", *flags)
    speed = results(tmp_path / "run")["train_samples_per_second"]
    assert again["time"]["images_per_second"] == pytest.approx(2 * speed)
    assert again["time"]["seconds"] == pytest.approx(80 / (2 * speed))
    assert again["time"]["limit"] == 1


def test_plan_chooses_ddp_for_a_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "digits", "--gpus", 8, "--nodes", 2, "--gpu", "h100")
    assert (found["strategy"], found["fits"]) == ("ddp", True)
    assert "nothing has to be sharded" in found["why"]


@pytest.mark.parametrize(
    ("flags", "strategy"),
    [
        (["--gpus", 8, "--gpu", "h100"], "ddp"),  # 32 GB of state on 80 GB
        (["--gpus", 8, "--gpu", "rtx4090"], "zero1"),  # 12 GB with the optimizer sharded
        (["--gpus", 8, "--gpu_memory", 16, "--gradient_accumulation_steps", 2], "zero2"),  # whole gradients between
        (["--gpus", 8, "--gpu_memory", 10], "fsdp2"),
        (["--gpus", 8, "--nodes", 2, "--gpu_memory", 10], "hsdp"),
        (["--gpus", 8, "--replicas", 2, "--strategy", "hsdp"], "hsdp"),
        (["--gpus", 1, "--gpu_memory", 40], "single"),
        (["--gpus", 1, "--gpu_memory", 30], "zero3_offload"),
    ],
)
def test_plan_shards_no_more_than_needed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path, flags: list[Any], strategy: str
) -> None:
    model = big_checkpoint(tmp_path / "big")
    found = planned(capsys, "--data", photos, "--model", model, "--per_device_train_batch_size", 1, *flags)
    assert found["strategy"] == strategy, {name: row["total"] / 1e9 for name, row in found["strategies"].items()}
    assert found["parameters"]["all"] == pytest.approx(2.0e9, rel=0.05)


def test_plan_with_a_link_has_the_time_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["digits", "--gpus", "8", "--link", "ib400"]
    row = planned(capsys, *flags)["strategies"]["ddp"]
    sent = 2 * 7 / 8 * 4 * 148_170
    assert row["traffic"] == pytest.approx(sent, rel=1e-4)
    assert row["traffic_seconds"] == pytest.approx(sent / 50e9 + 2 * 7 * traffic.HOP)
    assert plan.main(flags) == 0
    said = capsys.readouterr().out
    assert "ms: its time at 50 GB/s, none of it overlapped with computing" in said
    assert re.search(rf"\*ddp .* {1e3 * row['traffic_seconds']:.1f}  ", said)
    assert planned(capsys, "digits", "--gpus", 8)["strategies"]["ddp"]["traffic_seconds"] is None


def test_hsdp_uses_the_link_within_a_node(capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path) -> None:
    model = big_checkpoint(tmp_path / "big")
    flags = ["--data", photos, "--model", model, "--per_device_train_batch_size", 1, "--gpus", 8, "--nodes", 2,
             "--gpu", "h100", "--link", 100]  # fmt: skip
    slow, fast = (planned(capsys, *flags, *more)["strategies"] for more in ([], ["--node_link", "nvlink"]))
    times = {name: (slow[name]["traffic_seconds"], fast[name]["traffic_seconds"]) for name in ("ddp", "hsdp")}
    assert times["hsdp"][0] > times["hsdp"][1] and times["ddp"][0] == times["ddp"][1]
    across = fast["ddp"]["traffic"] * (8 / 15) / 8  # of a shard, round two nodes
    seconds = (fast["hsdp"]["traffic"] - across) / 450e9 + across / (100e9 / 8)
    assert times["hsdp"][1] == pytest.approx(seconds, rel=0.05), "eight rings share a node's network"


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("h100", "NVIDIA H100 80GB HBM3"), ("a100-40", "NVIDIA A100-SXM4-40GB"), ("a6000", "NVIDIA RTX A6000"),
        ("rtx4090", "NVIDIA GeForce RTX 4090"), ("t4", "Tesla T4"), ("l4", "NVIDIA L4"), (None, "cpu"),
    ],
)  # fmt: skip
def test_gpu_is_known_by_its_device_name(gpu: str | None, device: str) -> None:
    assert is_named(gpu, device)


def test_gpu_of_another_name_is_not_taken_for_it() -> None:
    assert not is_named("l4", "NVIDIA L40S") and not is_named("h100", "NVIDIA H200")


def test_plan_that_does_not_fit_exits_1_with_advice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path
) -> None:
    model = big_checkpoint(tmp_path / "big")
    flags = ["--data", photos, "--model", model, "--per_device_train_batch_size", 512]
    assert plan.main([*map(str, flags), "--gpus", "2", "--gpu", "t4"]) == 1
    assert "nothing fits; lower --per_device_train_batch_size" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp", "zero1"])
def test_gradients_are_whole_between_micro_batches(strategy: str) -> None:
    """None of these reduces before the last micro-batch of a step (`cost.traffic`, counted from real runs)."""
    with torch.device("meta"):
        tensors = memory.Tensors.of(ViTForImageClassification(ViTConfig(num_labels=10)))
    once, twice = (
        memory.state(strategy, tensors, shards=8, precision="bf16", optim="adamw_torch_fused", accumulation=count)
        for count in (1, 2)
    )
    assert twice.gradients == 2 * tensors.trained_parameters > once.gradients
    assert dataclasses.replace(twice, gradients=once.gradients) == once


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_bf16() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    set_fsdp_wrap_policy(model)
    fp32, bf16 = (memory.activations(model, 224, precision, False) for precision in ("fp32", "bf16"))
    light = memory.activations(model, 224, "bf16", True)
    assert fp32.of(64) == fp32.fixed + 64 * fp32.per_image
    # A block keeps some 17 widths of 197 tokens: Korthikanti et al. 2022, arXiv 2205.05198, without the attention
    # matrix, which is not kept, and without dropout.
    assert fp32.per_image == pytest.approx(12 * 197 * 768 * 17 * 4, rel=0.15)
    assert 0.5 < bf16.per_image / fp32.per_image < 0.75
    assert light.per_image < 0.25 * bf16.per_image
    assert bf16.fixed == pytest.approx(2 * 85.8e6, rel=0.05), "autocast's copies of the weights"


def test_images_that_stay_on_the_gpu_take_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path
) -> None:
    for split, count in (("train", 30), ("validation", 5), ("test", 5)):
        for index in range(count):
            path = tmp_path / split / str(index % 5) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (320, 200), (index, 0, 0)).save(path)
    flags = ["--data", tmp_path, "--model", checkpoint, "--per_device_train_batch_size", 2, "--gpu_memory", 24]
    rows = {
        source: planned(capsys, *flags, "--image_source", source)["strategies"]["single"]
        for source in ("auto", "resident", "stream", "processor")
    }
    assert [row["images"] for row in rows.values()] == [40 * 3 * 320 * 200] * 2 + [0, 0]
    assert rows["auto"]["total"] - rows["stream"]["total"] == rows["auto"]["images"]
    assert plan.main(list(map(str, flags))) == 0
    assert re.search(r"activations +images +reserve", capsys.readouterr().out)
    few = planned(capsys, *flags, "--gpu_memory", 0.02)["strategies"]["single"]
    assert few["images"] == 0, "more than a quarter of it"
    refused = [*map(str, flags), "--image_source", "resident"]
    assert plan.main([*refused, "--gpu_memory", "0.02"]) == 2
    assert "image_source=resident: 0.0 GiB of bytes, at most" in capsys.readouterr().err
    Image.new("RGB", (30, 20)).save(tmp_path / "train/0/0.png")
    assert plan.main(refused) == 2
    assert "image_source=resident: images of several sizes; use stream or cache" in capsys.readouterr().err
    (tmp_path / "train/0/0.png").write_bytes(b"no image")
    assert planned(capsys, *flags)["strategies"]["single"]["images"] == 0, "training finds it and names it"


@pytest.mark.launch
def test_plan_starts_no_processes_and_touches_no_gpu(tmp_path: Path) -> None:
    script = (
        "import sys, torch\nfrom vit_dist.commands import plan\n"
        "code = plan.main(['digits', '--gpus', '4', '--gpu', 'h100', '--output_dir', sys.argv[1]])\n"
        "assert code == 0 and not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
    )
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpu", "h1000"], "--gpu h1000: not in the list"),
        (["--gpus", 0], "--gpus 0: give at least 1"),
        (["--gpu_memory", "nan"], "--gpu_memory nan: give a number of GB"),
        (["--link", "rope"], "--link rope: give GB/s, or one of nvlink"),
        (["--gpus", 2, "--node_link", "nvlink"], "--node_link nvlink: there is one node; give --link"),
        (["--nodes", 2, "--node_link", "-1"], "--node_link -1: give GB/s, or one of nvlink"),
        (["--images_per_second", "-5"], "--images_per_second -5.0: give a number above 0"),
        (["--lr_scheduler_kwargs", '{"x": 1}'], "lr_scheduler_type="),
        (["--metric_for_best_model", "beauty"], "metric_for_best_model=beauty is not computed"),
        (["--time_limit", "1:99:99"], "--time_limit 1:99:99: give h:mm:ss"),
        (["--time_limit", "4h"], "--time_limit 4h: give h:mm:ss"),
        (["--strategy", "ddp"], "--strategy ddp is not for 1 x 1 GPUs"),
        (["--gpus", 8, "--strategy", "hsdp"], "hsdp needs --replicas 2 or more"),
        (["--gpus", 8, "--replicas", 3], "--replicas 3: 8 GPUs cannot be shared"),
        (["--strategy", "zero9"], "invalid choice: 'zero9'"),
        (["--global_batch_size", 33], "the nearest that can: 32 and 64"),
        (["--learnin_rate", 1], "did you mean --learning_rate?"),
    ],
)
def test_plan_with_wrong_flags_is_one_line(capsys: pytest.CaptureFixture[str], flags: list[Any], told: str) -> None:
    assert plan.main(["digits", *map(str, flags)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0]
