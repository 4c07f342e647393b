"""What can be told of a run before processes are started for it: wrong settings, a missing folder.

python -m vit_dist.preflight [RECIPE] [--flag value ...]

Writes nothing and asks no network. Prints the run folder on the last line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_dist import attempts, bundle, console, entry
from vit_dist.config import Config, load_config
from vit_dist.data.source import find, looks_like_path
from vit_dist.errors import UserError


def check(config: Config) -> None:
    """Raises UserError for what every process of the run would stumble over, one after another or all at once."""
    bundle.check(config)
    attempts.check(config)
    find(config.data.data)
    model = Path(config.model.model).expanduser()
    if looks_like_path(config.model.model) and not model.is_dir():
        raise UserError(f"--model {config.model.model}: there is no such folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `check`; exit codes as `entry.run` has them."""

    def body() -> int:
        config = load_config(sys.argv[1:] if argv is None else argv)
        check(config)
        console.say(os.path.abspath(config.output_dir))
        return 0

    return entry.run(body, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
