"""`--per_device_train_batch_size auto`: the most images that every device can take at once, tried out before training.

The step's images stay the same; only how many of them a device takes at a time is found here.
"""

from __future__ import annotations

import copy
import functools
import gc
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import ParallelismConfig
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

from vit_dist import blocks, distributed
from vit_dist.batch import Batch
from vit_dist.blocks import IN_PLACE, Compilation
from vit_dist.config import Config
from vit_dist.cost import memory
from vit_dist.errors import UserError

Peak = Callable[[int], int | None]  # images at once -> bytes on the device when it holds most; None: it ran out

ALL = "a device's whole share fits"


@dataclass(frozen=True)
class Found:
    """The most images at once, 0 if not even one fits, and why not more."""

    size: int
    reason: str


def find_batch(
    config: Config,
    args: TrainingArguments,
    batch: Batch,
    strategy: str,
    model: PreTrainedModel,
    side: int,
    kept: int | None = None,
) -> Batch:
    """The split of `batch` that fits every device (all ranks participate, with one gather).

    `model` is the one that will be trained, on the CPU and not compiled yet, with its blocks marked; it stays as it is,
    and so do the states of the random generators. `side`: of the images, in pixels. `kept`: what the checkpoint was
    made with that the run goes on from. Raises UserError on every rank if not even one image fits.
    """
    if kept is not None:
        return batch.split_into(kept, "auto: as before")
    if args.device.type == "cpu":  # running out of memory there ends the process; see `batch.MOST_ON_CPU`
        return batch
    if args.device.type != "cuda":
        raise UserError(f"per_device_train_batch_size=auto: not known for {args.device.type}; give a number of images")
    room = _room(args.device)
    if strategy in IN_PLACE:
        peak: Peak = functools.partial(step_peak, config, args, model, side)
    else:
        peak = _sharded_peak(config, args, batch, strategy, model, side)
    every = distributed.gather((search(batch.sizes, peak, room), socket.gethostname()))
    rank, (found, host) = min(enumerate(every), key=lambda one: one[1][0].size)
    if not found.size:
        cure = "shard the model (--strategy zero2 or fsdp2)"
        if strategy not in IN_PLACE:
            cure = "the whole model is measured: give a number of images, `vit-dist plan` computes what fits"
        raise UserError(
            f"per_device_train_batch_size=auto: not even one image fits on rank {rank} ({host}): {found.reason}; {cure}"
            "; --bf16 and --activation_checkpointing take less"
        )
    return batch.split_into(found.size, f"auto: {found.reason}")


