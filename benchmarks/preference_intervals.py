"""Coverage of the intervals of a preference study, on simulated votes: `python -m benchmarks.preference_intervals`."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import numpy as np

from tasks.study.statistics import Clusters, bootstrap_share, share

STUDIES = 500
TIES = 0.1
# Items, raters, effect of the preference, spread of items, spread of raters, least share of the items a rater votes on.
INDEPENDENT = "independent votes"
DESIGNS = {
    "as planned": (64, 32, 0.3, 0.5, 0.3, 1.0),
    "few raters": (40, 4, 0.2, 0.4, 0.3, 1.0),
    "few raters and items": (12, 6, 0.2, 0.4, 0.3, 1.0),
    "unequal numbers": (40, 20, 0.2, 0.5, 0.4, 0.1),
    "few raters, unequal numbers": (40, 6, 0.2, 0.4, 0.3, 0.15),
    "strong preference": (40, 10, 1.2, 0.4, 0.4, 1.0),
    INDEPENDENT: (24, 8, 0.0, 0.0, 0.0, 1.0),
}


def drawn_votes(rng, design):
    """Scores and clusters of one study: a vote is for the first where preference, item, rater and chance add up > 0."""
    items, raters, preference, of_item, of_rater, least = design
    item_effect, rater_effect = rng.normal(0, of_item, items), rng.normal(0, of_rater, raters)
    seen = [
        rng.permutation(items)[: items if least == 1 else rng.integers(least * items, items + 1)] for _ in range(raters)
    ]
    item = np.concatenate(seen)
    rater = np.repeat(np.arange(raters), [len(one) for one in seen])
    latent = preference + item_effect[item] + rater_effect[rater] + rng.normal(size=len(item))
    scores = np.where(rng.random(len(item)) < TIES, 0.5, (latent > 0).astype(float))
    return scores, Clusters(item, rater)


def true_share(design):
    _, _, preference, of_item, of_rater, _ = design
    return (1 - TIES) * NormalDist().cdf(preference / sqrt(1 + of_item**2 + of_rater**2)) + TIES / 2


def coverage(design, interval, seed: int = 1) -> float:
    """The share of studies whose interval covers the true share; `interval` is a function of scores and clusters."""
    rng, truth, hits = np.random.default_rng(seed), true_share(design), 0
    for _ in range(STUDIES):
        estimate = interval(*drawn_votes(rng, design))
        hits += estimate.ci_low <= truth <= estimate.ci_high
    return hits / STUDIES


def main() -> None:
    print("| votes | items x raters | this interval | bootstrap over both |\n|---|---|---|---|")
    for name, design in DESIGNS.items():
        values = [f"{coverage(design, interval):.1%}" for interval in (share, bootstrap_share)]
        print(f"| {name} | {design[0]} x {design[1]} | {values[0]} | {values[1]} |", flush=True)


if __name__ == "__main__":
    main()
