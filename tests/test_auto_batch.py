"""`--per_device_train_batch_size auto`: how many images a device takes at once is found; what a step computes stays."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import losses
from lab import ARGS, Lab, fingerprint, fork
from test_plan import big_checkpoint, planned
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import ViTConfig, ViTForImageClassification

from vit_dist import auto_batch, build, stop
from vit_dist import batch as batch_module
from vit_dist.arguments import build_arguments
from vit_dist.auto_batch import Found, find_batch, search, step_peak
from vit_dist.batch import Batch, split_batch
from vit_dist.commands import plan
from vit_dist.config import Config, load_config, write_config
from vit_dist.cost import memory
from vit_dist.errors import UserError
from vit_dist.strategy import set_fsdp_wrap_policy

GB = 10**9
AUTO = ["--per_device_train_batch_size", "auto", "--global_batch_size"]


def config(*flags: object) -> Config:
    return load_config(["digits", "--report_to", "none", *map(str, flags)])


class Device:
    """`room` bytes, of which a step takes `fixed` and more with every image; `asked` are the sizes that were tried."""

    def __init__(self, room: int, fixed: int, more: Callable[[int], float]) -> None:
        self.room, self.fixed, self.more = room, fixed, more
        self.asked: list[int] = []

    def peak(self, images: int) -> int | None:
        self.asked.append(images)
        needed = int(self.fixed + self.more(images))
        return None if needed > 1.1 * self.room else needed  # a little is between too much and out of memory

    def fits(self, images: int) -> bool:
        return self.fixed + self.more(images) <= self.room


MEMORY: dict[str, Callable[[int], float]] = {
    "affine": lambda n: 0.3 * GB * n,
    "steps": lambda n: 0.3 * GB * (n // 4 + 1),  # an allocator that rounds up: nothing is learnt from two images
    "bends up": lambda n: 0.1 * GB * n**1.2,
    "of the optimizer first": lambda n: max(3 * GB, 0.1 * GB * n),  # one and two images say nothing
}


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("share", [1, 3, 64, 97, 360, 4096])
def test_auto_batch_finds_the_largest_divisor_in_few_steps(kind: str, share: int) -> None:
    sizes = Batch(1, 2, share).sizes
    for room in (6 * GB, 20 * GB, 73 * GB):
        device = Device(room, 5 * GB, MEMORY[kind])
        found = search(sizes, device.peak, room)
        assert found.size == max((size for size in sizes if device.fits(size)), default=0)
        assert found.size in (0, *device.asked), "what is chosen was tried"
        assert len(device.asked) <= 8, device.asked
        assert ("whole share" in found.reason) == (found.size == share)


def test_auto_batch_prints_the_memory_of_the_next_size() -> None:
    device = Device(73 * GB, 5 * GB, lambda n: 0.7 * GB * n)
    assert search(Batch(1, 1, 256).sizes, device.peak, device.room) == Found(64, "128 would need 94.6 GB of 73")
    device = Device(6 * GB, 5 * GB, lambda n: 0.7 * GB * n)
    assert search([1, 2, 4], device.peak, device.room) == Found(1, "2 would need 6.4 GB of 6")
    device = Device(6 * GB, 5 * GB, lambda n: 0.9 * GB * n)
    assert search([1, 5], device.peak, device.room) == Found(1, "5 did not fit into 6 GB")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`find_batch` as rank 0 of two sees it, on simulated GPUs: (of this rank, of the other) -> its result."""

    def found(mine: Device, other: Device, batch: Batch, strategy: str, model: Any, *flags: object) -> Batch:
        def gather(value: tuple[Found, str]) -> list[tuple[Found, str]]:
            return [value, (search(batch.sizes, other.peak, other.room), "node2")]

        def peak(config: Any, args: Any, model: Any, side: int, images: int, *, optimizer: bool = True) -> int | None:
            return mine.peak(images)

        monkeypatch.setattr(auto_batch, "step_peak", peak)
        monkeypatch.setattr(auto_batch, "_room", lambda device: mine.room)
        monkeypatch.setattr(auto_batch.distributed, "gather", gather)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        args: Any = SimpleNamespace(device=torch.device("cuda", 0), world_size=2)
        return find_batch(config(*AUTO, batch.total, *flags), args, batch, strategy, model, 32)

    return found


def test_auto_batch_takes_the_smallest_of_all_ranks(gpus: Callable[..., Any]) -> None:
    large, small = (Device(room * GB, 5 * GB, lambda n: GB * n) for room in (73, 20))
    for mine, other in ((large, small), (small, large)):
        found = gpus(mine, other, Batch(32, 2, 4), "ddp", None)
        assert found == Batch(8, 2, 16, "auto: 16 would need 21 GB of 20")
        assert str(found).startswith("256 = 8 per device x 2 devices x 16 accumulation (auto: ")


