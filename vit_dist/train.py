"""Fine-tune a Vision Transformer.

python -m vit_dist.train                                      # one device: a GPU if there is one, else the CPU
python -m vit_dist.train configs/recipes/cifar10.yaml --learning_rate 3e-5
vit-dist train --data ~/photos                                # one process per visible GPU
accelerate launch --num_processes 8 -m vit_dist.train --data ~/photos
torchrun --nproc-per-node 8 -m vit_dist.train configs/recipes/cifar10.yaml

The same command again continues the run where it stopped. --help lists all options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vit_dist import console, distributed, entry, run_folder
from vit_dist.config import Config, load_config


def train(config: Config) -> None:
    """The order of events of a run; every rank runs it. Raises UserError for what the user can mend."""
    # Slow to import; a mistake in the command should be told at once.
    import torch

    from vit_dist import results, strategy, summary, trackers
    from vit_dist.data.pipeline import build_data
    from vit_dist.metrics import ClassificationMetrics
    from vit_dist.model import build_model
    from vit_dist.trainer import build_arguments, build_trainer, require_metric

    idle_gpus = distributed.use_one_device()
    strategy.check_owners(config.precision)
    args = build_arguments(config)  # joins the process group
    distributed.check_launch(args)
    asked = strategy.prepare(args)
    attempt = distributed.on_main(lambda: run_folder.inspect(config, asked, args.world_size))
    if attempt.finished:
        console.say(attempt.finished)
        return

    data = build_data(config.data, config.model, config.data_seed, console.progress)
    distributed.agree("data", data.record["fingerprint"])
    built = build_model(config.model, data.classes, data.input_size, seed=args.seed, cache_dir=config.data.cache_dir)
    metrics = ClassificationMetrics(data.classes, config.run.metrics)
    require_metric(config.training["metric_for_best_model"], metrics)
    strategy.mark_blocks(built.model)
    trainer = build_trainer(config, args, data, built.model, metrics)
    strategy.confirm(asked, trainer.accelerator)

    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    facts = run_folder.facts(data.record, built.revision, args.world_size, trainer.batches.global_batch, asked, device)
    distributed.on_main(lambda: run_folder.open_attempt(config, attempt, data.classes, facts))
    with run_folder.failure_recorded(config.output_dir):
        reporting = trackers.open_trackers(config, attempt, facts, trainer) if args.process_index == 0 else None
        console.say(*summary.describe(config, attempt, data, built, trainer, asked, idle_gpus, reporting))
        output = trainer.train(resume_from_checkpoint=attempt.checkpoint)
        results.conclude(config, trainer, data, metrics, output.metrics, facts, reporting)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train`; exit codes as `entry.run` has them."""

    def body() -> int:
        train(load_config(sys.argv[1:] if argv is None else argv))
        return 0

    return entry.run(
        body, "interrupted; the same command goes on from the last checkpoint, or anew if there is none yet"
    )


if __name__ == "__main__":
    sys.exit(main())
