"""How fast this machine trains, part by part, and which part holds the others up.

vit-dist bench [RECIPE] [--flag value ...]                 the digits with a tiny model, as `vit-dist train` would
vit-dist bench cifar10 --bf16 --json bench.json --chart bench.svg

One process on one device; all flags of training are taken. Nothing is kept of what it trains.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from vit_dist import console, distributed, entry
from vit_dist.config import Config, load_config
from vit_dist.cost.peak import matmul_flops, settle
from vit_dist.errors import UserError
from vit_dist.parser import Parser

if TYPE_CHECKING:
    from vit_dist.build import Built

WARM_UP = 5  # steps: compilation, allocations, the first batches of data loading processes
PATIENCE = 20.0  # seconds for a part that can be cut short


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend."""

    def body() -> int:
        asked, rest = _parser().parse_known_args(argv)
        for name in ("json", "chart"):
            if (path := getattr(asked, name)) and not path.absolute().parent.is_dir():
                raise UserError(f"--{name} {path}: there is no folder {path.absolute().parent}")
        if asked.steps < 1:
            raise UserError(f"--steps {asked.steps}: give at least 1")
        if distributed.launched_world_size() > 1:
            raise UserError("bench measures one process; start it without a launcher")
        found = run(load_config(rest), asked.steps)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=2) + "\n")
        if asked.chart:
            asked.chart.write_text(chart(found))
        return 0

    return entry.run(body, "nothing was written")


def _parser() -> Parser:
    parser = Parser(
        prog="vit-dist bench",
        usage="vit-dist bench [RECIPE] [--steps N] [--json FILE] [--chart FILE.svg] [--flag value ...]",
        description="Measure, on this machine and with this recipe: matrix products, decoding, batches "
        "alone, the step alone, both together, evaluation, and what a checkpoint costs. All other flags are those of "
        "`vit-dist train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=30, help=f"to measure, after {WARM_UP} others (default: 30)")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--chart", type=Path, help="draw the rates there (SVG)")
    return parser


def run(config: Config, steps: int) -> dict[str, Any]:
    """Measure everything and say each part when it is known. Returns rates in images per second, times in seconds."""
    from vit_dist import distributed, strategy
    from vit_dist.arguments import build_arguments
    from vit_dist.batch import split_batch
    from vit_dist.build import build
    from vit_dist.checkpoint.writer import CheckpointWriter
    from vit_dist.cost.flops import count_flops
    from vit_dist.run.run_folder import environment

    distributed.use_one_device()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vit_dist-bench-") as folder:
        quiet = {
            "output_dir": folder, "max_steps": steps + WARM_UP, "eval_strategy": "no", "save_strategy": "no",
            "load_best_model_at_end": False, "report_to": "none",
        }  # fmt: skip
        config = dataclasses.replace(config, training={**config.training, **quiet})
        batch = split_batch(config, 1)
        args = build_arguments(config, batch)
        asked = strategy.prepare(args)
        writer = CheckpointWriter(config, distributed.GlooGroup())
        built = build(config, args, batch, asked, writer)
        batch = built.batch
        flops = count_flops(built.model.model, built.data.input_size)
        found: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
            "cores": distributed.cores(), "precision": config.precision, "batch": batch.per_device,
            "model": built.model.description, "images": built.data.description[-1], "compiled": built.compilation.on,
            "ready_seconds": time.perf_counter() - begin, "gflop_per_image": flops.training / 1e9, **environment(),
        }  # fmt: skip
        console.say(
            f"device   {found['device']}, {found['precision']}; {found['model']}",
            f"images   {found['images']}",
            f"batch    {batch}",
        )
        _measure(built, steps, batch.total, found)
        writer.close()
    console.say(advice(found))
    return found


def _measure(built: Built, steps: int, images: int, found: dict[str, Any]) -> None:
    """Add each part to `found` and say it. `images` are of one step."""
    args = built.trainer.args

    def note(name: str, title: str, rate: float, more: str = "") -> None:
        found[f"{name}_images_per_second"] = rate
        console.say(f"{title:<22}{rate:10,.0f} images/s" + (f", {more}" if more else ""))

    found["matmul_flops"] = matmul_flops(args.device, found["precision"])
    console.say(f"{'peak':<22}{found['matmul_flops'] / 1e12:10,.2f} TFLOP/s in matrix products")
    cached = built.image_source == "cache"  # whose images were decoded when it was built
    note("decode", "out of the cache" if cached else "decoding, one core", _decode_rate(built))
    rate, batch = _batches_alone(built, steps)
    note("input", "batches alone", rate)
    repeated = _Repeated(batch, (steps + WARM_UP) * args.gradient_accumulation_steps)
    clock = Clock(steps)
    built.trainer.add_callback(clock)
    alone = [_seconds_a_step(built, clock, repeated)]
    found["first_step_seconds"] = clock.first
    both = [_seconds_a_step(built, clock), _seconds_a_step(built, clock)]
    alone.append(_seconds_a_step(built, clock, repeated))
    step, together = images / min(alone), images / min(both)  # a neighbour on the machine may disturb one of the two
    found["mfu"] = step * found["gflop_per_image"] * 1e9 / found["matmul_flops"]
    note("step", "step alone", step, f"{found['mfu']:.0%} of the matrix products' peak")
    note("train", "end to end", together, f"{together / step:.0%} of the step alone")
    if args.device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    note("evaluation", "evaluation", _evaluation_rate(built))
    begin = settle()
    built.trainer._save_checkpoint(built.trainer.model_wrapped, None)
    found["checkpoint_stall_seconds"] = time.perf_counter() - begin
    built.trainer.writer.wait()
    found["checkpoint_seconds"] = time.perf_counter() - begin
    console.say(
        f"{'checkpoint':<22}{found['checkpoint_stall_seconds']:10.2f} s that training waits, "
        f"{found['checkpoint_seconds']:.2f} s to the disk"
    )


