"""Reads tables row by row through a column map: CSV and JSON (also compressed), and Parquet."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.ingest.annotations import MAX_DOCUMENT_BYTES
from tasks.ingest.rows import Row, reading, rows_of
from tasks.records import Inside, UserError

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_MAX_LINE = 1 << 20  # characters; a table without line ends must not fill the memory
_HEAD = 100  # rows of JSON lines that define the columns
_BATCH = 1024  # rows of Parquet in memory at once
_UNDECODED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not in the encoding
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_csv(address: str, columns: dict[str, str], encoding: str | None = None) -> Iterator[Row]:
    """Yields the rows of a CSV with a header line; blank lines are skipped.

    The delimiter is the first of commas, tabs, semicolons and vertical bars that gives a header with all columns. A row
    has one cell per column of the header; further empty cells at its end are ignored. Any other number is
    a bad row, and so is a quote that neither opens nor closes a cell nor is doubled (`\\"`). An unclosed quote
    invalidates its own line and none of the lines after it. A well-formed quoted cell may contain any lines, including
    lines that look like rows. A needed cell with bytes that are not in the encoding is a bad row.

    Args:
        address: of the file, which may be compressed.
        columns: the column of each name; without `key` a row has no key.
        encoding: None is UTF-8, or UTF-16 where the file begins with its byte order mark.
    Raises:
        UserError: a column is missing, or a needed column is there twice.
    """
    with _open_text(address, "a CSV", encoding) as (file, encoding_name):
        lines = _RecordLines(file)
        delimiter = _find_delimiter(lines, columns)
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"table {address} is not a CSV ({error}); give a CSV with a header line") from error
        while header and not header[-1]:
            header.pop()
        _check_columns(address, columns, header)
        places = {name: header.index(column) for name, column in columns.items()}
        complete = _complete_line(delimiter)

        def fits(cells: list[str]) -> bool:
            return len(cells) >= len(header) and not any(cells[len(header) :])

        def is_row(line: str | csv.Error) -> bool:
            if not isinstance(line, str) or not complete.fullmatch(line):
                return False
            try:
                cells = next(csv.reader([line], strict=True, delimiter=delimiter), [])
            except csv.Error:
                return False
            has_link = fits(cells) and re.fullmatch(r"\S*[/.]\S*", cells[places["url"]]) is not None
            return has_link and ("key" not in places or cells[places["key"]] != "")

        while True:
            lines.taken.clear()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                lines.give_back()
                yield str(error)
                continue
            if cells is None:
                return
            if fits(cells):
                values = {name: cells[place] for name, place in places.items()}
                damaged = next((name for name, text in values.items() if _is_undecoded(text)), None)
                yield f"the {damaged} is not {encoding_name}" if damaged is not None else next(rows_of(values))
            elif any(map(is_row, lines.taken[1:])):
                lines.give_back()
                yield "a quote that is not closed before the next row"
            elif cells:
                yield f"{len(cells)} cells, the header has {len(header)}"


def read_jsonl(
    address: str, columns: dict[str, str], captions: str | int = "first", encoding: str | None = None
) -> Iterator[Row]:
    """Yields the rows of a file with one JSON object per line. An object that has a name twice is a bad row.

    Raises:
        UserError: no early row has a needed column.
    """
    with _open_text(address, "a file of JSON lines", encoding) as (file, encoding_name):
        objects = _parse_lines(_Lines(file), encoding_name)
        yield from _rows_of_objects(address, columns, captions, objects)


def read_json(address: str, columns: dict[str, str], captions: str | int = "first") -> Iterator[Row]:
    """Yields the rows of a JSON file that is an array of objects, which is read at once.

    Raises:
        UserError: the file is no array or too large, or no early row has a needed column.
    """
    with _open_text(address, "a JSON array of objects") as (file, _):
        text = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(text) > MAX_DOCUMENT_BYTES:
            raise UserError(f"{address} has more than {MAX_DOCUMENT_BYTES} characters; give a table of JSON lines")
        try:
            document = json.loads(text, object_pairs_hook=_Object)
        except RecursionError as error:
            raise ValueError("JSON that is nested too deep") from error
    if not isinstance(document, list):
        raise UserError(f"{address} is not an array of objects; give a JSON array or a table of JSON lines")
    yield from _rows_of_objects(address, columns, captions, map(_checked, document))


def read_parquet(address: str, columns: dict[str, str], captions: str | int = "first") -> Iterator[Row]:
    """Yields the rows of a Parquet file; reads only the needed columns. Raises UserError as `read_csv` does.

    The URL may be a column of the Hugging Face `datasets` library, with `bytes` and `path`: rows with bytes are read
    from the file itself.
    """
    with _open_parquet(address) as table:
        _check_columns(address, columns, table.schema_arrow.names)
        embedded = pa.types.is_struct(table.schema_arrow.field(columns["url"]).type)
        if embedded:
            yield from _read_embedded(address, columns, captions, table)
            return
        for batch in table.iter_batches(_BATCH, columns=sorted(set(columns.values()))):
            lists = [_values(batch.column(column)) for column in columns.values()]
            for values in zip(*lists, strict=True):
                yield from rows_of(dict(zip(columns, values, strict=True)), captions)


def _read_embedded(address: str, columns: dict[str, str], captions: str | int, table: pq.ParquetFile) -> Iterator[Row]:
    video = columns["url"]
    kind = table.schema_arrow.field(video).type
    fields = {kind.field(place).name for place in range(kind.num_fields)}
    if not {"bytes", "path"} <= fields:
        raise UserError(f"column {video!r} of {address} has no bytes and path; name a column of links or of videos")
    others = [column for name, column in columns.items() if name != "url"]
    for group in range(table.metadata.num_row_groups):
        # Of the bytes only whether they are there: the values may have gigabytes.
        names = [*others, f"{video}.path"]
        columns_read = table.read_row_group(group, columns=names)
        present = _with_bytes(table, group, video)
        paths = columns_read.column(video).to_pylist()
        lists = {n: _values(columns_read.column(c).combine_chunks()) for n, c in columns.items() if n != "url"}
        for place in range(columns_read.num_rows):
            path = (paths[place] or {}).get("path")
            values = {name: column[place] for name, column in lists.items()} | {"url": path}
            inside = Inside(address, place, group, video) if present[place] else None
            yield from rows_of(values, captions, inside)


def _with_bytes(table: pq.ParquetFile, group: int, video: str) -> list[bool]:
    """Returns which rows of a row group contain bytes; reads them unless the statistics say that none or all do."""
    metadata = table.metadata.row_group(group)
    for place in range(metadata.num_columns):
        chunk = metadata.column(place)
        nulls = None if chunk.statistics is None else chunk.statistics.null_count
        if chunk.path_in_schema == f"{video}.bytes" and nulls in (0, metadata.num_rows):
            return [nulls == 0] * metadata.num_rows
    cells = table.read_row_group(group, columns=[f"{video}.bytes"]).column(video).combine_chunks()
    return [bool(cell) for cell in cells.field("bytes").is_valid().to_pylist()]


def read_cell(inside: Inside) -> bytes:
    """Returns the bytes of a video in a Parquet file. Raises OSError or `pyarrow.ArrowException`."""
    assert inside.column is not None
    with fsspec.open(inside.file, "rb") as file:
        table = pq.ParquetFile(file)
        group = table.read_row_group(inside.size, columns=[f"{inside.column}.bytes"])
        return group.column(inside.column).combine_chunks().field("bytes")[inside.offset].as_py()


def count_parquet(address: str) -> int:
    """Returns the number of rows of a Parquet file, from its footer."""
    with _open_parquet(address) as table:
        return table.metadata.num_rows


def parquet_matches(address: str, column: str, pattern: str) -> bool:
    """Returns whether a text of a column, or of the lists in it, may match a pattern; other columns are not read."""
    with _open_parquet(address) as table:
        if column not in table.schema_arrow.names:
            return False  # reading the rows reports it
        for batch in table.iter_batches(1 << 16, columns=[column]):
            values = batch.column(0)
            while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                values = values.flatten()
            if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                return True
            if pc.any(pc.match_substring_regex(values, pattern)).as_py():  # type: ignore[attr-defined]
                return True
    return False


class _Lines:
    """Iterates over the lines of a text file. A line that is too long raises `csv.Error`; the next call continues."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MAX_LINE)
        if not line:
            raise StopIteration
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            while (rest := self._file.readline(_MAX_LINE)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"a line of more than {_MAX_LINE} characters")
        return line


