"""Text files of rows as Arrow tables: CSV with any usual delimiter and encoding, lists of paths and labels, JSON.

A file without quotation marks, in UTF-8, is parsed by Arrow. Every other file goes through Python's `csv` in blocks:
it reads any encoding, and reports a misplaced quotation mark where Arrow would join rows.
"""

from __future__ import annotations

import base64
import codecs
import csv
import io
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from vit_dist.data.columns import is_image_name, is_label_name
from vit_dist.data.index import IMAGE_EXTENSIONS
from vit_dist.data.split_column import role_of
from vit_dist.errors import UserError
from vit_dist.listing import shortened

_BYTE_ORDER_MARKS = (  # UTF-32 begins like UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS = (",", ";", "\t", "|", " ")  # in this order where several divide all rows alike
_DELIMITER_NAMES = {";": "semicolon", "\t": "tab", "|": "vertical bar", " ": "space"}
_SAMPLE_ROWS = 50
_MOST_COLUMNS = 50  # of a table of images; a longer row of numbers is an image
_SAMPLE_CHARACTERS = 1 << 22
_BLOCK_BYTES = 1 << 24
_BLOCK_ROWS = 4096
_IMAGE_SUFFIX = rf"\.(?:{'|'.join(sorted(IMAGE_EXTENSIONS))})"
_IS_PATH = re.compile(rf"(?is)(?:.*[^\s/\\]{_IMAGE_SUFFIX}|[a-z][a-z0-9+.-]+://.+)")
_PATH_THEN_LABEL = rf"(?i)^\s*(?P<image>.*[^\s/\\]{_IMAGE_SUFFIX})\s+(?P<label>\S.*?)\s*$"
# In cp1252, what Western languages do not write: other symbols, three letters with accents in sequence, quotation marks
# or currencies within a word, and a closing quotation mark where a cell begins.
_NOT_WESTERN = re.compile(
    r"[^\x00-\x7f\u2018\u2019\u201c-\u201e\u2013\u2014\u2026\u20ac\u2122\u00a0-\u00ff"
    r"\u0152\u0153\u0160\u0161\u0178\u017d\u017e]|[\u00a4-\u00a6\u00a8\u00ac\u00af\u00b6\u00b8\u00b9]|[\u00c0-\u00ff]{3}"
    r"|[^\W\d_][\u2018\u201c-\u201e\u00a2-\u00bf][^\W\d_]|[\u00b2\u00b3\u00bf][\u00c0-\u00ff\u0152-\u017e]|[\u0152\u0160\u017d][\u00a1-\u00bf]"
    r"|[\u00b2\u00b3][^\W\d_]|[\r\n,;\t]\u201d"
)
_ACCENTED_WORD = re.compile(r"[^\W\d_]*[^\x00-\x7f][^\W\d_]*")
_WHOLE_NUMBERS = r"^(0|-?[1-9]\d*)$"  # not 007: that is a name, and its zeros matter


@dataclass(frozen=True)
class TextFormat:
    """How a text table is written."""

    encoding: str
    delimiter: str | None  # None: a path, white space, and a label that may hold spaces
    header_lines: int
    names: list[str]  # of the columns
    has_header: bool
    example: str | None = None  # a word of the text that depends on the encoding

    def notes(self, suffix: str) -> list[str]:
        """What is worth telling the user."""
        found = []
        if self.encoding not in ("utf-8", "utf-8-sig"):
            word = f" (reads {self.example}; save the table as UTF-8 if that is garbled)" if self.example else ""
            found.append(f"encoding {self.encoding}{word}")
        expected = {"csv": ",", "tsv": "\t"}.get(suffix)
        if self.delimiter != expected and self.delimiter in _DELIMITER_NAMES:
            found.append(f"delimiter {_DELIMITER_NAMES[self.delimiter]}")
        if not self.has_header:
            found.append("no header: columns " + ", ".join(self.names))
        return found


def read_text(path: Path, num_rows: int | None = None, column_names: Sequence[str] = ()) -> tuple[pa.Table, list[str]]:
    """The rows of a text file and notes on how it is written.

    Args:
        path: The file. `.json` and `.jsonl` hold JSON objects, all others rows with a delimiter.
        num_rows: At most this many rows.
        column_names: Columns that the user named: a first line with one of them is a header.

    Returns:
        A table whose cells are strings, null where empty; of JSON, lists of values as they are (see `json_column`).

    Raises:
        UserError: The file is not a regular file, not in a known encoding, or a row is malformed.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: not a regular file")
    encoding, has_quotes = _examine(path)
    form = _format(path, encoding, column_names)
    if form.delimiter is None:
        return _read_list(path, form, num_rows), form.notes(_suffix(path))
    if num_rows is None and not has_quotes and form.delimiter != " " and encoding in ("utf-8", "utf-8-sig"):
        try:
            table = _read_fast(path, form)
        except pa.ArrowException:  # rows of several widths: the other reader fills them, or names the row
            table = _read_strictly(path, form, None)
    else:
        table = _read_strictly(path, form, num_rows)
    return _without_blank_rows(table), form.notes(_suffix(path))


def whole_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as int64 if every one is a whole number that comes back unchanged, else as they are."""
    if not pc.all(pc.match_substring_regex(column, _WHOLE_NUMBERS)).as_py() and column.null_count < len(column):
        return column
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:  # more than 64 bits
        return column


def _suffix(path: Path) -> str:
    return path.suffix[1:].lower()


def _examine(path: Path) -> tuple[str, bool]:
    """A file's encoding, and whether it has quotation marks. Reads all of it, in blocks."""
    with open(path, "rb") as file:
        start = file.read(4)
        marked = next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), None)
        if marked not in (None, "utf-8-sig"):
            return str(marked), True
        file.seek(0)
        decoder, is_utf8, has_quotes, num_lines = codecs.getincrementaldecoder("utf-8")(), True, False, 0
        while block := file.read(_BLOCK_BYTES):
            if (position := block.find(b"\0")) >= 0:
                raise UserError(
                    f"{path}: line {num_lines + block.count(10, 0, position) + 1} has a NUL byte: the file is damaged, "
                    "or UTF-16 without a byte order mark; save it as CSV UTF-8"
                )
            num_lines += block.count(b"\n")
            has_quotes = has_quotes or b'"' in block
            if is_utf8:
                try:
                    decoder.decode(block)
                except UnicodeDecodeError:
                    is_utf8 = False
        if is_utf8:
            try:
                decoder.decode(b"", final=True)
                return marked or "utf-8", has_quotes
            except UnicodeDecodeError:
                pass
    return "cp1252", has_quotes  # what spreadsheets on Windows write


