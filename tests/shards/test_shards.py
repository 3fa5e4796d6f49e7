"""Shards: readable by webdataset and by their index, with consistent counts, and without a way to run code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infra import storage
from tasks import shards
from tasks.records import Failure, UserError
from tasks.shards import Entry, Outcome, PackedSample, Sample, ShardDataset, ShardManifest
from tasks.shards.split import split_position

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = {"fps": 4.0, "size": 32}


def sample(key: str, seed: int = 0, keep_pixels: bool = True) -> Sample:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return Sample(
        key=key,
        caption=f"a caption, {key}, größer" if seed != 4 else "",
        latents=rng.normal(size=(3, 4, 4, 4)).astype(np.float16),
        first=pixels[0],
        tokens=np.arange(77, dtype=np.int32),
        meta={"clip": key, "times": [0.0, 0.25]},
        pixels=pixels if keep_pixels else None,
    )


FIELDS = replace(sample("a_000"), logvar=np.ones((3, 4, 4, 4), "f2"), text=np.ones((77, 8), "f2")).pack().members


def tar_of(folder: Path, index: int = 0) -> Path:
    (tar,) = folder.glob(f"{shards.shard_name(index)}-*.tar")
    return tar


def make_dataset(uri: str) -> str:
    shards.open_dataset(uri, RECIPE)
    first = shards.write_shard(
        uri,
        label=0,
        rows=(0, 3),
        outcomes=[[sample("a_000", 1), sample("a_001", 2)], Failure("b", 1, "too_short"), [sample("c_000", 3)]],
        recipe_hash="h",
    )
    second = shards.write_shard(uri, 1, (3, 5), [[sample("d_000", 4)], Failure("e", 4, "http_404", "gone")], "h")
    return shards.publish_dataset(uri, RECIPE, "h", {"limit": None}, [first.summary(), second.summary()])


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"


def test_what_was_written_is_read_back_in_any_order(uri: str) -> None:
    make_dataset(uri)
    data = ShardDataset(uri)
    assert len(data) == 4 and data.keys == ["a_000", "a_001", "c_000", "d_000"]
    assert [data.clip_of(i) for i in range(4)] == ["a", "a", "c", "d"]
    for i, seed in ((3, 4), (0, 1), (2, 3), (1, 2)):
        want = sample(data.keys[i], seed)
        got = data.read(i, ("latents", "first", "pixels", "tokens", "caption", "meta"))
        assert got["key"] == want.key and got["caption"] == want.caption and got["meta"] == want.meta
        for name in ("latents", "first", "pixels", "tokens"):
            assert got[name].dtype == getattr(want, name).dtype
            np.testing.assert_array_equal(got[name], getattr(want, name))
    with pytest.raises(IndexError):
        data.read(4)


def test_every_row_is_accounted_for(uri: str) -> None:
    make_dataset(uri)
    manifest = ShardDataset(uri).manifest
    assert manifest["rows"] == 5 == manifest["encoded"] + sum(manifest["failed"].values())
    assert manifest["failed"] == {"http_404": 1, "too_short": 1} and manifest["samples"] == 4


def test_a_shard_that_does_not_account_for_every_row_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        shards.write_shard(str(tmp_path), 0, (0, 3), [[sample("a_000")]], "h")
    assert storage.list_dir(str(tmp_path)) == []


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves it to the garbage collector
def test_webdataset_reads_the_shards_as_plain_tars(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    make_dataset(str(tmp_path))
    read = list(webdataset.WebDataset([str(tar_of(tmp_path))], shardshuffle=False).decode())
    assert [entry["__key__"] for entry in read] == ["a_000", "a_001", "c_000"]
    np.testing.assert_array_equal(read[1]["latents.npy"], sample("a_001", 2).latents)
    assert read[0]["caption.txt"] == sample("a_000").caption and read[0]["meta.json"]["clip"] == "a_000"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = make_dataset(str(tmp_path / "one")), make_dataset(str(tmp_path / "two"))
    assert one == two
    for name in storage.list_dir(str(tmp_path / "one")):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_killed_writer_leaves_no_file_behind(tmp_path: Path) -> None:
    """Whatever it had spooled: the temporary folder of a worker that is killed again and again must not fill up."""
    killed = f"""
