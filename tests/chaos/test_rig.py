"""The rig: a server, files and a table with every kind of fault; every row has its expected outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.rig import crashing
from benchmarks.rig.server import serving
from benchmarks.rig.table import DECODE, DOWNLOAD, ENCODED, FIRST_KEY, KINDS, TABLE, USABLE, Row, audit, write_rig
from tasks.curate.verify import problems
from tasks.encode import encoder
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.ingest.drawing import draw_frame, draw_scene
from tasks.ingest.spec import SourceSpec
from tasks.shards import ShardDataset, clip_key_of

SIZE = 32


@dataclass(frozen=True)
class Run:
    rows: list[Row]
    report: PrepareReport


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs one row of each kind through the stage in this process."""
    folder, output = tmp_path_factory.mktemp("rig"), tmp_path_factory.mktemp("data") / "set"
    rows = write_rig(folder, SIZE)
    with serving(folder / "files") as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "read_windows", encoder.read_windows)  # put back after the install
        crashing.install()
        spec = PrepareSpec(
            SourceSpec(str(folder / TABLE), base_url=url),
            str(output),
            str(tiny_base),
            size=SIZE,
            keep_pixels=True,
            clips_per_shard=20,
            workers=0,
            download=replace(DOWNLOAD, read_seconds=1.5, rate_seconds=0.5),
            decode=replace(DECODE, processes=2, seconds=4.0),
        )
        yield Run(rows, prepare(spec))


def test_every_row_is_accounted_for_and_every_fault_lands_in_its_own_reason(run: Run) -> None:
    result = audit(run.report.dataset, run.rows)
    assert (result.lost, result.wrong_successes, result.wrong_reasons) == ([], [], [])
    assert result.found == result.expected == {ENCODED: run.report.encoded, **run.report.failed}
    assert run.report.rows == run.report.encoded + sum(run.report.failed.values()) == len(run.rows) == len(KINDS)
    assert run.report.encoded == len(USABLE)


def test_the_data_set_that_is_left_verifies(run: Run) -> None:
    assert list(problems(run.report.dataset)) == []


def test_what_was_encoded_is_what_was_drawn(run: Run) -> None:
    data = ShardDataset(run.report.dataset)
    for place in range(len(data)):
        sample = data.read(place, ("pixels", "meta"))
        row = run.rows[int(clip_key_of(sample["key"])) - FIRST_KEY]
        if row.kind == "vfr":  # its stamps are not the times it was drawn for
            continue
        want = [draw_frame(draw_scene(row.scene), time, SIZE) for time in sample["meta"]["times"]]
        if row.kind == "rotated":
            want = [np.rot90(frame, -1) for frame in want]
        error = np.abs(np.stack(want).astype(int) - sample["pixels"]).mean(axis=(1, 2, 3))
        assert error.max() < 6, row.kind


def test_the_audit_tells_what_came_to_something_else(run: Run) -> None:
    def told(kind: str, **changes: str) -> tuple[list[str], list[str], list[str]]:
        rows = [replace(row, **changes) if row.kind == kind else row for row in run.rows]  # type: ignore[arg-type]
        result = audit(run.report.dataset, rows)
        assert not result.clean
        return result.lost, result.wrong_successes, result.wrong_reasons

    lost, successes, reasons = told("vfr", outcome="damaged")
    assert not lost and not reasons and [line.split(": ")[1] for line in successes] == ["encoded, expected damaged"]
    lost, successes, reasons = told("page", outcome="http_404")
    assert (
        not lost and not successes and [line.split(": ")[1] for line in reasons] == ["not_a_video, expected http_404"]
    )
    extra = Row("plain", ENCODED, 0, "", "")
    assert audit(run.report.dataset, [*run.rows, extra]).lost == [f"row {len(KINDS)}, plain: None, expected encoded"]
    # A success of another's file is none.
    rows = [replace(row, sha256="") if row.kind == "moved" else row for row in run.rows]
    [line] = audit(run.report.dataset, rows).wrong_successes
    assert "moved" in line
