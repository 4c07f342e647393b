"""Check a launch before a long run: processes, data, caches, disk, network. Trains nothing, downloads nothing.

vit-dist doctor [RECIPE] [--flag value ...]                              # one process per visible GPU
torchrun --nproc-per-node 8 -m vit_dist.doctor configs/recipes/cifar10.yaml
accelerate launch --config_file configs/accelerate/zero2.yaml -m vit_dist.doctor --data ~/photos
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vit_dist import console, distributed, run_folder
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.train import _fail

HELP = f"""usage: vit-dist doctor [RECIPE] [--flag value ...]

{(__doc__ or "").strip()}

Give it the recipe, the flags and the launcher that you would train with. It prints a row for each process, then a line
for each check: ok, warn, skip, or FAIL with what to do. Exit code 0: nothing failed, 1: a check did, 2: wrong command.

Recipes and flags are those of training: vit-dist train --help
"""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
MIB, GIB = 2**20, 2**30
PATIENCE = 300  # seconds that a rank waits for the others
REPEATS = 5


@dataclass(frozen=True)
class Result:
    """What a check found on one rank. `same` must be equal on all ranks; `cure` says what to do if it is not."""

    status: str  # ok, warn, skip, FAIL
    detail: str
    same: Mapping[str, str] = field(default_factory=dict)
    cure: str = ""


@dataclass(frozen=True)
class Process:
    """What the other ranks need to know of one."""

    host: str
    device: str
    driver: str
    versions: Mapping[str, str]
    cores: frozenset[int]  # that it may use
    workers: int


@dataclass(frozen=True)
class Job:
    config: Config
    args: TrainingArguments
    processes: Sequence[Process]  # by rank
    strategy: Result

    @property
    def neighbours(self) -> list[Process]:
        """The processes on this host, this one included."""
        return [process for process in self.processes if process.host == socket.gethostname()]


def doctor(config: Config) -> bool:
    """Run all checks; every rank runs it. Returns whether one failed, on whichever rank."""
    from vit_dist import strategy
    from vit_dist.trainer import build_arguments

    idle_gpus = distributed.use_one_device()
    precision = tried(check_precision, config)
    with waiting("launch"):
        args = build_arguments(config)  # joins the process group
    memory = tried(check_memory, args.device)  # before the first collective takes its share
    asked = tried(lambda: Result("ok", strategy.prepare(args)))
    with waiting("launch"):
        job = Job(config, args, distributed.gather(this_process(args)), asked)
    versions = job.processes[args.process_index].versions
    rows = [[str(i), p.host, p.device, p.driver, *p.versions.values()] for i, p in enumerate(job.processes)]
    console.say(*aligned([["rank", "host", "device", "driver", *versions], *rows]), "")

    # What a broken network would hold up comes last, and what was found before is on the screen by then.
    stages: tuple[Callable[[], dict[str, Result | None]], ...] = (
        lambda: {
            "launch": tried(check_launch, job, idle_gpus),
            "strategy": asked,
            "precision": precision,
            "versions": Result("ok", "compared between all ranks", versions, "install the same versions on all hosts"),
            "code": tried(check_code),
        },
        lambda: {name: tried(check, job) for name, check in LOCAL.items()} | {"GPU memory": memory},
        lambda: {"run folder": check_run_folder(job)},
        lambda: {"all-reduce": check_all_reduce(args)},
    )
    counts = [report(stage(), job) for stage in stages]
    failures, warnings = (sum(count) for count in zip(*counts, strict=True))
    console.say("", f"{failures} failed, {warnings} to look at" if failures or warnings else "nothing is wrong")
    distributed.gather(None)  # a launcher ends all processes once one has left with exit code 1: not before this is out
    # Processes that do not see each other all fail alike; rank 0 alone says so, and must not be ended by another first.
    return failures > 0 and (args.world_size > 1 or distributed.launched_rank() == 0)


def tried(check: Callable[..., Any], *args: Any) -> Any:
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


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


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


def check_precision(config: Config) -> Result:
    from vit_dist import strategy

    strategy.check_owners(config.precision)
    return Result("ok", config.precision)


def check_launch(job: Job, idle_gpus: int) -> Result:
    distributed.check_launch(job.args)
    if idle_gpus:
        return Result("warn", f"one process, {idle_gpus} more GPUs are idle; use `vit-dist doctor` or torchrun")
    hosts = {process.host for process in job.processes}
    return Result("ok", f"world size {job.args.world_size}, as launched; hosts: {len(hosts)}")


def check_code() -> Result:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    code = digest.hexdigest()[:12]
    return Result("ok", f"{package}, fingerprint {code}", {"code": code}, "install the same vit_dist on all hosts")


def check_memory(device: torch.device) -> Result:
    if device.type != "cuda":
        return Result("skip", "no GPU is used")
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.9 * total:
        used = f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of {device} are in use"
        return Result("warn", f"{used}; end the process that holds them (nvidia-smi) or set CUDA_VISIBLE_DEVICES")
    return Result("ok", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free")


def check_model(job: Job) -> Result:
    from vit_dist.data.transforms import _find_model

    options = job.config.model
    missing = _missing_files(job.config)
    if not missing:
        where = "no files needed" if options.model == "tiny" else "in this folder"
        return Result("ok", f"{options.model}, {where if _is_local(options.model) else 'in the cache'}")
    if _is_local(options.model):
        raise UserError(f"{options.model} lacks {', '.join(missing)}; give a folder written by `save_pretrained`")
    if _find_model(options):
        return Result("warn", f"{options.model} is not in the cache and will be downloaded at the start")
    flags = f" --revision {options.model_revision}" if options.model_revision else ""
    flags += f" --cache-dir {job.config.data.cache_dir}" if job.config.data.cache_dir else ""
    raise UserError(
        f"{options.model} is not in the cache (no {', '.join(missing)}), and {_no_hub()}; run "
        f"`hf download {options.model}{flags}` where there is a network"
    )


def _is_local(model: str) -> bool:
    return model == "tiny" or Path(model).is_dir()


def _missing_files(config: Config) -> list[str]:
    """Of the files that the model needs, those that are neither in its folder nor in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, revision = config.model.model, config.model.model_revision
    if name == "tiny":
        return []

    def find(file: str) -> Path | None:
        if _is_local(name):
            return path if (path := Path(name, file)).is_file() else None
        with contextlib.suppress(HFValidationError):
            cached = try_to_load_from_cache(name, file, cache_dir=config.data.cache_dir, revision=revision)
            return Path(cached) if isinstance(cached, str) else None
        return None

    wanted = [("config.json",), ("preprocessor_config.json", "processor_config.json")]
    if not config.model.from_scratch:
        wanted.append(("model.safetensors", "model.safetensors.index.json"))
        if index := find("model.safetensors.index.json"):
            wanted += [(shard,) for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [files[0] for files in wanted if not any(map(find, files))]


def _no_hub() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true")
    return "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"


def check_data(job: Job) -> Result:
    """Read what there is, without a network: a data set that has to be downloaded first is said, not downloaded."""
    from vit_dist.data.hub import _hub_commit, _offline
    from vit_dist.data.pipeline import build_data
    from vit_dist.data.source import _looks_like_path

    options = dataclasses.replace(job.config.data, verify_images=False)
    on_hub = options.data != "digits" and not Path(options.data).expanduser().exists()
    if on_hub and not _looks_like_path(options.data) and not _in_datasets_cache(job.config):
        if not _hub_commit(options.data, options.data_revision)[1]:
            return Result("warn", f"{options.data} is not in the cache and will be downloaded at the start")
        raise UserError(
            f"{options.data} is not in the cache, and {_no_hub()}; where there is a network run `hf download "
            f"{options.data} --repo-type dataset --local-dir FOLDER`, then pass --data FOLDER"
        )
    # The images are the same whatever the model; what is wrong with the model is another check's to say.
    model = job.config.model if not _missing_files(job.config) else dataclasses.replace(job.config.model, model="tiny")
    with _offline(True):
        data = build_data(options, model, job.config.data_seed, console.progress)
    record = data.record
    fingerprint, classes = record["fingerprint"][:12], f"{len(data.classes)} ({record['classes'][:12]})"
    order = [split for split in ("train", "validation", "test") if split in record["splits"]]
    images = {split: record["splits"][split]["images"] for split in order}
    splits = ", ".join(f"{split} {count:,}" for split, count in images.items())
    return Result(
        "ok",
        f"{sum(images.values()):,} images ({splits}), {len(data.classes)} classes, fingerprint {fingerprint}",
        {"fingerprint": fingerprint, "list of classes": classes},
        "all hosts must see the same files",
    )


def _in_datasets_cache(config: Config) -> bool:
    """Whether `datasets` has a converted copy: offline it takes nothing else, not even what `hf download` fetched."""
    import datasets

    from vit_dist.data.hub import _offline, datasets_cache

    options = config.data
    with _offline(True), contextlib.suppress(Exception):  # whatever a broken cache leads to
        folder = datasets_cache(options.cache_dir)
        datasets.load_dataset_builder(
            options.data, name=options.data_config, revision=options.data_revision, cache_dir=folder
        )
        return True
    return False


def check_shm(job: Job) -> Result:
    """Workers hand their batches over in shared memory; one too many and they die with a bus error."""
    workers, args = sum(process.workers for process in job.neighbours), job.args
    if not workers:
        return Result("skip", "no data loading workers (dataloader_num_workers 0)")
    batch = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    image = 3 * (job.config.model.image_size or 224) ** 2 * 4
    need = workers * ((args.dataloader_prefetch_factor or 2) + 1) * batch * image
    free = shutil.disk_usage("/dev/shm").free
    state = f"{free / MIB:,.0f} MiB free, batches of the workers take about {need / MIB:,.0f} MiB"
    cure = "start the container with --shm-size 16g or --ipc host, or lower --dataloader_num_workers"
    if free < need:
        return Result("FAIL", f"{state}; {cure}")
    return Result("warn", f"{state}, which is close; {cure}") if free < 2 * need else Result("ok", state)


def check_files(job: Job) -> Result:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= 4096:
        return Result("ok", "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,} allowed")
    return Result("FAIL" if limit < 256 else "warn", f"only {limit:,} allowed; run `ulimit -n 65536` before the launch")


def check_cores(job: Job) -> Result:
    processes, workers = len(job.neighbours), sum(process.workers for process in job.neighbours)
    cores = len(frozenset().union(*(process.cores for process in job.neighbours)))
    state = f"{cores} for {processes} process{'es' if processes > 1 else ''} with {workers} workers in all"
    if max(workers, processes) <= cores:
        return Result("ok", state)
    cure = f"pass --dataloader_num_workers {max(0, cores // processes - 1)}" if workers > cores else "start fewer"
    return Result("warn", f"only {state}; {cure}")


def check_disk(job: Job) -> Result | None:
    if job.args.process_index:
        return None  # rank 0 writes the checkpoints
    levels = _levels(job.config)
    free = shutil.disk_usage(levels[_existing(levels)]).free / GIB
    state = f"{free:,.1f} GiB free for {job.config.output_dir}"
    if free >= 10:  # a checkpoint of ViT-B with its optimizer is 1 GiB, of ViT-L 3.4; save_total_limit 2 writes a third
        return Result("ok", state)
    cure = "make room, choose another --output_dir, or lower --save_total_limit"
    return Result("FAIL" if free < 1 else "warn", f"only {state}; {cure}")


def check_wandb(job: Job) -> Result | None:
    """Never a failure: training goes on without it."""
    from vit_dist.callbacks.wandb import _base_url, _mode, _unreachable
    from vit_dist.trackers import wants_wandb

    if job.args.process_index:
        return None
    if not wants_wandb(job.config):
        asked = job.config.training["report_to"] is not None
        return Result("skip", "--report_to leaves it out" if asked else "not logged in; `wandb login` turns it on")
    mode, reason = _mode(os.environ)
    if mode == "disabled":
        return Result("warn", f"off ({reason}) though --report_to asks for it; unset the variable")
    if mode == "online":
        if problem := _unreachable(_base_url(os.environ)):
            return Result("warn", f"offline ({problem}); `wandb sync` the run afterwards, where there is a network")
        return Result("ok", f"logged in, {_base_url(os.environ)} answers")
    if reason == "not logged in":
        return Result("warn", f"offline ({reason}); `wandb login` or set WANDB_API_KEY, or `wandb sync` it afterwards")
    return Result("ok", f"offline ({reason}); `wandb sync` it afterwards")


LOCAL: dict[str, Callable[[Job], Result | None]] = {
    "model": check_model,  # before the data: asks for the hub first, and remembers if there is none
    "data": check_data,
    "/dev/shm": check_shm,
    "open files": check_files,
    "cores": check_cores,
    "disk": check_disk,
    "W&B": check_wandb,
}


def check_run_folder(job: Job) -> Result:
    """Every rank leaves a file where the run will be and looks for rank 0's (all ranks participate)."""
    levels, mine = _levels(job.config), tried(_leave_file, job)
    path = None if isinstance(mine, Result) else levels[mine[0]] / mine[1]
    try:
        with waiting("run folder", leftover=path):
            # By level, not by path: what rank 0 calls runs/a may be mounted elsewhere here.
            first = distributed.gather(mine if path else None)[0]
            seen = first is None or tried(_appears, levels[first[0]] / first[1])
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
    return Result("ok", f"{job.config.output_dir} can be written{shared}")


def _leave_file(job: Job) -> tuple[int, str]:
    """An empty file in the nearest folder that is there: how far above the run folder, and its name."""
    if job.args.process_index == 0 and job.strategy.status == "ok":
        run_folder.inspect(job.config, job.strategy.detail, job.args.world_size)  # what `train` would refuse
    levels = _levels(job.config)
    level = _existing(levels)
    if not levels[level].is_dir():
        raise UserError(f"{levels[level]} is a file; choose another --output_dir")
    handle, path = tempfile.mkstemp(prefix=".vit_dist-doctor-", dir=levels[level])
    os.close(handle)
    return level, Path(path).name


def _levels(config: Config) -> list[Path]:
    folder = Path(os.path.abspath(config.output_dir))
    return [folder, *folder.parents]


def _existing(levels: Sequence[Path]) -> int:
    """The first of these folders that is there: the run folder, or the nearest one above it."""
    return next(level for level, folder in enumerate(levels) if folder.exists())


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
    tensor = tried(lambda: torch.empty(size // 4, device=args.device))
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
    """Run `doctor`. Exit code 1 if a check failed, or with the first failing rank's traceback; 2 for a user's error."""
    argv = sys.argv[1:] if argv is None else argv
    console.set_up(distributed.launched_rank())
    if "-h" in argv or "--help" in argv:
        console.say(HELP.rstrip())
        return 0
    try:
        failed = doctor(load_config(argv))
        distributed.leave()
        return int(failed)
    except UserError as error:
        return _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception:
        return _fail(f"rank {distributed.launched_rank()} failed\n{traceback.format_exc()}", 1)


if __name__ == "__main__":
    sys.exit(main())