import os, signal
from tasks import shards
from tasks.shards.layout import PackedSample
def outcomes():
    yield [PackedSample("a_000", {{"latents": bytes(1 << 20)}})]
    os.kill(os.getpid(), signal.SIGKILL)
shards.write_shard({str(tmp_path / "set")!r}, 0, (0, 2), outcomes(), "h")
"""
    (tmp_path / "spool").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "spool")}
    done = subprocess.run([sys.executable, "-c", killed], cwd=REPOSITORY, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_pickle_inside_an_array_is_not_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("code from a shard ran",))

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(pytest.fail.Exception):
        np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)  # the bomb is live
    with pytest.raises(ValueError, match="an array of Python objects"):
        shards.decode_field("latents", buffer.getvalue())


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # numpy takes a damaged header for one of Python 2
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(shards.SUFFIXES)), st.data())
def test_damaged_bytes_of_a_field_decode_or_are_a_value_error(name: str, data: st.DataObject) -> None:
    damaged = bytearray(FIELDS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(damaged), 130) - 1))
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([*b"{}()[],:'0-\n\xff"])
        ).to_bytes()
    with contextlib.suppress(ValueError):
        shards.decode_field(name, bytes(damaged))


def test_a_field_that_was_not_kept_is_named(tmp_path: Path) -> None:
    manifest = shards.write_shard(str(tmp_path), 0, (0, 1), [[sample("a_000", keep_pixels=False)]], "h")
    shards.publish_dataset(str(tmp_path), RECIPE, "h", {}, [manifest.summary()])
    with pytest.raises(KeyError, match="pixels"):
        ShardDataset(str(tmp_path)).read(0, ("pixels",))


def test_a_folder_without_its_last_file_is_no_data_set(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="run the prepare stage"):
        ShardDataset(str(tmp_path))


def test_a_truncated_shard_and_a_damaged_index_are_rejected(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    tar = tar_of(tmp_path, 1)
    tar.write_bytes(tar.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        ShardDataset(str(tmp_path)).read(3)
    (index,) = tmp_path.glob("index-*.npz")
    content = index.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", b"PK"):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            ShardDataset(str(tmp_path)).read(0)
    index.unlink()
    with pytest.raises(UserError, match=r"index-\w+.npz is missing; prepare the data again"):
        ShardDataset(str(tmp_path)).read(0)


def test_an_index_with_objects_or_of_another_data_set_is_rejected(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    (index,) = tmp_path.glob("index-*.npz")
    arrays = dict(np.load(index))
    np.savez(index, allow_pickle=True, **(arrays | {"reasons": np.array([{}], object)}))
    with pytest.raises(UserError, match="is damaged"):
        ShardDataset(str(tmp_path)).read(0)
    np.savez(index, allow_pickle=False, **(arrays | {"clip_hashes": arrays["clip_hashes"][1:]}))
    with pytest.raises(UserError, match="is not the index of its manifest"):
        ShardDataset(str(tmp_path)).read(0)


def test_shards_of_different_fields_are_no_data_set(tmp_path: Path) -> None:
    one = shards.write_shard(str(tmp_path), 0, (0, 1), [[sample("a_000")]], "h")
    two = shards.write_shard(str(tmp_path), 1, (1, 2), [[sample("b_000", keep_pixels=False)]], "h")
    with pytest.raises(UserError, match="cannot be one data set"):
        shards.publish_dataset(str(tmp_path), RECIPE, "h", {}, [one.summary(), two.summary()])


def test_another_recipe_is_refused_by_name(tmp_path: Path) -> None:
    shards.open_dataset(str(tmp_path), RECIPE)
    shards.open_dataset(str(tmp_path), RECIPE)
    with pytest.raises(UserError, match=r"fps 4.0 -> 8.0.*another output"):
        shards.open_dataset(str(tmp_path), RECIPE | {"fps": 8.0})


def test_the_longest_key_fits_a_plain_tar_header(tmp_path: Path) -> None:
    key = shards.sample_key("k" * 80, 999)
    shards.write_shard(str(tmp_path), 0, (0, 1), [[sample(key)]], "h")
    with tarfile.open(tar_of(tmp_path)) as tar:
        assert all(member.pax_headers == {} and member.mtime == 0 for member in tar)


def test_a_split_keeps_a_clip_on_its_side_and_both_sides_filled() -> None:
    keys = [f"clip{i}" for i in range(400)]
    train, held_out = shards.split_keys(keys, 0.2)
    assert sorted(train + held_out) == sorted(keys) and 50 < len(held_out) < 110
    more_train, more_held_out = shards.split_keys([*keys, "another", "one-more"], 0.2)
    assert set(train) <= set(more_train) and set(held_out) <= set(more_held_out)
    assert [len(side) for side in shards.split_keys(["a", "b", "a"], 0.0)] == [1, 1]
    assert [len(side) for side in shards.split_keys(["a", "b"], 1.0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2"):
        shards.split_keys(["a", "a"], 0.5)


def split_by_definition(keys: list[str], fraction: float) -> set[str]:
    """Holds out the clips whose hash, as a fraction of its range, is below; at least one, never all."""
    place = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys}
    held_out = {key for key in keys if place[key] < fraction} or {min(keys, key=place.__getitem__)}
    return held_out - {max(keys, key=place.__getitem__)} if len(held_out) == len(place) else held_out


def test_a_hash_and_an_array_of_hashes_have_the_same_place() -> None:
    numbers = [0, 1, 2**53 + 1, 2**63 - 1, 2**63 + 1025, 2**64 - 1025, 2**64 - 1]
    places = split_position(np.array(numbers, np.uint64))
    assert [split_position(number) for number in numbers] == places.tolist()
    assert places.tolist() == [number / 2**64 for number in numbers]


@given(st.lists(st.text("ab_0", max_size=3), min_size=2, unique=True), st.floats(0, 1))
@example(["a", "b"], 1.0)
def test_arrays_split_as_the_definition_does(keys: list[str], fraction: float) -> None:
    expected = split_by_definition(keys, fraction)
    assert shards.split_keys([*keys, keys[0]], fraction)[1] == [key for key in keys if key in expected]


def test_a_batch_is_read_as_its_samples_one_by_one_are(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.shards.tar_reader._MOST_OPEN", 1)
    make_dataset(uri)
    data, order = ShardDataset(uri), np.array([3, 0, 2, 3, 1])
    for name in ("latents", "tokens", "pixels"):
        values, damage = data.stack(order, name)
        assert damage == {}
        np.testing.assert_array_equal(values, [data.read(i, (name,))[name] for i in order.tolist()])
    assert data.keys_of(order) == tuple(data.keys[i] for i in order.tolist())
    with pytest.raises(IndexError, match="sample 4 of 4"):
        data.stack(np.array([1, 4]), "latents")


def damage_member(uri: str, i: int, field: str, place: int, content: bytes) -> None:
    """Writes over bytes of a field of sample i of `make_dataset`, counted from the member's first."""
    data = ShardDataset(uri)
    (shard,), (offset,), _ = data._places(np.array([i]), field)
    address = storage.join(uri, data.published.shards[shard].shard)
    held = bytearray(storage.read_bytes(address))
    held[offset + place : offset + place + len(content)] = content
    storage.write_bytes(address, bytes(held))


