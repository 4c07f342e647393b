"""Rules about the code, kept by reading it: who may import whom, and that the README shows the tree as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vit_dist"

# Lowest first. A module may import modules of its own layer and of lower ones, without cycles. `data.` is a package.
# One direction: config -> data -> model -> training -> run -> commands.
LAYERS: dict[str, tuple[str, ...]] = {
    "foundation": (
        "terminal", "redact", "errors", "environment", "files", "settings_file", "options", "stop", "clock", "console",
        "first_look", "distributed", "entry", "threads", "parser", "listing", "launch.",
    ),
    "config": ("__init__", "config", "bundle", "batch", "schedule", "families"),
    "data": ("data.",),
    "model": ("model", "classifiers", "weight_decay", "blocks", "rewrites", "cost.", "auto_batch", "strategy"),
    "training": ("arguments", "checkpoint.", "metrics.", "callbacks.", "resumable", "trainer", "build"),
    "run": ("run.",),
    "commands": ("train", "commands."),
    "cli": ("cli", "__main__"),
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


def layer_of(module: str) -> int:
    """The position of the module's layer; fails for a module without one."""
    found = [
        position
        for position, members in enumerate(LAYERS.values())
        if any(module == member or (member[-1] == "." and module.startswith(member)) for member in members)
    ]
    assert len(found) == 1, f"{module} is in {len(found)} layers; name it in one of LAYERS"
    return found[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_own_layer_and_lower_ones(module: str) -> None:
    higher = {name for name in imports(MODULES[module]) if layer_of(name) > layer_of(module)}
    assert not higher, f"{module} imports from a higher layer: {sorted(higher)}"


def test_imports_form_no_cycle() -> None:
    left = {module: imports(path) for module, path in MODULES.items()}
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for module in free:
            del left[module]


def test_layers_name_no_module_that_is_gone() -> None:
    members = {member for layer in LAYERS.values() for member in layer}
    known = {*MODULES, *(module.partition(".")[0] + "." for module in MODULES if "." in module)}
    assert members <= known


def test_lower_layers_do_not_name_higher_ones() -> None:
    # It runs on a login node before there is a job; nothing that trains imports it.
    submits = PACKAGE / "commands" / "slurm.py"
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.*")]:
        if path == submits:
            continue
        assert not re.search(r"SLURM_|sbatch|srun", path.read_text()), path


def test_training_imports_nothing_that_submits_jobs() -> None:
    assert not [module for module, path in MODULES.items() if "commands.slurm" in imports(path)]
    submits = (PACKAGE / "commands" / "slurm.py").read_text()
    assert not re.search(r"SLURM_[A-Z]", submits), "a job's variables are for its scripts"


def test_readme_shows_the_file_tree() -> None:
    tree = re.search(r"```\n(vit_dist/.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree, "the README's file tree begins with vit_dist/"
    shown = set(re.findall(r"\b\w+(?:\.py|/)", tree.group(1)))
    tops = {f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert tops <= shown, f"missing in the README's tree: {tops - shown}"
    assert all(any(ROOT.glob(f"**/{name.rstrip('/')}")) for name in shown), "the tree names what is not there"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