def _format(path: Path, encoding: str, column_names: Sequence[str]) -> TextFormat:
    try:
        with open(path, encoding=encoding, newline="") as file:
            text = file.read(_SAMPLE_CHARACTERS)
            is_whole = not file.read(1)
    except UnicodeDecodeError as error:
        raise _encoding_error(path) from error
    if encoding == "cp1252" and (strange := _NOT_WESTERN.search(text)):
        raise UserError(
            f"{path}: the text is not UTF-8, and read as cp1252 it has {strange[0]!a}, so it is in another encoding: "
            "save it as CSV UTF-8"
        )
    accented = _ACCENTED_WORD.search(text) if encoding == "cp1252" else None
    example = shortened(accented[0], 30) if accented else None
    skipped, separator = 0, re.match(r"sep=(.)\r?\n", text)  # Excel's own hint
    if separator:
        skipped, text = 1, text[separator.end() :]
    while _suffix(path) == "txt" and text.startswith("#"):
        skipped, text = skipped + 1, text.partition("\n")[2]
    delimiters = [separator[1]] if separator else list(_DELIMITERS)
    if _suffix(path) in ("tsv", "txt"):
        delimiters.sort(key=lambda delimiter: delimiter != "\t")
    samples = {delimiter: _sample(text, delimiter, is_whole) for delimiter in delimiters}
    delimiter = _delimiter(samples, text, path, column_names)
    if delimiter is None:
        return TextFormat(encoding, None, skipped, ["image", "label"], False, example)
    sample = samples[delimiter]
    if not sample.rows:
        raise UserError(f"{path}: no rows")
    if names := _names_without_header(sample.rows, path, column_names):
        return TextFormat(encoding, delimiter, skipped, names, False, example)
    return TextFormat(encoding, delimiter, skipped + sample.header_lines, _header(sample.rows[0], path), True, example)


def _encoding_error(path: Path) -> UserError:
    return UserError(f"{path}: the text is in no known encoding (UTF-8, UTF-16, cp1252): save it as CSV UTF-8")


@dataclass(frozen=True)
class _Sample:
    rows: list[list[str]]
    header_lines: int

    def is_even(self) -> bool:
        """Whether all rows have the same number of fields, at least two."""
        return len(self.rows[0]) > 1 and len({len(row) for row in self.rows}) == 1 if self.rows else False

    def has_known_header(self, column_names: Sequence[str]) -> bool:
        return bool(self.rows) and len(self.rows[0]) > 1 and _known(self.rows[0], column_names)


