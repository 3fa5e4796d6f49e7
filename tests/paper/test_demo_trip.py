"""The shipped trained TRIP: the demo can continue it, and it animates drawn shapes without a training."""

from __future__ import annotations

import io
import subprocess

import numpy as np
import pytest
from PIL import Image

from benchmarks.shapes import ground_error, read_shape
from flows.layout import base_hash
from flows.recipes import DEMO_BASE, demo
from infra.settings import CHECKOUT
from tasks.ingest.drawing import draw_frame, draw_scene
from tasks.metrics.pixels import motion_magnitude
from tasks.train.start import check_network, parent_at, start_from
from trip_model import TripPipeline
from trip_model.encoders import decode_latents, encode_pixels

WEIGHTS = CHECKOUT / "examples" / "demo_trip" / "weights"


@pytest.mark.parametrize(("recipe", "start"), [("demo", WEIGHTS.relative_to(CHECKOUT)), ("demo-lora", "base")])
def test_make_demo_continues_it_with_the_recipe_demo_only(recipe: str, start: object) -> None:
    shown = subprocess.run(["make", "-n", "demo", f"RECIPE={recipe}"], cwd=CHECKOUT, capture_output=True, text=True)
    assert f"--from {start}\n" in shown.stdout


def test_the_recipe_demo_continues_the_shipped_trip() -> None:
    parent = parent_at(str(WEIGHTS), "")
    check_network(parent, demo().train, base_hash(DEMO_BASE))
    start, sentence = start_from(parent, demo().train, "0" * 64)
    assert start.model == str(WEIGHTS) and "its training is not known" in sentence


def test_drawn_shapes_keep_their_shape_and_move_on_a_still_ground() -> None:
    scenes = [draw_scene(seed) for seed in range(5_000_000, 5_000_006)]  # of no training and no corpus
    truths = [np.stack([draw_frame(scene, k / 4, 64) for k in range(16)]) for scene in scenes]
    photos = []
    for truth in truths:
        photo = io.BytesIO()
        Image.fromarray(truth[0]).save(photo, "png")
        photos.append(photo.getvalue())
    pipe = TripPipeline.from_pretrained(str(WEIGHTS))
    clips = pipe.generate(photos, [scene.caption for scene in scenes], list(range(6)))
    kept = [read_shape(c[-1], t[0]).shape == s.shape for c, t, s in zip(clips, truths, scenes, strict=True)]
    assert sum(kept) >= 5
    assert max(ground_error(clip, truth) for clip, truth in zip(clips, truths, strict=True)) < 8
    # To the VAE's round trip: of clips that no video file has compressed it moves a fifth more than the clips.
    vae = pipe.vae
    decoded = [decode_latents(vae, encode_pixels(vae, truth) * vae.config.scaling_factor) for truth in truths]
    ratio = sum(map(motion_magnitude, clips)) / sum(map(motion_magnitude, decoded))
    assert 0.8 < ratio < 1.25
