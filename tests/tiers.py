"""Which tests a pytest process runs: the cases drawn by the seed, a third of the slow tier, its share of the files.

`make test` starts two processes side by side. Plain ones, since whatever is forked from a process with threads, as
those of xdist, may inherit a lock that nobody will release. Each claims the next file that nobody has begun.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Files of more than about half a minute. They are begun first, so that the processes end at about the same time.
LONGEST_FIRST = (
    "tests/slurm/test_slurm.py", "tests/test_strategies.py", "tests/faults/test_exact.py",
    "tests/faults/test_signals.py", "tests/faults/test_ends.py", "tests/faults/test_kills.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption(
        "--seed", type=int, default=int(time.time()) % 1000,
        help="draws the cases of tests marked `draw`, the third of --third, and the faults of the chaos test",
    )  # fmt: skip
    group.addoption("--third", action="store_true", help="of the slow tests, run the third that the seed chooses")
    group.addoption(
        "--shared", type=Path, metavar="FOLDER",
        help="pytest processes with the same folder run the tests together: each file is run by the first to claim it",
    )  # fmt: skip


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')} (--seed repeats the draw)"


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what the seed does not draw; with --third, deselect the slow tests of the other two thirds."""
    seed = config.getoption("seed")
    pool = sorted((item for item in items if {"slow", "draw"} & _markers(item)), key=lambda item: item.nodeid)
    cases = defaultdict(list)
    for item in pool:
        if "slow" not in _markers(item) and (draw := item.get_closest_marker("draw")):
            cases[_function(item), draw.args[0]].append(item)
    for (function, count), found in cases.items():
        drawn = random.Random(f"{seed} {function}").sample(found, min(count, len(found)))
        for item in found:
            if item not in drawn:
                item.add_marker(pytest.mark.slow)
    if config.getoption("third"):
        others = {item for number, item in enumerate(pool) if (number + seed) % 3}
        config.hook.pytest_deselected(items=[item for item in items if item in others])
        items[:] = [item for item in items if item not in others]


def _markers(item: pytest.Item) -> set[str]:
    return {marker.name for marker in item.iter_markers()}


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --shared: as pytest's own loop, over the files that this process claims."""
    folder = session.config.getoption("shared")
    if folder is None or session.config.option.collectonly:
        return None
    if session.testsfailed and not session.config.option.continue_on_collection_errors:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    items = claimed(session.items, folder / "claims")
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def claimed(items: Sequence[Any], claims: Path) -> Iterator[Any]:
    """The tests of one file after another that no other process has claimed; the longest files come first."""
    claims.mkdir(exist_ok=True)
    for path, tests in itertools.groupby(sorted(items, key=_turn), key=_file):
        try:
            (claims / path.replace("/", "+")).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from tests


def _file(item: Any) -> str:
    return str(item.nodeid.partition("::")[0])


def _turn(item: Any) -> tuple[int, str]:
    path = _file(item)
    return LONGEST_FIRST.index(path) if path in LONGEST_FIRST else len(LONGEST_FIRST), path
