"""vit-dist slurm: checks a command on the login node, then submits it as a batch job. No other module knows Slurm.

vit-dist slurm -N 4 --gpus-per-node 8 -p gpu --time 8:00:00 train cifar10 --strategy fsdp2 --print
vit-dist slurm --time 10 doctor cifar10
vit-dist slurm --time 1:00:00 sweep configs/sweeps/lr.yaml --throttle 4

Options of sbatch stand before the verb, everything else behind it as `vit-dist train`, `doctor` or `sweep` take it.
What a job would only find out after hours in the queue is refused here; the scripts in slurm/ check what needs nodes.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vit_dist import console
from vit_dist.config import load_config
from vit_dist.errors import UserError
from vit_dist.verbs import preflight, sweep
from vit_dist.verbs.parser import Parser

USAGE = "usage: vit-dist slurm [sbatch options] train|doctor|sweep ... [--strategy NAME] [--throttle K] [--print]"
VERBS = ("train", "doctor", "sweep")
PASSED = (  # of the environment, what the scripts read
    "PYTHON", "NPROC_PER_NODE", "OMP_NUM_THREADS", "VIT_DIST_BUNDLE", "VIT_DIST_ROOT", "CONTAINER_IMAGE",
    "CONTAINER_MOUNTS", "HSDP_REPLICAS",
)  # fmt: skip
OWN = ("strategy", "throttle", "print")  # options of ours, which may also stand before the verb

# What must be known of sbatch's options to find the verb behind them: those that stand alone (another value is given
# with `=`), pyxis's among them, and the long names of the short ones.
ALONE = {
    "contiguous", "exclusive", "get-user-env", "help", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue",
    "overcommit", "oversubscribe", "parsable", "propagate", "quiet", "reboot", "requeue", "resv-ports", "spread-job",
    "test-only", "usage", "use-min-nodes", "verbose", "version", "wait", "container-mount-home",
    "no-container-mount-home", "container-remap-root", "no-container-remap-root", "container-entrypoint",
    "no-container-entrypoint", "container-entrypoint-log", "container-readonly", "container-writable", "stepmgr",
    "print",
}  # fmt: skip
LONG = {
    "-A": "account", "-a": "array", "-b": "begin", "-C": "constraint", "-c": "cpus-per-task", "-D": "chdir",
    "-d": "dependency", "-e": "error", "-F": "nodefile", "-G": "gpus", "-H": "hold", "-h": "help", "-i": "input",
    "-J": "job-name", "-k": "no-kill", "-L": "licenses", "-M": "clusters", "-m": "distribution", "-N": "nodes",
    "-n": "ntasks", "-O": "overcommit", "-o": "output", "-p": "partition", "-Q": "quiet", "-q": "qos",
    "-S": "core-spec", "-s": "oversubscribe", "-t": "time", "-v": "verbose", "-V": "version", "-W": "wait",
    "-w": "nodelist", "-x": "exclude",
}  # fmt: skip
VARIABLES = {"timelimit": "time", "array-inx": "array", "mem-per-node": "mem"}  # SBATCH_*: not the option's own name
FIRST = ("nodes", "gpus-per-node", "gpus", "gres", "exclusive", "time", "partition")  # shown first

Asked = dict[str, tuple[str | None, str]]  # option -> its value, and where it was said


@dataclass(frozen=True)
class Option:
    """One of sbatch's."""

    name: str  # the long one, without dashes
    value: str | None
    words: tuple[str, ...]  # as it was given


@dataclass(frozen=True)
class Request:
    """A command line, taken apart."""

    options: list[Option]
    verb: str
    arguments: list[str]  # what follows the verb, without our own options
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
        root = script_root()
        script = root / "slurm" / ("sweep.sh" if request.verb == "sweep" else "train.sh")
        with _folder_of_job(request.options):
            options, notes = check(request, root)
        command = sbatch_command(request, options, script)
        asked = resources(script, options, os.environ)
        environment = _python(asked)
        if not environment and "PYTHON" not in os.environ and "export" in asked:
            notes.append(
                f"--export={asked['export'][0]}: the job takes the interpreter of its checkout; add PYTHON=..."
            )
        if "time" not in asked:
            notes.append("no --time was given: the partition's default limit holds")
        if shutil.which("sbatch") is None and not request.show:
            raise UserError(
                "there is no sbatch on this machine; submit from a login node, or add --print to see the job"
            )
    except UserError as error:
        console.show_error(f"error: {error}")
        return 2
    for note in notes:
        console.show_error(f"note: {note}")
    if request.show:
        assigned = [f"{name}={value}" for name, value in environment.items()]
        assigned += [f"{name}={os.environ[name]}" for name in PASSED if name in os.environ]  # or it is another job
        shown = shlex.join([*(["env", *assigned] if assigned else []), *command])
        console.say(*_columns([("script", str(script), ""), *_shown(asked), ("command", shown, "")]))
        return 0
    return submit(command, {**os.environ, **environment}, asked)


