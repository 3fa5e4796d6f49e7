"""Whether a model may become champion: a pure function of intervals, with every rule, its value and its threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks.evaluation_record import Gate, Verdict
from tasks.metrics.statistics import Estimate

ENERGY_SCORE, CLIP_DISTANCE = "energy_score", "clip_distance"
RULES_VERSION = 2  # of the rules and their intervals; a finished report of another one is not reused
STILL_MOTION = 0.1  # a clip with less of its real clip's motion stands still
SCORES = {
    ENERGY_SCORE: "energy score",
    CLIP_DISTANCE: "distance to the true clip",
}


@dataclass(frozen=True)
class GateRule:
    """The thresholds of the gate. An interval passes a threshold if all of it does.

    Args:
        least_clips: unique held-out clips; of fewer, not even one without a still clip shows a share below a tenth.
        least_motion_ratio, most_motion_ratio: motion relative to the real clips; from half of it to twice as much. The
            same bounds hold for coarse motion, which noise does not have.
        most_still_clips: the share of clips that may stand still; a clip does if it has less than `STILL_MOTION` of its
            real clip's motion.
        champion_margin: of the champion's gain over the still, the share that a model may lose; and by how much the
            logarithm of its motion ratio may be further from 0. The same margin holds against the best champion so far,
            so a series of small losses does not add up.
    """

    least_clips: int = 35
    least_motion_ratio: float = 0.5
    most_motion_ratio: float = 2.0
    most_still_clips: float = 0.1
    champion_margin: float = 0.1


@dataclass(frozen=True)
class Against:
    """A model compared with a champion on the same items.

    Attributes:
        name: the champion, as in "the champion".
        lost_gain: the model's score minus the champion's, divided by the champion's gain over the still; below 0 where
            the model is better. None: the champion has no gain over the still.
        motion_error: |ln motion ratio| of the model minus that of the champion. None: one of the two does not move.
        sets: the champion's distance of sets minus the model's by metric; below 0 where the model is worse.
        unmeasured: one of the two has no score of the kind that decides, so they cannot be compared.
    """

    name: str
    lost_gain: Estimate | None = None
    motion_error: Estimate | None = None
    sets: Mapping[str, Estimate] = field(default_factory=dict)
    unmeasured: bool = False


@dataclass(frozen=True)
class Evidence:
    """What the gate decides on.

    Attributes:
        clips: unique clips.
        motion_ratio: of the model; None if the real clips do not move.
        coarse_motion_ratio: the same of frames that are averaged over squares, which noise does not move.
        still_clips: the share of the model's clips that stand still; None if no real clip moves.
        score: the name of the metric that decides, one of `SCORES`.
        score_minus_still: the model's score minus that of the still, paired by clip; None if it was not measured.
        champions: the comparisons with the champion and with the best champion so far, where there are any.
    """

    clips: int
    motion_ratio: Estimate | None
    coarse_motion_ratio: Estimate | None
    still_clips: Estimate | None
    score: str
    score_minus_still: Estimate | None
    champions: tuple[Against, ...] = ()


def gate(evidence: Evidence, rule: GateRule | None = None) -> Gate:
    """Applies every rule; a rule whose value has no interval is not met.

    A model passes if enough clips were measured, its motion ratio lies in bounds, few clips stand still, it is better
    than the still by a score that a perfect model wins, and it is not worse than the champion, or the best champion so
    far, by more than the margin.

    Args:
        evidence: the values.
        rule: the thresholds; None takes the defaults of `GateRule`.
    """
    rule = rule or GateRule()
    verdicts = [
        Verdict(
            "held-out clips",
            Estimate(float(evidence.clips)),
            f"at least {rule.least_clips}",
            evidence.clips >= rule.least_clips,
            f"{evidence.clips} held-out clips, at least {rule.least_clips} are needed to say anything",
        ),
        *_motion(evidence, rule),
        _better_than_still(evidence),
    ]
    for against in evidence.champions:
        verdicts += _not_worse(against, evidence.score, rule)
    verdicts = [Verdict(v.rule, v.value, v.threshold, v.passed, "" if v.passed else v.reason) for v in verdicts]
    reasons = tuple(verdict.reason for verdict in verdicts if not verdict.passed)
    return Gate(not reasons, reasons, tuple(verdicts))


def _interval(estimate: Estimate, digits: str) -> str:
    if estimate.ci_low is None or estimate.ci_high is None:
        return f"{estimate.value:{digits}}, without an interval"
    return f"{estimate.value:{digits}} ({estimate.ci_low:{digits}} to {estimate.ci_high:{digits}})"


def _motion(evidence: Evidence, rule: GateRule) -> list[Verdict]:
    low, high, most = rule.least_motion_ratio, rule.most_motion_ratio, rule.most_still_clips
    titles = "motion relative to the real clips", "coarse motion relative to the real clips"
    ratios, still_clips = (evidence.motion_ratio, evidence.coarse_motion_ratio), evidence.still_clips
    threshold = f"{low:g} to {high:g}, by the whole interval"
    if None in ratios:
        missing = "the real clips do not move, so there is no motion ratio"
        return [Verdict(titles[0], None, threshold, False, missing)]
    verdicts = []
    for title, ratio, name in zip(titles, ratios, ("motion ratio", "coarse motion ratio"), strict=True):
        assert ratio is not None
        inside = ratio.ci_low is not None and ratio.ci_high is not None and low <= ratio.ci_low <= ratio.ci_high <= high
        reason = f"{name} {_interval(ratio, '.3g')}, expected all of the interval in {low:g} to {high:g}"
        verdicts.append(Verdict(title, ratio, threshold, inside, reason))
    title, bound = "share of clips that stand still", f"below {most:g}, by the whole interval"
    if still_clips is None:
        return [*verdicts, Verdict(title, None, bound, False, "only noise moves in the real clips")]
    few = still_clips.ci_high is not None and still_clips.ci_high < most
    too_many = (
        f"not shown that few clips stand still: the share is {_interval(still_clips, '.3f')}, expected all of the"
        f" interval below {most:g}"
    )
    return [*verdicts, Verdict(title, still_clips, bound, few, too_many)]


def _better_than_still(evidence: Evidence) -> Verdict:
    name = SCORES[evidence.score]
    title, threshold = f"{name}, minus that of the still", "below 0, by the whole interval"
    minus = evidence.score_minus_still
    if minus is None:
        reason = (
            "without two clips for each item there is no energy score; evaluate with samples of at least 2, or"
            " declare deterministic motion if the first frame and the caption decide it"
        )
        return Verdict(title, None, threshold, False, reason)
    reason = f"not shown to be better than a still: {name} minus that of the still is {_interval(minus, '+.4f')}"
    return Verdict(title, minus, threshold, minus.ci_high is not None and minus.ci_high < 0, reason)


def _not_worse(against: Against, score: str, rule: GateRule) -> list[Verdict]:
    margin, name = rule.champion_margin, against.name
    threshold = f"below {margin:g}, by the whole interval"
    verdicts = []
    if against.unmeasured:
        reason = (
            f"the report of {name} or of the model has no {SCORES[score]}; evaluate both with samples of at least 2"
        )
        title = f"share lost of {name}'s gain over the still ({SCORES[score]})"
        verdicts.append(Verdict(title, None, threshold, False, reason))
    if against.lost_gain is not None:
        lost = against.lost_gain
        reason = (
            f"not shown to keep {1 - margin:.0%} of {name}'s gain over the still in {SCORES[score]}: the share lost"
            f" is {_interval(lost, '+.3f')}"
        )
        title = f"share lost of {name}'s gain over the still ({SCORES[score]})"
        verdicts.append(Verdict(title, lost, threshold, lost.ci_high is not None and lost.ci_high < margin, reason))
    if against.motion_error is not None:
        error = against.motion_error
        reason = (
            f"not shown to move as truly as {name}: its |ln motion ratio| minus that of {name} is"
            f" {_interval(error, '+.3f')}, expected below {margin:g}"
        )
        title = f"|ln motion ratio|, minus that of {name}"
        passed = error.ci_high is not None and error.ci_high < margin
        verdicts.append(Verdict(title, error, threshold, passed, reason))
    for metric, difference in against.sets.items():
        if difference.ci_low is None or difference.ci_high is None:
            continue  # of few clips a distance of sets has no interval
        reason = (
            f"worse than {name} in {metric}: the value of {name} minus the model's is {_interval(difference, '+.4g')}"
        )
        title = f"{metric}: {name} minus the model"
        verdicts.append(Verdict(title, difference, "not all below 0", difference.ci_high >= 0, reason))
    return verdicts
