"""Every image decoded once before training, the outcome remembered; then bad ones stop the run or are left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import PIL

from vit_dist.data.cache import cache_folder, locked, read_sealed, write_sealed
from vit_dist.data.decode import HIGHEST_LEVEL, RULES_VERSION, BadImage, DecodeRules, decode_downscaled, encoded_bytes
from vit_dist.data.split import table_fingerprint
from vit_dist.environment import job_cores
from vit_dist.errors import UserError
from vit_dist.listing import shortened

if TYPE_CHECKING:
    from vit_dist.options import DataOptions

DIGEST_BYTES = 16
_CHUNK = 32  # rows that a worker reads at once
_MOST_LISTED = 10
_LIST_LENGTH = 320  # characters
_LOWEST_USE = 8192  # an eighth of the levels of 16-bit gray


@dataclass(frozen=True)
class BadRow:
    """A row whose image does not decode, and why; `missing` if there is no such file."""

    index: int
    id: str
    reason: str
    missing: bool = False


@dataclass
class Seen:
    """What the images that decode have in common; sides in pixels."""

    images: int = 0
    narrowest: int = 0
    widest: int = 0
    lowest: int = 0
    highest: int = 0
    gray16: int = 0  # 16-bit gray images
    dark16: int = 0  # those of them that use less than an eighth of their levels
    brightest16: int = 0  # the highest level of all 16-bit gray images

    def add(self, other: Seen) -> None:
        """Take the images of another part into account."""
        if not other.images:
            return
        first = not self.images
        self.narrowest = other.narrowest if first else min(self.narrowest, other.narrowest)
        self.lowest = other.lowest if first else min(self.lowest, other.lowest)
        self.widest, self.highest = max(self.widest, other.widest), max(self.highest, other.highest)
        self.brightest16 = max(self.brightest16, other.brightest16)
        self.images += other.images
        self.gray16 += other.gray16
        self.dark16 += other.dark16


@dataclass(frozen=True)
class Verified:
    """The outcome for a split."""

    bad: list[BadRow]  # in order
    digests: np.ndarray  # uint8 (rows, 16) of each image's encoded bytes
    seen: Seen


def verify(
    table: datasets.Dataset,
    rules: DecodeRules,
    *,
    workers: int | None = None,
    cache_dir: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Which rows have images that do not decode under `rules`, and a digest of the encoded bytes of each image.

    Decodes with `workers` threads (default: all cores of this host that the job may use), Pillow's decoders run side by
    side; JPEGs at an eighth of their size, which finds what decoding them whole finds. The outcome is remembered until
    a file, a rule or Pillow changes; other processes that want the same wait for it. `progress(done, total)` is called
    in the process that decodes.
    """
    path = cache_folder(cache_dir) / f"verified-{decoding_key(table, rules)}.sealed"
    outcome = _remembered(path, len(table))
    if outcome is None:
        with locked(path):
            outcome = _remembered(path, len(table))
            if outcome is None:
                outcome = _decode_all(table, rules, workers or job_cores(), progress)
                _remember(path, outcome)
    return outcome


def fraction_to_skip(counts: Sequence[tuple[int, int]]) -> float:
    """The `--max_bad_fraction` with which every split may lose its bad images, rounded up to 1 %.

    `counts`: bad images and all images of each split.
    """
    return max((math.ceil(100 * bad / total) / 100 for bad, total in counts if total), default=0.0)


def apply_policy(
    table: datasets.Dataset, bad: Sequence[BadRow], options: DataOptions, split_name: str, needed: float | None = None
) -> tuple[datasets.Dataset, np.ndarray]:
    """The table without its bad rows, and for each row whether it was kept.

    `needed` is the `max_bad_fraction` that lets all splits pass, for the message; by default that of this split.
    Raises `UserError` listing the rows, unless they may be skipped and are no more than `max_bad_fraction`.
    """
    keep = np.ones(len(table), bool)
    if not bad:
        return table, keep
    needed = fraction_to_skip([(len(bad), len(table))]) if needed is None else needed
    missing = [row for row in bad if row.missing]
    flag = f" --max_bad_fraction {needed:g}" if needed > options.max_bad_fraction else ""
    skip = f", or pass --on_bad_image skip{flag}" if len(bad) < len(table) and needed < 1 else ""
    if missing and options.on_bad_image != "skip":
        raise UserError(
            f"{len(missing):,} of {len(table):,} image files of {split_name} are not there; correct their paths or "
            f"restore them{skip}:",
            _lines(missing),
        )
    kinds = (
        "are missing" if len(missing) == len(bad) else "do not decode or are missing" if missing else "do not decode"
    )
    count = f"{len(bad):,} of {len(table):,} images of {split_name} {kinds}"
    if options.on_bad_image != "skip":
        raise UserError(f"{count}; mend or remove them{skip}:", _lines(bad))
    if len(bad) == len(table):
        raise UserError(f"{count}, so none would be left; mend or restore some of them:", _lines(bad))
    if len(bad) / len(table) > options.max_bad_fraction:
        pass_it = f"; pass --max_bad_fraction {needed:g} to leave them out" if needed < 1 else ""
        raise UserError(
            f"{count} ({len(bad) / len(table):.2%}), too many for --on_bad_image skip with "
            f"--max_bad_fraction {options.max_bad_fraction:g}{pass_it}:",
            _lines(bad),
        )
    keep[[row.index for row in bad]] = False
    return table.select(np.flatnonzero(keep)), keep


