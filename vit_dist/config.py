"""What a run is asked to do: a flat recipe (YAML) and flags, checked alike, flags win.

Every key of a recipe is the name of a flag: ours (see `options`) or a field of
`transformers.TrainingArguments`, as upstream spells it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from vit_dist import first_look, settings_file
from vit_dist.errors import UserError
from vit_dist.first_look import find_recipe, shipped_recipes
from vit_dist.launch.topology import FLAGS as launch_flags
from vit_dist.options import (
    ALIASES,
    AUTO,
    RANGES,
    REFUSED,
    RENAMED,
    SECRET_KEYS,
    STAGES,
    TRAINING_DEFAULTS,
    WITHOUT_EFFECT,
    DataOptions,
    ModelOptions,
    RunOptions,
    ScalingOptions,
)
from vit_dist.settings_file import Setting
from vit_dist.terminal import one_line

DEFAULT_RECIPE = "digits"
OF_ONE_START = ("fresh", "resume_from_checkpoint", "allow_change")  # not of the run


class WrongSettings(UserError):
    """All `problems` of a recipe and flags in one line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(_all_of(problems))
        self.problems = problems


@dataclass(frozen=True)
class Config:
    """A run's resolved settings."""

    data: DataOptions
    model: ModelOptions
    scaling: ScalingOptions
    run: RunOptions
    training: dict[str, Any]  # every `TrainingArguments` field
    source: str  # where the settings came from, for the plan
    output_dir_given: bool = True  # else `run.folder_choice` finds a folder beside the default one
    output_dir_note: str = ""  # why it is not the default one

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])

    @property
    def logging_dir(self) -> Path:
        """Where TensorBoard logs go."""
        return Path(self.run.logging_dir) if self.run.logging_dir else self.output_dir / "logs"

    @property
    def max_time(self) -> float | None:
        """Seconds."""
        return None if self.run.max_time is None else parse_duration("max_time", self.run.max_time)

    @property
    def hang_timeout(self) -> float:
        """Seconds; 0 for never."""
        return parse_duration("hang_timeout", self.run.hang_timeout)

    @property
    def precision(self) -> str:
        return "bf16" if self.training["bf16"] else "fp16" if self.training["fp16"] else "fp32"

    @property
    def finds_batch(self) -> bool:
        """Whether a device takes as many images at once as fit."""
        return self.training["per_device_train_batch_size"] == AUTO

    @property
    def data_seed(self) -> int:
        """Seed of everything that chooses images: the hold-out, their order, augmentation."""
        data_seed = self.training["data_seed"]
        return self.training["seed"] if data_seed is None else data_seed

    def resolved(self) -> dict[str, Any]:
        """Every setting under its flag's name, without secrets: a recipe that asks for the same run."""
        ours = {
            k: v
            for part in (self.data, self.model, self.scaling, self.run)
            for k, v in dataclasses.asdict(part).items()
        }
        return {
            key: value.value if isinstance(value, enum.Enum) else value
            for key, value in {**ours, **self.training}.items()
            if key not in SECRET_KEYS and key not in OF_ONE_START
        }


def load_config(argv: Sequence[str]) -> Config:
    """Read `[RECIPE] [--flag value ...]`; flags win over the recipe, the recipe over our defaults over upstream's.

    Raises UserError for an unknown key or flag, a value of the wrong type, or a setting that cannot be honoured.
    """
    _refuse_secrets(argument.lstrip("-").split("=")[0] for argument in argv if "=" in argument or argument[:1] == "-")
    argv = _in_full(argv)
    parser = _parser()
    parser.set_defaults(**TRAINING_DEFAULTS)
    flags, unknown = parser.parse_known_args(argv, argparse.Namespace(**{_GIVEN: set()}))
    if unknown:
        name = unknown[0].split("=")[0]  # a value may be a secret behind a misspelt name
        if name.lstrip("-") in ("strategy", *launch_flags):
            raise UserError(f"{name} starts processes; give it to `vit-dist train`, not to a process that it starts")
        raise UserError(_unknown_message(f"unknown argument {name}", name.lstrip("-"), parser, "--"))
    recipe = flags.recipe or (None if "data" in flags.given else DEFAULT_RECIPE)
    values: dict[str, Any] = {}
    problems: list[str] = []
    if recipe is not None:
        path = find_recipe(recipe)
        values, problems = _values(settings_file.read(path, "a recipe"), parser)
    settings = {**vars(flags), **{k: v for k, v in values.items() if k not in flags.given}}
    settings["allow_change"] = [ALIASES.get(key, key) for key in settings["allow_change"]]
    given = set(values) | flags.given
    name = Path(recipe).stem if recipe else Path(settings["data"].rstrip("/")).name
    output_dir_given = bool(settings["output_dir"])
    settings["output_dir"] = settings["output_dir"] or f"runs/{name}"
    _follow_strategies(settings, given)
    if "keep_checkpoints" not in given:
        settings["keep_checkpoints"] = bool(given & {"save_total_limit", "save_keep_every"})
    problems += _bad_values(settings, given)
    if not problems:  # else a wrong value might be what does not go together with others
        problems += _bad_combinations(settings)
    if problems:
        raise WrongSettings(problems)
    return Config(
        data=_part(DataOptions, settings),
        model=_part(ModelOptions, settings),
        scaling=_part(ScalingOptions, settings),
        run=_part(RunOptions, settings),
        training={f.name: settings[f.name] for f in dataclasses.fields(TrainingArguments) if f.init},
        source=f"recipe {path}" if recipe else "flags",
        output_dir_given=output_dir_given,
    )


