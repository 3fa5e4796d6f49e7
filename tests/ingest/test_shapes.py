"""The measure of the demo's clips (benchmarks/shapes.py) reads drawn clips right and notices what it is there for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.shapes import ground_error, read_shape
from tasks.ingest.demo import FIRST_SEED
from tasks.ingest.drawing import Scene, draw_frame, draw_scene

SCENES = [draw_scene(FIRST_SEED + index) for index in range(40)]


def clip(scene: Scene) -> np.ndarray:
    return np.stack([draw_frame(scene, k / 4, 64) for k in (0, 7, 15)])


def test_every_drawn_clip_keeps_its_shape_and_its_ground():
    clips = [clip(scene) for scene in SCENES]
    readings = [read_shape(frames[-1], frames[0]) for frames in clips]
    assert [reading.shape for reading in readings] == [scene.shape for scene in SCENES]
    assert min(reading.overlap for reading in readings) > 0.95
    assert max(ground_error(frames, frames) for frames in clips) == 0


@pytest.mark.parametrize("other", ["circle", "square", "triangle"])
def test_an_object_that_turns_into_another_shape_is_read_as_that_shape(other: str):
    for scene in SCENES[:8]:
        photo, turned = draw_frame(scene, 0, 64), draw_frame(replace(scene, shape=other), 3.75, 64)
        assert read_shape(turned, photo).shape == other


def test_an_object_that_fades_shrinks_or_dissolves_has_no_shape():
    scene = SCENES[0]
    frames = clip(scene).astype(float)
    empty = draw_frame(replace(scene, start_xy=(9.0, 9.0)), 0, 64)
    noise = np.random.default_rng(0).normal(0, 120, frames[-1].shape)
    assert read_shape(empty, clip(scene)[0]).shape == "none"
    assert read_shape((frames[-1] + noise).clip(0, 255).astype(np.uint8), clip(scene)[0]).shape == "none"


def test_the_ground_error_is_in_levels_and_leaves_out_the_path_of_the_object():
    truth = clip(SCENES[1])
    shifted = np.concatenate([truth[:1], (truth[1:].astype(int) + 3).clip(0, 255).astype(np.uint8)])
    still = np.repeat(truth[:1], len(truth), axis=0)
    assert ground_error(shifted, truth) == pytest.approx(3, abs=0.1)
    assert ground_error(still, truth) == 0
