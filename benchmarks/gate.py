"""How often the gate passes samplers of known quality, on stationary textures whose motion chance decides.

    python -m benchmarks.gate [--runs 200] [--clips 40] [--correlations 0.5 0.8 0.9 0.97 0.99]

A texture is a blurred Gaussian field; frame t + 1 is r times frame t plus fresh noise of deviation sqrt(1 - r^2), so
every frame has the same law and frame 1 says less and less of what follows. Given frame 1 the law of the clip is known,
and with it a perfect sampler. Every system gives two clips of each item in uint8; scores, intervals and the gate are
those of a report. The champion is a perfect sampler with other seeds. Systems:

    perfect       the conditional law of the clip
    still         frame 1, repeated
    mean          the conditional mean, r^(t-1) times frame 1
    amplitude     0.9-worse: the perfect sampler's change from frame to frame, times 0.9
    correlation   0.9-worse: the perfect sampler of a texture of correlation 0.9 r
    stuck         0.9-worse: the perfect sampler, but every tenth clip is a still
    snow          white noise of the texture's law in time, instead of the texture
    pattern       frame 1 with one fixed pattern of noise on all later frames, with half of the texture's deviation
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.evaluate import champion
from tasks.evaluate.champion import MAGNITUDE, PerClip
from tasks.evaluate.gate import CLIP_DISTANCE, ENERGY_SCORE, Evidence, Gate, gate
from tasks.evaluate.protocol.protocol import Item
from tasks.metrics.energy import energy_score
from tasks.metrics.statistics import mean_over_clips, ratio_of_sums

FRAMES, SIDE, BLUR = 16, 16, 1.5  # the side and the deviation of the blur are in pixels
GREY, CONTRAST = 128, 30
CORRELATIONS = (0.5, 0.8, 0.9, 0.97, 0.99)
WORSE = ("amplitude", "correlation", "stuck")
NOISE = ("snow", "pattern")
SYSTEMS = ("perfect", "still", "mean", *WORSE, *NOISE)
RESAMPLES = 1000
FIRST, COARSE = "magnitude_of_first", "coarse_magnitude"

Field = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def _kernel() -> Field:
    """The blur in the frequency domain, scaled so that a blurred field has deviation 1."""
    frequency = np.fft.fftfreq(SIDE)
    gain = np.exp(-2 * (np.pi * BLUR) ** 2 * (frequency[:, None] ** 2 + frequency[None] ** 2))
    return (gain / np.sqrt((gain**2).mean())).astype(np.float32)


GAIN = _kernel()


def fields(random: np.random.Generator, *count: int) -> Field:
    """Blurred Gaussian fields of deviation 1: [.., SIDE, SIDE, 3]."""
    return np.fft.irfft2(
        np.fft.rfft2(white(random, *count), axes=(-3, -2)) * GAIN[:, : SIDE // 2 + 1, None], axes=(-3, -2)
    )


def white(random: np.random.Generator, *count: int) -> Field:
    """White noise of deviation 1: [.., SIDE, SIDE, 3]."""
    return random.standard_normal((*count, SIDE, SIDE, 3), dtype=np.float32)


def textures(
    random: np.random.Generator,
    first_NHWC: Field,
    correlation: float,
    law: Callable[..., Field] = fields,
) -> Field:
    """Clips [N, FRAMES, SIDE, SIDE, 3] that start with these fields; with `law` fields they keep their law."""
    noise = law(random, len(first_NHWC), FRAMES - 1) * np.sqrt(1 - correlation**2)
    frames = [first_NHWC]
    for index in range(FRAMES - 1):
        frames.append(correlation * frames[-1] + noise[:, index])
    return np.stack(frames, axis=1)


def sample(system: str, random: np.random.Generator, first_NHWC: Field, correlation: float) -> Field:
    """One clip of a system for each item, given its first frame."""
    still = np.repeat(first_NHWC[:, None], FRAMES, axis=1)
    if system == "still":
        return still
    if system == "mean":
        return still * correlation ** np.arange(FRAMES)[:, None, None, None]
    if system == "snow":
        return textures(random, first_NHWC, correlation, white)
    if system == "pattern":
        still[:, 1:] += 0.5 * white(random, len(first_NHWC))[:, None]
        return still
    if system == "correlation":
        return textures(random, first_NHWC, 0.9 * correlation)
    clips = textures(random, first_NHWC, correlation)
    if system == "stuck":
        stuck = random.random(len(clips)) < 0.1
        clips[stuck] = still[stuck]
    return still + 0.9 * (clips - still) if system == "amplitude" else clips


def pixels(field: Field) -> Pixels:
    return np.clip(GREY + CONTRAST * field, 0, 255).round().astype(np.uint8)


def distances(a: Pixels, b: Pixels) -> Field:
    """`clip_distance` of all clips at once: [N]."""
    difference = a[:, 1:].astype(np.float32) - b[:, 1:]
    return np.sqrt(np.square(difference).mean(axis=(1, 2, 3, 4), dtype=np.float64)) / 255


def magnitudes(clips: Pixels) -> Field:
    """`motion_magnitude` of all clips at once: [N]."""
    return np.abs(np.diff(clips.astype(np.int16), axis=1)).mean(axis=(1, 2, 3, 4)) / 255


def coarse_magnitudes(clips: Pixels) -> Field:
    """`coarse_motion_magnitude` of all clips at once: [N]."""
    cells = clips.reshape(*clips.shape[:2], 4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(3, 5), dtype=np.float32)
    return np.abs(np.diff(cells, axis=1)).mean(axis=(1, 2, 3, 4), dtype=np.float64) / 255


def measured(name: str, first: Pixels, second: Pixels, real: Pixels, items: Sequence[Item]) -> PerClip:
    """What a report keeps of a system: its two samples of each item against the true clips."""
    to_truth = np.stack([distances(first, real), distances(second, real)], axis=1)
    values = {ENERGY_SCORE: energy_score(to_truth, distances(first, second)), CLIP_DISTANCE: to_truth[:, 0]}
    values |= {MAGNITUDE: (magnitudes(first) + magnitudes(second)) / 2}
    values |= {FIRST: magnitudes(first), COARSE: coarse_magnitudes(first)}
    return PerClip(name, tuple(item.key for item in items), values)


def run(random: np.random.Generator, correlation: float, clips: int, systems: Sequence[str]) -> dict[str, Gate]:
    """One evaluation of every system on the same items, against the same champion."""
    items = [Item(f"{i}_000", str(i), i, "a texture", i) for i in range(clips)]
    first = fields(random, clips)
    real = pixels(textures(random, first, correlation))

    def of(system: str) -> PerClip:
        one, other = (pixels(sample(system, random, first, correlation)) for _ in range(2))
        return measured(system, one, other, real, items)

    best, still = of("perfect"), of("still")
    moved, coarse, names = magnitudes(real), coarse_magnitudes(real), [item.clip for item in items]
    gates = {}
    for system in systems:
        model = of(system)
        against = champion.compare("the champion", model, best, still, moved, ENERGY_SCORE, items, RESAMPLES)
        minus = model.values[ENERGY_SCORE] - still.values[ENERGY_SCORE]
        gates[system] = gate(
            Evidence(
                clips,
                ratio_of_sums(model.values[FIRST], moved, names, RESAMPLES),
                ratio_of_sums(model.values[COARSE], coarse, names, RESAMPLES),
                champion.still_clips(model.values[COARSE], coarse, names),
                ENERGY_SCORE,
                mean_over_clips(minus, names, RESAMPLES),
                (against,),
            )
        )
    return gates


def passes(
    correlation: float, runs: int, clips: int = 40, systems: Sequence[str] = SYSTEMS, seed: int = 0
) -> tuple[dict[str, int], dict[str, Counter[str]]]:
    """In how many runs each system passes, and how often each rule was not met."""
    passed, failed = Counter[str](), {system: Counter[str]() for system in systems}
    for index in range(runs):
        random = np.random.default_rng([seed, round(1000 * correlation), index])
        for system, verdict in run(random, correlation, clips, systems).items():
            passed[system] += verdict.passed
            failed[system].update(rule.rule for rule in verdict.rules if not rule.passed)
    return dict(passed), failed


def main(log: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--correlations", type=float, nargs="+", default=CORRELATIONS)
    given = parser.parse_args()
    log(f"{given.runs} runs of {given.clips} clips; runs that pass, in percent\n")
    log("| correlation | " + " | ".join(SYSTEMS) + " |\n|" + "---|" * (1 + len(SYSTEMS)))
    rules: dict[str, Counter[str]] = {system: Counter() for system in SYSTEMS}
    for correlation in given.correlations:
        passed, failed = passes(correlation, given.runs, given.clips)
        for system, counts in failed.items():
            rules[system].update(counts)
        cells = [f"{100 * passed.get(system, 0) / given.runs:.1f}" for system in SYSTEMS]
        log(f"| {correlation:g} | " + " | ".join(cells) + " |")
    log("\nrules that were not met, in runs of all correlations:")
    for system, counts in rules.items():
        log(f"- {system}: " + ("; ".join(f"{rule} {count}" for rule, count in counts.most_common()) or "none"))


if __name__ == "__main__":
    main()