class _RecordLines(_Lines):
    """Iterates over lines and can return to the second line of the current row, to read its lines separately."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file)
        self._again: deque[str | csv.Error] = deque()
        self.taken: list[str | csv.Error] = []

    def __next__(self) -> str:
        try:
            line = self._again.popleft() if self._again else super().__next__()
        except csv.Error as error:
            line = error
        self.taken.append(line)
        if isinstance(line, csv.Error):
            raise line
        return line

    def give_back(self, first: int = 1) -> None:
        """Puts back the taken lines from number `first` on: all except the first one."""
        self._again.extendleft(reversed(self.taken[first:]))


def _find_delimiter(lines: _RecordLines, columns: dict[str, str]) -> str:
    """Returns the delimiter of the header, which is read again afterwards; commas if none gives all columns."""
    try:
        first = next(lines, "")
    except csv.Error:
        first = ""
    lines.give_back(0)
    for delimiter in DELIMITERS:
        try:
            header = next(csv.reader([first], strict=True, delimiter=delimiter), [])
        except csv.Error:
            continue
        if set(columns.values()) <= {name.strip() for name in header}:
            return delimiter
    return max(DELIMITERS, key=first.count)


def _complete_line(delimiter: str) -> re.Pattern[str]:
    """Matches a line in which every quote begins or ends a cell; the rest of a row from an earlier line rarely does."""
    cell = rf'(?:"(?:[^"]|"")*"|[^"{re.escape(delimiter)}]*)'
    return re.compile(rf"{cell}(?:{re.escape(delimiter)}{cell})*[\r\n]*")


def _rows_of_objects(
    address: str, columns: dict[str, str], captions: str | int, objects: Iterable[dict[str, Any] | str]
) -> Iterator[Row]:
    objects = iter(objects)
    head = list(itertools.islice(objects, _HEAD))
    _check_columns(address, columns, list(dict.fromkeys(name for row in head if isinstance(row, dict) for name in row)))
    for row in itertools.chain(head, objects):
        if isinstance(row, str):
            yield row
        else:
            yield from rows_of({name: row.get(column) for name, column in columns.items()}, captions)


def _parse_lines(lines: Iterable[str], encoding_name: str) -> Iterator[dict[str, Any] | str]:
    """Yields an object, or the reason for a failure, for each line that is not blank."""
    iterator = iter(lines)
    while True:
        try:
            line = next(iterator)
            if _is_undecoded(line):
                yield f"not a line of JSON: not {encoding_name}"
                continue
            value = json.loads(line, object_pairs_hook=_object) if line.strip() else None
        except StopIteration:
            return
        except (csv.Error, ValueError, RecursionError) as error:
            yield f"not a line of JSON: {error}"
            continue
        if isinstance(value, dict):
            yield value
        elif line.strip():
            yield f"a line of JSON that is of type {type(value).__name__}, not an object"


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


class _Object(dict[str, Any]):
    """An object of a JSON array; `fault` names a name that it has twice."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.fault = None
        try:
            _object(pairs)
        except ValueError as error:
            self.fault = str(error)


