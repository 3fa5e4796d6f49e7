"""Tracks: their windows have the bits of the windows mode, and training draws them by sample and seed only."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage
from tasks.curate.forget import forget
from tasks.curate.samples import SampleChecker
from tasks.curate.verify import problems
from tasks.encode.fingerprint import fingerprint_of
from tasks.encode.job import prepare
from tasks.encode.spec import FilterSpec, PrepareSpec
from tasks.evaluate.generate import real_pixels
from tasks.evaluate.protocol.protocol import held_out_protocol
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError
from tasks.shards import OPTIONAL, Sample, ShardDataset, publish_dataset, write_shard
from tasks.train.loader import TrainingData
from tasks.train.loop import run_training
from tasks.train.preflight import preflight
from tasks.train.spec import TrainSpec, spec_digest
from trip_model.config import FusionConfig, ScheduleConfig, TripConfig
from trip_model.encoders import encode_posterior, load_text_encoder, load_vae
from trip_model.images import video_bytes

FRAMES = 4
LENGTHS = {"long": 23, "cut": 12, "exact": 4, "short": 3, "more": 9}
ALL_KEPT = {"clip": "track", "keep_pixels": True, "keep_logvar": True, "keep_text": True}


def moving(frames: int, seed: int) -> np.ndarray:
    """A smooth picture that moves by two pixels a frame: uint8 [F, 32, 32, 3]."""
    wave = np.sin(np.arange(32 + 2 * frames) / (6 + seed)) * 30 + 60
    return np.stack([np.broadcast_to(wave[2 * k : 2 * k + 32, None], (32, 32, 3)) for k in range(frames)]).astype("u1")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of captioned videos with a frame for each point of a grid of 4 a second; `cut` has a cut after 6."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, (name, frames) in enumerate(LENGTHS.items()):
        pixels = moving(frames, seed)
        if name == "cut":
            pixels[6:] = 255 - moving(frames, 40)[6:].swapaxes(1, 2)
        (folder / f"{name}.mp4").write_bytes(video_bytes(pixels, 4.0, crf=10))
        (folder / f"{name}.txt").write_text(f"a wave, {name}")
    return str(folder)


def spec_for(clips: str, base: Path, output: Path | str, **changes: Any) -> PrepareSpec:
    spec = PrepareSpec(SourceSpec(clips), str(output), str(base), num_frames=FRAMES, size=32, frames_per_batch=FRAMES)
    return replace(spec, clips_per_shard=2, workers=0, **changes)


@pytest.fixture(scope="module")
def tracks(clips: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of tracks with everything that can be kept."""
    return prepare(spec_for(clips, tiny_base, tmp_path_factory.mktemp("tracks") / "set", **ALL_KEPT)).dataset


def by_key(dataset: str) -> dict[str, dict[str, Any]]:
    data = ShardDataset(dataset)
    return {key: data.read(i, data.fields(i)) for i, key in enumerate(data.keys)}


def test_a_recipe_names_what_is_on_and_only_that(tiny_base: Path, clips: str) -> None:
    plain = fingerprint_of(spec_for(clips, tiny_base, "x"))
    assert plain["latents"] == "posterior mean, float16, unscaled" and plain["windows_per_clip"] == 1
    assert not {"clip", "longest_track", "text_encoder_sha256"} & set(plain)
    assert fingerprint_of(spec_for(clips, tiny_base, "x", longest_track=99)) == plain, "of no meaning for windows"
    track = fingerprint_of(spec_for(clips, tiny_base, "x", clip="track", windows_per_clip=7))
    assert track == fingerprint_of(spec_for(clips, tiny_base, "x", clip="track")), "of no meaning for tracks"
    assert {name: track.get(name) for name in {*track} ^ {*plain}} == {
        "windows_per_clip": None,
        "clip": "track",
        "longest_track": 240,
    }
    kept = fingerprint_of(spec_for(clips, tiny_base, "x", keep_logvar=True, keep_text=True))
    assert {name for name in {*kept, *plain} if kept.get(name) != plain.get(name)} == {"latents", "text_encoder_sha256"}