def search(sizes: Sequence[int], peak: Peak, room: int) -> Found:
    """The largest of `sizes` (ascending, the first is 1) whose peak is at most `room` bytes.

    Memory is affine in the images, once they take more than the optimizer's step: one and two of them say where it
    ends, and a step of that size says whether that is so. What is tried mends the forecast; where a try ran out and
    mended nothing, the middle of what is left comes next.
    """
    first = peak(1)
    if first is None or first > room:
        return Found(0, _short(1, first, room))
    if len(sizes) == 1:
        return Found(1, ALL)
    second = peak(2)  # also where it does not divide the share
    if second is None:
        return Found(1, _short(sizes[1], None, room))
    known, good, bad, ran_out = {1: first, 2: second}, 1, sizes[-1] + 1, False

    def forecast(images: int) -> int:
        """By the line through the two largest sizes that are known."""
        (fewer, low), (more, high) = sorted(known.items())[-2:]
        return high + round((images - more) * (high - low) / (more - fewer))

    while between := [size for size in sizes if good < size < bad]:
        fitting = [size for size in between if forecast(size) <= room]
        if not ran_out and not fitting:
            break
        size = between[(len(between) - 1) // 2] if ran_out else fitting[-1]
        needed = known[size] if size in known else peak(size)
        ran_out = needed is None
        if needed is not None:
            known[size] = needed
        if needed is None or needed > room:
            bad = size
        else:
            good = size
    above = next((size for size in sizes if size > good), None)
    if above is None:
        return Found(good, ALL)
    return Found(good, _short(above, known.get(above, None if above == bad else forecast(above)), room))


def _short(images: int, needed: int | None, room: int) -> str:
    if needed is None:
        return f"{images} did not fit into {room / 1e9:.3g} GB"
    return f"{images} would need {needed / 1e9:.3g} GB of {room / 1e9:.3g}"


def _room(device: torch.device) -> int:
    """Bytes that this process may use: less what others hold (CUDA and NCCL too), less what fragmentation takes."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(memory.USABLE * (total - others))


def step_peak(
    config: Config, args: TrainingArguments, model: PreTrainedModel, side: int, images: int, *, optimizer: bool = True
) -> int | None:
    """Bytes that the device holds at most in training steps on `images` random ones; None if it runs out of them.

    0 on a CPU, which has no such count. Nothing stays allocated.
    """
    on_gpu = args.device.type == "cuda"
    peak: int | None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(args.device)
    try:
        with torch.random.fork_rng([args.device] if on_gpu else []):
            _train_copy(config, args, model, side, images, optimizer)
        peak = torch.cuda.max_memory_allocated(args.device) if on_gpu else 0
    except torch.OutOfMemoryError:
        peak = None
    gc.collect()  # after the exception is gone, whose frames hold the tensors
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)  # `bench` reads it for the run alone
    return peak


def _train_copy(
    config: Config, args: TrainingArguments, model: PreTrainedModel, side: int, images: int, optimizer: bool
) -> None:
    """Two steps of a copy of the model, as the Trainer takes them.

    Gradients are kept in between: they are there during the forward when they are accumulated, and with DDP always, in
    its buckets. So are the optimizer's moments in the second step.
    """
    model_copy: Any = copy.deepcopy(model).train()
    model_copy.to(args.device)
    blocks.optimize_model(model_copy, None, Compilation(False, ""), config.model.bf16_residual, args.device)
    if args.gradient_checkpointing:  # transformers 5.23 has another name for it; this one has the same value
        given: Any = args.gradient_checkpointing_kwargs
        kwargs = dict(given or {})
        further = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        model_copy.gradient_checkpointing_enable(kwargs or None, **further)
    steps = _optimizer(args, model_copy) if optimizer else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    pixels = torch.randn(images, 3, side, side, device=args.device)
    labels = torch.zeros(images, dtype=torch.int64, device=args.device)
    for _ in range(2):
        with torch.autocast(args.device.type, dtype, enabled=dtype is not None):
            logits = model_copy(pixel_values=pixels).logits
        F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing_factor).backward()
        if steps is not None:
            torch.nn.utils.clip_grad_norm_(model_copy.parameters(), args.max_grad_norm)
            steps.step()


def _optimizer(args: TrainingArguments, model: PreTrainedModel) -> torch.optim.Optimizer:
    """The run's; AdamW, which keeps as much as any, for one that is not made of parameters alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ValueError, ImportError):  # the Trainer will say so
        return torch.optim.AdamW(trained)
    plain = isinstance(made, type) and issubclass(made, torch.optim.Optimizer)
    if not plain or options.keys() & {"params", "model", "optimizer_dict"}:
        return torch.optim.AdamW(trained)
    return made(trained, **options)


def _sharded_peak(
    config: Config, args: TrainingArguments, batch: Batch, strategy: str, model: PreTrainedModel, side: int
) -> Peak:
    """The peak with ZeRO or FSDP: activations as they are measured on the whole model, the rest computed.

    The whole model has to fit for that, with its gradients and two images, but without an optimizer.
    """
    held = torch.cuda.memory_allocated(args.device)  # resident images
    own = sum(p.nbytes * (2 if p.requires_grad else 1) for p in model.parameters())
    shards = ParallelismConfig().dp_shard_size if strategy == "hsdp" else args.world_size
    # Only ZeRO-3 has an arithmetic of its own for what lies on the host; without it there is room left.
    name = strategy if strategy == "zero3_offload" else strategy.removesuffix("_offload")
    tensors, optim, share = memory.Tensors.of(model), str(config.training["optim"]), batch.sizes[-1]

    @functools.cache
    def measured(images: int) -> int | None:
        whole = step_peak(config, args, model, side, images, optimizer=False)
        return None if whole is None else whole - held - own

    def peak(images: int) -> int | None:
        one, two = measured(1), measured(2)
        if one is None or two is None:
            return None
        state = memory.state(
            name, tensors, shards=shards, precision=config.precision, optim=optim, accumulation=share // images
        )
        return held + state.total + one + (images - 1) * max(0, two - one)

    return peak
