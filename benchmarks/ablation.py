"""The planned ablation: the arms of Table 6 and ours, from bases that never saw an image condition.

    python -m benchmarks.ablation --base noise=examples/ablation_bases/noise
    python -m benchmarks.ablation --base velocity=examples/ablation_bases/velocity
    python -m benchmarks.ablation --report

docs/decisions/ablation-plan.md is the plan. Unlike `flows ablate` it needs no data set, no Ray and no registry, and
measures errors by time step along one training. Each arm first chooses its learning rate (and TRIP^W its weights) by
short trainings under a seed that no arm has, on clips that no table contains; then every seed trains every arm from
every base. Learning rates are constant, so one training gives all budgets of its curve. Each training is a file of
`--out`: the same command continues with those that are missing, and one process for each base can run beside the other.
`--pack FILE` joins the files, with one value for each clip, and `--unpack FILE` writes them again, to continue
elsewhere; `--report` prints the tables of `--out`, `--read FILE` those of a packed file, and `--summary` with either of
them the tables of docs/decisions/ablation.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flows.recipes import demo
from tasks.evaluate.closed_form import ClosedForm
from tasks.evaluate.report.ablation import two_way_mean
from tasks.ingest.drawing import Style, draw_frame, draw_scene
from tasks.metrics.energy import distances_to_truth, energy_score, spread
from tasks.metrics.pixels import motion_magnitude
from tasks.metrics.statistics import holm, p_value
from tasks.train.optimizer import MovingAverage, learning_rate_factor, make_optimizer, trained_weights
from tasks.train.spec import TrainSpec
from trip_model.config import FusionConfig, ObjectiveConfig
from trip_model.encoders import decode_latents, encode_pixels, load_text_encoder, load_vae
from trip_model.model import Trip, base_unet_output, measure_residual_std
from trip_model.objective import addressed_generator, draw, training_loss
from trip_model.sampler import sample_latents

Values = NDArray[np.float64]

TEXTURED = Style(ground_texture=0.1, shape_texture=0.1)
# Title, values of each clip [N] by arm and seed, and the clips.
Column = tuple[str, dict[str, dict[int, Values]], list[str]]

STRATA = {"plain": Style(), "textured": TEXTURED, "open motion": replace(TEXTURED, motion_in_caption=False)}
TRAINING, CHOOSING, HELD_OUT = range(2_000_000, 2_000_600), range(2_900_000, 2_900_066), range(3_000_000, 3_000_132)
BUDGETS = (0, 50, 200)
CHOICE_STEPS, CHOICE_SEED = 50, 1000
BANDS, SAMPLES, SAMPLING_STEPS = 5, 2, 10
SAMPLED = (("energy", "energy score"), ("still_psnr", "PSNR of the still part, dB"), ("motion", "motion ratio"))
REFERENCE, VAE, STILL = "TRIP", "VAE round trip", "still photo"
NOISE, NO_NETWORK = "photo and noise", "prior without a 3D-UNet"
# Systems without training: what the VAE allows, and what a score gives without knowledge of the motion.
REFERENCES = VAE, STILL, NOISE, NO_NETWORK
DEMO = replace(demo().train, learning_rate_unet=7e-4)  # the rate of the demo when the plan was written
_TNF = FusionConfig(width=DEMO.model.fusion.width, heads=DEMO.model.fusion.heads)
ARMS = {
    "TRIP^-": replace(_TNF, kind="none"),
    REFERENCE: _TNF,
    "closed form": replace(_TNF, kind="closed", prediction="shrinkage"),
    "TRIP, shrinkage": replace(_TNF, prediction="shrinkage"),
    "TRIP^W": replace(_TNF, kind="linear"),
}
FIRST = ("TRIP^-", REFERENCE, "closed form", "TRIP, shrinkage")  # what the first claims need
RATES = (1.0, 3.0)
LAMBDAS = ((1.0, 0.5), (0.2, 0.0), (0.05, 0.0))


class Clips:
    """Final latents [N, C, F, h, w], text features, pixels [N, F, H, W, 3] and the mask of still pixels [N, H, W]."""

    def __init__(self, base: str, scenes: Sequence[int]) -> None:
        vae: Any = load_vae(base)
        text = load_text_encoder(base)
        model = DEMO.model
        styles = list(STRATA.values())
        drawn = [draw_scene(seed, styles[i % len(styles)]) for i, seed in enumerate(scenes)]
        times = [k / model.fps for k in range(model.num_frames)]
        self.pixels = np.stack([[draw_frame(scene, time, model.size) for time in times] for scene in drawn])
        self.still = (self.pixels == self.pixels[:, :1]).all(axis=(1, 4))  # the camera stands still: exactly equal
        raw = torch.stack([encode_pixels(vae, clip) for clip in self.pixels])
        self.z_0 = raw.permute(0, 2, 1, 3, 4) * float(vae.config.scaling_factor)
        self.text = torch.cat([text.encode(text.tokenize([scene.caption])) for scene in drawn])
        self.empty = text.encode(text.tokenize([""]))
        self.vae = vae


@torch.no_grad()
def errors(trip: Trip, clips: Clips) -> tuple[Values, Values]:
    """The mean squared error of the noise and of z_0 by band and clip, both [BANDS, N]; the same noise every time."""
    count, steps_T = len(clips.z_0), trip.config.schedule.num_train_timesteps
    noise_errors, z0_errors = [], []
    for band in range(BANDS):
        t_N = ((band + (torch.arange(count) + 0.5) / count) / BANDS * steps_T).long()
        rows = []
        for part in torch.arange(count).split(16):
            z_0, t_B = clips.z_0[part], t_N[part]
            noise = torch.stack(
                [torch.randn(z_0.shape[1:], generator=addressed_generator("pilot", 0, band, int(i))) for i in part]
            )
            predicted = trip(trip.schedule.add_noise(z_0, noise, t_B), z_0[:, :, :1], t_B, clips.text[part])
            rows.append((predicted - noise).square().mean(dim=(1, 2, 3, 4)))
        error_N = torch.cat(rows)
        signal, sigma = trip.schedule.signal_and_noise(t_N, 1)
        noise_errors.append(error_N.numpy())
        z0_errors.append((error_N * (sigma / signal).square()).numpy())
    return np.stack(noise_errors), np.stack(z0_errors)


@torch.no_grad()
def sampled(trip: Trip, clips: Clips) -> dict[str, Values]:
    """Samples each clip twice and returns their scores."""
    count, shape = len(clips.z_0), clips.z_0.shape[1:]
    made: list[list[Any]] = [[] for _ in range(count)]
    for sample in range(SAMPLES):
        for part in torch.arange(count).split(16):
            noise = torch.stack(
                [torch.randn(shape, generator=addressed_generator("ablation", sample, int(i))) for i in part]
            )
            z = sample_latents(trip, clips.z_0[part, :, :1], clips.text[part], clips.empty, noise, SAMPLING_STEPS, 1.0)
            for i, latents in zip(part.tolist(), z, strict=True):
                made[i].append(decode_latents(clips.vae, latents.permute(1, 0, 2, 3)))
    return scores(made, clips)


def round_trip(clips: Clips) -> dict[str, Values]:
    """The same scores of the true latents, decoded: what the VAE allows."""
    return scores([[decode_latents(clips.vae, z.permute(1, 0, 2, 3))] * SAMPLES for z in clips.z_0], clips)


def still(clips: Clips) -> dict[str, Values]:
    """The same scores of the photo, through the VAE, in every frame: what a system gets that does nothing."""
    first = [decode_latents(clips.vae, z[:, :1].permute(1, 0, 2, 3)) for z in clips.z_0]
    frames = clips.pixels.shape[1]
    return scores([[photo.repeat(frames, axis=0)] * SAMPLES for photo in first], clips)


def photo_and_noise(clips: Clips) -> dict[str, Values]:
    """The same scores of the photo with a fixed pattern of white noise, of the true clips' deviation in each frame."""
    photo = clips.pixels[:, :1].astype(float)
    deviation_F = np.sqrt(((clips.pixels - photo) ** 2).mean(axis=(0, 2, 3, 4)))
    made = []
    for i in range(len(photo)):
        patterns = [np.random.default_rng([7, i, sample]).normal(size=photo[i].shape) for sample in range(SAMPLES)]
        noisy = [photo[i] + deviation_F[:, None, None, None] * pattern for pattern in patterns]
        made.append([frames.clip(0, 255).round().astype(np.uint8) for frames in noisy])
    return scores(made, clips)


