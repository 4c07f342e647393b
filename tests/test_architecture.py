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
    "terminal": set(),
    "environment": {"errors"},
    "errors": {"terminal"},
    "files": {"errors"},
    "options": set(),
    "settings_file": {"errors"},
    "config": {"terminal", "errors", "options", "settings_file"},
    "console": {"files", "terminal"},
    "first_look": {"errors", "settings_file"},
    "config": {"errors", "first_look", "options", "settings_file"},
    "console": set(),
    "verbs.parser": {"errors"},
    "cost.flops": {"rewrites"},
    "build": {
        "data.shared_memory", "environment",
        "arguments", "auto_batch", "batch", "blocks", "console", "distributed", "strategy", "checkpoint.writer",
        "config", "data.pipeline", "data.pixels", "data.resident", "errors", "metrics.__init__", "model", "trainer",
        "cost.flops", "cost.peak", "data.workers",
    },
    "data.workers": {"data.dataset"},
    "data.shared_memory": set(),
    "verbs.bench": {"cost.peak",
        "arguments", "batch", "build", "checkpoint.writer", "config", "console", "distributed", "entry", "errors",
        "cost.flops", "run.run_folder", "strategy", "verbs.parser",
    },
    "verbs.cache": {
        "config", "console", "data.image_cache", "data.pipeline", "data.resident", "entry", "errors", "verbs.parser",
    },
    "verbs.preflight": {"run.attempts", "bundle", "verbs.checks", "config", "console", "entry"},
    "distributed": {"environment", "errors", "stop", "terminal"},
    "entry": {"terminal", "console", "distributed", "errors", "redact", "stop"},
    "verbs.preflight": {"run.attempts", "run.folder_choice", "bundle", "verbs.checks", "config", "console", "entry"},
    "distributed": {"errors"},
    "entry": {"console", "distributed", "errors", "redact", "stop"},
    "data.__init__": set(),
    "cost.__init__": set(),
    "run.__init__": set(),
    "verbs.__init__": set(),
    "data.cache": {"errors", "files"},
    "data.listing": set(),
    "data.split_words": set(),
    "data.layout": {"errors", "options", "data.columns", "data.listing", "data.split_words"},
    "data.folders": {"options", "data.index", "data.layout", "data.listing"},
    "data.shards": {"errors", "data.index", "data.listing"},
    "data.columns": {"errors", "options"},
    "data.tables": {"errors", "options", "data.columns", "data.cache"},
    "data.index": {"errors", "data.cache"},
    "data.decode": {"errors", "options"},
    "data.source": {
        "errors", "first_look", "options", "data.cache", "data.columns", "data.hub", "data.index", "data.split",
        "data.tables",
        "errors", "options", "data.cache", "data.columns", "data.folders", "data.hub", "data.index", "data.layout",
        "data.listing", "data.shards", "data.split", "data.tables",
    },
    "data.split": {"errors", "options"},
    "data.verify": {"files", "errors", "options", "data.cache", "data.decode", "data.split"},
    "data.transforms": {"errors", "families", "options"},
    "data.split": {"errors", "data.listing"},
    "data.verify": {"errors", "options", "data.cache", "data.decode", "data.listing", "data.split"},
    "data.duplicates": {"data.listing", "data.split"},
    "data.describe": {"data.decode", "data.listing", "data.split", "data.verify"},
    "data.transforms": {"errors", "options"},
    "data.sampler": {"errors"},
    "data.dataset": {"data.decode", "data.transforms"},
    "data.hub": {"bundle", "errors", "options", "data.cache"},
    "data.pixels": set(),
    "data.image_cache": {"errors", "files", "data.cache", "data.dataset", "data.decode", "data.verify"},
    "data.resident": {
        "distributed", "stop", "errors", "data.dataset", "data.image_cache", "data.pipeline", "data.pixels",
    },
    "blocks": {"errors", "rewrites", "data.pixels"},
    "rewrites": {"errors"},
    "data.pipeline": {"options",
        "data.dataset", "data.decode", "data.describe", "data.duplicates", "data.listing", "data.source", "data.split",
        "data.transforms", "data.verify",
    },
    "families": {"errors", "options"},
    "classifiers": set(),
    "weight_decay": set(),
    "model": {"errors", "families", "options"},
    "metrics.__init__": {"bundle", "errors", "metrics.outcomes"},
    "metrics.outcomes": set(),
    "callbacks.__init__": set(),
    "callbacks.reproducible": {"data.sampler"},
    "callbacks.metrics_file": {"files"},
    "callbacks.watchdog": {"errors", "files", "terminal"},
    "callbacks.progress": {"callbacks.speed"},
    "callbacks.profile": {"checkpoint.store", "errors", "files"},
    "callbacks.watchdog": set(),
    "callbacks.progress": {"callbacks.speed", "console"},
    "callbacks.profile": set(),
    "callbacks.communication": {"callbacks.profile"},
    "callbacks.speed": {"callbacks.communication", "clock"},
    "clock": set(),
    "cost.peak": set(),
    "callbacks.wandb": {"redact"},
    "batch": {"config", "errors"},
    "auto_batch": {"batch", "blocks", "config", "cost.memory", "distributed", "errors"},
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
    "run.owner": {"environment", "files", "checkpoint.store", "errors"},
    "strategy": {"environment", "blocks", "errors"},
    "cost.memory": {"errors", "strategy"},
    "cost.measured": {"errors"},
    "cost.scaling": set(),
    "arguments": {"environment", "batch", "config", "distributed", "errors", "strategy"},
    "arguments": {"batch", "config", "distributed", "errors", "schedule", "strategy"},
    "resumable": {
        "checkpoint.load", "checkpoint.snapshot", "checkpoint.store", "checkpoint.writer", "clock", "distributed",
        "errors", "model", "stop",
    },
    "trainer": {
        "checkpoint.writer", "clock", "errors", "config", "distributed", "data.dataset", "data.pipeline", "data.pixels",
        "data.sampler", "metrics.__init__", "metrics.outcomes", "callbacks.reproducible", "resumable", "schedule",
        "stop", "weight_decay",
    },
    "run.run_folder": {"environment", "checkpoint.store", "console", "errors", "files", "run.owner", "redact"},
    "run.attempts": {"environment", 
        "batch", "callbacks.metrics_file", "checkpoint.load", "checkpoint.store", "config", "errors", "files",
        "run.owner", "run.run_folder",
    },
    "run.failure": {"environment", "data.shared_memory", 
    "run.folder_choice": {
        "batch", "checkpoint.store", "config", "distributed", "errors", "run.attempts", "run.owner", "run.run_folder",
    },
    "run.failure": {
        "run.attempts", "callbacks.watchdog", "config", "distributed", "errors", "redact", "run.run_folder", "stop",
    },
    "run.trackers": {
        "arguments", "run.attempts", "config", "run.run_folder", "trainer", "callbacks.metrics_file",
        "callbacks.communication", "callbacks.profile", "callbacks.progress", "callbacks.speed", "callbacks.wandb",
        "cost.flops", "cost.peak", "distributed",
    },
    "run.summary": {
        "__init__", "run.attempts", "batch", "build", "config", "model", "schedule", "run.trackers",
    },
    "run.report": {"terminal", "files", "config", "data.dataset"},
    "run.report": {"files", "config", "data.dataset", "families"},
    "run.results": {
        "run.attempts", "config", "console", "distributed", "data.dataset", "data.pipeline", "data.pixels", "errors",
        "run.failure", "files", "metrics.__init__", "run.report", "run.run_folder", "stop", "run.trackers", "trainer",
    },
    "train": {
        "__init__", "first_look",
        "arguments", "run.attempts", "batch", "bundle", "callbacks.profile", "callbacks.watchdog",
        "checkpoint.writer", "errors",
        "run.failure", "build", "run.folder_choice", "run.owner", "run.run_folder", "stop",
        "config", "console", "distributed", "entry",
        "model", "run.results", "strategy", "run.summary", "run.trackers", "trainer",
    },
    "verbs.checks": {
        "bundle", "files", "config", "console", "distributed", "errors", "callbacks.wandb", "data.hub", "data.pipeline",
        "data.resident", "data.source", "data.transforms", "strategy", "run.trackers",
    },
    "verbs.doctor": {
        "arguments", "run.attempts", "batch", "bundle", "verbs.checks", "config", "console", "distributed", "entry",
        "errors", "files", "strategy", "trainer",
    },
    "verbs.plan": {"terminal", 
        "arguments", "batch", "bundle", "config", "console", "data.pipeline", "data.resident", "data.sampler", "errors",
        "cost.flops", "cost.measured", "metrics.__init__", "model", "run.run_folder", "schedule", "trainer",
        "verbs.machines", "verbs.parser", "verbs.plan_strategies", "verbs.plan_text",
    },
    "verbs.plan_strategies": {
        "auto_batch", "batch", "config", "cost.measured", "cost.memory", "cost.scaling", "strategy", "verbs.machines",
        "verbs.plan_text",
    },
    "verbs.machines": {"errors"},
    "verbs.plan_text": {"batch"},
    "verbs.sweep": {
        "config", "console", "errors", "run.run_folder", "settings_file", "terminal", "train", "verbs.parser",
    },
    "verbs.slurm": {"config", "console", "errors", "verbs.preflight", "verbs.sweep", "verbs.parser"},
    "verbs.fetch": {
        "bundle", "config", "console", "entry", "errors", "files", "data.hub", "data.transforms", "metrics.__init__",
        "run.run_folder", "verbs.parser",
    },
    "verbs.sync": {"files", "callbacks.wandb", "console", "entry", "errors", "run.owner", "redact", "verbs.parser"},
    "cli": {"environment", "terminal", "errors", "__init__", "verbs.sweep"},  # and the module of each verb, by its name
    "verbs.sync": {"callbacks.wandb", "console", "entry", "errors", "run.owner", "redact", "verbs.parser"},
    "__main__": {"cli"},
    "cli": {"__init__", "first_look", "verbs.sweep"},  # and the module of each verb, by its name
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


def test_import_table_has_no_cycle_and_no_stale_entry() -> None:
    assert set(ALLOWED) == set(MODULES)
    left = dict(ALLOWED)
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for module in free:
            del left[module]


def test_lower_layers_do_not_name_higher_ones() -> None:
    # It runs on a login node before there is a job; nothing that trains imports it.
    submits = PACKAGE / "verbs" / "slurm.py"
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.*")]:
        if path == submits:
            continue
        assert not re.search(r"SLURM_|sbatch|srun", path.read_text()), path


def test_training_imports_nothing_that_submits_jobs() -> None:
    assert not [module for module, path in MODULES.items() if "verbs.slurm" in imports(path)]
    submits = (PACKAGE / "verbs" / "slurm.py").read_text()
    assert not re.search(r"SLURM_[A-Z]", submits), "a job's variables are for its scripts"


def test_readme_shows_the_file_tree() -> None:
    tree = re.search(r"```\n(vit_dist/.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree, "the README's file tree begins with vit_dist/"
    shown = set(re.findall(r"^\s*([\w./]+)", tree.group(1), re.M))
    tops = {f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert tops <= shown, f"missing in the README's tree: {tops - shown}"
    assert all(any(ROOT.glob(f"**/{name.rstrip('/')}")) for name in shown), "the tree names what is not there"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
