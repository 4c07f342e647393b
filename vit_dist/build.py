"""From settings to a trainer: the data, the model, what makes its step fast, the metrics. For train and bench."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from vit_dist import blocks, console, distributed, strategy
from vit_dist.arguments import build_arguments
from vit_dist.auto_batch import find_batch
from vit_dist.batch import Batch
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import Config
from vit_dist.data.pipeline import ImageData, build_data
from vit_dist.data.resident import place_images
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


def build(
    config: Config,
    args: TrainingArguments,
    batch: Batch,
    asked: str,
    writer: CheckpointWriter,
    kept: int | None = None,
) -> Built:
    """Every rank, with the same settings; nothing is written yet. `asked` is the strategy.

    `batch` is split anew if the micro-batch is to be found, and `args` are made again for it; `kept`: see `find_batch`.
    Raises UserError for what is wrong with data, model or training arguments.
    """
    data = build_data(config.data, config.model, config.data_seed, console.progress)
    distributed.agree({"data": data.record["fingerprint"]}, "do all nodes see the same files?")
    data, pixels, resident = place_images(data, config.data.image_source, args.device, args.dataloader_num_workers)
    model = build_model(config.model, data.classes, data.input_size, seed=args.seed, cache_dir=config.data.cache_dir)
    metrics = ClassificationMetrics(data.classes, config.run.metrics)
    require_metric(config.training["metric_for_best_model"], metrics)
    strategy.mark_blocks(model.model)
    if config.finds_batch:
        batch = find_batch(config, args, batch, asked, model.model, data.input_size, kept)
        args = build_arguments(config, batch)  # DeepSpeed is told the micro-batch when they are made
        strategy.prepare(args)
    if resident:
        args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_pin_memory = 0, False, False
        args.dataloader_prefetch_factor = None
    compilation = blocks.choose_compilation(config.training, asked, args.device)
    blocks.speed_up(model.model, pixels, compilation, config.model.bf16_residual, args.device)
    trainer = build_trainer(config, args, data, model.model, metrics, writer, pixels, compilation.on)
    return Built(batch, data, model, metrics, trainer, compilation)
