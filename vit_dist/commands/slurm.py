"""vit-dist slurm: checks a command on the login node, then submits it as a batch job. No other module knows Slurm.

vit-dist slurm train cifar10
vit-dist slurm -N 4 --gpus-per-node 8 -p gpu --time 8:00:00 -- train cifar10 --strategy fsdp2 --print
vit-dist slurm --time 1:00:00 -- sweep configs/sweeps/lr.yaml --throttle 4

Options before `--` go to sbatch unchanged. What follows the command is for `vit-dist train`, `doctor` or `sweep`. This
command checks it before the job is queued; the scripts in slurm/ check the nodes.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_dist import console
from vit_dist.commands import preflight, sweep
from vit_dist.config import load_config
from vit_dist.errors import UserError
from vit_dist.launch import strategies
from vit_dist.launch.topology import FLAGS
from vit_dist.parser import Parser

USAGE = "usage: vit-dist slurm [sbatch options --] train|doctor|sweep ... [--strategy NAME] [--throttle K] [--print]"
COMMANDS = ("train", "doctor", "sweep")
PASSED = (  # of the environment, what the scripts read
    "PYTHON", "NPROC_PER_NODE", "OMP_NUM_THREADS", "VIT_DIST_BUNDLE", "VIT_DIST_ROOT", "CONTAINER_IMAGE",
    "CONTAINER_MOUNTS", "HSDP_REPLICAS",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A command line, taken apart."""

    sbatch: list[str]  # the words before `--`
    command: str
    arguments: list[str]  # what follows the command, without our own options
    strategy: str | None
    throttle: int | None  # members of a sweep that run at once
    show: bool  # --print


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for what the user can mend; sbatch's own if it refuses."""
    console.set_up(0)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{USAGE}\n\n{(__doc__ or '').partition(chr(10) * 2)[2]}")
        return 0
    try:
        request = parse(words)
        script = strategies.root() / "slurm" / ("sweep.sh" if request.command == "sweep" else "train.sh")
        with _folder_of_job(request.sbatch):
            array, notes = check(request)
        command = sbatch_command(request, array, script)
        environment = _python(request.sbatch)
        if not environment and "PYTHON" not in os.environ and (export := value(request.sbatch, "--export")):
            notes.append(f"--export={export}: the job takes the interpreter of its checkout; add PYTHON=...")
        if value(request.sbatch, "--time", "-t") is None and "SBATCH_TIMELIMIT" not in os.environ:
            notes.append("no --time was given: the partition's default limit holds")
        if shutil.which("sbatch") is None and not request.show:
            raise UserError(
                "there is no sbatch on this machine; submit from a login node, or add --print to see the job"
            )
        shown = _shown(script, environment, command) if request.show else []
    except UserError as error:
        console.show_error(f"error: {error}")
        return 2
    for note in notes:
        console.show_error(f"note: {note}")
    if request.show:
        console.say(*_columns(shown))
        return 0
    return submit(command, {**os.environ, **environment})


def parse(words: Sequence[str]) -> Request:
    """Raises UserError for a command line without a command, or whose options of sbatch do not end with `--`."""
    options: list[str] = []
    rest = list(words)
    if rest and rest[0].startswith("-"):
        if "--" not in rest:
            raise UserError("put `--` behind the options of sbatch: vit-dist slurm -N 4 -- train ...")
        end = rest.index("--")
        options, rest = rest[:end], rest[end + 1 :]
    if not rest or rest[0] not in COMMANDS:
        near = difflib.get_close_matches(rest[0], COMMANDS, n=1) if rest else []
        what = f"{rest[0]} is no command" if rest else "there is no command"
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"{what}; {hint}; see vit-dist slurm --help")
    parser = Parser(prog="vit-dist slurm", add_help=False, allow_abbrev=False)
    parser.add_argument("--strategy")
    parser.add_argument("--throttle", type=int)
    parser.add_argument("--print", action="store_true")
    own, arguments = parser.parse_known_args(rest[1:])
    if given := [word for word in arguments if word.partition("=")[0] in {f"--{name}" for name in FLAGS}]:
        raise UserError(
            f"{given[0]}: Slurm decides nodes and processes; give options of sbatch before `--` "
            "(-N 4 --gpus-per-node 8), or set NPROC_PER_NODE for processes on CPUs"
        )
    if own.throttle is not None and (rest[0] != "sweep" or own.throttle < 1):
        raise UserError("--throttle K is for a sweep: how many of its members may run at once, 1 or more")
    return Request(options, rest[0], arguments, own.strategy, own.throttle, own.print)


def value(options: Sequence[str], long: str, short: str | None = None) -> str | None:
    """The last value of one option of sbatch, in each of its spellings: `--time 5`, `--time=5`, `-t 5`, `-t5`."""
    found = None
    for word, following in itertools.zip_longest(options, options[1:], fillvalue=""):
        if word in (long, short):
            found = following
        elif word.startswith(f"{long}="):
            found = word.partition("=")[2]
        elif short and word.startswith(short) and not word.startswith("--"):
            found = word.removeprefix(short)
    return found


