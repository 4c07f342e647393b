"""What seals a process, and what is refused before a sealed run: nothing is started here, and there is no network."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from vit_dist import bundle
from vit_dist.config import load_config
from vit_dist.errors import UserError
from vit_dist.files import seal

ARGS = ["--data", "lab/photos", "--model", "lab/vit", "--metrics", "matthews"]
COMMIT = {"data": "a" * 40, "model": "b" * 40}


def made(folder: Path, *args: str) -> Path:
    """A bundle as `vit-dist fetch` leaves it for these arguments, with one small file in it."""
    wanted = bundle.needs(load_config(args))
    folder.mkdir(parents=True)
    (folder / "file").write_text("four")
    facts = {kind: {**wanted[kind], "commit": COMMIT[kind]} if kind in wanted else None for kind in COMMIT}
    facts |= {"metrics": wanted.get("metrics", []), "files": {"file": {"bytes": 4, "sha256": ""}}}
    (folder / bundle.MANIFEST).write_text(json.dumps(seal(facts)))
    return folder


def refusal(monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> str:
    monkeypatch.setenv(bundle.VARIABLE, str(folder))
    with pytest.raises(UserError) as refused:
        bundle.check(load_config(args))
    (line,) = str(refused.value).splitlines()
    return line


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bundle.VARIABLE, raising=False)
    for environ in ({"HF_HOME": "/hf"}, {bundle.VARIABLE: ""}):
        before = dict(environ)
        bundle.seal(environ)
        assert environ == before
    assert bundle.opened() is None
    bundle.check(load_config(ARGS))


def test_sealed_process_reads_the_bundle_and_writes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    environ = {bundle.VARIABLE: "tmp/b", "HF_HOME": "/hf", "HF_HUB_CACHE": "/other", "HF_HUB_OFFLINE": "0"}
    bundle.seal(environ)
    assert environ[bundle.VARIABLE] == "/tmp/b" and environ["HF_HUB_CACHE"] == "/tmp/b/hf/hub"
    assert environ["HF_HOME"] == "/hf"
    for library in ("HUB", "DATASETS", "EVALUATE"):
        assert environ[f"HF_{library}_OFFLINE"] == "1"
    assert environ["WANDB_MODE"] == "offline"
    again = dict(environ)
    bundle.seal(again)
    assert again == environ


@pytest.mark.parametrize(
    ("mode", "becomes"), [("disabled", "disabled"), ("dryrun", "dryrun"), ("online", "offline"), ("", "offline")]
)
def test_wandb_is_offline_unless_it_is_off(mode: str, becomes: str) -> None:
    environ = {bundle.VARIABLE: "/b", "WANDB_MODE": mode}
    bundle.seal(environ)
    assert environ["WANDB_MODE"] == becomes


def test_seal_is_set_before_libraries_are_imported(tmp_path: Path) -> None:
    code = """
