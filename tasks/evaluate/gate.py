"""Whether a model may take the champion's place: a pure rule over its numbers that lists every reason against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.evaluation_record import Gate
from tasks.metrics.statistics import Estimate


@dataclass(frozen=True)
class GateRule:
    """Thresholds for a model to count as one that animates."""

    least_motion_ratio: float = 0.5
    most_motion_ratio: float = 1.5
    least_clips: int = 32


def gate(
    motion_ratio: float | None,
    distance_minus_frozen: Estimate,
    clips: int,
    champion_minus_model: Mapping[str, Estimate] | None = None,
    rule: GateRule | None = None,
) -> Gate:
    """Moves about as much as the real clips, lies nearer to them than a still, and is not worse than the champion.

    Args:
        motion_ratio: motion of the generated clips relative to that of the real ones; None if that is 0.
        distance_minus_frozen: distance to the true clip minus that of a still, paired by clip: its interval must lie
            below 0.
        clips: unique clips, of which there must be a least number.
        champion_minus_model: paired differences by metric where lower is better: no interval may lie below 0, which
            would say that the model is worse. An interval across 0 does not tell the two apart, and passes.
        rule: the bounds; None takes the defaults of `GateRule`.
    """
    rule = rule or GateRule()
    reasons = []
    if clips < rule.least_clips:
        reasons.append(f"{clips} held-out clips, at least {rule.least_clips} are needed to say anything")
    low, high = rule.least_motion_ratio, rule.most_motion_ratio
    if motion_ratio is None:
        reasons.append("the real clips do not move, so there is no motion ratio")
    elif not low <= motion_ratio <= high:
        reasons.append(f"motion ratio {motion_ratio:.3g} lies outside {low:g} to {high:g}")
    upper = distance_minus_frozen.ci_high
    if upper is None:
        reasons.append("the distance to the true clip has no interval (a single clip)")
    elif not upper < 0:
        reasons.append(
            "not shown to be closer to the true clip than a still: the interval of the paired difference reaches "
            f"{upper:+.4f}"
        )
    for metric, difference in (champion_minus_model or {}).items():
        if difference.ci_low is not None and difference.ci_high is not None and difference.ci_high < 0:
            reasons.append(
                f"worse than the champion in {metric}: the champion's value minus the model's lies at "
                f"{difference.ci_low:+.4g} to {difference.ci_high:+.4g}, paired by clip"
            )
    return Gate(not reasons, tuple(reasons))
