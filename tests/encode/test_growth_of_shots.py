"""Shots, of which a row has several, in a data set that grows: they come, change and go with their row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tasks.curate.compact import compact
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareSpec
from tasks.ingest.rows import clean_key
from tasks.ingest.spec import SourceSpec
from tasks.shards import ShardDataset
from trip_model.images import video_bytes


def write_video(folder: Path, name: str, levels: tuple[int, ...]) -> None:
    """A video with a shot of two seconds for each level of gray."""
    frames = np.concatenate([np.full((16, 32, 32, 3), level, np.uint8) for level in levels])
    (folder / f"{name}.mp4").write_bytes(video_bytes(frames, 8.0))
    (folder / f"{name}.txt").write_text(f"clip {name}")


@pytest.fixture
def spec(tiny_base: Path, tmp_path: Path) -> PrepareSpec:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, levels in (("a", (20, 200, 90)), ("b", (220, 30)), ("c", (120,))):
        write_video(folder, name, levels)
    output = str(tmp_path / "root" / "data" / "0123456789abcdef")
    return PrepareSpec(
        SourceSpec(str(folder)),
        output,
        str(tiny_base),
        num_frames=4,
        size=32,
        windows_per_clip=1,
        workers=0,
        clip="shots",
        clips_per_shard=2,
    )


def captions(spec: PrepareSpec) -> dict[str, str]:
    """Prepares, checks the data set, and returns the caption of each sample by key."""
    report = prepare(spec)
    assert list(problems(report.dataset)) == []
    data = ShardDataset(report.dataset)
    return {key: data.read(place, ("caption",))["caption"] for place, key in enumerate(data.keys)}


def test_shots_come_change_and_go_with_their_row(spec: PrepareSpec) -> None:
    folder = Path(spec.source.table)
    shots = {"a": 3, "b": 2, "c": 1}
    expected = {f"{name}~{n:03d}_000": f"clip {name}" for name, count in shots.items() for n in range(count)}
    assert captions(spec) == expected
    write_video(folder, "d", (10, 240))
    expected |= {"d~000_000": "clip d", "d~001_000": "clip d"}
    assert captions(spec) == expected
    (folder / "a.txt").write_text("edited")
    expected |= {key: "edited" for key in expected if key.startswith("a")}
    assert captions(spec) == expected
    compact(spec.output, None, lambda _: None)
    assert captions(spec) == expected
    for suffix in ("mp4", "txt"):
        (folder / f"b.{suffix}").unlink()
    expected = {key: caption for key, caption in expected.items() if not key.startswith("b")}
    assert captions(spec) == expected
    report = forget(spec.output, ["d~001"], "asked for", clean_key, lambda _: None)
    assert (report.rows, report.samples, report.unknown) == (1, 2, ())  # a row is taken down with all its shots
    expected = {key: caption for key, caption in expected.items() if not key.startswith("d")}
    assert captions(spec) == expected