import sys, vit_dist
assert not {"huggingface_hub", "datasets", "evaluate", "transformers", "torch", "wandb"} & set(sys.modules)
import huggingface_hub.constants as hub, datasets, evaluate
print(hub.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_TELEMETRY, datasets.config.HF_HUB_OFFLINE)
print(evaluate.config.HF_EVALUATE_OFFLINE, hub.HF_HUB_CACHE)
"""
    done = subprocess.run([sys.executable, "-c", code], env=_environment(tmp_path), capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 4 + [f"{tmp_path}/hf/hub"], done.stderr


def _environment(folder: Path) -> dict[str, str]:
    import os

    return {**os.environ, bundle.VARIABLE: str(folder), "HF_HUB_OFFLINE": "0"}


def test_needs_are_what_is_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "vit", "metric"):
        (tmp_path / name).mkdir()
    assert bundle.needs(load_config(["--data", "digits", "--model", "tiny"])) == {}
    assert bundle.needs(load_config(["--data", "photos", "--model", "vit", "--metrics", "metric", "own.py"])) == {}
    assert bundle.needs(load_config(["--data", "/not/there", "--model", "tiny"])) == {}
    found = bundle.needs(load_config([*ARGS, "--data_config", "c", "--model_revision", "v1", "--from_scratch"]))
    assert found == {
        "data": {"name": "lab/photos", "config": "c", "revision": None},
        "model": {"name": "lab/vit", "revision": "v1", "weights": False},
        "metrics": ["matthews"],
    }


@pytest.mark.parametrize("folder", ["/shared/b", "/shared/two words/b"])
@pytest.mark.parametrize(
    "args",
    [
        ARGS,
        [*ARGS, "--data_revision", "v2", "--model_revision", "v1", "--from_scratch"],
        ["--data", "digits", "--model", "lab/vit"],
        ["--data", "lab/photos", "--data_config", "two words", "--model", "tiny"],
    ],
)
def test_command_in_the_refusal_fetches_the_bundle(args: list[str], folder: str) -> None:
    wanted = bundle.needs(load_config(args))
    program, verb, *rest = shlex.split(bundle.fetch_command(wanted, Path(folder)))
    assert (program, verb, rest[-2:]) == ("vit-dist", "fetch", ["--bundle", folder])
    assert bundle.needs(load_config(rest[:-2])) == wanted


def test_bundle_for_this_run_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bundle.VARIABLE, str(made(tmp_path / "b", *ARGS)))
    bundle.check(load_config(ARGS))
    bundle.check(load_config([*ARGS, "--from_scratch", "--data_revision", COMMIT["data"]]))
    bundle.check(load_config(["--data", "digits", "--model", "tiny"]))


@pytest.mark.parametrize(
    ("args", "missing"),
    [
        (["--data", "lab/birds", "--model", "lab/vit"], "data set lab/birds"),
        (["--data", "lab/photos", "--data_config", "c", "--model", "lab/vit"], "data set lab/photos (c)"),
        (["--data", "lab/photos", "--data_revision", "v2", "--model", "lab/vit"], "data set lab/photos at v2"),
        (["--data", "lab/photos", "--model", "lab/swin"], "model lab/swin"),
        (["--data", "lab/photos", "--model", "lab/vit", "--model_revision", "c" * 40], f"model lab/vit at {'c' * 40}"),
        (["--data", "digits", "--model", "tiny", "--metrics", "matthews", "lab/other"], "metric lab/other"),
        (["--data", "lab/birds", "--model", "lab/swin"], "data set lab/birds, no model lab/swin"),
    ],
)
def test_bundle_for_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], missing: str
) -> None:
    folder = made(tmp_path / "b", *ARGS)
    line = refusal(monkeypatch, folder, *args)
    assert f"holds no {missing};" in line and "vit-dist fetch --data" in line and f"--bundle {folder}" in line


def test_weights_are_missed_where_only_the_architecture_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "b", *ARGS, "--from_scratch")
    assert "holds no weights of lab/vit;" in refusal(monkeypatch, folder, *ARGS)


def damage(folder: Path, kind: str) -> None:
    manifest = folder / bundle.MANIFEST
    match kind:
        case "no folder":
            folder.rename(folder.with_name("elsewhere"))
        case "no manifest":
            manifest.unlink()
        case "cut manifest":
            manifest.write_text(manifest.read_text()[:-20])
        case "changed manifest":
            manifest.write_text(manifest.read_text().replace("lab/photos", "lab/photo2"))
        case "not an object":
            manifest.write_text("[]")
        case "no file":
            (folder / "file").unlink()
        case "short file":
            (folder / "file").write_text("fou")


DAMAGES = {
    "no folder": "b does not exist on this machine;",
    "no manifest": "b is no bundle, it has no manifest.json;",
    "cut manifest": "manifest.json cannot be read (",
    "changed manifest": "manifest.json was changed or cut short;",
    "not an object": "manifest.json cannot be read (",
    "no file": "is damaged: file cannot be read (No such file or directory), 1 in all;",
    "short file": "is damaged: file has 3 bytes instead of 4, 1 in all;",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_bundle_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = made(tmp_path / "b", *ARGS)
    damage(folder, kind)
    line = refusal(monkeypatch, folder, *ARGS)
    assert DAMAGES[kind] in line and line.endswith(f"--metrics matthews --bundle {folder}")


def test_bundle_with_a_cache_dir_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "b", *ARGS)
    assert "leave cache_dir out" in refusal(monkeypatch, folder, *ARGS, "--cache_dir", "/scratch")


@pytest.mark.launch  # the package looks for the bundle when it is imported
@pytest.mark.parametrize("module", ["vit_dist.train", "vit_dist.commands.doctor", "vit_dist.commands.plan"])
def test_missing_bundle_refuses_every_verb_in_one_line_and_leaves_nothing(tmp_path: Path, module: str) -> None:
    env: dict[str, Any] = {bundle.VARIABLE: str(tmp_path / "b"), "HF_HUB_OFFLINE": "0"}
    failed = run(*ARGS, "--output_dir", tmp_path / "run", module=module, expect=2, **env)
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: the bundle {tmp_path}/b does not exist on this machine; where there is a network: ")
    assert not (tmp_path / "run").exists()