def parse_duration(key: str, text: str) -> float:
    """Seconds in `3h50m`, `90s`, `1d2h`, or a plain number of seconds. Raises UserError."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1, "": 1}
    number = r"[0-9]{1,9}(\.[0-9]+)?"
    if not re.fullmatch(rf"({number}[dhms])+|{number}", text):
        raise UserError(f"{key}={text} is no duration; write it like 3h50m, 90s or 1d2h")
    seconds = sum(float(count) * units[unit] for count, unit in re.findall(r"([0-9.]+)([dhms]?)", text))
    if seconds > 366 * 86400:
        raise UserError(f"{key}={text}: give at most a year")
    return seconds


def write_config(config: Config, path: Path) -> None:
    """Write the resolved settings as a recipe."""
    with path.open("w", encoding="utf-8") as file:
        resolved, defaults = config.resolved(), _defaults()
        chosen = {key: value for key, value in resolved.items() if value != defaults.get(key)}
        rest = {key: value for key, value in resolved.items() if key not in chosen}
        for title, settings in (("other than the defaults", chosen), ("defaults", rest)):
            file.write(f"# {title}\n")
            yaml.safe_dump(settings, file, sort_keys=False, allow_unicode=True)


def _defaults() -> dict[str, Any]:
    """The default of each setting."""
    parser = _parser()
    parser.set_defaults(**TRAINING_DEFAULTS)
    settings = vars(parser.parse_known_args([], argparse.Namespace(**{_GIVEN: set()}))[0])
    return {key: value.value if isinstance(value, enum.Enum) else value for key, value in settings.items()}


# Beside a run's folder lies <name>.previous-<n>; in it, temporary files with longer names than their own.
LONGEST_NAME, LONGEST_PATH = 239, 3800  # bytes


class _Help(argparse.Action):
    """`--help` is short; `--help all` shows every option."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        sys.stdout.write(parser.format_help() if values == "all" else first_look.HELP)
        parser.exit()


_GIVEN = "given"  # the flags that were on the command line, gathered while parsing


class _UpstreamOptions(TrainingArguments):
    """Only for `--help`: upstream's fields under a title of their own, after ours."""

    _argument_group_name = "training (transformers.TrainingArguments)"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Show `--data_config X` once, not again as `--data-config X`."""
        names = [option for option in action.option_strings if option == "-h" or "_" in option or "-" not in option[2:]]
        value = "" if action.nargs == 0 or not names else " " + self._format_args(action, action.dest.upper())
        return ", ".join(names) + value if names else super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, and note in `given` which options the command line named."""
        actions = {option: action for action in self._actions for option in action.option_strings}
        for argument in args or ():
            action = actions.get(argument.split("=")[0])
            if action is not None and namespace is not None:
                namespace.given.add(action.dest)
        return super().parse_known_args(args, namespace)


def _parser() -> _Parser:
    parts: Any = [DataOptions, ModelOptions, ScalingOptions, RunOptions, _UpstreamOptions]
    parser = _Parser(
        parts,
        prog="vit-dist train",
        description="Fine-tune a Vision Transformer for image classification. The same command again continues "
        "a run where it stopped.",
        epilog="Secrets (Weights & Biases key, hub token) come from the environment or the usual credential files "
        "only: WANDB_API_KEY or `wandb login`, HF_TOKEN or `hf auth login`.",
        allow_abbrev=False,
        conflict_handler="resolve",  # older releases in our range still have fields that we took over (logging_dir)
        formatter_class=_HelpFormatter,
        usage="vit-dist train [RECIPE] [--flag value ...]",
        add_help=False,
    )
    parser.add_argument("-h", "--help", nargs="?", action=_Help, help="`--help`: the most used options; `--help all`")
    parser.add_argument(
        "recipe",
        nargs="?",
        help="a YAML file whose keys are the flags below, or the name of one that comes with the package: "
        f"{', '.join(sorted(shipped_recipes()))} (default: {DEFAULT_RECIPE}, unless --data is given)",
    )
    for action in parser._actions:
        if any(action.dest in keys for keys in (SECRET_KEYS, REFUSED, WITHOUT_EFFECT, STAGES)):
            action.help = argparse.SUPPRESS
        elif action.option_strings and action.option_strings[0].startswith("--no_") and action.nargs == 0:
            action.help = f"Turn off --{action.dest}."
        if action.dest == "report_to":
            action.nargs = "+"  # several, as a recipe may list them
        if action.dest == "per_device_train_batch_size":
            action.type = _size_or_auto
            action.help = (
                "Images that a device takes at once in training. `auto`: as many as fit, tried out before training; "
                "needs --global_batch_size."
            )
        if action.dest == "output_dir":
            action.help = (
                "The run folder; the same command continues its run, other settings are refused. Default: runs/NAME "
                "of the recipe or the data, or runs/NAME-2, -3, ... for other settings."
            )
    return parser


