"""Weights & Biases in every state that it can be in: the run is the one that it would be without, and ends in time."""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Reference, losses
from lab import Lab, committed, fingerprint, status
from test_wandb import KEY, FakeApi
from wandb_reader import read_run

from vit_dist import stop, train
from vit_dist.callbacks import wandb
from vit_dist.trainer import ExactTrainer

PROMISED = 60  # seconds from the last row to the exit
DEFAULTS = dict(wandb.WandbCallback.__init__.__kwdefaults__)
SHORT = {"init_timeout": 3.0, "finish_timeout": 3.0}  # for tests; see test_the_defaults_keep_the_promise
WITH_WANDB = ("--report_to", "wandb")


@pytest.fixture(scope="module")
def whole(lab: Lab, reference: Reference) -> dict[str, Any]:
    """Without W&B."""
    return fingerprint(reference(lab.args))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No account or proxy of the machine's, short deadlines, and runs that end as a process does: with what libraries
    have left for its exit.
    """
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, seconds in SHORT.items():
        monkeypatch.setitem(wandb.WandbCallback.__init__.__kwdefaults__, name, seconds)
    main = train.main

    def main_and_exit(argv: Any = None) -> int:
        atexit._clear()  # what the test process has left for its own
        code = main(argv)
        atexit._run_exitfuncs()
        return code

    monkeypatch.setattr(train, "main", main_and_exit)


class GoesSilent(FakeApi):
    """Answers until a run has begun, and never after that."""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        value = super().answer(query, variables)
        if "mutation UpsertBucket" in query:
            self.fault = "silence"
        return value


class Servers:
    """W&B in a state, as the environment of a run; `apis` are those that answered or might have."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.apis: list[FakeApi] = []

    def __call__(self, state: str) -> dict[str, str]:
        if state == "no key":
            return {}
        if state in ("nobody listens", "accepts and never answers"):
            server = socket.create_server(("127.0.0.1", 0))
            port = server.getsockname()[1]
            self.sockets.append(server)
            if state == "nobody listens":
                server.close()
        else:
            api = GoesSilent() if state == "silent once the run has begun" else FakeApi()
            self.apis.append(api)
            port = api.server_port
            if state == "answers 500":
                api.get_status, api.fault = 500, "500"
            elif state == "answers 500 when the run begins":
                api.fault = "500"
            elif state == "silent when the run begins":
                api.fault = "silence"
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": KEY}


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    for api in made.apis:
        api.released.set()
        api.shutdown()
        api.server_close()
    for server in made.sockets:
        server.close()


STATES = {  # what is said of it
    "nobody listens": "W&B: offline (no answer from 127.0.0.1)",
    "no key": "W&B: offline (not logged in)",
    "answers 500": "W&B: offline (127.0.0.1 answered 500)",
    "answers 500 when the run begins": "W&B: offline (",
    "accepts and never answers": "W&B: offline (no answer from 127.0.0.1)",
    "silent when the run begins": "W&B: offline (",
    "silent once the run has begun": "W&B: not everything was sent (",
}


