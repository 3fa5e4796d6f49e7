"""The prepare stage: it accounts for every row, writes complete shards, and gives the same data set after any kill."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from infra import storage
from infra.cluster import ray_session
from tasks.encode import job
from tasks.encode.encoder import ClipEncoder, decode_ahead, open_decoders
from tasks.encode.job import prepare
from tasks.encode.spec import PrepareReport, PrepareSpec
from tasks.ingest.demo import serve_folder, write_demo_corpus
from tasks.ingest.download import Fetched
from tasks.ingest.spec import DownloadSpec, SourceSpec
from tasks.json_records import parse_record
from tasks.records import ClipRef, Failure, UserError, to_json
from tasks.shards import Sample, ShardDataset
from tasks.video.decode import read_clip
from tasks.video.spec import DecodeSpec
from trip_model.encoders import encode_pixels, load_vae
from trip_model.images import video_bytes


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(None, 2):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_demo_corpus(tmp_path_factory.mktemp("corpus"), clips=6, size=32)


def spec_for(table: str, base: Path, output: Path | str, **changes: Any) -> PrepareSpec:
    spec = PrepareSpec(SourceSpec(table), str(output), str(base), size=32, clips_per_shard=2, workers=0)
    return replace(spec, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encoded(
    base: Path, spec: PrepareSpec, rows: list[tuple[ClipRef, Fetched] | Failure]
) -> list[list[Sample] | Failure]:
    with open_decoders(spec, DecodeSpec(), 1) as decoders:
        return list(ClipEncoder(base, spec).encode(decode_ahead(rows, decoders)))


def test_a_clip_becomes_samples_with_provenance(tiny_base: Path, corpus: str) -> None:
    data = next((Path(corpus).parent / "videos").rglob("*.mp4")).read_bytes()
    spec = PrepareSpec(num_frames=4, size=32, windows_per_clip=2, keep_pixels=True)
    [samples] = encoded(tiny_base, spec, [(ClipRef("k", "videos/k.mp4", "a red circle", 5), Fetched(data, "hash"))])
    assert isinstance(samples, list) and [sample.key for sample in samples] == ["k_000", "k_001"]
    first, second = samples
    clip = read_clip(data, num_frames=4, fps=4.0, size=32)
    assert first.pixels is not None
    np.testing.assert_array_equal(first.pixels, clip.pixels)
    np.testing.assert_array_equal(first.first, clip.pixels[0])
    want = encode_pixels(load_vae(tiny_base), clip.pixels)
    torch.testing.assert_close(torch.from_numpy(first.latents.astype(np.float32)), want, atol=2e-3, rtol=2e-3)
    assert first.latents.dtype == np.float16 and first.latents.shape == (4, 4, 4, 4)
    assert first.tokens.dtype == np.int32 and first.tokens.ndim == 1
    assert (first.meta["sha256"], first.meta["size_bytes"]) == ("hash", len(data))
    np.testing.assert_allclose(second.meta["times"], [1.0, 1.25, 1.5, 1.75], atol=1e-3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (video_bytes(np.zeros((6, 32, 32, 3), np.uint8), 12.0), "too_short"),
        (b"\x00\x00\x00\x18ftypmp42" + b"noise" * 99, "undecodable"),
    ],
)
def test_a_clip_that_cannot_be_used_is_a_row_with_a_reason(tiny_base: Path, data: bytes, reason: str) -> None:
    [result] = encoded(tiny_base, PrepareSpec(size=32), [(ClipRef("k", "u", "c", 3), Fetched(data, "hash"))])
    assert isinstance(result, Failure) and (result.key, result.row, result.reason) == ("k", 3, reason)


@pytest.mark.parametrize("frames_per_batch", [1, 5, 16, 64])
def test_the_neighbours_of_a_clip_change_nothing_about_its_sample(
    tiny_base: Path, corpus: str, frames_per_batch: int
) -> None:
    spec = PrepareSpec(num_frames=3, size=32, windows_per_clip=3, frames_per_batch=frames_per_batch)
    videos = [path.read_bytes() for path in sorted((Path(corpus).parent / "videos").rglob("*.mp4"))]
    rows: list[tuple[ClipRef, Fetched] | Failure] = [
        (ClipRef(f"k{row}", "u", "a shape", row), Fetched(data, "hash")) for row, data in enumerate(videos)
    ]
    with_failures = [
        Failure("a", 0, "x"),
        *rows[:2],
        Failure("b", 1, "x"),
        rows[3],
        (rows[4][0], Fetched(b"", "")),
        rows[5],
    ]  # type: ignore[index]
    together, apart = encoded(tiny_base, spec, rows), encoded(tiny_base, spec, with_failures)
    reasons = [outcome.reason if isinstance(outcome, Failure) else "" for outcome in apart]
    assert reasons == ["x", "", "", "x", "", "undecodable", ""]
    for alone, place in ((1, 0), (2, 1), (4, 3), (6, 5)):
        for sample, other in zip(apart[alone], together[place], strict=True):  # type: ignore[arg-type]
            assert sample.key == other.key and sample.meta == other.meta
            np.testing.assert_array_equal(sample.latents, other.latents)


def test_latents_that_are_not_finite_are_a_failure(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    vae = load_vae(base)
    vae.quant_conv.bias.fill_(1e6)  # type: ignore[union-attr, operator]
    vae.save_pretrained(base / "vae")  # type: ignore[operator]
    data = next((Path(corpus).parent / "videos").rglob("*.mp4")).read_bytes()
    [result] = encoded(base, PrepareSpec(num_frames=4, size=32), [(ClipRef("k", "u", "c", 3), Fetched(data, "hash"))])
    assert isinstance(result, Failure) and result.reason == "non_finite_latents"


def test_a_size_that_the_vae_cannot_halve_is_rejected(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="size 36, expected a multiple of"):
        ClipEncoder(tiny_base, PrepareSpec(size=36))


def test_every_row_is_accounted_for(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "videos").mkdir(parents=True)
    clips = sorted((Path(corpus).parent / "videos").rglob("*.mp4"))
    rows = []
    for index, clip in enumerate(clips[:3]):
        (folder / "videos" / f"{index}.mp4").write_bytes(clip.read_bytes())
        rows.append([f"clip.{index}", f"videos/{index}.mp4", "a shape"])
    (folder / "videos" / "page.mp4").write_bytes(b"<html>")
    (folder / "videos" / "short.mp4").write_bytes(video_bytes(np.zeros((6, 32, 32, 3), np.uint8), 12.0))
    rows += [["page", "videos/page.mp4", "c"], ["gone", "videos/gone.mp4", "c"], ["short", "videos/short.mp4", "c"]]
    rows += [["clip.0", "videos/0.mp4", "twice"], ["empty", "videos/0.mp4", ""]]
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["videoid", "contentUrl", "name"], *rows])

    ticks: list[dict[str, Any]] = []
    report = prepare(spec_for(str(folder / "t.csv"), tiny_base, tmp_path / "out"), ticks.append)
    assert (report.rows, report.encoded, report.samples, report.shards) == (8, 3, 3, 4)
    assert report.failed == {"bad_row": 1, "duplicate_key": 1, "missing_file": 1, "not_a_video": 1, "too_short": 1}
    assert report.rows == report.encoded + sum(report.failed.values())
    assert [tick["done"] for tick in ticks] == [2, 4, 6, 8] and ticks[-1]["total"] == 8
    assert ticks[-1]["eta_seconds"] == 0 and ticks[-1]["encoded"] == 3
    data = ShardDataset(report.dataset)
    assert data.manifest_sha256 == report.manifest_sha and len(data.keys) == 3
    assert all("." not in key for key in data.keys)
    assert parse_record(PrepareReport, json.dumps(to_json(report))) == report


def test_a_run_that_is_killed_and_repeated_ends_in_the_same_bytes(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    whole = prepare(spec_for(corpus, tiny_base, tmp_path / "whole"))

    class Killed(BaseException):
        pass

    def kill_after_the_first_shard(tick: dict[str, Any]) -> None:
        raise Killed

    spec = spec_for(corpus, tiny_base, tmp_path / "broken")
    with pytest.raises(Killed):
        prepare(spec, kill_after_the_first_shard)
    assert "manifest.json" not in os.listdir(tmp_path / "broken")
    (tmp_path / "broken" / "shard-00001-0123456789abcdef.tar").write_bytes(b"a tar whose manifest never came")
    (tmp_path / "broken" / ".shard-00002.tar.1.part").write_bytes(b"half")
    report = prepare(spec)
    assert report.shards_reused == 1 and report.manifest_sha == whole.manifest_sha
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_finished_data_set_is_reused_without_starting_a_worker(
    tiny_base: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(corpus, tiny_base, tmp_path)
    first = prepare(spec)

    def no_worker(*_: object) -> None:
        raise AssertionError("a worker was asked for")

    monkeypatch.setattr(job, "ray_session", no_worker)
    monkeypatch.setattr(job, "ClipEncoder", no_worker)
    again = prepare(spec)
    assert again.shards_reused == again.shards == 3
    assert replace(again, seconds=0, shards_reused=0) == replace(first, seconds=0, shards_reused=0)
    moved = replace(spec, source=replace(spec.source, base_url="http://127.0.0.1:9/"), workers=2)
    assert prepare(moved).manifest_sha == first.manifest_sha


def test_another_recipe_does_not_mix(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    spec = spec_for(corpus, tiny_base, tmp_path)
    prepare(spec)
    before = contents(tmp_path)
    for change in ({"fps": 8.0}, {"num_frames": 8}, {"keep_pixels": True}):
        with pytest.raises(UserError, match=f"{next(iter(change))} .* -> .*another output"):
            prepare(replace(spec, **change))
    assert contents(tmp_path) == before


def test_more_rows_of_the_same_table_join_what_is_there(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    spec = spec_for(corpus, tiny_base, tmp_path / "grown")
    prepare(replace(spec, source=replace(spec.source, limit=3)))
    grown = prepare(spec)
    assert (grown.rows, grown.shards_reused, grown.shards) == (6, 2, 4)
    assert grown.samples == 6 and len(set(ShardDataset(grown.dataset).keys)) == 6


@pytest.mark.slow
def test_ray_workers_give_the_same_bytes_also_when_one_is_lost(
    cluster: None, tiny_base: Path, corpus: str, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_a_worker_once(tick: dict[str, Any]) -> None:
        if tick["done"] and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if "EncodeWorker" in " ".join(_cmdline(p))]
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    spec = spec_for(corpus, tiny_base, tmp_path / "lost", workers=2, clips_per_shard=1)
    report = prepare(spec, kill_a_worker_once)
    assert killed and report.encoded == report.rows == 6
    calm = prepare(replace(spec, output=str(tmp_path / "calm"), workers=0))
    assert calm.manifest_sha == report.manifest_sha
    assert contents(tmp_path / "calm") == contents(tmp_path / "lost")


def test_what_a_worker_finds_wrong_reaches_the_person_as_one_sentence(
    cluster: None, tiny_base: Path, corpus: str, tmp_path: Path
) -> None:
    spec = spec_for(corpus, tiny_base, tmp_path / "odd", workers=1)
    for bad, sentence in (
        (replace(spec, size=36), "size 36, expected a multiple of 8"),
        (replace(spec, output=str(tmp_path / "big"), cpus_per_worker=64), "does not fit the Ray session"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            prepare(bad)
        assert "\n" not in str(caught.value)


def test_the_demo_corpus_over_loopback_gives_what_the_files_give(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    with serve_folder(Path(corpus).parent) as url:
        spec = spec_for(corpus, tiny_base, tmp_path / "http")
        served = prepare(replace(spec, source=replace(spec.source, base_url=url)))
    assert served.manifest_sha == prepare(spec_for(corpus, tiny_base, tmp_path / "files")).manifest_sha


def test_a_source_where_every_row_fails_is_reported_with_reasons_and_tried_again(
    tiny_base: Path, corpus: str, tmp_path: Path
) -> None:
    spec = spec_for(corpus, tiny_base, tmp_path, download=DownloadSpec(attempts=1))
    dead = replace(spec, source=replace(spec.source, base_url="http://127.0.0.1:9/"))
    with pytest.raises(UserError, match=r"0 of 6 clips .* \(network 6\)"):
        prepare(dead)
    assert "manifest.json" not in os.listdir(tmp_path)
    assert prepare(spec).encoded == 6


def test_bad_input_is_one_sentence(tiny_base: Path, corpus: str, tmp_path: Path) -> None:
    spec = spec_for(corpus, tiny_base, tmp_path / "out")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.csv").write_text("videoid,contentUrl,name\n")
    (tmp_path / "base").mkdir()
    cases = {
        "no table at": replace(spec, source=SourceSpec(str(tmp_path / "none.csv"))),
        "has no rows": replace(spec, source=SourceSpec(str(tmp_path / "empty.csv"))),
        "has no unet, vae": replace(spec, base=str(tmp_path / "base")),
        "cannot be written": replace(spec, output=str(tmp_path / "file")),
        "memory is not shared": replace(spec, output="memory://x", workers=1),
        "fps 0": replace(spec, fps=0.0),
        "clips_per_shard 0": replace(spec, clips_per_shard=0),
        "decode.processes 0": replace(spec, decode=DecodeSpec(processes=0)),
        "frames_per_batch 0": replace(spec, frames_per_batch=0),
        "size 36, expected a multiple": replace(spec, output=str(tmp_path / "odd"), size=36),
    }
    for sentence, bad in cases.items():
        with pytest.raises(UserError, match=sentence) as caught:
            prepare(bad)
        assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert not storage.exists(str(tmp_path / "out" / "manifest.json"))


def test_real_clips_are_encoded_or_counted_as_too_short(tiny_base: Path, real_clips: Path, tmp_path: Path) -> None:
    report = prepare(spec_for(str(real_clips), tiny_base, tmp_path))
    assert (report.rows, report.encoded, report.failed) == (25, 5, {"too_short": 20})


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