def test_damaged_samples_of_a_batch_are_reported_and_zero_and_the_others_unchanged(uri: str) -> None:
    make_dataset(uri)
    whole = ShardDataset(uri).stack(np.arange(4), "latents")[0]
    damage_member(uri, 1, "latents", 0, bytes(128))  # a hole in the file, as a broken copy leaves
    damage_member(uri, 2, "latents", 128 + 40, np.array([-np.inf], np.float16).tobytes())
    damage_member(uri, 3, "latents", 128 + 382, np.array([np.nan], np.float16).tobytes())
    values, damage = ShardDataset(uri).stack(np.array([0, 1, 2, 3]), "latents")
    finite = "values that are not finite"
    assert damage == {1: "another header", 2: finite, 3: finite}
    np.testing.assert_array_equal(values[0], whole[0])
    assert not values[1:].any()
    name = ShardDataset(uri).published.shards[1].shard
    content = storage.read_bytes(storage.join(uri, name))
    storage.write_bytes(storage.join(uri, name), content[:1000])
    assert ShardDataset(uri).stack(np.array([3, 0]), "latents")[1] == {0: "truncated"}


def test_an_index_of_many_samples_is_small(tmp_path: Path) -> None:
    """An object per sample would take seven times the bound; ten million samples must fit next to a model."""
    summaries = []
    for index in range(4):
        start = index * 2000
        entries = [
            Entry(f"{10**9 + row}_000", dict.fromkeys(("caption", "first", "latents", "tokens"), (512 * row, 99)))
            for row in range(start, start + 2000)
        ]
        manifest = ShardManifest("", start, start + 2000, "h", 2000, entries, [], "0" * 64, 0).named(index)
        storage.write_json(str(tmp_path / shards.index_name(manifest.shard)), dataclasses.asdict(manifest))
        summaries.append(manifest.summary())
    shards.publish_dataset(str(tmp_path), RECIPE, "h", {}, summaries)
    data = ShardDataset(str(tmp_path))
    data.fields(0)  # the first shard's, and what is loaded once
    tracemalloc.start()
    hashes = data.clip_hashes()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(np.unique(hashes)) == 8000 and held < 120 * 8000


