"""What a trained model owes to its base, and what to each part of its fusion, without any training.

    python -m benchmarks.parts --root runs/demo [--clips 40]

First the untrained base in every configuration of Tables 5 and 6 that adds no new weights, then the trained model with
one part of the fusion switched off at a time. All on the same held-out clips with the same noise; differences are
paired by clip. The part that is switched off was there in training: a model trained without it may do better.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flows.recipes import DEMO_BASE
from tasks.evaluate.generate import real_pixels
from tasks.evaluate.protocol.protocol import held_out_protocol
from tasks.evaluate.report.tables import number
from tasks.metrics.pixels import clip_distance, motion_magnitude
from tasks.metrics.statistics import mean_over_clips, paired_difference, ratio_of_sums
from tasks.shards import ShardDataset
from trip_model.checkpoint import load_model
from trip_model.config import FusionConfig, TripConfig
from trip_model.encoders import load_text_encoder, load_vae
from trip_model.fusion import TemporalNoiseFusion
from trip_model.model import Trip
from trip_model.pipeline import TripPipeline

Pixels = NDArray[np.uint8]
BATCH = 8


def untrained(base: str, config: TripConfig) -> Iterator[tuple[str, Trip]]:
    """The base in each configuration; new weights start at zero output, so their first values do not matter."""
    none, plain = FusionConfig(kind="none"), replace(config.fusion, local_shrinkage=False)
    variants = {
        "TRIP^-: first frame at the head, no prior": replace(config, fusion=none),
        "first frame at the tail, no prior": replace(config, fusion=none, condition="tail"),
        "first frame along the channels, no prior": replace(config, fusion=none, condition="channel"),
        "TRIP, closed form": replace(config, fusion=plain),
        "TRIP, closed form and local shrinkage": replace(config, fusion=replace(plain, local_shrinkage=True)),
    }
    for name, variant in variants.items():
        yield f"base: {name}", Trip.from_base(base, variant)


def silence(*names: str) -> Callable[[TemporalNoiseFusion], None]:
    """Sets the output of linear layers of a fusion to zero."""

    def change(fusion: TemporalNoiseFusion) -> None:
        for name in names:
            for parameter in fusion.get_submodule(name).parameters():
                parameter.data.zero_()

    return change


def without_shrinkage(fusion: TemporalNoiseFusion) -> None:
    fusion.config = replace(fusion.config, local_shrinkage=False)


PARTS: dict[str, Callable[[TemporalNoiseFusion], None]] = {
    "without the branch": silence("out"),
    "without both attentions": silence("attention_self.to_out", "attention_cross.to_out"),
    "without cross-attention": silence("attention_cross.to_out"),
    "without self-attention": silence("attention_self.to_out"),
    "without local shrinkage": without_shrinkage,
}


def trained(model: Trip) -> Iterator[tuple[str, Trip]]:
    yield "trained: whole", model
    for name, change in PARTS.items():
        changed = copy.deepcopy(model)
        assert changed.fusion is not None
        change(changed.fusion)
        yield f"trained: {name}", changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="where `reproduce --recipe demo` has run")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = (given.root / "model").resolve()
    (data,) = (path for path in (given.root / "data").iterdir() if path.is_dir())
    model, dataset = load_model(folder), ShardDataset(str(data))
    if model.fusion is None:
        raise SystemExit(f"the model at {folder} has no fusion whose parts could be switched off")
    vae, text = load_vae(folder), load_text_encoder(folder)
    frames = model.config.num_frames
    items = held_out_protocol(dataset, 0.1, given.clips, given.seed).items
    reals = [real_pixels(dataset, item, frames) for item in items]
    clips = [item.clip for item in items]
    moved = np.array([motion_magnitude(real) for real in reals])

    def row(name: str, made: Pixels, reference: NDArray[np.float64] | None) -> NDArray[np.float64]:
        distances = np.array([clip_distance(pixels, real) for pixels, real in zip(made, reals, strict=True)])
        ratio = ratio_of_sums([motion_magnitude(pixels) for pixels in made], moved, clips)
        minus = "" if reference is None else number(paired_difference(distances, reference, clips), "+.4f")
        print(
            f"| {name} | {number(mean_over_clips(distances, clips), '.4f')} | {minus} | {ratio.value:.2f} |", flush=True
        )
        return distances

    print(
        f"{len(items)} held-out clips, noise of seed {given.seed}, {model.config.schedule.sampling_steps} DDIM steps\n"
    )
    print("| what | distance to the true clip | minus the first row of its kind | motion ratio |\n|---|---|---|---|")
    row("frozen first frame", np.stack([np.repeat(real[:1], frames, axis=0) for real in reals]), None)
    for kind in (untrained(DEMO_BASE, model.config), trained(model)):
        reference = None
        for name, variant in kind:
            pipeline = TripPipeline.from_model(variant, vae, text)
            made = [
                pipeline.generate(
                    [real[0] for real in reals[i : i + BATCH]],
                    [item.caption for item in items[i : i + BATCH]],
                    [item.seed for item in items[i : i + BATCH]],
                )
                for i in range(0, len(items), BATCH)
            ]
            distances = row(name, np.concatenate(made), reference)
            reference = distances if reference is None else reference


if __name__ == "__main__":
    main()
