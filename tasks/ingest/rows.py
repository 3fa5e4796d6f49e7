"""Shared by the readers of all formats: rows as written, clean keys, the set of keys, and errors of a source."""

from __future__ import annotations

import hashlib
import lzma
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from infra import storage
from tasks.records import UserError

NAMES = ("key", "url", "caption")
# A row as written in its source: key, URL and caption, each possibly empty; or the reason why it cannot be read.
Row = tuple[str, str, str] | str
MAX_KEY = 80


def clean_key(text: str) -> str:
    """Returns a key of 1 to 80 characters of `[A-Za-z0-9_-]`; a changed key gets a short hash to stay distinct."""
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}", text):
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', text)[: MAX_KEY - 9]}-{mark}"


def text_cells(values: Sequence[Any]) -> Row:
    """Returns key, URL and caption from typed values: text and integers as text, None as empty; else a reason."""
    texts = []
    for name, value in zip(NAMES, values, strict=True):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            return f"the {name} is of type {type(value).__name__}, not text"
        # Lone surrogates are valid in JSON and in file names but cannot be encoded as UTF-8.
        texts.append("" if value is None else str(value).encode("utf-8", "replace").decode())
    return texts[0], texts[1], texts[2]


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
    except (OSError, EOFError, ImportError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"table {address} cannot be read ({reason}); give the address of {wanted}") from error