def no_network(trained_on: Clips, clips: Clips, unet_output: Any) -> dict[str, Values]:
    """The same scores of the closed form with a residual of 0: the prior, weighted by time step and frame."""
    std = measure_residual_std(trained_on.z_0)
    config = replace(DEMO.model, fusion=ARMS["closed form"], unet_output=unet_output, residual_std=std)
    model: Any = ClosedForm(config)
    return sampled(model, clips)


def scores(made: Sequence[Sequence[Any]], clips: Clips) -> dict[str, Values]:
    """Energy score, motion ratio and PSNR of the still part of each item's clips, each [N]."""
    truth = clips.pixels
    to_truth = np.array([distances_to_truth(samples, true) for samples, true in zip(made, truth, strict=True)])
    first = [samples[0] for samples in made]
    return {
        "energy": energy_score(to_truth, np.array([spread(samples) for samples in made])),
        "motion": np.array([motion_magnitude(m) / motion_magnitude(p) for m, p in zip(first, truth, strict=True)]),
        "still_psnr": np.array([still_psnr(m, p, s) for m, p, s in zip(first, truth, clips.still, strict=True)]),
    }


def still_psnr(clip: NDArray[np.uint8], truth: NDArray[np.uint8], still_HW: NDArray[np.bool_]) -> float:
    """PSNR in dB of the last frame to the photo where the true clip never changes."""
    error = clip[-1, still_HW].astype(float) - truth[0, still_HW]
    return float(10 * np.log10(255**2 / max(np.mean(error**2), 1e-3)))


