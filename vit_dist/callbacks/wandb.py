"""One Weights & Biases run per training run: a mirror of what is logged, which can fail without harm to it."""

from __future__ import annotations

import configparser
import contextlib
import logging
import netrc
import os
import shlex
import signal
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vit_dist.errors import first_line
from vit_dist.redact import redact

logger = logging.getLogger("vit_dist")

T = TypeVar("T")
STEP = "train/global_step"  # the x axis of every chart
PROBE_TIMEOUT = 3.0  # seconds
TEARDOWN_TIMEOUT = 10.0  # seconds
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # wandb's service does not let itself be kept from SIGTERM


class WandbCallback(TrainerCallback):
    """Sends what `Trainer` logs to one W&B run; to be constructed on world rank 0 alone.

    `run_id` names the run: the same id after a restart goes on with the same run. `config` is shown with it and
    must hold no secrets. Files go to `directory`/wandb. `last_step` is the last step that an earlier attempt
    logged, for all rows or by kind (`{"train": 40, "eval": 20}`); replayed rows up to it are not logged again.
    `init_timeout` and `finish_timeout` are seconds.

    Nothing here raises: after a first failure one warning is logged and the callback is off. WANDB_PROJECT,
    WANDB_ENTITY, WANDB_NAME, WANDB_MODE and the other variables of wandb hold as they do elsewhere.
    """

    def __init__(
        self,
        *,
        run_id: str,
        run_name: str | None,
        config: dict[str, Any],
        directory: Path,
        last_step: int | Mapping[str, int] = -1,
        init_timeout: float = 30.0,
        finish_timeout: float = 40.0,
    ):
        self.run_id = run_id
        self.run_name = run_name
        self.config = config
        self.directory = Path(directory)
        kinds = ("train", "eval", "test")
        self.last_step = last_step if isinstance(last_step, Mapping) else dict.fromkeys(kinds, last_step)
        self.init_timeout = init_timeout
        self.finish_timeout = finish_timeout
        self._run: Any = None
        self._failed = False

    def open(self) -> str:
        """Starts the run and returns one line that says where it goes: a URL, a `vit-dist sync` line, or nowhere."""
        mode, reason = wandb_mode(os.environ)
        if mode == "disabled":
            return f"W&B: off ({reason})"
        try:
            if mode == "online":
                reason = self._start_online()
            if self._run is None:
                self._start("offline")
        except Exception as error:
            return f"W&B: off ({redact(first_line(error))})"
        if self._offline:
            return f"W&B: offline ({reason}), then: {self._sync_line()}"
        return f"W&B: {self._run.url}"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Logs one row at `state.global_step`; the totals that end a training go to the summary."""
        if not logs or not state.is_world_process_zero:
            return
        if "train_runtime" in logs:
            # Not a row: train_loss, a mean over the run, would look like one more train/loss.
            self.summary({f"train/{key}": value for key, value in logs.items()})
            return
        kind = next((k for k in ("eval", "test") if any(key.startswith(f"{k}_") for key in logs)), "train")
        if state.global_step > self.last_step.get(kind, -1):
            row = {_key(key): value for key, value in logs.items()}
            self._try(lambda run: run.log({**row, STEP: state.global_step}))

    def summary(self, metrics: Mapping[str, Any]) -> None:
        """Adds values that describe the whole run, such as `test_accuracy`."""
        self._try(lambda run: run.summary.update({_key(key): value for key, value in metrics.items()}))

    def close(self, exit_code: int = 0, preempted: bool = False) -> str | None:
        """Finishes the run; returns the `vit-dist sync` line if some or all of it is only on this disk."""
        if self._run is None:
            return None
        if preempted:
            self._try(lambda run: run.mark_preempting())
        # wandb gives up first, if it knows `finish_timeout`; what it could not send stays on this disk. A batch system
        # that takes the machine back does not wait for it.
        patience = TEARDOWN_TIMEOUT if preempted else self.finish_timeout + TEARDOWN_TIMEOUT
        try:
            _within(patience, lambda: self._finish(exit_code))
        except Exception as error:
            if not self._failed:
                logger.warning("W&B: not everything was sent (%s)", redact(first_line(error)))
            return self._sync_line()
        else:
            return self._sync_line() if self._offline or self._failed else None
        finally:
            self._run = None

    def _start_online(self) -> str:
        """Starts an online run; if that fails, says why."""
        if problem := unreachable(base_url(os.environ)):
            return problem
        try:
            self._start("online")
        except Exception as error:
            with contextlib.suppress(Exception):  # the failed run keeps its id busy until wandb's service ends
                import wandb

                _within(TEARDOWN_TIMEOUT, wandb.teardown)
            return redact(first_line(error))
        return ""

    def _start(self, mode: str) -> None:
        # wandb's reports about itself would hold up our exit for 20 s when its server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.directory.mkdir(parents=True, exist_ok=True)

        def start() -> Any:
            # wandb's service inherits what this thread blocks: it outlives the warning that a scheduler sends to
            # every process of a job, and takes what is logged until the end.
            signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
            wandb.setup(settings=wandb.Settings(silent=True))  # else its login has its say on the terminal
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "vit_dist",
                name=os.environ.get("WANDB_NAME") or self.run_name,
                id=self.run_id,
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                dir=str(self.directory),
                config=self.config,
                settings=self._settings(),
            )

        with _no_arguments():
            run = _within(self.init_timeout + 5, start)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        self._run = run

    def _settings(self) -> Any:
        import wandb

        settings: dict[str, Any] = {
            "silent": True,  # `open` and `close` return what there is to say
            "console": "off",  # our output is not W&B's to keep
            "disable_code": True,
            "save_code": False,
            "disable_job_creation": True,
            "init_timeout": self.init_timeout,
            "finish_timeout": self.finish_timeout,  # since wandb 0.27
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 1.0,  # seconds of rows that a kill may cost
        }
        return wandb.Settings(**{k: v for k, v in settings.items() if k in wandb.Settings.model_fields})

    def _finish(self, exit_code: int) -> None:
        import wandb

        self._run.finish(exit_code=exit_code)
        wandb.teardown()  # `finish` may return before the last record is on the disk

    def _try(self, call: Callable[[Any], None]) -> None:
        if self._run is None or self._failed:
            return
        try:
            call(self._run)
        except Exception as error:
            self._failed = True
            logger.warning("W&B: off from here on, training continues (%s)", redact(first_line(error)))

    @property
    def _offline(self) -> bool:
        return bool(self._run.settings._offline)

    def _sync_line(self) -> str:
        return f"vit-dist sync {shlex.quote(str(self.directory))}"


def logged_in(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether wandb would find credentials: in the environment, or in the netrc file for its host."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environ.get("HOME") or Path.home())
    named = [Path(environ["NETRC"]).expanduser()] if environ.get("NETRC") else []
    for path in named or [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            return netrc.netrc(path).authenticators(urlsplit(base_url(environ)).netloc) is not None
    return False


def wandb_mode(environ: Mapping[str, str]) -> tuple[str, str]:
    """`online`, `offline` or `disabled`, and why."""
    mode = environ.get("WANDB_MODE", "").lower()
    if environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled", "WANDB_DISABLED is set"
    if mode == "disabled":
        return "disabled", "WANDB_MODE=disabled"
    if mode in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE={mode}"
    if not logged_in(environ):
        return "offline", "not logged in"  # wandb would ask for a key, and nobody may be there to give one
    return "online", ""


def base_url(environ: Mapping[str, str]) -> str:
    """The API's address: from the environment, else as `wandb login --host` left it, else the public one."""
    if url := environ.get("WANDB_BASE_URL"):
        return url.rstrip("/")
    home = Path(environ.get("HOME") or Path.home())
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError):
        settings.read(Path(environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb", "settings"))
    return settings.get("default", "base_url", fallback="https://api.wandb.ai").rstrip("/")


def unreachable(url: str) -> str | None:
    """Why there is no point in going online, or None if the server (through a proxy, if one is set) answers.

    wandb itself retries for half a minute; a cluster without a network should not wait for that.
    """
    opener = urllib.request.build_opener(_NoRedirect)
    host = urlsplit(url).hostname
    try:
        # The thread's deadline covers the name lookup, which has no timeout of its own.
        _within(PROBE_TIMEOUT + 1, lambda: opener.open(url, timeout=PROBE_TIMEOUT).close())
    except urllib.error.HTTPError as error:
        return f"{host} answered {error.code}" if error.code >= 500 else None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return None  # wandb has settings for that
        return f"no answer from {host}"
    except Exception:
        return f"no answer from {host}"
    return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer."""

    def redirect_request(self, *args: Any) -> None:
        return None


@contextlib.contextmanager
def _no_arguments() -> Iterator[None]:
    """Hides the command line from wandb, which would store it with any token in it. The config says it all."""
    arguments, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; after `seconds` a TimeoutError, and its thread is left behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=seconds)


def _key(name: str) -> str:
    """`eval_loss` is `eval/loss`, `test_loss` is `test/loss`, anything else is of the training."""
    if "/" in name:
        return name
    kind, _, rest = name.partition("_")
    return f"{kind}/{rest}" if kind in ("eval", "test") and rest else f"train/{name}"