def mirrored(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of what W&B has on the disk, attempt by attempt."""
    files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return [(int(step), float(loss)) for path in files for step, loss in read_run(path).series("train/loss")]


@pytest.mark.draw(3)
@pytest.mark.parametrize("state", STATES)
def test_run_with_unreachable_wandb_equals_the_run_without(
    lab: Lab, whole: dict[str, Any], servers: Servers, state: str
) -> None:
    """The same bits and rows, exit code 0, the promised end, and every row on the disk for `vit-dist sync`."""
    folder = lab.root / f"{state.replace(' ', '_')}_{wandb.WandbCallback.__init__.__kwdefaults__['finish_timeout']}"
    job = lab.run(folder, *WITH_WANDB, **servers(state))
    after_the_last_row = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    assert fingerprint(folder) == whole
    assert after_the_last_row < PROMISED
    assert STATES[state] in job.output and f"vit-dist sync {folder}" in job.output
    assert "Traceback" not in job.output
    assert mirrored(folder) == sorted(losses(folder).items())
    assert status(folder)["state"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("state", [state for state in STATES if "silent" in state or "never" in state])
def test_run_with_silent_wandb_and_the_default_deadlines_ends_in_time(
    lab: Lab, whole: dict[str, Any], servers: Servers, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    for name in SHORT:
        monkeypatch.setitem(wandb.WandbCallback.__init__.__kwdefaults__, name, DEFAULTS[name])
    test_run_with_unreachable_wandb_equals_the_run_without(lab, whole, servers, state)


def test_default_deadlines_of_wandb_keep_the_promise() -> None:
    """What `close` may wait for at most; a tenth of the time is left for the exit itself."""
    assert DEFAULTS["finish_timeout"] + wandb.TEARDOWN_TIMEOUT <= 0.9 * PROMISED
    assert SHORT.keys() <= DEFAULTS.keys()


@pytest.mark.parametrize(("fault", "code"), [("exc", 1), ("term", stop.EXIT_CODE)])
def test_run_failed_or_stopped_with_silent_wandb_leaves_in_time(
    lab: Lab, servers: Servers, fault: str, code: int
) -> None:
    """Failed or asked to stop, with a server that went silent."""
    folder = lab.root / f"silent_{fault}"
    job = lab.run(
        folder, *WITH_WANDB, fault=f"before_optim:0:22:{fault}", expect=code, **servers("silent once the run has begun")
    )
    assert time.time() - (folder / "status.json").stat().st_mtime < (PROMISED if fault == "exc" else 30), job.output
    assert max(committed(folder)) == (20 if fault == "exc" else 22)


def test_run_restarted_five_times_is_one_wandb_run(lab: Lab, whole: dict[str, Any], servers: Servers) -> None:
    """The id in run.json is that of every attempt, whatever W&B was like at the time; no row is there twice."""
    folder, ids = lab.root / "restarts", []
    at_each = [
        "answers", "nobody listens", "no key", "silent once the run has begun", "answers 500", "answers",
    ]  # fmt: skip
    for attempt, state in enumerate(at_each):
        last = attempt == len(at_each) - 1
        fault, code = ("", 0) if last else ("before_optim:0:4:term", stop.EXIT_CODE)
        lab.run(folder, *WITH_WANDB, fault=fault, expect=code, **servers(state))
        ids.append(json.loads((folder / "run.json").read_text())["wandb_id"])
        assert last or max(committed(folder)) == 4 * (attempt + 1)
    (run_id,) = set(ids)
    assert fingerprint(folder) == whole
    asked = [upsert["name"] for api in servers.apis for upsert in api.upserts]
    assert asked and set(asked) == {run_id}
    on_disk = list(folder.glob("wandb/*run-*"))
    assert len(on_disk) == len(at_each) and all(path.name.endswith(f"-{run_id}") for path in on_disk)
    assert mirrored(folder) == sorted(losses(folder).items())


def test_training_calls_wandb_only_when_something_is_logged(
    lab: Lab, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes to wandb's process passes one function: counted on the thread that trains, in and out of on_log."""
    from wandb.sdk.lib.asyncio_manager import AsyncioManager

    folder, inside, counts = lab.root / "counted", [False, False], [0, 0]
    send, on_log, fit = AsyncioManager.run, wandb.WandbCallback.on_log, ExactTrainer.train

    def counting(self: Any, call: Any) -> Any:
        training, logging = inside
        if training and threading.current_thread() is threading.main_thread():
            counts[logging] += 1
        return send(self, call)

    def logging(self: Any, *args: Any, **kwargs: Any) -> None:
        inside[1] = True
        on_log(self, *args, **kwargs)
        inside[1] = False

    def training(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside[0] = True
        output = fit(self, *args, **kwargs)
        inside[0] = False
        (folder / "counts.json").write_text(json.dumps(counts))
        return output

    monkeypatch.setattr(AsyncioManager, "run", counting)
    monkeypatch.setattr(wandb.WandbCallback, "on_log", logging)
    monkeypatch.setattr(ExactTrainer, "train", training)
    lab.run(folder, *WITH_WANDB, **servers("silent once the run has begun"))
    rows = [row for row in (folder / "metrics.jsonl").read_text().splitlines() if "test_" not in row]
    outside, in_on_log = json.loads((folder / "counts.json").read_text())
    assert outside == 0
    assert len(rows) <= in_on_log <= 2 * len(rows) + 2
