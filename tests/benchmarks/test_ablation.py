"""The planned ablation: its packed values are those of the page, they can be continued, and a still is the null row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.ablation import STILL, Study, still_psnr, summary, tables

DECISIONS = Path(__file__).resolve().parents[2] / "docs" / "decisions"
PACKED = DECISIONS / "ablation.npz"


def test_the_page_has_the_tables_of_the_packed_file() -> None:
    page = (DECISIONS / "ablation.md").read_text().splitlines()
    missing = [line for line in summary(dict(np.load(PACKED))) if line not in page]
    assert not missing, missing


def test_a_packed_study_continues_elsewhere(tmp_path: Path) -> None:
    study = Study(tmp_path, {})
    study.unpack(PACKED)
    arrays = study.read()
    assert {name: values.tolist() for name, values in arrays.items()} == {
        name: values.tolist() for name, values in np.load(PACKED).items()
    }
    assert study.file("noise", "TRIP^-", 1).is_file() and study.best("velocity", "TRIP^W") == 2
    assert any(line.startswith(f"| {STILL} | 1 | 0.1331 |") for line in tables(arrays))


def test_only_the_still_part_counts_for_its_psnr() -> None:
    truth = np.full((2, 4, 4, 3), 100, np.uint8)
    clip, still = truth.copy(), np.ones((4, 4), bool)
    clip[1, 0], still[0] = 0, False
    assert still_psnr(clip, truth, still) > 70
    clip[1, 1] = 110
    assert still_psnr(clip, truth, still) == pytest.approx(10 * np.log10(255**2 / (100 / 3)))
