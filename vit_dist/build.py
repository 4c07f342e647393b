"""From settings to a trainer: the data, the model, what makes its step fast, the metrics. For train and bench."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

from transformers import TrainingArguments

from vit_dist import blocks, console, distributed, strategy
from vit_dist.arguments import build_arguments
from vit_dist.auto_batch import find_batch
from vit_dist.batch import Batch
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import Config
from vit_dist.cost.flops import count_flops
from vit_dist.cost.peak import matmul_flops
from vit_dist.data import shared_memory
from vit_dist.data.pipeline import ImageData, build_data
from vit_dist.data.pixels import Pixels
from vit_dist.data.resident import place_images
from vit_dist.data.workers import choose_workers
from vit_dist.environment import integer
from vit_dist.errors import UserError
from vit_dist.metrics import ClassificationMetrics
from vit_dist.model import BuiltModel, build_model
from vit_dist.trainer import ExactTrainer, build_trainer, require_metric


@dataclass(frozen=True)
class Built:
    batch: Batch
    data: ImageData
    model: BuiltModel
    metrics: ClassificationMetrics
    trainer: ExactTrainer
    compilation: blocks.Compilation
    image_source: str  # where pixels are made, as `--image_source` has it


def build(
    config: Config,
    args: TrainingArguments,
    batch: Batch,
    asked: str,
    writer: CheckpointWriter,
    kept: int | None = None,
    resumed_image_source: str | None = None,
) -> Built:
    """Every rank, with the same settings; nothing is written yet. `asked` is the strategy; a run that goes on has
    `resumed_image_source` an image source.

    `batch` is split anew if the micro-batch is to be found, and `args` are made again for it; `kept`: see `find_batch`.
    Raises UserError for what is wrong with data, model or training arguments.
    """
    compilation = blocks.choose_compilation(config.training, asked, args.device)
    data = build_data(config.data, config.model, config.data_seed, console.progress)
    distributed.agree({"data": data.record["fingerprint"]}, "do all nodes see the same files?")
    data, pixels, source = _placed(config, args, data, batch.total, resumed_image_source)
    model = build_model(config.model, data.classes, data.input_size, seed=args.seed, cache_dir=config.data.cache_dir)
    metrics = ClassificationMetrics(data.classes, config.run.metrics)
    require_metric(config.training["metric_for_best_model"], metrics)
    strategy.set_fsdp_wrap_policy(model.model)
    if config.finds_batch:
        batch = find_batch(config, args, batch, asked, model.model, data.input_size, kept)
        args = build_arguments(config, batch)  # DeepSpeed is told the micro-batch when they are made
        strategy.prepare(args)
    if source == "resident":
        args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_pin_memory = 0, False, False
        args.dataloader_prefetch_factor = None
    elif args.device.type == "cuda" and config.training["dataloader_num_workers"] is None:
        flop = count_flops(model.model, data.input_size).forward
        peak = matmul_flops(args.device, config.precision)
        args.dataloader_num_workers, note = choose_workers(data.train, flop, peak, args.dataloader_num_workers)
        data.description.append(note)
    _fit_shared_memory(config, args, data, pixels)
    if args.dataloader_num_workers > (cores := distributed.cores()):
        data.description.append(
            f"{args.dataloader_num_workers} data loading processes on {cores} cores: more of them slow each other"
        )
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # the same, each time it is made
    blocks.optimize_model(model.model, pixels, compilation, config.model.bf16_residual, args.device)
    trainer = build_trainer(config, args, data, model.model, metrics, writer, pixels, compilation.on)
    return Built(batch, data, model, metrics, trainer, compilation, source)


def _fit_shared_memory(config: Config, args: TrainingArguments, data: ImageData, pixels: Pixels | None) -> None:
    """Start no more data loading processes than /dev/shm has room for (all ranks participate): where it is too small
    for a batch, the run would stand still.

    Raises UserError on every rank if the user asked for that many.
    """
    processes = integer("LOCAL_WORLD_SIZE", 1, least=1)
    found = distributed.gather(shared_memory.room(args, data.input_size, pixels is not None, processes))
    tight = [room for room in found if room is not None and room.fitting < room.workers]
    if not tight:
        return
    tightest = min(tight, key=lambda room: room.fitting)
    if config.training["dataloader_num_workers"] is not None:
        raise UserError(f"{tightest.needed}: {shared_memory.CURE}, or --dataloader_num_workers {tightest.fitting}")
    data.description.append(f"{tightest.fitting} data loading processes: {tightest.needed}; {shared_memory.CURE}")
    args.dataloader_num_workers = tightest.fitting
    if not tightest.fitting:
        args.dataloader_persistent_workers, args.dataloader_prefetch_factor = False, None


def _placed(
    config: Config, args: TrainingArguments, data: ImageData, images: int, resumed_image_source: str | None
) -> tuple[ImageData, Pixels | None, str]:
    """`place_images`. A run that goes on has the source that it began with: pixels differ a little between them.

    `images` are those of a step.
    """
    asked = config.data.image_source
    epochs = args.max_steps * images / len(data.train) if args.max_steps > 0 else args.num_train_epochs
    try:
        return place_images(
            data,
            resumed_image_source if resumed_image_source and asked == "auto" else asked,
            args.device,
            args.dataloader_num_workers,
            cache_dir=config.data.cache_dir,
            epochs=epochs,
            progress=partial(console.progress, doing="caching images"),
        )
    except UserError as error:
        if not resumed_image_source or asked != "auto":
            raise
        raise UserError(
            f"this run uses image_source={resumed_image_source}, which this machine does not support: {error}. Another "
            "source makes slightly other pixels; to go on with one: --image_source stream --allow_change image_source"
        ) from None
