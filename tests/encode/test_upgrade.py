"""A data set of schema 2 is read as it is, upgraded in place, and then grows like any other."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.growth import Growth, counting_server
from tasks.curate.compact import compact
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.ingest.demo import write_demo_corpus
from tasks.shards import ShardDataset, read_manifest, upgrade
from tests.support.kills import Killed, kill_at
from tests.support.schema2 import write_schema2

ROWS = 8


@pytest.fixture
def growth(tiny_base: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growth]:
    """A data set of schema 2 below a root, with a failed row in it; nothing else is there."""
    corpus = tmp_path_factory.mktemp("corpus")
    write_demo_corpus(corpus, clips=ROWS + 1, size=32)
    with counting_server(corpus) as server:
        growth = Growth(tmp_path, tiny_base, server, ROWS, clips_per_shard=3)
        growth.lines.append("gone,videos/gone.mp4,a shape\n")
        growth.night("present")
        old = growth.root / "data" / "1234567890abcdef"
        write_schema2(growth.dataset, str(tmp_path / "old"))
        shutil.rmtree(growth.root)
        shutil.copytree(tmp_path / "old", old)
        growth.old = str(old)  # type: ignore[attr-defined]
        yield growth


def latents(dataset: str) -> dict[str, bytes]:
    data = ShardDataset(dataset)
    return {key: data.read(i, ("latents",))["latents"].tobytes() for i, key in enumerate(data.keys)}


def test_schema_2_is_read_and_verified_without_an_upgrade(growth: Growth) -> None:
    old = growth.old  # type: ignore[attr-defined]
    assert read_manifest(old)[0].schema_version == 2 and list(problems(old)) == []
    data = ShardDataset(old)
    assert len(data) == ROWS and data.read(3, ("caption",))["caption"] == "a shape number 3"


def test_the_next_prepare_takes_the_old_samples_over(growth: Growth) -> None:
    before = latents(growth.old)  # type: ignore[attr-defined]
    night = growth.night("upgraded")
    assert (night.requests, night.rows) == (1, ROWS + 1), "only the failed row, whose link no record has"
    assert latents(growth.dataset) == before
    growth.lines[2] = growth.lines[2].replace("a shape", "another shape")
    growth.grow(0)
    assert growth.night("edited").requests == 0


def test_an_upgrade_that_is_killed_anywhere_is_completed_by_the_same_call(
    growth: Growth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = latents(growth.old)  # type: ignore[attr-defined]
    step, finished = -1, False
    while not finished:
        step += 1
        dataset = str(tmp_path / f"killed{step}" / "data" / "1234567890abcdef")
        shutil.copytree(tmp_path / "old", dataset)
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with contextlib.suppress(Killed):
                upgrade(dataset)
                finished = True
        assert latents(dataset) == before, "the data set cannot be read in between"
        upgrade(dataset)
        assert latents(dataset) == before and list(problems(dataset)) == []
        assert not upgrade(dataset)
    assert step > 8


@pytest.mark.parametrize("command", ["forget", "compact"])
def test_commands_upgrade_first(growth: Growth, command: str) -> None:
    old = growth.old  # type: ignore[attr-defined]
    if command == "forget":
        assert forget(old, ["k2"]).rows == 1
    else:
        assert compact(old).merged == 0
    assert read_manifest(old)[0].schema_version == 3 and list(problems(old)) == []


def test_a_private_data_set_is_upgraded_where_it_is(growth: Growth, tmp_path: Path) -> None:
    old, private = growth.old, str(tmp_path / "private")  # type: ignore[attr-defined]
    shutil.copytree(old, private)
    assert upgrade(private) and list(problems(private)) == []
    assert latents(private) == latents(old)
