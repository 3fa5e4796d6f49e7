"""Errors after optical flow: zero for a still, small for what moves, large for what becomes something else."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from benchmarks.sensitivity import FAULTS, OF_DRAWN, Window, draw
from tasks.evaluate.systems import measure
from tasks.metrics.alignment import alignment
from tasks.metrics.pixels import clip_distance


@pytest.fixture(scope="module")
def window() -> Window:
    return next(draw(1))


def spoiled(window: Window, fault: str) -> np.ndarray:
    return (FAULTS | OF_DRAWN)[fault](window, np.random.default_rng(0))


def test_a_still_has_no_error_and_a_moving_clip_a_small_one(window: Window):
    assert astuple(alignment(spoiled(window, "frozen"), window.real)) == (0, 0, 0)
    real = alignment(window.real, window.real)
    assert 0 < real.warp_error < 0.01 and 0 < real.photo_error < 0.02 and 0 < real.part_distance < 0.04


def test_flow_follows_a_panned_picture():
    """A texture that moves by (5, 2) pixels a frame: what remains is far below the difference of the frames."""
    random = np.random.default_rng(0)
    picture = np.kron(random.integers(0, 256, (28, 28, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    clip = np.stack([picture[2 * k : 2 * k + 64, 5 * k : 5 * k + 64] for k in range(5)])
    found = alignment(clip, clip)
    still = np.concatenate([clip[:1]] * 5)
    assert max(astuple(found)) < 0.35 * clip_distance(clip, still)


@pytest.mark.parametrize(
    ("fault", "metric"),
    [
        ("shape swapped", "part_distance"),
        ("texture replaced", "part_distance"),
        ("blurred", "part_distance"),
        ("colour drift", "photo_error"),
        ("shimmer", "warp_error"),
    ],
)
def test_a_fault_doubles_the_error_in_charge_of_it_and_another_motion_does_not(window: Window, fault: str, metric: str):
    real, other, found = (
        getattr(alignment(clip, window.real), metric)
        for clip in (window.real, spoiled(window, "other motion"), spoiled(window, fault))
    )
    assert found > 2 * real and other < 1.6 * real


def test_frame_1_is_the_given_one_whatever_a_method_put_there(window: Window):
    own = window.real.copy()
    own[0] = 0
    assert alignment(own, window.real) == alignment(window.real, window.real)


def test_where_nothing_moves_in_the_real_clip_all_of_the_frame_counts(window: Window):
    still = spoiled(window, "frozen")
    assert alignment(still, still).part_distance == 0
    assert alignment(window.real, still).part_distance > 0.001


def test_clips_of_two_shapes_or_another_type_are_refused(window: Window):
    with pytest.raises(ValueError, match="clips differ in shape"):
        alignment(window.real[:-1], window.real)
    with pytest.raises(ValueError, match="pixels need uint8"):
        alignment(window.real / 255, window.real)


def test_the_record_of_a_clip_has_the_errors(window: Window):
    numbers = measure(window.real, window.real, None)
    assert numbers["part_distance"] == alignment(window.real, window.real).part_distance
