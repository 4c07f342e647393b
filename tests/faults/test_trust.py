"""What others put into a run folder, a checkpoint or the environment is neither run nor written through."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import write_photos
from lab import Job, Lab, committed
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from vit_dist import console, environment, stop
from vit_dist.callbacks.metrics_file import MetricsFile
from vit_dist.checkpoint import store
from vit_dist.checkpoint.load import load_optimizer
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.files import SEAL, replacing, seal
from vit_dist.redact import redact
from vit_dist.run import attempts
from vit_dist.run.lock import run_lock
from vit_dist.run.report import CARD_METRICS, write_model_card
from vit_dist.run.run_folder import WRITTEN, keep_output, write_json
from vit_dist.terminal import markdown_code, one_line

# Forged checkpoints


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def pickled_call(module: str, name: str, *args: Any) -> bytes:
    """A pickle that calls `module.name(*args)`, written by hand: such a name need not be importable here."""
    body = pickle.dumps(args, 2)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + body[2:-1] + b"R."


def sharded(folder: Path, metadata: Callable[[Path], bytes] | None = None) -> tuple[Path, Any, Any]:
    """A committed FSDP checkpoint, its model and optimizer; `metadata` replaces what describes the optimizer."""
    staged, model = store.begin(folder, 5), torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=staged / "optimizer_0", no_dist=True)
    if metadata is not None:
        (staged / "optimizer_0/.metadata").write_bytes(metadata(staged))
    files = {str(p.relative_to(staged)): store.settle(p) for p in staged.rglob("*") if p.is_file()}
    return store.commit(staged, files, {"step": 5, "layout": "fsdp_sharded"}), model, optimizer


def test_metadata_that_calls_a_loader_of_torch_distributed_is_refused(tmp_path: Path) -> None:
    """`torch_save_to_dcp` loads a file beside it without restriction."""
    marker = tmp_path / "marker"
    payload = tmp_path / "payload"
    torch.save(Call(open, str(marker), "w"), payload)

    def metadata(staged: Path) -> bytes:
        return pickle.dumps(Call(format_utils.torch_save_to_dcp, str(payload), str(tmp_path / "out")))

    checkpoint, model, optimizer = sharded(tmp_path / "run", metadata)
    assert store.integrity_error(checkpoint) is None
    with pytest.raises(pickle.UnpicklingError, match="torch_save_to_dcp is not part of"):
        load_optimizer(checkpoint, model, optimizer)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "namedtuple"),  # compiles its arguments
        ("collections.abc", "Callable"),
        ("torch", "load"),
        ("torch", "hub.load"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        ("torch.distributed.checkpoint.format_utils", "dcp_to_torch_save"),
        ("torch.distributed.checkpoint", "load"),
        ("pathlib", "os"),
    ],
)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, module: str, name: str) -> None:
    checkpoint, model, optimizer = sharded(tmp_path, lambda staged: pickled_call(module, name, "touch marker"))
    with pytest.raises(pickle.UnpicklingError, match="is not part of a checkpoint's metadata"):
        load_optimizer(checkpoint, model, optimizer)


@pytest.mark.parametrize("data", [b"", b"\x80\x04", pickle.dumps({"a": 1}), pickled_call("torch", "Size", "x")])
def test_metadata_that_is_cut_short_or_something_else_is_refused(tmp_path: Path, data: bytes) -> None:
    checkpoint, model, optimizer = sharded(tmp_path, lambda staged: data)
    with pytest.raises(pickle.UnpicklingError, match=r"cannot be read|holds no metadata"):
        load_optimizer(checkpoint, model, optimizer)


def test_metadata_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    checkpoint, model, optimizer = sharded(tmp_path)
    load_optimizer(checkpoint, model, optimizer)
    assert store.integrity_error(checkpoint) is None
    path = checkpoint / "optimizer_0/.metadata"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(pickle.UnpicklingError, match="is not the file that the manifest names"):
        load_optimizer(checkpoint, model, optimizer)


def test_metadata_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    def metadata(staged: Path) -> bytes:
        path = staged / "optimizer_0/.metadata"
        found = pickle.loads(path.read_bytes())
        for info in found.storage_data.values():
            info.relative_path = "../../elsewhere"
        return pickle.dumps(found)

    checkpoint, model, optimizer = sharded(tmp_path, metadata)
    with pytest.raises(pickle.UnpicklingError, match="is not a file of this checkpoint"):
        load_optimizer(checkpoint, model, optimizer)


def forge(checkpoint: Path, *names: str) -> None:
    """A manifest that fits what lies there now."""
    manifest = store.read_manifest(checkpoint)
    manifest["files"] |= {name: store.settle(checkpoint / name) for name in names}
    del manifest[SEAL]
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_forged_deepspeed_shares_are_not_run(lab: Lab, tmp_path: Path) -> None:
    """DeepSpeed asks for an unrestricted load. What it wrote itself loads all the same: see test_strategies.py."""
    folder, marker = tmp_path / "run", tmp_path / "marker"
    args = ["--max_steps", 3, "--save_steps", 2, "--eval_steps", 2]
    lab.run(folder, *args, processes=2, strategy="zero2", fault="before_optim:0:2:term", expect=stop.EXIT_CODE)
    assert committed(folder) == [2]
    shares = list((folder / "checkpoint-2").rglob("*optim_states.pt"))
    for path in shares:
        torch.save({"optimizer_state_dict": Call(open, str(marker), "w"), "ds_version": "0"}, path)
    forge(folder / "checkpoint-2", *(str(path.relative_to(folder / "checkpoint-2")) for path in shares))
    job: Job = lab.run(folder, *args, processes=2, strategy="zero2", expect=None)
    assert set(job.codes.values()) == {2}, job.output
    assert "holds something other than weights and state" in job.output
    assert not marker.exists()


# Links in a run folder


@pytest.fixture
def run_config(photos: Path, tmp_path: Path) -> Config:
    return load_config(["--data", str(photos), "--model", "tiny", "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("name", [*WRITTEN, "stacks-rank-0.txt"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_where_the_run_writes_is_refused_and_named(
    run_config: Config, tmp_path: Path, name: str, dangling: bool
) -> None:
    folder, target = run_config.output_dir, tmp_path / "thesis.tex"
    folder.mkdir()
    (folder / "status.json").write_text('{"state": "failed"}')
    (folder / name).unlink(missing_ok=True)
    if not dangling:
        target.write_text("years of work")
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link"):
        attempts.check(run_config)
    assert target.exists() != dangling and (dangling or target.read_text() == "years of work")


def test_a_run_folder_that_is_a_link_itself_is_a_users_choice(run_config: Config, tmp_path: Path) -> None:
    (tmp_path / "disk2").mkdir()
    run_config.output_dir.symlink_to(tmp_path / "disk2")
    attempts.check(run_config)
    with run_lock(run_config.output_dir):
        assert (tmp_path / "disk2/.lock").is_file()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match=r"\.lock is a link"), run_lock(tmp_path / "run"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_metrics_that_are_a_link_keep_their_last_line(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("first\nlast")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match=r"metrics\.jsonl is a link"):
        MetricsFile(tmp_path / "metrics.jsonl")
    assert (tmp_path / "thesis.tex").read_text() == "first\nlast"


def test_the_temporary_file_of_a_replacement_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / f".status.json.{os.getpid()}.tmp").symlink_to(tmp_path / "thesis.tex")
    (tmp_path / "status.json").symlink_to(tmp_path / "thesis.tex")
    with replacing(tmp_path / "status.json") as partial:
        partial.write_text("{}")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "status.json").is_symlink() and (tmp_path / "status.json").read_text() == "{}"


def test_staging_trash_and_checkpoints_that_are_links_leave_their_targets_alone(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    for name in ("staging/checkpoint-5", "trash/checkpoint-5", "checkpoint"):
        (outside / name).mkdir(parents=True)
        (outside / name / "kept").touch()
    folder.mkdir()
    (folder / store.STAGING).symlink_to(outside / "staging")
    (folder / store.TRASH).symlink_to(outside / "trash")
    (folder / "checkpoint-5").symlink_to(outside / "checkpoint")
    checkpoint = store.commit(store.begin(folder, 5), {}, {"step": 5})
    assert store.integrity_error(checkpoint) is None and not checkpoint.is_symlink()
    store.clear(folder)
    (folder / "checkpoint-6").symlink_to(tmp_path / "nowhere")
    assert store.integrity_error(store.commit(store.begin(folder, 6), {}, {"step": 6})) is None
    for name in ("staging/checkpoint-5", "trash/checkpoint-5", "checkpoint"):
        assert (outside / name / "kept").exists(), name


@pytest.mark.parametrize("where", ["jobs", "jobs/7", "jobs/7/rank-0.log"])
def test_a_job_log_is_not_written_through_a_link(tmp_path: Path, where: str) -> None:
    folder, target = tmp_path / "run", tmp_path / "target"
    (folder / where).parent.mkdir(parents=True)
    target.mkdir()
    (folder / where).symlink_to(target / "file" if where.endswith("log") else target)
    with pytest.raises(UserError, match="is a link"):
        keep_output(folder, 0, {"VIT_DIST_JOB_ID": "7"})


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", ".", "..", ".hidden", "a b", "a\nb", "x" * 65, "é"])
def test_a_job_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="VIT_DIST_JOB_ID="):
        keep_output(tmp_path / "run", 0, {"VIT_DIST_JOB_ID": name})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["4711", "4711_3", "job-1.node_2", "x" * 64])
def test_job_names_of_batch_systems_are_taken(name: str) -> None:
    assert environment.job({"VIT_DIST_JOB_ID": name}) == name


def test_state_is_never_writable_for_everybody_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        checkpoint = store.commit(store.begin(tmp_path, 5), {}, {"step": 5})
        write_json(tmp_path / "status.json", {})
        MetricsFile(tmp_path / "metrics.jsonl")
        store.discard(store.commit(store.begin(tmp_path, 6), {}, {"step": 6}))
    finally:
        os.umask(before)
    for path in (checkpoint, checkpoint / "manifest.json", tmp_path / "status.json", tmp_path / "metrics.jsonl"):
        assert not path.stat().st_mode & 0o002, path
    (checkpoint / "manifest.json").chmod(0o666)
    assert "manifest.json: everybody may write in it" in (store.integrity_error(checkpoint) or "")


# Secrets

PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSjAgEAAoIB\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "name",
    [
        "GITHUB_PAT", "DB_PASS", "MYSQL_PWD", "SSHPASS", "REDISCLI_AUTH", "AUTH", "TOKENS", "API_KEYS", "SECRETS",
        "CREDENTIAL", "OPENAI_API_KEY_2", "SLACK_WEBHOOK", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY", "db_password2",
        "HF_TOKEN", "PGPASSWORD", "KEY", "MY_CREDENTIALS", "SESSION_COOKIE", "SECRET_KEY_BASE", "TOKEN_FOR_CI",
        "WEBHOOK_URL",
    ],
)  # fmt: skip
def test_a_variable_whose_name_says_secret_is_redacted(name: str) -> None:
    secret = "Xq7vT2mLp9Rw4Zs8"
    assert redact(f"cannot log in with {secret}: refused", {name: secret}) == "cannot log in with ***: refused"


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"PASS": "1", "AUTH": "no", "KEY": "q", "TOKENS": "5"}, "PASS 1 of 5, AUTH no"),
        ({"HOME": "/home/me", "PWD": "/home/me/photos"}, "no folder /home/me/photos"),
        ({"SSH_AUTH_SOCK": "/tmp/ssh-XXabc/agent.12"}, "socket /tmp/ssh-XXabc/agent.12"),
        ({"GOOGLE_APPLICATION_CREDENTIALS": "/home/me/keys/a.json"}, "no file /home/me/keys/a.json"),
        ({"TOKENIZERS_PARALLELISM": "enabled-now"}, "enabled-now"),
        ({"AUTH_METHOD": "kerberos"}, "kerberos is down"),
        ({"KEY_BINDINGS": "standard"}, "the standard rate"),
        ({"MONKEYS": "baboon", "COMPASS": "northern", "PATH": "/usr/bin:/bin"}, "baboon northern /usr/bin:/bin"),
        ({}, "a basic augmentation and a task-with-a-long-name-2 of 1,000 keys: key=value, Basic settings"),
        ({}, "sha256 0123456789abcdef0123456789abcdef01234567 is not the one"),
    ],
)  # fmt: skip
def test_ordinary_words_are_not_redacted(environ: dict[str, str], text: str) -> None:
    assert redact(text, environ) == text


@pytest.mark.parametrize(
    "secret",
    [
        "ghp_16C7e42F292c6912E7", "gho_16C7e42F292c6912E7", "ghs_16C7e42F292c6912E7", "github_pat_11ABCDEFG0abcdefg",
        "glpat-abcDEF123456789", "sk-proj-abc123DEF456ghi789", "sk-ant-api03-abc123DEF456", "xoxb-123456789-abcdef",
        "AKIAIOSFODNN7EXAMPLE", "AIzaSyA1234567890abcdefghij", "hf_abcdefghijklmnop",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_redacted_wherever_it_comes_from(secret: str) -> None:
    assert redact(f"refused: {secret}.", {}).replace(".", "") == "refused: ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://user:pass@host/db", "postgres://***@host/db"),
        ("Authorization: Basic dXNlcjpwYXNzd29yZA==", "Authorization: Basic ***"),
        ("Authorization: bearer abc.DEF-123~x/y+z=", "Authorization: bearer ***"),
        ("GET https://host/x?token=abc&n=1", "GET https://host/x?token=***&n=1"),
        ("GET https://host/x?n=1&api_key=abc", "GET https://host/x?n=1&api_key=***"),
        ("Server=db;Password=hunter2hunter2;Port=1", "Server=db;Password=***;Port=1"),
        ("https://hooks.slack.com/services/T0/B0/abc", "https://hooks.slack.com/services/***"),
        (f"key:\n{PEM}", "key:\n***\n"),
    ],
)
def test_secrets_in_known_places_are_redacted(text: str, shown: str) -> None:
    assert redact(text, {}) == shown


def test_every_line_of_a_secret_and_the_password_of_an_address_are_redacted() -> None:
    environ = {"DEPLOY": PEM, "DATABASE_URL": "postgres://me:Tr0ub4dor3@db/x"}
    text = "bad line MIIEvQIBADANBgkqhkiG9w0B; password Tr0ub4dor3 was refused"
    assert redact(text, environ) == "bad line ***; password *** was refused"


# The terminal

HOSTILE = "a\nerror: all is well\r\x1b[2J\x9b2J\u202ecod\u2066\u2028z\x00\x7f\udcff.png"


def escaped(text: str) -> bool:
    return not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_a_users_error_is_one_line_whatever_the_names_in_it_hold() -> None:
    error = UserError(f"{HOSTILE} cannot be read", [HOSTILE, "b.png"])
    assert len(str(error).splitlines()) == 3 and all(map(escaped, str(error).splitlines()))
    assert "a\\nerror: all is well\\r\\x1b[2J" in str(error) and "\\xff.png" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error), "as it reaches the other ranks"


@pytest.mark.parametrize("name", ["straße.png", "図.png", "a b.png", "می‌خواهم", "👩‍💻.png", "C:\\new", "é"])
def test_names_in_any_script_are_shown_as_they_are(name: str) -> None:
    assert one_line(name) == name


def test_lines_and_logged_warnings_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up(0)
    console.say(f"data  {HOSTILE}")
    console.logger.warning("skipped %s", HOSTILE)
    console.progress(HOSTILE)
    console.show([HOSTILE])
    console.show_error(f"error: {UserError(HOSTILE)}")
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 3 and len(told.err.splitlines()) == 1
    assert all(map(escaped, (told.out + told.err).splitlines()))


def test_a_traceback_cannot_hold_a_line_that_begins_like_ours() -> None:
    try:
        try:
            raise KeyError("x")
        except KeyError:
            raise ValueError("first\nerror: all is well") from None
    except ValueError as error:
        text = console.describe_failure(error)
    assert text.startswith("Traceback (most recent call last):\n  File ")
    assert "ValueError: first\n    error: all is well" in text


def test_hostile_image_names_are_shown_escaped(lab: Lab, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", {"train": 6, "validation": 6})
    (photos / "train/cat" / HOSTILE.replace("\x00", "").replace("\udcff", "")).write_bytes(b"no image")
    job = lab.run(tmp_path / "run", "--data", photos, "--verify_images", "true", expect=2)
    assert not any(line.startswith("error: all is well") for line in job.output.splitlines())
    assert "\\nerror: all is well" in job.output and "\x1b" not in job.output


@pytest.mark.parametrize(
    "name",
    ["a`b", "``", "`", "[click](http://x)", "<script>alert(1)</script>", "# title", "a\n# b", "---", "a|b", "*x*"],
)
def test_names_do_not_break_out_of_the_model_card(run_config: Config, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    run_config.training["output_dir"] = str(tmp_path / name.replace("/", "_"))
    results = {f"eval_{key}": 0.5 for key in CARD_METRICS} | {
        "eval_samples": 3,
        "train_steps": 4,
        "global_batch_size": 8,
    }
    write_model_card(tmp_path, run_config, [f"photos of {name}"], [name, "dog"], results, {"torch": "2"})
    card = (tmp_path / "README.md").read_text()
    (front, body) = card.split("\n---\n", 1)
    shown = one_line(name.replace("/", "_"))
    assert yaml.safe_load(front.removeprefix("---\n"))["model-index"][0]["name"] == shown
    rest = body.replace(markdown_code(name), "")
    assert not re.search(r"(?<!\\)(<script>|\]\()", rest)  # a backslash before it takes its meaning
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == 5, headings
    (classes,) = [line for line in body.splitlines() if line.startswith("Classes: ")]
    assert one_line(name) in classes and classes.endswith(", `dog`")
