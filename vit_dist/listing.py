"""Names in messages: at most ten of them, none too long."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_MOST = 10
_LONGEST = 60  # characters of one name


def listed(names: Collection[str], room: int = 220, most: int = _MOST) -> str:
    """The first names, separated by commas, and how many are left.

    Args:
        names: In the order in which they are shown.
        room: Characters that the names may take; the first one is always shown.
        most: Names at most.
    """
    shown: list[str] = []
    length = 0
    for name in names:
        short = shortened(name)
        length += len(short) + 2
        if len(shown) == most or (shown and length > room):
            break
        shown.append(short)
    left = len(names) - len(shown)
    return ", ".join(shown) + (f" and {left:,} more" if left else "")


def shortened(name: str, longest: int = _LONGEST) -> str:
    """The name, without its middle if it is longer than `longest` characters."""
    if len(name) <= longest:
        return name
    end = (longest - 3) // 2
    return f"{name[: longest - 3 - end]}...{name[-end:]}"


def counted(counts: Mapping[str, int], most: int = 5) -> str:
    """`12 .cr2, 3 .txt` for numbers of files by suffix, the most frequent first."""
    order = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
    parts = [f"{counts[suffix]:,} {_suffix(suffix)}" for suffix in order]
    return listed(parts, most=most)


def _suffix(suffix: str) -> str:
    return "without a suffix" if not suffix else "of other formats" if suffix == "..." else f".{suffix}"