def parse(words: Sequence[str]) -> Request:
    """Raises UserError for a command line without a verb, or with options that are not understood."""
    options, rest = split_options(words)
    if not rest or rest[0] not in VERBS:
        near = difflib.get_close_matches(rest[0], VERBS, n=1) if rest else []
        what = f"{rest[0]} is no verb" if rest else "there is no verb"
        hint = f"did you mean {near[0]}?" if near else f"options of sbatch stand before {', '.join(VERBS)}"
        raise UserError(f"{what}; {hint}; see vit-dist slurm --help")
    ours = [word for option in options if option.name in OWN for word in option.words]
    parser = Parser(prog="vit-dist slurm", add_help=False, allow_abbrev=False)
    parser.add_argument("--strategy")
    parser.add_argument("--throttle", type=int)
    parser.add_argument("--print", action="store_true")
    own, arguments = parser.parse_known_args([*ours, *rest[1:]])
    if own.throttle is not None and (rest[0] != "sweep" or own.throttle < 1):
        raise UserError("--throttle K is for a sweep: how many of its members may run at once, 1 or more")
    theirs = [option for option in options if option.name not in OWN]
    return Request(theirs, rest[0], arguments, own.strategy, own.throttle, own.print)


def split_options(words: Sequence[str]) -> tuple[list[Option], list[str]]:
    """sbatch's options at the beginning of `words`, and the rest. Raises UserError if the last one lacks its value."""
    options, left = [], list(words)
    while left and left[0].startswith("-"):
        word = left.pop(0)
        given: tuple[str, ...] = (word,)
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            whole = "=" in word or name in ALONE
        else:
            name, value = LONG.get(word[:2], word[1:2]), word[2:]
            whole = bool(value) or name in ALONE
        if not whole:
            if not left:
                raise UserError(f"{word} needs a value")
            value = left.pop(0)
            given = (word, value)
        options.append(Option(name, value or None, given))
    return options, left


def script_root() -> Path:
    """The folder with slurm/, launch/ and configs/accelerate/ in it: of the installed package, or of a checkout."""
    installed = Path(__file__).parents[1] / "cluster"
    return installed if installed.is_dir() else Path(__file__).parents[2]


def check(request: Request, root: Path) -> tuple[list[Option], list[str]]:
    """sbatch's options with the array of a sweep, and remarks. Raises UserError for what a job would stop at."""
    options, notes = request.options, []
    if request.verb == "sweep":
        if not request.arguments or request.arguments[0].startswith("-"):
            raise UserError("the sweep's file comes first: vit-dist slurm [sbatch options] sweep SWEEP.yaml ...")
        asked = sweep.read(Path(request.arguments[0]))
        options = _with_array(request, asked)
        configs = sweep.check(asked, request.arguments[1:])
    elif any(option.name == "array" for option in request.options):
        raise UserError("--array: all of them would be one run; an array is for a sweep: vit-dist slurm ... sweep FILE")
    else:
        configs = [load_config(request.arguments)]
    if request.strategy is not None:
        check_strategy(request.strategy, root / "configs" / "accelerate")
        if request.strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            notes.append(f"deepspeed is not installed here, and {request.strategy} needs it on the nodes")
    for config in configs:
        preflight.check(config)
    return options, notes


def check_strategy(strategy: str, folder: Path) -> None:
    """Raises UserError for a strategy that launch/accelerate.sh would refuse by its name."""
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if "/" in strategy or strategy.endswith((".yaml", ".yml")):
        if not Path(strategy).is_file():
            raise UserError(f"--strategy {strategy}: there is no such file; there are {', '.join(known)}")
        if "distributed_type" not in Path(strategy).read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"--strategy {strategy} is no configuration of Accelerate (no distributed_type)")
    elif strategy not in known:
        near = difflib.get_close_matches(strategy, known, n=1)
        hint = f"did you mean {near[0]}? there" if near else "there"
        raise UserError(f"unknown --strategy {strategy}; {hint} are {', '.join(known)}")


def _with_array(request: Request, asked: sweep.Sweep) -> list[Option]:
    last = len(asked.members) - 1
    given = [option.value or "" for option in request.options if option.name == "array"]
    if not given:
        array = f"0-{last}" + (f"%{request.throttle}" if request.throttle else "")
        return [*request.options, Option("array", array, (f"--array={array}",))]
    if request.throttle:
        raise UserError(f"--throttle {request.throttle} and --array {given[-1]}: write --array {given[-1]}%K alone")
    for part in given[-1].partition("%")[0].split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+)(?::\d+)?)?", part)  # sbatch judges what is written otherwise
        if numbers and int(numbers[2] or numbers[1]) > last:
            raise UserError(f"--array {given[-1]}: {asked.path} has members 0 to {last}")
    return request.options


