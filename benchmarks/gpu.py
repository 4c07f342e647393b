"""This package and its peers on one GPU, in one run: what docs/speed.md is filled from.

    python benchmarks/gpu.py CIFAR10 PHOTOS OUT.json      CIFAR-10 as Parquet; a class folder of photos
    ... --small                                           a trial of everything with a tiny model, also on a CPU
    ... --parts train step                                some of the parts
    ... --turns 2                                         all of it there and back (ABBA), medians in `median`

ViT-B/16 at 224 pixels, random weights, bf16 unless a peer's recipe says otherwise. Parts, each a process of its own:

- train: `vit_dist.train` over an epoch of CIFAR-10, crops and flips included, from step 30 to its last; host syncs of
  steps 20 to 28, which lie between two log points; prediction of the 10,000 test images; its batches without the model
- step: an 8192 x 8192 x 8192 bf16 matrix product and a copy within the device's memory; forward, backward
  and AdamW on a batch that stays, ours and timm's turn by turn (ABCDDCBA)
- tutorial, hf_example, plain: the peers' own Trainer or loop, same images
- photos: batches of JPEGs as the data loading processes hand them over, without a model; a training on them, streamed
- auto: what --per_device_train_batch_size auto finds, and the peak of a run with it
- exact: a run that is stopped and goes on against one that nothing happens to, to the bit
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peers import steps as peers
from record import record
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessor

from vit_dist.cost.flops import count_flops
from vit_dist.cost.peak import settle

PARTS = ("train", "step", "hf_example", "plain", "tutorial", "photos", "auto", "exact")
PATIENCE = 150  # seconds for a part
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Clock(TrainerCallback):
    """Images a second from step `begin` to the last; how often the host waited for the device in steps `watched`."""

    def __init__(self, begin: int, batch: int, watched: range = range(0)) -> None:
        self.begin, self.batch, self.watched = begin, batch, watched
        self.began = self.images_per_second = 0.0
        self.syncs: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if GPU and self.watched and state.global_step == self.watched.start:
            self._show, warnings.showwarning = warnings.showwarning, self._note
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "called a synchronizing" in str(message):  # switching the mode on warns of the mode
            self.syncs.append(f"{Path(filename).name}:{lineno}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if GPU and self.watched and state.global_step == self.watched.stop:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self._show
        if state.global_step == self.begin:
            self.began = settle()
        if state.global_step == state.max_steps:
            self.images_per_second = (state.global_step - self.begin) * self.batch / (settle() - self.began)


class Bench:
    def __init__(self, cifar10: Path, photos: Path, small: bool, root: Path) -> None:
        self.cifar10, self.folder_of_photos, self.small, self.root = cifar10, photos, small, root
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        self.config = ViTConfig(num_labels=10, **(sizes if small else {}))
        self.batch, self.workers = (8, 2) if small else (256, 15)
        self.folder = root / "model"
        self.config.architectures = ["ViTForImageClassification"]
        self.config.save_pretrained(self.folder)  # trained from random weights: no others are needed
        ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(self.folder)

    def model(self) -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification(self.config)

    def peak(self) -> dict[str, float]:
        side, times = (512, 5) if self.small else (8192, 30)
        a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(5):
            a @ b
        begin = settle()
        for _ in range(times):
            a @ b
        flops = 2 * side**3 * times / (settle() - begin)
        source = torch.empty(2**20 if self.small else 2**31, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        target.copy_(source)
        begin = settle()
        for _ in range(10):
            target.copy_(source)
        return {"matmul_flops": flops, "copy_bytes_per_second": 20 * len(source) / (settle() - begin)}

    def _trained(self, flags: dict[str, Any], clock: Clock) -> tuple[Any, Any]:
        """The trainer and the test split of a run of `vit_dist.train` in this process."""
        from vit_dist import build, train

        made: list[tuple[Any, Any]] = []
        make = build.build_trainer

        def with_clock(*args: Any, **kwargs: Any) -> Any:
            made.append((make(*args, **kwargs), args[2].test))
            made[0][0].add_callback(clock)
            return made[0][0]

        build.build_trainer = with_clock
        every = {
            "model": self.folder, "from_scratch": True, "output_dir": self.root / "run", "bf16": True,
            "bf16_residual": True, "per_device_train_batch_size": self.batch, "per_device_eval_batch_size": 500,
            "verify_images": False, "report_to": "none", "cache_dir": self.root / "cache", "learning_rate": 1e-4,
        }  # fmt: skip
        code = train.main(_words(every | flags))
        build.build_trainer = make
        if code:
            raise RuntimeError(f"vit_dist.train ended with {code}")
        return made[0]

    def train(self) -> dict[str, Any]:
        clock = Clock(10 if self.small else 30, self.batch, range(5, 8) if self.small else range(20, 28))
        flags: dict[str, Any] = {
            "data": self.cifar10, "num_train_epochs": 1, "train_val_split": 0.02, "logging_steps": 50,
        }  # fmt: skip
        if self.small:
            flags |= {"image_source": "resident", "max_train_samples": 160, "max_eval_samples": 40,
                      "max_predict_samples": 40, "per_device_eval_batch_size": 16, "torch_compile": True}  # fmt: skip
        begin = time.perf_counter()
        (one, test), tested = self._trained(flags, clock), {}
        seconds = time.perf_counter() - begin
        rows = [json.loads(line) for line in (self.root / "run/metrics.jsonl").read_text().splitlines()]
        for _ in range(2):
            begin = settle()
            output = one.predict(test)
            tested = {"images": len(output.predictions), "seconds": settle() - begin}
        model_input, count = iter(one.get_train_dataloader()), 0
        one._prepare_inputs(next(model_input))
        begin = settle()
        for batch in model_input:
            count += len(one._prepare_inputs(batch)["labels"])
        return {
            "images_per_second": clock.images_per_second,
            "syncs": sorted(clock.syncs),
            "watched_steps": len(clock.watched),
            "job_seconds": seconds,
            "prediction": tested,
            "last_row": [row for row in rows if "loss" in row][-1],
            "input_alone_images_per_second": count / (settle() - begin),
        }

    def step(self) -> dict[str, Any]:
        images = torch.randn(self.batch, 3, 224, 224, device=DEVICE)
        sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2} if self.small else {}
        made = {
            "ours, bf16 residual": peers.ours_step(self.model(), DEVICE, images, True),
            "ours": peers.ours_step(self.model(), DEVICE, images, False),
            "timm": peers.timm_step(DEVICE, images, False, **sizes),
            "timm, channels last": peers.timm_step(DEVICE, images, True, **sizes),
        }
        times, first = {name: [] for name in made}, {}
        for name, step in made.items():
            begin = settle()
            step()
            first[name] = settle() - begin
            for _ in range(2 if self.small else 10):
                step()
        count = 2 if self.small else 10
        for _ in range(3):
            for name in [*made, *reversed(made)]:
                begin = settle()
                for _ in range(count):
                    made[name]()
                times[name].append((settle() - begin) / count)
        rates = {name: self.batch / statistics.median(values) for name, values in times.items()}
        return {**self.peak(), "images_per_second": rates, "step_seconds": times, "first_step_seconds": first}

    def tutorial(self) -> dict[str, float]:
        clock = Clock(3 if self.small else 20, 16)
        peers.tutorial(self.model(), self.folder, self.cifar10, self.root / "t", 6 if self.small else 60, clock)
        return {"images_per_second": clock.images_per_second}

    def hf_example(self) -> dict[str, float]:
        clock, count = Clock(3 if self.small else 20, self.batch), 6 if self.small else 50
        peers.hf_example(
            self.model(), self.folder, self.cifar10, self.root / "h", count, self.batch, self.workers, clock
        )
        return {"images_per_second": clock.images_per_second}

    def plain(self) -> dict[str, float]:
        steps, warm_up = (6, 3) if self.small else (50, 20)
        rate = peers.plain(self.model(), self.folder, self.cifar10, steps, warm_up, self.batch, self.workers)
        return {"images_per_second": rate}

    def photos(self) -> dict[str, Any]:
        from vit_dist.data.dataset import collate
        from vit_dist.data.pipeline import build_data
        from vit_dist.data.resident import place_images
        from vit_dist.options import DataOptions, ModelOptions

        options = DataOptions(data=str(self.folder_of_photos), verify_images=False, cache_dir=str(self.root / "cache"))
        data = build_data(options, ModelOptions(model=str(self.folder)), 0, lambda title: lambda done, total: None)
        found: dict[str, Any] = {"workers": self.workers, "images_per_second": {}}
        for source in ("stream", "cache", "processor"):
            placed, pixels, _ = place_images(data, source, DEVICE, self.workers, cache_dir=options.cache_dir)
            keys = (list(range(begin, begin + self.batch)) for begin in itertools.count(0, self.batch))
            loader = torch.utils.data.DataLoader(
                placed.train, batch_sampler=keys, collate_fn=collate, num_workers=self.workers, pin_memory=GPU
            )
            batches, seen = iter(loader), 0
            for _ in range(self.workers + 2):  # started, and what they made meanwhile
                next(batches)
            begin = settle()
            for batch in batches:
                values = batch["pixel_values"].to(DEVICE, non_blocking=True)
                seen += len(values if pixels is None else pixels(values, None, None))
                if time.perf_counter() - begin > (2 if self.small else 6):
                    break
            found["images_per_second"][source] = seen / (settle() - begin)
        found["decoded"] = [placed.train.decoded(index).size for index in range(3)]
        clock = Clock(3 if self.small else 20, self.batch)
        steps = {"max_steps": 6 if self.small else 60, "eval_strategy": "no", "load_best_model_at_end": False}
        flags = {"data": self.folder_of_photos, "image_source": "stream", "save_strategy": "no", **steps}
        one, _ = self._trained(flags, clock)
        found["trained"] = {
            "images_per_second": clock.images_per_second, "processes": one.args.dataloader_num_workers,
        }  # fmt: skip
        return found

    def _flags(self, **more: Any) -> list[str]:
        few = {"max_train_samples": 2048 if not self.small else 160, "max_eval_samples": 64, "max_predict_samples": 64}
        flags = {
            "data": self.cifar10, "model": self.folder, "from_scratch": True, "bf16": True, "verify_images": False,
            "report_to": "none", "cache_dir": self.root / "cache", **few, **more,
        }  # fmt: skip
        return _words(flags)

    def auto(self) -> dict[str, Any]:
        from vit_dist.commands import bench
        from vit_dist.config import load_config

        sizes = {"per_device_train_batch_size": "auto", "global_batch_size": 64 if self.small else 1024}
        found = bench.run(load_config(self._flags(**sizes)), 2 if self.small else 5)
        keys = ("batch", "peak_memory_bytes", "step_images_per_second")
        return {key: found.get(key) for key in keys}

    def exact(self) -> dict[str, Any]:
        """Each attempt in a process of its own; one run is asked to leave after a few steps."""
        prints = {}
        sizes = {"per_device_train_batch_size": self.batch, "max_steps": 40, "logging_steps": 1, "save_steps": 20}
        for name in ("whole", "stopped"):
            command = [sys.executable, "-m", "vit_dist.train", *self._flags(output_dir=self.root / name, **sizes)]
            codes = [_stopped_after(5, self.root / name / "metrics.jsonl", command)] if name == "stopped" else []
            if codes not in ([], [75]):
                raise RuntimeError(f"the run to be stopped ended with {codes}")
            codes.append(subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode)
            rows = [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]
            weights = (self.root / name / "best/model.safetensors").read_bytes()
            prints[name] = {
                "codes": codes, "weights": hashlib.sha256(weights).hexdigest(),
                "losses": [row["loss"] for row in rows if "loss" in row],
            }  # fmt: skip
        same = all(prints["whole"][key] == prints["stopped"][key] for key in ("weights", "losses"))
        return {"same_bits": same, **prints}


def _words(flags: dict[str, Any]) -> list[str]:
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def _stopped_after(steps: int, metrics: Path, command: list[str]) -> int:
    """The exit code of a run that is sent SIGTERM once so many steps are logged."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < steps):
            time.sleep(0.01)
        process.terminate()
    return process.returncode


