"""The filters: each rejects its fault, accepts similar clips, and every row stays accounted for."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flows.recipes import find_recipe
from tasks.curate.duplicates import deduplicate
from tasks.curate.verify import problems
from tasks.encode.filters import REASONS, SCORERS, SCORES, Screen, picture_hash, read_measured, scores
from tasks.encode.fingerprint import check_spec
from tasks.encode.job import prepare
from tasks.encode.spec import FilterSpec, PrepareReport, PrepareSpec
from tasks.ingest.spec import SourceSpec
from tasks.records import UserError
from tasks.shards import ShardDataset
from tasks.video.decode import Clip, ClipError, read_windows
from trip_model.images import video_bytes

BOUNDS = find_recipe("paper-filtered").prepare.filters
INFO = {"width": 640, "height": 360, "pixel_aspect": 1.0}
SIDE, FRAMES = 64, 16


def scene(seed: int, side: int = SIDE) -> np.ndarray:
    """A picture with coarse and fine parts, in its own colours: uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    tint = rng.uniform(0.5, 1.0, 3)
    layers = [rng.integers(0, 256, (side // size, side // size, 3), dtype=np.uint8) for size in (21, 7)]
    coarse, fine = (Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC) for layer in layers)
    return ((0.65 * np.asarray(coarse) + 0.35 * np.asarray(fine)) * tint).astype(np.uint8)


def still(picture: np.ndarray, frames: int = FRAMES) -> np.ndarray:
    return np.repeat(picture[None], frames, axis=0)


def pan(seed: int, step: int, frames: int = FRAMES) -> np.ndarray:
    """A camera that moves `step` pixels a frame over a wide scene, to and fro."""
    wide = scene(seed, 5 * SIDE)
    lefts = np.abs((np.arange(frames) * step + 4 * SIDE) % (8 * SIDE) - 4 * SIDE)
    return np.stack([wide[SIDE : 2 * SIDE, left : left + SIDE] for left in lefts])


def flight(seed: int, side: int, step: int) -> np.ndarray:
    """A red square that flies through a scene, `step` pixels a frame, again and again."""
    pixels = still(scene(seed)).copy()
    for frame, picture in enumerate(pixels):
        left = (frame * step) % (SIDE + 2 * side) - side
        picture[8 : 8 + side, max(left, 0) : max(left + side, 0)] = (230, 40, 30)
    return pixels


def fade(pixels: np.ndarray, frames: int, plain: int = 0) -> np.ndarray:
    """The same, fading in from a plain gray over the first frames."""
    weight = np.clip(np.arange(len(pixels)) / frames, 0, 1)[:, None, None, None]
    return (pixels * weight + plain * (1 - weight)).astype(np.uint8)


def noisy(pixels: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def reason(pixels: np.ndarray, bounds: FilterSpec = BOUNDS, **info: Any) -> str:
    """Why a window of these frames is left out, "" when it is kept."""
    measured = [scores(pixels, INFO | info), picture_hash(pixels)]
    try:
        Screen(bounds)([Clip(pixels, np.zeros(len(pixels), np.float32), {"measured": measured})])
    except ClipError as error:
        return error.reason
    return ""


SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_moves_is_kept_however_it_moves(seed: int) -> None:
    for step in (1, 4, 16, 40):
        assert reason(pan(seed, step)) == "", step
    for side, step in ((8, 3), (16, 10), (32, 30)):
        assert reason(flight(seed, side, step)) == "", (side, step)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_still_picture_is_near_static_under_noise_too(seed: int) -> None:
    for deviation in (0, 1.5):
        assert reason(noisy(still(scene(seed)), deviation)) == "near_static", deviation


@pytest.mark.parametrize("seed", SEEDS)
def test_a_start_in_the_dark_or_in_a_fade_is_distinguished_from_a_dim_scene(seed: int) -> None:
    moving = pan(seed, 4)
    assert reason(fade(moving, 4, 0)) == "dark_start"
    assert reason(np.concatenate([np.zeros_like(moving[:1]), moving])) == "dark_start"
    for plain in (128, 255):
        assert reason(fade(moving, 4, plain)) == "faded_start"
    assert reason((moving * 0.5).astype(np.uint8)) == ""
    assert reason(fade(moving, 4, 0)[::-1]) == "", "a fade at the end is no start"


@pytest.mark.parametrize("level", [255, 128, 60])
def test_a_plain_clip_is_static_and_no_fade(level: int) -> None:
    assert reason(np.full((FRAMES, SIDE, SIDE, 3), level, np.uint8)) == "near_static"
    assert reason(noisy(np.full((FRAMES, SIDE, SIDE, 3), level), 1)) == "near_static"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cut_is_found_wherever_it_is(seed: int) -> None:
    for at in (1, 2, 8, 14, 15):
        for one, other in (
            (still(scene(seed)), still(scene(seed + 50))),
            (pan(seed, 4), flight(seed + 50, 16, 10)),
        ):
            assert reason(np.concatenate([one[:at], other[at:]])) == "hard_cut", at


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dissolve_a_flash_and_a_fade_are_no_cuts(seed: int) -> None:
    bounds = FilterSpec(most_cut=BOUNDS.most_cut)
    one, other = pan(seed, 2), pan(seed + 50, 2)
    for frames in (4, 8):
        weight = np.clip((np.arange(FRAMES) - 4) / frames, 0, 1)[:, None, None, None]
        assert reason((one * (1 - weight) + other * weight).astype(np.uint8), bounds) == "", frames
        assert reason(fade(one, frames), bounds) == ""
    flash = one.copy()
    flash[7] = 255
    assert reason(flash, bounds) == ""


def barred(pixels: np.ndarray, top: int, bottom: int, left: int = 0, right: int = 0) -> np.ndarray:
    pixels = pixels.copy()
    height, width = pixels.shape[1:3]
    pixels[:, :top] = pixels[:, height - bottom :] = 16
    pixels[:, :, :left] = pixels[:, :, width - right :] = 16
    return pixels


@pytest.mark.parametrize("seed", SEEDS)
def test_bars_are_distinguished_from_dark_parts_of_a_picture(seed: int) -> None:
    moving = np.maximum(pan(seed, 4), 60)
    assert reason(barred(moving, 8, 8)) == "letterbox"
    assert scores(barred(moving, 8, 8), INFO)["bars"] == 0.25
    assert reason(noisy(barred(moving, 0, 0, 6, 6), 3)) == "letterbox"
    assert reason(barred(moving, 8, 0)) == "", "on one side alone"
    before_black = np.zeros_like(moving)
    before_black[:, 16:48, 16:36] = moving[:, 16:48, 16:36]
    assert scores(before_black, INFO)["bars"] == 0, "a thing before a black wall"
    assert scores(np.zeros_like(moving), INFO)["bars"] == 0


def test_a_small_video_is_recognised_by_its_displayed_side() -> None:
    moving = pan(0, 4)
    assert reason(moving, width=320, height=240) == "low_resolution"
    assert reason(moving, width=240, height=320, pixel_aspect=1.1) == ""
    assert scores(moving, INFO)["side"] == 360


def test_another_encoding_of_a_clip_has_nearly_its_hash_and_another_clip_has_not() -> None:
    def bits(one: str | None, other: str | None) -> int:
        assert one is not None and other is not None
        return (int(one, 16) ^ int(other, 16)).bit_count()

    clips = [pan(seed, 4) for seed in SEEDS]
    hashes = [picture_hash(clip) for clip in clips]
    for clip, one in zip(clips, hashes, strict=True):
        [again] = read_windows(video_bytes(clip, 4.0, crf=28), FRAMES, 4.0, 32)
        darker = (clip * 0.8).astype(np.uint8)
        assert bits(one, picture_hash(again.pixels)) <= 4 and bits(one, picture_hash(darker)) <= 4
    assert min(bits(a, b) for a in hashes for b in hashes if a != b) > 12 and len(set(hashes)) == len(SEEDS)
    assert picture_hash(still(np.full((SIDE, SIDE, 3), 90, np.uint8))) is None


def test_the_windows_that_pass_record_why_the_others_were_dropped() -> None:
    good, cut = pan(0, 4), np.concatenate([pan(1, 1)[:8], pan(60, 1)[8:]])
    video = video_bytes(np.concatenate([cut, good, still(scene(2))]), 4.0, crf=10)
    clips = read_measured(video, num_frames=FRAMES, fps=4.0, size=SIDE, windows=3)
    [window] = Screen(replace(BOUNDS, least_side=SIDE))(clips)
    assert window.position == 1 and list(window.meta["scores"]) == list(SCORES)
    assert window.meta["scores"] == scores(window.clip.pixels, window.clip.info)
    assert window.meta["picture_hash"] == picture_hash(window.clip.pixels)
    assert [line.split(":")[0] for line in window.meta["dropped"].values()] == ["hard_cut", "near_static"]
    assert window.clip.info == read_windows(video, FRAMES, 4.0, SIDE, 3)[1].info
    with pytest.raises(ClipError, match=r"hard_cut: cut 0.*, expected at most 0.*; none of 2 windows passes"):
        Screen(replace(BOUNDS, least_side=SIDE))([clips[0], clips[2]])


@pytest.mark.parametrize("info", [{}, {"measured": 1}, {"measured": [{}, None]}, {"measured": [{"side": "x"}, "0"]}])
def test_a_decoder_that_measures_nonsense_costs_one_row(info: dict[str, Any]) -> None:
    with pytest.raises(ClipError, match="decoder_crash"):
        Screen(BOUNDS)([Clip(pan(0, 4), np.zeros(FRAMES, np.float32), info)])


def test_the_named_scorer_decides_what_a_watermark_is() -> None:
    bounds = FilterSpec(most_watermark=0.5, watermark_scorer="tests.support.scorers:white_corner")
    marked = pan(0, 4).copy()
    marked[:, -8:, -8:] = 255
    assert reason(marked, bounds) == "watermark" and marked.any() and reason(pan(0, 4), bounds) == ""
    assert reason(marked, replace(bounds, most_watermark=None)) == "", "scored alone"


@pytest.mark.parametrize(
    ("scorer", "sentence"),
    [
        ("tests.support.scorers:fails", "scorers:fails failed .RuntimeError: no weights.; fix it"),
        ("tests.support.scorers:far_off", "scorers:far_off returned 1.5, expected a number from 0 to 1"),
        ("tests.support.scorers:says_nothing", "says_nothing failed .TypeError"),
        ("tests.support.scorers:nobody", "scorers:nobody cannot be imported .AttributeError"),
        ("tests.support.nowhere:score", "nowhere:score cannot be imported .ModuleNotFoundError"),
    ],
)
def test_a_fault_of_the_scorer_stops_the_stage_with_its_name(scorer: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        reason(pan(0, 4), FilterSpec(most_watermark=0.5, watermark_scorer=scorer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (FilterSpec(most_cut=2), "filters.most_cut 2, expected a number from 0 to 1"),
        (FilterSpec(least_side=-1), "filters.least_side -1, expected a number from 0 to 100000"),
        (FilterSpec(least_motion=float("nan")), "filters.least_motion nan"),
        (FilterSpec(most_watermark=0.5), "most_watermark needs a scorer"),
        (FilterSpec(watermark_scorer="import os"), "'import os', expected module:function"),
        (FilterSpec(most_unsafe=0.5), "most_unsafe needs a scorer"),
        (FilterSpec(unsafe_scorer="x"), "unsafe_scorer 'x', expected module:function"),
    ],
)
def test_a_bound_that_no_score_can_have_is_refused(filters: FilterSpec, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_spec(PrepareSpec(filters=filters))


def test_every_reason_has_a_bound_and_every_bound_a_score() -> None:
    bounds = {name for name in FilterSpec.__dataclass_fields__ if not name.endswith("_scorer")}
    assert set(REASONS.values()) == bounds
    assert {name.split("_")[1] for name in bounds} == {*SCORES, *SCORERS}


def write_clips(folder: Path, clips: dict[str, np.ndarray]) -> str:
    folder.mkdir()
    for name, pixels in clips.items():
        (folder / f"{name}.mp4").write_bytes(video_bytes(pixels, 4.0, crf=10))
        (folder / f"{name}.txt").write_text(f"a clip, {name}")
    return str(folder)


CLIPS = {
    "a": np.concatenate([pan(1, 4), pan(1, 1)[:8], pan(60, 1)[8:]]),
    "b": still(scene(2)),
    "c": fade(pan(3, 4), 4),
    "d": flight(4, 16, 10),
    "e": noisy(pan(1, 4), 2),
    "f": pan(5, 4),
}


def prepared(folder: str, base: Path, output: Path, filters: FilterSpec) -> PrepareReport:
    return prepare(
        PrepareSpec(
            SourceSpec(folder),
            str(output),
            str(base),
            size=32,
            windows_per_clip=2,
            filters=filters,
            clips_per_shard=2,
            workers=0,
        )
    )


def test_rejected_windows_stay_accounted_for(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", CLIPS)
    bounds = replace(BOUNDS, least_side=32)
    off, on = (prepared(folder, tiny_base, tmp_path / name, f) for name, f in (("off", FilterSpec()), ("on", bounds)))
    assert (off.failed, off.samples) == ({}, 7)
    assert on.failed == {"dark_start": 1, "near_static": 1} and (on.encoded, on.samples) == (4, 4)
    assert off.recipe_hash != on.recipe_hash and list(problems(on.dataset)) == []
    data, every = ShardDataset(on.dataset), ShardDataset(off.dataset)
    assert "filters" not in every.published.recipe
    assert data.published.recipe["filters"] == bounds.chosen() | {"version": 2}
    assert data.keys == ["a_000", "d_000", "e_000", "f_000"]
    for i, key in enumerate(data.keys):
        meta = data.read(i, ("meta",))["meta"]
        said = {name: meta.pop(name) for name in ("scores", "picture_hash", "dropped")}
        assert meta == every.read(every.keys.index(key), ("meta",))["meta"]
        assert said["scores"]["motion"] >= BOUNDS.least_motion and list(said["dropped"]) == (["1"] if i == 0 else [])


def test_a_later_clip_that_shows_the_same_is_removed_and_stays_so(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "clips", CLIPS)
    output, bounds = tmp_path / "set", replace(BOUNDS, least_side=32)
    prepared(folder, tiny_base, output, bounds)
    removal = deduplicate(str(output))
    assert (removal.rows, removal.samples, removal.shards) == (1, 1, 1) and list(problems(str(output))) == []
    data = ShardDataset(str(output))
    assert data.keys == ["a_000", "d_000", "f_000"] and data.published.failed["duplicate"] == 1
    again = prepared(folder, tiny_base, output, bounds)
    assert again.failed == {"dark_start": 1, "duplicate": 1, "near_static": 1}
    assert again.manifest_sha == removal.manifest_sha == deduplicate(str(output)).manifest_sha
    with pytest.raises(UserError, match="contains no hashes of its clips"):
        deduplicate(prepared(folder, tiny_base, tmp_path / "off", FilterSpec()).dataset)


def test_of_the_real_clips_the_filters_find_what_is_there_and_no_more(real_clips: Path) -> None:
    found: dict[str, list[str]] = {}
    with real_clips.open(newline="") as table:
        rows = list(csv.DictReader(table))
    for row in rows:
        signs = row["videoid"].startswith("2")  # these are shorter than 16 frames
        data = (real_clips.parent / row["contentUrl"]).read_bytes()
        for clip in read_windows(data, 6 if signs else 16, 4.0, 64, 8):
            for name, bound in ((name, bound) for name, bound in REASONS.items() if getattr(BOUNDS, bound) is not None):
                if reason(clip.pixels, FilterSpec(**{bound: getattr(BOUNDS, bound)}), **clip.info):
                    found.setdefault(f"{row['videoid']} {clip.info['window']}", []).append(name)
    assert found == {
        "1002 0": ["dark_start", "faded_start"],
        "1002 3": ["hard_cut"],
        "1002 5": ["hard_cut"],
        "1004 0": ["near_static"],
        "1004 5": ["near_static"],
        "1005 0": ["near_static"],
    }
