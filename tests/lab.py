"""Runs that something happens to, and verbs, without the seconds that imports take: forked from the test process.

One process for each rank: the processes, the kills and the files are real, and the imports are paid once. Where the
launcher, a signal to it, or what a library reads when it is imported matters, conftest.run starts a real launcher.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "accelerate"
HSDP = (  # what launch/accelerate.sh adds for two replicas of two shards
    "--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config", "--parallelism_config_dp_replicate_size", "2",
    "--parallelism_config_dp_shard_size", "2",
)  # fmt: skip


@functools.cache
def prepare() -> None:
    """Import what a run imports on its way, once for all of them; not when tests are collected."""
    for name in (
        "vit_dist",  # first: it seals a process with a bundle before libraries read where their caches are
        "deepspeed", "wandb", "evaluate", "sklearn.metrics", "pyarrow.parquet", "torch.distributed.checkpoint",
        "vit_dist.train", "vit_dist.run.results", "vit_dist.strategy", "vit_dist.run.failure", "vit_dist.run.summary",
        "vit_dist.run.trackers", "transformers.models.vit.modeling_vit",
        "transformers.models.vit.image_processing_pil_vit",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import tqdm
    from PIL import Image

    Image.init()  # its plugins
    # tqdm's lock is a semaphore that forked processes share: one that is killed with a bar on the screen keeps it for
    # ever, and every later run would wait for it. Its monitor is a thread, which might hold the lock in a fork.
    tqdm.tqdm.monitor_interval = 0
    tqdm.tqdm.set_lock(threading.RLock())


def still_running(family: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """The processes of these that have not ended after this time.

    A process that ended stays as a zombie until its parent asks for its exit code. Where its parent ended first, that
    is the machine's first process, and in many containers that one never asks: a zombie has ended.
    """

    def running(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    deadline = time.monotonic() + seconds
    while (left := [process for process in family if running(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


ARGS = [
    "--max_steps", 30, "--learning_rate", "3e-3", "--logging_steps", 3, "--save_steps", 5, "--save_total_limit", 2,
    "--metric_for_best_model", "loss", "--report_to", "none", "--dataloader_num_workers", 0, "--global_batch_size", 8,
    "--per_device_eval_batch_size", 3,
]  # fmt: skip


@dataclass
class Job:
    """Processes of one run, and what they print."""

    pids: list[int]
    log: Path
    codes: dict[int, int]
    launcher: int | None

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = 300, others: float = 10) -> list[int]:
        """Exit codes by rank (negative: the signal). As a launcher does, ends the others when one has failed, with
        SIGTERM, and with SIGKILL `others` seconds later.
        """
        deadline, failed = time.monotonic() + seconds, None
        while len(self.codes) < len(self.pids):
            for pid in set(self.pids) - self.codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if failed is None and any(self.codes.values()):
                failed = now
                self.signal(signal.SIGTERM)
            if failed is not None and now > failed + others:
                self.signal(signal.SIGKILL)
            if now > deadline:
                self.signal(signal.SIGKILL)
                self._end_launcher()
                raise AssertionError(f"still running after {seconds} s\n{self.output}")
            time.sleep(0.01)
        self._end_launcher()
        return [self.codes[pid] for pid in self.pids]

    def _end_launcher(self) -> None:
        if self.launcher:
            os.kill(self.launcher, signal.SIGKILL)
            os.waitpid(self.launcher, 0)

    def signal(self, number: int, rank: int | None = None) -> None:
        for pid in self.pids if rank is None else [self.pids[rank]]:
            if pid not in self.codes:
                os.kill(pid, number)


class Lab:
    """`args` come before those of each run."""

    def __init__(self, root: Path, args: list[Any]) -> None:
        self.root, self.args = root, args

    def start(
        self,
        folder: Path,
        *args: Any,
        processes: int = 1,
        strategy: str | Path = "ddp",
        fault: str = "",
        alone: Mapping[int, Sequence[Any]] | None = None,
        patch: Callable[[], None] | None = None,
        **env: str,
    ) -> Job:
        """`strategy`: of configs/accelerate, or a file like those. `alone`: further arguments of one rank, by rank.
        `patch`: called on each rank before the run.
        """
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        argv = list(map(str, [*self.args, "--output_dir", folder, *args]))
        if "--per_device_train_batch_size" not in argv:
            argv += ["--per_device_train_batch_size", str(8 // processes)]
        launcher, port = store_process() if processes > 1 else (None, 0)
        env = {**launch_environment(strategy), **env}
        argvs = [[*argv, *map(str, (alone or {}).get(rank, ()))] for rank in range(processes)]
        pids = []
        for rank in range(processes):
            body = functools.partial(_train, rank, argvs[rank], fault, patch)
            own = rank_environment(rank, processes, port) if launcher else {}
            pids.append(_fork(body, (log, log), {**own, **env}))
        return Job(pids, log, {}, launcher)

    def run(self, folder: Path, *args: Any, expect: int | None = 0, **options: Any) -> Job:
        """Start and wait; fails unless every rank exits with `expect` (None: with anything)."""
        job = self.start(folder, *args, **options)
        codes = job.wait()
        assert expect is None or set(codes) == {expect}, f"{codes}\n{job.output}"
        return job


@functools.cache
def launch_environment(strategy: str | Path) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<strategy>.yaml` tells the processes of the strategy."""
    if strategy in ("single", "ddp"):
        return {}
    config = strategy if isinstance(strategy, Path) else CONFIGS / f"{strategy}.yaml"
    if "deepspeed" in config.read_text().lower():  # its optimizers import Inductor: 4 s for each process of each run
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    show = "import json, os; print(json.dumps(dict(os.environ)))"

    def launch() -> None:
        from accelerate.commands.launch import main

        flags = ["--config_file", str(config), *(HSDP if strategy == "hsdp" else ()), "--num_processes", "1"]
        sys.argv = ["accelerate-launch", *flags, "--main_process_port", "0", "--no_python", sys.executable, "-c", show]
        main()

    codes, printed, errors = _outcome(launch)
    assert codes == [0], errors
    told: dict[str, str] = json.loads(printed.splitlines()[-1])
    return {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}