def test_windows_are_the_frames_of_the_track_to_the_last_bit(
    tiny_base: Path, clips: str, tracks: str, tmp_path: Path
) -> None:
    windows = by_key(
        prepare(spec_for(clips, tiny_base, tmp_path, windows_per_clip=9, keep_pixels=True, keep_logvar=True)).dataset
    )
    stored = by_key(tracks)
    assert {key: len(sample["latents"]) for key, sample in stored.items()} == {
        f"{name}_000": frames for name, frames in LENGTHS.items() if frames >= FRAMES
    }
    assert len(windows) == sum(frames // FRAMES for frames in LENGTHS.values())
    assert ShardDataset(tracks).published.failed == {"too_short": 1}
    for key, window in windows.items():
        clip, place = key.rsplit("_", 1)
        frames = slice(int(place) * FRAMES, (int(place) + 1) * FRAMES)
        for name in ("latents", "logvar", "pixels"):
            np.testing.assert_array_equal(window[name], stored[f"{clip}_000"][name][frames])
        assert window["meta"]["times"] == stored[f"{clip}_000"]["meta"]["times"][frames]


def test_what_is_kept_is_what_the_encoders_give_and_is_verified(tiny_base: Path, tracks: str) -> None:
    assert list(problems(tracks)) == []
    sample = by_key(tracks)["exact_000"]
    mean, logvar = encode_posterior(load_vae(tiny_base), sample["pixels"], FRAMES)
    encoder = load_text_encoder(tiny_base)
    text = encoder.encode(torch.from_numpy(sample["tokens"].astype(np.int64))[None])[0]
    for name, want in (("latents", mean), ("logvar", logvar), ("text", text)):
        assert sample[name].dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(sample[name]).float(), want, rtol=2**-11, atol=1e-6)
    kept = Sample(sample["key"], *(sample[name] for name in ("caption", "latents", "first", "tokens", "meta")))
    for change, problem in (
        ({"logvar": sample["logvar"][1:]}, "their log variance of"),
        ({"logvar": sample["logvar"].astype(np.float32)}, "float32 of 4 dimensions, expected float16"),
        ({"text": sample["text"][1:]}, "text features of"),
        ({"text": sample["text"] * np.float16(np.inf)}, "not finite"),
    ):
        [found] = SampleChecker({}).problems(replace(kept, **change).pack())
        assert problem in found


def test_the_removal_of_a_track_removes_all_its_fields(tiny_base: Path, clips: str, tmp_path: Path) -> None:
    spec = spec_for(clips, tiny_base, tmp_path / "set", **ALL_KEPT)
    before = by_key(prepare(spec).dataset)
    forget(spec.output, ["long"])
    after = by_key(spec.output)
    assert list(problems(spec.output)) == [] and prepare(spec).failed == {"forgotten": 1, "too_short": 1}
    assert set(after) == set(before) - {"long_000"} and set(OPTIONAL) < set(after["more_000"])
    for key, sample in after.items():
        for name in OPTIONAL:
            np.testing.assert_array_equal(sample[name], before[key][name])


def test_a_long_track_is_truncated_and_its_meta_records_it(tiny_base: Path, clips: str, tmp_path: Path) -> None:
    stored = by_key(prepare(spec_for(clips, tiny_base, tmp_path, clip="track", longest_track=12)).dataset)
    said = {
        key: (len(sample["latents"]), sample["meta"]["decoder"].get("cut_off_at")) for key, sample in stored.items()
    }
    assert said == {"long_000": (12, 12), "cut_000": (12, None), "exact_000": (4, None), "more_000": (9, None)}


