"""Samples: the same clips whatever the order of the rows, and a manifest that is a source and cannot be changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.cli.app import main
from infra import storage
from tasks.ingest.samples import sample_rows, write_sample
from tasks.ingest.sources import find_format, read_rows
from tasks.ingest.spec import SourceSpec
from tasks.records import ClipRef, UserError
from tasks.shards import split_keys, split_of

KEYS = st.lists(st.integers(0, 10**6).map(str), min_size=4, max_size=60, unique=True)


def table_of(keys: list[str], address: str = "memory://samples/t.csv", host: str = "https://host/") -> SourceSpec:
    text = "videoid,contentUrl,name\n" + "".join(f"{key},{host}{key}.mp4,clip {key}\n" for key in keys)
    storage.write_bytes(address, text.encode())
    return SourceSpec(address)


def keys_of(spec: SourceSpec, count: int, seed: int = 0) -> list[str]:
    return [row.key for row in sample_rows(spec, count, seed)[0]]


@settings(max_examples=40, deadline=None)
@given(KEYS, st.randoms(use_true_random=False), st.integers(0, 2**40))
def test_a_sample_begins_with_every_smaller_one_in_any_order_of_rows(keys: list[str], chance, seed: int) -> None:
    spec = table_of(keys)
    largest = keys_of(spec, len(keys), seed)
    assert sorted(largest) == sorted(keys)
    chance.shuffle(keys)
    table_of(keys)
    for count in range(1, len(keys) + 1):
        assert keys_of(spec, count, seed) == largest[:count]


@settings(max_examples=40, deadline=None)
@given(KEYS, KEYS)
def test_splits_part_the_rows_and_stay_when_rows_are_added(keys: list[str], more: list[str]) -> None:
    def splits(keys: list[str]) -> dict[str, set[str]]:
        spec = replace(table_of(keys), held_out=0.2)
        return {
            name: {row.key for row in read_rows(replace(spec, split=name))} for name in ("train", "validation", "test")
        }

    before, after = splits(keys), splits(list(dict.fromkeys(keys + more)))
    assert sum(map(len, before.values())) == len(keys) and set().union(*before.values()) == set(keys)
    assert all(before[name] <= after[name] for name in before)


def test_rows_without_a_key_are_counted_in_exactly_one_split() -> None:
    storage.write_bytes("memory://samples/bad.csv", b"videoid,contentUrl,name\n" + b",u,c\n" * 200)
    spec = SourceSpec("memory://samples/bad.csv", held_out=0.2)
    counts = [len(list(read_rows(replace(spec, split=name)))) for name in ("train", "validation", "test")]
    assert sum(counts) == 200 and min(counts) > 0


def test_shares_are_kept_and_validation_is_what_training_holds_out() -> None:
    keys = [f"clip{number}" for number in range(4000)]
    splits = [split_of(key, 0.1) for key in keys]
    assert [abs(splits.count(name) - want) < 80 for name, want in (("validation", 400), ("test", 400))] == [True, True]
    held_out = split_keys(keys, 0.1)[1]
    assert sorted(held_out) == sorted(key for key in keys if split_of(key, 0.1) == "validation")


def test_another_seed_draws_other_clips() -> None:
    spec = table_of([str(number) for number in range(500)])
    assert keys_of(spec, 50, 0) != keys_of(spec, 50, 1) and keys_of(spec, 50, 0) == keys_of(spec, 50, 0)


def test_a_sample_is_a_source_that_gives_its_rows() -> None:
    spec = replace(table_of([str(number) for number in range(400)]), split="validation", held_out=0.2)
    report = write_sample(spec, 20, 3, "memory://elsewhere/val-20.json")
    sample = SourceSpec(report.sample)
    rows = [row for row in read_rows(sample) if isinstance(row, ClipRef)]
    chosen, usable = sample_rows(spec, 20, 3)
    assert find_format(sample) == "sample" and report.rows == 20 and report.usable == usable < 200
    assert [(row.key, row.url, row.caption) for row in rows] == [(row.key, row.url, row.caption) for row in chosen]
    document = storage.read_json(report.sample)
    assert (
        document["source"]["split"] == "validation" and document["seed"] == 3 and "held_out" in document["split_rule"]
    )
    before = storage.read_bytes(report.sample)
    assert write_sample(spec, 20, 3, report.sample) == report and storage.read_bytes(report.sample) == before


def test_a_changed_sample_is_refused() -> None:
    report = write_sample(table_of(["1", "2", "3"]), 2, 0, "memory://samples/s.json")
    document = storage.read_json(report.sample)
    document["rows"][0]["caption"] = "another"
    storage.write_bytes(report.sample, json.dumps(document).encode())
    with pytest.raises(UserError, match="does not match its sha256"):
        list(read_rows(SourceSpec(report.sample, format="sample")))


def test_a_sample_of_files_next_to_the_table_lies_next_to_it_too(tmp_path: Path) -> None:
    spec = table_of(["1", "2"], str(tmp_path / "set" / "t.csv"), host="videos/")
    with pytest.raises(UserError, match=f"write into {tmp_path}/set"):
        write_sample(spec, 1, 0, str(tmp_path / "s.json"))
    report = write_sample(spec, 1, 0, str(tmp_path / "set" / "s.json"))
    assert next(read_rows(SourceSpec(report.sample))).key in "12"
    write_sample(replace(spec, base_url="https://mirror/"), 1, 0, str(tmp_path / "s.json"))


@pytest.mark.parametrize(("count", "sentence"), [(0, "at least 1"), (9, "has 3 usable rows, expected at least 9")])
def test_a_sample_that_cannot_be_drawn_is_one_sentence(count: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sample_rows(table_of(["1", "2", "3"]), count, 0)


def test_the_command_writes_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text(
        "".join(json.dumps({"id": n, "contentUrl": f"https://h/{n}", "name": "c"}) + "\n" for n in range(99))
    )
    flags = ["--split", "train", "--count", "5", "--seed", "1", "--columns.key", "id"]
    assert main(["sample", "--source", str(table), *flags, "-o", str(tmp_path / "s.json")]) == 0
    spec = SourceSpec(str(table), {"key": "id", "url": "contentUrl", "caption": "name"}, split="train")
    assert [row.key for row in read_rows(SourceSpec(str(tmp_path / "s.json")))] == keys_of(spec, 5, 1)
    assert "sample      5 of " in capsys.readouterr().out
    assert main(["sample", "--source", str(tmp_path / "none.csv"), "-o", str(tmp_path / "s.json")]) == 2
    assert "error: no table at" in capsys.readouterr().err