def sbatch_command(request: Request, options: Sequence[Option], script: Path) -> list[str]:
    strategy = ["--strategy", request.strategy] if request.strategy is not None else []
    first = request.arguments[:1] if request.verb == "sweep" else [request.verb]
    rest = request.arguments[1:] if request.verb == "sweep" else request.arguments
    given = [word for option in options for word in option.words]
    return ["sbatch", *given, str(script), *first, *strategy, *rest]


def resources(script: Path, options: Sequence[Option], environment: Mapping[str, str]) -> Asked:
    """What is asked for, as sbatch puts it together: the last one wins."""
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{script} cannot be read ({error.strerror}); install vit_dist anew, or use a checkout"
        ) from None
    asked: Asked = {}
    for line in itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), lines):
        if line.startswith("#SBATCH "):
            for option in split_options(shlex.split(line[len("#SBATCH ") :], comments=True))[0]:
                asked[option.name] = (option.value, script.name)
    for variable, value in environment.items():
        if variable.startswith("SBATCH_"):
            name = variable[len("SBATCH_") :].lower().replace("_", "-")
            asked[VARIABLES.get(name, name)] = (value, variable)
    for option in options:
        asked[option.name] = (option.value, "command line")
        if option.name in ("requeue", "no-requeue"):
            asked.pop({"requeue": "no-requeue", "no-requeue": "requeue"}[option.name], None)
    return asked


def submit(command: Sequence[str], environment: Mapping[str, str], asked: Asked) -> int:
    """Run sbatch, which says itself what it refuses; then tell how to follow and stop the job."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    found = re.search(r"^(?:Submitted batch job )?(\d+)", done.stdout)
    if done.returncode or not found:
        sys.stdout.write(done.stdout)
        return done.returncode
    job = found[1]
    log = _log(job, asked)
    console.say(
        *_columns(
            [
                ("submitted", f"job {job}", ""),
                ("log", log, ""),
                ("follow", f"tail -F {log}", ""),
                ("stop", f"scancel {job}", ""),
                ("requeue", f"scancel --batch --signal=USR1 {job}", "saves first"),
            ]
        )
    )
    return 0


def _log(job: str, asked: Asked) -> str:
    """The job's log as a shell takes it; `*` stands for the member of an array."""
    default = "slurm-%A_%a.out" if "array" in asked else "slurm-%j.out"
    pattern = os.path.join(asked.get("chdir", ("", ""))[0] or "", asked.get("output", (None, ""))[0] or default)
    pattern = re.sub(r"%([jA])", job, pattern).replace("%x", asked.get("job-name", (None, ""))[0] or "%x")
    return "*".join(shlex.quote(part) if part else "" for part in pattern.split("%a"))


def _shown(asked: Asked) -> list[tuple[str, str, str]]:
    rows = [(name, "yes" if value is None else value, where) for name, (value, where) in asked.items()]
    if "exclusive" in asked and not {"gpus", "gpus-per-node", "gpus-per-task", "gres"} & asked.keys():
        rows.append(("gpus-per-node", "all that a node has", "--exclusive"))
    return sorted(rows, key=lambda row: FIRST.index(row[0]) if row[0] in FIRST else len(FIRST))


def _columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Name, value and, where there is one, a remark."""
    left = max(len(name) for name, _, _ in rows)
    middle = max((len(value) for _, value, remark in rows if remark), default=0)
    return [f"{name:<{left}}  {value:<{middle}}  {remark}".rstrip() for name, value, remark in rows]


@contextlib.contextmanager
def _folder_of_job(options: Sequence[Option]) -> Iterator[None]:
    """Paths are meant from the folder that the job will run in. Raises UserError if it is not there."""
    here = os.getcwd()
    try:
        os.chdir(next((option.value for option in reversed(options) if option.name == "chdir"), None) or here)
    except OSError as error:
        raise UserError(f"--chdir: {error}") from None
    try:
        yield
    finally:
        os.chdir(here)


def _python(asked: Asked) -> dict[str, str]:
    """The job runs under this interpreter, unless the user names another one or an image brings it."""
    exported = (asked["export"][0] or "").upper().startswith("ALL") if "export" in asked else True
    if "PYTHON" in os.environ or "container-image" in asked or "container" in asked or not exported:
        return {}
    return {"PYTHON": sys.executable}


if __name__ == "__main__":
    sys.exit(main())
