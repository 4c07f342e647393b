"""launch/ssh.sh between two hosts: two real ssh servers, whose sessions are processes of this machine."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import rows

ROOT = Path(__file__).parents[1]
SSH = ROOT / "launch" / "ssh.sh"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
SIGNALS_HEARD = ("env", "--default-signal=INT,QUIT,USR1,USR2,HUP")  # whatever started the tests may ignore them
SECRET = "0123456789abcdef-a-key-of-a-user"

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# In place of the interpreter on the hosts, where a test is about processes and not about training: the checks of the
# launcher are real, and what it then starts runs the last argument. `rank` is the node's.
NODE = """#!{python}
import os, pathlib, signal, subprocess, sys, time
if sys.argv[1] == "-":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
rank = int(sys.argv[sys.argv.index("--machine_rank") + 1]) if "--machine_rank" in sys.argv else 0  # one process
def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
exec(sys.argv[-1])
"""


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The ssh configuration for two hosts, `a` and `b`, and one that is `gone`."""
    assert SSHD, "there is no sshd (Debian: apt install openssh-server)"
    root = tmp_path_factory.mktemp("sshd")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / key], check=True, timeout=60)
    ports = {"a": free_port(), "b": free_port(), "gone": free_port()}
    (root / "home").mkdir()
    (root / "config").write_text(
        "".join(f"Host {host}\n  Port {port}\n" for host, port in ports.items())
        + f"Host *\n  HostName 127.0.0.1\n  User {getpass.getuser()}\n  IdentityFile {root}/user\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {root}/known\n  StrictHostKeyChecking no\n  LogLevel ERROR\n"
    )
    servers = []
    for host in ("a", "b"):
        (root / f"sshd_{host}").write_text(
            f"ListenAddress 127.0.0.1:{ports[host]}\nHostKey {root}/host\nAuthorizedKeysFile {root}/user.pub\n"
            f"PidFile none\nStrictModes no\nUsePAM no\nSetEnv HOME={root}/home\n"
        )
        server = [*SIGNALS_HEARD, SSHD, "-D", "-e", "-f", root / f"sshd_{host}"]
        servers.append(subprocess.Popen(server, stderr=(root / f"sshd_{host}.log").open("w")))
    try:
        for host in ("a", "b"):
            probe = ["ssh", "-F", root / "config", "-o", "BatchMode=yes", host, "true"]
            deadline = time.monotonic() + 20
            while subprocess.run(probe, capture_output=True, timeout=60).returncode:
                assert time.monotonic() < deadline, (root / f"sshd_{host}.log").read_text()
                time.sleep(0.1)
        yield root / "config"
    finally:
        for process in servers:
            process.terminate()
            process.wait(timeout=20)


class Cluster:
    """Runs ssh.sh, in a folder that exists on both hosts."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder = config, folder / "a folder"
        self.folder.mkdir()
        self.node = self.folder / "node's python"
        self.node.write_text(NODE.format(python=sys.executable))
        self.node.chmod(0o755)

    def start(self, *args: object, **env: str) -> subprocess.Popen[str]:
        """In a process group of its own, as a shell starts it."""
        unset = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "VIRTUAL_ENV", "DRY_RUN", "CUDA_VISIBLE_DEVICES")
        clean = {name: value for name, value in os.environ.items() if name not in unset}
        more = {
            "SSH_CONFIG": str(self.config), "PYTHON": sys.executable, "NPROC_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "",
            "MASTER_PORT": str(free_port()), "HF_HOME": str(self.folder / "hf"),
        }  # fmt: skip
        return subprocess.Popen(
            [*SIGNALS_HEARD, SSH, *map(str, args)], env={**clean, **more, **env}, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, *args: object, **env: str) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        process = self.start(*args, **env)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    def code(self, program: str, hosts: str = "a,b", **env: str) -> subprocess.Popen[str]:
        """Start `program` as what the launcher of each host starts."""
        return self.start(hosts, "ddp", "train", "--run_name", program, PYTHON=str(self.node), **env)

    def processes(self) -> list[psutil.Process]:
        """What belongs to jobs of this cluster, on any host, and here."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("HF_HOME") == str(
                    self.folder / "hf"
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def gone(self, seconds: float = 60) -> None:
        until(lambda: not self.processes(), f"left: {self.processes()}", seconds)