@pytest.mark.parametrize(("strategy", "cure"), [("ddp", "shard the model"), ("zero2", "give a number of images")])
def test_auto_batch_where_nothing_fits_is_refused_on_every_rank(
    gpus: Callable[..., Any], small_model: Any, strategy: str, cure: str
) -> None:
    full, free = Device(4 * GB, 5 * GB, lambda n: GB * n), Device(73 * GB, 5 * GB, lambda n: GB * n)
    batch = Batch(1, 2, 8)
    for mine, other in ((full, free), (free, full)) if strategy == "ddp" else ((full, free),):
        with pytest.raises(UserError, match=rf"auto: not even one image fits on rank [01] \(.*{cure}") as error:
            gpus(mine, other, batch, strategy, small_model)
        assert "\n" not in str(error.value)


def test_sharded_state_is_computed_and_activations_are_measured(gpus: Callable[..., Any], small_model: Any) -> None:
    own = 2 * sum(parameter.nbytes for parameter in small_model.parameters())
    per_image = 100_000
    state = memory.state("fsdp2", memory.Tensors.of(small_model), shards=2, precision="fp32", optim="adamw_torch_fused")
    room = state.total + 20 * per_image
    mine = Device(room, own, lambda n: per_image * n)
    found = gpus(mine, Device(GB, 0, lambda n: n), Batch(1, 2, 64), "fsdp2", small_model)
    assert found.per_device == 16 and mine.asked == [1, 2], "on the whole model, and no more of it"


def test_another_kind_of_device_is_refused_in_one_line() -> None:
    args: Any = SimpleNamespace(device=torch.device("meta"), world_size=1)
    with pytest.raises(UserError, match="auto: not known for meta; give a number"):
        find_batch(config(*AUTO, 8), args, Batch(8, 1, 1), "single", None, 32)  # type: ignore[arg-type]


@pytest.fixture
def small_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                  patch_size=8, hidden_dropout_prob=0.1, num_labels=5)
    )  # fmt: skip
    set_fsdp_wrap_policy(model)
    return model


@pytest.mark.parametrize(
    "flags", [[], ["--bf16", "--bf16_residual"], ["--gradient_checkpointing", "--optim", "sgd"]], 
    ids=["plain", "bf16", "light"],
)  # fmt: skip
def test_auto_batch_trial_leaves_model_and_optimizer_unchanged(
    small_model: ViTForImageClassification, flags: list[str], tmp_path: Path
) -> None:
    settings = config(*AUTO, 8, "--output_dir", tmp_path / "run", *flags)
    args = build_arguments(settings, split_batch(settings, 1))
    before = {name: value.clone() for name, value in small_model.state_dict().items()}
    kinds, mode = [type(module) for module in small_model.modules()], small_model.training
    seen: list[tuple[int, ...]] = []
    small_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    steps: list[int] = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *rest: steps.append(len(optimizer.param_groups[0]["params"]))
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    gc.collect()
    count = sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())
    assert step_peak(settings, args, small_model, 32, 4) == 0, "a CPU has no count"
    handle.remove()
    assert seen == [(4, 3, 32, 32)] * 2 and steps == [len(list(small_model.parameters()))] * 2
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert all(torch.equal(value, before[name]) for name, value in small_model.state_dict().items())
    assert all(parameter.grad is None for parameter in small_model.parameters())
    assert ([type(module) for module in small_model.modules()], small_model.training) == (kinds, mode)
    assert sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects()) == count, "the copy is gone"


