"""Splits clips by a hash of their key, so that a clip stays on its side when other clips come or go."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from tasks.records import UserError

MAX_SHOTS = 1000  # of one row: three digits of a key
SPLITS = ("train", "validation", "test")
SPLIT_RULE = "h = the first 8 bytes of sha256(key) / 2^64; h < held_out: validation; h < 2 held_out: test; else train"

Hashes = TypeVar("Hashes", int, np.ndarray)


# The end of the key of a clip that is a span: the first digits of the link's sha256, and the span in milliseconds.
_SPAN = re.compile(r"(.*)-([0-9a-f]{12})-t\d{7,}-(?:\d{7,}|end)")


def span_key(key: str, url: str, start: float, end: float | None) -> str:
    """Returns the key of a span of a video: what identifies it is the link with the span, next to the row's own key."""
    last = "end" if end is None else f"{round(1000 * end):07d}"
    return f"{key}-{hashlib.sha256(url.encode()).hexdigest()[:12]}-t{round(1000 * start):07d}-{last}"


def shot_key(key: str, number: int) -> str:
    """Returns the key of a shot of a row's clip, below `MAX_SHOTS`. No row has a key with a tilde."""
    return f"{key}~{number:03d}"


def row_key(clip_key: str) -> str:
    """Returns the key of the row that a clip was made from: without the shot."""
    return clip_key[:-4] if re.fullmatch(r"[^~]*~\d{3}", clip_key) else clip_key


def written_key(clip_key: str) -> str:
    """Returns the key of a clip as its row has it: without the shot and the span."""
    key = row_key(clip_key)
    match = _SPAN.fullmatch(key)
    return match[1] if match else key


def clip_hash(clip_key: str) -> int:
    """Returns the first 64 bits of the sha256 of a row's key, so that all shots of a video have the same.

    For a span it is that of its link, the same for all spans of it.
    """
    key = row_key(clip_key)
    match = _SPAN.fullmatch(key)
    return int.from_bytes(hashlib.sha256((match[2] if match else key).encode()).digest()[:8], "big")


def split_position(clip_hashes: Hashes) -> Any:
    """Returns where in [0, 1] a hash lies, or float64 [N] for hashes of uint64 [N]; both round in the same way."""
    return clip_hashes / 2.0**64


def split_of(key: str, held_out: float) -> str:
    """Returns the split of a key (`SPLIT_RULE`); it does not depend on other keys.

    A training that holds out the same share of a data set holds out the clips of this "validation".
    """
    position = split_position(clip_hash(key))
    return "validation" if position < held_out else "test" if position < 2 * held_out else "train"


def held_out_samples(clip_hashes: np.ndarray, held_out_fraction: float) -> np.ndarray:
    """Returns which samples belong to held-out clips, bool [N], from their clips' hashes, uint64 [N].

    Each side has at least one clip: if the threshold leaves a side empty, the clip with the smallest hash is held out,
    or the clip with the largest hash is trained on.

    Raises:
        UserError: fewer than two clips, or a fraction outside 0 to 1.
    """
    if not 0 <= held_out_fraction <= 1:
        raise UserError(f"held_out_fraction {held_out_fraction}, expected a number from 0 to 1")
    if (clip_hashes == clip_hashes[:1]).all():
        count = min(1, len(clip_hashes))
        raise UserError(f"{count} clips cannot be split into training and held-out ones; at least 2 are needed")
    position_N = split_position(clip_hashes)
    held_out_N = position_N < held_out_fraction
    if not held_out_N.any():
        held_out_N = clip_hashes == clip_hashes[position_N.argmin()]
    if held_out_N.all():
        held_out_N = clip_hashes != clip_hashes[position_N.argmax()]
    return held_out_N


def split_keys(clip_keys: Iterable[str], held_out_fraction: float) -> tuple[list[str], list[str]]:
    """Returns (training keys, held-out keys) without repeats, by `held_out_samples`, which also defines the errors."""
    keys = list(dict.fromkeys(clip_keys))
    held_out_N = held_out_samples(np.array([clip_hash(key) for key in keys], np.uint64), held_out_fraction).tolist()
    sides = list(zip(keys, held_out_N, strict=True))
    return [key for key, held_out in sides if not held_out], [key for key, held_out in sides if held_out]
