"""All that a run takes from the Hugging Face hub, in a folder, for machines without a network.

`vit-dist fetch` makes it; `VIT_DIST_BUNDLE=FOLDER` in the environment of any process of ours seals that process: it
reads from the folder and tries to reach no other host. What a run writes goes where it would go without one, so the
folder may be read-only.

FOLDER/
  manifest.json   what was fetched, of which commits, and the size and SHA-256 of every file
  hf/hub/         the model, as huggingface_hub caches it
  hf/modules/     metrics, as evaluate caches them
  data/           the data set, as `save_to_disk` writes it: images in it, no paths of the machine that fetched it
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_dist.errors import UserError
from vit_dist.files import is_sealed

if TYPE_CHECKING:
    from vit_dist.config import Config

VARIABLE = "VIT_DIST_BUNDLE"
MANIFEST = "manifest.json"
HUB_CACHE, MODULES, DATA = "hf/hub", "hf/modules/evaluate_modules", "data"
SEALED = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # of datasets and evaluate
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",  # what other trackers and their libraries heed
    "GRADIO_ANALYTICS_ENABLED": "False",  # Trackio's
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def seal(environ: MutableMapping[str, str] = os.environ) -> None:
    """Settings for the libraries, which read them when they are imported; none without `VIT_DIST_BUNDLE`."""
    if not environ.get(VARIABLE):
        return
    folder = os.path.abspath(os.path.expanduser(environ[VARIABLE]))
    environ.update(SEALED)
    environ[VARIABLE] = folder  # for processes that are started in other folders
    environ["HF_HUB_CACHE"] = os.path.join(folder, HUB_CACHE)
    if environ.get("WANDB_MODE", "").lower() not in ("disabled", "offline", "dryrun"):
        environ["WANDB_MODE"] = "offline"


def opened(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The bundle that this process reads from, if any."""
    return Path(environ[VARIABLE]) if environ.get(VARIABLE) else None


def check(config: Config) -> None:
    """Raise UserError if the bundle of this process is not whole, or not for this run. Cheap: sizes, no hashes."""
    folder = opened()
    if folder is None:
        return
    wanted = needs(config)
    cure = f"; where there is a network: {fetch_command(wanted, folder)}"
    if config.data.cache_dir is not None:
        raise UserError(
            f"cache_dir={config.data.cache_dir} with {VARIABLE}: model and data come from the bundle; leave cache_dir "
            "out (HF_HOME is where indexes are kept)"
        )
    manifest = read(folder, cure)
    if absent := lacks(manifest, wanted):
        raise UserError(f"{VARIABLE}={folder} holds no {', no '.join(absent)}{cure}")
    if damaged := integrity_errors(folder, manifest):
        raise UserError(f"{VARIABLE}={folder} is damaged: {damaged[0]}, {len(damaged)} in all{cure}")


def needs(config: Config) -> dict[str, Any]:
    """What the run takes from the hub, by kind (`data`, `model`, `metrics`); nothing that lies in local files."""
    data, model, found = config.data, config.model, dict[str, Any]()
    if data.data != "digits" and _is_hub_id(data.data):
        found["data"] = {"name": data.data, "config": data.data_config, "revision": data.data_revision}
    if model.model != "tiny" and _is_hub_id(model.model):
        weights = not model.from_scratch
        found["model"] = {"name": model.model, "revision": model.model_revision, "weights": weights}
    if metrics := [name for name in config.run.metrics if _is_hub_id(name) and not name.endswith(".py")]:
        found["metrics"] = metrics
    return found


def _is_hub_id(name: str) -> bool:
    path = Path(name).expanduser()
    return bool(name) and not path.exists() and name[0] not in "./~\\" and name.count("/") < 2


def read(folder: Path, cure: str = "") -> dict[str, Any]:
    """The manifest. Raises UserError, which ends with `cure`, if it is not there or not as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = is_sealed(manifest) and {"data", "model", "metrics", "files"} <= manifest.keys()
    except FileNotFoundError:
        what = f"is no bundle, it has no {MANIFEST}" if folder.is_dir() else "does not exist on this machine"
        raise UserError(f"the bundle {folder} {what}{cure}") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}){cure}") from None
    if not whole:
        raise UserError(f"{folder / MANIFEST} was changed or cut short{cure}")
    return manifest


def lacks(manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What is wanted and not in the bundle, in words."""
    absent = []
    if "data" in wanted and not _same(wanted["data"], manifest["data"], "config"):
        absent.append(f"data set {_described(wanted['data'])}")
    if "model" in wanted:
        model = manifest["model"]
        if not _same(wanted["model"], model):
            absent.append(f"model {_described(wanted['model'])}")
        elif wanted["model"]["weights"] and not model["weights"]:
            absent.append(f"weights of {_described(wanted['model'])}")
    return absent + [f"metric {name}" for name in wanted.get("metrics", ()) if name not in manifest["metrics"]]


def _same(wanted: Mapping[str, Any], there: Mapping[str, Any] | None, *keys: str) -> bool:
    if there is None or any(wanted[key] != there[key] for key in ("name", *keys)):
        return False
    return wanted["revision"] in (there["revision"], there["commit"])


def _described(wanted: Mapping[str, Any]) -> str:
    config = f" ({wanted['config']})" if wanted.get("config") else ""
    return f"{wanted['name']}{config}" + (f" at {wanted['revision']}" if wanted["revision"] else "")


def integrity_errors(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that are missing or have another size than in the manifest, in words."""
    found = []
    for name, facts in manifest["files"].items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
        else:
            if size != facts["bytes"]:
                found.append(f"{name} has {size:,} bytes instead of {facts['bytes']:,}")
    return found


def fetch_command(wanted: Mapping[str, Any], folder: Path) -> str:
    """The `vit-dist fetch` that brings what is wanted."""
    words = ["vit-dist", "fetch", "--data", "digits", "--model", "tiny"]
    if data := wanted.get("data"):
        words[3] = data["name"]
        words += ["--data_config", data["config"]] if data["config"] else []
        words += ["--data_revision", data["revision"]] if data["revision"] else []
    if model := wanted.get("model"):
        words[5] = model["name"]
        words += ["--model_revision", model["revision"]] if model["revision"] else []
        words += [] if model["weights"] else ["--from_scratch"]
    words += ["--metrics", *wanted["metrics"]] if wanted.get("metrics") else []
    return shlex.join([*words, "--bundle", str(folder)])