def advice(found: dict[str, Any]) -> str:
    """What holds training up, in one line."""
    step, given, got = (found[f"{name}_images_per_second"] for name in ("step", "input", "train"))
    if got > 0.93 * step:
        return f"nothing holds the step up: it keeps {got / step:.0%} of its pace; batches come at {given / step:.1f} x"
    if given < 1.1 * step:
        return (
            f"the step waits for batches, which come at {given / step:.0%} of what it takes: more "
            "--dataloader_num_workers, --image_source cache for large photos, resident where all images have one size"
        )
    serial = 1 / (1 / step + 1 / given)
    if 0.85 * serial <= got <= 1.15 * serial:
        return (
            f"batches are made between the steps, for {1 - got / step:.0%} of the time: --dataloader_num_workers 1 or "
            "more makes them beside where cores are idle; --image_source resident (images of one size) or cache (large "
            "photos) makes them faster"
        )
    return f"training reaches {got / step:.0%} of the step's pace though batches come fast enough: log less often"


def chart(found: dict[str, Any]) -> str:
    """The rates as bars, an SVG on its own."""
    names = {"input": "batches alone", "step": "step alone", "train": "end to end", "evaluation": "evaluation"}
    rates = [(title, found[f"{name}_images_per_second"]) for name, title in names.items()]
    most = max(rate for _, rate in rates)
    rows = "".join(
        f'<text x="150" y="{y + 17}" text-anchor="end">{title}</text>'
        f'<rect x="160" y="{y}" width="{max(380 * rate / most, 1):.0f}" height="24" rx="3" fill="#4269d0"/>'
        f'<text x="{168 + 380 * rate / most:.0f}" y="{y + 17}">{rate:,.0f}</text>'
        for y, (title, rate) in zip(range(60, 200, 34), rates, strict=False)
    )
    title = f"images per second: {found['device']}, {found['precision']}, batch {found['batch']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="210" font-family="sans-serif" font-size="14">'
        f'<rect width="640" height="210" fill="white"/><text x="20" y="34" font-size="16">{title}</text>{rows}</svg>\n'
    )


class _Repeated:
    """A loader of one batch, which is on the device already."""

    def __init__(self, batch: dict[str, Any], count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(self.count):
            yield dict(self.batch)


class Clock(TrainerCallback):
    """Seconds a step, from the end of step `WARM_UP` to that of the last; and those of the first."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.begun = self.step = self.first = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = settle()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.first = settle() - self.begun
        if state.global_step == WARM_UP:
            self.begun = settle()
        if state.global_step == state.max_steps:
            self.step = (settle() - self.begun) / self.steps


def _seconds_a_step(built: Built, clock: Clock, loader: Any = None) -> float:
    """Of the Trainer's own loop, with another loader in the place of its own if that is given."""
    trainer = built.trainer
    trainer.optimizer = trainer.lr_scheduler = None
    if loader is not None:
        trainer.get_train_dataloader = lambda: loader  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.__dict__.pop("get_train_dataloader", None)
    return clock.step


def _evaluation_rate(built: Built) -> float:
    built.trainer.evaluate()  # compiles
    begin = settle()
    built.trainer.evaluate()
    return len(built.data.validation) / (settle() - begin)


def _decode_rate(built: Built) -> float:
    """Images a second that this process decodes, or takes out of a cache, without crops."""
    images, count, begin = built.data.train, 0, time.perf_counter()
    while time.perf_counter() - begin < 1.0:
        images.decoded(count % len(images))
        count += 1
    return count / (time.perf_counter() - begin)


def _batches_alone(built: Built, steps: int) -> tuple[float, dict[str, Any]]:
    """Images a second that arrive on the device as the model's input, and the last batch. Epochs follow each other."""
    trainer = built.trainer
    loader = trainer.get_train_dataloader()
    ahead = WARM_UP + 2 * trainer.args.dataloader_num_workers  # batches that were made before they were asked for
    begin, seen = math.inf, 0

    def batches() -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            trainer.batches.set_epoch(epoch)
            yield from loader

    for count, batch in enumerate(batches(), start=1):
        made = trainer._prepare_inputs(batch)
        if count == ahead:
            begin = settle()
        elif count > ahead:
            seen += len(made["labels"])
        seconds = time.perf_counter() - begin
        enough = count >= ahead + steps and (seconds > 1 or count >= ahead + 20 * steps)
        if enough or (seen and seconds > PATIENCE):
            return seen / (settle() - begin), made
    raise AssertionError("epochs follow each other for ever")


if __name__ == "__main__":
    sys.exit(main())
