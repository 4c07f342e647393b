"""Reads the transaction log (`run-<id>.wandb`) that wandb leaves on disk, to see what would reach the server.

The file is a LevelDB log: 32 KiB blocks of chunks, each with a checksum, a length and a kind (a whole record, or
its first, a middle or its last part). Records are `wandb_internal.Record` messages.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FILE_HEADER = struct.Struct("<4sHB")  # identity, magic number, version
CHUNK_HEADER = struct.Struct("<IHB")  # CRC-32 of kind and data, length of data, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class LoggedRun:
    """What one attempt logged. `axes` maps a metric name, or a pattern of them, to its step metric."""

    run_id: str = ""
    name: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None

    def series(self, key: str) -> list[tuple[int, Any]]:
        """(step, value) of every row that has `key`."""
        return [(row["train/global_step"], row[key]) for row in self.rows if key in row]


def read_run(path: Path) -> LoggedRun:
    from wandb.proto import wandb_internal_pb2

    run = LoggedRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.run_id, run.name = record.run.run_id, record.run.display_name
                run.project = record.run.project
                run.config |= _items(record.run.config.update)
            case "config":
                run.config |= _items(record.config.update)
            case "history":
                run.rows.append(_items(record.history.item))
            case "summary":
                run.summary |= _items(record.summary.update)
            case "metric":
                run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    identity, magic, _ = FILE_HEADER.unpack_from(data)
    assert (identity, magic) == (b":W&B", 0xBEE1), "not a wandb log"
    position, parts = FILE_HEADER.size, b""
    while position + CHUNK_HEADER.size <= len(data):
        if BLOCK - position % BLOCK < CHUNK_HEADER.size:  # the rest of a block that fits no header is padding
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        chunk = data[position : position + length]
        position += length
        if not kind or len(chunk) < length:  # preallocated, or cut short
            return
        assert zlib.crc32(bytes([kind]) + chunk) == checksum, f"damaged before byte {position}"
        parts = chunk if kind in (WHOLE, FIRST) else parts + chunk
        if kind in (WHOLE, LAST):
            yield parts
