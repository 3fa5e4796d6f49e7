"""Which clips are trained on and which are held out: a function of each clip's key alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from tasks.records import UserError


def clip_hash(clip_key: str) -> int:
    """The first 64 bits of a clip key's sha256."""
    return int.from_bytes(hashlib.sha256(clip_key.encode()).digest()[:8], "big")


def held_out_samples(clip_hashes: np.ndarray, held_out_fraction: float) -> np.ndarray:
    """Which samples are of held-out clips, bool [N], by their clips' hashes; a clip keeps its side when others come.

    At least one clip lies on each side: where the threshold leaves a side empty, the clip with the smallest hash is
    held out, or the one with the largest is trained on.

    Raises:
        UserError: fewer than two clips, or a fraction outside 0 to 1.
    """
    if not 0 <= held_out_fraction <= 1:
        raise UserError(f"held_out_fraction {held_out_fraction}, expected a number from 0 to 1")
    if (clip_hashes == clip_hashes[:1]).all():
        count = min(1, len(clip_hashes))
        raise UserError(f"{count} clips cannot be split into training and held-out ones; at least 2 are needed")
    place_N = clip_hashes.astype(np.float64) / 2**64
    held_out_N = place_N < held_out_fraction
    if not held_out_N.any():
        held_out_N = clip_hashes == clip_hashes[place_N.argmin()]
    if held_out_N.all():
        held_out_N = clip_hashes != clip_hashes[place_N.argmax()]
    return held_out_N


def split_keys(clip_keys: Iterable[str], held_out_fraction: float) -> tuple[list[str], list[str]]:
    """Splits clips into (train, held out), each clip once, as `held_out_samples` does. Raises as it does."""
    keys = list(dict.fromkeys(clip_keys))
    held_out_N = held_out_samples(np.array([clip_hash(key) for key in keys], np.uint64), held_out_fraction).tolist()
    sides = list(zip(keys, held_out_N, strict=True))
    return [key for key, held_out in sides if not held_out], [key for key, held_out in sides if held_out]
