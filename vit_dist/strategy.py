"""How the training state is spread over processes: what the launcher's configuration asks for, or a refusal.

The choice is a file in configs/accelerate/; nothing here chooses. Names are those files' names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vit_dist.blocks import repeated_blocks
from vit_dist.environment import integer
from vit_dist.errors import UserError

REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's default, 10 times that, would take 2 GB for a model of 0.3 GB
BY_SHAPE = ("adafactor", "galore", "apollo", "lomo", "muon", "shampoo", "soap")  # optimizers that see matrices
PERSISTENT = 100_000  # elements; ZeRO-3 leaves smaller parameters whole on every rank (DeepSpeed's default)


def reject_launcher_overrides(precision: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a launcher that decides what belongs to the recipe. Call before anything is held.

    `precision` is the recipe's: fp32, bf16 or fp16. Accelerate puts what a flag, its configuration file or the user's
    default file says into the environment, where upstream would take it without a word. Raises UserError.
    """
    said = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ("no", precision):
        raise UserError(
            f"accelerate launch asks for {said} (--mixed_precision, its configuration file, or the user's default "
            f"file), the recipe for {precision}: precision belongs to the recipe; "
            + (f"give --{said} there, or " if said in ("bf16", "fp16") else "")
            + "launch with --mixed_precision no"
        )
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError(
            "accelerate launch asks for compilation (dynamo_backend): that belongs to the recipe; use --torch_compile"
        )


