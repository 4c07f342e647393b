"""The command line of a command that has options of its own, beside those of `vit-dist train`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vit_dist.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of leaving; `prog` is the command as it is typed."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")