def _sample(text: str, delimiter: str, is_whole: bool) -> _Sample:
    """The first rows, without blank ones and without one that the sample cuts off."""
    reader = _reader(io.StringIO(text, newline=""), delimiter, strict=False)
    rows: list[list[str]] = []
    header_lines = 0
    for row in reader:
        if not any(field.strip() for field in row):
            continue
        rows.append(row)
        if len(rows) == 1:
            header_lines = reader.line_num
        if len(rows) == _SAMPLE_ROWS:
            return _Sample(rows, header_lines)
    return _Sample(rows if is_whole or len(rows) < 2 else rows[:-1], header_lines)


def _reader(lines: Iterable[str], delimiter: str, strict: bool) -> Any:
    csv.field_size_limit(1 << 30)
    if delimiter == " ":
        lines = (line.strip() + "\n" for line in lines)
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter == " ", strict=strict)


def _known(row: Sequence[str], column_names: Sequence[str]) -> bool:
    return any(field.strip() in column_names or _is_usual_name(field) for field in row)


def _is_usual_name(field: str) -> bool:
    field = field.strip()
    return not _is_path(field) and (is_image_name(field) or is_label_name(field))


def _delimiter(samples: dict[str, _Sample], text: str, path: Path, column_names: Sequence[str]) -> str | None:
    """The delimiter of a file; None for a list of paths that are each followed by white space and a label."""
    even = [delimiter for delimiter, sample in samples.items() if sample.is_even()]
    for delimiter in [*even, *(each for each in samples if each != " ")]:
        if samples[delimiter].has_known_header(column_names):
            return delimiter
    for delimiter in even:
        if delimiter != " " and sum(map(_is_path, samples[delimiter].rows[0])) == 1:
            return delimiter
    if " " in even and _has_plain_columns(samples[" "].rows):
        return " "
    lines = pa.array([line for line in text.splitlines() if line.strip()][:_SAMPLE_ROWS], pa.string())
    if len(lines) and " " in samples and pc.extract_regex(lines, _PATH_THEN_LABEL).null_count == 0:
        return None
    usual = "\t" if _suffix(path) == "tsv" else ","
    return even[0] if even else usual if usual in samples else next(iter(samples))


def _has_plain_columns(rows: list[list[str]]) -> bool:
    """Whether some column beyond the second holds numbers or splits: then labels are single words."""
    further = list(zip(*rows, strict=True))[2:]
    return any(all(field.isdigit() or role_of(field) for field in column) for column in further)


def _is_path(field: str) -> bool:
    return _IS_PATH.fullmatch(field.strip()) is not None


def _names_without_header(rows: list[list[str]], path: Path, column_names: Sequence[str]) -> list[str] | None:
    """Names for the columns if the first row is a path to an image and a label; None if it is a header.

    Raises `UserError` if it may be either, or if the columns cannot be told apart.
    """
    first = [field.strip() for field in rows[0]]
    paths = [position for position, field in enumerate(first) if _is_path(field)]
    advice = "add a first line with the names of the columns, such as image,label"
    if not paths or any(field in column_names for field in first):
        return None
    if len(first) == 1:
        raise UserError(f"{path}: paths without labels: write a label behind each path, or use class folders")
    repeated = {field.strip() for row in rows[1:] for field in row}
    if not all(field in repeated for field in first if _is_usual_name(field)):
        raise UserError(f"{path}: the first line may be a header or a row ({_quoted(','.join(first))}): {advice}")
    others = [position for position in range(len(first)) if position not in paths]
    width = len(first)
    splits = [position for position in others if all(len(row) == width and role_of(row[position]) for row in rows)]
    labels = [position for position in others if position not in splits]
    if len(paths) != 1 or len(labels) != 1 or len(splits) > 1:
        raise UserError(f"{path}: no header, and {width} columns in line 1 ({_quoted(','.join(first))}): {advice}")
    names = {paths[0]: "image", labels[0]: "label", **dict.fromkeys(splits, "split")}
    return [names[position] for position in range(width)]


def _quoted(text: str, longest: int = 80) -> str:
    return ascii(text if len(text) <= longest else text[:longest] + "...")[1:-1]


def _header(row: Sequence[str], path: Path) -> list[str]:
    names = [field.strip() or f"column {position}" for position, field in enumerate(row, 1)]
    advice = "add a first line with the names of the columns, such as image,label"
    if all(re.fullmatch(r"-?[\d.]+", name) for name in names):
        pixels = ", and pixel values are not read" if len(names) > _MOST_COLUMNS else ""
        raise UserError(f"{path}: the first line holds numbers instead of names of columns: {advice}{pixels}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two columns are called {_quoted(name)}: rename one, or {advice}")
    return names


