"""What the readers of all formats share: a row as it is written, clean keys, the keys seen, the split of a key."""

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
# A row as its source has it: key, URL and caption, each maybe empty; or why it cannot be read.
Row = tuple[str, str, str] | str
MAX_KEY = 80
SPLITS = ("train", "validation", "test")
SPLIT_RULE = "h = the first 8 bytes of sha256(key) / 2^64; h < held_out: validation; h < 2 held_out: test; else train"


def clean_key(text: str) -> str:
    """A key for files and tar members: 1 to 80 of `[A-Za-z0-9_-]`; an altered one gets a short hash, to be distinct."""
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_KEY}}}", text):
        return text
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', text)[: MAX_KEY - 9]}-{mark}"


def split_of(key: str, held_out: float) -> str:
    """The split that a key belongs to (`SPLIT_RULE`), whatever other keys there are.

    A training that holds out the same share of a data set holds out the clips of this "validation".
    """
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "validation" if place < held_out else "test" if place < 2 * held_out else "train"


def text_cells(values: Sequence[Any]) -> Row:
    """Key, URL and caption from typed values. Text and integers are taken, None is empty; anything else is told."""
    texts = []
    for name, value in zip(NAMES, values, strict=True):
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            return f"the {name} is of type {type(value).__name__}, not text"
        # Half a character, which JSON and file names can hold, would break every writer after.
        texts.append("" if value is None else str(value).encode("utf-8", "replace").decode())
    return texts[0], texts[1], texts[2]


class KeysSeen:
    """An exact set of keys in 12 to 24 bytes each, where Python's own takes about 100: ten million in 134 MB.

    Keys are told apart by 64 bits of blake2b: the odds that any two of ten million meet are 3 in a million.
    """

    def __init__(self) -> None:
        self._marks = array("Q", [0]) * 1024  # open addressing: a power of two of slots, 0 is a free one
        self._held = 0

    def add(self, key: str) -> bool:
        """Adds a key. Returns whether it is new."""
        if 3 * self._held > 2 * len(self._marks):
            marks, self._marks = self._marks, array("Q", [0]) * (2 * len(self._marks))
            for mark in marks:
                if mark:
                    self._marks[self._slot(mark)] = mark
        mark = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") or 1
        slot = self._slot(mark)
        if self._marks[slot]:
            return False
        self._marks[slot] = mark
        self._held += 1
        return True

    def _slot(self, mark: int) -> int:
        """The slot that holds a mark, or the free one that is its own."""
        marks, last = self._marks, len(self._marks) - 1
        slot = mark & last
        while (held := marks[slot]) and held != mark:
            slot = (slot + 1) & last
        return slot


@contextmanager
def reading(address: str, wanted: str = "a table") -> Iterator[None]:
    """Turns what a store or a parser says about an unreadable source into one sentence."""
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