def test_a_cut_anywhere_leaves_the_track_out(tiny_base: Path, clips: str, tmp_path: Path) -> None:
    filters = FilterSpec(most_cut=0.35)
    track = prepare(spec_for(clips, tiny_base, tmp_path / "track", clip="track", filters=filters))
    assert track.failed == {"hard_cut": 1, "too_short": 1}
    data = ShardDataset(track.dataset)
    assert data.keys == ["exact_000", "long_000", "more_000"]
    assert "cut" in data.read(1, ("meta",))["meta"]["scores"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"clip": "whole"}, "clip 'whole', expected 'windows', 'track' or 'shots'"),
        ({"longest_track": 3}, "longest_track 3, exp"),
    ],
)
def test_a_clip_of_no_kind_is_one_sentence(tiny_base: Path, clips: str, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fingerprint_of(spec_for(clips, tiny_base, "x", **({"clip": "track"} | change)))


def test_some_frames_are_read_without_the_others(uri: str) -> None:
    data = ShardDataset(drawn_tracks(uri, [9, 4, 30]))
    for i, count in enumerate((9, 4, 30)):
        assert data.num_frames(i) == count
        whole = data.read(i, ("latents", "tokens"))
        part = data.read(i, ("latents", "tokens"), (1, 4))
        np.testing.assert_array_equal(part["latents"], whole["latents"][1:4])
        np.testing.assert_array_equal(part["tokens"], whole["tokens"])
        for wrong in ((-1, 2), (2, 2), (0, count + 1)):
            with pytest.raises(IndexError, match=f"of {count}"):
                data.read(i, ("latents",), wrong)


def drawn_tracks(uri: str, lengths: list[int]) -> str:
    """A published data set of random tracks, latents and log variance, a frame's first latent being its number."""
    rng = np.random.default_rng(0)
    rows: list[list[Sample]] = []
    for row, frames in enumerate(lengths):
        latents, logvar = rng.normal(size=(2, frames, 4, 4, 4)).astype(np.float16)
        latents[:, 0, 0, 0] = np.arange(frames)
        first, tokens = np.zeros((32, 32, 3), np.uint8), np.full(32, row, np.int32)
        rows.append([Sample(f"clip{row}_000", "a wave", latents, first, tokens, {}, logvar=logvar - 4)])
    shard = write_shard(uri, 0, (0, len(rows)), rows, "hash")
    publish_dataset(uri, {}, "hash", {}, [shard.summary()])
    return uri


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return ShardDataset(drawn_tracks(str(tmp_path_factory.mktemp("drawn")), [4, 5, 7, 30, 12, 4, 9]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**7), st.sampled_from([1, 2, 3, 6]), st.booleans())
def test_a_window_depends_only_on_seed_and_place(
    drawn: ShardDataset, seed: int, step: int, world: int, sample_posterior: bool
) -> None:
    data = TrainingData(drawn, 0.2, seed, FRAMES, sample_posterior)
    data.batch(step // 2, 6)  # whatever was read before
    whole = data.batch(step, 6)
    resumed = TrainingData(drawn, 0.2, seed, FRAMES, sample_posterior)
    parts = [resumed.batch(step, 6, rank, world) for rank in range(world)]
    assert whole.keys == sum((part.keys for part in parts), ())
    assert torch.equal(whole.raw_latents_BFCHW, torch.cat([part.raw_latents_BFCHW for part in parts]))
    for key, latents in zip(whole.keys, whole.raw_latents_BFCHW, strict=True):
        if not sample_posterior:
            start = int(latents[0, 0, 0, 0])
            assert 0 <= start <= drawn.num_frames(drawn.keys.index(key)) - FRAMES
            assert latents[:, 0, 0, 0].tolist() == list(range(start, start + FRAMES))


def test_an_epoch_has_each_track_once_and_in_time_every_start(drawn: ShardDataset) -> None:
    data = TrainingData(drawn, 0.2, 3, FRAMES)
    count = len(data.samples)
    seen: dict[str, set[int]] = {}
    for epoch in range(60):
        batch = data.batch(epoch, count)
        assert len(set(batch.keys)) == count
        for key, latents in zip(batch.keys, batch.raw_latents_BFCHW, strict=True):
            seen.setdefault(key, set()).add(int(latents[0, 0, 0, 0]))
    for key, starts in seen.items():
        frames = drawn.num_frames(drawn.keys.index(key))
        assert starts == set(range(frames - FRAMES + 1)) or (frames == 30 and len(starts) > 18)


def test_drawn_latents_have_the_mean_and_deviation_of_the_posterior(drawn: ShardDataset) -> None:
    drawing = TrainingData(drawn, 0.2, 3, FRAMES, sample_posterior=True)
    index = drawn.keys.index("clip0_000")  # its one window is all of it
    stored = {name: torch.from_numpy(value).float() for name, value in drawn.read(index, ("latents", "logvar")).items()
              if name != "key"}  # fmt: skip
    draws = drawing._read([index] * 600, range(600), range(600)).raw_latents_BFCHW
    score = (draws - stored["latents"]) / torch.exp(0.5 * stored["logvar"])
    assert abs(score.mean().item()) < 0.02 and abs(score.std().item() - 1) < 0.02
    assert len({draw.sum().item() for draw in draws}) == 600


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"num_frames": 13}, r"contains a clip of \d+ frames, 13 are trained on"),
        ({"stored_text": True}, "contains no text; prepare it with keep_text, or train without"),
    ],
)
def test_what_a_data_set_cannot_give_is_one_sentence(drawn: ShardDataset, asked: dict[str, Any], sentence: str) -> None:
    options: dict[str, Any] = {"num_frames": FRAMES} | asked
    with pytest.raises(UserError, match=sentence):
        TrainingData(drawn, 0.2, 0, **options).measured_latents(99)


