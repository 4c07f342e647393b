"""From settings to a trainer: the data, the model, what makes its step fast, the metrics. For train and bench."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import TrainingArguments

from vit_dist import blocks, console, distributed, strategy
from vit_dist.checkpoint.writer import CheckpointWriter
from vit_dist.config import Config
from vit_dist.data.pipeline import ImageData, build_data
from vit_dist.data.pixels import Pixels
from vit_dist.data.resident import place_images
from vit_dist.errors import UserError
from vit_dist.metrics import ClassificationMetrics
from vit_dist.model import BuiltModel, build_model
from vit_dist.trainer import ExactTrainer, build_trainer, require_metric


@dataclass(frozen=True)
class Built:
    data: ImageData
    model: BuiltModel
    metrics: ClassificationMetrics
    trainer: ExactTrainer
    compilation: blocks.Compilation
    image_source: str  # where pixels are made, as `--image_source` has it


def build(
    config: Config, args: TrainingArguments, asked: str, writer: CheckpointWriter, begun_with: str | None = None
) -> Built:
    """Every rank, with the same settings; nothing is written yet. `asked` is the strategy; a run that goes on has
    `begun_with` an image source.

    Raises UserError for what is wrong with data, model or training arguments.
    """
    data = build_data(config.data, config.model, config.data_seed, console.progress)
    distributed.agree({"data": data.record["fingerprint"]}, "do all nodes see the same files?")
    data, pixels, source = _placed(config, args, data, begun_with)
    if source == "resident":
        args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_pin_memory = 0, False, False
        args.dataloader_prefetch_factor = None
    model = build_model(config.model, data.classes, data.input_size, seed=args.seed, cache_dir=config.data.cache_dir)
    metrics = ClassificationMetrics(data.classes, config.run.metrics)
    require_metric(config.training["metric_for_best_model"], metrics)
    strategy.mark_blocks(model.model)
    compilation = blocks.choose_compilation(config.training, asked, args.device)
    blocks.speed_up(model.model, pixels, compilation, config.model.bf16_residual, args.device)
    trainer = build_trainer(config, args, data, model.model, metrics, writer, pixels, compilation.on)
    return Built(data, model, metrics, trainer, compilation, source)


def _placed(
    config: Config, args: TrainingArguments, data: ImageData, begun_with: str | None
) -> tuple[ImageData, Pixels | None, str]:
    """`place_images`. A run that goes on has the source that it began with: pixels differ a little between them."""
    asked = config.data.image_source
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    epochs = args.max_steps * batch / len(data.train) if args.max_steps > 0 else args.num_train_epochs
    try:
        return place_images(
            data,
            begun_with if begun_with and asked == "auto" else asked,
            args.device,
            args.dataloader_num_workers,
            cache_dir=config.data.cache_dir,
            epochs=epochs,
            progress=partial(console.progress, doing="caching images"),
        )
    except UserError as error:
        if not begun_with or asked != "auto":
            raise
        raise UserError(
            f"the run began with image_source {begun_with}, which cannot be here: {error}. Another one makes slightly "
            "other pixels; to go on with it all the same: --image_source stream --allow_change image_source"
        ) from None
