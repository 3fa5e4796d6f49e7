"""How many votes a preference study needs before it can distinguish a share from one half."""

from __future__ import annotations

from math import ceil, sqrt
from statistics import NormalDist

LEVEL, POWER = 0.95, 0.8
# Assumed shares of the variance of a vote that are the item's and the rater's; the tally prints the measured effect.
ITEM_SHARE, RATER_SHARE = 0.05, 0.02


def votes_needed(share: float, effect: float = 1.0, level: float = LEVEL, power: float = POWER) -> int:
    """The votes that distinguish a share of preferences from 0.5, by the normal approximation of the binomial.

    Args:
        share: the true share, not 0.5.
        effect: design effect, the variance relative to that of independent votes.
        level: 1 minus the size of the two-sided test.
        power: chance to find the difference.
    """
    if share == 0.5 or not 0 < share < 1:
        raise ValueError(f"share {share}, expected between 0 and 1 and not 0.5")
    normal = NormalDist()
    reach = normal.inv_cdf((1 + level) / 2) * 0.5 + normal.inv_cdf(power) * sqrt(share * (1 - share))
    return ceil(effect * (reach / (share - 0.5)) ** 2)


def share_found(votes: int, effect: float = 1.0) -> float:
    """The smallest share above 0.5 that this many votes find with the power of `votes_needed`, to 0.001; 1 at most."""
    low, high = 0.5005, 0.9995
    if votes_needed(high, effect) > votes:
        return 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if votes_needed(middle, effect) <= votes else (middle, high)
    return high


def design_effect(raters: int, items: int, votes: int) -> float:
    """The assumed design effect of votes that share items and raters: 1 + (m - 1) x share for each of both."""
    per_item, per_rater = votes / items, votes / raters
    return 1 + (per_item - 1) * ITEM_SHARE + (per_rater - 1) * RATER_SHARE


def power_sentences(raters: int, items: int, per_rater: int, comparisons: int) -> tuple[str, ...]:
    """What a study can show, for people, before it starts.

    Args:
        raters: number of raters.
        items: number of items.
        per_rater: pairs of each rater, over all comparisons.
        comparisons: number of comparisons of two systems.
    """
    votes = raters * per_rater // comparisons
    effect = design_effect(raters, items, votes)
    found = share_found(votes, effect)
    return (
        f"{votes_needed(0.55)} independent votes tell 55 % from 50 % (95 % level, 80 % power); "
        f"{votes_needed(0.6)} tell 60 %.",
        f"Planned: {raters} raters x {per_rater} pairs = {votes} votes for each question"
        + (f" and each of {comparisons} comparisons." if comparisons > 1 else "."),
        f"Votes share {items} items and {raters} raters. If {ITEM_SHARE:.0%} of their variance is the item's and "
        f"{RATER_SHARE:.0%} the rater's, the design effect is {effect:.2f}: {votes_needed(0.55, effect)} such votes "
        f"tell 55 % from 50 %, and this plan finds "
        + (f"a preference of {found:.1%} or more." if found < 1 else "no preference reliably."),
        f"A tally of {raters} raters has an interval of about +-{98 / sqrt(raters):.0f} points at 50 %.",
    )
