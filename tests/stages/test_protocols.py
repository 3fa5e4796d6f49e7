"""Protocols: every preset resolves on a small data set of its layout, a manifest travels, and bad files are told."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from infra import storage
from tasks.evaluate.presets import PRESETS, PublishedRow, load_preset, preset_names, published_rows
from tasks.evaluate.protocols import load_protocol, resolve
from tasks.records import UserError
from tasks.shards import Sample, ShardDataset, publish_dataset, sample_key, write_shard

PAPER = {"num_frames": 16, "fps": 4.0, "size": 256}


def dataset_of(
    folder: Path, clips: dict[str, str], recipe: dict, windows: int = 1, frames: int = 16, size: int = 8
) -> ShardDataset:
    """A data set of black clips by key and caption, prepared as the recipe says."""
    black = np.zeros((frames, size, size, 3), np.uint8)
    zeros, tokens = np.zeros((frames, 4, 1, 1), np.float16), np.zeros(77, np.int32)
    rows = [
        [Sample(sample_key(key, w), caption, zeros, black[0], tokens, {}, black) for w in range(windows)]
        for key, caption in clips.items()
    ]
    shard = write_shard(str(folder), 0, (0, len(rows)), rows, "hash")
    publish_dataset(str(folder), recipe, "hash", {}, [shard.summary()])
    return ShardDataset(str(folder))


def of_layout(name: str, folder: Path) -> ShardDataset:
    """The data set that prepare makes of the source which the preset names."""
    videos = {f"video{i}": f"caption {i}" for i in range(12)}
    if name.startswith("msrvtt"):
        captions = {"msrvtt-first-caption": "first", "msrvtt-one-random-caption": 7, "msrvtt-all-20": "all"}[name]
        if captions == "all":
            videos = {f"{key}-{n:02d}": f"{caption}, {n}" for key, caption in videos.items() for n in range(20)}
        return dataset_of(folder, videos, PAPER | {"format": "msrvtt", "split": "test", "captions": captions})
    if name.startswith("dtdb"):
        classes = ["fire", "clouds", "vegetation", "waterfall", "traffic"]
        clips = {f"{label}-{i}": label for label in classes for i in range(5)}
        return dataset_of(folder, clips, PAPER | {"format": "classes"})
    return dataset_of(folder, videos, PAPER | ({"format": "folder"} if name == "folder" else {}), windows=2)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_on_a_data_set_of_its_layout(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    assert (PRESETS / f"{name}.toml").read_text().startswith("# ")  # the citation comes first
    small = replace(preset, number=8) if isinstance(preset.number, int) else preset
    found = resolve(name, small, of_layout(name, tmp_path), 0.5, limit=6, seed=0)
    items = {"dtdb-clean": 20, "msrvtt-all-20": 160, "held-out": 6, "folder": 6}.get(name, 8)
    assert len(found.items) == items and found.clips == {"msrvtt-all-20": 8}.get(name, min(items, found.clips))
    assert len({item.seed for item in found.items}) == items  # one seed an item
    assert (found.frames, found.fps, found.size) == (16, 4.0, 256)
    assert {item.category for item in found.items} == (set(preset.categories) or {""})
    if isinstance(preset.number, int):
        with pytest.raises(UserError, match=f"asks for {preset.number} clips, .* holds 12; prepare the others"):
            resolve(name, preset, of_layout(name, tmp_path), 0.5, limit=6, seed=0)


def test_published_rows_are_those_of_the_papers_tables() -> None:
    webvid = {row.method: row.values for row in published_rows("webvid-2048") if row.table != 4}
    assert webvid["TRIP"] == {"F-Consistency/4": 95.36, "F-Consistency/all": 96.41, "FVD": 38.9}
    assert len(webvid) == 7 and published_rows("held-out") == published_rows("webvid-2048")
    assert [row.values["FID"] for row in published_rows("dtdb-clean")] == [65.1, 31.9, 24.8]
    assert published_rows("msrvtt-all-20")[-1] == PublishedRow(3, "TRIP", {"FID": 9.68, "FVD": 91.3}, "I2V")


def test_a_manifest_asks_the_same_of_another_preparation(tmp_path: Path) -> None:
    clips = {f"video{i}": f"caption {i}" for i in range(12)}
    first = load_protocol("held-out", dataset_of(tmp_path / "a", clips, PAPER, windows=2), 0.5, 6, seed=3)
    assert {item.start for item in load_protocol("held-out", ShardDataset(str(tmp_path / "a")), 1, 99, 3).items} == {
        0.0,
        4.0,
    }
    address = str(tmp_path / "protocol.json")
    storage.write_json(address, first.manifest())
    reordered = dataset_of(tmp_path / "b", dict(reversed(clips.items())), PAPER, windows=2)
    again = load_protocol(address, reordered, 1.0, 1, seed=99)
    assert again.sha == first.sha and [i.seed for i in again.items] == [i.seed for i in first.items]
    assert [reordered.keys[item.index] for item in again.items] == [item.key for item in first.items]

    fewer = dataset_of(tmp_path / "c", {k: v for k, v in clips.items() if k != first.items[0].clip}, PAPER, windows=2)
    with pytest.raises(UserError, match=f"lacks 1 of 6 items of .*: {first.items[0].key}; prepare"):
        load_protocol(address, fewer, 1.0, 1, 0)
    forgiving = replace(first, rules=replace(first.rules, missing="exclude"))
    storage.write_json(address, forgiving.manifest())
    left = load_protocol(address, fewer, 1.0, 1, 0)
    assert len(left.items) == 5 and left.excluded == (("not in the data set", 1),)

    storage.write_json(address, forgiving.manifest() | {"fps": 8.0})
    with pytest.raises(UserError, match="was changed after it was written"):
        load_protocol(address, fewer, 1.0, 1, 0)


def test_a_bad_protocol_is_one_sentence(tmp_path: Path) -> None:
    dataset = of_layout("dtdb-clean", tmp_path / "data")
    own = tmp_path / "own.toml"
    (tmp_path / "other.json").write_text("{}")
    cases = {
        "no protocol 'webvid'; give dtdb-clean, ": "webvid",
        "no protocol file at": str(tmp_path / "none.toml"),
        "no protocol at": str(tmp_path / "none.json"),
        "is no protocol of schema": str(tmp_path / "other.json"),
        "takes data of format msrvtt, .* prepared with format classes": "msrvtt-first-caption",
        "not usable .*clips_number": 'title = "a"\nclips_number = 3',
        "not usable .*missing": 'title = "a"\nmissing = "ignore"',
        "not usable": "title = ",
        "number -1": 'title = "a"\nnumber = -1',
        "takes 16 frames at 8 fps and 256 pixels, .* holds 16 at 4": 'title = "a"\nfps = 8.0\nframes = 16',
        "of category 'snow', 0 are left": 'title = "a"\nleast_clips = 4\ncategories = ["fire", "snow"]',
    }
    for message, name in cases.items():
        if name.startswith("title"):
            own.write_text(name)
            name = str(own)
        with pytest.raises(UserError, match=message) as caught:
            load_protocol(name, dataset, 1.0, 10, 0)
        assert "\n" not in str(caught.value), message


def test_too_few_clips_are_counted_where_the_protocol_says_so(tmp_path: Path) -> None:
    preset = replace(load_preset("webvid-2048"), missing="exclude")
    found = resolve("webvid-2048", preset, of_layout("webvid-2048", tmp_path), 1.0, 1, 0)
    assert found.clips == 12 and found.excluded == (("not in the data set", 2036),)
    assert asdict(found)["rules"]["number"] == 2048