@pytest.fixture
def cluster(hosts: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(hosts, tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def test_ssh_host_that_is_not_ready_is_named_and_nothing_starts(cluster: Cluster, tmp_path: Path) -> None:
    begun = time.monotonic()
    code, output, errors = cluster.run("a,gone,b", "ddp", "--output_dir", "run")
    assert (code, output) == (2, "") and time.monotonic() - begun < 15
    first, last = errors.splitlines()
    assert first.startswith("error: gone cannot be reached: ssh: ") and "refused" in first
    assert last == "error: nothing was started on any host"
    code, output, errors = cluster.run("a,b", "zero7")
    assert (code, output) == (2, "")
    assert [line[:32] for line in errors.splitlines()[:2]] == [f"{h}: error: unknown strategy zero7"[:32] for h in "ab"]
    assert not list(cluster.folder.glob("run*"))


def test_ssh_with_a_folder_missing_on_the_host_is_refused(cluster: Cluster) -> None:
    here = cluster.folder / "removed"
    here.mkdir()
    process = subprocess.Popen(
        ["bash", "-c", 'cd "$1" && rmdir "$1" && exec "${@:2}"', "-", here, SSH, "b", "ddp"],
        env={**os.environ, "SSH_CONFIG": str(cluster.config)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert f"b: error: there is no directory {here} on this host; " in process.communicate(timeout=60)[1]
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("a,-oProxyCommand=x", "'-oProxyCommand=x' in a,-oProxyCommand=x is no host"),
        ("a,a", "a is listed twice in a,a"),
        ("./gone.txt", "there is no file ./gone.txt"),
        (",", "'' in , is no host"),
    ],
)
def test_hosts_that_cannot_be_are_one_line(cluster: Cluster, listed: str, message: str) -> None:
    code, _, errors = cluster.run(listed, "ddp")
    assert code == 2 and errors.startswith(f"error: {message}") and errors.count("\n") == 1
    (cluster.folder / "hosts").write_text("# mine\n\n a slots=8\n")
    assert "'slots=8' in hosts is no host" in cluster.run("hosts", "ddp")[2]


def test_ssh_dry_run_shows_commands_without_secrets(cluster: Cluster) -> None:
    (cluster.folder / "hosts").write_text("root@a  # the first\n\nb\n")
    code, output, errors = cluster.run(
        "hosts", "fsdp2", "--run_name", "it's", DRY_RUN="1", WANDB_API_KEY=SECRET, HF_TOKEN=SECRET, NCCL_DEBUG="INFO"
    )
    assert code == 0 and SECRET not in output + errors
    assert [line.split(": ")[0] for line in output.splitlines()] == ["root@a", "b"]
    for rank, line in enumerate(output.splitlines()):
        assert f"NNODES=2 NODE_RANK={rank} MASTER_ADDR=127.0.0.1 " in line and "NCCL_DEBUG=INFO" in line
        assert line.endswith(r"/launch/accelerate.sh fsdp2 --run_name it\'s")
    assert errors.startswith("note: passed on besides") and "WANDB_API_KEY" in errors and "HF_TOKEN" in errors
    assert "MASTER_ADDR=10.1.1.1" in cluster.run("a,b", "ddp", DRY_RUN="1", MASTER_ADDR="10.1.1.1")[1]


def test_words_settings_and_secrets_arrive_and_no_command_line_shows_them(cluster: Cluster) -> None:
    program = """
print(rank, sys.argv[-5:-1], os.getcwd())
print(os.environ["WANDB_API_KEY"][::-1], os.environ["NCCL_DEBUG"], os.environ["CUDA_VISIBLE_DEVICES"] == "")
for commands in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        text = commands.read_text()
    except OSError:
        continue
    if os.environ["WANDB_API_KEY"] in text:
        print("SHOWN", text)
"""
    words = ["train", "it's; $HOME *", "", 'a "b"\n\\']
    process = cluster.start(
        "a,b", "ddp", *words, program, PYTHON=str(cluster.node), WANDB_API_KEY=f"{SECRET}'", NCCL_DEBUG="INFO"
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    for rank, host in enumerate("ab"):
        assert f"{host}: {rank} {['vit_dist.train', *words[1:]]} {cluster.folder}\n" in output
        assert f"{host}: '{SECRET[::-1]} INFO True\n" in output
    assert "SHOWN" not in output


def test_ssh_with_one_host_returns_its_exit_code(cluster: Cluster) -> None:
    process = cluster.code("print('alone', os.environ['NNODES']); sys.exit(9)", hosts="b")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[-1]) == (9, "alone 1"), "no name before the only host's lines"
    assert errors == "error: b failed first, with exit code 9; the others were ended\n"


def test_ssh_host_that_fails_ends_the_others_after_they_save(cluster: Cluster) -> None:
    process = cluster.code("""
if rank == 1:
    wait_for("ready")
    sys.exit(7)
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
while True:
    signal.pause()
""")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 7 and "a: saved\n" in output
    assert errors == "error: b failed first, with exit code 7; the others were ended\n"
    cluster.gone(5)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_ssh_passes_a_signal_to_each_host_once(cluster: Cluster, name: str) -> None:
    """Sent to the group, as a terminal does."""
    process = cluster.code("""
def heard(number, _):
    print("heard", signal.Signals(number).name, flush=True)
    pathlib.Path(f"heard{rank}").touch()
    wait_for(f"heard{1 - rank}")
    time.sleep(0.5)
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, heard)
pathlib.Path(f"ready{rank}").touch()
while True:
    signal.pause()
""")
    until(lambda: all((cluster.folder / f"ready{rank}").exists() for rank in (0, 1)), "not started")
    os.killpg(process.pid, signal.Signals[name])
    until(lambda: all((cluster.folder / f"heard{rank}").exists() for rank in (0, 1)), "not heard")
    os.killpg(process.pid, signal.SIGTERM)  # once more, which nobody is to hear
    output, errors = process.communicate(timeout=60)
    heard = sorted(line for line in output.splitlines() if "heard" in line)
    assert (process.returncode, heard) == (75, [f"a: heard {name}", f"b: heard {name}"])
    assert errors.startswith(f"note: stopped by {name};")


def test_ssh_processes_that_do_not_stop_are_killed_after_the_grace_time(cluster: Cluster) -> None:
    process = cluster.code(
        """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its child then ignores it too
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(f"ready{rank}").touch()
if rank == 1:
    wait_for("ready0")
    os.kill(os.getpid(), signal.SIGKILL)  # the launcher is lost, its process is not
time.sleep(600)
""",
        PET_SHUTDOWN_TIMEOUT="0",
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "b failed first, with exit code 137" in errors
    cluster.gone(5)


def test_ssh_connection_lost_is_named_and_its_host_saves(cluster: Cluster) -> None:
    process = cluster.code("""
def save(*_):
    for line in range(100000):
        print("saving", line, flush=True)
    pathlib.Path(f"saved{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(f"ready{rank}").write_text(str(os.getpid()))
while True:
    signal.pause()
""")
    ready = [cluster.folder / f"ready{rank}" for rank in (0, 1)]
    until(lambda: all(path.exists() and path.read_text() for path in ready), "not started")
    sessions = [parent for parent in psutil.Process(int(ready[1].read_text())).parents() if "sshd" in parent.name()]
    sessions[0].kill()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 255 and errors.startswith("error: the connection to b was lost")
    cluster.gone(20)
    assert (cluster.folder / "saved0").exists() and (cluster.folder / "saved1").exists()


def test_ssh_hosts_train_one_model_over_a_signal_and_a_killed_launcher(
    cluster: Cluster, photos: Path, checkpoint: Path
) -> None:
    folder = cluster.folder / "runs" / "a run"
    words = [
        "a,b", "ddp", "train", "--data", photos, "--model", checkpoint, "--output_dir", folder, "--max_steps", 200,
        "--per_device_train_batch_size", 4, "--logging_steps", 1, "--eval_strategy", "no", "--save_strategy", "no",
        "--load_best_model_at_end", "false", "--report_to", "none",
    ]  # fmt: skip
    env = {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET}

    def trained() -> int:
        return max((row["step"] for row in rows(folder)), default=0)

    first = cluster.start(*words, **env)
    until(lambda: trained() >= 3 or first.poll() is not None, "no step")
    first.send_signal(signal.SIGUSR1)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 75, output + errors
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "preempted" and "SIGUSR1" in status["by"] and 3 <= status["step"] < 150
    assert (folder / f"checkpoint-{status['step']}").is_dir()
    cluster.gone(5)

    second = cluster.start(*words, **env)
    until(lambda: trained() > status["step"] or second.poll() is not None, "no further step")
    assert len([p for p in cluster.processes() if "vit_dist.train" in p.cmdline()]) >= 4, "two workers, two launchers"
    second.kill()
    cluster.gone()
    orphaned = json.loads((folder / "status.json").read_text())
    assert orphaned["state"] == "preempted" and "SIGTERM" in orphaned["by"] and orphaned["step"] > status["step"]
    second.communicate(timeout=60)

    code, output, errors = cluster.run(*words, **env)
    assert code == 0, output + errors
    assert re.search(r"^a: .*complete", output, re.M) and "b: note: MASTER_ADDR=127.0.0.1 is" in output
    record = json.loads((folder / "run.json").read_text())
    assert (record["world_size"], record["attempts"]) == (2, 3)
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(1, 201))
    assert SECRET not in output
