"""The W&B callback, against real offline runs, servers that fail in every way, and a stand-in for the API."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from wandb_reader import LoggedRun, read_run

from vit_dist.callbacks.wandb import WandbCallback, logged_in

KEY = "c0ffee" * 6 + "beef"  # 40 characters, as wandb wants them


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, settings or proxy of the machine's, and a wandb that reads its environment anew."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "NETRC")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    if "wandb" in sys.modules:
        with contextlib.suppress(ConnectionError):  # a test may have killed its service
            sys.modules["wandb"].teardown()


def callback(directory: Path, **options: Any) -> WandbCallback:
    defaults: dict[str, Any] = {"run_id": "abc123", "run_name": "first", "config": {"seed": 7, "model": "tiny"}}
    return WandbCallback(directory=directory, **{**defaults, **options})


def log(cb: WandbCallback, step: int, logs: dict[str, Any], rank_zero: bool = True) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=rank_zero)
    cb.on_log(TrainingArguments(report_to=[]), state, TrainerControl(), logs=logs)


def train(cb: WandbCallback, steps: range, evaluate_every: int = 4) -> None:
    """What Trainer logs: a row per step and one per evaluation, at the same step."""
    for step in steps:
        log(cb, step, {"loss": 1 / step, "learning_rate": 1e-3, "epoch": step / 4})
        if step % evaluate_every == 0:
            log(cb, step, {"eval_accuracy": step / 100, "eval_loss": 2.0, "epoch": step / 4})


def attempts(directory: Path) -> list[LoggedRun]:
    """What each attempt left on disk, oldest first."""
    files = directory.glob("wandb/*run-*/run-*.wandb")
    return [read_run(path) for path in sorted(files, key=lambda path: path.stat().st_mtime)]


def test_offline_run_holds_everything_on_one_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cb = callback(tmp_path)
    line = cb.open()
    train(cb, range(1, 9))
    log(cb, 9, {"loss": math.nan, "epoch": 2.25})
    log(cb, 9, {"loss": 5.0}, rank_zero=False)
    log(cb, 9, {"train_runtime": 12.0, "train_loss": 0.25, "epoch": 2.25})
    log(cb, 9, {"test_accuracy": 0.75, "epoch": 2.25})
    cb.summary({"test_f1_macro": 0.5})
    sync = cb.close(exit_code=3)

    (run,) = attempts(tmp_path)
    assert line == f"W&B: offline (WANDB_MODE=offline), then: {sync}"
    assert Path(shlex.split(sync or "")[2]).is_dir()
    assert (run.run_id, run.name, run.project, run.exit_code) == ("abc123", "first", "vit_dist", 3)
    assert run.config["seed"] == 7 and run.config["model"] == "tiny"
    assert run.series("train/loss")[:8] == [(step, 1 / step) for step in range(1, 9)]
    assert [step for step, _ in run.series("train/loss")] == list(range(1, 10))
    assert math.isnan(float(run.series("train/loss")[8][1]))
    assert run.series("eval/accuracy") == [(4, 0.04), (8, 0.08)]
    assert run.axes["*"] == "train/global_step" and "train/global_step" in run.axes
    assert run.series("test/accuracy") == [(9, 0.75)]
    assert run.summary["test/f1_macro"] == 0.5
    assert run.summary["train/train_runtime"] == 12.0 and run.summary["train/train_loss"] == 0.25


def test_restart_keeps_the_run_and_skips_replayed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = callback(tmp_path)
    first.open()
    train(first, range(1, 8))
    log(first, 8, {"loss": 1 / 8})  # killed before the evaluation of step 8
    first.close(exit_code=85, preempted=True)
    time.sleep(1.1)  # wandb names folders by the second
    second = callback(tmp_path, last_step={"train": 8, "eval": 4})
    second.open()
    train(second, range(5, 13))
    second.close()

    one, two = attempts(tmp_path)
    assert one.run_id == two.run_id == "abc123"
    assert [step for step, _ in one.series("train/loss") + two.series("train/loss")] == list(range(1, 13))
    assert [step for step, _ in one.series("eval/accuracy") + two.series("eval/accuracy")] == [4, 8, 12]


def test_last_step_may_be_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cb = callback(tmp_path, last_step=8)
    cb.open()
    train(cb, range(5, 13))
    cb.close()
    (run,) = attempts(tmp_path)
    assert [step for step, _ in run.series("train/loss")] == [9, 10, 11, 12]
    assert [step for step, _ in run.series("eval/accuracy")] == [12]


def test_variables_of_wandb_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "flowers")
    monkeypatch.setenv("WANDB_NAME", "rose")
    cb = callback(tmp_path)
    cb.open()
    cb.close()
    (run,) = attempts(tmp_path)
    assert (run.project, run.name) == ("flowers", "rose")


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv(name, value)
    cb = callback(tmp_path / "out")
    assert cb.open().startswith("W&B: off (WANDB_")
    train(cb, range(1, 3))
    assert cb.close() is None
    assert not (tmp_path / "out").exists()


def test_not_logged_in_is_offline_without_a_question(tmp_path: Path) -> None:
    cb = callback(tmp_path)
    assert cb.open().startswith("W&B: offline (not logged in), then: vit-dist sync ")
    cb.close()


def test_wandb_folder_that_cannot_be_written_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "file").touch()
    cb = callback(tmp_path / "file" / "out")
    assert cb.open().startswith("W&B: off (")
    train(cb, range(1, 3))
    assert cb.close() is None


def test_logged_in(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    assert not logged_in(environ)
    assert logged_in({**environ, "WANDB_API_KEY": KEY})
    assert logged_in({**environ, "WANDB_IDENTITY_TOKEN_FILE": "token"})
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert logged_in(environ)
    assert not logged_in({**environ, "WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / "other").write_text(f"machine wandb.example.org:8080 login user password {KEY}\n")
    own = {**environ, "NETRC": str(tmp_path / "other")}
    assert logged_in({**own, "WANDB_BASE_URL": "http://wandb.example.org:8080/"})
    assert not logged_in(own)
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = http://wandb.example.org:8080\n")
    assert logged_in(own)
    (tmp_path / "other").write_text("not a netrc")
    assert not logged_in(own)


def test_importing_the_module_does_not_import_wandb() -> None:
    code = "import sys, vit_dist.callbacks.wandb as w; w.logged_in({}); sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_wandb_with_secrets_writes_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_canary_in_the_environment")
    monkeypatch.setattr(sys, "argv", ["train", "--hub_token", "hf_canary_on_the_command_line"])
    cb = callback(tmp_path)
    lines = [cb.open()]
    sys.stdout.write("hf_canary_printed\n")
    train(cb, range(1, 5))
    lines.append(cb.close() or "")
    assert sys.argv[1:] == ["--hub_token", "hf_canary_on_the_command_line"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    shown = "".join([*lines, capfd.readouterr().err, caplog.text])
    assert b"abc123" in written
    for canary in (KEY, "hf_canary"):
        assert canary.encode() not in written and canary not in shown


def test_first_failure_gives_one_warning_and_turns_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    cb = callback(tmp_path)
    cb.open()
    calls = []

    def broken(row: dict[str, Any]) -> None:
        calls.append(row)
        raise RuntimeError(f"no luck with {KEY}")

    monkeypatch.setattr(cb._run, "log", broken)
    train(cb, range(1, 9))
    cb.summary({"test_accuracy": 0.5})
    assert (cb.close() or "").startswith("vit-dist sync ")
    assert len(calls) == 1
    assert [r.message for r in caplog.records if r.name == "vit_dist"] == [
        "W&B: off from here on, training continues (no luck with ***)"
    ]


def services() -> list[psutil.Process]:
    found = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("wandb-core")]
    assert found
    return found


def test_warnings_to_the_whole_job_do_not_end_wandbs_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    cb = callback(tmp_path)
    cb.open()
    for service in services():
        service.send_signal(signal.SIGUSR1)
        service.send_signal(signal.SIGUSR2)
    time.sleep(0.3)
    train(cb, range(1, 9))
    cb.close()
    assert [step for step, _ in attempts(tmp_path)[0].series("train/loss")] == list(range(1, 9))
    assert not [r for r in caplog.records if r.name == "vit_dist"]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_death_of_wandbs_process_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    cb = callback(tmp_path)
    cb.open()
    train(cb, range(1, 3))
    killed = services()
    for service in killed:
        service.kill()
    psutil.wait_procs(killed, timeout=5)
    start = time.monotonic()
    for step in range(3, 9):
        time.sleep(0.05)
        log(cb, step, {"loss": 1.0})
    cb.close()
    assert time.monotonic() - start < 5
    assert len([r for r in caplog.records if r.name == "vit_dist"]) == 1


# Servers. wandb's service is told where they are by WANDB_BASE_URL.


def go_online(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def assert_falls_back(cb: WandbCallback, within: float, because: str) -> None:
    start = time.monotonic()
    line = cb.open()
    opened = time.monotonic()
    assert re.fullmatch(rf"W&B: offline \(.*{because}.*\), then: vit-dist sync \S+", line), line
    assert opened - start < within
    train(cb, range(1, 9))
    assert time.monotonic() - opened < 2
    assert (cb.close() or "").startswith("vit-dist sync ")
    assert [step for step, _ in attempts(cb.directory)[-1].series("eval/accuracy")] == [4, 8]


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    go_online(monkeypatch, port)
    assert_falls_back(callback(tmp_path), within=10, because="no answer from 127.0.0.1")


def test_server_accepts_and_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        go_online(monkeypatch, server.getsockname()[1])
        assert_falls_back(callback(tmp_path, init_timeout=3), within=10, because="no answer from 127.0.0.1")


def test_proxy_that_is_down_is_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert_falls_back(callback(tmp_path), within=10, because="no answer from api.wandb.ai")


class FakeApi(http.server.ThreadingHTTPServer):
    """Answers as much of the W&B API as a run needs, and keeps what it was sent.

    `fault` is what becomes of POST requests: "" for an answer, a number for that status, "silence" for nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeApiHandler)
        self.fault = ""
        self.get_status = 404
        self.upserts: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "team"}
        project = {"id": "p", "name": "vit_dist", "entity": entity}
        if "mutation UpsertBucket" in query:
            self.upserts.append(variables)
            return {"upsertBucket": {"bucket": {"id": "b", "name": variables["name"], "project": project}}}
        if "query RunResumeStatus" in query:
            return {"model": {**project, "bucket": None}}
        if "mutation CreateRunFiles" in query:
            url = f"http://127.0.0.1:{self.server_port}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class FakeApiHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeApi

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply({}, self.server.get_status)

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        body = self.body()
        if self.server.fault == "silence":
            self.server.released.wait(120)
        elif self.server.fault:
            self.reply({}, int(self.server.fault))
        elif self.path == "/graphql":
            request = json.loads(body)
            self.reply({"data": self.server.answer(request["query"], request.get("variables") or {})})
        else:
            files = json.loads(body).get("files") or {}
            rows = files.get("wandb-history.jsonl", {}).get("content", [])
            self.server.history += [json.loads(row) for row in rows]
            self.reply({})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApi]:
    server = FakeApi()
    go_online(monkeypatch, server.server_port)
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def test_online_run(tmp_path: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setattr(sys, "argv", ["train", "--hub_token", "hf_canary"])
    for steps, last in ((range(1, 8), -1), (range(5, 13), 7)):
        cb = callback(tmp_path, last_step=last)
        assert cb.open() == f"W&B: http://127.0.0.1:{api.server_port}/team/vit_dist/runs/abc123"
        train(cb, steps)
        cb.summary({"test_accuracy": 0.75})
        assert cb.close() is None

    assert {upsert["name"] for upsert in api.upserts} == {"abc123"}
    train_rows = [row for row in api.history if "train/loss" in row]
    assert [row["train/global_step"] for row in train_rows] == list(range(1, 13))
    assert [row["train/global_step"] for row in api.history if "eval/accuracy" in row] == [4, 8, 12]
    assert json.loads(api.uploads["wandb-summary.json"])["test/accuracy"] == 0.75
    assert set(api.uploads) <= {"config.yaml", "wandb-summary.json", "wandb-metadata.json", "requirements.txt"}
    sent = json.dumps([api.upserts, api.history]) + str(api.uploads)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for canary in (KEY, "hf_canary"):
        assert canary not in sent and canary.encode() not in stored


def test_server_is_broken(tmp_path: Path, api: FakeApi) -> None:
    api.get_status = 500
    assert_falls_back(callback(tmp_path), within=10, because="127.0.0.1 answered 500")


@pytest.mark.parametrize("fault", ["500", "401", "silence"])
def test_server_fails_once_the_run_is_to_start(tmp_path: Path, api: FakeApi, fault: str) -> None:
    api.fault = fault
    assert_falls_back(callback(tmp_path, init_timeout=3), within=20, because="")


def test_server_goes_silent_in_mid_run(tmp_path: Path, api: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
    cb = callback(tmp_path, finish_timeout=3)
    assert cb.open().startswith("W&B: http://")
    train(cb, range(1, 5))
    api.fault = "silence"
    start = time.monotonic()
    train(cb, range(5, 13))
    assert time.monotonic() - start < 2
    assert (cb.close() or "").startswith("vit-dist sync ")
    assert time.monotonic() - start < 15
    assert [r.levelno for r in caplog.records if r.name == "vit_dist"] == [logging.WARNING]
    (run,) = attempts(tmp_path)
    assert [step for step, _ in run.series("train/loss")] == list(range(1, 13))
