"""Every image decoded once before training, the outcome remembered; then bad ones stop the run or are left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import PIL

from vit_dist.data.cache import cache_folder, locked
from vit_dist.data.decode import RULES_VERSION, BadImage, DecodeRules, decode_reduced
from vit_dist.data.split import table_fingerprint
from vit_dist.errors import UserError
from vit_dist.files import replacing

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

_CHUNK = 32  # rows that a worker reads at once
_MOST_LISTED = 10


@dataclass(frozen=True)
class BadRow:
    """A row whose image does not decode, and why."""

    index: int
    id: str
    reason: str


def verify(
    table: datasets.Dataset,
    rules: DecodeRules,
    *,
    workers: int | None = None,
    cache_dir: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[BadRow]:
    """The rows whose images do not decode under `rules`, in order.

    Decodes with `workers` threads (default: the cores that this process may use), Pillow's decoders run side by
    side; JPEGs at an eighth of their size, which finds what decoding them whole finds. The outcome is remembered until
    a file, a rule or Pillow changes; other processes that want the same wait for it. `progress(done, total)` is called
    in the process that decodes.
    """
    path = cache_folder(cache_dir) / f"verified-{decoding_key(table, rules)}.json"
    bad = _remembered(path)
    if bad is None:
        with locked(path):
            bad = _remembered(path)
            if bad is None:
                bad = _decode_all(table, rules, workers or cores(), progress)
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps([dataclasses.astuple(row) for row in bad]), encoding="utf-8")
    return bad


def apply_policy(
    table: datasets.Dataset, bad: Sequence[BadRow], options: DataOptions, split_name: str
) -> tuple[datasets.Dataset, int]:
    """The table without its bad rows, and how many those were.

    Raises `UserError` listing them, unless they may be skipped and are no more than `max_bad_fraction`.
    """
    if not bad:
        return table, 0
    count = f"{len(bad):,} of {len(table):,} images of {split_name} do not decode"
    if options.on_bad_image != "skip":
        raise UserError(f"{count}; mend or remove them, or leave them out with --on_bad_image skip:", _listed(bad))
    if len(bad) > options.max_bad_fraction * len(table) or len(bad) == len(table):
        raise UserError(
            f"{count} ({len(bad) / len(table):.2%}), too many for --on_bad_image skip with "
            f"--max_bad_fraction {options.max_bad_fraction:g}:",
            _listed(bad),
        )
    keep = np.ones(len(table), bool)
    keep[[row.index for row in bad]] = False
    return table.select(np.flatnonzero(keep)), len(bad)


def _listed(bad: Sequence[BadRow]) -> list[str]:
    more = len(bad) - _MOST_LISTED
    return [f"{row.id}: {row.reason}" for row in bad[:_MOST_LISTED]] + ([f"and {more:,} more"] if more > 0 else [])


def decoding_key(table: datasets.Dataset, rules: DecodeRules, *more: int) -> str:
    """Changes with the images (for files: size and change time), the rules, the decoder, and what is given further."""
    times = table_fingerprint(table, with_times=True)
    parts = [times, dataclasses.astuple(rules), RULES_VERSION, PIL.__version__, *more]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _remembered(path: Path) -> list[BadRow] | None:
    try:
        return [BadRow(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_all(
    table: datasets.Dataset, rules: DecodeRules, workers: int, progress: Callable[[int, int], None] | None
) -> list[BadRow]:
    rows = table.select_columns(["id", "image"])

    def decode_chunk(start: int) -> list[BadRow]:
        chunk = rows[start : start + _CHUNK]
        bad = []
        for offset, (id, image) in enumerate(zip(chunk["id"], chunk["image"], strict=True)):
            try:
                decode_reduced(image, rules, lambda width, height: 8)
            except BadImage as error:
                bad.append(BadRow(start + offset, id, error.reason))
        return bad

    found: list[BadRow] = []
    starts = range(0, len(table), _CHUNK)
    with ThreadPoolExecutor(workers) as pool:
        for start, bad in zip(starts, pool.map(decode_chunk, starts), strict=True):
            found += bad
            if progress is not None:
                progress(min(start + _CHUNK, len(table)), len(table))
    return found
