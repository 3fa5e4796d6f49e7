"""The benchmark of long videos sees a video that stops, and one that jumps between its windows."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.long_motion import MODES, main, seam_of, summarise, windows_of
from tasks.metrics.pixels import motion_magnitude


def moving(frames: int, seed: int = 0) -> np.ndarray:
    """A picture that is shifted by a pixel in every frame, so that all steps are equal."""
    picture = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return np.stack([np.roll(picture, n, axis=1) for n in range(frames)])


def test_a_video_that_moves_on_has_all_its_motion_in_every_window():
    clips = [moving(64, seed) for seed in range(3)]
    assert [len(part) for part in windows_of(clips[0], 16)] == [16] * 4
    result = summarise("joint", clips, 16, 1.0)
    assert [ratio.value for ratio in result.ratios] == pytest.approx([1.0] * 4)
    assert result.seam == pytest.approx(1.0) and result.first == pytest.approx(
        np.mean([motion_magnitude(clip[:16]) for clip in clips])
    )


def test_a_video_that_stops_and_one_that_jumps_are_seen():
    stopped = np.concatenate([moving(32), np.repeat(moving(32)[-1:], 32, axis=0)])
    assert [ratio.value for ratio in summarise("joint", [stopped], 16, 1.0).ratios] == pytest.approx([1, 1, 0, 0])
    steps = np.concatenate([np.full((16, 8, 8, 3), value, np.uint8) for value in (0, 60, 120)])
    steps[1::2] += 1  # a little motion, and jumps between the windows
    assert seam_of(steps, 16) > 10 and seam_of(np.zeros((32, 8, 8, 3), np.uint8), 16) == 0


def test_both_ways_are_measured_on_a_model(tiny_model: Path, tmp_path: Path, capsys):
    given = argparse.Namespace(model=tiny_model, clips=2, frames=24, steps=1, least=0.0, threads=1, examples=tmp_path)
    assert main(given) == 0
    table = capsys.readouterr().out
    assert all(f"| {mode} | " in table for mode in MODES) and "window 2 / 1" in table and "window 3" not in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long_chunks.gif", "long_joint.gif"]
    given.least = 1000.0
    assert main(given) == 1
    assert "joint: the motion of window 2 is less than 1000 of the first one's" in capsys.readouterr().out
