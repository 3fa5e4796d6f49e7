"""Freezing, half speed, shuffling, flicker and blur of real clips are each seen by the metric in charge of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sensitivity import EXPECTED, FAULTS, markdown, measure, read


def test_every_fault_is_seen_by_the_metrics_in_charge(real_clips: Path):
    result = measure(list(read(real_clips, windows=1))[:12])
    assert result.unseen() == []
    assert result.clips == 12
    cells = result.cells
    assert cells["frozen"]["motion_ratio"].value.value == 0
    assert cells["frozen"]["consistency"].value.value == pytest.approx(100)
    assert not cells["shuffled"]["rfd-app"].seen  # the same frames in another order
    assert 0.9 < cells["none"]["motion_ratio"].value.value < 1.1
    table = markdown(result)
    assert all(f"| {row} |" in table for row in FAULTS) and "not comparable with published values" in table
    assert set(EXPECTED) == set(FAULTS) - {"none"}
