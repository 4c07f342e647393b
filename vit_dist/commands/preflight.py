"""What can be told of a run before processes are started for it: wrong settings, a missing folder.

python -m vit_dist.commands.preflight [RECIPE] [--flag value ...]

Writes nothing, and reads no image and no weights; asks the hub only for what is not in the cache. Prints the run folder
on the last line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vit_dist import bundle, console, entry
from vit_dist.commands import checks
from vit_dist.config import Config, load_config
from vit_dist.run import attempts, folder_choice


def check(config: Config) -> Config:
    """The settings with the folder that the run would have.

    Raises UserError for what every process of the run would stumble over, one after another or all at once.
    """
    bundle.check(config)
    config = folder_choice.resolved(config)
    attempts.check(config)
    attempts.check_settings(config)
    checks.check_source(config)
    checks.check_model(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run `check`; exit codes as `entry.run` has them."""

    def body() -> int:
        config = check(load_config(sys.argv[1:] if argv is None else argv))
        if config.output_dir_note:
            console.say(f"run folder: {config.output_dir}; {config.output_dir_note}")
        console.say(os.path.abspath(config.output_dir))
        return 0

    return entry.run(body, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
