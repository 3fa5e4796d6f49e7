"""The identity of a row: what it names and how it is captioned, whatever its place in a table.

A row is known by its key, its link, its span and, where a source knows it, the size of its file. The caption has a hash
of its own, so that a row with another caption is found again, and its stored latents with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np

from infra.redaction import name_of

Span = tuple[float, float | None]

_encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_LENGTH = 48  # hex digits: 128 bits of the row, 64 of its caption
KEY_ALONE = 1  # the caption's hash of a row that is known only by its key
NO_CAPTION = 0  # that of a failure


def row_id(key: str, link: str, caption: str, span: Span | None = None, size_bytes: int | None = None) -> str:
    """Returns the identity of a clip's row: 48 hex digits, the last 16 of them of its caption.

    A link counts as records have it, without its secrets, so that an index alone gives the same identity.
    """
    return _hash([key, name_of(link), None if span is None else list(span), size_bytes], 16) + _hash(caption, 8)


def failure_id(key: str, reason: str, detail: str, occurrence: int) -> str:
    """Returns the identity of a row that its source cannot use; equal ones are counted."""
    return _hash([key, reason, detail, occurrence], 16) + f"{NO_CAPTION:016x}"


def key_id(key: str) -> str:
    """Returns the identity of a row of which a record has only the key."""
    return _hash([key], 16) + f"{KEY_ALONE:016x}"


def without_caption(identity: str) -> str:
    """Returns the identity as a shard keeps it for a row that failed."""
    return identity[:32] + f"{NO_CAPTION:016x}"


def is_row_id(text: str) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{_LENGTH}}}", text) is not None


def as_array(identities: Sequence[str]) -> np.ndarray:
    """Returns identities as uint64 [R, 3]: two words of the row, one of its caption."""
    return np.frombuffer(bytes.fromhex("".join(identities)), ">u8").astype(np.uint64).reshape(-1, 3)


def find_rows(wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns where each row of uint64 [W, 2] is in uint64 [K, 2], int64 [W]; -1 for those that are not there.

    Of equal rows in `known` the first counts.
    """
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(known[:, 0], kind="stable")
    place = np.minimum(np.searchsorted(known[order, 0], wanted[:, 0]), len(known) - 1)
    found = order[place]
    return np.where((known[found] == wanted).all(axis=1), found, -1)


def _hash(value: object, size: int) -> str:
    return hashlib.blake2b(_encoded(value).encode(), digest_size=size).hexdigest()