def train(
    base: str, fusion: FusionConfig, rate: float, seed: int, clips: Clips, held_out: Clips, budgets: Sequence[int]
) -> tuple[Trip, MovingAverage, dict[str, Values]]:
    """One training of one arm: the model, its averaged weights, and the errors after each budget."""
    config = replace(
        DEMO.model, fusion=fusion, unet_output=base_unet_output(base), residual_std=measure_residual_std(clips.z_0)
    )
    torch.manual_seed(seed)
    trip = Trip.from_base(base, config).train()
    spec: TrainSpec = replace(
        DEMO,
        model=config,
        cosine=False,
        learning_rate_unet=rate * DEMO.learning_rate_unet,
        learning_rate_fusion=rate * DEMO.learning_rate_fusion,
    )
    optimizer, weights = make_optimizer(trip, spec), trained_weights(trip)
    average = MovingAverage(weights, spec.average_decay)
    curve: list[tuple[Values, Values]] = []

    def measure() -> None:
        trip.eval()
        with average.applied():
            curve.append(errors(trip, held_out))
        trip.train()

    count = len(clips.z_0)
    for step in range(budgets[-1]):
        if step in budgets:
            measure()
        shuffled = torch.randperm(count, generator=addressed_generator("ablation order", seed, step))
        order = shuffled[: spec.global_batch]
        times = config.schedule.num_train_timesteps
        drawn = draw(seed, step, range(spec.global_batch), spec.global_batch, clips.z_0.shape[1:], times, 0.0)
        loss, _ = training_loss(trip, clips.z_0[order], clips.text[order], clips.empty, drawn, ObjectiveConfig())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), spec.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(step, spec)
        optimizer.step()
        average.update(step)
    measure()
    noise, z0 = (np.stack([step[i] for step in curve]) for i in (0, 1))
    return trip.eval(), average, {"noise_error": noise, "z0_error": z0}


def candidates(arm: str) -> list[tuple[FusionConfig, float]]:
    """The settings among which an arm chooses: learning rates, and weights of Equation 9 for TRIP^W."""
    fusion = ARMS[arm]
    if fusion.kind == "linear":
        return [(replace(fusion, lambda_first=first, lambda_last=last), 1.0) for first, last in LAMBDAS]
    return [(fusion, rate) for rate in RATES]


