"""The files for Kubernetes and SkyPilot: what they promise their systems, and the commands that their nodes make.

No cluster is reached. What the systems set in the environment is written down from their sources: Training Operator 1.9
(pkg/controller.v1/pytorch/envvar.go, pkg/util/train/train_util.go) and SkyPilot 0.14 (docs: environment variables).
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import rows

ROOT = Path(__file__).parents[1]
PYTORCHJOB = yaml.safe_load((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())
SKYPILOT = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
REPLICAS = PYTORCHJOB["spec"]["pytorchReplicaSpecs"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def node(command: list[str], tmp_path: Path, gpus: int, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a node with so many GPUs would start, from the repository's root with nothing of ours set."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {i}: Test (UUID: GPU-{i}a7c)'\n" for i in range(gpus)))
    smi.chmod(0o755)
    base = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "DRY_RUN": "1"}
    return subprocess.run(
        command, env={**base, "PYTHON": sys.executable, **env}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def value(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, command
    return command[command.index(flag) + 1]


def operator(rank: int, replicas: int, processes: str = "auto") -> dict[str, str]:
    """The environment that Training Operator 1.9 gives to the container of this rank. Its address is this machine's."""
    world = replicas * (int(processes) if processes.isdigit() else 1)
    port = free_port()
    return {
        "PYTHONUNBUFFERED": "1", "MASTER_PORT": port, "PET_MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world), "RANK": str(rank), "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": processes, "PET_NNODES": str(replicas),
    }  # fmt: skip


def container(replica: str) -> dict[str, Any]:
    (only,) = REPLICAS[replica]["template"]["spec"]["containers"]
    return dict(only)


def node_command(replica: str) -> list[str]:
    """The container's command, of this checkout instead of the image's."""
    (program,) = container(replica)["command"]
    return [str(ROOT / Path(program).relative_to(container(replica)["workingDir"])), *container(replica)["args"]]


@pytest.mark.parametrize("rank", [0, 1])
def test_containers_of_a_pytorchjob_start_one_job(rank: int, tmp_path: Path) -> None:
    replica = "Master" if rank == 0 else "Worker"
    env = operator(rank, sum(spec["replicas"] for spec in REPLICAS.values()))
    gpus = container(replica)["resources"]["limits"]["nvidia.com/gpu"]
    done = node(node_command(replica), tmp_path, gpus, env)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    flags = ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port")
    assert [value(command, flag) for flag in flags] == ["2", str(rank), "16", "127.0.0.1", env["MASTER_PORT"]]
    assert command[-6:] == ["-m", "vit_dist.train", *container(replica)["args"][2:]]


def test_processes_per_node_of_a_pytorchjob_and_what_it_cannot_be(tmp_path: Path) -> None:
    script = str(ROOT / "launch" / "kubernetes" / "node.sh")
    done = node([script, "ddp"], tmp_path, 8, operator(1, 3, "4"))
    assert value(shlex.split(done.stdout), "--num_processes") == "12"
    elastic = node([script, "ddp"], tmp_path, 8, {**operator(0, 2), "PET_NNODES": "1:4"})
    assert elastic.returncode == 2 and elastic.stderr.startswith(
        "error: PET_NNODES is 1:4; a job with an elasticPolicy"
    )
    outside = node([script, "ddp"], tmp_path, 8, {})
    assert outside.returncode == 2 and outside.stderr.startswith("error: PET_NNODES is not set on ")