def judge_levels(seen: Seen, split_name: str) -> str | None:
    """A note about 16-bit gray images of which little is left in 8 bits; None if there are none.

    Raises `UserError` if most images of the split are such.
    """
    if not seen.dark16:
        return None
    found = f"{seen.dark16:,} of {seen.gray16:,} 16-bit images of {split_name} use less than an eighth of their levels"
    if seen.dark16 < seen.gray16 or 2 * seen.dark16 < seen.images:
        return f"{found}: they are almost black when scaled to 8 bits"
    by = f" (here: multiply by {65535 // seen.brightest16})" if seen.brightest16 else ""
    raise UserError(
        f"{found}, {seen.brightest16:,} of 65,535 at most, and would be almost black when scaled to 8 bits: write them "
        f"anew with levels from 0 to 65,535{by}, or as 8-bit images"
    )


def _lines(bad: Sequence[BadRow]) -> list[str]:
    """A line for each, as many as fit."""
    lines: list[str] = []
    for row in bad[:_MOST_LISTED]:
        line = f"{shortened(row.id)}: {shortened(row.reason, 80)}"
        if lines and sum(len(shown) + 3 for shown in [*lines, line]) > _LIST_LENGTH:
            break
        lines.append(line)
    more = len(bad) - len(lines)
    return lines + ([f"and {more:,} more"] if more > 0 else [])


def decoding_key(table: datasets.Dataset, rules: DecodeRules, *more: int) -> str:
    """Changes with the images (for files: size and change time), the rules, the decoder, and what is given further."""
    times = table_fingerprint(table, with_times=True)
    parts = [times, dataclasses.astuple(rules), RULES_VERSION, PIL.__version__, *more]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _remember(path: Path, outcome: Verified) -> None:
    """A line of JSON, then the digests."""
    bad = [dataclasses.astuple(row) for row in outcome.bad]
    head = json.dumps({"bad": bad, "seen": dataclasses.asdict(outcome.seen)}).encode()
    write_sealed(path, head + b"\n" + outcome.digests.tobytes())


def _remembered(path: Path, num_rows: int) -> Verified | None:
    content = read_sealed(path)
    if content is None:
        return None
    end = len(content) - num_rows * DIGEST_BYTES
    try:
        head: dict[str, Any] = json.loads(bytes(content[:end]))
        digests = np.frombuffer(content, np.uint8, offset=end).reshape(num_rows, DIGEST_BYTES)
        return Verified([BadRow(*row) for row in head["bad"]], digests, Seen(**head["seen"]))
    except (ValueError, TypeError, KeyError):
        return None  # written by another version: it is made again


def _decode_all(
    table: datasets.Dataset, rules: DecodeRules, workers: int, progress: Callable[[int, int], None] | None
) -> Verified:
    rows = table.select_columns(["id", "image"])
    digests = np.zeros((len(table), DIGEST_BYTES), np.uint8)

    def decode_chunk(start: int) -> tuple[list[BadRow], Seen]:
        chunk = rows[start : start + _CHUNK]
        bad, seen = [], Seen()
        for offset, (id, image) in enumerate(zip(chunk["id"], chunk["image"], strict=True)):
            try:
                digest, one = _look(image, rules)
            except BadImage as error:
                bad.append(BadRow(start + offset, id, error.reason, error.missing))
            else:
                digests[start + offset] = np.frombuffer(digest, np.uint8)
                seen.add(one)
        return bad, seen

    outcome = Verified([], digests, Seen())
    starts = range(0, len(table), _CHUNK)
    with ThreadPoolExecutor(workers) as pool:
        for start, (bad, seen) in zip(starts, pool.map(decode_chunk, starts), strict=True):
            outcome.bad.extend(bad)
            outcome.seen.add(seen)
            if progress is not None:
                progress(min(start + _CHUNK, len(table)), len(table))
    return outcome


def _look(image: Mapping[str, Any], rules: DecodeRules) -> tuple[bytes, Seen]:
    """Digest and properties of one image."""
    data = encoded_bytes(image)
    decoded, (width, height) = decode_downscaled(data, rules, lambda width, height: 8)
    level = decoded.info.get(HIGHEST_LEVEL)
    gray16, brightest = level is not None, level or 0
    dark16 = gray16 and brightest < _LOWEST_USE
    digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
    return digest, Seen(1, width, width, height, height, int(gray16), int(dark16), brightest)