class Study:
    """The files of one ablation in a folder."""

    def __init__(self, out: Path, bases: dict[str, str]) -> None:
        self.out, self.bases = out, bases
        self._clips: dict[tuple[str, range], Clips] = {}
        out.mkdir(parents=True, exist_ok=True)

    def clips(self, base: str, scenes: range) -> Clips:
        if (base, scenes) not in self._clips:  # two bases have two text encoders
            self._clips[base, scenes] = Clips(self.bases[base], scenes)
        return self._clips[base, scenes]

    def file(self, *name: Any) -> Path:
        return self.out / ("_".join(str(part).replace(" ", "-") for part in name) + ".npz")

    def save(self, file: Path, values: dict[str, Values]) -> None:
        part = file.with_suffix(".part.npz")
        np.savez_compressed(part, **{name: v.astype(np.float32) for name, v in values.items()})  # pyright: ignore[reportArgumentType]
        part.replace(file)

    def choose(self, base: str, arm: str, choice: int) -> None:
        """One short training of one candidate; its error of Equation 10 is saved."""
        fusion, rate = candidates(arm)[choice]
        clips, unseen = self.clips(base, TRAINING), self.clips(base, CHOOSING)
        _, _, values = train(self.bases[base], fusion, rate, CHOICE_SEED, clips, unseen, (CHOICE_STEPS,))
        self.save(self.file("choice", base, arm, choice), {"noise_error": values["noise_error"]})
        print(f"choice: {base}, {arm}, candidate {choice}: {values['noise_error'].mean():.4f}", flush=True)

    def best(self, base: str, arm: str) -> int:
        """The candidate of least error. Raises FileNotFoundError where a candidate has not been trained."""
        scores = [
            float(np.load(self.file("choice", base, arm, i))["noise_error"].mean()) for i in range(len(candidates(arm)))
        ]
        return int(np.argmin(scores))

    def run(self, base: str, arm: str, seed: int) -> None:
        """One training of one arm under one seed, with everything the tables need."""
        fusion, rate = candidates(arm)[self.best(base, arm)]
        clips, held_out = self.clips(base, TRAINING), self.clips(base, HELD_OUT)
        trip, average, values = train(self.bases[base], fusion, rate, seed, clips, held_out, BUDGETS)
        with average.applied():
            values |= sampled(trip, held_out)
        self.save(self.file(base, arm, seed), values)
        curve = np.round(values["noise_error"].mean(axis=(1, 2)), 4)
        print(f"{base}, {arm}, seed {seed}: {curve}, energy {values['energy'].mean():.4f}", flush=True)

    def work(self, seeds: int) -> None:
        """Trains what is missing: all choices, then the arms of the first claim seed by seed, then the others."""
        for base, arm in itertools.product(self.bases, ARMS):
            for choice in range(len(candidates(arm))):
                if not self.file("choice", base, arm, choice).is_file():
                    self.choose(base, arm, choice)
        for base, (row, score) in itertools.product(
            self.bases, {VAE: round_trip, STILL: still, NOISE: photo_and_noise}.items()
        ):
            if not self.file(base, row, 0).is_file():
                self.save(self.file(base, row, 0), score(self.clips(base, HELD_OUT)))
        for base, folder in self.bases.items():
            if not self.file(base, NO_NETWORK, 0).is_file():
                trained_on, held_out = self.clips(base, TRAINING), self.clips(base, HELD_OUT)
                self.save(self.file(base, NO_NETWORK, 0), no_network(trained_on, held_out, base_unet_output(folder)))
        rest = [arm for arm in ARMS if arm not in FIRST]
        order = [
            *itertools.product(range(seeds), self.bases, FIRST),
            *itertools.product(range(seeds), self.bases, rest),
        ]
        for seed, base, arm in order:
            if not self.file(base, arm, seed).is_file():
                self.run(base, arm, seed)

    def unpack(self, packed: Path) -> None:
        """Writes the files of a packed file, so that a study continues on another machine."""
        by_file: dict[str, dict[str, Values]] = {}
        for key, values in np.load(packed).items():
            stem, name = key.rsplit("/", 1)
            by_file.setdefault(stem, {})[name] = values
        for stem, arrays in by_file.items():
            self.save(self.out / f"{stem}.npz", arrays)

    def read(self) -> dict[str, Values]:
        """All arrays of the folder by `FILE/ARRAY`."""
        files = sorted(file for file in self.out.glob("*.npz") if not file.name.endswith(".part.npz"))
        return {f"{file.stem}/{name}": values for file in files for name, values in np.load(file).items()}


def _runs(arrays: dict[str, Values], base: str, arm: str, name: str) -> dict[int, Values]:
    """The values of one array by seed."""
    start, end = f"{base}_{arm.replace(' ', '-')}_", f"/{name}"
    found = {key.removeprefix(start).removesuffix(end): v for key, v in arrays.items() if key.startswith(start)}
    return {int(seed): values.astype(float) for seed, values in found.items() if seed.isdigit()}


