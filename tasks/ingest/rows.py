"""Shared by the readers of all formats: rows as written, clean keys, captions, spans, and errors of a source."""

from __future__ import annotations

import hashlib
import lzma
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from infra import storage
from tasks.records import Inside, UserError

NAMES = ("key", "url", "caption")
SPAN_NAMES = ("start", "end")
MAX_KEY = 80
MAX_SPAN_SECONDS = 3600.0  # a longer one is no clip; its table probably counts milliseconds or frames

_STAMP = re.compile(r"(?:(?:(\d{1,4}):)?(\d{1,4}):)?(\d{1,7}(?:[.,]\d*)?)", re.ASCII)


class Cells(NamedTuple):
    """A row as written in its source, each text possibly empty."""

    key: str
    url: str
    caption: str
    start: str = ""
    end: str = ""
    inside: Inside | None = None
    size_bytes: int | None = None


# A row as written, or the reason why it cannot be read.
Row = Cells | str


def clean_key(text: str, longest: int = MAX_KEY) -> str:
    """Returns a key of 1 to 80 characters of `[A-Za-z0-9_-]`; a changed key gets a short hash to stay distinct."""
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{longest}}}", text):
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', text)[: longest - 9]}-{mark}"


def rows_of(values: Mapping[str, Any], captions: str | int = "first", inside: Inside | None = None) -> Iterator[Row]:
    """Yields the rows of typed values by name: one, or with several captions and `captions` "all" one for each.

    Text and integers become text, None and NaN empty. A key may be a float without a fraction, a stamp any float, a
    caption a list. Any other value is the reason of a bad row.
    """
    caption = values.get("caption")
    if not isinstance(caption, list | tuple):
        yield _cells(values, inside)
        return
    for suffix, chosen in choose_captions(str(values.get("key")), list(caption), captions):
        row = _cells({**values, "caption": chosen}, inside)
        yield row._replace(key=row.key + suffix) if suffix and isinstance(row, Cells) and row.key else row


def choose_captions(name: str, captions: list[Any], choice: str | int) -> Iterator[tuple[str, Any]]:
    """Yields the chosen captions of a clip, each with the suffix of its key: the first, all, or one that a seed draws.

    Raises:
        UserError: an unknown choice.
    """
    if choice not in ("first", "all") and not isinstance(choice, int):
        raise UserError(f"captions {choice!r}, expected 'first', 'all' or the number of a seed")
    if choice == "all" and captions:
        yield from ((f"-{number:02d}", caption) for number, caption in enumerate(captions))
        return
    mark = 0 if isinstance(choice, str) else int(hashlib.sha256(f"{choice}\0{name}".encode()).hexdigest(), 16)
    yield "", captions[mark % len(captions)] if captions else None


def read_span(start: str, end: str) -> tuple[float, float | None] | None:
    """Returns the span of a row in seconds, from seconds or `[HH:]MM:SS[.mmm]`; None if both cells are empty.

    Stamps are rounded to milliseconds. Without a start it is 0, without an end the end of the video.

    Raises:
        ValueError: a stamp cannot be read, the end is not after the start, or the span is too long.
    """
    if not start and not end:
        return None
    first = 0.0 if not start else _seconds("start", start)
    if not end:
        return first, None
    last = _seconds("end", end)
    if last <= first:
        raise ValueError(f"the span ends at {end}, which is not after its start {start or 0}")
    if last - first > MAX_SPAN_SECONDS:
        raise ValueError(
            f"a span of {last - first:g} s, expected at most {MAX_SPAN_SECONDS:g}; stamps are seconds or HH:MM:SS.mmm"
        )
    return first, last


def _seconds(name: str, text: str) -> float:
    match = _STAMP.fullmatch(text)
    if match is None or (match[2] is not None and float(match[3].replace(",", ".")) >= 60):
        raise ValueError(f"the {name} {text[:40]!r} is neither seconds nor HH:MM:SS.mmm")
    return round(3600 * int(match[1] or 0) + 60 * int(match[2] or 0) + float(match[3].replace(",", ".")), 3)


def _cells(values: Mapping[str, Any], inside: Inside | None) -> Row:
    texts: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                return f"the {name} is not UTF-8"
        if isinstance(value, float):
            if value != value:
                value = None
            elif name == "key" and value.is_integer() and abs(value) < 2**53:  # pandas, where some keys are missing
                value = int(value)
            elif name in SPAN_NAMES:
                value = f"{value:.6f}"
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            return f"the {name} is of type {type(value).__name__}, not text"
        # Lone surrogates are valid in JSON and in file names but cannot be encoded as UTF-8.
        texts[name] = "" if value is None else str(value).encode("utf-8", "replace").decode()
    key, url, caption, start, end = (texts.get(name, "") for name in (*NAMES, *SPAN_NAMES))
    return Cells(key, url, caption, start, end, inside)


class KeysSeen:
    """A set of keys in 12 to 24 bytes each, where a Python set takes about 100: ten million take 134 MB.

    Keys are compared by 64 bits of blake2b. The probability of any collision among ten million is 3 in a million.
    """

    def __init__(self) -> None:
        self._marks = array("Q", [0]) * 1024  # open addressing: a power of two of slots, 0 marks a free one
        self._count = 0

    def add(self, key: str) -> bool:
        """Adds a key. Returns whether it is new."""
        if 3 * self._count > 2 * len(self._marks):
            marks, self._marks = self._marks, array("Q", [0]) * (2 * len(self._marks))
            for mark in marks:
                if mark:
                    self._marks[self._slot(mark)] = mark
        mark = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") or 1
        slot = self._slot(mark)
        if self._marks[slot]:
            return False
        self._marks[slot] = mark
        self._count += 1
        return True

    def _slot(self, mark: int) -> int:
        """Returns the slot of a mark: the one that contains it, or the free one where it belongs."""
        marks, last = self._marks, len(self._marks) - 1
        slot = mark & last
        while (stored := marks[slot]) and stored != mark:
            slot = (slot + 1) & last
        return slot


@contextmanager
def reading(address: str, wanted: str = "a table") -> Iterator[None]:
    """Converts the errors of a store or a parser into a UserError about an unreadable source."""
    try:
        with storage.boundary(address):
            yield
    except FileNotFoundError as error:
        raise UserError(f"no table at {address}; give the address of {wanted}") from error
    except IsADirectoryError as error:
        raise UserError(f"{address} is a folder; give the address of {wanted} in it") from error
    except UserError:
        raise
    except (
        *(OSError, EOFError, ImportError, ValueError, NotImplementedError),
        *(zlib.error, lzma.LZMAError, zipfile.BadZipFile),
    ) as error:
        text = getattr(error, "strerror", None) or str(error)
        reason = text.splitlines()[0] if text else type(error).__name__
        remedy = f"give the address of {wanted}"
        if storage.local_path(address) is None and isinstance(error, PermissionError):
            remedy = "give credentials that may read it"
        elif storage.local_path(address) is None and getattr(error, "errno", None) is not None:
            remedy = "the store did not serve it; try again later"
        raise UserError(f"table {address} cannot be read ({reason}); {remedy}") from error
