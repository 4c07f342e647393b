"""Which tests a pytest process runs: see tiers.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiers


class Item:
    def __init__(self, nodeid: str, *markers: Any) -> None:
        self.nodeid, self.markers = nodeid, list(markers)

    def iter_markers(self) -> Any:
        return (marker.mark for marker in self.markers)

    def get_closest_marker(self, name: str) -> Any:
        return next((marker.mark for marker in self.markers if marker.name == name), None)

    def add_marker(self, marker: Any) -> None:
        self.markers.append(marker)

    @property
    def slow(self) -> bool:
        return self.get_closest_marker("slow") is not None


def collected() -> list[Item]:
    cases = [Item(f"a.py::test_kill[{number}]", pytest.mark.draw(4)) for number in range(16)]
    slow = [Item(f"b.py::test_digits[{number}]", pytest.mark.slow) for number in range(5)]
    return [*cases, *slow, Item("c.py::test_fast")]


def chosen(seed: int, third: bool = False) -> list[Item]:
    items: Any = collected()
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    config: Any = SimpleNamespace(getoption={"seed": seed, "third": third}.__getitem__, hook=hook)
    tiers.pytest_collection_modifyitems(config, items)
    return items


def test_drawn_cases_are_fast_and_repeat_with_the_seed() -> None:
    fast = {seed: [item.nodeid for item in chosen(seed) if not item.slow] for seed in range(20)}
    assert all(len(found) == 4 + 1 for found in fast.values())
    assert fast[3] == [item.nodeid for item in chosen(3) if not item.slow]
    assert set().union(*fast.values()) == {item.nodeid for item in collected() if not item.slow}


def test_thirds_of_three_seeds_in_a_row_hold_every_slow_test() -> None:
    thirds = [{item.nodeid for item in chosen(seed, third=True)} for seed in (7, 8, 9)]
    assert set().union(*thirds) == {item.nodeid for item in collected()}
    assert all(len(third) == 21 // 3 + 1 for third in thirds), "and what is not slow"


def test_files_claimed_by_two_processes_run_once_and_longest_first(tmp_path: Path) -> None:
    items = [*collected(), Item(f"{tiers.LONGEST_FIRST[0]}::test_x")]
    one, two = (tiers.claimed(items, tmp_path / "claims") for _ in range(2))
    first, second = next(one), next(two)
    assert first.nodeid == items[-1].nodeid and second.nodeid == "a.py::test_kill[0]"
    assert Counter(item.nodeid for item in [first, second, *one, *two]) == Counter(item.nodeid for item in items)
