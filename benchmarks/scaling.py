"""Is the efficiency that `vit-dist plan --bench --link` predicts what processes of this machine reach?

    python benchmarks/scaling.py [OUT.json]

A ViT of 11.0 million parameters, random weights, float32, one batch of 4 images of 64 pixels that is given again and
again. For 1, 2 and 4 processes of one thread, in turn, three rounds of each: as many runs side by side that do not know
of each other (what the cores give to each), gloo's collectives with nothing else to do, and the runs of
`vit_dist.train` under torchrun with DDP and with FSDP2. Efficiency is the median step of the first over that of the
last. The prediction takes the first, the collectives' own seconds, and cost/scaling.py.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import record

ROUNDS, STEPS, WARM_UP, BATCH = 3, 30, 4, 4
PROCESSES = (1, 2, 4)
STRATEGIES = ("ddp", "fsdp2")
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
SMALL, LARGE = 2**12, 2**23  # bytes; the larger is about a bucket of DDP or a block of FSDP2
SIDE = 64
FLAGS = [
    "digits", "--model", "vit", "--max_steps", str(STEPS + WARM_UP), "--per_device_train_batch_size", str(BATCH),
    "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none",
    "--logging_steps", "1000", "--dataloader_num_workers", "0",
]  # fmt: skip
ROOT = Path(__file__).parents[1]


def write_model(folder: Path) -> dict[str, int]:
    """A small ViT, and what `scaling.sends` wants to know of it."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    from vit_dist.cost.memory import Tensors
    from vit_dist.strategy import mark_blocks

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, image_size=SIDE,
        patch_size=16, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    mark_blocks(model)
    tensors = Tensors.of(model)
    return {"weights": tensors.parameters, "trained": tensors.trained_parameters, "blocks": tensors.groups, "size": 4}


class Repeated:
    """One batch, as often as it is asked for."""

    def __init__(self, loader: Any) -> None:
        self.batch, self.count = next(iter(loader)), STEPS + WARM_UP

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield dict(self.batch)


