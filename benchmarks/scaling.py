"""Is the efficiency that `vit-dist plan --bench --link` predicts what processes of this machine reach?

    python benchmarks/scaling.py [OUT.json]

A ViT of 11.0 million parameters, random weights, float32, one batch of 4 images of 64 pixels that is given again and
again. For 1, 2 and 4 processes of one thread there are as many runs side by side that do not know of each other (what
the cores give to each), a group that only sends (gloo's collectives) and copies, and runs of `vit_dist.train` under
torchrun with DDP and with FSDP2. All are started once and then take turns of a few steps, the others waiting: what else
the machine does falls on all alike. Efficiency is the median step of the first over that of the last. The prediction
takes vit_dist/cost/scaling.py, the slowest of each of the first's steps (processes that average gradients wait for the
slowest), those of a copy, the trainer's two small collectives of each step, and the collectives' own seconds: on idle
cores for the upper end of the range, and for the lower one beside a thread of each process that computes, since here
the cores that compute are also what sends.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from record import record

ROUNDS, STEPS, BATCH = 7, 6, 4  # STEPS of a turn, the first of which is not counted; nor is the first round
PROCESSES = (1, 2, 4)
STRATEGIES = ("ddp", "fsdp2")
KINDS = ("all-reduce", "all-gather", "reduce-scatter")
BESIDE = ", beside computing"
SMALL, LARGE = 2**12, 2**23  # bytes; the larger is about a bucket of DDP or a block of FSDP2
SIDE = 64
FLAGS = [
    "digits", "--model", "../vit", "--max_steps", str(STEPS * ROUNDS), "--per_device_train_batch_size", str(BATCH),
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
        self.batch, self.count = next(iter(loader)), STEPS * ROUNDS

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield dict(self.batch)


class Turns:
    """Who may work: files in the folder that the processes are started in. `group`: alone, ddp, ..."""

    def __init__(self, folder: Path, group: str, rank: int) -> None:
        self.folder, self.group, self.rank = folder, group, rank

    def wait(self, number: int) -> None:
        self._say(f"ready-{self.group}-{self.rank}", "")
        while (self.folder / "turn").read_text() != f"{self.group} {number}":
            time.sleep(0.005)

    def done(self, number: int, found: Any) -> None:
        self._say(f"{self.group}-{self.rank}-{number}", json.dumps(found))

    def _say(self, name: str, text: str) -> None:
        say(self.folder / name, text)


def say(path: Path, text: str) -> None:
    """There whole or not at all."""
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").replace(path)


def observed_run(turns: Turns, argv: list[str]) -> None:
    """One process of `vit_dist.train`."""
    from transformers import TrainerCallback

    from vit_dist import train
    from vit_dist.trainer import ExactTrainer

    class Clock(TrainerCallback):
        ends: list[float]

        def on_step_begin(self, args: Any, state: Any, *rest: Any, **more: Any) -> None:
            if state.global_step % STEPS == 0:
                turns.wait(state.global_step // STEPS)
                self.ends = []

        def on_step_end(self, args: Any, state: Any, *rest: Any, **more: Any) -> None:
            self.ends.append(time.perf_counter())
            if state.global_step % STEPS == 0:
                steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
                turns.done(state.global_step // STEPS - 1, steps)
            if state.global_step == ROUNDS * STEPS:
                time.sleep(1)  # the others may still be in their last collective
                os._exit(0)  # what a run does at its end is of no interest

    loader, begin = ExactTrainer.get_train_dataloader, ExactTrainer.__init__

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.add_callback(Clock())

    ExactTrainer.__init__ = made  # type: ignore[method-assign]
    ExactTrainer.get_train_dataloader = lambda self: Repeated(loader(self))  # type: ignore[assignment, method-assign]
    train.main(argv)


def collectives(turns: Turns) -> None:
    """One process of a group that only sends: seconds of each kind and size."""
    import torch
    import torch.distributed as dist  # noqa: TID251 outside of the package

    dist.init_process_group("gloo")
    world = dist.get_world_size()
    acts: dict[str, Callable[[], Any]] = {}
    for size in (SMALL, LARGE):
        whole, share = torch.ones(size // 4), torch.ones(size // 4 // world)
        for kind, act in zip(
            KINDS,
            (lambda whole, share: dist.all_reduce(whole), dist.all_gather_into_tensor,
             lambda whole, share: dist.reduce_scatter_tensor(share, whole)), strict=True,
        ):  # fmt: skip
            acts[f"{kind} {size}"] = partial(act, whole, share)
    acts["copy"] = torch.ones(LARGE // 4).clone
    for number in range(ROUNDS):
        turns.wait(number)
        found: dict[str, list[float]] = defaultdict(list)
        for beside in (False, True):
            with computing() if beside else nullcontext():
                for name, act in acts.items():
                    for _ in range(STEPS):
                        dist.barrier()
                        begin = time.perf_counter()
                        act()
                        found[f"{name}{BESIDE * beside}"].append(time.perf_counter() - begin)
        turns.done(number, {name: seconds[1:] for name, seconds in found.items()})
    time.sleep(1)
    os._exit(0)


@contextmanager
def computing() -> Iterator[None]:
    """A thread that multiplies matrices, as a step does."""
    import torch

    over, matrix = threading.Event(), torch.randn(384, 384)

    def multiply() -> None:
        while not over.is_set():
            matrix @ matrix

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def start(folder: Path, launcher: list[str], group: str, *args: str, **env: str) -> subprocess.Popen[bytes]:
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (folder / f"{group}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, __file__, "--group", group, *args], cwd=folder,
            env={**os.environ, **quiet, **env}, stdout=log, stderr=log,
            start_new_session=True,  # as torchrun does: Linux shares busy cores among sessions
        )  # fmt: skip


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


def measure(folder: Path, processes: int, fsdp: dict[str, str]) -> dict[str, Any]:
    """Medians of each turn: seconds of a step in each group of processes, and of the collectives."""
    folder.mkdir()
    say(folder / "turn", "")

    def run(group: str) -> tuple[str, ...]:
        return (*FLAGS, "--output_dir", str(folder / group))

    jobs = [start(folder, [], "alone", *run(f"alone-{n}"), RANK_ALONE=str(n)) for n in range(processes)]
    if processes > 1:
        jobs.append(start(folder, torchrun(processes), "collectives"))
        jobs.append(start(folder, torchrun(processes), "ddp", *run("ddp")))
        jobs.append(start(folder, torchrun(processes), "fsdp2", *run("fsdp2"), **fsdp))
    groups = ("alone", "collectives", *STRATEGIES) if processes > 1 else ("alone",)

    def wait(names: list[str]) -> None:
        begin = time.monotonic()
        while not all((folder / name).exists() for name in names):
            if time.monotonic() - begin > 900 or any(job.poll() for job in jobs):
                raise SystemExit("\n".join(path.read_text()[-3000:] for path in folder.glob("*.log")))
            time.sleep(0.02)

    try:
        wait([f"ready-{group}-{rank}" for group in groups for rank in range(processes)])
        found: dict[str, Any] = {group: [] for group in (*groups, "slowest")}
        for number in range(ROUNDS):
            for group in groups:
                say(folder / "turn", f"{group} {number}")
                names = [f"{group}-{rank}-{number}" for rank in range(processes)]
                wait(names)
                values = [json.loads((folder / name).read_text()) for name in names]
                if group == "collectives":
                    found[group].append({name: statistics.median(values[0][name]) for name in values[0]})
                else:
                    found[group].append(statistics.mean(map(statistics.median, values)))
                if group == "alone":
                    found["slowest"].append(statistics.median(map(max, zip(*values, strict=True))))
        for job in jobs:
            job.wait(timeout=60)
    finally:
        for job in jobs:
            job.terminate()
    return {group: turns[1:] for group, turns in found.items()}


def summary(found: dict[str, Any], processes: int, model: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured efficiency, by the medians of the turns."""
    from vit_dist.cost.scaling import Link, Send, Step, bounds, sends

    alone, slowest = (statistics.median(found[name]) for name in ("alone", "slowest"))
    result: dict[str, Any] = {"step alone": round(alone, 4), "slowest": round(slowest, 4)}
    if processes == 1:
        return result

    def seconds(name: str) -> float:
        return statistics.median(turn[name] for turn in found["collectives"])

    def link(send: Send, beside: str = "") -> Link:
        """Of this kind of collective, from its seconds for two sizes."""
        small, large = (seconds(f"{send.kind} {size}{beside}") for size in (SMALL, LARGE))
        sent = send.rounds * (send.devices - 1) / send.devices * (LARGE - SMALL)
        return Link(sent / max(large - small, 1e-9), small / send.rounds)

    copies = 2 * LARGE / seconds("copy")
    result["copies MB/s"] = round(copies / 1e6)
    for strategy in STRATEGIES:
        asked = sends(strategy, devices=processes, shards=processes, **model)
        asked.append(Send("all-reduce", 0, 2, processes, None))  # whether to stop; whether the loss is finite
        step = Step.of(slowest)
        idle = [alone / slowest * end for end in bounds(step, asked, link, copies)]
        loaded = [alone / slowest * end for end in bounds(step, asked, partial(link, beside=BESIDE), copies)]
        measured = alone / statistics.median(found[strategy])
        turns = [one / other for one, other in zip(found["alone"], found[strategy], strict=True)]
        result[strategy] = {
            "predicted": [round(loaded[0], 3), round(idle[1], 3)], "measured": round(measured, 3),
            "turns": [round(min(turns), 3), round(max(turns), 3)], "inside": loaded[0] <= measured <= idle[1],
            "by idle links": [round(end, 3) for end in idle],
        }  # fmt: skip
        for send in asked:
            result[f"{send.kind} MB/s, ms: idle; beside computing"] = [
                [round(one.bytes_per_second / 1e6), round(1e3 * send.rounds * one.latency, 2)]
                for one in (link(send), link(send, BESIDE))
            ]
    return result


def main(out: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as root:
        folder = Path(root)
        model, fsdp = write_model(folder / "vit"), fsdp_environment()
        load = os.getloadavg()[0]  # of others: the figures are as quiet as the machine was
        found: dict[int, dict[str, Any]] = {}
        for processes in PROCESSES:
            found[processes] = measure(folder / str(processes), processes, fsdp)
            sys.stderr.write(f"{processes}: {json.dumps(summary(found[processes], processes, model))}\n")
    record(
        __file__, out, ("torch", "transformers", "accelerate"), python=sys.version.split()[0], load_before=load,
        model=model, batch=BATCH, summary={k: summary(one, k, model) for k, one in found.items()}, seconds=found,
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--group"]:
        rank = int(os.environ.get("RANK", os.environ.get("RANK_ALONE", "0")))
        turns = Turns(Path.cwd(), sys.argv[2], rank)
        if sys.argv[2] == "collectives":
            collectives(turns)
        else:
            observed_run(turns, sys.argv[3:])
    else:
        main(*sys.argv[1:])