def store_process() -> tuple[int, int]:
    """As torchrun does it, the key-value store is the launcher's and outlives every rank: (process, port).

    Not in the test process: its thread would be missing in everything that is forked from there.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        time.sleep(3600)
        os._exit(0)
    port = int(os.read(read, 10))
    os.close(read)
    os.close(write)
    return pid, port


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def _train(rank: int, argv: list[str], fault: str, patch: Callable[[], None] | None) -> int:
    from points import install, witness

    if patch is not None:
        patch()
    install(rank, fault)
    witness(rank)
    from vit_dist import train

    return train.main(argv)


def _fork(body: Callable[[], int | None], streams: tuple[Path, Path], env: Mapping[str, str]) -> int:
    """The process that ends with what `body` returns, and prints to these files."""
    prepare()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:  # an exception that left this function would go on as a test run of its own
        os.setpgid(0, 0)
        gc.freeze()  # a collection in the run need not look through what the test process has imported: 0.4 s each
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.update(env)
        from vit_dist import distributed

        distributed.first_to_fail.cache_clear()  # what the test process has asked
        code = body() or 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _outcome(body: Callable[[], int | None], processes: int = 1, **env: str) -> tuple[list[int], str, str]:
    """Exit codes by rank of forks that call `body`, and what they print: standard output, standard error."""
    with tempfile.TemporaryDirectory(prefix="vit_dist-fork-") as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        launcher, port = store_process() if processes > 1 else (None, 0)
        told = [rank_environment(rank, processes, port) if launcher else {} for rank in range(processes)]
        pids = [_fork(body, streams, {**own, **env}) for own in told]
        codes = Job(pids, streams[0], {}, launcher).wait()
        out, err = (stream.read_text() if stream.exists() else "" for stream in streams)
    return codes, out, err


def fork(
    *args: Any,
    module: str = "vit_dist.train",
    processes: int = 1,
    expect: int | None = 0,
    patch: Callable[[], None] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """conftest.run without the launcher: `module`'s `main`, on each rank after `patch`; fails unless it exits with
    `expect` (None: with anything). If one rank fails, the others may have heard of its end before they come to their
    own, as under a launcher.
    """

    def body() -> int:
        atexit._clear()  # what the test process has left for its own exit
        if patch is not None:
            patch()
        code = importlib.import_module(module).main(list(map(str, args)))
        atexit._run_exitfuncs()
        return int(code)

    codes, *printed = _outcome(body, processes, **env)
    as_expected = expect in codes and (0 not in codes if expect else not any(codes))
    assert expect is None or as_expected, f"{codes}\n{printed[0]}\n{printed[1]}"
    return subprocess.CompletedProcess(list(args), max(codes, key=abs), *printed)


class ForkServer:
    """Forks from a process of its own, for what libraries read from the environment when they are imported."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import lab; lab.serve()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))},
        )  # fmt: skip

    def fork(self, *args: Any, expect: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([list(map(str, args)), options]) + "\n")
        self.process.stdin.flush()
        code, *printed = json.loads(self.process.stdout.readline())
        assert expect is None or code == expect, f"exit {code}\n{printed[0]}\n{printed[1]}"
        return subprocess.CompletedProcess(list(args), code, *printed)

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """The other side of a ForkServer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    for line in sys.stdin:
        args, options = json.loads(line)
        done = fork(*args, expect=None, **options)
        answers.write(json.dumps([done.returncode, done.stdout, done.stderr]) + "\n")
        answers.flush()


def fingerprint(folder: Path) -> dict[str, Any]:
    """What must be equal to the bit: weights, optimizer, learning rate, and every row that was logged."""
    from vit_dist.callbacks.speed import KEYS
    from vit_dist.checkpoint import store

    last = next(store.checkpoints(folder))
    timing = ("runtime", "per_second", *KEYS)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "all_results.json").read_text())
    # ZeRO's shares of the optimizer end with padding that nobody sets; what they did is in the weights and rows.
    state = [
        p for p in last.rglob("*") if p.suffix in (".safetensors", ".pt", ".distcp") and "optim_states" not in p.name
    ]
    weights = [folder / "best/model.safetensors", *state]
    digests = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(weights)}
    return {
        **digests,
        "rows": [{k: v for k, v in row.items() if not k.endswith(timing)} for row in rows],
        "results": {
            k: v for k, v in results.items() if not k.endswith((*timing, "world_size")) and k != "train_runtime"
        },
    }


def committed(folder: Path) -> list[int]:
    """Steps of the checkpoints that are as they were committed, oldest first."""
    from vit_dist.checkpoint import store

    def is_whole(path: Path) -> bool:
        try:
            return store.integrity_error(path) is None
        except FileNotFoundError:  # a job that still runs has just deleted it for a newer one
            return False

    return sorted(store.step_of(path) for path in store.checkpoints(folder) if is_whole(path))


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())