def test_variables_of_the_operator_are_not_passed_to_torchrun(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\nenv\n')
    python.chmod(0o755)
    env = {**operator(0, 2), "PYTHON": str(python), "DRY_RUN": "0"}
    done = node([str(ROOT / "launch" / "kubernetes" / "node.sh"), "ddp"], tmp_path, 8, env)
    names = [line.split("=")[0] for line in done.stdout.splitlines()]
    assert "NNODES" in names and not [name for name in names if name.startswith("PET_")]


@pytest.mark.cluster  # a pid namespace of its own needs root
def test_container_asked_to_end_saves_the_run(photos: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The script is process 1, as in a container, where a signal without a handler does nothing."""
    folder = tmp_path / "run"
    words = [
        "ddp", "--data", photos, "--model", checkpoint, "--output_dir", folder, "--max_steps", "5000",
        "--per_device_train_batch_size", "4", "--logging_steps", "1", "--report_to", "none",
    ]  # fmt: skip
    port = free_port()
    containers = []
    for rank in (0, 1):
        env = {**operator(rank, 2, "1"), "MASTER_PORT": port, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        alone = [
            "unshare",
            "--fork",
            "--pid",
            "--kill-child",
            "--mount-proc",
            ROOT / "launch" / "kubernetes" / "node.sh",
        ]
        containers.append(
            subprocess.Popen(
                [*alone, *words],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        deadline = time.monotonic() + 120
        while not any("loss" in row for row in rows(folder)):
            assert all(container.poll() is None for container in containers) and time.monotonic() < deadline
            time.sleep(0.05)
        (first,) = psutil.Process(containers[1].pid).children()
        first.terminate()
        outputs = [container.communicate(timeout=60)[0] for container in containers]
    finally:
        for container in containers:
            container.kill()
    assert all(0 < container.returncode < 128 for container in containers), "to ExitCode these were permanent errors"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["by"]) == ("preempted", "SIGTERM on rank 1"), "\n".join(outputs)
    assert (folder / f"checkpoint-{status['step']}").is_dir()


def test_pytorchjob_has_time_to_save_and_restarts() -> None:
    assert (PYTORCHJOB["apiVersion"], PYTORCHJOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert PYTORCHJOB["spec"]["runPolicy"]["backoffLimit"] > 0, "or a run that always fails is started for ever"
    for name, spec in REPLICAS.items():
        assert spec["restartPolicy"] == "OnFailure", "ExitCode takes 75 and 1 for permanent errors"
        pod, only = spec["template"]["spec"], container(name)
        assert pod["terminationGracePeriodSeconds"] > 110, "PET_SHUTDOWN_TIMEOUT, and room"
        assert only["name"] == "pytorch" and only["ports"][0]["name"] == "pytorchjob-port", (
            "the operator looks for them"
        )
        mounts = {mount["name"]: mount["mountPath"] for mount in only["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]} and mounts["shm"] == "/dev/shm"
        assert only["args"][only["args"].index("--output_dir") + 1].startswith(f"{mounts['shared']}/")
        keys = [entry for entry in only["env"] if "KEY" in entry["name"] or "TOKEN" in entry["name"]]
        assert keys and all("secretKeyRef" in entry["valueFrom"] for entry in keys)
    assert REPLICAS["Master"]["replicas"] == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_nodes_of_skypilot_start_one_job(rank: int, tmp_path: Path) -> None:
    gpus = SKYPILOT["resources"]["accelerators"].split(":")[1]
    env = {
        "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
    }  # fmt: skip
    run = SKYPILOT["run"].replace("PYTHON=.venv/bin/python", f"PYTHON={shlex.quote(sys.executable)}")
    done = node(["bash", "-c", run], tmp_path, int(gpus), {**env, "MASTER_PORT": free_port()})
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    flags = ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip")
    assert [value(command, flag) for flag in flags] == ["2", str(rank), str(2 * int(gpus)), "127.0.0.1"]
    recipe = command[command.index("vit_dist.train") + 1]
    assert (ROOT / recipe).is_file()


def test_skypilot_job_keeps_its_run_in_the_bucket() -> None:
    ((folder, bucket),) = SKYPILOT["file_mounts"].items()
    assert bucket["mode"] == "MOUNT_CACHED" and f"--output_dir {folder}/" in SKYPILOT["run"]
    assert SKYPILOT["num_nodes"] == 1, "a bucket is no file system that several nodes can share"
    assert SKYPILOT["resources"]["use_spot"] and SKYPILOT["workdir"] == "."
    assert "constraints.txt" in SKYPILOT["setup"] and (ROOT / "constraints.txt").is_file()


@pytest.mark.external  # pip install skypilot
def test_skypilot_accepts_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import sky

    monkeypatch.chdir(ROOT)
    task = sky.Task.from_yaml("launch/skypilot.yaml")
    assert task.num_nodes == 1 and "launch/accelerate.sh" in task.run


@pytest.mark.external  # PYTORCHJOB_CRD: the path of the operator's schema file; pip install jsonschema
def test_schema_of_the_operator_accepts_the_pytorchjob() -> None:
    """With kubeflow.org_pytorchjobs.yaml of the operator's manifests/base/crds."""
    import jsonschema

    def closed(schema: Any) -> Any:
        """A misspelt field is an error, not something to be pruned."""
        if isinstance(schema, list):
            return [closed(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        copy = {key: closed(item) for key, item in schema.items()}
        if isinstance(copy.get("properties"), dict) and copy.get("type") == "object":
            copy.setdefault("additionalProperties", False)
        return copy

    crd = yaml.safe_load(Path(os.environ["PYTORCHJOB_CRD"]).read_text())
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(PYTORCHJOB, schema)
    broken = yaml.safe_load((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())
    broken["spec"]["runPolicy"]["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(broken, schema)
