"""The only module that talks to the process group: is this the launch that was asked for, and do all ranks agree?"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from vit_dist import stop
from vit_dist.environment import integer, job, job_cores
from vit_dist.errors import LostProcess, UserError
from vit_dist.terminal import one_line

T = TypeVar("T")
LONGEST_DECISION = timedelta(minutes=10)  # of rank 0, while the others wait for it before the process group
LEFT_OVER = "start the processes with torchrun or accelerate, or unset RANK and WORLD_SIZE to train in one process"


def launched_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank as the launcher says it, 0 without a launcher. Needs no process group."""
    return integer("RANK", 0, environ)


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for a variable of a launcher or a batch system that cannot be what it says.

    Before anything else reads them: the libraries would end with a traceback.
    """
    rank, world = launched_rank(environ), launched_world_size(environ)
    if rank >= world:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world} in the environment: {LEFT_OVER}")
    if world > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR") if name not in environ]):
        raise UserError(f"WORLD_SIZE={world} in the environment, but no {' and no '.join(missing)}: {LEFT_OVER}")
    for name in ("LOCAL_RANK", "VIT_DIST_HOSTS", "VIT_DIST_CPUS", "GPUS_PER_NODE", "TORCHELASTIC_RESTART_COUNT"):
        integer(name, 0, environ)
    for name in ("LOCAL_WORLD_SIZE", "VIT_DIST_PROCESSES"):
        integer(name, 1, environ, least=1)
    if "MASTER_PORT" in environ and not 0 <= integer("MASTER_PORT", 0, environ) < 65536:
        raise UserError(f"MASTER_PORT={environ['MASTER_PORT']} in the environment: give a port from 1 to 65535")
    job(environ)


def launched_world_size(environ: Mapping[str, str] = os.environ) -> int:
    return integer("WORLD_SIZE", 1, environ, least=1)


def on_main(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and give its value to every rank (all ranks participate).

    A UserError on rank 0 is raised on every rank, so that nobody waits for a value that will not come.
    """
    box: list[Any] = [None, None]
    if launched_rank() == 0:
        try:
            box = [make(), None]
        except UserError as error:
            box = [None, error]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


_rendezvous: list[Any] = []  # rank 0's store without an agent lives as long as its process: the process group joins it


def decided_on_main(name: str, make: Callable[[], T]) -> T:
    """As `on_main`, before there is a process group: the value, which JSON can hold, goes through the launcher's
    key-value store under `name` (all ranks participate). Raises UserError on every rank if rank 0 does.
    """
    if launched_world_size() == 1:
        return make()
    if not _rendezvous:
        with joining():
            _rendezvous.append(next(dist.rendezvous("env://", timeout=LONGEST_DECISION))[0])
    store, key = _rendezvous[0], f"vit_dist/{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if launched_rank() == 0:
        try:
            value = make()
        except UserError as error:
            store.set(key, json.dumps({"error": error.args}))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store ends with this process
                _wait_until(lambda: store.add(f"{key}/read", 0) == launched_world_size() - 1, 5)
            raise
        store.set(key, json.dumps({"value": value}))
        return value
    try:
        told = _wait_until(lambda: store.check([key]), LONGEST_DECISION.total_seconds())
        box = json.loads(store.get(key)) if told else {}
        store.add(f"{key}/read", 1)
    except dist.DistNetworkError:
        box = {}
    if "error" in box:
        raise UserError(*box["error"])
    if not box:
        raise LostProcess(f"rank 0 is gone, or has not told its {name.replace('_', ' ')} in {LONGEST_DECISION}")
    return box["value"]


def _wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it was done in time. Asks again and again: in the store's own `wait` no signal would be heard."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def gather(value: T, group: Any = None) -> list[T]:
    """Every rank's value, in rank order (all ranks participate). `group` is another process group than training's."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class GlooGroup:
    """A process group of its own between the CPUs of all ranks, so that its collectives may run in another thread than
    training's. Making one is a collective; without a process group it talks to itself.

    `timeout` is how long a rank waits for the slowest one.
    """

    def __init__(self, timeout: timedelta = timedelta(hours=2)) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order (all ranks participate)."""
        return [value] if self.group is None else gather(value, self.group)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank (all ranks participate; no device is involved)."""
        if self.group is None:
            return flag
        box = torch.tensor(int(flag))
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group)
        return bool(box)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, as Gloo and NCCL say it."""
    said = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def agree(facts: Mapping[str, Any], hint: str) -> None:
    """Raise UserError on every rank unless all of them have the same facts (all ranks participate).

    The message names the first fact that differs, two ranks with what they have, and `hint`.
    """
    values = gather(dict(facts))
    for key in sorted({key for each in values for key in each}):
        other = next((rank for rank, each in enumerate(values) if each.get(key) != values[0].get(key)), None)
        if other is not None:
            seen = f"{values[0].get(key)} on rank 0, {values[other].get(key)} on rank {other}"
            raise UserError(f"the processes do not have the same {key}: {seen}; {hint}")