def _checked(value: Any) -> dict[str, Any] | str:
    """Returns an element of a JSON array, or the reason why it is a bad row."""
    if not isinstance(value, _Object):
        return f"an element of type {type(value).__name__}, not an object"
    return value.fault or value


def _is_undecoded(text: str) -> bool:
    return not text.isascii() and _UNDECODED.search(text) is not None


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # invalid UTF-8 in one value must not fail the table
        return column.cast(pa.binary()).to_pylist()


def _check_columns(address: str, columns: dict[str, str], names: list[str]) -> None:
    """Raises UserError for a missing column and for a name that several columns have; a column may have no name."""
    missing = [(name, column) for name, column in columns.items() if column not in names]
    if missing:
        shown = ", ".join(repr(name[:40]) for name in names[:12]) or "none"
        name, column = missing[0]
        keyless = "; without such a column give --columns.key ''" if name == "key" else ""
        raise UserError(
            f"table {address} has no column {column!r} (columns found: {shown}); name its columns in the column map"
            f"{keyless}"
        )
    repeated = [column for column in columns.values() if names.count(column) > 1]
    if repeated:
        raise UserError(
            f"table {address} has the column {repeated[0]!r} {names.count(repeated[0])} times;"
            " rename or remove the others"
        )


@contextmanager
def _open_text(address: str, wanted: str, encoding: str | None = None) -> Iterator[tuple[TextIO, str]]:
    """Yields a text file and the name of its encoding; bytes that are not in the encoding become surrogates."""
    with reading(address, wanted):
        if encoding is None:
            with fsspec.open(address, "rb", compression="infer") as file:
                head = file.read(4)  # type: ignore[attr-defined]
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        with fsspec.open(
            *(address, "rt"), encoding=encoding, errors="surrogateescape", newline="", compression="infer"
        ) as file:
            yield file, encoding.removesuffix("-sig").upper()  # type: ignore[misc]


@contextmanager
def _open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    with reading(address, "a Parquet file"), fsspec.open(address, "rb") as file:
        yield pq.ParquetFile(file)
