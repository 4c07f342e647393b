"""Rules about the code, kept by reading it: who may import whom, and that the README shows the tree as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vit_dist"

# Module -> the modules of ours that it may import. One direction: config -> data -> model -> trainer -> report.
# A new module must be given its place here.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"bundle"},
    "bundle": {"config", "errors", "files"},
    "errors": set(),
    "files": set(),
    "options": set(),
    "settings_file": {"errors"},
    "config": {"errors", "options", "settings_file"},
    "console": set(),
    "verb": {"errors"},
    "flops": set(),
    "build": {
        "blocks", "console", "distributed", "strategy", "checkpoint.writer", "config", "data.pipeline", "data.resident",
        "metrics.__init__", "model", "trainer",
    },
    "bench": {
        "arguments", "batch", "build", "checkpoint.writer", "config", "console", "distributed", "entry", "errors",
        "flops", "run_folder", "strategy", "verb",
    },
    "preflight": {"attempts", "bundle", "checks", "config", "console", "entry"},
    "distributed": {"errors"},
    "entry": {"console", "distributed", "errors", "redact", "stop"},
    "data.__init__": set(),
    "data.cache": {"errors"},
    "data.columns": {"errors", "options"},
    "data.tables": {"errors", "options", "data.columns", "data.cache"},
    "data.index": {"files", "errors", "options", "data.cache"},
    "data.decode": {"errors", "options"},
    "data.source": {
        "errors", "options", "data.cache", "data.columns", "data.hub", "data.index", "data.split", "data.tables",
    },
    "data.split": {"errors", "options"},
    "data.verify": {"files", "errors", "options", "data.cache", "data.decode", "data.split"},
    "data.transforms": {"errors", "options"},
    "data.sampler": {"errors"},
    "data.dataset": {"data.decode", "data.transforms"},
    "data.hub": {"bundle", "errors", "options", "data.cache"},
    "data.pixels": set(),
    "data.resident": {"errors", "data.dataset", "data.pipeline", "data.pixels"},
    "blocks": {"errors", "data.pixels"},
    "data.pipeline": {"options",
        "config", "data.dataset", "data.decode", "data.source", "data.split", "data.transforms", "data.verify",
    },
    "model": {"errors", "options"},
    "metrics.__init__": {"bundle", "errors"},
    "callbacks.__init__": set(),
    "callbacks.reproducible": {"data.sampler"},
    "callbacks.metrics_file": {"files"},
    "callbacks.watchdog": set(),
    "callbacks.progress": set(),
    "callbacks.wandb": {"redact"},
    "batch": {"config", "errors"},
    "schedule": {"config", "errors"},
    "checkpoint.__init__": set(),
    "checkpoint.store": {"files"},
    "checkpoint.load": {"checkpoint.store"},
    "checkpoint.snapshot": {"checkpoint.load", "checkpoint.store"},
    "checkpoint.writer": {
        "config", "distributed", "errors", "files", "redact", "checkpoint.snapshot", "checkpoint.store",
    },
    "stop": set(),
    "redact": set(),
    "owner": {"checkpoint.store", "errors"},
    "strategy": {"blocks", "errors"},
    "memory": {"errors", "strategy"},
    "arguments": {"batch", "config", "distributed", "errors", "strategy"},
    "resumable": {
        "checkpoint.load", "checkpoint.snapshot", "checkpoint.store", "checkpoint.writer", "distributed", "errors",
        "model", "stop",
    },
    "trainer": {
        "checkpoint.writer", "errors", "config", "distributed", "data.dataset", "data.pipeline", "data.pixels",
        "data.sampler", "metrics.__init__", "callbacks.reproducible", "resumable", "stop",
    },
    "run_folder": {"checkpoint.store", "console", "errors", "files", "owner", "redact"},
    "attempts": {
        "batch", "callbacks.metrics_file", "checkpoint.load", "checkpoint.store", "config", "errors", "files", "owner",
        "run_folder",
    },
    "failure": {"attempts", "callbacks.watchdog", "config", "distributed", "errors", "redact", "run_folder", "stop"},
    "trackers": {
        "arguments", "attempts", "config", "run_folder", "trainer", "callbacks.metrics_file", "callbacks.progress",
        "callbacks.wandb",
    },
    "summary": {
        "__init__", "attempts", "batch", "build", "config", "schedule", "trackers",
    },
    "report": {"files", "config", "data.dataset", "data.decode"},
    "results": {
        "attempts", "config", "console", "distributed", "data.dataset", "data.pipeline", "data.pixels", "errors",
        "failure", "files", "metrics.__init__", "report", "run_folder", "stop", "trackers", "trainer",
    },
    "train": {
        "arguments", "attempts", "batch", "bundle", "callbacks.watchdog", "checkpoint.writer", "errors", "failure",
        "build", "owner", "run_folder", "stop", "config", "console", "distributed", "entry",
        "model", "results", "strategy", "summary", "trackers", "trainer",
    },
    "checks": {
        "bundle", "files", "config", "console", "distributed", "errors", "callbacks.wandb", "data.hub", "data.pipeline",
        "data.source",
        "data.transforms", "strategy", "trackers",
    },
    "doctor": {
        "arguments", "attempts", "batch", "bundle", "checks", "config", "console", "distributed", "entry", "errors",
        "files", "strategy", "trainer",
    },
    "plan": {
        "arguments", "batch", "bundle", "config", "console", "data.pipeline", "data.sampler", "errors", "memory",
        "metrics.__init__", "model", "run_folder", "schedule", "strategy", "trainer", "verb",
    },
    "sweep": {"config", "console", "errors", "run_folder", "settings_file", "train", "verb"},
    "slurm": {"config", "console", "errors", "preflight", "sweep", "verb"},
    "fetch": {
        "bundle", "config", "console", "entry", "errors", "files", "data.hub", "data.transforms", "metrics.__init__",
        "run_folder", "verb",
    },
    "sync": {"callbacks.wandb", "console", "entry", "errors", "owner", "redact", "verb"},
    "cli": {"__init__", "sweep"},  # and the module of each verb, by its name
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "modules" not in path.parts}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vit_dist":
            base = (node.module or "")[len("vit_dist") :].lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                candidates = (whole, f"{whole}.__init__", base, f"{base}.__init__".lstrip("."))
                found.add(next(name for name in candidates if name in MODULES))
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    assert module in ALLOWED, "place the new module in the table"
    assert imports(MODULES[module]) <= ALLOWED[module]


def test_the_table_has_no_cycle_and_nothing_stale() -> None:
    assert set(ALLOWED) == set(MODULES)
    left = dict(ALLOWED)
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for module in free:
            del left[module]


def test_lower_layers_do_not_name_higher_ones() -> None:
    submits = PACKAGE / "slurm.py"  # runs on a login node before there is a job; nothing that trains imports it
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.*")]:
        if path == submits:
            continue
        assert not re.search(r"SLURM_|sbatch|srun", path.read_text()), path


def test_nothing_that_trains_imports_what_submits() -> None:
    assert not [module for module, path in MODULES.items() if "slurm" in imports(path)]
    assert not re.search(r"SLURM_[A-Z]", (PACKAGE / "slurm.py").read_text()), "a job's variables are for its scripts"


def test_the_readme_shows_the_tree_as_it_is() -> None:
    tree = re.search(r"```\n(vit_dist/.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree, "the README's file tree begins with vit_dist/"
    shown = set(re.findall(r"^\s*([\w./]+)", tree.group(1), re.M))
    tops = {f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert tops <= shown, f"missing in the README's tree: {tops - shown}"
    assert all(any(ROOT.glob(f"**/{name.rstrip('/')}")) for name in shown), "the tree names what is not there"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