@pytest.fixture
def training(tracks: str, tiny_base: Path, tmp_path: Path) -> TrainSpec:
    model = TripConfig(
        size=32,
        num_frames=FRAMES,
        residual_std=(0.0, 0.5, 0.5, 0.5),
        fusion=FusionConfig(width=16, heads=2),
        schedule=ScheduleConfig(sampling_steps=2),
    )
    return TrainSpec(
        dataset=tracks, output=str(tmp_path / "run"), base=str(tiny_base), model=model, steps=4, global_batch=2,
        learning_rate_unet=1e-3, checkpoint_every=2, tick_every=1, sample_posterior=True, stored_text=True,
    )  # fmt: skip


def test_training_on_drawn_windows_resumes_bitwise(training: TrainSpec, tmp_path: Path) -> None:
    class Killed(Exception):
        """Stands for the end of the process."""

    def losses_of(spec: TrainSpec, last: int) -> list[float]:
        losses: list[float] = []

        def tick(values: dict[str, Any]) -> None:
            losses.append(values["loss"])
            if values["step"] == last:
                raise Killed

        with contextlib.suppress(Killed):
            run_training(spec, on_tick=tick)
        return losses

    whole = losses_of(training, 99)
    broken = replace(training, output=str(tmp_path / "broken"))
    assert losses_of(broken, 3)[:2] + losses_of(broken, 99) == whole
    assert (
        storage.read_json(f"{training.output}/model/trip.json")["provenance"]["latents"] == "drawn from the posterior"
    )
    computed = replace(training, output=str(tmp_path / "computed"), stored_text=False)
    np.testing.assert_allclose(losses_of(computed, 99), whole, rtol=1e-2)


def test_text_of_another_encoder_is_refused(training: TrainSpec, tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "text_encoder" / "more.txt").write_text("another")
    with pytest.raises(UserError, match="is not by the text encoder of"):
        preflight(replace(training, base=str(base)))


def test_what_is_read_of_a_sample_is_part_of_a_trainings_identity() -> None:
    spec = TrainSpec("d", "", "b")
    changed = [replace(spec, **{name: True}) for name in ("sample_posterior", "stored_text")]
    assert len({spec_digest(one) for one in (spec, *changed)}) == 3
    assert spec_digest(replace(spec, output="elsewhere", workers=4, micro_batch=1)) == spec_digest(spec)


def test_a_track_is_judged_by_its_first_window(tracks: str) -> None:
    data = ShardDataset(tracks)
    protocol = held_out_protocol(data, 1.0, 9, 0)
    assert protocol.frames == FRAMES
    for item in protocol.items:
        frames = real_pixels(data, item, protocol.frames)
        np.testing.assert_array_equal(frames, data.read(item.index, ("pixels",))["pixels"][:FRAMES])
