"""Reads tables row by row through a column map: CSV and JSON lines (also compressed), and Parquet."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.ingest.rows import NAMES, Row, reading, text_cells
from tasks.records import UserError

_MAX_LINE = 1 << 20  # characters; a table without line ends must not fill the memory
_HEAD = 100  # rows of JSON lines that define the columns
_BATCH = 1024  # rows of Parquet in memory at once
# A line in which every quote begins or ends a cell; the rest of a row from an earlier line rarely matches.
_COMPLETE_LINE = re.compile(r'(?:"(?:[^"]|"")*"|[^",]*)(?:,(?:"(?:[^"]|"")*"|[^",]*))*[\r\n]*')


def read_csv(address: str, columns: dict[str, str]) -> Iterator[Row]:
    """Yields the rows of a CSV with a header line; blank lines are skipped.

    A row has one cell per column of the header; further empty cells at its end are ignored. Any other number is
    a bad row, and so is a quote that neither opens nor closes a cell nor is doubled (`\\"`). An unclosed quote
    invalidates its own line and none of the lines after it. A well-formed quoted cell may contain any lines, including
    lines that look like rows.

    Raises:
        UserError: a column is missing, or a needed column is there twice.
    """
    with _open_text(address, "a CSV") as file:
        lines = _RecordLines(file)
        reader = csv.reader(lines, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"table {address} is not a CSV ({error}); give a CSV with a header line") from error
        while header and not header[-1]:
            header.pop()
        _check_columns(address, columns, header)
        key, url, caption = (header.index(columns[name]) for name in NAMES)

        def fits(cells: list[str]) -> bool:
            return len(cells) >= len(header) and not any(cells[len(header) :])

        def is_row(line: str | csv.Error) -> bool:
            if not isinstance(line, str) or not _COMPLETE_LINE.fullmatch(line):
                return False
            try:
                cells = next(csv.reader([line], strict=True), [])
            except csv.Error:
                return False
            has_link = fits(cells) and re.fullmatch(r"\S*[/.]\S*", cells[url]) is not None
            return has_link and cells[key] != ""

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
                yield cells[key], cells[url], cells[caption]
            elif any(map(is_row, lines.taken[1:])):
                lines.give_back()
                yield "a quote that is not closed before the next row"
            elif cells:
                yield f"{len(cells)} cells, the header has {len(header)}"


def read_jsonl(address: str, columns: dict[str, str]) -> Iterator[Row]:
    """Yields the rows of a file with one JSON object per line. An object that has a name twice is a bad row.

    Raises:
        UserError: no early row has a needed column.
    """
    with _open_text(address, "a file of JSON lines") as file:
        objects = _parse_lines(_Lines(file))
        head = list(itertools.islice(objects, _HEAD))
        _check_columns(
            address, columns, list(dict.fromkeys(name for row in head if isinstance(row, dict) for name in row))
        )
        names = [columns[name] for name in NAMES]
        for row in itertools.chain(head, objects):
            yield row if isinstance(row, str) else text_cells([row.get(name) for name in names])


def read_parquet(address: str, columns: dict[str, str]) -> Iterator[Row]:
    """Yields the rows of a Parquet file; reads only the needed columns. Raises UserError as `read_csv` does."""
    names = [columns[name] for name in NAMES]
    with _open_parquet(address) as table:
        _check_columns(address, columns, table.schema_arrow.names)
        for batch in table.iter_batches(_BATCH, columns=sorted(set(names))):
            yield from map(text_cells, zip(*(_values(batch.column(name)) for name in names), strict=True))


def count_parquet(address: str) -> int:
    """Returns the number of rows of a Parquet file, from its footer."""
    with _open_parquet(address) as table:
        return table.metadata.num_rows


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

    def give_back(self) -> None:
        """Puts back all taken lines except the first."""
        self._again.extendleft(reversed(self.taken[1:]))


def _parse_lines(lines: Iterable[str]) -> Iterator[dict[str, Any] | str]:
    """Yields an object, or the reason for a failure, for each line that is not blank."""
    iterator = iter(lines)
    while True:
        try:
            line = next(iterator)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # invalid UTF-8 in one value must not fail the table
        return column.cast(pa.binary()).to_pylist()


def _check_columns(address: str, columns: dict[str, str], names: list[str]) -> None:
    """Raises UserError for a missing column and for a name that several columns have; a column may have no name."""
    missing = [column for column in columns.values() if column not in names]
    if missing:
        shown = ", ".join(repr(name[:40]) for name in names[:12]) or "none"
        raise UserError(
            f"table {address} has no column {missing[0]!r} (columns found: {shown}); name its columns in the column map"
        )
    repeated = [column for column in columns.values() if names.count(column) > 1]
    if repeated:
        raise UserError(
            f"table {address} has the column {repeated[0]!r} {names.count(repeated[0])} times;"
            " rename or remove the others"
        )


@contextmanager
def _open_text(address: str, wanted: str) -> Iterator[TextIO]:
    with (
        reading(address, wanted),
        fsspec.open(address, "rt", encoding="utf-8-sig", errors="replace", newline="", compression="infer") as file,
    ):
        yield file  # type: ignore[misc]


@contextmanager
def _open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    with reading(address, "a Parquet file"), fsspec.open(address, "rb") as file:
        yield pq.ParquetFile(file)
