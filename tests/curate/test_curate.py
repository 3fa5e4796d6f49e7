"""A data set at rest: every fault in it is named, clips are removed on request, and a kill in between is made good."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra import storage
from infra.redaction import name_of
from tasks import shards
from tasks.curate.forget import forget
from tasks.curate.verify import problems
from tasks.records import Failure, UserError, digest
from tasks.shards import Outcome, Sample, ShardDataset
from tests.support.kills import Killed, contents, kill_at

RECIPE = {"fps": 4.0, "size": 32}
HASH = digest(RECIPE)
URL = "https://example.org/{}.mp4"


def sample(clip: str, row: int, window: int = 0) -> Sample:
    rng = np.random.default_rng([row, window])
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return Sample(
        key=shards.sample_key(clip, window),
        caption=f"the caption of {clip}",
        latents=rng.normal(size=(3, 4, 4, 4)).astype(np.float16),
        first=pixels[0],
        tokens=np.arange(77, dtype=np.int32),
        meta={"clip": clip, "row": row, "url": URL.format(clip), "times": [0.0, 0.25, 0.5]},
        pixels=pixels,
    )


OUTCOMES: list[list[Outcome]] = [
    [[sample("a", 0), sample("a", 0, 1)], Failure("b", 1, "too_short"), [sample("c", 2)]],
    [[sample("d", 3)], Failure("e", 4, "http_404", f"{URL.format('e')}: gone")],
    [[sample("f", 5)]],
]


def make_dataset(uri: str, outcomes: list[list[Outcome]] = OUTCOMES) -> str:
    """Rows 0 to 5 in three shards; returns the address."""
    shards.open_dataset(uri, RECIPE)
    parts, start = [], 0
    for index, rows in enumerate(outcomes):
        parts.append(shards.write_shard(uri, index, (start, start + len(rows)), rows, HASH).summary())
        start += len(rows)
    shards.publish_dataset(uri, RECIPE, HASH, {"limit": None}, parts)
    return uri


def tar_of(folder: Path, index: int = 0) -> Path:
    (tar,) = folder.glob(f"{shards.shard_name(index)}-*.tar")
    return tar


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_valid_data_set_has_no_problems_and_progress_is_per_shard(uri: str) -> None:
    ticks: list[dict[str, Any]] = []
    assert list(problems(make_dataset(uri), ticks.append)) == []
    assert [(tick["done"], tick["total"]) for tick in ticks] == [(3, 6), (5, 6), (6, 6)]


def test_a_shard_of_failures_only_is_valid(tmp_path: Path) -> None:
    assert list(problems(make_dataset(str(tmp_path), [OUTCOMES[0], [Failure("x", 3, "http_404")]]))) == []


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a flipped byte": (lambda f: flip(tar_of(f), 2000), ["png: ", "damaged, sha256"]),
    "a cut inside": (lambda f: tar_of(f).write_bytes(tar_of(f).read_bytes()[:9000]), ["as a tar", "9000 bytes", "sha"]),
    "a cut between members": (
        lambda f: tar_of(f).write_bytes(tar_of(f).read_bytes()[:1024]),
        ["ends before a_000.first.png", "1024 bytes, expected", "damaged"],
    ),
    "bytes behind the end": (
        lambda f: tar_of(f, 1).write_bytes(tar_of(f, 1).read_bytes() + b"more"),
        ["bytes, expected", "damaged"],
    ),
    "no tar": (lambda f: tar_of(f, 1).unlink(), [r"shard-00001-\w+.tar: is missing"]),
    "no index": (
        lambda f: tar_of(f, 1).with_suffix(".json").unlink(),
        [r"shard-00001-\w+.json: is missing", "rows 6, .* 4", "encoded 4, .* 3", "samples 5, .* 4", "failed"],
    ),
    "an index that is none": (
        lambda f: tar_of(f, 2).with_suffix(".json").write_text("{}"),
        ["cannot be read .shard: Field required", "rows 6", "encoded", "samples"],
    ),
    "an edited index": (
        lambda f: edit(tar_of(f, 2).with_suffix(".json"), lambda v: v["samples"][0]["members"]["meta"].reverse()),
        ["changed after it was written", "contains f_000.caption.txt .* its index f_000.meta.json"],
    ),
    "a row lost from the books": (
        lambda f: edit(tar_of(f).with_suffix(".json"), lambda v: v["failures"].clear()),
        ["changed after", "the counts do not add up", "failed .*, its shards add up to"],
    ),
    "a failure of another shard": (
        lambda f: edit(tar_of(f).with_suffix(".json"), lambda v: v["failures"][0].update(row=7)),
        ["changed after", "the counts do not add up"],
    ),
    "a manifest that is none": (lambda f: (f / "manifest.json").write_text("["), ["manifest.json is not JSON"]),
    "a manifest of another time": (
        lambda f: edit(f / "manifest.json", lambda v: v.update(schema_version=9)),
        ["schema 9, expected 2 or 3"],
    ),
    "a manifest with too many rows": (
        lambda f: edit(f / "manifest.json", lambda v: v.update(rows=7)),
        ["rows 7, its shards add up to 6", "7 rows are not 4 encoded"],
    ),
    "a gap between shards": (
        lambda f: edit(f / "manifest.json", lambda v: v["shards"][1].update(rows=[4, 5])),
        [r"rows \(3, 5\), manifest.json has \(4, 5\)", "begins at row 4, expected 3"],
    ),
    "a source of fewer rows": (
        lambda f: edit(f / "manifest.json", lambda v: v["source"].update(limit=3)),
        ["its source has the limit 3, with 6 rows"],
    ),
    "a source with one thing more": (
        lambda f: edit(f / "manifest.json", lambda v: v["source"].update(split="train")),
        ["its source has 'split', which is not part of it"],
    ),
    "a source of another table": (
        lambda f: edit(f / "manifest.json", lambda v: v["source"].update(table_sha256="0" * 64)),
        ["its source has the table_sha256 '0+', its recipe None"],
    ),
    "another recipe in the manifest": (
        lambda f: edit(f / "manifest.json", lambda v: v["recipe"].update(fps=8.0)),
        ["recipe.json: is not the recipe of manifest.json", "recipe_hash is"],
    ),
    "no recipe": (lambda f: (f / "recipe.json").unlink(), ["recipe.json: is missing"]),
    "a stray file": (lambda f: (f / "notes.txt").write_text("x"), ["notes.txt: is not part of the data set"]),
    "a stray shard": (
        lambda f: (f / "shard-00001.tar").write_bytes(b"x"),
        ["shard-00001.tar: is not part of the data set"],
    ),
    "takedowns that the manifest does not follow": (
        lambda f: shards.write_takedowns(str(f), shards.Takedowns({shards.mark("a"): "asked"})),
        ["manifest.json: does not match forgotten.json", "contains a clip that is taken down"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(tmp_path: Path, fault: str) -> None:
    make_dataset(str(tmp_path))
    damage, expected = FAULTS[fault]
    damage(tmp_path)
    found = list(problems(str(tmp_path)))
    assert len(found) == len(expected), found
    for pattern, line in zip(expected, found, strict=True):
        assert re.search(pattern, line), (pattern, line)
        assert "\n" not in line


def odd(clip: str, row: int) -> Sample:
    """Returns a sample with another shape than all others."""
    return replace(sample(clip, row), latents=np.zeros((3, 4, 8, 8), np.float16))


@pytest.mark.parametrize("first", [sample("x0", 0), odd("x0", 0)], ids=["whole", "the odd one first"])
def test_more_workers_report_the_same_in_the_same_order(tmp_path: Path, first: Sample) -> None:
    rows = [first] + [odd(f"x{row}", row) if row in (4, 5, 9) else sample(f"x{row}", row) for row in range(1, 12)]
    make_dataset(str(tmp_path), [[[item]] for item in rows])
    flip(tar_of(tmp_path, 2), 2000)
    flip(tar_of(tmp_path, 10), 2000)
    tar_of(tmp_path, 7).unlink()
    alone = list(problems(str(tmp_path)))
    assert len([line for line in alone if "other samples have" in line]) == (3 if first.latents.shape[2] == 4 else 7)
    for workers in (2, 5):
        ticks: list[dict[str, Any]] = []
        assert list(problems(str(tmp_path), ticks.append, workers)) == alone
        assert [tick["done"] for tick in ticks] == list(range(1, 13))
    with pytest.raises(UserError, match="workers 0, expected at least 1"):
        list(problems(str(tmp_path), workers=0))


def test_workers_read_no_further_ahead_than_twice_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(str(tmp_path), [[[sample(f"x{row}", row)]] for row in range(12)])
    opened: list[str] = []
    stream = storage.open_stream
    monkeypatch.setattr(storage, "open_stream", lambda uri: (opened.append(uri), stream(uri))[1])
    (tmp_path / shards.index_name(tar_of(tmp_path).name)).write_text("{}")
    found = problems(str(tmp_path), workers=2)
    assert "cannot be read" in next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(opened) <= 4


def test_an_unfinished_data_set_is_reported_with_its_progress(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    (line,) = problems(str(tmp_path))
    assert line.startswith("unfinished: manifest.json is missing; 3 shards contain rows 0 to 5 (4 encoded)")
    tar = tar_of(tmp_path, 1)
    tar.with_suffix(".json").unlink()
    tar.unlink()
    (line,) = problems(str(tmp_path))
    assert "2 shards contain rows 0 to 2, 5 to 5 (3 encoded)" in line
    assert list(problems(str(tmp_path / "none"))) == [f"{tmp_path / 'none'}: is missing or empty"]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("code from a shard ran",))


BAD_FIELDS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "pickle": ({"latents": npy(np.array([Bomb()], dtype=object))}, "latents.npy: an array of Python objects"),
    "infinite": ({"latents": npy(np.full((3, 4, 4, 4), np.inf, np.float16))}, "not finite"),
    "type": ({"latents": npy(np.zeros((3, 4, 4, 4), np.float32))}, "float32 of 4 dimensions, expected float16"),
    "dimensions": ({"tokens": npy(np.zeros((1, 77), np.int32))}, "int32 of 2 dimensions"),
    "shape": ({"latents": npy(np.zeros((3, 4, 8, 8), np.float16))}, r"shape \(3, 4, 8, 8\), other samples"),
    "lying header": (
        {"tokens": npy(np.zeros(7, np.int32)).replace(b"(7,)", b"(9,)")},
        r"shape \(9,\) of int32 does not",
    ),
    "cut": ({"tokens": npy(np.zeros(7, np.int32))[:-1]}, "does not fit 27 bytes"),
    "text": ({"caption": b"\xff"}, "caption.txt: .*utf-8"),
    "json": ({"meta": b"{"}, "meta.json: "),
    "deep json": ({"meta": b"[" * 100_000}, "nested too deeply|Expecting"),
    "list": ({"meta": b"[]"}, "meta is not an object"),
    "png": ({"first": b"GIF89a"}, "first.png: not a PNG"),
    "frames": ({"latents": npy(np.zeros((2, 4, 4, 4), np.float16))}, "2 frames of latents, 3 times"),
    "another first frame": ({"first": sample("x", 99).pack().members["first"]}, "not that of the pixels"),
    "another clip": ({"meta": b'{"clip": "z"}'}, "names the clip 'z'"),
    "other pixels": ({"meta": b'{"pixels_sha256": "00"}'}, "pixels_sha256"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_bad_field_is_named_though_every_checksum_is_right(tmp_path: Path, case: str) -> None:
    changed, expected = BAD_FIELDS[case]
    members = sample("g", 6).pack().members | changed
    packed = shards.PackedSample("g_000", {name: data for name, data in members.items() if data is not None})
    make_dataset(str(tmp_path), [*OUTCOMES, [[packed]]])
    found = list(problems(str(tmp_path)))
    assert found and all("g_000" in line and line.startswith("shard-00003-") for line in found), found
    assert re.search(expected, "\n".join(found)), found


def test_a_field_that_all_samples_miss_is_named(tmp_path: Path) -> None:
    members = {name: data for name, data in sample("g", 0).pack().members.items() if name != "tokens"}
    make_dataset(str(tmp_path), [[[shards.PackedSample("g_000", members)]]])
    (line,) = problems(str(tmp_path))
    assert line.endswith("g_000 has no tokens")


def test_an_index_file_that_its_shards_do_not_have_is_named(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    (index,) = tmp_path.glob("index-*.npz")
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    (line,) = problems(str(tmp_path))
    assert re.fullmatch(r"index-\w+\.npz: damaged, sha256 \w+, expected \w+", line)
    index.unlink()
    assert list(problems(str(tmp_path))) == [f"{index.name}: is missing"]


def test_what_lies_in_a_tar_besides_its_index_is_named(tmp_path: Path) -> None:
    shards.open_dataset(str(tmp_path), RECIPE)
    manifest = shards.write_shard(str(tmp_path), 0, (0, 1), [[sample("a", 0)]], HASH)
    tar = tar_of(tmp_path)
    with tarfile.open(tar, "a", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("a_001.payload.pkl")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"evil"))
    forged = replace(manifest, size_bytes=tar.stat().st_size, sha256=storage.sha256_file(tar)).named(0)
    tar.rename(tmp_path / forged.shard)
    tar.with_suffix(".json").unlink()
    storage.write_json(str(tmp_path / shards.index_name(forged.shard)), dataclasses.asdict(forged))
    shards.publish_dataset(str(tmp_path), RECIPE, HASH, {}, [forged.summary()])
    assert list(problems(str(tmp_path))) == [
        f"{forged.shard}: contains a_001.payload.pkl, which its index does not list"
    ]


def test_a_clip_that_is_there_twice_is_named(tmp_path: Path) -> None:
    make_dataset(str(tmp_path), [*OUTCOMES, [[sample("a", 6)]]])
    (line,) = problems(str(tmp_path))
    assert re.search(r"shard-00003-\w+.json: clip a occurs a second time", line)


def test_removed_clips_are_gone_and_the_rest_is_unchanged(uri: str) -> None:
    make_dataset(uri)
    whole = ShardDataset(uri)
    before = {key: whole.read(i, whole.fields(i)) for i, key in enumerate(whole.keys)}
    third = [name for name in contents(uri) if name.startswith("shard-00002")]
    kept = {name: contents(uri)[name] for name in third}
    for address in shards.report_addresses(uri).values():
        storage.write_bytes(address, b"a picture of what is removed")

    report = forget(uri, ["a", URL.format("d"), URL.format("e"), "nobody"], "letter of May")
    assert (report.rows, report.samples, report.shards, report.unknown) == (3, 3, 2, ("nobody",))
    assert list(problems(uri)) == []
    data = ShardDataset(uri)
    assert data.manifest_sha256 == report.manifest_sha and data.keys == ["c_000", "f_000"]
    assert data.manifest["failed"] == {"forgotten": 3, "too_short": 1} and data.manifest["rows"] == 6
    for i, key in enumerate(data.keys):
        got = data.read(i, data.fields(i))
        assert got.keys() == before[key].keys()
        assert all(np.array_equal(got[name], before[key][name]) for name in got)
    after = contents(uri)
    assert {name: after[name] for name in third} == kept
    for name, content in after.items():
        for trace in ("caption of a", "caption of d", "a_000", "d_000", '"a"', '"d"', '"e"', URL.format("d")):
            assert trace.encode() not in content, (name, trace)
    assert not any(storage.exists(address) for address in shards.report_addresses(uri).values())

    again = forget(uri, ["a", URL.format("d")], "another letter")
    assert (again.rows, again.shards, again.unknown) == (0, 0, ()) and contents(uri) == after


def test_a_url_with_a_secret_is_known_by_its_hash(tmp_path: Path) -> None:
    urls = [f"https://ops:hunter2@example.org/v?key={key}" for key in ("one", "two", "three", "four")]
    first, second = (
        replace(sample(key, row), meta={"clip": key, "row": row, "url": name_of(urls[row])})
        for key, row in (("a", 0), ("b", 1))
    )
    rows: list[Outcome] = [
        [first],
        [second],
        Failure("c", 2, "http_404", f"{name_of(urls[2])}: gone"),
        Failure("d", 3, "http_404", f"{name_of(urls[3])}: gone"),
    ]
    uri = make_dataset(str(tmp_path / "set"), [rows])
    assert not any(b"hunter2" in content for content in contents(uri).values())
    report = forget(uri, [urls[0], urls[2]])
    assert (report.rows, report.unknown) == (2, ()) and ShardDataset(uri).keys == ["b_000"]


def test_a_key_is_known_as_the_table_spells_it(tmp_path: Path) -> None:
    uri = make_dataset(str(tmp_path))
    report = forget(uri, ["A"], as_key=str.lower)
    assert report.rows == 1 and report.unknown == () and "a_000" not in ShardDataset(uri).keys


def test_a_removal_that_is_killed_anywhere_is_completed_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_dataset(str(tmp_path / "whole"))
    ids = ["a", URL.format("d"), "nobody"]
    forget(whole, ids)
    for step in range(99):
        uri = make_dataset(str(tmp_path / f"killed{step}"))
        untouched = contents(uri)
        with monkeypatch.context() as patch:
            happened = kill_at(patch, step)
            try:
                forget(uri, ids)
            except Killed:
                pass
            else:
                break
        assert len(happened) == step
        if contents(uri) != untouched and contents(uri) != contents(whole):
            assert list(problems(uri)), f"killed after {happened[-1]}: no problem is reported"
        published = "manifest.json" in " ".join(happened)
        if contents(uri) != untouched and not published:
            with pytest.raises(UserError, match="repeat the command forget"):
                ShardDataset(uri)
        report = forget(uri, ids)
        assert contents(uri) == contents(whole), happened
        assert published or report.unknown == ("nobody",)
    else:
        raise AssertionError("the command never ended")
    # The list, two shards of two files, index and manifest, and the removal of two reports, four files and an index.
    assert len(happened) == 1 + 4 + 2 + 2 + 5
    assert contents(uri) == contents(whole)


def test_a_damaged_shard_is_not_given_a_new_checksum(tmp_path: Path) -> None:
    uri = make_dataset(str(tmp_path))
    flip(tar_of(tmp_path), 2000)
    with pytest.raises(UserError, match=r"shard-00000-\w+.tar of .* is damaged"):
        forget(uri, ["a"])


def test_a_reader_at_work_meets_the_old_data_or_an_error(tmp_path: Path) -> None:
    uri = make_dataset(str(tmp_path))
    reader = ShardDataset(uri)
    expected = reader.read(2, ("latents",))["latents"]
    state = reader.__getstate__()
    forget(uri, ["a"])
    with pytest.raises(UserError, match="open it again"):
        reader.read(2, ("latents",))
    with pytest.raises(UserError, match="open it again"):
        ShardDataset.__new__(ShardDataset).__setstate__(state)
    np.testing.assert_array_equal(ShardDataset(uri).read(0, ("latents",))["latents"], expected)


def test_no_finished_data_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the prepare stage"):
        forget(str(tmp_path), ["a"])
