"""Check a launch before a long run: processes, data, caches, disk, network. Trains nothing, downloads nothing.

vit-dist doctor [RECIPE] [--flag value ...]                              # one process per visible GPU
torchrun --nproc-per-node 8 -m vit_dist.commands.doctor configs/recipes/cifar10.yaml
accelerate launch --config_file configs/accelerate/zero2.yaml -m vit_dist.commands.doctor --data ~/photos
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vit_dist import bundle, console, distributed, entry
from vit_dist.batch import split_batch
from vit_dist.commands import checks
from vit_dist.commands.checks import MIB, Job, Process, Result
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.files import nearest_folder
from vit_dist.run import attempts, folder_choice, run_folder

HELP = f"""usage: vit-dist doctor [RECIPE] [--flag value ...]

{(__doc__ or "").strip()}

Give it the recipe, the flags and the launcher that you would train with. It prints a row for each process, then a line
for each check: ok, warn, skip, or FAIL with what to do. Exit code 0: nothing failed, 1: a check did, 2: wrong command.

Recipes and flags are those of training: vit-dist train --help
"""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
PATIENCE = 300  # seconds that a rank waits for the others
REPEATS = 5


def doctor(config: Config) -> bool:
    """Run all checks; every rank runs it. Returns whether one failed, on whichever rank."""
    from vit_dist import strategy
    from vit_dist.arguments import build_arguments

    bundle.check(config)
    idle_gpus = distributed.use_one_device()
    with waiting("launch"):
        config = folder_choice.settle(config, held=None)
    precision = run_check(checks.check_precision, config)
    batch = split_batch(config, distributed.launched_world_size(), attempts.batch_to_keep(config))
    with waiting("launch"):
        args = build_arguments(config, batch)  # joins the process group
    memory = run_check(checks.check_memory, args.device)  # before the first collective takes its share
    asked = run_check(lambda: Result("ok", strategy.prepare(args)))
    with waiting("launch"):
        job = Job(config, args, distributed.gather(this_process(args)), asked)
    versions = job.processes[args.process_index].versions
    rows = [[str(i), p.host, p.device, p.driver, *p.versions.values()] for i, p in enumerate(job.processes)]
    console.say(*console.aligned([["rank", "host", "device", "driver", *versions], *rows]), "")

    # What a broken network would hold up comes last, and what was found before is on the screen by then.
    stages: tuple[Callable[[], dict[str, Result | None]], ...] = (
        lambda: {
            "launch": run_check(checks.check_launch, job, idle_gpus),
            "strategy": asked,
            "precision": precision,
            "versions": Result("ok", "compared between all ranks", versions, "install the same versions on all hosts"),
            "code": run_check(checks.check_code),
        },
        lambda: {name: run_check(check, job) for name, check in checks.LOCAL.items()} | {"GPU memory": memory},
        lambda: {"run folder": check_run_folder(job)},
        lambda: {"all-reduce": check_all_reduce(args)},
    )
    counts = [report(stage(), job) for stage in stages]
    failures, warnings = (sum(count) for count in zip(*counts, strict=True))
    console.say("", f"{failures} failed, {warnings} to look at" if failures or warnings else "nothing is wrong")
    distributed.gather(None)  # a launcher ends all processes once one has left with exit code 1: not before this is out
    # Processes that do not see each other all fail alike; rank 0 alone says so, and must not be ended by another first.
    return failures > 0 and (args.world_size > 1 or distributed.launched_rank() == 0)


def run_check(check: Callable[..., Any], *args: Any) -> Any:
    """What the check returns, or its failure as a result: the other ranks wait for this one in the next collective."""
    try:
        return check(*args)
    except Exception as error:
        told = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
        return Result("FAIL", told + " ".join(str(error).split()))


@contextlib.contextmanager
def waiting(what: str, leftover: Path | None = None) -> Iterator[None]:
    """End this process, with a word, if the block takes longer than `PATIENCE`: some rank or the network hangs.

    The backends' own time-outs are half an hour, and `--ddp_timeout` does not reach them on CPUs (transformers 5.23).
    """

    def give_up() -> None:
        if leftover:
            leftover.unlink(missing_ok=True)
        if distributed.first_to_fail():
            me = f"rank {distributed.launched_rank()} ({socket.gethostname()})"
            console.show_error(
                f"FAIL  {what}: {me} waited {PATIENCE} s for the others; are all hosts up, and can they reach each "
                "other? NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the network, NCCL_DEBUG=INFO says more"
            )
        os._exit(1)

    timer = threading.Timer(PATIENCE, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def report(found: Mapping[str, Result | None], job: Job) -> tuple[int, int]:
    """Print what all ranks found; how many failures and warnings (all ranks participate). None: not this rank's."""
    with waiting(", ".join(found)):
        everywhere = distributed.gather(dict(found))
    counts = [0, 0]
    for name in found:
        results = {rank: result for rank, its in enumerate(everywhere) if (result := its[name]) is not None}
        for status, line in merged(results, [process.host for process in job.processes]):
            console.say(f"{status:<5} {name}: {line}")
            counts[0] += status == "FAIL"
            counts[1] += status == "warn"
        if results:
            console.say(*(f"      {line}" for line in results[min(results)].lines))
    return counts[0], counts[1]


