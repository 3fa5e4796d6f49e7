"""A data set that grows: only new rows are requested, and what was taken down stays away through every change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.growth import Growth, Server, counting_server, growth_table
from infra import storage
from tasks.curate.compact import compact
from tasks.curate.verify import problems
from tasks.encode import job
from tasks.encode.job import prepare
from tasks.ingest.demo import write_demo_corpus
from tasks.records import UserError
from tasks.shards import (
    DUPLICATES_FOLDER,
    ShardDataset,
    Takedowns,
    add_root_takedowns,
    mark,
    named,
    read_manifest,
    versions_of,
)
from tasks.shards.pool import remove_shard, unused_shards

ROWS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_demo_corpus(folder, clips=ROWS + 5, size=32)
    return folder


@pytest.fixture
def server(corpus: Path) -> Iterator[Server]:
    with counting_server(corpus) as server:
        yield server


@pytest.fixture
def growth(server: Server, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Growth:
    monkeypatch.setattr(job, "write_report", lambda *_: None)  # the pages, which take most of the time
    return Growth(tmp_path, tiny_base, server, ROWS, clips_per_shard=3)


def test_a_night_costs_what_is_new(growth: Growth) -> None:
    nights = {night.change: night for night in growth_table(growth)}
    costs = {change: (night.requests, night.shards_made) for change, night in nights.items()}
    assert costs["first night"] == (ROWS, 3)
    assert costs["same table"] == costs["another order"] == costs["a trailing newline"] == (0, 0)
    assert costs["one clip taken down"] == (0, 0), "forget has rebuilt its shard"
    assert costs["5 rows more"] == (5, 2)
    assert costs["one row less"] == costs["one caption edited"] == (0, 1)
    assert costs["after compact"] == (0, 0)
    assert costs["the row again"][0] <= 1
    assert costs["the table under another name"][0] == 0
    assert costs["another recipe"][0] == ROWS + 5 - 1, "every clip but the forgotten one"
    assert [night.forgotten for night in nights.values()] == [0, 0] + [1] * (len(nights) - 2)
    assert nights["another order"].version == nights["a trailing newline"].version
    assert nights["same table"].version == nights["first night"].version


def test_an_edited_caption_changes_caption_and_tokens_and_nothing_else(growth: Growth) -> None:
    growth.night("first")
    before = ShardDataset(growth.dataset)
    old = {key: before.read(i, ("caption", "latents", "tokens", "meta")) for i, key in enumerate(before.keys)}
    growth.lines[4] = growth.lines[4].replace("a shape number 4", "two waves")
    growth.night("edited")
    after = ShardDataset(growth.dataset)
    for i, key in enumerate(after.keys):
        new = after.read(i, ("caption", "latents", "tokens", "meta"))
        assert (new["latents"] == old[key]["latents"]).all() and new["meta"] == old[key]["meta"]
        edited = key == "k4_000"
        assert (new["caption"] == "two waves") == edited
        assert (new["tokens"] != old[key]["tokens"]).any() == edited
    # The version of before is still there, with its caption.
    assert len(versions_of(growth.dataset)) == 2
    pinned = ShardDataset(next(v for v in versions_of(growth.dataset) if v.endswith(before.manifest_sha256[:16])))
    assert pinned.read(before.keys.index("k4_000"), ("caption",))["caption"] == "a shape number 4"


def test_compact_keeps_every_sample_byte_for_byte(growth: Growth) -> None:
    growth.night("first")
    for _ in range(3):
        growth.grow(1)
        growth.night("more")
    before = samples_of(growth.dataset)
    report = compact(growth.dataset)
    assert (report.before, report.after, report.merged) == (6, 4, 4)
    assert samples_of(growth.dataset) == before and list(problems(growth.dataset)) == []
    assert compact(growth.dataset).manifest_sha == report.manifest_sha
    with pytest.raises(UserError, match="rows per shard 0"):
        compact(growth.dataset, 0)


def test_a_version_with_a_forgotten_clip_is_gone_from_the_root(growth: Growth) -> None:
    from tasks.curate.forget import forget

    first = growth.night("first")
    other = growth.dataset[:-16] + "0" * 16
    growth.night("other", output=other)
    assert forget(growth.dataset, ["k1"]).rows == 1
    for dataset in (growth.dataset, other):
        assert "k1_000" not in ShardDataset(dataset).keys and list(problems(dataset)) == []
        for version in versions_of(dataset):
            assert not version.endswith(first.version) and "k1_000" not in ShardDataset(version).keys
    for path in growth.root.rglob("*"):
        assert not path.is_file() or b"k1_000" not in path.read_bytes(), path


def test_a_version_is_read_at_its_own_address_and_maintained_at_its_name(growth: Growth) -> None:
    growth.night("first")
    growth.grow(1)
    report = prepare(growth.spec)
    assert named(report.dataset) == growth.dataset and report.dataset in versions_of(growth.dataset)
    assert ShardDataset(report.dataset).manifest_sha256 == ShardDataset(growth.dataset).manifest_sha256
    storage.delete(report.dataset)
    with pytest.raises(UserError, match="take the newest version"):
        ShardDataset(report.dataset)


def samples_of(dataset: str) -> dict[str, dict[str, bytes]]:
    """Every member of every sample, by key."""
    data = ShardDataset(dataset)
    fields = data.fields(0)
    samples = {}
    for i, key in enumerate(data.keys):
        samples[key] = {}
        for field in fields:
            (shard,), (offset,), (size,) = (values.tolist() for values in data._places(np.array([i]), field))
            samples[key][field] = data._bytes(shard, offset, size)
    return samples


def test_a_removed_duplicate_stays_away_under_another_recipe(growth: Growth) -> None:
    growth.night("first")
    add_root_takedowns(growth.dataset, Takedowns({mark("k3"): "shows what row 0 shows"}), DUPLICATES_FOLDER)
    assert growth.night("same table").requests == 0 and "k3_000" not in ShardDataset(growth.dataset).keys
    other = growth.night("another recipe", output=growth.dataset[:-16] + "1" * 16, num_frames=5)
    assert other.requests == ROWS - 1


def test_a_link_whose_retries_gave_up_is_not_requested_by_any_prepare(growth: Growth) -> None:
    growth.lines.append("slow,broken/503,a shape\n")
    assert growth.night("first").requests == ROWS + 1
    for _ in range(3):
        assert growth.night("retry", retry=("server",)).requests == 1
    assert growth.night("given up", retry=("server",)).requests == 0
    other = {"output": growth.dataset[:-16] + "1" * 16, "num_frames": 5}
    assert growth.night("another recipe", **other).requests == ROWS
    assert read_manifest(str(other["output"]))[0].failed == {"gave_up": 1}
    assert growth.night("asked again", retry=("gave_up",)).requests == 1


def test_a_shard_that_no_version_names_is_unused_and_others_are_not(growth: Growth) -> None:
    growth.night("first")
    growth.lines[0] = growth.lines[0].replace("a shape", "another shape")
    growth.night("edited")
    root = str(growth.root)
    assert unused_shards(root) == [], "the version of before names the shard of before"
    (old,) = (v for v in versions_of(growth.dataset) if not v.endswith(read_manifest(growth.dataset)[1][:16]))
    storage.delete(old)
    (tar,) = unused_shards(root)
    unfinished = growth.dataset[:-16] + "f" * 16
    storage.write_json(f"{unfinished}/recipe.json", read_manifest(growth.dataset)[0].recipe)
    assert unused_shards(root) == [], "an unfinished data set may continue with it"
    storage.delete(unfinished)
    remove_shard(tar)
    assert unused_shards(root) == [] and list(problems(growth.dataset)) == []
    assert growth.night("same table").requests == 0
