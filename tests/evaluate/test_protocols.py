"""Protocols: every preset resolves on a small data set of its layout, a manifest travels, and bad files are told."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from infra import storage
from tasks.evaluate.protocol.presets import PRESETS, PublishedRow, load_preset, preset_names, published_rows
from tasks.evaluate.protocol.protocol import load_protocol, resolve
from tasks.records import UserError
from tasks.shards import Sample, ShardDataset, publish_dataset, sample_key, write_shard

PAPER = {"num_frames": 16, "fps": 4.0, "size": 256}
CINN = {"num_frames": 17, "fps": 4.0, "size": 128, "fit": "squash", "stride": 1, "format": "classes"}


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
        captions = {"msrvtt-one-random-caption": 7, "msrvtt-all-20": "all"}.get(name, "first")
        if captions == "all":
            videos = {f"{key}-{n:02d}": f"{caption}, {n}" for key, caption in videos.items() for n in range(20)}
        recipe = PAPER | {"format": "msrvtt", "split": "test", "captions": captions}
        return dataset_of(folder, videos, recipe | ({"stride": 3} if name == "msrvtt-stride-3" else {}))
    if name in ("dtdb-clean", "cinn-exact"):
        classes = ["fire", "clouds", "vegetation", "waterfall", "traffic"]
        clips = {f"{label}-{i}": label for label in classes for i in range(5)}
        return dataset_of(folder, clips, CINN if name == "cinn-exact" else PAPER | {"format": "classes"}, frames=17)
    return dataset_of(folder, videos, PAPER | ({"format": "folder"} if name == "folder" else {}), windows=2)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_on_a_data_set_of_its_layout(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    assert (PRESETS / f"{name}.toml").read_text().startswith("# ")  # the citation comes first
    small = replace(preset, number=8) if isinstance(preset.number, int) else preset
    found = resolve(name, small, of_layout(name, tmp_path), 0.5, limit=6, seed=0)
    items = {"dtdb-clean": 20, "cinn-exact": 100, "msrvtt-all-20": 160, "held-out": 6, "folder": 6}.get(name, 8)
    assert len(found.items) == items and found.clips == {"msrvtt-all-20": 8, "cinn-exact": 20}.get(
        name, min(items, found.clips)
    )
    assert len({item.seed for item in found.items}) == items  # one seed an item
    assert (found.frames, found.size) == ((17, 128) if name == "cinn-exact" else (16, 256))
    assert (found.fps, found.rules.stride) == (4.0, {"cinn-exact": 1, "msrvtt-stride-3": 3}.get(name))
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
        "no protocol 'webvid'; give cinn-exact, dtdb-clean, ": "webvid",
        "no protocol file at": str(tmp_path / "none.toml"),
        "no protocol at": str(tmp_path / "none.json"),
        "is no protocol of schema": str(tmp_path / "other.json"),
        "takes data of format msrvtt, .* prepared with format classes": "msrvtt-first-caption",
        "not usable .*clips_number": 'title = "a"\nclips_number = 3',
        "not usable .*missing": 'title = "a"\nmissing = "ignore"',
        "not usable": "title = ",
        "number -1": 'title = "a"\nnumber = -1',
        "fps 4 and stride 2, expected one": 'title = "a"\nfps = 4.0\nstride = 2',
        "takes 16 frames at 8 fps and 256 pixels .* holds 16 frames at 4 fps": 'title = "a"\nfps = 8.0\nframes = 16',
        "of category 'snow', 0 are left": 'title = "a"\nleast_clips = 4\ncategories = ["fire", "snow"]',
    }
    for message, name in cases.items():
        if name.startswith("title"):
            own.write_text(name)
            name = str(own)
        with pytest.raises(UserError, match=message) as caught:
            load_protocol(name, dataset, 1.0, 10, 0)
        assert "\n" not in str(caught.value), message


@pytest.mark.parametrize(
    ("protocol", "change", "said"),
    [
        ("dtdb-clean", {"stride": 1}, r"takes 16 frames at 4 fps .* holds 16 frames at a stride of 1"),
        ("dtdb-clean", {"fit": "squash"}, r"takes .* 256 pixels \(crop\), .* and 256 \(squash\)"),
        ("cinn-exact", {"stride": None}, "takes 17 frames at a stride of 1 .* holds 17 frames at 4 fps"),
        ("cinn-exact", {"stride": 2}, "takes 17 frames at a stride of 1 .* holds 17 frames at a stride of 2"),
        ("cinn-exact", {"fit": "crop"}, r"128 pixels \(squash\), .* 128 \(crop\); prepare-latents --protocol makes"),
        ("msrvtt-stride-3", {"stride": None}, "takes 16 frames at a stride of 3 .* holds 16 frames at 4 fps"),
    ],
)
def test_frames_that_were_taken_in_another_way_are_refused(
    protocol: str, change: dict, said: str, tmp_path: Path
) -> None:
    right = of_layout(protocol, tmp_path / "right")
    clips = {key[:-4]: str(right.read(i, ("caption",))["caption"]) for i, key in enumerate(right.keys)}
    recipe = {k: v for k, v in (right.published.recipe | change).items() if v is not None}
    with pytest.raises(UserError, match=said):
        load_protocol(protocol, dataset_of(tmp_path / "wrong", clips, recipe, frames=17), 1.0, 10, 0)


def test_a_manifest_of_repeats_and_of_native_frames_travels(tmp_path: Path) -> None:
    dataset = of_layout("cinn-exact", tmp_path / "data")
    once = resolve("cinn-exact", replace(load_preset("cinn-exact"), repeats=1), dataset, 1.0, 1, 0)
    for name in ("cinn-exact", "held-out"):  # the second leaves open how frames are taken
        first = load_protocol(name, dataset, 1.0, 3, seed=0)
        storage.write_json(str(tmp_path / "protocol.json"), first.manifest())
        again = load_protocol(str(tmp_path / "protocol.json"), dataset, 1.0, 1, seed=9)
        assert again.items == first.items and again.sha == first.sha and again.sampling == first.sampling
        if name == "cinn-exact":  # the first of the repeats is the item without any
            assert [item for item in first.items if "." not in item.key] == list(once.items)
            assert [item.key[-2:] for item in first.items[:5]] == ["00", ".1", ".2", ".3", ".4"]


def test_what_a_preset_does_not_use_leaves_its_manifest_as_it_was(tmp_path: Path) -> None:
    found = load_protocol("dtdb-clean", of_layout("dtdb-clean", tmp_path), 1.0, 1, 0)
    assert not {"fit", "stride", "repeats", "shifted", "scaled"} & set(found.manifest()["rules"])


def test_too_few_clips_are_counted_where_the_protocol_says_so(tmp_path: Path) -> None:
    preset = replace(load_preset("webvid-2048"), missing="exclude")
    found = resolve("webvid-2048", preset, of_layout("webvid-2048", tmp_path), 1.0, 1, 0)
    assert found.clips == 12 and found.excluded == (("not in the data set", 2036),)
    assert asdict(found)["rules"]["number"] == 2048
