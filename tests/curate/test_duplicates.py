"""Duplicates: the earliest row stays, by a rule that no order of work changes, at any size and after any kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from infra import storage
from tasks import shards
from tasks.curate.duplicates import deduplicate, near_earlier
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.records import Failure, UserError, digest
from tasks.shards import Outcome, Sample, ShardDataset
from tests.support.kills import Killed, contents, kill_at

RECIPE = {"size": 8, "filters": {"most_cut": 0.5, "version": 1}}
HASH = digest(RECIPE)


def sample(row: int, picture: int | None, window: int = 0) -> Sample:
    return Sample(
        key=shards.sample_key(f"k{row}", window),
        caption=f"clip {row}",
        latents=np.full((2, 4, 1, 1), row, np.float16),
        first=np.full((8, 8, 3), row, np.uint8),
        tokens=np.arange(7, dtype=np.int32),
        meta={"clip": f"k{row}", "row": row, "picture_hash": None if picture is None else f"{picture:016x}"},
    )


# By row: the hash of its first window, None where it has none, "" for a row that failed. Row 6 is 3 bits from row 0,
# row 7 is 3 from row 6 and 6 from row 0: it stays, for row 6 does not.
ROWS: list[int | str | None] = [0b0, 2**40 - 1, None, "", None, 0b0, 0b111, 0b111111, 2**40 - 2]


def make_dataset(uri: str) -> str:
    """Nine rows in three shards; every clip has a second window that is like row 0."""
    shards.open_dataset(uri, RECIPE)
    parts = []
    for index in range(3):
        outcomes: list[Outcome] = []
        for row in range(3 * index, 3 * index + 3):
            picture = ROWS[row]
            if isinstance(picture, str):
                outcomes.append(Failure(f"k{row}", row, "http_404"))
            else:
                outcomes.append([sample(row, picture), sample(row, 0, 1)])
        parts.append(shards.write_shard(uri, index, (3 * index, 3 * index + 3), outcomes, HASH).summary())
    shards.publish_dataset(uri, RECIPE, HASH, {"limit": None}, parts)
    return uri


def test_the_earliest_row_stays_and_every_row_is_accounted_for(uri: str) -> None:
    make_dataset(uri)
    for address in shards.report_addresses(uri).values():
        storage.write_bytes(address, b"nine clips")
    removal = deduplicate(uri)
    assert (removal.rows, removal.samples, removal.shards) == (3, 6, 2) and list(problems(uri)) == []
    data = ShardDataset(uri)
    assert data.keys == [f"k{row}_{window:03d}" for row in (0, 1, 2, 4, 7) for window in (0, 1)]
    assert data.published.failed == {"duplicate": 3, "http_404": 1} and data.published.rows == 9
    details = {}
    for shard in data.published.shards:
        manifest = shards.read_shard_manifest(uri, shard.shard)
        assert manifest is not None
        details |= {failure.row: failure.detail for failure in manifest.failures if failure.reason == "duplicate"}
    assert {row: detail.split(",")[0] for row, detail in details.items()} == {
        5: "shows what row 0 shows",
        6: "shows what row 0 shows",
        8: "shows what row 1 shows",
    }
    assert not any(storage.exists(address) for address in shards.report_addresses(uri).values())
    before = contents(uri)
    assert deduplicate(uri).rows == 0 and contents(uri) == before


def test_how_near_is_asked(tmp_path: Path) -> None:
    assert deduplicate(make_dataset(str(tmp_path / "exact")), distance=0).rows == 1
    assert deduplicate(make_dataset(str(tmp_path / "wide")), distance=6).rows == 4
    for distance in (-1, 9):
        with pytest.raises(UserError, match=f"distance {distance}, expected a number of bits from 0 to 8"):
            deduplicate(str(tmp_path / "exact"), distance)


def test_killed_anywhere_the_same_command_completes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_dataset(str(tmp_path / "whole"))
    deduplicate(whole)
    for step in range(99):
        uri = make_dataset(str(tmp_path / f"killed{step}"))
        with monkeypatch.context() as patch:
            happened = kill_at(patch, step)
            try:
                deduplicate(uri)
            except Killed:
                pass
            else:
                break
        assert len(happened) == step and len(ShardDataset(uri)) in (10, 16)
        deduplicate(uri)
        assert contents(uri) == contents(whole), happened
    else:
        raise AssertionError("the command never ended")
    # Two reports, two shards of two files, index and manifest, and the removal of four files and an index.
    assert len(happened) == 2 + 4 + 2 + 5


def test_a_removal_on_request_that_was_cut_off_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make_dataset(str(tmp_path))
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            forget(uri, ["k0"])
    with pytest.raises(UserError, match="repeat the command forget"):
        deduplicate(uri)
    forget(uri, ["k0"])
    assert deduplicate(uri).rows == 2 and list(problems(uri)) == []
    assert b"k0" not in b"".join(contents(uri).values())


def test_an_invalid_hash_is_reported(tmp_path: Path) -> None:
    uri = str(tmp_path)
    shards.open_dataset(uri, RECIPE)
    broken = sample(0, 0)
    broken.meta["picture_hash"] = "no number"
    part = shards.write_shard(uri, 0, (0, 1), [[broken]], HASH).summary()
    shards.publish_dataset(uri, RECIPE, HASH, {}, [part])
    with pytest.raises(UserError, match=r"is damaged .*verify the data set"):
        deduplicate(uri)


@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_the_bands_find_what_comparing_all_pairs_finds(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes: list[int] = [int(word) for word in rng.integers(0, 2**64, 200, dtype=np.uint64)]
    for _ in range(400):  # relatives of relatives, up to 9 bits away
        word = hashes[rng.integers(len(hashes))]
        for bit in rng.choice(64, rng.integers(0, 10), replace=False):
            word ^= 1 << int(bit)
        hashes.append(word)
    order = rng.permutation(len(hashes))
    hashes = [hashes[place] for place in order]
    stays: list[int] = []
    for place, word in enumerate(hashes):
        if all((word ^ hashes[earlier]).bit_count() > distance for earlier in stays):
            stays.append(place)
    gone = near_earlier(np.array(hashes, np.uint64), distance)
    assert sorted(gone) == sorted(set(range(len(hashes))) - set(stays)) and gone
    for place, (earlier, bits) in gone.items():
        assert earlier in stays and bits == (hashes[place] ^ hashes[earlier]).bit_count() <= distance
    assert near_earlier(np.array([], np.uint64), distance) == {}