def test_the_fields_of_a_sample_are_one_request_to_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{uuid.uuid4().hex}/set"
    make_dataset(uri)
    data = ShardDataset(uri)
    windows: dict = {"latents": ([1, 0, 1], 2), "tokens": (None, None)}
    samples = np.array([3, 0, 2])
    data.stacks(samples, windows)  # reads the layouts
    requests: list[tuple[str, int, int]] = []
    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *place: requests.append(place) or read_range(*place))
    found = data.stacks(samples, windows)
    assert len(requests) <= len(samples)
    one_by_one = {name: data.stack(samples, name, *window) for name, window in windows.items()}
    for name, (alone, damage) in one_by_one.items():
        assert np.array_equal(found[name][0], alone) and damage == found[name][1] == {}
    assert np.array_equal(found["latents"][0][0], sample("", 4).latents[1:3])
    largest = max(stop - start for _, start, stop in requests)
    monkeypatch.setattr(storage, "read_range", lambda u, a, b: read_range(u, a, b)[: -1 if b - a >= largest else None])
    again = data.stacks(samples, windows)  # what is cut is read again, field by field
    assert all(np.array_equal(again[name][0], one_by_one[name][0]) and not again[name][1] for name in windows)


def test_a_data_set_of_squares_keeps_its_bytes_and_names(tmp_path: Path) -> None:
    """Digests of the format from before frame sizes: other bytes would prepare every data set again."""
    uri, recipe = str(tmp_path / "set"), {"size": 32}
    shards.open_dataset(uri, recipe)
    outcomes: list[Outcome] = [
        [PackedSample(f"c{row}_000", {"caption": b"a", "latents": bytes(128 + 64 * row), "tokens": b"t"})]
        for row in range(3)
    ]
    outcomes.insert(1, Failure("f", 1, "too_short", "1 s"))
    written = shards.write_shard(uri, 0, (0, 4), outcomes, "hash")
    manifest_sha = shards.publish_dataset(uri, recipe, "hash", {}, [written.summary()])
    assert manifest_sha == "7df9503293c881622d4cf94c0543f70687d140f90146219d8a0277149fccf56c"
    digests = {path.name: storage.sha256_file(path)[:16] for path in Path(uri).iterdir()}
    assert digests == {
        "index-0bb93ec6f160b63c.npz": "0bb93ec6f160b63c",
        "manifest.json": "7df9503293c88162",
        "recipe.json": "f8843995f03c7a6c",
        "shard-00000-7d7a06f6eaceca53.json": "bdd94ea6b120f75c",
        "shard-00000-7d7a06f6eaceca53.tar": "4f5c560037487d00",
    }