def tables(arrays: dict[str, Values]) -> Iterator[str]:
    """Markdown tables of the arrays: for each base the curves, then the sampled clips, with differences to TRIP."""
    strata = np.arange(len(HELD_OUT)) % len(STRATA)
    every = np.ones(len(HELD_OUT), bool)
    for base in sorted({key.split("_")[0] for key in arrays} - {"choice"}):
        yield f"\n### Base {base}\n"
        yield f"Settings: {_settings(arrays, base)}.\n"

        def column(
            name: str, about: str, at: tuple[int, ...] = (), clips: NDArray[np.bool_] = every, base: str = base
        ) -> Column:
            """Values [N] by arm and seed; the axes before the clips are indexed by `at`, the rest of them averaged."""
            by_arm = {
                arm: {
                    s: v[at].reshape(-1, len(HELD_OUT)).mean(0)[clips]
                    for s, v in _runs(arrays, base, arm, name).items()
                }
                for arm in (*ARMS, *REFERENCES)
            }
            return about, by_arm, [str(seed) for seed, kept in zip(HELD_OUT, clips, strict=True) if kept]

        yield from _table(
            [
                column(name, f"{about}, {budget} steps", (i,))
                for name, about in (("noise_error", "noise error"), ("z0_error", "z_0 error"))
                for i, budget in enumerate(BUDGETS)
            ]
        )
        yield f"\nAfter {BUDGETS[-1]} steps, noise error by band of t:\n"
        yield from _table([column("noise_error", f"t {200 * k} to {200 * k + 199}", (-1, k)) for k in range(BANDS)])
        for name, about in SAMPLED:
            yield f"\nAfter {BUDGETS[-1]} steps, {about}, by stratum:\n"
            parts = [column(name, stratum, (), strata == i) for i, stratum in enumerate(STRATA)]
            yield from _table([column(name, "all"), *parts])


# The columns of the summary: name of the array, title, format of a value, and the index of its axes before the clips.
SUMMARY = (
    ("noise_error", "noise error", ".4f", (-1,)),
    ("z0_error", "z_0 error", ".3f", (-1,)),
    ("energy", "energy score", ".4f", ()),
    ("still_psnr", "still part, dB to the photo", ".1f", ()),
    ("motion", "motion ratio", ".2f", ()),
)


def summary(arrays: dict[str, Values]) -> Iterator[str]:
    """The tables of docs/decisions/ablation.md: means with the difference to TRIP, curves, strata, and TRIP^-."""
    bases = sorted({key.split("_")[0] for key in arrays} - {"choice"})
    clips = [str(seed) for seed in HELD_OUT]
    rows = (*ARMS, *REFERENCES)

    def by_seed(base: str, row: str, name: str, at: tuple[int, ...] = ()) -> dict[int, Values]:
        """Values [N] by seed; the axes before the clips are indexed by `at`, the rest of them averaged."""
        return {s: v[at].reshape(-1, len(clips)).mean(0) for s, v in _runs(arrays, base, row, name).items()}

    def mean(values: dict[int, Values], form: str) -> str:
        return format(float(np.mean(list(values.values()))), form) if values else ""

    def minus(values: dict[int, Values], other: dict[int, Values], form: str) -> tuple[str, str]:
        """The mean of the difference, paired by clip and seed, and its interval."""
        shared = sorted(values.keys() & other.keys())
        own = two_way_mean(np.stack([values[s] - other[s] for s in shared]), clips)
        return format(own.value, "+" + form), f"{own.ci_low:+{form}} to {own.ci_high:+{form}}"

    for base in bases:
        yield from (f"Base `{base}`:", "")
        yield "| arm | seeds | " + " | ".join(title for _, title, _, _ in SUMMARY) + " |"
        yield "|---|---|" + "---|" * len(SUMMARY)
        for row in rows:
            cells = []
            for name, _, form, at in SUMMARY:
                values = by_seed(base, row, name, at)
                cell = mean(values, form)
                if values and row in ARMS and row != REFERENCE:
                    cell += " ({}: {})".format(*minus(values, by_seed(base, REFERENCE, name, at), form))
                cells.append(cell)
            seeds = len(_runs(arrays, base, row, "energy"))
            if seeds:
                yield f"| {row} | {seeds} | " + " | ".join(cells) + " |"
        yield ""
    yield "| base | arm | " + " | ".join(f"{budget} steps" for budget in BUDGETS) + " |"
    yield "|---|---|" + "---|" * len(BUDGETS)
    for base, row in itertools.product(bases, ARMS):
        cells = [mean(by_seed(base, row, "noise_error", (i,)), ".4f") for i in range(len(BUDGETS))]
        if all(cells):
            yield f"| {base} | {row} | " + " | ".join(cells) + " |"
    yield ""
    strata = np.arange(len(clips)) % len(STRATA)
    yield "| base | arm | " + " | ".join(STRATA) + " |"
    yield "|---|---|" + "---|" * len(STRATA)
    for base, row in itertools.product(bases, rows):
        values = by_seed(base, row, "still_psnr")
        if values:
            parts = [mean({s: v[strata == i] for s, v in values.items()}, ".1f") for i in range(len(STRATA))]
            yield f"| {base} | {row} | " + " | ".join(parts) + " |"
    yield ""
    compared = [column for column in SUMMARY if column[0] != "motion"]
    yield "| minus TRIP^- | base | " + " | ".join(title for _, title, _, _ in compared) + " |"
    yield "|---|---|" + "---|" * len(compared)
    cells = {
        (base, row): "" for row, base in itertools.product(list(ARMS)[1:], bases) if _runs(arrays, base, row, "energy")
    }
    for base, (name, _, form, at) in itertools.product(bases, compared):
        own = {row: by_seed(base, row, name, at) for one, row in cells if one == base}
        other = by_seed(base, "TRIP^-", name, at)
        stacked = [np.stack([v[s] - other[s] for s in sorted(v.keys() & other.keys())]) for v in own.values()]
        raw = [p_value(lambda level, v=minus_SC: two_way_mean(v, clips, level)) for minus_SC in stacked]
        for (row, values), p in zip(own.items(), holm(raw), strict=True):
            cells[base, row] += " {} ({}), p {:.3f} |".format(*minus(values, other, form), p)
    for (base, row), line in cells.items():
        yield f"| {row} | `{base}` |{line}"


