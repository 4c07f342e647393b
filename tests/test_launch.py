"""The launch scripts: the commands they make, what they refuse, and two nodes that really train together."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vit_dist.launch.topology import FLAGS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
CONFIGS = ROOT / "configs" / "accelerate"
STRATEGIES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
TOPOLOGY = (
    "NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "HSDP_REPLICAS",
    "DRY_RUN", "OMP_NUM_THREADS",
)  # fmt: skip
TWO_NODES = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}


def program(folder: Path, name: str, script: str) -> Path:
    """A folder for the front of PATH with a program in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


class Scripts:
    """Runs launch scripts on a node with a given number of GPUs, and without anything that this process's node has."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.modules = tmp_path / "modules"
        (self.modules / "deepspeed").mkdir(parents=True)  # looks installed
        (self.modules / "deepspeed" / "__init__.py").touch()

    def env(self, gpus: int, **env: str) -> dict[str, str]:
        listed = "\n".join(f"GPU {i}: Test (UUID: GPU-{i}a7c)" for i in range(gpus))
        smi = f"printf '{listed}\n'" if gpus else "echo No devices were found; exit 6"
        path = f"{program(self.tmp_path / f'gpus{gpus}', 'nvidia-smi', smi)}:{os.environ['PATH']}"
        clean = {name: value for name, value in os.environ.items() if name not in TOPOLOGY}
        return {**clean, "PYTHON": sys.executable, "PATH": path, **env}

    def run(self, line: str, *args: str, gpus: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        script, *words = line.split()
        return subprocess.run(
            [LAUNCH / f"{script}.sh", *words, *args],
            env=self.env(gpus, **{"PYTHONPATH": str(self.modules), "DRY_RUN": "1", **env}),
            cwd=self.tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def command(self, line: str, *args: str, gpus: int = 0, **env: str) -> list[str]:
        """The words of the command that would be started."""
        done = self.run(line, *args, gpus=gpus, **env)
        assert done.returncode == 0, done.stderr
        return shlex.split(done.stdout)

    def error(self, line: str, *args: str, gpus: int = 0, **env: str) -> str:
        """The one line that says why nothing is started."""
        done = self.run(line, *args, gpus=gpus, **{"DRY_RUN": "", **env})
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def value(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, command
    return command[command.index(flag) + 1]


def accelerate_reads(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """The settings that `accelerate launch` makes of a command, and what it would put in the environment."""
    from accelerate.commands import launch
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    words = command[command.index("accelerate.commands.launch") + 1 :]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return args, prepare_deepspeed_cmd_env(args)[1]
    if args.use_fsdp or args.multi_gpu:
        return args, prepare_multi_gpu_env(args)
    return args, prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("line", ["torchrun", "accelerate ddp"])
def test_visible_gpus_get_a_process_each(scripts: Scripts, line: str) -> None:
    flag = "--nproc-per-node" if line == "torchrun" else "--num_processes"
    assert value(scripts.command(line, gpus=4), flag) == "4"
    for visible in ("1,3", "GPU-2a7c,0", " 0, 1"):
        assert value(scripts.command(line, gpus=4, CUDA_VISIBLE_DEVICES=visible), flag) == "2"
    assert value(scripts.command(line, gpus=4, NPROC_PER_NODE="3"), flag) == "3"
    assert value(scripts.command(line, gpus=4, NPROC_PER_NODE="8", CUDA_VISIBLE_DEVICES=""), flag) == "8", "on CPUs"


@pytest.mark.parametrize("line", ["torchrun", "accelerate ddp"])
def test_verb_recipe_and_words_with_spaces_reach_the_module(scripts: Scripts, line: str) -> None:
    words = ["my recipe.yaml", "--run_name", "it's 2 words; $HOME *", "--empty", ""]
    assert scripts.command(line, *words, gpus=2)[-7:] == ["-m", "vit_dist.train", *words]
    assert scripts.command(line, "train", *words, gpus=2)[-7:] == ["-m", "vit_dist.train", *words]
    assert scripts.command(line, "doctor", *words, gpus=2)[-7:] == ["-m", "vit_dist.commands.doctor", *words]


def test_dry_run_prints_a_command_that_can_be_pasted(scripts: Scripts) -> None:
    done = scripts.run("torchrun", "a b", "it's", NPROC_PER_NODE="1")
    assert done.stdout.count("\n") == 1
    script = f'env() {{ printf "%s\\n" "$@"; }}; {done.stdout}'
    pasted = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert pasted.stdout.splitlines()[-5:] == [sys.executable, "-m", "vit_dist.train", "a b", "it's"]


def test_torchrun_on_one_node(scripts: Scripts) -> None:
    several = scripts.command("torchrun", gpus=2)
    assert "--standalone" in several and "--master-port" not in several, "two runs on a machine must not meet"
    port = scripts.command("torchrun", gpus=2, MASTER_PORT="29871", MASTER_ADDR="an-earlier-jobs-node")
    assert value(port, "--master-port") == "29871" and value(port, "--master-addr") == "127.0.0.1"
    alone = scripts.command("torchrun", gpus=1, MASTER_PORT="29871")
    assert alone[-3:] == [sys.executable, "-m", "vit_dist.train"] and "torch.distributed.run" not in alone
    assert {"RANK", "WORLD_SIZE", "MASTER_PORT"} <= set(alone), "an outer launcher's variables are taken away"


def test_processes_of_two_nodes_are_counted_per_node_or_in_all(scripts: Scripts) -> None:
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    torchrun = scripts.command("torchrun", gpus=4, **nodes)
    flags = ("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port")
    assert [value(torchrun, flag) for flag in flags] == ["2", "1", "4", "10.0.0.1", "29500"]
    accelerate = scripts.command("accelerate ddp", gpus=4, **nodes, MASTER_PORT="29871")
    flags = ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port")
    assert [value(accelerate, flag) for flag in flags] == ["2", "1", "8", "10.0.0.1", "29871"]
    assert "--same_network" in accelerate
    assert value(accelerate, "--config_file") == str(CONFIGS / "ddp_multinode.yaml")


@pytest.mark.parametrize("line", ["torchrun", "accelerate ddp", "accelerate zero1", "accelerate single"])
def test_processes_get_their_share_of_the_cores(scripts: Scripts, line: str) -> None:
    cores = len(os.sched_getaffinity(0))
    processes = {} if line == "accelerate single" else {"NPROC_PER_NODE": "2"}
    share = cores if line == "accelerate single" else max(1, cores // 2)
    assert f"OMP_NUM_THREADS={share}" in scripts.command(line, **processes)
    assert "OMP_NUM_THREADS=1" in scripts.command(line, VIT_DIST_CPUS="1", **processes)
    assert "OMP_NUM_THREADS=1" in scripts.command("torchrun", NPROC_PER_NODE="16")
    assert not [word for word in scripts.command(line, OMP_NUM_THREADS="3", **processes) if "OMP_NUM" in word]


OTHER = {("single", 1), ("single", 2), ("ddp_multinode", 1)}  # started without accelerate, or refused; see below


@pytest.mark.parametrize(("strategy", "nodes"), [(s, n) for s in STRATEGIES for n in (1, 2) if (s, n) not in OTHER])
def test_accelerate_takes_every_strategy_as_meant(
    scripts: Scripts, strategy: str, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"} if nodes == 2 else {}
    if strategy == "hsdp" and nodes == 1:
        env["HSDP_REPLICAS"] = "2"
    args, given = accelerate_reads(scripts.command(f"accelerate {strategy}", gpus=4, **env), monkeypatch)
    assert (args.num_processes, args.num_machines, args.training_script) == (nodes * 4, nodes, "vit_dist.train")
    assert args.multi_gpu == strategy.startswith("ddp")
    assert args.nproc_per_node == "4", "started by torchrun's agent, on every node"
    if strategy.startswith("zero"):
        assert given["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert given["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == strategy[4]
        assert args.deepspeed_multinode_launcher == "standard"
    if strategy in ("fsdp2", "hsdp"):
        assert (given["ACCELERATE_USE_FSDP"], given["FSDP_VERSION"]) == ("true", "2")
        assert given["FSDP_RESHARD_AFTER_FORWARD"] == "true", "the file's settings hold beside the flags"
    sizes = [given.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE") for name in ("REPLICATE", "SHARD")]
    assert sizes == (["2", str(nodes * 2)] if strategy == "hsdp" else [None, None])


def test_default_config_of_the_user_is_ignored(scripts: Scripts) -> None:
    for strategy in set(STRATEGIES) - {"single"}:
        env = {"NODE_RANK": "1", **TWO_NODES} if strategy == "ddp_multinode" else {"HSDP_REPLICAS": "2"}
        command = scripts.command(f"accelerate {strategy}", gpus=4, **env)
        assert value(command, "--config_file") == str(CONFIGS / f"{strategy}.yaml")


@pytest.mark.parametrize(("line", "gpus"), [("accelerate single", 4), ("accelerate ddp", 1)])
def test_single_process_is_started_without_launcher(scripts: Scripts, line: str, gpus: int) -> None:
    done = scripts.run(line, "--seed", "1", gpus=gpus)
    assert shlex.split(done.stdout)[-4:] == ["-m", "vit_dist.train", "--seed", "1"]
    assert "accelerate" not in done.stdout
    assert done.stderr.startswith("note: one process") == (line == "accelerate ddp")


def test_launch_with_a_configuration_file_of_the_user_passes_it_on(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "my own.yaml").write_text("distributed_type: MULTI_GPU\n")
    assert value(scripts.command("accelerate", "my own.yaml", gpus=2), "--config_file") == "my own.yaml"
    assert "--strategy gone.yaml: there is no such file" in scripts.error("accelerate", "gone.yaml", gpus=2)
    recipe = str(ROOT / "configs" / "recipes" / "cifar10.yaml")
    assert "the strategy comes first" in scripts.error("accelerate", recipe, gpus=2)


def test_strategies_are_the_files_and_a_near_one_is_named(scripts: Scripts) -> None:
    message = scripts.error("accelerate zero2_offload")
    names = ", ".join(STRATEGIES)
    assert message == f"error: unknown strategy zero2_offload; did you mean zero3_offload? strategies are {names}\n"
    assert "did you mean" not in scripts.error("accelerate --data")


def test_help_teaches_and_a_missing_strategy_is_an_error(scripts: Scripts) -> None:
    shown, missing = scripts.run("accelerate --help"), scripts.run("accelerate")
    assert (shown.returncode, missing.returncode) == (0, 2) and shown.stdout == missing.stderr
    assert all(f"\n  {strategy} " in shown.stdout for strategy in STRATEGIES) and "--node_rank 0" in shown.stdout
    assert all(f"\n  --{flag} " in shown.stdout and variable in shown.stdout for flag, (variable, _) in FLAGS.items())
    assert scripts.run("torchrun --help").stdout == shown.stdout


def test_help_of_the_training_needs_no_gpu(scripts: Scripts) -> None:
    for line in ("torchrun train --help", "accelerate zero3 --help"):
        assert scripts.run(line).stdout.startswith("usage: vit-dist train")


def test_flags_of_the_command_line_win_over_variables(scripts: Scripts) -> None:
    flags = ["--nproc", "4", "--nodes=2", "--node_rank", "1", "--master_addr", "10.0.0.1", "--master_port", "29871"]
    for words in (["--seed", "1", *flags], [*flags, "--seed", "1"]):
        found = scripts.command("torchrun", *words, NPROC_PER_NODE="9", NNODES="1", MASTER_PORT="1")
        names = ("--nnodes", "--node-rank", "--nproc-per-node", "--master-addr", "--master-port")
        assert [value(found, flag) for flag in names] == ["2", "1", "4", "10.0.0.1", "29871"]
        assert found[-4:] == ["-m", "vit_dist.train", "--seed", "1"]
    assert scripts.error("torchrun", "--nproc", "x").startswith("error: --nproc is 'x' on ")
    assert "--strategy needs a name" in scripts.error("torchrun", "--strategy=")
    assert "two strategies, ddp and --strategy fsdp2" in scripts.error("accelerate ddp", "--strategy", "fsdp2")
    assert "--replicas is for hsdp, not for ddp" in scripts.error("accelerate ddp", "--replicas", "2", gpus=2)
    several = ["--nodes", "2", "--node_rank", "1", "--master_addr"]
    for name in ("a..b", "x" * 64):
        assert f"--master_addr={name[:40]}" in scripts.error("torchrun", *several, name, gpus=2)


def test_output_of_nvidia_smi_that_is_no_text_is_one_line(scripts: Scripts, tmp_path: Path) -> None:
    for number, script in enumerate((r"printf '\\377\\n'; exit 1", "yes x | head -c 3000 | tr -d '\\n'; exit 1")):
        path = f"{program(tmp_path / str(number), 'nvidia-smi', script)}:{os.environ['PATH']}"
        assert len(scripts.error("torchrun", PATH=path)) < 500
    assert scripts.error("torchrun", "--nodes", "2", "--node_rank", "0").startswith("error: --nodes is 2, but MASTER")


def test_without_a_gpu_one_line_says_what_to_set(scripts: Scripts, tmp_path: Path) -> None:
    cure = "set NPROC_PER_NODE=N or --nproc N to start N processes on CPUs\n"
    for line in ("torchrun", "accelerate ddp", "accelerate zero3"):
        assert scripts.error(line).endswith(f"(nvidia-smi says: No devices were found); {cure}")
        assert scripts.error(line, CUDA_VISIBLE_DEVICES="0").endswith(
            f"(nvidia-smi says: No devices were found); {cure}"
        )
    hidden = scripts.error("torchrun", gpus=2, CUDA_VISIBLE_DEVICES="")
    assert "CUDA_VISIBLE_DEVICES='' hides all" in hidden and hidden.endswith(cure)
    for folder in reversed(os.environ["PATH"].split(":")):  # all programs but one
        for found in Path(folder).glob("*"):
            if found.name != "nvidia-smi" and not (link := tmp_path / "all" / found.name).is_symlink():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(found)
    assert "(there is no nvidia-smi)" in scripts.error("torchrun", PATH=str(tmp_path / "all"))


def test_gpus_that_are_not_there_are_not_asked_for(scripts: Scripts) -> None:
    for visible in ("0,5", "GPU-ffff", "0,,1", "0,x"):
        message = scripts.error("torchrun", gpus=2, CUDA_VISIBLE_DEVICES=visible)
        assert f"CUDA_VISIBLE_DEVICES={visible} asks for GPU" in message
    assert "NPROC_PER_NODE is 3, but" in scripts.error("accelerate ddp", gpus=2, NPROC_PER_NODE="3")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NODE_RANK": "0"}, "NNODES is 2, but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "10.0.0.1"}, "NNODES is 2, but NODE_RANK is not set"),
        ({"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "2"}, "NODE_RANK is 2, but NNODES is 2"),
        ({"NNODES": "1", "NODE_RANK": "1"}, "NODE_RANK is 1, but NNODES is 1"),
        ({"NNODES": "two"}, "NNODES is 'two'"),
        ({"NNODES": "1", "NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is '0'"),
        ({"NNODES": "1", "NPROC_PER_NODE": "08"}, "NPROC_PER_NODE is '08'"),
        ({"NNODES": "1", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "-1"}, "NODE_RANK is '-1'"),
        ({"MASTER_ADDR": "no-such-node.invalid", "NODE_RANK": "1"}, "MASTER_ADDR=no-such-node.invalid is not known on"),
    ],
)
def test_impossible_topology_is_one_line(scripts: Scripts, env: dict[str, str], message: str) -> None:
    for line in ("torchrun", "accelerate ddp"):
        assert scripts.error(line, gpus=2, **{"NNODES": "2", **env}).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("line", "env", "message"),
    [
        ("single", {"NPROC_PER_NODE": "2"}, "single is one process"),
        ("single", {"NNODES": "2"}, "single is one process"),
        ("ddp_multinode", {}, "ddp_multinode is for several nodes"),
        ("fsdp2", {"NPROC_PER_NODE": "1"}, "fsdp2 has nothing to shard over"),
        ("hsdp", {}, "hsdp with 1 replica is fsdp2"),
        ("hsdp", {"HSDP_REPLICAS": "3"}, "hsdp cannot shard each of 3 replicas over 4 / 3 processes"),
        ("hsdp", {"HSDP_REPLICAS": "4"}, "hsdp cannot shard each of 4 replicas over 4 / 4 processes"),
        ("hsdp", {"HSDP_REPLICAS": "all"}, "HSDP_REPLICAS is 'all'"),
    ],
)
def test_strategy_that_does_not_fit_is_one_line(scripts: Scripts, line: str, env: dict[str, str], message: str) -> None:
    assert scripts.error(f"accelerate {line}", gpus=4, **env).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("package", "line", "cure"),
    [
        ("deepspeed", "accelerate zero1", "pip install deepspeed"),
        ("torch", "torchrun", "activate its environment, or set PYTHON"),
        ("vit_dist", "torchrun", "activate its environment, or set PYTHON"),
    ],
)
def test_missing_package_is_refused_first(scripts: Scripts, package: str, line: str, cure: str) -> None:
    (scripts.modules / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    message = scripts.error(line, gpus=2)
    assert message == f"error: {package} is not installed for {sys.executable}; {cure}\n"
    assert "there is no /nowhere/python" in scripts.error(line, gpus=2, PYTHON="/nowhere/python")


def test_busy_port_is_refused_on_the_node_that_listens(scripts: Scripts) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        for line in ("torchrun", "accelerate ddp"):
            for env in ({}, {"NODE_RANK": "0", **TWO_NODES}):
                message = scripts.error(line, gpus=2, MASTER_PORT=port, **env)
                assert message.startswith(f"error: MASTER_PORT={port} cannot be used on ") and "in use" in message
        elsewhere = scripts.command("torchrun", gpus=2, MASTER_PORT=port, NODE_RANK="1", **TWO_NODES)
        assert value(elsewhere, "--master-port") == port


@pytest.mark.parametrize("script", sorted(LAUNCH.rglob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_parse_and_know_no_batch_system(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    text = script.read_text().lower()
    assert not [word for word in ("slurm_", "sbatch", "srun") if word in text]


@pytest.mark.cluster
@pytest.mark.parametrize("script", sorted(LAUNCH.rglob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_pass_shellcheck(script: Path) -> None:
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.launch
@pytest.mark.parametrize("line", ["torchrun", "accelerate ddp"])
def test_launch_on_two_nodes_trains_one_model(
    scripts: Scripts, line: str, photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    default = tmp_path / "hf" / "accelerate" / "default_config.yaml"  # which must not decide
    default.parent.mkdir(parents=True)
    default.write_text("distributed_type: 'NO'\nnum_processes: 7\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, *words = line.split()
    words += [
        "train",
        "--data",
        str(photos),
        "--model",
        str(checkpoint),
        "--output_dir",
        str(tmp_path / "runs" / "a run"),
    ]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
    nodes = [
        subprocess.Popen(
            [LAUNCH / f"{script}.sh", *words],
            env=scripts.env(
                0, NPROC_PER_NODE="1", NODE_RANK=str(rank), MASTER_PORT=port, OMP_NUM_THREADS="1",
                HF_HOME=str(tmp_path / "hf"), **TWO_NODES,
            ),
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = []
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a run"]
    record = json.loads((tmp_path / "runs" / "a run" / "run.json").read_text())
    assert (record["world_size"], record["attempts"]) == (2, 1)
    assert "error" not in outputs[1] and "note: MASTER_ADDR=127.0.0.1 is" in outputs[1]
    assert "Traceback" not in "".join(outputs), "node 0, which has the store, leaves last"