def check(request: Request) -> tuple[str | None, list[str]]:
    """The job array of a sweep, and remarks. Raises UserError for what a job would stop at."""
    array, notes = None, []
    if request.command == "sweep":
        if not request.arguments or request.arguments[0].startswith("-"):
            raise UserError("the sweep's file comes first: vit-dist slurm [sbatch options --] sweep SWEEP.yaml ...")
        asked = sweep.read(Path(request.arguments[0]))
        array = _array(request, asked)
        configs = sweep.check(asked, request.arguments[1:])
    elif value(request.sbatch, "--array", "-a") is not None:
        raise UserError(
            "--array: all of them would be one run; an array is for a sweep: vit-dist slurm ... -- sweep FILE"
        )
    else:
        configs = [load_config(request.arguments)]
    needed = strategies.find(request.strategy).packages if request.strategy is not None else []
    if "deepspeed" in needed and importlib.util.find_spec("deepspeed") is None:
        notes.append(f"deepspeed is not installed here, and {request.strategy} needs it on the nodes")
    for config in configs:
        preflight.check(config)
    return array, notes


def _array(request: Request, asked: sweep.Sweep) -> str | None:
    """All members, unless the user gave an array."""
    last = len(asked.members) - 1
    given = value(request.sbatch, "--array", "-a")
    if given is None:
        return f"0-{last}" + (f"%{request.throttle}" if request.throttle else "")
    if request.throttle:
        raise UserError(f"--throttle {request.throttle} and --array {given}: write --array {given}%K alone")
    for part in given.partition("%")[0].split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+)(?::\d+)?)?", part)  # sbatch judges what is written otherwise
        if numbers and int(numbers[2] or numbers[1]) > last:
            raise UserError(f"--array {given}: {asked.path} has members 0 to {last}")
    return None


def sbatch_command(request: Request, array: str | None, script: Path) -> list[str]:
    strategy = ["--strategy", request.strategy] if request.strategy is not None else []
    first = request.arguments[:1] if request.command == "sweep" else [request.command]
    rest = request.arguments[1:] if request.command == "sweep" else request.arguments
    given = [*request.sbatch, *([f"--array={array}"] if array else [])]
    return ["sbatch", *given, str(script), *first, *strategy, *rest]


def submit(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run sbatch, which says itself what it refuses; then tell how to follow and stop the job."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    found = re.search(r"^(?:Submitted batch job )?(\d+)", done.stdout)
    if done.returncode or not found:
        sys.stdout.write(done.stdout)
        return done.returncode
    job = found[1]
    rows = [("submitted", f"job {job}", "")]
    if log := _log(job):
        rows += [("log", log, ""), ("follow", f"tail -F {log}", "")]
    rows += [("stop", f"scancel {job}", ""), ("requeue", f"scancel --batch --signal=USR1 {job}", "saves first")]
    console.say(*_columns(rows))
    return 0


def _log(job: str) -> str | None:
    """The log's path from scontrol, quoted for a shell, with `*` for the member of an array; None if unknown."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["scontrol", "show", "job", job]
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL).stdout
        if found := re.search(r"^ *StdOut=(.+)$", told, re.MULTILINE):
            # slurm.h: 0xfffffffe is NO_VAL, the member's number as long as the array is pending.
            parts = re.split(r"%a|4294967294", found[1])
            return "*".join(shlex.quote(part) if part else "" for part in parts)
    return None


def _shown(script: Path, environment: dict[str, str], command: Sequence[str]) -> list[tuple[str, str, str]]:
    """The rows of --print: what asks for resources, and a command line to paste."""
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {script} ({error.strerror}); install vit_dist again") from None
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    variables = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("SBATCH_")]
    assigned = [f"{name}={value}" for name, value in environment.items()]
    assigned += [f"{name}={os.environ[name]}" for name in PASSED if name in os.environ]  # or it is another job
    pasted = shlex.join([*(["env", *assigned] if assigned else []), *command])
    rows = [("script", str(script), ""), ("it asks for", " ".join(asked), "")]
    if variables:
        rows.append(("environment", " ".join(variables), "overrides the script"))
    return [*rows, ("command", pasted, "")]


def _columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Name, value and, where there is one, a remark."""
    left = max(len(name) for name, _, _ in rows)
    middle = max((len(value) for _, value, remark in rows if remark), default=0)
    return [f"{name:<{left}}  {value:<{middle}}  {remark}".rstrip() for name, value, remark in rows]


@contextlib.contextmanager
def _folder_of_job(options: Sequence[str]) -> Iterator[None]:
    """Paths are meant from the folder that the job will run in. Raises UserError if it is not there."""
    here = os.getcwd()
    try:
        os.chdir(value(options, "--chdir", "-D") or here)
    except OSError as error:
        raise UserError(f"--chdir: {error}") from None
    try:
        yield
    finally:
        os.chdir(here)


def _python(options: Sequence[str]) -> dict[str, str]:
    """The job runs under this interpreter, unless the user names another one or an image brings it."""
    exported = (value(options, "--export") or "ALL").upper().startswith("ALL")
    in_image = value(options, "--container-image") is not None or value(options, "--container") is not None
    if "PYTHON" in os.environ or in_image or not exported:
        return {}
    return {"PYTHON": sys.executable}


if __name__ == "__main__":
    sys.exit(main())