def any_rank(flag: torch.Tensor) -> bool:
    """Whether `flag` (bool scalar) is true on any rank (all ranks participate; one host sync)."""
    flag = flag.to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def add_up(tensor: torch.Tensor) -> None:
    """Replace `tensor` by its sum over all ranks (all ranks participate)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def use_one_device(environ: Any = os.environ) -> int:
    """Without a launcher, hide all GPUs but the first; returns how many were hidden.

    The Trainer would otherwise wrap the model in `nn.DataParallel` and multiply the batch. Must run before CUDA is
    initialised.
    """
    count = torch.cuda.device_count()
    if "WORLD_SIZE" in environ or count < 2:
        return 0
    first = environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environ["CUDA_VISIBLE_DEVICES"] = first
    return count - 1


def check_launch(args: TrainingArguments, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse launches in which the stack would silently do something else than what was asked for.

    Raises UserError; nothing has been written yet.
    """
    asked, seen = launched_world_size(environ), args.world_size
    if asked != seen:
        raise UserError(
            f"the launcher started {asked} processes but the training arguments see {seen}: each would train alone, "
            "into one folder; on a machine without GPUs leave --ddp_backend alone, or pass --use_cpu"
        )
    if "RANK" not in environ and "MASTER_PORT" in environ and "ACCELERATE_MIXED_PRECISION" in environ:
        # accelerate's simple launcher sets the address only if it was asked for several processes
        raise UserError(
            "accelerate launch was asked for several processes but started one (it does so for MULTI_CPU and without "
            "GPUs); add --multi_gpu, which also works on CPUs, or use torchrun --nproc-per-node N"
        )
    told = integer("VIT_DIST_PROCESSES", seen, environ, least=1)
    if told != seen:
        raise UserError(
            f"{told} processes were to be started, but {seen} found each other: each group would train alone"
        )
    if args.n_gpu > 1:
        raise UserError("one process would drive several GPUs with nn.DataParallel; use `vit-dist train` or torchrun")


def check_world(args: TrainingArguments, environ: Mapping[str, str] = os.environ) -> tuple[list[list[str]], str]:
    """Every rank's host, device and cores, as rows under a title, and a line about an all-reduce.

    All ranks participate, with a gather and the all-reduce of one number. Raises UserError on every rank if they are
    not on as many hosts as they were to be, or cannot add up numbers on their devices.
    """
    device = f"{args.device} {torch.cuda.get_device_name(args.device)}" if args.device.type == "cuda" else "cpu"
    rank_table = gather((socket.gethostname(), device, cores(environ), os.getpid()))
    hosts = {seat[0] for seat in rank_table}
    told = integer("VIT_DIST_HOSTS", len(hosts), environ)  # checked before, see `check_environment`
    if told != len(hosts):
        raise UserError(
            f"the job has {told} nodes, but its {len(rank_table)} processes run on {len(hosts)}: "
            f"{', '.join(sorted(hosts))}"
        )
    total = torch.tensor(float(args.process_index + 1), device=args.device)
    begun = time.monotonic()
    add_up(total)
    count = len(rank_table)
    sum_of_all, expected = total.item(), count * (count + 1) / 2
    if sum_of_all != expected:
        raise UserError(f"an all-reduce of 1 to {count} gave {sum_of_all:g}, not {expected:g}: vit-dist doctor")
    milliseconds = (time.monotonic() - begun) * 1e3
    allreduce_report = f"all-reduce of 1 to {count}: {sum_of_all:g}, in {milliseconds:.1f} ms"
    title = ["rank", "host", "device", "cores", "process"]
    return [title, *([str(rank), *map(str, seat)] for rank, seat in enumerate(rank_table))], allreduce_report


def cores(environ: Mapping[str, str] = os.environ) -> int:
    """CPU cores for this process: an equal share of `job_cores`."""
    return max(1, job_cores(environ) // integer("LOCAL_WORLD_SIZE", 1, environ, least=1))


@contextlib.contextmanager
def joining(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Around what joins the process group: say what is waited for, and let the first signal end the process.

    The wait is a call of PyTorch's, during which Python runs no signal handler: a thread hears of signals instead.
    """
    world = launched_world_size(environ)
    if world == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    address = f"{environ.get('MASTER_ADDR', '127.0.0.1')}:{environ.get('MASTER_PORT', '29500')}"
    waited = f"waiting for {world} processes at {address}"
    # One process of each host speaks, and those of other hosts only if rank 0 may be the one that is missing.
    patience = 10.0 if launched_rank(environ) == 0 else 30.0 if integer("LOCAL_RANK", 0, environ) == 0 else math.inf
    over, (read, write) = threading.Event(), os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        begun, told = time.monotonic(), False
        while not over.is_set():
            heard = os.read(read, 1) if select.select([read], [], [], 0.2)[0] else b""
            if heard and heard[0] in stop.SIGNALS and not over.wait(1.0):  # else its handler has run
                sys.stderr.write(f"stopped ({signal.Signals(heard[0]).name}) while {waited}\n")
                sys.stderr.flush()
                os._exit(stop.EXIT_CODE)
            if not told and time.monotonic() - begun > patience:
                told = True
                sys.stderr.write(
                    one_line(f"{waited}; to train in one process, unset WORLD_SIZE, RANK and MASTER_ADDR") + "\n"
                )
                sys.stderr.flush()

    thread = threading.Thread(target=watch, name="joining", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        thread.join()
        os.close(read)
        os.close(write)


def leave() -> None:
    """Take the process group down after the last collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache  # asked by the failure record and by the entry point
def first_to_fail() -> bool:
    """Whether this process is the first of its job to fail, and so the one whose error is shown.

    Asks the launcher's key-value store, which outlives the workers; when in doubt, yes. Not a collective.
    """
    if launched_world_size() == 1:
        return True
    try:
        return _store().add(_failures(), 1) == 1
    except Exception:
        return True


class Peers:
    """Whether another process of the job has failed, for a thread that watches. Not a collective."""

    def __init__(self) -> None:
        self._client: dist.TCPStore | None = None
        if launched_world_size() > 1:
            with contextlib.suppress(Exception):
                self._client = _store()

    def failed(self) -> bool:
        try:
            return self._client is not None and self._client.add(_failures(), 0) > 0
        except Exception:  # the launcher is gone, or busy
            return False


def _store() -> dist.TCPStore:
    environ = os.environ
    return dist.TCPStore(
        environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
    )


def _failures() -> str:
    return f"vit_dist/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
