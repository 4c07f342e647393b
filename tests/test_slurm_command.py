"""vit-dist slurm: what is refused before machines are asked for, and the very command that is given to sbatch.

sbatch is a program here that writes down what it gets; tests/slurm/ has the real one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from lab import fork

from vit_dist.commands import slurm
from vit_dist.errors import UserError

ROOT = Path(__file__).parents[1]
SBATCH = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORDED"], "w") as file:
    json.dump([sys.argv[1:], os.environ.get("PYTHON")], file)
print("Submitted batch job 7")
"""
REFUSES = "#!/bin/sh\necho sbatch: error: invalid partition specified: nope >&2\nexit 1\n"


class Login:
    """A login node: a folder to submit from, and an sbatch."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd, self.recorded = folder, capfd, folder / "recorded.json"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program(SBATCH)
        self.scontrol("")

    def program(self, text: str, name: str = "sbatch") -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def scontrol(self, line: str) -> None:
        self.program(f"#!/bin/sh\necho '{line}'\n", "scontrol")

    def submit(self, *words: str) -> str:
        """What is printed for a command that is accepted."""
        assert slurm.main(words) == 0
        self.told = self.capfd.readouterr()
        return self.told.out

    def submitted(self) -> list[str]:
        """What sbatch got."""
        return json.loads(self.recorded.read_text())[0]

    def error(self, *words: str) -> str:
        """The one line that says why nothing is submitted."""
        assert slurm.main(words) == 2
        told = self.capfd.readouterr()
        assert (told.out, told.err.count("\n"), self.recorded.exists()) == ("", 1, False), told
        return told.err

    def shown(self, *words: str) -> dict[str, Sequence[str]]:
        """The rows of --print: name -> value, remark."""
        return {row[0]: row[1:] for row in map(str.split, self.submit(*words, "--print").splitlines())}


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Login:
    for name in [name for name in os.environ if name.startswith("SBATCH_") or name in slurm.PASSED]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    found = Login(tmp_path, capfd)
    monkeypatch.setenv("RECORDED", str(found.recorded))
    monkeypatch.setenv("PATH", f"{found.bin}:{os.environ['PATH']}")
    return found


def test_words_of_the_user_reach_sbatch_unchanged(login: Login) -> None:
    words = ["digits", "--run_name", "it's 2 words; $HOME *", "--learning_rate=3e-5"]
    login.submit("-N", "4", "--gpus-per-node=8", "-J", "train", "--", "train", *words, "--strategy", "fsdp2")
    script = str(ROOT / "slurm" / "train.sh")
    assert login.submitted() == [
        "-N", "4", "--gpus-per-node=8", "-J", "train", script, "train", "--strategy", "fsdp2", *words,
    ]  # fmt: skip
    assert json.loads(login.recorded.read_text())[1] == sys.executable, "the interpreter that checked the command"
    login.submit("doctor", "digits", "--strategy=zero1")
    assert login.submitted() == [script, "doctor", "--strategy", "zero1", "digits"]


@pytest.mark.parametrize(
    "options", ["-J train", "-Jtrain", "--job-name sweep -N4", "--exclusive --wait -H", "--exclusive=user -W -t 5",
                "--no-container-mount-home --container-image img", "--option-of-a-later-slurm train"],
)  # fmt: skip
def test_options_before_the_two_dashes_are_those_of_sbatch(options: str) -> None:
    request = slurm.parse([*options.split(), "--", "train", "digits", "--run_name", "doctor"])
    assert (request.command, request.arguments) == ("train", ["digits", "--run_name", "doctor"])
    assert request.sbatch == options.split()


@pytest.mark.parametrize("options", ["-t 5", "-t5", "--time 5", "--time=5", "-t 9 --time 5 --test-only"])
def test_option_of_sbatch_is_read_in_each_spelling(options: str) -> None:
    assert slurm.value(options.split(), "--time", "-t") == "5"
    assert slurm.value(options.split(), "--array", "-a") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no command"),
        (["-N", "2", "--"], "there is no command"),
        (["-N", "2", "train", "digits"], "put `--` behind the options of sbatch"),
        (["-N", "2", "--", "trian"], "trian is no command; did you mean train"),
        (["digits"], "digits is no command; commands are train, doctor, sweep"),
        (["train", "--strategy"], "expected one argument"),
        (["train", "digits", "--nproc", "2"], "--nproc: Slurm decides nodes and processes"),
        (["train", "--throttle", "2"], "--throttle K is for a sweep"),
        (["sweep", "a.yaml", "--throttle", "0"], "1 or more"),
    ],
)
def test_slurm_verb_with_unknown_words_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        slurm.parse(words)


def test_slurm_verb_refuses_what_the_job_would(login: Login) -> None:
    assert "did you mean --learning_rate?" in login.error("train", "--learnin_rate", "1")
    assert "did you mean cifar10?" in login.error("train", "cifr10")
    assert "unknown strategy fsdp; did you mean" in login.error("train", "--strategy", "fsdp")
    assert "--strategy ./mine.yaml: there is no such file" in login.error("train", "--strategy", "./mine.yaml")
    (login.folder / "mine.yaml").write_text("learning_rate: 1\n")
    assert "no configuration of Accelerate" in login.error("train", "--strategy", "./mine.yaml")
    (login.folder / "photos").mkdir()
    missing = login.error("doctor", "--data", "./photo")
    assert f"--data ./photo: there is no such file or folder (did you mean {login.folder / 'photos'}?)" in missing
    (login.folder / "file").touch()
    assert "output_dir file is a file" in login.error("train", "--output_dir", "file")
    assert "the sweep's file comes first" in login.error("sweep", "--seed", "1")
    assert "there is no sweep file no.yaml" in login.error("sweep", "no.yaml")
    (login.folder / "bad.yaml").write_text("recipe: digits\ngrid: {seed: [1, x]}\n")
    assert "bad.yaml:2: seed: invalid int value" in login.error("sweep", "bad.yaml")


def test_without_sbatch_it_can_only_be_shown(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no sbatch on this machine" in login.error("train")
    assert "command" in login.shown("train")


def test_slurm_verb_with_a_strategy_without_its_package_warns(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "deepspeed" else find(name, *at))
    login.submit("-t", "5", "--", "train", "--strategy", "zero2")
    assert login.told.err == "note: deepspeed is not installed here, and zero2 needs it on the nodes\n"


def test_printing_starts_nothing_and_can_be_pasted(login: Login) -> None:
    words = ("-N", "2", "-t", "5", "--", "train", "digits", "--run_name", "a b; $HOME", "--strategy", "ddp")
    printed = login.submit(*words, "--print")
    assert not login.recorded.exists() and login.told.err == ""
    line = next(line for line in printed.splitlines() if line.startswith("command")).removeprefix("command")
    subprocess.run(["bash", "-c", line], check=True, timeout=60)
    pasted = login.recorded.read_text()
    login.submit(*words)
    assert login.recorded.read_text() == pasted


def test_slurm_verb_shows_what_script_and_environment_ask_for(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = login.submit("train", "--print")
    assert f"script       {ROOT / 'slurm' / 'train.sh'}\n" in printed
    assert "it asks for  --job-name=vit_dist --nodes=1 --ntasks-per-node=1 --exclusive" in printed
    assert "environment" not in printed
    assert login.told.err == "note: no --time was given: the partition's default limit holds\n"
    monkeypatch.setenv("SBATCH_TIMELIMIT", "60")
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    printed = login.submit("-p", "gpu", "--", "train", "--print")
    assert "environment  SBATCH_PARTITION=cpu SBATCH_TIMELIMIT=60" in printed and "sbatch -p gpu" in printed
    assert login.told.err == ""


def test_interpreter_of_an_image_or_of_the_user_is_kept(login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    assert login.shown("train")["command"][:2] == ["env", f"PYTHON={sys.executable}"]
    assert login.shown("--container-image", "img", "--", "train")["command"][0] == "sbatch"
    monkeypatch.setenv("PYTHON", "/opt/python")
    assert login.shown("train")["command"][:3] == ["env", "PYTHON=/opt/python", "sbatch"]
    monkeypatch.delenv("PYTHON")
    assert login.shown("--export=NONE", "--", "train")["command"][0] == "sbatch"
    assert "--export=NONE: the job takes the interpreter of its checkout" in login.told.err


def test_paths_are_those_of_the_folder_that_the_job_runs_in(login: Login) -> None:
    (login.folder / "elsewhere").mkdir()
    (login.folder / "elsewhere" / "mine.yaml").write_text("data: digits\nmodel: tiny\n")
    assert "no recipe mine.yaml" in login.error("train", "mine.yaml")
    login.submit("-D", "elsewhere", "--", "train", "mine.yaml")
    assert login.submitted()[:2] == ["-D", "elsewhere"] and Path.cwd() == login.folder
    login.recorded.unlink()
    assert "--chdir: " in login.error("--chdir=nowhere", "--", "train")


def test_slurm_verb_for_a_run_with_other_settings_is_refused(login: Login) -> None:
    fork("digits", "--max_steps", 1, "--report_to", "none", "--output_dir", login.folder / "begun")
    assert "holds a complete run with other settings: max_steps 1 -> 2" in login.error(
        "train", "digits", "--max_steps", "2", "--report_to", "none", "--output_dir", "begun"
    )
    for more in (["--allow_change", "max_steps"], ["--fresh"]):
        login.submit("train", "digits", "--max_steps", "2", "--report_to", "none", "--output_dir", "begun", *more)


def test_slurm_verb_prints_how_to_follow_and_stop_the_job(login: Login) -> None:
    login.scontrol("   StdOut=/home/me/vit_dist-7.log")
    told = login.submit("train")
    for part in ("job 7", "tail -F /home/me/vit_dist-7.log", "scancel 7", "scancel --batch --signal=USR1 7"):
        assert part in told
    login.scontrol("   StdOut=/home/me/my logs/x-7.log")
    assert "tail -F '/home/me/my logs/x-7.log'" in login.submit("train")
    login.scontrol("slurm_load_jobs error: Invalid job id specified")
    told = login.submit("train")
    assert "scancel 7" in told and "tail" not in told
    login.recorded.unlink()
    assert "--array: all of them would be one run" in login.error("-a", "1,2", "--", "train")
    (login.folder / "a b").mkdir()
    (login.folder / "a b" / "s.yaml").write_text("recipe: digits\ngrid: {seed: [1, 2, 3]}\n")
    for pending in ("%a", "4294967294"):
        login.scontrol(f"   StdOut=/home/a b/7_{pending}.log")
        told = login.submit("-a", "1,2", "-D", "a b", "--", "sweep", "s.yaml")
        assert "tail -F '/home/a b/7_'*.log\n" in told, "all members of an array"


def test_refusal_of_sbatch_is_printed_unchanged(login: Login) -> None:
    login.program(REFUSES)
    assert slurm.main(["-t", "5", "-p", "nope", "--", "train"]) == 1
    assert login.capfd.readouterr() == ("", "sbatch: error: invalid partition specified: nope\n")


def test_slurm_verb_submits_a_sweep_as_an_array(login: Login) -> None:
    file = str(ROOT / "configs" / "sweeps" / "lr.yaml")
    script = str(ROOT / "slurm" / "sweep.sh")
    login.submit("-t", "5", "--", "sweep", file, "--throttle", "4", "--strategy", "ddp", "--bf16", "false")
    assert login.submitted() == [
        "-t", "5", "--array=0-11%4", script, file, "--strategy", "ddp", "--bf16", "false",
    ]  # fmt: skip
    login.submit("sweep", file)
    assert login.submitted() == ["--array=0-11", script, file]
    login.submit("-a", "3,5-11:2%1", "--", "sweep", file)
    assert login.submitted() == ["-a", "3,5-11:2%1", script, file]
    login.recorded.unlink()
    assert "has members 0 to 11" in login.error("--array=0-12", "--", "sweep", file)
    assert "alone" in login.error("--array=0-3", "--", "sweep", file, "--throttle", "2")


def test_wheel_has_the_scripts(tmp_path: Path) -> None:
    """A wheel, without the checkout: the scripts are there, executable, and find each other."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "DRY_RUN": "1"}
    cluster = site / "vit_dist" / "cluster"

    def output(*command: object) -> str:
        words = list(map(str, command))
        return subprocess.run(
            words, cwd=tmp_path, env=env, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    launched = shlex.split(output(cluster / "launch" / "accelerate.sh", "fsdp2", "digits"))
    assert launched[launched.index("--config_file") + 1] == str(cluster / "configs" / "accelerate" / "fsdp2.yaml")
    shown = output(sys.executable, "-m", "vit_dist.cli", "slurm", "train", "--strategy", "fsdp2", "--print")
    assert f"script       {cluster / 'slurm' / 'train.sh'}\n" in shown
