"""The pilot of the planned ablation: learning curves of the arms from bases that never saw an image condition.

    python -m benchmarks.ablation_pilot --base noise=runs/bases/noise/weights \
        --base velocity=runs/bases/velocity/weights --out runs/pilot --seeds 3

docs/decisions/ablation-plan.md is the plan. The pilot has one stratum (the demo's plain scenes), constant learning
rates (so one training gives every budget of its curve) and no search of rates; it measures the first primary metric,
the error of the noise and of z_0 on held-out clips in five bands of t, and the distance of clips sampled after the last
step. Each training is a file of --out, so the same command goes on with those that are missing, and several processes
can share the work: --part 0/2 and --part 1/2. --report prints the tables of what exists.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows.recipes import demo
from tasks.evaluate.report.ablation import two_way_mean
from tasks.ingest.drawing import draw_frame, draw_scene
from tasks.metrics.pixels import clip_distance
from tasks.metrics.statistics import holm, p_value
from tasks.train.optimizer import MovingAverage, learning_rate_factor, make_optimizer, trained_weights
from trip_model.config import FusionConfig, ObjectiveConfig
from trip_model.encoders import decode_latents, encode_pixels, load_text_encoder, load_vae
from trip_model.model import Trip, base_unet_output, measure_residual_std
from trip_model.objective import addressed_generator, draw, training_loss
from trip_model.sampler import sample_latents

TRAINING, HELD_OUT = range(2_000_000, 2_000_600), range(3_000_000, 3_000_128)
BUDGETS = (0, 50, 100, 200, 400)
BANDS, SAMPLED = 5, 64
REFERENCE = "TRIP"
DEMO = demo().train
_TNF = FusionConfig(width=DEMO.model.fusion.width, heads=DEMO.model.fusion.heads)
ARMS = {
    "TRIP^-": replace(_TNF, kind="none"),
    REFERENCE: _TNF,
    "closed form": replace(_TNF, kind="closed", prediction="shrinkage"),
    "TRIP, shrinkage": replace(_TNF, prediction="shrinkage"),
}


class Clips:
    """Final latents [N, C, F, h, w], text features and pixels [N, F, H, W, 3] of drawn scenes."""

    def __init__(self, base: str, scenes: range) -> None:
        vae: Any = load_vae(base)
        text = load_text_encoder(base)
        drawn = [draw_scene(seed) for seed in scenes]
        model = DEMO.model
        times = [k / model.fps for k in range(model.num_frames)]
        self.pixels = np.stack([[draw_frame(scene, time, model.size) for time in times] for scene in drawn])
        raw = torch.stack([encode_pixels(vae, clip) for clip in self.pixels])
        self.z_0 = raw.permute(0, 2, 1, 3, 4) * float(vae.config.scaling_factor)
        self.text = torch.cat([text.encode(text.tokenize([scene.caption])) for scene in drawn])
        self.empty = text.encode(text.tokenize([""]))
        self.vae = vae


@torch.no_grad()
def errors(trip: Trip, clips: Clips) -> tuple[np.ndarray, np.ndarray]:
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
def distances(trip: Trip, clips: Clips) -> np.ndarray:
    """The distance to the true clip of one sampled clip for each of the first `SAMPLED` items."""
    values = []
    for part in torch.arange(SAMPLED).split(16):
        shape = clips.z_0.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=addressed_generator("pilot clip", 0, int(i))) for i in part])
        z = sample_latents(
            trip, clips.z_0[part, :, :1], clips.text[part], clips.empty, noise, DEMO.model.schedule.sampling_steps, 1.0
        )
        for i, latents in zip(part.tolist(), z, strict=True):
            frames = decode_latents(clips.vae, latents.permute(1, 0, 2, 3))
            values.append(clip_distance(frames, clips.pixels[i]))
    return np.array(values)


def train(base: str, fusion: FusionConfig, seed: int, clips: Clips, held_out: Clips) -> dict[str, np.ndarray]:
    """One training of one arm: errors after each budget and distances after the last."""
    std = measure_residual_std(clips.z_0)
    config = replace(DEMO.model, fusion=fusion, unet_output=base_unet_output(base), residual_std=std)
    torch.manual_seed(seed)
    trip = Trip.from_base(base, config).train()
    spec = replace(DEMO, model=config, cosine=False)
    optimizer, weights = make_optimizer(trip, spec), trained_weights(trip)
    average = MovingAverage(weights, spec.average_decay)
    curves: list[tuple[np.ndarray, np.ndarray]] = []

    def measure() -> None:
        trip.eval()
        with average.applied():
            curves.append(errors(trip, held_out))
        trip.train()

    for step in range(BUDGETS[-1]):
        if step in BUDGETS:
            measure()
        order = torch.randperm(len(clips.z_0), generator=addressed_generator("pilot order", seed, step))[
            : spec.global_batch
        ]
        drawn = draw(seed, step, range(spec.global_batch), spec.global_batch, clips.z_0.shape[1:], 1000, 0.0)
        loss, _ = training_loss(trip, clips.z_0[order], clips.text[order], clips.empty, drawn, ObjectiveConfig())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), spec.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(step, spec)
        optimizer.step()
        average.update(step)
    measure()
    with average.applied():
        sampled = distances(trip.eval(), held_out)
    noise, z0 = (np.stack([curve[i] for curve in curves]) for i in (0, 1))
    return {"noise_error": noise, "z0_error": z0, "distance": sampled}


def _file(out: Path, base: str, arm: str, seed: int) -> Path:
    return out / f"{base}_{arm.replace(' ', '-')}_{seed}.npz"


def tables(out: Path, bases: list[str], seeds: int) -> Iterator[str]:
    """Markdown tables of the trainings that exist: for each base, errors by budget and the paired differences."""
    clusters = [str(seed) for seed in HELD_OUT]
    for base in bases:
        read: dict[str, list[Any]] = {}
        for arm in ARMS:
            files = [_file(out, base, arm, seed) for seed in range(seeds)]
            read[arm] = [dict(np.load(file)) for file in files if file.is_file()]
        complete = min(len(runs) for runs in read.values())
        if not complete:
            yield f"base {base}: no seed has every arm yet"
            continue
        for name, about in (("noise_error", "of the noise"), ("z0_error", "of z_0")):
            yield f"\nBase {base}, mean squared error {about} on {len(clusters)} held-out clips, {complete} seeds\n"
            yield "| arm | " + " | ".join(f"{budget} steps" for budget in BUDGETS) + " |"
            yield "|---|" + "---|" * len(BUDGETS)
            for arm, runs in read.items():
                cells = []
                for i in range(len(BUDGETS)):
                    values_SC = np.stack([run[name][i].mean(axis=0) for run in runs[:complete]])
                    other_SC = np.stack([run[name][i].mean(axis=0) for run in read[REFERENCE][:complete]])
                    cell = f"{values_SC.mean():.4f}"
                    if arm != REFERENCE:
                        minus = two_way_mean(values_SC - other_SC, clusters)
                        cell += f", minus {REFERENCE} {minus.value:+.4f} ({minus.ci_low:+.4f} to {minus.ci_high:+.4f})"
                    cells.append(cell)
                yield f"| {arm} | " + " | ".join(cells) + " |"
        yield f"\nBase {base}, {BUDGETS[-1]} steps: error of the noise by band of t, and distance of sampled clips\n"
        yield "| arm | " + " | ".join(f"t {200 * b} to {200 * b + 199}" for b in range(BANDS)) + " | distance |"
        yield "|---|" + "---|" * (BANDS + 1)
        others = [arm for arm in ARMS if arm != REFERENCE]
        minus_by_arm = {
            arm: np.stack([run["distance"] for run in read[arm][:complete]])
            - np.stack([run["distance"] for run in read[REFERENCE][:complete]])
            for arm in others
        }
        own = [p_value(lambda level, v=minus_by_arm[arm]: two_way_mean(v, clusters[:SAMPLED], level)) for arm in others]
        adjusted = dict(zip(others, holm(own), strict=True))
        for arm, runs in read.items():
            bands = np.stack([run["noise_error"][-1].mean(axis=1) for run in runs[:complete]]).mean(axis=0)
            cell = f"{np.mean([run['distance'].mean() for run in runs[:complete]]):.4f}"
            if arm != REFERENCE:
                minus = two_way_mean(minus_by_arm[arm], clusters[:SAMPLED])
                cell += f", minus {REFERENCE} {minus.value:+.4f} ({minus.ci_low:+.4f} to {minus.ci_high:+.4f}),"
                cell += f" p = {adjusted[arm]:.3f} (Holm)"
            yield f"| {arm} | " + " | ".join(f"{value:.4f}" for value in bands) + f" | {cell} |"


def main(arguments: argparse.Namespace) -> None:
    bases = dict(text.split("=", 1) for text in arguments.base)
    arguments.out.mkdir(parents=True, exist_ok=True)
    part, parts = (int(number) for number in arguments.part.split("/"))
    wanted = [(base, arm, seed) for seed in range(arguments.seeds) for base in bases for arm in ARMS]
    mine = [(b, a, s) for b, a, s in wanted[part::parts] if not _file(arguments.out, b, a, s).is_file()]
    data: dict[str, tuple[Clips, Clips]] = {}
    for base, arm, seed in [] if arguments.report else mine:
        folder = bases[base]
        if base not in data:  # two bases have two text encoders
            data[base] = (Clips(folder, TRAINING), Clips(folder, HELD_OUT))
        values = train(folder, ARMS[arm], seed, *data[base])
        file = _file(arguments.out, base, arm, seed)
        np.savez(file.with_suffix(".part.npz"), **values)  # pyright: ignore[reportArgumentType]
        file.with_suffix(".part.npz").replace(file)
        error = values["noise_error"].mean(axis=(1, 2))
        print(f"{base}, {arm}, seed {seed}: {np.round(error, 4)}, distance {values['distance'].mean():.4f}", flush=True)
    for line in tables(arguments.out, list(bases), arguments.seeds):
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, help="NAME=FOLDER, once for each base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="of several processes: INDEX/COUNT")
    parser.add_argument("--report", action="store_true", help="train nothing")
    main(parser.parse_args())
