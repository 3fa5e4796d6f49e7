"""Which pairs each rater sees, in which order and with which clip on the left: random, balanced by rater and item."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tasks.study.plan import Place


def assign(
    groups: Sequence[Sequence[int]],
    gold: Sequence[tuple[int, bool]],
    repeats: dict[int, int],
    per_rater: int,
    raters: int,
    rng: np.random.Generator,
) -> tuple[tuple[Place, ...], ...]:
    """Returns the places of every rater.

    Raters come in twos that see the same pairs with opposite sides, so over an even number of raters each pair has each
    clip on the left equally often, and each rater has each system on the left equally often (up to one pair).

    Args:
        groups: indices of the study's pairs, one group for each two systems; the first clip of each pair of a group is
            of the same system.
        gold: indices of gold pairs, each with whether its first clip is the real one.
        repeats: by index of a repeated pair, the index of its copy; every rater sees both, with opposite sides.
        per_rater: number of different study pairs of each rater.
        raters: number of raters.
        rng: the random draws.
    """
    pairs = [pair for group in groups for pair in group]
    group_of = {pair: number for number, group in enumerate(groups) for pair in group}
    others = rng.permutation([pair for pair in pairs if pair not in repeats]).tolist()
    drawn, start, result = per_rater - len(repeats), 0, []
    for _ in range(math.ceil(raters / 2)):
        # The next stretch of a circle: every pair is seen equally often, up to one.
        chosen = [others[(start + offset) % len(others)] for offset in range(drawn)] + list(repeats)
        start = (start + drawn) % max(len(others), 1)
        swapped: dict[int, bool] = {}
        for number in range(len(groups)):
            members = [pair for pair in chosen if group_of[pair] == number]
            swapped |= zip(members, _halves(len(members), rng), strict=True)
        real_left = _halves(len(gold), rng)
        swapped |= {pair: left != first for (pair, first), left in zip(gold, real_left, strict=True)}
        swapped |= {copy: not swapped[pair] for pair, copy in repeats.items()}
        for opposite in (False, True):
            order = _order(chosen, [pair for pair, _ in gold], repeats, rng)
            result.append(tuple(Place(pair, swapped[pair] != opposite) for pair in order))
    return tuple(result[:raters])


def _halves(count: int, rng: np.random.Generator) -> list[bool]:
    """`count` values in random order, half of them True; an odd one is drawn."""
    values = [False] * (count // 2) + [True] * (count // 2) + [bool(rng.integers(2))] * (count % 2)
    return [values[i] for i in rng.permutation(count)]


def _order(chosen: Sequence[int], gold: Sequence[int], repeats: dict[int, int], rng: np.random.Generator) -> list[int]:
    """A random order in which repeated pairs come in the first half and their copies in the last third."""
    early = [*repeats]
    late = rng.permutation([pair for pair in (*chosen, *gold) if pair not in repeats]).tolist()
    half = max((len(late) + len(early)) // 2, len(early))
    first = rng.permutation([*early, *late[: half - len(early)]]).tolist()
    rest = late[half - len(early) :]
    third = (len(first) + len(rest) + len(early)) * 2 // 3 - len(first)
    third = min(max(third, 0), len(rest))
    last = rng.permutation([*rest[third:], *repeats.values()]).tolist()
    return [int(pair) for pair in (*first, *rest[:third], *last)]
