"""The demo corpus: the same clips on every call, complete files only, and reachable over loopback HTTP."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks.ingest.demo import FIRST_SEED, serve_folder, write_demo_corpus
from tasks.ingest.download import Fetched, download_clips
from tasks.ingest.drawing import draw_clip
from tasks.ingest.sources import read_rows
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.records import ClipRef, UserError
from tasks.video.decode import read_clip


def test_the_corpus_is_a_table_of_captioned_clips_that_decode_to_what_was_drawn(tmp_path: Path) -> None:
    ready: list[int] = []
    table = write_demo_corpus(tmp_path, clips=3, size=32, progress=ready.append)
    rows = [row for row in read_rows(SourceSpec(table)) if isinstance(row, ClipRef)]
    assert ready == [1, 2, 3] and [row.key for row in rows] == [str(FIRST_SEED + i) for i in range(3)]
    pixels, caption = draw_clip(FIRST_SEED + 1, 32)
    assert rows[1].caption == caption
    clip = read_clip(tmp_path / rows[1].url, num_frames=16, fps=4.0, size=32)
    error = np.abs(clip.pixels.astype(float) - pixels[: 16 * 3 : 3].astype(float)).mean()
    assert error < 4  # of 255: every third drawn frame, but for the codec


def test_a_second_call_reuses_every_file(tmp_path: Path) -> None:
    table = write_demo_corpus(tmp_path, clips=2, size=32)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    text = Path(table).read_bytes()
    (tmp_path / "videos" / "32px" / f"{FIRST_SEED}.mp4").unlink()
    assert write_demo_corpus(tmp_path, clips=2, size=32) == table
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert before.keys() == after.keys() and Path(table).read_bytes() == text
    assert sum(before[path] != after[path] for path in before) == 1


def test_the_served_corpus_travels_the_real_download_path_whatever_the_port(tmp_path: Path) -> None:
    table = write_demo_corpus(tmp_path, clips=2, size=32)
    for _ in range(2):
        with serve_folder(tmp_path) as url:
            spec = SourceSpec(table, base_url=url)
            refs = [row for row in read_rows(spec) if isinstance(row, ClipRef)]
            results = [result for _, result in download_clips(refs, spec, DownloadSpec())]
        for ref, result in zip(refs, results, strict=True):
            assert isinstance(result, Fetched) and result.data == (tmp_path / ref.url).read_bytes()


def test_numbers_that_cannot_be_drawn_and_a_folder_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 demo clips"):
        write_demo_corpus(tmp_path, clips=0, size=32)
    with pytest.raises(UserError, match="of 33 pixels"):
        write_demo_corpus(tmp_path, clips=1, size=33)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_demo_corpus(tmp_path / "file", clips=1, size=32)
