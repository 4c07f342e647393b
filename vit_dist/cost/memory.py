"""Bytes that a strategy keeps on one device: an arithmetic of shapes, nothing is allocated.

State is exact up to DeepSpeed's padding (tests/test_strategies.py compares it with what real runs hold on each rank).
Activations are those that autograd saves in a forward of the real model class on tensors without storage.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import PreTrainedModel

from vit_dist.errors import UserError
from vit_dist.strategy import PERSISTENT, REDUCE_BUCKET

FP32 = 4
GROUPS = 2  # the Trainer's optimizer has two: with weight decay and without; DeepSpeed keeps a flat tensor of each
USABLE = 0.92  # of a device's memory: fragmentation takes the rest
RESERVE = 1_000_000_000  # CUDA context, cuBLAS and NCCL workspaces; not measured here


@dataclass(frozen=True)
class Tensors:
    """The sizes of a model's parameters."""

    trained: tuple[tuple[int, ...], ...]  # shapes
    frozen: tuple[tuple[int, ...], ...]
    largest_block: int  # elements that are gathered together
    groups: int = 1  # what is gathered one by one: the blocks, and the rest together

    @classmethod
    def of(cls, model: PreTrainedModel) -> Tensors:
        shapes: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for parameter in model.parameters():
            shapes[parameter.requires_grad].append(tuple(parameter.shape))
        names = model._no_split_modules or ()
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks or [model])
        return cls(tuple(shapes[True]), tuple(shapes[False]), largest, len(blocks) + 1)

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.trained + self.frozen))

    @property
    def trained_parameters(self) -> int:
        return sum(map(math.prod, self.trained))


@dataclass(frozen=True)
class State:
    """Bytes on the device of the rank that holds most, between backward and optimizer step, gradients between
    micro-batches where they are more; `host` for what is not on it."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int  # what is gathered or reduced at a time
    host: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def state(strategy: str, tensors: Tensors, *, shards: int, precision: str, optim: str, accumulation: int = 1) -> State:
    """`shards`: processes that share what is sharded (with hsdp: those of one replica).

    Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 3, with the differences of the implementations:
    DeepSpeed keeps a float32 master copy also in float32 runs, FSDP2 cuts along the first dimension.
    """
    everything, trained = tensors.trained + tensors.frozen, tensors.trained
    slots = _slots(optim)
    steps = FP32 * len(trained) if slots else 0  # PyTorch counts steps in a tensor for each parameter
    if strategy in ("single", "ddp"):
        whole, mine = _whole(everything), _whole(trained)
        return State(FP32 * whole, FP32 * mine, int(FP32 * slots * mine) + steps, 0)
    if strategy in ("fsdp2", "hsdp"):
        # Weights and gradients stay float32; a block is gathered in the run's precision while the next is on its way.
        size = FP32 if precision == "fp32" else 2
        mine, shard = _rows(trained, shards), _rows(everything, shards)
        # Scattered in a step's last backward only: between micro-batches they are whole, in the run's precision.
        gradients = max(FP32 * mine, size * _whole(trained) if accumulation > 1 else 0)
        return State(FP32 * shard, gradients, int(FP32 * slots * mine) + steps, 2 * size * tensors.largest_block)
    size = FP32 if precision == "fp32" else 2
    steps = FP32 * GROUPS if slots else 0
    if strategy in ("zero1", "zero2"):
        mine = -(-_whole(trained) // shards)
        # ZeRO-1 reduces at the end of a step only, and has whole gradients between micro-batches.
        gradients = size * (_whole(trained) if strategy == "zero1" and accumulation > 1 else mine)
        bucket = size * min(REDUCE_BUCKET, _whole(trained))
        return State(size * _whole(everything), gradients, int(FP32 * (slots + 1) * mine) + steps, bucket)
    mine, shard = _ceil(trained, shards), _ceil(everything, shards)
    small = _whole(shape for shape in everything if math.prod(shape) < PERSISTENT)
    optimizer = int(FP32 * (slots + 1) * mine) + steps
    buffers = size * (min(REDUCE_BUCKET, _whole(trained)) + 2 * tensors.largest_block)
    if strategy == "zero3_offload":
        return State(size * (shard + small), 0, 0, buffers, host=optimizer + FP32 * mine)
    return State(size * (shard + small), size * mine, optimizer, buffers)


def checkpoint_bytes(strategy: str, tensors: Tensors, *, precision: str, optim: str) -> int:
    """Of one checkpoint folder, all ranks together."""
    whole, trained, slots = _whole(tensors.trained + tensors.frozen), _whole(tensors.trained), _slots(optim)
    if strategy.startswith("zero"):
        size = FP32 if precision == "fp32" else 2
        # model.safetensors; the engine's own copy of the weights; master weights and moments
        return int(2 * size * whole + FP32 * (slots + 1) * trained)
    return int(FP32 * (whole + slots * trained))


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward leaves for the backward: `fixed` (weights cast by autocast) and for each image."""

    fixed: int
    per_image: int

    def of(self, images: int) -> int:
        return self.fixed + images * self.per_image


def activations(model: PreTrainedModel, side: int, precision: str, checkpointing: bool) -> Activations:
    """`model` on the meta device, for images of `side` pixels. Measured for one and for two images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = (_saved(model, images, side, precision, checkpointing) for images in (1, 2))
    per_image = two - one
    if checkpointing:  # what is kept between blocks, and one block at a time while it is computed again
        names = model._no_split_modules or ()
        blocks = sum(type(module).__name__ in names for module in model.modules()) or 1
        once, twice = (_saved(model, images, side, precision, False) for images in (1, 2))
        per_image += (twice - once) // blocks
    return Activations(max(0, 2 * one - two), per_image)


def _saved(model: PreTrainedModel, images: int, side: int, precision: str, checkpointing: bool) -> int:
    """Bytes of the distinct storages that autograd saves, the parameters' own left out."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    model_copy = copy.deepcopy(model).train()
    if checkpointing and not model_copy.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no activation checkpointing; leave it out")
    if checkpointing:
        model_copy.gradient_checkpointing_enable()
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(storage)  # else its identity could be given to another
        return tensor

    alive: list[torch.UntypedStorage] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model_copy.to_empty(device="cpu")
        own = {parameter.untyped_storage()._cdata for parameter in model_copy.parameters()}
        with saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model_copy(pixel_values=torch.zeros(images, 3, side, side)).logits
            F.cross_entropy(logits.float(), torch.zeros(images, dtype=torch.long))
    return sum(saved.values())


def _slots(optim: str) -> float:
    """Values of the parameter's size that the optimizer keeps: Adam's two moments and so on."""
    if "8bit" in optim:
        return 0.5
    if "adafactor" in optim:
        return 0
    # SGD's is the momentum, which `schedule.sgd_arguments` sets.
    return 1 if any(name in optim for name in ("lion", "rmsprop", "adagrad", "sgd")) else 2


def _whole(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _ceil(shapes: Iterable[tuple[int, ...]], shards: int) -> int:
    return sum(-(-math.prod(shape) // shards) for shape in shapes)


def _rows(shapes: Iterable[tuple[int, ...]], shards: int) -> int:
    return sum(-(-shape[0] // shards) * math.prod(shape[1:]) for shape in shapes if shape)
