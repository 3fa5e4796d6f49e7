"""Frame consistency (section 4.1): cosines between the embeddings of one video's frames."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate.frechet import checked_features

Floats = NDArray[np.float64]


def consistency_curve(embeddings: Any) -> Floats:
    """Frame consistency of one video at k = 2..F, entry k-2: 100 x mean cosine of consecutive pairs of frames 1..k.

    `embeddings` is [F >= 2, D], frame 1 being the given image. k counts frames, not pairs.
    """
    array = checked_features(embeddings, least=2)
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError("an embedding of length zero has no angle")
    unit = array / norms
    cosines = np.clip((unit[1:] * unit[:-1]).sum(axis=1), -1.0, 1.0)
    return 100.0 * np.cumsum(cosines) / np.arange(1, len(cosines) + 1)


def consistency_at(curve: Floats, k: int) -> float:
    """The curve's value for the first k frames; a video shorter than k is an error, never skipped."""
    if not 2 <= k <= len(curve) + 1:
        raise ValueError(f"consistency of the first {k} frames asked of a video of {len(curve) + 1} frames")
    return float(curve[k - 2])
