"""Counts the votes of a study: win rates, tests, strengths, agreement and biases, with and without exclusions."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.evaluation_record import REAL
from tasks.metrics.statistics import Estimate, holm
from tasks.records import UserError
from tasks.study.plan import Key, Plan, SealedPair
from tasks.study.statistics import (
    Clusters,
    Strengths,
    bootstrap_share,
    bradley_terry,
    effective_votes,
    krippendorff_alpha,
    majorities,
    share,
    sign_test,
    wilson,
)
from tasks.study.store import Vote

NORMAL = 1.959964  # two-sided 95 % of the normal distribution
GOLD_QUESTION = {"shuffled": "temporal_coherence", "frozen": "motion_fidelity"}
LEAST_REPEATS, LEAST_SIDES = 4, 20  # answers from which the rule of exclusion looks at repeats and at sides
SCHEMA = 1


@dataclass(frozen=True)
class Choice:
    """One answer to one question, in terms of the systems: score 1 for the first, 0 for the second, 0.5 not sure."""

    rater: int
    item: str
    clip: str
    first: str
    second: str
    question: str
    score: float


@dataclass(frozen=True)
class Comparison:
    """Two systems under one question.

    Attributes:
        first, second: the systems.
        question: name of the question.
        wins, ties, losses: votes for the first, "not sure", votes for the second.
        win_rate: share of votes for the first, a tie as one half, with the two-way interval.
        bootstrap: the same with the percentile interval of the two-way bootstrap, which is longer.
        effective_votes: number of independent votes with the same variance.
        items_for, items_against, items_tied: majorities by item.
        sign_p: exact sign test on the majorities by item, of this comparison only.
        sign_p_holm: adjusted for all comparisons and questions of the study.
        raters_for, raters_against, raters_tied: majorities by rater.
        tally_by_rater: the paper's figure: raters whose majority is for the first, a tie as one half, with Wilson's
            interval of independent raters.
        alpha: Krippendorff's, nominal, over items; None where it is not defined.
    """

    first: str
    second: str
    question: str
    wins: int
    ties: int
    losses: int
    win_rate: Estimate
    bootstrap: Estimate
    effective_votes: float
    items_for: int
    items_against: int
    items_tied: int
    sign_p: float
    sign_p_holm: float
    raters_for: int
    raters_against: int
    raters_tied: int
    tally_by_rater: Estimate
    alpha: float | None


@dataclass(frozen=True)
class RaterFacts:
    """What the rule of exclusion looks at, for one rater; None where nothing was answered."""

    rater: int
    votes: int
    places: int
    gold: float | None
    repeats: float | None
    left: float | None
    seconds: float
    excluded: str


@dataclass(frozen=True)
class Count:
    """The numbers of one set of raters.

    Attributes:
        raters: number of raters.
        votes: number of pairs with a vote, gold and repeated ones not counted.
        comparisons: of each two systems and question.
        strengths: by question, for more than two systems.
        left: share of the left side among the answers left and right, by question.
        item_scores: by question and "FIRST/SECOND", the mean score of each item.
    """

    raters: int
    votes: int
    comparisons: tuple[Comparison, ...]
    strengths: dict[str, Strengths]
    left: dict[str, Estimate]
    item_scores: dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Tally:
    """The result of a study: the numbers of all raters, of those that the rule keeps, and what it looked at."""

    study: str
    plan_sha256: str
    systems: tuple[str, ...]
    all_raters: Count
    kept_raters: Count | None
    raters: tuple[RaterFacts, ...]
    excluded: dict[str, int]
    schema_version: int = SCHEMA


def tally(plan: Plan, key: Key, votes: Sequence[Vote]) -> Tally:
    """Counts the votes of a study.

    Args:
        plan: the plan that the votes were given under.
        key: its key.
        votes: all votes; each is checked against the plan.
    Raises:
        UserError: no votes on pairs of the study, or a vote that does not belong to the plan.
    """
    sealed = {pair.name: pair for pair in key.pairs}
    _check(plan, votes)
    facts = tuple(_facts(plan, sealed, rater, mine) for rater, mine in _by_rater(votes).items())
    questions = [question.name for question in plan.questions]
    everyone = _count(key.systems, questions, sealed, votes)
    kept = {fact.rater for fact in facts if not fact.excluded}
    left = [vote for vote in votes if vote.rater in kept]
    has_votes = any(sealed[vote.pair].kind == "study" for vote in left)
    return Tally(
        study=plan.study,
        plan_sha256=plan.sha256,
        systems=key.systems,
        all_raters=everyone,
        kept_raters=_count(key.systems, questions, sealed, left) if has_votes else None,
        raters=facts,
        excluded=dict(sorted(Counter(fact.excluded for fact in facts if fact.excluded).items())),
    )


def _check(plan: Plan, votes: Sequence[Vote]) -> None:
    seen: set[tuple[int, str]] = set()
    for vote in votes:
        places = plan.assignments[vote.rater] if 0 <= vote.rater < len(plan.assignments) else ()
        place = places[vote.position] if 0 <= vote.position < len(places) else None
        if place is None or plan.pairs[place.pair].name != vote.pair or place.swapped != vote.swapped:
            raise UserError(
                f"the vote of rater {vote.rater} at position {vote.position} is not of this plan; give the plan of the"
                " same study"
            )
        if (vote.rater, vote.pair) in seen:
            raise UserError(f"rater {vote.rater} has two votes on one pair; the votes were changed after the export")
        seen.add((vote.rater, vote.pair))


def _by_rater(votes: Sequence[Vote]) -> dict[int, list[Vote]]:
    by_rater: dict[int, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_rater[vote.rater].append(vote)
    return dict(sorted(by_rater.items()))


def system_chosen(pair: SealedPair, swapped: bool, answer: str) -> str | None:
    """The system that an answer is for; None for "not sure"."""
    if answer == "unsure":
        return None
    return pair.first if (answer == "left") != swapped else pair.second


def choices(key: Key, votes: Sequence[Vote]) -> list[Choice]:
    """The answers on pairs of the study, with the systems in the order of the key."""
    sealed = {pair.name: pair for pair in key.pairs}
    return _choices(key.systems, sealed, votes)


def _choices(systems: Sequence[str], sealed: dict[str, SealedPair], votes: Sequence[Vote]) -> list[Choice]:
    result = []
    for vote in votes:
        pair = sealed[vote.pair]
        if pair.kind != "study":
            continue
        first, second = sorted((pair.first, pair.second), key=systems.index)
        for question, answer in vote.answers.items():
            chosen = system_chosen(pair, vote.swapped, answer)
            score = 0.5 if chosen is None else float(chosen == first)
            result.append(Choice(vote.rater, pair.item, pair.clip, first, second, question, score))
    return result


def _facts(plan: Plan, sealed: dict[str, SealedPair], rater: int, votes: Sequence[Vote]) -> RaterFacts:
    rule, places = plan.rule, len(plan.assignments[rater])
    gold, repeats, sides = [], [], []
    originals = {}
    for vote in votes:
        pair = sealed[vote.pair]
        if pair.kind == "study":
            originals[pair.item, frozenset((pair.first, pair.second))] = vote
    for vote in votes:
        pair = sealed[vote.pair]
        if pair.kind in GOLD_QUESTION:
            question = GOLD_QUESTION[pair.kind]
            answer = vote.answers.get(question) or next(iter(vote.answers.values()))
            gold.append(system_chosen(pair, vote.swapped, answer) == REAL)
            continue
        sides += [answer == "left" for answer in vote.answers.values() if answer != "unsure"]
        original = originals.get((pair.item, frozenset((pair.first, pair.second))))
        if pair.kind == "repeat" and original is not None:
            before = sealed[original.pair]
            repeats += [
                system_chosen(pair, vote.swapped, answer)
                == system_chosen(before, original.swapped, original.answers[question])
                for question, answer in vote.answers.items()
            ]
    shares = [float(np.mean(values)) if values else None for values in (gold, repeats, sides)]
    excluded = ""
    if len(votes) < rule.least_answered * places:
        excluded = "incomplete"
    elif shares[0] is not None and shares[0] < rule.least_gold:
        excluded = "gold"
    elif shares[1] is not None and len(repeats) >= LEAST_REPEATS and shares[1] < rule.least_repeats:
        excluded = "repeats"
    elif shares[2] is not None and len(sides) >= LEAST_SIDES and max(shares[2], 1 - shares[2]) > rule.most_one_side:
        excluded = "one_side"
    seconds = float(np.median([vote.milliseconds for vote in votes])) / 1000
    return RaterFacts(rater, len(votes), places, shares[0], shares[1], shares[2], seconds, excluded)


def _count(
    systems: Sequence[str], questions: Sequence[str], sealed: dict[str, SealedPair], votes: Sequence[Vote]
) -> Count:
    study = [vote for vote in votes if sealed[vote.pair].kind == "study"]
    if not study:
        raise UserError("no votes on pairs of the study yet")
    lines = _choices(systems, sealed, study)
    comparisons = [
        _compare(first, second, question, chosen)
        for first, second in itertools.combinations(systems, 2)
        for question in questions
        if (chosen := [x for x in lines if (x.first, x.second, x.question) == (first, second, question)])
    ]
    adjusted = holm([comparison.sign_p for comparison in comparisons])
    comparisons = [replace(comparison, sign_p_holm=p) for comparison, p in zip(comparisons, adjusted, strict=True)]
    strengths: dict[str, Strengths] = {}
    left: dict[str, Estimate] = {}
    item_scores: dict[str, dict[str, dict[str, float]]] = {}
    for question in questions:
        mine = [line for line in lines if line.question == question]
        if len(systems) > 2:
            strengths[question] = bradley_terry(
                systems,
                np.array([systems.index(line.first) for line in mine]),
                np.array([systems.index(line.second) for line in mine]),
                np.array([line.score for line in mine]),
                Clusters.of([line.clip for line in mine], [line.rater for line in mine]),
            )
        sided = [vote for vote in study if vote.answers[question] != "unsure"]
        if sided:
            left[question] = share(
                np.array([float(vote.answers[question] == "left") for vote in sided]),
                Clusters.of([sealed[vote.pair].clip for vote in sided], [vote.rater for vote in sided]),
            )
        by_item: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for line in mine:
            by_item[f"{line.first}/{line.second}"][line.item].append(line.score)
        item_scores[question] = {
            name: {item: float(np.mean(scores)) for item, scores in sorted(items.items())}
            for name, items in by_item.items()
        }
    raters = len({vote.rater for vote in votes})
    return Count(raters, len(study), tuple(comparisons), strengths, left, item_scores)


def _compare(first: str, second: str, question: str, chosen: Sequence[Choice]) -> Comparison:
    scores = np.array([line.score for line in chosen])
    clusters = Clusters.of([line.clip for line in chosen], [line.rater for line in chosen])
    items_for, items_against, items_tied = majorities(scores, clusters.items)
    raters_for, raters_against, raters_tied = majorities(scores, clusters.raters)
    raters = raters_for + raters_against + raters_tied
    ratings: dict[str, dict[int, float]] = defaultdict(dict)
    for line in chosen:
        ratings[line.item][line.rater] = line.score
    p = sign_test(items_for, items_against)
    return Comparison(
        first=first,
        second=second,
        question=question,
        wins=int((scores == 1).sum()),
        ties=int((scores == 0.5).sum()),
        losses=int((scores == 0).sum()),
        win_rate=share(scores, clusters),
        bootstrap=bootstrap_share(scores, clusters),
        effective_votes=effective_votes(scores, clusters),
        items_for=items_for,
        items_against=items_against,
        items_tied=items_tied,
        sign_p=p,
        sign_p_holm=p,
        raters_for=raters_for,
        raters_against=raters_against,
        raters_tied=raters_tied,
        tally_by_rater=wilson((raters_for + raters_tied / 2) / raters, raters, NORMAL),
        alpha=krippendorff_alpha(list(ratings.values())),
    )