def _medians(kept: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Images per second of each part, or of each of its variants."""
    rates: dict[str, list[float]] = {}
    for part, turns in kept.items():
        for found in turns:
            rate = found.get("images_per_second", found.get("step_images_per_second"))
            for name, value in rate.items() if isinstance(rate, dict) else [("", rate)] if rate else []:
                rates.setdefault(f"{part} {name}".strip(), []).append(value)
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        with tempfile.TemporaryDirectory() as root:
            bench = Bench(given.cifar10.resolve(), given.photos.resolve(), given.small, Path(root))
            found = getattr(bench, given.part)()
            facts = {"batch": bench.batch, "flop_per_image": count_flops(bench.model(), 224).training}
        sys.stdout.write(json.dumps({given.part: found, **facts}) + "\n")
        return
    measured: dict[str, Any] = {}
    kept: dict[str, list[dict[str, Any]]] = {part: [] for part in given.parts}
    turns = [given.parts if turn % 2 == 0 else given.parts[::-1] for turn in range(given.turns)]
    for part in itertools.chain(*turns):
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--part", part], capture_output=True, text=True, timeout=PATIENCE
            )
            lines, told = done.stdout.splitlines(), done.stderr.splitlines()
            found = json.loads(lines[-1]) if done.returncode == 0 else {part: {"failed": told[-15:]}}
        except subprocess.TimeoutExpired as error:
            found = {part: {"failed": str(error)}}
        kept[part].append(found[part])
        if "failed" not in found[part] or part not in measured:
            measured |= found
        sys.stderr.write(f"{part}: {found[part]} ({time.perf_counter() - begin:.0f} s)\n")
        record(
            __file__, given.out, ("torch", "transformers", "accelerate", "datasets", "timm", "torchvision", "pillow"),
            torch.cuda.get_device_name() if GPU else "cpu", model="tiny" if given.small else "ViT-B/16",
            median=_medians(kept), turns=kept if given.turns > 1 else None, **measured,
        )  # fmt: skip


if __name__ == "__main__":
    main()