def observed_run(out: str, argv: list[str]) -> None:
    """One process of `vit_dist.train`; appends the seconds of its steps to the file `out`, if it is rank 0."""
    from transformers import TrainerCallback

    from vit_dist import train
    from vit_dist.trainer import ExactTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())
            if len(ends) == STEPS + WARM_UP:
                steps = [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
                if os.environ.get("RANK", "0") == "0":
                    Path(out).write_text(json.dumps(steps))
                time.sleep(1)  # the others may still be in their last collective
                os._exit(0)  # what a run does at its end is of no interest

    loader, begin = ExactTrainer.get_train_dataloader, ExactTrainer.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.add_callback(Clock())

    ExactTrainer.__init__ = made  # type: ignore[method-assign]
    ExactTrainer.get_train_dataloader = lambda self: Repeated(loader(self))  # type: ignore[assignment, method-assign]
    train.main(argv)


def collectives(out: str) -> None:
    """One process of a group that only sends; rank 0 writes the seconds of each kind and size to `out`."""
    import torch
    import torch.distributed as dist  # noqa: TID251 outside of the package

    dist.init_process_group("gloo")
    world, found = dist.get_world_size(), {}
    for size in (SMALL, LARGE):
        whole = torch.ones(size // 4)
        share = torch.ones(size // 4 // world)
        acts: list[Callable[[], Any]] = [
            lambda whole=whole: dist.all_reduce(whole),
            lambda whole=whole, share=share: dist.all_gather_into_tensor(whole, share),
            lambda whole=whole, share=share: dist.reduce_scatter_tensor(share, whole),
        ]
        for kind, act in zip(KINDS, acts, strict=True):
            seconds = []
            for _ in range(25):
                dist.barrier()
                begin = time.perf_counter()
                act()
                seconds.append(time.perf_counter() - begin)
            found[f"{kind} {size}"] = statistics.median(seconds[5:])
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def start(folder: Path, launcher: list[str], *args: str, **env: str) -> subprocess.Popen[str]:
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, *launcher, __file__, *args], cwd=folder, env={**os.environ, **quiet, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(*jobs: subprocess.Popen[str]) -> None:
    for job in jobs:
        said = job.communicate(timeout=900)[0]
        if job.returncode:
            raise SystemExit(said)


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` tells its processes; torchrun does not."""
    made = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/fsdp2.yaml",
         "--num_processes", "1", "--main_process_port", "0", "--no_python", sys.executable, "-c",
         "import json, os; print(json.dumps(dict(os.environ)))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told: dict[str, str] = json.loads(made.stdout.splitlines()[-1])
    return {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def one_round(folder: Path, processes: int, fsdp: dict[str, str]) -> dict[str, Any]:
    """Seconds of a step (the median of a run) side by side, with each strategy; seconds of the collectives."""

    def observe(name: str) -> tuple[str, ...]:
        return ("--observe", str(folder / f"{name}.json"), *FLAGS, "--output_dir", str(folder / name), "--fresh")

    def step(name: str) -> float:
        return statistics.median(json.loads((folder / f"{name}.json").read_text()))

    alone = [f"alone-{number}" for number in range(processes)]
    ended(*(start(folder, [], *observe(name)) for name in alone))
    found: dict[str, Any] = {"alone": statistics.mean(step(name) for name in alone)}
    if processes > 1:
        ended(start(folder, torchrun(processes), "--collectives", str(folder / "collectives.json")))
        found["collectives"] = json.loads((folder / "collectives.json").read_text())
        for strategy in STRATEGIES:
            env = fsdp if strategy == "fsdp2" else {}
            ended(start(folder, torchrun(processes), *observe(strategy), **env))
            found[strategy] = step(strategy)
    return found


def summary(rounds: list[dict[str, Any]], processes: int, model: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured efficiency, by the medians of the rounds."""
    from vit_dist.cost.scaling import Link, Send, Step, bounds, sends

    def middle(*keys: str) -> float:
        values = []
        for one in rounds:
            value: Any = one
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    alone = middle("alone")
    found: dict[str, Any] = {"step alone": alone}
    if processes == 1:
        return found

    def link(send: Send) -> Link:
        """Of this kind of collective, from its seconds for two sizes."""
        small, large = (middle("collectives", f"{send.kind} {size}") for size in (SMALL, LARGE))
        sent = send.rounds * (send.devices - 1) / send.devices * (LARGE - SMALL)
        speed = sent / max(large - small, 1e-9)
        return Link(speed, small / send.rounds)

    for strategy in STRATEGIES:
        asked = sends(strategy, devices=processes, shards=processes, **model)
        low, high = bounds(Step.of(alone), asked, link)
        values = [one["alone"] / one[strategy] for one in rounds]
        found[strategy] = {
            "predicted": [round(low, 3), round(high, 3)],
            "measured": round(alone / middle(strategy), 3),
            "of the rounds": [round(value, 3) for value in values],
            "inside": low <= alone / middle(strategy) <= high,
        }
        for send in asked:
            one = link(send)
            found.setdefault("links", {})[send.kind] = {
                "bytes per second": round(one.bytes_per_second), "latency": one.latency,
            }  # fmt: skip
    return found


def main(out: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as root:
        folder = Path(root)
        model, fsdp = write_model(folder / "vit"), fsdp_environment()
        load = os.getloadavg()[0]  # of others: the figures are as quiet as the machine was
        rounds: dict[int, list[dict[str, Any]]] = {processes: [] for processes in PROCESSES}
        for _ in range(ROUNDS):
            for processes in PROCESSES:
                rounds[processes].append(one_round(folder, processes, fsdp))
                sys.stderr.write(f"{processes}: {json.dumps(rounds[processes][-1])}\n")
    record(
        __file__, out, ("torch", "transformers", "accelerate"), python=sys.version.split()[0], load_before=load,
        model=model, batch=BATCH, steps=STEPS,
        summary={processes: summary(found, processes, model) for processes, found in rounds.items()}, rounds=rounds,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--observe"]:
        observed_run(sys.argv[2], sys.argv[3:])
    elif sys.argv[1:2] == ["--collectives"]:
        collectives(sys.argv[2])
    else:
        main(*sys.argv[1:])
