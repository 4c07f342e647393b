"""The checks of `vit-dist doctor` that a process makes on its own; those for all ranks together are in doctor.py."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from vit_dist import bundle, console, distributed
from vit_dist.config import Config
from vit_dist.errors import UserError
from vit_dist.files import nearest_folder

MIB, GIB = 2**20, 2**30
MOST_DECODED = 20_000  # images, which two cores decode in a minute or two


@dataclass(frozen=True)
class Result:
    """What a check found on one rank. `same` must be equal on all ranks; `cure` says what to do if it is not.

    `lines` are printed below the first rank's result.
    """

    status: str  # ok, warn, skip, FAIL
    detail: str
    same: Mapping[str, str] = field(default_factory=dict)
    cure: str = ""
    lines: Sequence[str] = ()


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


def check_precision(config: Config) -> Result:
    from vit_dist import strategy

    strategy.reject_launcher_overrides(config.precision)
    return Result("ok", config.precision)


def check_launch(job: Job, idle_gpus: int) -> Result:
    distributed.check_launch(job.args)
    if idle_gpus:
        return Result("warn", f"one process, {idle_gpus} more GPUs are idle; use `vit-dist doctor` or torchrun")
    hosts = {process.host for process in job.processes}
    return Result("ok", f"world size {job.args.world_size}, as launched; hosts: {len(hosts)}")


def check_code() -> Result:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
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


def check_model(config: Config) -> Result:
    from vit_dist.data.transforms import find_model

    options = config.model
    missing = _missing_files(config)
    if not missing:
        where = "no files needed" if options.model == "tiny" else "in this folder"
        return Result("ok", f"{options.model}, {where if _is_local(options.model) else 'in the cache'}")
    if _is_local(options.model):
        raise UserError(f"{options.model} lacks {', '.join(missing)}; give a folder written by `save_pretrained`")
    if find_model(options):
        return Result("warn", f"{options.model} is not in the cache and will be downloaded at the start")
    flags = f" --revision {options.model_revision}" if options.model_revision else ""
    flags += f" --cache-dir {config.data.cache_dir}" if config.data.cache_dir else ""
    raise UserError(
        f"{options.model} is not in the cache (no {', '.join(missing)}), and {_no_hub()}; where there is a network run "
        f"`hf download {options.model}{flags}`, or `vit-dist fetch` for all that a run takes from the hub"
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


def check_source(config: Config) -> Result | None:
    """Whether the data is here, or can be had; None: it is, and nothing was read of it."""
    from vit_dist.data.hub import hub_commit
    from vit_dist.data.source import find

    name = config.data.data
    if find(name) is not None or name == "digits" or _in_datasets_cache(config):
        return None
    if not hub_commit(name, config.data.data_revision)[1]:
        return Result("warn", f"{name} is not in the cache and will be downloaded at the start")
    raise UserError(
        f"{name} is not in the cache, and {_no_hub()}; where there is a network run `vit-dist fetch`, or `hf download "
        f"{name} --repo-type dataset --local-dir FOLDER` and pass --data FOLDER"
    )


def check_data(job: Job) -> Result:
    """Read and decode what there is, without a network: a data set that has to be downloaded first is said, not
    downloaded. What is decoded is remembered: training does not decode it for this again.
    """
    from vit_dist.data.hub import offline
    from vit_dist.data.pipeline import build_data

    if (elsewhere := check_source(job.config)) is not None:
        return elsewhere
    # The images are the same whatever the model; what is wrong with the model is another check's to say.
    model = job.config.model if not _missing_files(job.config) else dataclasses.replace(job.config.model, model="tiny")
    with offline(True):
        data = build_data(job.config.data, model, job.config.data_seed, console.progress, MOST_DECODED)
    record = data.record
    fingerprint, classes = record["fingerprint"][:12], f"{len(data.classes)} ({record['classes'][:12]})"
    counts = record["splits"]
    images = {split: counts[split]["images"] for split in ("train", "validation", "test") if split in counts}
    splits = ", ".join(f"{split} {count:,}" for split, count in images.items())
    found = f"{sum(images.values()):,} images ({splits}), {len(data.classes)} classes, fingerprint {fingerprint}"
    return Result(
        "warn" if data.warnings else "ok",
        "; ".join([found, *data.warnings]),
        {"fingerprint": fingerprint, "list of classes": classes},
        "all hosts must see the same files",
        data.description,
    )


def _in_datasets_cache(config: Config) -> bool:
    """Whether `datasets` has a converted copy: offline it takes nothing else, not even what `hf download` fetched."""
    import datasets

    from vit_dist.data.hub import datasets_cache, offline

    options = config.data
    if bundle.opened() is not None:
        return True  # `bundle.check` was asked before
    with offline(True), contextlib.suppress(Exception):  # whatever a broken cache leads to
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
    image = 3 * (job.config.model.image_size or 224) ** 2 * (1 if _hands_over_bytes(job) else 4)
    need = workers * ((args.dataloader_prefetch_factor or 2) + 1) * batch * image
    free = shutil.disk_usage("/dev/shm").free
    state = f"{free / MIB:,.0f} MiB free, batches of the workers take about {need / MIB:,.0f} MiB"
    cure = "start the container with --shm-size 16g or --ipc host, or lower --dataloader_num_workers"
    if free < need:
        return Result("FAIL", f"{state}; {cure}")
    return Result("warn", f"{state}, which is close; {cure}") if free < 2 * need else Result("ok", state)


def _hands_over_bytes(job: Job) -> bool:
    """Not float32."""
    from vit_dist.data.resident import pixels_of
    from vit_dist.data.transforms import load_processor

    source, on_gpu = job.config.data.image_source, job.args.device.type == "cuda"
    try:
        return pixels_of(load_processor(job.config.model), source, on_gpu) is not None
    except (OSError, UserError):
        return False  # the model's own check says what is wrong with it


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
    free = shutil.disk_usage(nearest_folder(job.config.output_dir)).free / GIB
    state = f"{free:,.1f} GiB free for {job.config.output_dir}"
    if free >= 10:  # a checkpoint of ViT-B with its optimizer is 1 GiB, of ViT-L 3.4; save_total_limit 2 writes a third
        return Result("ok", state)
    cure = "make room, choose another --output_dir, or lower --save_total_limit"
    return Result("FAIL" if free < 1 else "warn", f"only {state}; {cure}")


def check_wandb(job: Job) -> Result | None:
    """Never a failure: training goes on without it."""
    from vit_dist.callbacks.wandb import base_url, unreachable, wandb_mode
    from vit_dist.run.trackers import wants_wandb

    if job.args.process_index:
        return None
    if not wants_wandb(job.config):
        asked = job.config.training["report_to"] is not None
        return Result("skip", "--report_to leaves it out" if asked else "not logged in; `wandb login` turns it on")
    mode, reason = wandb_mode(os.environ)
    if mode == "disabled":
        return Result("warn", f"off ({reason}) though --report_to asks for it; unset the variable")
    if mode == "online":
        if problem := unreachable(base_url(os.environ)):
            return Result("warn", f"offline ({problem}); `vit-dist sync` the run afterwards, where there is a network")
        return Result("ok", f"logged in, {base_url(os.environ)} answers")
    if reason == "not logged in":
        return Result("warn", f"offline ({reason}); `wandb login`, or `vit-dist sync` it afterwards")
    return Result("ok", f"offline ({reason}); `vit-dist sync` it afterwards")


LOCAL: dict[str, Callable[[Job], Result | None]] = {
    "model": lambda job: check_model(
        job.config
    ),  # before the data: asks for the hub first, and remembers if there is none
    "data": check_data,
    "/dev/shm": check_shm,
    "open files": check_files,
    "cores": check_cores,
    "disk": check_disk,
    "W&B": check_wandb,
}
