"""Fine-tune a Vision Transformer.

python -m vit_dist.train                                      # one device: a GPU if there is one, else the CPU
python -m vit_dist.train configs/recipes/cifar10.yaml --learning_rate 3e-5
vit-dist train --data ~/photos                                # one process per visible GPU
accelerate launch --num_processes 8 -m vit_dist.train --data ~/photos
torchrun --nproc-per-node 8 -m vit_dist.train configs/recipes/cifar10.yaml

The same command again continues the run where it stopped. --help lists all options.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_dist import __version__, first_look
from vit_dist.threads import spin_briefly

if __name__ == "__main__":  # before the next imports, which take seconds and load OpenMP
    spin_briefly()
    if (code := first_look.tell(sys.argv[1:], __version__)) is not None:
        sys.exit(code)

from vit_dist import bundle, console, distributed, entry, stop
from vit_dist.batch import Batch, split_batch
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.run import attempts, folder_choice, run_folder
from vit_dist.run.lock import run_lock

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from vit_dist.callbacks.watchdog import Watchdog


def train(config: Config) -> None:
    """The order of events of a run; every rank runs it. Raises UserError for what the user can mend."""
    # Slow to import; a mistake in the command should be told at once.
    from vit_dist import strategy
    from vit_dist.arguments import build_arguments
    from vit_dist.run import failure

    stop.install_handlers(config.max_time)
    bundle.check(config)
    with contextlib.ExitStack() as held:
        config = folder_choice.settle(config, held)
        attempts.check(config)
        run_folder.keep_output(config.output_dir, distributed.launched_rank())
        if config.output_dir_note:
            console.say(f"run folder: {config.output_dir}; {config.output_dir_note}")
        idle_gpus = distributed.use_one_device()
        strategy.reject_launcher_overrides(config.precision)
        batch = split_batch(config, distributed.launched_world_size(), attempts.batch_to_keep(config))
        args = build_arguments(config, batch)  # joins the process group
        distributed.check_launch(args)
        rank_table, allreduce_report = distributed.check_world(args)
        if args.world_size > 1:
            console.say(*console.aligned(rank_table), allreduce_report)
        asked = strategy.prepare(args)
        facts = attempts.common_facts(config, asked, args.device.type) | {"batch": str(batch)}
        distributed.agree(facts, "start all of them with one command, in one environment")
        if not folder_choice.is_held(config):
            distributed.on_main(lambda: own(config, held))
        attempt = distributed.on_main(lambda: attempts.inspect(config, asked, args.world_size))
        if attempt.finished:
            distributed.on_main(lambda: require_same_data(config))
            console.say(attempt.finished)
            return
        attempt.processes = distributed.gather((socket.gethostname(), os.getpid()))
        watchdog = held.enter_context(failure.watchdog(config, attempt))
        with failure.interruption_recorded(config.output_dir, attempt):
            fit(config, args, batch, asked, attempt, watchdog, idle_gpus, held)


def own(config: Config, held: contextlib.ExitStack) -> None:
    """The run folder, for this process alone, until `held` ends."""
    held.enter_context(run_lock(config.output_dir, settings=folder_choice.digest(config)))


def require_same_data(config: Config) -> None:
    """On rank 0, for a complete run. Raises UserError if its images have changed; says so if they cannot be read.

    Data of the hub are not read: their revision is a setting.
    """
    from vit_dist.data.pipeline import build_data

    if not Path(config.data.data).expanduser().exists():
        return
    try:
        data = build_data(config.data, config.model, config.data_seed, console.progress)
    except UserError as error:
        console.say(f"the data cannot be compared with those of the run: {error.args[0]}")
        return
    attempts.check_data(config.output_dir, data.record)


def fit(
    config: Config,
    args: TrainingArguments,
    batch: Batch,
    asked: str,
    attempt: attempts.Attempt,
    watchdog: Watchdog,
    idle_gpus: int,
    held: contextlib.ExitStack,
) -> None:
    """From the data to the report, in a folder that is ours. `asked` is the strategy; `held` ends with the run."""
    import torch

    from vit_dist import strategy
    from vit_dist.build import build
    from vit_dist.callbacks.profile import Profile
    from vit_dist.checkpoint.writer import CheckpointWriter
    from vit_dist.run import failure, results, summary, trackers

    writer = CheckpointWriter(config, distributed.GlooGroup(), args.process_index, attempt.begins_at or None)
    held.callback(writer.close)  # before the lock is let go
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    kept = distributed.on_main(lambda: attempts.split_to_keep(attempt, batch, asked, device))
    built = build(config, args, batch, asked, writer, kept, attempt.image_source)
    batch, data, trainer = built.batch, built.data, built.trainer
    weights = sum(parameter.nbytes for parameter in built.model.model.parameters())
    distributed.on_main(lambda: writer.require_room(weights))
    trainer.add_callback(watchdog)
    writer.progress = watchdog.touch
    strategy.assert_active(asked, trainer.accelerator)

    facts = distributed.on_main(
        lambda: attempts.facts(
            data.record, built.model.revision, args.world_size, batch.total, asked, device, built.image_source
        )
    )
    if attempt.replaces:
        distributed.on_main(lambda: attempts.archive_run(config, attempt))
        distributed.on_main(lambda: own(config, held))
    attempt = distributed.on_main(lambda: attempts.open_attempt(config, attempt, data.classes, facts))
    trainer.facts = attempts.manifest_facts(attempt, batch)
    if config.run.profile:
        trainer.add_callback(Profile(config.output_dir / "profile", config.run.profile, args.process_index))
    with failure.recorded(config.output_dir, attempt, trainer.failure_context):
        reporting = None
        if args.process_index == 0:
            reporting = trackers.open_trackers(config, attempt, facts, trainer, data.input_size)
            held.callback(reporting.progress.close)
        console.say(*summary.describe(config, attempt, built, batch, asked, idle_gpus, reporting))
        try:
            stop.enter_graceful()
            output = trainer.train(resume_from_checkpoint=attempt.checkpoint)
            results.finalize(config, trainer, data, built.metrics, output.metrics, facts, attempt, reporting)
        except stop.Interrupted as by:
            results.finalize_preempted(config, trainer, by, attempt, reporting)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train`; exit codes as `entry.run` has them."""

    def body() -> int:
        train(load_config(sys.argv[1:] if argv is None else argv))
        return 0

    return entry.run(body, "the same command goes on from the last checkpoint, or anew if there is none yet")


if __name__ == "__main__":
    sys.exit(main())
