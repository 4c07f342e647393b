"""Sweeps: one recipe under many settings, each member a run of its own with a folder of its own.

vit-dist sweep configs/sweeps/lr.yaml               # the members, what became of them, how to start them
vit-dist sweep configs/sweeps/lr.yaml --run 3       # train member 3 on this machine, as `vit-dist train` would

    recipe: digits                                  # as `vit-dist train RECIPE` has it; optional
    name: lr                                        # default: the file's name
    grid: {learning_rate: [1e-4, 3e-4], seed: [1, 2]}   # every combination, the first key changes slowest
    runs: [{learning_rate: 1e-3, warmup_steps: 0.1}]    # further members, one by one

Flags behind the file are for all members and win; `--output_dir` is the folder of their folders.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from vit_dist import settings_file
from vit_dist.errors import UserError
from vit_dist.parser import Parser
from vit_dist.settings_file import Setting
from vit_dist.terminal import show

if TYPE_CHECKING:
    from vit_dist.config import Config

# Nothing above loads PyTorch or transformers: a batch job asks for a member's arguments on every start of every node.

KEYS = ("recipe", "name", "grid", "runs")
OWN = ("output_dir", "run_name")  # made from a member's settings
MOST_MEMBERS = 10_000
LONGEST_NAME = 200  # bytes; file systems end at 255, and `.previous` is appended


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file has it; whether training would take the settings is not checked yet."""

    path: Path
    name: str
    recipe: str | None
    members: list[dict[str, Setting]]  # a member's number is its place

    def member_name(self, number: int) -> str:
        """Of its settings, and fit to be a folder's."""
        settings = self.members[number]
        name = ",".join(f"{key}={'+'.join(settings_file.texts(setting.node))}" for key, setting in settings.items())
        return re.sub(r"[^\w.,=+-]+", "-", name)

    def arguments(self, number: int, flags: Sequence[str] = ()) -> list[str]:
        """What `vit_dist.train` gets for a member; `flags` are those for all members. Raises UserError if there is no
        such member.
        """
        if not 0 <= number < len(self.members):
            raise UserError(f"{self.path} has no member {number}; its members are 0 to {len(self.members) - 1}")
        folder, flags = _root(self.name, flags)
        name = self.member_name(number)
        words = [self.recipe] if self.recipe else []
        for key, setting in self.members[number].items():
            texts = settings_file.texts(setting.node)
            words += [f"--{key}={texts[0]}"] if len(texts) == 1 else [f"--{key}", *texts]
        return [*words, f"--output_dir={folder / name}", f"--run_name={name}", *flags]


def read(path: Path) -> Sweep:
    """Raises UserError, with file and line, for a file that is no sweep."""
    if not path.is_file():
        raise UserError(f"there is no sweep file {path}; configs/sweeps/ has one to begin with")
    found = {setting.key: setting for setting in settings_file.read(path, "a sweep")}
    for key, setting in found.items():
        if key not in KEYS:
            raise UserError(
                f"{setting.where}: unknown key {key!r}: a sweep has {', '.join(KEYS)}; settings stand in grid or "
                "runs, and those that all members share in the recipe or in flags"
            )
    name = _word(found["name"]) if "name" in found else path.stem
    if "/" in name or name[:1] in ("", "."):
        raise UserError(f"{found['name'].where if 'name' in found else path}: name {name!r} cannot be a folder's name")
    members = [*_grid(found.get("grid"), path), *_runs(found.get("runs"), path)]
    if not members:
        raise UserError(f"{path} has no members: give it a grid (setting: [values]) or runs (a list of settings)")
    sweep = Sweep(path, name, _word(found["recipe"]) if "recipe" in found else None, members)
    names: dict[str, int] = {}
    for number in range(len(members)):
        name = sweep.member_name(number)
        if name in names:
            raise UserError(f"{path}: members {names[name]} and {number} would be the same run, {name}")
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"{path}: member {number} has too many settings to be named after them; put what all members share in "
                "the recipe or in flags"
            )
        names[name] = number
    return sweep


def check(sweep: Sweep, flags: Sequence[str] = ()) -> list[Config]:
    """The members' resolved settings. Raises UserError, one line with all that training would refuse."""
    from vit_dist.config import WrongSettings, check_settings, load_config

    written = {setting for settings in sweep.members for setting in settings.values()}
    check_settings(sorted(written, key=lambda setting: setting.node.start_mark.index))
    configs: list[Config] = []
    problems: dict[str, list[int]] = {}  # message -> members
    for number in range(len(sweep.members)):
        try:
            configs.append(load_config(sweep.arguments(number, flags)))
        except WrongSettings as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(number)
        except UserError as error:
            problems.setdefault(str(error), []).append(number)
    if problems:
        raise UserError("; ".join(_of_members(sweep, *problem) for problem in problems.items()))
    return configs


def _of_members(sweep: Sweep, message: str, numbers: list[int]) -> str:
    if len(numbers) == len(sweep.members):
        return message
    return f"{sweep.path}: member{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {message}"