def _read_fast(path: Path, form: TextFormat) -> pa.Table:
    assert form.delimiter is not None
    return pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(skip_rows=form.header_lines, column_names=form.names, block_size=_BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(delimiter=form.delimiter, quote_char=False),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(form.names, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )


def _read_strictly(path: Path, form: TextFormat, num_rows: int | None) -> pa.Table:
    assert form.delimiter is not None
    schema = pa.schema([(name, pa.string()) for name in form.names])
    blocks = []
    with open(path, encoding=form.encoding, newline="") as file:
        reader = _reader(itertools.islice(file, form.header_lines, None), form.delimiter, strict=True)
        for rows in _blocks(reader, path, form, num_rows):
            columns = [pa.array([field or None for field in column], pa.string()) for column in zip(*rows, strict=True)]
            blocks.append(pa.Table.from_arrays(columns, schema=schema))
    return pa.concat_tables(blocks) if blocks else schema.empty_table()


def _blocks(reader: Any, path: Path, form: TextFormat, num_rows: int | None) -> Iterator[list[list[str]]]:
    """Rows of the table's width, a block at a time."""
    width, first = len(form.names), 1
    while True:
        wanted = _BLOCK_ROWS if num_rows is None else min(_BLOCK_ROWS, num_rows - first + 1)
        try:
            rows = list(itertools.islice(reader, wanted))
        except csv.Error as error:
            line = reader.line_num + form.header_lines
            raise UserError(f"{path}: line {line}: a quotation mark is out of place ({error})") from error
        except UnicodeDecodeError as error:
            raise _encoding_error(path) from error
        if not rows:
            return
        if set(map(len, rows)) != {width}:
            rows = [_fitted(row, width, number, path) for number, row in enumerate(rows, first) if row]
        first += len(rows)
        if rows:
            yield rows


def _fitted(row: list[str], width: int, number: int, path: Path) -> list[str]:
    """A row with empty fields added at its end, or removed."""
    if any(field.strip() for field in row[width:]):
        raise UserError(f"{path}: row {number} has {len(row)} fields, but the header has {width}")
    return row[:width] + [""] * (width - len(row))


def _without_blank_rows(table: pa.Table) -> pa.Table:
    """The table without rows that have no value at all, which spreadsheets leave at the end."""
    if any(column.null_count == 0 for column in table.columns):
        return table
    filled = pc.is_valid(table.column(0))
    for column in table.columns[1:]:
        filled = pc.or_(filled, pc.is_valid(column))
    return table.filter(filled)


def _read_list(path: Path, form: TextFormat, num_rows: int | None) -> pa.Table:
    with open(path, encoding=form.encoding) as file:
        rest = (line.rstrip("\n") for line in itertools.islice(file, form.header_lines, None) if line.strip())
        lines = pa.array(list(itertools.islice(rest, num_rows)), pa.string())
    rows = pc.extract_regex(lines, _PATH_THEN_LABEL)
    if rows.null_count:
        number = pc.index(pc.is_null(rows), True).as_py()
        raise UserError(f"{path}: row {number + 1} is not a path and a label: {_quoted(lines[number].as_py())}")
    return pa.table({name: pc.struct_field(rows, name) for name in form.names})


# JSON


def json_records(path: Path, num_rows: int | None) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line, or with one list of them; at most `num_rows`.

    Raises `UserError` or `ValueError` for anything else.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: not a regular file")
    encoding = "utf-8-sig"
    with open(path, "rb") as raw:
        start = raw.read(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), encoding)
    try:
        with open(path, encoding=encoding) as file:
            is_list = file.read(64).lstrip().startswith("[")
            file.seek(0)
            records = json.load(file)[:num_rows] if is_list else _json_lines(file, num_rows)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("not JSON objects, one a line, nor a list of them")
    if len(records) == 1 and len(records[0]) > 1 and all(map(_is_path, records[0])):
        raise ValueError(
            'one object of paths and labels: write a list of objects such as {"image": PATH, "label": NAME}'
        )
    return records


def _json_lines(file: Iterable[str], num_rows: int | None) -> list[Any]:
    records: list[Any] = []
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not a JSON object: {error.msg}") from None
            if len(records) == num_rows:
                break
    return records


def json_column(values: list[Any]) -> pa.Array:
    """A column of JSON values. Scalars of several types become strings; so does what Arrow has no type for."""
    if any(isinstance(value, dict) and ("bytes" in value or "path" in value) for value in values):
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        return pa.array([_json_image(value) for value in values], image)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # several types, or more than 64 bits
        texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        return pa.array(texts, pa.string())


def _json_image(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None if value is None else {"bytes": None, "path": str(value)}
    data = value.get("bytes")
    return {"bytes": None if data is None else base64.b64decode(data, validate=True), "path": value.get("path")}