def test_running_out_of_memory_is_an_answer(small_model: ViTForImageClassification, tmp_path: Path) -> None:
    settings = config(*AUTO, 8, "--output_dir", tmp_path / "run")
    args = build_arguments(settings, split_batch(settings, 1))

    def full(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if len(kwargs["pixel_values"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small_model.register_forward_hook(full, with_kwargs=True)
    state = torch.get_rng_state()
    assert [step_peak(settings, args, small_model, 32, images) for images in (8, 16)] == [0, None]
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_batch_on_cpus_takes_the_bound() -> None:
    settings = config(*AUTO, 256)
    assert [split_batch(settings, n).per_device for n in (1, 2, 16)] == [32, 32, 16]
    assert str(split_batch(settings, 2)) == (
        "256 = 32 per device x 2 devices x 4 accumulation (auto: at most 32 at once on CPUs)"
    )
    assert split_batch(config(*AUTO, 37), 1).per_device == 1, "only divisors"
    assert split_batch(settings, 4, keep=256).total == 256
    with pytest.raises(UserError, match="cannot be shared by 3 processes; it can by 1, 2, 4"):
        split_batch(settings, 3)
    with pytest.raises(UserError, match="leave one of them out"):
        split_batch(config(*AUTO, 64, "--gradient_accumulation_steps", 2), 1)


def test_auto_batch_is_read_from_flag_and_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("per_device_train_batch_size: auto\nglobal_batch_size: 64\n")
    settings = load_config([str(recipe)])
    assert settings.finds_batch and not load_config([str(recipe), "--per_device_train_batch_size", "8"]).finds_batch
    write_config(settings, tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]).resolved() == settings.resolved()
    for text, told in (("auto", "=auto needs --global_batch_size"), ("many", "invalid value: 'many', give a number")):
        recipe.write_text(f"per_device_train_batch_size: {text}\n")
        for argv in ([str(recipe)], ["--per_device_train_batch_size", text]):
            with pytest.raises(UserError, match=told):
                load_config(argv)
    with pytest.raises(UserError, match="--per_device_train_batch_size auto finds one"):
        load_config(["--auto_find_batch_size", "true"])
    with pytest.raises(SystemExit):
        load_config(["--help", "all"])
    assert "as many as fit, tried out before training" in " ".join(capsys.readouterr().out.split())


def test_plan_with_gpu_memory_computes_the_auto_batch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path
) -> None:
    flags = ["--data", photos, "--model", big_checkpoint(tmp_path / "big"), *AUTO, 2048, "--gpus", 8]
    found = planned(capsys, *flags, "--gpu", "h100", "--strategy", "ddp")
    chosen, row = found["batch"]["per_device"], found["strategies"]["ddp"]
    assert 1 < chosen < 256 and found["batch"]["global"] == 2048 and row["fits"]
    explicit = [*flags, "--per_device_train_batch_size", chosen, "--gpu", "h100", "--strategy", "ddp"]
    assert planned(capsys, *explicit)["strategies"]["ddp"] == row
    explicit[explicit.index(chosen)] = 2 * chosen
    assert not planned(capsys, *explicit)["fits"]
    sizes = {name: one["per_device"] for name, one in found["strategies"].items()}
    assert sizes["fsdp2"] >= sizes["ddp"], "what is sharded leaves room for images"
    assert plan.main([*map(str, flags), "--gpu", "h100", "--strategy", "ddp"]) == 0
    assert f"(auto, by the memory model: {2 * chosen} would need " in capsys.readouterr().out
    assert plan.main([*map(str, flags), "--gpu_memory", "2"]) == 1
    assert "nothing fits; not even one image at once" in capsys.readouterr().out
    assert plan.main([*map(str, flags)]) == 2
    assert "give --gpu or --gpu_memory, or a number" in capsys.readouterr().err


def test_auto_batch_on_two_processes_has_the_curve_of_a_given_split(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("per_device_train_batch_size: auto\nglobal_batch_size: 8\n")
    args = ["--data", photos, "--model", checkpoint, "--max_steps", 8, "--learning_rate", "3e-3", "--logging_steps", 1,
            "--report_to", "none", "--dataloader_num_workers", 0]  # fmt: skip
    done = fork(recipe, *args, "--output_dir", tmp_path / "auto", processes=2)
    assert "8 = 4 per device x 2 devices x 1 accumulation (auto: at most 32 at once on CPUs)" in done.stdout
    fork(*args, "--per_device_train_batch_size", 1, "--global_batch_size", 8, "--output_dir", tmp_path / "given",
         processes=2)  # fmt: skip
    found, given = losses(tmp_path / "auto"), losses(tmp_path / "given")
    assert list(found) == list(range(1, 9)) and found == pytest.approx(given, abs=1e-5)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_auto_batch_with_sharded_strategies_equals_the_given_split(
    photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setattr(build, "find_batch", lambda config, args, batch, *rest: batch.split_into(2, "auto: a test"))
    args = [*ARGS, "--max_steps", 4, "--save_steps", 4, "--logging_steps", 1]
    lab = Lab(tmp_path, ["--data", photos, "--model", checkpoint, *args])
    found = lab.run(tmp_path / "auto", "--per_device_train_batch_size", "auto", processes=2, strategy=strategy)
    assert "8 = 2 per device x 2 devices x 2 accumulation (auto: a test)" in found.output
    lab.run(tmp_path / "given", "--per_device_train_batch_size", 2, processes=2, strategy=strategy)
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")


def test_auto_batch_resumed_keeps_its_split_and_bits(
    photos: Path, dropout_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(
        tmp_path, ["--data", photos, "--model", dropout_checkpoint, *ARGS, "--per_device_train_batch_size", "auto"]
    )
    monkeypatch.setattr(batch_module, "MOST_ON_CPU", 2)
    lab.run(tmp_path / "whole")
    lab.run(tmp_path / "stopped", fault="before_optim:0:12:term", expect=stop.EXIT_CODE)
    manifest = json.loads(next((tmp_path / "stopped").glob("checkpoint-*/manifest.json")).read_text())
    assert manifest["batch"]["per_device"] == 2
    monkeypatch.setattr(batch_module, "MOST_ON_CPU", 8)
    resumed = lab.run(tmp_path / "stopped")
    assert "8 = 2 per device x 1 device x 4 accumulation (auto: as before)" in resumed.output
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    # On another number of devices it is found anew.
    lab.run(tmp_path / "moved", fault="before_optim:0:12:term", expect=stop.EXIT_CODE)
    moved = lab.run(tmp_path / "moved", processes=2)
    assert "8 = 4 per device x 2 devices x 1 accumulation (auto: at most" in moved.output
