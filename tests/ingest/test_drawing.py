"""The drawn corpus: its style's factors are off by default, independent, and each changes what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.ingest.demo import write_demo_corpus
from tasks.ingest.drawing import PLAIN, Style, draw_frame, draw_scene

FACTORS = {"ground_texture": 0.1, "shape_texture": 0.1, "pan": 10.0, "zoom": 10.0, "motion_in_caption": False}


def frames(style: Style, seed: int = 7) -> list[np.ndarray]:
    scene = draw_scene(seed, style)
    return [draw_frame(scene, seconds, 64).astype(float) for seconds in (0.0, 2.0)]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_leaves_shape_and_motion_and_changes_only_its_own(factor: str):
    scene, plain = draw_scene(7, Style(**{factor: FACTORS[factor]})), draw_scene(7)
    assert replace(scene, style=PLAIN) == plain
    same_caption = scene.caption == plain.caption
    same_pixels = all(np.array_equal(a, b) for a, b in zip(frames(scene.style), frames(PLAIN), strict=True))
    assert (same_caption, same_pixels) == ((False, True) if factor == "motion_in_caption" else (True, False))


def test_ground_and_shape_textures_have_the_deviation_asked_for():
    differences = [frames(Style(ground_texture=0.1), seed)[0] - frames(PLAIN, seed)[0] for seed in range(12)]
    assert 0.07 < np.sqrt(np.mean(np.square(differences))) / 255 < 0.12  # clipped at black, and hidden by the shape
    on_shape = frames(Style(shape_texture=0.1))[0] - frames(PLAIN)[0]
    assert 0.01 < (np.abs(on_shape).max(axis=2) > 2).mean() < 0.12


def test_the_camera_starts_at_the_photo_and_moves_the_ground_with_it():
    style = Style(ground_texture=0.1)
    still, panned = frames(style), frames(replace(style, pan=15.0, zoom=5.0))
    assert np.array_equal(still[0], panned[0])
    corner = np.s_[:6, :6]
    assert np.abs(panned[1][corner] - panned[0][corner]).mean() > np.abs(still[1][corner] - still[0][corner]).mean() + 1


def test_clips_of_two_styles_lie_in_one_folder(tmp_path: Path):
    for style in (PLAIN, Style(pan=10.0, motion_in_caption=False)):
        table = write_demo_corpus(tmp_path, 1, 32, style=style)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    assert len(files) == 2 and files[1].startswith("videos/32px/") and files[0].startswith("videos/32px-")
    assert "moving" not in Path(table).read_text()
