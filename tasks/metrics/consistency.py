"""Frame consistency (section 4.1): cosines between the embeddings of one video's frames, by named rules of pairs."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.frechet import checked_features

Floats = NDArray[np.float64]
# Which pairs of the first k frames count: each with the next (AIGCBench; fits the paper's rows, and is what
# "F-Consistency" means here), all of them (the LOVEU-TGVE script), or the first with each other one.
PairRule = Literal["consecutive", "all_pairs", "first_vs_rest"]
PAIR_RULES: tuple[PairRule, ...] = get_args(PairRule)


def _cosines(embeddings: Any) -> Floats:
    """Cosines [F, F] of all frames of one video."""
    array = np.asarray(checked_features(embeddings, least=2), dtype=np.float64)
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError("an embedding of length zero has no angle")
    unit = array / norms
    return np.clip(unit @ unit.T, -1.0, 1.0)


def consistency_curve(embeddings: Any, rule: PairRule = "consecutive") -> Floats:
    """Frame consistency of one video at k = 2..F, entry k-2: 100 x mean cosine of the rule's pairs of frames 1..k.

    `embeddings` is [F >= 2, D], frame 1 being the given image. k counts frames, not pairs.
    """
    cosines = _cosines(embeddings)
    last = np.arange(1, len(cosines))  # position of the k-th frame
    if rule == "consecutive":
        added, pairs = cosines[last - 1, last], last
    elif rule == "first_vs_rest":
        added, pairs = cosines[0, last], last
    else:
        added, pairs = np.tril(cosines, -1).sum(axis=1)[1:], last * (last + 1) // 2
    return 100.0 * np.cumsum(added) / pairs


def consistency_at(curve: Floats, k: int) -> float:
    """The curve's value for the first k frames; a video shorter than k is an error, never skipped."""
    if not 2 <= k <= len(curve) + 1:
        raise ValueError(f"consistency of the first {k} frames asked of a video of {len(curve) + 1} frames")
    return float(curve[k - 2])


def consistency_by_lag(embeddings: Any) -> Floats:
    """100 x mean cosine of all frames of one video that lie 1..F-1 frames apart, entry lag-1: shows slow drift."""
    cosines = _cosines(embeddings)
    return 100.0 * np.array([np.diagonal(cosines, lag).mean() for lag in range(1, len(cosines))])


def consistency_name(metric: str, k: int | Literal["all"], rule: PairRule = "consecutive") -> str:
    """The column's name: "F-Consistency/4", and for other rules "F-Consistency/all_pairs/4"."""
    return f"{metric}/{k}" if rule == "consecutive" else f"{metric}/{rule}/{k}"
