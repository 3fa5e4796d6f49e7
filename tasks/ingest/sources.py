"""Reads source tables: WebVid-style CSVs, or any other CSV through a column map, one streamed row at a time."""

from __future__ import annotations

import csv
import hashlib
import itertools
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO
from urllib.parse import urljoin

import fsspec

from infra import storage
from tasks.records import ClipRef, Failure, UserError

# The 2M and the 10M tables of WebVid order their columns differently, so columns go by name.
WEBVID_COLUMNS = {"key": "videoid", "url": "contentUrl", "caption": "name"}
MAX_KEY = 80
MAX_CAPTION = 4000


@dataclass(frozen=True)
class SourceSpec:
    """A table of captioned videos.

    Relative URLs resolve against `base_url` where given, else against the table's own folder. `base_url` says where the
    same files are found today (a mirror, a loopback port); it is no part of what the data set is.
    """

    table: str  # address of a CSV (also .gz) with a header line
    columns: dict[str, str] = field(default_factory=lambda: dict(WEBVID_COLUMNS))
    limit: int | None = None  # the first rows only
    base_url: str | None = None


def read_rows(spec: SourceSpec, start: int = 0, stop: int | None = None) -> Iterator[ClipRef | Failure]:
    """Rows start (inclusive) to stop (exclusive) of the table: one record each, either usable or with its reason.

    Reasons: `bad_row` (no key, URL or caption, or unreadable) and `duplicate_key` (the key was seen in an earlier row).
    The table is read from its head, so that rows and duplicates are the same whatever the range.

    Raises:
        UserError: the table is missing or unreadable, or lacks a column.
    """
    if spec.limit is not None:
        stop = spec.limit if stop is None else min(stop, spec.limit)
    seen: set[int] = set()  # 64 bits a key: ten million rows take under a gigabyte on the driver
    with _open_table(spec) as file:
        reader = csv.reader(file)
        places = _find_columns(spec, reader)
        for row in itertools.count():
            if stop is not None and row >= stop:
                return
            try:
                cells = _next_cells(reader)
            except csv.Error as error:
                record: ClipRef | Failure = Failure(f"row-{row}", row, "bad_row", str(error))
            else:
                if cells is None:
                    return
                record = _parse_row(cells, places, row, seen)
            if row >= start:
                yield record


def count_rows(spec: SourceSpec) -> int:
    """How many rows `read_rows` gives, bad ones included."""
    with _open_table(spec) as file:
        reader = csv.reader(file)
        _find_columns(spec, reader)
        rows = 0
        while spec.limit is None or rows < spec.limit:
            try:
                if _next_cells(reader) is None:
                    break
            except csv.Error:
                pass
            rows += 1
    return rows


def source_digest(spec: SourceSpec) -> str:
    """sha256 of the table's bytes: what the rows are, wherever the table lies."""
    hasher = hashlib.sha256()
    with _reading(spec), fsspec.open(spec.table, "rb") as file:
        while piece := file.read(1 << 20):  # type: ignore[attr-defined]
            hasher.update(piece)
    return hasher.hexdigest()


def resolve_url(spec: SourceSpec, url: str) -> str:
    """The address of a row's video: a URL with its scheme as it is, a relative one against `base_url` or the table."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
        return url
    if spec.base_url is not None:
        return urljoin(spec.base_url.rstrip("/") + "/", url)
    if spec.table.startswith(("http://", "https://")):
        return urljoin(spec.table, url)
    if url.startswith("/"):
        return url  # an absolute path; the download refuses what lies outside the table's folder
    return storage.join(storage.parent(storage.absolute(spec.table)), posixpath.normpath(url))


def local_root(spec: SourceSpec) -> str | None:
    """The folder whose files rows may name: the table's own, unless the table or its files come over HTTP."""
    if spec.base_url is not None or spec.table.startswith(("http://", "https://")):
        return None
    return storage.parent(storage.absolute(spec.table))


def clean_key(text: str) -> str:
    """A key for files and tar members: 1 to 80 of `[A-Za-z0-9_-]`; an altered one gets a short hash, to be distinct."""
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}", text):
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', text)[: MAX_KEY - 9]}-{mark}"


def _parse_row(cells: list[str], places: dict[str, int], row: int, seen: set[int]) -> ClipRef | Failure:
    values = {name: cells[place].strip() if place < len(cells) else "" for name, place in places.items()}
    key = clean_key(values["key"]) if values["key"] else f"row-{row}"
    empty = [name for name in ("key", "url", "caption") if not values[name]]
    if empty:
        return Failure(key, row, "bad_row", f"no {' and no '.join(empty)}")
    if len(values["caption"]) > MAX_CAPTION:
        return Failure(key, row, "bad_row", f"a caption of {len(values['caption'])} characters, at most {MAX_CAPTION}")
    mark = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    if mark in seen:
        return Failure(key, row, "duplicate_key", "an earlier row has this key")
    seen.add(mark)
    return ClipRef(key, values["url"], values["caption"], row)


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    """Cells of the next row that is not blank, or None at the end."""
    for cells in reader:
        if cells:
            return cells
    return None


def _find_columns(spec: SourceSpec, reader: Iterator[list[str]]) -> dict[str, int]:
    needed = WEBVID_COLUMNS | spec.columns
    unknown = sorted(set(spec.columns) - set(WEBVID_COLUMNS))
    if unknown:
        raise UserError(f"the column map names {unknown[0]!r}; it may name {', '.join(WEBVID_COLUMNS)}")
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise UserError(f"table {spec.table} is not a CSV ({error}); give a CSV with a header line") from error
    found = [name.strip() for name in header]
    missing = [name for name in needed.values() if name not in found]
    if missing:
        shown = ", ".join(repr(name[:40]) for name in found[:12]) or "none"
        raise UserError(
            f"table {spec.table} has no column {missing[0]!r} (columns found: {shown});"
            " name its columns in the column map"
        )
    return {name: found.index(column) for name, column in needed.items()}


@contextmanager
def _open_table(spec: SourceSpec) -> Iterator[TextIO]:
    with (
        _reading(spec),
        fsspec.open(spec.table, "rt", encoding="utf-8-sig", errors="replace", newline="", compression="infer") as file,
    ):
        yield file  # type: ignore[misc]


@contextmanager
def _reading(spec: SourceSpec) -> Iterator[None]:
    """Turns what a store says about an unreadable table into one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no table at {spec.table}; give the address of a CSV") from error
    except IsADirectoryError as error:
        raise UserError(f"{spec.table} is a folder; give the address of a CSV in it") from error
    except UserError:
        raise
    except (OSError, EOFError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"table {spec.table} cannot be read ({reason}); give the address of a CSV") from error