def prepare(args: TrainingArguments, environ: Mapping[str, str] = os.environ) -> str:
    """The strategy that this launch asks for, by name, with the way cleared for it. Call after the arguments,
    each time they are made.

    Raises UserError for a configuration that is not supported.
    """
    deepspeed, fsdp = args.deepspeed_plugin is not None, bool(args.fsdp) or _on(environ, "ACCELERATE_USE_FSDP")
    mesh = ParallelismConfig() if _on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") else None
    if mesh and (mesh.tp_size > 1 or mesh.cp_size > 1 or mesh.sp_size > 1):
        raise UserError(
            "tensor, context and sequence parallelism are not supported: every process trains on its own images"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if (deepspeed or fsdp) and any(name in optim for name in BY_SHAPE):
        raise UserError(
            f"optim={optim} looks at whole matrices, which sharding cuts up: it would train differently or fail; use "
            "adamw_torch_fused or sgd, or the ddp strategy"
        )
    if (deepspeed or fsdp) and args.fp16 and args.device.type == "cpu":
        raise UserError("fp16 needs a GPU with DeepSpeed and FSDP; use --bf16 on CPUs")
    if deepspeed or fsdp:
        return _deepspeed(args) if deepspeed else _fsdp(args, environ, mesh)
    return "ddp" if integer("WORLD_SIZE", 1, environ) > 1 else "single"


def is_sharded(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this launch asks for DeepSpeed or FSDP."""
    return _on(environ, "ACCELERATE_USE_DEEPSPEED") or _on(environ, "ACCELERATE_USE_FSDP")


def _on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")


def _deepspeed(args: TrainingArguments) -> str:
    plugin: Any = args.deepspeed_plugin
    config = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2, 3):
        raise UserError(
            f"DeepSpeed with zero_stage {plugin.zero_stage} shards nothing; use configs/accelerate/ddp.yaml"
        )
    for section, flag in (("optimizer", "--optim"), ("scheduler", "--lr_scheduler_type")):
        if section in config:
            raise UserError(f"the DeepSpeed file has a section {section!r}: that belongs to the recipe; use {flag}")
    if plugin.zero_stage == 3:
        # Without it a ZeRO-3 run ends with weights that only DeepSpeed can read.
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    # With the optimizer on the host Accelerate would put DeepSpeed's Adam in the place of the recipe's optimizer; it is
    # compiled at the first start and does not resume to the bit. PyTorch's fused AdamW runs on the host as well.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config["zero_optimization"].setdefault("reduce_bucket_size", REDUCE_BUCKET)
    if args.device.type == "cpu":
        import deepspeed.ops

        # Otherwise compiled at the first start, for minutes, to make collectives between CPUs faster.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    disable_zero_init()
    offload = {plugin.offload_optimizer_device, plugin.offload_param_device} - {None, "none"}
    return f"zero{plugin.zero_stage}" + ("_offload" if offload else "")


def _fsdp(args: TrainingArguments, environ: Mapping[str, str], mesh: ParallelismConfig | None) -> str:
    plugin = args.fsdp_plugin_args or {}
    version = str(plugin.get("fsdp_version", environ.get("FSDP_VERSION", "1")))
    if version != "2":
        raise UserError(
            f"fsdp_version {version}: only FSDP2 is supported; set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml"
        )
    if plugin.get("cpu_ram_efficient_loading", _on(environ, "FSDP_CPU_RAM_EFFICIENT_LOADING")):
        raise UserError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without weights to check; set it to false"
        )
    if args.world_size == 1:
        raise UserError("fsdp2 has nothing to shard over with one process; start several, or use single")
    if args.device.type == "cpu" and plugin.get("cpu_offload", _on(environ, "FSDP_OFFLOAD_PARAMS")):
        raise UserError("fsdp_offload_params needs GPUs to offload from; set it to false on CPUs")
    if args.device.type == "cpu":
        # Accelerate shards only where it sees GPUs and would otherwise train with DDP; PyTorch shards on CPUs as well.
        # accelerate/state.py, AcceleratorState.__init__; tests/test_strategies.py notices when this stops working.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return "hsdp" if mesh and mesh.dp_replicate_size > 1 else "fsdp2"


def disable_zero_init() -> None:
    """From here on `from_pretrained` loads whole models, also under ZeRO-3.

    Upstream would shard a model while it is being built, and wait for the other processes wherever rank 0 alone loads
    one. Cost: every process holds the weights once in host memory before they are sharded.
    """
    unset_hf_deepspeed_config()


def set_fsdp_wrap_policy(model: PreTrainedModel) -> None:
    """Tell FSDP which modules are gathered together: the repeated blocks, whatever the family calls them.

    Upstream's list (`_no_split_modules`) also has a ViT's embeddings, where Accelerate's FSDP2 fails. A model without
    repeated blocks is sharded as one.
    """
    model._no_split_modules = {type(blocks[0]).__name__ for blocks in repeated_blocks(model)}
    try:
        model.get_input_embeddings()
    except NotImplementedError:  # ConvNeXt, ResNet, SegFormer: Accelerate's FSDP2 asks, and None is an answer it takes
        setattr(model, "get_input_embeddings", lambda: None)  # noqa: B010 mypy knows the method


def assert_active(asked: str, accelerator: Accelerator) -> None:
    """Raises UserError if the run would train with another strategy than the one asked for. Call when it is built."""
    disable_zero_init()  # again: making the Accelerator undid it
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        got = "zero"
        wrong = [line.strip(" -") for line in accelerator.state.deepspeed_plugin.hf_ds_config.mismatches]
        if wrong:
            raise UserError(
                f"the DeepSpeed file and the recipe disagree: {'; '.join(wrong)}; leave it to the recipe (auto)"
            )
    elif kind == DistributedType.FSDP:
        got = "hsdp" if (mesh := accelerator.parallelism_config) and mesh.dp_replicate_size > 1 else "fsdp2"
    else:
        got = "ddp" if accelerator.num_processes > 1 else "single"
    if not asked.startswith(got):
        hint = {
            "fsdp2": "it needs at least two processes",
            "hsdp": "it needs at least two processes",
            "ddp": "start with torchrun or accelerate launch --multi_gpu",
        }.get(asked, "unset ACCELERATE_USE_CPU, which switches DeepSpeed off")
        raise UserError(f"{asked} was asked for, but this launch would train with {got}: {hint}")