def table(sweep: Sweep, configs: Sequence[Config], flags: Sequence[str] = ()) -> list[str]:
    """The members, what their run folders tell of them, and how to start them."""
    from vit_dist import console
    from vit_dist.run.run_folder import RESULTS, STATUS, read_json

    keys = list(dict.fromkeys(key for settings in sweep.members for key in settings))
    rows = [["member", *keys, "state", "validation", "test"]]
    for number, (settings, config) in enumerate(zip(sweep.members, configs, strict=True)):
        results = read_json(config.output_dir / RESULTS)
        rows.append([
            str(number),
            *(" ".join(settings_file.texts(settings[key].node)) if key in settings else "-" for key in keys),
            read_json(config.output_dir / STATUS).get("state", "not started"),
            *(f"{results[key]:.4f}" if key in results else "-" for key in ("eval_accuracy", "test_accuracy")),
        ])  # fmt: skip
    command = shlex.join(["vit-dist", "sweep", str(sweep.path), *flags])
    batch = shlex.join(["vit-dist", "slurm", "sweep", str(sweep.path), *flags])
    return [
        f"sweep {sweep.name}: {len(sweep.members)} members, folders in {configs[0].output_dir.parent}",
        *console.aligned(rows),
        f"one of them here:      {command} --run NUMBER",
        f"all of them, by Slurm: {batch}",
    ]


def main(argv: Sequence[str] | None = None, train: Callable[[list[str]], int] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend. `train` starts a member; by default in this process."""
    try:
        asked, flags = _parser().parse_known_args(argv)
        flags = [flag for flag in flags if flag != "--"]
        sweep = read(asked.sweep)
        if asked.member is not None:
            sys.stdout.write("".join(f"{word}\0" for word in sweep.arguments(asked.member, flags)))
        elif asked.count:
            sys.stdout.write(f"{len(sweep.members)}\n")
        elif asked.name:
            sys.stdout.write(f"{sweep.name}\n")
        elif asked.run is not None:
            arguments = sweep.arguments(asked.run, flags)
            os.environ.setdefault("WANDB_RUN_GROUP", sweep.name)
            if train is not None:
                return train(arguments)
            from vit_dist.train import main as train_here

            return train_here(arguments)
        else:
            show(table(sweep, check(sweep, flags), flags))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="vit-dist sweep",
        usage="vit-dist sweep SWEEP.yaml [--run N | --count | --name | --member N] [--flag value ...]",
        description="Show the members of a sweep and what became of them, or train one. All other flags are those of "
        "`vit-dist train`, for every member; --output_dir is the folder of their folders (default: runs/<name>).",
        allow_abbrev=False,
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="the sweep's file: recipe, name, grid, runs")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--run", type=int, metavar="N", help="train member N on this machine, on all visible GPUs")
    action.add_argument("--count", action="store_true", help="print the number of members")
    action.add_argument("--name", action="store_true", help="print the sweep's name, which is its group at W&B")
    action.add_argument(
        "--member", type=int, metavar="N", help="print member N's arguments of training, each ended by NUL"
    )
    return parser


def _root(name: str, flags: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of the members' folders, and the flags without the one that says it."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / name)
    asked, others = parser.parse_known_args(list(flags))
    return asked.output_dir, others


def _word(setting: Setting) -> str:
    if not isinstance(setting.node, yaml.ScalarNode) or settings_file.is_null(setting.node) or not setting.node.value:
        raise UserError(f"{setting.where}: {setting.key} takes one word")
    return setting.node.value


def _grid(grid: Setting | None, path: Path) -> list[dict[str, Setting]]:
    if grid is None:
        return []
    if not isinstance(grid.node, yaml.MappingNode):
        raise UserError(f"{grid.where}: grid is a list of `setting: [value, value, ...]` lines")
    choices: list[list[Setting]] = []
    for key, node, where in settings_file.entries(grid.node, path):
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise UserError(f"{where}: {key} takes a list of values in a grid: [value, value, ...]")
        choices.append([_setting(Setting(key, value, where)) for value in node.value])
    if (count := math.prod(map(len, choices))) > MOST_MEMBERS:
        raise UserError(f"{grid.where}: the grid has {count:,} members; at most {MOST_MEMBERS:,}")
    return [{setting.key: setting for setting in chosen} for chosen in itertools.product(*choices) if chosen]


def _runs(runs: Setting | None, path: Path) -> list[dict[str, Setting]]:
    if runs is None:
        return []
    if not isinstance(runs.node, yaml.SequenceNode):
        raise UserError(f"{runs.where}: runs is a list of members, each with its settings: - {{seed: 1}}")
    members = []
    for node in runs.node.value:
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise UserError(f"{path}:{node.start_mark.line + 1}: a member of runs has settings: - {{seed: 1}}")
        members.append({setting.key: _setting(setting) for setting in settings_file.entries(node, path)})
    return members


def _setting(setting: Setting) -> Setting:
    key, node, where = setting
    if key in OWN:
        raise UserError(
            f"{where}: {key} is made from each member's settings; --output_dir moves the folder of them all"
        )
    if settings_file.is_null(node) or (isinstance(node, yaml.SequenceNode) and not node.value):
        raise UserError(f"{where}: {key} needs a value")
    return setting


if __name__ == "__main__":
    sys.exit(main())