def _settings(arrays: dict[str, Values], base: str) -> str:
    chosen = []
    for arm in ARMS:
        scores = [
            float(arrays[key].mean())
            for i in range(len(candidates(arm)))
            if (key := f"choice_{base}_{arm.replace(' ', '-')}_{i}/noise_error") in arrays
        ]
        fusion, rate = candidates(arm)[int(np.argmin(scores))]
        weights = (
            f"lambda {fusion.lambda_first:g} to {fusion.lambda_last:g}"
            if fusion.kind == "linear"
            else f"rate x {rate:g}"
        )
        chosen.append(f"{arm} {weights}")
    return ", ".join(chosen)


def _table(columns: list[Column]) -> Iterator[str]:
    """A row for each arm: its mean over seeds, the difference to TRIP with interval, and p adjusted by Holm."""
    yield "| arm | seeds | " + " | ".join(title for title, *_ in columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    present = [arm for arm in (*ARMS, *REFERENCES) if columns[0][1][arm]]
    cells: dict[str, list[str]] = {arm: [str(len(columns[0][1][arm]))] for arm in present}
    for _, values, clips in columns:
        minus = {
            arm: np.stack(
                [values[arm][s] - values[REFERENCE][s] for s in sorted(values[arm]) if s in values[REFERENCE]]
            )
            for arm in present
            if arm not in (REFERENCE, *REFERENCES) and set(values[arm]) & set(values[REFERENCE])
        }
        raw = [p_value(lambda level, v=minus_SC, c=clips: two_way_mean(v, c, level)) for minus_SC in minus.values()]
        adjusted = dict(zip(minus, holm(raw), strict=True))
        for arm in present:
            cell = f"{np.mean(list(values[arm].values())):.4g}"
            if arm in minus:
                own = two_way_mean(minus[arm], clips)
                cell += f"; {own.value:+.3g} ({own.ci_low:+.3g} to {own.ci_high:+.3g}), p {adjusted[arm]:.3f}"
            cells[arm].append(cell)
    for arm in present:
        yield f"| {arm} | " + " | ".join(cells[arm]) + " |"


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    study = Study(arguments.out, dict(text.split("=", 1) for text in arguments.base))
    if arguments.unpack is not None:
        study.unpack(arguments.unpack)
    if arguments.base and not (arguments.report or arguments.pack or arguments.read):
        study.work(arguments.seeds)
    arrays = study.read() if arguments.read is None else dict(np.load(arguments.read))
    if arguments.pack is not None:
        np.savez_compressed(arguments.pack, **arrays)  # pyright: ignore[reportArgumentType]
    for line in summary(arrays) if arguments.summary else tables(arrays):
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", default=[], help="NAME=FOLDER, once for each base")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--summary", action="store_true", help="print the tables of docs/decisions/ablation.md")
    parser.add_argument("--read", type=Path, help="print the tables of this packed file")
    parser.add_argument("--unpack", type=Path, help="first write the files of this packed file into --out")
    parser.add_argument("--pack", type=Path, help="train nothing; write all arrays into this file")
    main(parser.parse_args())