def _size_or_auto(text: str) -> int | str:
    """Upstream's field is a number; `arguments` hands it the one that was found."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}, give a number or {AUTO}") from None


def check_settings(settings: Iterable[Setting]) -> None:
    """Raises UserError with all settings that no recipe could have: an unknown key, or a value of another type."""
    _, problems = _values(settings, _parser())
    if problems:
        raise WrongSettings(problems)


def _values(settings: Iterable[Setting], parser: _Parser) -> tuple[dict[str, Any], list[str]]:
    """The settings of a file under their full names, and what is wrong with the others."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    names: dict[str, str] = {}
    for setting in settings:
        full = ALIASES.get(setting.key, setting.key)
        if names.setdefault(full, setting.key) != setting.key:
            problems.append(f"{setting.where}: {_same_setting(full)}")
            continue
        try:
            values[full] = _value(setting._replace(key=full), parser)
        except UserError as error:
            problems.append(str(error))
    return values, problems


def _in_full(argv: Sequence[str]) -> list[str]:
    """The command line with full names in place of short ones. Raises UserError if both are there."""
    words, short, names = [], set(), set()
    for word in argv:
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        full = ALIASES.get(name)
        words.append(f"--{full}{equals}{value}" if full else word)
        if full:
            short.add(full)
        names.add(name)
    if both := sorted(short & names):
        raise UserError(_same_setting(both[0], "--"))
    return words


def _same_setting(full: str, prefix: str = "") -> str:
    short = next(name for name, key in ALIASES.items() if key == full)
    return f"{prefix}{short} and {prefix}{full} are the same setting; give one of them"


def _all_of(problems: Sequence[str], most: int = 10, length: int = 470) -> str:
    """The first problems in one line, and how many more there are. Only the first one names the file."""
    file = re.match(r"(.+?):[0-9]+: ", problems[0])
    prefix = f"{file[1]}:" if file else None
    later = [f"line {text[len(prefix) :]}" if prefix and text.startswith(prefix) else text for text in problems[1:most]]
    shown = [problems[0], *later]
    while len(shown) > 1 and len("; ".join(shown)) > length:
        shown.pop()
    left = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {left} more" if left else "")


def _value(setting: Setting, parser: _Parser) -> Any:
    """Check key and value of a setting in a file as the flag of that name would be; errors carry file and line."""
    key, node, where = setting
    _refuse_secrets([key], where)
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.nargs != 0}
    if key not in actions or key == "help":
        raise UserError(_unknown_message(f"{where}: unknown key {key!r}", key, parser))
    action = actions[key]
    if settings_file.is_null(node):
        if action.default is not None:
            raise UserError(f"{where}: {key} needs a value")
        return None
    try:
        items = [parser._get_value(action, text) for text in settings_file.texts(node)]
        for item in items:
            parser._check_value(action, item)
    except argparse.ArgumentError as error:
        raise UserError(f"{where}: {key}: {error.message}") from None
    if action.nargs == "+":
        return items
    if isinstance(node, yaml.SequenceNode):
        raise UserError(f"{where}: {key} takes one value, not a list")
    return items[0]


def _unknown_message(what: str, key: str, parser: _Parser, prefix: str = "") -> str:
    key = key.split("=")[0].replace("-", "_")
    if key in RENAMED:
        return f"{what}: it is {prefix}{RENAMED[key]} here"
    known = [action.dest for action in parser._actions if action.option_strings]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"{what}; did you mean {prefix}{near[0]}?" if near else f"{what}; --help lists what there is"


def _refuse_secrets(keys: Iterable[str], where: str = "command line") -> None:
    for key in keys:
        if key.replace("-", "_").lower() in SECRET_KEYS:
            raise UserError(
                f"{where}: {key}: secrets are not taken from flags or recipes, which end up in logs; "
                "use the environment (HF_TOKEN, WANDB_API_KEY) or `hf auth login`, `wandb login`"
            )


