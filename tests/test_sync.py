"""`vit-dist sync`: real offline runs, the real `wandb sync`, and a stand-in for the API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_wandb import FakeApi, FakeApiHandler, callback, clean_environment, go_online, train

from vit_dist.commands import sync

__all__ = ["clean_environment"]  # a fixture for all tests of this module
OWNER = """
import sys
from pathlib import Path
from vit_dist.run.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


class Server(FakeApi):
    """Tells what it has of a run, as W&B does, and keeps for each row the place that it was sent for."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = Handler
        self.config: dict[str, Any] = {}
        self.placed: dict[int, int] = {}  # line of the run's history -> step

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "mutation UpsertBucket" in query and variables.get("config"):
            self.config = json.loads(variables["config"])
        if "query RunResumeStatus" not in query or not self.config:
            return super().answer(query, variables)
        last = json.dumps({"_step": len(self.placed) - 1})
        bucket: dict[str, Any] = {"id": "b", "name": variables["name"], "tags": [], "config": json.dumps(self.config)}
        bucket |= {"historyLineCount": len(self.placed), "historyTail": json.dumps([last]), "summaryMetrics": last}
        bucket |= {"eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0}
        bucket["wandbConfig"] = json.dumps({"t": self.config["_wandb"]["value"]["t"]})
        entity = {"id": "e", "name": "team"}
        return {"model": {"id": "p", "name": "vit_dist", "entity": entity, "bucket": bucket}}


class Handler(FakeApiHandler):
    server: Server

    def do_POST(self) -> None:
        if self.path == "/graphql" or self.server.fault:
            super().do_POST()
            return
        history = (json.loads(self.body()).get("files") or {}).get("wandb-history.jsonl", {})
        for line, row in enumerate(history.get("content", []), history.get("offset", 0)):
            self.server.placed[line] = json.loads(row)["train/global_step"]
        self.reply({})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    go_online(monkeypatch, server.server_port)
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with what three attempts kept: requeued after step 7, after step 12, and done at 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        run = tmp_path_factory.mktemp("offline") / "run"
        for last, steps in ((0, range(1, 8)), (7, range(5, 13)), (12, range(13, 17))):
            if last:
                time.sleep(1.1)  # wandb names folders by the second
            attempt = callback(run, last_step={"train": last, "eval": last // 4 * 4})
            attempt.open()
            train(attempt, steps)
            attempt.close(exit_code=75 if steps.stop < 17 else 0, preempted=steps.stop < 17)
    (run / "run.json").write_text("{}")
    return run


@pytest.fixture
def run(offline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(offline, tmp_path / "two words", symlinks=True))


def attempts(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("wandb/offline-run-*"))


def test_sync_of_attempts_makes_one_run_in_order_and_once(
    run: Path, api: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")  # as in a sealed environment
    first, second, third = attempts(run)
    assert sync.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{run}: pushed {name}" for name in (first, second, third)]
    rows = [api.placed[line] for line in range(len(api.placed))]
    assert rows == sorted([*range(1, 17), 4, 8, 12, 16])  # a row for each step and each evaluation, appended
    assert {upsert["name"] for upsert in api.upserts} == {"abc123"}
    asked = len(api.upserts)
    assert sync.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: 3 of 3 attempts were pushed before\n"
    assert len(api.upserts) == asked


def test_sync_of_a_killed_attempt_pushes_its_rows(run: Path, api: Server, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = attempts(run)
    (log,) = (run / "wandb" / second).glob("*.wandb")
    log.write_bytes(log.read_bytes()[:-700])
    assert sync.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: pushed {first}",
        f"{run}: pushed {second}, whose end is missing: the job was killed",
        f"{run}: pushed {third}",
    ]
    rows = [api.placed[line] for line in range(len(api.placed))]
    assert rows == sorted(rows) and set(rows) >= {1, 7, 8, 13, 16}
    assert sync.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: 3 of 3 attempts were pushed before\n"


def test_sync_of_a_running_attempt_waits(run: Path, api: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The lock of a run is another process's, as in life: a process does not lock itself out."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdout.readline() == "1\n"
    first, second, third = attempts(run)
    assert sync.main([str(run)]) == 0
    later, *pushed = capsys.readouterr().out.splitlines()
    assert later.startswith(f"{run}: {third} is left for later: {run} is in use by process {owner.pid} on ")
    assert pushed == [f"{run}: pushed {first}", f"{run}: pushed {second}"]
    owner.communicate("\n")
    assert sync.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: 2 of 3 attempts were pushed before",
        f"{run}: pushed {third}",
    ]
    assert sorted(api.placed.values())[-1] == 16


def test_after_one_that_was_refused_nothing_is_pushed(
    run: Path, api: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    api.fault = "400"
    assert sync.main([str(run)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {run}/wandb/{attempts(run)[0]}: wandb did not push it: ")
    assert captured.out == "" and not api.placed
    api.fault = ""
    assert sync.main([str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_sync_without_account_or_network_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync.main([str(run)]) == 2
    assert capsys.readouterr().err == "error: not logged in to W&B: run `wandb login`, or set WANDB_API_KEY\n"
    go_online(monkeypatch, 9)
    assert sync.main([str(run)]) == 2
    assert capsys.readouterr().err == (
        "error: W&B cannot be reached (no answer from 127.0.0.1); run this where there is a network\n"
    )


def test_sync_of_a_folder_without_offline_runs_is_refused(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are looked at before any is pushed."""
    assert sync.main([str(run), str(tmp_path)]) == 2
    assert f"error: {tmp_path} is no run folder (no run.json in it)" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    assert sync.main([str(run), str(tmp_path)]) == 2
    assert f"error: {tmp_path} has nothing for W&B" in capsys.readouterr().err
    assert sync.main([]) == 2
    assert "see vit-dist sync --help" in capsys.readouterr().err
    assert not list(run.rglob("*.synced"))
