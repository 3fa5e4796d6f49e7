"""How often every interval that a report or an ablation prints contains the true value, at the sizes that are printed.

    python -m benchmarks.coverage [--trials 1000] [--clips 40]

Simulated data with a known answer; 95 % intervals should cover in 93 to 97 %. A distance of sets has the expectation of
its difference at this number of clips as the true value, estimated by the mean over the trials. The rows `of the
ablation` draw clips from the values that docs/decisions/ablation.npz keeps of 132, whose mean is the true value.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate import champion
from tasks.evaluate.champion import MAGNITUDE, PerClip
from tasks.evaluate.gate import ENERGY_SCORE
from tasks.evaluate.protocol.protocol import Item
from tasks.evaluate.report.ablation import two_way_mean
from tasks.evaluate.report.distances import together
from tasks.metrics.energy import energy_score
from tasks.metrics.frechet import FeatureSet, frechet_to_real, paired_frechet_difference
from tasks.metrics.statistics import Estimate, mean_over_clips, paired_difference, ratio_of_sums, share_of

WIDTH = 32  # of the features of a distance of sets
BOUNDS = 0.93, 0.97
KEPT = Path("docs/decisions/ablation.npz")
ENDLESS_CLIPS = 4 * 2 * WIDTH  # from here on a value at endless clips is printed

Values = NDArray[np.float64]
Random = np.random.Generator


@dataclass(frozen=True)
class Interval:
    """A kind of interval: how one is made from fresh data, and the true value (None: the mean over the trials)."""

    name: str
    make: Callable[[Random], Estimate]
    truth: float | None


def intervals(clips: int) -> Iterator[Interval]:
    """Every kind that is printed; of data without and with a long tail where the data decide the coverage."""
    names = [str(i) for i in range(clips)]
    items = [Item(name, name, i, "", i) for i, name in enumerate(names)]

    def hard(random: Random) -> Values:
        """What a clip adds to the values of every system: half of their deviation."""
        return random.normal(0, 0.5, clips)

    def tailed(random: Random, deviation: float = 0.5) -> Values:
        """Values of mean 1 with a long tail; of its logarithm `deviation` is the deviation."""
        return random.lognormal(-(deviation**2) / 2, deviation, clips)

    yield Interval("mean, normal", lambda r: mean_over_clips(r.normal(size=clips), names), 0.0)
    yield Interval("mean, lognormal (0.5)", lambda r: mean_over_clips(tailed(r), names), 1.0)
    yield Interval("mean, lognormal (1)", lambda r: mean_over_clips(r.lognormal(-0.5, 1, clips), names), 1.0)
    kept = np.load(KEPT)
    for name, about in (("energy", "energy scores"), ("motion", "motion ratios"), ("still_psnr", "PSNR, still part")):
        for base in ("noise", "velocity"):
            values = kept[f"{base}_TRIP_0/{name}"]

            def redrawn(random: Random, values: Values = values) -> Estimate:
                return mean_over_clips(random.choice(values, clips), names)

            yield Interval(f"mean, {about} of the ablation ({base})", redrawn, float(values.mean()))

    def ratio(random: Random, deviation: float) -> Estimate:
        real = tailed(random)
        return ratio_of_sums(1.2 * real * tailed(random, deviation), real, names)

    # In the demo's report a clip's motion ratio has a deviation of 0.2.
    yield Interval("ratio to the real clips, deviation 0.25", lambda r: ratio(r, 0.25), 1.2)
    yield Interval("ratio to the real clips, deviation 0.5", lambda r: ratio(r, 0.5), 1.2)

    def share(random: Random) -> Estimate:
        """Hits are whole: at a single share the coverage is anywhere in 92 to 98 %, so the share is drawn too."""
        true = random.uniform(0, 0.3)
        found = share_of(float(random.binomial(clips, true)), clips)
        assert found.ci_low is not None and found.ci_high is not None
        return Estimate(found.value - true, found.ci_low - true, found.ci_high - true)

    yield Interval("share of clips, drawn from 0 to 0.3", share, 0.0)

    def difference(random: Random) -> Estimate:
        shared = hard(random)
        return paired_difference(shared + random.normal(0.3, 0.5, clips), shared + random.normal(0, 0.5, clips), names)

    yield Interval("paired difference of means", difference, 0.3)

    def difference_of_ratios(random: Random, deviation: float) -> Estimate:
        real = tailed(random)
        more, less = (level * real * tailed(random, deviation) for level in (1.2, 1.0))
        return paired_difference(more, less, names, real)

    yield Interval("paired difference of ratios, deviation 0.25", lambda r: difference_of_ratios(r, 0.25), 0.2)
    yield Interval("paired difference of ratios, deviation 0.5", lambda r: difference_of_ratios(r, 0.5), 0.2)

    def scores(random: Random, scale: float, truth_ND: Values, mean_ND: Values) -> Values:
        """Energy scores from two samples that are spread about the right mean."""
        a, b = (mean_ND + scale * random.normal(size=mean_ND.shape) for _ in range(2))
        to_truth = np.stack([np.linalg.norm(x - truth_ND, axis=1) for x in (a, b)], axis=1)
        return energy_score(to_truth, np.linalg.norm(a - b, axis=1))

    def drawn(random: Random) -> tuple[Values, Values]:
        mean = random.normal(size=(clips, 3)) * tailed(random)[:, None]
        return mean + random.normal(size=mean.shape), mean

    # E|Z| of a Gaussian in three dimensions with deviation s is s 2 sqrt(2 / pi).
    norm = 2 * np.sqrt(2 / pi)
    right, wide = norm * np.sqrt(2) / 2, norm * (np.sqrt(1 + 2.25) - 1.5 * np.sqrt(2) / 2)

    def energy(random: Random) -> Estimate:
        return mean_over_clips(scores(random, 1.0, *drawn(random)), names)

    def energy_difference(random: Random) -> Estimate:
        truth, mean = drawn(random)
        return paired_difference(scores(random, 1.5, truth, mean), scores(random, 1.0, truth, mean), names)

    yield Interval("energy score", energy, right)
    yield Interval("paired difference of energy scores", energy_difference, wide - right)

    def per_clip(score: Values, magnitude: Values) -> PerClip:
        return PerClip("", tuple(names), {ENERGY_SCORE: score, MAGNITUDE: magnitude})

    def against(random: Random, motion: float, other: float) -> tuple[Estimate, Estimate]:
        shared, real = hard(random), tailed(random)
        model, best, still = (
            per_clip(level + shared + random.normal(0, 0.2, clips), ratio * real * tailed(random, 0.25))
            for level, ratio in ((1.05, motion), (1.0, other), (2.0, 0.0))
        )
        found = champion.compare("", model, best, still, real, ENERGY_SCORE, items, 2000)
        assert found.lost_gain is not None and found.motion_error is not None
        return found.lost_gain, found.motion_error

    yield Interval("share lost of the champion's gain", lambda r: against(r, 1, 1)[0], 0.05)
    far = abs(np.log(1.4)) - abs(np.log(1.2))
    yield Interval("error in motion minus the champion's, both move too much", lambda r: against(r, 1.4, 1.2)[1], far)
    across = abs(np.log(0.8)) - abs(np.log(1.2))
    yield Interval("error in motion minus the champion's, one on each side", lambda r: against(r, 0.8, 1.2)[1], across)
    yield Interval("error in motion minus the champion's, both right", lambda r: against(r, 1.0, 1.0)[1], 0.0)

    def of_categories(random: Random) -> Estimate:
        parts = np.array_split(random.normal(size=clips), 4)
        return together(
            [mean_over_clips(part, [str(i) for i in range(len(part))]) for part in parts], [len(part) for part in parts]
        )

    yield Interval("mean of four categories", of_categories, 0.0)

    deviation = np.arange(1, WIDTH + 1) ** -0.5

    def sets(random: Random, count: int) -> tuple[Values, Values, Values]:
        """Real features, and those of two systems whose clips correlate 0.8 with the real ones."""
        real = random.normal(size=(count, WIDTH))
        near, far = (0.8 * real + 0.6 * random.normal(size=real.shape) for _ in range(2))
        return real * deviation, (near + 0.25) * deviation, (1.1 * far + 0.3) * deviation

    def frechet(random: Random) -> Estimate:
        real, near, far = (FeatureSet.of(rows, names) for rows in sets(random, clips))
        return paired_frechet_difference(frechet_to_real(far, real), frechet_to_real(near, real), names)

    yield Interval(f"paired difference of Frechet distances, {WIDTH} features", frechet, None)

    many = [str(i) for i in range(ENDLESS_CLIPS)]

    def endless(random: Random) -> Estimate:
        real, near, _ = (FeatureSet.of(rows, many) for rows in sets(random, ENDLESS_CLIPS))
        distance = frechet_to_real(near, real)
        reach = 1.96 * distance.sd
        return Estimate(distance.infinity, distance.infinity - reach, distance.infinity + reach)

    shift = float(0.25**2 * (deviation**2).sum())  # the covariances are equal
    yield Interval(f"endless clips of {ENDLESS_CLIPS}, {WIDTH} features", endless, shift)
    for seeds in (1, 3, 5):
        for what, (seed_sd, clip_sd, rest_sd) in {
            "seeds only": (1.0, 0.0, 0.1),
            "all alike": (1.0, 1.0, 1.0),
            "clips three times seeds": (1.0, 3.0, 1.0),
            "clips only": (0.0, 1.0, 0.1),
        }.items():
            if seeds == 1 and seed_sd:
                continue  # one seed says nothing of another

            def crossed(
                random: Random, seeds: int = seeds, sd: tuple[float, float, float] = (seed_sd, clip_sd, rest_sd)
            ) -> Estimate:
                values = sd[0] * random.normal(size=(seeds, 1)) + sd[1] * random.normal(size=(1, clips))
                return two_way_mean(values + sd[2] * random.normal(size=(seeds, clips)), names)

            yield Interval(f"ablation, {seeds} seed{'s' if seeds > 1 else ''}, {what}", crossed, 0.0)


def coverage(interval: Interval, trials: int, seed: int = 0) -> float:
    """The share of the trials in which the interval contains the true value."""
    estimates = [interval.make(np.random.default_rng([seed, trial])) for trial in range(trials)]
    truth = float(np.mean([e.value for e in estimates])) if interval.truth is None else interval.truth
    ends = [(e.ci_low, e.ci_high) for e in estimates]
    return sum(low is not None and high is not None and low <= truth <= high for low, high in ends) / trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=40)
    given = parser.parse_args()
    error = 196 * (0.95 * 0.05 / given.trials) ** 0.5
    print(f"{given.trials} trials of {given.clips} clips; the error of a share is +-{error:.1f} %\n")
    print("| interval | covers | in 93 to 97 % |\n|---|---|---|")
    for interval in intervals(given.clips):
        share = coverage(interval, given.trials)
        within = "yes" if BOUNDS[0] <= share <= BOUNDS[1] else "no"
        print(f"| {interval.name} | {100 * share:.1f} % | {within} |", flush=True)


if __name__ == "__main__":
    main()
