"""The energy score: a proper score for motion that chance decides, from two or more samples of each item.

A system gives a distribution of clips X for an item, the true clip y is one draw of nature. The energy score

    E|X - y| - E|X - X'| / 2                                         (Gneiting and Raftery, 2007, Section 4.3)

is least in expectation for the system whose distribution is the true one, whatever the law of the motion. The distance
of one sample to the true clip is not: where chance decides, it prefers the still and the blurred mean to a perfect
sampler. |.| is `pixels.clip_distance`, the Euclidean norm of frames 2..F in pixel values, divided by the root of their
number. So of a system that always gives the same clip (a still) the score is its distance to the true clip.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.pixels import clip_distance

Pixels = NDArray[np.uint8]


def distances_to_truth(samples: Sequence[Pixels], truth: Pixels) -> list[float]:
    """The distance of each sample of an item to the true clip; clips are uint8 [F, H, W, 3]."""
    return [clip_distance(sample, truth) for sample in samples]


def spread(samples: Sequence[Pixels]) -> float:
    """The mean distance of two samples of an item, over all pairs. Raises ValueError on fewer than two samples."""
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} sample, expected at least 2 to measure a spread")
    return float(np.mean([clip_distance(a, b) for a, b in itertools.combinations(samples, 2)]))


def energy_score(to_truth: NDArray[np.float64], spreads: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unbiased energy score of each item [N] from its samples' distances [N, K] and their spread [N]."""
    return to_truth.mean(axis=1) - spreads / 2