def merged(results: Mapping[int, Result], hosts: Sequence[str]) -> list[tuple[str, str]]:
    """(status, line) for one check: each failure and warning with its ranks, or what the first rank says."""
    lines = []
    for status in ("FAIL", "warn"):
        details = {rank: result.detail for rank, result in results.items() if result.status == status}
        lines += [(status, f"{who}: {text}" if len(hosts) > 1 else text) for text, who in by_value(details, hosts)]
    for key in next((result.same for result in results.values() if result.same), ()):
        values = {rank: result.same[key] for rank, result in results.items() if result.same}
        if len(set(values.values())) > 1:
            cure = next(result.cure for result in results.values() if result.same)
            seen = ", ".join(f"{value} on {who}" for value, who in by_value(values, hosts))
            lines.append(("FAIL", f"{key} differs: {seen}; {cure}"))
    first = results[min(results)]
    return lines or [(first.status, first.detail)]


def by_value(values: Mapping[int, str], hosts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each distinct value, and the ranks that have it, named with their hosts."""
    for value in dict.fromkeys(values.values()):
        who = [f"rank {rank} ({hosts[rank]})" for rank, its in values.items() if its == value]
        yield value, ", ".join(who[:8]) + (f" and {len(who) - 8} more" if len(who) > 8 else "")


def this_process(args: TrainingArguments) -> Process:
    on_gpu = args.device.type == "cuda"
    return Process(
        host=socket.gethostname(),
        device=f"{args.device} {torch.cuda.get_device_name(args.device)}" if on_gpu else args.device.type,
        driver=_cuda_driver() if on_gpu else "-",
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        cores=frozenset(os.sched_getaffinity(0)),
        workers=args.dataloader_num_workers,
    )


def _cuda_driver() -> str:
    """The newest CUDA that the driver can run."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return "-"
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def check_run_folder(job: Job) -> Result:
    """Every rank leaves a file where the run will be and looks for rank 0's (all ranks participate)."""
    folder = Path(os.path.abspath(job.config.output_dir))
    levels, mine = [folder, *folder.parents], run_check(_leave_file, job)
    path = mine if isinstance(mine, Path) else None
    try:
        with waiting("run folder", leftover=path):
            # By level, not by path: what rank 0 calls runs/a may be mounted elsewhere here.
            first = distributed.gather((levels.index(path.parent), path.name) if path else None)[0]
            seen = first is None or run_check(_appears, levels[first[0]] / first[1])
            distributed.gather(None)  # all have looked
    finally:
        if path:
            path.unlink(missing_ok=True)
    if path is None:
        return mine
    if first and seen is not True:
        where = f"rank 0's file does not appear in {levels[first[0]]}"
        return Result("FAIL", f"{where}; choose an --output_dir that all hosts share")
    shared = ", shared by all ranks" if first and len(job.processes) > 1 else ""
    note = f"; {job.config.output_dir_note}" if job.config.output_dir_note else ""
    if not run_folder.is_new(folder):
        note += f"; it holds {run_folder.describe(job.config.output_dir)}"
    return Result("ok", f"{job.config.output_dir} can be written{shared}{note}")


def _leave_file(job: Job) -> Path:
    """An empty file in the run folder, or in the nearest folder above it."""
    if job.args.process_index == 0 and job.strategy.status == "ok":
        attempts.check(job.config)
        attempts.inspect(job.config, job.strategy.detail, job.args.world_size)  # what `train` would refuse
    folder = nearest_folder(job.config.output_dir)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output_dir")
    handle, path = tempfile.mkstemp(prefix=".vit_dist-doctor-", dir=folder)
    os.close(handle)
    return Path(path)


def _appears(path: Path, seconds: float = 5.0) -> bool:
    """Whether the file is there; a network file system may take a moment."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@waiting("all-reduce")
def check_all_reduce(args: TrainingArguments) -> Result:
    """A known sum, and how fast it is made (all ranks participate)."""
    ranks, size = args.world_size, 16 * MIB if args.device.type == "cpu" else 256 * MIB
    if ranks == 1:
        return Result("skip", "one process")
    tensor = run_check(lambda: torch.empty(size // 4, device=args.device))
    short = isinstance(tensor, Result)
    if any(distributed.gather(short)):
        return tensor if short else Result("skip", "another rank has no memory for it")
    expected, right, times = ranks * (ranks + 1) // 2, True, []
    for _ in range(1 + REPEATS):  # the first makes the connections
        tensor.fill_(args.process_index + 1)
        _synchronize(args.device)
        begun = time.perf_counter()
        distributed.add_up(tensor)
        _synchronize(args.device)
        times.append(time.perf_counter() - begun)
        right = right and bool((tensor == expected).all())
    seconds = max(distributed.gather(statistics.median(times[1:])))
    if not right:
        return Result(
            "FAIL", f"the sum of 1 to {ranks} is not {expected} here; leave out this host, it corrupts numbers"
        )
    bandwidth = 2 * (ranks - 1) / ranks * size / seconds / 1e9
    timing = f"{size // MIB} MiB in {seconds * 1e3:.1f} ms"
    return Result("ok", f"the sum is right on all ranks; {timing}, bus bandwidth {bandwidth:.2f} GB/s")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `doctor`. Exit code 1 if a check failed, else as `entry.run` has them."""
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    return entry.run(lambda: int(doctor(load_config(argv))), "interrupted")


if __name__ == "__main__":
    sys.exit(main())
