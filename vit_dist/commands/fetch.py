"""Bring all that a run takes from the Hugging Face hub into a bundle, for machines without a network.

vit-dist fetch configs/recipes/cifar10.yaml                       # into bundles/cifar10
vit-dist fetch --data user/photos --model google/vit-base-patch16-224-in21k --bundle /shared/photos
vit-dist fetch --verify bundles/cifar10                           # every file's SHA-256

Then, where there is no network: VIT_DIST_BUNDLE=bundles/cifar10 vit-dist train configs/recipes/cifar10.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vit_dist import bundle, console, entry
from vit_dist.config import Config, load_config
from vit_dist.errors import UserError
from vit_dist.files import remove, replacing, seal, sha256, sync_folder, sync_tree
from vit_dist.parser import Parser
from vit_dist.run.run_folder import versions

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# In the folder where a bundle is made: the libraries' caches, what they are for, and the bundle itself.
WORK, REQUEST, MADE = "work", "request.json", "bundle"
# Where the libraries would keep things if they were not told otherwise by HF_HOME.
CACHES = (
    "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE",
    "HF_DATASETS_DOWNLOADED_DATASETS_PATH", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE",
)  # fmt: skip


def fetch(argv: Sequence[str]) -> None:
    """Make the bundle that `argv` asks for, whole or not at all; what was downloaded is kept for another try.

    Raises UserError for what the user can mend.
    """
    asked, rest = _parser().parse_known_args(argv)
    if asked.verify is not None:
        verify(Path(asked.verify))
        return
    config = load_config(rest)
    if bundle.opened() is not None:
        raise UserError(f"{bundle.VARIABLE} is set, which keeps this process off the network; unset it for fetch")
    folder = Path(os.path.abspath(Path(asked.bundle or f"bundles/{_name(config)}").expanduser()))
    wanted = bundle.needs(config)
    local = _local(config)
    now: dict[str, str] = {kind: _commit(kind, config) for kind in ("data", "model") if kind in wanted}
    if _is_there(folder, wanted, now):
        console.say(f"{folder}: whole, and the hub has nothing newer; nothing to do")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")
        _use_caches_in(partial / WORK, argv)
        try:
            with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
                _make(partial, wanted, config)
                _put(partial / MADE, folder)
                remove(partial)
        except Timeout:
            raise UserError(f"another vit-dist fetch is making {folder}; wait for it") from None
        files = bundle.read(folder)["files"]
        size = sum(facts["bytes"] for facts in files.values())
        console.say(f"{folder}: {_described(wanted)}; {len(files)} files, {size / 1e6:,.1f} MB")
    for path in local:
        console.say(f"not copied, the nodes must see it: {path}")
    console.say(f"run with it: {bundle.VARIABLE}={folder}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vit-dist fetch",
        usage="vit-dist fetch [RECIPE] [--bundle FOLDER] [--flag value ...]",
        description=f"{__doc__}\nAll other flags are those of `vit-dist train`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--bundle", metavar="FOLDER", help="default: bundles/<name of the recipe>")
    parser.add_argument("--verify", metavar="FOLDER", help="read a bundle and compare every file's SHA-256; no network")
    return parser


def _name(config: Config) -> str:
    recipe = config.source.startswith("recipe ")
    return Path(config.source.removeprefix("recipe ") if recipe else config.data.data.rstrip("/")).stem


def _local(config: Config) -> list[str]:
    """Files and folders that the run reads and that are not from the hub. Raises UserError if they are not there."""
    wanted = bundle.needs(config)
    named = [config.data.data] if "data" not in wanted and config.data.data != "digits" else []
    named += [config.model.model] if "model" not in wanted and config.model.model != "tiny" else []
    named += [name for name in config.run.metrics if name not in wanted.get("metrics", ())]
    paths = [os.path.abspath(Path(name).expanduser()) for name in named]
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: there is no such file or folder")
    return paths


def _described(wanted: Mapping[str, Any]) -> str:
    named = [f"{kind} {wanted[kind]['name']}" for kind in ("data", "model") if kind in wanted]
    named += [f"metrics {', '.join(wanted['metrics'])}"] if "metrics" in wanted else []
    return ", ".join(named) or "nothing is needed from the hub"


def _commit(kind: str, config: Config) -> str:
    """The commit that the hub has now. Raises UserError if the hub cannot be reached or has no such thing."""
    if kind == "model":
        return str(_model_info(config).sha)
    from vit_dist.data.hub import hub_commit

    commit, unreachable = hub_commit(config.data.data, config.data.data_revision)
    if unreachable or commit is None:
        raise _no_hub()
    return commit


def _model_info(config: Config) -> ModelInfo:
    from huggingface_hub import HfApi
    from huggingface_hub import constants as hub

    from vit_dist.data.transforms import find_model

    offline = hub.HF_HUB_OFFLINE
    reachable = find_model(config.model)  # and if it is not there, an error that says so
    hub.HF_HUB_OFFLINE = offline
    if not reachable:
        raise _no_hub()
    return HfApi().model_info(config.model.model, revision=config.model.model_revision)


def _no_hub() -> UserError:
    from huggingface_hub import constants as hub

    if hub.HF_HUB_OFFLINE:
        return UserError("HF_HUB_OFFLINE is set, and fetch needs the Hugging Face hub; unset it")
    return UserError(
        f"the hub cannot be reached from this machine ({hub.ENDPOINT}); run fetch where there is a network"
    )


def _is_there(folder: Path, wanted: Mapping[str, Any], now: Mapping[str, str]) -> bool:
    """Whether the bundle is whole, for this, and of the commits that the hub has now.

    Raises UserError for a folder that is something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / bundle.MANIFEST).exists():
        raise UserError(f"{folder} is there already and is no bundle; choose another one with --bundle")
    try:
        manifest = bundle.read(folder)
    except UserError:
        return False
    same = all(manifest[kind] is not None and manifest[kind]["commit"] == commit for kind, commit in now.items())
    return same and not bundle.lacks(manifest, wanted) and not bundle.integrity_errors(folder, manifest)


