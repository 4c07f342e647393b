"""What can be told of a command before the libraries are loaded, which takes seconds: a path that is not there, or a
recipe that cannot be read. Also the short help.

Looks only at what is certain: a flag whose value follows it, a recipe that comes first. The rest is `config`'s.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vit_dist import settings_file
from vit_dist.errors import UserError

PATHS = ("data", "model", "output_dir")

HELP = """\
usage: vit-dist train [RECIPE] [--flag value ...]

Fine-tune a Vision Transformer for image classification on all GPUs of this machine, or on its CPUs.
The same command again continues a run where it stopped. RECIPE is a YAML file whose keys are the flags,
or the name of one that comes with the package: cifar10, digits (default, unless --data is given).

data
  --data DATA             folder of class folders, Parquet/CSV/JSONL file or folder, .tar shards, hub id, or digits
  --validation_split S    split that chooses the best model; default: validation, val, dev, ..., else held out
  --train_val_split X     share of train that is held out if there is no validation split (0.15)
  --test_split S          split that is evaluated once, at the end; none leaves it alone
  --max_train_samples N   train on at most N images
  --on_bad_image skip     leave out images that cannot be decoded; default: stop before training and list them
model
  --model MODEL           hub id or folder of an image classifier, or tiny (google/vit-base-patch16-224-in21k)
  --image_size N          input side in pixels; default: the model's own
  --from_scratch          random weights
training
  --epochs N              number of epochs (--num_train_epochs, 3)
  --lr X                  learning rate (--learning_rate, 5e-5)
  --batch_size N          images on a device at once, or auto (--per_device_train_batch_size, 8)
  --global_batch_size N   images of a step on any number of devices; accumulation follows
  --wd X                  weight decay (--weight_decay, 0)
  --lr_scheduler_type T   linear (default), cosine, constant, constant_with_warmup, ...
  --warmup_steps X        steps, or a share of all steps below 1
  --bf16                  mixed precision
  --patience N            stop after N evaluations without a better accuracy (--early_stopping_patience)
  --seed N                seed of weights, splits, order and augmentation (42)
run
  --output_dir FOLDER     run folder; default: runs/NAME, or runs/NAME-2, ... for other settings
  --workers N             data loading processes of each device (--dataloader_num_workers)
  --save_steps N, --eval_steps N   default: both at the end of each epoch
  --max_time 3h50m        stop with a checkpoint and exit code 75; the same command goes on
  --report_to NAME ...    none, wandb, tensorboard, ...
  --fresh                 start over; the earlier run is moved to FOLDER.previous

processes; default: one for each visible GPU of this machine
  --strategy NAME         ddp, zero1, zero2, zero3, zero3_offload, fsdp2, hsdp, single, torchrun, or an Accelerate file
  --nproc N               processes on this node
  --nodes N --node_rank R --master_addr HOST   several nodes: the same command on each, another rank
  --dry_run               show the command of the launcher; starts nothing

examples
  vit-dist train                                           train on the embedded digits
  vit-dist train --data ~/photos --epochs 10 --bf16        a folder for each class
  vit-dist train cifar10 --lr 3e-5                         a recipe, one setting changed
  vit-dist train --data ~/photos --strategy fsdp2 --nproc 8
  vit-dist plan --data ~/photos --gpus 8 --gpu h100        memory, steps and time; starts nothing

--help all shows every option. Keys and tokens come from the environment or a login only: WANDB_API_KEY, HF_TOKEN.
"""


def refuse(argv: Sequence[str]) -> None:
    """Raise UserError for a path that is not there, or a recipe that cannot be read."""
    recipe = find_recipe(argv[0]) if argv and not argv[0].startswith("-") else None
    named = _of_recipe(recipe) if recipe else {}
    named |= _of_flags(argv)
    for key, value in named.items():
        try:
            problem = _problem(key, value)
        except (OSError, RuntimeError, ValueError):  # `config` and `data.source` have the words for these
            continue
        if problem:
            raise UserError(problem)


def _problem(key: str, value: str) -> str | None:
    path = Path(value).expanduser()
    missing = value.startswith((".", "/", "~")) and not os.path.lexists(path)  # others may be on the hub
    if key == "data" and missing:
        return no_such_data(value, path)
    if key == "model" and missing:
        return f"--model {value}: there is no such folder{near_miss(path)}"
    if key == "output_dir" and path.is_file():
        return f"output_dir {value} is a file; choose another --output_dir"
    return None


def tell(argv: Sequence[str], version: str, environ: dict[str, str] | os._Environ[str] = os.environ) -> int | None:
    """What is known before the libraries are loaded: an exit code if the process can end, else None.

    In a launcher's processes, of which only one must speak, nothing is looked at.
    """
    if "--version" in argv:
        sys.stdout.write(f"{version}\n")
        return 0
    if argv and argv[-1] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0
    if "WORLD_SIZE" in environ or "-h" in argv or "--help" in argv:
        return None
    try:
        refuse(argv)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if sys.stderr.isatty():
        sys.stderr.write("loading libraries\n")
    return None


def no_such_data(data: str, path: Path) -> str:
    return f"--data {data}: there is no such file or folder{near_miss(path)}"


def near_miss(path: Path) -> str:
    """A suggestion at the first part of `path` that is missing."""
    parent = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    try:
        missing = path.absolute().relative_to(parent).parts[0]
        close = difflib.get_close_matches(missing, os.listdir(parent), n=1)
    except OSError:
        close = []
    return f" (did you mean {parent / close[0]}?)" if close else ""


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with the package, by name. In a checkout they lie in configs/recipes/."""
    installed = Path(str(resources.files("vit_dist"))) / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "configs" / "recipes"
    return {path.stem: path for path in folder.glob("*.yaml")}


def find_recipe(recipe: str) -> Path:
    """The file of a recipe that is given by its path or its name. Raises UserError."""
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = shipped_recipes()
    if recipe in shipped:  # though there may be a folder of that name: data, or what was trained
        return shipped[recipe]
    if Path(recipe).exists():
        raise UserError(f"{recipe} is no recipe; did you mean --data {recipe}?")
    near = difflib.get_close_matches(Path(recipe).stem, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes that come with the package: {', '.join(sorted(shipped))}"
    recipe = recipe.split("=")[0]
    raise UserError(f"no recipe {recipe}: not a file, not the name of a shipped recipe; {hint}")


def _of_flags(argv: Sequence[str]) -> dict[str, str]:
    """Values of the flags that name paths: `--data X`, `--data=X`; the last one wins, as for argparse."""
    found = {}
    for word, following in zip(argv, [*argv, "-"][1:], strict=True):
        flag, equals, value = word.partition("=")
        key = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if key in PATHS and equals:
            found[key] = value
        elif key in PATHS and not following.startswith("-"):
            found[key] = following
    return found


def _of_recipe(path: Path) -> dict[str, str]:
    settings = settings_file.read(path, "a recipe")
    texts = {one.key: settings_file.texts(one.node) for one in settings if not settings_file.is_null(one.node)}
    return {key: values[0] for key, values in texts.items() if key in PATHS and len(values) == 1}