def _bad_values(settings: dict[str, Any], given: set[str]) -> list[str]:
    """What is wrong with single settings."""
    found = _bad_names(settings)
    for key, (value, reason) in REFUSED.items():
        if settings.get(key) == value:
            found.append(f"{key}={value} is not supported: {reason}")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for key, reason in WITHOUT_EFFECT.items():
        unset = (defaults.get(key), [], None, *((False,) if defaults.get(key) == "no" else ()))
        if key in given and settings.get(key) not in unset:
            found.append(f"{key}={settings[key]} has no effect here: {reason}; leave it out")
    for key, reason in STAGES.items():
        if key in given and settings.get(key) is False:
            found.append(f"{key}=False has no effect here: {reason}")
    for key, (least, most) in RANGES.items():
        value = settings[key]
        if value not in (None, AUTO) and not least <= value <= most:
            found.append(f"{key}={value}: give a number from {least:g} to {most:g}")
    for key in ("max_time", "hang_timeout"):
        try:
            if settings[key] is not None:
                parse_duration(key, settings[key])
        except UserError as error:
            found.append(str(error))
    if settings["max_steps"] != -1 and settings["max_steps"] < 1:
        found.append(f"max_steps={settings['max_steps']}: give at least 1, or leave it out to train whole epochs")
    if str(settings["train_sampling_strategy"]) not in ("random", "sequential"):
        found.append(
            f"train_sampling_strategy={settings['train_sampling_strategy']}: images have no length; use random or "
            "sequential"
        )
    for key in settings["allow_change"]:
        known = {*settings, "restarts"} - {"recipe", _GIVEN}
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            found.append(f"allow_change {key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _bad_combinations(settings: dict[str, Any]) -> list[str]:
    """What is wrong with settings together."""
    found = []
    if settings["per_device_train_batch_size"] == AUTO and settings["global_batch_size"] is None:
        found.append(
            "per_device_train_batch_size=auto needs --global_batch_size, 256 say: what a step trains on must not "
            "depend on the memory of a device"
        )
    if settings["early_stopping_patience"] and not settings["load_best_model_at_end"]:
        found.append("early_stopping_patience needs evaluations and --load_best_model_at_end to say what is better")
    if settings["bf16_residual"] and not settings["bf16"]:
        found.append("bf16_residual needs --bf16")
    if settings["bf16"] and settings["fp16"]:
        found.append("bf16 and fp16: give one of them")
    return found


def _bad_names(settings: dict[str, Any]) -> list[str]:
    """Text that no file or log can hold, and an output_dir that cannot be a folder's name."""
    found = []
    for key, value in settings.items():
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            found.append(f"{key}={value}: not valid UTF-8; rename it, or reach it by a link with another name")
        if isinstance(value, str) and value.startswith("~"):
            try:
                Path(value).expanduser()
            except RuntimeError:
                found.append(f"{key}={value}: there is no such home directory; write the whole path")
    output_dir = settings["output_dir"]
    if one_line(output_dir) != output_dir:
        found.append(f"output_dir={output_dir}: a line break or another control character in it")
    found += [
        f"output_dir: {part[:40]}... has {_num_bytes(part)} bytes; give names of at most {LONGEST_NAME}"
        for part in Path(output_dir).parts
        if _num_bytes(part) > LONGEST_NAME
    ]
    if _num_bytes(os.path.abspath(output_dir)) > LONGEST_PATH:
        found.append(f"output_dir={output_dir[:80]}...: give a path of at most {LONGEST_PATH} bytes")
    return found


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _follow_strategies(settings: dict[str, Any], given: set[str]) -> None:
    """Evaluating and saving go together (the best model must have been saved): one setting is enough for both."""
    for one, other in (("eval", "save"), ("save", "eval")):
        if f"{one}_strategy" not in given and f"{one}_steps" in given:
            settings[f"{one}_strategy"] = "steps"
            given.add(f"{one}_strategy")
        follows = settings[f"{one}_strategy"] in ("steps", "epoch")
        if follows and f"{one}_strategy" in given and not given & {f"{other}_strategy", f"{other}_steps"}:
            settings[f"{other}_strategy"] = settings[f"{one}_strategy"]
            if f"{one}_steps" in given:
                settings[f"{other}_steps"] = settings[f"{one}_steps"]
    if "no" in (settings["eval_strategy"], settings["save_strategy"]) and "load_best_model_at_end" not in given:
        settings["load_best_model_at_end"] = False


def _part(cls: type, settings: dict[str, Any]) -> Any:
    return cls(**{f.name: settings[f.name] for f in dataclasses.fields(cls)})