def _use_caches_in(folder: Path, argv: Sequence[str]) -> None:
    """Go on as a process whose libraries keep everything in `folder`: they have read their settings when they were
    imported.
    """
    if os.environ.get("HF_HOME") == str(folder):
        return
    from huggingface_hub import constants as hub

    environ = {name: value for name, value in os.environ.items() if name not in CACHES}
    environ |= {
        "HF_HOME": str(folder),
        "HF_TOKEN_PATH": hub.HF_TOKEN_PATH,  # would be in HF_HOME
        "HF_HUB_DISABLE_SHARED_BLOBS": "1",  # a model's folder holds all of its files
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "vit_dist.commands.fetch", *argv], environ)


def _make(partial: Path, wanted: Mapping[str, Any], config: Config) -> None:
    """The bundle, its manifest last, with what an earlier try for the same has downloaded."""
    request, made = partial / REQUEST, partial / MADE
    if not request.is_file() or request.read_text(encoding="utf-8") != json.dumps(wanted):
        remove(partial)
        partial.mkdir()
        with replacing(request) as temporary:
            temporary.write_text(json.dumps(wanted), encoding="utf-8")
    remove(made)
    made.mkdir()
    found = {
        "model": {**wanted["model"], "commit": _fetch_model(made, config)} if "model" in wanted else None,
        "data": {**wanted["data"], "commit": _fetch_data(made, config)} if "data" in wanted else None,
        "metrics": wanted.get("metrics", []),
        "not_copied": _local(config),
        "versions": versions(),
    }
    if "metrics" in wanted:
        _fetch_metrics(made, partial / WORK, wanted["metrics"])
    manifest = seal({**found, "files": _files(made)})
    (made / bundle.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync_tree(made)


def _fetch_model(made: Path, config: Config) -> str:
    """The files that `model.build_model` reads, and no pickled or other weights. Returns their commit."""
    from huggingface_hub import hf_hub_download, snapshot_download

    options, revision = config.model, config.model.model_revision or "main"
    info = _model_info(config)
    there = {file.rfilename for file in info.siblings or ()}
    names = ["config.json", "preprocessor_config.json", "processor_config.json"]
    if not options.from_scratch:
        index = "model.safetensors.index.json"
        if "model.safetensors" in there:
            names.append("model.safetensors")
        elif index in there:
            path = hf_hub_download(options.model, index, revision=revision)
            names += [index, *sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))]
        else:
            raise UserError(f"model {options.model}: no safetensors weights there; pickled weights are not loaded")
    snapshot = Path(snapshot_download(options.model, revision=revision, allow_patterns=names))
    repository = snapshot.parents[1]
    copy, unfinished = made / bundle.HUB_CACHE / repository.name, shutil.ignore_patterns("*.incomplete")
    shutil.copytree(repository, copy, symlinks=True, ignore=unfinished)
    return snapshot.name


def _fetch_data(made: Path, config: Config) -> str | None:
    """Through the code that training loads it with, then as files that hold the images themselves."""
    import datasets

    from vit_dist.data.hub import load_hub

    options = dataclasses.replace(config.data, cache_dir=None)
    splits, commit = load_hub(options.data, options)
    datasets.DatasetDict(splits).save_to_disk(str(made / bundle.DATA))
    return commit


def _fetch_metrics(made: Path, work: Path, names: Sequence[str]) -> None:
    """Through the code that training loads them with; of its cache, what belongs to these metrics."""
    from vit_dist.metrics import ClassificationMetrics

    modules = work / Path(bundle.MODULES).relative_to("hf")
    remove(modules)  # of an earlier try, maybe of another version
    ClassificationMetrics(["a", "b", "c"], names)
    for name in names:
        folders = [modules / "metrics" / name.replace("/", "--"), *modules.glob(f"metrics/evaluate-*--{name}")]
        for folder in filter(Path.is_dir, folders):
            shutil.copytree(
                folder,
                made / bundle.MODULES / folder.relative_to(modules),
                ignore=shutil.ignore_patterns("__pycache__", "*.lock"),
            )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file, by its path in the folder; of a link, those of the file that it leads to."""
    known: dict[Path, dict[str, Any]] = {}
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        real = path.resolve()
        if real not in known:
            with real.open("rb") as file:
                known[real] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256(file)}
        found[path.relative_to(folder).as_posix()] = known[real]
    return found


def _put(made: Path, folder: Path) -> None:
    """In the place of `folder`, which is an older bundle, empty or not there."""
    old = folder.with_name(f".{folder.name}.old")
    remove(old)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    sync_folder(folder.parent)
    remove(old)


def verify(folder: Path) -> None:
    """Compare every file of a bundle with its manifest. Raises UserError, naming what differs."""
    manifest = bundle.read(folder)
    differ = bundle.integrity_errors(folder, manifest)
    if not differ:
        found = _files(folder)
        differ = [f"{name} was changed" for name, facts in manifest["files"].items() if found.get(name) != facts]
    if differ:
        raise UserError(
            f"{folder}: {', '.join(differ[:5])}; {len(differ)} in all; delete the folder and fetch it again"
        )
    console.say(f"{folder}: all {len(manifest['files'])} files are as they were fetched")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fetch`; exit codes as `entry.run` has them."""

    def body() -> int:
        fetch(sys.argv[1:] if argv is None else argv)
        return 0

    return entry.run(body, "interrupted; the same command goes on with what was downloaded")


if __name__ == "__main__":
    sys.exit(main())
